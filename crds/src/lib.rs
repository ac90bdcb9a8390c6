//! Millrace's Kubernetes resources as Rust types, and the YAML that `kubectl apply` takes.
//!
//! Responsible for: what a `Topic` document may say ([`Topic`]), its meaning after defaults and checks
//! ([`TopicConfig`]), reading such documents from files ([`read_topics`]), and the generated
//! CustomResourceDefinition ([`crd_yaml`]). Not responsible for acting on any of it: it does no networking.

mod config;
mod crd;
mod file;
mod quantity;
mod topic;

pub use config::{
    MAX_MAX_MESSAGE_BYTES, MAX_PARTITIONS, MIN_MAX_MESSAGE_BYTES, TopicConfig, TopicError,
    check_topic_name,
};
pub use crd::crd_yaml;
pub use file::{TopicFileError, read_topics};
pub use quantity::{ByteQuantity, parse_retention_time};
pub use topic::{ClusterRef, Retention, TimestampType, Topic, TopicSpec};
