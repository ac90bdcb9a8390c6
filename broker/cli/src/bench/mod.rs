//! `millrace bench`: quick figures of a broker as seen from here. Not a comparison: `e2e/bench` is for that.

mod consume;
mod latency;
mod load;
mod produce;
mod report;

use clap::{Args, Subcommand};

use crate::Outcome;
use crate::connection::Connection;
use crate::failure::Failure;

const AFTER_HELP: &str = "\
Examples:
  millrace bench produce events --records 5000000 --record-size 100
  millrace bench produce events --rate 20000 --duration 30s
  millrace bench consume events
  millrace bench latency events --rate 20000

They write records of random letters into the topic that they are given: give
them one of their own. On the broker's machine they share its processors.

With --rate, records are due at fixed times, whether or not earlier ones were
answered, and latency is counted from when a record was due: a broker that
stalls is charged for every record that had to wait.";

/// Measure throughput and latency.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Bench {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Produce(Box<produce::Produce>),
    Consume(consume::Consume),
    Latency(Box<latency::Latency>),
}

impl Bench {
    pub(crate) async fn run(self, connection: &Connection) -> Result<Outcome, Failure> {
        match self.command {
            Command::Produce(produce) => produce.run(connection).await,
            Command::Consume(consume) => consume.run(connection).await,
            Command::Latency(latency) => latency.run(connection).await,
        }?;
        Ok(Outcome::Done)
    }
}
