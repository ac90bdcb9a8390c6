//! What a transaction's coordinator tells this broker, as the leader of partitions or the coordinator of groups that are part of it.

use std::sync::Arc;

use futures::future::try_join_all;
use millrace_proto::v1::{
    CloseTransactionRequest, CloseTransactionResponse, HoldOffsetsRequest, HoldOffsetsResponse,
    OpenTransactionRequest, OpenTransactionResponse,
    participant_service_server::ParticipantService,
};
use millrace_record::EndMarker;
use tonic::{Request, Response, Status};

use super::{Broker, error::ApiError};
use crate::{
    groups,
    observe::Method,
    storage::{PartitionAppend, StorageError},
    transactions::Producer,
};

/// The participant service.
pub(super) struct Participant {
    pub(super) broker: Arc<Broker>,
}

impl Participant {
    /// Appends the marker to a partition, and waits until it is committed.
    async fn mark(
        &self,
        topic: &str,
        partition: i32,
        end: EndMarker,
        producer: Producer,
    ) -> Result<(), ApiError> {
        let led = self.broker.partition(topic, partition)?;
        if let Some(replica) = &led.replica {
            let too_few = |error| ApiError::not_enough_replicas(topic, partition, error);
            replica.check_in_sync().map_err(too_few)?;
        }
        let failed = |error: StorageError| self.broker.failure(topic, partition, &error);
        let append = PartitionAppend::marker(led.log.clone(), led.epoch, end, producer);
        let append = append.map_err(failed)?;
        let answer = self.broker.store.append(vec![append]).await;
        let answer = answer.map_err(failed)?.await;
        let appended = answer.ok().and_then(|results| results.into_iter().next());
        let appended = appended
            .ok_or_else(ApiError::shutting_down)?
            .map_err(failed)?;
        led.committed(appended.end_offset).await.map_err(failed)
    }
}

#[tonic::async_trait]
impl ParticipantService for Participant {
    async fn open_transaction(
        &self,
        request: Request<OpenTransactionRequest>,
    ) -> Result<Response<OpenTransactionResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::OpenTransaction);
        let request = request.into_inner();
        let (producer_id, epoch) = producer(request.producer_id, request.producer_epoch)?;
        let mut logs = Vec::new();
        let mut names = Vec::new();
        for topic in &request.partitions {
            for &partition in &topic.partitions {
                let led = self.broker.partition(&topic.topic, partition)?;
                logs.push((led.log, led.epoch));
                names.push((&topic.topic, partition));
            }
        }
        let announced = self.broker.store.announce(logs, producer_id, epoch).await;
        announced.map_err(|(index, error)| match names.get(index) {
            Some((topic, partition)) => self.broker.failure(topic, *partition, &error),
            None => ApiError::shutting_down(),
        })?;
        Ok(Response::new(OpenTransactionResponse {}))
    }

    async fn close_transaction(
        &self,
        request: Request<CloseTransactionRequest>,
    ) -> Result<Response<CloseTransactionResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::CloseTransaction);
        let request = request.into_inner();
        let producer = producer(request.producer_id, request.producer_epoch)?;
        let end = match request.commit {
            true => EndMarker::Commit,
            false => EndMarker::Abort,
        };
        let partitions = request.partitions.iter().flat_map(|topic| {
            let partitions = topic.partitions.iter();
            partitions.map(|partition| (&*topic.topic, *partition))
        });
        let marks = partitions.map(|(topic, partition)| self.mark(topic, partition, end, producer));
        let groups = request.groups.iter().map(|group| {
            let close =
                move |reply| groups::Request::Close(group.clone(), producer, request.commit, reply);
            self.broker
                .ask_shard(&self.broker.groups, ("group", group), close)
        });
        tokio::try_join!(try_join_all(marks), try_join_all(groups))?;
        Ok(Response::new(CloseTransactionResponse {}))
    }

    async fn hold_offsets(
        &self,
        request: Request<HoldOffsetsRequest>,
    ) -> Result<Response<HoldOffsetsResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::HoldOffsets);
        let request = request.into_inner();
        let group = request.offsets.as_ref().map(|offsets| &offsets.group_id);
        let group = group.cloned().unwrap_or_default();
        let hold = |reply| groups::Request::Hold(request, reply);
        self.broker
            .ask_shard(&self.broker.groups, ("group", &group), hold)
            .await?;
        Ok(Response::new(HoldOffsetsResponse {}))
    }
}

fn producer(producer_id: i64, epoch: i32) -> Result<Producer, ApiError> {
    match i16::try_from(epoch) {
        Ok(epoch) if epoch >= 0 && producer_id >= 0 => Ok((producer_id, epoch)),
        _ => Err(ApiError::invalid(
            "producer_epoch",
            format!("producer {producer_id} with epoch {epoch} can't be"),
        )),
    }
}
