//! Calls to a group's coordinator, the leader of the group's partition of the internal topic; follows it when it moves.

use std::sync::Arc;

use millrace_proto::{
    GROUPS_TOPIC,
    v1::{self, group_service_client::GroupServiceClient},
};
use millrace_record::key_partition;
use tokio::time::Instant;
use tonic::{Response, Status, transport::Channel};

use crate::{
    Client, backoff,
    error::{Error, ErrorKind},
    transport::Transport,
};

/// The way to one group's coordinator.
#[derive(Debug, Clone)]
pub(crate) struct Coordinator {
    client: Client,
    group: Arc<str>,
}

impl Coordinator {
    pub(crate) fn new(client: Client, group: Arc<str>) -> Self {
        Self { client, group }
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// The group's partition of the internal topic, and its leader's address.
    pub(crate) async fn find(&self, deadline: Instant) -> Result<(i32, Arc<str>), Error> {
        let topic = self.client.topic(GROUPS_TOPIC, deadline).await;
        let topic = topic.map_err(|error| match error.kind() {
            ErrorKind::UnknownTopic => Error::new(
                ErrorKind::NotLeader,
                "the cluster has no consumer groups yet: their topic is made once all brokers are up",
            ),
            _ => error,
        })?;
        let count = u32::try_from(topic.leaders.len()).unwrap_or(u32::MAX);
        let partition = key_partition(self.group.as_bytes(), count.max(1)) as i32;
        let leader = self.client.cached().leader(GROUPS_TOPIC, partition);
        let leader = leader.ok_or_else(|| Error::no_leader(&GROUPS_TOPIC.into(), partition))?;
        Ok((partition, leader))
    }

    /// What is to be done about a failure before the next try: takes over a hint, or asks for metadata.
    pub(crate) async fn look_again(&self, asked: Option<(i32, Arc<str>)>, error: &Error) {
        if let Some((partition, address)) = asked {
            let metadata = self.client.cached();
            metadata.apply_hint(GROUPS_TOPIC, partition, error);
            if metadata.leader(GROUPS_TOPIC, partition).as_ref() != Some(&address) {
                return;
            }
        }
        if let Err(error) = self.client.refresh(&[GROUPS_TOPIC.to_owned()]).await {
            tracing::debug!(%error, "can't look for the group's coordinator");
        }
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
        let mut failures = 0;
        loop {
            let mut asked = None;
            let result = async {
                let (partition, address) = self.find(deadline).await?;
                asked = Some((partition, address.clone()));
                let service = self.client.transport().groups(&address)?;
                let limit = self.client.transport().request_timeout();
                let left = deadline.saturating_duration_since(Instant::now());
                Transport::call(&address, limit.min(left), call(service)).await
            }
            .await;
            let error = match result {
                Err(error) if error.is_retriable() => error,
                other => return other,
            };
            failures += 1;
            let delay = backoff::delay(error.kind(), failures);
            if Instant::now() + delay >= deadline {
                return Err(error);
            }
            tracing::debug!(%error, ?delay, failures, "asking the group's coordinator again");
            let before = asked.clone();
            self.look_again(asked, &error).await;
            let known = self.find(deadline).await.ok();
            if known.is_none() || known == before {
                tokio::time::sleep(delay).await;
            }
        }
    }

    /// What was committed for the partitions; for all, if none is given.
    pub(crate) async fn offsets(
        &self,
        partitions: Vec<v1::TopicPartitions>,
        deadline: Instant,
    ) -> Result<Vec<v1::CommittedOffset>, Error> {
        let request = v1::FetchOffsetsRequest {
            group_id: self.group.to_string(),
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
            group_id: self.group.to_string(),
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
