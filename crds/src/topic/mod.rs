//! The `Topic` resource as it is written: nothing here is checked beyond its shape. [`crate::TopicConfig`] is what it means.
//!
//! The rules are in CEL, for the API server. Where one compares with what was, it looks at the old spec; of what the Cluster's
//! defaults have made of absent fields it can only look at the old status.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

mod status;

pub use status::{MAX_LISTED_PARTITIONS, PartitionState, TopicStatus};

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};

use crate::config::{MAX_PARTITIONS, MAX_REPLICATION_FACTOR};
use crate::names::{MAX_QUALIFIED_TOPIC_NAME, MAX_TOPIC_NAME};
use crate::quantity::{
    ByteQuantity, MAX_TIME_LENGTH, RETENTION_TIME_PATTERN, TIME_PATTERN, size_between,
};

/// Kafka's default for `log.retention.hours`, 168.
pub(crate) const DEFAULT_RETENTION_TIME: &str = "7d";
const DEFAULT_CLUSTER: &str = "main";
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
    status = "TopicStatus",
    derive = "PartialEq",
    doc = "A topic: a named log of records, split into partitions. It lives in its app's namespace and names its Cluster, which must \
           admit that namespace.",
    validation = Rule::new("has(self.spec.topicName) || self.metadata.name.size() <= 249")
        .message("metadata.name is longer than the 249 characters of a topic name: set spec.topicName"),
    validation = Rule::new(format!(
        "!has(self.spec.clusterRef.__namespace__) || \
         (has(self.spec.topicName) ? self.spec.topicName.size() : self.metadata.name.size()) <= {MAX_QUALIFIED_TOPIC_NAME}"
    )).message(format!(
        "the name of a topic in another namespace than its Cluster has at most {MAX_QUALIFIED_TOPIC_NAME} characters, since clients see \
         it with the namespace in front"
    ).as_str()),
    validation = Rule::new(
        "!has(self.spec.partitions) || has(oldSelf.spec.partitions) || !has(oldSelf.status) || \
         !has(oldSelf.status.partitions) || self.spec.partitions >= oldSelf.status.partitions"
    ).message("partitions can only grow, and the topic has more already (status.partitions): make a new Topic to have fewer"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Cluster", type_ = "string", json_path = ".spec.clusterRef.name"),
    printcolumn(name = "Partitions", type_ = "integer", json_path = ".status.partitions"),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".status.replicationFactor"),
    printcolumn(name = "Offline", type_ = "integer", json_path = ".status.partitionsOffline"),
    printcolumn(name = "Under-replicated", type_ = "integer", json_path = ".status.partitionsUnderReplicated"),
    printcolumn(name = "Retention", type_ = "string", json_path = ".spec.retention.time"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Topic", type_ = "string", json_path = ".status.topicName", priority = 1),
    printcolumn(name = "Cleanup", type_ = "string", json_path = ".spec.cleanupPolicy", priority = 1),
    printcolumn(name = "Deletion", type_ = "string", json_path = ".spec.deletionPolicy", priority = 1),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].reason"#, priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(self.minInSyncReplicas) || !has(self.replicationFactor) || self.minInSyncReplicas <= self.replicationFactor"
    ).message("minInSyncReplicas can't be more than replicationFactor: such a topic could never accept acks=all"),
    validation = Rule::new("!has(oldSelf.partitions) || (has(self.partitions) && self.partitions >= oldSelf.partitions)")
        .message("partitions can only grow: records keep their places, so make a new Topic to have fewer"),
    validation = Rule::new("self.cleanupPolicy != 'Compact' || !has(self.retention.bytes)")
        .message("retention.bytes deletes nothing from a topic that is only compacted: remove it, or use cleanupPolicy CompactAndDelete"),
    validation = Rule::new("has(self.topicName) == has(oldSelf.topicName) && (!has(self.topicName) || self.topicName == oldSelf.topicName)")
        .message("topicName can't change: make a new Topic")
)]
pub struct TopicSpec {
    /// The Cluster that holds the topic: by default the one named `main` in the topic's namespace. It can't change. A standalone
    /// broker ignores it.
    #[serde(default)]
    #[x_kube(
        validation = Rule::new("self == oldSelf").message("clusterRef can't change: records don't move between Clusters, so make a new Topic")
    )]
    pub cluster_ref: ClusterRef,

    /// The topic's name for producers and consumers, where Kubernetes would not allow it as `metadata.name`, which is the default: 1 to 249 of
    /// `a-z A-Z 0-9 . _ -`, without `..`, and not beginning with `__`. It can't change. If the Cluster is in another namespace, clients put the
    /// topic's namespace and two dots in front: `shop..orders` (see `status.topicName`).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = MAX_TOPIC_NAME), regex(pattern = r"^[a-zA-Z0-9._-]+$"))]
    #[x_kube(
        validation = Rule::new("self != '.' && !self.contains('..')")
            .message("a topic can't be named . and its name can't contain .. (that is what clients put between a namespace and a name)"),
        validation = Rule::new("!self.startsWith('__')").message("names that begin with __ are for the brokers' own topics")
    )]
    pub topic_name: Option<String>,

    /// How many partitions the topic has: the most consumers of one group that can share it. It can only grow, and growing it moves keys
    /// to other partitions. By default what the Cluster says when the topic is made; on a standalone broker 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_PARTITIONS))]
    pub partitions: Option<i32>,

    /// How many brokers hold a copy of each partition. By default what the Cluster says when the topic is made; a standalone broker holds one
    /// copy whatever is written.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_REPLICATION_FACTOR))]
    pub replication_factor: Option<i32>,

    /// How many replicas must have a record before `acks=all` is answered. By default the Cluster's, but never more than there are replicas.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_REPLICATION_FACTOR))]
    pub min_in_sync_replicas: Option<i32>,

    /// What becomes of old records: `Delete` removes those beyond `retention`; `Compact` keeps the last record of each key, and records without
    /// a key are refused; `CompactAndDelete` does both.
    #[serde(default)]
    pub cleanup_policy: CleanupPolicy,

    /// When a compacted topic is compacted.
    #[serde(default)]
    pub compaction: Compaction,

    /// How long records are kept, unless the topic is only compacted. They are deleted as soon as one of the limits is passed.
    #[serde(default)]
    pub retention: Retention,

    /// How batches are compressed where they are stored: `Producer` keeps them as their producers made them, which costs the brokers nothing. With
    /// any other the brokers compress batches again that came otherwise; a standalone broker can't and refuses it.
    #[serde(default)]
    pub compression: Compression,

    /// The most bytes that one record batch may have after compression, such as `1MiB`: 128 bytes to 64 MiB.
    #[serde(
        default = "default_max_message_bytes",
        deserialize_with = "null_is_default"
    )]
    #[x_kube(validation = size_between("maxMessageBytes", "128", "64Mi"))]
    pub max_message_bytes: ByteQuantity,

    /// Whether records carry the producer's time (`CreateTime`) or the broker's at arrival (`LogAppendTime`).
    #[serde(default)]
    pub timestamp_type: TimestampType,

    /// With `CreateTime`: how far ahead of the broker's clock records may be stamped, such as `1h`; later ones are refused, since they
    /// would keep all that is before them from being deleted by age. Units: `ms s m h d w`.
    #[serde(default = "default_timestamp_after_max")]
    #[schemars(length(max = MAX_TIME_LENGTH), regex(pattern = TIME_PATTERN))]
    pub timestamp_after_max: String,

    /// Whether a replica that may lack acknowledged records may lead when no other is left: the topic is available again sooner, and records
    /// can be lost. `false` waits for a complete replica, however long that takes. A standalone broker elects no leaders.
    #[serde(default)]
    pub unclean_leader_election: bool,

    /// What becomes of the records when this Topic is deleted: `Retain` keeps them, and a new Topic of the same name gets them again; `Delete`
    /// deletes them for good. A standalone broker always retains.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,
}

impl Default for TopicSpec {
    fn default() -> Self {
        Self {
            cluster_ref: ClusterRef::default(),
            topic_name: None,
            partitions: None,
            replication_factor: None,
            min_in_sync_replicas: None,
            cleanup_policy: CleanupPolicy::default(),
            compaction: Compaction::default(),
            retention: Retention::default(),
            compression: Compression::default(),
            max_message_bytes: default_max_message_bytes(),
            timestamp_type: TimestampType::default(),
            timestamp_after_max: default_timestamp_after_max(),
            unclean_leader_election: false,
            deletion_policy: DeletionPolicy::default(),
        }
    }
}

/// Names a `Cluster`.
///
/// The default is a fixed name, not "the only Cluster there is": what a document means must not change when a second one is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClusterRef {
    /// The `Cluster`'s name.
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub name: String,
    /// The `Cluster`'s namespace, if it is another one than the topic's. Its `topicNamespaces` must admit the topic's namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 63),
        regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub namespace: Option<String>,
}

impl Default for ClusterRef {
    fn default() -> Self {
        Self {
            name: DEFAULT_CLUSTER.to_owned(),
            namespace: None,
        }
    }
}

/// What becomes of old records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum CleanupPolicy {
    /// They are deleted.
    #[default]
    Delete,
    /// The last one of each key is kept.
    Compact,
    /// Both.
    CompactAndDelete,
}

/// When a compacted topic is compacted. It happens in the background, to what is on the disk already; who reads sees nothing of it but that less is left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Compaction {
    /// Records stay at least so long, whatever comes after them, such as `1h`. By default no longer than until the next compaction. Units: `ms s m h d w`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_TIME_LENGTH), regex(pattern = TIME_PATTERN))]
    pub min_lag: Option<String>,
    /// Records that are older are compacted, however few they are, such as `7d`. By default only how much is new counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_TIME_LENGTH), regex(pattern = TIME_PATTERN))]
    pub max_lag: Option<String>,
    /// How long the record stays by which a key was deleted, one without a value, after all before it is gone: who reads the topic from its beginning must get to
    /// its end within that time to hear of it.
    #[serde(default = "default_delete_retention")]
    #[schemars(length(max = MAX_TIME_LENGTH), regex(pattern = TIME_PATTERN))]
    pub delete_retention: String,
    /// A partition is compacted once so much of what it has on disk is new since the last time: each byte that stays is then written that much more often.
    #[serde(default = "default_min_dirty_percent")]
    #[schemars(range(min = 1, max = 100))]
    pub min_dirty_percent: i32,
}

impl Default for Compaction {
    fn default() -> Self {
        Self {
            min_lag: None,
            max_lag: None,
            delete_retention: default_delete_retention(),
            min_dirty_percent: default_min_dirty_percent(),
        }
    }
}

fn default_delete_retention() -> String {
    "1d".to_owned()
}

fn default_min_dirty_percent() -> i32 {
    50
}

/// How batches are compressed where they are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Compression {
    /// As the producer sent them.
    #[default]
    Producer,
    /// Not at all.
    None,
    /// With gzip.
    Gzip,
    /// With Snappy.
    Snappy,
    /// With LZ4.
    Lz4,
    /// With Zstandard.
    Zstd,
}

/// What becomes of data when its object is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// It is kept. The default, since a mistake in Git must not cost records.
    #[default]
    Retain,
    /// It is deleted.
    Delete,
}

/// How long records are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Retention {
    /// Records older than this are deleted, such as `7d`, `12h`, `1d 12h`, or `forever` to keep them whatever their age. Units:
    /// `ms s m h d w`.
    #[serde(default = "default_retention_time")]
    #[schemars(length(max = MAX_TIME_LENGTH), regex(pattern = RETENTION_TIME_PATTERN))]
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

    fn replicas(factor: i32, min: i32) -> Topic {
        topic(spec(|s| {
            s.replication_factor = Some(factor);
            s.min_in_sync_replicas = Some(min);
        }))
    }

    fn compacted(policy: CleanupPolicy) -> TopicSpec {
        spec(|s| {
            s.cleanup_policy = policy;
            s.retention.bytes = Some(ByteQuantity::Number(1 << 30));
        })
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
            (topic(spec(|s| s.topic_name = Some("a..b".into()))), false),
            (topic(spec(|s| s.topic_name = Some("__own".into()))), false),
            (topic(spec(|s| s.min_in_sync_replicas = Some(2))), true),
            (replicas(1, 2), false),
            (replicas(3, 2), true),
            (topic(compacted(CleanupPolicy::Compact)), false),
            (topic(compacted(CleanupPolicy::CompactAndDelete)), true),
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
        let partitions = |n| spec(|s| s.partitions = Some(n));
        let cluster = |name: &str| spec(|s| s.cluster_ref.name = name.into());
        let named = |name: &str| spec(|s| s.topic_name = Some(name.into()));
        for (old, new, accepted) in [
            (partitions(6), partitions(6), true),
            (partitions(6), partitions(12), true),
            (partitions(6), partitions(5), false),
            (partitions(6), TopicSpec::default(), false),
            (TopicSpec::default(), partitions(6), true),
            (cluster("main"), TopicSpec::default(), true),
            (cluster("main"), cluster("other"), false),
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
    fn partitions_that_the_cluster_chose_can_only_grow_either() {
        let mut old = topic(TopicSpec::default());
        old.status = Some(TopicStatus {
            partitions: Some(6),
            ..TopicStatus::default()
        });
        for (partitions, accepted) in [(5, false), (6, true), (7, true)] {
            let mut new = old.clone();
            new.spec.partitions = Some(partitions);
            let verdict = validate_cel_update(&new, &old);
            assert_eq!(verdict.is_ok(), accepted, "{partitions}: {verdict:?}");
        }
        // A Topic from Git may say less than what was retained: its status must be writable all the same.
        old.spec.partitions = Some(3);
        assert!(validate_cel_update(&old.clone(), &old).is_ok());
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
