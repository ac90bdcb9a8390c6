//! What `meta` says of the store itself, of its topics and of their partitions. Descriptors are JSON: few, and read by people too.

use std::fmt;

use millrace_record::TimestampType;
use rocksdb::WriteBatch;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{LogConfig, PartitionId, StorageError, keys};

/// The format that this version writes, and the only one that it reads.
pub(super) const FORMAT: u32 = 2;

/// The broker of a Cluster to which a store belongs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokerIdentity {
    /// The cluster.
    pub cluster: String,
    /// The broker's id in it.
    pub broker_id: i32,
}

impl fmt::Display for BrokerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "broker {} of cluster {}", self.broker_id, self.cluster)
    }
}

/// The store. Since format 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct StoreDescriptor {
    pub format: u32,
    /// Given to a new store: a store that lost its data is another one.
    pub store_id: Uuid,
    /// Counts the starts.
    pub incarnation: i32,
    pub next_partition_id: u32,
    /// The broker that has claimed the store; none has if it belongs to a broker that runs alone. Since format 2.
    pub identity: Option<BrokerIdentity>,
}

/// A topic; its id is the key. Since format 2.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct TopicDescriptor {
    pub name: String,
    pub config: LogConfig,
}

/// The stored form of a [`TimestampType`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "TimestampType")]
pub(super) enum StoredTimestampType {
    CreateTime,
    LogAppendTime,
}

impl StoreDescriptor {
    pub(super) fn new() -> Self {
        StoreDescriptor {
            format: FORMAT,
            store_id: Uuid::new_v4(),
            incarnation: 0,
            next_partition_id: 0,
            identity: None,
        }
    }

    pub(super) fn put(&self, batch: &mut WriteBatch) -> Result<(), StorageError> {
        batch.put(keys::STORE, encode_json(self)?);
        Ok(())
    }

    pub(super) fn decode(value: &[u8]) -> Result<Self, StorageError> {
        decode_json("the store's descriptor", value)
    }
}

impl TopicDescriptor {
    pub(super) fn put(&self, topic_id: Uuid, batch: &mut WriteBatch) -> Result<(), StorageError> {
        batch.put(keys::topic(topic_id), encode_json(self)?);
        Ok(())
    }

    pub(super) fn decode(topic_id: Uuid, value: &[u8]) -> Result<Self, StorageError> {
        decode_json(&format!("the descriptor of topic {topic_id}"), value)
    }
}

/// Value of `meta`'s partition entries: the partition's number in this store, u32. Since format 2.
pub(super) fn encode_partition(id: PartitionId) -> [u8; 4] {
    id.0.to_be_bytes()
}

pub(super) fn decode_partition(value: &[u8]) -> Option<PartitionId> {
    Some(PartitionId(u32::from_be_bytes(value.try_into().ok()?)))
}

fn encode_json(value: &impl Serialize) -> Result<Vec<u8>, StorageError> {
    serde_json::to_vec(value)
        .map_err(|error| StorageError::Rocks(format!("a descriptor can't be encoded: {error}")))
}

fn decode_json<T: for<'a> Deserialize<'a>>(what: &str, value: &[u8]) -> Result<T, StorageError> {
    serde_json::from_slice(value).map_err(|error| StorageError::Corrupt {
        what: format!("{what}: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::storage::Retention;

    #[test]
    fn descriptors_are_stored_as_documented() {
        let store = StoreDescriptor {
            store_id: Uuid::from_u128(1),
            incarnation: 2,
            next_partition_id: 3,
            identity: Some(BrokerIdentity {
                cluster: "main".into(),
                broker_id: 4,
            }),
            ..StoreDescriptor::new()
        };
        let stored = r#"{"format":2,"store_id":"00000000-0000-0000-0000-000000000001","incarnation":2,"next_partition_id":3,"identity":{"cluster":"main","broker_id":4}}"#;
        assert_eq!(encode_json(&store).unwrap(), stored.as_bytes());
        assert_eq!(StoreDescriptor::decode(stored.as_bytes()).unwrap(), store);

        let topic = TopicDescriptor {
            name: "orders".into(),
            config: LogConfig {
                max_message_bytes: 1_048_576,
                timestamp_type: TimestampType::CreateTime,
                timestamp_after_max: Duration::from_secs(3600),
                retention: Retention {
                    time: Some(Duration::from_secs(604_800)),
                    bytes: None,
                },
            },
        };
        let stored = r#"{"name":"orders","config":{"max_message_bytes":1048576,"timestamp_type":"CreateTime","timestamp_after_max":{"secs":3600,"nanos":0},"retention":{"time":{"secs":604800,"nanos":0},"bytes":null}}}"#;
        assert_eq!(encode_json(&topic).unwrap(), stored.as_bytes());
        let decoded = TopicDescriptor::decode(Uuid::nil(), stored.as_bytes());
        assert_eq!(decoded.unwrap(), topic);

        assert_eq!(encode_partition(PartitionId(258)), [0, 0, 1, 2]);
        assert_eq!(decode_partition(&[0, 0, 1, 2]), Some(PartitionId(258)));
        assert_eq!(decode_partition(&[1, 2]), None);
    }
}
