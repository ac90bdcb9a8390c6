//! What can go wrong in storage.

use std::path::PathBuf;

use millrace_record::BatchError;

use super::{BrokerIdentity, SequenceError};

/// A failed storage operation. Each names the thing, the cause and the next step.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StorageError {
    /// The database could not be opened.
    #[error("can't open the store in {}: {cause}; is another broker using it, or are its permissions wrong?", path.display())]
    Open {
        /// The store's folder.
        path: PathBuf,
        /// RocksDB's or the system's own words.
        cause: String,
    },
    /// The store was written by a version that this one can't read.
    #[error("the store in {} has format {found}, this broker reads {supported}; start the version that wrote it", path.display())]
    Format {
        /// The store's folder.
        path: PathBuf,
        /// The format found.
        found: u32,
        /// The format that this version writes.
        supported: u32,
    },
    /// Stored data is damaged.
    #[error(
        "the store is corrupt: {what}; stop the broker, keep the folder, and restore the data from a replica or backup"
    )]
    Corrupt {
        /// The damaged thing.
        what: String,
    },
    /// RocksDB failed.
    #[error("storage failed: {0}; see the broker's log")]
    Rocks(String),
    /// The disk is full or nearly so.
    #[error(
        "the disk is full: {free_bytes} bytes free, {required_bytes} required; writes are refused until retention or a larger volume frees space"
    )]
    DiskFull {
        /// Bytes free now.
        free_bytes: u64,
        /// Bytes that must be free for writes.
        required_bytes: u64,
    },
    /// The offset is not in the log.
    #[error("offset {offset} is out of range: {log_start} to {high_watermark} can be read")]
    OffsetOutOfRange {
        /// The offset asked for.
        offset: i64,
        /// The first offset still held.
        log_start: i64,
        /// The first offset not readable yet.
        high_watermark: i64,
    },
    /// The batch is not acceptable.
    #[error("the batch is refused: {0}")]
    Batch(#[from] BatchError),
    /// A record without a key in a compacted topic.
    #[error(
        "the batch holds a record without a key, and the topic is compacted by key; give each record one, or set the topic's cleanupPolicy to Delete"
    )]
    NoKey,
    /// The batch is larger than the topic allows.
    #[error(
        "the batch has {size} bytes, the topic allows {max}; send smaller batches or raise the topic's maxMessageBytes"
    )]
    TooLarge {
        /// Bytes of the batch.
        size: usize,
        /// Bytes allowed.
        max: usize,
    },
    /// The batch is stamped further ahead than the topic allows.
    #[error(
        "the batch holds a record stamped {timestamp_ms}, the topic allows up to {max_timestamp_ms} now (milliseconds since 1970); correct the producer's clock, raise the topic's timestampAfterMax, or let the broker stamp records (timestampType: LogAppendTime)"
    )]
    Timestamp {
        /// The batch's greatest timestamp.
        timestamp_ms: i64,
        /// The greatest that is accepted now.
        max_timestamp_ms: i64,
    },
    /// A producer sent a control batch.
    #[error("control batches are written by brokers only; clear the control bit")]
    Control,
    /// A producer sent a transactional batch without a producer id.
    #[error("a transactional batch needs the producer id and epoch of its transaction")]
    NoProducer,
    /// A producer sent a batch that claims the broker's timestamps.
    #[error(
        "only brokers stamp records on append; clear the timestamp type bit, and ask for it with the topic's timestampType: LogAppendTime"
    )]
    Stamped,
    /// The batch's sequence is not acceptable.
    #[error(transparent)]
    Sequence(#[from] SequenceError),
    /// This broker does not lead the partition.
    #[error("this broker does not lead the partition; look up its leader and send there")]
    NotLed,
    /// The request was accepted in another leader epoch than the one in which the partition is led now.
    #[error(
        "the request was accepted in leader epoch {epoch}, the partition is led in {current} now; look up its leader and send again"
    )]
    FencedLeader {
        /// The epoch of the request.
        epoch: i32,
        /// The epoch in which the partition is led.
        current: i32,
    },
    /// What a leader sent does not follow what is there.
    #[error("a replicated batch begins at offset {found}, and {expected} is next")]
    NotContiguous {
        /// Its base offset.
        found: i64,
        /// The log end offset.
        expected: i64,
    },
    /// The partition has been deleted.
    #[error(
        "the partition has been deleted, with its topic or because it was moved; look up the topic again"
    )]
    Deleted,
    /// The store belongs to another broker.
    #[error(
        "the store belongs to {owner}, and {claimant} claims it; give each broker the volume that it had before, or a new one an empty volume"
    )]
    ClaimedByOther {
        /// Who has claimed it before.
        owner: BrokerIdentity,
        /// Who claims it now.
        claimant: BrokerIdentity,
    },
    /// A broker that runs alone was given the store of one that does not.
    #[error(
        "the store belongs to {owner}, where topics are created as resources; start it as that broker, or start a broker that runs alone on an empty folder"
    )]
    Claimed {
        /// Who has claimed it.
        owner: BrokerIdentity,
    },
    /// A partition of a Cluster was to be created in a store that none of its brokers has claimed.
    #[error(
        "the store belongs to no broker of a cluster; it has to be claimed before it holds partitions of one"
    )]
    Unclaimed,
    /// A broker of a Cluster was given the store of one that ran alone.
    #[error(
        "the store holds {topics} topics of a broker that ran alone; give a broker of a cluster an empty volume"
    )]
    UsedAlone {
        /// Topics in it.
        topics: usize,
    },
    /// The store is closing.
    #[error("the store is closing")]
    Closed,
}

impl StorageError {
    /// Whether the operating system refused a write for lack of space or quota. RocksDB passes on the system's words, not its code.
    pub(super) fn is_lack_of_space(&self) -> bool {
        const WORDS: [&str; 2] = ["No space left on device", "Disk quota exceeded"];
        matches!(self, StorageError::Rocks(text) if WORDS.iter().any(|words| text.contains(words)))
    }
}

impl From<rocksdb::Error> for StorageError {
    fn from(error: rocksdb::Error) -> Self {
        StorageError::Rocks(error.into_string())
    }
}
