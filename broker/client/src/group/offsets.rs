//! What a group has committed, and commits.

use std::sync::Arc;

use millrace_proto::{
    GROUPS_TOPIC,
    v1::{self, group_service_client::GroupServiceClient},
};
use tokio::time::Instant;
use tonic::{Response, Status, transport::Channel};

use crate::{Client, Error, coordinator::Coordinator, transport::Transport};

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
