//! What people ask about groups, and do to them.

use std::{collections::BTreeMap, sync::Arc};

use millrace_proto::{
    GROUPS_TOPIC,
    v1::{self, group_service_client::GroupServiceClient},
};
use tonic::transport::Channel;

use super::{Assignor, GroupCoordinator, GroupOffset, offsets::check_not_beyond};
use crate::{Client, Error, coordinator, transport::Transport};

/// What a group is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupState {
    /// It has no members.
    Empty,
    /// Everyone has what is meant for them.
    Stable,
    /// Partitions are moving.
    Rebalancing,
}

/// A group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupSummary {
    /// Its name.
    pub group: String,
    /// What it is doing.
    pub state: GroupState,
    /// How many members it has.
    pub members: u32,
    /// Rises with each change of who gets what.
    pub epoch: i32,
}

/// A group, in detail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupDescription {
    /// The group.
    pub summary: GroupSummary,
    /// How its partitions are given out.
    pub assignor: Assignor,
    /// Sorted by id.
    pub members: Vec<GroupMember>,
    /// All that was committed, sorted.
    pub offsets: Vec<CommittedOffset>,
}

/// A member of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupMember {
    /// Its id.
    pub member_id: String,
    /// Of a static member.
    pub instance_id: Option<String>,
    /// As its client said.
    pub client_id: String,
    /// What it owns: topics and partitions.
    pub owned: Vec<(Arc<str>, i32)>,
    /// What it is to stop reading.
    pub revoking: Vec<(Arc<str>, i32)>,
    /// Whether it is connected.
    pub connected: bool,
}

/// What was committed for a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommittedOffset {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The partition's index.
    pub partition: i32,
    /// The next offset to be read.
    pub offset: i64,
    /// As committed.
    pub metadata: String,
    /// When: milliseconds since the Unix epoch.
    pub committed_at_ms: i64,
}

impl Client {
    /// All groups of the cluster, by name.
    pub async fn groups(&self) -> Result<Vec<GroupSummary>, Error> {
        let list = |mut service: GroupServiceClient<Channel>| async move {
            service.list_groups(v1::ListGroupsRequest {}).await
        };
        let lists = coordinator::each(self, GROUPS_TOPIC, Transport::groups, list).await?;
        let all = lists.into_iter().flat_map(|list| list.groups);
        let all = all.map(|group| (group.group_id.clone(), group.into()));
        Ok(all.collect::<BTreeMap<_, _>>().into_values().collect())
    }

    /// A group's members and offsets.
    pub async fn describe_group(&self, group: &str) -> Result<GroupDescription, Error> {
        let call = |mut service: GroupServiceClient<Channel>| async move {
            let group_id = group.to_owned();
            service
                .describe_group(v1::DescribeGroupRequest { group_id })
                .await
        };
        let coordinator = GroupCoordinator::new(self.clone(), group.into());
        Ok(coordinator.call(self.deadline(), call).await?.into())
    }

    /// Forgets a group without members, and its offsets.
    pub async fn delete_group(&self, group: &str) -> Result<(), Error> {
        let call = |mut service: GroupServiceClient<Channel>| async move {
            let group_id = group.to_owned();
            service
                .delete_group(v1::DeleteGroupRequest { group_id })
                .await
        };
        let coordinator = GroupCoordinator::new(self.clone(), group.into());
        coordinator.call(self.deadline(), call).await.map(drop)
    }

    /// What a group committed.
    pub async fn group_offsets(&self, group: &str) -> Result<Vec<CommittedOffset>, Error> {
        let coordinator = GroupCoordinator::new(self.clone(), group.into());
        let offsets = coordinator.offsets(Vec::new(), self.deadline()).await?;
        Ok(offsets.into_iter().map(CommittedOffset::from).collect())
    }

    /// Has a group without members go on elsewhere. All or none of these partitions, and nowhere beyond the end of a log.
    pub async fn reset_group(
        &self,
        group: &str,
        offsets: impl IntoIterator<Item = GroupOffset>,
    ) -> Result<(), Error> {
        let offsets: Vec<GroupOffset> = offsets.into_iter().collect();
        let deadline = self.deadline();
        check_not_beyond(self, &offsets, deadline).await?;
        let commits = offsets.into_iter().map(v1::OffsetCommit::from);
        let coordinator = GroupCoordinator::new(self.clone(), group.into());
        coordinator.commit("", 0, commits.collect(), deadline).await
    }
}

impl From<v1::GroupSummary> for GroupSummary {
    fn from(summary: v1::GroupSummary) -> Self {
        Self {
            state: match summary.state() {
                v1::GroupState::Empty | v1::GroupState::Unspecified => GroupState::Empty,
                v1::GroupState::Stable => GroupState::Stable,
                v1::GroupState::Rebalancing => GroupState::Rebalancing,
            },
            group: summary.group_id,
            members: summary.members,
            epoch: summary.epoch,
        }
    }
}

impl From<v1::DescribeGroupResponse> for GroupDescription {
    fn from(response: v1::DescribeGroupResponse) -> Self {
        let member = |member: v1::GroupMember| GroupMember {
            member_id: member.member_id,
            instance_id: member.instance_id,
            client_id: member.client_id,
            owned: flat(&member.owned),
            revoking: flat(&member.revoking),
            connected: member.connected,
        };
        Self {
            assignor: match response.assignor() {
                v1::Assignor::Range => Assignor::Range,
                v1::Assignor::Uniform | v1::Assignor::Unspecified => Assignor::Uniform,
            },
            summary: response.summary.unwrap_or_default().into(),
            members: response.members.into_iter().map(member).collect(),
            offsets: response
                .offsets
                .into_iter()
                .map(CommittedOffset::from)
                .collect(),
        }
    }
}

impl From<v1::CommittedOffset> for CommittedOffset {
    fn from(committed: v1::CommittedOffset) -> Self {
        Self {
            topic: committed.topic.into(),
            partition: committed.partition,
            offset: committed.offset,
            metadata: committed.metadata,
            committed_at_ms: committed.committed_at_ms,
        }
    }
}

/// One by one.
pub(crate) fn flat(topics: &[v1::TopicPartitions]) -> Vec<(Arc<str>, i32)> {
    let all = topics.iter().flat_map(|topic| {
        let name: Arc<str> = topic.topic.as_str().into();
        let partitions = topic.partitions.iter();
        partitions.map(move |partition| (name.clone(), *partition))
    });
    all.collect()
}
