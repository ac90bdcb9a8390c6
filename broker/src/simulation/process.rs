//! A broker's process: what the tasks of production do around the pure parts, as one state machine. What it is to its partitions is here;
//! who leads is in [`super::coordination`], and how logs get from leaders to followers in [`super::sessions`].

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::{Duration, Instant},
};

use fastrand::Rng;
use k8s_openapi::api::core::v1::ConfigMap;
use millrace_crds::coordination::PartitionLease;
use uuid::Uuid;

use super::{
    coordination::Coordination,
    coverage::{Coverage, Seen},
    log::{Batch, SimLog},
    net::Net,
    oracle::Oracle,
    queue::{Event, Queue},
    sessions::{Link, Serving},
    swarm::Swarm,
    trace::Trace,
};
use crate::{
    coordination::replicas::{Wish, is_let_go, wish},
    partition::{Part, PartitionKey, Peers},
    replication::{Follower, Leader, LogEnds, Me, Timing},
    storage::{SequenceError, Verdict},
};

/// One process of a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pid {
    pub(super) broker: i32,
    pub(super) boot: u64,
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.broker, self.boot)
    }
}

/// What outlives a process.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) store: Uuid,
    pub(super) starts: i32,
    pub(super) logs: BTreeMap<PartitionKey, SimLog>,
}

/// The world as a process sees it while it is at something.
pub(super) struct Cx<'a> {
    /// The world's time, in milliseconds.
    pub(super) at: u64,
    /// The process' own.
    pub(super) now: Instant,
    pub(super) rng: &'a mut Rng,
    pub(super) queue: &'a mut Queue,
    pub(super) net: &'a mut Net,
    pub(super) oracle: &'a mut Oracle,
    pub(super) coverage: &'a mut Coverage,
    pub(super) trace: &'a mut Trace,
    pub(super) swarm: &'a Swarm,
    /// Partitions of which something changed that the oracle has to look at as a whole.
    pub(super) dirty: &'a mut BTreeSet<PartitionKey>,
}

/// A producer's batch on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Produce {
    pub(super) client: usize,
    pub(super) key: PartitionKey,
    pub(super) batch: Batch,
    /// Whether all that is in sync must have it.
    pub(super) all: bool,
}

/// What a producer is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Produced {
    At(i64),
    /// In the log, at an offset that is no longer known.
    Somewhere,
    /// Try again, perhaps elsewhere.
    Retry,
    /// An earlier batch is missing.
    Gap,
}

/// What a consumer is told.
#[derive(Clone, Debug)]
pub(super) enum Fetched {
    Batches(Vec<Batch>),
    OutOfRange { log_start: i64, log_end: i64 },
    NotLeading,
}

/// A replica.
pub(super) struct Hosted {
    pub(super) role: Role,
    /// As it was when last looked at.
    pub(super) in_sync: usize,
    waiters: Vec<Waiter>,
}

// As in production: there are few, and nearly all of them are leaders or followers.
#[allow(clippy::large_enum_variant)]
pub(super) enum Role {
    Leader(Leader),
    Follower(Follower),
    Neither,
}

/// A producer who waits.
struct Waiter {
    end: i64,
    base: i64,
    request: Produce,
}

impl Hosted {
    fn part(&self) -> Part {
        match &self.role {
            Role::Leader(leader) => Part::Leader(leader.epoch()),
            Role::Follower(follower) => Part::Follower(follower.epoch),
            Role::Neither => Part::Neither,
        }
    }

    /// The leader, if it is one in that epoch.
    pub(super) fn leader_of(&mut self, epoch: i32) -> Option<&mut Leader> {
        match &mut self.role {
            Role::Leader(leader) if leader.epoch() == epoch => Some(leader),
            _ => None,
        }
    }

    /// The follower, if it is one in that epoch.
    pub(super) fn follower_of(&self, epoch: i32) -> Option<Follower> {
        match &self.role {
            Role::Follower(follower) if follower.epoch == epoch => Some(*follower),
            _ => None,
        }
    }
}

pub(super) struct Process {
    pub(super) pid: Pid,
    pub(super) me: Me,
    pub(super) disk: Disk,
    pub(super) hosted: BTreeMap<PartitionKey, Hosted>,
    pub(super) coordination: Coordination,
    pub(super) peers: Peers,
    /// Its sessions as a follower, by leader.
    pub(super) links: BTreeMap<i32, Link>,
    /// Its followers' sessions.
    pub(super) serving: BTreeMap<u64, Serving>,
    /// It ends: nothing more comes of it.
    pub(super) has_ended: bool,
}

impl Process {
    pub(super) fn new(pid: Pid, mut disk: Disk, record: &ConfigMap) -> Self {
        disk.starts += 1;
        Self {
            me: Me {
                id: pid.broker,
                epoch: 0,
                store: disk.store,
            },
            pid,
            coordination: Coordination::new(pid, &disk, record),
            disk,
            hosted: BTreeMap::new(),
            peers: Peers::default(),
            links: BTreeMap::new(),
            serving: BTreeMap::new(),
            has_ended: false,
        }
    }

    pub(super) fn start(&mut self, cx: &mut Cx) {
        self.start_coordination(cx);
        cx.queue.push(cx.at + 1, Event::Tick(self.pid));
    }

    pub(super) fn on_tick(&mut self, cx: &mut Cx) {
        self.tick_coordination(cx);
        self.ask_leaders(cx);
        self.tick_sessions(cx);
        if cx.rng.u32(0..32) == 0 {
            self.disk.logs.values_mut().for_each(SimLog::seal);
        }
        let pause = cx.rng.u64(150..=250);
        cx.queue.push(cx.at + pause, Event::Tick(self.pid));
    }

    /// Becomes to the partition what its Lease asks, as far as this process has heard of it.
    pub(super) fn serve(&mut self, key: PartitionKey, cx: &mut Cx) {
        let Some(lease) = self.coordination.lease(key) else {
            return;
        };
        let log = self.disk.logs.get(&key);
        let last_epoch = log.and_then(SimLog::newest_epoch);
        let is_let_go = log.is_some() && is_let_go(self.me, &lease, last_epoch);
        if broken!(DeleteInSync) && !lease.assignment.replicas.contains(&self.me.id) {
            return self.delete(key, cx);
        }
        if is_let_go {
            self.confirm_let_go(key, cx);
        }
        let wish = match wish(self.me, &lease) {
            Some(wish) => wish,
            None if self.hosted.contains_key(&key) => Wish::Hold,
            None => return,
        };
        let log = self.disk.logs.entry(key).or_default();
        let hosted = self.hosted.entry(key).or_insert_with(|| Hosted {
            role: Role::Neither,
            in_sync: 0,
            waiters: Vec::new(),
        });
        if hosted.part() == wish.part() {
            self.change_leader(key, cx, |leader, _| leader.adopt(&lease));
            return;
        }
        if let Role::Leader(_) = hosted.role
            && self.coordination.is_changing_isr(key)
        {
            cx.coverage.note(Seen::DeposedPending);
        }
        hosted.role = Role::Neither;
        for waiter in std::mem::take(&mut hosted.waiters) {
            cx.coverage.note(Seen::WaitersFailed);
            cx.answer(waiter.request, Produced::Retry);
        }
        // What was accepted before is finished: from here on the log stands still.
        log.settle();
        cx.oracle
            .on_durable(key, self.me.replica(), log.durable_end());
        let last_epoch = log.newest_epoch();
        self.unfollow(key, cx);
        cx.trace.line(cx.at, || format!("{} {wish:?}", self.pid));
        if wish.is_older_than(last_epoch) {
            cx.coverage.note(Seen::OldLease);
            return;
        }
        if let Some(log) = self.disk.logs.get_mut(&key) {
            log.note_epoch(wish.epoch());
        }
        match wish {
            Wish::Lead(_) => self.lead(key, lease, cx),
            Wish::Follow(follower) => {
                if let Some(hosted) = self.hosted.get_mut(&key) {
                    hosted.role = Role::Follower(follower);
                }
                self.follow(key, follower, cx);
            }
            Wish::Hold => {}
        }
        cx.dirty.insert(key);
    }

    /// Deletes what it has of a partition, if its Lease, which was just read, says that others have it.
    pub(super) fn let_go(&mut self, key: PartitionKey, cx: &mut Cx) {
        let (log, lease) = (self.disk.logs.get(&key), self.coordination.lease(key));
        if let (Some(log), Some(lease)) = (log, lease)
            && is_let_go(self.me, &lease, log.newest_epoch())
        {
            self.delete(key, cx);
        }
    }

    fn delete(&mut self, key: PartitionKey, cx: &mut Cx) {
        cx.coverage.note(Seen::LetGo);
        cx.trace
            .line(cx.at, || format!("{} deletes {}", self.pid, key.1));
        if let Some(hosted) = self.hosted.remove(&key) {
            for waiter in hosted.waiters {
                cx.answer(waiter.request, Produced::Retry);
            }
        }
        self.unfollow(key, cx);
        self.disk.logs.remove(&key);
        cx.dirty.insert(key);
    }

    fn lead(&mut self, key: PartitionKey, lease: PartitionLease, cx: &mut Cx) {
        let (Some(hosted), Some(log)) = (self.hosted.get_mut(&key), self.disk.logs.get_mut(&key))
        else {
            return;
        };
        hosted.in_sync = lease.assignment.isr.len();
        let timing = Timing {
            lag: Duration::from_millis(cx.swarm.lag),
            pause: Duration::from_secs(1),
        };
        let before = log.high_watermark;
        let min_isr = cx.swarm.min_isr;
        let leader = Leader::new(
            self.me,
            timing,
            lease.clone(),
            min_isr,
            &*log,
            before,
            cx.now,
        );
        log.high_watermark = leader.high_watermark();
        if !leader.knows_latest() {
            cx.coverage.note(Seen::NotKnownLatest);
        }
        let span = (before, log.high_watermark);
        let isr = &lease.assignment.isr;
        cx.oracle.on_committed(key, self.pid, log, span, isr);
        hosted.role = Role::Leader(leader);
    }

    /// The epoch in which it leads the partition, if it does.
    pub(super) fn leads_in(&self, key: PartitionKey) -> Option<i32> {
        match &self.hosted.get(&key)?.role {
            Role::Leader(leader) => Some(leader.epoch()),
            Role::Follower(_) | Role::Neither => None,
        }
    }

    /// Has the leader, if this is one, take something in, and acts on what follows for the high watermark.
    pub(super) fn change_leader<T>(
        &mut self,
        key: PartitionKey,
        cx: &mut Cx,
        change: impl FnOnce(&mut Leader, &SimLog) -> T,
    ) -> Option<T> {
        let hosted = self.hosted.get_mut(&key)?;
        let log = self.disk.logs.get_mut(&key)?;
        let Role::Leader(leader) = &mut hosted.role else {
            return None;
        };
        let before = leader.high_watermark();
        let result = change(leader, log);
        let committed = leader.high_watermark();
        if committed == before {
            return Some(result);
        }
        log.high_watermark = log.high_watermark.max(committed);
        if committed < before {
            cx.oracle.fail("a leader's high watermark never falls", || {
                format!("{} from {before} to {committed}", self.pid)
            });
        }
        if leader.lease().assignment.isr.len() < cx.swarm.min_isr {
            cx.oracle
                .fail("nothing is committed below min.insync.replicas", || {
                    format!("{} to {committed} with {:?}", self.pid, leader.lease())
                });
        }
        let isr = &leader.lease().assignment.isr;
        let span = (before, committed);
        cx.oracle.on_committed(key, self.pid, log, span, isr);
        cx.dirty.insert(key);
        cx.trace
            .line(cx.at, || format!("{} commits to {committed}", self.pid));
        let (done, waiting) = std::mem::take(&mut hosted.waiters)
            .into_iter()
            .partition(|waiter| waiter.request.all && waiter.end <= committed);
        hosted.waiters = waiting;
        for waiter in done {
            cx.answer(waiter.request, Produced::At(waiter.base));
        }
        self.send_news(key, cx);
        Some(result)
    }

    /// A sync is done.
    pub(super) fn on_synced(
        &mut self,
        key: PartitionKey,
        (generation, end): (u64, i64),
        session: Option<(u64, u32)>,
        cx: &mut Cx,
    ) {
        let Some(log) = self.disk.logs.get_mut(&key) else {
            return;
        };
        if log.generation != generation {
            return;
        }
        log.synced(end);
        cx.oracle.on_durable(key, self.me.replica(), end);
        match session {
            Some((session, handle)) => self.on_appended(session, handle, end, cx),
            None => {
                self.change_leader(key, cx, |leader, _| leader.on_durable(end));
                self.answer_durable(key, end, cx);
            }
        }
        self.send_positions(cx);
    }

    fn answer_durable(&mut self, key: PartitionKey, end: i64, cx: &mut Cx) {
        let Some(hosted) = self.hosted.get_mut(&key) else {
            return;
        };
        hosted.waiters.retain(|waiter| {
            let done = !waiter.request.all && waiter.end <= end;
            if done {
                cx.answer(waiter.request, Produced::At(waiter.base));
            }
            !done
        });
    }

    pub(super) fn on_produce(&mut self, request: Produce, cx: &mut Cx) {
        if let Some(answer) = self.produce(request, cx) {
            cx.answer(request, answer);
        }
    }

    fn produce(&mut self, request: Produce, cx: &mut Cx) -> Option<Produced> {
        let key = request.key;
        let Some(hosted) = self.hosted.get_mut(&key) else {
            return Some(Produced::Retry);
        };
        let (Role::Leader(leader), Some(log)) = (&hosted.role, self.disk.logs.get_mut(&key)) else {
            return Some(Produced::Retry);
        };
        if request.all && hosted.in_sync < cx.swarm.min_isr {
            cx.coverage.note(Seen::TooFewInSync);
            return Some(Produced::Retry);
        }
        let mut batch = request.batch;
        let (base, end) = match log.check(&batch) {
            Ok(Verdict::Append) => {
                batch.base = log.log_end();
                batch.epoch = leader.epoch();
                (batch.base, batch.end())
            }
            Ok(Verdict::Duplicate {
                base_offset,
                last_offset,
            }) => {
                cx.coverage.note(Seen::DuplicateBatch);
                (base_offset, last_offset + 1)
            }
            Err(SequenceError::Duplicate { .. }) => return Some(Produced::Somewhere),
            Err(_) => {
                cx.coverage.note(Seen::SequenceGap);
                return Some(Produced::Gap);
            }
        };
        let known = match request.all {
            true => leader.high_watermark(),
            false => log.durable_end(),
        };
        if end <= known || (request.all && broken!(AcknowledgeUncommitted)) {
            return Some(Produced::At(base));
        }
        hosted.waiters.push(Waiter { end, base, request });
        if base == log.log_end() {
            log.append(batch);
            cx.trace
                .line(cx.at, || format!("{} appends {batch:?}", self.pid));
            cx.oracle.on_appended(key, self.pid, true, batch, log);
            cx.sync(self.pid, key, log, None);
            self.change_leader(key, cx, |leader, _| leader.on_appended(end));
            self.send_news(key, cx);
        }
        None
    }

    /// What a consumer gets, and from a leader of which epoch.
    pub(super) fn on_fetch(&self, key: PartitionKey, offset: i64, known: i32) -> (i32, Fetched) {
        let hosted = self.hosted.get(&key).map(|hosted| &hosted.role);
        let (Some(Role::Leader(leader)), Some(log)) = (hosted, self.disk.logs.get(&key)) else {
            return (known, Fetched::NotLeading);
        };
        let epoch = leader.epoch();
        // One that was deposed may lack what the consumer has read already.
        if epoch < known {
            return (known, Fetched::NotLeading);
        }
        if offset < log.log_start() || offset > log.log_end() {
            let (log_start, log_end) = (log.log_start(), log.log_end());
            return (epoch, Fetched::OutOfRange { log_start, log_end });
        }
        let end = match broken!(ShowUncommitted) {
            true => log.log_end(),
            false => log.high_watermark,
        };
        (epoch, Fetched::Batches(log.batches(offset, end).to_vec()))
    }
}

impl Cx<'_> {
    /// Tells a producer what became of its batch.
    pub(super) fn answer(&mut self, request: Produce, answer: Produced) {
        let delay = self.swarm.network.draw(self.rng);
        // Decided now, whenever it is heard.
        if let (Produced::At(base), true) = (answer, request.all) {
            let value = request.batch.value;
            self.queue
                .push(self.at, Event::Acknowledged(request.key, value, base));
        }
        self.queue
            .push(self.at + delay, Event::Produced(request, answer));
    }

    /// Has what was appended synced, in turn.
    pub(super) fn sync(
        &mut self,
        pid: Pid,
        key: PartitionKey,
        log: &mut SimLog,
        session: Option<(u64, u32)>,
    ) {
        let delay = match self.swarm.fsync {
            true => self.swarm.sync.draw(self.rng),
            false => 0,
        };
        log.synced_at = log.synced_at.max(self.at + delay);
        let event = Event::Synced {
            pid,
            key,
            sync: (log.generation, log.log_end()),
            session,
        };
        self.queue.push(log.synced_at, event);
    }
}
