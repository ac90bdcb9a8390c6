//! What this broker does about its partitions: holds, leads, gives up, deletes. It follows the [`View`](super::view::View), topic by topic,
//! and tells the [`Directory`] what came of it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use millrace_crds::coordination::{PartitionLease, Replica, TopicRecord, TopicState};
use tracing::{info, warn};
use uuid::Uuid;

use crate::{
    directory::{Directory, Partition, Topic},
    storage::{StorageError, Store, StoredPartition},
    topics::log_config,
};

/// This process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Me {
    /// The broker's id.
    pub(super) id: i32,
    /// Its epoch.
    pub(super) epoch: i32,
    /// What is on its volume.
    pub(super) store: Uuid,
}

/// A topic as it should be.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Its id.
    pub(super) topic_id: Uuid,
    /// `None`: there is no such topic any more, which is no reason to delete data.
    pub(super) record: Option<TopicRecord>,
    /// Its partitions, by index.
    pub(super) partitions: BTreeMap<i32, PartitionLease>,
}

/// Brings the store and the directory to what is wanted. Blocks.
pub(super) struct Replicas {
    me: Me,
    store: Arc<Store>,
    directory: Arc<Directory>,
    /// Under which name a topic was last published.
    published: HashMap<Uuid, Arc<str>>,
}

impl Me {
    /// The epoch in which this process leads the partition, if it does.
    pub(super) fn leads(&self, lease: &PartitionLease) -> Option<i32> {
        let leader = lease.assignment.leader.as_ref()?;
        let own = Replica {
            id: self.id,
            store: self.store,
        };
        let is_me = leader.id == self.id && leader.broker_epoch == self.epoch;
        (is_me && lease.assignment.isr.contains(&own)).then_some(lease.held.epoch)
    }
}

impl Replicas {
    /// Of this process.
    pub(super) fn new(me: Me, store: Arc<Store>, directory: Arc<Directory>) -> Self {
        Self {
            me,
            store,
            directory,
            published: HashMap::new(),
        }
    }

    /// Holds and leads what it should, and publishes the topic, if it is served.
    pub(super) fn follow(&mut self, wanted: &Wanted) -> Result<(), StorageError> {
        match &wanted.record {
            Some(record) if record.state == TopicState::Active => self.serve(record, wanted),
            _ => {
                self.withdraw(wanted.topic_id);
                Ok(())
            }
        }
    }

    /// Deletes all that is held of the topic.
    pub(super) fn delete(&mut self, topic_id: Uuid) -> Result<(), StorageError> {
        self.withdraw(topic_id);
        let Some(held) = self.store.topic(topic_id) else {
            return Ok(());
        };
        let partitions: Vec<_> = held.partitions.keys().map(|i| (topic_id, *i)).collect();
        self.store.delete_partitions(&partitions)?;
        info!(topic = %held.name, partitions = partitions.len(), "topic deleted: its records are gone from this broker");
        Ok(())
    }

    fn serve(&mut self, record: &TopicRecord, wanted: &Wanted) -> Result<(), StorageError> {
        let topic_id = wanted.topic_id;
        let config = log_config(&record.config);
        let led: BTreeMap<i32, i32> = wanted
            .partitions
            .iter()
            .filter_map(|(index, lease)| Some((*index, self.me.leads(lease)?)))
            .collect();
        let indexes: Vec<i32> = led.keys().copied().collect();
        let held = self
            .store
            .ensure_partitions(topic_id, &record.config.name, &indexes, config)?
            .partitions;
        for (index, log) in &held {
            match led.get(index) {
                Some(epoch) => log.lead(*epoch)?,
                None => log.resign(),
            }
        }
        let name: Arc<str> = record.config.name.as_str().into();
        // Clients count partitions: one is known when all before it are.
        let known = (0..).map_while(|index| wanted.partitions.get(&index).map(|l| (index, l)));
        let partitions = known.map(|(index, lease)| describe(lease, held.get(&index).cloned()));
        self.directory.publish(Topic {
            name: name.clone(),
            topic_id,
            max_message_bytes: config.max_message_bytes,
            partitions: partitions.collect(),
        });
        self.published.insert(topic_id, name);
        Ok(())
    }

    fn withdraw(&mut self, topic_id: Uuid) {
        if let Some(name) = self.published.remove(&topic_id) {
            self.directory.withdraw(&name, topic_id);
        }
        let Some(held) = self.store.topic(topic_id) else {
            return;
        };
        for log in held.partitions.values() {
            if log.leader_epoch().is_some() {
                warn!(topic = %held.name, partition = log.index, "no longer served");
            }
            log.resign();
        }
    }
}

fn describe(lease: &PartitionLease, log: Option<StoredPartition>) -> Partition {
    let assignment = &lease.assignment;
    Partition {
        leader: assignment.leader.as_ref().map(|leader| leader.id),
        leader_epoch: lease.held.epoch,
        replicas: assignment.replicas.clone(),
        isr: assignment.isr.iter().map(|replica| replica.id).collect(),
        log,
    }
}
