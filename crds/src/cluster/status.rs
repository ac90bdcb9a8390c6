//! What is so of a Cluster, as the operator reports it.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::MAX_BROKERS;
use crate::conditions::MAX_CONDITIONS;

/// What is so of a Cluster.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterStatus {
    /// Whether all is well, and if not, why and what to do. Wait for `Ready`.
    #[serde(default)]
    #[schemars(length(max = MAX_CONDITIONS))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,

    /// The `metadata.generation` of the spec that the operator has acted on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// How many brokers there are, whatever their state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,

    /// How many of them are up and serve.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<i32>,

    /// The labels of the brokers' pods, for autoscalers.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub selector: Option<String>,

    /// The id of the broker that is controller; absent if none is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub controller: Option<i32>,

    /// Where apps in this Kubernetes connect first: `host:port`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub bootstrap_address: Option<String>,

    /// The version that all brokers run; during an upgrade the lowest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub version: Option<String>,

    /// How many topics there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topics: Option<i32>,

    /// How many partitions there are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions: Option<i32>,

    /// How many partitions have no leader, hence can be neither written nor read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions_offline: Option<i32>,

    /// How many partitions have fewer in-sync replicas than replicas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions_under_replicated: Option<i32>,

    /// How many partitions have fewer in-sync replicas than `acks=all` needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions_below_min_isr: Option<i32>,

    /// Partitions on their way to other brokers; absent if all are where they shall be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rebalance: Option<RebalanceStatus>,

    /// The brokers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_BROKERS))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["id".into()]))]
    pub brokers: Vec<BrokerState>,
}

/// Partitions on their way to other brokers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RebalanceStatus {
    /// What is done about them.
    pub state: RebalanceState,
    /// The proposal's id, in `Manual` mode: `kubectl annotate cluster NAME millrace.dev/rebalance=ID` approves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub proposal: Option<String>,
    /// How many partitions are to have other replicas, or another preferred leader, and are not there yet.
    pub partitions: i32,
    /// How many of them are moving now.
    pub moving: i32,
    /// How many have arrived.
    pub moved: i32,
    /// Since when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When all will have arrived if they go on as fast.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_end: Option<Time>,
}

/// What is done about partitions that are not where they shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum RebalanceState {
    /// A person has to approve it.
    Proposed,
    /// They move.
    Moving,
    /// More brokers must be up first.
    Waiting,
}

/// A broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BrokerState {
    /// Its id, as its volume says.
    pub id: i32,
    /// The id of what is on its volume. A new one means that the old records are gone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub store_id: Option<String>,
    /// The PersistentVolumeClaim.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub claim_name: Option<String>,
    /// The pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub pod_name: Option<String>,
    /// Its rack.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 63))]
    pub rack: Option<String>,
    /// What it does.
    pub state: BrokerPhase,
    /// How full its volume is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeState>,
}

/// How full a broker's volume is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VolumeState {
    /// Bytes of its file system.
    pub capacity_bytes: i64,
    /// How much is used of what can be: at 100 the broker refuses writes (`minFreeDisk`).
    #[schemars(range(min = 0, max = 100))]
    pub used_percent: i32,
    /// Whether the broker refuses writes now, for lack of space.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
    /// When it will be full if it fills as it did within the last hour; absent if that is not within 30 days.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_at: Option<Time>,
}

/// What a broker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum BrokerPhase {
    /// It starts.
    Starting,
    /// It serves.
    Serving,
    /// Its partitions move away, since it is to be removed.
    Draining,
    /// It is away.
    Down,
}
