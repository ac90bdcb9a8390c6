//! Idempotence: which sequences each producer has appended to one partition. Pure; the writer feeds it.
//!
//! The rules are Kafka's (KIP-98): a producer's batches carry (producer id, epoch, base sequence); the next batch must
//! begin where the last one ended; one of the last five batches sent again is answered with its original offset. Stricter than
//! Kafka in one case: an unknown producer must begin at sequence 0, so that a batch overtaken by its successor is noticed.
//!
//! And transactions: which are open here, and since where. Each has an epoch of its own (KIP-890): the marker that ends it fences its
//! epoch, so that what is still on its way can't become part of the next one, and a marker that comes twice changes nothing. A transaction
//! may write here only once its coordinator has [announced](Producers::announce) it, having noted before that its end is to be told here:
//! so none stays open for ever.

use std::collections::{BTreeSet, HashMap, VecDeque};

use millrace_record::{BatchHeader, EndMarker};

use super::transactions::Ended;

/// How many batches of a producer are remembered: as many as a client may have in flight.
const REMEMBERED: usize = 5;
/// Producers remembered for one partition; beyond that the one that was idle longest is forgotten. As many transactions may be announced.
const MAX_PRODUCERS: usize = 20_000;

/// Why a batch's sequence is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SequenceError {
    /// The batch does not follow the last one.
    #[error(
        "producer {producer_id} sent sequence {sequence} where {expected} is next; an earlier batch is missing"
    )]
    OutOfOrder {
        /// Whose batch.
        producer_id: i64,
        /// Its base sequence.
        sequence: i32,
        /// What would have been accepted.
        expected: i32,
    },
    /// The batch is in the log already, but its offset is no longer remembered.
    #[error(
        "producer {producer_id} sent sequence {sequence} again; it is in the log, its offset is no longer known"
    )]
    Duplicate {
        /// Whose batch.
        producer_id: i64,
        /// Its base sequence.
        sequence: i32,
    },
    /// A newer epoch has written.
    #[error("producer {producer_id} with epoch {epoch} is fenced: epoch {current} has taken over")]
    Fenced {
        /// Whose batch.
        producer_id: i64,
        /// Its epoch.
        epoch: i16,
        /// The epoch that has written.
        current: i16,
    },
    /// The transaction has ended.
    #[error(
        "the transaction of producer {producer_id} with epoch {epoch} has ended: nothing can be added to it"
    )]
    TransactionEnded {
        /// Whose batch.
        producer_id: i64,
        /// Its epoch.
        epoch: i16,
    },
    /// This broker has not been told of the transaction.
    #[error(
        "producer {producer_id} has no transaction here with epoch {epoch}; add the partition to the transaction, and send again"
    )]
    NotInTransaction {
        /// Whose batch.
        producer_id: i64,
        /// Its epoch.
        epoch: i16,
    },
    /// The producer has a transaction here, and the batch is not of it.
    #[error(
        "producer {producer_id} has an open transaction here; what it sends meanwhile must be part of it"
    )]
    OutsideTransaction {
        /// Whose batch.
        producer_id: i64,
    },
}

/// What to do with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Append,
    Duplicate { base_offset: i64, last_offset: i64 },
}

/// A batch that was appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Remembered {
    base_sequence: i32,
    last_sequence: i32,
    base_offset: i64,
    last_offset: i64,
}

/// What is known of one producer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Producer {
    epoch: i16,
    /// When it last wrote, milliseconds since the Unix epoch.
    last_written_ms: i64,
    /// Oldest first.
    batches: VecDeque<Remembered>,
    /// The sequence that comes next if all of them were truncated: that of the first one that was.
    expected: Option<i32>,
    /// Where its open transaction begins.
    open: Option<i64>,
    /// The transaction of this epoch has ended.
    ended: bool,
}

/// The producers of one partition.
#[derive(Debug, Default)]
pub(crate) struct Producers {
    producers: HashMap<i64, Producer>,
    /// Where open transactions begin, and whose they are.
    open: BTreeSet<(i64, i64)>,
    /// The epochs of transactions that may write here. Not kept: who is refused for it has the next leader told.
    announced: HashMap<i64, i16>,
}

impl Producers {
    /// The first offset of the oldest open transaction.
    pub(crate) fn first_open(&self) -> Option<i64> {
        self.open.first().map(|(offset, _)| *offset)
    }

    /// The transaction's coordinator lets it write here. An error if it has ended here already.
    pub(crate) fn announce(&mut self, producer_id: i64, epoch: i16) -> Result<(), SequenceError> {
        if let Some(producer) = self.producers.get(&producer_id) {
            producer.check_epoch(producer_id, epoch)?;
        }
        if self.announced.len() >= MAX_PRODUCERS {
            self.announced.clear();
        }
        self.announced.insert(producer_id, epoch);
        Ok(())
    }

    /// Whether the marker that ends this transaction is here already.
    pub(crate) fn has_ended(&self, producer_id: i64, epoch: i16) -> bool {
        let known = self.producers.get(&producer_id);
        known.is_some_and(|p| p.epoch > epoch || p.epoch == epoch && p.ended)
            && !broken!(ForgetEnds)
    }

    /// Checks a batch before it is appended.
    pub(crate) fn check(&self, header: &BatchHeader) -> Result<Verdict, SequenceError> {
        if header.producer_id < 0 || header.attributes.is_control() {
            return Ok(Verdict::Append);
        }
        let verdict = self.check_sequence(header)?;
        if verdict == Verdict::Append {
            self.check_transaction(header)?;
        }
        Ok(verdict)
    }

    fn check_transaction(&self, header: &BatchHeader) -> Result<(), SequenceError> {
        let (producer_id, epoch) = (header.producer_id, header.producer_epoch);
        let known = self.producers.get(&producer_id);
        let open = known.filter(|producer| producer.open.is_some());
        match (header.attributes.is_transactional(), open) {
            (true, Some(open)) if open.epoch == epoch => Ok(()),
            (true, None) if self.announced.get(&producer_id) == Some(&epoch) => Ok(()),
            (true, None) if broken!(TakeUnannounced) => Ok(()),
            (true, _) => Err(SequenceError::NotInTransaction { producer_id, epoch }),
            (false, Some(_)) => Err(SequenceError::OutsideTransaction { producer_id }),
            (false, None) => Ok(()),
        }
    }

    fn check_sequence(&self, header: &BatchHeader) -> Result<Verdict, SequenceError> {
        let (producer_id, sequence) = (header.producer_id, header.base_sequence);
        let out_of_order = |expected| SequenceError::OutOfOrder {
            producer_id,
            sequence,
            expected,
        };
        let Some(producer) = self.producers.get(&producer_id) else {
            return if sequence == 0 {
                Ok(Verdict::Append)
            } else {
                Err(out_of_order(0))
            };
        };
        producer.check_epoch(producer_id, header.producer_epoch)?;
        if header.producer_epoch > producer.epoch {
            return if sequence == 0 {
                Ok(Verdict::Append)
            } else {
                Err(out_of_order(0))
            };
        }
        let last = producer.batches.back();
        let next = last.map(|last| next_sequence(last.last_sequence));
        let Some(expected) = next.or(producer.expected) else {
            return Ok(Verdict::Append);
        };
        if sequence == expected {
            return Ok(Verdict::Append);
        }
        let original = producer
            .batches
            .iter()
            .find(|b| b.base_sequence == sequence && b.last_sequence == header.last_sequence());
        match original {
            Some(original) => Ok(Verdict::Duplicate {
                base_offset: original.base_offset,
                last_offset: original.last_offset,
            }),
            // Sequences wrap: "before" is the nearer half of the circle.
            None if sequence.wrapping_sub(expected) & i32::MAX > i32::MAX / 2 => {
                Err(SequenceError::Duplicate {
                    producer_id,
                    sequence,
                })
            }
            None => Err(out_of_order(expected)),
        }
    }

    /// Takes note of an appended batch: of what it marks, too, if it is a control batch. Adds the producers that it changes to `before`,
    /// with what was known of them, for [`Self::restore`]: its own, and whoever had to make room. Returns the transaction that it ends.
    pub(crate) fn appended(
        &mut self,
        header: &BatchHeader,
        marker: Option<EndMarker>,
        base_offset: i64,
        now_ms: i64,
        before: &mut Vec<(i64, Option<Producer>)>,
    ) -> Option<Ended> {
        if header.producer_id < 0 {
            return None;
        }
        if !self.producers.contains_key(&header.producer_id) {
            // Several have to go if a store holds more than there may be.
            while self.producers.len() >= MAX_PRODUCERS
                && let Some(id) = self.idlest()
            {
                before.push((id, self.producers.remove(&id)));
            }
        }
        let known = self.producers.get(&header.producer_id).cloned();
        before.push((header.producer_id, known));
        let producer = self
            .producers
            .entry(header.producer_id)
            .or_insert_with(|| Producer {
                epoch: header.producer_epoch,
                last_written_ms: now_ms,
                batches: VecDeque::with_capacity(REMEMBERED),
                expected: None,
                open: None,
                ended: false,
            });
        if header.producer_epoch != producer.epoch {
            producer.epoch = header.producer_epoch;
            producer.batches.clear();
            producer.expected = None;
            producer.ended = false;
        }
        producer.last_written_ms = now_ms;
        if header.attributes.is_control() {
            let marker = marker?;
            producer.ended = true;
            let first_offset = producer.open.take();
            self.announced.remove(&header.producer_id);
            let first_offset = first_offset?;
            self.open.remove(&(first_offset, header.producer_id));
            let last_offset = base_offset + i64::from(header.last_offset_delta);
            return Some(Ended {
                producer_id: header.producer_id,
                epoch: header.producer_epoch,
                aborted: marker == EndMarker::Abort,
                first_offset,
                last_offset,
                stable_end: self.first_open().unwrap_or(last_offset + 1),
            });
        }
        if header.attributes.is_transactional() && producer.open.is_none() {
            producer.open = Some(base_offset);
            self.open.insert((base_offset, header.producer_id));
        }
        // A batch that is replayed may be remembered already, since truncation stores what is known in the middle of a generation.
        producer.batches.retain(|b| b.last_offset < base_offset);
        if producer.batches.len() == REMEMBERED {
            producer.batches.pop_front();
        }
        producer.batches.push_back(Remembered {
            base_sequence: header.base_sequence,
            last_sequence: header.last_sequence(),
            base_offset,
            last_offset: base_offset + i64::from(header.last_offset_delta),
        });
        None
    }

    /// As if so many others had written since that it has to make room.
    #[cfg(test)]
    pub(crate) fn forget(&mut self, producer_id: i64) {
        if self
            .producers
            .get(&producer_id)
            .is_some_and(|p| p.open.is_none())
        {
            self.producers.remove(&producer_id);
        }
    }

    /// But for those with an open transaction, which must not be forgotten.
    fn idlest(&self) -> Option<i64> {
        let idle = self.producers.iter().filter(|(_, p)| p.open.is_none());
        let idlest = idle.min_by_key(|(_, p)| p.last_written_ms);
        idlest.map(|(id, _)| *id)
    }

    /// Undoes [`Self::appended`], for what it added to `before`, the last first.
    pub(crate) fn restore(&mut self, producer_id: i64, before: Option<Producer>) {
        let opened = before.as_ref().and_then(|producer| producer.open);
        let now = match before {
            Some(producer) => self.producers.insert(producer_id, producer),
            None => self.producers.remove(&producer_id),
        };
        if let Some(first) = now.and_then(|producer| producer.open) {
            self.open.remove(&(first, producer_id));
        }
        self.open.extend(opened.map(|first| (first, producer_id)));
    }

    /// Forgets the batches at and after `offset`, among them the markers of `reopened` transactions, the last first. Returns the producers
    /// that changed, with what was known of them, for [`Self::restore`], the last first.
    pub(crate) fn truncate(
        &mut self,
        offset: i64,
        reopened: &[Ended],
    ) -> Vec<(i64, Option<Producer>)> {
        let mut changed = Vec::new();
        for (id, producer) in &mut self.producers {
            let opened = producer.open.is_some_and(|first| first >= offset);
            if opened
                || producer
                    .batches
                    .iter()
                    .any(|batch| batch.last_offset >= offset)
            {
                changed.push((*id, Some(producer.clone())));
                let mut cut = producer.batches.iter().filter(|b| b.last_offset >= offset);
                let first = cut.next().map(|first| first.base_sequence);
                producer.expected = first.or(producer.expected);
                producer.batches.retain(|batch| batch.last_offset < offset);
                if let Some(first) = producer.open.take_if(|first| *first >= offset) {
                    self.open.remove(&(first, *id));
                }
            }
        }
        for ended in reopened {
            let Some(producer) = self.producers.get_mut(&ended.producer_id) else {
                continue;
            };
            changed.push((ended.producer_id, Some(producer.clone())));
            if producer.epoch != ended.epoch {
                producer.epoch = ended.epoch;
                producer.batches.clear();
                producer.expected = None;
            }
            producer.ended = false;
            if ended.first_offset < offset {
                producer.open = Some(ended.first_offset);
                self.open.insert((ended.first_offset, ended.producer_id));
            }
        }
        changed.reverse();
        changed
    }

    /// Forgets producers that last wrote before `deadline_ms` and have no open transaction. Returns their ids.
    pub(crate) fn expire(&mut self, deadline_ms: i64) -> Vec<i64> {
        let expired: Vec<i64> = self
            .producers
            .iter()
            .filter(|(_, p)| p.last_written_ms < deadline_ms && p.open.is_none())
            .map(|(id, _)| *id)
            .collect();
        for id in &expired {
            self.producers.remove(id);
        }
        expired
    }

    /// The stored form of one producer, if it is known.
    pub(crate) fn encode(&self, producer_id: i64) -> Option<Vec<u8>> {
        self.producers.get(&producer_id).map(Producer::encode)
    }

    /// Takes in the stored form of one producer. `None` if the value is damaged.
    pub(crate) fn load(&mut self, producer_id: i64, value: &[u8]) -> Option<()> {
        self.restore(producer_id, Some(Producer::decode(value)?));
        Some(())
    }
}

impl Producer {
    /// An error if the epoch is older than what was seen, or its transaction has ended.
    fn check_epoch(&self, producer_id: i64, epoch: i16) -> Result<(), SequenceError> {
        if epoch < self.epoch {
            let current = self.epoch;
            return Err(SequenceError::Fenced {
                producer_id,
                epoch,
                current,
            });
        }
        if epoch == self.epoch && self.ended && !broken!(TakeMoreAfterEnd) {
            return Err(SequenceError::TransactionEnded { producer_id, epoch });
        }
        Ok(())
    }

    /// format u8 = 3, epoch i16, last written i64, expected sequence i32 (-1: none), open transaction's first offset i64 (-1: none), ended u8,
    /// then for each batch: base sequence i32, last sequence i32, base offset i64, last offset i64; big-endian. Since format 3. Format 2 has
    /// nothing of transactions.
    fn encode(&self) -> Vec<u8> {
        let mut value = vec![3];
        value.extend_from_slice(&self.epoch.to_be_bytes());
        value.extend_from_slice(&self.last_written_ms.to_be_bytes());
        value.extend_from_slice(&self.expected.unwrap_or(-1).to_be_bytes());
        value.extend_from_slice(&self.open.unwrap_or(-1).to_be_bytes());
        value.push(self.ended.into());
        for batch in &self.batches {
            value.extend_from_slice(&batch.base_sequence.to_be_bytes());
            value.extend_from_slice(&batch.last_sequence.to_be_bytes());
            value.extend_from_slice(&batch.base_offset.to_be_bytes());
            value.extend_from_slice(&batch.last_offset.to_be_bytes());
        }
        value
    }

    fn decode(value: &[u8]) -> Option<Producer> {
        let (&format, rest) = value.split_first()?;
        let (epoch, rest) = rest.split_first_chunk::<2>()?;
        let (last_written, rest) = rest.split_first_chunk::<8>()?;
        let (expected, rest) = rest.split_first_chunk::<4>()?;
        let expected = i32::from_be_bytes(*expected);
        let (open, ended, rest) = match format {
            2 => (-1, 0, rest),
            3 => {
                let (open, rest) = rest.split_first_chunk::<8>()?;
                let (ended, rest) = rest.split_first()?;
                (i64::from_be_bytes(*open), *ended, rest)
            }
            _ => return None,
        };
        let (batches, []) = rest.as_chunks::<24>() else {
            return None;
        };
        let batch = |b: &[u8; 24]| {
            Some(Remembered {
                base_sequence: i32::from_be_bytes(b[..4].try_into().ok()?),
                last_sequence: i32::from_be_bytes(b[4..8].try_into().ok()?),
                base_offset: i64::from_be_bytes(b[8..16].try_into().ok()?),
                last_offset: i64::from_be_bytes(b[16..].try_into().ok()?),
            })
        };
        Some(Producer {
            epoch: i16::from_be_bytes(*epoch),
            last_written_ms: i64::from_be_bytes(*last_written),
            batches: batches.iter().map(batch).collect::<Option<_>>()?,
            expected: (expected >= 0).then_some(expected),
            open: (open >= 0).then_some(open),
            ended: ended != 0,
        })
    }
}

/// Sequences count from 0 to `i32::MAX` and begin again.
fn next_sequence(last: i32) -> i32 {
    if last == i32::MAX { 0 } else { last + 1 }
}

#[cfg(test)]
mod tests {
    use millrace_record::{BatchBuilder, BatchOptions, ProducerState};

    use super::*;

    fn header(producer_id: i64, epoch: i16, base_sequence: i32, records: usize) -> BatchHeader {
        let producer = Some(ProducerState {
            id: producer_id,
            epoch,
            base_sequence,
        });
        let mut builder = BatchBuilder::new(BatchOptions {
            producer,
            ..BatchOptions::default()
        });
        for _ in 0..records {
            builder.append(0, None, None, &[]);
        }
        BatchHeader::parse(&builder.build().unwrap()).unwrap()
    }

    fn producers_after(batches: &[(i16, i32, usize)]) -> Producers {
        let mut producers = Producers::default();
        let mut offset = 0;
        for &(epoch, sequence, records) in batches {
            let header = header(1, epoch, sequence, records);
            assert_eq!(producers.check(&header), Ok(Verdict::Append));
            producers.appended(&header, None, offset, 0, &mut Vec::new());
            offset += records as i64;
        }
        producers
    }

    #[test]
    fn a_batch_sent_again_is_answered_with_its_original_offset() {
        let producers = producers_after(&[(0, 0, 10), (0, 10, 5), (0, 15, 1)]);
        for (sequence, records, base_offset) in [(0, 10, 0), (10, 5, 10), (15, 1, 15)] {
            assert_eq!(
                producers.check(&header(1, 0, sequence, records)),
                Ok(Verdict::Duplicate {
                    base_offset,
                    last_offset: base_offset + records as i64 - 1,
                })
            );
        }
        assert_eq!(producers.check(&header(1, 0, 16, 3)), Ok(Verdict::Append));
    }

    #[test]
    fn a_gap_is_refused_and_an_unknown_producer_begins_at_zero() {
        let producers = producers_after(&[(0, 0, 10)]);
        let refused = |sequence, expected| {
            Err(SequenceError::OutOfOrder {
                producer_id: 1,
                sequence,
                expected,
            })
        };
        assert_eq!(producers.check(&header(1, 0, 11, 1)), refused(11, 10));
        assert_eq!(
            Producers::default().check(&header(1, 0, 7, 1)),
            refused(7, 0)
        );
    }

    #[test]
    fn an_old_duplicate_is_told_from_a_gap() {
        let batches: Vec<_> = (0..10).map(|i| (0, i, 1)).collect();
        let producers = producers_after(&batches);
        let old = SequenceError::Duplicate {
            producer_id: 1,
            sequence: 2,
        };
        assert_eq!(producers.check(&header(1, 0, 2, 1)), Err(old));
    }

    #[test]
    fn a_newer_epoch_fences_the_older_one() {
        let producers = producers_after(&[(0, 0, 10), (1, 0, 1)]);
        let fenced = SequenceError::Fenced {
            producer_id: 1,
            epoch: 0,
            current: 1,
        };
        assert_eq!(producers.check(&header(1, 0, 10, 1)), Err(fenced));
        assert!(producers.check(&header(1, 2, 5, 1)).is_err());
        assert_eq!(producers.check(&header(1, 2, 0, 1)), Ok(Verdict::Append));
    }

    #[test]
    fn sequences_wrap() {
        let mut producers = Producers::default();
        let header_at_the_end = header(1, 0, i32::MAX - 1, 2);
        producers.appended(&header_at_the_end, None, 0, 0, &mut Vec::new());
        assert_eq!(producers.check(&header(1, 0, 0, 1)), Ok(Verdict::Append));
    }

    #[test]
    fn the_stored_form_keeps_everything() {
        let producers = producers_after(&[(0, 0, 10), (0, 10, 5)]);
        let mut loaded = Producers::default();
        loaded.load(1, &producers.encode(1).unwrap()).unwrap();
        assert_eq!(loaded.producers, producers.producers);
        assert_eq!(loaded.load(2, &[1, 0]), None);
        assert_eq!(loaded.load(2, &producers.encode(1).unwrap()[..20]), None);
    }

    #[test]
    fn truncation_forgets_what_it_removed() {
        let mut producers = producers_after(&[(0, 0, 10), (0, 10, 5)]);
        let before = producers.producers.get(&1).cloned();
        assert_eq!(producers.truncate(12, &[]), vec![(1, before)]);
        assert_eq!(producers.check(&header(1, 0, 10, 5)), Ok(Verdict::Append));
        producers.truncate(0, &[]);
        // Also if nothing is left: what was cut off must come again from its first batch on.
        assert!(producers.check(&header(1, 0, 10, 5)).is_err());
        assert_eq!(producers.check(&header(1, 0, 0, 10)), Ok(Verdict::Append));
    }

    #[test]
    fn the_idlest_makes_room_and_comes_back_if_the_append_is_undone() {
        let mut producers = Producers::default();
        let last = MAX_PRODUCERS as i64 - 1;
        for id in 0..=last {
            producers.appended(
                &header(id, 0, 0, 1),
                None,
                id,
                1_000 - (id % 2),
                &mut Vec::new(),
            );
        }
        producers.appended(&header(3, 0, 1, 1), None, last + 1, 1, &mut Vec::new());
        let mut before = Vec::new();
        producers.appended(
            &header(last + 1, 0, 0, 1),
            None,
            last + 2,
            2_000,
            &mut before,
        );
        let changed: Vec<i64> = before.iter().map(|(id, _)| *id).collect();
        assert_eq!(changed, [3, last + 1]);
        assert!(producers.encode(3).is_none());
        for (id, producer) in before.into_iter().rev() {
            producers.restore(id, producer);
        }
        assert_eq!(producers.check(&header(3, 0, 2, 1)), Ok(Verdict::Append));
        assert!(producers.encode(last + 1).is_none());
    }

    #[test]
    fn a_batch_that_is_replayed_is_remembered_once() {
        let mut producers = producers_after(&[(0, 0, 1), (0, 1, 1), (0, 2, 1), (0, 3, 1)]);
        for sequence in 2..4 {
            let replayed = header(1, 0, sequence, 1);
            producers.appended(&replayed, None, i64::from(sequence), 0, &mut Vec::new());
        }
        let expected = producers_after(&[(0, 0, 1), (0, 1, 1), (0, 2, 1), (0, 3, 1)]);
        assert_eq!(producers.producers, expected.producers);
    }

    #[test]
    fn idle_producers_expire() {
        let mut producers = producers_after(&[(0, 0, 1)]);
        assert!(producers.expire(0).is_empty());
        assert_eq!(producers.expire(1), vec![1]);
        assert!(producers.encode(1).is_none());
    }
}
