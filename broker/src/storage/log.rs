//! One partition's log as readers see it: its bounds, its newest batches in memory, and who waits for more.

use std::{
    collections::VecDeque,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicI32, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use millrace_record::TimestampType;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use uuid::Uuid;

use super::{
    EpochCache, EpochEnd, PartitionId, ReadBatches, StorageError,
    descriptors::StoredTimestampType,
    leadership::Leadership,
    run::Run,
    transactions::{Ended, EndedTransactions},
};

/// Told of what becomes of a partition that is replicated: when its records are committed is for it to say
/// ([`PartitionLog::advance_high_watermark`]). Called by the threads that write: it must not block.
pub trait LogListener: Send + Sync {
    /// The log reaches to `end` now, not durably yet.
    fn appended(&self, end: i64);
    /// Up to `end` all is as durable as configured.
    fn durable(&self, end: i64);
}

/// What of a topic's configuration storage acts on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogConfig {
    /// The most bytes of one batch.
    pub max_message_bytes: usize,
    /// Who stamps records.
    #[serde(with = "StoredTimestampType")]
    pub timestamp_type: TimestampType,
    /// How far ahead of this broker's clock a producer's timestamps may be (KIP-937). Without a limit one record from the
    /// future would keep its run, and all that follow, from retention by time.
    pub timestamp_after_max: Duration,
    /// How long and how much is kept.
    pub retention: Retention,
    /// If the log is compacted: how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compaction: Option<Compaction>,
}

impl LogConfig {
    /// The greatest timestamp that a batch may hold now; `None` if producers' timestamps don't count.
    pub(super) fn max_timestamp_ms(&self, now_ms: i64) -> Option<i64> {
        let ahead_ms = i64::try_from(self.timestamp_after_max.as_millis()).unwrap_or(i64::MAX);
        (self.timestamp_type == TimestampType::CreateTime).then(|| now_ms.saturating_add(ahead_ms))
    }
}

/// How much of a log is kept. What exceeds a limit goes in whole runs, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Retention {
    /// Records older than this may go; `None` keeps them for ever.
    pub time: Option<Duration>,
    /// Bytes of batches kept at least; `None` sets no limit.
    pub bytes: Option<u64>,
}

/// How a log is compacted by key: of each key the last record stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compaction {
    /// Younger records stay, whatever comes after them.
    pub min_lag: Duration,
    /// A log that has an older record which was never looked at is compacted whatever its size; `None`: not for that.
    pub max_lag: Option<Duration>,
    /// How long the last record of a key that was deleted (a tombstone) stays after all before it is gone.
    pub delete_retention: Duration,
    /// It is compacted once so much of it was never looked at.
    pub min_dirty_percent: u8,
}

/// One partition's log.
#[derive(Debug)]
pub struct PartitionLog {
    /// Its number in this store.
    pub id: PartitionId,
    /// The topic's name.
    pub topic: Arc<str>,
    /// The topic's id.
    pub topic_id: Uuid,
    /// The partition's index in the topic.
    pub index: i32,
    config: ArcSwap<LogConfig>,
    log_start: AtomicI64,
    log_end: AtomicI64,
    high_watermark: AtomicI64,
    durable_end: AtomicI64,
    /// What lies before may go whatever the retention.
    released: AtomicI64,
    leadership: Leadership,
    epochs: Mutex<EpochCache>,
    /// The newest epoch in which it was led or followed, if that was noted.
    newest_epoch: AtomicI32,
    /// The first offset of the oldest open transaction; `i64::MAX` if there is none.
    first_open: AtomicI64,
    ended: Mutex<EndedTransactions>,
    listener: OnceLock<Listener>,
    /// Bytes ever appended, and bytes ever removed from the front.
    appended_bytes: AtomicU64,
    removed_bytes: AtomicU64,
    view: Mutex<View>,
    waiters: Mutex<Vec<Weak<Notify>>>,
}

struct Listener(Weak<dyn LogListener>);

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener")
    }
}

#[derive(Debug, Default)]
struct View {
    /// The run in the generation that the writer fills.
    active: Option<Run>,
    /// The newest batches, oldest first, without gaps up to the log end.
    tail: VecDeque<TailBatch>,
}

#[derive(Debug)]
struct TailBatch {
    /// Names the batch towards the cache's budget.
    ticket: u64,
    base_offset: i64,
    last_offset: i64,
    bytes: Bytes,
}

/// Where a log begins and ends.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Bounds {
    pub log_start: i64,
    pub log_end: i64,
    /// Bytes ever removed from the front.
    pub removed_bytes: u64,
    /// Bytes ever appended.
    pub appended_bytes: u64,
}

/// Where the batches at an offset are.
pub(super) enum Located {
    Memory(ReadBatches),
    Disk,
}

impl PartitionLog {
    pub(super) fn new(
        id: PartitionId,
        (topic, topic_id): (Arc<str>, Uuid),
        index: i32,
        config: LogConfig,
        bounds: Bounds,
        leader_epoch: Option<i32>,
    ) -> Self {
        PartitionLog {
            id,
            topic,
            topic_id,
            index,
            config: ArcSwap::from_pointee(config),
            log_start: AtomicI64::new(bounds.log_start),
            log_end: AtomicI64::new(bounds.log_end),
            high_watermark: AtomicI64::new(bounds.log_end),
            durable_end: AtomicI64::new(bounds.log_end),
            released: AtomicI64::new(bounds.log_start),
            leadership: Leadership::new(leader_epoch),
            epochs: Mutex::default(),
            newest_epoch: AtomicI32::new(-1),
            first_open: AtomicI64::new(i64::MAX),
            ended: Mutex::default(),
            listener: OnceLock::new(),
            removed_bytes: AtomicU64::new(bounds.removed_bytes),
            appended_bytes: AtomicU64::new(bounds.appended_bytes),
            view: Mutex::default(),
            waiters: Mutex::default(),
        }
    }

    /// The topic's configuration now.
    pub fn config(&self) -> LogConfig {
        **self.config.load()
    }

    /// Changes the configuration; holds from the next append or retention pass.
    pub(super) fn set_config(&self, config: LogConfig) {
        self.config.store(Arc::new(config));
    }

    /// The first offset still held.
    pub fn log_start(&self) -> i64 {
        self.log_start.load(Ordering::Acquire)
    }

    /// The offset that the next record will get.
    pub fn log_end(&self) -> i64 {
        self.log_end.load(Ordering::Acquire)
    }

    /// The first offset that consumers can't read yet.
    pub fn high_watermark(&self) -> i64 {
        self.high_watermark.load(Ordering::Acquire)
    }

    /// The last stable offset: the first one whose record is not committed yet, or belongs to a transaction that is open.
    pub fn stable_end(&self) -> i64 {
        // In this order: what is below the high watermark was taken note of before.
        let high_watermark = self.high_watermark();
        high_watermark.min(self.first_open.load(Ordering::Acquire))
    }

    /// The transactions that were aborted and have records from `offset` up to `end`, which was the last stable offset or is below.
    pub(crate) fn aborted_within(&self, offset: i64, end: i64) -> Vec<Ended> {
        self.ended.lock().aborted_within(offset, end)
    }

    pub(super) fn ended(&self) -> EndedTransactions {
        self.ended.lock().clone()
    }

    /// What is to be stored of them now.
    pub(super) fn settled_ended(&self) -> Vec<u8> {
        let mut ended = self.ended.lock();
        ended.settle(self.high_watermark());
        ended.encode()
    }

    /// Makes known which transactions have ended, and where the oldest open one begins.
    pub(super) fn set_transactions(
        &self,
        ended: impl IntoIterator<Item = Ended>,
        first_open: Option<i64>,
    ) {
        let mut known = self.ended.lock();
        ended.into_iter().for_each(|ended| known.push(ended));
        // Under the lock: who sees that a transaction is over finds it among those that have ended.
        self.first_open
            .store(first_open.unwrap_or(i64::MAX), Ordering::Release);
    }

    /// Up to here all is as durable as configured.
    pub fn durable_end(&self) -> i64 {
        self.durable_end.load(Ordering::Acquire)
    }

    /// The leader epoch of the last batch.
    pub fn last_epoch(&self) -> Option<i32> {
        self.epochs.lock().last()
    }

    /// The newest leader epoch of which this replica knows: that of its last batch, or a later one in which it led or followed.
    pub fn newest_epoch(&self) -> Option<i32> {
        let noted = self.newest_epoch.load(Ordering::Acquire);
        self.last_epoch().max((noted >= 0).then_some(noted))
    }

    pub(super) fn set_newest_epoch(&self, epoch: i32) {
        self.newest_epoch.fetch_max(epoch, Ordering::AcqRel);
    }

    /// The greatest epoch of this log that is not above `epoch`, and where it ends.
    pub fn end_of_epoch(&self, epoch: i32) -> EpochEnd {
        let epochs = self.epochs.lock();
        epochs.end_of(epoch, self.log_start(), self.log_end())
    }

    pub(super) fn epochs(&self) -> EpochCache {
        self.epochs.lock().clone()
    }

    /// From now on the listener says what is committed. For once: a partition of a broker that runs alone has none, and there all
    /// that is durable is committed.
    pub fn set_listener(&self, listener: Weak<dyn LogListener>) {
        let _ = self.listener.set(Listener(listener));
    }

    /// The epoch in which this broker leads the partition, if it does.
    pub fn leader_epoch(&self) -> Option<i32> {
        self.leadership.epoch()
    }

    /// Leads the partition in this epoch: appends that were accepted in it are taken from now on, and no others. An error if the
    /// partition is deleted.
    pub fn lead(&self, epoch: i32) -> Result<(), StorageError> {
        self.leadership.lead(epoch)
    }

    /// Follows the partition's leader of this epoch: what it sent in it is appended from now on, and nothing else. An error if the
    /// partition is deleted.
    pub fn follow(&self, epoch: i32) -> Result<(), StorageError> {
        self.leadership.follow(epoch)
    }

    /// Neither leads nor follows the partition any more. An append that the writer is at is finished and answered, those behind it are refused; the log
    /// end stands still after [`super::Store::settled`].
    pub fn resign(&self) {
        self.leadership.resign();
    }

    /// Takes the partition out of use for good, and wakes those who wait for more of it.
    pub(super) fn delete(&self) {
        self.leadership.delete();
        self.wake();
    }

    /// Lets go of what is in memory.
    pub(super) fn clear(&self) {
        *self.view.lock() = View::default();
    }

    /// An error if the partition is deleted.
    pub(super) fn check_held(&self) -> Result<(), StorageError> {
        self.leadership.check_held()
    }

    /// An error unless this broker leads the partition in exactly this epoch.
    pub(super) fn check_led_in(&self, epoch: i32) -> Result<(), StorageError> {
        self.leadership.check_led_in(epoch)
    }

    /// An error unless this broker follows the partition in exactly this epoch.
    pub(super) fn check_followed_in(&self, epoch: i32) -> Result<(), StorageError> {
        self.leadership.check_followed_in(epoch)
    }

    /// Bytes of batches held.
    pub fn size_bytes(&self) -> u64 {
        self.appended_bytes
            .load(Ordering::Acquire)
            .saturating_sub(self.removed_bytes.load(Ordering::Acquire))
    }

    /// Calls `waiter` once, at the next rise of the high watermark or when the partition is deleted.
    pub fn notify_on_append(&self, waiter: &Arc<Notify>) {
        let mut waiters = self.waiters.lock();
        // On an idle partition nobody clears out those that have given up. Looking only when the list would grow keeps the cost even.
        if waiters.len() == waiters.capacity() {
            waiters.retain(|waiter| waiter.strong_count() > 0);
        }
        waiters.push(Arc::downgrade(waiter));
    }

    /// An error unless the partition is held and consumers can read from `offset`, or could if there were more.
    pub fn check_offset(&self, offset: i64) -> Result<(), StorageError> {
        self.check_held()?;
        let (log_start, high_watermark) = (self.log_start(), self.high_watermark());
        // What is not committed yet can't be read, but will be: a new leader learns only by and by how far its log is committed.
        if offset < log_start || offset > self.log_end() {
            return Err(StorageError::OffsetOutOfRange {
                offset,
                log_start,
                high_watermark,
            });
        }
        Ok(())
    }

    /// Finds the batch with `offset`, which is below `end`, and what follows it up to `end` and `max_bytes`; the first batch
    /// comes whatever its size if `at_least_one`.
    pub(super) fn locate(
        &self,
        offset: i64,
        end: i64,
        max_bytes: usize,
        at_least_one: bool,
    ) -> Located {
        let view = self.view.lock();
        if view
            .tail
            .front()
            .is_some_and(|first| first.base_offset <= offset)
        {
            let from = view
                .tail
                .partition_point(|batch| batch.last_offset < offset);
            let mut read = ReadBatches::default();
            for batch in view.tail.range(from..) {
                let full = read.bytes + batch.bytes.len() > max_bytes
                    && !(at_least_one && read.batches.is_empty());
                if batch.last_offset >= end || full {
                    read.more = batch.last_offset < end;
                    break;
                }
                read.push(batch.bytes.clone());
            }
            return Located::Memory(read);
        }
        Located::Disk
    }

    pub(super) fn active_run(&self) -> Option<Run> {
        self.view.lock().active
    }

    pub(super) fn set_active_run(&self, run: Option<Run>) {
        self.view.lock().active = run;
    }

    /// Makes appended batches known: all of one group, in order. `run` is the active run with them.
    pub(super) fn publish(&self, run: Run, batches: impl Iterator<Item = Published>) {
        let mut view = self.view.lock();
        let mut epochs = self.epochs.lock();
        for Published {
            ticket,
            base_offset,
            last_offset,
            leader_epoch,
            bytes,
        } in batches
        {
            epochs.note(leader_epoch, base_offset);
            view.tail.push_back(TailBatch {
                ticket,
                base_offset,
                last_offset,
                bytes,
            });
        }
        view.active = Some(run);
        drop(view);
        self.appended_bytes
            .store(run.cumulative_bytes, Ordering::Release);
        self.log_end.store(run.last_offset + 1, Ordering::Release);
        drop(epochs);
        if let Some(listener) = self.listener() {
            listener.appended(run.last_offset + 1);
        }
    }

    /// Sets what recovery found. `high_watermark` is what was known of it before; `None` if all that is there is committed.
    pub(super) fn recovered(
        &self,
        (log_end, appended_bytes): (i64, u64),
        active: Option<Run>,
        mut epochs: EpochCache,
        (mut ended, first_open): (EndedTransactions, Option<i64>),
        high_watermark: Option<i64>,
    ) {
        self.view.lock().active = active;
        self.appended_bytes.store(appended_bytes, Ordering::Release);
        self.log_end.store(log_end, Ordering::Release);
        self.durable_end.store(log_end, Ordering::Release);
        let known = high_watermark.map_or(log_end, |known| known.min(log_end));
        self.high_watermark
            .store(known.max(self.log_start()), Ordering::Release);
        epochs.truncate(log_end);
        epochs.advance(self.log_start());
        *self.epochs.lock() = epochs;
        ended.advance(self.log_start());
        *self.ended.lock() = ended;
        self.set_transactions([], first_open);
    }

    fn listener(&self) -> Option<Arc<dyn LogListener>> {
        self.listener.get()?.0.upgrade()
    }

    /// Up to `end` all is durable now.
    pub(super) fn set_durable(&self, end: i64) {
        self.durable_end.fetch_max(end, Ordering::AcqRel);
        match self.listener.get() {
            None => self.advance_high_watermark(end),
            Some(listener) => {
                if let Some(listener) = listener.0.upgrade() {
                    listener.durable(end);
                }
            }
        }
    }

    /// Drops the oldest batch from memory if it is the one with this ticket; after a truncation it may be gone already.
    pub(super) fn evict(&self, ticket: u64) {
        let mut view = self.view.lock();
        if view
            .tail
            .front()
            .is_some_and(|batch| batch.ticket == ticket)
        {
            view.tail.pop_front();
        }
        if view.tail.is_empty() {
            view.tail.shrink_to_fit();
        }
    }

    /// Lets consumers read up to `offset`, and wakes those who wait.
    pub fn advance_high_watermark(&self, offset: i64) {
        if self.high_watermark.fetch_max(offset, Ordering::AcqRel) < offset {
            self.wake();
        }
    }

    /// Nobody needs what lies before that offset: the next retention passes remove it as far as they can, whole runs that are committed.
    pub fn release_before(&self, offset: i64) {
        self.released.fetch_max(offset, Ordering::AcqRel);
    }

    /// Up to where all may go whatever the retention.
    pub(super) fn released(&self) -> i64 {
        self.released.load(Ordering::Acquire)
    }

    /// Wakes those who wait for more.
    pub fn wake(&self) {
        let waiters = std::mem::take(&mut *self.waiters.lock());
        for waiter in waiters.iter().filter_map(Weak::upgrade) {
            waiter.notify_one();
        }
    }

    pub(super) fn advance_log_start(&self, offset: i64, removed_bytes: u64) {
        self.log_start.fetch_max(offset, Ordering::AcqRel);
        self.epochs.lock().advance(offset);
        self.ended.lock().advance(offset);
        self.removed_bytes
            .fetch_max(removed_bytes, Ordering::AcqRel);
    }

    /// Runs within it have been replaced by smaller ones.
    pub(super) fn compacted(&self, freed: u64) {
        self.removed_bytes.fetch_add(freed, Ordering::AcqRel);
    }

    /// The log, which is empty, begins at `offset`.
    pub(super) fn begin_at(&self, offset: i64) {
        self.log_start.store(offset, Ordering::Release);
        *self.epochs.lock() = EpochCache::default();
        *self.ended.lock() = EndedTransactions::default();
        self.first_open.store(i64::MAX, Ordering::Release);
        self.removed_bytes.store(
            self.appended_bytes.load(Ordering::Acquire),
            Ordering::Release,
        );
        self.log_end.store(offset, Ordering::Release);
        self.durable_end.store(offset, Ordering::Release);
        self.high_watermark.store(offset, Ordering::Release);
    }

    /// Takes everything from `offset` on out of sight. The tail goes whole; it fills again with new appends. Of the transactions that are
    /// open then, the oldest begins at `first_open`.
    pub(super) fn truncate(
        &self,
        offset: i64,
        active: Option<Run>,
        appended_bytes: u64,
        first_open: Option<i64>,
    ) {
        let mut view = self.view.lock();
        view.tail.clear();
        view.active = active;
        drop(view);
        let mut epochs = self.epochs.lock();
        epochs.truncate(offset);
        self.log_end.store(offset, Ordering::Release);
        drop(epochs);
        self.durable_end.fetch_min(offset, Ordering::AcqRel);
        self.high_watermark.fetch_min(offset, Ordering::AcqRel);
        self.ended.lock().truncate(offset);
        self.set_transactions([], first_open);
        self.appended_bytes.store(appended_bytes, Ordering::Release);
    }
}

/// A batch that was appended.
pub(super) struct Published {
    pub ticket: u64,
    pub base_offset: i64,
    pub last_offset: i64,
    pub leader_epoch: i32,
    pub bytes: Bytes,
}
