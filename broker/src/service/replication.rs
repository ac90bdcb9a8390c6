//! The leader's side of replication: sends each follower what it has not got yet, as it comes.
//!
//! Live partitions, whose news is in memory, are served in turn. A follower that is behind is fed from disk by one read at a time for
//! each session, between what is live: it neither holds that up nor is held up by it. What is sent and not acknowledged is bounded.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    pin::Pin,
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use futures::{FutureExt, Stream, future::BoxFuture};
use millrace_crds::coordination::Replica;
use millrace_proto::v1::{
    Diverging, NotLeading, OutOfRange, ReplicaData, ReplicaHello, ReplicaPosition,
    ReplicateRequest, ReplicateResponse, replica_data::Refusal,
    replication_service_server::ReplicationService,
};
use millrace_record::BatchHeader;
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::Broker;
use crate::{
    partition::{HEARTBEAT, HostedReplica, News, PartitionKey, SILENCE, SessionSignal},
    replication::{Position, PositionCheck},
    storage::{ReadBatches, StorageError, UpTo},
};

/// Bytes of batches in one message, and of one partition in it.
const MESSAGE_BYTES: usize = 1 << 20;
const PARTITION_BYTES: usize = 256 << 10;
/// Bytes that a session may have sent without an acknowledgement. What is new waits behind them while a follower catches up: 8 MiB were no faster on a
/// fast link, and doubled the latency of live traffic meanwhile.
const WINDOW_BYTES: usize = 2 << 20;
/// Messages that wait for the connection.
const OUTGOING: usize = 2;

/// The replication service.
pub(super) struct Replication {
    pub(super) broker: Arc<Broker>,
}

#[tonic::async_trait]
impl ReplicationService for Replication {
    type ReplicateStream = Pin<Box<dyn Stream<Item = Result<ReplicateResponse, Status>> + Send>>;

    async fn replicate(
        &self,
        request: Request<Streaming<ReplicateRequest>>,
    ) -> Result<Response<Self::ReplicateStream>, Status> {
        let mut requests = request.into_inner();
        let first = tokio::time::timeout(SILENCE, requests.message());
        let first = first
            .await
            .map_err(|_| Status::deadline_exceeded("a follower says first who it is"))??;
        let hello = first.and_then(|request| request.hello);
        let follower = self.greet(hello)?;
        let (responses, stream) = mpsc::channel(OUTGOING);
        let session = Session {
            broker: self.broker.clone(),
            follower,
            signal: Arc::default(),
            partitions: BTreeMap::new(),
            handles: HashMap::new(),
            ready: VecDeque::new(),
            behind: VecDeque::new(),
            notes: Vec::new(),
            reading: None,
            unacknowledged: 0,
            heard: Instant::now(),
        };
        tokio::spawn(session.run(requests, responses));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

impl Replication {
    fn greet(&self, hello: Option<ReplicaHello>) -> Result<Replica, Status> {
        let hello =
            hello.ok_or_else(|| Status::invalid_argument("a follower says first who it is"))?;
        if hello.cluster_id != self.broker.cluster_id {
            return Err(Status::failed_precondition(format!(
                "this broker is of cluster {:?}, and the follower of {:?}",
                self.broker.cluster_id, hello.cluster_id
            )));
        }
        let store = Uuid::parse_str(&hello.store_id)
            .map_err(|_| Status::invalid_argument("store_id is no UUID"))?;
        Ok(Replica {
            id: hello.broker_id,
            store,
        })
    }
}

/// A partition that is sent.
struct Sending {
    replica: Arc<HostedReplica>,
    epoch: i32,
    /// The next offset to send.
    next: i64,
    /// What was sent: where it ends, and its bytes.
    sent: VecDeque<(i64, usize)>,
    /// Whether it waits in `ready`, or to be read from disk.
    queued: bool,
    /// The high watermark that was told last.
    told: i64,
}

/// Batches from disk, and for which handle.
type DiskRead = BoxFuture<'static, (u32, Result<ReadBatches, StorageError>)>;

async fn finished(reading: &mut Option<DiskRead>) -> (u32, Result<ReadBatches, StorageError>) {
    match reading {
        Some(reading) => reading.await,
        None => std::future::pending().await,
    }
}

/// One follower's session.
struct Session {
    broker: Arc<Broker>,
    follower: Replica,
    signal: Arc<SessionSignal>,
    partitions: BTreeMap<u32, Sending>,
    /// Of each partition the handle that counts.
    handles: HashMap<PartitionKey, u32>,
    /// With something to send, in turn.
    ready: VecDeque<u32>,
    /// To be read from disk, in turn.
    behind: VecDeque<u32>,
    /// Refusals, high watermarks and what was read from disk: for the next message.
    notes: Vec<ReplicaData>,
    reading: Option<DiskRead>,
    unacknowledged: usize,
    heard: Instant,
}

impl Session {
    async fn run(
        mut self,
        mut requests: Streaming<ReplicateRequest>,
        responses: mpsc::Sender<Result<ReplicateResponse, Status>>,
    ) {
        let follower = self.follower.id;
        debug!(follower, "a follower's session begins");
        let broker = self.broker.clone();
        let signal = self.signal.clone();
        let mut ticks = tokio::time::interval(HEARTBEAT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.start_reading();
            let sends = !self.notes.is_empty()
                || (!self.ready.is_empty() && self.unacknowledged < WINDOW_BYTES);
            tokio::select! {
                () = broker.stopping() => return,
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        self.heard = Instant::now();
                        broker.peers.heard(follower, self.heard);
                        self.on_request(request);
                    }
                    Ok(None) => break,
                    Err(status) => {
                        debug!(follower, %status, "a follower's session broke");
                        break;
                    }
                },
                () = signal.urgent() => self.take_news(),
                permit = responses.reserve(), if sends => match permit {
                    Ok(permit) => {
                        let message = self.next_message();
                        permit.send(Ok(message));
                    }
                    Err(_) => break,
                },
                (handle, read) = finished(&mut self.reading) => {
                    self.reading = None;
                    self.on_read(handle, read);
                }
                _ = ticks.tick() => {
                    if self.heard.elapsed() > SILENCE {
                        info!(follower, "nothing was heard of a follower for {SILENCE:?}: its session ends");
                        break;
                    }
                    self.take_news();
                    // If there is no room, much is on its way anyhow.
                    if let Ok(permit) = responses.try_reserve() {
                        let message = self.next_message();
                        permit.send(Ok(message));
                    }
                }
            }
        }
    }

    fn on_request(&mut self, request: ReplicateRequest) {
        let now = Instant::now();
        for handle in request.stopped {
            self.forget(handle);
        }
        for ack in request.acks {
            let end = ack.durable_end_offset;
            let Some(sending) = self.partitions.get_mut(&ack.handle) else {
                continue;
            };
            while sending.sent.front().is_some_and(|(last, _)| *last <= end) {
                let (_, bytes) = sending.sent.pop_front().unwrap_or_default();
                self.unacknowledged -= bytes;
            }
            // What it was not sent it can't have.
            let end = end.min(sending.next);
            sending
                .replica
                .on_acknowledged(self.follower, sending.epoch, end, now);
        }
        for position in request.positions {
            self.on_position(position, now);
        }
    }

    fn on_position(&mut self, asked: ReplicaPosition, now: Instant) {
        let handle = asked.handle;
        let topic_id = Uuid::parse_str(&asked.topic_id).unwrap_or_default();
        let key = (topic_id, asked.partition);
        if let Some(old) = self.handles.insert(key, handle) {
            self.forget(old);
        }
        let Some(replica) = self.broker.hosting.get(key) else {
            self.handles.remove(&key);
            self.notes.push(not_leading(handle, None));
            return;
        };
        let position = Position {
            log_end: asked.log_end_offset,
            last_epoch: (asked.last_epoch >= 0).then_some(asked.last_epoch),
            durable_end: asked.durable_end_offset.min(asked.log_end_offset),
        };
        let epoch = asked.leader_epoch;
        let tap = (handle, &self.signal);
        let log = replica.log().clone();
        let note = match replica.on_position(self.follower, epoch, &position, now, tap) {
            Ok(PositionCheck::Prefix) => {
                let sending = Sending {
                    told: -1,
                    replica,
                    epoch,
                    next: position.log_end,
                    sent: VecDeque::new(),
                    queued: true,
                };
                self.partitions.insert(handle, sending);
                self.ready.push_back(handle);
                return;
            }
            Ok(PositionCheck::Diverging(end)) => {
                let diverging = Diverging {
                    epoch: end.epoch.unwrap_or(-1),
                    end_offset: end.end_offset,
                };
                refusal(handle, Refusal::Diverging(diverging), log.log_start())
            }
            Ok(PositionCheck::OutOfRange) => {
                refusal(handle, Refusal::OutOfRange(OutOfRange {}), log.log_start())
            }
            Err(other) => not_leading(handle, other.epoch),
        };
        self.notes.push(note);
    }

    fn forget(&mut self, handle: u32) {
        if let Some(sending) = self.partitions.remove(&handle) {
            self.unacknowledged -= sending.sent.iter().map(|(_, bytes)| bytes).sum::<usize>();
        }
    }

    fn take_news(&mut self) {
        for (handle, news) in self.signal.take() {
            let Some(sending) = self.partitions.get_mut(&handle) else {
                continue;
            };
            if news == News::HighWatermark && sending.next >= sending.replica.log().log_end() {
                if !sending.queued {
                    self.notes.push(sending.note(handle, Vec::new()));
                }
            } else if !sending.queued {
                sending.queued = true;
                self.ready.push_back(handle);
            }
        }
    }

    /// What there is to send, up to the size of a message.
    fn next_message(&mut self) -> ReplicateResponse {
        let mut partitions = std::mem::take(&mut self.notes);
        let mut bytes = 0;
        while bytes < MESSAGE_BYTES
            && self.unacknowledged < WINDOW_BYTES
            && let Some(handle) = self.ready.pop_front()
        {
            let Some(sending) = self.partitions.get_mut(&handle) else {
                continue;
            };
            sending.queued = false;
            let log = sending.replica.log();
            if log.leader_epoch() != Some(sending.epoch) {
                partitions.push(not_leading(handle, log.leader_epoch()));
                self.forget(handle);
                continue;
            }
            let room = PARTITION_BYTES.min(MESSAGE_BYTES - bytes);
            let at_least_one = bytes == 0;
            let read =
                self.broker
                    .store
                    .read_memory(log, sending.next, room, at_least_one, UpTo::LogEnd);
            match read {
                Ok(Some(read)) => {
                    bytes += read.bytes;
                    self.unacknowledged += read.bytes;
                    let is_first = sending.told < 0;
                    let has_news = !read.batches.is_empty() || is_first;
                    let more =
                        read.more || (read.batches.is_empty() && sending.next < log.log_end());
                    if more {
                        sending.queued = true;
                        self.ready.push_back(handle);
                    }
                    let is_full = more && read.batches.is_empty();
                    if has_news {
                        partitions.push(sending.note(handle, read.batches));
                    }
                    if is_full {
                        break;
                    }
                }
                Ok(None) => {
                    sending.queued = true;
                    self.behind.push_back(handle);
                }
                Err(error) => partitions.extend(self.give_up(handle, &error)),
            }
        }
        ReplicateResponse { partitions }
    }

    /// Reads for one partition at a time, so that those who are behind share the disk; those that are not in sync, below the rate for all of them.
    fn start_reading(&mut self) {
        if self.reading.is_some() || self.unacknowledged >= WINDOW_BYTES {
            return;
        }
        let Some(handle) = self.behind.pop_front() else {
            return;
        };
        let Some(sending) = self.partitions.get(&handle) else {
            return;
        };
        let (broker, log) = (self.broker.clone(), sending.replica.log().clone());
        let next = sending.next;
        // `acks=all` waits for who is in sync.
        let is_paced = !sending.replica.is_in_isr(self.follower);
        let read = async move {
            if is_paced {
                broker.catch_up.turn().await;
            }
            let store = broker.store.clone();
            let read = move || store.read_disk(&log, next, MESSAGE_BYTES, true, UpTo::LogEnd);
            let done = tokio::task::spawn_blocking(read).await;
            let failed = |error| Err(StorageError::Rocks(format!("a read failed: {error}")));
            let read = done.unwrap_or_else(failed);
            if is_paced {
                let bytes = read.as_ref().map_or(0, |read| read.bytes);
                broker.catch_up.sent(bytes);
            }
            (handle, read)
        };
        self.reading = Some(read.boxed());
    }

    fn on_read(&mut self, handle: u32, read: Result<ReadBatches, StorageError>) {
        let Some(sending) = self.partitions.get_mut(&handle) else {
            return;
        };
        // It may have taken a while: what a later leader wrote must not go to who follows this one.
        let leads = sending.replica.log().leader_epoch();
        if leads != Some(sending.epoch) {
            self.notes.push(not_leading(handle, leads));
            self.forget(handle);
            return;
        }
        match read {
            Ok(read) => {
                self.unacknowledged += read.bytes;
                self.notes.push(sending.note(handle, read.batches));
                self.ready.push_back(handle);
            }
            Err(error) => {
                let note = self.give_up(handle, &error);
                self.notes.extend(note);
            }
        }
    }

    /// A partition can't be read on: what its follower is told.
    fn give_up(&mut self, handle: u32, error: &StorageError) -> Option<ReplicaData> {
        let log = self.partitions.get(&handle)?.replica.log().clone();
        self.forget(handle);
        let told = match error {
            // Retention overtook it.
            StorageError::OffsetOutOfRange { .. } => Refusal::OutOfRange(OutOfRange {}),
            _ => {
                warn!(topic = %log.topic, partition = log.index, follower = self.follower.id, %error, "can't read for a follower");
                Refusal::NotLeading(NotLeading { leader_epoch: -1 })
            }
        };
        Some(refusal(handle, told, log.log_start()))
    }
}

fn refusal(handle: u32, refusal: Refusal, log_start: i64) -> ReplicaData {
    ReplicaData {
        handle,
        log_start_offset: log_start,
        refusal: Some(refusal),
        ..ReplicaData::default()
    }
}

fn not_leading(handle: u32, leader_epoch: Option<i32>) -> ReplicaData {
    let leader_epoch = leader_epoch.unwrap_or(-1);
    refusal(handle, Refusal::NotLeading(NotLeading { leader_epoch }), 0)
}

impl Sending {
    /// Batches that follow what was sent, if any, and how far all is committed.
    fn note(&mut self, handle: u32, batches: Vec<Bytes>) -> ReplicaData {
        if let Some(end) = end_of(&batches) {
            self.next = end;
            let bytes = batches.iter().map(Bytes::len).sum();
            self.sent.push_back((end, bytes));
        }
        let log = self.replica.log();
        self.told = log.high_watermark();
        ReplicaData {
            handle,
            high_watermark: self.told,
            log_start_offset: log.log_start(),
            batches,
            refusal: None,
        }
    }
}

/// The offset after the last record.
fn end_of(batches: &[Bytes]) -> Option<i64> {
    let mut rest = &batches.last()?[..];
    let mut end = None;
    while let Ok(header) = BatchHeader::parse(rest) {
        end = Some(header.last_offset() + 1);
        rest = rest.get(header.size()..).unwrap_or_default();
    }
    end
}
