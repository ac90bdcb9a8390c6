//! All partitions' Leases. Those that were deleted by hand are remembered, since nothing else knows their leader epochs.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::coordination::v1::Lease;
use millrace_crds::coordination::PartitionLease;
use uuid::Uuid;

use super::ClusterId;

/// A Lease that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    /// What it says.
    pub(crate) lease: PartitionLease,
    /// For deletes that must not hit a later state.
    pub(crate) resource_version: String,
}

/// A topic's partitions.
#[derive(Clone, Debug, Default)]
pub(crate) struct Topic {
    /// Those that have a Lease.
    pub(crate) there: BTreeMap<i32, Held>,
    /// Those that had one, as it was last seen.
    pub(crate) gone: BTreeMap<i32, PartitionLease>,
    /// Those whose Lease can't be read, and why.
    pub(crate) unreadable: BTreeMap<i32, String>,
    /// Where partitions shall be whose Leases are being made.
    pub(crate) reserved: BTreeMap<i32, Vec<i32>>,
}

/// Which partition a Lease is of, by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeaseId {
    pub(crate) cluster: ClusterId,
    pub(crate) topic_id: Uuid,
    pub(crate) partition: i32,
}

impl LeaseId {
    /// Reads `<cluster>-<topic id>-<partition>`.
    pub(crate) fn parse(namespace: &str, name: &str) -> Option<Self> {
        const UUID_LENGTH: usize = 36;
        let (rest, partition) = name.rsplit_once('-')?;
        let at = rest.len().checked_sub(UUID_LENGTH)?;
        let (cluster, topic_id) = (rest.get(..at)?, rest.get(at..)?);
        Some(Self {
            cluster: ClusterId::new(namespace, cluster.strip_suffix('-')?),
            topic_id: Uuid::try_parse(topic_id).ok()?,
            partition: partition.parse().ok()?,
        })
    }
}

/// The partitions of all Clusters.
#[derive(Default)]
pub(crate) struct Partitions {
    clusters: HashMap<ClusterId, HashMap<Uuid, Topic>>,
}

impl Partitions {
    /// Takes in a Lease, unless a later state of it is known. Answers whose it is, if anything has changed.
    pub(crate) fn apply(&mut self, lease: &Lease) -> Option<LeaseId> {
        let metadata = &lease.metadata;
        let namespace = metadata.namespace.as_deref().unwrap_or_default();
        let id = LeaseId::parse(namespace, metadata.name.as_deref().unwrap_or_default())?;
        let topic = self.topic_mut(&id);
        let held = match PartitionLease::read(lease) {
            Ok(lease) => Held {
                lease,
                resource_version: metadata.resource_version.clone().unwrap_or_default(),
            },
            Err(error) => {
                let reason = error.to_string();
                let before = topic.unreadable.insert(id.partition, reason.clone());
                return (before != Some(reason)).then_some(id);
            }
        };
        topic.unreadable.remove(&id.partition);
        topic.reserved.remove(&id.partition);
        topic.gone.remove(&id.partition);
        let before = topic.there.get(&id.partition);
        if before.is_some_and(|before| before.lease.epochs() > held.lease.epochs()) {
            return None;
        }
        let changed = before.is_none_or(|before| before.lease != held.lease);
        topic.there.insert(id.partition, held);
        changed.then_some(id)
    }

    /// Takes note that a Lease is gone.
    pub(crate) fn delete(&mut self, namespace: &str, name: &str) -> Option<LeaseId> {
        let id = LeaseId::parse(namespace, name)?;
        // A topic that was forgotten is not remembered for the end of its last Leases.
        let topic = self.clusters.get_mut(&id.cluster)?.get_mut(&id.topic_id)?;
        topic.unreadable.remove(&id.partition);
        let held = topic.there.remove(&id.partition)?;
        topic.gone.insert(id.partition, held.lease);
        Some(id)
    }

    /// A topic's partitions.
    pub(crate) fn topic(&self, cluster: &ClusterId, topic_id: Uuid) -> Topic {
        let topics = self.clusters.get(cluster);
        topics
            .and_then(|topics| topics.get(&topic_id))
            .cloned()
            .unwrap_or_default()
    }

    /// All topics of a Cluster.
    pub(crate) fn topics(&self, cluster: &ClusterId) -> impl Iterator<Item = (&Uuid, &Topic)> {
        self.clusters.get(cluster).into_iter().flatten()
    }

    /// The Lease is being made, there.
    pub(crate) fn reserve(
        &mut self,
        cluster: &ClusterId,
        topic_id: Uuid,
        placed: BTreeMap<i32, Vec<i32>>,
    ) {
        let topics = self.clusters.entry(cluster.clone()).or_default();
        topics.entry(topic_id).or_default().reserved.extend(placed);
    }

    /// The topic is no more: its Leases were deleted on purpose.
    pub(crate) fn forget(&mut self, cluster: &ClusterId, topic_id: Uuid) {
        if let Some(topics) = self.clusters.get_mut(cluster) {
            topics.remove(&topic_id);
            if topics.is_empty() {
                self.clusters.remove(cluster);
            }
        }
    }

    /// The Cluster is no more.
    pub(crate) fn forget_cluster(&mut self, cluster: &ClusterId) {
        self.clusters.remove(cluster);
    }

    fn topic_mut(&mut self, id: &LeaseId) -> &mut Topic {
        let topics = self.clusters.entry(id.cluster.clone()).or_default();
        topics.entry(id.topic_id).or_default()
    }
}

#[cfg(test)]
mod tests {
    use millrace_crds::coordination::{self, PartitionAssignment};

    use super::*;

    const TOPIC: Uuid = Uuid::from_u128(7);

    fn lease(epoch: i32, partition_epoch: i64) -> Lease {
        let mut assignment = PartitionAssignment::new(TOPIC, 3, vec![0, 1]);
        assignment.partition_epoch = partition_epoch;
        assignment.write_id = Uuid::nil();
        let held = coordination::Held {
            epoch,
            ..Default::default()
        };
        let mut lease = Lease::default();
        lease.metadata.namespace = Some("shop".into());
        PartitionLease { assignment, held }.write(&mut lease, "main-2");
        lease
    }

    fn cluster() -> ClusterId {
        ClusterId::new("shop", "main-2")
    }

    #[test]
    fn a_partition_is_known_by_its_leases_name() {
        let lease = lease(0, 0);
        let name = lease.metadata.name.unwrap();
        let id = LeaseId::parse("shop", &name).unwrap();
        assert_eq!(id.cluster, cluster());
        assert_eq!((id.topic_id, id.partition), (TOPIC, 3));
        for other in ["main-2-broker-0", "main-controller", "", "-", "é-1"] {
            assert_eq!(LeaseId::parse("shop", other), None, "{other}");
        }
    }

    #[test]
    fn an_older_state_never_replaces_a_later_one() {
        let mut partitions = Partitions::default();
        assert!(partitions.apply(&lease(2, 5)).is_some());
        assert!(partitions.apply(&lease(2, 5)).is_none());
        assert!(partitions.apply(&lease(1, 9)).is_none());
        let epochs =
            |partitions: &Partitions| partitions.topic(&cluster(), TOPIC).there[&3].lease.epochs();
        assert_eq!(epochs(&partitions), (2, 5));
        assert!(partitions.apply(&lease(2, 6)).is_some());
        assert_eq!(epochs(&partitions), (2, 6));
    }

    #[test]
    fn a_lease_that_was_deleted_is_remembered_until_it_is_back() {
        let mut partitions = Partitions::default();
        let held = lease(2, 5);
        let name = held.metadata.name.clone().unwrap();
        partitions.apply(&held);
        assert!(partitions.delete("shop", &name).is_some());
        let topic = partitions.topic(&cluster(), TOPIC);
        assert!(topic.there.is_empty());
        assert_eq!(topic.gone[&3].epochs(), (2, 5));
        partitions.apply(&lease(3, 6));
        assert!(partitions.topic(&cluster(), TOPIC).gone.is_empty());
    }

    #[test]
    fn of_a_topic_that_was_deleted_nothing_is_kept() {
        let mut partitions = Partitions::default();
        let held = lease(2, 5);
        let name = held.metadata.name.clone().unwrap();
        partitions.apply(&held);
        partitions.forget(&cluster(), TOPIC);
        assert_eq!(partitions.delete("shop", &name), None);
        assert!(partitions.clusters.is_empty());
    }

    #[test]
    fn a_lease_that_cannot_be_read_is_not_taken_for_one_that_is_gone() {
        let mut partitions = Partitions::default();
        partitions.apply(&lease(2, 5));
        let mut spoilt = lease(2, 6);
        spoilt.metadata.annotations = None;
        assert!(partitions.apply(&spoilt).is_some());
        let topic = partitions.topic(&cluster(), TOPIC);
        assert!(topic.unreadable[&3].contains("has no millrace.dev/partition"));
        assert!(topic.gone.is_empty());
    }
}
