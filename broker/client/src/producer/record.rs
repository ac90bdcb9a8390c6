//! A record as a caller hands it to a producer.

use std::sync::Arc;

use bytes::Bytes;
use millrace_record::RecordHeader;

/// A record to be sent.
///
/// ```
/// use millrace_client::Record;
///
/// let record = Record::to("orders").key("c42").value(r#"{"total":7}"#).header("content-type", "application/json");
/// assert_eq!(record.key.as_deref(), Some(&b"c42"[..]));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The topic's name. Callers in a hurry keep an `Arc<str>` and clone that.
    pub topic: Arc<str>,
    /// The partition; if absent, the producer's [`Partitioner`](crate::Partitioner) chooses.
    pub partition: Option<i32>,
    /// The key. Absent and empty are different things.
    pub key: Option<Bytes>,
    /// The value. Absent (a tombstone in a compacted topic) and empty are different things.
    pub value: Option<Bytes>,
    /// In this order; a key may repeat.
    pub headers: Vec<RecordHeader>,
    /// Milliseconds since the Unix epoch; if absent, the time of `send`.
    pub timestamp_ms: Option<i64>,
}

impl Record {
    /// A record without key and value.
    pub fn to(topic: impl Into<Arc<str>>) -> Self {
        Record {
            topic: topic.into(),
            partition: None,
            key: None,
            value: None,
            headers: Vec::new(),
            timestamp_ms: None,
        }
    }

    /// Sets the key.
    pub fn key(mut self, key: impl Into<Bytes>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Sets the value.
    pub fn value(mut self, value: impl Into<Bytes>) -> Self {
        self.value = Some(value.into());
        self
    }

    /// Adds a header.
    pub fn header(mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        self.headers.push(RecordHeader {
            key: key.into(),
            value: Some(value.into()),
        });
        self
    }

    /// Adds a header with a null value.
    pub fn null_header(mut self, key: impl Into<Bytes>) -> Self {
        self.headers.push(RecordHeader {
            key: key.into(),
            value: None,
        });
        self
    }

    /// Sets the time of creation, in milliseconds since the Unix epoch.
    pub fn timestamp_ms(mut self, ms: i64) -> Self {
        self.timestamp_ms = Some(ms);
        self
    }

    /// Sets the partition.
    pub fn partition(mut self, partition: i32) -> Self {
        self.partition = Some(partition);
        self
    }
}
