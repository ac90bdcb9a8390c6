//! The RocksDB handle with its column families, and the table that its compaction filter reads.

use std::{collections::HashMap, path::Path, sync::Arc};

use parking_lot::RwLock;
use rocksdb::{ColumnFamily, DB, Options, WriteBatch, WriteOptions};

use super::{PartitionId, StorageError, StorageOptions, keys};

/// The database. Column families are opened with it, so that their look-up can't fail later.
pub(super) struct Db {
    rocks: DB,
    /// Keeps RocksDB's statistics readable.
    options: Options,
    log_starts: LogStarts,
}

/// The log start offset of each partition, for the compaction filter.
type LogStarts = Arc<RwLock<HashMap<PartitionId, i64>>>;

impl Db {
    pub(super) fn open(options: &StorageOptions) -> Result<Db, StorageError> {
        let fail = |cause: String| StorageError::Open {
            path: options.path.clone(),
            cause,
        };
        std::fs::create_dir_all(&options.path).map_err(|error| fail(error.to_string()))?;
        let log_starts = LogStarts::default();
        let filter = log_starts.clone();
        let keep = move |key: &[u8]| match keys::parse_log(key) {
            Some((_, partition, last_offset)) => filter
                .read()
                .get(&partition)
                .is_none_or(|log_start| last_offset >= *log_start),
            None => true,
        };
        let database = options.database();
        let rocks =
            DB::open_cf_descriptors(&database, &options.path, options.column_families(keep))
                .map_err(|error| fail(error.into_string()))?;
        for family in [keys::LOG, keys::RUN, keys::META] {
            rocks
                .cf_handle(family)
                .ok_or_else(|| fail(format!("column family {family} is missing")))?;
        }
        Ok(Db {
            rocks,
            options: database,
            log_starts,
        })
    }

    #[allow(clippy::expect_used, reason = "checked when opened")]
    fn family(&self, name: &str) -> &ColumnFamily {
        self.rocks
            .cf_handle(name)
            .expect("column families are checked when the database is opened")
    }

    pub(super) fn log(&self) -> &ColumnFamily {
        self.family(keys::LOG)
    }

    pub(super) fn run(&self) -> &ColumnFamily {
        self.family(keys::RUN)
    }

    pub(super) fn meta(&self) -> &ColumnFamily {
        self.family(keys::META)
    }

    pub(super) fn rocks(&self) -> &DB {
        &self.rocks
    }

    pub(super) fn get_meta(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        Ok(self.rocks.get_cf(self.meta(), key)?)
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
        let mut iterator = self.rocks.raw_iterator_cf_opt(self.meta(), options);
        iterator.seek(prefix);
        while let Some((key, value)) = iterator.item() {
            each(key, value)?;
            iterator.next();
        }
        Ok(iterator.status()?)
    }

    /// Writes to the WAL, handed to the operating system; with `sync` on the disk as well.
    pub(super) fn write(&self, batch: WriteBatch, sync: bool) -> Result<(), StorageError> {
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        Ok(self.rocks.write_opt(batch, &options)?)
    }

    /// Tells the compaction filter what may go.
    pub(super) fn set_log_start(&self, partition: PartitionId, log_start: i64) {
        self.log_starts.write().insert(partition, log_start);
    }

    /// RocksDB's own statistics, as text of `name COUNT : value` lines.
    pub(super) fn statistics(&self) -> Option<String> {
        self.options.get_statistics()
    }

    pub(super) fn property(&self, family: &ColumnFamily, name: &str) -> Option<u64> {
        self.rocks
            .property_int_value_cf(family, name)
            .ok()
            .flatten()
    }

    pub(super) fn path(&self) -> &Path {
        self.rocks.path()
    }
}
