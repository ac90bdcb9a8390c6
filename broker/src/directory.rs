//! The topics by name as this broker's clients see them: their partitions, who leads each, and the logs that are held here.
//!
//! It is written by whoever coordinates (the topic files of a standalone broker, or [`coordination`](crate::coordination) in a
//! Cluster) and read by the services. A partition is replaced as a whole, so that a reader never sees half a change.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use millrace_record::key_partition;
use parking_lot::RwLock;
use uuid::Uuid;

use crate::{
    partition::{HostedReplica, Hosting, Peers},
    storage::{StorageError, StoredPartition},
};

/// The topics and brokers that clients are told of.
#[derive(Debug, Default)]
pub struct Directory {
    topics: RwLock<HashMap<Arc<str>, Arc<Topic>>>,
    brokers: RwLock<Arc<BTreeMap<i32, String>>>,
    racks: RwLock<Arc<BTreeMap<i32, Arc<str>>>>,
}

/// What a broker knows of its cluster. A broker that runs alone has no replicas to host and no peers.
#[derive(Clone, Debug, Default)]
pub struct ClusterView {
    /// The cluster's id.
    pub cluster_id: String,
    /// The topics, for clients.
    pub directory: Arc<Directory>,
    /// The replicas here.
    pub hosting: Arc<Hosting>,
    /// The other brokers.
    pub peers: Arc<Peers>,
}

/// A topic.
#[derive(Debug)]
pub struct Topic {
    /// Its name for clients.
    pub name: Arc<str>,
    /// Another topic of the same name has another.
    pub topic_id: Uuid,
    /// The most bytes of a record batch.
    pub max_message_bytes: usize,
    partitions: RwLock<Partitions>,
}

/// Clients count partitions: one is known when all before it are.
#[derive(Debug, Default)]
struct Partitions {
    known: Vec<Arc<Partition>>,
    early: BTreeMap<usize, Arc<Partition>>,
}

/// A partition.
#[derive(Clone, Debug, Default)]
pub struct Partition {
    /// The broker that leads it.
    pub leader: Option<i32>,
    /// Rises with each leader.
    pub leader_epoch: i32,
    /// The brokers that hold it, the preferred leader first.
    pub replicas: Vec<i32>,
    /// Those that are in sync.
    pub isr: Vec<i32>,
    /// The log, if this broker holds it.
    pub log: Option<StoredPartition>,
    /// The replica, if others may hold the partition, too.
    pub replica: Option<Arc<HostedReplica>>,
}

/// A partition that this broker leads.
#[derive(Clone, Debug)]
pub struct Led {
    /// Its log.
    pub log: StoredPartition,
    /// The epoch in which it is led.
    pub epoch: i32,
    /// The replica; `None` on a broker that runs alone, where all that is durable is committed.
    pub replica: Option<Arc<HostedReplica>>,
}

impl Partition {
    /// The partition, if this broker leads it at this moment.
    pub fn led(&self) -> Option<Led> {
        let log = self.log.as_ref()?;
        Some(Led {
            epoch: log.leader_epoch()?,
            log: log.clone(),
            replica: self.replica.clone(),
        })
    }
}

impl Topic {
    /// A topic of which no partition is known yet.
    pub fn new(name: Arc<str>, topic_id: Uuid, max_message_bytes: usize) -> Self {
        Self {
            name,
            topic_id,
            max_message_bytes,
            partitions: RwLock::default(),
        }
    }

    /// How many partitions it has.
    pub fn partition_count(&self) -> usize {
        self.partitions.read().known.len()
    }

    /// One of them.
    pub fn partition(&self, index: i32) -> Option<Arc<Partition>> {
        let index = usize::try_from(index).ok()?;
        self.partitions.read().known.get(index).cloned()
    }

    /// All of them, by index without gaps.
    pub fn partitions(&self) -> Vec<Arc<Partition>> {
        self.partitions.read().known.clone()
    }

    /// Makes partitions known, or replaces what is known of them: what it costs depends on how many these are, not on how many there are.
    pub fn set(&self, partitions: impl IntoIterator<Item = (i32, Partition)>) {
        let Partitions { known, early } = &mut *self.partitions.write();
        for (index, partition) in partitions {
            let Ok(index) = usize::try_from(index) else {
                continue;
            };
            match known.get_mut(index) {
                Some(known) => *known = Arc::new(partition),
                None => {
                    early.insert(index, Arc::new(partition));
                }
            }
        }
        while let Some(next) = early.remove(&known.len()) {
            known.push(next);
        }
    }
}

impl Led {
    /// Whether it is led still, in the same epoch.
    pub fn is_led(&self) -> bool {
        self.log.leader_epoch() == Some(self.epoch)
    }

    /// The first offset that consumers can't read yet; `None` while a new leader does not know it.
    pub fn latest(&self) -> Option<i64> {
        let replica = self.replica.as_ref();
        let known = replica.is_none_or(|replica| replica.knows_latest());
        known.then(|| self.log.high_watermark())
    }

    /// Waits until all before `end`, appended in this epoch, is committed.
    pub async fn committed(&self, end: i64) -> Result<(), StorageError> {
        match &self.replica {
            Some(replica) => replica.committed(self.epoch, end).await,
            None => Ok(()),
        }
    }
}

impl Directory {
    /// A topic by its name.
    pub fn topic(&self, name: &str) -> Option<Arc<Topic>> {
        self.topics.read().get(name).cloned()
    }

    /// All topics, by name.
    pub fn topics(&self) -> Vec<Arc<Topic>> {
        let mut topics: Vec<_> = self.topics.read().values().cloned().collect();
        topics.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        topics
    }

    /// The brokers that are up, by id, and where clients reach them.
    pub fn brokers(&self) -> Arc<BTreeMap<i32, String>> {
        self.brokers.read().clone()
    }

    /// The broker that leads a partition, if it is up, and where it is reached.
    pub fn leader(&self, partition: &Partition) -> Option<(i32, String)> {
        let id = partition.leader?;
        Some((id, self.brokers().get(&id)?.clone()))
    }

    /// The partition that a key belongs to, if there is the topic.
    pub fn partition_of(&self, topic: &str, key: &str) -> Option<i32> {
        let count = u32::try_from(self.topic(topic)?.partition_count()).ok()?;
        (count > 0).then(|| key_partition(key.as_bytes(), count) as i32)
    }

    /// Replaces what is known of the brokers.
    pub fn set_brokers(&self, brokers: BTreeMap<i32, String>) {
        *self.brokers.write() = Arc::new(brokers);
    }

    /// The brokers' racks, as far as they are known.
    pub fn racks(&self) -> Arc<BTreeMap<i32, Arc<str>>> {
        self.racks.read().clone()
    }

    /// Replaces what is known of racks.
    pub fn set_racks(&self, racks: BTreeMap<i32, String>) {
        let racks = racks.into_iter().map(|(id, rack)| (id, rack.into()));
        *self.racks.write() = Arc::new(racks.collect());
    }

    /// Makes a topic known, or replaces what is known of it.
    pub fn publish(&self, topic: Arc<Topic>) {
        self.topics.write().insert(topic.name.clone(), topic);
    }

    /// The topic of that name and id is not served any more.
    pub fn withdraw(&self, name: &str, topic_id: Uuid) {
        let mut topics = self.topics.write();
        if topics.get(name).is_some_and(|t| t.topic_id == topic_id) {
            topics.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn led_by(leader: i32) -> Partition {
        Partition {
            leader: Some(leader),
            ..Partition::default()
        }
    }

    fn leaders(topic: &Topic) -> Vec<Option<i32>> {
        topic.partitions().iter().map(|p| p.leader).collect()
    }

    #[test]
    fn a_partition_is_known_when_all_before_it_are() {
        let topic = Topic::new("t".into(), Uuid::from_u128(1), 1);
        topic.set([(2, led_by(2)), (-1, led_by(9)), (0, led_by(0))]);
        assert_eq!(leaders(&topic), [Some(0)]);
        assert!(topic.partition(1).is_none() && topic.partition(2).is_none());
        topic.set([(2, led_by(7)), (0, led_by(5))]);
        topic.set([(1, led_by(1))]);
        assert_eq!(leaders(&topic), [Some(5), Some(1), Some(7)]);
        assert_eq!(topic.partition_count(), 3);
        assert_eq!(topic.partition(2).unwrap().leader, Some(7));
        assert!(topic.partition(3).is_none() && topic.partition(-1).is_none());
    }
}
