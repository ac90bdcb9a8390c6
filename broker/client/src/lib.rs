//! The Rust client of Millrace: produce and consume records over gRPC.
//!
//! ```no_run
//! use std::time::Duration;
//!
//! use millrace_client::{Client, Record, StartFrom};
//!
//! # async fn example() -> Result<(), millrace_client::Error> {
//! let client = Client::connect("127.0.0.1:7070").await?;
//!
//! let producer = client.producer().linger(Duration::from_millis(1)).build().await?;
//! let delivery = producer.send(Record::to("orders").key("c42").value(r#"{"total":7}"#)).await?;
//! let meta = delivery.await?;
//! println!("written to partition {} at offset {}", meta.partition, meta.offset);
//! producer.close(Duration::from_secs(10)).await?;
//!
//! let mut consumer = client.consumer().topic("orders").start(StartFrom::Earliest).build().await?;
//! while let Some(next) = consumer.next_record().await {
//!     let consumed = next?;
//!     println!("{} {:?}", consumed.record.offset, consumed.record.value);
//! }
//! # Ok(()) }
//! ```
//!
//! - [`Producer::send`] waits only for room in a bounded buffer and returns a [`Delivery`], the future of the acknowledgement.
//!   Batching, retries within one deadline, and idempotence (no duplicates, no reordering) happen behind it.
//! - [`Consumer`] is a [`Stream`](futures::Stream) that a background task keeps fed; [`BatchConsumer`] is the same for whole batches.
//! - Everything that fails gives an [`Error`] with a [`kind`](Error::kind). Retries are reported as `tracing` events.
//!
//! Dependencies' types in this API: [`Bytes`], and from `millrace-record` the batch format's.

mod backoff;
mod client;
mod consumer;
mod coordinator;
mod error;
mod group;
mod metadata;
mod offsets;
mod partitioner;
mod producer;
mod race;
mod refresh;
mod suspects;
mod transactions;
mod transport;

pub use bytes::Bytes;
pub use millrace_record::{self, BatchHeader, Compression, RecordHeader};

pub use client::{Client, ClientBuilder};
pub use consumer::{
    BatchConsumer, ConsumedBatch, ConsumedRecord, Consumer, ConsumerBuilder, Isolation, StartFrom,
};
pub use error::{Error, ErrorKind};
pub use group::{
    Assignor, CommittedOffset, GroupDescription, GroupMember, GroupOffset, GroupState, GroupSummary,
};
pub use metadata::{BrokerInfo, ClusterMetadata, Extent, PartitionInfo, TopicInfo};
pub use offsets::{OffsetAt, OffsetSpec};
pub use partitioner::Partitioner;
pub use producer::{
    Acks, Backpressure, Delivery, Producer, ProducerBuilder, Record, RecordMeta, Transaction,
    TransactionalProducer, TrySendError,
};
pub use transactions::{TransactionState, TransactionSummary};
