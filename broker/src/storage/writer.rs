//! The one thread that appends. It drains a queue of appends into a single RocksDB write, so that one write to the WAL (and one
//! fsync, where asked for) covers every partition's pending batches. Offsets, sequences and runs belong to it alone.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use millrace_record::{
    BatchHeader, DecodeLimits, EndMarker, TimestampType, end_marker, marker_batch, set_base_offset,
    set_leader_epoch, set_log_append_time,
};
use parking_lot::Mutex;
use rocksdb::WriteBatch;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tracing::{error, info, warn};

use crate::now_ms;

use super::{
    DiskSpace, Generation, PartitionId, PartitionLog, StorageError, StorageOptions,
    compaction::Compacted,
    db::Db,
    keys,
    log::Published,
    producers::{Producer, Producers, SequenceError, Verdict},
    retention::{bury, put_generations},
    run::Run,
    syncer::{Completion, Syncer},
    transactions::Ended,
};

/// Bytes of batches in one write at most. Larger groups gain nothing and hold up those who came first.
const GROUP_BYTES: usize = 4 << 20;
/// What an entry costs in the memtable beside its batch: key, node, length.
const ENTRY_OVERHEAD: usize = 96;
/// How long writes may fail, with room on the disk, before the broker stops.
const FAILURE_LIMIT: Duration = Duration::from_secs(30);
/// How often the writer looks at the generation's age.
const TICK: Duration = Duration::from_secs(1);

/// Batches for several partitions, appended together and answered together.
pub struct Append {
    /// What goes where.
    pub partitions: Vec<PartitionAppend>,
    /// Gets one result for each partition, in their order, once the append is as durable as configured.
    pub reply: oneshot::Sender<Vec<Result<Appended, StorageError>>>,
    /// Room in the queue, given back with the reply.
    pub(super) room: Option<OwnedSemaphorePermit>,
}

/// Checked batches for one partition: appended in order, all or none.
pub struct PartitionAppend {
    log: Arc<PartitionLog>,
    leader_epoch: i32,
    origin: Origin,
    batches: Vec<(BatchHeader, Option<EndMarker>, Bytes)>,
}

/// Where batches come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// A producer: they get offsets, if their sequence is right.
    Producer,
    /// The partition's leader, which did that: they are taken as they are.
    Leader,
    /// A transaction's coordinator: a marker, which gets an offset unless it is there already.
    Coordinator,
}

/// Where batches went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// The offset of the first record; of the original, for a duplicate.
    pub base_offset: i64,
    /// The timestamp given on append, if the topic asks for it; milliseconds since the Unix epoch.
    pub log_append_time_ms: Option<i64>,
    /// The partition's log start offset.
    pub log_start: i64,
    /// The offset after the last record; of the original, for a duplicate. All of it is committed once the high watermark gets there.
    pub end_offset: i64,
}

impl PartitionAppend {
    /// Checks batches as they came from a producer: whole, not larger and not stamped later than the topic allows, checksum right.
    /// They are appended only if the partition is led in `leader_epoch` when their turn comes.
    pub fn new(
        log: Arc<PartitionLog>,
        leader_epoch: i32,
        batches: Vec<Bytes>,
    ) -> Result<Self, StorageError> {
        let config = log.config();
        let max = config.max_message_bytes;
        let max_timestamp_ms = config.max_timestamp_ms(now_ms()).unwrap_or(i64::MAX);
        let check = |batch: Bytes| {
            if batch.len() > max {
                return Err(StorageError::TooLarge {
                    size: batch.len(),
                    max,
                });
            }
            let header = millrace_record::validate(&batch)?;
            if header.attributes.is_control() {
                return Err(StorageError::Control);
            }
            if header.attributes.is_transactional() && header.producer_id < 0 {
                return Err(StorageError::NoProducer);
            }
            if header.attributes.timestamp_type() == TimestampType::LogAppendTime {
                return Err(StorageError::Stamped);
            }
            if config.compaction.is_some() {
                check_keys(&batch)?;
            }
            if header.max_timestamp > max_timestamp_ms {
                return Err(StorageError::Timestamp {
                    timestamp_ms: header.max_timestamp,
                    max_timestamp_ms,
                });
            }
            Ok((header, None, batch))
        };
        let batches = batches.into_iter().map(check).collect::<Result<_, _>>()?;
        Ok(PartitionAppend {
            log,
            leader_epoch,
            origin: Origin::Producer,
            batches,
        })
    }

    /// Checks batches as they came from the partition's leader: whole, checksum right. Each element holds one or several. They are
    /// appended only if the partition is followed in `leader_epoch` when their turn comes, and they follow what is there.
    pub fn replicated(
        log: Arc<PartitionLog>,
        leader_epoch: i32,
        batches: Vec<Bytes>,
    ) -> Result<Self, StorageError> {
        let check = |batch| {
            let batch: Bytes = batch?;
            let header = millrace_record::validate_stored(&batch)?;
            let marker = match header.attributes.is_control() {
                true => end_marker(&batch)?,
                false => None,
            };
            Ok((header, marker, batch))
        };
        let batches = batches.into_iter().flat_map(millrace_record::split);
        Ok(PartitionAppend {
            log,
            leader_epoch,
            origin: Origin::Leader,
            batches: batches.map(check).collect::<Result<_, StorageError>>()?,
        })
    }

    /// The marker that ends a transaction. It is appended only if the partition is led in `leader_epoch`, and once.
    pub(crate) fn marker(
        log: Arc<PartitionLog>,
        leader_epoch: i32,
        end: EndMarker,
        (producer_id, producer_epoch): (i64, i16),
    ) -> Result<Self, StorageError> {
        // No one needs the coordinator's epoch: a marker that comes late finds that it is there already.
        let batch = marker_batch(end, producer_id, producer_epoch, 0, now_ms())?;
        let header = BatchHeader::parse(&batch)?;
        Ok(PartitionAppend {
            log,
            leader_epoch,
            origin: Origin::Coordinator,
            batches: vec![(header, Some(end), batch)],
        })
    }

    /// The offset of the first record and the one after the last, as the batches have them now.
    pub fn span(&self) -> Option<(i64, i64)> {
        let (first, ..) = self.batches.first()?;
        let (last, ..) = self.batches.last()?;
        Some((first.base_offset, last.last_offset() + 1))
    }

    /// Bytes of the batches.
    pub fn size(&self) -> usize {
        self.batches.iter().map(|(.., bytes)| bytes.len()).sum()
    }
}

/// In a compacted topic a record without a key could never be told from another one.
fn check_keys(batch: &Bytes) -> Result<(), StorageError> {
    let records = millrace_record::decode(batch, &DecodeLimits::default())?;
    for record in records {
        if record?.key.is_none() {
            return Err(StorageError::NoKey);
        }
    }
    Ok(())
}

/// What the writer is asked to do.
pub(super) enum Command {
    Append(Append),
    /// Removes all batches that reach to or beyond `offset`, as a follower of that epoch.
    Truncate {
        log: Arc<PartitionLog>,
        epoch: i32,
        offset: i64,
        reply: oneshot::Sender<Result<i64, StorageError>>,
    },
    /// Removes all batches, and begins anew at `offset`, as a follower of that epoch.
    BeginAt {
        log: Arc<PartitionLog>,
        epoch: i32,
        offset: i64,
        reply: oneshot::Sender<Result<(), StorageError>>,
    },
    /// Lets a transaction write to partitions, each of which is led in the epoch beside it. All or none.
    Announce {
        logs: Vec<(Arc<PartitionLog>, i32)>,
        producer_id: i64,
        producer_epoch: i16,
        reply: oneshot::Sender<Result<(), AnnounceError>>,
    },
    /// Drops everything known of deleted partitions, and hands it over to be freed.
    Forget {
        logs: Vec<Arc<PartitionLog>>,
        reply: Sender<Vec<Slot>>,
    },
    /// Seals the active generation, if it holds anything.
    Seal {
        reply: oneshot::Sender<Result<(), StorageError>>,
    },
    Stop,
}

/// The partition, by its place among those asked for, that a transaction can't write to, and why.
pub(super) type AnnounceError = (usize, StorageError);

/// Bytes of batches in a sealed generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct GenerationBytes {
    pub total: u64,
    /// Of these, what no retention has removed.
    pub live: u64,
}

/// The sealed generations that hold data.
pub(super) type Generations = Arc<Mutex<BTreeMap<Generation, GenerationBytes>>>;

/// What the writer knows of a partition.
pub(super) struct Slot {
    pub log: Arc<PartitionLog>,
    pub next_offset: i64,
    pub run: Option<Run>,
    pub cumulative_bytes: u64,
    pub producers: Producers,
    /// Producers that have changed in the active generation: stored when it is sealed, replayed from it until then.
    pub dirty_producers: HashSet<i64>,
    stored: Stored,
    /// Of the group being written.
    staged: Vec<Staged>,
    staged_ended: Vec<Ended>,
    before: Option<Before>,
}

/// What a seal has stored of a partition and seldom changes, so that the next one writes it only if it did: with thousands of partitions in each
/// generation, that is the greater part of what seals cost. `None` if it is not known.
#[derive(Default)]
struct Stored {
    epochs: Option<Vec<u8>>,
    ended: Option<Vec<u8>>,
}

impl Stored {
    /// Adds the entry to a write, if it is another than what is stored.
    fn put(
        stored: &mut Option<Vec<u8>>,
        key: impl AsRef<[u8]>,
        value: Vec<u8>,
        batch: &mut WriteBatch,
    ) {
        if stored.as_ref() != Some(&value) {
            batch.put(key, &value);
            *stored = Some(value);
        }
    }
}

/// A batch that is being written.
struct Staged {
    base_offset: i64,
    last_offset: i64,
    leader_epoch: i32,
    bytes: Bytes,
}

/// To undo a group that could not be written.
struct Before {
    next_offset: i64,
    run: Option<Run>,
    cumulative_bytes: u64,
    producers: Vec<(i64, Option<Producer>)>,
}

impl Slot {
    pub(super) fn new(log: Arc<PartitionLog>, next_offset: i64, cumulative_bytes: u64) -> Self {
        Slot {
            log,
            next_offset,
            run: None,
            cumulative_bytes,
            producers: Producers::default(),
            dirty_producers: HashSet::new(),
            stored: Stored::default(),
            staged: Vec::new(),
            staged_ended: Vec::new(),
            before: None,
        }
    }

    /// Extends the active run by a batch.
    pub(super) fn extend_run(
        &mut self,
        generation: Generation,
        base: i64,
        last: i64,
        bytes: u64,
        max_timestamp: i64,
    ) {
        self.cumulative_bytes += bytes;
        let run = self.run.get_or_insert(Run {
            generation,
            first_offset: base,
            last_offset: last,
            bytes: 0,
            cumulative_bytes: 0,
            max_timestamp,
        });
        run.last_offset = last;
        run.bytes += bytes;
        run.cumulative_bytes = self.cumulative_bytes;
        run.max_timestamp = run.max_timestamp.max(max_timestamp);
        self.next_offset = last + 1;
    }

    /// Adds to a write what is stored of the active run at its end.
    pub(super) fn put_sealed(&self, batch: &mut WriteBatch) {
        if let Some(run) = &self.run {
            batch.put(keys::run(self.log.id, run.last_offset), run.encode());
        }
        self.put_producers(batch);
    }

    /// So that after a start it does not count as committed what is not.
    fn put_high_watermark(&self, batch: &mut WriteBatch) {
        let high_watermark = self.log.high_watermark();
        batch.put(
            keys::high_watermark(self.log.id),
            high_watermark.to_be_bytes(),
        );
    }

    /// Adds what is to be stored of the producers that have changed; those that are no longer known are deleted.
    fn put_producers(&self, batch: &mut WriteBatch) {
        for &producer_id in &self.dirty_producers {
            let key = keys::producer(self.log.id, producer_id);
            match self.producers.encode(producer_id) {
                Some(value) => batch.put(key, value),
                None => batch.delete(key),
            }
        }
    }

    pub(super) fn next_generation(&mut self) {
        self.run = None;
        self.dirty_producers.clear();
        self.log.set_active_run(None);
    }

    /// Ends the log earlier, for the writer and for readers.
    fn shorten(&mut self, end: i64, cumulative_bytes: u64) {
        self.next_offset = end;
        self.cumulative_bytes = cumulative_bytes;
        let first_open = self.producers.first_open();
        self.log
            .truncate(end, self.run, cumulative_bytes, first_open);
    }

    /// What producers have appended from `end` on no longer counts. What was known of them before, for undoing that.
    fn forget_batches(&mut self, end: i64) -> Vec<(i64, Option<Producer>)> {
        let reopened = self.log.ended().truncate(end);
        let before = self.producers.truncate(end, &reopened);
        let ids = before.iter().map(|(producer_id, _)| *producer_id);
        self.dirty_producers.extend(ids);
        before
    }

    fn undo(&mut self) {
        if let Some(before) = self.before.take() {
            self.next_offset = before.next_offset;
            self.run = before.run;
            self.cumulative_bytes = before.cumulative_bytes;
            for (producer_id, producer) in before.producers.into_iter().rev() {
                self.producers.restore(producer_id, producer);
            }
        }
        self.staged.clear();
        self.staged_ended.clear();
    }
}

/// The writer's state.
pub(super) struct Writer {
    pub db: Arc<Db>,
    pub options: StorageOptions,
    pub disk: Arc<DiskSpace>,
    pub generations: Generations,
    pub syncer: Option<Syncer>,
    pub slots: HashMap<PartitionId, Slot>,
    pub generation: Generation,
    pub active: Active,
    pub tail: TailBudget,
    /// The last write failed: whether it is in the WAL is unknown, so nothing may follow it in the same generation.
    pub tainted: bool,
    /// When it was first seen that writes fail although the disk has room.
    pub failing_since: Option<Instant>,
}

/// The generation being filled.
pub(super) struct Active {
    pub bytes: u64,
    /// Of these, what belongs to partitions that were deleted since.
    pub dead_bytes: u64,
    pub memtable_bytes: usize,
    pub since: Instant,
    pub partitions: Vec<PartitionId>,
}

impl Active {
    pub(super) fn empty() -> Self {
        Active {
            bytes: 0,
            dead_bytes: 0,
            memtable_bytes: 0,
            since: Instant::now(),
            partitions: Vec::new(),
        }
    }

    /// What it holds when it is sealed.
    pub(super) fn sealed(&self) -> GenerationBytes {
        GenerationBytes {
            total: self.bytes,
            live: self.bytes - self.dead_bytes,
        }
    }

    /// Counts what was written for a partition, before it is published.
    fn note(&mut self, id: PartitionId, slot: &Slot) {
        if self.bytes == 0 {
            self.since = Instant::now();
        }
        if slot
            .before
            .as_ref()
            .is_some_and(|before| before.run.is_none())
        {
            self.partitions.push(id);
        }
        for Staged { bytes, .. } in &slot.staged {
            self.bytes += bytes.len() as u64;
            self.memtable_bytes += bytes.len() + ENTRY_OVERHEAD;
        }
    }
}

/// The batches in memory, oldest first, and what they may take in all.
pub(super) struct TailBudget {
    limit: usize,
    used: usize,
    tickets: u64,
    order: VecDeque<(Arc<PartitionLog>, u64, usize)>,
}

impl TailBudget {
    pub(super) fn new(limit: usize) -> Self {
        TailBudget {
            limit,
            used: 0,
            tickets: 0,
            order: VecDeque::new(),
        }
    }

    fn admit(&mut self, log: &Arc<PartitionLog>, bytes: usize) -> u64 {
        self.tickets += 1;
        self.used += bytes + ENTRY_OVERHEAD;
        self.order
            .push_back((log.clone(), self.tickets, bytes + ENTRY_OVERHEAD));
        self.tickets
    }

    fn evict(&mut self) {
        while self.used > self.limit
            && let Some((log, ticket, bytes)) = self.order.pop_front()
        {
            log.evict(ticket);
            self.used -= bytes;
        }
    }

    fn forget_deleted(&mut self) {
        self.order.retain(|(log, _, bytes)| {
            let held = log.check_held().is_ok();
            if !held {
                self.used -= bytes;
            }
            held
        });
    }
}

impl Writer {
    /// Serves the queue until it is told to stop or all senders are gone.
    pub(super) fn run(mut self, queue: &Receiver<Command>) {
        let mut group = Vec::new();
        let mut next_tick = Instant::now() + TICK;
        loop {
            let command = queue.recv_timeout(next_tick.saturating_duration_since(Instant::now()));
            match command {
                Ok(Command::Append(append)) => {
                    let other = collect_group(append, &mut group, queue);
                    self.append_group(&mut group);
                    if let Some(command) = other
                        && !self.handle(command)
                    {
                        break;
                    }
                }
                Ok(command) => {
                    if !self.handle(command) {
                        break;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if Instant::now() >= next_tick {
                next_tick = Instant::now() + TICK;
                self.tick();
            }
        }
        self.stop();
    }

    /// Anything but an append. False to stop.
    fn handle(&mut self, command: Command) -> bool {
        match command {
            Command::Append(append) => self.append_group(&mut vec![append]),
            Command::Truncate {
                log,
                epoch,
                offset,
                reply,
            } => {
                let _ = reply.send(self.truncate(&log, epoch, offset));
            }
            Command::BeginAt {
                log,
                epoch,
                offset,
                reply,
            } => {
                let _ = reply.send(self.begin_at(&log, epoch, offset));
            }
            Command::Announce {
                logs,
                producer_id,
                producer_epoch,
                reply,
            } => {
                let _ = reply.send(self.announce(&logs, producer_id, producer_epoch));
            }
            Command::Forget { logs, reply } => {
                let _ = reply.send(self.forget(&logs));
            }
            Command::Seal { reply } => {
                let sealed = self.seal();
                self.tainted |= sealed.is_err();
                let _ = reply.send(sealed);
            }
            Command::Stop => return false,
        }
        true
    }

    fn tick(&mut self) {
        if self.tainted
            && self.disk.has_room()
            && self.disk.free_bytes() > 2 * self.options.generation_bytes as u64
        {
            let since = *self.failing_since.get_or_insert_with(Instant::now);
            if since.elapsed() > FAILURE_LIMIT && self.seal().is_err() {
                // RocksDB does not come back from an I/O error by itself; a start does, or says why not.
                error!(
                    "writes have failed for {FAILURE_LIMIT:?} although the disk has room; the broker stops"
                );
                std::process::exit(1);
            }
        } else {
            self.failing_since = None;
        }
        if self.active.bytes > 0 && self.active.since.elapsed() >= self.options.generation_age {
            self.seal_or_warn();
        }
    }

    /// Everything accepted is in the WAL; sealing spares the next start the replay.
    fn stop(mut self) {
        let sealed = self.seal();
        if let Some(syncer) = self.syncer.take() {
            syncer.stop();
        }
        let mut batch = WriteBatch::default();
        for slot in self.slots.values() {
            slot.put_high_watermark(&mut batch);
        }
        batch.put(keys::CLEAN_SHUTDOWN, []);
        match sealed
            .and_then(|()| self.db.sync_log())
            .and_then(|()| self.db.write_meta_durably(batch))
        {
            Ok(()) => info!("store closed"),
            Err(error) => {
                warn!(%error, "the store could not be closed in order; the next start replays the write-ahead log")
            }
        }
    }

    fn append_group(&mut self, group: &mut Vec<Append>) {
        let now_ms = now_ms();
        if self.tainted
            && let Err(error) = self.seal()
        {
            return refuse(group, &self.disk.cause(&error));
        }
        let size: usize = group
            .iter()
            .flat_map(|append| &append.partitions)
            .map(PartitionAppend::size)
            .sum();
        let mut batch = WriteBatch::with_capacity_bytes(size + 4096);
        let mut touched = Vec::new();
        let mut results: Vec<Vec<Result<Appended, StorageError>>> = Vec::with_capacity(group.len());
        for append in group.iter_mut() {
            let outcomes = append
                .partitions
                .iter_mut()
                .map(|p| self.stage(p, &mut batch, &mut touched, now_ms));
            results.push(outcomes.collect());
        }
        if !batch.is_empty()
            && let Err(error) = self.db.write_log(batch)
        {
            self.undo(&touched);
            let cause = self.disk.note_write_failure(&error);
            error!(%error, "a write failed; it is not acknowledged");
            return refuse(group, &cause);
        }
        let mut advanced = Vec::with_capacity(touched.len());
        for id in touched {
            if let Some(slot) = self.slots.get_mut(&id) {
                advanced.push((slot.log.clone(), slot.next_offset));
                self.active.note(id, slot);
                publish(slot, &mut self.tail);
            }
        }
        self.tail.evict();
        let replies = group
            .drain(..)
            .zip(results)
            .map(|(append, results)| (append.reply, results, append.room));
        let completion = Completion {
            advanced,
            replies: replies.collect(),
        };
        match &self.syncer {
            Some(syncer) => syncer.submit(completion),
            None => completion.complete(),
        }
        if self.active.memtable_bytes >= self.options.generation_bytes {
            self.seal_or_warn();
        }
    }

    /// Gives offsets to one partition's batches and adds them to the write.
    fn stage(
        &mut self,
        append: &mut PartitionAppend,
        batch: &mut WriteBatch,
        touched: &mut Vec<PartitionId>,
        now_ms: i64,
    ) -> Result<Appended, StorageError> {
        let log = &append.log;
        let epoch = append.leader_epoch;
        match append.origin {
            Origin::Producer | Origin::Coordinator => log.check_led_in(epoch)?,
            Origin::Leader => log.check_followed_in(epoch)?,
        }
        let config = log.config();
        let log_start = log.log_start();
        let slot = self
            .slots
            .entry(log.id)
            .or_insert_with(|| Slot::new(log.clone(), log.log_end(), 0));
        if append.origin == Origin::Leader {
            let mut expected = slot.next_offset;
            for (header, ..) in &append.batches {
                let found = header.base_offset;
                if found != expected {
                    return Err(StorageError::NotContiguous { found, expected });
                }
                expected = header.last_offset() + 1;
            }
        }
        let mut answer = None;
        let mut end_offset = slot.next_offset;
        let mut admitted = Vec::with_capacity(append.batches.len());
        // Sequences of all first, so that a refused batch leaves nothing of its siblings behind.
        let mut producers_before = Vec::new();
        let mut ended = Vec::new();
        let mut offset = slot.next_offset;
        let several = append.batches.len() > 1;
        for (header, marker, bytes) in append.batches.drain(..) {
            let verdict = match append.origin {
                Origin::Producer => slot.producers.check(&header),
                Origin::Coordinator
                    if slot
                        .producers
                        .has_ended(header.producer_id, header.producer_epoch) =>
                {
                    // All that is there, and the marker is part of it.
                    Ok(Verdict::Duplicate {
                        base_offset: -1,
                        last_offset: offset - 1,
                    })
                }
                Origin::Coordinator | Origin::Leader => Ok(Verdict::Append),
            };
            match verdict {
                Ok(Verdict::Append) => {
                    let last_offset = offset + i64::from(header.last_offset_delta);
                    let before = &mut producers_before;
                    let ends = slot
                        .producers
                        .appended(&header, marker, offset, now_ms, before);
                    ended.extend(ends);
                    answer.get_or_insert(offset);
                    admitted.push((header, bytes, offset, last_offset));
                    offset = last_offset + 1;
                    end_offset = offset;
                }
                Ok(Verdict::Duplicate {
                    base_offset,
                    last_offset,
                }) => {
                    answer.get_or_insert(base_offset);
                    end_offset = last_offset + 1;
                }
                // In the log already, and its offset forgotten; what follows it in the request may not be.
                Err(SequenceError::Duplicate { .. }) if several => {
                    answer.get_or_insert(-1);
                }
                Err(error) => {
                    for (producer_id, before) in producers_before.into_iter().rev() {
                        slot.producers.restore(producer_id, before);
                    }
                    return Err(error.into());
                }
            }
        }
        let stamps = append.origin == Origin::Producer
            && config.timestamp_type == TimestampType::LogAppendTime;
        let stamp = stamps.then_some(now_ms);
        if !admitted.is_empty() {
            if slot.before.is_none() {
                touched.push(log.id);
            }
            let before = slot.before.get_or_insert_with(|| Before {
                next_offset: slot.next_offset,
                run: slot.run,
                cumulative_bytes: slot.cumulative_bytes,
                producers: Vec::new(),
            });
            slot.dirty_producers
                .extend(producers_before.iter().map(|(producer_id, _)| *producer_id));
            before.producers.append(&mut producers_before);
        }
        slot.staged_ended.append(&mut ended);
        for (header, bytes, base_offset, last_offset) in admitted {
            // Copied once: the head changes, and the tail cache must not hold on to the whole request.
            let mut stored = BytesMut::with_capacity(bytes.len());
            stored.extend_from_slice(&bytes);
            let leader_epoch = match append.origin {
                Origin::Producer | Origin::Coordinator => {
                    set_base_offset(&mut stored, base_offset);
                    set_leader_epoch(&mut stored, epoch);
                    epoch
                }
                Origin::Leader => header.leader_epoch,
            };
            if let Some(stamp) = stamp {
                set_log_append_time(&mut stored, stamp);
            }
            let stored = stored.freeze();
            batch.put(keys::log(self.generation, log.id, last_offset), &stored);
            let max_timestamp = stamp.unwrap_or(header.max_timestamp);
            slot.extend_run(
                self.generation,
                base_offset,
                last_offset,
                stored.len() as u64,
                max_timestamp,
            );
            slot.staged.push(Staged {
                base_offset,
                last_offset,
                leader_epoch,
                bytes: stored,
            });
        }
        Ok(Appended {
            base_offset: answer.unwrap_or(-1),
            log_append_time_ms: stamp,
            log_start,
            end_offset,
        })
    }

    fn announce(
        &mut self,
        logs: &[(Arc<PartitionLog>, i32)],
        producer_id: i64,
        producer_epoch: i16,
    ) -> Result<(), AnnounceError> {
        for (index, (log, leader_epoch)) in logs.iter().enumerate() {
            let at = |error| (index, error);
            log.check_led_in(*leader_epoch).map_err(at)?;
            let slot = self
                .slots
                .entry(log.id)
                .or_insert_with(|| Slot::new(log.clone(), log.log_end(), 0));
            slot.producers
                .announce(producer_id, producer_epoch)
                .map_err(|error| at(error.into()))?;
        }
        Ok(())
    }

    fn undo(&mut self, touched: &[PartitionId]) {
        self.tainted = true;
        for id in touched {
            if let Some(slot) = self.slots.get_mut(id) {
                slot.undo();
            }
        }
    }

    fn seal_or_warn(&mut self) {
        if let Err(error) = self.seal() {
            warn!(%error, "a generation could not be sealed; trying again with the next append");
            self.tainted = true;
        }
    }

    /// Ends the active generation: its runs and producers are stored, the next one begins, and its memtable goes to disk.
    fn seal(&mut self) -> Result<(), StorageError> {
        if self.active.bytes == 0 && !self.tainted {
            return Ok(());
        }
        let bytes = self.active.sealed();
        let next = Generation(self.generation.0 + 1);
        let mut batch = WriteBatch::default();
        self.expire_producers(&mut batch);
        for id in &self.active.partitions {
            let Some(slot) = self.slots.get_mut(id) else {
                continue;
            };
            slot.put_sealed(&mut batch);
            slot.put_high_watermark(&mut batch);
            let (epochs, ended) = (slot.log.epochs().encode(), slot.log.settled_ended());
            let stored = &mut slot.stored;
            Stored::put(&mut stored.epochs, keys::epochs(*id), epochs, &mut batch);
            Stored::put(&mut stored.ended, keys::ended(*id), ended, &mut batch);
        }
        batch.put(keys::generation(self.generation), bytes.encode());
        batch.put(keys::ACTIVE_GENERATION, next.0.to_be_bytes());
        // Locked meanwhile: retention must find the generation's entry as soon as it finds its runs.
        let generations = self.generations.clone();
        let mut generations = generations.lock();
        let written = match self.tainted {
            // What may follow the failed write in the WAL must never be replayed as part of this generation.
            true => self.db.write_meta_durably(batch),
            false => self.db.write_meta(batch),
        };
        if written.is_err() {
            for id in &self.active.partitions {
                if let Some(slot) = self.slots.get_mut(id) {
                    slot.stored = Stored::default();
                }
            }
        }
        written?;
        for id in std::mem::take(&mut self.active.partitions) {
            if let Some(slot) = self.slots.get_mut(&id) {
                slot.next_generation();
            }
        }
        let sealed = std::mem::replace(&mut self.generation, next);
        self.active = Active::empty();
        self.tainted = false;
        let mut flush = rocksdb::FlushOptions::default();
        flush.set_wait(false);
        let flushing = self.db.log().flush_opt(&flush);
        generations.insert(sealed, bytes);
        Ok(flushing?)
    }

    /// Of the partitions that were written to; those of idle partitions wait for the next write or start.
    fn expire_producers(&mut self, batch: &mut WriteBatch) {
        let kept_ms =
            i64::try_from(self.options.producer_expiration.as_millis()).unwrap_or(i64::MAX);
        let deadline = now_ms().saturating_sub(kept_ms);
        for id in &self.active.partitions {
            if let Some(slot) = self.slots.get_mut(id) {
                for producer_id in slot.producers.expire(deadline) {
                    batch.delete(keys::producer(*id, producer_id));
                }
            }
        }
    }

    /// Drops what is known of deleted partitions. What the active generation has of them is dead when it is sealed.
    fn forget(&mut self, logs: &[Arc<PartitionLog>]) -> Vec<Slot> {
        let mut forgotten = Vec::with_capacity(logs.len());
        for log in logs {
            if let Some(slot) = self.slots.remove(&log.id) {
                self.active.dead_bytes += slot.run.map_or(0, |run| run.bytes);
                forgotten.push(slot);
            }
            log.clear();
        }
        let slots = &self.slots;
        self.active.partitions.retain(|id| slots.contains_key(id));
        self.tail.forget_deleted();
        forgotten
    }

    /// Removes all batches that reach to or beyond `offset`. Returns the new log end offset. If it fails halfway, doing it again
    /// finishes it.
    fn truncate(
        &mut self,
        log: &Arc<PartitionLog>,
        epoch: i32,
        offset: i64,
    ) -> Result<i64, StorageError> {
        log.check_followed_in(epoch)?;
        // An append that is completed later would raise the high watermark above the new end.
        if let Some(syncer) = &self.syncer {
            syncer.wait();
        }
        let end = log.log_end();
        if offset < log.log_start() || offset > end {
            let (log_start, high_watermark) = (log.log_start(), end);
            return Err(StorageError::OffsetOutOfRange {
                offset,
                log_start,
                high_watermark,
            });
        }
        if offset == end && !self.tainted {
            return Ok(end);
        }
        // The log first: cut twice is as good as once, but `meta` must not be ahead. Each cut shows in memory as soon as it is
        // written, and not before.
        let cut = self
            .cut_active(log, offset)
            .and_then(|()| self.db.sync_log())
            .and_then(|()| self.cut_sealed(log, offset));
        self.tainted |= cut.is_err();
        cut.map(|()| log.log_end())
    }

    /// Removes all batches, and begins anew at `offset`. If it fails halfway, doing it again finishes it.
    fn begin_at(
        &mut self,
        log: &Arc<PartitionLog>,
        epoch: i32,
        offset: i64,
    ) -> Result<(), StorageError> {
        self.truncate(log, epoch, log.log_start())?;
        let slot = self
            .slots
            .entry(log.id)
            .or_insert_with(|| Slot::new(log.clone(), log.log_end(), 0));
        slot.stored = Stored::default();
        let mut batch = WriteBatch::default();
        batch.put(keys::log_start(log.id), offset.to_be_bytes());
        batch.put(keys::high_watermark(log.id), offset.to_be_bytes());
        batch.put(keys::epochs(log.id), []);
        batch.put(keys::ended(log.id), []);
        self.db.write_meta_durably(batch)?;
        slot.next_offset = offset;
        self.db.set_log_start(log.id, offset);
        log.begin_at(offset);
        Ok(())
    }

    /// In the active generation keys are deleted: they are in the same memtable, files stay apart.
    fn cut_active(&mut self, log: &Arc<PartitionLog>, offset: i64) -> Result<(), StorageError> {
        let Some(slot) = self.slots.get_mut(&log.id) else {
            return Ok(());
        };
        let Some(run) = slot.run.filter(|run| run.last_offset >= offset) else {
            return Ok(());
        };
        let cut = self.db.batches_from(log.id, &run, offset)?;
        let mut batch = WriteBatch::default();
        for key in &cut.keys {
            batch.delete(key);
        }
        self.db.write_log(batch)?;
        self.active.bytes -= cut.bytes;
        let kept = Run {
            last_offset: cut.first_offset - 1,
            bytes: run.bytes - cut.bytes,
            cumulative_bytes: run.cumulative_bytes - cut.bytes,
            ..run
        };
        slot.run = (kept.bytes > 0).then_some(kept);
        slot.forget_batches(cut.first_offset);
        slot.shorten(cut.first_offset, slot.cumulative_bytes - cut.bytes);
        Ok(())
    }

    /// In sealed generations the run's bounds hide the batches; their bytes go with the generation.
    fn cut_sealed(&mut self, log: &Arc<PartitionLog>, offset: i64) -> Result<(), StorageError> {
        let Some(slot) = self.slots.get_mut(&log.id) else {
            return Ok(());
        };
        // Locked until the writes are done, and changed only after them, as in retention.
        let mut generations = self.generations.lock();
        let mut batch = WriteBatch::default();
        let mut cumulative = slot.cumulative_bytes;
        let mut new_end = slot.next_offset.min(offset);
        let mut changed: BTreeMap<Generation, GenerationBytes> = BTreeMap::new();
        for run in self.db.runs(log.id, offset)? {
            let cut = self.db.batches_from(log.id, &run, offset)?;
            batch.delete(keys::run(log.id, run.last_offset));
            if cut.bytes < run.bytes {
                let kept = Run {
                    last_offset: cut.first_offset - 1,
                    bytes: run.bytes - cut.bytes,
                    cumulative_bytes: run.cumulative_bytes - cut.bytes,
                    ..run
                };
                batch.put(keys::run(log.id, kept.last_offset), kept.encode());
            }
            cumulative -= cut.bytes;
            new_end = new_end.min(cut.first_offset);
            bury(&generations, &mut changed, run.generation, cut.bytes);
        }
        let producers_before = slot.forget_batches(new_end);
        // Now, since a generation from which everything was cut is not sealed.
        slot.put_producers(&mut batch);
        let mut epochs = log.epochs();
        epochs.truncate(new_end);
        batch.put(keys::epochs(log.id), epochs.encode());
        let mut ended = log.ended();
        ended.truncate(new_end);
        batch.put(keys::ended(log.id), ended.encode());
        slot.stored = Stored::default();
        Compacted::cut(&self.db, log.id, new_end, &mut batch)?;
        put_generations(&changed, &mut batch);
        if let Err(error) = self.db.write_meta_durably(batch) {
            for (producer_id, before) in producers_before {
                slot.producers.restore(producer_id, before);
            }
            return Err(error);
        }
        generations.extend(changed);
        drop(generations);
        slot.shorten(new_end, cumulative);
        Ok(())
    }
}

impl GenerationBytes {
    /// Value of `meta`'s generation entries: total u64, live u64; big-endian. Since format 1.
    pub(super) fn encode(self) -> [u8; 16] {
        let mut value = [0; 16];
        value[..8].copy_from_slice(&self.total.to_be_bytes());
        value[8..].copy_from_slice(&self.live.to_be_bytes());
        value
    }

    pub(super) fn decode(value: &[u8]) -> Option<Self> {
        let (total, live) = value.split_first_chunk::<8>()?;
        Some(GenerationBytes {
            total: u64::from_be_bytes(*total),
            live: u64::from_be_bytes(live.try_into().ok()?),
        })
    }
}

/// Adds what waits in the queue to the group, up to its limit. Returns the first command that is no append.
fn collect_group(
    first: Append,
    group: &mut Vec<Append>,
    queue: &Receiver<Command>,
) -> Option<Command> {
    let bytes_of = |append: &Append| {
        append
            .partitions
            .iter()
            .map(PartitionAppend::size)
            .sum::<usize>()
    };
    let mut bytes = bytes_of(&first);
    group.push(first);
    while bytes < GROUP_BYTES {
        match queue.try_recv() {
            Ok(Command::Append(append)) => {
                bytes += bytes_of(&append);
                group.push(append);
            }
            Ok(command) => return Some(command),
            Err(_) => break,
        }
    }
    None
}

fn publish(slot: &mut Slot, tail: &mut TailBudget) {
    slot.before = None;
    let log = &slot.log;
    // Before readers can see what this is about.
    log.set_transactions(slot.staged_ended.drain(..), slot.producers.first_open());
    let published = slot.staged.drain(..).map(|staged| Published {
        ticket: tail.admit(log, staged.bytes.len()),
        base_offset: staged.base_offset,
        last_offset: staged.last_offset,
        leader_epoch: staged.leader_epoch,
        bytes: staged.bytes,
    });
    if let Some(run) = slot.run {
        log.publish(run, published);
    }
}

fn refuse(group: &mut Vec<Append>, error: &StorageError) {
    for append in group.drain(..) {
        let results = append
            .partitions
            .iter()
            .map(|_| Err(error.clone()))
            .collect();
        let _ = append.reply.send(results);
    }
}
