//! The topics that the store holds, of each the partitions that it holds, and how they come to be.
//!
//! A store that no broker of a Cluster has claimed belongs to a broker that runs alone: it holds whole topics, known by name, and
//! leads all of them. One that is claimed holds what it is told to, known by topic id, and leads what it is told to lead.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use rocksdb::WriteBatch;
use uuid::Uuid;

use super::{
    BrokerIdentity, LogConfig, PartitionId, PartitionLog, StorageError, Store,
    descriptors::{StoreDescriptor, TopicDescriptor, encode_partition},
    keys,
    log::Bounds,
};

/// A topic of which the store holds partitions.
#[derive(Clone, Debug)]
pub struct StoredTopic {
    /// Its name.
    pub name: Arc<str>,
    /// Given when it was created; another topic of the same name has another.
    pub topic_id: Uuid,
    /// Its configuration.
    pub config: LogConfig,
    /// Those that are held, by index.
    pub partitions: BTreeMap<i32, StoredPartition>,
}

/// A partition that the store holds.
pub type StoredPartition = Arc<PartitionLog>;

/// All topics, by id and by name.
#[derive(Default)]
pub(super) struct Topics {
    by_id: HashMap<Uuid, StoredTopic>,
    /// Two of one name are held while one of them is being deleted.
    by_name: BTreeMap<Arc<str>, Vec<Uuid>>,
}

impl Topics {
    pub(super) fn get(&self, topic_id: Uuid) -> Option<&StoredTopic> {
        self.by_id.get(&topic_id)
    }

    fn named(&self, name: &str) -> Option<&StoredTopic> {
        self.by_id.get(self.by_name.get(name)?.first()?)
    }

    fn iter(&self) -> impl Iterator<Item = &StoredTopic> {
        let ids = self.by_name.values().flatten();
        ids.filter_map(|topic_id| self.by_id.get(topic_id))
    }

    /// Adds a topic, or what it does not have yet of the partitions, and changes its configuration.
    pub(super) fn merge(&mut self, topic: StoredTopic) {
        match self.by_id.get_mut(&topic.topic_id) {
            Some(held) => {
                held.config = topic.config;
                held.partitions.extend(topic.partitions);
            }
            None => {
                let ids = self.by_name.entry(topic.name.clone()).or_default();
                ids.push(topic.topic_id);
                self.by_id.insert(topic.topic_id, topic);
            }
        }
    }

    /// Takes partitions out, and the topic with its last one.
    pub(super) fn remove<'a>(&mut self, topic_id: Uuid, indexes: impl Iterator<Item = &'a i32>) {
        let Some(topic) = self.by_id.get_mut(&topic_id) else {
            return;
        };
        for index in indexes {
            topic.partitions.remove(index);
        }
        if !topic.partitions.is_empty() {
            return;
        }
        if let Some(ids) = self.by_name.get_mut(&topic.name) {
            ids.retain(|id| *id != topic_id);
            if ids.is_empty() {
                self.by_name.remove(&topic.name);
            }
        }
        self.by_id.remove(&topic_id);
    }
}

/// What there is to be of a topic.
struct Wanted<'a> {
    topic_id: Uuid,
    name: &'a str,
    indexes: &'a [i32],
    config: LogConfig,
    /// New partitions are led in this epoch from the start.
    leader_epoch: Option<i32>,
}

impl Store {
    /// The broker of a Cluster that has claimed the store.
    pub fn identity(&self) -> Option<BrokerIdentity> {
        self.descriptor.lock().identity.clone()
    }

    /// Binds the store to a broker of a Cluster, for good. Blocks.
    pub fn claim(&self, identity: BrokerIdentity) -> Result<(), StorageError> {
        let mut descriptor = self.descriptor.lock();
        match &descriptor.identity {
            Some(owner) if *owner == identity => return Ok(()),
            Some(owner) => {
                return Err(StorageError::ClaimedByOther {
                    owner: owner.clone(),
                    claimant: identity,
                });
            }
            None => {}
        }
        let topics = self.topics.read().by_id.len();
        if topics > 0 {
            return Err(StorageError::UsedAlone { topics });
        }
        let next = StoreDescriptor {
            identity: Some(identity),
            ..descriptor.clone()
        };
        let mut batch = WriteBatch::default();
        next.put(&mut batch)?;
        self.db.write_meta_durably(batch)?;
        *descriptor = next;
        Ok(())
    }

    /// All topics, by name.
    pub fn topics(&self) -> Vec<StoredTopic> {
        self.topics.read().iter().cloned().collect()
    }

    /// A topic by its id.
    pub fn topic(&self, topic_id: Uuid) -> Option<StoredTopic> {
        self.topics.read().get(topic_id).cloned()
    }

    /// A partition by its topic's id and its index.
    pub fn partition(&self, topic_id: Uuid, index: i32) -> Option<StoredPartition> {
        let topics = self.topics.read();
        topics.get(topic_id)?.partitions.get(&index).cloned()
    }

    /// A topic by its name, for a broker that runs alone: only there is a name enough.
    pub fn topic_named(&self, name: &str) -> Option<StoredTopic> {
        self.topics.read().named(name).cloned()
    }

    /// For a broker that runs alone: creates the topic, or grows it to `partitions` and changes its configuration. It never loses
    /// partitions. All are led in the store's incarnation. Blocks.
    pub fn ensure_topic(
        &self,
        name: &str,
        partitions: usize,
        config: LogConfig,
    ) -> Result<StoredTopic, StorageError> {
        let mut descriptor = self.descriptor.lock();
        if let Some(owner) = &descriptor.identity {
            return Err(StorageError::Claimed {
                owner: owner.clone(),
            });
        }
        let existing = self.topics.read().named(name).map(|topic| topic.topic_id);
        let count = i32::try_from(partitions).unwrap_or(i32::MAX);
        let wanted = Wanted {
            topic_id: existing.unwrap_or_else(Uuid::new_v4),
            name,
            indexes: &(0..count).collect::<Vec<_>>(),
            config,
            leader_epoch: Some(descriptor.incarnation),
        };
        self.ensure(&mut descriptor, wanted)
    }

    /// For a broker of a Cluster: creates those of these partitions that are not held, with one write. They are not led. Returns all that is
    /// held of the topic, which has the configuration from then on. Blocks.
    pub fn ensure_partitions(
        &self,
        topic_id: Uuid,
        name: &str,
        indexes: &[i32],
        config: LogConfig,
    ) -> Result<StoredTopic, StorageError> {
        let mut descriptor = self.descriptor.lock();
        if descriptor.identity.is_none() {
            return Err(StorageError::Unclaimed);
        }
        let wanted = Wanted {
            topic_id,
            name,
            indexes,
            config,
            leader_epoch: None,
        };
        self.ensure(&mut descriptor, wanted)
    }

    /// Brings a topic to what is wanted. Changes of topics come one after another, since each holds the descriptor's lock;
    /// whoever looks topics up meanwhile does not wait for the disk.
    fn ensure(
        &self,
        descriptor: &mut StoreDescriptor,
        wanted: Wanted<'_>,
    ) -> Result<StoredTopic, StorageError> {
        let held = self.topic(wanted.topic_id);
        let name: Arc<str> = match &held {
            Some(topic) => topic.name.clone(),
            None => wanted.name.into(),
        };
        let is_held = |index: &i32| {
            let topic = held.as_ref();
            topic.is_some_and(|topic| topic.partitions.contains_key(index))
        };
        let mut next = descriptor.clone();
        let mut batch = WriteBatch::default();
        let mut added = BTreeMap::new();
        for &index in wanted.indexes.iter().filter(|index| !is_held(index)) {
            added.entry(index).or_insert_with(|| {
                let id = PartitionId(next.next_partition_id);
                next.next_partition_id += 1;
                let key = keys::partition(wanted.topic_id, index);
                batch.put(key, encode_partition(id));
                Arc::new(PartitionLog::new(
                    id,
                    (name.clone(), wanted.topic_id),
                    index,
                    wanted.config,
                    Bounds::default(),
                    wanted.leader_epoch,
                ))
            });
        }
        let topic = StoredTopic {
            name,
            topic_id: wanted.topic_id,
            config: wanted.config,
            partitions: added,
        };
        let configured = held
            .as_ref()
            .is_some_and(|held| held.config == wanted.config);
        if let (true, true, Some(held)) = (configured, topic.partitions.is_empty(), held) {
            return Ok(held);
        }
        next.put(&mut batch)?;
        let stored = TopicDescriptor {
            name: topic.name.to_string(),
            config: wanted.config,
        };
        stored.put(wanted.topic_id, &mut batch)?;
        self.db.write_meta_durably(batch)?;
        *descriptor = next;
        for log in topic.partitions.values() {
            self.db.set_log_start(log.id, 0);
        }
        let mut topics = self.topics.write();
        topics.merge(topic.clone());
        let topic = topics.get(wanted.topic_id).cloned().unwrap_or(topic);
        drop(topics);
        for log in topic.partitions.values() {
            log.set_config(wanted.config);
        }
        Ok(topic)
    }
}
