//! What operator and brokers tell each other through the API server: the Leases of a Cluster, and a record of each topic.
//!
//! | object | written by | says |
//! |---|---|---|
//! | Lease `<cluster>-controller` | the broker that is controller | `leaseTransitions` is the controller epoch: [`ControllerState`] |
//! | Lease `<cluster>-broker-<id>` | that broker | its session; `leaseTransitions` is the broker epoch: [`BrokerSession`] |
//! | Lease `<cluster>-<topic id>-<partition>` | operator (makes, grows, removes), controller (elects), leader (ISR), replica (has deleted its data) | `leaseTransitions` is the leader epoch: [`PartitionAssignment`] |
//! | ConfigMap `<cluster>-topic-<hash of the name>` | the operator | the topic as resolved: [`TopicRecord`] |
//! | ConfigMap `<cluster>-racks` | the operator | the brokers' racks: [`Racks`] |
//!
//! All of them are in the Cluster's namespace and have the label [`CLUSTER_LABEL`]; [`ROLE_LABEL`] tells them apart, so that each can be watched by
//! itself. Each holds one JSON document with a version, in an annotation (Leases) or under a data key (ConfigMap).
//!
//! # Rules of writing
//! Every write, but for that of the racks, is a create, or a replace of the whole object with its `resourceVersion`: compare-and-swap. A patch without one is not, and an apply
//! takes no part in it, so neither is ever used on these objects. Each write of a partition raises `partition_epoch` by one, and a leader epoch
//! never falls: states of a partition are ordered by (leader epoch, partition epoch), never by `resourceVersion`. No one reads a time from a
//! partition's Lease, and no one compares a `renewTime` with a clock: a session is alive as long as its Lease is seen to *change*.
//!
//! # Why no owner references and no finalizers on partitions and records
//! Garbage collection must not be able to remove the only record of a leader epoch, and a finalizer would hold up the deletion of a
//! namespace whose operator is gone.

mod broker;
mod lease;
mod partition;
mod racks;
#[cfg(test)]
mod tests;
mod topic;

pub use broker::{BrokerSession, ControllerState};
pub use lease::{Held, LeaseError};
pub use partition::{Leader, PartitionAssignment, PartitionLease, Replica};
pub use racks::Racks;
pub use topic::{TopicRecord, TopicState};

/// On each object: the Cluster's name.
pub const CLUSTER_LABEL: &str = "millrace.dev/cluster";
/// On each object: what it is, one of [`Role`].
pub const ROLE_LABEL: &str = "millrace.dev/role";
/// On partition Leases and topic records: the topic's id.
pub const TOPIC_LABEL: &str = "millrace.dev/topic-id";

/// What an object is for: the values of [`ROLE_LABEL`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// The Lease of the controller.
    Controller,
    /// A broker's session.
    Broker,
    /// A partition.
    Partition,
    /// A topic's record.
    Topic,
    /// The brokers' racks.
    Racks,
}

impl Role {
    /// As it is written in the label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Controller => "controller",
            Self::Broker => "broker",
            Self::Partition => "partition",
            Self::Topic => "topic",
            Self::Racks => "racks",
        }
    }

    /// The label selector of all such objects of a Cluster.
    pub fn selector(self, cluster: &str) -> String {
        format!("{CLUSTER_LABEL}={cluster},{ROLE_LABEL}={}", self.as_str())
    }

    /// The label selector of all such objects of a Cluster, of several roles.
    pub fn selector_of(roles: &[Self], cluster: &str) -> String {
        let roles: Vec<&str> = roles.iter().map(|role| role.as_str()).collect();
        format!(
            "{CLUSTER_LABEL}={cluster},{ROLE_LABEL} in ({})",
            roles.join(",")
        )
    }

    fn labels(self, cluster: &str) -> std::collections::BTreeMap<String, String> {
        [(CLUSTER_LABEL, cluster), (ROLE_LABEL, self.as_str())]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into()
    }
}
