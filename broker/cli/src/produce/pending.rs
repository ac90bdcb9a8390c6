//! Keeps the deliveries that are on their way, in order, so that the first failure can be traced to its record.

use std::collections::VecDeque;

use futures::FutureExt;
use millrace_client::{Delivery, Error};

/// The most deliveries kept. The producer's own buffer bounds the bytes; this bounds the count, for tiny records.
const PENDING_MAX: usize = 1 << 18;

/// Deliveries in the order of their records.
#[derive(Default)]
pub(super) struct Pending {
    /// Each with the bytes of its key and value.
    deliveries: VecDeque<(Delivery, usize)>,
    /// Records settled, stored or not.
    settled: u64,
    stored: u64,
    stored_bytes: u64,
    failure: Option<(u64, Error)>,
}

impl Pending {
    /// Adds one, and waits for the oldest if there are too many. Returns whether all settled so far were stored.
    pub(super) async fn push(&mut self, delivery: Delivery, bytes: usize) -> bool {
        self.deliveries.push_back((delivery, bytes));
        if self.deliveries.len() > PENDING_MAX / 2 {
            self.settle_ready();
        }
        if self.deliveries.len() >= PENDING_MAX
            && let Some((oldest, bytes)) = self.deliveries.pop_front()
        {
            let outcome = oldest.await.map(|_| ());
            self.note(outcome, bytes);
        }
        self.failure.is_none()
    }

    /// Takes note of those at the front whose fate is known.
    pub(super) fn settle_ready(&mut self) {
        while let Some((oldest, bytes)) = self.deliveries.front_mut() {
            let Some(outcome) = oldest.now_or_never() else {
                return;
            };
            let bytes = *bytes;
            self.deliveries.pop_front();
            self.note(outcome.map(|_| ()), bytes);
        }
    }

    /// Waits for all.
    pub(super) async fn settle(&mut self) {
        while let Some((oldest, bytes)) = self.deliveries.pop_front() {
            let outcome = oldest.await.map(|_| ());
            self.note(outcome, bytes);
        }
    }

    /// Records known to be stored.
    pub(super) fn stored(&self) -> u64 {
        self.stored
    }

    /// Bytes of the keys and values of those.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    /// The first failure and the number of its record, from 1.
    pub(super) fn failure(&self) -> Option<&(u64, Error)> {
        self.failure.as_ref()
    }

    fn note(&mut self, outcome: Result<(), Error>, bytes: usize) {
        self.settled += 1;
        match outcome {
            Ok(()) => {
                self.stored += 1;
                self.stored_bytes += bytes as u64;
            }
            Err(error) => {
                self.failure.get_or_insert((self.settled, error));
            }
        }
    }
}
