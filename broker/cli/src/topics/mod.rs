//! `millrace topics`: what topics there are, and the documents that declare them.

mod create;
mod describe;
mod list;
mod offsets;

use clap::{Args, Subcommand};

use crate::Outcome;
use crate::connection::Connection;
use crate::failure::Failure;

/// List, describe and declare topics.
#[derive(Debug, Args)]
pub(crate) struct Topics {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(list::List),
    Describe(describe::Describe),
    Offsets(offsets::Offsets),
    Create(Box<create::Create>),
}

impl Topics {
    pub(crate) async fn run(self, connection: &Connection) -> Result<Outcome, Failure> {
        match self.command {
            Command::List(list) => list.run(connection).await,
            Command::Describe(describe) => describe.run(connection).await,
            Command::Offsets(offsets) => offsets.run(connection).await,
            Command::Create(create) => create.run(),
        }?;
        Ok(Outcome::Done)
    }
}
