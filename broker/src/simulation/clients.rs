//! Producers and consumers, as far as the protocol can tell them apart: producers repeat what was not acknowledged, in order, wherever they
//! believe the leader to be; consumers read on from where they are.

use std::collections::VecDeque;

use super::{
    log::Batch,
    process::{Produce, Produced},
};
use crate::partition::PartitionKey;

/// Without an answer for so long a batch is sent again.
const PATIENCE: u64 = 1_500;
/// Before a batch that was refused is sent again.
const BACKOFF: u64 = 100;

/// How long a gap before its first batch must have shown until a producer goes on under another id.
const GAP_PATIENCE: u64 = 5_000;

/// A batch that was not acknowledged yet.
#[derive(Debug)]
struct Unacknowledged {
    batch: Batch,
    /// All before this was acknowledged to someone when the batch was sent first.
    not_before: i64,
    resend_at: u64,
}

/// A producer for one partition.
#[derive(Debug)]
pub(super) struct Producer {
    pub(super) key: PartitionKey,
    /// Its producer id; -1: it is not idempotent, and so does not repeat anything.
    id: i64,
    /// `acks=all`, or the leader's word is enough.
    all: bool,
    next_sequence: i32,
    unacknowledged: VecDeque<Unacknowledged>,
    gap_since: Option<u64>,
    /// Where it believes the leader to be.
    pub(super) target: Option<i32>,
}

impl Producer {
    pub(super) fn new(key: PartitionKey, id: i64, all: bool) -> Self {
        Self {
            key,
            id,
            all,
            next_sequence: 0,
            unacknowledged: VecDeque::new(),
            gap_since: None,
            target: None,
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.unacknowledged.len()
    }

    pub(super) fn make(&mut self, value: u64, count: i32, not_before: i64, at: u64) {
        let is_idempotent = self.id >= 0;
        let sequence = match is_idempotent {
            true => self.next_sequence,
            false => -1,
        };
        self.next_sequence += count;
        let batch = Batch {
            base: 0,
            count,
            epoch: -1,
            producer: self.id,
            sequence,
            value,
        };
        self.unacknowledged.push_back(Unacknowledged {
            batch,
            not_before,
            resend_at: at,
        });
    }

    /// What is to be sent now: if the first is sent again, all of them, in order.
    pub(super) fn take_due(&mut self, client: usize, at: u64) -> Vec<Produce> {
        let first = self.unacknowledged.front();
        let again = first.is_some_and(|first| first.resend_at <= at);
        let mut due = Vec::new();
        for unacknowledged in &mut self.unacknowledged {
            if again || unacknowledged.resend_at <= at {
                unacknowledged.resend_at = at + PATIENCE;
                due.push(Produce {
                    client,
                    key: self.key,
                    batch: unacknowledged.batch,
                    all: self.all,
                });
            }
        }
        if self.id < 0 {
            // Whatever becomes of it.
            self.unacknowledged.clear();
        }
        due
    }

    /// The bound on the offset of a batch, if it waits for its acknowledgement.
    pub(super) fn not_before(&self, value: u64) -> Option<i64> {
        let mut all = self.unacknowledged.iter();
        let of = all.find(|unacknowledged| unacknowledged.batch.value == value);
        of.map(|unacknowledged| unacknowledged.not_before)
    }

    /// Takes an answer in. Whether it can't go on under its id: what came before is not there any more, or no one knows of it, as
    /// retention has removed it and the leader never saw it.
    pub(super) fn on_answer(&mut self, value: u64, answer: Produced, at: u64) -> bool {
        let mut all = self.unacknowledged.iter();
        let Some(position) = all.position(|u| u.batch.value == value) else {
            return false;
        };
        match answer {
            Produced::At(_) | Produced::Somewhere => {
                self.unacknowledged.remove(position);
                self.gap_since = None;
            }
            Produced::Retry | Produced::Gap => {
                self.target = None;
                self.unacknowledged[position].resend_at = at + BACKOFF;
            }
        }
        if answer != Produced::Gap || position > 0 {
            return false;
        }
        at - *self.gap_since.get_or_insert(at) >= GAP_PATIENCE
    }

    /// Begins anew under another id. What became of the batches that it has sent it does not learn.
    pub(super) fn renew(&mut self, id: i64) {
        *self = Self::new(self.key, id, self.all);
    }
}

/// A consumer of one partition.
#[derive(Debug)]
pub(super) struct Consumer {
    pub(super) key: PartitionKey,
    /// The offset that comes next.
    pub(super) next: i64,
    /// The newest leader epoch that it knows of.
    pub(super) epoch: i32,
}
