//! Kafka's RecordBatch v2 (magic 2, KIP-98): the one format for records on the wire, in the log and in clients.
//!
//! Responsible for building, checking, splitting and reading record batches, byte-identical to Kafka's. Not responsible for
//! offsets' assignment, idempotence or storage: the broker decides those and patches the few header fields outside the CRC.
//!
//! The rules come from Kafka's documentation ("Record Batch", "Record") and KIP-98; `tests/kafka_golden.rs` checks them
//! against batches that Apache Kafka's own Java client wrote.
//!
//! ```
//! use millrace_record::{BatchBuilder, BatchOptions, Compression, DecodeLimits, decode, validate};
//!
//! let mut builder = BatchBuilder::new(BatchOptions { compression: Compression::Zstd, ..Default::default() });
//! builder.append(1_700_000_000_000, Some(b"key"), Some(b"value"), &[]);
//! let batch = builder.build()?;
//!
//! assert_eq!(validate(&batch)?.record_count, 1);
//! for record in decode(&batch, &DecodeLimits::default())? {
//!     assert_eq!(record?.value.as_deref(), Some(&b"value"[..]));
//! }
//! # Ok::<(), millrace_record::BatchError>(())
//! ```

mod builder;
mod compression;
mod control;
mod decode;
mod error;
mod header;
mod partition;
mod thin;
mod varint;

pub use builder::{BatchBuilder, BatchOptions, ProducerState};
pub use compression::{Compression, UnknownCompression};
pub use control::{EndMarker, end_marker, marker_batch};
pub use decode::{DecodeLimits, Record, RecordHeader, Records, decode};
pub use error::BatchError;
pub use header::{
    Attributes, BatchHeader, HEADER_LEN, TimestampType, set_base_offset, set_leader_epoch,
    set_log_append_time, split, validate, validate_stored,
};
pub use partition::key_partition;
pub use thin::{Thinned, gap, gap_from, hollow, thin};
