//! Record batches in RocksDB: append, read, retention, truncation, deletion, recovery. It holds partitions of topics and batches as
//! headers with bytes, and appends to a partition only in the epoch in which it is told to lead or to follow it; who leads, when a
//! record is committed, and clients, are above it.
//!
//! # Layout
//! Two RocksDB databases, each with one column family and one write-ahead log (WAL):
//!
//! | database | key | value |
//! |---|---|---|
//! | `log` | generation, partition, last offset of the batch | the batch, byte for byte |
//! | `meta` | kind, … | runs, descriptors, log start offsets, producers: [`keys`] |
//!
//! One WAL for all partitions: one group commit covers them all. Two databases rather than column families of one,
//! since RocksDB syncs the WAL at every flush as soon as there are several families. With one, and without fsync, a WAL file is deleted
//! before the kernel has written it back, so that the disk sees each batch once; appends ran nearly twice as fast in
//! `e2e/bench/layouts.rs`. The price: no write covers both. `log` is always ahead: what `meta` says is derived from it, and [`recovery`]
//! derives it again where `meta` is behind, and cuts it back where a crash of the machine took `log`'s unsynced end.
//!
//! A **generation** is what goes into one memtable. The writer seals it (writes the runs, counts the generation up, asks for
//! a flush) before the memtable is full, so that each flushed file holds exactly one generation and no two files overlap. RocksDB then
//! moves files down without rewriting them: a byte is written twice in its life, once to the WAL and once to its file, for
//! any number of partitions. A **run** is the part of one partition within one generation; offsets in it are contiguous
//! on disk. With the plain key (partition, offset) every flushed file overlaps all older ones and is merged again and again.
//!
//! # Rules
//! - One thread, the [`writer`], appends; offsets, sequences and runs are its own, without locks.
//! - An append is acknowledged when its group is in the WAL (`durability: os`) or after the fsync that covers it (`fsync`).
//! - [Compaction](compaction) puts new runs in place of old ones, in generations of its own, in one write of `meta`.
//! - Reads are bounded by the high watermark; the newest batches come from memory ([`log`]'s tail), older ones from RocksDB.
//! - What retention, truncation or [deletion](delete) removes is first made invisible (log start offset, run bounds), then given back as files. No
//!   tombstones are written into `log`, since a tombstone for an old generation would make files overlap.

mod compaction;
mod db;
mod delete;
mod descriptors;
mod disk;
mod epochs;
mod error;
mod keys;
mod leadership;
mod log;
mod options;
mod producers;
mod read;
mod recovery;
mod retention;
mod run;
mod store;
mod syncer;
#[cfg(test)]
mod tests;
mod topics;
mod transactions;
mod writer;

pub use descriptors::BrokerIdentity;
pub use disk::{DiskSpace, DiskState};
pub use epochs::{EpochCache, EpochEnd};
pub use error::StorageError;
pub use log::{Compaction, LogConfig, LogListener, PartitionLog, Retention};
pub use options::{Durability, StorageOptions};
pub use producers::SequenceError;
#[cfg(test)]
pub(crate) use producers::{Producers, Verdict};
pub use read::{ReadBatches, UpTo};
pub use recovery::RecoveryReport;
pub use store::Store;
pub use topics::{StoredPartition, StoredTopic};
pub(crate) use transactions::Ended;
#[cfg(test)]
pub(crate) use transactions::EndedTransactions;
pub use writer::{Append, Appended, PartitionAppend};

/// A partition's number in this store: given once, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PartitionId(pub u32);

/// The number of a generation: see the [module's page](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Generation(pub u32);

impl Generation {
    /// The first of those that compaction has written; the writer's are below. They would last for 2,000 years at one each half minute.
    pub(crate) const COMPACTED: Self = Self(1 << 31);
}
