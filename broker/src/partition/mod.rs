//! A replica that this broker hosts: a log, what this broker is to the partition, and who waits for something of it.
//!
//! The rules are [`replication`](crate::replication)'s; here is what calls them: the writer's threads when the log grows, sessions
//! of followers, the coordination when the partition's Lease changes, producers who wait for their records to be committed.

mod commit;
mod hosting;
mod peers;
mod signal;

use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use millrace_crds::coordination::{PartitionLease, Replica};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use self::commit::Waiters;
pub use self::{
    hosting::{Hosting, PartitionKey},
    peers::Peers,
    signal::{News, SessionSignal},
};
use crate::{
    replication::{
        Cut, Diverged, Follower, IsrStep, Leader, Me, Peer, Position, PositionCheck, Timing,
    },
    storage::{EpochEnd, LogListener, StorageError, StoredPartition},
};

/// How often either side of a session says something.
pub const HEARTBEAT: Duration = Duration::from_millis(500);
/// Without a word for so long the other side is taken for gone.
pub const SILENCE: Duration = Duration::from_secs(3);

/// What this broker is to a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// It leads in that epoch.
    Leader(i32),
    /// It follows the leader of that epoch.
    Follower(i32),
    /// Nothing, at the moment.
    Neither,
}

/// Fewer replicas are in sync than `acks=all` needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{in_sync} replicas are in sync, and the topic's minInSyncReplicas is {min_in_sync}")]
pub struct NotEnoughReplicas {
    /// In sync now.
    pub in_sync: usize,
    /// The topic's `minInSyncReplicas`.
    pub min_in_sync: usize,
}

/// This broker does not lead the partition in the epoch asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotLeading {
    /// The epoch in which it leads, if it does.
    pub epoch: Option<i32>,
}

/// A hosted replica.
pub struct HostedReplica {
    me: Me,
    timing: Timing,
    log: StoredPartition,
    state: Mutex<State>,
    /// As it was when last looked at; for `acks=all`.
    in_sync: AtomicUsize,
    min_in_sync: AtomicUsize,
}

struct State {
    role: Role,
    waiters: Waiters,
    /// The sessions of followers that are sent what the log gets.
    taps: Vec<Tap>,
}

// A leader is far larger than a follower; a broker has one or the other for each replica, and boxes would cost as much.
#[allow(clippy::large_enum_variant)]
enum Role {
    Leader(Leader),
    Follower(Follower),
    Neither,
}

struct Tap {
    follower: i32,
    handle: u32,
    session: Weak<SessionSignal>,
}

impl HostedReplica {
    /// Of a log that from now on is committed when this says so.
    pub fn new(me: Me, timing: Timing, log: StoredPartition) -> Arc<Self> {
        let hosted = Arc::new(Self {
            me,
            timing,
            log: log.clone(),
            state: Mutex::new(State {
                role: Role::Neither,
                waiters: Waiters::default(),
                taps: Vec::new(),
            }),
            in_sync: AtomicUsize::new(0),
            min_in_sync: AtomicUsize::new(0),
        });
        let listener: Weak<dyn LogListener> = Arc::downgrade(&hosted) as _;
        log.set_listener(listener);
        hosted
    }

    /// The log.
    pub fn log(&self) -> &StoredPartition {
        &self.log
    }

    /// What this broker is to the partition now.
    pub fn part(&self) -> Part {
        match &self.state.lock().role {
            Role::Leader(leader) => Part::Leader(leader.epoch()),
            Role::Follower(follower) => Part::Follower(follower.epoch),
            Role::Neither => Part::Neither,
        }
    }

    /// Stops being what it is: nothing more is appended, and whoever waits is told. The log stands still once the store
    /// [has settled](crate::storage::Store::settled).
    pub fn stop(&self) {
        self.log.resign();
        let mut state = self.state.lock();
        state.role = Role::Neither;
        let waiters = std::mem::take(&mut state.waiters);
        let taps = std::mem::take(&mut state.taps);
        drop(state);
        waiters.fail(&StorageError::NotLed);
        self.log.wake();
        for tap in &taps {
            tap.tell(News::Changed);
        }
    }

    /// Leads as the Lease says, from now on. The log must stand still.
    pub fn lead(
        &self,
        lease: PartitionLease,
        min_in_sync: usize,
        now: Instant,
    ) -> Result<(), StorageError> {
        let epoch = lease.held.epoch;
        self.in_sync
            .store(lease.assignment.isr.len(), Ordering::Release);
        self.min_in_sync.store(min_in_sync, Ordering::Release);
        let high_watermark = self.log.high_watermark();
        let leader = Leader::new(
            self.me,
            self.timing,
            lease,
            min_in_sync,
            &*self.log,
            high_watermark,
            now,
        );
        let committed = leader.high_watermark();
        self.state.lock().role = Role::Leader(leader);
        self.log.lead(epoch)?;
        self.log.advance_high_watermark(committed);
        Ok(())
    }

    /// Follows from now on. The log must stand still.
    pub fn follow(&self, follower: Follower) -> Result<(), StorageError> {
        self.state.lock().role = Role::Follower(follower);
        self.log.follow(follower.epoch)
    }

    /// The Lease changed, and the part in it is the same.
    pub fn adopt(&self, lease: &PartitionLease, min_in_sync: usize) {
        self.min_in_sync.store(min_in_sync, Ordering::Release);
        self.change_leader(|leader| {
            leader.set_min_isr(min_in_sync);
            leader.adopt(lease);
        });
    }

    /// Has the leader, if this is one, take something in, and acts on what follows for the high watermark.
    fn change_leader<T>(&self, change: impl FnOnce(&mut Leader) -> T) -> Option<T> {
        let mut state = self.state.lock();
        let State {
            role,
            waiters,
            taps,
        } = &mut *state;
        let Role::Leader(leader) = role else {
            return None;
        };
        let before = leader.high_watermark();
        let result = change(leader);
        let committed = leader.high_watermark();
        if committed > before {
            // Under the lock, so that who no longer leads can't raise it.
            self.log.advance_high_watermark(committed);
            let done = waiters.take(committed);
            for tap in taps.iter() {
                tap.tell(News::HighWatermark);
            }
            drop(state);
            done.succeed();
        }
        Some(result)
    }

    /// The same, if it leads in that epoch.
    fn change_leader_of<T>(&self, epoch: i32, change: impl FnOnce(&mut Leader) -> T) -> Option<T> {
        self.change_leader(|leader| (leader.epoch() == epoch).then(|| change(leader)))
            .flatten()
    }

    /// A follower says where its log ends; from now on its session is told of what is appended.
    pub fn on_position(
        &self,
        from: Replica,
        epoch: i32,
        position: &Position,
        now: Instant,
        (handle, session): (u32, &Arc<SessionSignal>),
    ) -> Result<PositionCheck, NotLeading> {
        let checked = self.change_leader_of(epoch, |leader| {
            leader.on_position(from, position, &*self.log, now)
        });
        let check = checked.ok_or_else(|| NotLeading {
            epoch: self.log.leader_epoch(),
        })?;
        if check == PositionCheck::Prefix {
            let mut state = self.state.lock();
            state.taps.retain(|tap| tap.follower != from.id);
            if matches!(&state.role, Role::Leader(leader) if leader.epoch() == epoch) {
                state.taps.push(Tap {
                    follower: from.id,
                    handle,
                    session: Arc::downgrade(session),
                });
            }
        }
        Ok(check)
    }

    /// A follower that was found to have a prefix has that much durably.
    pub fn on_acknowledged(&self, from: Replica, epoch: i32, durable_end: i64, now: Instant) {
        self.change_leader_of(epoch, |leader| {
            leader.on_acknowledged(from, durable_end, now)
        });
    }

    /// Waits until all before `end`, appended in this leader epoch, is committed. An error once that can't be told any more.
    pub async fn committed(&self, epoch: i32, end: i64) -> Result<(), StorageError> {
        // In this order: the epoch was led then, too, since none is led twice.
        if self.log.high_watermark() >= end && self.log.leader_epoch() == Some(epoch) {
            return Ok(());
        }
        let waiting = {
            let mut state = self.state.lock();
            match &state.role {
                Role::Leader(leader) if leader.epoch() == epoch => {
                    if leader.high_watermark() >= end {
                        return Ok(());
                    }
                }
                _ => return Err(StorageError::NotLed),
            }
            let (sender, waiting) = oneshot::channel();
            state.waiters.add(end, sender);
            waiting
        };
        waiting.await.unwrap_or(Err(StorageError::NotLed))
    }

    /// Whether this broker leads, with that replica in the ISR.
    pub fn is_in_isr(&self, replica: Replica) -> bool {
        let state = self.state.lock();
        matches!(&state.role, Role::Leader(leader) if leader.is_in_isr(replica))
    }

    /// Whether `acks=all` may be asked for.
    pub fn check_in_sync(&self) -> Result<(), NotEnoughReplicas> {
        let in_sync = self.in_sync.load(Ordering::Acquire);
        let min_in_sync = self.min_in_sync.load(Ordering::Acquire);
        match in_sync >= min_in_sync {
            true => Ok(()),
            false => Err(NotEnoughReplicas {
                in_sync,
                min_in_sync,
            }),
        }
    }

    /// Whether the high watermark is as high as any that consumers have seen.
    pub fn knows_latest(&self) -> bool {
        match &self.state.lock().role {
            Role::Leader(leader) => leader.knows_latest(),
            Role::Follower(_) | Role::Neither => false,
        }
    }

    /// What the leader, if this is one, has to do about the ISR. Looks who is in sync, too.
    pub fn isr_step(&self, now: Instant, peers: impl Fn(i32) -> Peer) -> Option<IsrStep> {
        let mut state = self.state.lock();
        let Role::Leader(leader) = &mut state.role else {
            return None;
        };
        self.in_sync
            .store(leader.in_sync(now, &peers), Ordering::Release);
        leader.isr_step(now, peers)
    }

    /// What a write or read of the Lease brought, if that is known.
    pub fn on_isr_answer(&self, epoch: i32, state: Option<&PartitionLease>, now: Instant) {
        self.change_leader_of(epoch, |leader| leader.on_isr_answer(state, now));
    }

    /// The API server refused to write the Lease.
    pub fn on_isr_refused(&self, epoch: i32, now: Instant) {
        self.change_leader_of(epoch, |leader| leader.on_isr_refused(now));
    }

    /// How many replicas are in the ISR and how many there are to be, if this broker leads.
    pub fn isr_size(&self) -> Option<(usize, usize)> {
        match &self.state.lock().role {
            Role::Leader(leader) => {
                let assignment = &leader.lease().assignment;
                Some((assignment.isr.len(), assignment.replicas.len()))
            }
            Role::Follower(_) | Role::Neither => None,
        }
    }

    /// Where to go on as a follower, if it is one in this epoch.
    pub fn position(&self, epoch: i32) -> Option<Position> {
        self.follower(epoch).map(|_| Follower::position(&*self.log))
    }

    /// Where to cut, as the leader's log is another.
    pub fn cut(&self, epoch: i32, diverging: EpochEnd) -> Result<Option<Cut>, Diverged> {
        match self.follower(epoch) {
            Some(follower) => {
                let high_watermark = self.log.high_watermark();
                follower.cut(epoch, diverging, &*self.log, high_watermark)
            }
            None => Ok(None),
        }
    }

    /// Where to begin anew, as the leader has nothing that this log could be compared with.
    pub fn begin_anew(&self, epoch: i32, log_start: i64) -> Result<Option<i64>, Diverged> {
        match self.follower(epoch) {
            Some(follower) => {
                let high_watermark = self.log.high_watermark();
                follower.begin_anew(epoch, log_start, &*self.log, high_watermark)
            }
            None => Ok(None),
        }
    }

    /// The leader of this epoch says how far its log is committed.
    pub fn on_leaders_high_watermark(&self, epoch: i32, high_watermark: i64) {
        let state = self.state.lock();
        if matches!(&state.role, Role::Follower(follower) if follower.epoch == epoch) {
            self.log
                .advance_high_watermark(Follower::high_watermark(high_watermark, &*self.log));
        }
    }

    fn follower(&self, epoch: i32) -> Option<Follower> {
        match &self.state.lock().role {
            Role::Follower(follower) if follower.epoch == epoch => Some(*follower),
            _ => None,
        }
    }
}

impl LogListener for HostedReplica {
    fn appended(&self, end: i64) {
        let mut state = self.state.lock();
        if let Role::Leader(leader) = &mut state.role {
            leader.on_appended(end);
            for tap in &state.taps {
                tap.tell(News::Appended);
            }
        }
    }

    fn durable(&self, end: i64) {
        self.change_leader(|leader| leader.on_durable(end));
    }
}

impl Tap {
    fn tell(&self, news: News) {
        if let Some(session) = self.session.upgrade() {
            session.mark(self.handle, news);
        }
    }
}

impl std::fmt::Debug for HostedReplica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostedReplica")
            .field("topic", &self.log.topic)
            .field("partition", &self.log.index)
            .field("part", &self.part())
            .finish()
    }
}
