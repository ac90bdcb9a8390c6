//! A shard of groups at work: who is told what, and which topics there are.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use millrace_proto::v1::{
    self, CommitOffsetsRequest, DescribeGroupResponse, FetchOffsetsRequest, FetchOffsetsResponse,
    GroupSummary, HoldOffsetsRequest, MemberHello,
};
use tokio::{
    sync::{mpsc, watch},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;

use super::{
    GroupError, Shape, TOPIC, Topology,
    entry::Entry,
    group::{GroupFigures, News, Outcome, SessionId},
    shard::{Said, Shard, Speaker},
};
use crate::{
    directory::{Directory, Partition, Topic},
    partition::NotEnoughReplicas,
    shards::{self, Answer, Machine, Now, Shards, answer, refuse},
    storage::Store,
};

/// How often the topics are looked at.
const TOPICS: Duration = Duration::from_millis(250);
/// A topic that is not there for so long is gone. A broker that has just started does not know them all yet.
const TOPIC_GONE: Duration = Duration::from_secs(10);
/// Assignments that wait for a member's stream. Who does not take them is let go, and comes back.
const OUTBOX: usize = 16;

/// How a request on a group is answered.
type Reply<T> = shards::Reply<T, GroupError>;

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
    /// Offsets that wait for a transaction.
    Hold(HoldOffsetsRequest, Reply<()>),
    /// A transaction has ended: the group, its producer id and epoch, and whether it was committed.
    Close(String, (i64, i16), bool, Reply<()>),
    List(Reply<Vec<GroupSummary>>),
    Describe(String, Reply<DescribeGroupResponse>),
    Delete(String, Reply<()>),
    Figures(Reply<Vec<GroupFigures>>),
}

/// All shards of groups on this broker.
pub(crate) type Groups = Shards<GroupMachine>;

/// Begins to coordinate the groups whose shards are led here.
pub(crate) fn coordinate(
    store: Arc<Store>,
    directory: Arc<Directory>,
    stop: CancellationToken,
) -> Arc<Groups> {
    let (topics, topology) = watch::channel(Topology::new());
    tokio::spawn(
        stop.clone()
            .run_until_cancelled_owned(follow_topics(directory.clone(), topics)),
    );
    let sessions = AtomicU64::new(1);
    let make = move |_| GroupMachine {
        shard: Shard::default(),
        topology: topology.clone(),
        outboxes: HashMap::new(),
        news: Vec::new(),
        next_session: sessions.fetch_add(1 << 32, Ordering::Relaxed),
    };
    Shards::new(TOPIC, store, directory, make, stop)
}

/// Tells all shards of the topics.
async fn follow_topics(directory: Arc<Directory>, topics: watch::Sender<Topology>) {
    let mut seen: HashMap<Arc<str>, Instant> = HashMap::new();
    let mut ticks = tokio::time::interval(TOPICS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = Instant::now();
        let mut topology = topics.borrow().clone();
        let racks = directory.racks();
        for topic in directory.topics() {
            if millrace_crds::is_internal_topic(&topic.name) {
                continue;
            }
            seen.insert(topic.name.clone(), now);
            topology.insert(topic.name.clone(), shape(&topic, &racks));
        }
        seen.retain(|_, last| now - *last < TOPIC_GONE);
        topology.retain(|name, _| seen.contains_key(name));
        topics.send_if_modified(|known| {
            let changed = *known != topology;
            *known = topology;
            changed
        });
    }
}

fn shape(topic: &Topic, racks: &BTreeMap<i32, Arc<str>>) -> Shape {
    let rack = |partition: &Arc<Partition>| racks.get(partition.replicas.first()?).cloned();
    let partitions = topic.partitions();
    Shape {
        id: topic.topic_id,
        partitions: partitions.len() as i32,
        racks: match racks.is_empty() {
            true => Vec::new(),
            false => partitions.iter().map(rack).collect(),
        },
    }
}

/// A shard of groups, and the streams of their members.
pub(crate) struct GroupMachine {
    shard: Shard,
    topology: watch::Receiver<Topology>,
    outboxes: HashMap<SessionId, mpsc::Sender<Result<v1::Assignment, GroupError>>>,
    /// To be told once all of a round is kept.
    news: Vec<News>,
    next_session: SessionId,
}

impl Machine for GroupMachine {
    type Entry = Entry;
    type Request = Request;

    fn replay(&mut self, entry: Entry, now: Now) {
        self.shard.replay(entry, now.instant);
    }

    fn replayed(&mut self, _: Now) {
        self.shard
            .replayed(self.topology.borrow_and_update().clone());
    }

    fn len(&self) -> usize {
        self.shard.len()
    }

    fn begin(&mut self, now: Now, ticked: bool) {
        if ticked {
            self.shard.tick(now);
        }
        if self.topology.has_changed().unwrap_or(false) {
            self.shard
                .set_topology(self.topology.borrow_and_update().clone());
        }
    }

    fn take_in(&mut self, request: Request, now: Now) -> Answer {
        let shard = &mut self.shard;
        match request {
            Request::Join(hello, reply) => {
                self.next_session += 1;
                let session = self.next_session;
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
            Request::Hold(hold, reply) => answer(reply, shard.hold(hold, now)),
            Request::Close(group, producer, commit, reply) => {
                answer(reply, shard.close(&group, producer, commit, now))
            }
            Request::List(reply) => answer(reply, Ok(shard.list())),
            Request::Describe(group, reply) => answer(reply, shard.describe(&group)),
            Request::Delete(group, reply) => answer(reply, shard.delete(&group)),
            Request::Figures(reply) => answer(reply, Ok(shard.figures())),
        }
    }

    fn refuse(request: Request, error: NotEnoughReplicas) {
        match request {
            Request::Join(_, reply) => refuse(reply, error),
            Request::Said(_, _, reply)
            | Request::Commit(_, reply)
            | Request::Hold(_, reply)
            | Request::Close(.., reply)
            | Request::Delete(_, reply) => refuse(reply, error),
            Request::Fetch(_, reply) => refuse(reply, error),
            Request::List(reply) => refuse(reply, error),
            Request::Describe(_, reply) => refuse(reply, error),
            Request::Figures(reply) => refuse(reply, error),
        }
    }

    fn settle(&mut self, now: Now) -> Vec<Entry> {
        let Outcome { entries, news } = self.shard.settle(now.instant);
        self.news = news;
        entries
    }

    fn kept(&mut self) {
        for News {
            session,
            assignment,
        } in std::mem::take(&mut self.news)
        {
            let ends = assignment.is_err();
            let Some(outbox) = self.outboxes.get(&session) else {
                continue;
            };
            if outbox.try_send(assignment).is_err() || ends {
                self.outboxes.remove(&session);
            }
        }
    }

    fn snapshot(&self) -> Vec<Entry> {
        self.shard.snapshot().collect()
    }
}
