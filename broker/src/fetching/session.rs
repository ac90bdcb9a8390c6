//! One session with a leader: says where logs end, appends what comes, and acknowledges it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Instant as StdInstant,
};

use bytes::Bytes;
use futures::{
    FutureExt, StreamExt,
    future::BoxFuture,
    stream::{FuturesOrdered, FuturesUnordered},
};
use millrace_proto::v1::{
    Diverging, ReplicaAck, ReplicaData, ReplicaHello, ReplicaPosition, ReplicateRequest,
    ReplicateResponse, replica_data::Refusal, replication_service_client::ReplicationServiceClient,
};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Status, transport::Channel};
use tracing::{error, info, warn};

use super::{Leader, Shared};
use crate::{
    partition::{HEARTBEAT, HostedReplica, PartitionKey, SILENCE},
    replication::{Cut, Diverged, Following, NotNext},
    storage::{Appended, EpochEnd, PartitionAppend, StorageError, Store},
};

/// Messages to the leader that wait to be sent.
const OUTGOING: usize = 16;
/// Positions in one message at most.
const POSITIONS: usize = 1000;
/// A partition that is followed.
struct Followed {
    key: PartitionKey,
    replica: Arc<HostedReplica>,
    following: Following,
}

/// Why a log was not cut.
#[derive(Debug, thiserror::Error)]
enum CutError {
    #[error(transparent)]
    Diverged(#[from] Diverged),
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// The answer to a cut: the partition's handle and what came of it.
type CutOutcome = (u32, Result<(), CutError>);

/// The answer to an append: for each partition its handle and what came of it.
type Outcome = Vec<(u32, Result<Appended, StorageError>)>;

pub(super) struct Session<'a> {
    shared: &'a Arc<Shared>,
    outgoing: mpsc::Sender<ReplicateRequest>,
    followed: BTreeMap<u32, Followed>,
    handles: HashMap<PartitionKey, u32>,
    last_handle: u32,
    /// Whose positions are to be sent again, once it is time.
    waiting: BTreeSet<u32>,
    appends: FuturesOrdered<BoxFuture<'static, Outcome>>,
    /// Beside all else: each takes a while, and after a crash of the last leader there may be one for each partition.
    cuts: FuturesUnordered<BoxFuture<'static, CutOutcome>>,
    /// When something was sent last.
    sent: Instant,
}

impl<'a> Session<'a> {
    /// Runs until it breaks. What was handed to the store is appended then.
    pub(super) async fn run(
        shared: &'a Arc<Shared>,
        leader: &Leader,
        client: &mut ReplicationServiceClient<Channel>,
    ) -> Result<(), Status> {
        let (outgoing, requests) = mpsc::channel(OUTGOING);
        let mut session = Session {
            shared,
            outgoing,
            followed: BTreeMap::new(),
            handles: HashMap::new(),
            last_handle: 0,
            waiting: BTreeSet::new(),
            appends: FuturesOrdered::new(),
            cuts: FuturesUnordered::new(),
            sent: Instant::now(),
        };
        session
            .send(ReplicateRequest {
                hello: Some(ReplicaHello {
                    cluster_id: shared.cluster_id.clone(),
                    broker_id: shared.me.id,
                    broker_epoch: shared.me.epoch,
                    store_id: shared.me.store.to_string(),
                }),
                ..ReplicateRequest::default()
            })
            .await?;
        let opening = client.replicate(Request::new(ReceiverStream::new(requests)));
        let mut responses = tokio::time::timeout(SILENCE, opening)
            .await
            .map_err(|_| silent())??
            .into_inner();
        let all = {
            let mut assigned = leader.assigned.lock();
            assigned.changed.clear();
            assigned.partitions.keys().copied().collect()
        };
        let result = session.serve(leader, all, &mut responses).await;
        // What is on its way into the logs comes before whatever the next session says of them.
        while session.appends.next().await.is_some() {}
        while session.cuts.next().await.is_some() {}
        result
    }

    async fn serve(
        &mut self,
        leader: &Leader,
        first: BTreeSet<PartitionKey>,
        responses: &mut tonic::Streaming<ReplicateResponse>,
    ) -> Result<(), Status> {
        self.change(leader, first).await?;
        let mut ticks = tokio::time::interval(HEARTBEAT);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            let due = self.next_retry();
            tokio::select! {
                () = leader.wake.notified() => {
                    let changed = std::mem::take(&mut leader.assigned.lock().changed);
                    self.change(leader, changed).await?;
                }
                response = responses.message() => {
                    heard = Instant::now();
                    match response? {
                        Some(response) => self.on_response(response).await?,
                        None => return Ok(()),
                    }
                }
                Some(outcome) = self.appends.next(), if !self.appends.is_empty() => {
                    self.on_appended(outcome).await?;
                }
                Some((handle, outcome)) = self.cuts.next(), if !self.cuts.is_empty() => {
                    if let Some(followed) = self.followed.get_mut(&handle) {
                        followed.on_cut(outcome);
                        self.look_whether_waiting(handle);
                    }
                }
                () = tokio::time::sleep_until(due.unwrap_or(heard)), if due.is_some() => {
                    self.send_positions().await?;
                }
                _ = ticks.tick() => {
                    if heard.elapsed() > SILENCE {
                        return Err(silent());
                    }
                    if self.sent.elapsed() >= HEARTBEAT {
                        self.send(ReplicateRequest::default()).await?;
                    }
                }
            }
        }
    }

    /// Takes up what is to be followed now of these partitions.
    async fn change(
        &mut self,
        leader: &Leader,
        changed: BTreeSet<PartitionKey>,
    ) -> Result<(), Status> {
        let mut stopped = Vec::new();
        {
            let assigned = leader.assigned.lock();
            for key in changed {
                let wanted = assigned.partitions.get(&key);
                if let Some(handle) = self.handles.remove(&key) {
                    self.followed.remove(&handle);
                    stopped.push(handle);
                }
                let Some((follower, replica)) = wanted else {
                    continue;
                };
                let handle = self.new_handle(key);
                let followed = Followed {
                    key,
                    replica: replica.clone(),
                    following: Following::new(*follower, Instant::now().into_std()),
                };
                self.followed.insert(handle, followed);
                self.waiting.insert(handle);
            }
        }
        if !stopped.is_empty() {
            self.send(ReplicateRequest {
                stopped,
                ..ReplicateRequest::default()
            })
            .await?;
        }
        self.send_positions().await
    }

    fn new_handle(&mut self, key: PartitionKey) -> u32 {
        self.last_handle += 1;
        self.handles.insert(key, self.last_handle);
        self.last_handle
    }

    /// After something came of it: whether its position is to be sent again.
    fn look_whether_waiting(&mut self, handle: u32) {
        if self.due(handle).is_some() {
            self.waiting.insert(handle);
        }
    }

    /// When the partition's position is to be sent again. Not before all that was handed to the store is appended.
    fn due(&self, handle: u32) -> Option<StdInstant> {
        self.followed.get(&handle)?.following.due()
    }

    fn next_retry(&self) -> Option<Instant> {
        let waiting = self.waiting.iter();
        let due = waiting.filter_map(|handle| self.due(*handle)).min();
        due.map(Instant::from_std)
    }

    fn take_due(&mut self, now: StdInstant) -> Vec<u32> {
        // Who waits no more was given up.
        let is_later = |handle: &u32| self.due(*handle).is_some_and(|at| at > now);
        let waiting = self.waiting.iter();
        let (later, due): (BTreeSet<u32>, BTreeSet<u32>) = waiting.partition(|h| is_later(h));
        self.waiting = later;
        due.into_iter().collect()
    }

    /// Sends the positions that are due, each under a new handle: what comes for the old one counts no more.
    async fn send_positions(&mut self) -> Result<(), Status> {
        let due = self.take_due(StdInstant::now());
        for some in due.chunks(POSITIONS) {
            let mut positions = Vec::with_capacity(some.len());
            for old in some {
                let Some(mut followed) = self.followed.remove(old) else {
                    continue;
                };
                let handle = self.new_handle(followed.key);
                let epoch = followed.following.follower().epoch;
                // If there is none it is being made something else: that is told separately.
                let position = followed.replica.position(epoch);
                followed.following.on_sent(position.as_ref());
                if let Some(position) = position {
                    let (topic_id, partition) = followed.key;
                    positions.push(ReplicaPosition {
                        handle,
                        topic_id: topic_id.to_string(),
                        partition,
                        leader_epoch: epoch,
                        log_end_offset: position.log_end,
                        last_epoch: position.last_epoch.unwrap_or(-1),
                        durable_end_offset: position.durable_end,
                    });
                }
                self.followed.insert(handle, followed);
            }
            self.send(ReplicateRequest {
                positions,
                ..ReplicateRequest::default()
            })
            .await?;
        }
        Ok(())
    }

    async fn on_response(&mut self, response: ReplicateResponse) -> Result<(), Status> {
        let mut appends = Vec::new();
        let mut handles = Vec::new();
        for data in response.partitions {
            let handle = data.handle;
            match self.followed.get_mut(&handle) {
                Some(followed) if followed.following.is_awaiting() => match data.refusal {
                    Some(refusal) => {
                        let store = self.shared.store.clone();
                        let cut = followed.on_refusal(refusal, data.log_start_offset, store);
                        self.cuts
                            .extend(cut.map(|cut| cut.map(move |done| (handle, done)).boxed()));
                    }
                    None => {
                        if let Some(append) = followed.on_data(data) {
                            self.shared.metrics.replicated(append.size());
                            appends.push(append);
                            handles.push(handle);
                        }
                    }
                },
                _ => {}
            }
            self.look_whether_waiting(handle);
        }
        if appends.is_empty() {
            return Ok(());
        }
        match self.shared.store.append(appends).await {
            Ok(answer) => self.appends.push_back(Box::pin(async move {
                match answer.await {
                    Ok(results) => handles.into_iter().zip(results).collect(),
                    Err(_) => handles
                        .into_iter()
                        .map(|handle| (handle, Err(StorageError::Closed)))
                        .collect(),
                }
            })),
            Err(error) => {
                let failed = handles
                    .into_iter()
                    .map(|handle| (handle, Err(error.clone())));
                let failed = failed.collect();
                self.appends.push_back(Box::pin(async move { failed }));
            }
        }
        Ok(())
    }

    /// Acknowledges what is appended, with whatever else is ready.
    async fn on_appended(&mut self, first: Outcome) -> Result<(), Status> {
        let mut acks = Vec::new();
        let mut next = Some(first);
        while let Some(outcome) = next {
            for (handle, result) in outcome {
                let Some(followed) = self.followed.get_mut(&handle) else {
                    continue;
                };
                match result {
                    Ok(appended) => {
                        followed.following.on_appended();
                        followed.show_committed();
                        acks.push(ReplicaAck {
                            handle,
                            durable_end_offset: appended.end_offset,
                        });
                    }
                    Err(error) => {
                        followed.warn(&error);
                        let now = StdInstant::now();
                        followed.following.on_not_appended(now);
                    }
                }
                self.look_whether_waiting(handle);
            }
            next = self.appends.next().now_or_never().flatten();
        }
        if acks.is_empty() {
            return Ok(());
        }
        self.send(ReplicateRequest {
            acks,
            ..ReplicateRequest::default()
        })
        .await
    }

    async fn send(&mut self, request: ReplicateRequest) -> Result<(), Status> {
        self.sent = Instant::now();
        match tokio::time::timeout(SILENCE, self.outgoing.send(request)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::unavailable("the connection was closed")),
            Err(_) => Err(Status::unavailable("the broker does not read")),
        }
    }
}

impl Followed {
    fn epoch(&self) -> i32 {
        self.following.follower().epoch
    }

    /// What is to be appended of the leader's news.
    fn on_data(&mut self, data: ReplicaData) -> Option<PartitionAppend> {
        self.following.on_data(data.high_watermark);
        self.show_committed();
        // As with Kafka: what the leader no longer has, no one can read.
        self.replica.log().release_before(data.log_start_offset);
        if data.batches.is_empty() {
            return None;
        }
        match self.append(data.batches) {
            Ok(append) => append,
            Err(error) => {
                self.on_failure(&error);
                None
            }
        }
    }

    fn append(&mut self, batches: Vec<Bytes>) -> Result<Option<PartitionAppend>, StorageError> {
        let log = self.replica.log().clone();
        let append = PartitionAppend::replicated(log, self.epoch(), batches)?;
        let Some((first, end)) = append.span() else {
            return Ok(None);
        };
        let taken = self.following.takes(first, end);
        taken.map_err(|NotNext { expected }| StorageError::NotContiguous {
            found: first,
            expected,
        })?;
        Ok(Some(append))
    }

    fn show_committed(&self) {
        let high_watermark = self.following.high_watermark();
        self.replica
            .on_leaders_high_watermark(self.epoch(), high_watermark);
    }

    /// What is to be done about the log, if anything.
    fn on_refusal(
        &mut self,
        refusal: Refusal,
        log_start: i64,
        store: Arc<Store>,
    ) -> Option<impl Future<Output = Result<(), CutError>> + use<>> {
        let now = StdInstant::now();
        if matches!(refusal, Refusal::NotLeading(_)) {
            self.following.on_not_leading(now);
            return None;
        }
        if !self.following.heeds_refusal(now) {
            return None;
        }
        let (replica, epoch) = (self.replica.clone(), self.epoch());
        Some(async move {
            match refusal {
                Refusal::Diverging(diverging) => cut(&replica, epoch, diverging, &store).await,
                _ => begin_anew(&replica, epoch, log_start, &store).await,
            }
        })
    }

    fn on_cut(&mut self, outcome: Result<(), CutError>) {
        match outcome {
            Ok(()) => self.following.on_cut(StdInstant::now()),
            Err(CutError::Storage(error)) => self.on_failure(&error),
            Err(CutError::Diverged(diverged)) => {
                let log = self.replica.log();
                let epoch = self.epoch();
                error!(topic = %log.topic, partition = log.index, epoch, %diverged, "a replica stopped");
                self.following.stop();
            }
        }
    }

    fn on_failure(&mut self, error: &StorageError) {
        self.warn(error);
        self.following.on_failure(StdInstant::now());
    }

    fn warn(&self, error: &StorageError) {
        if self.following.is_busy() {
            let log = self.replica.log();
            warn!(topic = %log.topic, partition = log.index, %error, "can't take over what the leader has; asking again");
        }
    }
}

async fn begin_anew(
    replica: &HostedReplica,
    epoch: i32,
    log_start: i64,
    store: &Store,
) -> Result<(), CutError> {
    let Some(offset) = replica.begin_anew(epoch, log_start)? else {
        return Ok(());
    };
    let log = replica.log();
    info!(topic = %log.topic, partition = log.index, epoch, offset, log_end = log.log_end(), "the leader has nothing left that this replica could go on from: it begins anew");
    Ok(store.begin_at(log, epoch, offset).await?)
}

async fn cut(
    replica: &HostedReplica,
    epoch: i32,
    diverging: Diverging,
    store: &Store,
) -> Result<(), CutError> {
    let end = EpochEnd {
        epoch: (diverging.epoch >= 0).then_some(diverging.epoch),
        end_offset: diverging.end_offset,
    };
    let Some(Cut(offset)) = replica.cut(epoch, end)? else {
        return Ok(());
    };
    let log = replica.log();
    info!(topic = %log.topic, partition = log.index, epoch, offset, log_end = log.log_end(), "cut off what the leader does not have");
    store.truncate(log, epoch, offset).await?;
    Ok(())
}

fn silent() -> Status {
    Status::deadline_exceeded(format!("nothing was heard of it for {SILENCE:?}"))
}
