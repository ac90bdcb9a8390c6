//! What brokers say to each other, and which links do not carry it. A follower's session with its leader is a stream of messages each
//! way: where one is lost, nothing follows it.

use std::collections::{BTreeMap, BTreeSet};

use millrace_crds::coordination::Replica;

use super::{log::Batch, process::Pid};
use crate::{partition::PartitionKey, replication::Position, storage::EpochEnd};

/// A session, and which way in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Way {
    ToLeader,
    ToFollower,
}

/// From a follower.
#[derive(Clone, Debug)]
pub(super) enum Request {
    Heartbeat,
    Position {
        handle: u32,
        key: PartitionKey,
        epoch: i32,
        position: Position,
    },
    Acknowledge {
        handle: u32,
        durable_end: i64,
    },
    Stopped {
        handle: u32,
    },
}

/// From a leader.
#[derive(Clone, Debug)]
pub(super) enum Response {
    Heartbeat,
    Data {
        handle: u32,
        high_watermark: i64,
        batches: Vec<Batch>,
    },
    NotLeading {
        handle: u32,
    },
    Diverging {
        handle: u32,
        end: EpochEnd,
    },
    OutOfRange {
        handle: u32,
        log_start: i64,
    },
}

/// Who follows whom in a session.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    pub(super) follower: Pid,
    pub(super) store: Replica,
    pub(super) leader: Pid,
}

#[derive(Debug, Default)]
pub(super) struct Net {
    /// Links that carry nothing, from one broker to another.
    cut: BTreeSet<(i32, i32)>,
    /// Brokers without the API server.
    pub(super) without_api: BTreeSet<i32>,
    sessions: BTreeMap<u64, Ends>,
    opened: u64,
    /// What is lost is lost with all that follows it.
    broken: BTreeSet<(u64, Way)>,
    /// When the last message will be there: the next one comes after it.
    arrivals: BTreeMap<(u64, Way), u64>,
}

impl Net {
    pub(super) fn cut(&mut self, from: i32, to: i32) {
        self.cut.insert((from, to));
    }

    pub(super) fn mend(&mut self) {
        self.cut.clear();
        self.without_api.clear();
    }

    pub(super) fn is_cut(&self, from: i32, to: i32) -> bool {
        self.cut.contains(&(from, to))
    }

    pub(super) fn open(&mut self, ends: Ends) -> u64 {
        self.opened += 1;
        self.sessions.insert(self.opened, ends);
        self.opened
    }

    pub(super) fn ends(&self, session: u64) -> Option<Ends> {
        self.sessions.get(&session).copied()
    }

    /// The sessions of a process.
    pub(super) fn of(&self, pid: Pid) -> Vec<u64> {
        let of = |ends: &Ends| ends.follower == pid || ends.leader == pid;
        let sessions = self.sessions.iter().filter(|(_, ends)| of(ends));
        sessions.map(|(session, _)| *session).collect()
    }

    pub(super) fn all(&self) -> Vec<u64> {
        self.sessions.keys().copied().collect()
    }

    pub(super) fn close(&mut self, session: u64) {
        self.sessions.remove(&session);
        for way in [Way::ToLeader, Way::ToFollower] {
            self.broken.remove(&(session, way));
            self.arrivals.remove(&(session, way));
        }
    }

    /// Nothing more gets through this way.
    pub(super) fn lose(&mut self, session: u64, way: Way) {
        if self.sessions.contains_key(&session) {
            self.broken.insert((session, way));
        }
    }

    /// When a message that takes `delay` is there; `None` if it is lost.
    pub(super) fn arrival(
        &mut self,
        session: u64,
        way: Way,
        at: u64,
        in_order: bool,
    ) -> Option<u64> {
        let ends = self.sessions.get(&session)?;
        let (from, to) = match way {
            Way::ToLeader => (ends.follower.broker, ends.leader.broker),
            Way::ToFollower => (ends.leader.broker, ends.follower.broker),
        };
        if self.cut.contains(&(from, to)) {
            self.lose(session, way);
        }
        if self.broken.contains(&(session, way)) {
            return None;
        }
        if !in_order {
            return Some(at);
        }
        let last = self.arrivals.entry((session, way)).or_default();
        *last = at.max(*last);
        Some(*last)
    }
}
