//! `millrace transactions`: transactional ids, and what they are doing; aborts one whose app is gone or hangs.

use clap::{Args, Subcommand};
use jiff::Timestamp;
use millrace_client::{Client, TransactionState, TransactionSummary};
use serde::Serialize;

use crate::Outcome;
use crate::connection::Connection;
use crate::failure::Failure;
use crate::print::{Printable, print};
use crate::text::Layout;

/// List and abort transactions.
#[derive(Debug, Args)]
pub(crate) struct Transactions {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(List),
    Abort(Abort),
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

/// Abort the open transaction of a transactional id: readers of committed records wait for it, at most until its time-out.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  millrace transactions abort copier-0\n\nIts app, if it lives, is told so with its next call, and may begin another transaction."
)]
struct Abort {
    /// The transactional id
    transactional_id: String,
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
        let client = connection.open().await?;
        let all = client.transactions().await?.into_iter();
        match self.command {
            Command::List(List { open, output }) => {
                let shown = all.filter(|summary| !open || summary.state != TransactionState::Idle);
                print(&Lines(shown.map(Line::from).collect()), output)?;
            }
            Command::Abort(Abort { transactional_id }) => {
                let mut all = all.filter(|summary| summary.transactional_id == transactional_id);
                abort(&client, &transactional_id, all.next()).await?;
            }
        }
        Ok(Outcome::Done)
    }
}

async fn abort(
    client: &Client,
    id: &str,
    found: Option<TransactionSummary>,
) -> Result<(), Failure> {
    let all = "`millrace transactions list` shows all";
    let found = found
        .ok_or_else(|| Failure::new(format!("there is no transactional id `{id}`")).hint(all))?;
    let why = match found.state {
        TransactionState::Open => None,
        TransactionState::Idle => Some("has no open transaction"),
        TransactionState::Committing => Some("has committed its transaction"),
        TransactionState::Aborting => Some("has aborted its transaction already"),
    };
    if let Some(why) = why {
        return Err(Failure::new(format!("transactional id `{id}` {why}")).hint(all));
    }
    client.abort_transaction(&found).await?;
    eprintln!("aborted the transaction of `{id}`");
    Ok(())
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
