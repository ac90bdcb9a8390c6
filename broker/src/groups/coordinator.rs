//! A task for each shard that this broker leads, and the way to it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use millrace_proto::v1::{
    self, CommitOffsetsRequest, DescribeGroupResponse, FetchOffsetsRequest, FetchOffsetsResponse,
    GroupSummary, MemberHello,
};
use millrace_record::key_partition;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    GroupError, TOPIC, Topology,
    group::{News, Outcome, SessionId},
    log::{GroupLog, LogError},
    shard::{Now, Said, Shard, Speaker},
};
use crate::{directory::Directory, now_ms, storage::Store};

/// How often what time alone brings is looked for.
const TICK: Duration = Duration::from_millis(250);
/// How often the topics are looked at.
const TOPICS: Duration = Duration::from_millis(250);
/// A topic that is not there for so long is gone. A broker that has just started does not know them all yet.
const TOPIC_GONE: Duration = Duration::from_secs(10);
/// Requests that wait for a shard; more wait in their connections.
const QUEUE: usize = 4096;
/// Requests of one round.
const ROUND: usize = 1024;
/// Assignments that wait for a member's stream. Who does not take them is let go, and comes back.
const OUTBOX: usize = 16;
/// The shard says all anew once it has written so much, and twice what that takes.
const SNAPSHOT: u64 = 4 << 20;
/// Entries of one append, then.
const AT_A_TIME: usize = 10_000;

/// How a round's request is answered.
type Reply<T> = oneshot::Sender<Result<T, RoundError>>;

/// Why a round's request was not taken in.
#[derive(Clone, Debug)]
pub(crate) enum RoundError {
    Group(GroupError),
    /// Too few replicas of the internal topic are in sync.
    NotEnoughReplicas(crate::partition::NotEnoughReplicas),
}

/// A member that has joined.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) speaker: Speaker,
    /// How often it is to give a sign of life.
    pub(crate) interval: Duration,
    /// What is to be told to it; ends when the coordinator does, or has let go of it.
    pub(crate) news: mpsc::Receiver<Result<v1::Assignment, GroupError>>,
}

/// What a shard can be asked.
pub(crate) enum Request {
    Join(MemberHello, Reply<Joined>),
    Said(Speaker, Said, Reply<()>),
    Commit(CommitOffsetsRequest, Reply<()>),
    Fetch(FetchOffsetsRequest, Reply<FetchOffsetsResponse>),
    List(Reply<Vec<GroupSummary>>),
    Describe(String, Reply<DescribeGroupResponse>),
    Delete(String, Reply<()>),
}

/// Why a shard can't be asked: this broker does not lead its partition, or not any more, or the topic is not there yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NotCoordinator {
    /// The partition of the internal topic, if there is one.
    pub(crate) partition: Option<i32>,
}

/// All shards of this broker.
pub(crate) struct Groups {
    store: Arc<Store>,
    directory: Arc<Directory>,
    topology: watch::Receiver<Topology>,
    shards: Mutex<HashMap<i32, Handle>>,
    sessions: AtomicU64,
    stop: CancellationToken,
}

struct Handle {
    epoch: i32,
    requests: mpsc::Sender<Request>,
}

impl Groups {
    pub(crate) fn new(
        store: Arc<Store>,
        directory: Arc<Directory>,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let (topics, topology) = watch::channel(Topology::new());
        let groups = Arc::new(Self {
            store,
            directory,
            topology,
            shards: Mutex::default(),
            sessions: AtomicU64::new(1),
            stop,
        });
        tokio::spawn(groups.clone().follow_topics(topics));
        groups
    }

    /// Asks the group's shard. `Err`: it is not here.
    pub(crate) async fn ask<T>(
        &self,
        group: &str,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<Result<T, RoundError>, NotCoordinator> {
        let partition = self.partition_of(group);
        let partition = partition.ok_or(NotCoordinator { partition: None })?;
        self.ask_shard(partition, request).await
    }

    /// Asks all shards that are here.
    pub(crate) async fn list(&self) -> Vec<GroupSummary> {
        let count = self.partitions();
        let mut all = Vec::new();
        for partition in 0..count {
            if let Ok(Ok(groups)) = self.ask_shard(partition, Request::List).await {
                all.extend(groups);
            }
        }
        all.sort_by(|a, b| a.group_id.cmp(&b.group_id));
        all
    }

    async fn ask_shard<T>(
        &self,
        partition: i32,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<Result<T, RoundError>, NotCoordinator> {
        let not_here = NotCoordinator {
            partition: Some(partition),
        };
        let shard = self.shard(partition).ok_or(not_here)?;
        let (reply, answer) = oneshot::channel();
        let sent = shard.send(request(reply)).await;
        sent.map_err(|_| not_here)?;
        answer.await.map_err(|_| not_here)
    }

    fn partitions(&self) -> i32 {
        let topic = self.directory.topic(TOPIC);
        topic.map_or(0, |topic| topic.partitions.len() as i32)
    }

    fn partition_of(&self, group: &str) -> Option<i32> {
        let count = u32::try_from(self.partitions()).ok()?;
        (count > 0).then(|| key_partition(group.as_bytes(), count) as i32)
    }

    /// The shard of a partition that this broker leads, begun if it is not.
    fn shard(&self, partition: i32) -> Option<mpsc::Sender<Request>> {
        let topic = self.directory.topic(TOPIC)?;
        let led = topic
            .partitions
            .get(usize::try_from(partition).ok()?)?
            .led()?;
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
            log: GroupLog {
                store: self.store.clone(),
                led,
            },
            partition,
            topology: self.topology.clone(),
            outboxes: HashMap::new(),
            written: 0,
            said_anew: 0,
        };
        let stop = self.stop.clone();
        let next_session = self.sessions.fetch_add(1 << 32, Ordering::Relaxed);
        tokio::spawn(stop.run_until_cancelled_owned(task.run(queue, next_session)));
        let handle = Handle {
            epoch,
            requests: requests.clone(),
        };
        shards.insert(partition, handle);
        Some(requests)
    }

    /// Tells all shards of the topics, and begins those that are led here: groups expire also if nobody asks for them.
    async fn follow_topics(self: Arc<Self>, topics: watch::Sender<Topology>) {
        let mut seen: HashMap<Arc<str>, Instant> = HashMap::new();
        let mut ticks = tokio::time::interval(TOPICS);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while self.stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let now = Instant::now();
            let mut topology = topics.borrow().clone();
            for topic in self.directory.topics() {
                if millrace_crds::is_internal_topic(&topic.name) {
                    continue;
                }
                seen.insert(topic.name.clone(), now);
                let count = topic.partitions.len() as i32;
                topology.insert(topic.name.clone(), (topic.topic_id, count));
            }
            seen.retain(|_, last| now - *last < TOPIC_GONE);
            topology.retain(|name, _| seen.contains_key(name));
            topics.send_if_modified(|known| {
                let changed = *known != topology;
                *known = topology;
                changed
            });
            for partition in 0..self.partitions() {
                self.shard(partition);
            }
        }
    }
}

/// A shard at work.
struct Task {
    log: GroupLog,
    partition: i32,
    topology: watch::Receiver<Topology>,
    outboxes: HashMap<SessionId, mpsc::Sender<Result<v1::Assignment, GroupError>>>,
    /// Bytes since the shard said all anew, and what that took.
    written: u64,
    said_anew: u64,
}

impl Task {
    async fn run(mut self, mut queue: mpsc::Receiver<Request>, next_session: SessionId) {
        let partition = self.partition;
        match self.serve(&mut queue, next_session).await {
            Err(error) if self.log.is_led() => {
                warn!(partition, %error, "a shard of groups is given up, and loaded again when it is asked for");
                // Not at once again and again: as long as the queue is open, there is no other one.
                tokio::time::sleep(TICK).await;
            }
            Ok(()) | Err(_) => info!(partition, "no longer the coordinator of these groups"),
        }
    }

    /// Loads the shard and works in rounds, as long as the partition is led.
    async fn serve(
        &mut self,
        queue: &mut mpsc::Receiver<Request>,
        mut next_session: SessionId,
    ) -> Result<(), LogError> {
        let begun = Instant::now();
        let mut shard = Shard::default();
        self.written = self.log.read(|entry| shard.replay(entry, begun)).await?;
        shard.replayed(self.topology.borrow_and_update().clone());
        info!(partition = self.partition, groups = shard.list().len(), bytes = self.written, took = ?begun.elapsed(), "coordinator of these groups");
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
                let error = RoundError::NotEnoughReplicas(error);
                for request in requests.drain(..) {
                    request.refuse(&error);
                }
                continue;
            }
            let now = Now {
                instant: Instant::now(),
                unix_ms: now_ms(),
            };
            if ticked {
                shard.tick(now);
            }
            if self.topology.has_changed().unwrap_or(false) {
                shard.set_topology(self.topology.borrow_and_update().clone());
            }
            let mut answers: Vec<Box<dyn FnOnce() + Send>> = Vec::new();
            for request in requests.drain(..) {
                answers.push(self.take_in(&mut shard, request, &mut next_session, now));
            }
            let Outcome { entries, news } = shard.settle(now.instant);
            if !entries.is_empty() {
                let (_, bytes) = self.log.append(&entries).await?;
                self.written += bytes;
            }
            for answer in answers {
                answer();
            }
            for news in news {
                self.tell(news);
            }
            if self.written > SNAPSHOT.max(2 * self.said_anew) {
                self.say_anew(&shard).await?;
            }
        }
        Ok(())
    }

    /// Takes a request in; what it returns answers it, once all is kept.
    fn take_in(
        &mut self,
        shard: &mut Shard,
        request: Request,
        next_session: &mut SessionId,
        now: Now,
    ) -> Box<dyn FnOnce() + Send> {
        fn answer<T: Send + 'static>(
            reply: Reply<T>,
            result: Result<T, GroupError>,
        ) -> Box<dyn FnOnce() + Send> {
            Box::new(move || {
                // Who asked may be gone.
                let _ = reply.send(result.map_err(RoundError::Group));
            })
        }
        match request {
            Request::Join(hello, reply) => {
                *next_session += 1;
                let session = *next_session;
                let speaker = Speaker {
                    group: hello.group_id.as_str().into(),
                    member: hello.member_id.as_str().into(),
                    session,
                };
                let joined = shard.join(hello, session, now).map(|interval| {
                    let (outbox, news) = mpsc::channel(OUTBOX);
                    self.outboxes.insert(session, outbox);
                    Joined {
                        speaker,
                        interval,
                        news,
                    }
                });
                answer(reply, joined)
            }
            Request::Said(speaker, said, reply) => {
                if matches!(said, Said::Left | Said::Disconnected) {
                    self.outboxes.remove(&speaker.session);
                }
                answer(reply, shard.said(&speaker, said, now))
            }
            Request::Commit(commit, reply) => answer(reply, shard.commit(commit, now)),
            Request::Fetch(fetch, reply) => answer(reply, shard.fetch(&fetch)),
            Request::List(reply) => answer(reply, Ok(shard.list())),
            Request::Describe(group, reply) => answer(reply, shard.describe(&group)),
            Request::Delete(group, reply) => answer(reply, shard.delete(&group)),
        }
    }

    fn tell(&mut self, news: News) {
        let ends = news.assignment.is_err();
        let Some(outbox) = self.outboxes.get(&news.session) else {
            return;
        };
        if outbox.try_send(news.assignment).is_err() || ends {
            self.outboxes.remove(&news.session);
        }
    }

    /// Writes all that is known, and lets go of what was written before.
    async fn say_anew(&mut self, shard: &Shard) -> Result<(), LogError> {
        let all: Vec<_> = shard.snapshot().collect();
        if all.is_empty() {
            // There is nothing that says where the log may begin; the next group does.
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

impl Request {
    fn refuse(self, error: &RoundError) {
        fn send<T>(reply: Reply<T>, error: &RoundError) {
            let _ = reply.send(Err(error.clone()));
        }
        match self {
            Self::Join(_, reply) => send(reply, error),
            Self::Said(_, _, reply) => send(reply, error),
            Self::Commit(_, reply) => send(reply, error),
            Self::Fetch(_, reply) => send(reply, error),
            Self::List(reply) => send(reply, error),
            Self::Describe(_, reply) => send(reply, error),
            Self::Delete(_, reply) => send(reply, error),
        }
    }
}
