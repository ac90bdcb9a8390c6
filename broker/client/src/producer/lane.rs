//! One partition's order of sending: sequences, what is in flight, what has to be sent again. A pure state machine: time and
//! answers come in, verdicts go out.
//!
//! The rules, after Kafka's `TransactionManager` (KIP-98, KIP-360), and where they differ:
//! - A unit keeps its sequences over all tries, so that the broker recognises it.
//! - After a failure nothing is sent until everything in flight has come back; then all is sent again in the old order. What
//!   followed the failed unit comes back as `OUT_OF_ORDER_SEQUENCE`, which is no failure of its own.
//! - `OUT_OF_ORDER_SEQUENCE` with nothing unresolved before it means a gap: an earlier unit failed for good, or the broker forgot
//!   the producer. The answer proves that the unit is not in the log, nor anything after it, so it is safe to go on
//!   under a new producer id, with sequences from 0. Only this partition changes its id; Kafka renews the whole producer.
//! - It proves nothing if the unit may have been appended already and the broker may have lost its leadership without knowing:
//!   then the unit keeps its sequence and is tried again until no such broker can be left.
//! - The first unit under an id, or at another leader, or after a failure that left open what was appended, goes alone: a broker
//!   that knows nothing of the id, or had to truncate all that it knew, may take any first sequence, so a second
//!   unit must not overtake the first.
//! - A unit that may have been appended parts into its batches: a leader that has only the first of them would take the whole
//!   for a duplicate.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use millrace_record::ProducerState;
use tokio::time::Instant;

use super::{
    batch::{Batch, Unit, sequence_after},
    delivery::{Ack, Completion},
};
use crate::{
    backoff,
    error::{Error, ErrorKind},
};

/// The state of one partition.
#[derive(Debug, Default)]
pub(crate) struct Lane {
    /// Its `base_sequence` is the next to be given out. Absent: not idempotent.
    identity: Option<ProducerState>,
    next_order: u64,
    /// Whether the leader has taken a unit under this id.
    established: bool,
    /// Waits for all in flight to come back.
    halted: bool,
    /// Whether the pause after this failure is set: what comes back after the first failed with it.
    backs_off: bool,
    needs_identity: bool,
    /// How long a gap that would cost a unit in doubt its sequence must have shown.
    patience: Duration,
    /// What is sent is part of a transaction: nothing of it may go on under another id.
    transactional: bool,
    gap_since: Option<Instant>,
    in_flight: VecDeque<Flight>,
    retry: VecDeque<Unit>,
    failures: u32,
    not_before: Option<Instant>,
}

#[derive(Debug)]
struct Flight {
    order: u64,
    deadline: Option<Instant>,
    batches: Vec<(u64, Arc<Completion>)>,
    /// Why the try before this one failed.
    last_error: Option<String>,
}

/// What to do with a unit that came back.
#[derive(Debug)]
pub(crate) enum Verdict {
    Done(Unit, Result<Ack, Error>),
    /// The lane keeps it, to send it again.
    Again,
}

impl Lane {
    /// `patience`: for how long an acknowledged unit may be missing at whoever takes itself for the leader. Zero: nothing
    /// acknowledged has to survive a leader.
    pub(crate) fn new(
        identity: Option<ProducerState>,
        patience: Duration,
        transactional: bool,
    ) -> Self {
        Lane {
            identity,
            patience,
            transactional,
            ..Lane::default()
        }
    }

    /// Whether a unit may be sent now, if there is one.
    pub(crate) fn can_send(&self, now: Instant) -> bool {
        let alone = self.identity.is_some() && !self.established;
        !self.halted
            && !self.needs_identity
            && self.not_before.is_none_or(|time| time <= now)
            && (!alone || self.in_flight.is_empty())
    }

    pub(crate) fn has_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Whether the last try failed.
    pub(crate) fn is_failing(&self) -> bool {
        self.failures > 0
    }

    /// The size of the unit that has to be sent again next.
    pub(crate) fn next_retry(&self) -> Option<usize> {
        self.retry.front().map(Unit::size)
    }

    /// When sending may go on after a failure.
    pub(crate) fn not_before(&self) -> Option<Instant> {
        self.not_before
    }

    /// Takes the next unit to be sent again.
    pub(crate) fn send_again(&mut self) -> Option<Unit> {
        let unit = self.retry.pop_front()?;
        self.depart(&unit);
        Some(unit)
    }

    /// Makes a unit of new batches. Nothing may wait to be sent again.
    pub(crate) fn send_new(&mut self, slot: usize, batches: Vec<Batch>) -> Unit {
        debug_assert!(self.retry.is_empty());
        let unit = Unit {
            slot,
            order: self.next_order,
            batches,
            producer: self.identity,
            is_in_doubt: false,
            last_error: None,
        };
        // A place for each batch, in case that they have to part.
        self.next_order += unit.batches.len() as u64;
        self.advance(&unit);
        self.depart(&unit);
        unit
    }

    fn advance(&mut self, unit: &Unit) {
        if let Some(identity) = &mut self.identity {
            identity.base_sequence = sequence_after(identity.base_sequence, unit.records());
        }
    }

    fn depart(&mut self, unit: &Unit) {
        self.in_flight.push_back(Flight {
            order: unit.order,
            deadline: unit.deadline(),
            batches: unit
                .batches
                .iter()
                .map(|batch| (batch.id, batch.completion.clone()))
                .collect(),
            last_error: unit.last_error.as_ref().map(Error::to_string),
        });
    }

    /// A unit came back from a broker.
    pub(crate) fn on_answer(
        &mut self,
        mut unit: Unit,
        answer: Result<Ack, Error>,
        now: Instant,
    ) -> Verdict {
        self.in_flight.retain(|flight| flight.order != unit.order);
        let idempotent = self.identity.is_some();
        let verdict = match answer {
            Ok(ack) => self.succeeded(unit, ack),
            Err(error) if idempotent && error.kind() == ErrorKind::DuplicateSequence => self
                .succeeded(
                    unit,
                    Ack {
                        base_offset: None,
                        log_append_time_ms: None,
                    },
                ),
            Err(error) if unit.is_settled() => Verdict::Done(unit, Err(error)),
            Err(error) if idempotent && error.kind() == ErrorKind::OutOfOrderSequence => {
                match self.is_unresolved_before(unit.order) {
                    false if self.transactional => Verdict::Done(unit, Err(error)),
                    is_unresolved => {
                        if !is_unresolved {
                            self.on_gap(&unit, &error, now);
                        }
                        self.keep(unit, error)
                    }
                }
            }
            Err(error) if error.is_retriable() => {
                self.back_off(&unit, &error, now);
                if leaves_doubt(&error) {
                    self.established = false;
                    unit.is_in_doubt = true;
                }
                if unit.deadline().is_some_and(|deadline| deadline <= now) {
                    unit.last_error = Some(error);
                    let expired = timed_out(&unit);
                    Verdict::Done(unit, Err(expired))
                } else if idempotent && unit.is_in_doubt {
                    self.keep_apart(unit, error)
                } else {
                    self.keep(unit, error)
                }
            }
            Err(error) if is_batchs_fault(&error) && unit.batches.len() > 1 => {
                // Nothing was appended. One at a time, so that only the bad one fails.
                self.keep_apart(unit, error)
            }
            Err(error) => Verdict::Done(unit, Err(error)),
        };
        if self.in_flight.is_empty() {
            self.halted = false;
            self.backs_off = false;
        }
        verdict
    }

    /// Sets the pause before the next try, once for all that fail together.
    fn back_off(&mut self, unit: &Unit, error: &Error, now: Instant) {
        if std::mem::replace(&mut self.backs_off, true) {
            return;
        }
        self.failures = self.failures.saturating_add(1);
        let delay = backoff::delay(error.kind(), self.failures);
        self.not_before = Some(now + delay);
        if let Some(batch) = unit.batches.first() {
            let (topic, partition) = (&batch.completion.topic, batch.completion.partition);
            tracing::warn!(%topic, partition, %error, ?delay, failures = self.failures, "retrying to produce");
        }
    }

    /// What is before the unit is not in the log of the broker that answered, and won't come.
    fn on_gap(&mut self, unit: &Unit, error: &Error, now: Instant) {
        let since = *self.gap_since.get_or_insert(now);
        if unit.is_in_doubt && now - since < self.patience {
            self.back_off(unit, error, now);
            return;
        }
        tracing::warn!(%error, order = unit.order, "a gap in the sequence: going on under a new producer id");
        self.needs_identity = true;
    }

    /// Another leader is known: what failed at the last one is tried there without delay.
    pub(crate) fn on_new_leader(&mut self) {
        self.established = false;
        self.failures = 0;
        self.not_before = None;
        self.gap_since = None;
    }

    fn succeeded(&mut self, unit: Unit, ack: Ack) -> Verdict {
        self.established = true;
        self.failures = 0;
        self.not_before = None;
        self.gap_since = None;
        Verdict::Done(unit, Ok(ack))
    }

    fn keep_apart(&mut self, unit: Unit, error: Error) -> Verdict {
        for single in split(unit) {
            self.keep(single, error.clone());
        }
        Verdict::Again
    }

    fn keep(&mut self, mut unit: Unit, error: Error) -> Verdict {
        self.halted = true;
        unit.last_error = Some(error);
        let at = self.retry.partition_point(|other| other.order < unit.order);
        self.retry.insert(at, unit);
        Verdict::Again
    }

    fn is_unresolved_before(&self, order: u64) -> bool {
        self.retry
            .iter()
            .map(|unit| unit.order)
            .chain(self.in_flight.iter().map(|f| f.order))
            .any(|o| o < order)
    }

    /// The id that must be replaced, once everything has come back.
    pub(crate) fn outworn_identity(&self) -> Option<i64> {
        (self.needs_identity && self.in_flight.is_empty()).then_some(self.identity?.id)
    }

    /// Goes on in a transaction with this identity. `false`: not yet, since something of the last one is still under way.
    pub(crate) fn enter(&mut self, identity: ProducerState) -> bool {
        let same = |known: ProducerState| (known.id, known.epoch) == (identity.id, identity.epoch);
        if self.identity.is_some_and(same) {
            return true;
        }
        if self.has_in_flight() {
            return false;
        }
        self.renew(identity);
        true
    }

    /// Goes on under a new id, with sequences from 0.
    pub(crate) fn renew(&mut self, identity: ProducerState) {
        self.identity = Some(ProducerState {
            base_sequence: 0,
            ..identity
        });
        self.established = false;
        self.needs_identity = false;
        self.gap_since = None;
        let mut retry = std::mem::take(&mut self.retry);
        for unit in &mut retry {
            unit.producer = self.identity;
            unit.is_in_doubt = false;
            self.advance(unit);
        }
        self.retry = retry;
    }

    /// Gives up what was not delivered in time. What is in flight stays so until it comes back, but its callers learn now; its
    /// batches' ids are returned as well.
    pub(crate) fn expire(&mut self, now: Instant) -> (Vec<Unit>, Vec<u64>) {
        let is_over = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        let mut expired = Vec::new();
        while self
            .retry
            .front()
            .is_some_and(|unit| is_over(unit.deadline()))
        {
            expired.extend(self.retry.pop_front());
            // What follows has had no failure of its own: waiting out the last pause could cost it its own deadline.
            self.failures = 0;
            self.not_before = None;
        }
        let mut answered = Vec::new();
        for flight in self
            .in_flight
            .iter_mut()
            .filter(|flight| is_over(flight.deadline))
        {
            let before = flight.last_error.take();
            let before = before.map_or_else(String::new, |error| {
                format!("; the try before failed: {error}")
            });
            for (id, completion) in flight.batches.drain(..) {
                let message = format!(
                    "no answer within delivery_timeout: the record may or may not be in the log{before}"
                );
                let error = Error::new(ErrorKind::TimedOut, message)
                    .at(&completion.topic, completion.partition);
                completion.complete(Err(error));
                answered.push(id);
            }
        }
        (expired, answered)
    }

    /// Gives up everything that waits to be sent again.
    pub(crate) fn take_retries(&mut self) -> Vec<Unit> {
        self.retry.drain(..).collect()
    }

    /// The batches in flight.
    pub(crate) fn in_flight(&self) -> impl Iterator<Item = &(u64, Arc<Completion>)> {
        self.in_flight.iter().flat_map(|flight| &flight.batches)
    }
}

/// Whether the broker may have appended what it answered with this. `NOT_LEADER` may come from a leader that lost its leadership
/// while followers were on their way to the unit.
fn leaves_doubt(error: &Error) -> bool {
    !matches!(
        error.kind(),
        ErrorKind::Throttled
            | ErrorKind::DiskFull
            | ErrorKind::NotEnoughReplicas
            | ErrorKind::NotInTransaction
    )
}

fn is_batchs_fault(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::RecordTooLarge
            | ErrorKind::InvalidBatch
            | ErrorKind::CorruptBatch
            | ErrorKind::InvalidTimestamp
    )
}

/// The same batches with the same sequences, each for itself.
fn split(unit: Unit) -> impl Iterator<Item = Unit> {
    let Unit {
        slot,
        order,
        batches,
        mut producer,
        is_in_doubt,
        ..
    } = unit;
    batches.into_iter().zip(order..).map(move |(batch, order)| {
        let single = Unit {
            slot,
            order,
            batches: vec![batch],
            producer,
            is_in_doubt,
            last_error: None,
        };
        if let Some(state) = &mut producer {
            state.base_sequence = sequence_after(state.base_sequence, single.records());
        }
        single
    })
}

/// The error of a unit whose time is over.
pub(crate) fn timed_out(unit: &Unit) -> Error {
    let cause = match &unit.last_error {
        Some(error) => format!("the last try failed: {error}"),
        None => "it was never sent".to_owned(),
    };
    let error = Error::new(
        ErrorKind::TimedOut,
        format!("not delivered within delivery_timeout; {cause}"),
    );
    match unit.batches.first() {
        Some(batch) => error.at(&batch.completion.topic, batch.completion.partition),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use millrace_record::{BatchBuilder, BatchOptions};

    use super::*;
    use crate::producer::batch::Payload;

    const ID: ProducerState = ProducerState {
        id: 1,
        epoch: 0,
        base_sequence: 0,
    };
    const PATIENCE: Duration = Duration::from_secs(10);
    const NEW_ID: ProducerState = ProducerState {
        id: 2,
        epoch: 0,
        base_sequence: 0,
    };

    fn batch(now: Instant, records: usize) -> Batch {
        let mut builder = BatchBuilder::new(BatchOptions::default());
        for _ in 0..records {
            builder.append(0, None, Some(b"v"), &[]);
        }
        Batch {
            id: 0,
            payload: Payload::Open(builder),
            completion: Completion::new("t".into(), 0),
            reserved: 0,
            opened: now,
            deadline: now + Duration::from_secs(120),
        }
    }

    fn error(kind: ErrorKind) -> Error {
        Error::new(kind, format!("{kind:?}"))
    }

    fn acked(base: i64) -> Result<Ack, Error> {
        Ok(Ack {
            base_offset: Some(base),
            log_append_time_ms: None,
        })
    }

    fn sequence(unit: &Unit) -> (i64, i32) {
        let producer = unit.producer.unwrap();
        (producer.id, producer.base_sequence)
    }

    /// A lane with its first unit acknowledged: 10 records.
    fn established(now: Instant) -> Lane {
        let mut lane = Lane::new(Some(ID), PATIENCE, false);
        let unit = lane.send_new(0, vec![batch(now, 10)]);
        assert!(matches!(
            lane.on_answer(unit, acked(0), now),
            Verdict::Done(_, Ok(_))
        ));
        lane
    }

    #[test]
    fn the_first_unit_under_an_id_goes_alone_and_later_ones_are_pipelined() {
        let now = Instant::now();
        let mut lane = Lane::new(Some(ID), PATIENCE, false);
        assert!(lane.can_send(now));
        let first = lane.send_new(0, vec![batch(now, 3), batch(now, 4)]);
        assert_eq!(sequence(&first), (1, 0));
        assert!(!lane.can_send(now));
        lane.on_answer(first, acked(0), now);
        for expected in [7, 8, 9] {
            assert!(lane.can_send(now));
            assert_eq!(
                sequence(&lane.send_new(0, vec![batch(now, 1)])),
                (1, expected)
            );
        }
    }

    #[test]
    fn a_failure_holds_back_everything_until_all_is_back_and_then_repeats_it_in_order() {
        let now = Instant::now();
        let mut lane = established(now);
        let units: Vec<Unit> = (0..3)
            .map(|_| lane.send_new(0, vec![batch(now, 5)]))
            .collect();
        let [first, second, third]: [Unit; 3] = units.try_into().unwrap();
        // Answers arrive in any order; the third's comes first.
        assert!(matches!(
            lane.on_answer(third, Err(error(ErrorKind::OutOfOrderSequence)), now),
            Verdict::Again
        ));
        assert!(matches!(
            lane.on_answer(first, Err(error(ErrorKind::Throttled)), now),
            Verdict::Again
        ));
        assert!(
            !lane.can_send(now + Duration::from_secs(5)),
            "the second is still in flight"
        );
        assert!(matches!(
            lane.on_answer(second, Err(error(ErrorKind::OutOfOrderSequence)), now),
            Verdict::Again
        ));
        assert!(lane.outworn_identity().is_none());
        assert!(!lane.can_send(now), "backs off");
        let later = now + Duration::from_secs(5);
        for expected in [10, 15, 20] {
            assert!(lane.can_send(later));
            assert_eq!(sequence(&lane.send_again().unwrap()), (1, expected));
        }
        assert!(lane.send_again().is_none());
    }

    #[test]
    fn a_gap_left_by_a_unit_that_failed_for_good_is_closed_by_a_new_id() {
        let now = Instant::now();
        let mut lane = established(now);
        let first = lane.send_new(0, vec![batch(now, 5)]);
        let second = lane.send_new(0, vec![batch(now, 6)]);
        let third = lane.send_new(0, vec![batch(now, 7)]);
        let verdict = lane.on_answer(first, Err(error(ErrorKind::RecordTooLarge)), now);
        assert!(
            matches!(verdict, Verdict::Done(_, Err(e)) if e.kind() == ErrorKind::RecordTooLarge)
        );
        lane.on_answer(second, Err(error(ErrorKind::OutOfOrderSequence)), now);
        assert_eq!(
            lane.outworn_identity(),
            None,
            "the third is still in flight"
        );
        lane.on_answer(third, Err(error(ErrorKind::OutOfOrderSequence)), now);
        assert_eq!(lane.outworn_identity(), Some(1));
        assert!(!lane.can_send(now));
        lane.renew(NEW_ID);
        let second = lane.send_again().unwrap();
        assert_eq!(sequence(&second), (2, 0));
        assert!(!lane.can_send(now), "alone again");
        lane.on_answer(second, acked(50), now);
        assert_eq!(sequence(&lane.send_again().unwrap()), (2, 6));
        assert_eq!(sequence(&lane.send_new(0, vec![batch(now, 1)])), (2, 13));
    }

    #[test]
    fn a_bad_batch_does_not_take_its_neighbours_with_it() {
        let now = Instant::now();
        let mut lane = established(now);
        let unit = lane.send_new(0, vec![batch(now, 2), batch(now, 3), batch(now, 4)]);
        let next = lane.send_new(0, vec![batch(now, 1)]);
        assert!(matches!(
            lane.on_answer(unit, Err(error(ErrorKind::RecordTooLarge)), now),
            Verdict::Again
        ));
        lane.on_answer(next, Err(error(ErrorKind::OutOfOrderSequence)), now);
        for expected in [10, 12, 15, 19] {
            let unit = lane.send_again().unwrap();
            assert_eq!((unit.batches.len(), sequence(&unit)), (1, (1, expected)));
        }
    }

    #[test]
    fn a_duplicate_is_a_success_without_offset() {
        let now = Instant::now();
        let mut lane = established(now);
        let unit = lane.send_new(0, vec![batch(now, 1)]);
        let verdict = lane.on_answer(unit, Err(error(ErrorKind::DuplicateSequence)), now);
        assert!(matches!(
            verdict,
            Verdict::Done(
                _,
                Ok(Ack {
                    base_offset: None,
                    ..
                })
            )
        ));
    }

    #[test]
    fn what_follows_an_expired_unit_keeps_its_sequence_until_the_broker_says_that_there_is_a_gap() {
        let now = Instant::now();
        let mut lane = established(now);
        let first = lane.send_new(0, vec![batch(now, 5)]);
        let second = lane.send_new(0, vec![batch(now + Duration::from_secs(60), 6)]);
        lane.on_answer(first, Err(error(ErrorKind::Transport)), now);
        lane.on_answer(second, Err(error(ErrorKind::Transport)), now);
        let later = now + Duration::from_secs(121);
        let (expired, _) = lane.expire(later);
        assert_eq!(expired.len(), 1);
        let message = timed_out(&expired[0]).to_string();
        assert!(
            message.contains("Transport"),
            "names the last failure: {message}"
        );
        // The second may be in the log after all: a new id would write it twice.
        for (after, renumbers) in [(0, false), (9, false), (10, true)] {
            let second = lane.send_again().unwrap();
            assert_eq!(sequence(&second), (1, 15));
            let at = later + Duration::from_secs(after);
            lane.on_answer(second, Err(error(ErrorKind::OutOfOrderSequence)), at);
            assert_eq!(lane.outworn_identity().is_some(), renumbers, "{after} s");
            assert_eq!(lane.not_before().is_some_and(|time| time > at), !renumbers);
        }
    }

    #[test]
    fn a_unit_in_doubt_is_renumbered_at_once_if_nothing_acknowledged_has_to_survive() {
        let now = Instant::now();
        let mut lane = Lane::new(Some(ID), Duration::ZERO, false);
        let unit = lane.send_new(0, vec![batch(now, 10)]);
        lane.on_answer(unit, acked(0), now);
        let unit = lane.send_new(0, vec![batch(now, 10)]);
        lane.on_answer(unit, Err(error(ErrorKind::Transport)), now);
        let unit = lane.send_again().unwrap();
        lane.on_answer(unit, Err(error(ErrorKind::OutOfOrderSequence)), now);
        assert_eq!(lane.outworn_identity(), Some(1));
    }

    #[test]
    fn at_a_new_leader_all_is_sent_again_without_delay_the_first_alone() {
        let now = Instant::now();
        let mut lane = established(now);
        let units: Vec<Unit> = (0..3)
            .map(|_| lane.send_new(0, vec![batch(now, 5)]))
            .collect();
        for unit in units {
            lane.on_answer(unit, Err(error(ErrorKind::NotLeader)), now);
        }
        assert!(!lane.can_send(now), "backs off until the leader is known");
        assert!(lane.can_send(now + Duration::from_millis(20)));
        lane.on_new_leader();
        assert!(lane.can_send(now));
        let first = lane.send_again().unwrap();
        assert_eq!(sequence(&first), (1, 10));
        assert!(
            !lane.can_send(now),
            "the second must not overtake the first"
        );
        lane.on_answer(first, acked(10), now);
        for expected in [15, 20] {
            assert!(lane.can_send(now));
            assert_eq!(sequence(&lane.send_again().unwrap()), (1, expected));
        }
    }

    #[test]
    fn what_fails_together_backs_off_once() {
        let now = Instant::now();
        let mut lane = established(now);
        let mut units: Vec<Unit> = (0..5)
            .map(|_| lane.send_new(0, vec![batch(now, 5)]))
            .collect();
        for longest in [50, 100, 200] {
            for unit in units.drain(..) {
                lane.on_answer(unit, Err(error(ErrorKind::Throttled)), now);
            }
            let delay = lane.not_before().unwrap() - now;
            assert!(delay <= Duration::from_millis(longest), "{delay:?}");
            units.extend(std::iter::from_fn(|| lane.send_again()));
        }
    }

    #[test]
    fn a_unit_that_may_have_been_appended_parts_into_its_batches_and_a_refused_one_does_not() {
        let now = Instant::now();
        for (kind, units) in [
            (ErrorKind::Transport, 3),
            (ErrorKind::TimedOut, 3),
            (ErrorKind::NotLeader, 3),
            (ErrorKind::ShuttingDown, 3),
            (ErrorKind::Throttled, 1),
            (ErrorKind::DiskFull, 1),
            (ErrorKind::NotEnoughReplicas, 1),
        ] {
            let mut lane = established(now);
            let unit = lane.send_new(0, vec![batch(now, 1), batch(now, 2), batch(now, 3)]);
            lane.on_answer(unit, Err(error(kind)), now);
            let retries = lane.take_retries();
            assert_eq!(retries.len(), units, "{kind:?}");
            let sequences: Vec<_> = retries.iter().map(sequence).collect();
            let expected = [(1, 10), (1, 11), (1, 13)];
            assert_eq!(sequences, expected[..units], "{kind:?}");
        }
    }

    #[test]
    fn callers_learn_of_a_time_out_while_the_unit_is_still_in_flight_and_it_is_not_sent_again() {
        let now = Instant::now();
        let mut lane = established(now);
        let unit = lane.send_new(0, vec![batch(now, 5)]);
        let completion = unit.batches[0].completion.clone();
        let later = now + Duration::from_secs(121);
        assert_eq!(lane.expire(later).1, [0]);
        assert_eq!(
            completion.outcome().unwrap().as_ref().unwrap_err().kind(),
            ErrorKind::TimedOut
        );
        let verdict = lane.on_answer(unit, Err(error(ErrorKind::Transport)), later);
        assert!(matches!(verdict, Verdict::Done(..)));
        assert!(lane.next_retry().is_none());
    }

    #[test]
    fn without_idempotence_nothing_is_numbered_and_sequence_errors_are_final() {
        let now = Instant::now();
        let mut lane = Lane::new(None, PATIENCE, false);
        let first = lane.send_new(0, vec![batch(now, 1)]);
        assert!(lane.can_send(now) && first.producer.is_none());
        let verdict = lane.on_answer(first, Err(error(ErrorKind::OutOfOrderSequence)), now);
        assert!(matches!(verdict, Verdict::Done(_, Err(_))));
    }
}
