//! How the replicas of a partition stay the same: the protocol of leaders and followers as pure state machines. Events and the time go
//! in, decisions come out; there is no clock, socket, disk or task here, so that a simulator drives the very code that brokers run.
//!
//! # The protocol
//! Kafka's, with the partition's Lease in the part of its metadata log. Followers pull; the leader counts what each of them has made
//! durable, and the high watermark is what *all* in-sync replicas (ISR) have. A record is acknowledged (`acks=all`), and shown to
//! consumers, once the high watermark is above it. Any replica of the ISR has all of that, hence each may become leader.
//!
//! - A [`Leader`] leads in one leader epoch, for one process of a broker: after a restart it must be elected again, in a higher epoch. It
//!   accepts positions and acknowledgements only for its own epoch, from stores that it knows by id.
//! - A [`Follower`]'s log must be a prefix of its leader's before it counts. Before it gets its first record in an epoch the leader
//!   compares the last epoch of the follower's log with its own ([`check_position`]), and the follower cuts off what is not
//!   the leader's (KIP-101, KIP-279). It never cuts below what it knows to be committed: with clean elections that can't
//!   be needed, so if it is, records were lost elsewhere, and it stops rather than lose more.
//! - The leader changes the ISR by compare-and-swap on the partition's Lease. From the moment a change *may* have been written until
//!   it is known what became of it, the high watermark needs the replicas of both the old and the new ISR. A write with an
//!   unknown outcome is never taken back: the leader reads the Lease, and if it is unchanged it writes the same state again with a new
//!   partition epoch, since of two writes that replace one version only one can succeed.
//! - A replica leaves the ISR if it has not been caught up for `lag`, or is known to be gone; never so that fewer than
//!   `min.insync.replicas` are left (the rest of them may still be elected: KIP-966's eligible leader replicas are in the ISR here). It
//!   comes back once it has all that is committed, and all that the leader had when its epoch began: before that the leader does not
//!   know how much of it is committed.
//!
//! Nothing here is unsafe because a clock is wrong, a message comes late or twice, or two brokers think that they lead: time only decides
//! when a change is *proposed*.

mod follower;
mod following;
mod leader;
#[cfg(test)]
mod tests;

pub use follower::{Cut, Diverged, Follower};
pub use following::{Following, NotNext};
pub use leader::{IsrStep, Leader, Peer, Timing};

use millrace_crds::coordination::Replica;
use uuid::Uuid;

use crate::storage::{EpochEnd, PartitionLog};

/// This process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Me {
    /// The broker's id.
    pub id: i32,
    /// Its epoch.
    pub epoch: i32,
    /// What is on its volume.
    pub store: Uuid,
}

impl Me {
    /// As it stands in the ISR.
    pub fn replica(&self) -> Replica {
        Replica {
            id: self.id,
            store: self.store,
        }
    }
}

/// What the protocol has to know of a log.
pub trait LogEnds {
    /// The first offset held.
    fn log_start(&self) -> i64;
    /// The offset that the next record gets.
    fn log_end(&self) -> i64;
    /// Up to here all is as durable as configured.
    fn durable_end(&self) -> i64;
    /// The leader epoch of the last batch.
    fn last_epoch(&self) -> Option<i32>;
    /// The greatest epoch not above `epoch`, and where it ends.
    fn end_of_epoch(&self, epoch: i32) -> EpochEnd;
}

impl LogEnds for PartitionLog {
    fn log_start(&self) -> i64 {
        PartitionLog::log_start(self)
    }
    fn log_end(&self) -> i64 {
        PartitionLog::log_end(self)
    }
    fn durable_end(&self) -> i64 {
        PartitionLog::durable_end(self)
    }
    fn last_epoch(&self) -> Option<i32> {
        PartitionLog::last_epoch(self)
    }
    fn end_of_epoch(&self, epoch: i32) -> EpochEnd {
        PartitionLog::end_of_epoch(self, epoch)
    }
}

/// Where a follower's log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The offset that comes next.
    pub log_end: i64,
    /// The leader epoch of the last batch; `None` if the log is empty, and so like any other up to its end.
    pub last_epoch: Option<i32>,
    /// Up to here all is as durable as configured.
    pub durable_end: i64,
}

/// What a leader makes of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PositionCheck {
    /// The follower's log is a prefix of the leader's.
    Prefix,
    /// It is not.
    Diverging(EpochEnd),
    /// What comes next for the follower is no longer there, or nothing that its log could be compared with.
    OutOfRange,
}

/// Compares a follower's log with its leader's, by the last epoch: logs that have the same epoch at one offset are the same up to it.
pub fn check_position(position: &Position, log: &impl LogEnds) -> PositionCheck {
    if let Some(last_epoch) = position.last_epoch {
        let end = log.end_of_epoch(last_epoch);
        if end.epoch.is_none() && log.log_start() > 0 && !broken!(KeepIncomparable) {
            // Retention has removed all that was as old: whether it was the same no one can tell.
            return PositionCheck::OutOfRange;
        }
        if end.epoch != Some(last_epoch) || end.end_offset < position.log_end {
            return PositionCheck::Diverging(end);
        }
    } else if position.log_end > log.log_end() {
        // An empty log that begins where the leader's has not got to.
        return PositionCheck::OutOfRange;
    }
    if position.log_end < log.log_start() {
        return PositionCheck::OutOfRange;
    }
    PositionCheck::Prefix
}
