//! The batch's 61-byte header: reading it, checking a whole batch against it, and the fields that a broker may change.
//!
//! ```text
//!  0 base offset i64        23 last offset delta i32     57 record count i32
//!  8 batch length i32       27 base timestamp i64        61 records
//! 12 leader epoch i32       35 max timestamp i64
//! 16 magic i8 (= 2)         43 producer id i64
//! 17 CRC-32C u32            51 producer epoch i16
//! 21 attributes i16         53 base sequence i32
//! ```
//! All big-endian. The length counts from byte 12 on, the checksum covers byte 21 to the end, so base offset and leader
//! epoch can be set by the broker without touching the records.

use bytes::Bytes;

use crate::{BatchError, Compression};

/// Bytes of a batch's header.
pub const HEADER_LEN: usize = 61;

pub(crate) const LENGTH_PREFIX: usize = 12;
pub(crate) const MAGIC: i8 = 2;
pub(crate) const CRC_START: usize = 21;

const BASE_OFFSET: usize = 0;
const BATCH_LENGTH: usize = 8;
const LEADER_EPOCH: usize = 12;
const MAGIC_AT: usize = 16;
const CRC: usize = 17;
const ATTRIBUTES: usize = 21;
const LAST_OFFSET_DELTA: usize = 23;
const BASE_TIMESTAMP: usize = 27;
const MAX_TIMESTAMP: usize = 35;
const PRODUCER_ID: usize = 43;
const PRODUCER_EPOCH: usize = 51;
const BASE_SEQUENCE: usize = 53;
const RECORD_COUNT: usize = 57;

/// Where the timestamps of a batch's records come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum TimestampType {
    /// Each record has the time that its producer gave.
    #[default]
    CreateTime,
    /// All records have the time at which the broker appended the batch: its max timestamp.
    LogAppendTime,
}

/// The batch's attribute bits. A value exists only with a known compression code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Attributes(u16);

impl Attributes {
    const COMPRESSION: u16 = 0b111;
    const LOG_APPEND_TIME: u16 = 1 << 3;
    const TRANSACTIONAL: u16 = 1 << 4;
    const CONTROL: u16 = 1 << 5;
    const DELETE_HORIZON: u16 = 1 << 6;

    pub(crate) fn new(compression: Compression, transactional: bool, control: bool) -> Self {
        let flag = |on: bool, bit: u16| if on { bit } else { 0 };
        Attributes(
            compression.code()
                | flag(transactional, Self::TRANSACTIONAL)
                | flag(control, Self::CONTROL),
        )
    }

    fn from_bits(bits: u16) -> Result<Self, BatchError> {
        match Compression::from_code(bits & Self::COMPRESSION) {
            Some(_) => Ok(Attributes(bits)),
            None => Err(BatchError::invalid(format!(
                "compression code {} is unknown; codes are 0 none, 1 gzip, 2 snappy, 3 lz4, 4 zstd",
                bits & Self::COMPRESSION
            ))),
        }
    }

    /// The bits as in the header, including those without a meaning yet.
    pub fn bits(self) -> u16 {
        self.0
    }

    /// How the records are compressed.
    pub fn compression(self) -> Compression {
        Compression::from_code(self.0 & Self::COMPRESSION).unwrap_or_default()
    }

    /// Where the records' timestamps come from.
    pub fn timestamp_type(self) -> TimestampType {
        if self.0 & Self::LOG_APPEND_TIME == 0 {
            TimestampType::CreateTime
        } else {
            TimestampType::LogAppendTime
        }
    }

    /// Whether the batch belongs to a transaction.
    pub fn is_transactional(self) -> bool {
        self.0 & Self::TRANSACTIONAL != 0
    }

    /// Whether the batch holds a marker (commit, abort) for clients' machinery and no records for people.
    pub fn is_control(self) -> bool {
        self.0 & Self::CONTROL != 0
    }

    /// Whether the base timestamp is the time after which compaction may drop the batch's tombstones (KIP-534).
    pub fn has_delete_horizon(self) -> bool {
        self.0 & Self::DELETE_HORIZON != 0
    }
}

/// A batch's header, read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BatchHeader {
    /// Offset of the first record; a producer writes 0, the leader sets it.
    pub base_offset: i64,
    /// Bytes after the length field itself; see [`BatchHeader::size`].
    pub batch_length: i32,
    /// Epoch of the leader that appended the batch, -1 until then.
    pub leader_epoch: i32,
    /// Message format, always 2.
    pub magic: i8,
    /// CRC-32C of everything from the attributes on.
    pub crc: u32,
    /// Compression, timestamp type and flags.
    pub attributes: Attributes,
    /// Offset of the last record less the base offset. Compaction leaves it when it removes records.
    pub last_offset_delta: i32,
    /// What the records' timestamp deltas are added to.
    pub base_timestamp: i64,
    /// Greatest timestamp in the batch.
    pub max_timestamp: i64,
    /// Id of an idempotent producer, or -1.
    pub producer_id: i64,
    /// Epoch of that producer, or -1.
    pub producer_epoch: i16,
    /// Sequence number of the first record, or -1.
    pub base_sequence: i32,
    /// Records in the batch.
    pub record_count: i32,
}

impl BatchHeader {
    /// Reads the header at the start of `bytes`, which may hold less or more than the whole batch.
    pub fn parse(bytes: &[u8]) -> Result<BatchHeader, BatchError> {
        let Some(h) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(BatchError::Truncated {
                needed: HEADER_LEN,
                available: bytes.len(),
            });
        };
        let magic = h[MAGIC_AT] as i8;
        if magic != MAGIC {
            return Err(BatchError::UnsupportedMagic { magic });
        }
        let batch_length = i32::from_be_bytes(field(h, BATCH_LENGTH));
        if batch_length < (HEADER_LEN - LENGTH_PREFIX) as i32 {
            return Err(BatchError::invalid(format!(
                "batch length {batch_length} is less than the {} bytes that a header alone has",
                HEADER_LEN - LENGTH_PREFIX
            )));
        }
        Ok(BatchHeader {
            base_offset: i64::from_be_bytes(field(h, BASE_OFFSET)),
            batch_length,
            leader_epoch: i32::from_be_bytes(field(h, LEADER_EPOCH)),
            magic,
            crc: u32::from_be_bytes(field(h, CRC)),
            attributes: Attributes::from_bits(u16::from_be_bytes(field(h, ATTRIBUTES)))?,
            last_offset_delta: i32::from_be_bytes(field(h, LAST_OFFSET_DELTA)),
            base_timestamp: i64::from_be_bytes(field(h, BASE_TIMESTAMP)),
            max_timestamp: i64::from_be_bytes(field(h, MAX_TIMESTAMP)),
            producer_id: i64::from_be_bytes(field(h, PRODUCER_ID)),
            producer_epoch: i16::from_be_bytes(field(h, PRODUCER_EPOCH)),
            base_sequence: i32::from_be_bytes(field(h, BASE_SEQUENCE)),
            record_count: i32::from_be_bytes(field(h, RECORD_COUNT)),
        })
    }

    /// Bytes of the whole batch, header included.
    pub fn size(&self) -> usize {
        LENGTH_PREFIX + usize::try_from(self.batch_length).unwrap_or(0)
    }

    /// Offset of the last record (saturating: [`validate`] and `decode` refuse offsets past `i64::MAX`).
    pub fn last_offset(&self) -> i64 {
        self.base_offset
            .saturating_add(i64::from(self.last_offset_delta))
    }

    /// Sequence number of the last record, or -1 without one. Sequences go from `i32::MAX` on to 0, as Kafka's do.
    pub fn last_sequence(&self) -> i32 {
        if self.base_sequence < 0 {
            return self.base_sequence;
        }
        self.base_sequence.wrapping_add(self.last_offset_delta) & i32::MAX
    }

    /// A header of no records and no producer.
    pub(crate) fn empty(max_timestamp: i64) -> Self {
        BatchHeader {
            base_offset: 0,
            batch_length: 0,
            leader_epoch: -1,
            magic: MAGIC,
            crc: 0,
            attributes: Attributes::new(Compression::None, false, false),
            last_offset_delta: 0,
            base_timestamp: max_timestamp,
            max_timestamp,
            producer_id: -1,
            producer_epoch: -1,
            base_sequence: -1,
            record_count: 0,
        }
    }

    /// Writes the header, with the batch's length and checksum as they are now, in front of the records that are there already.
    pub(crate) fn seal(mut self, batch: &mut [u8]) -> Result<(), BatchError> {
        let too_large = |_| BatchError::TooLarge {
            limit: i32::MAX as usize,
        };
        self.batch_length = i32::try_from(batch.len() - LENGTH_PREFIX).map_err(too_large)?;
        self.write(batch);
        set_checksum(batch);
        Ok(())
    }

    /// What a reader checks: compaction may have taken records away.
    pub(crate) fn check_count(&self) -> Result<(), BatchError> {
        let offsets = i64::from(self.last_offset_delta) + 1;
        if self.record_count < 0 || i64::from(self.record_count) > offsets {
            return Err(BatchError::invalid(format!(
                "record count {} does not fit its {offsets} offsets",
                self.record_count
            )));
        }
        Ok(())
    }

    /// Writes the header to the first [`HEADER_LEN`] bytes of `out`.
    fn write(&self, out: &mut [u8]) {
        put(out, BASE_OFFSET, self.base_offset.to_be_bytes());
        put(out, BATCH_LENGTH, self.batch_length.to_be_bytes());
        put(out, LEADER_EPOCH, self.leader_epoch.to_be_bytes());
        put(out, MAGIC_AT, self.magic.to_be_bytes());
        put(out, CRC, self.crc.to_be_bytes());
        put(out, ATTRIBUTES, self.attributes.0.to_be_bytes());
        put(out, LAST_OFFSET_DELTA, self.last_offset_delta.to_be_bytes());
        put(out, BASE_TIMESTAMP, self.base_timestamp.to_be_bytes());
        put(out, MAX_TIMESTAMP, self.max_timestamp.to_be_bytes());
        put(out, PRODUCER_ID, self.producer_id.to_be_bytes());
        put(out, PRODUCER_EPOCH, self.producer_epoch.to_be_bytes());
        put(out, BASE_SEQUENCE, self.base_sequence.to_be_bytes());
        put(out, RECORD_COUNT, self.record_count.to_be_bytes());
    }

    /// What both a broker on produce and a reader check: exact length and representable offsets.
    pub(crate) fn check_extent(&self, available: usize) -> Result<(), BatchError> {
        let size = self.size();
        if available < size {
            return Err(BatchError::Truncated {
                needed: size,
                available,
            });
        }
        if available > size {
            return Err(BatchError::invalid(format!(
                "{} bytes follow the batch, which says that it is {size} bytes long",
                available - size
            )));
        }
        if self.last_offset_delta < 0 {
            return Err(BatchError::invalid(format!(
                "last offset delta {} is negative",
                self.last_offset_delta
            )));
        }
        if self
            .base_offset
            .checked_add(i64::from(self.last_offset_delta))
            .is_none()
        {
            return Err(BatchError::invalid(format!(
                "offsets from {} on overflow",
                self.base_offset
            )));
        }
        Ok(())
    }

    pub(crate) fn check_crc(&self, batch: &[u8]) -> Result<(), BatchError> {
        let actual = checksum(batch);
        if actual == self.crc {
            Ok(())
        } else {
            Err(BatchError::CorruptCrc {
                expected: self.crc,
                actual,
            })
        }
    }
}

/// Checks a batch as a broker does on produce, without decoding records: format, exact length, count and offset delta,
/// sequence, checksum. Whether control batches are welcome is the caller's decision.
pub fn validate(batch: &[u8]) -> Result<BatchHeader, BatchError> {
    checked(batch, |header| {
        if header.record_count < 1 {
            return Err(BatchError::invalid(format!(
                "record count is {}, at least 1 is needed",
                header.record_count
            )));
        }
        if header.last_offset_delta != header.record_count - 1 {
            return Err(BatchError::invalid(format!(
                "last offset delta {} does not fit {} records, whose last has delta {}",
                header.last_offset_delta,
                header.record_count,
                header.record_count - 1
            )));
        }
        Ok(())
    })
}

/// Checks a batch that is stored, or comes from where it was: as [`validate`] does, but compaction may have thinned it out.
///
/// # Errors
/// If it is not whole.
pub fn validate_stored(batch: &[u8]) -> Result<BatchHeader, BatchError> {
    checked(batch, BatchHeader::check_count)
}

fn checked(
    batch: &[u8],
    check_count: impl Fn(&BatchHeader) -> Result<(), BatchError>,
) -> Result<BatchHeader, BatchError> {
    let header = BatchHeader::parse(batch)?;
    header.check_extent(batch.len())?;
    check_count(&header)?;
    // A transaction marker carries its producer's id and no sequence.
    if header.producer_id >= 0 && header.base_sequence < 0 && !header.attributes.is_control() {
        return Err(BatchError::invalid(format!(
            "base sequence {} of producer {} is negative",
            header.base_sequence, header.producer_id
        )));
    }
    header.check_crc(batch)?;
    Ok(header)
}

/// Sets the base offset. Outside the checksum.
///
/// # Panics
/// If `batch` is shorter than a header; pass batches that [`validate`] accepted.
pub fn set_base_offset(batch: &mut [u8], base_offset: i64) {
    put(batch, BASE_OFFSET, base_offset.to_be_bytes());
}

/// Sets the leader epoch. Outside the checksum.
///
/// # Panics
/// If `batch` is shorter than a header; pass batches that [`validate`] accepted.
pub fn set_leader_epoch(batch: &mut [u8], leader_epoch: i32) {
    put(batch, LEADER_EPOCH, leader_epoch.to_be_bytes());
}

/// Gives all records the time `now_ms`: sets the timestamp type and the max timestamp and computes the checksum anew.
///
/// # Panics
/// If `batch` is shorter than a header; pass batches that [`validate`] accepted.
pub fn set_log_append_time(batch: &mut [u8], now_ms: i64) {
    let bits = u16::from_be_bytes([batch[ATTRIBUTES], batch[ATTRIBUTES + 1]])
        | Attributes::LOG_APPEND_TIME;
    put(batch, ATTRIBUTES, bits.to_be_bytes());
    put(batch, MAX_TIMESTAMP, now_ms.to_be_bytes());
    set_checksum(batch);
}

/// Computes the checksum and writes it to the header.
fn set_checksum(batch: &mut [u8]) {
    let crc = checksum(batch);
    put(batch, CRC, crc.to_be_bytes());
}

/// Cuts `bytes` into the whole batches that lie back to back in it, without copying or checking their contents. After the
/// first error, such as a partial batch at the end, it ends.
pub fn split(bytes: Bytes) -> impl Iterator<Item = Result<Bytes, BatchError>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let size = match BatchHeader::parse(&rest) {
            Ok(header) if header.size() <= rest.len() => header.size(),
            Ok(header) => {
                let available = std::mem::take(&mut rest).len();
                return Some(Err(BatchError::Truncated {
                    needed: header.size(),
                    available,
                }));
            }
            Err(error) => {
                rest = Bytes::new();
                return Some(Err(error));
            }
        };
        Some(Ok(rest.split_to(size)))
    })
}

fn checksum(batch: &[u8]) -> u32 {
    crc32c::crc32c(&batch[CRC_START..])
}

fn field<const N: usize>(header: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&header[at..at + N]);
    out
}

fn put<const N: usize>(out: &mut [u8], at: usize, value: [u8; N]) {
    out[at..at + N].copy_from_slice(&value);
}
