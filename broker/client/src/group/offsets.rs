//! What a group has committed, and commits.

use std::{collections::BTreeMap, sync::Arc};

use millrace_proto::{
    GROUPS_TOPIC,
    v1::{self, group_service_client::GroupServiceClient},
};
use tokio::time::Instant;
use tonic::{Response, Status, transport::Channel};

use crate::{
    Client, Error, ErrorKind,
    coordinator::Coordinator,
    offsets::{self, OffsetSpec, Query},
    transport::Transport,
};

/// An offset to be committed for a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupOffset {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The partition's index.
    pub partition: i32,
    /// The next offset to be read.
    pub offset: i64,
    /// Kept with it: at most 4,096 bytes.
    pub metadata: String,
}

impl GroupOffset {
    /// Without metadata.
    pub fn new(topic: impl Into<Arc<str>>, partition: i32, offset: i64) -> Self {
        Self {
            topic: topic.into(),
            partition,
            offset,
            metadata: String::new(),
        }
    }

    /// The same with metadata.
    #[must_use]
    pub fn metadata(mut self, metadata: impl Into<String>) -> Self {
        self.metadata = metadata.into();
        self
    }
}

impl From<GroupOffset> for v1::OffsetCommit {
    fn from(offset: GroupOffset) -> Self {
        Self {
            topic: offset.topic.to_string(),
            partition: offset.partition,
            offset: offset.offset,
            leader_epoch: -1,
            metadata: offset.metadata,
        }
    }
}

/// An error if one of them lies beyond the end of its partition's log: whoever goes on there would miss what is written until then.
pub(crate) async fn check_not_beyond(
    client: &Client,
    offsets: &[GroupOffset],
    deadline: Instant,
) -> Result<(), Error> {
    let query = |offset: &GroupOffset| Query {
        topic: offset.topic.clone(),
        partition: offset.partition,
        spec: OffsetSpec::Latest,
    };
    let queries = offsets.iter().map(query).collect();
    let ends = offsets::find(client, queries, deadline).await?;
    for (offset, end) in offsets.iter().zip(ends) {
        let end = end.map_or(0, |at| at.offset);
        if offset.offset > end {
            let message = format!(
                "offset {} can't be committed: the log ends at {end}",
                offset.offset
            );
            let error = Error::new(ErrorKind::OffsetOutOfRange, message);
            return Err(error.at(&offset.topic, offset.partition));
        }
    }
    Ok(())
}

/// Sorted partitions, gathered by their topics.
pub(crate) fn by_topic<'a>(
    partitions: impl Iterator<Item = &'a (Arc<str>, i32)>,
) -> Vec<v1::TopicPartitions> {
    let mut topics: BTreeMap<&Arc<str>, Vec<i32>> = BTreeMap::new();
    for (topic, partition) in partitions {
        topics.entry(topic).or_default().push(*partition);
    }
    let topics = topics.into_iter();
    topics
        .map(|(topic, partitions)| v1::TopicPartitions {
            topic: topic.to_string(),
            partitions,
        })
        .collect()
}

/// The way to one group's coordinator.
#[derive(Debug, Clone)]
pub(crate) struct GroupCoordinator(Coordinator);

impl GroupCoordinator {
    pub(crate) fn new(client: Client, group: Arc<str>) -> Self {
        Self(Coordinator::new(client, GROUPS_TOPIC, group))
    }

    /// The way there.
    pub(crate) fn way(&self) -> &Coordinator {
        &self.0
    }

    pub(crate) fn group(&self) -> &Arc<str> {
        self.0.key()
    }

    /// Calls the coordinator, again while that may help and time is left.
    pub(crate) async fn call<T, F>(
        &self,
        deadline: Instant,
        call: impl Fn(GroupServiceClient<Channel>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.0.call(deadline, Transport::groups, call).await
    }

    /// What was committed for the partitions; for all, if none is given.
    pub(crate) async fn offsets(
        &self,
        partitions: Vec<v1::TopicPartitions>,
        deadline: Instant,
    ) -> Result<Vec<v1::CommittedOffset>, Error> {
        let request = v1::FetchOffsetsRequest {
            group_id: self.group().to_string(),
            partitions,
        };
        let call = |mut service: GroupServiceClient<Channel>| {
            let request = request.clone();
            async move { service.fetch_offsets(request).await }
        };
        Ok(self.call(deadline, call).await?.offsets)
    }

    pub(crate) async fn commit(
        &self,
        member_id: &str,
        epoch: i32,
        offsets: Vec<v1::OffsetCommit>,
        deadline: Instant,
    ) -> Result<(), Error> {
        let request = v1::CommitOffsetsRequest {
            group_id: self.group().to_string(),
            member_id: member_id.to_owned(),
            epoch,
            offsets,
        };
        let call = |mut service: GroupServiceClient<Channel>| {
            let request = request.clone();
            async move { service.commit_offsets(request).await }
        };
        self.call(deadline, call).await.map(drop)
    }
}
