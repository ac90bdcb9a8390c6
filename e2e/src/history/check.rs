//! The check. Pure: events in, a verdict out. What it must hold is argued in the [module](super).

use std::collections::{BTreeMap, HashMap};

use super::{Event, Outcome, Seen, Value};

/// Something that no correct log could have shown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// An acknowledged value is not in the log.
    #[error(
        "lost: {value} was acknowledged at offset {offset:?} after {ended} us, and is not among the {records} records of the log"
    )]
    Lost {
        /// What.
        value: Value,
        /// Where it was said to be.
        offset: Option<i64>,
        /// When it was acknowledged.
        ended: u64,
        /// How many there are.
        records: usize,
    },
    /// A value is in the log twice.
    #[error("duplicated: {value} is at offset {first} and at {second}")]
    Duplicated {
        /// What.
        value: Value,
        /// Where it was read first.
        first: i64,
        /// And where else.
        second: i64,
    },
    /// A producer's values are in the log in another order than that in which it sent them.
    #[error(
        "reordered: {earlier} was sent before {later}, and is at offset {earlier_at}, after it at {later_at}"
    )]
    Reordered {
        /// Sent first.
        earlier: Value,
        /// Its offset.
        earlier_at: i64,
        /// Sent later.
        later: Value,
        /// Its offset.
        later_at: i64,
    },
    /// An append that was done before another one began comes after it.
    #[error(
        "out of time: {done} was in the log after {by} us, {begun} was sent only after {invoked} us, and yet is at offset {begun_at}, before it at {done_at}"
    )]
    OutOfTime {
        /// Acknowledged, or read, before the other was sent.
        done: Value,
        /// Its offset.
        done_at: i64,
        /// When.
        by: u64,
        /// Sent afterwards.
        begun: Value,
        /// Its offset.
        begun_at: i64,
        /// When.
        invoked: u64,
    },
    /// A value is elsewhere than the producer was told, or the offset that it was told has another value.
    #[error("misplaced: {value} was acknowledged at offset {acked}, where {found} is")]
    Misplaced {
        /// What.
        value: Value,
        /// Where it should be.
        acked: i64,
        /// What is there.
        found: String,
    },
    /// One offset was read with two values.
    #[error("inconsistent: at offset {offset} one reader saw {one} and reader {reader} {other}")]
    Inconsistent {
        /// Where.
        offset: i64,
        /// What was read first.
        one: Seen,
        /// Who saw something else.
        reader: u32,
        /// What.
        other: Seen,
    },
    /// A reader was not shown some offsets.
    #[error("gap: reader {reader} was at offset {expected} and was given {found}")]
    Gap {
        /// Who.
        reader: u32,
        /// Where it was.
        expected: i64,
        /// What it was given.
        found: i64,
    },
    /// A reader was shown an offset again.
    #[error("step back: reader {reader} was at offset {expected} and was given {found}")]
    StepBack {
        /// Who.
        reader: u32,
        /// Where it was.
        expected: i64,
        /// What it was given.
        found: i64,
    },
    /// A value was read though its append had failed for certain.
    #[error("failed, yet read: {value} is at offset {offset}; its producer was told: {error}")]
    FailedYetRead {
        /// What.
        value: Value,
        /// Where.
        offset: i64,
        /// What the producer was told.
        error: String,
    },
    /// A value was read that no one sent to this partition.
    #[error("never sent: {seen} is at offset {offset}")]
    NeverSent {
        /// What.
        seen: Seen,
        /// Where.
        offset: i64,
    },
    /// A reader's next offset was refused.
    #[error("refused: reader {reader} was told: {error}")]
    Refused {
        /// Who.
        reader: u32,
        /// What.
        error: String,
    },
    /// The whole log was not read, so that lost records can't be told.
    #[error("not drained: {0}; what is lost can't be told from this history")]
    NotDrained(String),
    /// The history itself is wrong: a value must be sent only once.
    #[error("sent twice: {0}; the history is not usable")]
    SentTwice(Value),
}

/// What there was to check.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Appends that were acknowledged.
    pub acked: usize,
    /// Appends that failed for certain.
    pub failed: usize,
    /// Appends of unknown outcome.
    pub unknown: usize,
    /// Of those, the ones that are in the log.
    pub unknown_in_log: usize,
    /// Records read, by all readers together.
    pub read: usize,
    /// Partitions.
    pub partitions: usize,
}

/// The outcome of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Each with its partition.
    pub violations: Vec<(i32, Violation)>,
    /// What there was to check.
    pub counts: Counts,
}

/// Finds all that can't be.
pub fn check(events: &[Event]) -> Verdict {
    let mut partitions: BTreeMap<i32, Partition<'_>> = BTreeMap::new();
    // First all that was sent: a value may be read before its producer hears of it.
    for event in events {
        if let Event::Append { partition, .. } = event {
            partitions.entry(*partition).or_default().sent(event);
        }
    }
    for event in events {
        match event {
            Event::Append { .. } | Event::Fault { .. } => {}
            Event::Read {
                reader,
                partition,
                offset,
                values,
                at,
            } => {
                let partition = partitions.entry(*partition).or_default();
                for (offset, seen) in (*offset..).zip(values) {
                    partition.read(*reader, offset, seen, *at);
                }
            }
            Event::Refused {
                reader,
                partition,
                error,
                ..
            } => {
                let (reader, error) = (*reader, error.clone());
                let found = Violation::Refused { reader, error };
                let partition = partitions.entry(*partition).or_default();
                partition.violations.push(found);
            }
            Event::Drained { partition, end } => {
                partitions.entry(*partition).or_default().end = Some(*end);
            }
        }
    }
    let mut verdict = Verdict::default();
    verdict.counts.partitions = partitions.len();
    for (index, partition) in partitions {
        let found = partition.finish(&mut verdict.counts);
        verdict
            .violations
            .extend(found.into_iter().map(|found| (index, found)));
    }
    verdict
}

/// What is known of one partition.
#[derive(Default)]
struct Partition<'a> {
    appends: HashMap<Value, Append<'a>>,
    log: BTreeMap<i64, Entry<'a>>,
    offsets: HashMap<Value, i64>,
    next: HashMap<u32, i64>,
    end: Option<i64>,
    read: usize,
    violations: Vec<Violation>,
}

struct Append<'a> {
    invoked: u64,
    ended: u64,
    outcome: &'a Outcome,
}

/// What an offset has, by whoever read it first.
struct Entry<'a> {
    seen: &'a Seen,
    at: u64,
}

/// An append whose place in the log is known.
struct Placed {
    offset: i64,
    value: Value,
    invoked: u64,
    by: u64,
}

impl<'a> Partition<'a> {
    fn sent(&mut self, event: &'a Event) {
        let Event::Append {
            value,
            invoked,
            ended,
            outcome,
            ..
        } = event
        else {
            return;
        };
        let append = Append {
            invoked: *invoked,
            ended: *ended,
            outcome,
        };
        if self.appends.insert(*value, append).is_some() {
            self.violations.push(Violation::SentTwice(*value));
        }
    }

    fn read(&mut self, reader: u32, offset: i64, seen: &'a Seen, at: u64) {
        self.read += 1;
        let expected = *self.next.get(&reader).unwrap_or(&offset);
        self.next.insert(reader, offset + 1);
        if offset > expected {
            self.violations.push(Violation::Gap {
                reader,
                expected,
                found: offset,
            });
        } else if offset < expected {
            self.violations.push(Violation::StepBack {
                reader,
                expected,
                found: offset,
            });
        }
        match self.log.get_mut(&offset) {
            Some(entry) if entry.seen == seen => entry.at = entry.at.min(at),
            Some(entry) => {
                let one = entry.seen.clone();
                self.violations.push(Violation::Inconsistent {
                    offset,
                    one,
                    reader,
                    other: seen.clone(),
                });
            }
            None => {
                self.log.insert(offset, Entry { seen, at });
                self.first_seen(offset, seen);
            }
        }
    }

    fn first_seen(&mut self, offset: i64, seen: &Seen) {
        let sent = match seen {
            Seen::Whole(value) => self.appends.get(value).map(|append| (*value, append)),
            Seen::Foreign(_) => None,
        };
        let Some((value, append)) = sent else {
            let seen = seen.clone();
            self.violations.push(Violation::NeverSent { seen, offset });
            return;
        };
        if let Outcome::Failed { error } = append.outcome {
            let error = error.clone();
            self.violations.push(Violation::FailedYetRead {
                value,
                offset,
                error,
            });
        }
        match self.offsets.get(&value) {
            Some(first) => self.violations.push(Violation::Duplicated {
                value,
                first: *first,
                second: offset,
            }),
            None => {
                self.offsets.insert(value, offset);
            }
        }
    }

    fn finish(mut self, counts: &mut Counts) -> Vec<Violation> {
        counts.read += self.read;
        self.check_drained();
        let mut placed = Vec::with_capacity(self.appends.len());
        // In the order of values, so that one history always has one verdict.
        let mut appends: Vec<_> = self.appends.iter().collect();
        appends.sort_unstable_by_key(|(value, _)| **value);
        for (value, append) in appends {
            let read_at = self.offsets.get(value).copied();
            let acked = match append.outcome {
                Outcome::Acked { offset } => {
                    counts.acked += 1;
                    let (value, ended) = (*value, append.ended);
                    if read_at.is_none() && self.end.is_some() {
                        self.violations.push(Violation::Lost {
                            value,
                            offset: *offset,
                            ended,
                            records: self.log.len(),
                        });
                    }
                    self.violations
                        .extend(misplaced(value, *offset, read_at, &self.log));
                    *offset
                }
                Outcome::Failed { .. } => {
                    counts.failed += 1;
                    None
                }
                Outcome::Unknown { .. } => {
                    counts.unknown += 1;
                    counts.unknown_in_log += usize::from(read_at.is_some());
                    None
                }
            };
            let Some(offset) = read_at.or(acked) else {
                continue;
            };
            let read = self.log.get(&offset).map(|entry| entry.at);
            let acked = matches!(append.outcome, Outcome::Acked { .. }).then_some(append.ended);
            placed.push(Placed {
                offset,
                value: *value,
                invoked: append.invoked,
                by: read.into_iter().chain(acked).min().unwrap_or(u64::MAX),
            });
        }
        placed.sort_unstable_by_key(|placed| (placed.offset, placed.value));
        self.violations.extend(reordered(&placed));
        self.violations.extend(out_of_time(&placed));
        self.violations
    }

    /// Without the whole log nothing could be missed.
    fn check_drained(&mut self) {
        let missing = match self.end {
            None => Some("no reader went through all of the partition at the end".to_owned()),
            Some(end) => (0..end)
                .find(|offset| !self.log.contains_key(offset))
                .map(|offset| {
                    format!("the log ends at {end}, and no one has read offset {offset}")
                }),
        };
        self.violations.extend(missing.map(Violation::NotDrained));
    }
}

/// An acknowledgement that contradicts what was read.
fn misplaced(
    value: Value,
    acked: Option<i64>,
    read_at: Option<i64>,
    log: &BTreeMap<i64, Entry<'_>>,
) -> Option<Violation> {
    let acked = acked?;
    let there = log.get(&acked).map(|entry| entry.seen);
    if there == Some(&Seen::Whole(value)) || (there.is_none() && read_at.is_none()) {
        // As it should be; or it was never read, which is another matter.
        return None;
    }
    let found = there.map_or_else(|| "nothing".to_owned(), Seen::to_string);
    Some(Violation::Misplaced {
        value,
        acked,
        found,
    })
}

/// In offset order each producer's counter must rise.
fn reordered(placed: &[Placed]) -> Vec<Violation> {
    let mut last: HashMap<u32, &Placed> = HashMap::new();
    let mut found = Vec::new();
    for this in placed {
        match last.get(&this.value.producer) {
            Some(later) if later.value.counter > this.value.counter => {
                found.push(Violation::Reordered {
                    earlier: this.value,
                    earlier_at: this.offset,
                    later: later.value,
                    later_at: later.offset,
                });
            }
            _ => {
                last.insert(this.value.producer, this);
            }
        }
    }
    found
}

/// In offset order none may have been done before the latest invocation so far.
fn out_of_time(placed: &[Placed]) -> Vec<Violation> {
    let mut latest: Option<&Placed> = None;
    let mut found = Vec::new();
    for this in placed {
        if let Some(begun) = latest.filter(|begun| begun.invoked > this.by) {
            found.push(Violation::OutOfTime {
                done: this.value,
                done_at: this.offset,
                by: this.by,
                begun: begun.value,
                begun_at: begun.offset,
                invoked: begun.invoked,
            });
        }
        // Its own too: what is read before it is sent is as wrong.
        if this.invoked > this.by {
            found.push(Violation::OutOfTime {
                done: this.value,
                done_at: this.offset,
                by: this.by,
                begun: this.value,
                begun_at: this.offset,
                invoked: this.invoked,
            });
        }
        if latest.is_none_or(|latest| latest.invoked < this.invoked) {
            latest = Some(this);
        }
    }
    found
}
