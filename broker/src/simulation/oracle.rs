//! Knows everything, takes no part, and says what must not have happened. The invariants are those of the protocol's page:
//! what the records are that were ever committed, who appended in which epoch, what producers were told and consumers have read.
//!
//! An unclean election may lose committed records: from then on, of that partition, only those invariants are checked that hold all the same.

use std::collections::BTreeMap;

use millrace_crds::coordination::{PartitionLease, Replica};

use super::{
    log::{Batch, SimLog},
    process::Pid,
};
use crate::{partition::PartitionKey, replication::LogEnds};

/// Something happened that must not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Violation {
    pub(super) invariant: &'static str,
    pub(super) detail: String,
}

/// Where a batch is: its epoch and its first offset.
type Place = (i32, i64);

/// What is known of a partition.
#[derive(Debug, Default)]
struct History {
    /// All batches that ever were below the high watermark of a leader, by their first offset.
    committed: BTreeMap<i64, Batch>,
    end: i64,
    /// The sequence that comes next of each producer in what is committed.
    sequences: BTreeMap<i64, i32>,
    /// After the last record that a producer was told is committed.
    acknowledged: i64,
    /// Who appended in an epoch.
    leaders: BTreeMap<i32, Pid>,
    /// Each batch by its epoch and offset, and the one before it.
    written: BTreeMap<Place, (Batch, Option<Place>)>,
    /// How far each store ever had the log on the disk.
    durable: BTreeMap<Replica, i64>,
    may_have_lost: bool,
}

#[derive(Debug, Default)]
pub(super) struct Oracle {
    partitions: BTreeMap<PartitionKey, History>,
    pub(super) violation: Option<Violation>,
}

impl Oracle {
    pub(super) fn fail(&mut self, invariant: &'static str, detail: impl FnOnce() -> String) {
        if self.violation.is_none() {
            self.violation = Some(Violation {
                invariant,
                detail: detail(),
            });
        }
    }

    fn history(&mut self, key: PartitionKey) -> &mut History {
        self.partitions.entry(key).or_default()
    }

    /// The offset after the last record that ever was committed.
    pub(super) fn committed_end(&self, key: PartitionKey) -> i64 {
        self.partitions.get(&key).map_or(0, |history| history.end)
    }

    /// The offset after the last record that a producer knows to be committed.
    pub(super) fn acknowledged_end(&self, key: PartitionKey) -> i64 {
        let history = self.partitions.get(&key);
        history.map_or(0, |history| history.acknowledged)
    }

    /// Whether committed records may be gone, as the topic allows.
    pub(super) fn may_have_lost(&self, key: PartitionKey) -> bool {
        let history = self.partitions.get(&key);
        history.is_some_and(|history| history.may_have_lost)
    }

    /// The controller's Lease may have been written.
    pub(super) fn on_controller_epoch(&mut self, old: Option<i32>, new: Option<i32>) {
        if new < old {
            self.fail("the controller's epoch never falls", || {
                format!("from {old:?} to {new:?}")
            });
        }
    }

    /// A partition's Lease was written in place of another.
    pub(super) fn on_lease(
        &mut self,
        key: PartitionKey,
        old: Option<&PartitionLease>,
        new: &PartitionLease,
    ) {
        let Some(old) = old else { return };
        if new.epochs() <= old.epochs() || new.held.epoch < old.held.epoch {
            self.fail("the epochs of a Lease rise", || format!("{old:?} {new:?}"));
        }
        if new.assignment.partition_epoch != old.assignment.partition_epoch + 1 {
            self.fail("each write raises the partition epoch by one", || {
                format!("{old:?} {new:?}")
            });
        }
        if new.assignment.leader != old.assignment.leader
            && new.assignment.leader.is_some()
            && new.held.epoch == old.held.epoch
        {
            self.fail("each leader has an epoch of its own", || {
                format!("{old:?} {new:?}")
            });
        }
        if new.assignment.last_unclean_epoch != old.assignment.last_unclean_epoch {
            self.history(key).may_have_lost = true;
        }
    }

    /// A batch was appended to the log of a process, which leads if it gave the batch its offset.
    pub(super) fn on_appended(
        &mut self,
        key: PartitionKey,
        by: Pid,
        leads: bool,
        batch: Batch,
        log: &SimLog,
    ) {
        let before = log.before(batch.base).copied();
        if before.is_some_and(|before| before.end() != batch.base) {
            self.fail("offsets are contiguous", || {
                format!("{by}: {batch:?} after {before:?}")
            });
        }
        let history = self.history(key);
        if leads {
            let first = *history.leaders.entry(batch.epoch).or_insert(by);
            if first != by {
                self.fail("one process leads in an epoch", || {
                    format!("{first} and {by} appended in epoch {}", batch.epoch)
                });
                return;
            }
        }
        let before = before.map(|before| (before.epoch, before.base));
        let new = (batch, before);
        let (known, known_before) = history
            .written
            .entry((batch.epoch, batch.base))
            .or_insert(new);
        let is_same = *known == batch
            && known_before.is_none_or(|known| before.is_none_or(|before| before == known));
        if is_same {
            *known_before = known_before.or(before);
            return;
        }
        let known = (*known, *known_before);
        self.fail("logs with a batch in common are the same up to it", || {
            format!("{by} has {new:?}, and another log {known:?}")
        });
    }

    /// A store has that much of the log on the disk.
    pub(super) fn on_durable(&mut self, key: PartitionKey, replica: Replica, end: i64) {
        let known = self.history(key).durable.entry(replica).or_default();
        *known = end.max(*known);
    }

    /// A leader raised its high watermark, with these replicas in sync as far as it knows.
    pub(super) fn on_committed(
        &mut self,
        key: PartitionKey,
        by: Pid,
        log: &SimLog,
        (from, to): (i64, i64),
        isr: &[Replica],
    ) {
        for replica in isr {
            let has = self.history(key).durable.get(replica).copied();
            if to > from && has.unwrap_or(0) < to {
                self.fail("what is committed is on every disk of the ISR", || {
                    format!("{by} commits to {to}, and {replica:?} had {has:?}")
                });
            }
        }
        if self.may_have_lost(key) {
            return;
        }
        for batch in log.batches(from, to) {
            let history = self.history(key);
            if batch.base < history.end {
                self.check_same(key, by, batch);
                continue;
            }
            let expected = history.end;
            if batch.base != expected {
                self.fail("what is committed has no gap", || {
                    format!("{by} commits {batch:?} where {expected} is next")
                });
                return;
            }
            history.committed.insert(batch.base, *batch);
            history.end = batch.end();
            if batch.producer < 0 {
                continue;
            }
            let next = history.sequences.entry(batch.producer).or_default();
            let expected = std::mem::replace(next, batch.sequence + batch.count);
            if batch.sequence != expected {
                self.fail("a producer's records are there once, in order", || {
                    format!("{by} commits {batch:?} where sequence {expected} is next")
                });
            }
        }
    }

    /// A replica knows that its records up to `to` are committed.
    pub(super) fn on_shown(
        &mut self,
        key: PartitionKey,
        by: Pid,
        log: &SimLog,
        (from, to): (i64, i64),
    ) {
        if self.may_have_lost(key) {
            return;
        }
        for batch in log.batches(from, to) {
            self.check_same(key, by, batch);
        }
    }

    fn check_same(&mut self, key: PartitionKey, by: Pid, batch: &Batch) {
        let known = self.history(key).committed.get(&batch.base).copied();
        if known != Some(*batch) {
            self.fail(
                "what is committed is the same everywhere, and stays",
                || format!("{by} has {batch:?} where {known:?} was committed"),
            );
        }
    }

    /// Every store in the ISR that still exists has everything that is committed, on the disk.
    pub(super) fn check_electable(&mut self, key: PartitionKey, replica: Replica, log: &SimLog) {
        let end = self.committed_end(key);
        if self.may_have_lost(key) || end <= log.log_start() {
            return;
        }
        let last = self.history(key).committed.values().next_back().copied();
        let own = log.before(end).copied();
        if log.durable_end() < end || last != own {
            self.fail("each replica of the ISR has all that is committed", || {
                format!(
                    "broker {} has {own:?}, durable to {}, and {last:?} is committed",
                    replica.id,
                    log.durable_end()
                )
            });
        }
    }

    /// A producer is told that a batch is committed.
    pub(super) fn on_acknowledged(
        &mut self,
        key: PartitionKey,
        value: u64,
        base: i64,
        not_before: i64,
    ) {
        if self.may_have_lost(key) {
            return;
        }
        let history = self.history(key);
        let known = history.committed.get(&base).copied();
        let Some(known) = known.filter(|known| known.value == value) else {
            self.fail("what is acknowledged is committed, at that offset", || {
                format!("batch {value} at {base}, where {known:?} is committed")
            });
            return;
        };
        history.acknowledged = history.acknowledged.max(known.end());
        if base < not_before {
            self.fail("what was acknowledged before comes before", || {
                format!("{known:?} was sent when all before {not_before} was acknowledged")
            });
        }
    }

    /// A consumer gets a batch.
    pub(super) fn on_read(&mut self, key: PartitionKey, by: Pid, next: i64, batch: &Batch) {
        if self.may_have_lost(key) {
            return;
        }
        if batch.base > next || batch.end() <= next {
            self.fail("consumers see no gap and nothing twice", || {
                format!("{by} sends {batch:?} where {next} is next")
            });
        }
        let known = self.history(key).committed.get(&batch.base).copied();
        if known != Some(*batch) {
            self.fail("consumers see what is committed", || {
                format!("{by} sends {batch:?} where {known:?} is committed")
            });
        }
    }
}
