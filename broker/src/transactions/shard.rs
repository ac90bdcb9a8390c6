//! The transactional ids of one partition of the internal topic. Pure: what is to be kept, and whom to tell then, comes out.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use millrace_proto::v1::{
    TopicPartitions, TransactionLogCurrent, TransactionLogLast, TransactionLogValue,
    TransactionState, TransactionSummary,
};

use super::{Producer, TransactionError, entry::Entry};
use crate::{
    groups::{TopicPartition, by_topic, flat},
    shards::Now,
};

/// Unless a producer asks for something else.
const TIMEOUT: Duration = Duration::from_secs(60);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// A transactional id that is not used for so long is forgotten, as Kafka's are.
const RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);
/// So many transactional ids one coordinator keeps for each partition of the internal topic.
const MAX_IDS: usize = 100_000;
const MAX_ID_BYTES: usize = 255;
/// Partitions of one transaction.
const MAX_PARTITIONS: usize = 10_000;
/// Groups of one transaction.
const MAX_GROUPS: usize = 100;
/// The last epoch of a producer id. After it comes another id.
const LAST_EPOCH: i16 = i16::MAX - 1;

/// A transaction whose participants are to be told that it has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ending {
    pub(crate) id: Arc<str>,
    pub(crate) producer: Producer,
    pub(crate) commit: bool,
    pub(crate) partitions: BTreeSet<TopicPartition>,
    pub(crate) groups: BTreeSet<String>,
}

/// One transactional id.
#[derive(Debug)]
struct Transactional {
    /// Of the current or the next transaction.
    producer: Producer,
    timeout_ms: u32,
    changed_ms: i64,
    current: Option<Current>,
    /// How the transaction before ended, for its producer.
    last: Option<(Producer, bool)>,
}

/// A transaction that has not ended everywhere.
#[derive(Debug, Default)]
struct Current {
    since_ms: i64,
    partitions: BTreeSet<TopicPartition>,
    groups: BTreeSet<String>,
    decided: Option<Decided>,
}

/// How it ends, and who its producer is then.
#[derive(Clone, Copy, Debug)]
struct Decided {
    commit: bool,
    next: Producer,
}

/// See the module.
pub(crate) struct Shard {
    ids: HashMap<Arc<str>, Transactional>,
    /// What is to be kept, of these.
    changed: BTreeSet<Arc<str>>,
    endings: Vec<Ending>,
    /// Gives a producer id that no one has had.
    new_id: fn() -> i64,
}

impl Shard {
    pub(crate) fn new(new_id: fn() -> i64) -> Self {
        Self {
            ids: HashMap::new(),
            changed: BTreeSet::new(),
            endings: Vec::new(),
            new_id,
        }
    }

    /// Takes in what was kept, in order.
    pub(crate) fn replay(&mut self, entry: Entry) {
        match entry.value {
            Some(value) => self.ids.insert(entry.id.into(), value.into()),
            None => self.ids.remove(entry.id.as_str()),
        };
    }

    /// All that was kept has been replayed: who was being told of an end is told by this one.
    pub(crate) fn replayed(&mut self) {
        let endings = self.ids.iter().filter_map(|(id, known)| known.ending(id));
        let endings = endings.filter(|_| !broken!(ForgetDecisions));
        self.endings = endings.collect();
    }

    pub(crate) fn len(&self) -> usize {
        self.ids.len()
    }

    /// A producer takes the transactional id over; or goes on with it, if it says who it was before.
    pub(crate) fn init(
        &mut self,
        id: &str,
        timeout_ms: u32,
        before: Option<Producer>,
        now: Now,
    ) -> Result<Producer, TransactionError> {
        check_id(id)?;
        let timeout_ms = check_timeout(timeout_ms)?;
        let Some(known) = self.ids.get_mut(id) else {
            if self.ids.len() >= MAX_IDS {
                return Err(TransactionError::Limit(format!(
                    "{MAX_IDS} transactional ids are kept by one coordinator; use fewer: one for each instance that writes at the same time"
                )));
            }
            let producer = ((self.new_id)(), 0);
            let id: Arc<str> = id.into();
            let transactional = Transactional {
                producer,
                timeout_ms,
                changed_ms: now.unix_ms,
                current: None,
                last: None,
            };
            self.changed.insert(id.clone());
            self.ids.insert(id, transactional);
            return Ok(producer);
        };
        if let Some(before) = before {
            known.check_known(id, before)?;
        }
        if let Some(current) = &known.current {
            if current.decided.is_none() {
                self.decide(id, false, now);
            }
            return Err(TransactionError::Concurrent(id.to_owned()));
        }
        known.producer = after(known.producer, self.new_id);
        known.timeout_ms = timeout_ms;
        known.changed_ms = now.unix_ms;
        // Whoever had it before is fenced, and not told more.
        known.last = None;
        self.changed.insert(id.into());
        Ok(known.producer)
    }

    /// Makes partitions part of the transaction.
    pub(crate) fn add_partitions(
        &mut self,
        id: &str,
        producer: Producer,
        partitions: &[TopicPartitions],
        now: Now,
    ) -> Result<(), TransactionError> {
        let added = flat(partitions);
        let current = self.begun(id, producer, now)?;
        let before = current.partitions.len();
        current.partitions.extend(added);
        let count = current.partitions.len();
        self.added(id, before == count, count, MAX_PARTITIONS, "partitions")
    }

    /// Makes offsets of a group part of it.
    pub(crate) fn add_group(
        &mut self,
        id: &str,
        producer: Producer,
        group: &str,
        now: Now,
    ) -> Result<(), TransactionError> {
        let current = self.begun(id, producer, now)?;
        let is_known = !current.groups.insert(group.to_owned());
        let count = current.groups.len();
        self.added(id, is_known, count, MAX_GROUPS, "groups")
    }

    /// Too many are kept as they are: it can only be aborted.
    fn added(
        &mut self,
        id: &str,
        nothing_new: bool,
        count: usize,
        most: usize,
        what: &str,
    ) -> Result<(), TransactionError> {
        if !nothing_new && !broken!(ForgetPartitions) {
            self.changed.insert(id.into());
        }
        match count <= most {
            true => Ok(()),
            false => Err(TransactionError::Limit(format!(
                "transactional id {id:?}: a transaction has at most {most} {what}; abort it"
            ))),
        }
    }

    /// The transaction of this producer, begun if it is not.
    fn begun(
        &mut self,
        id: &str,
        producer: Producer,
        now: Now,
    ) -> Result<&mut Current, TransactionError> {
        let known = self.ids.get_mut(id);
        let known = known.ok_or_else(|| TransactionError::Unknown(id.to_owned()))?;
        known.check(id, producer)?;
        known.changed_ms = now.unix_ms;
        Ok(known.current.get_or_insert_with(|| Current {
            since_ms: now.unix_ms,
            ..Current::default()
        }))
    }

    /// Commits or aborts. Who to be in the next transaction.
    pub(crate) fn end(
        &mut self,
        id: &str,
        producer: Producer,
        commit: bool,
        now: Now,
    ) -> Result<Producer, TransactionError> {
        let known = self.ids.get(id);
        let known = known.ok_or_else(|| TransactionError::Unknown(id.to_owned()))?;
        let settled = |committed: bool, next: Producer| match (committed, commit) {
            (true, true) | (false, false) => Ok(next),
            (true, false) => Err(TransactionError::Committed(id.to_owned())),
            (false, true) => Err(TransactionError::Aborted(id.to_owned())),
        };
        match (&known.current, known.last) {
            // Asked again.
            (Some(current), _)
                if let Some(decided) = current.decided
                    && known.producer == producer
                    && !(broken!(DecideAgain) && decided.commit != commit) =>
            {
                settled(decided.commit, decided.next)
            }
            (None, Some((last, committed))) if last == producer => {
                settled(committed, known.producer)
            }
            (current, _) => {
                known.check(id, producer)?;
                match current {
                    // Nothing is in it.
                    None => Ok(producer),
                    Some(_) => Ok(self.decide(id, commit, now).unwrap_or(producer)),
                }
            }
        }
    }

    /// From now on it stands how it ends.
    fn decide(&mut self, id: &str, commit: bool, now: Now) -> Option<Producer> {
        let (id, _) = self.ids.get_key_value(id)?;
        let id = id.clone();
        let known = self.ids.get_mut(&id)?;
        let next = after(known.producer, self.new_id);
        known.current.as_mut()?.decided = Some(Decided { commit, next });
        known.changed_ms = now.unix_ms;
        self.endings.extend(known.ending(&id));
        self.changed.insert(id);
        Some(next)
    }

    /// Everyone knows that the transaction has ended.
    pub(crate) fn told(&mut self, id: &str, producer: Producer, now: Now) {
        let Some(known) = self.ids.get_mut(id).filter(|k| k.producer == producer) else {
            return;
        };
        let decided = known.current.as_ref().and_then(|current| current.decided);
        if let Some(Decided { commit, next }) = decided {
            known.current = None;
            known.last = Some((producer, commit));
            known.producer = next;
            known.changed_ms = now.unix_ms;
            self.changed.insert(id.into());
        }
    }

    /// What time alone brings: transactions that take too long are aborted, and ids that no one uses are forgotten.
    pub(crate) fn tick(&mut self, now: Now) {
        let retention = i64::try_from(RETENTION.as_millis()).unwrap_or(i64::MAX);
        let mut overdue = Vec::new();
        let mut unused = Vec::new();
        for (id, known) in &self.ids {
            match &known.current {
                Some(current) => {
                    let ends_ms = current.since_ms + i64::from(known.timeout_ms);
                    if current.decided.is_none() && ends_ms <= now.unix_ms {
                        overdue.push(id.clone());
                    }
                }
                None => {
                    if known.changed_ms.saturating_add(retention) <= now.unix_ms {
                        unused.push(id.clone());
                    }
                }
            }
        }
        for id in overdue {
            tracing::info!(transactional_id = %id, "a transaction takes too long and is aborted");
            self.decide(&id, false, now);
        }
        for id in unused {
            self.ids.remove(&id);
            self.changed.insert(id);
        }
    }

    /// What is to be kept of what changed since the last call, and who is to be told of ends then.
    pub(crate) fn settle(&mut self) -> (Vec<Entry>, Vec<Ending>) {
        let changed = std::mem::take(&mut self.changed);
        let entries = changed.into_iter().map(|id| Entry {
            value: self.ids.get(&id).map(TransactionLogValue::from),
            id: id.to_string(),
        });
        (entries.collect(), std::mem::take(&mut self.endings))
    }

    /// All of it, as it would be written if nothing had been.
    pub(crate) fn snapshot(&self) -> Vec<Entry> {
        let all = self.ids.iter().map(|(id, known)| Entry {
            id: id.to_string(),
            value: Some(known.into()),
        });
        all.collect()
    }

    /// All, by transactional id.
    pub(crate) fn list(&self) -> Vec<TransactionSummary> {
        let sorted: BTreeMap<_, _> = self.ids.iter().collect();
        let summary = |(id, known): (&Arc<str>, &Transactional)| TransactionSummary {
            transactional_id: id.to_string(),
            state: known.state().into(),
            producer_id: known.producer.0,
            producer_epoch: known.producer.1.into(),
            since_ms: known.current.as_ref().map(|current| current.since_ms),
            timeout_ms: known.timeout_ms,
            partitions: known
                .current
                .as_ref()
                .map_or_else(Vec::new, |current| by_topic(&current.partitions)),
            groups: known
                .current
                .as_ref()
                .map_or_else(Vec::new, |current| current.groups.iter().cloned().collect()),
        };
        sorted.into_iter().map(summary).collect()
    }
}

impl Transactional {
    /// Whether that producer may add to the transaction, or begin one.
    fn check(&self, id: &str, producer: Producer) -> Result<(), TransactionError> {
        let over = |committed: bool| match committed {
            true => Err(TransactionError::Committed(id.to_owned())),
            false => Err(TransactionError::Aborted(id.to_owned())),
        };
        let decided = self.current.as_ref().and_then(|current| current.decided);
        match decided {
            Some(_) if self.producer == producer && broken!(DecideAgain) => Ok(()),
            Some(decided) if self.producer == producer => over(decided.commit),
            Some(decided) if decided.next == producer => {
                Err(TransactionError::Concurrent(id.to_owned()))
            }
            None if self.producer == producer => Ok(()),
            None if self.producer.0 == producer.0 && broken!(LetZombiesEnd) => Ok(()),
            _ => match self.last {
                Some((last, committed)) if last == producer => over(committed),
                _ => Err(TransactionError::Fenced {
                    id: id.to_owned(),
                    producer_id: producer.0,
                    epoch: producer.1,
                }),
            },
        }
    }

    /// Whether no other producer has taken over from that one.
    fn check_known(&self, id: &str, producer: Producer) -> Result<(), TransactionError> {
        match self.check(id, producer) {
            Err(error @ TransactionError::Fenced { .. }) => Err(error),
            _ => Ok(()),
        }
    }

    /// Who is to be told of its end.
    fn ending(&self, id: &Arc<str>) -> Option<Ending> {
        let current = self.current.as_ref()?;
        Some(Ending {
            id: id.clone(),
            producer: self.producer,
            commit: current.decided?.commit,
            partitions: current.partitions.clone(),
            groups: current.groups.clone(),
        })
    }

    fn state(&self) -> TransactionState {
        match &self.current {
            None => TransactionState::Idle,
            Some(Current { decided: None, .. }) => TransactionState::Open,
            Some(Current {
                decided: Some(decided),
                ..
            }) => match decided.commit {
                true => TransactionState::Committing,
                false => TransactionState::Aborting,
            },
        }
    }
}

/// Who comes after a producer.
fn after((producer_id, epoch): Producer, new_id: fn() -> i64) -> Producer {
    if broken!(KeepEpoch) {
        return (producer_id, epoch);
    }
    match epoch >= LAST_EPOCH {
        true => (new_id(), 0),
        false => (producer_id, epoch + 1),
    }
}

impl From<&Transactional> for TransactionLogValue {
    fn from(known: &Transactional) -> Self {
        let current = known.current.as_ref().map(|current| TransactionLogCurrent {
            since_ms: current.since_ms,
            partitions: by_topic(&current.partitions),
            groups: current.groups.iter().cloned().collect(),
            commit: current.decided.map(|decided| decided.commit),
            next_producer_id: current.decided.map_or(-1, |decided| decided.next.0),
            next_producer_epoch: current.decided.map_or(-1, |decided| decided.next.1.into()),
        });
        let last = known
            .last
            .map(|((producer_id, epoch), committed)| TransactionLogLast {
                producer_id,
                producer_epoch: epoch.into(),
                committed,
            });
        Self {
            producer_id: known.producer.0,
            producer_epoch: known.producer.1.into(),
            timeout_ms: known.timeout_ms,
            changed_ms: known.changed_ms,
            current,
            last,
        }
    }
}

impl From<TransactionLogValue> for Transactional {
    fn from(value: TransactionLogValue) -> Self {
        // Epochs were i16 when they were written.
        let producer = |id: i64, epoch: i32| (id, i16::try_from(epoch).unwrap_or(LAST_EPOCH));
        let current = value.current.map(|current| Current {
            since_ms: current.since_ms,
            partitions: flat(&current.partitions).into_iter().collect(),
            groups: current.groups.into_iter().collect(),
            decided: current.commit.map(|commit| Decided {
                commit,
                next: producer(current.next_producer_id, current.next_producer_epoch),
            }),
        });
        let last = value.last.map(|last| {
            let committed = last.committed;
            (producer(last.producer_id, last.producer_epoch), committed)
        });
        Self {
            producer: producer(value.producer_id, value.producer_epoch),
            timeout_ms: value.timeout_ms,
            changed_ms: value.changed_ms,
            current,
            last,
        }
    }
}

fn check_id(id: &str) -> Result<(), TransactionError> {
    let field = "transactional_id";
    match id.len() {
        0 => Err(TransactionError::Invalid {
            field,
            message: "it is empty".to_owned(),
        }),
        1..=MAX_ID_BYTES => Ok(()),
        _ => Err(TransactionError::Limit(format!(
            "{field}: at most {MAX_ID_BYTES} bytes"
        ))),
    }
}

fn check_timeout(ms: u32) -> Result<u32, TransactionError> {
    let longest = LONGEST_TIMEOUT.as_millis();
    match u128::from(ms) {
        0 => Ok(TIMEOUT.as_millis() as u32),
        asked if asked <= longest => Ok(ms),
        _ => Err(TransactionError::Invalid {
            field: "timeout_ms",
            message: format!(
                "it must be at most {LONGEST_TIMEOUT:?}: readers of committed records wait that long"
            ),
        }),
    }
}
