//! Consumer groups. A group's coordinator is the leader of its partition of the internal topic [`TOPIC`]; what the group is, is in that
//! partition's log, and in this broker's memory while it leads it.
//!
//! Pure, and driven by tests: [`assign`] (who is to have what), [`group`] (one group), [`shard`] (all groups of a partition).
//! Thin around them: [`entry`] (what is kept), [`log`] (reads and writes it), [`coordinator`] (one task for each shard).
//!
//! # How a shard works
//! In rounds: all requests that have come are taken in; what changed is appended as one batch; when it is committed everyone gets an answer, and
//! members are told what is theirs now. So no one ever hears of something that a failover could take back, and however many requests come,
//! there is one append under way. If an append fails the shard is given up, with all that it knows; who leads then loads it again.
//!
//! # Instead of compaction
//! A log of changes grows with every commit. After some megabytes the shard writes all that it knows, as new records, and when they are committed
//! lets go of everything before them. A load therefore reads no more than twice what is known, and no one has to search a log for what
//! is still valid.

mod assign;
mod coordinator;
mod entry;
mod group;
mod log;
mod shard;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, sync::Arc};

use uuid::Uuid;

pub(crate) use self::{
    coordinator::{Groups, Joined, NotCoordinator, Request, RoundError},
    shard::Said,
};

pub(crate) use millrace_crds::GROUPS_TOPIC as TOPIC;

/// A topic's name and a partition's index.
pub(crate) type TopicPartition = (Arc<str>, i32);
/// The topics that can be read: their ids, and how many partitions they have.
pub(crate) type Topology = BTreeMap<Arc<str>, (Uuid, i32)>;

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
