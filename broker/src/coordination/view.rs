//! What a broker knows of its Cluster: an index of the watched Leases and records, plain data that watch events change.
//!
//! It is never the authority, and may be late. States of a partition are ordered by their epochs, so that a late event can't undo what is known
//! already, be it from this broker's own write; an older state that comes after a newer one (someone restored a backup, or put
//! back an old Lease) is refused.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::{coordination::v1::Lease, core::v1::ConfigMap};
use millrace_crds::coordination::{
    BrokerSession, ControllerState, Held, LeaseError, PartitionLease, ROLE_LABEL, Racks, Role,
    TopicRecord, TopicState,
};
use tracing::{error, warn};
use uuid::Uuid;

/// Names a partition: the topic's id and the partition's index.
pub(crate) type PartitionKey = (Uuid, i32);

/// A broker's session as its Lease says.
#[derive(Clone, Debug)]
pub(crate) struct SeenSession {
    /// What the broker says of itself.
    pub(crate) session: BrokerSession,
    /// Who holds it, in which epoch.
    pub(crate) held: Held,
}

/// A partition, with the object that a new state must replace.
#[derive(Clone, Debug)]
pub(crate) struct SeenPartition {
    /// Its state.
    pub(crate) lease: PartitionLease,
    /// The Lease, less what only the API server needs.
    pub(crate) object: Lease,
}

/// The controller, with its Lease.
#[derive(Clone, Debug)]
pub(crate) struct SeenController {
    /// Who it is.
    pub(crate) state: ControllerState,
    /// Who holds the Lease, in which epoch.
    pub(crate) held: Held,
    /// The Lease.
    pub(crate) object: Lease,
}

/// A thing that watched objects tell of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Item {
    /// A broker's session.
    Session(i32),
    /// The controller.
    Controller,
    /// A partition.
    Partition(PartitionKey),
    /// A topic's record.
    Topic(Uuid),
    /// The brokers' racks.
    Racks,
}

/// The index. What changes it says which item is another now; a renewal alone makes none another.
#[derive(Debug, Default)]
pub(crate) struct View {
    sessions: BTreeMap<i32, SeenSession>,
    controller: Option<SeenController>,
    partitions: BTreeMap<PartitionKey, SeenPartition>,
    topics: BTreeMap<Uuid, TopicRecord>,
    racks: BTreeMap<i32, String>,
    /// What was seen since a list began; what is not among it when the list is complete is gone.
    listed: Option<BTreeSet<Item>>,
    listed_records: Option<BTreeSet<Item>>,
}

impl View {
    /// The brokers' sessions.
    pub(crate) fn sessions(&self) -> &BTreeMap<i32, SeenSession> {
        &self.sessions
    }

    /// The controller's Lease, if there is one.
    pub(crate) fn controller(&self) -> Option<&SeenController> {
        self.controller.as_ref()
    }

    /// All partitions.
    pub(crate) fn partitions(&self) -> &BTreeMap<PartitionKey, SeenPartition> {
        &self.partitions
    }

    /// A topic's partitions, by index.
    pub(crate) fn partitions_of(&self, topic: Uuid) -> impl Iterator<Item = (i32, &SeenPartition)> {
        self.partitions
            .range((topic, i32::MIN)..=(topic, i32::MAX))
            .map(|((_, index), seen)| (*index, seen))
    }

    /// The topics' records.
    pub(crate) fn topics(&self) -> &BTreeMap<Uuid, TopicRecord> {
        &self.topics
    }

    /// The brokers' racks, as far as they are known.
    pub(crate) fn racks(&self) -> &BTreeMap<i32, String> {
        &self.racks
    }

    /// A Lease was made, changed or listed.
    pub(crate) fn apply(&mut self, mut lease: Lease) -> Option<Item> {
        let item = identify(&lease)?;
        if let Some(listed) = &mut self.listed {
            listed.insert(item);
        }
        // Kilobytes for each object, and of no use here.
        lease.metadata.managed_fields = None;
        let applied = match item {
            Item::Session(_) => self.apply_session(&lease),
            Item::Controller => self.apply_controller(lease),
            Item::Partition(_) => self.apply_partition(lease),
            Item::Topic(_) | Item::Racks => Ok(false),
        };
        match applied {
            Ok(changed) => changed.then_some(item),
            Err(error) => {
                error!(%error, "a Lease is left out of account");
                None
            }
        }
    }

    /// A Lease is gone.
    pub(crate) fn delete(&mut self, lease: &Lease) -> Option<Item> {
        let item = identify(lease)?;
        self.forget(item).then_some(item)
    }

    /// All Leases are about to be listed.
    pub(crate) fn begin_list(&mut self) {
        self.listed = Some(BTreeSet::new());
    }

    /// All Leases have been listed: what was not among them is gone.
    pub(crate) fn end_list(&mut self) -> Vec<Item> {
        let Some(listed) = self.listed.take() else {
            return Vec::new();
        };
        let sessions = self.sessions.keys().map(|id| Item::Session(*id));
        let controller = self.controller.iter().map(|_| Item::Controller);
        let partitions = self.partitions.keys().map(|key| Item::Partition(*key));
        let known: BTreeSet<Item> = sessions.chain(controller).chain(partitions).collect();
        let gone = known.difference(&listed).copied();
        gone.filter(|item| self.forget(*item)).collect()
    }

    /// A topic's record, or that of the racks, was made, changed or listed.
    pub(crate) fn apply_record(&mut self, object: &ConfigMap) -> Option<Item> {
        if Racks::is_in(object) {
            return self.apply_racks(object);
        }
        let record = read_topic(object)?;
        let id = record.topic_id;
        let item = Item::Topic(id);
        if let Some(listed) = &mut self.listed_records {
            listed.insert(item);
        }
        let changed = self.topics.get(&id) != Some(&record);
        self.topics.insert(id, record);
        changed.then_some(item)
    }

    fn apply_racks(&mut self, object: &ConfigMap) -> Option<Item> {
        if let Some(listed) = &mut self.listed_records {
            listed.insert(Item::Racks);
        }
        let read = Racks::read(object);
        let read = read.inspect_err(|error| error!(%error, "racks are left out of account"));
        let racks = read.ok()?.racks;
        let changed = self.racks != racks;
        self.racks = racks;
        changed.then_some(Item::Racks)
    }

    /// A record is gone.
    pub(crate) fn delete_record(&mut self, object: &ConfigMap) -> Option<Item> {
        if Racks::is_in(object) {
            return self.forget(Item::Racks).then_some(Item::Racks);
        }
        let item = Item::Topic(read_topic(object)?.topic_id);
        self.forget(item).then_some(item)
    }

    /// All records are about to be listed.
    pub(crate) fn begin_record_list(&mut self) {
        self.listed_records = Some(BTreeSet::new());
    }

    /// All records have been listed: what was not among them is gone.
    pub(crate) fn end_record_list(&mut self) -> Vec<Item> {
        let Some(listed) = self.listed_records.take() else {
            return Vec::new();
        };
        let topics = self.topics.keys().map(|id| Item::Topic(*id));
        let known: BTreeSet<Item> = topics.chain([Item::Racks]).collect();
        let gone = known.difference(&listed).copied();
        gone.filter(|item| self.forget(*item)).collect()
    }

    fn apply_session(&mut self, lease: &Lease) -> Result<bool, LeaseError> {
        let (session, held) = BrokerSession::read(lease)?;
        let id = session.broker_id;
        let changed = self.sessions.get(&id).is_none_or(|known| {
            known.session != session
                || known.held.epoch != held.epoch
                || known.held.holder != held.holder
        });
        self.sessions.insert(id, SeenSession { session, held });
        Ok(changed)
    }

    fn apply_controller(&mut self, object: Lease) -> Result<bool, LeaseError> {
        let (state, held) = ControllerState::read(&object)?;
        let known = self.controller.as_ref();
        // One that was deleted and made again counts from the beginning.
        let is_late = |known: &SeenController| {
            known.held.epoch > held.epoch && known.object.metadata.uid == object.metadata.uid
        };
        if known.is_some_and(is_late) {
            return Ok(false);
        }
        let changed = known
            .is_none_or(|known| known.held.epoch != held.epoch || known.held.holder != held.holder);
        self.controller = Some(SeenController {
            state,
            held,
            object,
        });
        Ok(changed)
    }

    fn apply_partition(&mut self, object: Lease) -> Result<bool, LeaseError> {
        let lease = PartitionLease::read(&object)?;
        let key = (lease.assignment.topic_id, lease.assignment.partition);
        if let Some(known) = self.partitions.get_mut(&key) {
            if lease.epochs() < known.lease.epochs() && !broken!(GoBackInTime) {
                // Mostly an event that is later than this broker's own write.
                return Ok(false);
            }
            if lease == known.lease {
                known.object = object;
                return Ok(false);
            }
            if lease.epochs() == known.lease.epochs() {
                warn!(
                    lease = object.metadata.name,
                    "a partition's Lease was edited without a new partition epoch"
                );
            }
        }
        self.partitions.insert(key, SeenPartition { lease, object });
        Ok(true)
    }

    fn forget(&mut self, item: Item) -> bool {
        match item {
            Item::Session(id) => self.sessions.remove(&id).is_some(),
            Item::Controller => self.controller.take().is_some(),
            Item::Topic(id) => self.topics.remove(&id).is_some(),
            Item::Racks => !std::mem::take(&mut self.racks).is_empty(),
            Item::Partition(key) => {
                let topic = self.topics.get(&key.0);
                if topic.is_some_and(|topic| topic.state == TopicState::Active) {
                    // By hand: the operator makes it again, in a higher epoch. Until then all goes on as it was.
                    error!(topic = %key.0, partition = key.1, "the Lease of a partition that is served was deleted");
                    return false;
                }
                self.partitions.remove(&key).is_some()
            }
        }
    }
}

fn read_topic(object: &ConfigMap) -> Option<TopicRecord> {
    TopicRecord::read(object)
        .inspect_err(|error| error!(%error, "a topic's record is left out of account"))
        .ok()
}

/// What a Lease is about; `None` if it is not one of Millrace's.
fn identify(lease: &Lease) -> Option<Item> {
    let role = lease.metadata.labels.as_ref()?.get(ROLE_LABEL)?.as_str();
    let item = if role == Role::Broker.as_str() {
        BrokerSession::read(lease).map(|(session, _)| Item::Session(session.broker_id))
    } else if role == Role::Controller.as_str() {
        Ok(Item::Controller)
    } else if role == Role::Partition.as_str() {
        PartitionLease::read(lease)
            .map(|l| Item::Partition((l.assignment.topic_id, l.assignment.partition)))
    } else {
        return None;
    };
    item.inspect_err(|error| error!(%error, "a Lease is left out of account"))
        .ok()
}

#[cfg(test)]
mod tests {
    use millrace_crds::{
        TopicConfig,
        coordination::{Leader, PartitionAssignment, Replica},
    };

    use super::*;

    const TOPIC: Uuid = Uuid::from_u128(1);

    fn partition(index: i32, leader_epoch: i32, partition_epoch: i64) -> Lease {
        let mut assignment = PartitionAssignment::new(TOPIC, index, vec![0]);
        assignment.partition_epoch = partition_epoch;
        assignment.write_id = Uuid::from_u128(7);
        assignment.leader = Some(Leader {
            id: 0,
            broker_epoch: 1,
        });
        assignment.isr = vec![Replica {
            id: 0,
            store: Uuid::from_u128(2),
        }];
        let held = Held {
            holder: Some("p".into()),
            epoch: leader_epoch,
            ..Held::default()
        };
        let mut lease = Lease::default();
        PartitionLease { assignment, held }.write(&mut lease, "main");
        lease
    }

    fn session(id: i32, epoch: i32, renewed: i64) -> Lease {
        let mut lease = Lease::default();
        let session = BrokerSession {
            broker_id: id,
            store_id: Uuid::from_u128(2),
            pod: "p".into(),
            address: "p:1".into(),
            release: "0".into(),
            draining: false,
        };
        let held = Held {
            holder: Some("p/u/b".into()),
            epoch,
            renewed: jiff::Timestamp::from_second(renewed)
                .ok()
                .map(k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime),
            ..Held::default()
        };
        session.write(&mut lease, "main", held);
        lease
    }

    fn record(state: TopicState) -> ConfigMap {
        let document = serde_json::json!({
            "apiVersion": "millrace.dev/v1alpha1", "kind": "Topic", "metadata": {"name": "orders"}, "spec": {}
        });
        let topic = serde_json::from_value(document).unwrap();
        let mut object = ConfigMap::default();
        let record = TopicRecord {
            topic_id: TOPIC,
            namespace: "shop".into(),
            topic: "orders".into(),
            topic_uid: "u".into(),
            state,
            partitions_made: 1,
            config: TopicConfig::try_from(&topic).unwrap(),
        };
        record.write(&mut object, "main");
        object
    }

    #[test]
    fn an_older_state_never_replaces_a_newer_one() {
        let mut view = View::default();
        let key = (TOPIC, 0);
        assert_eq!(view.apply(partition(0, 3, 8)), Some(Item::Partition(key)));
        for (leader_epoch, partition_epoch) in [(3, 7), (2, 9), (3, 8)] {
            assert_eq!(
                view.apply(partition(0, leader_epoch, partition_epoch)),
                None
            );
            assert_eq!(view.partitions()[&key].lease.epochs(), (3, 8));
        }
        assert!(view.apply(partition(0, 4, 1)).is_some());
        assert_eq!(view.partitions()[&key].lease.epochs(), (4, 1));
    }

    #[test]
    fn a_write_without_a_new_state_still_brings_the_version_to_replace() {
        let mut view = View::default();
        view.apply(partition(0, 1, 1));
        let mut labelled = partition(0, 1, 1);
        labelled.metadata.resource_version = Some("9".into());
        assert_eq!(view.apply(labelled), None);
        let seen = &view.partitions()[&(TOPIC, 0)];
        assert_eq!(seen.object.metadata.resource_version.as_deref(), Some("9"));
    }

    #[test]
    fn renewals_are_no_news() {
        let mut view = View::default();
        assert_eq!(view.apply(session(4, 1, 1)), Some(Item::Session(4)));
        assert_eq!(view.apply(session(4, 1, 2)), None);
        assert_eq!(view.apply(session(4, 2, 2)), Some(Item::Session(4)));
    }

    #[test]
    fn what_a_list_does_not_show_is_gone() {
        let mut view = View::default();
        view.apply(partition(0, 1, 1));
        view.apply(partition(1, 1, 1));
        view.apply(session(4, 1, 1));
        view.apply(session(5, 1, 1));
        view.begin_list();
        view.apply(partition(1, 1, 1));
        view.apply(session(5, 1, 2));
        assert_eq!(
            view.end_list(),
            [Item::Session(4), Item::Partition((TOPIC, 0))]
        );
        assert_eq!(view.partitions().len(), 1);
        assert!(view.end_list().is_empty());
    }

    #[test]
    fn a_deleted_lease_changes_nothing_while_its_topic_is_served() {
        for (state, kept) in [
            (TopicState::Active, true),
            (TopicState::Retained, false),
            (TopicState::Deleting, false),
        ] {
            let mut view = View::default();
            assert_eq!(view.apply_record(&record(state)), Some(Item::Topic(TOPIC)));
            view.apply(partition(0, 3, 8));
            let changed = view.delete(&partition(0, 3, 8));
            assert_eq!(changed.is_none(), kept, "{state:?}");
            // Made again from nothing, it would be older, hence is refused.
            let older = view.apply(partition(0, 0, 0));
            assert_eq!(older.is_none(), kept, "{state:?}");
        }
    }

    #[test]
    fn what_can_not_be_read_is_left_out() {
        let mut view = View::default();
        let mut lease = partition(0, 1, 1);
        lease.metadata.annotations = None;
        assert_eq!(view.apply(lease), None);
        assert_eq!(view.apply(Lease::default()), None);
        assert_eq!(view.apply_record(&ConfigMap::default()), None);
        assert!(view.partitions().is_empty());
    }
}
