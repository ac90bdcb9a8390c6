//! Building a batch: records are encoded as they come, the header is written in front of them at the end.
//!
//! Not responsible for when a batch is full or due: the producer asks for [`BatchBuilder::size`] and decides.

use bytes::Bytes;

use crate::header::{Attributes, HEADER_LEN};
use crate::{BatchError, BatchHeader, Compression, RecordHeader, compression, varint};

/// Most bytes that a record needs beside its key, value and headers: length, attributes, both deltas, two lengths, count.
const MAX_OVERHEAD: usize = 5 * varint::MAX_LEN + 1;

/// Who an idempotent producer is and where this batch stands in its sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProducerState {
    /// Producer id that the broker assigned.
    pub id: i64,
    /// Producer epoch.
    pub epoch: i16,
    /// Sequence number of the batch's first record.
    pub base_sequence: i32,
}

/// What a batch says about all its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct BatchOptions {
    /// How `build` compresses the records.
    pub compression: Compression,
    /// Set for idempotent producers.
    pub producer: Option<ProducerState>,
    /// Whether the batch belongs to a transaction.
    pub transactional: bool,
    /// Whether the batch holds a marker instead of records for people.
    pub control: bool,
}

/// Builds one record batch with base offset 0 and create time, as a producer sends it.
#[derive(Debug)]
pub struct BatchBuilder {
    options: BatchOptions,
    /// [`HEADER_LEN`] bytes for the header, then the records, uncompressed.
    buffer: Vec<u8>,
    count: usize,
    base_timestamp: i64,
    max_timestamp: i64,
}

impl BatchBuilder {
    /// An empty batch.
    pub fn new(options: BatchOptions) -> Self {
        let mut buffer = Vec::with_capacity(1024);
        buffer.resize(HEADER_LEN, 0);
        BatchBuilder {
            options,
            buffer,
            count: 0,
            base_timestamp: -1,
            max_timestamp: -1,
        }
    }

    /// Most bytes that such a record adds to a batch.
    pub fn max_record_size(
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[RecordHeader],
    ) -> usize {
        let headers: usize = headers
            .iter()
            .map(|header| {
                2 * varint::MAX_LEN + header.key.len() + header.value.as_ref().map_or(0, Bytes::len)
            })
            .sum();
        MAX_OVERHEAD + key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len) + headers
    }

    /// Appends a record and returns its offset delta. Absent (`None`) and empty keys and values are different things.
    pub fn append(
        &mut self,
        timestamp_ms: i64,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
        headers: &[RecordHeader],
    ) -> i32 {
        if self.count == 0 {
            self.base_timestamp = timestamp_ms;
            self.max_timestamp = timestamp_ms;
        }
        self.max_timestamp = self.max_timestamp.max(timestamp_ms);
        // Kafka's readers add with wrap-around, so any pair of timestamps survives.
        let timestamp_delta = timestamp_ms.wrapping_sub(self.base_timestamp);
        let delta = self.count as i64;

        let body_len = 1
            + varint::len(timestamp_delta)
            + varint::len(delta)
            + field_len(key)
            + field_len(value)
            + varint::len(headers.len() as i64)
            + headers
                .iter()
                .map(|h| field_len(Some(&h.key)) + field_len(h.value.as_deref()))
                .sum::<usize>();
        self.buffer.reserve(varint::MAX_LEN + body_len);

        let mut front = [0; 3 * varint::MAX_LEN + 1];
        let mut at = varint::write(&mut front, body_len as i64);
        at += 1; // The record's attributes, all unused.
        at += varint::write(&mut front[at..], timestamp_delta);
        at += varint::write(&mut front[at..], delta);
        self.buffer.extend_from_slice(&front[..at]);
        self.put_field(key);
        self.put_field(value);
        self.put_int(headers.len() as i64);
        for header in headers {
            self.put_field(Some(&header.key));
            self.put_field(header.value.as_deref());
        }
        self.count += 1;
        // `build` refuses batches of more than 2 GiB, which have far fewer records than this holds.
        i32::try_from(delta).unwrap_or(i32::MAX)
    }

    /// Bytes of the batch so far, before compression.
    pub fn size(&self) -> usize {
        self.buffer.len()
    }

    /// Whether no record was appended yet.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Records appended so far.
    pub fn record_count(&self) -> usize {
        self.count
    }

    /// Sets the producer's state, which is often known only when the batch is about to be sent.
    pub fn set_producer(&mut self, producer: ProducerState) {
        self.options.producer = Some(producer);
    }

    /// Compresses, writes header and checksum, and gives the batch away. Without compression no byte is copied.
    pub fn build(self) -> Result<Bytes, BatchError> {
        if self.is_empty() {
            return Err(BatchError::invalid(
                "it has no records; append at least one before building",
            ));
        }
        let too_large = || BatchError::TooLarge {
            limit: i32::MAX as usize,
        };
        i32::try_from(self.buffer.len()).map_err(|_| too_large())?;
        let record_count = i32::try_from(self.count).map_err(|_| too_large())?;
        let mut batch = match self.options.compression {
            Compression::None => self.buffer,
            codec => compression::compress(codec, &self.buffer[HEADER_LEN..])?,
        };
        let producer = self.options.producer.unwrap_or(ProducerState {
            id: -1,
            epoch: -1,
            base_sequence: -1,
        });
        let header = BatchHeader {
            attributes: Attributes::new(
                self.options.compression,
                self.options.transactional,
                self.options.control,
            ),
            last_offset_delta: record_count - 1,
            base_timestamp: self.base_timestamp,
            producer_id: producer.id,
            producer_epoch: producer.epoch,
            base_sequence: producer.base_sequence,
            record_count,
            ..BatchHeader::empty(self.max_timestamp)
        };
        header.seal(&mut batch)?;
        Ok(batch.into())
    }

    #[inline]
    fn put_int(&mut self, value: i64) {
        // One byte for up to 63, which most lengths and nearly all header counts are.
        if (0..64).contains(&value) {
            self.buffer.push((value as u8) << 1);
        } else {
            let mut out = [0; varint::MAX_LEN];
            let len = varint::write(&mut out, value);
            self.buffer.extend_from_slice(&out[..len]);
        }
    }

    #[inline]
    fn put_field(&mut self, field: Option<&[u8]>) {
        match field {
            Some(bytes) => {
                self.put_int(bytes.len() as i64);
                self.buffer.extend_from_slice(bytes);
            }
            None => self.buffer.push(1), // -1
        }
    }
}

/// Encoded length of a key, a value or a header's part, with its own length in front.
#[inline]
fn field_len(field: Option<&[u8]>) -> usize {
    match field {
        Some(bytes) => varint::len(bytes.len() as i64) + bytes.len(),
        None => 1,
    }
}
