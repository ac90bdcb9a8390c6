//! What is to happen, in the order of time; what happens at one moment, in the order in which it was planned.

use std::collections::BTreeMap;

use k8s_openapi::api::coordination::v1::Lease;
use millrace_crds::coordination::Replica;

use super::{
    kube::{Call, Outcome},
    net::{Request, Response},
    process::{Fetched, Pid, Produce, Produced},
};
use crate::partition::PartitionKey;

/// How a call of the API server will fare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Done,
    /// It arrives, and its answer does not.
    AnswerLost,
    /// It does not arrive.
    Lost,
    /// An error that says nothing of whether it was done.
    Failed,
    Refused,
}

#[derive(Clone, Debug)]
pub(super) enum Event {
    Tick(Pid),
    Serve(Pid, PartitionKey),
    /// Up to an offset of a generation of a log all is on the disk. It was appended for a session, or for a producer.
    Synced {
        pid: Pid,
        key: PartitionKey,
        sync: (u64, i64),
        session: Option<(u64, u32)>,
    },
    /// A call comes to the API server, which its caller gives up at that time.
    Called {
        from: Pid,
        number: u64,
        call: Call,
        fate: Fate,
        until: u64,
    },
    Answered {
        to: Pid,
        number: u64,
        outcome: Outcome,
    },
    /// A process asks for all objects, to watch them from there on.
    List(Pid, u64),
    Listed {
        pid: Pid,
        stream: u64,
        objects: Vec<Lease>,
        next: usize,
    },
    Watch(Pid, u64),
    Connect {
        from: Pid,
        store: Replica,
        to: i32,
        /// Which process is looked for there.
        epoch: i32,
    },
    /// Or refused, if there is no session.
    Connected {
        pid: Pid,
        leader: i32,
        epoch: i32,
        session: Option<u64>,
    },
    Request(u64, Request),
    Response(u64, Response),
    /// A session's end is seen.
    Reset(Pid, u64),
    Producer(usize),
    Produce(i32, Produce),
    /// What the oracle hears the moment that it is decided.
    Acknowledged(PartitionKey, u64, i64),
    Produced(Produce, Produced),
    Consumer(usize),
    Fetch {
        consumer: usize,
        broker: i32,
        key: PartitionKey,
        offset: i64,
        epoch: i32,
    },
    Fetched {
        consumer: usize,
        key: PartitionKey,
        offset: i64,
        by: Pid,
        epoch: i32,
        fetched: Fetched,
    },
    Fault,
    Restart(i32),
    /// A process that stood still goes on, unless it is to stand still for longer.
    Resume(i32),
    ApiBack,
    Heal,
    LookWhetherHealed,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    events: BTreeMap<(u64, u64), Event>,
    pushed: u64,
}

impl Queue {
    pub(super) fn push(&mut self, at: u64, event: Event) {
        self.pushed += 1;
        self.events.insert((at, self.pushed), event);
    }

    pub(super) fn pop(&mut self) -> Option<(u64, Event)> {
        let ((at, _), event) = self.events.pop_first()?;
        Some((at, event))
    }
}
