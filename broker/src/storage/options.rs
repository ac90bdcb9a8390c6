//! How the store uses memory, disk and RocksDB: every limit with its unit, default and reason, in one place.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use rocksdb::{BlockBasedOptions, Cache, DBRecoveryMode, Options};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Blocks of runs and state in memory.
const META_CACHE_BYTES: usize = 4 * MIB;

/// When an append may be acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// Once the write-ahead log is handed to the operating system, as Kafka does by default: survives a crash of the broker, not
    /// of the machine.
    #[default]
    Os,
    /// After an fsync, shared by all appends that wait: survives a crash of the machine.
    Fsync,
}

impl FromStr for Durability {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "os" => Ok(Durability::Os),
            "fsync" => Ok(Durability::Fsync),
            other => Err(format!("{other:?} is not a durability; use os or fsync")),
        }
    }
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Durability::Os => "os",
            Durability::Fsync => "fsync",
        })
    }
}

/// The store's configuration. Memory is at most about `write_buffers` × `generation_bytes` × 1.25 + `block_cache_bytes`
/// + `tail_cache_bytes` + `queued_bytes`.
#[derive(Clone, Debug)]
pub struct StorageOptions {
    /// The folder.
    pub path: PathBuf,
    /// When an append may be acknowledged.
    pub durability: Durability,
    /// Bytes of batches in one generation. Larger ones make catch-up reads more sequential; smaller ones need less memory and
    /// give space back sooner. Default 16 MiB.
    pub generation_bytes: usize,
    /// Generations in memory at most: one that fills, the others on their way to disk. Default 3.
    pub write_buffers: usize,
    /// A generation is sealed after this time even if it is not full, so that retention can act on it. Default 10 minutes.
    pub generation_age: Duration,
    /// Bytes of blocks cached for reads of old data and for the index blocks of all files. Default 32 MiB.
    pub block_cache_bytes: usize,
    /// Bytes of the newest batches kept in memory for consumers that keep up. Default 16 MiB.
    pub tail_cache_bytes: usize,
    /// Bytes of appends waiting for the writer. Producers wait beyond that. Default 32 MiB.
    pub queued_bytes: usize,
    /// Writes are refused while the volume has less than this free. Default 512 MiB.
    pub min_free_bytes: u64,
    /// How often retention looks for what to remove. Default 30 s.
    pub retention_interval: Duration,
    /// Keys that compaction notes in one pass at most, but for those of one generation: some 40 bytes each. Default 2,000,000.
    pub compaction_keys: usize,
    /// An idempotent producer is forgotten if it has not written to a partition for this long. Default 7 days.
    pub producer_expiration: Duration,
}

impl StorageOptions {
    /// The defaults, for a small machine.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        StorageOptions {
            path: path.into(),
            durability: Durability::default(),
            generation_bytes: 16 * MIB,
            write_buffers: 3,
            generation_age: Duration::from_secs(600),
            block_cache_bytes: 32 * MIB,
            tail_cache_bytes: 16 * MIB,
            queued_bytes: 32 * MIB,
            min_free_bytes: 512 * MIB as u64,
            retention_interval: Duration::from_secs(30),
            compaction_keys: 2_000_000,
            producer_expiration: Duration::from_secs(7 * 24 * 3600),
        }
    }

    /// For both databases.
    fn database(&self) -> Options {
        let mut options = Options::default();
        options.create_if_missing(true);
        // -1 keeps every file's handle and index reader: reads never pay for opening one.
        options.set_max_open_files(-1);
        // A crash of the machine leaves the unsynced end in any order: what follows its first hole goes, in all WAL files. Recovery
        // says how many records that were known are gone.
        options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        options.set_track_and_verify_wals_in_manifest(true);
        options.set_allow_concurrent_memtable_write(false);
        options.set_enable_write_thread_adaptive_yield(false);
        options.set_advise_random_on_open(false);
        options.set_keep_log_file_num(4);
        options.set_max_log_file_size(16 * MIB);
        options.set_compression_type(rocksdb::DBCompressionType::None);
        // Both would rewrite data only because it is old.
        options.set_periodic_compaction_seconds(0);
        options.set_ttl(0);
        options
    }

    /// For the batches. `keep` tells by its key whether a batch is still wanted.
    pub(super) fn log_database(
        &self,
        mut keep: impl FnMut(&[u8]) -> bool + Send + 'static,
    ) -> Options {
        let mut options = self.database();
        options.enable_statistics();
        options.set_statistics_level(rocksdb::statistics::StatsLevel::ExceptTimers);
        // A quarter of these are for flushes: two, so that one can fill its file while the other waits for the disk.
        options.set_max_background_jobs(8);
        // Flushed batches go to the disk past the page cache where the file system can do that: a copy less, and consumers that keep up
        // are served from the tail cache anyway.
        options.set_use_direct_io_for_flush_and_compaction(supports_direct_io(&self.path));
        // Smooth write-back: without it the page cache holds hundreds of megabytes and then stalls everyone.
        options.set_bytes_per_sync(MIB as u64);
        // A WAL file lives until its write buffers are flushed, often less than a second. Left alone it is deleted before the
        // kernel writes it back, and never costs the disk anything; with fsync it goes there anyway, so the sooner the better.
        options.set_wal_bytes_per_sync(match self.durability {
            Durability::Os => 0,
            Durability::Fsync => MIB as u64,
        });
        // Larger than a generation, so that RocksDB never switches the memtable before the writer seals it.
        options.set_write_buffer_size(self.generation_bytes + self.generation_bytes / 4);
        options.set_max_write_buffer_number(i32::try_from(self.write_buffers).unwrap_or(i32::MAX));
        options.set_min_write_buffer_number_to_merge(1);
        // Two levels: files never overlap, so each moves from the first to the second without being rewritten.
        options.set_num_levels(2);
        options.set_level_compaction_dynamic_level_bytes(false);
        options.set_level_zero_file_num_compaction_trigger(1);
        options.set_level_zero_slowdown_writes_trigger(64);
        options.set_level_zero_stop_writes_trigger(128);
        options.set_soft_pending_compaction_bytes_limit(512 << 30);
        options.set_hard_pending_compaction_bytes_limit(2 << 40);
        options.set_target_file_size_base(2 * self.generation_bytes as u64);
        // Used by retention's own compactions, of generations that are mostly dead.
        options.set_compaction_filter("below log start", move |_level, key, _value| {
            if keep(key) {
                rocksdb::CompactionDecision::Keep
            } else {
                rocksdb::CompactionDecision::Remove
            }
        });
        let mut table = BlockBasedOptions::default();
        table.set_block_size(64 * KIB);
        table.set_block_cache(&Cache::new_hyper_clock_cache(self.block_cache_bytes, 0));
        table.set_cache_index_and_filter_blocks(true);
        options.set_block_based_table_factory(&table);
        options
    }

    /// For runs, descriptors and state: small, and ordinary leveled compaction.
    pub(super) fn meta_database(&self) -> Options {
        let mut options = self.database();
        options.set_max_background_jobs(2);
        options.set_write_buffer_size(4 * MIB);
        options.set_max_write_buffer_number(2);
        options.set_target_file_size_base(8 * MIB as u64);
        options.set_max_bytes_for_level_base(32 * MIB as u64);
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&Cache::new_lru_cache(META_CACHE_BYTES));
        table.set_bloom_filter(10.0, false);
        options.set_block_based_table_factory(&table);
        options
    }
}

/// Whether files in `folder` can be written past the page cache; tmpfs, among others, may not do that.
fn supports_direct_io(folder: &Path) -> bool {
    let probe = folder.join("direct-io-probe");
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::DIRECT;
    let opened = rustix::fs::open(&probe, flags, Mode::RUSR | Mode::WUSR).is_ok();
    // If it could not be removed it is empty, and in no one's way.
    let _ = std::fs::remove_file(&probe);
    opened
}
