//! `millrace groups`: consumer groups, how far they have got, and where they are to go on.

mod delete;
mod describe;
mod list;
mod reset;

use clap::{Args, Subcommand};

use crate::Outcome;
use crate::connection::Connection;
use crate::failure::Failure;

/// List, describe, reset and delete consumer groups.
#[derive(Debug, Args)]
pub(crate) struct Groups {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(list::List),
    Describe(describe::Describe),
    Reset(Box<reset::Reset>),
    Delete(delete::Delete),
}

impl Groups {
    pub(crate) async fn run(self, connection: &Connection) -> Result<Outcome, Failure> {
        match self.command {
            Command::List(list) => list.run(connection).await,
            Command::Describe(describe) => describe.run(connection).await,
            Command::Reset(reset) => reset.run(connection).await,
            Command::Delete(delete) => delete.run(connection).await,
        }?;
        Ok(Outcome::Done)
    }
}
