//! What a coordinator of groups and one of transactions have in common: a *shard*, which is the leader of one partition of an internal topic, with
//! all that is kept there in memory. What it is about is its [`Machine`]'s, which is pure but for what it does in [`Machine::kept`].
//!
//! # How a shard works
//! In rounds: all requests that have come are taken in; what changed is appended as one batch; when it is committed everyone gets an answer, and
//! what follows is done. So no one ever hears of something that a failover could take back, and however many requests come,
//! there is one append under way. If an append fails the shard is given up, with all that it knows; who leads then loads it again.
//!
//! # Instead of compaction
//! A log of changes grows with every one of them. After some megabytes the shard writes all that it knows, as new records, and when they are committed
//! lets go of everything before them. A load therefore reads no more than twice what is known, and no one has to search a log for what
//! is still valid.

mod log;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use self::log::{LogError, StateLog};
use crate::{directory::Directory, now_ms, partition::NotEnoughReplicas, storage::Store};

/// How often what time alone brings is looked for.
const TICK: Duration = Duration::from_millis(250);
/// How often it is looked for shards that are led here.
const BEGIN: Duration = Duration::from_millis(250);
/// Requests that wait for a shard; more wait in their connections.
const QUEUE: usize = 4096;
/// Requests of one round.
const ROUND: usize = 1024;
/// The shard says all anew once it has written so much, and twice what that takes.
const SNAPSHOT: u64 = 4 << 20;
/// Entries of one append, then.
const AT_A_TIME: usize = 10_000;

/// Time, of the clock that measures and of the one that people read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) instant: Instant,
    pub(crate) unix_ms: i64,
}

impl Now {
    fn read() -> Self {
        Self {
            instant: Instant::now(),
            unix_ms: now_ms(),
        }
    }
}

/// A change that is kept: a record of the internal topic.
pub(crate) trait Entry: Sized {
    /// As the record's key and value; without value: it is no more.
    fn encode(&self) -> (Vec<u8>, Option<Vec<u8>>);
    fn decode(key: Option<Bytes>, value: Option<Bytes>) -> Result<Self, EntryError>;
}

/// A record that no version of this program has written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EntryError {
    #[error("it has no key")]
    NoKey,
    #[error("its key names nothing that is known")]
    UnknownKey,
    #[error(transparent)]
    Decode(#[from] prost::DecodeError),
}

/// Why a round's request was not taken in.
#[derive(Clone, Debug)]
pub(crate) enum RoundError<E> {
    Refused(E),
    /// Too few replicas of the internal topic are in sync.
    NotEnoughReplicas(NotEnoughReplicas),
}

/// How a round's request is answered.
pub(crate) type Reply<T, E> = oneshot::Sender<Result<T, RoundError<E>>>;

/// Answers a request, once all is kept.
pub(crate) type Answer = Box<dyn FnOnce() + Send>;

/// The answer that gives this to who asked, who may be gone.
pub(crate) fn answer<T: Send + 'static, E: Send + 'static>(
    reply: Reply<T, E>,
    result: Result<T, E>,
) -> Answer {
    Box::new(move || drop(reply.send(result.map_err(RoundError::Refused))))
}

/// Refuses a request.
pub(crate) fn refuse<T, E>(reply: Reply<T, E>, error: NotEnoughReplicas) {
    let _ = reply.send(Err(RoundError::NotEnoughReplicas(error)));
}

/// What a shard is about.
pub(crate) trait Machine: Send + 'static {
    type Entry: Entry + Send + Sync;
    type Request: Send + 'static;

    /// Takes in what was kept, in order.
    fn replay(&mut self, entry: Self::Entry, now: Now);
    /// All that was kept has been replayed.
    fn replayed(&mut self, now: Now);
    /// How many things it knows, for people.
    fn len(&self) -> usize;
    /// A round begins. From time to time it is asked for what time alone brings.
    fn begin(&mut self, now: Now, ticked: bool);
    /// Takes a request in.
    fn take_in(&mut self, request: Self::Request, now: Now) -> Answer;
    /// A request can't be taken in.
    fn refuse(request: Self::Request, error: NotEnoughReplicas);
    /// What is to be kept of what changed in this round.
    fn settle(&mut self, now: Now) -> Vec<Self::Entry>;
    /// It is: what follows may be done.
    fn kept(&mut self);
    /// All of it, as it would be written if nothing had been.
    fn snapshot(&self) -> Vec<Self::Entry>;
}

/// Why a shard can't be asked: this broker does not lead its partition, or not any more, or the topic is not there yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotCoordinator {
    pub(crate) topic: &'static str,
    /// The partition of the internal topic, if there is one.
    pub(crate) partition: Option<i32>,
}

/// Makes a shard's machine; what is sent there reaches the shard, as long as there is one.
type Make<M> = Box<dyn Fn(mpsc::WeakSender<<M as Machine>::Request>) -> M + Send + Sync>;

/// All shards of one internal topic on this broker.
pub(crate) struct Shards<M: Machine> {
    topic: &'static str,
    store: Arc<Store>,
    directory: Arc<Directory>,
    make: Make<M>,
    shards: Mutex<HashMap<i32, Handle<M::Request>>>,
    stop: CancellationToken,
}

struct Handle<R> {
    epoch: i32,
    requests: mpsc::Sender<R>,
}

impl<M: Machine> Shards<M> {
    pub(crate) fn new(
        topic: &'static str,
        store: Arc<Store>,
        directory: Arc<Directory>,
        make: impl Fn(mpsc::WeakSender<M::Request>) -> M + Send + Sync + 'static,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let shards = Arc::new(Self {
            topic,
            store,
            directory,
            make: Box::new(make),
            shards: Mutex::default(),
            stop,
        });
        tokio::spawn(shards.clone().begin_all());
        shards
    }

    /// Asks the shard that the key belongs to. `Err`: it is not here.
    pub(crate) async fn ask<T, E>(
        &self,
        key: &str,
        request: impl FnOnce(Reply<T, E>) -> M::Request,
    ) -> Result<Result<T, RoundError<E>>, NotCoordinator> {
        let partition = self.partition_of(key);
        let partition = partition.ok_or_else(|| self.not_here(None))?;
        self.ask_shard(partition, request).await
    }

    /// The internal topic.
    pub(crate) fn topic(&self) -> &'static str {
        self.topic
    }

    /// The partition of the internal topic that the key belongs to, if there is the topic.
    pub(crate) fn partition_of(&self, key: &str) -> Option<i32> {
        self.directory.partition_of(self.topic, key)
    }

    /// Asks all shards that are here.
    pub(crate) async fn ask_all<T, E>(
        &self,
        request: impl Fn(Reply<T, E>) -> M::Request,
    ) -> Vec<T> {
        let mut all = Vec::new();
        for partition in 0..self.partitions() {
            if let Ok(Ok(answer)) = self.ask_shard(partition, &request).await {
                all.push(answer);
            }
        }
        all
    }

    async fn ask_shard<T, E>(
        &self,
        partition: i32,
        request: impl FnOnce(Reply<T, E>) -> M::Request,
    ) -> Result<Result<T, RoundError<E>>, NotCoordinator> {
        let not_here = self.not_here(Some(partition));
        let shard = self.shard(partition).ok_or(not_here)?;
        let (reply, answer) = oneshot::channel();
        let sent = shard.send(request(reply)).await;
        sent.map_err(|_| not_here)?;
        answer.await.map_err(|_| not_here)
    }

    fn not_here(&self, partition: Option<i32>) -> NotCoordinator {
        let topic = self.topic;
        NotCoordinator { topic, partition }
    }

    fn partitions(&self) -> i32 {
        let topic = self.directory.topic(self.topic);
        topic.map_or(0, |topic| topic.partition_count() as i32)
    }

    /// The shard of a partition that this broker leads, begun if it is not.
    fn shard(&self, partition: i32) -> Option<mpsc::Sender<M::Request>> {
        let topic = self.directory.topic(self.topic)?;
        let led = topic.partition(partition)?.led()?;
        let mut shards = self.shards.lock();
        if let Some(handle) = shards.get(&partition)
            && handle.epoch == led.epoch
            && !handle.requests.is_closed()
        {
            return Some(handle.requests.clone());
        }
        let (requests, queue) = mpsc::channel(QUEUE);
        let epoch = led.epoch;
        let task = Task {
            log: StateLog {
                store: self.store.clone(),
                led,
            },
            topic: self.topic,
            partition,
            machine: (self.make)(requests.downgrade()),
            written: 0,
            said_anew: 0,
        };
        let stop = self.stop.clone();
        tokio::spawn(stop.run_until_cancelled_owned(task.run(queue)));
        let handle = Handle {
            epoch,
            requests: requests.clone(),
        };
        shards.insert(partition, handle);
        Some(requests)
    }

    /// Begins those that are led here: time brings changes also if nobody asks.
    async fn begin_all(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(BEGIN);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while self.stop.run_until_cancelled(ticks.tick()).await.is_some() {
            for partition in 0..self.partitions() {
                self.shard(partition);
            }
        }
    }
}

/// A shard at work.
struct Task<M> {
    log: StateLog,
    topic: &'static str,
    partition: i32,
    machine: M,
    /// Bytes since the shard said all anew, and what that took.
    written: u64,
    said_anew: u64,
}

impl<M: Machine> Task<M> {
    async fn run(mut self, mut queue: mpsc::Receiver<M::Request>) {
        let (topic, partition) = (self.topic, self.partition);
        match self.serve(&mut queue).await {
            Err(error) if self.log.is_led() => {
                warn!(topic, partition, %error, "a coordinator's shard is given up, and loaded again when it is asked for");
                // Not at once again and again: as long as the queue is open, there is no other one.
                tokio::time::sleep(TICK).await;
            }
            Ok(()) | Err(_) => info!(topic, partition, "no longer the coordinator of this shard"),
        }
    }

    /// Loads the shard and works in rounds, as long as the partition is led.
    async fn serve(&mut self, queue: &mut mpsc::Receiver<M::Request>) -> Result<(), LogError> {
        let begun = Now::read();
        let machine = &mut self.machine;
        self.written = self.log.read(|entry| machine.replay(entry, begun)).await?;
        machine.replayed(Now::read());
        let (known, bytes, took) = (machine.len(), self.written, begun.instant.elapsed());
        match bytes {
            0 => debug!(
                topic = self.topic,
                partition = self.partition,
                "coordinator of a new shard"
            ),
            _ => info!(
                topic = self.topic,
                partition = self.partition,
                known,
                bytes,
                ?took,
                "coordinator of this shard"
            ),
        }
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut requests = Vec::new();
        while self.log.is_led() {
            let ticked = tokio::select! {
                count = queue.recv_many(&mut requests, ROUND) => {
                    if count == 0 {
                        return Ok(());
                    }
                    false
                }
                _ = ticks.tick() => true,
            };
            let replica = self.log.led.replica.as_ref();
            if let Some(Err(error)) = replica.map(|replica| replica.check_in_sync()) {
                for request in requests.drain(..) {
                    M::refuse(request, error);
                }
                continue;
            }
            let now = Now::read();
            self.machine.begin(now, ticked);
            let machine = &mut self.machine;
            let answers: Vec<Answer> = requests
                .drain(..)
                .map(|request| machine.take_in(request, now))
                .collect();
            let entries = self.machine.settle(now);
            if !entries.is_empty() {
                let (_, bytes) = self.log.append(&entries).await?;
                self.written += bytes;
            }
            for answer in answers {
                answer();
            }
            self.machine.kept();
            if self.written > SNAPSHOT.max(2 * self.said_anew) {
                self.say_anew().await?;
            }
        }
        Ok(())
    }

    /// Writes all that is known, and lets go of what was written before.
    async fn say_anew(&mut self) -> Result<(), LogError> {
        let all = self.machine.snapshot();
        if all.is_empty() {
            // There is nothing that says where the log may begin; the next entry does.
            self.written = 0;
            return Ok(());
        }
        let mut first = i64::MAX;
        let mut bytes = 0;
        for some in all.chunks(AT_A_TIME) {
            let (base, more) = self.log.append(some).await?;
            first = first.min(base);
            bytes += more;
        }
        self.log.release_before(first);
        self.written = bytes;
        self.said_anew = bytes;
        Ok(())
    }
}
