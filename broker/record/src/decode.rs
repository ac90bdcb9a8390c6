//! Reading a batch's records, which may come from anyone.
//!
//! Keys, values and headers are slices of the batch (or of its decompressed records): nothing is copied, and one kept
//! record keeps the whole buffer alive.

use bytes::Bytes;

use crate::varint::{Fault, Reader};
use crate::{BatchError, BatchHeader, Compression, HEADER_LEN, TimestampType, compression};

/// Fewest bytes of a record: its length, attributes, two deltas, two lengths, the header count.
const MIN_RECORD_LEN: usize = 7;
/// Fewest bytes of a record header: two lengths.
const MIN_HEADER_LEN: usize = 2;

/// A record's header: metadata beside key and value. Keys may repeat; they are UTF-8 by convention, which is not checked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RecordHeader {
    /// Name.
    pub key: Bytes,
    /// Value; absent and empty are different things.
    pub value: Option<Bytes>,
}

/// A record read from a batch.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Record {
    /// Position in the partition.
    pub offset: i64,
    /// Milliseconds since the epoch; by whose clock, the batch's [`TimestampType`] says.
    pub timestamp_ms: i64,
    /// Key; absent and empty are different things.
    pub key: Option<Bytes>,
    /// Value; absent (a tombstone, in compacted topics) and empty are different things.
    pub value: Option<Bytes>,
    /// Headers in the order in which the producer gave them.
    pub headers: Vec<RecordHeader>,
}

/// What a batch may cost its reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Most bytes that a compressed batch's records may become; one record's header list is held to it too.
    pub max_decompressed_bytes: usize,
}

impl Default for DecodeLimits {
    /// 64 MiB: over 60 times what a broker takes as one batch by default.
    fn default() -> Self {
        DecodeLimits {
            max_decompressed_bytes: 64 << 20,
        }
    }
}

/// Verifies the batch's checksum, decompresses it within `limits`, and reads its records one by one.
///
/// Batches that compaction thinned out or emptied are fine here, unlike in [`validate`](crate::validate).
pub fn decode(batch: &Bytes, limits: &DecodeLimits) -> Result<Records, BatchError> {
    let header = BatchHeader::parse(batch)?;
    header.check_extent(batch.len())?;
    header.check_count()?;
    header.check_crc(batch)?;
    let data = batch.slice(HEADER_LEN..);
    let data = match header.attributes.compression() {
        // Compaction leaves no data when it removes all records.
        Compression::None => data,
        _ if data.is_empty() => data,
        codec => compression::decompress(codec, &data, limits.max_decompressed_bytes)?.into(),
    };
    let needed = header.record_count as usize * MIN_RECORD_LEN;
    if needed > data.len() {
        return Err(BatchError::invalid(format!(
            "{} records need at least {needed} bytes, it has {}",
            header.record_count,
            data.len()
        )));
    }
    if header.record_count == 0 && !data.is_empty() {
        return Err(BatchError::invalid(format!(
            "it has no records and yet {} bytes of them",
            data.len()
        )));
    }
    Ok(Records {
        data,
        at: 0,
        base_offset: header.base_offset,
        base_timestamp: header.base_timestamp,
        append_time: (header.attributes.timestamp_type() == TimestampType::LogAppendTime)
            .then_some(header.max_timestamp),
        last_delta: header.last_offset_delta,
        next_delta: 0,
        count: header.record_count,
        read: 0,
        max_headers: limits.max_decompressed_bytes / size_of::<RecordHeader>(),
    })
}

/// The records of a batch, in order. After the first error it ends.
#[derive(Debug, Clone)]
pub struct Records {
    data: Bytes,
    at: usize,
    base_offset: i64,
    base_timestamp: i64,
    append_time: Option<i64>,
    last_delta: i32,
    /// Least offset delta that the next record may have.
    next_delta: i64,
    count: i32,
    read: i32,
    max_headers: usize,
}

impl Records {
    #[inline]
    fn read_record(&mut self) -> Result<Record, Fault> {
        let mut reader = Reader::new(&self.data, self.at);
        let length = usize::try_from(reader.int()?).map_err(|_| "its length is negative")?;
        let start = reader.skip(length)?;
        let end = start + length;

        let mut reader = Reader::new(&self.data[..end], start);
        reader.byte()?; // Attributes, all unused.
        let timestamp_delta = reader.long()?;
        let offset_delta = reader.int()?;
        if i64::from(offset_delta) < self.next_delta || offset_delta > self.last_delta {
            return Err("its offset delta is out of order or past the batch's last");
        }
        let key = field(&self.data, &mut reader)?;
        let value = field(&self.data, &mut reader)?;
        let headers = match reader.int()? {
            0 => Vec::new(),
            count => self.read_headers(&mut reader, count)?,
        };
        if reader.remaining() != 0 {
            return Err("bytes follow its last header");
        }
        self.at = end;
        self.next_delta = i64::from(offset_delta) + 1;
        self.read += 1;
        Ok(Record {
            offset: self.base_offset + i64::from(offset_delta),
            // With wrap-around, as Kafka's client writes and reads it.
            timestamp_ms: self
                .append_time
                .unwrap_or_else(|| self.base_timestamp.wrapping_add(timestamp_delta)),
            key,
            value,
            headers,
        })
    }

    fn read_headers(
        &self,
        reader: &mut Reader<'_>,
        count: i32,
    ) -> Result<Vec<RecordHeader>, Fault> {
        let count = usize::try_from(count).map_err(|_| "its header count is negative")?;
        if count > reader.remaining() / MIN_HEADER_LEN {
            return Err("its header count is larger than its bytes can hold");
        }
        if count > self.max_headers {
            return Err("its headers take more memory than the limit for decompressed batches");
        }
        let mut headers = Vec::with_capacity(count);
        for _ in 0..count {
            let key = field(&self.data, reader)?.ok_or("a header's key is absent")?;
            headers.push(RecordHeader {
                key,
                value: field(&self.data, reader)?,
            });
        }
        Ok(headers)
    }

    /// The next record, and its bytes as they lie there.
    pub(crate) fn next_with_bytes(&mut self) -> Option<(Result<Record, BatchError>, Bytes)> {
        let from = self.at;
        let record = self.next()?;
        let to = if record.is_ok() { self.at } else { from };
        Some((record, self.data.slice(from..to)))
    }

    fn fail(&mut self, reason: String) -> Option<Result<Record, BatchError>> {
        self.read = self.count;
        self.at = self.data.len();
        Some(Err(BatchError::invalid(reason)))
    }
}

/// A key, a value or a header's part: its length, -1 when absent, and its bytes.
#[inline]
fn field(data: &Bytes, reader: &mut Reader<'_>) -> Result<Option<Bytes>, Fault> {
    match reader.int()? {
        -1 => Ok(None),
        length => {
            let length = usize::try_from(length).map_err(|_| "a length is negative")?;
            let start = reader.skip(length)?;
            Ok(Some(data.slice(start..start + length)))
        }
    }
}

impl Iterator for Records {
    type Item = Result<Record, BatchError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.read < self.count {
            return match self.read_record() {
                Ok(record) => Some(Ok(record)),
                Err(fault) => {
                    let reason = format!(
                        "record {} of {} (byte {} of its records): {fault}",
                        self.read + 1,
                        self.count,
                        self.at
                    );
                    self.fail(reason)
                }
            };
        }
        match self.data.len() - self.at {
            0 => None,
            more => self.fail(format!("{more} bytes follow the last record")),
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        // A broken record, or bytes behind the last one, end it early or add one error.
        (0, Some((self.count - self.read) as usize + 1))
    }
}

impl std::iter::FusedIterator for Records {}
