//! Metadata: what there is and who leads it.

use std::{collections::HashSet, sync::Arc};

use millrace_proto::v1::{
    Broker as BrokerInfo, GetMetadataRequest, GetMetadataResponse, PartitionMetadata,
    TopicMetadata, metadata_service_server::MetadataService,
};
use tonic::{Request, Response, Status};

use super::{Broker, MAX_PARTITIONS_PER_REQUEST, error::ApiError};
use crate::{observe::Method, storage::StoredTopic};

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
        let mut names = request.into_inner().topics;
        // Each topic once, however often it is named.
        let mut seen = HashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        if names.len() > MAX_PARTITIONS_PER_REQUEST {
            let message = format!(
                "{} topics in one request; {MAX_PARTITIONS_PER_REQUEST} are allowed",
                names.len()
            );
            return Err(ApiError::invalid("topics", message).into());
        }
        let store = &self.broker.store;
        let topics = if names.is_empty() {
            store
                .topics()
                .iter()
                .map(|topic| self.describe(topic))
                .collect()
        } else {
            let describe = |name: String| match store.topic(&name) {
                Some(topic) => self.describe(&topic),
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
        let identity = &self.broker.identity;
        Ok(Response::new(GetMetadataResponse {
            cluster_id: identity.cluster_id.clone(),
            brokers: vec![BrokerInfo {
                id: identity.broker_id,
                address: identity.address.clone(),
            }],
            topics,
        }))
    }
}

impl Metadata {
    fn describe(&self, topic: &StoredTopic) -> TopicMetadata {
        let id = self.broker.identity.broker_id;
        let partitions = topic.partitions.iter().map(|log| PartitionMetadata {
            partition: log.index,
            leader_id: id,
            leader_epoch: log.leader_epoch(),
            replica_ids: vec![id],
            isr_ids: vec![id],
            log_start_offset: log.log_start(),
            high_watermark: log.high_watermark(),
            size_bytes: log.size_bytes(),
        });
        let max_message_bytes = topic
            .partitions
            .first()
            .map_or(0, |log| log.config().max_message_bytes);
        TopicMetadata {
            name: topic.name.to_string(),
            topic_id: topic.topic_id.to_string(),
            partitions: partitions.collect(),
            max_message_bytes: u32::try_from(max_message_bytes).unwrap_or(u32::MAX),
            error: None,
        }
    }
}
