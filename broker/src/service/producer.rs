//! Produce: checks what came, hands it to storage, answers when it is as durable as asked for.

use std::{pin::Pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream::FuturesUnordered};
use millrace_proto::v1::{
    self, Acks, ErrorReason, InitProducerRequest, InitProducerResponse, PartitionRecords,
    ProduceRequest, ProduceResponse, ProduceResult, ProduceStreamRequest, ProduceStreamResponse,
    producer_service_server::ProducerService,
};
use millrace_record::{BatchBuilder, BatchOptions, RecordHeader};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{
    Broker, MAX_PARTITIONS_PER_REQUEST,
    error::ApiError,
    memory::{RequestMemory, STALL},
    messages::Messages,
};
use crate::{
    observe::Method,
    storage::{Appended, PartitionAppend, StorageError},
};

/// Requests of one stream that may wait for their answers; the stream is not read further beyond that.
const MAX_IN_FLIGHT: usize = 64;
/// How long an append may take unless the request says otherwise.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);

/// The producer service.
pub(super) struct Producer {
    pub(super) broker: Arc<Broker>,
}

/// What became of one entry of a request: its topic and partition, and the rest.
type Outcome = Result<(String, i32, Appended), (String, i32, ApiError)>;

/// A request that storage has taken.
struct Accepted {
    begun: Instant,
    timeout: Duration,
    /// One for each entry of the request: where it goes, and why not if it was refused at once.
    entries: Vec<(String, i32, Option<ApiError>)>,
    /// `None` if nobody waits for it (`acks=0`) or nothing was left of it.
    answer: Option<oneshot::Receiver<Vec<Result<Appended, StorageError>>>>,
}

impl Producer {
    /// Checks a request and puts it into the writer's queue. Its order among others is settled when this returns.
    async fn accept(&self, request: ProduceRequest) -> Result<Accepted, ApiError> {
        let begun = Instant::now();
        let acks = Acks::try_from(request.acks).map_err(|_| {
            ApiError::invalid("acks", format!("{} is not a value of Acks", request.acks))
        })?;
        let timeout = match request.timeout_ms {
            0 => DEFAULT_TIMEOUT,
            millis => Duration::from_millis(millis.into()),
        };
        check_partition_count(request.partitions.len())?;
        if self.broker.is_stopping() {
            return Err(ApiError::shutting_down());
        }
        let mut entries = Vec::with_capacity(request.partitions.len());
        let mut appends = Vec::with_capacity(request.partitions.len());
        for PartitionRecords {
            topic,
            partition,
            batches,
            records,
        } in request.partitions
        {
            let refused = match self.prepare(&topic, partition, batches, records) {
                Ok(append) => {
                    self.broker.metrics.produced(append.size());
                    appends.push(append);
                    None
                }
                Err(error) => Some(error),
            };
            entries.push((topic, partition, refused));
        }
        let mut answer = None;
        if !appends.is_empty() {
            match self.broker.store.append(appends).await {
                Ok(receiver) => answer = Some(receiver),
                Err(error) => {
                    for (topic, partition, refused) in &mut entries {
                        refused.get_or_insert_with(|| ApiError::storage(topic, *partition, &error));
                    }
                }
            }
        }
        if acks == Acks::None {
            answer = None;
        }
        Ok(Accepted {
            begun,
            timeout,
            entries,
            answer,
        })
    }

    fn prepare(
        &self,
        topic: &str,
        partition: i32,
        mut batches: Vec<Bytes>,
        records: Vec<v1::Record>,
    ) -> Result<PartitionAppend, ApiError> {
        let log = self.broker.partition(topic, partition)?;
        match (batches.is_empty(), records.is_empty()) {
            (true, true) => {
                return Err(ApiError::invalid(
                    "partitions",
                    format!("{topic}/{partition}: neither batches nor records"),
                ));
            }
            (false, false) => {
                let message =
                    format!("{topic}/{partition}: both batches and records; send one of them");
                return Err(ApiError::invalid("partitions", message));
            }
            (true, false) => batches.push(build_batch(topic, partition, records)?),
            (false, true) => {}
        }
        let failed = |error| ApiError::storage(topic, partition, &error);
        let leader_epoch = log.leader_epoch().ok_or(StorageError::NotLed);
        PartitionAppend::new(log, leader_epoch.map_err(failed)?, batches).map_err(failed)
    }
}

/// Makes one batch of plain records.
fn build_batch(topic: &str, partition: i32, records: Vec<v1::Record>) -> Result<Bytes, ApiError> {
    let now_ms = crate::now_ms();
    let mut builder = BatchBuilder::new(BatchOptions::default());
    for record in records {
        let headers: Vec<RecordHeader> = record
            .headers
            .into_iter()
            .map(|header| RecordHeader {
                key: header.key.into(),
                value: header.value,
            })
            .collect();
        let timestamp_ms = record.timestamp_ms.unwrap_or(now_ms);
        builder.append(
            timestamp_ms,
            record.key.as_deref(),
            record.value.as_deref(),
            &headers,
        );
    }
    builder
        .build()
        .map_err(|error| ApiError::storage(topic, partition, &error.into()))
}

pub(super) fn check_partition_count(count: usize) -> Result<(), ApiError> {
    match count {
        0 => Err(ApiError::invalid(
            "partitions",
            "the request names no partition",
        )),
        1..=MAX_PARTITIONS_PER_REQUEST => Ok(()),
        _ => {
            let message = format!(
                "{count} partitions in one request; {MAX_PARTITIONS_PER_REQUEST} are allowed"
            );
            Err(ApiError::invalid("partitions", message))
        }
    }
}

impl Accepted {
    /// Waits for storage. One result for each entry, in their order.
    async fn finish(self) -> Vec<Outcome> {
        let unknown = Appended {
            base_offset: -1,
            log_append_time_ms: None,
            log_start: -1,
        };
        let deadline = self.begun + self.timeout;
        let (outcomes, timed_out) = match self.answer {
            None => (None, false),
            Some(answer) => match tokio::time::timeout_at(deadline, answer).await {
                Ok(Ok(outcomes)) => (Some(outcomes), false),
                Ok(Err(_)) => (Some(Vec::new()), false),
                Err(_) => (Some(Vec::new()), true),
            },
        };
        let mut outcomes = outcomes.map(Vec::into_iter);
        let timeout = self.timeout;
        let finish = |(topic, partition, refused): (String, i32, Option<ApiError>)| {
            if let Some(error) = refused {
                return Err((topic, partition, error));
            }
            match outcomes.as_mut().map(Iterator::next) {
                None => Ok((topic, partition, unknown)),
                Some(Some(Ok(appended))) => Ok((topic, partition, appended)),
                Some(Some(Err(error))) => {
                    let error = ApiError::storage(&topic, partition, &error);
                    Err((topic, partition, error))
                }
                Some(None) if timed_out => {
                    let message = format!(
                        "{topic}/{partition}: not appended within {timeout:?}; it may still be: an idempotent producer can send it again"
                    );
                    Err((
                        topic,
                        partition,
                        ApiError::new(ErrorReason::TimedOut, message),
                    ))
                }
                Some(None) => Err((topic, partition, ApiError::shutting_down())),
            }
        };
        self.entries.into_iter().map(finish).collect()
    }
}

fn response(results: Vec<Outcome>) -> ProduceResponse {
    let result = |outcome| match outcome {
        Ok((topic, partition, appended)) => {
            let Appended {
                base_offset,
                log_append_time_ms,
                log_start,
            } = appended;
            ProduceResult {
                topic,
                partition,
                base_offset,
                log_append_time_ms,
                log_start_offset: log_start,
                error: None,
            }
        }
        Err((topic, partition, error)) => ProduceResult {
            topic,
            partition,
            base_offset: -1,
            log_append_time_ms: None,
            log_start_offset: -1,
            error: Some(v1::Error::from(error)),
        },
    };
    ProduceResponse {
        results: results.into_iter().map(result).collect(),
    }
}

#[tonic::async_trait]
impl ProducerService for Producer {
    async fn produce(
        &self,
        request: Request<ProduceRequest>,
    ) -> Result<Response<ProduceResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::Produce);
        // Held until the queue has taken the request over, which counts it itself.
        let memory = request.extensions().get::<RequestMemory>().cloned();
        let accepted = self.accept(request.into_inner()).await?;
        drop(memory);
        let results = accepted.finish().await;
        self.broker.metrics.refused(
            results
                .iter()
                .filter_map(|result| Some(result.as_ref().err()?.2.reason_name())),
        );
        if results.iter().all(Result::is_err)
            && let Some(Err((_, _, error))) = results.first()
        {
            return Err(error.clone().into());
        }
        Ok(Response::new(response(results)))
    }

    type ProduceStreamStream =
        Pin<Box<dyn Stream<Item = Result<ProduceStreamResponse, Status>> + Send>>;

    async fn produce_stream(
        &self,
        mut request: Request<Streaming<ProduceStreamRequest>>,
    ) -> Result<Response<Self::ProduceStreamStream>, Status> {
        let requests = Messages::of(&mut request)?;
        let (answers, stream) = mpsc::channel(MAX_IN_FLIGHT);
        let producer = Producer {
            broker: self.broker.clone(),
        };
        tokio::spawn(producer.serve(requests, answers));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn init_producer(
        &self,
        _request: Request<InitProducerRequest>,
    ) -> Result<Response<InitProducerResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::InitProducer);
        Ok(Response::new(InitProducerResponse {
            producer_id: new_producer_id(),
            producer_epoch: 0,
        }))
    }
}

/// One that no producer has had, whichever broker gave it out: 63 random bits need no one to be asked. Among a million producers that wrote to
/// one partition within a week the chance that two have the same is less than one in ten million.
fn new_producer_id() -> i64 {
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    // A UUID's few fixed bits are at different places of its halves.
    ((high ^ low.rotate_left(32)) >> 1).cast_signed()
}

impl Producer {
    /// Serves one produce stream until the client ends it or goes away; what was accepted is answered all the same.
    async fn serve(
        self,
        mut requests: Messages,
        answers: mpsc::Sender<Result<ProduceStreamResponse, Status>>,
    ) {
        let mut in_flight = FuturesUnordered::new();
        let mut open = true;
        while open || !in_flight.is_empty() {
            tokio::select! {
                biased;
                Some(answer) = in_flight.next(), if !in_flight.is_empty() => {
                    // A client that does not read its answers must not keep what its next request takes.
                    if !matches!(tokio::time::timeout(STALL, answers.send(Ok(answer))).await, Ok(Ok(()))) {
                        return;
                    }
                }
                request = requests.next(), if open && in_flight.len() < MAX_IN_FLIGHT => match request {
                    Some(Ok(ProduceStreamRequest { correlation_id, request })) => {
                        let timer = self.broker.metrics.start(Method::ProduceStream);
                        let accepted = self.accept(request.unwrap_or_default()).await;
                        let metrics = &self.broker.metrics;
                        in_flight.push(async move {
                            let _timer = timer;
                            match accepted {
                                Ok(accepted) => {
                                    let results = accepted.finish().await;
                                    metrics.refused(results.iter().filter_map(|r| Some(r.as_ref().err()?.2.reason_name())));
                                    ProduceStreamResponse { correlation_id, response: Some(response(results)), error: None }
                                }
                                Err(error) => {
                                    metrics.refused([error.reason_name()].into_iter());
                                    ProduceStreamResponse { correlation_id, response: None, error: Some(error.into()) }
                                }
                            }
                        });
                    }
                    None => open = false,
                    Some(Err(status)) => {
                        // The client broke off or sent what is no message: nothing more can be read.
                        let _ = answers.try_send(Err(status));
                        open = false;
                    }
                },
            }
        }
    }
}
