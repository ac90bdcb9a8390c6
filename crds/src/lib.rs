//! Millrace's Kubernetes resources as Rust types, and the YAML that `kubectl apply` takes.
//!
//! Responsible for: what [`Topic`] and [`Cluster`] documents may say, the meaning of a Topic after defaults and checks
//! ([`TopicConfig`]), the [`names`] by which clients know topics, reading Topics from files ([`read_topics`]), the
//! [`conditions`] of a status, the Leases and records by which operator and brokers [coordinate](coordination), and the generated CustomResourceDefinitions ([`crds`]). Not responsible for acting on any of it: it
//! does no networking.

pub mod cluster;
pub mod conditions;
mod config;
pub mod coordination;
mod crd;
mod file;
mod kubernetes_quantity;
pub mod names;
mod quantity;
mod topic;

pub use cluster::{Cluster, ClusterSpec};
pub use config::{
    CompactionConfig, GROUPS_TOPIC, INTERNAL_TOPICS, MAX_MAX_MESSAGE_BYTES, MAX_PARTITIONS,
    MAX_REPLICATION_FACTOR, MIN_MAX_MESSAGE_BYTES, TRANSACTIONS_TOPIC, TopicConfig, TopicDefaults,
    TopicError, check_topic_name, is_internal_topic,
};
pub use crd::{CrdFile, crds};
pub use file::{TopicFileError, read_topics};
pub use quantity::{ByteQuantity, parse_retention_time};
pub use topic::{
    CleanupPolicy, ClusterRef, Compression, DeletionPolicy, MAX_LISTED_PARTITIONS, PartitionState,
    Retention, TimestampType, Topic, TopicSpec, TopicStatus,
};
