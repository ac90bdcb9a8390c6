//! What the nemesis works on: the brokers of one Cluster, wherever they run.

use std::path::PathBuf;

use anyhow::Result;
use millrace_e2e::leases::Leases;

use crate::plan::{Fault, Kind};

/// Brokers 0, 1, … that can be broken.
pub(crate) trait Target {
    /// What can break here.
    fn can_break(&self, kind: Kind) -> bool;

    /// Where clients find the brokers.
    fn bootstrap(&self) -> String;

    /// Begins a fault. Returns what went wrong with the brokers on the way.
    async fn begin(&mut self, fault: &Fault) -> Result<Vec<String>>;

    /// Ends it.
    async fn mend(&mut self, fault: &Fault) -> Result<()>;

    /// Starts again what has ended by itself, but for those that are to stay off. Returns what has ended.
    async fn restart_ended(&mut self, off: &[i32]) -> Result<Vec<String>>;

    /// What the brokers write to the API server.
    fn leases(&self) -> &Leases;

    /// Ends or freezes all brokers at a moment at which no client writes. Returns where the data of each is, if this machine has it.
    async fn end(&mut self) -> Result<Option<Vec<(i32, PathBuf)>>>;
}
