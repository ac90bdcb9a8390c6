//! Consumer groups: a consumer's membership, and what people ask about groups.

mod admin;
mod app;
mod membership;
mod offsets;

pub(crate) use admin::flat;
pub use admin::{CommittedOffset, GroupDescription, GroupMember, GroupState, GroupSummary};
pub(crate) use app::{Instance, InstanceId, group as group_of_app};
pub(crate) use membership::{Commit, Committer, Event, GroupSettings, Handle, Request, begin};
pub use offsets::GroupOffset;
pub(crate) use offsets::{GroupCoordinator, by_topic, check_not_beyond};

/// How a group's partitions are given out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Assignor {
    /// Evenly over all topics together, and everyone keeps what can be kept.
    #[default]
    Uniform,
    /// By topic, neighbours together: partition n of several topics goes to the same member, if they have as many.
    Range,
}
