//! `millrace groups list`.

use clap::Args;
use millrace_client::{GroupState, GroupSummary};
use serde::Serialize;

use crate::connection::Connection;
use crate::failure::Failure;
use crate::print::{Printable, print};
use crate::text::Layout;

/// List all consumer groups.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  millrace groups list\n  millrace groups list -o name | xargs -n1 millrace groups describe"
)]
pub(crate) struct List {
    /// How to print
    #[arg(long, short = 'o', value_enum, default_value = "table")]
    output: Layout,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    group: String,
    state: &'static str,
    members: u32,
    epoch: i32,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Lines(Vec<Line>);

impl List {
    pub(super) async fn run(self, connection: &Connection) -> Result<(), Failure> {
        let groups = connection.open().await?.groups().await?;
        let lines = Lines(groups.into_iter().map(Line::from).collect());
        print(&lines, self.output)
    }
}

pub(super) fn state(state: GroupState) -> &'static str {
    match state {
        GroupState::Empty => "Empty",
        GroupState::Stable => "Stable",
        GroupState::Rebalancing => "Rebalancing",
    }
}

impl From<GroupSummary> for Line {
    fn from(group: GroupSummary) -> Self {
        Self {
            state: state(group.state),
            group: group.group,
            members: group.members,
            epoch: group.epoch,
        }
    }
}

impl Printable for Lines {
    fn columns(&self) -> &'static [&'static str] {
        &["group", "state", "#members", "#epoch"]
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let row = |line: &Line| {
            vec![
                line.group.clone(),
                line.state.to_owned(),
                line.members.to_string(),
                line.epoch.to_string(),
            ]
        };
        self.0.iter().map(row).collect()
    }

    fn names(&self) -> Vec<String> {
        self.0.iter().map(|line| line.group.clone()).collect()
    }
}
