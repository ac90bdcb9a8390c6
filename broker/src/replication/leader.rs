//! A leader: what its followers have, how far the log is committed, and who is in sync.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use millrace_crds::coordination::{PartitionLease, Replica};
use uuid::Uuid;

use super::{LogEnds, Me, Position, PositionCheck, check_position};

/// A follower that was heard of, and not for so long, is not waited for as long as one that lags: its session broke two seconds ago, and it
/// did not begin another. Heartbeats come with a session however much there is to copy.
const SILENT: Duration = Duration::from_secs(5);

/// How patient a leader is.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// A replica that has not had all of the log at any time within this long is no longer in sync (`replica.lag.time.max.ms`).
    pub lag: Duration,
    /// After an ISR change could not be written, or its outcome is unknown.
    pub pause: Duration,
}

/// What a leader knows of another broker beside what that says of the partition.
#[derive(Clone, Copy, Debug, Default)]
pub struct Peer {
    /// When it was last heard of in its present session as a follower.
    pub heard: Option<Instant>,
    /// Its process is known to be gone, or about to stop.
    pub gone: bool,
}

/// What to do about the partition's Lease.
#[derive(Clone, Debug, PartialEq)]
pub enum IsrStep {
    /// Write this state in place of the one that is known.
    Write(Box<PartitionLease>),
    /// Read the state from the API server itself.
    Read,
}

/// A replica that leads, in one leader epoch.
#[derive(Clone, Debug)]
pub struct Leader {
    me: Replica,
    timing: Timing,
    /// The newest state that is known to be written.
    lease: PartitionLease,
    min_isr: usize,
    /// Where the log ended when the epoch began.
    start: i64,
    log_end: i64,
    durable_end: i64,
    high_watermark: i64,
    followers: BTreeMap<i32, Progress>,
    pending: Option<Pending>,
    /// Not before this is another change proposed.
    rests_until: Option<Instant>,
}

/// How far a follower is.
#[derive(Clone, Copy, Debug)]
struct Progress {
    store: Uuid,
    /// What it has in common with this log, durably; `None` before its position was checked in this epoch.
    durable_end: Option<i64>,
    /// When it last had everything.
    caught_up: Instant,
    /// A moment, and where the log ended then.
    sample: (Instant, i64),
}

/// An ISR change of which it is not known whether it was written.
#[derive(Clone, Debug)]
struct Pending {
    isr: Vec<Replica>,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A write or read is under way.
    Asked,
    /// Its outcome is unknown: to be read, from then on.
    Unknown(Instant),
    /// Read, and unchanged: the write may still be on its way, unless another one comes first.
    Unchanged,
}

impl Leader {
    /// Leads as the Lease says, with a log that no one else appends to.
    pub fn new(
        me: Me,
        timing: Timing,
        lease: PartitionLease,
        min_isr: usize,
        log: &impl LogEnds,
        high_watermark: i64,
        now: Instant,
    ) -> Self {
        let me = me.replica();
        let log_end = log.log_end();
        // None has been heard of in this epoch: those in sync get the whole lag time from now on.
        let grace = |replica: &Replica| {
            let progress = Progress {
                store: replica.store,
                durable_end: None,
                caught_up: now,
                sample: (now, log_end),
            };
            (replica.id, progress)
        };
        let followers = lease.assignment.isr.iter().filter(|r| **r != me).map(grace);
        let mut leader = Self {
            me,
            timing,
            followers: followers.collect(),
            lease,
            min_isr,
            start: log_end,
            log_end,
            durable_end: log.durable_end(),
            high_watermark,
            pending: None,
            rests_until: None,
        };
        leader.advance();
        leader
    }

    /// The epoch in which it leads.
    pub fn epoch(&self) -> i32 {
        self.lease.held.epoch
    }

    /// Up to here the log is committed.
    pub fn high_watermark(&self) -> i64 {
        self.high_watermark
    }

    /// Whether it knows that all is committed which may be: before that it can't say what the latest offset is (KIP-207).
    pub fn knows_latest(&self) -> bool {
        self.high_watermark >= self.start
    }

    /// The newest state of the partition that it knows.
    pub fn lease(&self) -> &PartitionLease {
        &self.lease
    }

    /// The topic's `min.insync.replicas` now.
    pub fn set_min_isr(&mut self, min_isr: usize) {
        self.min_isr = min_isr;
        self.advance();
    }

    /// A state of the partition was seen, in which this replica leads in the same epoch. Older ones change nothing.
    pub fn adopt(&mut self, lease: &PartitionLease) {
        if lease.epochs() <= self.lease.epochs() {
            return;
        }
        self.lease = lease.clone();
        // What was proposed replaces an older state: it is written, or never will be.
        self.pending = None;
        self.advance();
    }

    /// The log got longer.
    pub fn on_appended(&mut self, log_end: i64) {
        self.log_end = self.log_end.max(log_end);
    }

    /// More of the log is durable.
    pub fn on_durable(&mut self, durable_end: i64) {
        self.durable_end = self.durable_end.max(durable_end);
        self.log_end = self.log_end.max(durable_end);
        self.advance();
    }

    /// A follower says where its log ends, in this epoch.
    pub fn on_position(
        &mut self,
        from: Replica,
        position: &Position,
        log: &impl LogEnds,
        now: Instant,
    ) -> PositionCheck {
        let check = check_position(position, log);
        if check == PositionCheck::Prefix || broken!(CountUnchecked) {
            self.on_acknowledged(from, position.durable_end, now);
        }
        check
    }

    /// A follower whose position was checked has that much durably, in this epoch.
    pub fn on_acknowledged(&mut self, from: Replica, durable_end: i64, now: Instant) {
        let log_end = self.log_end;
        let new = || Progress {
            store: from.store,
            durable_end: None,
            // Long ago, so to say: it has yet to catch up.
            caught_up: now.checked_sub(self.timing.lag).unwrap_or(now),
            sample: match broken!(JoinBelowEpochStart) {
                true => (now, self.high_watermark),
                false => (now, log_end),
            },
        };
        let progress = self.followers.entry(from.id).or_insert_with(new);
        if progress.store != from.store {
            *progress = new();
        }
        let end = progress
            .durable_end
            .map_or(durable_end, |known| known.max(durable_end));
        progress.durable_end = Some(end);
        if end >= progress.sample.1 {
            progress.caught_up = progress.caught_up.max(progress.sample.0);
            progress.sample = (now, log_end);
        }
        if end >= log_end {
            progress.caught_up = progress.caught_up.max(now);
        }
        self.advance();
    }

    /// How many replicas are in sync and within reach; `acks=all` needs as many as `min.insync.replicas`.
    pub fn in_sync(&self, now: Instant, peers: impl Fn(i32) -> Peer) -> usize {
        let isr = self.lease.assignment.isr.iter();
        isr.filter(|replica| **replica == self.me || self.keeps_up(**replica, now, &peers))
            .count()
    }

    /// Whether that replica is one of the ISR.
    pub fn is_in_isr(&self, replica: Replica) -> bool {
        self.lease.assignment.isr.contains(&replica)
    }

    /// What to do about the ISR, if anything.
    pub fn isr_step(&mut self, now: Instant, peers: impl Fn(i32) -> Peer) -> Option<IsrStep> {
        match &self.pending {
            Some(pending) => match pending.phase {
                Phase::Asked => None,
                Phase::Unknown(from) if now < from => None,
                Phase::Unknown(_) => {
                    self.set_phase(Phase::Asked);
                    Some(IsrStep::Read)
                }
                Phase::Unchanged => {
                    // Whichever of the two writes comes first, the other one fails.
                    let fence = self.next(self.lease.assignment.isr.clone());
                    self.set_phase(Phase::Asked);
                    Some(IsrStep::Write(Box::new(fence)))
                }
            },
            None if self.rests_until.is_some_and(|until| now < until) => None,
            None => {
                let isr = self.proposal(now, peers)?;
                let next = self.next(isr.clone());
                if !broken!(ShrinkBeforeWritten) {
                    self.pending = Some(Pending {
                        isr,
                        phase: Phase::Asked,
                    });
                } else {
                    self.lease.assignment.isr = isr;
                    self.advance();
                }
                Some(IsrStep::Write(Box::new(next)))
            }
        }
    }

    /// What a write or read brought: the state that is there now, if that is known.
    pub fn on_isr_answer(&mut self, state: Option<&PartitionLease>, now: Instant) {
        let Some(state) = state else {
            if broken!(RollBackUnknown) {
                self.pending = None;
            }
            self.set_phase(Phase::Unknown(now + self.timing.pause));
            return;
        };
        let is_newer = state.epochs() > self.lease.epochs();
        if state.held.epoch == self.epoch() {
            self.adopt(state);
        }
        if !is_newer && broken!(SkipFence) {
            self.pending = None;
        } else if !is_newer {
            self.set_phase(Phase::Unchanged);
        } else if state.held.epoch != self.epoch() {
            // Someone else leads: the one who looks after this replica hears of it, and no write can succeed any more.
            self.rests_until = Some(now + self.timing.lag);
        }
    }

    /// The API server refuses to write: nothing was written.
    pub fn on_isr_refused(&mut self, now: Instant) {
        self.rests_until = Some(now + self.timing.pause);
        self.set_phase(Phase::Unknown(now + self.timing.pause));
    }

    fn set_phase(&mut self, phase: Phase) {
        if let Some(pending) = &mut self.pending {
            pending.phase = phase;
        }
    }

    fn next(&self, isr: Vec<Replica>) -> PartitionLease {
        let mut next = self.lease.clone();
        next.assignment.isr = isr;
        next.assignment.partition_epoch += 1;
        next.assignment.write_id = Uuid::new_v4();
        next
    }

    /// The ISR as it should be, if it should be another.
    fn proposal(&self, now: Instant, peers: impl Fn(i32) -> Peer) -> Option<Vec<Replica>> {
        let assignment = &self.lease.assignment;
        let mut isr: BTreeMap<i32, Replica> = assignment.isr.iter().map(|r| (r.id, *r)).collect();
        for (id, progress) in &self.followers {
            let replica = Replica {
                id: *id,
                store: progress.store,
            };
            if assignment.replicas.contains(id)
                && isr.get(id) != Some(&replica)
                && self.may_join(progress)
                && self.keeps_up(replica, now, &peers)
            {
                isr.insert(*id, replica);
            }
        }
        let floor = self.min_isr.min(assignment.isr.len()).max(1);
        // Those that are gone first: the others may come back by themselves.
        let (gone, slow): (Vec<Replica>, Vec<Replica>) = isr
            .values()
            .filter(|replica| **replica != self.me && !self.keeps_up(**replica, now, &peers))
            .partition(|replica| peers(replica.id).gone);
        for replica in gone.iter().chain(&slow) {
            if isr.len() > floor {
                isr.remove(&replica.id);
            }
        }
        let is_in = |id: &i32| {
            let replica = isr.get(id);
            replica.is_some_and(|r| *r == self.me || self.keeps_up(*r, now, &peers))
        };
        // Who is to hold the partition no longer is let go once all have it who shall.
        if assignment.replicas.iter().all(is_in) {
            let former = assignment.isr.iter().filter(|r| **r != self.me);
            for replica in former.filter(|r| !assignment.replicas.contains(&r.id)) {
                if isr.len() > floor {
                    isr.remove(&replica.id);
                }
            }
        }
        let is_same = isr.len() == assignment.isr.len()
            && assignment.isr.iter().all(|r| isr.get(&r.id) == Some(r));
        if is_same {
            return None;
        }
        // In the order of the replicas; one that is no replica any more was dropped, or is not to be counted on.
        let ids: BTreeSet<i32> = assignment.replicas.iter().copied().collect();
        let listed = assignment.replicas.iter().filter_map(|id| isr.get(id));
        let others = isr.values().filter(|replica| !ids.contains(&replica.id));
        Some(listed.chain(others).copied().collect())
    }

    /// It has all that is committed, and all that may have been before this epoch.
    fn may_join(&self, progress: &Progress) -> bool {
        let needed = match broken!(JoinBelowEpochStart) {
            true => self.high_watermark,
            false => self.high_watermark.max(self.start),
        };
        progress.durable_end.is_some_and(|end| end >= needed)
    }

    fn keeps_up(&self, replica: Replica, now: Instant, peers: impl Fn(i32) -> Peer) -> bool {
        let peer = peers(replica.id);
        let Some(progress) = self.followers.get(&replica.id) else {
            return false;
        };
        let since = |then: Instant| now.saturating_duration_since(then);
        let is_silent = peer.heard.is_some_and(|heard| since(heard) >= SILENT);
        if peer.gone || is_silent || progress.store != replica.store {
            return false;
        }
        let has_all = progress.durable_end.is_some_and(|end| end >= self.log_end);
        let caught_up = match peer.heard.filter(|_| has_all) {
            Some(heard) => progress.caught_up.max(heard),
            None => progress.caught_up,
        };
        since(caught_up) < self.timing.lag
    }

    /// What a replica of the ISR has durably, as far as that is known.
    fn durable_end_of(&self, replica: &Replica) -> Option<i64> {
        if *replica == self.me {
            return Some(match broken!(CountUnsynced) {
                true => self.log_end,
                false => self.durable_end,
            });
        }
        let progress = self.followers.get(&replica.id)?;
        let is_known = progress.store == replica.store || broken!(IgnoreStoreIds);
        progress.durable_end.filter(|_| is_known)
    }

    /// Raises the high watermark to what all have that are in sync, or may be.
    fn advance(&mut self) {
        let isr = &self.lease.assignment.isr;
        let proposed = self.pending.as_ref().map(|pending| &pending.isr);
        let fewest = proposed.map_or(isr.len(), |proposed| proposed.len().min(isr.len()));
        if fewest < self.min_isr && !broken!(CommitBelowMinimum) {
            return;
        }
        let counted = isr.iter().chain(proposed.into_iter().flatten());
        let common = counted
            .map(|replica| self.durable_end_of(replica))
            .try_fold(i64::MAX, |least, end| Some(least.min(end?)));
        if let Some(common) = common.filter(|_| !isr.is_empty()) {
            self.high_watermark = self.high_watermark.max(common);
        }
    }
}
