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
    directory::Led,
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
    /// One for each entry of the request.
    entries: Vec<Entry>,
    /// Whether all that is in sync must have it.
    all: bool,
    /// `None` if nobody waits for it (`acks=0`) or nothing was left of it.
    answer: Option<oneshot::Receiver<Vec<Result<Appended, StorageError>>>>,
}

/// One entry of a request: where it goes, and why not if it was refused at once.
struct Entry {
    topic: String,
    partition: i32,
    led: Result<Led, ApiError>,
}

impl Producer {
    /// Checks a request and puts it into the writer's queue. Its order among others is settled when this returns.
    async fn accept(&self, request: ProduceRequest) -> Result<Accepted, ApiError> {
        let begun = Instant::now();
        let acks = Acks::try_from(request.acks).map_err(|_| {
            ApiError::invalid("acks", format!("{} is not a value of Acks", request.acks))
        })?;
        let all = matches!(acks, Acks::All | Acks::Unspecified);
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
            let prepared = self.prepare(&topic, partition, all, batches, records);
            let led = prepared.map(|(led, append)| {
                self.broker.metrics.produced(append.size());
                appends.push(append);
                led
            });
            entries.push(Entry {
                topic,
                partition,
                led,
            });
        }
        let mut answer = None;
        if !appends.is_empty() {
            match self.broker.store.append(appends).await {
                Ok(receiver) => answer = Some(receiver),
                Err(error) => {
                    for entry in entries.iter_mut().filter(|entry| entry.led.is_ok()) {
                        let Entry {
                            topic, partition, ..
                        } = entry;
                        entry.led = Err(self.broker.failure(topic, *partition, &error));
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
            all,
            answer,
        })
    }

    fn prepare(
        &self,
        topic: &str,
        partition: i32,
        all: bool,
        mut batches: Vec<Bytes>,
        records: Vec<v1::Record>,
    ) -> Result<(Led, PartitionAppend), ApiError> {
        self.broker.check_writable(topic, partition)?;
        let led = self.broker.partition(topic, partition)?;
        if let (true, Some(replica)) = (all, &led.replica) {
            let too_few = |error| ApiError::not_enough_replicas(topic, partition, error);
            replica.check_in_sync().map_err(too_few)?;
        }
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
        let failed = |error| self.broker.failure(topic, partition, &error);
        let append = PartitionAppend::new(led.log.clone(), led.epoch, batches).map_err(failed)?;
        Ok((led, append))
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
    /// Waits until the appends are as durable as configured and, if asked for, committed. One result for each entry, in their order.
    async fn finish(self, broker: &Broker) -> Vec<Outcome> {
        let deadline = self.begun + self.timeout;
        let timeout = self.timeout;
        let mut appended = match self.answer {
            None => Answer::NotAwaited,
            Some(answer) => match tokio::time::timeout_at(deadline, answer).await {
                Ok(Ok(results)) => Answer::Results(results.into_iter()),
                Ok(Err(_)) => Answer::Stopped,
                Err(_) => Answer::TimedOut,
            },
        };
        let mut outcomes = Vec::with_capacity(self.entries.len());
        for Entry {
            topic,
            partition,
            led,
        } in self.entries
        {
            let led = match led {
                Ok(led) => led,
                Err(error) => {
                    outcomes.push(Err((topic, partition, error)));
                    continue;
                }
            };
            let result = match appended.next() {
                // All that was appended was appended by then: waiting for one after the other takes no longer.
                Ok(Ok(appended)) if self.all => {
                    let committed = led.committed(appended.end_offset);
                    match tokio::time::timeout_at(deadline, committed).await {
                        Ok(committed) => committed
                            .map(|()| appended)
                            .map_err(|error| broker.failure(&topic, partition, &error)),
                        Err(_) => Err(not_in_time(
                            &topic,
                            partition,
                            "not on all replicas in sync",
                            timeout,
                        )),
                    }
                }
                Ok(Ok(appended)) => Ok(appended),
                Ok(Err(error)) => Err(broker.failure(&topic, partition, &error)),
                Err(Unanswered::TimedOut) => {
                    Err(not_in_time(&topic, partition, "not appended", timeout))
                }
                Err(Unanswered::Stopped) => Err(ApiError::shutting_down()),
            };
            outcomes.push(match result {
                Ok(appended) => Ok((topic, partition, appended)),
                Err(error) => Err((topic, partition, error)),
            });
        }
        outcomes
    }
}

/// What storage answered.
enum Answer {
    /// Nobody waits.
    NotAwaited,
    Results(std::vec::IntoIter<Result<Appended, StorageError>>),
    TimedOut,
    Stopped,
}

/// Why there is no answer.
enum Unanswered {
    TimedOut,
    Stopped,
}

impl Answer {
    /// For the next entry that was not refused.
    fn next(&mut self) -> Result<Result<Appended, StorageError>, Unanswered> {
        match self {
            Answer::NotAwaited => Ok(Ok(Appended {
                base_offset: -1,
                log_append_time_ms: None,
                log_start: -1,
                end_offset: -1,
            })),
            Answer::Results(results) => results.next().ok_or(Unanswered::Stopped),
            Answer::TimedOut => Err(Unanswered::TimedOut),
            Answer::Stopped => Err(Unanswered::Stopped),
        }
    }
}

fn not_in_time(topic: &str, partition: i32, what: &str, timeout: Duration) -> ApiError {
    let message = format!(
        "{topic}/{partition}: {what} within {timeout:?}; it may still be: an idempotent producer can send it again"
    );
    ApiError::new(ErrorReason::TimedOut, message)
}

fn response(results: Vec<Outcome>) -> ProduceResponse {
    let result = |outcome| match outcome {
        Ok((topic, partition, appended)) => {
            let Appended {
                base_offset,
                log_append_time_ms,
                log_start,
                ..
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
        let results = accepted.finish(&self.broker).await;
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
pub(super) fn new_producer_id() -> i64 {
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
        let stopping = self.broker.stopping();
        tokio::pin!(stopping);
        while open || !in_flight.is_empty() {
            tokio::select! {
                biased;
                Some(answer) = in_flight.next(), if !in_flight.is_empty() => {
                    // A client that does not read its answers must not keep what its next request takes.
                    if !matches!(tokio::time::timeout(STALL, answers.send(Ok(answer))).await, Ok(Ok(()))) {
                        return;
                    }
                }
                // A client that keeps its stream open would hold the broker up. What was read is answered; it sends the rest elsewhere.
                () = &mut stopping, if open => open = false,
                request = requests.next(), if open && in_flight.len() < MAX_IN_FLIGHT => match request {
                    Some(Ok(ProduceStreamRequest { correlation_id, request })) => {
                        let timer = self.broker.metrics.start(Method::ProduceStream);
                        let accepted = self.accept(request.unwrap_or_default()).await;
                        let broker = &self.broker;
                        in_flight.push(async move {
                            let metrics = &broker.metrics;
                            let _timer = timer;
                            match accepted {
                                Ok(accepted) => {
                                    let results = accepted.finish(broker).await;
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
