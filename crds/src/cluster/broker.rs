//! The brokers' own settings: what a standalone broker takes as options, less what other fields of the Cluster say. A field that is absent
//! has the broker's default, which is declared there and nowhere else.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::quantity::{
    ByteQuantity, MAX_TIME_LENGTH, SHORT_TIME_PATTERN, TIME_PATTERN, size_between, size_in_cel,
    time_between,
};

/// The brokers' own settings. A change of any of them restarts the brokers, one at a time, which the operator does.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(format!(
        "!has(self.maxRequest) || !has(self.requestMemory) || {}.compareTo({}) <= 0",
        size_in_cel("self.maxRequest"), size_in_cel("self.requestMemory")
    )).message("maxRequest can't be more than requestMemory: such a request could never be received")
)]
pub struct BrokerConfig {
    /// Size of a write buffer, such as `16MiB`. Larger ones make reads of old data more sequential, smaller ones need less memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = size_between("writeBuffer", "1Mi", "4Gi"))]
    pub write_buffer: Option<ByteQuantity>,

    /// Write buffers at most: one that fills, the others on their way to disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 2, max = 64))]
    pub write_buffers: Option<i32>,

    /// A write buffer goes to disk after this time even if it is not full, so that retention can act on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_TIME_LENGTH), regex(pattern = TIME_PATTERN))]
    pub write_buffer_age: Option<String>,

    /// Memory for reads of old data and for file indexes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = size_between("blockCache", "1Mi", "1Ti"))]
    pub block_cache: Option<ByteQuantity>,

    /// Memory for the newest batches, from which consumers that keep up are served.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = size_between("tailCache", "1Mi", "1Ti"))]
    pub tail_cache: Option<ByteQuantity>,

    /// Memory for requests while they are received, and again for appends that wait for the writer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = size_between("requestMemory", "1Mi", "1Ti"))]
    pub request_memory: Option<ByteQuantity>,

    /// Memory for responses until they are sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = size_between("responseMemory", "1Mi", "1Ti"))]
    pub response_memory: Option<ByteQuantity>,

    /// The largest request.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = size_between("maxRequest", "64Ki", "1Gi"))]
    pub max_request: Option<ByteQuantity>,

    /// Connections to a broker at most; one more is closed at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 1_000_000))]
    pub max_connections: Option<i32>,

    /// Writes are refused while the volume has less than this free; reads go on.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = size_between("minFreeDisk", "64Mi", "1Ti"))]
    pub min_free_disk: Option<ByteQuantity>,

    /// How often retention looks for what to remove.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_TIME_LENGTH), regex(pattern = TIME_PATTERN))]
    pub retention_interval: Option<String>,

    /// An idempotent producer is forgotten if it has not written to a partition for this long.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_TIME_LENGTH), regex(pattern = TIME_PATTERN))]
    pub producer_expiration: Option<String>,

    /// A replica that has not had all of its leader's log at any time within so long, such as `10s`, is no longer in sync: `acks=all` does not wait for it any more
    /// (Kafka's `replica.lag.time.max.ms`). Shorter: a broker that is slow delays producers less. Longer: a pause costs it its place less often.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_TIME_LENGTH), regex(pattern = SHORT_TIME_PATTERN))]
    #[x_kube(validation = time_between("replicaLag", "2s", "1h"))]
    pub replica_lag: Option<String>,

    /// What a broker sends at most in a second, on average, to replicas that are not in sync, such as `50MiB`: those that move to another broker, and those that come
    /// back. They never are in sync if more than that is written. As much as it can if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = size_between("catchUpRate", "64Ki", "1Ti"))]
    pub catch_up_rate: Option<ByteQuantity>,

    /// How long clients may take to end their streams when a broker stops. What was accepted is finished in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_TIME_LENGTH), regex(pattern = TIME_PATTERN))]
    pub drain: Option<String>,

    /// What is logged. Like all settings it is read when a broker starts, so that a change restarts the brokers, one at a time.
    #[serde(default)]
    pub log: Log,
}

/// What is logged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Log {
    /// How much: a level, or levels by part, such as `info` or `info,millrace_broker::storage=debug`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[A-Za-z0-9_:=,]+$"))]
    pub level: Option<String>,

    /// `Json`: a JSON object in each line, for collectors. `Text`: for people.
    #[serde(default)]
    pub format: LogFormat,
}

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum LogFormat {
    /// JSON objects.
    #[default]
    Json,
    /// Text.
    Text,
}
