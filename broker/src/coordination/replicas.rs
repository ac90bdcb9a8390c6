//! What this broker does about its partitions: holds, leads, gives up, deletes. It follows the [`View`](super::view::View), topic by topic
//! and of each what has changed, and tells the [directory](crate::directory) what came of it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Instant,
};

use millrace_crds::coordination::{PartitionAssignment, PartitionLease, TopicRecord, TopicState};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::context::Context;
use crate::{
    directory::{Partition, Topic},
    partition::{HostedReplica, Part},
    replication::{Follower, Me},
    storage::{StorageError, Store, StoredPartition},
    topics::log_config,
};

/// A topic as it should be.
#[derive(Debug)]
pub(super) struct Wanted {
    /// Its id.
    pub(super) topic_id: Uuid,
    /// `None`: there is no such topic any more, which is no reason to delete data.
    pub(super) record: Option<TopicRecord>,
    /// The partitions to look at, by index.
    pub(super) partitions: BTreeMap<i32, PartitionLease>,
    /// Whether these are all that there are, and those that have no Lease are to be looked at, too.
    pub(super) is_whole: bool,
    /// Those of which the API server itself says that others hold them in this broker's place.
    pub(super) let_go: BTreeSet<i32>,
}

/// Brings the store, the replicas and the directory to what is wanted. Blocks.
pub(super) struct Replicas {
    context: Arc<Context>,
    store: Arc<Store>,
    /// The topics as they were last published.
    published: HashMap<Uuid, Arc<Topic>>,
}

/// What this process is to be to a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// To lead it in that epoch.
    Lead(i32),
    /// To follow its leader.
    Follow(Follower),
    /// To hold it, for someone to lead.
    Hold,
}

/// What the Lease of a partition asks of this process; `None` if it is nothing to it.
pub(crate) fn wish(me: Me, lease: &PartitionLease) -> Option<Wish> {
    let assignment = &lease.assignment;
    let own = me.replica();
    let is_replica = assignment.replicas.contains(&me.id) || assignment.isr.contains(&own);
    match assignment.leader {
        Some(leader) if leader.id != me.id => is_replica.then_some(Wish::Follow(Follower {
            epoch: lease.held.epoch,
            leader: leader.id,
            last_unclean_epoch: assignment.last_unclean_epoch,
        })),
        // Leadership is bound to one process, and to what it had on its volume.
        Some(leader)
            if (leader.broker_epoch == me.epoch || broken!(ResumeEpoch))
                && assignment.isr.contains(&own) =>
        {
            Some(Wish::Lead(lease.held.epoch))
        }
        _ => is_replica.then_some(Wish::Hold),
    }
}

/// Whether what this process has of a partition is to be deleted: others hold it in its place, and all of them have it. `last_epoch` is that of its newest
/// records: by an older Lease, which someone has put back, nothing is deleted. The Lease must have been read from the API server itself: by one that is late
/// this replica may be in sync again.
///
/// What makes that safe: the leader can't count this replica again by what it said before, since whoever gives the partition other replicas gives it another
/// leader epoch ([`PartitionLease::reassigned`]), in which it has to say anew what it has.
pub(crate) fn is_let_go(me: Me, lease: &PartitionLease, last_epoch: Option<i32>) -> bool {
    let PartitionAssignment { replicas, isr, .. } = &lease.assignment;
    let is_in_sync = |id: &i32| isr.iter().any(|replica| replica.id == *id);
    wish(me, lease).is_none()
        && !replicas.is_empty()
        && replicas.iter().all(is_in_sync)
        && last_epoch.is_none_or(|last| last <= lease.held.epoch)
}

impl Wish {
    pub(crate) fn part(&self) -> Part {
        match self {
            Wish::Lead(epoch) => Part::Leader(*epoch),
            Wish::Follow(follower) => Part::Follower(follower.epoch),
            Wish::Hold => Part::Neither,
        }
    }

    pub(crate) fn epoch(&self) -> Option<i32> {
        match self {
            Wish::Lead(epoch) => Some(*epoch),
            Wish::Follow(follower) => Some(follower.epoch),
            Wish::Hold => None,
        }
    }

    /// Whether it stems from a Lease that is older than the newest epoch of which this replica knows: someone put an old state back, or it was read late. Who
    /// follows a leader that was deposed cuts off what was committed since, or has it commit what others have cut off.
    pub(crate) fn is_older_than(&self, newest_epoch: Option<i32>) -> bool {
        let is_older = |epoch| newest_epoch.is_some_and(|newest| newest > epoch);
        self.epoch().is_some_and(is_older) && !broken!(FollowThePast)
    }
}

impl Replicas {
    /// Of this process.
    pub(super) fn new(context: Arc<Context>, store: Arc<Store>) -> Self {
        Self {
            context,
            store,
            published: HashMap::new(),
        }
    }

    /// Holds, leads and follows what it should, and publishes the topic, if it is served.
    pub(super) fn follow(&mut self, wanted: &Wanted) -> Result<(), StorageError> {
        match &wanted.record {
            Some(record) if record.state == TopicState::Active => self.serve(record, wanted),
            _ => {
                self.withdraw(wanted.topic_id);
                Ok(())
            }
        }
    }

    /// The partitions of which this broker may delete what it has, if that is still so.
    pub(super) fn let_go(&self, wanted: &Wanted) -> Vec<i32> {
        let active = wanted.record.as_ref();
        if active.is_none_or(|record| record.state != TopicState::Active) {
            return Vec::new();
        }
        let me = self.context.me;
        let is_let_go = |(index, log): &(i32, StoredPartition)| {
            let lease = wanted.partitions.get(index);
            lease.is_some_and(|lease| is_let_go(me, lease, log.newest_epoch()))
        };
        let let_go = self.held(wanted).into_iter().filter(is_let_go);
        let_go.map(|(index, _)| index).collect()
    }

    /// What the store has of the partitions to look at.
    fn held(&self, wanted: &Wanted) -> BTreeMap<i32, StoredPartition> {
        let topic_id = wanted.topic_id;
        if wanted.is_whole {
            let topic = self.store.topic(topic_id);
            return topic.map(|topic| topic.partitions).unwrap_or_default();
        }
        let held = |index: &i32| Some((*index, self.store.partition(topic_id, *index)?));
        wanted.partitions.keys().filter_map(held).collect()
    }

    /// Deletes all that is held of the topic.
    pub(super) fn delete(&mut self, topic_id: Uuid) -> Result<(), StorageError> {
        self.withdraw(topic_id);
        let Some(held) = self.store.topic(topic_id) else {
            return Ok(());
        };
        let partitions: Vec<_> = held.partitions.keys().map(|i| (topic_id, *i)).collect();
        self.delete_partitions(&partitions)?;
        info!(topic = %held.name, partitions = partitions.len(), "topic deleted: its records are gone from this broker");
        Ok(())
    }

    fn delete_partitions(&self, partitions: &[(Uuid, i32)]) -> Result<(), StorageError> {
        self.store.delete_partitions(partitions)?;
        for key in partitions {
            self.context.hosting.remove(*key);
        }
        Ok(())
    }

    fn serve(&mut self, record: &TopicRecord, wanted: &Wanted) -> Result<(), StorageError> {
        let topic_id = wanted.topic_id;
        let me = self.context.me;
        let config = log_config(&record.config);
        let min_in_sync = min_in_sync(record);
        let wishes: BTreeMap<i32, Wish> = wanted
            .partitions
            .iter()
            .filter_map(|(index, lease)| Some((*index, wish(me, lease)?)))
            .collect();
        let indexes: Vec<i32> = wishes.keys().copied().collect();
        self.store
            .ensure_partitions(topic_id, &record.config.name, &indexes, config)?;
        let hosted = self.held(wanted).into_iter();
        let hosted = hosted.map(|(index, log)| (index, self.host((topic_id, index), &log)));
        let (let_go, hosted): (BTreeMap<_, _>, BTreeMap<_, _>) =
            hosted.partition(|(index, _)| wanted.let_go.contains(index));
        // First, so that who is told that this broker no longer leads is told, too, who does.
        self.publish(record, wanted, &hosted, config.max_message_bytes);
        let mut changes = Vec::new();
        for (index, replica) in &hosted {
            let wish = wishes.get(index).unwrap_or(&Wish::Hold);
            let lease = wanted.partitions.get(index);
            let key = (topic_id, *index);
            if replica.part() == wish.part() {
                if let Some(lease) = lease {
                    replica.adopt(lease, min_in_sync);
                }
                continue;
            }
            replica.stop();
            self.context.fetching.unfollow(key);
            changes.push((key, replica, wish, lease));
        }
        for (index, replica) in &let_go {
            replica.stop();
            self.context.fetching.unfollow((topic_id, *index));
        }
        if changes.is_empty() && let_go.is_empty() {
            return Ok(());
        }
        // What was accepted before is finished: from here on the logs stand still.
        futures::executor::block_on(self.store.settled())?;
        if !let_go.is_empty() {
            let indexes: Vec<i32> = let_go.keys().copied().collect();
            info!(topic = %record.config.name, partitions = ?indexes, "other brokers hold these partitions now: their records are deleted here");
            let keys: Vec<_> = indexes.iter().map(|index| (topic_id, *index)).collect();
            self.delete_partitions(&keys)?;
        }
        // Before anything is done in them: of what is done in memory only, the next process knows nothing.
        let begun = changes.iter().filter_map(|(_, replica, wish, _)| {
            let log = replica.log();
            let epoch = wish
                .epoch()
                .filter(|_| !wish.is_older_than(log.newest_epoch()))?;
            (Some(epoch) > log.newest_epoch()).then(|| (log.clone(), epoch))
        });
        let begun: Vec<_> = begun.collect();
        if !begun.is_empty() {
            self.store.note_epochs(&begun)?;
        }
        for (key, replica, wish, lease) in changes {
            let last = replica.log().newest_epoch();
            if wish.is_older_than(last) {
                error!(topic = %replica.log().topic, partition = key.1, ?wish, ?last, "the partition's Lease is older than this replica's records: someone put an old state back. The partition is neither led nor followed here; write a higher spec.leaseTransitions into its Lease");
                continue;
            }
            match (wish, lease) {
                (Wish::Lead(_), Some(lease)) => {
                    replica.lead(lease.clone(), min_in_sync, Instant::now())?;
                }
                (Wish::Follow(follower), _) => {
                    replica.follow(*follower)?;
                    self.context
                        .fetching
                        .follow(key, *follower, replica.clone());
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn host(&self, key: (Uuid, i32), log: &StoredPartition) -> Arc<HostedReplica> {
        let context = &self.context;
        context.hosting.get_or_insert(key, || {
            HostedReplica::new(context.me, context.replication, log.clone())
        })
    }

    fn publish(
        &mut self,
        record: &TopicRecord,
        wanted: &Wanted,
        hosted: &BTreeMap<i32, Arc<HostedReplica>>,
        max_message_bytes: usize,
    ) {
        let topic_id = wanted.topic_id;
        let partitions = wanted.partitions.iter();
        let partitions =
            partitions.map(|(index, lease)| (*index, describe(lease, hosted.get(index).cloned())));
        if !wanted.is_whole {
            // If it is not published, it could not be looked at as a whole, and will be.
            if let Some(topic) = self.published.get(&topic_id) {
                topic.set(partitions);
            }
            return;
        }
        let name = record.config.name.as_str().into();
        let topic = Arc::new(Topic::new(name, topic_id, max_message_bytes));
        topic.set(partitions);
        self.context.directory.publish(topic.clone());
        self.published.insert(topic_id, topic);
    }

    fn withdraw(&mut self, topic_id: Uuid) {
        if let Some(topic) = self.published.remove(&topic_id) {
            self.context.directory.withdraw(&topic.name, topic_id);
        }
        let Some(held) = self.store.topic(topic_id) else {
            return;
        };
        for (index, log) in &held.partitions {
            let key = (topic_id, *index);
            let Some(replica) = self.context.hosting.get(key) else {
                continue;
            };
            if replica.part() != Part::Neither {
                warn!(topic = %held.name, partition = log.index, "no longer served");
                replica.stop();
                self.context.fetching.unfollow(key);
            }
        }
    }
}

/// The topic's `min.insync.replicas`.
pub(crate) fn min_in_sync(record: &TopicRecord) -> usize {
    record.config.min_insync_replicas.unwrap_or(1) as usize
}

fn describe(lease: &PartitionLease, replica: Option<Arc<HostedReplica>>) -> Partition {
    let assignment = &lease.assignment;
    Partition {
        leader: assignment.leader.as_ref().map(|leader| leader.id),
        leader_epoch: lease.held.epoch,
        replicas: assignment.replicas.clone(),
        isr: assignment.isr.iter().map(|replica| replica.id).collect(),
        log: replica.as_ref().map(|replica| replica.log().clone()),
        replica,
    }
}

#[cfg(test)]
mod tests {
    use millrace_crds::coordination::{Held, Leader, PartitionAssignment, Replica};

    use super::*;

    #[test]
    fn a_process_leads_only_as_itself_and_with_the_volume_that_is_in_sync() {
        let store = |number| Uuid::from_u128(number);
        let me = Me {
            id: 1,
            epoch: 5,
            store: store(11),
        };
        let follow = Wish::Follow(Follower {
            epoch: 3,
            leader: 0,
            last_unclean_epoch: Some(2),
        });
        for (name, replicas, isr, leader, expected) in [
            (
                "leads",
                vec![0, 1],
                vec![(0, 10), (1, 11)],
                Some((1, 5)),
                Some(Wish::Lead(3)),
            ),
            (
                "was started again",
                vec![0, 1],
                vec![(1, 11)],
                Some((1, 4)),
                Some(Wish::Hold),
            ),
            (
                "lost its data",
                vec![0, 1],
                vec![(1, 12)],
                Some((1, 5)),
                Some(Wish::Hold),
            ),
            (
                "follows",
                vec![0, 1],
                vec![(0, 10)],
                Some((0, 9)),
                Some(follow.clone()),
            ),
            (
                "no one leads",
                vec![0, 1],
                vec![(0, 10)],
                None,
                Some(Wish::Hold),
            ),
            (
                "is no replica",
                vec![0, 2],
                vec![(0, 10)],
                Some((0, 9)),
                None,
            ),
            (
                "is no replica yet in sync",
                vec![0, 2],
                vec![(0, 10), (1, 11)],
                Some((0, 9)),
                Some(follow.clone()),
            ),
        ] {
            let mut assignment = PartitionAssignment::new(store(99), 0, replicas);
            assignment.isr = isr
                .into_iter()
                .map(|(id, number)| Replica {
                    id,
                    store: store(number),
                })
                .collect();
            assignment.leader = leader.map(|(id, broker_epoch)| Leader { id, broker_epoch });
            assignment.last_unclean_epoch = Some(2);
            let held = Held {
                epoch: 3,
                ..Held::default()
            };
            assert_eq!(
                wish(me, &PartitionLease { assignment, held }),
                expected,
                "{name}"
            );
        }
    }

    #[test]
    fn a_lease_older_than_the_log_is_neither_led_nor_followed_by() {
        let follow = Wish::Follow(Follower {
            epoch: 3,
            leader: 0,
            last_unclean_epoch: None,
        });
        for (wish, last_epoch, expected) in [
            (Wish::Lead(3), Some(4), true),
            (Wish::Lead(3), Some(3), false),
            (Wish::Lead(3), None, false),
            (follow.clone(), Some(4), true),
            (follow, Some(3), false),
            (Wish::Hold, Some(4), false),
        ] {
            assert_eq!(wish.is_older_than(last_epoch), expected, "{wish:?}");
        }
    }
}
