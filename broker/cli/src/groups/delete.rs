//! `millrace groups delete`.

use clap::Args;

use crate::connection::Connection;
use crate::failure::Failure;

/// Forget a consumer group that has no members, and its offsets.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  millrace groups delete billing")]
pub(crate) struct Delete {
    /// The groups
    #[arg(required = true)]
    names: Vec<String>,
}

impl Delete {
    pub(super) async fn run(self, connection: &Connection) -> Result<(), Failure> {
        let client = connection.open().await?;
        for name in &self.names {
            client.delete_group(name).await?;
        }
        Ok(())
    }
}
