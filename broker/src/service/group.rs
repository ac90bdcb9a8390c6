//! Consumer groups: finds the group's shard on this broker, and carries a member's stream.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::Stream;
use millrace_proto::v1::{
    CommitOffsetsRequest, CommitOffsetsResponse, DeleteGroupRequest, DeleteGroupResponse,
    DescribeGroupRequest, DescribeGroupResponse, FetchOffsetsRequest, FetchOffsetsResponse,
    JoinRequest, JoinResponse, ListGroupsRequest, ListGroupsResponse, MemberHello,
    group_service_server::GroupService, join_request::Message,
};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Broker, error::ApiError};
use crate::{
    groups::{self, GroupError, Joined, Said},
    observe::Method,
    shards::Reply,
};

/// How long a stream may take to say who joins.
const HELLO: Duration = Duration::from_secs(10);

/// The group service.
pub(super) struct Group {
    pub(super) broker: Arc<Broker>,
}

type Answer = Result<JoinResponse, Status>;

impl Group {
    async fn ask<T>(
        &self,
        group: &str,
        request: impl FnOnce(Reply<T, GroupError>) -> groups::Request,
    ) -> Result<T, ApiError> {
        let shards = &self.broker.groups;
        self.broker
            .ask_shard(shards, ("group", group), request)
            .await
    }

    /// Carries a member's stream until one of both sides ends it.
    async fn carry(
        self,
        joined: Joined,
        mut messages: Streaming<JoinRequest>,
        answers: mpsc::Sender<Answer>,
    ) {
        let Joined {
            speaker,
            interval,
            mut news,
        } = joined;
        let heartbeat_interval_ms = u32::try_from(interval.as_millis()).unwrap_or(u32::MAX);
        let answer = |assignment| JoinResponse {
            assignment,
            heartbeat_interval_ms,
        };
        let mut signs = tokio::time::interval(interval);
        signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let broker = self.broker.clone();
        let stopping = broker.stopping();
        tokio::pin!(stopping);
        let last = loop {
            let told = tokio::select! {
                biased;
                told = news.recv() => match told {
                    Some(Ok(assignment)) => answer(Some(assignment)),
                    Some(Err(error)) => break Some(ApiError::from(error)),
                    // The coordinator is another broker now.
                    None => {
                        let asked = self.ask(&speaker.group, |reply| {
                            groups::Request::Said(speaker.clone(), Said::Alive, reply)
                        });
                        break Some(asked.await.err().unwrap_or_else(ApiError::shutting_down));
                    }
                },
                () = &mut stopping => break Some(ApiError::shutting_down()),
                message = messages.message() => {
                    let said = match message {
                        Ok(Some(JoinRequest { message: Some(message) })) => match message {
                            Message::AppliedVersion(version) => Said::Applied(version),
                            Message::Alive(_) => Said::Alive,
                            Message::Subscription(subscription) => Said::Subscribed(subscription),
                            Message::Leave(_) => Said::Left,
                            Message::Hello(_) => break Some(ApiError::invalid("hello", "it stands in the first message only")),
                        },
                        Ok(Some(JoinRequest { message: None })) => Said::Alive,
                        Ok(None) | Err(_) => Said::Disconnected,
                    };
                    let ends = matches!(said, Said::Left | Said::Disconnected);
                    let asked = self.ask(&speaker.group, |reply| {
                        groups::Request::Said(speaker.clone(), said, reply)
                    });
                    match asked.await {
                        Ok(()) if ends => break None,
                        Ok(()) => continue,
                        Err(error) => break Some(error),
                    }
                }
                _ = signs.tick() => answer(None),
            };
            // Who doesn't read gives no more signs of life either, and is let go in time.
            if answers.send(Ok(told)).await.is_err() {
                let gone =
                    |reply| groups::Request::Said(speaker.clone(), Said::Disconnected, reply);
                // If the coordinator is gone, too, the next one has not heard of this stream.
                let _ = self.ask(&speaker.group, gone).await;
                break None;
            }
        };
        if let Some(error) = last {
            let _ = answers.send(Err(error.into())).await;
        }
    }
}

async fn hello_of(messages: &mut Streaming<JoinRequest>) -> Result<MemberHello, Status> {
    let first = tokio::time::timeout(HELLO, messages.message()).await;
    match first {
        Ok(Ok(Some(JoinRequest {
            message: Some(Message::Hello(hello)),
        }))) => Ok(hello),
        Ok(Err(status)) => Err(status),
        Ok(Ok(_)) | Err(_) => {
            let message = format!("a stream begins with a hello, within {HELLO:?}");
            Err(ApiError::invalid("hello", message).into())
        }
    }
}

#[tonic::async_trait]
impl GroupService for Group {
    type JoinStream = Pin<Box<dyn Stream<Item = Answer> + Send>>;

    async fn join(
        &self,
        request: Request<Streaming<JoinRequest>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let _timer = self.broker.metrics.start(Method::JoinGroup);
        let mut messages = request.into_inner();
        let hello = hello_of(&mut messages).await?;
        let group = hello.group_id.clone();
        let joined = self.ask(&group, |reply| groups::Request::Join(hello, reply));
        let joined = joined.await?;
        let (answers, stream) = mpsc::channel(4);
        let group = Group {
            broker: self.broker.clone(),
        };
        tokio::spawn(group.carry(joined, messages, answers));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn commit_offsets(
        &self,
        request: Request<CommitOffsetsRequest>,
    ) -> Result<Response<CommitOffsetsResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::CommitOffsets);
        let request = request.into_inner();
        let group = request.group_id.clone();
        self.ask(&group, |reply| groups::Request::Commit(request, reply))
            .await?;
        Ok(Response::new(CommitOffsetsResponse {}))
    }

    async fn fetch_offsets(
        &self,
        request: Request<FetchOffsetsRequest>,
    ) -> Result<Response<FetchOffsetsResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::FetchOffsets);
        let request = request.into_inner();
        let group = request.group_id.clone();
        let asked = self.ask(&group, |reply| groups::Request::Fetch(request, reply));
        Ok(Response::new(asked.await?))
    }

    async fn list_groups(
        &self,
        _request: Request<ListGroupsRequest>,
    ) -> Result<Response<ListGroupsResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::ListGroups);
        let lists = self.broker.groups.ask_all(groups::Request::List);
        let mut groups = lists.await.concat();
        groups.sort_by(|a, b| a.group_id.cmp(&b.group_id));
        Ok(Response::new(ListGroupsResponse { groups }))
    }

    async fn describe_group(
        &self,
        request: Request<DescribeGroupRequest>,
    ) -> Result<Response<DescribeGroupResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::DescribeGroup);
        let group = request.into_inner().group_id;
        let asked = self.ask(&group, |reply| {
            groups::Request::Describe(group.clone(), reply)
        });
        Ok(Response::new(asked.await?))
    }

    async fn delete_group(
        &self,
        request: Request<DeleteGroupRequest>,
    ) -> Result<Response<DeleteGroupResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::DeleteGroup);
        let group = request.into_inner().group_id;
        let asked = self.ask(&group, |reply| {
            groups::Request::Delete(group.clone(), reply)
        });
        asked.await?;
        Ok(Response::new(DeleteGroupResponse {}))
    }
}
