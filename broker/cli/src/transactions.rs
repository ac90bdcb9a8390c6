//! `millrace transactions`: transactional ids, and what they are doing.

use clap::{Args, Subcommand};
use jiff::Timestamp;
use millrace_client::{TransactionState, TransactionSummary};
use serde::Serialize;

use crate::Outcome;
use crate::connection::Connection;
use crate::failure::Failure;
use crate::print::{Printable, print};
use crate::text::Layout;

/// List transactions.
#[derive(Debug, Args)]
pub(crate) struct Transactions {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(List),
}

/// List all transactional ids: who has a transaction open, since when, and where it writes to.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  millrace transactions list\n  millrace transactions list --open -o json"
)]
struct List {
    /// Only those with a transaction that has not ended
    #[arg(long)]
    open: bool,

    /// How to print
    #[arg(long, short = 'o', value_enum, default_value = "table")]
    output: Layout,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    transactional_id: String,
    state: &'static str,
    since: Option<String>,
    timeout_ms: u32,
    producer_id: i64,
    producer_epoch: i32,
    partitions: Vec<String>,
    groups: Vec<String>,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Lines(Vec<Line>);

impl Transactions {
    pub(crate) async fn run(self, connection: &Connection) -> Result<Outcome, Failure> {
        let Command::List(List { open, output }) = self.command;
        let all = connection.open().await?.transactions().await?;
        let all = all.into_iter();
        let shown = all.filter(|summary| !open || summary.state != TransactionState::Idle);
        print(&Lines(shown.map(Line::from).collect()), output)?;
        Ok(Outcome::Done)
    }
}

impl From<TransactionSummary> for Line {
    fn from(summary: TransactionSummary) -> Self {
        let since = summary.since_ms;
        let since = since.and_then(|ms| Timestamp::from_millisecond(ms).ok());
        let partitions = summary.partitions.into_iter();
        Self {
            transactional_id: summary.transactional_id,
            state: match summary.state {
                TransactionState::Idle => "Idle",
                TransactionState::Open => "Open",
                TransactionState::Committing => "Committing",
                TransactionState::Aborting => "Aborting",
            },
            since: since.map(|since| since.to_string()),
            timeout_ms: summary.timeout_ms,
            producer_id: summary.producer_id,
            producer_epoch: summary.producer_epoch,
            partitions: partitions
                .map(|(topic, partition)| format!("{topic}/{partition}"))
                .collect(),
            groups: summary.groups,
        }
    }
}

impl Printable for Lines {
    fn columns(&self) -> &'static [&'static str] {
        &[
            "transactional id",
            "state",
            "since",
            "#timeout ms",
            "#epoch",
            "partitions",
            "groups",
        ]
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let row = |line: &Line| {
            vec![
                line.transactional_id.clone(),
                line.state.to_owned(),
                line.since.clone().unwrap_or_default(),
                line.timeout_ms.to_string(),
                line.producer_epoch.to_string(),
                line.partitions.join(" "),
                line.groups.join(" "),
            ]
        };
        self.0.iter().map(row).collect()
    }

    fn names(&self) -> Vec<String> {
        let ids = self.0.iter().map(|line| line.transactional_id.clone());
        ids.collect()
    }
}
