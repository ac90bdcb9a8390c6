//! Makes records and hands them to a producer: as fast as it takes them, or each when it is due.
//!
//! It runs on a thread of its own, because timers of the async runtime are too coarse for records that are microseconds
//! apart.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use clap::Args;
use millrace_client::{Bytes, Delivery, Error, ErrorKind, Producer, Record};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::failure::Failure;

/// Deliveries travel in groups, since one channel operation for each record would be measured too.
const GROUP: usize = 512;
const GROUPS_WAITING: usize = 256;
/// Payloads are cut from so many random letters.
const LETTERS: usize = 1 << 20;
/// A sleep shorter than this is not exact.
const SLEEP_MIN: Duration = Duration::from_micros(50);

/// How much of what.
#[derive(Debug, Args)]
pub(super) struct LoadOptions {
    /// The topic to write into
    pub(super) topic: String,

    /// How many records
    #[arg(long, value_name = "N")]
    records: Option<u64>,

    /// Stop after this time
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    duration: Option<Duration>,

    /// The size of each record's value
    #[arg(long, default_value = "100B", value_name = "SIZE")]
    pub(super) record_size: ByteSize,
}

impl LoadOptions {
    /// The bounds; `default` for the one that counts if neither is given.
    pub(super) fn bounds(&self, default: Bounds) -> Bounds {
        match (self.records, self.duration) {
            (None, None) => default,
            (records, duration) => Bounds {
                records: records.unwrap_or(u64::MAX),
                duration: duration.unwrap_or(Duration::MAX),
            },
        }
    }

    /// The value's size.
    pub(super) fn value_bytes(&self) -> Result<usize, Failure> {
        usize::try_from(self.record_size.as_u64())
            .ok()
            .filter(|bytes| *bytes <= LETTERS)
            .ok_or_else(|| {
                Failure::usage(format!(
                    "--record-size {} is more than {}",
                    self.record_size,
                    ByteSize(LETTERS as u64)
                ))
            })
    }
}

/// When a load ends: at whichever comes first.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) records: u64,
    pub(super) duration: Duration,
}

/// When records are due.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schedule {
    pub(super) start: Instant,
    /// Records a second; `None`: as fast as they are taken.
    pub(super) rate: Option<f64>,
}

impl Schedule {
    /// When the record is due, if there is a rate.
    pub(super) fn due(&self, index: u64) -> Option<Instant> {
        let rate = self.rate?;
        Some(self.start + Duration::from_secs_f64(index as f64 / rate))
    }
}

/// A record that was handed over.
pub(super) struct Sent {
    /// When it was due, or handed over if there is no rate.
    pub(super) due: Instant,
    pub(super) delivery: Delivery,
}

/// The thread, and the records that it has handed over, in order.
pub(super) struct Load {
    groups: mpsc::Receiver<Result<Vec<Sent>, Error>>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// The next group; `None` at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<Sent>>, Failure> {
        if let Some(group) = self.groups.recv().await {
            return Ok(Some(group?));
        }
        match self.thread.take().map(JoinHandle::join) {
            Some(Err(_)) => Err(Failure::new("the thread that makes the records died")
                .hint("this is a fault of millrace: report it")),
            _ => Ok(None),
        }
    }
}

/// Starts the thread. `value` makes the value of each record.
pub(super) fn start(
    producer: Producer,
    topic: &str,
    bounds: Bounds,
    schedule: Schedule,
    mut value: impl FnMut(u64) -> Bytes + Send + 'static,
) -> Load {
    let (sender, groups) = mpsc::channel(GROUPS_WAITING);
    let runtime = Handle::current();
    let topic: Arc<str> = topic.into();
    let thread = thread::spawn(move || {
        // The producer starts tasks now and then.
        let _inside = runtime.enter();
        let mut group = Vec::with_capacity(GROUP);
        for index in 0..bounds.records {
            let now = Instant::now();
            let due = schedule.due(index).unwrap_or(now);
            if due.max(now).saturating_duration_since(schedule.start) >= bounds.duration {
                break;
            }
            let early = due.saturating_duration_since(now);
            if group.len() >= GROUP || (!group.is_empty() && early > Duration::ZERO) {
                let full = std::mem::replace(&mut group, Vec::with_capacity(GROUP));
                if sender.blocking_send(Ok(full)).is_err() {
                    return;
                }
            }
            if early >= SLEEP_MIN {
                thread::sleep(early);
            }
            let record = Record::to(topic.clone()).value(value(index));
            match hand_over(&runtime, &producer, record) {
                Ok(delivery) => group.push(Sent { due, delivery }),
                Err(error) => {
                    let _ = sender.blocking_send(Err(error));
                    return;
                }
            }
        }
        let _ = sender.blocking_send(Ok(group));
    });
    Load {
        groups,
        thread: Some(thread),
    }
}

/// Waits if there is no room.
fn hand_over(runtime: &Handle, producer: &Producer, record: Record) -> Result<Delivery, Error> {
    let refused = match producer.try_send(record) {
        Ok(delivery) => return Ok(delivery),
        Err(refused) => refused,
    };
    match refused.error.kind() {
        ErrorKind::BufferFull | ErrorKind::NotReady => {
            runtime.block_on(producer.send(refused.record))
        }
        _ => Err(refused.error),
    }
}

/// Random capital letters to cut values from, as Kafka's own tool makes them.
pub(super) fn letters() -> Bytes {
    (0..LETTERS).map(|_| fastrand::u8(b'A'..=b'Z')).collect()
}

/// `bytes` letters from anywhere.
pub(super) fn cut(letters: &Bytes, bytes: usize) -> Bytes {
    let at = fastrand::usize(..=letters.len().saturating_sub(bytes));
    letters.slice(at..(at + bytes).min(letters.len()))
}

/// A rate: more than nothing.
pub(super) fn parse_rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate.is_finite() && rate > 0.0 => Ok(rate),
        _ => Err("write how many records a second, such as 20000".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_due_at_even_distances_from_the_start() {
        let start = Instant::now();
        let schedule = Schedule {
            start,
            rate: Some(20_000.0),
        };
        for (index, micros) in [
            (0, 0),
            (1, 50),
            (20_000, 1_000_000),
            (72_000_000, 3_600_000_000),
        ] {
            let due = schedule.due(index).unwrap();
            assert_eq!(due - start, Duration::from_micros(micros), "record {index}");
        }
        assert_eq!(Schedule { start, rate: None }.due(7), None);
    }

    #[test]
    fn values_have_their_size_up_to_the_largest() {
        let letters = letters();
        for bytes in [0, 1, 100, LETTERS] {
            let value = cut(&letters, bytes);
            assert_eq!(value.len(), bytes);
            assert!(value.iter().all(u8::is_ascii_uppercase));
        }
    }

    #[test]
    fn a_rate_is_a_positive_number() {
        assert_eq!(parse_rate("20000"), Ok(20_000.0));
        for text in ["0", "-1", "inf", "NaN", "fast"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }
}
