//! What `meta` says of the store itself, of its topics and of their partitions. Descriptors are JSON: few, and read by people too.

use std::fmt;

use millrace_record::TimestampType;
use rocksdb::WriteBatch;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Durability, LogConfig, PartitionId, StorageError, keys};

/// The format that this version writes, and the only one that it reads.
pub(super) const FORMAT: u32 = 3;

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
    /// What the process that has it open, or had it last, promised. Since format 3.
    pub durability: Durability,
    /// The run of the operating system in which that was; `None` if it can't be told. Since format 3.
    pub boot_id: Option<String>,
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
            durability: Durability::Fsync,
            boot_id: None,
        }
    }

    /// Counts a start. A store that may have lost records which it had acknowledged is another store from then on: no partition's ISR
    /// knows it, so that it is not elected for what it no longer has. That is so if the operating system went down before it had
    /// written everything back, and no fsync was asked for. Returns whether it is another one.
    pub(super) fn start(
        &mut self,
        durability: Durability,
        boot_id: Option<String>,
        clean: bool,
    ) -> bool {
        let same_boot = boot_id.is_some() && self.boot_id == boot_id;
        let doubtful = self.incarnation > 0
            && self.identity.is_some()
            && self.durability == Durability::Os
            && !clean
            && !same_boot;
        if doubtful {
            self.store_id = Uuid::new_v4();
        }
        self.incarnation += 1;
        self.durability = durability;
        self.boot_id = boot_id;
        doubtful
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
    fn a_store_that_may_have_lost_what_it_acknowledged_is_another_one() {
        use Durability::{Fsync, Os};
        let boot = |name: &str| Some(name.to_owned());
        // What the last process promised, in which run of the system; whether it stopped in order; the run now.
        for (durability, before, clean, now, another) in [
            (Os, boot("a"), false, boot("b"), true),
            (Os, boot("a"), false, None, true),
            (Os, None, false, None, true),
            (Os, boot("a"), false, boot("a"), false),
            (Os, boot("a"), true, boot("b"), false),
            (Fsync, boot("a"), false, boot("b"), false),
        ] {
            let identity = BrokerIdentity {
                cluster: "main".into(),
                broker_id: 0,
            };
            let mut store = StoreDescriptor::new();
            assert!(!store.start(durability, before.clone(), false));
            let (mut alone, id) = (store.clone(), store.store_id);
            store.identity = Some(identity);
            assert_eq!(store.start(Os, now.clone(), clean), another);
            assert_eq!(store.store_id != id, another);
            assert_eq!(store.incarnation, 2);
            assert!(!alone.start(Os, now, clean), "no one counts on it");
        }
    }

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
            boot_id: Some("b".into()),
            ..StoreDescriptor::new()
        };
        let stored = r#"{"format":3,"store_id":"00000000-0000-0000-0000-000000000001","incarnation":2,"next_partition_id":3,"identity":{"cluster":"main","broker_id":4},"durability":"fsync","boot_id":"b"}"#;
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
                compaction: None,
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
