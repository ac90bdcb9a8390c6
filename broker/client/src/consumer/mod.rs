//! The consumer: its configuration and its public faces, a stream of records and a stream of batches.
//!
//! The [`fetcher`], a background task, keeps a bounded buffer of batches filled; records are decoded here, on the caller's side,
//! one batch at a time. A member of a group is told by its [`membership`](crate::group) which partitions are its own.

mod buffer;
mod cursors;
mod fetcher;

use std::{
    collections::{BTreeSet, HashMap},
    fmt,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
    vec,
};

use bytes::Bytes;
use futures::{FutureExt, Stream, future::BoxFuture};
use millrace_proto::v1;
use millrace_record::{BatchHeader, DecodeLimits, Record, Records, decode};
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
};

pub(crate) use self::cursors::Assigned;
use self::{
    buffer::Buffer,
    cursors::{Cursors, FetchSettings, Fetched, Item},
    fetcher::{BATCH_OVERHEAD, Command, Fetcher, Pace},
};
use crate::{
    Client,
    error::{Error, ErrorKind},
    group::{
        self, Assignor, Commit, Committer, Event, GroupCoordinator, GroupOffset, GroupSettings,
        Handle, Instance, InstanceId, Request, check_not_beyond,
    },
    offsets::{self, OffsetSpec, Query},
    transport::MAX_MESSAGE_BYTES,
};

/// Where to begin reading a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StartFrom {
    /// At the first record still held.
    #[default]
    Earliest,
    /// After the last record that is there now.
    Latest,
    /// At this offset.
    Offset(i64),
    /// At the first record whose timestamp, in milliseconds since the Unix epoch, is at or after this; if there is none, as
    /// [`Latest`](StartFrom::Latest).
    Timestamp(i64),
}

/// What a consumer sees of transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Isolation {
    /// Those that were committed, and what is not part of any. What comes after the beginning of an open transaction waits for its end.
    #[default]
    ReadCommitted,
    /// Everything, also of transactions that are open or were aborted.
    ReadUncommitted,
}

impl Isolation {
    fn to_proto(self) -> v1::IsolationLevel {
        match self {
            Isolation::ReadCommitted => v1::IsolationLevel::ReadCommitted,
            Isolation::ReadUncommitted => v1::IsolationLevel::ReadUncommitted,
        }
    }
}

/// Configures a [`Consumer`] or a [`BatchConsumer`]. `{:?}` prints all settings.
#[derive(Debug, Clone)]
pub struct ConsumerBuilder {
    client: Client,
    /// With the partitions, if not all.
    topics: Vec<(Arc<str>, Option<Vec<i32>>)>,
    start: StartFrom,
    max_buffered_bytes: usize,
    min_bytes: u32,
    max_wait: Duration,
    max_bytes: usize,
    max_partition_bytes: u32,
    group: Option<Arc<str>>,
    pattern: Option<String>,
    instance_id: Option<String>,
    static_member: bool,
    assignor: Assignor,
    rack: Option<String>,
    session_timeout: Option<Duration>,
    rebalance_timeout: Duration,
    auto_commit: Option<Duration>,
    isolation: Isolation,
}

impl ConsumerBuilder {
    pub(crate) fn new(client: Client) -> Self {
        ConsumerBuilder {
            client,
            topics: Vec::new(),
            start: StartFrom::Earliest,
            max_buffered_bytes: 32 << 20,
            min_bytes: 1,
            max_wait: Duration::from_millis(500),
            max_bytes: 4 << 20,
            max_partition_bytes: 1 << 20,
            group: None,
            pattern: None,
            instance_id: None,
            static_member: true,
            assignor: Assignor::Uniform,
            rack: None,
            session_timeout: None,
            rebalance_timeout: Duration::from_secs(60),
            auto_commit: Some(Duration::from_secs(5)),
            isolation: Isolation::ReadCommitted,
        }
    }

    /// What it sees of transactions. Default: [`Isolation::ReadCommitted`].
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.isolation = isolation;
        self
    }

    /// Becomes a member of a group, whose members share the partitions of the topics. It goes on where the group has got to; where that is
    /// nowhere, as [`start`](ConsumerBuilder::start) says.
    pub fn group(mut self, group: impl Into<Arc<str>>) -> Self {
        self.group = Some(group.into());
        self
    }

    /// Becomes a member of the group that is named after the app: `MILLRACE_GROUP` in its environment; without that, in Kubernetes, the workload that
    /// the pod belongs to (`billing` for `billing-7d9c8b6f5d-x2x4z` and `billing-0`); elsewhere the name of its program.
    pub fn group_of_app(mut self) -> Self {
        self.group = group::group_of_app().or(Some("app".into()));
        self
    }

    /// Reads, in a group, also all topics whose whole name matches this regular expression, and those that are made later.
    pub fn pattern(mut self, pattern: impl Into<String>) -> Self {
        self.pattern = Some(pattern.into());
        self
    }

    /// Makes this a static member: the next process with the same instance id takes over what this one has, with no rebalance, if it comes within
    /// the session timeout. In a pod of a StatefulSet that is the default, under the pod's name (if `POD_NAME` does not say otherwise, the host's): a
    /// restart moves no partition.
    pub fn instance_id(mut self, id: impl Into<String>) -> Self {
        self.instance_id = Some(id.into());
        self
    }

    /// Whether a pod of a StatefulSet is a static member without being told so. Default: true.
    pub fn static_member(mut self, by_itself: bool) -> Self {
        self.static_member = by_itself;
        self
    }

    /// How the group's partitions are given out, if most of its members ask for the same. Default: [`Assignor::Uniform`].
    pub fn assignor(mut self, assignor: Assignor) -> Self {
        self.assignor = assignor;
        self
    }

    /// Where this member is, such as the zone of its node (`topology.kubernetes.io/zone`). Of partitions whose preferred leader is there it gets as many
    /// as the balance allows, so that less is read across zones. With [`Assignor::Uniform`].
    pub fn rack(mut self, rack: impl Into<String>) -> Self {
        self.rack = Some(rack.into());
        self
    }

    /// A member that has not been heard of for so long is gone; one whose process was killed, after 3 s. Default: 10 s, 45 s for static
    /// members; from 1 s to 30 min.
    pub fn session_timeout(mut self, timeout: Duration) -> Self {
        self.session_timeout = Some(timeout);
        self
    }

    /// How long the caller may be busy with a batch of a partition that another member is to have. Then this one is gone. Default: 60 s.
    pub fn rebalance_timeout(mut self, timeout: Duration) -> Self {
        self.rebalance_timeout = timeout;
        self
    }

    /// How often what was read is committed by itself; also when partitions go to another member, and by [`Consumer::close`]. A record counts as read
    /// once the caller asks for the next one: at least once. `None`: only [`Consumer::commit`] does. Default: 5 s.
    pub fn auto_commit(mut self, interval: Option<Duration>) -> Self {
        self.auto_commit = interval;
        self
    }

    /// Reads all partitions of a topic, also those that are added later (from their beginning).
    pub fn topic(mut self, topic: impl Into<Arc<str>>) -> Self {
        self.topics.push((topic.into(), None));
        self
    }

    /// Reads all partitions of several topics.
    pub fn topics<T: Into<Arc<str>>>(self, topics: impl IntoIterator<Item = T>) -> Self {
        topics.into_iter().fold(self, ConsumerBuilder::topic)
    }

    /// Reads some partitions of a topic.
    pub fn partitions(
        mut self,
        topic: impl Into<Arc<str>>,
        partitions: impl IntoIterator<Item = i32>,
    ) -> Self {
        self.topics
            .push((topic.into(), Some(partitions.into_iter().collect())));
        self
    }

    /// Where to begin in every partition. Default: [`StartFrom::Earliest`].
    pub fn start(mut self, start: StartFrom) -> Self {
        self.start = start;
        self
    }

    /// The most bytes that are fetched ahead. One batch more can come if it is larger than this. Default: 32 MiB.
    pub fn max_buffered_bytes(mut self, bytes: usize) -> Self {
        self.max_buffered_bytes = bytes;
        self
    }

    /// The broker waits for so much data before it answers. Default: 1.
    pub fn min_bytes(mut self, bytes: u32) -> Self {
        self.min_bytes = bytes;
        self
    }

    /// The broker answers after this time even with less than `min_bytes`; at most 60 s. Default: 500 ms.
    pub fn max_wait(mut self, wait: Duration) -> Self {
        self.max_wait = wait;
        self
    }

    /// The most bytes in one answer. Records keep the memory of the answer that they came in as long as they live.
    /// Default: 4 MiB.
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }

    /// The most bytes of one partition in one answer. Default: 1 MiB.
    pub fn max_partition_bytes(mut self, bytes: u32) -> Self {
        self.max_partition_bytes = bytes;
        self
    }

    /// Finds where to begin and starts fetching. Must be called within a Tokio runtime.
    pub async fn build(self) -> Result<Consumer, Error> {
        Ok(Consumer {
            engine: self.start_engine().await?,
            current: None,
        })
    }

    /// The same for whole batches, not decoded.
    pub async fn build_batches(self) -> Result<BatchConsumer, Error> {
        Ok(BatchConsumer {
            engine: self.start_engine().await?,
            returned: None,
        })
    }

    async fn start_engine(self) -> Result<Engine, Error> {
        let invalid = |message: &str| Err(Error::new(ErrorKind::InvalidRequest, message));
        if self.group.is_none() && self.pattern.is_some() {
            return invalid("a pattern needs a group: name one with `group`");
        }
        if self.topics.is_empty() && self.pattern.is_none() {
            return invalid("nothing to read: name a topic with `topic`, `topics` or `partitions`");
        }
        if self.group.is_some() && self.topics.iter().any(|(_, some)| some.is_some()) {
            return invalid(
                "in a group, partitions are given out: name whole topics, or leave the group out",
            );
        }
        if self.auto_commit.is_some_and(|interval| interval.is_zero()) {
            return invalid("auto_commit must be longer than nothing");
        }
        if self.max_wait > Duration::from_secs(60) {
            return invalid("max_wait must be at most 60 s");
        }
        if self.max_bytes == 0 || self.max_bytes > MAX_MESSAGE_BYTES / 2 {
            return invalid("max_bytes must be from 1 to 32 MiB");
        }
        let client = &self.client;
        let mut wanted: BTreeSet<(Arc<str>, i32)> = BTreeSet::new();
        let mut whole_topics: Vec<Arc<str>> = Vec::new();
        let membership = self.group.as_ref().map(|group| self.join(group));
        let by_name = self.topics.iter().filter(|_| membership.is_none());
        for (topic, partitions) in by_name {
            let count = client.topic(topic, client.deadline()).await?.leaders.len();
            match partitions {
                Some(partitions) => wanted.extend(partitions.iter().map(|&p| (topic.clone(), p))),
                None => {
                    wanted.extend(
                        (0..i32::try_from(count).unwrap_or(i32::MAX)).map(|p| (topic.clone(), p)),
                    );
                    whole_topics.push(topic.clone());
                }
            }
        }
        whole_topics.sort();
        whole_topics.dedup();
        let wanted: Vec<(Arc<str>, i32)> = wanted.into_iter().collect();
        let offsets = resolve(client, &wanted, self.start).await?;

        let settings = FetchSettings {
            min_bytes: self.min_bytes,
            max_wait: self.max_wait,
            max_partition_bytes: self.max_partition_bytes,
            isolation: self.isolation,
        };
        let mut cursors = Cursors::new(settings);
        let mut topics: Vec<String> = wanted.iter().map(|(topic, _)| topic.to_string()).collect();
        topics.extend(whole_topics.iter().map(|topic| topic.to_string()));
        if membership.is_some() {
            // None at all would be all.
            topics.push(millrace_proto::GROUPS_TOPIC.to_owned());
        }
        topics.sort();
        topics.dedup();
        let (items, items_out) = mpsc::unbounded_channel();
        let (commands, commands_out) = mpsc::unbounded_channel();
        let buffer = Arc::new(Buffer::new(self.max_buffered_bytes));
        let mut tracked = Vec::with_capacity(wanted.len());
        for ((topic, partition), offset) in wanted.into_iter().zip(offsets) {
            let assigned = Assigned::new(topic, partition);
            cursors.add(assigned.clone(), offset);
            tracked.push((assigned, offset));
        }
        let fetcher = Fetcher {
            client: self.client.clone(),
            cursors,
            buffer: buffer.clone(),
            max_bytes: self.max_bytes,
            max_wait: self.max_wait,
            whole_topics,
            topics,
            items,
            pace: Pace::default(),
        };
        let task = tokio::spawn(fetcher.run(commands_out)).abort_handle();
        let mut engine = Engine {
            client: self.client,
            tracked: Vec::new(),
            index: HashMap::new(),
            items: items_out,
            commands,
            buffer,
            pending: None,
            task,
            membership,
            lost: Vec::new(),
        };
        tracked
            .into_iter()
            .for_each(|(assigned, offset)| engine.track(assigned, offset));
        Ok(engine)
    }
}

impl ConsumerBuilder {
    fn join(&self, group: &Arc<str>) -> Handle {
        let instance_id = match &self.instance_id {
            Some(id) => Some(InstanceId::Given(id.clone())),
            None if self.static_member => Instance::take(group).map(InstanceId::Own),
            None => None,
        };
        let default = match instance_id {
            Some(_) => Duration::from_secs(45),
            None => Duration::from_secs(10),
        };
        let settings = GroupSettings {
            group: group.clone(),
            instance_id,
            client_id: self.client.client_id().to_owned(),
            topics: self
                .topics
                .iter()
                .map(|(topic, _)| topic.to_string())
                .collect(),
            pattern: self.pattern.clone(),
            assignor: self.assignor,
            rack: self.rack.clone(),
            session_timeout: self.session_timeout.unwrap_or(default),
            rebalance_timeout: self.rebalance_timeout,
            auto_commit: self.auto_commit,
            start: self.start,
        };
        group::begin(
            GroupCoordinator::new(self.client.clone(), group.clone()),
            settings,
        )
    }
}

/// Turns a wish into offsets, one for each partition.
pub(crate) async fn resolve(
    client: &Client,
    partitions: &[(Arc<str>, i32)],
    start: StartFrom,
) -> Result<Vec<i64>, Error> {
    let spec = match start {
        StartFrom::Offset(offset) => return Ok(vec![offset; partitions.len()]),
        StartFrom::Earliest => OffsetSpec::Earliest,
        StartFrom::Latest => OffsetSpec::Latest,
        StartFrom::Timestamp(ms) => OffsetSpec::Timestamp(ms),
    };
    let query = |spec| {
        let queries = partitions.iter().map(|(topic, partition)| Query {
            topic: topic.clone(),
            partition: *partition,
            spec,
        });
        queries.collect::<Vec<_>>()
    };
    // Before the search by time, so that nothing that comes in between is skipped.
    let latest = match start {
        StartFrom::Timestamp(_) => {
            offsets::find(client, query(OffsetSpec::Latest), client.deadline()).await?
        }
        _ => vec![None; partitions.len()],
    };
    let found = offsets::find(client, query(spec), client.deadline()).await?;
    Ok(found
        .into_iter()
        .zip(latest)
        .map(|(found, latest)| found.or(latest).map_or(0, |at| at.offset))
        .collect())
}

/// What both consumers have: the batches that arrive, and the caller's place in each partition.
struct Engine {
    client: Client,
    tracked: Vec<Tracked>,
    index: HashMap<Arc<str>, HashMap<i32, usize>>,
    items: mpsc::UnboundedReceiver<Item>,
    commands: mpsc::UnboundedSender<Command>,
    buffer: Arc<Buffer>,
    pending: Option<Pending>,
    task: AbortHandle,
    membership: Option<Handle>,
    /// Partitions that went to other members after records of them were returned, which no transaction commits.
    lost: Vec<(Arc<str>, i32)>,
}

/// A batch with its partition's index.
type NextBatch = Result<(usize, BatchHeader, Fetched), Error>;

struct Tracked {
    assigned: Arc<Assigned>,
    generation: u64,
    /// The next offset for the caller.
    position: i64,
    /// In a group, another member has it now.
    gone: bool,
    /// Records of it were returned that no transaction commits yet.
    unsettled: bool,
}

struct Pending {
    index: usize,
    generation: u64,
    batches: vec::IntoIter<Fetched>,
}

impl Engine {
    fn track(&mut self, assigned: Arc<Assigned>, offset: i64) {
        let partitions = self.index.entry(assigned.topic.clone()).or_default();
        partitions.insert(assigned.partition, self.tracked.len());
        self.tracked.push(Tracked {
            assigned,
            generation: 0,
            position: offset,
            gone: false,
            unsettled: false,
        });
    }

    fn find(&self, topic: &str, partition: i32) -> Option<usize> {
        let index = self.index.get(topic)?.get(&partition).copied()?;
        (!self.tracked[index].gone).then_some(index)
    }

    /// Reads these partitions, and no others. Those with an offset are new.
    fn assign(&mut self, partitions: Vec<(Arc<Assigned>, Option<i64>)>) {
        let wanted: BTreeSet<(Arc<str>, i32)> = partitions
            .iter()
            .map(|(assigned, _)| (assigned.topic.clone(), assigned.partition))
            .collect();
        for (index, tracked) in self.tracked.iter_mut().enumerate() {
            let key = (tracked.assigned.topic.clone(), tracked.assigned.partition);
            if tracked.gone || wanted.contains(&key) {
                continue;
            }
            tracked.gone = true;
            if std::mem::take(&mut tracked.unsettled) {
                self.lost.push(key);
            }
            tracked.generation += 1;
            let generation = tracked.generation;
            // Fails only if the task is gone; the next poll says so.
            let _ = self.commands.send(Command::Remove { index, generation });
        }
        for (assigned, offset) in partitions {
            let Some(offset) = offset else { continue };
            let known = self.index.get(&assigned.topic);
            let known = known.and_then(|of| of.get(&assigned.partition).copied());
            let index = known.unwrap_or(self.tracked.len());
            match known {
                None => self.track(assigned.clone(), offset),
                Some(_) => {
                    let tracked = &mut self.tracked[index];
                    tracked.assigned = assigned.clone();
                    tracked.generation += 1;
                    tracked.position = offset;
                    tracked.gone = false;
                }
            }
            let generation = self.tracked[index].generation;
            let _ = self.commands.send(Command::Assign {
                index,
                generation,
                assigned,
                offset,
            });
        }
    }

    /// Takes in what the membership has to say.
    fn poll_membership(&mut self, cx: &mut Context<'_>) -> Result<(), Error> {
        while let Some(membership) = &mut self.membership {
            match membership.events.poll_recv(cx) {
                Poll::Pending => break,
                Poll::Ready(None) => {
                    self.membership = None;
                    self.assign(Vec::new());
                }
                Poll::Ready(Some(Event::Failed(error))) => {
                    self.membership = None;
                    self.assign(Vec::new());
                    return Err(error);
                }
                Poll::Ready(Some(Event::Assigned { partitions, done })) => {
                    self.assign(partitions);
                    // It waits, or has joined anew meanwhile.
                    let _ = done.send(());
                }
            }
        }
        Ok(())
    }

    /// The caller is done with what comes before, so that it may be committed.
    fn is_done_up_to(&self, index: usize, offset: i64) {
        self.tracked[index]
            .assigned
            .read
            .store(offset, Ordering::Release);
    }

    /// Asks at once; the future brings the answer.
    fn ask<T: Send + 'static>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Request,
    ) -> BoxFuture<'static, Result<T, Error>> {
        let (reply, answer) = oneshot::channel();
        let asked = match &self.membership {
            Some(membership) => {
                let sent = membership.requests.send(request(reply));
                sent.map_err(|_| Error::closed("consumer"))
            }
            None => {
                let message =
                    "this consumer is not in a group, or no longer: build it with `group`";
                Err(Error::new(ErrorKind::InvalidRequest, message))
            }
        };
        let answer = async move {
            asked?;
            answer.await.map_err(|_| Error::closed("consumer"))?
        };
        answer.boxed()
    }

    fn commit(&self, offsets: Vec<Commit>) -> BoxFuture<'static, Result<(), Error>> {
        self.ask(|reply| Request::Commit { offsets, reply })
    }

    /// The next batch of records for the caller. Its bytes still count as buffered.
    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<Option<NextBatch>> {
        if let Err(error) = self.poll_membership(cx) {
            return Poll::Ready(Some(Err(error)));
        }
        loop {
            while let Some(pending) = &mut self.pending {
                let Some(fetched) = pending.batches.next() else {
                    self.pending = None;
                    break;
                };
                let tracked = &mut self.tracked[pending.index];
                if tracked.generation != pending.generation {
                    self.buffer.give_back(cost(&fetched));
                    continue;
                }
                match &fetched.header {
                    // Markers of transactions are not for callers.
                    Ok(header) if header.attributes.is_control() => {
                        tracked.position = fetched.next;
                        tracked.assigned.read.store(fetched.next, Ordering::Release);
                        self.buffer.give_back(cost(&fetched));
                    }
                    Ok(header) => return Poll::Ready(Some(Ok((pending.index, *header, fetched)))),
                    Err(error) => {
                        let Assigned {
                            topic, partition, ..
                        } = &*tracked.assigned;
                        let error = Error::from_batch(error, topic, *partition, Some(fetched.from));
                        tracked.position = fetched.next;
                        self.buffer.give_back(cost(&fetched));
                        return Poll::Ready(Some(Err(error)));
                    }
                }
            }
            match ready!(self.items.poll_recv(cx)) {
                None => return Poll::Ready(None),
                Some(Item::Joined { assigned, offset }) => self.track(assigned, offset),
                Some(Item::Batches {
                    index,
                    generation,
                    batches,
                }) => {
                    self.pending = Some(Pending {
                        index,
                        generation,
                        batches: batches.into_iter(),
                    });
                }
                Some(Item::Skipped {
                    index,
                    generation,
                    next,
                }) => {
                    let tracked = &mut self.tracked[index];
                    if tracked.generation == generation {
                        tracked.position = next;
                        tracked.assigned.read.store(next, Ordering::Release);
                    }
                }
                Some(Item::Failed {
                    index,
                    generation,
                    error,
                }) => {
                    if self.tracked[index].generation != generation {
                        continue;
                    }
                    if error.kind() != ErrorKind::OffsetOutOfRange {
                        // Fails only if the task is gone; the next poll says so.
                        let _ = self.commands.send(Command::Resume { index, generation });
                    }
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }

    async fn seek(
        &mut self,
        topic: &str,
        partition: i32,
        start: StartFrom,
    ) -> Result<usize, Error> {
        let topic: Arc<str> = topic.into();
        let index = self.find(&topic, partition).ok_or_else(|| {
            let message = format!("this consumer does not read partition {partition} of topic `{topic}`; add it when building");
            Error::new(ErrorKind::InvalidRequest, message).at(&topic, partition)
        })?;
        let offsets = resolve(&self.client, &[(topic, partition)], start).await?;
        let offset = offsets.first().copied().unwrap_or_default();
        let tracked = &mut self.tracked[index];
        tracked.generation += 1;
        tracked.position = offset;
        let (done, acknowledged) = oneshot::channel();
        let command = Command::Seek {
            index,
            generation: tracked.generation,
            offset,
            done,
        };
        self.commands
            .send(command)
            .map_err(|_| Error::closed("consumer"))?;
        acknowledged.await.map_err(|_| Error::closed("consumer"))?;
        Ok(index)
    }

    fn high_watermark(&self, topic: &str, partition: i32) -> Option<i64> {
        let tracked = &self.tracked[self.find(topic, partition)?];
        Some(tracked.assigned.high_watermark.load(Ordering::Relaxed)).filter(|&offset| offset >= 0)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn cost(fetched: &Fetched) -> usize {
    fetched.bytes.len() + BATCH_OVERHEAD
}

fn limits() -> DecodeLimits {
    DecodeLimits {
        max_decompressed_bytes: MAX_MESSAGE_BYTES,
    }
}

/// A record and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumedRecord {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The partition's index.
    pub partition: i32,
    /// The record, with its offset.
    pub record: Record,
    /// The epoch of the leader that appended it.
    pub leader_epoch: i32,
}

/// Reads records: a [`Stream`] that has no end. Records of one partition come in order, each offset at most once between seeks.
///
/// Whoever is slow only makes fetching pause. Errors don't end the stream: after a batch that can't be read it goes on with the
/// next one, other failures are retried; only [`ErrorKind::OffsetOutOfRange`] stops its partition until
/// [`seek`](Consumer::seek). What a retry may cure is logged, not returned.
pub struct Consumer {
    engine: Engine,
    current: Option<Current>,
}

/// The batch that is being read.
struct Current {
    records: Records,
    index: usize,
    topic: Arc<str>,
    partition: i32,
    leader_epoch: i32,
    /// The next offset for the caller.
    position: i64,
    /// Where to go on after the batch.
    next: i64,
    cost: usize,
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer")
            .field("partitions", &self.engine.tracked.len())
            .finish_non_exhaustive()
    }
}

impl Consumer {
    /// The next record. Cancel safe.
    pub async fn next_record(&mut self) -> Option<Result<ConsumedRecord, Error>> {
        std::future::poll_fn(|cx| self.poll_record(cx)).await
    }

    /// Goes on from elsewhere in one partition. What was fetched before is dropped.
    pub async fn seek(
        &mut self,
        topic: &str,
        partition: i32,
        start: StartFrom,
    ) -> Result<(), Error> {
        let index = self.engine.seek(topic, partition, start).await?;
        if let Some(current) = self.current.take_if(|current| current.index == index) {
            self.engine.buffer.give_back(current.cost);
        }
        Ok(())
    }

    /// Commits what has been returned so far, for the consumer's group: all records count as read.
    pub async fn commit(&self) -> Result<(), Error> {
        self.commit_async().await
    }

    /// The next offset to be returned of each partition.
    pub(crate) fn positions(&self) -> Vec<(Arc<Assigned>, i64)> {
        let current = |index: usize| {
            let current = self.current.as_ref();
            current.filter(|current| current.index == index)
        };
        let read = self.engine.tracked.iter().enumerate();
        let read = read.filter(|(_, tracked)| !tracked.gone);
        let read = read.map(|(index, tracked)| {
            let position = current(index).map_or(tracked.position, |current| current.position);
            (tracked.assigned.clone(), position)
        });
        read.collect()
    }

    /// An error if records were returned of a partition that another member has by now, and which no transaction commits: that one reads them, too.
    pub(crate) fn check_kept(&self) -> Result<(), Error> {
        let Some((topic, partition)) = self.engine.lost.first() else {
            return Ok(());
        };
        let message = "the partition went to another member in the middle of the transaction: abort it, and rewind the consumer";
        Err(Error::new(ErrorKind::NotOwner, message).at(topic, *partition))
    }

    /// What was returned before is a transaction's to commit.
    pub(crate) fn settled(&mut self) {
        self.engine.lost.clear();
        for tracked in &mut self.engine.tracked {
            tracked.unsettled = false;
        }
    }

    /// As whom it commits.
    pub(crate) async fn committer(&self) -> Result<Committer, Error> {
        self.engine.ask(|reply| Request::Identify { reply }).await
    }

    /// The same without waiting: what has been returned so far is being committed, whatever becomes of the future.
    pub fn commit_async(&self) -> impl Future<Output = Result<(), Error>> + Send + use<> {
        let read = self.positions().into_iter();
        let commits = read.map(|(assigned, offset)| Commit::new(assigned, offset));
        self.engine.commit(commits.collect())
    }

    /// Commits these offsets, of partitions that are this member's. None may lie beyond the end of its log.
    pub async fn commit_offsets(
        &self,
        offsets: impl IntoIterator<Item = GroupOffset>,
    ) -> Result<(), Error> {
        let offsets: Vec<GroupOffset> = offsets.into_iter().collect();
        let indexes = self.check_offsets(&offsets).await?;
        let commits = indexes.into_iter().zip(offsets);
        let commits = commits.map(|(index, offset)| Commit {
            assigned: self.engine.tracked[index].assigned.clone(),
            offset: offset.offset,
            metadata: offset.metadata,
        });
        self.engine.commit(commits.collect()).await
    }

    /// That these offsets may be committed; which partitions they are of.
    pub(crate) async fn check_offsets(&self, offsets: &[GroupOffset]) -> Result<Vec<usize>, Error> {
        let mut indexes = Vec::with_capacity(offsets.len());
        let mut ahead = Vec::new();
        for offset in offsets {
            let (topic, partition) = (&offset.topic, offset.partition);
            let index = self.engine.find(topic, partition).ok_or_else(|| {
                let message = "the partition is not this member's";
                Error::new(ErrorKind::NotOwner, message).at(topic, partition)
            })?;
            indexes.push(index);
            if offset.offset > self.engine.tracked[index].position {
                ahead.push(offset.clone());
            }
        }
        let client = &self.engine.client;
        check_not_beyond(client, &ahead, client.deadline()).await?;
        Ok(indexes)
    }

    /// Goes back to where the consumer's group has got to, in all its partitions: after a transaction that was to commit what was read, and was
    /// not.
    pub async fn rewind(&mut self) -> Result<(), Error> {
        let partitions = self.assignment();
        let asked = partitions.clone();
        let beginnings = |reply| Request::Beginnings {
            partitions: asked,
            reply,
        };
        let offsets = self.engine.ask(beginnings).await?;
        for ((topic, partition), offset) in partitions.into_iter().zip(offsets) {
            self.seek(&topic, partition, StartFrom::Offset(offset))
                .await?;
        }
        self.settled();
        Ok(())
    }

    /// The partitions that this consumer reads, sorted.
    pub fn assignment(&self) -> Vec<(Arc<str>, i32)> {
        let read = self.engine.tracked.iter().filter(|tracked| !tracked.gone);
        let mut read: Vec<_> = read
            .map(|tracked| (tracked.assigned.topic.clone(), tracked.assigned.partition))
            .collect();
        read.sort();
        read
    }

    /// Commits what was returned, if that is done by itself, and leaves the group, so that others have its partitions at once. Who is only dropped
    /// is taken for gone after 3 s, and what it read since the last commit is read again.
    pub async fn close(mut self) -> Result<(), Error> {
        self.note_read();
        let Some(membership) = &mut self.engine.membership else {
            return Ok(());
        };
        // It may be waiting until something is taken up here.
        membership.events.close();
        while membership.events.try_recv().is_ok() {}
        self.engine.ask(|reply| Request::Close { reply }).await
    }

    /// What was returned before is read by now.
    fn note_read(&self) {
        if let Some(current) = &self.current {
            self.engine.is_done_up_to(current.index, current.position);
        }
    }

    /// The offset of the next record to be returned from the partition, if this consumer reads it.
    pub fn position(&self, topic: &str, partition: i32) -> Option<i64> {
        let index = self.engine.find(topic, partition)?;
        let current = self
            .current
            .as_ref()
            .filter(|current| current.index == index);
        Some(
            current.map_or(self.engine.tracked[index].position, |current| {
                current.position
            }),
        )
    }

    /// The first offset that can't be read yet, as of the last answer from the partition's leader.
    pub fn high_watermark(&self, topic: &str, partition: i32) -> Option<i64> {
        self.engine.high_watermark(topic, partition)
    }

    fn poll_record(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<ConsumedRecord, Error>>> {
        self.note_read();
        loop {
            if let Some(current) = &mut self.current {
                match current.records.next() {
                    // A batch may begin before the offset asked for.
                    Some(Ok(record)) if record.offset < current.position => continue,
                    Some(Ok(record)) => {
                        current.position = record.offset.saturating_add(1);
                        self.engine.tracked[current.index].unsettled = true;
                        return Poll::Ready(Some(Ok(ConsumedRecord {
                            topic: current.topic.clone(),
                            partition: current.partition,
                            record,
                            leader_epoch: current.leader_epoch,
                        })));
                    }
                    Some(Err(error)) => {
                        let offset = current.position;
                        let error = Error::from_batch(
                            &error,
                            &current.topic,
                            current.partition,
                            Some(offset),
                        );
                        self.leave_batch();
                        return Poll::Ready(Some(Err(error)));
                    }
                    None => self.leave_batch(),
                }
            }
            let (index, header, fetched) = match ready!(self.engine.poll_batch(cx)) {
                Some(Ok(batch)) => batch,
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None => return Poll::Ready(None),
            };
            let tracked = &mut self.engine.tracked[index];
            let (topic, partition) = (tracked.assigned.topic.clone(), tracked.assigned.partition);
            match decode(&fetched.bytes, &limits()) {
                Ok(records) => {
                    self.current = Some(Current {
                        records,
                        index,
                        topic,
                        partition,
                        leader_epoch: header.leader_epoch,
                        position: fetched.from,
                        next: fetched.next,
                        cost: cost(&fetched),
                    });
                }
                Err(error) => {
                    tracked.position = fetched.next;
                    self.engine.buffer.give_back(cost(&fetched));
                    let error = Error::from_batch(&error, &topic, partition, Some(fetched.from));
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }

    fn leave_batch(&mut self) {
        if let Some(current) = self.current.take() {
            self.engine.is_done_up_to(current.index, current.next);
            self.engine.tracked[current.index].position = current.next;
            self.engine.buffer.give_back(current.cost);
        }
    }
}

impl Stream for Consumer {
    type Item = Result<ConsumedRecord, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_record(cx)
    }
}

/// A batch as it is in the log.
#[derive(Debug, Clone)]
pub struct ConsumedBatch {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The partition's index.
    pub partition: i32,
    /// The batch's header.
    pub header: BatchHeader,
    /// The whole batch, header included. Its checksum is checked by [`records`](ConsumedBatch::records) only.
    pub bytes: Bytes,
    from: i64,
}

impl ConsumedBatch {
    /// Checks and decodes the batch. Leaves out records before the offset where the consumer began.
    pub fn records(&self) -> Result<impl Iterator<Item = Result<Record, Error>> + use<'_>, Error> {
        let wrong = |error| {
            Error::from_batch(
                &error,
                &self.topic,
                self.partition,
                Some(self.header.base_offset),
            )
        };
        let records = decode(&self.bytes, &limits()).map_err(wrong)?;
        let is_wanted = |record: &Result<Record, _>| {
            record
                .as_ref()
                .map_or(true, |record| record.offset >= self.from)
        };
        Ok(records
            .filter(is_wanted)
            .map(move |record| record.map_err(wrong)))
    }
}

/// Reads whole batches, for those who pass them on or decode elsewhere: a [`Stream`] that has no end. Order and errors are as
/// with [`Consumer`].
pub struct BatchConsumer {
    engine: Engine,
    /// The partition of the batch that the caller has.
    returned: Option<usize>,
}

impl fmt::Debug for BatchConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchConsumer")
            .field("partitions", &self.engine.tracked.len())
            .finish_non_exhaustive()
    }
}

impl BatchConsumer {
    /// The next batch. Cancel safe.
    pub async fn next_batch(&mut self) -> Option<Result<ConsumedBatch, Error>> {
        std::future::poll_fn(|cx| self.poll_batch(cx)).await
    }

    /// Goes on from elsewhere in one partition. What was fetched before is dropped.
    pub async fn seek(
        &mut self,
        topic: &str,
        partition: i32,
        start: StartFrom,
    ) -> Result<(), Error> {
        self.engine.seek(topic, partition, start).await.map(drop)
    }

    /// The offset after the last batch returned from the partition, if this consumer reads it.
    pub fn position(&self, topic: &str, partition: i32) -> Option<i64> {
        Some(self.engine.tracked[self.engine.find(topic, partition)?].position)
    }

    /// The first offset that can't be read yet, as of the last answer from the partition's leader.
    pub fn high_watermark(&self, topic: &str, partition: i32) -> Option<i64> {
        self.engine.high_watermark(topic, partition)
    }

    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<ConsumedBatch, Error>>> {
        if let Some(index) = self.returned.take() {
            let position = self.engine.tracked[index].position;
            self.engine.is_done_up_to(index, position);
        }
        let (index, header, fetched) = match ready!(self.engine.poll_batch(cx)) {
            Some(Ok(batch)) => batch,
            Some(Err(error)) => return Poll::Ready(Some(Err(error))),
            None => return Poll::Ready(None),
        };
        self.engine.buffer.give_back(cost(&fetched));
        self.returned = Some(index);
        let tracked = &mut self.engine.tracked[index];
        tracked.position = fetched.next;
        Poll::Ready(Some(Ok(ConsumedBatch {
            topic: tracked.assigned.topic.clone(),
            partition: tracked.assigned.partition,
            header,
            bytes: fetched.bytes,
            from: fetched.from,
        })))
    }
}

impl Stream for BatchConsumer {
    type Item = Result<ConsumedBatch, Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_batch(cx)
    }
}
