//! All replicas that this broker hosts.

use std::{collections::HashMap, sync::Arc};

use parking_lot::RwLock;
use uuid::Uuid;

use super::HostedReplica;

/// A partition: its topic's id and its index.
pub type PartitionKey = (Uuid, i32);

/// The replicas, by partition.
#[derive(Debug, Default)]
pub struct Hosting(RwLock<HashMap<PartitionKey, Arc<HostedReplica>>>);

impl Hosting {
    /// One of them.
    pub fn get(&self, key: PartitionKey) -> Option<Arc<HostedReplica>> {
        self.0.read().get(&key).cloned()
    }

    /// All of them, in no order.
    pub fn all(&self) -> Vec<(PartitionKey, Arc<HostedReplica>)> {
        let all = self.0.read();
        all.iter()
            .map(|(key, hosted)| (*key, hosted.clone()))
            .collect()
    }

    /// The replica of a partition, made by `make` if there is none.
    pub fn get_or_insert(
        &self,
        key: PartitionKey,
        make: impl FnOnce() -> Arc<HostedReplica>,
    ) -> Arc<HostedReplica> {
        if let Some(hosted) = self.get(key) {
            return hosted;
        }
        self.0.write().entry(key).or_insert_with(make).clone()
    }

    /// The partition's data is gone.
    pub fn remove(&self, key: PartitionKey) {
        self.0.write().remove(&key);
    }
}
