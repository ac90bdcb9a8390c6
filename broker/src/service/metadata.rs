//! Metadata: what there is and who leads it.

use std::{collections::HashSet, sync::Arc};

use millrace_crds::is_internal_topic;
use millrace_proto::v1::{
    Broker as BrokerInfo, GetMetadataRequest, GetMetadataResponse, PartitionMetadata,
    TopicMetadata, Volume, metadata_service_server::MetadataService,
};
use prost::Message;
use tonic::{Request, Response, Status};

use super::{
    Broker, MAX_PARTITIONS_PER_REQUEST,
    connection::ConnectionInfo,
    error::ApiError,
    memory::{RequestMemory, ResponseMemory},
};
use crate::{
    directory::{Led, Partition, Topic},
    observe::Method,
    storage::{DiskSpace, DiskState},
};

/// Answers up to this size don't wait for the budget, so that clients find their partitions while consumers use it up.
const SMALL_ANSWER: usize = 64 << 10;
/// In place of the leader's id.
const NO_LEADER: i32 = -1;
/// What a partition takes in an answer, less the two lists in it: as a message, and encoded.
const PARTITION_BYTES: usize = size_of::<PartitionMetadata>() + 64;
/// The same for a topic, or for the error that there is none.
const TOPIC_BYTES: usize = size_of::<TopicMetadata>() + 512;

/// The metadata service.
pub(super) struct Metadata {
    pub(super) broker: Arc<Broker>,
}

#[tonic::async_trait]
impl MetadataService for Metadata {
    async fn get_metadata(
        &self,
        request: Request<GetMetadataRequest>,
    ) -> Result<Response<GetMetadataResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::GetMetadata);
        let connection = request.extensions().get::<ConnectionInfo>().cloned();
        // Held as long as the names are.
        let _memory = request.extensions().get::<RequestMemory>().cloned();
        let mut names = request.into_inner().topics;
        // Each topic once, however often it is named.
        let mut seen = HashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        drop(seen);
        if names.len() > MAX_PARTITIONS_PER_REQUEST {
            let message = format!(
                "{} topics in one request; {MAX_PARTITIONS_PER_REQUEST} are allowed",
                names.len()
            );
            return Err(ApiError::invalid("topics", message).into());
        }
        let directory = &self.broker.directory;
        // Those of people, in the order of their names.
        let all = || {
            let topics = directory.topics().into_iter();
            topics.filter(|topic| !is_internal_topic(&topic.name))
        };
        let bytes = if names.is_empty() {
            all().map(|topic| known_bytes(&topic)).sum()
        } else {
            let bytes = |name: &String| match directory.topic(name) {
                Some(topic) => known_bytes(&topic),
                None => absent_bytes(name),
            };
            names.iter().map(bytes).sum()
        };
        // Nothing but the names is held meanwhile: many may have to wait.
        let mut memory = match bytes {
            ..=SMALL_ANSWER => ResponseMemory::none(),
            _ => self.broker.response_memory.acquire(bytes).await,
        };
        let topics = if names.is_empty() {
            all().map(|topic| describe(&topic)).collect()
        } else {
            let describe = |name: String| match directory.topic(&name) {
                Some(topic) => describe(&topic),
                None => {
                    let error = Some(ApiError::unknown_topic(&name).into());
                    TopicMetadata {
                        name,
                        error,
                        ..TopicMetadata::default()
                    }
                }
            };
            names.into_iter().map(describe).collect()
        };
        let brokers = directory.brokers();
        let brokers = brokers.iter().map(|(id, address)| BrokerInfo {
            id: *id,
            address: address.clone(),
        });
        let answer = GetMetadataResponse {
            cluster_id: self.broker.cluster_id.clone(),
            brokers: brokers.collect(),
            topics,
            volume: Some(volume(self.broker.store.disk())),
        };
        memory.shrink(answer.encoded_len());
        let mut response = Response::new(answer);
        self.broker
            .response_memory
            .attach(memory, &mut response, connection);
        Ok(response)
    }
}

fn volume(disk: &DiskSpace) -> Volume {
    Volume {
        used_bytes: disk.used_bytes(),
        free_bytes: disk.free_bytes(),
        required_free_bytes: disk.required_bytes(),
        full: disk.state() == DiskState::Full,
    }
}

/// What it takes at most to describe a topic.
fn known_bytes(topic: &Topic) -> usize {
    let partition_bytes = |p: &Partition| PARTITION_BYTES + 8 * (p.replicas.len() + p.isr.len());
    let partitions = topic.partitions();
    let partitions: usize = partitions.iter().map(|p| partition_bytes(p)).sum();
    TOPIC_BYTES + topic.name.len() + partitions
}

/// What it takes at most to say that there is no such topic.
fn absent_bytes(name: &str) -> usize {
    // The name stands in the answer and in the error's details, and with escapes in the error's message.
    TOPIC_BYTES + 8 * name.len()
}

fn describe(topic: &Topic) -> TopicMetadata {
    let partitions = (0..).zip(topic.partitions()).map(|(index, partition)| {
        let led = partition.led();
        PartitionMetadata {
            partition: index,
            leader_id: partition.leader.unwrap_or(NO_LEADER),
            leader_epoch: partition.leader_epoch,
            replica_ids: partition.replicas.clone(),
            isr_ids: partition.isr.clone(),
            log_start_offset: led.as_ref().map(|led| led.log.log_start()),
            high_watermark: led.as_ref().and_then(Led::latest),
            size_bytes: led.as_ref().map(|led| led.log.size_bytes()),
            last_stable_offset: led
                .as_ref()
                .and_then(|led| Some(led.latest()?.min(led.log.stable_end()))),
            log_end_offset: led.as_ref().map(|led| led.log.log_end()),
        }
    });
    TopicMetadata {
        name: topic.name.to_string(),
        topic_id: topic.topic_id.to_string(),
        partitions: partitions.collect(),
        max_message_bytes: u32::try_from(topic.max_message_bytes).unwrap_or(u32::MAX),
        error: None,
    }
}
