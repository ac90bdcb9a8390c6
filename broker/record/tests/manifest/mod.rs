//! The text in which the compatibility checks say what a record batch holds; `e2e/compat/RecordBatches.java` describes it
//! and writes and reads the same.

use std::fmt;

use millrace_record::{BatchHeader, Compression, Record, TimestampType};

/// A `batch` line.
pub(crate) struct Batch<'a> {
    pub(crate) file: &'a str,
    pub(crate) compression: Compression,
    pub(crate) timestamp_type: TimestampType,
    pub(crate) base_offset: i64,
    pub(crate) last_offset: i64,
    pub(crate) leader_epoch: i32,
    pub(crate) max_timestamp: i64,
    pub(crate) producer: (i64, i16),
    pub(crate) sequences: (i32, i32),
    pub(crate) transactional: bool,
    pub(crate) control: bool,
    pub(crate) delete_horizon: Option<i64>,
    pub(crate) record_count: i32,
}

impl<'a> Batch<'a> {
    /// What a batch's header says.
    #[allow(
        dead_code,
        reason = "the writer must not take its expectations from what it wrote"
    )]
    pub(crate) fn of(file: &'a str, header: &BatchHeader) -> Self {
        Batch {
            file,
            compression: header.attributes.compression(),
            timestamp_type: header.attributes.timestamp_type(),
            base_offset: header.base_offset,
            last_offset: header.last_offset(),
            leader_epoch: header.leader_epoch,
            max_timestamp: header.max_timestamp,
            producer: (header.producer_id, header.producer_epoch),
            sequences: (header.base_sequence, header.last_sequence()),
            transactional: header.attributes.is_transactional(),
            control: header.attributes.is_control(),
            delete_horizon: header
                .attributes
                .has_delete_horizon()
                .then_some(header.base_timestamp),
            record_count: header.record_count,
        }
    }
}

impl fmt::Display for Batch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "batch {} {} {} {} {} {} {} {} {} {} {} {} {} {} {}",
            self.file,
            self.compression,
            if self.timestamp_type == TimestampType::CreateTime {
                "create"
            } else {
                "append"
            },
            self.base_offset,
            self.last_offset,
            self.leader_epoch,
            self.max_timestamp,
            self.producer.0,
            self.producer.1,
            self.sequences.0,
            self.sequences.1,
            if self.transactional {
                "transactional"
            } else {
                "plain"
            },
            if self.control { "control" } else { "data" },
            self.delete_horizon.map_or("-".into(), |ms| ms.to_string()),
            self.record_count
        )
    }
}

/// A `record` line.
pub(crate) fn record(record: &Record) -> String {
    let mut line = format!(
        "record {} {} {} {}",
        record.offset,
        record.timestamp_ms,
        bytes(record.key.as_deref()),
        bytes(record.value.as_deref())
    );
    for header in &record.headers {
        line.push_str(&format!(
            " {} {}",
            bytes(Some(&header.key)),
            bytes(header.value.as_deref())
        ));
    }
    line
}

fn bytes(bytes: Option<&[u8]>) -> String {
    match bytes {
        None => "-".into(),
        Some(bytes) if bytes.len() <= 1024 => bytes
            .iter()
            .fold("0x".into(), |hex, byte| format!("{hex}{byte:02x}")),
        Some(bytes) => format!("crc32c:{}:{:08x}", bytes.len(), crc32c::crc32c(bytes)),
    }
}
