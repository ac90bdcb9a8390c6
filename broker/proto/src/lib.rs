//! The gRPC API of Millrace, package `millrace.v1`: messages, client stubs and server traits generated from `proto/`.
//!
//! `bytes` fields are [`bytes::Bytes`](https://docs.rs/bytes), so that a record batch is never copied between the
//! received message and where it goes.

pub mod codec;
mod elements;

pub use elements::MAX_REQUEST_ELEMENTS;

/// Package `millrace.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod v1 {
    tonic::include_proto!("millrace.v1");
}

/// The compiled descriptors of the package, for gRPC reflection and for counting a request's elements.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The internal topic of consumer groups.
pub const GROUPS_TOPIC: &str = "__groups";

/// The internal topic of transactions.
pub const TRANSACTIONS_TOPIC: &str = "__transactions";

/// The `domain` of every `google.rpc.ErrorInfo` that Millrace sends.
pub const ERROR_DOMAIN: &str = "millrace.dev";
