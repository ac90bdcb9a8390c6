//! A partition's Lease: the only authority on who leads it, in which epoch, and which replicas are in sync.

use k8s_openapi::api::coordination::v1::Lease;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::lease::{self, Held, LeaseError};
use super::{Role, TOPIC_LABEL};

const ANNOTATION: &str = "millrace.dev/partition";

/// A partition as its Lease's document says. `spec.leaseTransitions` is the leader epoch, `spec.holderIdentity` the leader's pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PartitionAssignment {
    /// The topic's id: a topic that is deleted and made again has another.
    pub topic_id: Uuid,
    /// The partition's index, from 0.
    pub partition: i32,
    /// One more with each write, whoever writes.
    pub partition_epoch: i64,
    /// The brokers that hold it, or shall; the preferred leader first. A broker takes itself out once it has deleted its data of a deleted topic.
    pub replicas: Vec<i32>,
    /// The replicas that have all acknowledged records. Empty only if the partition has never had a leader, hence no record.
    pub isr: Vec<Replica>,
    /// Who leads; absent if no one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<Leader>,
    /// The last leader epoch whose leader was elected although it may have lacked acknowledged records, as the topic allows
    /// (`uncleanLeaderElection`): only then may a replica cut off what it knows to be committed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_unclean_epoch: Option<i32>,
    /// The controller epoch of the last election.
    pub controller_epoch: i32,
    /// Random, for each write: by it a writer whose answer was lost knows its own.
    pub write_id: Uuid,
}

/// A copy on one volume. A broker whose volume lost its data is another replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Replica {
    /// The broker.
    pub id: i32,
    /// What is on its volume.
    pub store: Uuid,
}

/// A leader: one process of a broker. Its successor after a restart must be elected anew, in a higher leader epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Leader {
    /// The broker.
    pub id: i32,
    /// The broker's epoch.
    pub broker_epoch: i32,
}

/// The whole Lease as data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionLease {
    /// The document.
    pub assignment: PartitionAssignment,
    /// Who leads, in which epoch.
    pub held: Held,
}

impl PartitionAssignment {
    /// A partition that no one has led yet.
    pub fn new(topic_id: Uuid, partition: i32, replicas: Vec<i32>) -> Self {
        Self {
            topic_id,
            partition,
            partition_epoch: 0,
            replicas,
            isr: Vec::new(),
            leader: None,
            last_unclean_epoch: None,
            controller_epoch: 0,
            write_id: Uuid::new_v4(),
        }
    }

    /// The name of the Lease.
    pub fn lease_name(&self, cluster: &str) -> String {
        format!("{cluster}-{}-{}", self.topic_id, self.partition)
    }

    /// Whether none of so many replicas that are in sync can be spared: without one of them there would be fewer than `acks=all` needs. Where that needs all
    /// replicas, no restart can spare one.
    pub fn spares_none(&self, in_sync: usize, min_in_sync: usize) -> bool {
        in_sync <= min_in_sync && self.replicas.len() > min_in_sync
    }
}

impl PartitionLease {
    /// Orders the states of one partition: (leader epoch, partition epoch).
    pub fn epochs(&self) -> (i32, i64) {
        (self.held.epoch, self.assignment.partition_epoch)
    }

    /// The state in which these brokers are to hold it; whoever is in sync stays so until all of them are. Its leader, if there is one, goes on in an epoch
    /// of its own: a broker that was let go has deleted what it had, and if it is to hold the partition again, what it said of its log before
    /// must not count any more.
    #[must_use]
    pub fn reassigned(&self, replicas: Vec<i32>) -> Self {
        let mut next = self.clone();
        next.assignment.replicas = replicas;
        next.assignment.partition_epoch += 1;
        next.assignment.write_id = Uuid::new_v4();
        // A partition that no one has led is known by its epoch.
        next.held.epoch += i32::from(!self.assignment.isr.is_empty());
        next
    }

    /// Reads it.
    ///
    /// # Errors
    /// If the Lease is not a partition's.
    pub fn read(lease: &Lease) -> Result<Self, LeaseError> {
        Ok(Self {
            assignment: lease::read_annotation(&lease.metadata, ANNOTATION)?,
            held: Held::read(lease)?,
        })
    }

    /// Writes it into its Lease.
    pub fn write(&self, lease: &mut Lease, cluster: &str) {
        let assignment = &self.assignment;
        lease.metadata.name = Some(assignment.lease_name(cluster));
        lease::write(
            lease,
            cluster,
            Role::Partition,
            ANNOTATION,
            assignment,
            self.held.clone(),
        );
        let labels = lease.metadata.labels.get_or_insert_default();
        labels.insert(TOPIC_LABEL.to_owned(), assignment.topic_id.to_string());
    }
}
