//! A topic as a producer sees it: its partitions, and which of them a record goes to.
//!
//! Not responsible for hashing (`partitioner`) or for waiting records (`accumulator`).

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use millrace_record::key_partition;

use super::{
    accumulator::{Accumulator, Appended, Partition, Refused},
    record::Record,
};
use crate::{error::Error, partitioner::Partitioner};

/// One topic's partitions.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) topic: Arc<str>,
    pub(crate) partitions: Vec<Arc<Partition>>,
    sticky: AtomicUsize,
    turn: AtomicUsize,
}

impl Route {
    /// `partitions` must not be empty.
    pub(crate) fn new(topic: Arc<str>, partitions: Vec<Arc<Partition>>) -> Self {
        let start = fastrand::usize(..partitions.len().max(1));
        Route {
            topic,
            partitions,
            sticky: AtomicUsize::new(start),
            turn: AtomicUsize::new(start),
        }
    }

    /// Appends to the partition that the record or the partitioner names.
    pub(crate) fn append(
        &self,
        accumulator: &Accumulator,
        partitioner: Partitioner,
        record: &Record,
        timestamp_ms: i64,
        granted: &mut usize,
    ) -> Result<Appended, Refused> {
        let count = self.partitions.len();
        let index = match (record.partition, partitioner, &record.key) {
            (Some(partition), ..) => usize::try_from(partition).unwrap_or(usize::MAX),
            // A topic has far fewer partitions than 2^32.
            (None, Partitioner::KeyHash, Some(key)) => key_partition(key, count as u32) as usize,
            (None, Partitioner::RoundRobin, _) => {
                self.available(self.turn.fetch_add(1, Ordering::Relaxed))
            }
            (None, Partitioner::Random, _) => self.available(fastrand::usize(..count)),
            (None, Partitioner::Sticky | Partitioner::KeyHash, _) => {
                return self.append_sticky(accumulator, record, timestamp_ms, granted);
            }
        };
        let Some(partition) = self.partitions.get(index) else {
            let index = record.partition.unwrap_or(-1);
            return Err(Refused::Failed(Error::unknown_partition(
                &self.topic,
                index,
                count,
            )));
        };
        partition.append(accumulator, record, timestamp_ms, granted, false)
    }

    fn append_sticky(
        &self,
        accumulator: &Accumulator,
        record: &Record,
        timestamp_ms: i64,
        granted: &mut usize,
    ) -> Result<Appended, Refused> {
        let count = self.partitions.len();
        let index = self.sticky.load(Ordering::Relaxed);
        match self.partitions[index].append(accumulator, record, timestamp_ms, granted, count > 1) {
            Err(Refused::Switch) => {
                // Any but the present one.
                let next = self.available(index + 1 + fastrand::usize(..count - 1));
                self.sticky.store(next, Ordering::Relaxed);
                self.partitions[next].append(accumulator, record, timestamp_ms, granted, false)
            }
            done => done,
        }
    }

    /// The first partition from `start` on that has a leader; if none has, `start`.
    fn available(&self, start: usize) -> usize {
        let count = self.partitions.len();
        let is_available =
            |&index: &usize| self.partitions[index].available.load(Ordering::Relaxed);
        (0..count)
            .map(|step| start.wrapping_add(step) % count)
            .find(is_available)
            .unwrap_or(start % count)
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, time::Duration};

    use millrace_record::Compression;
    use tokio::time::Instant;

    use super::*;
    use crate::error::ErrorKind;

    fn fixture(partitions: usize, batch_bytes: usize) -> (Accumulator, Route) {
        let accumulator = Accumulator::new(
            Compression::None,
            batch_bytes,
            Duration::ZERO,
            Duration::from_secs(9),
            1 << 20,
            false,
        );
        let topic: Arc<str> = "t".into();
        let partition = |i| Arc::new(Partition::new(i, topic.clone(), i as i32, 1 << 20));
        (
            accumulator,
            Route::new(topic.clone(), (0..partitions).map(partition).collect()),
        )
    }

    fn send(fixture: &(Accumulator, Route), partitioner: Partitioner, record: &Record) -> i32 {
        fixture
            .1
            .append(&fixture.0, partitioner, record, 0, &mut 0)
            .unwrap()
            .delivery
            .partition()
    }

    #[test]
    fn equal_keys_go_to_the_partition_of_kafkas_hash() {
        let fixture = fixture(7, 1000);
        for key in ["21", "foobar", "abc"] {
            let record = Record::to("t").key(key);
            let expected = key_partition(key.as_bytes(), 7) as i32;
            assert_eq!(send(&fixture, Partitioner::KeyHash, &record), expected);
            assert_eq!(send(&fixture, Partitioner::KeyHash, &record), expected);
        }
    }

    #[test]
    fn sticky_fills_a_batch_before_it_moves_on_and_moves_on_when_the_batch_was_sent() {
        let fixture = fixture(4, 4000);
        let record = Record::to("t").value(vec![0; 1000]);
        let first: HashSet<i32> = (0..3)
            .map(|_| send(&fixture, Partitioner::Sticky, &record))
            .collect();
        assert_eq!(first.len(), 1);
        let second = send(&fixture, Partitioner::KeyHash, &record);
        assert!(!first.contains(&second), "the batch was full");
        let taken = fixture.1.partitions[second as usize].take(
            &fixture.0,
            Instant::now(),
            1 << 20,
            true,
            true,
        );
        assert_eq!(taken.len(), 1);
        assert_ne!(
            send(&fixture, Partitioner::Sticky, &record),
            second,
            "the batch was sent"
        );
    }

    #[test]
    fn round_robin_and_sticky_avoid_partitions_without_leader() {
        let fixture = fixture(3, 100);
        fixture.1.partitions[1]
            .available
            .store(false, Ordering::Relaxed);
        let record = Record::to("t").value("v");
        for partitioner in [Partitioner::RoundRobin, Partitioner::Random] {
            let used: HashSet<i32> = (0..100)
                .map(|_| send(&fixture, partitioner, &record))
                .collect();
            assert_eq!(used, HashSet::from([0, 2]), "{partitioner:?}");
        }
    }

    #[test]
    fn a_partition_that_does_not_exist_is_an_error() {
        let fixture = fixture(3, 100);
        for partition in [-1, 3] {
            let record = Record::to("t").partition(partition);
            let refused = fixture
                .1
                .append(&fixture.0, Partitioner::KeyHash, &record, 0, &mut 0)
                .unwrap_err();
            assert!(
                matches!(refused, Refused::Failed(e) if e.kind() == ErrorKind::UnknownPartition)
            );
        }
    }
}
