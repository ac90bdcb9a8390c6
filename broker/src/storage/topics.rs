//! The topics that the store holds, of each the partitions that it holds, and how they come to be.
//!
//! A store that no broker of a Cluster has claimed belongs to a broker that runs alone: it holds whole topics, known by name, and
//! leads all of them. One that is claimed holds what it is told to, known by topic id, and leads what it is told to lead.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry},
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

    /// Adds a topic, or what it does not have yet of the partitions, and changes its configuration. The topic as it is then.
    pub(super) fn merge(&mut self, topic: StoredTopic) -> &StoredTopic {
        match self.by_id.entry(topic.topic_id) {
            Entry::Occupied(held) => {
                let held = held.into_mut();
                held.config = topic.config;
                held.partitions.extend(topic.partitions);
                held
            }
            Entry::Vacant(vacant) => {
                let ids = self.by_name.entry(topic.name.clone()).or_default();
                ids.push(topic.topic_id);
                vacant.insert(topic)
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
        self.ensure(&mut descriptor, wanted, StoredTopic::clone)
    }

    /// For a broker of a Cluster: creates those of these partitions that are not held, with one write. They are not led. The topic has the
    /// configuration from then on. Blocks.
    pub fn ensure_partitions(
        &self,
        topic_id: Uuid,
        name: &str,
        indexes: &[i32],
        config: LogConfig,
    ) -> Result<(), StorageError> {
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
        self.ensure(&mut descriptor, wanted, |_| ())
    }

    /// Brings a topic to what is wanted, and reads something of it. Changes of topics come one after another, since each holds the descriptor's
    /// lock; whoever looks topics up meanwhile does not wait for the disk.
    fn ensure<T>(
        &self,
        descriptor: &mut StoreDescriptor,
        wanted: Wanted<'_>,
        read: impl FnOnce(&StoredTopic) -> T,
    ) -> Result<T, StorageError> {
        let mut missing: BTreeSet<i32> = wanted.indexes.iter().copied().collect();
        let mut name: Arc<str> = wanted.name.into();
        let mut is_changed = false;
        if let Some(held) = self.topics.read().get(wanted.topic_id) {
            missing.retain(|index| !held.partitions.contains_key(index));
            is_changed = held.config != wanted.config;
            if missing.is_empty() && !is_changed {
                return Ok(read(held));
            }
            name = held.name.clone();
        }
        let mut next = descriptor.clone();
        let mut batch = WriteBatch::default();
        let mut added = BTreeMap::new();
        for index in missing {
            let id = PartitionId(next.next_partition_id);
            next.next_partition_id += 1;
            let key = keys::partition(wanted.topic_id, index);
            batch.put(key, encode_partition(id));
            let log = PartitionLog::new(
                id,
                (name.clone(), wanted.topic_id),
                index,
                wanted.config,
                Bounds::default(),
                wanted.leader_epoch,
            );
            added.insert(index, Arc::new(log));
        }
        let topic = StoredTopic {
            name,
            topic_id: wanted.topic_id,
            config: wanted.config,
            partitions: added,
        };
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
        let topic = topics.merge(topic);
        if is_changed {
            for log in topic.partitions.values() {
                log.set_config(wanted.config);
            }
        }
        Ok(read(topic))
    }
}
