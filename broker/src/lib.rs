//! The Millrace broker, from the bottom up, each module knowing only those before it: [`storage`] keeps record batches in RocksDB,
//! [`replication`] is the protocol of leaders and followers as pure state machines, [`partition`] hosts a replica with both,
//! [`fetching`] follows leaders on other brokers, [`directory`] knows topics by name and their leaders, [`topics`] fills it from files
//! for a broker that runs alone and [`coordination`] from Kubernetes Leases for one of several, [`observe`] shows what happens,
//! [`groups`] coordinates consumer groups, [`service`] is gRPC in front. `main` wires them. The batch format is the crate `millrace-record`, since clients make batches too.

#[macro_use]
mod mutation;

pub mod config;
pub mod coordination;
pub mod directory;
pub mod fetching;
mod groups;
pub mod observe;
pub mod partition;
pub mod replication;
pub mod service;
mod shards;
#[cfg(test)]
mod simulation;
pub mod storage;
pub mod topics;
mod transactions;

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch.
fn now_ms() -> i64 {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}
