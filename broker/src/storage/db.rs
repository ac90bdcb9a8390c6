//! The two RocksDB databases, and the table that the log's compaction filter reads.

use std::{collections::HashMap, path::Path, sync::Arc};

use parking_lot::RwLock;
use rocksdb::{DB, Options, WriteBatch, WriteOptions};

use super::{
    Durability, Generation, PartitionId, StorageError, StorageOptions, compaction::Compacted, keys,
};

/// The databases.
pub(super) struct Db {
    log: DB,
    meta: DB,
    /// Keeps RocksDB's statistics readable.
    log_options: Options,
    durability: Durability,
    log_starts: Arc<RwLock<LogStarts>>,
}

/// For the compaction filter. Numbers of partitions are never reused: what is in the log of one that is not held is of one that
/// was deleted, once all that are held are known.
#[derive(Default)]
struct LogStarts {
    by_partition: HashMap<PartitionId, Kept>,
    complete: bool,
}

/// What is kept of a partition.
#[derive(Clone, Copy, Default)]
struct Kept {
    log_start: i64,
    compacted: Option<Replaced>,
}

/// What compaction has written anew.
#[derive(Clone, Copy)]
struct Replaced {
    /// All before this offset,
    end: i64,
    /// of the writer's generations up to this one. What comes later to lower offsets, after a truncation, is none of it.
    through: Generation,
    /// Its own earlier generations are replaced, too.
    first: Generation,
}

impl Replaced {
    fn holds(&self, generation: Generation, last_offset: i64) -> bool {
        let is_old = match generation < Generation::COMPACTED {
            true => generation <= self.through,
            false => generation < self.first,
        };
        is_old && last_offset < self.end
    }
}

impl LogStarts {
    fn keeps(&self, generation: Generation, partition: PartitionId, last_offset: i64) -> bool {
        let Some(kept) = self.by_partition.get(&partition) else {
            return !self.complete;
        };
        let replaced = kept.compacted;
        last_offset >= kept.log_start && !replaced.is_some_and(|r| r.holds(generation, last_offset))
    }
}

impl Db {
    pub(super) fn open(options: &StorageOptions) -> Result<Db, StorageError> {
        let fail = |cause: String| StorageError::Open {
            path: options.path.clone(),
            cause,
        };
        std::fs::create_dir_all(&options.path).map_err(|error| fail(error.to_string()))?;
        let log_starts = Arc::new(RwLock::new(LogStarts::default()));
        let filter = log_starts.clone();
        let keep = move |key: &[u8]| match keys::parse_log(key) {
            Some((generation, partition, last_offset)) => {
                filter.read().keeps(generation, partition, last_offset)
            }
            None => true,
        };
        let log_options = options.log_database(keep);
        let open = |options: &Options, path: &Path| {
            DB::open(options, path).map_err(|error| fail(error.into_string()))
        };
        let log = open(&log_options, &options.path.join("log"))?;
        let meta = open(&options.meta_database(), &options.path.join("meta"))?;
        Ok(Db {
            log,
            meta,
            log_options,
            durability: options.durability,
            log_starts,
        })
    }

    pub(super) fn log(&self) -> &DB {
        &self.log
    }

    pub(super) fn meta(&self) -> &DB {
        &self.meta
    }

    pub(super) fn get_meta(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(self.meta.get(key)?)
    }

    /// Calls `each` with the keys that begin with `prefix` and their values, in order.
    pub(super) fn scan_meta(
        &self,
        prefix: &[u8],
        mut each: impl FnMut(&[u8], &[u8]) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let mut options = rocksdb::ReadOptions::default();
        if let Some(end) = keys::after_prefix(prefix) {
            options.set_iterate_upper_bound(end);
        }
        let mut iterator = self.meta.raw_iterator_opt(options);
        iterator.seek(prefix);
        while let Some((key, value)) = iterator.item() {
            each(key, value)?;
            iterator.next();
        }
        Ok(iterator.status()?)
    }

    /// Hands appends to the operating system, by way of the WAL.
    pub(super) fn write_log(&self, batch: WriteBatch) -> Result<(), StorageError> {
        Ok(self.log.write(batch)?)
    }

    /// Whether sealed generations wait in memory to be flushed.
    pub(super) fn has_unflushed_generations(&self) -> bool {
        let waiting = self
            .log
            .property_int_value("rocksdb.num-immutable-mem-table");
        !matches!(waiting, Ok(Some(0)))
    }

    /// Makes every append so far durable.
    pub(super) fn sync_log(&self) -> Result<(), StorageError> {
        Ok(self.log.flush_wal(true)?)
    }

    /// Writes what follows from the log so far, as durable as appends are.
    pub(super) fn write_meta(&self, batch: WriteBatch) -> Result<(), StorageError> {
        match self.durability {
            Durability::Os => Ok(self.meta.write(batch)?),
            Durability::Fsync => {
                // Never ahead of the log, also after a crash of the machine.
                self.sync_log()?;
                self.write_meta_durably(batch)
            }
        }
    }

    /// Writes what must outlive a crash of the machine whatever the durability of appends: files are deleted on the strength of it.
    pub(super) fn write_meta_durably(&self, batch: WriteBatch) -> Result<(), StorageError> {
        let mut options = WriteOptions::default();
        options.set_sync(true);
        Ok(self.meta.write_opt(batch, &options)?)
    }

    /// Tells the compaction filter what may go.
    pub(super) fn set_log_start(&self, partition: PartitionId, log_start: i64) {
        let mut log_starts = self.log_starts.write();
        log_starts
            .by_partition
            .entry(partition)
            .or_default()
            .log_start = log_start;
    }

    /// Tells the compaction filter what has been written anew.
    pub(super) fn set_compacted(&self, partition: PartitionId, compacted: &Compacted) {
        let mut log_starts = self.log_starts.write();
        let kept = log_starts.by_partition.entry(partition).or_default();
        kept.compacted = Some(Replaced {
            end: compacted.end,
            through: compacted.through,
            first: compacted.first,
        });
    }

    /// For files that are made for the log.
    pub(super) fn log_options(&self) -> &Options {
        &self.log_options
    }

    /// Tells the compaction filter that it knows all partitions that are held; from now on it has to be told of each new one
    /// before anything is appended to it.
    pub(super) fn all_log_starts_set(&self) {
        self.log_starts.write().complete = true;
    }

    /// Tells the compaction filter that partitions are deleted.
    pub(super) fn forget_log_starts(&self, partitions: impl Iterator<Item = PartitionId>) {
        let mut log_starts = self.log_starts.write();
        for partition in partitions {
            log_starts.by_partition.remove(&partition);
        }
    }

    /// RocksDB's own statistics of the log, as text of `name COUNT : value` lines.
    pub(super) fn statistics(&self) -> Option<String> {
        self.log_options.get_statistics()
    }
}
