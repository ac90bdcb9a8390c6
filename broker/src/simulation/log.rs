//! A partition's log on a simulated volume: the batches, how far they are synced, and what storage keeps beside them. Epochs and producers are
//! the real ones, and go through their stored form at each restart.

use std::{collections::BTreeMap, sync::LazyLock};

use fastrand::Rng;
use millrace_record::{BatchBuilder, BatchHeader, BatchOptions, ProducerState};

use crate::{
    replication::LogEnds,
    storage::{EpochCache, EpochEnd, Producers, SequenceError, Verdict},
};

/// A batch. Its value names it, whatever offset it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) base: i64,
    pub(super) count: i32,
    pub(super) epoch: i32,
    /// -1: not idempotent.
    pub(super) producer: i64,
    pub(super) sequence: i32,
    pub(super) value: u64,
}

impl Batch {
    pub(super) fn end(&self) -> i64 {
        self.base + i64::from(self.count)
    }

    fn header(&self) -> BatchHeader {
        static TEMPLATE: LazyLock<BatchHeader> = LazyLock::new(|| {
            let producer = Some(ProducerState {
                id: 0,
                epoch: 0,
                base_sequence: 0,
            });
            let mut builder = BatchBuilder::new(BatchOptions {
                producer,
                ..BatchOptions::default()
            });
            builder.append(0, None, None, &[]);
            let batch = builder.build().expect("one record makes a batch");
            BatchHeader::parse(&batch).expect("it was built a moment ago")
        });
        BatchHeader {
            base_offset: self.base,
            leader_epoch: self.epoch,
            last_offset_delta: self.count - 1,
            record_count: self.count,
            producer_id: self.producer,
            base_sequence: self.sequence,
            ..*TEMPLATE
        }
    }
}

/// What a start reads back beside the batches: as it was when it was stored last.
#[derive(Clone, Debug, Default)]
struct Stored {
    epochs: Vec<u8>,
    producers: BTreeMap<i64, Vec<u8>>,
    high_watermark: i64,
    /// What was appended from here on is replayed.
    end: i64,
}

/// A log.
#[derive(Debug, Default)]
pub(super) struct SimLog {
    batches: Vec<Batch>,
    log_start: i64,
    log_end: i64,
    durable_end: i64,
    pub(super) high_watermark: i64,
    epochs: EpochCache,
    newest_epoch: Option<i32>,
    producers: Producers,
    /// All that ever wrote here, so that their states can be stored.
    producer_ids: Vec<i64>,
    stored: Stored,
    /// Syncs that were begun before the log was cut say nothing of what is there now.
    pub(super) generation: u64,
    /// When the last sync that was begun will be done: they are done in turn.
    pub(super) synced_at: u64,
}

impl SimLog {
    pub(super) fn newest_epoch(&self) -> Option<i32> {
        self.last_epoch().max(self.newest_epoch)
    }

    /// At once on the disk.
    pub(super) fn note_epoch(&mut self, epoch: Option<i32>) {
        self.newest_epoch = self.newest_epoch.max(epoch);
    }
}

impl LogEnds for SimLog {
    fn log_start(&self) -> i64 {
        self.log_start
    }
    fn log_end(&self) -> i64 {
        self.log_end
    }
    fn durable_end(&self) -> i64 {
        self.durable_end
    }
    fn last_epoch(&self) -> Option<i32> {
        self.epochs.last()
    }
    fn end_of_epoch(&self, epoch: i32) -> EpochEnd {
        self.epochs.end_of(epoch, self.log_start, self.log_end)
    }
}

impl SimLog {
    pub(super) fn check(&self, batch: &Batch) -> Result<Verdict, SequenceError> {
        self.producers.check(&batch.header())
    }

    /// Appends a batch at the end; whether it may be was asked before.
    pub(super) fn append(&mut self, batch: Batch) {
        self.epochs.note(batch.epoch, batch.base);
        self.note_producer(&batch);
        self.log_end = batch.end();
        self.batches.push(batch);
    }

    /// A rule broken on purpose.
    pub(super) fn forget_producers(&mut self) {
        self.producers = Producers::default();
    }

    fn note_producer(&mut self, batch: &Batch) {
        if batch.producer >= 0 && !self.producer_ids.contains(&batch.producer) {
            self.producer_ids.push(batch.producer);
        }
        let header = batch.header();
        self.producers
            .appended(&header, None, batch.base, 0, &mut Vec::new());
    }

    /// The batches that end after `from` and before or at `to`.
    pub(super) fn batches(&self, from: i64, to: i64) -> &[Batch] {
        let first = self.batches.partition_point(|batch| batch.end() <= from);
        let end = self.batches.partition_point(|batch| batch.end() <= to);
        &self.batches[first.min(end)..end]
    }

    /// The batch before the one that begins at `offset`.
    pub(super) fn before(&self, offset: i64) -> Option<&Batch> {
        let at = self.batches.partition_point(|batch| batch.base < offset);
        at.checked_sub(1).map(|at| &self.batches[at])
    }

    /// Up to `end` all is on the disk.
    pub(super) fn synced(&mut self, end: i64) {
        self.durable_end = self.durable_end.max(end.min(self.log_end));
    }

    /// Waits for the disk: nothing is under way after that.
    pub(super) fn settle(&mut self) {
        self.durable_end = self.log_end;
        self.generation += 1;
    }

    /// Seals what is there, as the writer does from time to time: its epochs, producers and the high watermark are stored.
    pub(super) fn seal(&mut self) {
        self.stored = Stored {
            epochs: self.epochs.encode(),
            producers: self
                .producer_ids
                .iter()
                .filter_map(|id| Some((*id, self.producers.encode(*id)?)))
                .collect(),
            high_watermark: self.high_watermark,
            end: self.log_end,
        };
    }

    /// Cuts off all batches that reach to or beyond `offset`.
    pub(super) fn truncate(&mut self, offset: i64) {
        self.settle();
        let kept = self.batches.partition_point(|batch| batch.end() <= offset);
        self.batches.truncate(kept);
        let end = self.batches.last().map_or(self.log_start, Batch::end);
        self.producers.truncate(end, &[]);
        self.epochs.truncate(end);
        self.log_end = end;
        self.durable_end = end;
        self.high_watermark = self.high_watermark.min(end);
        self.seal();
    }

    /// Removes everything, and begins anew at `offset`.
    pub(super) fn begin_at(&mut self, offset: i64) {
        self.truncate(self.log_start);
        self.epochs = EpochCache::default();
        self.log_start = offset;
        self.log_end = offset;
        self.durable_end = offset;
        self.high_watermark = offset;
        self.seal();
    }

    /// Retention removes some of what is committed and synced. Returns whether it did.
    pub(super) fn retain(&mut self, rng: &mut Rng) -> bool {
        self.seal();
        let limit = self.high_watermark.min(self.durable_end);
        let dead = self.batches.partition_point(|batch| batch.end() <= limit);
        let gone = match rng.bool() {
            true => dead,
            false => rng.usize(0..=dead),
        };
        let Some(last) = gone.checked_sub(1).map(|at| self.batches[at]) else {
            return false;
        };
        self.batches.drain(..gone);
        self.log_start = last.end();
        self.epochs.advance(self.log_start);
        true
    }

    /// The process ended; if the power failed, some or all of what was not synced is gone, or of everything if it never was. What the next
    /// process finds, or that it can't start.
    pub(super) fn restart(
        &mut self,
        power_fails: bool,
        is_synced: bool,
        rng: &mut Rng,
    ) -> Result<(), &'static str> {
        self.generation += 1;
        if power_fails {
            let synced = match is_synced {
                true => self.batches(i64::MIN, self.durable_end).len(),
                false => 0,
            };
            let kept = rng.usize(synced..=self.batches.len());
            self.batches.truncate(kept);
        }
        let stored = std::mem::take(&mut self.stored);
        self.log_end = self.batches.last().map_or(self.log_start, Batch::end);
        self.durable_end = self.log_end;
        self.epochs = EpochCache::decode(&stored.epochs).ok_or("its stored epochs are damaged")?;
        self.producers = Producers::default();
        for (id, value) in &stored.producers {
            let read = self.producers.load(*id, value);
            read.ok_or("a stored producer is damaged")?;
        }
        self.producers.truncate(self.log_end, &[]);
        let replayed: Vec<Batch> = self.batches(stored.end, i64::MAX).to_vec();
        for batch in &replayed {
            self.epochs.note(batch.epoch, batch.base);
            self.note_producer(batch);
        }
        self.epochs.truncate(self.log_end);
        self.epochs.advance(self.log_start);
        let known = stored.high_watermark.min(self.log_end);
        self.high_watermark = known.max(self.log_start);
        self.seal();
        self.check_epochs()
    }

    /// The epoch cache says what a scan of the log says.
    pub(super) fn check_epochs(&self) -> Result<(), &'static str> {
        let mut scanned = EpochCache::default();
        for batch in &self.batches {
            scanned.note(batch.epoch, batch.base);
        }
        // Of an emptied log the cache knows the last epoch, and a scan does not.
        let is_same = scanned == self.epochs || self.batches.is_empty();
        is_same
            .then_some(())
            .ok_or("its epoch cache is not what a scan gives")
    }
}
