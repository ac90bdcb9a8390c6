//! What a [`Topic`] means: every default filled in, every rule checked. The rules are those of the CRD, for documents that
//! no API server has seen.

use std::sync::LazyLock;
use std::time::Duration;

use regex_lite::Regex;
use thiserror::Error;

use crate::quantity::{ByteQuantity, parse_retention_time, parse_time};
use crate::topic::{TimestampType, Topic};

/// The most partitions of one topic.
pub const MAX_PARTITIONS: i32 = 10_000;
/// The smallest legal `maxMessageBytes`: below it hardly a record fits beside the batch's header.
pub const MIN_MAX_MESSAGE_BYTES: u32 = 128;
/// The largest legal `maxMessageBytes`. A broker holds whole batches in memory, hence a limit far below the format's 2 GiB.
pub const MAX_MAX_MESSAGE_BYTES: u32 = 64 << 20;

static OBJECT_NAME: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$").ok());

/// A topic's settings, complete and legal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TopicConfig {
    /// The topic's name.
    pub name: String,
    /// How many partitions it has, 1 to [`MAX_PARTITIONS`].
    pub partitions: u32,
    /// How many brokers hold each partition, at least 1.
    pub replication_factor: u32,
    /// How many of them must have a record for `acks=all`; `None`: the cluster's default. At most the replication factor.
    pub min_insync_replicas: Option<u32>,
    /// Records older than this may be deleted; `None`: kept forever.
    pub retention_time: Option<Duration>,
    /// A partition's oldest records may be deleted while it holds more; `None`: no limit.
    pub retention_bytes: Option<u64>,
    /// The most bytes of a record batch.
    pub max_message_bytes: u32,
    /// Whose clock timestamps are from.
    pub timestamp_type: TimestampType,
    /// How far ahead of the broker's clock a producer's timestamps may be.
    pub timestamp_after_max: Duration,
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
        min: i32,
        /// The replicas.
        factor: i32,
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

impl TryFrom<&Topic> for TopicConfig {
    type Error = TopicError;

    fn try_from(topic: &Topic) -> Result<Self, TopicError> {
        let spec = &topic.spec;
        let partitions = in_range("spec.partitions", spec.partitions, MAX_PARTITIONS)?;
        let replication_factor =
            in_range("spec.replicationFactor", spec.replication_factor, i32::MAX)?;
        let min_insync_replicas = spec
            .min_in_sync_replicas
            .map(|min| in_range("spec.minInSyncReplicas", min, i32::MAX))
            .transpose()?;
        if let Some(min) = spec
            .min_in_sync_replicas
            .filter(|min| *min > spec.replication_factor)
        {
            return Err(TopicError::MinInSyncReplicas {
                min,
                factor: spec.replication_factor,
            });
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
            name: topic_name(topic)?.to_owned(),
            partitions,
            replication_factor,
            min_insync_replicas,
            retention_time,
            retention_bytes,
            max_message_bytes: max_message_bytes(&spec.max_message_bytes)?,
            timestamp_type: spec.timestamp_type,
            timestamp_after_max: time("spec.timestampAfterMax", &spec.timestamp_after_max)?,
        })
    }
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
    (1..=249).contains(&name.len())
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
    Ok(name)
}

fn in_range(field: &'static str, value: i32, max: i32) -> Result<u32, TopicError> {
    if (1..=max).contains(&value) {
        return Ok(value.unsigned_abs());
    }
    let allowed = match max {
        i32::MAX => "1 or more".to_owned(),
        max => format!("1 to {max}"),
    };
    Err(TopicError::OutOfRange {
        field,
        value: value.to_string(),
        allowed,
    })
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
                retention_time: Some(Duration::from_secs(7 * 24 * 3600)),
                retention_bytes: None,
                max_message_bytes: 1 << 20,
                timestamp_type: TimestampType::CreateTime,
                timestamp_after_max: Duration::from_secs(3600),
            })
        );
    }

    #[test]
    fn what_is_written_is_what_is_meant() {
        let config = config("orders", |s| {
            s.topic_name = Some("Orders_2".into());
            s.partitions = MAX_PARTITIONS;
            s.replication_factor = 3;
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
                retention_time: None,
                retention_bytes: Some(10 << 30),
                max_message_bytes: 2048,
                timestamp_type: TimestampType::LogAppendTime,
                timestamp_after_max: Duration::from_secs(36 * 3600),
            })
        );
    }

    #[test]
    fn what_is_not_legal_is_refused_and_named() {
        type Change = fn(&mut TopicSpec);
        let cases: [(&str, Change, &str); 20] = [
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
            ("a", |s| s.partitions = 0, "spec.partitions: 0"),
            ("a", |s| s.partitions = -1, "spec.partitions: -1"),
            ("a", |s| s.partitions = 10_001, "use 1 to 10000"),
            (
                "a",
                |s| s.replication_factor = 0,
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
}
