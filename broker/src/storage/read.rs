//! Reading: from memory, or from RocksDB through the runs.

use bytes::{Bytes, BytesMut};
use millrace_record::{BatchError, BatchHeader, DecodeLimits};

use super::{
    PartitionId, PartitionLog, StorageError,
    db::Db,
    keys::{self, LOG_KEY_LEN},
    log::Located,
    run::Run,
};

/// Whole batches, in offset order.
#[derive(Clone, Debug, Default)]
pub struct ReadBatches {
    /// Each holds one batch or several, back to back.
    pub batches: Vec<Bytes>,
    /// Their bytes.
    pub bytes: usize,
    /// There was more than there was room for.
    pub more: bool,
}

impl ReadBatches {
    pub(crate) fn push(&mut self, batches: Bytes) {
        self.bytes += batches.len();
        self.batches.push(batches);
    }
}

/// How far a read goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpTo {
    /// What is committed: for consumers.
    HighWatermark,
    /// What is committed and belongs to no open transaction: for consumers of committed records.
    StableEnd,
    /// All that there is: for followers.
    LogEnd,
}

impl UpTo {
    pub(crate) fn end(self, log: &PartitionLog) -> i64 {
        match self {
            UpTo::HighWatermark => log.high_watermark(),
            UpTo::StableEnd => log.stable_end(),
            UpTo::LogEnd => log.log_end(),
        }
    }
}

/// The batches of a run that reach to or beyond an offset.
pub(super) struct Cut {
    pub keys: Vec<[u8; LOG_KEY_LEN]>,
    pub bytes: u64,
    /// Base offset of the first.
    pub first_offset: i64,
}

impl Db {
    /// The sealed runs of a partition that end at or after `offset`, in order.
    pub(super) fn runs(
        &self,
        partition: PartitionId,
        offset: i64,
    ) -> Result<Vec<Run>, StorageError> {
        let mut runs = Vec::new();
        self.each_run(partition, offset, |run| {
            runs.push(run);
            Ok(true)
        })?;
        Ok(runs)
    }

    /// Calls `each` with the sealed runs that end at or after `offset`, in order, until it returns false.
    pub(super) fn each_run(
        &self,
        partition: PartitionId,
        offset: i64,
        mut each: impl FnMut(Run) -> Result<bool, StorageError>,
    ) -> Result<(), StorageError> {
        let mut options = rocksdb::ReadOptions::default();
        options.set_iterate_upper_bound(keys::run(partition, i64::MAX));
        let mut iterator = self.meta().raw_iterator_opt(options);
        iterator.seek(keys::run(partition, offset));
        while let Some((key, value)) = iterator.item() {
            let last_offset = keys::parse_run(key).ok_or_else(|| StorageError::Corrupt {
                what: "a key of the run family".into(),
            })?;
            if !each(Run::decode(last_offset, value)?)? {
                break;
            }
            iterator.next();
        }
        Ok(iterator.status()?)
    }

    /// Calls `each` with the batches of a run that hold `offset` or come after it, in order, until it returns false.
    pub(super) fn each_batch(
        &self,
        partition: PartitionId,
        run: &Run,
        offset: i64,
        mut each: impl FnMut(i64, &[u8]) -> Result<bool, StorageError>,
    ) -> Result<(), StorageError> {
        let mut options = rocksdb::ReadOptions::default();
        options.set_iterate_upper_bound(keys::log(run.generation, partition, run.last_offset + 1));
        options.set_readahead_size(256 << 10);
        // Read once: caching it would drive out the index blocks.
        options.fill_cache(false);
        let mut iterator = self.log().raw_iterator_opt(options);
        iterator.seek(keys::log(run.generation, partition, offset));
        while let Some((key, value)) = iterator.item() {
            let (_, _, last_offset) =
                keys::parse_log(key).ok_or_else(|| StorageError::Corrupt {
                    what: "a key of the log family".into(),
                })?;
            if !each(last_offset, value)? {
                break;
            }
            iterator.next();
        }
        Ok(iterator.status()?)
    }

    pub(super) fn batches_from(
        &self,
        partition: PartitionId,
        run: &Run,
        offset: i64,
    ) -> Result<Cut, StorageError> {
        let mut cut = Cut {
            keys: Vec::new(),
            bytes: 0,
            first_offset: run.last_offset + 1,
        };
        self.each_batch(partition, run, offset, |last_offset, batch| {
            if cut.keys.is_empty() {
                cut.first_offset = BatchHeader::parse(batch)?.base_offset;
            }
            cut.keys
                .push(keys::log(run.generation, partition, last_offset));
            cut.bytes += batch.len() as u64;
            Ok(true)
        })?;
        Ok(cut)
    }

    /// Calls `each` with every run that holds `offset` or comes after it, the active one last.
    fn each_run_with_active(
        &self,
        log: &PartitionLog,
        offset: i64,
        mut each: impl FnMut(&Run) -> Result<bool, StorageError>,
    ) -> Result<(), StorageError> {
        // The active run is looked up first: if it is sealed meanwhile it is met twice, never missed.
        let active = log.active_run();
        let mut next = offset;
        let mut go_on = true;
        if active.is_none_or(|run| offset < run.first_offset) {
            self.each_run(log.id, offset, |run| {
                next = run.last_offset + 1;
                go_on = each(&run)?;
                Ok(go_on)
            })?;
        }
        match active {
            Some(run) if go_on && run.last_offset >= next => each(&run).map(|_| ()),
            _ => Ok(()),
        }
    }
}

/// Reads from memory if the offset is there. `Ok(None)`: it is on disk.
pub(super) fn read_memory(
    log: &PartitionLog,
    offset: i64,
    max_bytes: usize,
    at_least_one: bool,
    up_to: UpTo,
) -> Result<Option<ReadBatches>, StorageError> {
    log.check_offset(offset)?;
    let end = up_to.end(log);
    if offset >= end {
        return Ok(Some(ReadBatches::default()));
    }
    match log.locate(offset, end, max_bytes, at_least_one) {
        Located::Memory(read) => Ok(Some(read)),
        Located::Disk => Ok(None),
    }
}

/// Reads from RocksDB. Blocks.
pub(super) fn read_disk(
    db: &Db,
    log: &PartitionLog,
    offset: i64,
    max_bytes: usize,
    at_least_one: bool,
    up_to: UpTo,
) -> Result<ReadBatches, StorageError> {
    log.check_offset(offset)?;
    let end = up_to.end(log);
    // All batches back to back: they are sent from here.
    let mut buffer = BytesMut::with_capacity(max_bytes.min(1 << 20));
    let mut next = offset;
    let mut more = false;
    let mut hole = None;
    db.each_run_with_active(log, offset, |run| {
        let mut go_on = true;
        db.each_batch(log.id, run, next, |last_offset, batch| {
            if last_offset >= end {
                go_on = false;
                return Ok(false);
            }
            if buffer.len() + batch.len() > max_bytes && !(at_least_one && buffer.is_empty()) {
                (more, go_on) = (true, false);
                return Ok(false);
            }
            let header = BatchHeader::parse(batch)?;
            if header.base_offset > next {
                (hole, go_on) = (Some(next), false);
                return Ok(false);
            }
            // Several batches may have been where one gap is: a follower that had some of them takes the rest of it.
            match millrace_record::gap_from(&header, next)? {
                Some(rest) => buffer.extend_from_slice(&rest),
                None => buffer.extend_from_slice(batch),
            }
            next = last_offset + 1;
            Ok(true)
        })?;
        Ok(go_on)
    })?;
    // Retention may have overtaken the read: then its start is gone, and the reader must be told.
    log.check_offset(offset)?;
    if let Some(hole) = hole.filter(|_| buffer.is_empty()) {
        let what = format!("{}/{}: offset {hole} is missing", log.topic, log.index);
        return Err(StorageError::Corrupt { what });
    }
    let mut read = ReadBatches {
        more,
        ..ReadBatches::default()
    };
    if !buffer.is_empty() {
        read.push(buffer.freeze());
    }
    Ok(read)
}

/// The first record at or after a point in time: its offset and timestamp. Blocks.
pub(super) fn find_timestamp(
    db: &Db,
    log: &PartitionLog,
    timestamp_ms: i64,
) -> Result<Option<(i64, i64)>, StorageError> {
    log.check_held()?;
    let (log_start, end) = (log.log_start(), log.high_watermark());
    let mut found = None;
    db.each_run_with_active(log, log_start, |run| {
        if run.max_timestamp < timestamp_ms {
            return Ok(true);
        }
        db.each_batch(log.id, run, log_start, |_, batch| {
            let header = BatchHeader::parse(batch)?;
            if header.base_offset >= end {
                return Ok(false);
            }
            if header.max_timestamp >= timestamp_ms {
                // A batch whose producer packed it badly is found by its header.
                let whole = (header.base_offset.max(log_start), header.max_timestamp);
                found =
                    first_at_or_after(batch, timestamp_ms, log_start, end).unwrap_or(Some(whole));
            }
            Ok(found.is_none())
        })?;
        Ok(found.is_none())
    })?;
    // What was looked through may have been deleted meanwhile.
    log.check_held()?;
    Ok(found)
}

fn first_at_or_after(
    batch: &[u8],
    timestamp_ms: i64,
    from: i64,
    end: i64,
) -> Result<Option<(i64, i64)>, BatchError> {
    let batch = Bytes::copy_from_slice(batch);
    for record in millrace_record::decode(&batch, &DecodeLimits::default())? {
        let record = record?;
        if record.timestamp_ms >= timestamp_ms && (from..end).contains(&record.offset) {
            return Ok(Some((record.offset, record.timestamp_ms)));
        }
    }
    Ok(None)
}
