//! What the Leases and records say, arranged by Cluster: plain data, driven by what is seen, with no IO.

mod partitions;
mod records;
mod sessions;

pub(crate) use partitions::{Held, Partitions, Topic};
pub(crate) use records::Records;
pub(crate) use sessions::{Broker, Sessions};

/// A Cluster by namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ClusterId {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl ClusterId {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}
