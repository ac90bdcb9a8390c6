//! `millrace-e2e`: breaks brokers at random under a constant load, and checks what producers and consumers saw.
//!
//! `soak` makes a history and checks it; `check` checks one that was kept. Both fail if something in it can't be. A run is told by its seed: which
//! faults come, how long they last and when follows from it, though not what the machine makes of them.

mod consumers;
mod copiers;
mod load;
mod nemesis;
mod plan;
mod pods;
mod processes;
mod producers;
mod replicas;
mod soak;
mod summary;
mod target;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use millrace_e2e::history;
use tokio::signal::unix::{SignalKind, signal};

/// Breaks Millrace's brokers at random under load, and checks what their clients saw.
#[derive(Parser)]
#[command(name = "millrace-e2e", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs brokers as processes on this machine, or as pods of a real Kubernetes, breaks them for a while, mends all, and checks the history.
    Soak(Box<soak::Options>),
    /// Checks a history that was kept.
    Check {
        /// The file.
        history: PathBuf,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Soak(options) => {
            let mut run = tokio::spawn(soak::soak(*options));
            tokio::select! {
                result = &mut run => result.unwrap_or_else(|error| Err(error.into())),
                stopped = stopped() => {
                    // Ends when the run has been dropped, and with it every process that it made.
                    run.abort();
                    let _ = run.await;
                    stopped
                }
            }
        }
        Command::Check { history } => check(&history),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("millrace-e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn check(path: &std::path::Path) -> Result<()> {
    let events = history::read(path)?;
    let verdict = history::check(&events);
    println!("{}", summary::faults(&events));
    println!("{}", summary::verdict(&verdict));
    if !verdict.violations.is_empty() {
        bail!("{} violations", verdict.violations.len());
    }
    Ok(())
}

async fn stopped() -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = tokio::signal::ctrl_c() => result?,
        _ = terminate.recv() => {}
    }
    bail!("stopped before the end; nothing was checked")
}
