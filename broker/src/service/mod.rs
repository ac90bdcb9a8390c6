//! The broker's gRPC services, and the server that they run in.

mod connection;
mod consumer;
mod error;
mod group;
mod memory;
mod messages;
mod metadata;
mod pace;
mod participant;
mod producer;
mod replication;
mod shard;
mod sliced;
mod transaction;

use std::{io, sync::Arc, time::Duration};

use millrace_crds::is_internal_topic;
use millrace_proto::v1::{
    ErrorReason, consumer_service_server::ConsumerServiceServer,
    group_service_server::GroupServiceServer, metadata_service_server::MetadataServiceServer,
    participant_service_server::ParticipantServiceServer,
    producer_service_server::ProducerServiceServer,
    replication_service_server::ReplicationServiceServer,
    transaction_service_server::TransactionServiceServer,
};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tower::ServiceBuilder;

use self::{
    error::ApiError,
    memory::{RequestBudget, ResponseBudget, hold_memory},
    pace::Pace,
};
use crate::{
    config::ServiceOptions,
    directory::{ClusterView, Directory, Led, Partition},
    groups::{self, Groups},
    observe::Metrics,
    partition::{Hosting, Peers},
    storage::{StorageError, Store},
    transactions::{self, Transactions},
};

/// Entries of one request at most.
const MAX_PARTITIONS_PER_REQUEST: usize = 10_000;
/// Reads from disk at a time: each takes a thread and its response's memory.
const MAX_DISK_READS: usize = 16;

/// What every service works on.
pub struct Broker {
    store: Arc<Store>,
    directory: Arc<Directory>,
    hosting: Arc<Hosting>,
    peers: Arc<Peers>,
    cluster_id: String,
    metrics: Arc<Metrics>,
    response_memory: ResponseBudget,
    /// Of what is sent to followers that are behind.
    catch_up: Pace,
    disk_reads: Semaphore,
    groups: Arc<Groups>,
    transactions: Arc<Transactions>,
    stop: CancellationToken,
}

impl Broker {
    /// A broker on a store, in a cluster. It serves until `stop` is cancelled.
    pub fn new(
        store: Arc<Store>,
        cluster: ClusterView,
        metrics: Arc<Metrics>,
        options: &ServiceOptions,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let ClusterView {
            cluster_id,
            directory,
            hosting,
            peers,
        } = cluster;
        let groups = groups::coordinate(store.clone(), directory.clone(), stop.clone());
        metrics.watch_groups(&groups);
        Arc::new(Broker {
            groups,
            transactions: transactions::coordinate(
                store.clone(),
                directory.clone(),
                producer::new_producer_id,
                stop.clone(),
            ),
            store,
            directory,
            hosting,
            peers,
            cluster_id,
            metrics,
            response_memory: ResponseBudget::new(options.response_bytes),
            catch_up: Pace::new(options.catch_up_rate),
            disk_reads: Semaphore::new(MAX_DISK_READS),
            stop,
        })
    }

    /// A partition that this broker leads.
    fn partition(&self, topic: &str, partition: i32) -> Result<Led, ApiError> {
        let found = self
            .directory
            .topic(topic)
            .ok_or_else(|| ApiError::unknown_topic(topic))?;
        let known = found.partition(partition).ok_or_else(|| {
            ApiError::unknown_partition(topic, partition, found.partition_count())
        })?;
        match known.led() {
            Some(led) => Ok(led),
            None => Err(self.not_leader(topic, partition, &known)),
        }
    }

    /// An error unless there is such a partition, and clients may write to it.
    fn check_writable(&self, topic: &str, partition: i32) -> Result<(), ApiError> {
        if is_internal_topic(topic) {
            let message = format!("{topic} is an internal topic: only brokers write to it");
            return Err(ApiError::invalid("topic", message));
        }
        let found = self.directory.topic(topic);
        let found = found.ok_or_else(|| ApiError::unknown_topic(topic))?;
        let count = found.partition_count();
        match usize::try_from(partition).is_ok_and(|index| index < count) {
            true => Ok(()),
            false => Err(ApiError::unknown_partition(topic, partition, count)),
        }
    }

    /// What a client is told of an error of storage. If the partition has moved meanwhile: where to.
    fn failure(&self, topic: &str, partition: i32, error: &StorageError) -> ApiError {
        let moved = matches!(
            error,
            StorageError::NotLed | StorageError::FencedLeader { .. }
        );
        let known = self.directory.topic(topic).filter(|_| moved);
        match known.and_then(|found| found.partition(partition)) {
            Some(known) => self.not_leader(topic, partition, &known),
            None => ApiError::storage(topic, partition, error),
        }
    }

    fn not_leader(&self, topic: &str, partition: i32, known: &Partition) -> ApiError {
        let leader = self.directory.leader(known);
        ApiError::not_leader(topic, partition, known.leader_epoch, leader)
    }

    fn is_stopping(&self) -> bool {
        self.stop.is_cancelled()
    }

    async fn stopping(&self) {
        self.stop.cancelled().await;
    }
}

/// Serves gRPC until the broker is told to stop, then finishes what it accepted.
pub async fn serve(
    broker: Arc<Broker>,
    listener: TcpListener,
    options: &ServiceOptions,
) -> Result<(), ServeError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_serving::<ProducerServiceServer<producer::Producer>>()
        .await;
    health
        .set_serving::<ConsumerServiceServer<consumer::Consumer>>()
        .await;
    health
        .set_serving::<MetadataServiceServer<metadata::Metadata>>()
        .await;
    health
        .set_serving::<GroupServiceServer<group::Group>>()
        .await;
    health
        .set_serving::<TransactionServiceServer<transaction::Transaction>>()
        .await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(millrace_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let budget = RequestBudget::new(options.request_bytes, options.max_request_bytes);
    let max = options.max_request_bytes;
    let producer = producer::Producer {
        broker: broker.clone(),
    };
    let consumer = consumer::Consumer {
        broker: broker.clone(),
    };
    let metadata = metadata::Metadata {
        broker: broker.clone(),
    };
    let group = group::Group {
        broker: broker.clone(),
    };
    let transaction = transaction::Transaction {
        broker: broker.clone(),
    };
    let participant = participant::Participant {
        broker: broker.clone(),
    };
    let replication = replication::Replication {
        broker: broker.clone(),
    };
    let memory = ServiceBuilder::new()
        .map_request(move |request| budget.meter(request))
        .map_response(hold_memory)
        .map_response(sliced::send_pieces)
        .into_inner();
    let stop = broker.stop.clone();
    let server = Server::builder()
        .initial_stream_window_size(options.stream_window_bytes)
        .initial_connection_window_size(options.connection_window_bytes)
        .max_frame_size(256 << 10)
        .max_concurrent_streams(256)
        // Finds connections whose peer is gone without a word.
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .layer(memory)
        .add_service(health_service)
        .add_service(reflection)
        .add_service(ProducerServiceServer::new(producer).max_decoding_message_size(max))
        .add_service(ConsumerServiceServer::new(consumer).max_decoding_message_size(max))
        .add_service(MetadataServiceServer::new(metadata))
        .add_service(GroupServiceServer::new(group).max_decoding_message_size(max))
        .add_service(TransactionServiceServer::new(transaction).max_decoding_message_size(max))
        .add_service(ParticipantServiceServer::new(participant).max_decoding_message_size(max))
        .add_service(ReplicationServiceServer::new(replication))
        .serve_with_incoming_shutdown(
            connection::accept(listener, options.max_connections, broker.metrics.clone()),
            async move { stop.cancelled().await },
        );
    tokio::pin!(server);
    tokio::select! {
        ended = &mut server => return Ok(ended?),
        () = broker.response_memory.watch_peers() => {}
        () = broker.stopping() => health.set_service_status("", tonic_health::ServingStatus::NotServing).await,
    }
    // Clients that keep their streams open would hold the broker up; what they have sent is finished by now.
    match tokio::time::timeout(options.drain, &mut server).await {
        Ok(ended) => Ok(ended?),
        Err(_) => Ok(()),
    }
}

/// Why the server ended.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The transport failed.
    #[error("the gRPC server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The compiled-in descriptors are damaged.
    #[error("gRPC reflection can't be set up: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// The listener failed.
    #[error("the gRPC listener failed: {0}")]
    Io(#[from] io::Error),
}

/// Runs what blocks on a thread for it.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        ApiError::new(
            ErrorReason::Storage,
            format!("a storage task failed: {error}"),
        )
    })
}
