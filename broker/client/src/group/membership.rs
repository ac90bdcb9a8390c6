//! A consumer's membership in its group: a background task that keeps the member's stream, has the consumer read what is its own, and
//! commits for it.
//!
//! An assignment is taken up in this order: where to go on is asked for what is new; the consumer stops what is gone and begins what is new; what it had read
//! of what is gone is committed; and only then the coordinator is told, who gives it to others.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    time::Duration,
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use millrace_proto::v1::{self, JoinRequest, JoinResponse, MemberHello, join_request::Message};
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
    time::{Instant, MissedTickBehavior, interval_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{Assignor, GroupCoordinator, GroupOffset, InstanceId, admin::flat, offsets::by_topic};
use crate::{
    backoff,
    consumer::{Assigned, StartFrom},
    error::{Error, ErrorKind},
    offsets::{self, OffsetSpec, Query},
    transport::Transport,
};

/// Messages to the coordinator that wait for the connection.
const OUTGOING: usize = 16;
/// Signs of life that the coordinator may leave out before it is looked for elsewhere.
const SILENT: u32 = 3;
/// How long a last commit and farewell may take.
const FAREWELL: Duration = Duration::from_secs(5);

/// Commits that wait for those before.
const MAX_COMMITS: usize = 100;

/// Partitions, with what is known of each.
pub(crate) type Owned = BTreeMap<(Arc<str>, i32), Arc<Assigned>>;

/// How a consumer is a member.
#[derive(Debug, Clone)]
pub(crate) struct GroupSettings {
    pub(crate) group: Arc<str>,
    pub(crate) instance_id: Option<InstanceId>,
    pub(crate) client_id: String,
    pub(crate) topics: Vec<String>,
    pub(crate) pattern: Option<String>,
    pub(crate) assignor: Assignor,
    pub(crate) rack: Option<String>,
    pub(crate) session_timeout: Duration,
    pub(crate) rebalance_timeout: Duration,
    pub(crate) auto_commit: Option<Duration>,
    /// Where nothing was committed.
    pub(crate) start: StartFrom,
}

/// For the consumer.
#[derive(Debug)]
pub(crate) enum Event {
    /// It reads these from now on, and nothing else; those with an offset are new.
    Assigned {
        partitions: Vec<(Arc<Assigned>, Option<i64>)>,
        done: oneshot::Sender<()>,
    },
    /// It is no member any more, and will not be one again.
    Failed(Error),
}

/// An offset to keep.
#[derive(Debug, Clone)]
pub(crate) struct Commit {
    pub(crate) assigned: Arc<Assigned>,
    pub(crate) offset: i64,
    pub(crate) metadata: String,
}

impl Commit {
    pub(crate) fn new(assigned: Arc<Assigned>, offset: i64) -> Self {
        Self {
            assigned,
            offset,
            metadata: String::new(),
        }
    }
}

/// From the consumer.
#[derive(Debug)]
pub(crate) enum Request {
    /// Keep these offsets.
    Commit { offsets: Vec<Commit>, reply: Reply },
    /// Where to go on in these partitions, in their order.
    Beginnings {
        partitions: Vec<(Arc<str>, i32)>,
        reply: oneshot::Sender<Result<Vec<i64>, Error>>,
    },
    /// As whom it commits, for a transaction to do that.
    Identify {
        reply: oneshot::Sender<Result<Committer, Error>>,
    },
    /// Commit what has been read, if that is done by itself, and leave.
    Close {
        reply: oneshot::Sender<Result<(), Error>>,
    },
}

/// As whom a consumer commits.
#[derive(Debug)]
pub(crate) struct Committer {
    pub(crate) group: Arc<str>,
    pub(crate) member_id: String,
    pub(crate) epoch: i32,
}

/// The consumer's end.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) events: mpsc::UnboundedReceiver<Event>,
    pub(crate) requests: mpsc::UnboundedSender<Request>,
    task: AbortHandle,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Joins the group, in the background.
pub(crate) fn begin(coordinator: GroupCoordinator, settings: GroupSettings) -> Handle {
    let (events_in, events) = mpsc::unbounded_channel();
    let (requests, requests_out) = mpsc::unbounded_channel();
    let member = Member {
        coordinator,
        settings,
        member_id: new_member_id(),
        epoch: Arc::default(),
        owned: Owned::new(),
        commits: VecDeque::new(),
        events: events_in,
        requests: requests_out,
    };
    let task = tokio::spawn(member.run()).abort_handle();
    Handle {
        events,
        requests,
        task,
    }
}

fn new_member_id() -> String {
    format!("{:032x}", fastrand::u128(..))
}

struct Member {
    coordinator: GroupCoordinator,
    settings: GroupSettings,
    member_id: String,
    /// Of the newest assignment that the consumer was given. It may commit what it read of that before this task hears that it has taken it.
    epoch: Arc<AtomicI32>,
    owned: Owned,
    /// One after the other, so that none undoes a later one. The first stays here until it is answered, in this stream or another.
    commits: VecDeque<(Vec<Commit>, Option<Reply>)>,
    events: mpsc::UnboundedSender<Event>,
    requests: mpsc::UnboundedReceiver<Request>,
}

/// To whom a commit is confirmed.
type Reply = oneshot::Sender<Result<(), Error>>;

/// How a stream ended.
enum End {
    /// The consumer is gone, or has left.
    Closed,
    /// Its connection broke, or the coordinator is elsewhere.
    Broken(Error),
}

/// What a stream is busy with.
enum Done {
    /// An assignment is taken up.
    TakenUp(Box<Result<TakenUp, Error>>),
    /// The first of the commits is kept, or refused.
    Committed(Result<(), Error>),
    /// Something was asked for, and answered.
    Answered,
}

struct TakenUp {
    version: u64,
    owned: Owned,
}

impl Member {
    async fn run(mut self) {
        let mut failures = 0;
        loop {
            let begun = Instant::now();
            let mut asked = None;
            let error = match self.stream(&mut asked).await {
                Ok(End::Closed) => return,
                Ok(End::Broken(error)) | Err(error) => error,
            };
            match error.kind() {
                ErrorKind::UnknownMember => {
                    tracing::warn!(%error, "this consumer was taken for gone; it joins its group anew");
                    self.member_id = new_member_id();
                    self.owned.clear();
                    let (done, taken) = oneshot::channel();
                    let partitions = Vec::new();
                    if self
                        .events
                        .send(Event::Assigned { partitions, done })
                        .is_err()
                    {
                        return;
                    }
                    // What it reads meanwhile it can't commit.
                    drop(taken);
                    continue;
                }
                _ if !error.is_retriable() => {
                    while !self.commits.is_empty() {
                        self.committed(Err(error.clone()));
                    }
                    let _ = self.events.send(Event::Failed(error));
                    return;
                }
                _ => {}
            }
            // A stream that stood for a while was well.
            failures = match begun.elapsed() > self.settings.session_timeout {
                true => 1,
                false => failures + 1,
            };
            tracing::debug!(%error, failures, "looking for the group's coordinator again");
            let before = asked.clone();
            self.coordinator.way().look_again(asked, &error).await;
            let deadline = self.coordinator.way().client().deadline();
            let known = self.coordinator.way().find(deadline).await.ok();
            if known.is_none() || known == before || failures > 2 {
                tokio::time::sleep(backoff::delay(error.kind(), failures)).await;
            }
        }
    }

    /// Keeps one stream, as long as it stands.
    async fn stream(&mut self, asked: &mut Option<(i32, Arc<str>)>) -> Result<End, Error> {
        let client = self.coordinator.way().client().clone();
        let (partition, address) = self.coordinator.way().find(client.deadline()).await?;
        *asked = Some((partition, address.clone()));
        let (outgoing, messages) = mpsc::channel(OUTGOING);
        // There is room: nothing else has been sent.
        let _ = outgoing.try_send(message(Message::Hello(self.hello())));
        let mut service = client.transport().groups(&address)?;
        let join = service.join(ReceiverStream::new(messages));
        let limit = client.transport().request_timeout();
        let mut incoming = Transport::call(&address, limit, join).await?;
        let mut interval = self.settings.session_timeout / 3;
        let mut heartbeats = interval_at(Instant::now() + interval, interval);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let commit_every = self.settings.auto_commit.unwrap_or(Duration::MAX / 4);
        let mut commits = interval_at(
            Instant::now() + commit_every.min(FOREVER),
            commit_every.min(FOREVER),
        );
        commits.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut newest: Option<v1::Assignment> = None;
        let mut taking_up = false;
        let mut committing = false;
        let mut work: FuturesUnordered<BoxFuture<'static, Done>> = FuturesUnordered::new();
        loop {
            if !taking_up && let Some(assignment) = newest.take() {
                taking_up = true;
                work.push(self.take_up(assignment));
            }
            if !committing && let Some((offsets, _)) = self.commits.front() {
                committing = true;
                work.push(self.commit(offsets.clone()));
            }
            tokio::select! {
                answer = next(&mut incoming, &address) => {
                    let JoinResponse { assignment, heartbeat_interval_ms } = match answer {
                        Ok(answer) => answer,
                        Err(error) => return Ok(End::Broken(error)),
                    };
                    heard = Instant::now();
                    let told = Duration::from_millis(heartbeat_interval_ms.max(100).into());
                    if told != interval {
                        interval = told;
                        heartbeats = interval_at(heard + told, told);
                        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
                    }
                    newest = assignment.or(newest);
                }
                _ = heartbeats.tick() => {
                    if heard.elapsed() > SILENT * interval {
                        let message = format!("broker {address} has been silent for {:?}", heard.elapsed());
                        return Ok(End::Broken(Error::new(ErrorKind::Transport, message)));
                    }
                    // If there is no room, there are signs of life enough.
                    let _ = outgoing.try_send(message(Message::Alive(v1::MemberAlive {})));
                }
                Some(done) = work.next(), if !work.is_empty() => match done {
                    Done::Answered => {}
                    Done::Committed(result) => {
                        committing = false;
                        self.committed(result);
                    }
                    Done::TakenUp(taken) => {
                        taking_up = false;
                        let TakenUp { version, owned } = (*taken)?;
                        self.owned = owned;
                        if outgoing.send(message(Message::AppliedVersion(version))).await.is_err() {
                            let message = format!("broker {address} closed the member's stream");
                            return Ok(End::Broken(Error::new(ErrorKind::Transport, message)));
                        }
                    }
                },
                _ = commits.tick(), if self.settings.auto_commit.is_some() => {
                    let read = read(self.owned.values());
                    if !read.is_empty() && self.commits.is_empty() {
                        self.commits.push_back((read, None));
                    }
                }
                request = self.requests.recv() => match request {
                    None => return Ok(End::Closed),
                    Some(Request::Commit { reply, .. }) if self.commits.len() >= MAX_COMMITS => {
                        let message = format!("{MAX_COMMITS} commits wait already for group {}'s coordinator", self.settings.group);
                        let _ = reply.send(Err(Error::new(ErrorKind::Throttled, message)));
                    }
                    Some(Request::Commit { offsets, reply }) => self.commits.push_back((offsets, Some(reply))),
                    Some(Request::Beginnings { partitions, reply }) => {
                        let (coordinator, start) = (self.coordinator.clone(), self.settings.start);
                        let found = async move {
                            let _ = reply.send(beginnings(&coordinator, &partitions, start).await);
                            Done::Answered
                        };
                        work.push(found.boxed());
                    }
                    Some(Request::Identify { reply }) => {
                        let committer = match self.settings.auto_commit {
                            None => Ok(Committer {
                                group: self.settings.group.clone(),
                                member_id: self.member_id.clone(),
                                epoch: self.epoch(),
                            }),
                            Some(_) => Err(Error::new(
                                ErrorKind::InvalidRequest,
                                "this consumer commits by itself: build it with `auto_commit(None)` to have a transaction do that",
                            )),
                        };
                        let _ = reply.send(committer);
                    }
                    Some(Request::Close { reply }) => {
                        let farewell = async {
                            // What is under way comes first, so that it does not come after.
                            while let Some(done) = work.next().await {
                                if let Done::Committed(result) = done {
                                    self.committed(result);
                                }
                            }
                            while let Some((offsets, _)) = self.commits.front() {
                                let result = commit(&self.coordinator, &self.member_id, self.epoch(), offsets.clone()).await;
                                self.committed(result);
                            }
                            let read = read(self.owned.values());
                            let mut committed = Ok(());
                            if self.settings.auto_commit.is_some() && !read.is_empty() {
                                committed = commit(&self.coordinator, &self.member_id, self.epoch(), read).await;
                            }
                            let _ = outgoing.send(message(Message::Leave(v1::MemberLeave {}))).await;
                            // It ends the stream once it has heard that.
                            while next(&mut incoming, &address).await.is_ok() {}
                            committed
                        };
                        let left = tokio::time::timeout(FAREWELL, farewell).await;
                        let late = || Error::new(ErrorKind::TimedOut, format!("the group's coordinator did not answer within {FAREWELL:?}"));
                        let _ = reply.send(left.unwrap_or_else(|_| Err(late())));
                        return Ok(End::Closed);
                    }
                },
            }
        }
    }

    fn epoch(&self) -> i32 {
        self.epoch.load(Ordering::Acquire)
    }

    fn hello(&self) -> MemberHello {
        let GroupSettings {
            group,
            instance_id,
            client_id,
            topics,
            pattern,
            assignor,
            rack,
            session_timeout,
            rebalance_timeout,
            ..
        } = &self.settings;
        let assignor = match assignor {
            Assignor::Uniform => v1::Assignor::Uniform,
            Assignor::Range => v1::Assignor::Range,
        };
        MemberHello {
            group_id: group.to_string(),
            member_id: self.member_id.clone(),
            instance_id: instance_id.as_ref().map(|id| id.as_str().to_owned()),
            client_id: client_id.clone(),
            subscription: Some(v1::Subscription {
                topics: topics.clone(),
                pattern: pattern.clone(),
                assignor: assignor.into(),
                rack: rack.clone(),
            }),
            session_timeout_ms: millis(*session_timeout),
            rebalance_timeout_ms: millis(*rebalance_timeout),
            owned: by_topic(self.owned.keys()),
        }
    }

    /// Takes an assignment up, as the module says.
    fn take_up(&self, assignment: v1::Assignment) -> BoxFuture<'static, Done> {
        let coordinator = self.coordinator.clone();
        let settings = self.settings.clone();
        let (member_id, before_epoch) = (self.member_id.clone(), self.epoch());
        let epoch = self.epoch.clone();
        let (before, events) = (self.owned.clone(), self.events.clone());
        let taken = async move {
            let wanted = flat(&assignment.partitions);
            let new: Vec<(Arc<str>, i32)> = wanted
                .iter()
                .filter(|partition| !before.contains_key(*partition))
                .cloned()
                .collect();
            let offsets = beginnings(&coordinator, &new, settings.start).await;
            let offsets = offsets.map_err(|error| match error.kind() {
                // The coordinator knows already of what others don't; or not yet that it is gone.
                ErrorKind::UnknownTopic | ErrorKind::UnknownPartition => {
                    Error::new(ErrorKind::NotReady, error.to_string())
                }
                _ => error,
            })?;
            let mut offsets: BTreeMap<(Arc<str>, i32), i64> =
                new.into_iter().zip(offsets).collect();
            let mut owned = Owned::new();
            let mut partitions = Vec::with_capacity(wanted.len());
            for key in wanted {
                let known = before.get(&key).cloned();
                let assigned = known.unwrap_or_else(|| Assigned::new(key.0.clone(), key.1));
                partitions.push((assigned.clone(), offsets.remove(&key)));
                owned.insert(key, assigned);
            }
            let (done, taken) = oneshot::channel();
            epoch.store(assignment.epoch, Ordering::Release);
            let _ = events.send(Event::Assigned { partitions, done });
            // It drops the sender only when it is gone.
            let _ = taken.await;
            let gone = before.iter().filter(|(key, _)| !owned.contains_key(*key));
            let read = read(gone.map(|(_, assigned)| assigned));
            if settings.auto_commit.is_some()
                && !read.is_empty()
                && let Err(error) = commit(&coordinator, &member_id, before_epoch, read).await
            {
                tracing::warn!(%error, "what was read of partitions that go to another member is not committed: it is read again");
            }
            Ok(TakenUp {
                version: assignment.version,
                owned,
            })
        };
        taken.map(|taken| Done::TakenUp(Box::new(taken))).boxed()
    }

    fn commit(&self, offsets: Vec<Commit>) -> BoxFuture<'static, Done> {
        let coordinator = self.coordinator.clone();
        let (member_id, epoch) = (self.member_id.clone(), self.epoch());
        let result = async move { commit(&coordinator, &member_id, epoch, offsets).await };
        result.map(Done::Committed).boxed()
    }

    /// What became of the first of the commits.
    fn committed(&mut self, result: Result<(), Error>) {
        match (self.commits.pop_front(), result) {
            // Who asked may not wait for it.
            (Some((_, Some(reply))), result) => drop(reply.send(result)),
            (_, Err(error)) => {
                tracing::warn!(%error, "offsets can't be committed; the next time more of them are");
            }
            (_, Ok(())) => {}
        }
    }
}

/// Longer than any consumer lives; timers overflow on more.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

fn message(message: Message) -> JoinRequest {
    JoinRequest {
        message: Some(message),
    }
}

async fn next(
    incoming: &mut Streaming<JoinResponse>,
    address: &str,
) -> Result<JoinResponse, Error> {
    match incoming.message().await {
        Ok(Some(answer)) => Ok(answer),
        Ok(None) => {
            let message = format!("broker {address} ended the member's stream");
            Err(Error::new(ErrorKind::Transport, message))
        }
        Err(status) => Err(Error::from_status(&status, address)),
    }
}

/// What has been read and is not committed yet.
fn read<'a>(partitions: impl Iterator<Item = &'a Arc<Assigned>>) -> Vec<Commit> {
    let news = partitions.filter_map(|assigned| {
        let read = assigned.read.load(Ordering::Acquire);
        let is_news = read > assigned.committed.load(Ordering::Acquire);
        is_news.then(|| Commit::new(assigned.clone(), read))
    });
    news.collect()
}

async fn commit(
    coordinator: &GroupCoordinator,
    member_id: &str,
    epoch: i32,
    commits: Vec<Commit>,
) -> Result<(), Error> {
    let offsets = commits.iter().map(|commit| {
        let (topic, partition) = (commit.assigned.topic.clone(), commit.assigned.partition);
        let offset = GroupOffset::new(topic, partition, commit.offset);
        offset.metadata(commit.metadata.as_str()).into()
    });
    let deadline = coordinator.way().client().deadline();
    coordinator
        .commit(member_id, epoch, offsets.collect(), deadline)
        .await?;
    for commit in commits {
        let committed = &commit.assigned.committed;
        committed.store(commit.offset, Ordering::Release);
    }
    Ok(())
}

/// Where to go on in partitions that are new: where the group has got to, or as the consumer wishes if it has not been there. What is gone by now
/// is passed over.
async fn beginnings(
    coordinator: &GroupCoordinator,
    partitions: &[(Arc<str>, i32)],
    start: StartFrom,
) -> Result<Vec<i64>, Error> {
    if partitions.is_empty() {
        return Ok(Vec::new());
    }
    let client = coordinator.way().client();
    let deadline = client.deadline();
    let is_new = |(topic, partition): &(Arc<str>, i32)| {
        let known = client.cached().topic(topic);
        let count = known.map_or(0, |topic| topic.leaders.len());
        usize::try_from(*partition).is_ok_and(|partition| partition >= count)
    };
    if partitions.iter().any(is_new) {
        let mut topics: Vec<String> = partitions.iter().map(|(t, _)| t.to_string()).collect();
        topics.dedup();
        client.refresh(&topics).await?;
    }
    let committed = coordinator
        .offsets(by_topic(partitions.iter()), deadline)
        .await?;
    let committed: BTreeMap<(Arc<str>, i32), i64> = committed
        .into_iter()
        .map(|found| ((found.topic.into(), found.partition), found.offset))
        .collect();
    let wishes = crate::consumer::resolve(client, partitions, start).await?;
    let query = |(topic, partition): &(Arc<str>, i32)| Query {
        topic: topic.clone(),
        partition: *partition,
        spec: OffsetSpec::Earliest,
    };
    let queries = partitions.iter().map(query).collect();
    let earliest = offsets::find(client, queries, deadline).await?;
    let each = partitions.iter().zip(wishes).zip(earliest);
    Ok(each
        .map(|((partition, wish), earliest)| {
            let offset = committed.get(partition).copied().unwrap_or(wish);
            offset.max(earliest.map_or(0, |at| at.offset))
        })
        .collect())
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
