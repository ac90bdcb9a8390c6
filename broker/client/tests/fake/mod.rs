//! A cluster in this process that speaks `millrace.v1` and fails on purpose: the protocol's edge cases, which a real broker
//! shows too rarely. It keeps logs in memory and recognises idempotent producers as a broker does.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)] // Each test program uses its part.

mod wire;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use millrace_proto::{
    ERROR_DOMAIN,
    v1::{
        self, ErrorReason,
        consumer_service_server::{ConsumerService, ConsumerServiceServer},
        metadata_service_server::{MetadataService, MetadataServiceServer},
        producer_service_server::{ProducerService, ProducerServiceServer},
    },
};
use millrace_record::{BatchHeader, DecodeLimits, decode, set_base_offset, validate};
use parking_lot::Mutex;
use tokio::{
    net::TcpListener,
    sync::{Notify, mpsc},
    task::JoinHandle,
    time::Instant,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};
use tonic_types::{ErrorDetails, StatusExt};
pub use wire::Mode;
use wire::Wire;

/// What happens to one produce request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Every partition answers with this and appends nothing.
    Reject(ErrorReason),
    /// The request as a whole is refused.
    Refuse(ErrorReason),
    /// The stream ends before anything is appended.
    DropBefore,
    /// The stream ends after the append, without an answer.
    DropAfter,
    /// Appended, and answered as if the time was over.
    AppendAndTimeOut,
    Delay(Duration),
    /// Answered after the next request's answer, or a little later if there is none.
    AnswerLater,
    /// Never answered, not appended.
    Swallow,
    /// The first so many batches of each partition are appended, then the stream ends: so a new leader may have them.
    AppendPart(usize),
}

#[derive(Default)]
pub struct Log {
    pub batches: Vec<Bytes>,
    pub next: i64,
    pub start: i64,
    producers: HashMap<i64, Known>,
}

#[derive(Default)]
struct Known {
    next_sequence: i32,
    /// As after a truncation that took all of this producer's batches.
    takes_any: bool,
    recent: VecDeque<(i32, i64)>,
}

pub struct Topic {
    pub logs: Vec<Log>,
    /// Broker, if there is a leader, and epoch.
    pub leaders: Vec<(Option<usize>, i32)>,
    pub max_message_bytes: u32,
}

type ProduceFaults = Box<dyn FnMut(&v1::ProduceRequest) -> Fault + Send>;

#[derive(Default)]
pub struct State {
    pub topics: HashMap<String, Topic>,
    pub addresses: Vec<String>,
    next_producer_id: i64,
    /// Asked for each produce request.
    pub produce_faults: Option<ProduceFaults>,
    /// Asked for each fetch; fails the call.
    pub fetch_faults: Option<Box<dyn FnMut() -> Option<Code> + Send>>,
    /// Answers to queries for offsets that say that they aren't available yet.
    pub unavailable_offsets: usize,
    /// What one broker takes for the end of every log, and whether it refuses offsets beyond that.
    pub short: Option<(usize, i64, bool)>,
    /// `NOT_LEADER` does not tell who is.
    pub keeps_leaders_secret: bool,
    /// Metadata is never answered.
    pub keeps_metadata_secret: bool,
    pub produce_requests: usize,
    pub metadata_requests: usize,
    pub fetch_requests: usize,
    pub fetched_bytes: usize,
}

impl State {
    pub fn move_leader(&mut self, topic: &str, partition: usize, broker: usize) {
        let leader = &mut self.topics.get_mut(topic).unwrap().leaders[partition];
        *leader = (Some(broker), leader.1 + 1);
    }

    pub fn depose_leader(&mut self, topic: &str, partition: usize) {
        self.topics.get_mut(topic).unwrap().leaders[partition].0 = None;
    }

    pub fn leader(&self, topic: &str, partition: usize) -> Option<usize> {
        self.topics[topic].leaders[partition].0
    }

    /// As after a truncation: any sequence may come next.
    pub fn forget_sequences(&mut self, topic: &str, partition: usize) {
        let log = &mut self.topics.get_mut(topic).unwrap().logs[partition];
        log.producers
            .values_mut()
            .for_each(|known| known.takes_any = true);
    }

    /// All records of a partition, in order.
    pub fn values(&self, topic: &str, partition: usize) -> Vec<String> {
        let batches = &self.topics[topic].logs[partition].batches;
        let records = batches
            .iter()
            .flat_map(|batch| decode(batch, &DecodeLimits::default()).unwrap());
        records
            .map(|record| String::from_utf8(record.unwrap().value.unwrap().to_vec()).unwrap())
            .collect()
    }

    pub fn batch_count(&self, topic: &str) -> usize {
        self.topics[topic]
            .logs
            .iter()
            .map(|log| log.batches.len())
            .sum()
    }
}

#[derive(Clone)]
struct Broker {
    id: usize,
    state: Arc<Mutex<State>>,
    appended: Arc<Notify>,
}

pub struct Cluster {
    pub state: Arc<Mutex<State>>,
    appended: Arc<Notify>,
    servers: Vec<JoinHandle<()>>,
    wires: Vec<Wire>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.servers.iter().for_each(JoinHandle::abort);
    }
}

impl Cluster {
    pub async fn start(brokers: usize) -> Self {
        let state = Arc::new(Mutex::new(State {
            next_producer_id: 1000,
            ..State::default()
        }));
        let appended = Arc::new(Notify::new());
        let mut servers = Vec::new();
        let mut wires = Vec::new();
        for id in 0..brokers {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let wire = Wire::to(listener.local_addr().unwrap()).await;
            state.lock().addresses.push(wire.address.to_string());
            wires.push(wire);
            let broker = Broker {
                id,
                state: state.clone(),
                appended: appended.clone(),
            };
            servers.push(tokio::spawn(async move {
                let limit = 64 << 20;
                Server::builder()
                    .initial_stream_window_size(4 << 20)
                    .initial_connection_window_size(8 << 20)
                    .add_service(
                        ProducerServiceServer::new(broker.clone()).max_decoding_message_size(limit),
                    )
                    .add_service(
                        ConsumerServiceServer::new(broker.clone()).max_encoding_message_size(limit),
                    )
                    .add_service(MetadataServiceServer::new(broker))
                    .serve_with_incoming(TcpListenerStream::new(listener))
                    .await
                    .unwrap();
            }));
        }
        Cluster {
            state,
            appended,
            servers,
            wires,
        }
    }

    /// Stops a broker as a signal does, or kills it, or brings it back.
    pub fn set(&self, broker: usize, mode: Mode) {
        self.wires[broker].set(mode);
    }

    /// Adds a topic, or partitions to it; leaders in turn.
    pub fn topic(&self, name: &str, partitions: usize) {
        let mut state = self.state.lock();
        let brokers = state.addresses.len();
        let topic = state.topics.entry(name.into()).or_insert_with(|| Topic {
            logs: Vec::new(),
            leaders: Vec::new(),
            max_message_bytes: 1 << 20,
        });
        for partition in topic.logs.len()..partitions {
            topic.logs.push(Log::default());
            topic.leaders.push((Some(partition % brokers), 1));
        }
    }

    pub fn address(&self) -> String {
        self.state.lock().addresses[0].clone()
    }

    pub fn produce_faults(
        &self,
        faults: impl FnMut(&v1::ProduceRequest) -> Fault + Send + 'static,
    ) {
        self.state.lock().produce_faults = Some(Box::new(faults));
    }

    /// These faults for the next requests, then none.
    pub fn next_produce_faults(&self, faults: impl IntoIterator<Item = Fault>) {
        let mut faults: VecDeque<Fault> = faults.into_iter().collect();
        self.produce_faults(move |_| faults.pop_front().unwrap_or(Fault::None));
    }

    /// Appends a batch as it is, with its base offset set.
    pub fn append_raw(
        &self,
        topic: &str,
        partition: usize,
        batch: &[u8],
        corrupt: impl FnOnce(&mut Vec<u8>),
    ) {
        let mut state = self.state.lock();
        let log = &mut state.topics.get_mut(topic).unwrap().logs[partition];
        let mut batch = batch.to_vec();
        set_base_offset(&mut batch, log.next);
        log.next = BatchHeader::parse(&batch).unwrap().last_offset() + 1;
        corrupt(&mut batch);
        log.batches.push(batch.into());
        self.appended.notify_waiters();
    }
}

fn error(reason: ErrorReason, topic: &str, partition: i32, more: &[(&str, String)]) -> v1::Error {
    let mut metadata: HashMap<String, String> = more
        .iter()
        .map(|(k, v)| (k.to_string(), v.clone()))
        .collect();
    metadata.insert("topic".into(), topic.into());
    metadata.insert("partition".into(), partition.to_string());
    v1::Error {
        reason: reason.into(),
        message: format!("{} on {topic}-{partition}", reason.as_str_name()),
        metadata,
    }
}

impl Broker {
    /// Whether this broker may serve the partition.
    fn check(&self, state: &State, topic: &str, partition: i32) -> Result<(), v1::Error> {
        let Some(found) = state.topics.get(topic) else {
            return Err(error(ErrorReason::UnknownTopic, topic, partition, &[]));
        };
        let Some(&(leader, epoch)) = found.leaders.get(partition as usize) else {
            return Err(error(ErrorReason::UnknownPartition, topic, partition, &[]));
        };
        if leader != Some(self.id) {
            let told = leader.filter(|_| !state.keeps_leaders_secret);
            let hint = told.map_or_else(Vec::new, |leader| {
                vec![
                    ("leader_id", leader.to_string()),
                    ("leader_address", state.addresses[leader].clone()),
                    ("leader_epoch", epoch.to_string()),
                ]
            });
            return Err(error(ErrorReason::NotLeader, topic, partition, &hint));
        }
        Ok(())
    }

    fn append(&self, state: &mut State, records: &v1::PartitionRecords) -> Result<i64, v1::Error> {
        let (topic, partition) = (records.topic.as_str(), records.partition);
        self.check(state, topic, partition)?;
        let fail = |reason| error(reason, topic, partition, &[]);
        let found = state.topics.get_mut(topic).unwrap();
        let log = &mut found.logs[partition as usize];
        let headers: Vec<BatchHeader> = records
            .batches
            .iter()
            .map(|batch| validate(batch).map_err(|_| fail(ErrorReason::CorruptBatch)))
            .collect::<Result<_, _>>()?;
        if records
            .batches
            .iter()
            .any(|batch| batch.len() > found.max_message_bytes as usize)
        {
            return Err(fail(ErrorReason::RecordTooLarge));
        }
        let first = &headers[0];
        let idempotent = first.producer_id >= 0;
        if idempotent {
            let known = log.producers.entry(first.producer_id).or_default();
            if std::mem::take(&mut known.takes_any) {
                known.next_sequence = first.base_sequence;
            }
            if first.base_sequence < known.next_sequence {
                let original = known
                    .recent
                    .iter()
                    .find(|(sequence, _)| *sequence == first.base_sequence);
                return original
                    .map(|(_, offset)| *offset)
                    .ok_or_else(|| fail(ErrorReason::DuplicateSequence));
            }
            let mut expected = known.next_sequence;
            for header in &headers {
                if header.base_sequence != expected {
                    return Err(fail(ErrorReason::OutOfOrderSequence));
                }
                expected += header.record_count;
            }
            known.next_sequence = expected;
            let mut offset = log.next;
            for header in &headers {
                known.recent.push_back((header.base_sequence, offset));
                offset += i64::from(header.record_count);
            }
            let forgotten = known.recent.len().saturating_sub(100);
            known.recent.drain(..forgotten);
        }
        let base = log.next;
        for (batch, header) in records.batches.iter().zip(&headers) {
            let mut batch = batch.to_vec();
            set_base_offset(&mut batch, log.next);
            log.next += i64::from(header.record_count);
            log.batches.push(batch.into());
        }
        self.appended.notify_waiters();
        Ok(base)
    }

    /// `None`: the stream ends.
    fn produce_one(
        &self,
        message: &v1::ProduceStreamRequest,
    ) -> (Fault, Option<v1::ProduceStreamResponse>) {
        let request = message.request.as_ref().unwrap();
        let mut state = self.state.lock();
        state.produce_requests += 1;
        let mut faults = state.produce_faults.take();
        let fault = faults
            .as_mut()
            .map_or(Fault::None, |faults| faults(request));
        state.produce_faults = faults;
        if let Fault::Refuse(reason) = fault {
            let refused = v1::Error {
                reason: reason.into(),
                ..Default::default()
            };
            let response = v1::ProduceStreamResponse {
                correlation_id: message.correlation_id,
                response: None,
                error: Some(refused),
            };
            return (fault, Some(response));
        }
        if matches!(fault, Fault::DropBefore | Fault::Swallow) {
            return (fault, None);
        }
        let results = request.partitions.iter().map(|records| {
            let outcome = match fault {
                Fault::Reject(reason) => Err(error(reason, &records.topic, records.partition, &[])),
                Fault::AppendAndTimeOut => self.append(&mut state, records).and_then(|_| {
                    Err(error(
                        ErrorReason::TimedOut,
                        &records.topic,
                        records.partition,
                        &[],
                    ))
                }),
                Fault::AppendPart(batches) => {
                    let mut part = records.clone();
                    part.batches.truncate(batches);
                    self.append(&mut state, &part)
                }
                _ => self.append(&mut state, records),
            };
            let (base_offset, error) = match outcome {
                Ok(base) => (base, None),
                Err(error) => (-1, Some(error)),
            };
            v1::ProduceResult {
                topic: records.topic.clone(),
                partition: records.partition,
                base_offset,
                error,
                ..Default::default()
            }
        });
        let response = v1::ProduceResponse {
            results: results.collect(),
        };
        let response = v1::ProduceStreamResponse {
            correlation_id: message.correlation_id,
            response: Some(response),
            error: None,
        };
        (fault, Some(response))
    }
}

#[tonic::async_trait]
impl ProducerService for Broker {
    async fn produce(
        &self,
        _: Request<v1::ProduceRequest>,
    ) -> Result<Response<v1::ProduceResponse>, Status> {
        Err(Status::unimplemented("the client uses the stream"))
    }

    type ProduceStreamStream = ReceiverStream<Result<v1::ProduceStreamResponse, Status>>;

    async fn produce_stream(
        &self,
        request: Request<Streaming<v1::ProduceStreamRequest>>,
    ) -> Result<Response<Self::ProduceStreamStream>, Status> {
        let mut requests = request.into_inner();
        let (answers, stream) = mpsc::channel(100);
        let broker = self.clone();
        tokio::spawn(async move {
            let mut held = None;
            loop {
                let patience = Duration::from_millis(if held.is_some() { 50 } else { 1_000_000 });
                let message = match tokio::time::timeout(patience, requests.message()).await {
                    Ok(Ok(Some(message))) => message,
                    Ok(_) => return,
                    Err(_) => {
                        let _ = answers.send(Ok(held.take().unwrap())).await;
                        continue;
                    }
                };
                let (fault, response) = broker.produce_one(&message);
                match fault {
                    Fault::DropBefore | Fault::DropAfter | Fault::AppendPart(_) => {
                        let _ = answers
                            .send(Err(Status::unavailable("dropped on purpose")))
                            .await;
                        return;
                    }
                    Fault::Delay(delay) => tokio::time::sleep(delay).await,
                    Fault::AnswerLater if held.is_none() && response.is_some() => {
                        held = response;
                        continue;
                    }
                    _ => {}
                }
                for response in response.into_iter().chain(held.take()) {
                    let _ = answers.send(Ok(response)).await;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn init_producer(
        &self,
        _: Request<v1::InitProducerRequest>,
    ) -> Result<Response<v1::InitProducerResponse>, Status> {
        let mut state = self.state.lock();
        state.next_producer_id += 1;
        Ok(Response::new(v1::InitProducerResponse {
            producer_id: state.next_producer_id,
            producer_epoch: 0,
        }))
    }
}

#[tonic::async_trait]
impl ConsumerService for Broker {
    async fn fetch(
        &self,
        request: Request<v1::FetchRequest>,
    ) -> Result<Response<v1::FetchResponse>, Status> {
        let request = request.into_inner();
        {
            let mut state = self.state.lock();
            state.fetch_requests += 1;
            let mut faults = state.fetch_faults.take();
            let fault = faults.as_mut().and_then(|faults| faults());
            state.fetch_faults = faults;
            if let Some(code) = fault {
                return Err(Status::new(code, "failed on purpose"));
            }
        }
        let until = Instant::now() + Duration::from_millis(request.max_wait_ms.into());
        loop {
            let appended = self.appended.notified();
            tokio::pin!(appended);
            appended.as_mut().enable();
            let results = self.read(&request);
            if let [first, rest @ ..] = &results[..]
                && first.error.is_some()
                && rest.iter().all(|result| result.error.is_some())
                && results.len() == request.partitions.len()
            {
                let failed = first.error.clone().unwrap();
                let reason = failed
                    .reason()
                    .as_str_name()
                    .trim_start_matches("ERROR_REASON_")
                    .to_owned();
                let details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, failed.metadata);
                return Err(Status::with_error_details(
                    Code::FailedPrecondition,
                    failed.message,
                    details,
                ));
            }
            if !results.is_empty() || tokio::time::timeout_at(until, appended).await.is_err() {
                let bytes: usize = results
                    .iter()
                    .flat_map(|r| &r.batches)
                    .map(Bytes::len)
                    .sum();
                self.state.lock().fetched_bytes += bytes;
                return Ok(Response::new(v1::FetchResponse { results }));
            }
        }
    }

    async fn list_offsets(
        &self,
        request: Request<v1::ListOffsetsRequest>,
    ) -> Result<Response<v1::ListOffsetsResponse>, Status> {
        let mut state = self.state.lock();
        let unavailable = state.unavailable_offsets > 0;
        state.unavailable_offsets -= usize::from(unavailable);
        let answer = |query: &v1::OffsetQuery| {
            let mut result = v1::OffsetResult {
                topic: query.topic.clone(),
                partition: query.partition,
                ..Default::default()
            };
            if let Err(error) = self.check(&state, &query.topic, query.partition) {
                result.error = Some(error);
                return result;
            }
            if unavailable {
                let reason = ErrorReason::OffsetNotAvailable;
                result.error = Some(error(reason, &query.topic, query.partition, &[]));
                return result;
            }
            let log = &state.topics[&query.topic].logs[query.partition as usize];
            match query.spec.as_ref().unwrap() {
                v1::offset_query::Spec::Earliest(_) => result.offset = Some(log.start),
                v1::offset_query::Spec::Latest(_) => result.offset = Some(log.next),
                v1::offset_query::Spec::TimestampMs(ms) => {
                    let records = log
                        .batches
                        .iter()
                        .flat_map(|batch| decode(batch, &DecodeLimits::default()).unwrap());
                    let found = records
                        .map(Result::unwrap)
                        .find(|record| record.timestamp_ms >= *ms);
                    result.offset = found.as_ref().map(|record| record.offset);
                    result.timestamp_ms = found.map(|record| record.timestamp_ms);
                }
            }
            result
        };
        let results = request.into_inner().queries.iter().map(answer).collect();
        Ok(Response::new(v1::ListOffsetsResponse { results }))
    }
}

impl Broker {
    fn read(&self, request: &v1::FetchRequest) -> Vec<v1::FetchResult> {
        let state = self.state.lock();
        let mut room = request.max_bytes as usize;
        let mut results = Vec::new();
        for wanted in &request.partitions {
            let mut result = v1::FetchResult {
                topic: wanted.topic.clone(),
                partition: wanted.partition,
                ..Default::default()
            };
            if let Err(error) = self.check(&state, &wanted.topic, wanted.partition) {
                result.error = Some(error);
                results.push(result);
                continue;
            }
            let log = &state.topics[&wanted.topic].logs[wanted.partition as usize];
            let short = state.short.filter(|short| short.0 == self.id);
            let end = short.map_or(log.next, |(_, end, _)| end.min(log.next));
            let refuses = short.is_none_or(|(_, _, refuses)| refuses);
            if wanted.offset < log.start || (wanted.offset > end && refuses) {
                let range = [
                    ("offset", wanted.offset.to_string()),
                    ("log_start_offset", log.start.to_string()),
                    ("high_watermark", end.to_string()),
                ];
                result.error = Some(error(
                    ErrorReason::OffsetOutOfRange,
                    &wanted.topic,
                    wanted.partition,
                    &range,
                ));
                results.push(result);
                continue;
            }
            result.high_watermark = end;
            result.last_stable_offset = end;
            result.log_start_offset = log.start;
            let mut of_partition = wanted.max_bytes as usize;
            // Damaged headers count as long as the broker's index would have them.
            let bases: Vec<i64> = log
                .batches
                .iter()
                .map(|b| i64::from_be_bytes(b[..8].try_into().unwrap()))
                .collect();
            for (at, batch) in log.batches.iter().enumerate() {
                let next = bases.get(at + 1).copied().unwrap_or(log.next);
                if next <= wanted.offset || next > end {
                    continue;
                }
                let fits = batch.len() <= room.min(of_partition);
                if !fits && (!results.is_empty() || !result.batches.is_empty()) {
                    break;
                }
                room = room.saturating_sub(batch.len());
                of_partition = of_partition.saturating_sub(batch.len());
                result.batches.push(batch.clone());
            }
            if !result.batches.is_empty() {
                results.push(result);
            }
        }
        results
    }
}

#[tonic::async_trait]
impl MetadataService for Broker {
    async fn get_metadata(
        &self,
        request: Request<v1::GetMetadataRequest>,
    ) -> Result<Response<v1::GetMetadataResponse>, Status> {
        if self.state.lock().keeps_metadata_secret {
            std::future::pending::<()>().await;
        }
        let mut state = self.state.lock();
        state.metadata_requests += 1;
        let mut names = request.into_inner().topics;
        if names.is_empty() {
            names = state.topics.keys().cloned().collect();
            names.sort();
        }
        let describe = |name: String| match state.topics.get(&name) {
            None => v1::TopicMetadata {
                error: Some(v1::Error {
                    reason: ErrorReason::UnknownTopic.into(),
                    message: format!("topic `{name}` does not exist"),
                    metadata: [("topic".to_owned(), name.clone())].into_iter().collect(),
                }),
                name,
                ..Default::default()
            },
            Some(topic) => v1::TopicMetadata {
                topic_id: format!("id-{name}"),
                name,
                partitions: topic
                    .leaders
                    .iter()
                    .zip(&topic.logs)
                    .enumerate()
                    .map(
                        |(partition, (&(leader, epoch), log))| v1::PartitionMetadata {
                            partition: partition as i32,
                            leader_id: leader.map_or(-1, |leader| leader as i32),
                            leader_epoch: epoch,
                            high_watermark: Some(log.next),
                            last_stable_offset: Some(log.next),
                            log_start_offset: Some(log.start),
                            ..Default::default()
                        },
                    )
                    .collect(),
                max_message_bytes: topic.max_message_bytes,
                error: None,
            },
        };
        let brokers = state.addresses.iter().enumerate();
        Ok(Response::new(v1::GetMetadataResponse {
            volume: None,
            cluster_id: "fake".into(),
            brokers: brokers
                .map(|(id, address)| v1::Broker {
                    id: id as i32,
                    address: address.clone(),
                })
                .collect(),
            topics: names.into_iter().map(describe).collect(),
        }))
    }
}
