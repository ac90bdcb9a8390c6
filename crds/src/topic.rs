//! The `Topic` resource as it is written: nothing here is checked beyond its shape. [`crate::TopicConfig`] is what it means.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use crate::config::MAX_PARTITIONS;
use crate::quantity::{ByteQuantity, RETENTION_TIME_PATTERN, TIME_PATTERN};

/// Kafka's default for `log.retention.hours`, 168.
pub(crate) const DEFAULT_RETENTION_TIME: &str = "7d";
pub(crate) const DEFAULT_MAX_MESSAGE_BYTES: &str = "1MiB";
/// Kafka's default for `log.message.timestamp.after.max.ms` since version 4 (KIP-1030).
pub(crate) const DEFAULT_TIMESTAMP_AFTER_MAX: &str = "1h";

/// What a topic should be: how many partitions and replicas it has, and how long it keeps records.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "millrace.dev",
    version = "v1alpha1",
    kind = "Topic",
    plural = "topics",
    shortname = "mrt",
    category = "millrace",
    namespaced,
    derive = "PartialEq",
    doc = "A topic: a named log of records, split into partitions.",
    validation = Rule::new("has(self.spec.topicName) || self.metadata.name.size() <= 249")
        .message("metadata.name is longer than the 249 characters of a topic name: set spec.topicName"),
    printcolumn(name = "Partitions", type_ = "integer", json_path = ".spec.partitions"),
    printcolumn(name = "Replication", type_ = "integer", json_path = ".spec.replicationFactor"),
    printcolumn(name = "Retention", type_ = "string", json_path = ".spec.retention.time"),
    printcolumn(name = "Topic", type_ = "string", json_path = ".spec.topicName", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.minInSyncReplicas) || self.minInSyncReplicas <= self.replicationFactor")
        .message("minInSyncReplicas can't be more than replicationFactor: such a topic could never accept acks=all"),
    validation = Rule::new("self.partitions >= oldSelf.partitions")
        .message("partitions can only grow: records keep their places, so make a new topic to have fewer"),
    validation = Rule::new("has(self.topicName) == has(oldSelf.topicName) && (!has(self.topicName) || self.topicName == oldSelf.topicName)")
        .message("topicName can't change: make a new Topic")
)]
pub struct TopicSpec {
    /// The cluster that holds the topic. A standalone broker ignores it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_ref: Option<ClusterRef>,

    /// The topic's name for producers and consumers: 1 to 249 of `a-z A-Z 0-9 . _ -`, but neither `.` nor `..`. By default
    /// `metadata.name`. It can't change later.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 249), regex(pattern = r"^[a-zA-Z0-9._-]+$"))]
    #[x_kube(
        validation = Rule::new("self != '.' && self != '..'").message("a topic can't be named . or ..")
    )]
    pub topic_name: Option<String>,

    /// How many partitions the topic has: the most consumers of one group that can share it. It can only grow, and growing
    /// it moves keys to other partitions.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = MAX_PARTITIONS))]
    pub partitions: i32,

    /// How many brokers hold a copy of each partition.
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    pub replication_factor: i32,

    /// How many replicas must have a record before `acks=all` is answered. By default the cluster's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub min_in_sync_replicas: Option<i32>,

    /// How long records are kept. They are deleted as soon as one of the limits is passed.
    #[serde(default)]
    pub retention: Retention,

    /// The most bytes that one record batch may have after compression, such as `1MiB`.
    #[serde(
        default = "default_max_message_bytes",
        deserialize_with = "null_is_default"
    )]
    pub max_message_bytes: ByteQuantity,

    /// Whether records carry the producer's time (`CreateTime`) or the broker's at arrival (`LogAppendTime`).
    #[serde(default)]
    pub timestamp_type: TimestampType,

    /// With `CreateTime`: how far ahead of the broker's clock records may be stamped, such as `1h`; later ones are refused, since they
    /// would keep all that is before them from being deleted by age. Units: `ms s m h d w`.
    #[serde(default = "default_timestamp_after_max")]
    #[schemars(regex(pattern = TIME_PATTERN))]
    pub timestamp_after_max: String,
}

impl Default for TopicSpec {
    fn default() -> Self {
        Self {
            cluster_ref: None,
            topic_name: None,
            partitions: one(),
            replication_factor: one(),
            min_in_sync_replicas: None,
            retention: Retention::default(),
            max_message_bytes: default_max_message_bytes(),
            timestamp_type: TimestampType::default(),
            timestamp_after_max: default_timestamp_after_max(),
        }
    }
}

/// Names a `Cluster`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterRef {
    /// The `Cluster`'s name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// The `Cluster`'s namespace. By default the topic's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub namespace: Option<String>,
}

/// How long records are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Retention {
    /// Records older than this are deleted, such as `7d`, `12h`, `1d 12h`, or `forever` to keep them whatever their age. Units:
    /// `ms s m h d w`.
    #[serde(default = "default_retention_time")]
    #[schemars(regex(pattern = RETENTION_TIME_PATTERN))]
    pub time: String,

    /// The oldest records of a partition are deleted while it holds more bytes than this, such as `10GiB`. Absent: no
    /// limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<ByteQuantity>,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            time: default_retention_time(),
            bytes: None,
        }
    }
}

/// Whose clock a record's timestamp is from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum TimestampType {
    /// The producer's, when it made the record.
    #[default]
    CreateTime,
    /// The broker's, when it appended the record.
    LogAppendTime,
}

fn one() -> i32 {
    1
}

fn default_retention_time() -> String {
    DEFAULT_RETENTION_TIME.to_owned()
}

fn default_max_message_bytes() -> ByteQuantity {
    ByteQuantity::Text(DEFAULT_MAX_MESSAGE_BYTES.to_owned())
}

fn default_timestamp_after_max() -> String {
    DEFAULT_TIMESTAMP_AFTER_MAX.to_owned()
}

/// The schema of every int-or-string field says `nullable`, so the API server lets a null through.
fn null_is_default<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ByteQuantity, D::Error> {
    Option::deserialize(deserializer).map(|bytes| bytes.unwrap_or_else(default_max_message_bytes))
}

#[cfg(test)]
mod tests {
    use kube::core::cel::{validate_cel, validate_cel_update};

    use super::*;

    fn topic(spec: TopicSpec) -> Topic {
        Topic::new("orders", spec)
    }

    fn spec(change: impl FnOnce(&mut TopicSpec)) -> TopicSpec {
        let mut spec = TopicSpec::default();
        change(&mut spec);
        spec
    }

    #[test]
    fn the_api_server_refuses_what_can_never_work() {
        let long = "o".repeat(250);
        for (topic, accepted) in [
            (topic(TopicSpec::default()), true),
            (
                topic(spec(|s| s.topic_name = Some("Orders_1".into()))),
                true,
            ),
            (topic(spec(|s| s.topic_name = Some(".".into()))), false),
            (topic(spec(|s| s.topic_name = Some("..".into()))), false),
            (topic(spec(|s| s.min_in_sync_replicas = Some(1))), true),
            (topic(spec(|s| s.min_in_sync_replicas = Some(2))), false),
            (
                topic(spec(|s| {
                    s.replication_factor = 3;
                    s.min_in_sync_replicas = Some(2);
                })),
                true,
            ),
            (Topic::new(&long, TopicSpec::default()), false),
            (
                Topic::new(&long, spec(|s| s.topic_name = Some("short".into()))),
                true,
            ),
        ] {
            let verdict = validate_cel(&topic);
            assert_eq!(verdict.is_ok(), accepted, "{topic:?}: {verdict:?}");
        }
    }

    #[test]
    fn the_api_server_refuses_changes_that_would_lose_records() {
        let partitions = |n| spec(|s| s.partitions = n);
        let named = |name: &str| spec(|s| s.topic_name = Some(name.into()));
        for (old, new, accepted) in [
            (partitions(6), partitions(6), true),
            (partitions(6), partitions(12), true),
            (partitions(6), partitions(5), false),
            (named("a"), named("a"), true),
            (named("a"), named("b"), false),
            (named("a"), TopicSpec::default(), false),
            (TopicSpec::default(), named("a"), false),
        ] {
            let verdict = validate_cel_update(&topic(new.clone()), &topic(old.clone()));
            assert_eq!(verdict.is_ok(), accepted, "{old:?} to {new:?}: {verdict:?}");
        }
    }

    #[test]
    fn an_object_as_the_api_server_stores_it_is_read() {
        let stored = serde_json::json!({
            "apiVersion": "millrace.dev/v1alpha1",
            "kind": "Topic",
            "metadata": {"name": "orders"},
            "spec": {"maxMessageBytes": null, "fieldOfALaterVersion": 1, "retention": {"bytes": 10_737_418_240_i64}},
        });
        let read: Topic = serde_json::from_value(stored).unwrap();
        let expected = spec(|s| s.retention.bytes = Some(ByteQuantity::Number(10_737_418_240)));
        assert_eq!(read, topic(expected));
    }
}
