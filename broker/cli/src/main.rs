//! `millrace`: produce, consume and look at topics from a terminal or a script.
//!
//! Responsible for arguments, input and output as people and pipes expect them, and messages that say what to do next. Not
//! responsible for anything about the log itself: `millrace-client` talks to brokers, `millrace-crds` knows what a Topic is.

mod backup;
mod bench;
mod completions;
mod connection;
mod consume;
mod copy;
mod failure;
mod groups;
mod interrupt;
mod output;
mod points;
mod print;
mod produce;
mod progress;
mod text;
mod topics;
mod transactions;
mod warnings;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::connection::Connection;
use crate::failure::Failure;

const AFTER_HELP: &str = "\
Examples:
  millrace topics list
  millrace produce orders --file orders.tsv --key-separator '\\t'
  millrace consume orders --from -10 --follow
  millrace consume orders --group billing
  millrace groups describe billing
  millrace topics create orders --partitions 6 | kubectl apply -f -

Exit codes:
  0    done
  1    failed: standard error says why
  2    wrong usage
  130  stopped by Ctrl-C or SIGTERM, after finishing what was begun";

/// Produce to, consume from and look at Millrace topics and consumer groups.
#[derive(Debug, Parser)]
#[command(name = "millrace", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Produce(Box<produce::Produce>),
    Consume(Box<consume::Consume>),
    Copy(Box<copy::Copy>),
    Export(backup::Export),
    Import(backup::Import),
    Topics(topics::Topics),
    Groups(groups::Groups),
    Transactions(transactions::Transactions),
    Bench(bench::Bench),
    Completions(completions::Completions),
}

/// How a command ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Interrupted,
}

fn main() -> ExitCode {
    match run(Cli::parse()) {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Interrupted) => ExitCode::from(interrupt::EXIT_CODE),
        Err(failure) => failure.report(),
    }
}

fn run(cli: Cli) -> Result<Outcome, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("can't start the async runtime").because(error))?;
    let outcome = runtime.block_on(async {
        match cli.command {
            Command::Produce(produce) => produce.run(&cli.connection).await,
            Command::Consume(consume) => consume.run(&cli.connection).await,
            Command::Topics(topics) => topics.run(&cli.connection).await,
            Command::Copy(copy) => copy.run(&cli.connection).await,
            Command::Export(export) => export.run(&cli.connection).await,
            Command::Import(import) => import.run(&cli.connection).await,
            Command::Groups(groups) => groups.run(&cli.connection).await,
            Command::Transactions(transactions) => transactions.run(&cli.connection).await,
            Command::Bench(bench) => bench.run(&cli.connection).await,
            Command::Completions(completions) => completions.run(),
        }
    });
    // Nothing that is still running matters: a thread may sit in a read from the terminal.
    runtime.shutdown_background();
    outcome
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
