//! Consumer groups. A group's coordinator is the leader of its partition of the internal topic [`TOPIC`]; what the group is, is in that
//! partition's log, and in this broker's memory while it leads it.
//!
//! Pure, and driven by tests: [`assign`] (who is to have what), [`group`] (one group), [`shard`] (all groups of a partition).
//! Thin around them: [`entry`] (what is kept), [`coordinator`] (what a [shard](crate::shards) does with it).

mod assign;
mod coordinator;
mod entry;
mod group;
mod shard;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc};

use uuid::Uuid;

pub(crate) use self::{
    coordinator::{Groups, Joined, Request, coordinate},
    group::{GroupFigures, by_topic, flat},
    shard::Said,
};

pub(crate) use millrace_crds::GROUPS_TOPIC as TOPIC;

/// A topic's name and a partition's index.
pub(crate) type TopicPartition = (Arc<str>, i32);
/// The topics that can be read.
pub(crate) type Topology = BTreeMap<Arc<str>, Shape>;

/// What a group must know of a topic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) id: Uuid,
    pub(crate) partitions: i32,
    /// The rack of each partition's preferred leader; empty while none is known. Not that of who happens to lead, or each failover would move partitions.
    pub(crate) racks: Vec<Option<Arc<str>>>,
}

/// Why a request on a group is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GroupError {
    #[error(
        "group {group} has no member {member}: it was taken for gone, or never joined; join again"
    )]
    UnknownMember { group: String, member: String },
    #[error(
        "member {member} of group {group}: another process has its instance id or its member id now; end this one"
    )]
    FencedMember { group: String, member: String },
    #[error(
        "member {member} of group {group} does not own {topic}/{partition} in epoch {epoch}: it is another one's to commit"
    )]
    NotOwner {
        group: String,
        member: String,
        topic: String,
        partition: i32,
        epoch: i32,
    },
    #[error("there is no group {0}")]
    UnknownGroup(String),
    #[error("group {group} has {members} members; stop them first")]
    NotEmpty { group: String, members: usize },
    #[error("topic {0:?} does not exist; create it as a Topic resource, or check the name")]
    UnknownTopic(String),
    #[error(
        "topic {topic:?} has {partitions} partitions, counted from 0: there is no partition {partition}"
    )]
    UnknownPartition {
        topic: String,
        partition: i32,
        partitions: i32,
    },
    #[error(
        "group {group}: a transaction that commits an offset of {topic}/{partition} is open; try again once it has ended"
    )]
    OffsetsPending {
        group: String,
        topic: String,
        partition: i32,
    },
    #[error(
        "group {group}: the transaction of producer {producer_id} with epoch {epoch} has ended; nothing can be added to it"
    )]
    TransactionEnded {
        group: String,
        producer_id: i64,
        epoch: i16,
    },
    #[error("{0}")]
    Limit(String),
    #[error("{field}: {message}")]
    Invalid {
        field: &'static str,
        message: String,
    },
}

impl GroupError {
    fn limit(message: impl Into<String>) -> Self {
        Self::Limit(message.into())
    }

    fn invalid(field: &'static str, message: impl Into<String>) -> Self {
        let message = message.into();
        Self::Invalid { field, message }
    }
}
