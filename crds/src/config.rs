//! What a [`Topic`] means: every default filled in, every rule checked. The rules are those of the CRD, for documents that
//! no API server has seen.

use std::sync::LazyLock;
use std::time::Duration;

use regex_lite::Regex;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::names::{MAX_TOPIC_NAME, NAMESPACE_SEPARATOR};
use crate::quantity::{ByteQuantity, parse_retention_time, parse_time};
use crate::topic::{CleanupPolicy, Compression, TimestampType, Topic, TopicSpec};

/// The internal topic of consumer groups.
pub const GROUPS_TOPIC: &str = "__groups";
/// The internal topic of transactions.
pub const TRANSACTIONS_TOPIC: &str = "__transactions";
/// All internal topics.
pub const INTERNAL_TOPICS: [&str; 2] = [GROUPS_TOPIC, TRANSACTIONS_TOPIC];
/// Each has a coordinator: enough for the brokers of a Cluster to share the work.
const INTERNAL_PARTITIONS: u32 = 8;
/// What the names of Millrace's own topics begin with.
const INTERNAL: &str = "__";
/// The most partitions of one topic.
pub const MAX_PARTITIONS: i32 = 10_000;
/// The most replicas of a partition. More would only make `acks=all` slower.
pub const MAX_REPLICATION_FACTOR: i32 = 32;
/// The smallest legal `maxMessageBytes`: below it hardly a record fits beside the batch's header.
pub const MIN_MAX_MESSAGE_BYTES: u32 = 128;
/// The largest legal `maxMessageBytes`. A broker holds whole batches in memory, hence a limit far below the format's 2 GiB.
pub const MAX_MAX_MESSAGE_BYTES: u32 = 64 << 20;

static OBJECT_NAME: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$").ok());

/// What a Topic means where it says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopicDefaults {
    /// How many partitions.
    pub partitions: u32,
    /// How many replicas of each.
    pub replication_factor: u32,
    /// How many of them for `acks=all`; at most the topic's replicas count.
    pub min_insync_replicas: Option<u32>,
}

impl TopicDefaults {
    /// Those of a standalone broker.
    pub const STANDALONE: Self = Self {
        partitions: 1,
        replication_factor: 1,
        min_insync_replicas: None,
    };
}

/// A topic's settings, complete and legal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TopicConfig {
    /// The topic's name for clients.
    pub name: String,
    /// How many partitions it has, 1 to [`MAX_PARTITIONS`].
    pub partitions: u32,
    /// How many brokers hold each partition, at least 1.
    pub replication_factor: u32,
    /// How many of them must have a record for `acks=all`; `None`: the cluster's default. At most the replication factor.
    pub min_insync_replicas: Option<u32>,
    /// What becomes of old records.
    pub cleanup_policy: CleanupPolicy,
    /// How it is compacted, if it is.
    #[serde(default, skip_serializing_if = "CompactionConfig::is_default")]
    pub compaction: CompactionConfig,
    /// Records older than this may be deleted; `None`: kept forever.
    #[serde(with = "milliseconds::optional", rename = "retentionTimeMs")]
    pub retention_time: Option<Duration>,
    /// A partition's oldest records may be deleted while it holds more; `None`: no limit.
    pub retention_bytes: Option<u64>,
    /// How batches are compressed where they are stored.
    pub compression: Compression,
    /// The most bytes of a record batch.
    pub max_message_bytes: u32,
    /// Whose clock timestamps are from.
    pub timestamp_type: TimestampType,
    /// How far ahead of the broker's clock a producer's timestamps may be.
    #[serde(with = "milliseconds", rename = "timestampAfterMaxMs")]
    pub timestamp_after_max: Duration,
    /// Whether a replica that may lack acknowledged records may lead.
    pub unclean_leader_election: bool,
}

/// How a topic is compacted by key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CompactionConfig {
    /// Younger records stay, whatever comes after them.
    #[serde(with = "milliseconds", rename = "minLagMs")]
    pub min_lag: Duration,
    /// Records that are older are looked at, however few they are; `None`: not for that.
    #[serde(with = "milliseconds::optional", rename = "maxLagMs")]
    pub max_lag: Option<Duration>,
    /// How long tombstones stay.
    #[serde(with = "milliseconds", rename = "deleteRetentionMs")]
    pub delete_retention: Duration,
    /// It is compacted once so much of it is new.
    pub min_dirty_percent: u8,
}

impl CompactionConfig {
    // What topics always looked like stays so.
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for CompactionConfig {
    fn default() -> Self {
        Self {
            min_lag: Duration::ZERO,
            max_lag: None,
            delete_retention: Duration::from_secs(24 * 3600),
            min_dirty_percent: 50,
        }
    }
}

/// Why a `Topic` is not legal.
#[derive(Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum TopicError {
    /// The object has no name.
    #[error("metadata.name is missing: name the topic")]
    NameMissing,
    /// Kubernetes would refuse the object's name.
    #[error(
        "metadata.name {name:?} is not a Kubernetes object name: use lower-case letters, digits, '-' and '.', and give \
         another topic name with spec.topicName"
    )]
    ObjectName {
        /// The name.
        name: String,
    },
    /// Not one of Kafka's legal topic names.
    #[error(
        "{field}: {name:?} is not a legal topic name: use 1 to 249 letters, digits, '.', '_' and '-', but neither \".\" nor \"..\""
    )]
    TopicName {
        /// The field that holds it.
        field: &'static str,
        /// The name.
        name: String,
    },
    /// Legal for Kafka, but given another meaning here.
    #[error(
        "{field}: {name:?} is not allowed: a topic's name may neither contain \"..\", which clients put between a namespace and a \
         name, nor begin with \"__\", which is for the brokers' own topics"
    )]
    ReservedName {
        /// The field that holds it.
        field: &'static str,
        /// The name.
        name: String,
    },
    /// A size limit on a topic from which nothing is deleted.
    #[error(
        "spec.retention.bytes: it deletes nothing from a topic that is only compacted: remove it, or use cleanupPolicy CompactAndDelete"
    )]
    RetentionBytesOfCompacted,
    /// A standalone broker can't do it.
    #[error(
        "{field}: {value} needs a Cluster: a standalone broker can't do that yet; use {instead}"
    )]
    NotStandalone {
        /// The field's path.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What a standalone broker can do.
        instead: &'static str,
    },
    /// A number or size outside its range.
    #[error("{field}: {value} is not allowed: use {allowed}")]
    OutOfRange {
        /// The field's path.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What it may hold.
        allowed: String,
    },
    /// More in-sync replicas wanted than there are replicas.
    #[error(
        "spec.minInSyncReplicas: {min} is more than spec.replicationFactor {factor}: such a topic could never accept \
         acks=all; lower it or raise the replication factor"
    )]
    MinInSyncReplicas {
        /// The minimum.
        min: u32,
        /// The replicas.
        factor: u32,
    },
    /// Not a time.
    #[error(
        "spec.retention.time: {value:?} is not a time: write a number with ms, s, m, h, d or w, such as \"7d\" or \
         \"1d 12h\", or \"forever\""
    )]
    RetentionTime {
        /// What it holds.
        value: String,
    },
    /// Not a time either, where there is no for ever.
    #[error(
        "{field}: {value:?} is not a time: write a number with ms, s, m, h, d or w, such as \"1h\" or \"1d 12h\""
    )]
    Time {
        /// The field's path.
        field: &'static str,
        /// What it holds.
        value: String,
    },
    /// Not an amount of bytes.
    #[error(
        "{field}: \"{value}\" is not a size: write a number of bytes or a size such as \"10GiB\""
    )]
    Size {
        /// The field's path.
        field: &'static str,
        /// What it holds.
        value: ByteQuantity,
    },
}

/// What the Topic means to a standalone broker, which refuses what it can't do: the same document would otherwise do something else there.
impl TryFrom<&Topic> for TopicConfig {
    type Error = TopicError;

    fn try_from(topic: &Topic) -> Result<Self, TopicError> {
        let name = topic_name(topic)?.to_owned();
        let config = Self::complete(topic, name, TopicDefaults::STANDALONE)?;
        let not_standalone = |field, value, instead| {
            Err(TopicError::NotStandalone {
                field,
                value,
                instead,
            })
        };
        match config.compression {
            Compression::Producer => Ok(config),
            other => not_standalone("spec.compression", format!("{other:?}"), "Producer"),
        }
    }
}

impl TopicConfig {
    /// What the Topic means to a Cluster of that namespace with these defaults.
    ///
    /// # Errors
    /// If the Topic breaks a rule, be it one that only the Cluster's defaults make it break.
    pub fn resolve(
        topic: &Topic,
        cluster_namespace: &str,
        defaults: TopicDefaults,
    ) -> Result<Self, TopicError> {
        topic_name(topic)?;
        let name = topic.client_name(cluster_namespace);
        if name.len() > MAX_TOPIC_NAME {
            return Err(TopicError::TopicName {
                field: "the name with its namespace",
                name,
            });
        }
        Self::complete(topic, name, defaults)
    }

    fn complete(topic: &Topic, name: String, defaults: TopicDefaults) -> Result<Self, TopicError> {
        let spec = &topic.spec;
        let partitions = in_range("spec.partitions", spec.partitions, MAX_PARTITIONS)?
            .unwrap_or(defaults.partitions);
        let factor = MAX_REPLICATION_FACTOR;
        let replication_factor =
            in_range("spec.replicationFactor", spec.replication_factor, factor)?
                .unwrap_or(defaults.replication_factor);
        let min = in_range("spec.minInSyncReplicas", spec.min_in_sync_replicas, factor)?;
        if let Some(min) = min.filter(|min| *min > replication_factor) {
            return Err(TopicError::MinInSyncReplicas {
                min,
                factor: replication_factor,
            });
        }
        let default_min = defaults.min_insync_replicas;
        let min_insync_replicas = min.or(default_min.map(|min| min.min(replication_factor)));
        if spec.cleanup_policy == CleanupPolicy::Compact && spec.retention.bytes.is_some() {
            return Err(TopicError::RetentionBytesOfCompacted);
        }
        let retention_time = parse_retention_time(&spec.retention.time).ok_or_else(|| {
            TopicError::RetentionTime {
                value: spec.retention.time.clone(),
            }
        })?;
        let retention_bytes = spec
            .retention
            .bytes
            .as_ref()
            .map(|bytes| size("spec.retention.bytes", bytes))
            .transpose()?;
        Ok(Self {
            name,
            partitions,
            replication_factor,
            min_insync_replicas,
            cleanup_policy: spec.cleanup_policy,
            compaction: compaction(spec)?,
            retention_time,
            retention_bytes,
            compression: spec.compression,
            max_message_bytes: max_message_bytes(&spec.max_message_bytes)?,
            timestamp_type: spec.timestamp_type,
            timestamp_after_max: time("spec.timestampAfterMax", &spec.timestamp_after_max)?,
            unclean_leader_election: spec.unclean_leader_election,
        })
    }
}

fn compaction(spec: &TopicSpec) -> Result<CompactionConfig, TopicError> {
    let written = &spec.compaction;
    let lag = |field, lag: &Option<String>| {
        let lag = lag.as_ref();
        lag.map(|lag| time(field, lag)).transpose()
    };
    Ok(CompactionConfig {
        min_lag: lag("spec.compaction.minLag", &written.min_lag)?.unwrap_or_default(),
        max_lag: lag("spec.compaction.maxLag", &written.max_lag)?,
        delete_retention: time("spec.compaction.deleteRetention", &written.delete_retention)?,
        min_dirty_percent: in_range(
            "spec.compaction.minDirtyPercent",
            Some(written.min_dirty_percent),
            100,
        )?
        .and_then(|percent| u8::try_from(percent).ok())
        .unwrap_or(50),
    })
}

/// Durations as whole milliseconds.
mod milliseconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    fn of(duration: Duration) -> u64 {
        u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn serialize<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
        of(*time).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }

    pub(super) mod optional {
        use super::{Deserialize, Deserializer, Duration, Serialize, Serializer, of};

        pub(in super::super) fn serialize<S: Serializer>(
            time: &Option<Duration>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            time.map(of).serialize(to)
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<Duration>, D::Error> {
            Ok(Option::deserialize(from)?.map(Duration::from_millis))
        }
    }
}

impl TopicConfig {
    /// One of the [internal topics](INTERNAL_TOPICS). Its partitions can't be added to later: a group or a transactional id belongs to
    /// the one that its name gives. It is kept for ever, since the brokers themselves let go of what is no longer valid.
    pub fn internal(name: &str, replication_factor: u32) -> Self {
        Self {
            name: name.to_owned(),
            partitions: INTERNAL_PARTITIONS,
            replication_factor,
            min_insync_replicas: Some(replication_factor.div_ceil(2)),
            cleanup_policy: CleanupPolicy::Delete,
            compaction: CompactionConfig::default(),
            retention_time: None,
            retention_bytes: None,
            compression: Compression::Producer,
            max_message_bytes: 1 << 20,
            timestamp_type: TimestampType::CreateTime,
            timestamp_after_max: Duration::from_secs(3600),
            unclean_leader_election: false,
        }
    }
}

/// Whether the topic is Millrace's own. No Topic resource may have such a name.
pub fn is_internal_topic(name: &str) -> bool {
    name.starts_with(INTERNAL)
}

/// Checks Kafka's rule for topic names.
pub fn check_topic_name(name: &str) -> Result<(), TopicError> {
    if is_topic_name(name) {
        return Ok(());
    }
    Err(TopicError::TopicName {
        field: "topic",
        name: name.to_owned(),
    })
}

fn is_topic_name(name: &str) -> bool {
    (1..=MAX_TOPIC_NAME).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && name != "."
        && name != ".."
}

fn topic_name(topic: &Topic) -> Result<&str, TopicError> {
    let object_name = topic.metadata.name.as_deref().unwrap_or_default();
    if object_name.is_empty() {
        return Err(TopicError::NameMissing);
    }
    if !OBJECT_NAME
        .as_ref()
        .is_some_and(|r| r.is_match(object_name))
    {
        return Err(TopicError::ObjectName {
            name: object_name.to_owned(),
        });
    }
    let (field, name) = match topic.spec.topic_name.as_deref() {
        Some(name) => ("spec.topicName", name),
        None => ("metadata.name", object_name),
    };
    if !is_topic_name(name) {
        return Err(TopicError::TopicName {
            field,
            name: name.to_owned(),
        });
    }
    if name.contains(NAMESPACE_SEPARATOR) || is_internal_topic(name) {
        return Err(TopicError::ReservedName {
            field,
            name: name.to_owned(),
        });
    }
    Ok(name)
}

/// The number that is written, if one is.
fn in_range(field: &'static str, value: Option<i32>, max: i32) -> Result<Option<u32>, TopicError> {
    match value {
        None => Ok(None),
        Some(value) if (1..=max).contains(&value) => Ok(Some(value.unsigned_abs())),
        Some(value) => Err(TopicError::OutOfRange {
            field,
            value: value.to_string(),
            allowed: format!("1 to {max}"),
        }),
    }
}

fn size(field: &'static str, quantity: &ByteQuantity) -> Result<u64, TopicError> {
    quantity.bytes().ok_or_else(|| TopicError::Size {
        field,
        value: quantity.clone(),
    })
}

fn time(field: &'static str, text: &str) -> Result<Duration, TopicError> {
    parse_time(text).ok_or_else(|| TopicError::Time {
        field,
        value: text.to_owned(),
    })
}

fn max_message_bytes(quantity: &ByteQuantity) -> Result<u32, TopicError> {
    const FIELD: &str = "spec.maxMessageBytes";
    u32::try_from(size(FIELD, quantity)?)
        .ok()
        .filter(|bytes| (MIN_MAX_MESSAGE_BYTES..=MAX_MAX_MESSAGE_BYTES).contains(bytes))
        .ok_or_else(|| TopicError::OutOfRange {
            field: FIELD,
            value: quantity.to_string(),
            allowed: format!(
                "{MIN_MAX_MESSAGE_BYTES} bytes to {} MiB",
                MAX_MAX_MESSAGE_BYTES >> 20
            ),
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topic::TopicSpec;

    fn config(name: &str, change: impl FnOnce(&mut TopicSpec)) -> Result<TopicConfig, TopicError> {
        let mut spec = TopicSpec::default();
        change(&mut spec);
        TopicConfig::try_from(&Topic::new(name, spec))
    }

    #[test]
    fn a_topic_that_says_nothing_has_the_documented_defaults() {
        assert_eq!(
            config("orders", |_| ()),
            Ok(TopicConfig {
                name: "orders".into(),
                partitions: 1,
                replication_factor: 1,
                min_insync_replicas: None,
                cleanup_policy: CleanupPolicy::Delete,
                compaction: CompactionConfig::default(),
                retention_time: Some(Duration::from_secs(7 * 24 * 3600)),
                retention_bytes: None,
                compression: Compression::Producer,
                max_message_bytes: 1 << 20,
                timestamp_type: TimestampType::CreateTime,
                timestamp_after_max: Duration::from_secs(3600),
                unclean_leader_election: false,
            })
        );
    }

    #[test]
    fn what_is_written_is_what_is_meant() {
        let config = config("orders", |s| {
            s.topic_name = Some("Orders_2".into());
            s.partitions = Some(MAX_PARTITIONS);
            s.unclean_leader_election = true;
            s.replication_factor = Some(3);
            s.min_in_sync_replicas = Some(2);
            s.retention.time = "forever".into();
            s.retention.bytes = Some(ByteQuantity::Text("10GiB".into()));
            s.max_message_bytes = ByteQuantity::Number(2048);
            s.timestamp_type = TimestampType::LogAppendTime;
            s.timestamp_after_max = "1d 12h".into();
        });
        assert_eq!(
            config,
            Ok(TopicConfig {
                name: "Orders_2".into(),
                partitions: 10_000,
                replication_factor: 3,
                min_insync_replicas: Some(2),
                cleanup_policy: CleanupPolicy::Delete,
                compaction: CompactionConfig::default(),
                retention_time: None,
                retention_bytes: Some(10 << 30),
                compression: Compression::Producer,
                max_message_bytes: 2048,
                timestamp_type: TimestampType::LogAppendTime,
                timestamp_after_max: Duration::from_secs(36 * 3600),
                unclean_leader_election: true,
            })
        );
    }

    #[test]
    fn what_is_not_legal_is_refused_and_named() {
        type Change = fn(&mut TopicSpec);
        let cases: [(&str, Change, &str); 27] = [
            ("", |_| (), "metadata.name is missing"),
            ("Orders", |_| (), "metadata.name \"Orders\""),
            ("my_orders", |_| (), "spec.topicName"),
            ("-orders", |_| (), "metadata.name"),
            (&"o".repeat(250), |_| (), "metadata.name: "),
            (
                "a",
                |s| s.topic_name = Some(String::new()),
                "spec.topicName: \"\"",
            ),
            ("a", |s| s.topic_name = Some("..".into()), "spec.topicName"),
            ("a", |s| s.topic_name = Some("a/b".into()), "spec.topicName"),
            (
                "a",
                |s| s.topic_name = Some("b".repeat(250)),
                "spec.topicName",
            ),
            ("a", |s| s.partitions = Some(0), "spec.partitions: 0"),
            ("a", |s| s.partitions = Some(-1), "spec.partitions: -1"),
            ("a", |s| s.partitions = Some(10_001), "use 1 to 10000"),
            (
                "a",
                |s| s.replication_factor = Some(0),
                "spec.replicationFactor: 0",
            ),
            (
                "a",
                |s| s.min_in_sync_replicas = Some(0),
                "spec.minInSyncReplicas",
            ),
            (
                "a",
                |s| s.min_in_sync_replicas = Some(2),
                "spec.replicationFactor 1",
            ),
            (
                "a",
                |s| s.replication_factor = Some(33),
                "spec.replicationFactor: 33 is not allowed: use 1 to 32",
            ),
            (
                "a",
                |s| s.topic_name = Some("shop..orders".into()),
                "spec.topicName: \"shop..orders\" is not allowed",
            ),
            (
                "a",
                |s| s.topic_name = Some("__offsets".into()),
                "nor begin with \"__\"",
            ),
            (
                "a",
                |s| s.compaction.min_lag = Some("soon".into()),
                "spec.compaction.minLag: \"soon\"",
            ),
            (
                "a",
                |s| s.compaction.min_dirty_percent = 0,
                "spec.compaction.minDirtyPercent",
            ),
            (
                "a",
                |s| s.compression = Compression::Zstd,
                "spec.compression: Zstd needs a Cluster: a standalone broker can't do that yet; use Producer",
            ),
            (
                "a",
                |s| {
                    s.cleanup_policy = CleanupPolicy::Compact;
                    s.retention.bytes = Some(ByteQuantity::Number(1));
                },
                "spec.retention.bytes: it deletes nothing",
            ),
            (
                "a",
                |s| s.retention.time = "7 days".into(),
                "spec.retention.time: \"7 days\"",
            ),
            (
                "a",
                |s| s.timestamp_after_max = "forever".into(),
                "spec.timestampAfterMax: \"forever\"",
            ),
            (
                "a",
                |s| s.retention.bytes = Some(ByteQuantity::Number(-1)),
                "spec.retention.bytes: \"-1\"",
            ),
            (
                "a",
                |s| s.max_message_bytes = ByteQuantity::Number(127),
                "spec.maxMessageBytes: 127",
            ),
            (
                "a",
                |s| s.max_message_bytes = ByteQuantity::Text("1GiB".into()),
                "128 bytes to 64 MiB",
            ),
        ];
        for (name, change, part) in cases {
            let message = config(name, change).unwrap_err().to_string();
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
    }

    #[test]
    fn a_cluster_fills_in_its_defaults() {
        let defaults = TopicDefaults {
            partitions: 6,
            replication_factor: 3,
            min_insync_replicas: Some(2),
        };
        let resolve = |change: fn(&mut TopicSpec)| {
            let mut spec = TopicSpec::default();
            change(&mut spec);
            let mut topic = Topic::new("orders", spec);
            topic.metadata.namespace = Some("shop".into());
            TopicConfig::resolve(&topic, "kafka", defaults)
        };
        let config = resolve(|_| ()).unwrap();
        assert_eq!(config.name, "shop..orders");
        assert_eq!((config.partitions, config.replication_factor), (6, 3));
        assert_eq!(config.min_insync_replicas, Some(2));
        let single = resolve(|s| s.replication_factor = Some(1)).unwrap();
        assert_eq!(single.min_insync_replicas, Some(1));
        let compacted = resolve(|s| s.cleanup_policy = CleanupPolicy::Compact).unwrap();
        assert_eq!(compacted.cleanup_policy, CleanupPolicy::Compact);
        let refused = resolve(|s| s.min_in_sync_replicas = Some(4)).unwrap_err();
        assert_eq!(refused, TopicError::MinInSyncReplicas { min: 4, factor: 3 });
        assert!(resolve(|s| s.topic_name = Some("t".repeat(245))).is_err());
    }
}
