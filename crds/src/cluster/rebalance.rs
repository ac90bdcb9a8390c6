//! How partitions move between brokers.
//!
//! They move off brokers that are to go, and to where a topic's replication factor wants them, in any case: that was asked for.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// In `Manual` mode: approves the proposal whose id is its value, `status.rebalance.proposal`.
pub const APPROVAL_ANNOTATION: &str = "millrace.dev/rebalance";

/// How partitions are spread anew over brokers that were added.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rebalance {
    /// `Auto`: partitions move until brokers hold as many replicas as each other, of each topic and of all. `Manual`: that is proposed in
    /// `status.rebalance`, and done once the annotation `millrace.dev/rebalance` has the proposal's id.
    #[serde(default)]
    pub mode: RebalanceMode,

    /// How many partitions move at a time. Whoever copies one reads what its leader has, at the expense of producers and consumers.
    #[serde(default = "default_concurrency")]
    #[schemars(range(min = 1, max = 1000))]
    pub concurrency: i32,
}

/// Who decides that partitions are spread anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum RebalanceMode {
    /// The operator.
    #[default]
    Auto,
    /// A person.
    Manual,
}

impl Default for Rebalance {
    fn default() -> Self {
        Self {
            mode: RebalanceMode::default(),
            concurrency: default_concurrency(),
        }
    }
}

fn default_concurrency() -> i32 {
    20
}
