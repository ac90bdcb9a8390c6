//! A topic's record: what the operator has made of a `Topic` and its Cluster's defaults, for the brokers.
//!
//! The record's name is a hash of the topic's name, so that of two Topics with one name only one can make it.

use k8s_openapi::api::core::v1::ConfigMap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::lease::{self, LeaseError};
use super::{Role, TOPIC_LABEL};
use crate::TopicConfig;

const DATA_KEY: &str = "topic.json";

/// A topic as brokers are to serve it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TopicRecord {
    /// Given once; another topic of the same name has another.
    pub topic_id: Uuid,
    /// The `Topic` that it was made of.
    pub namespace: String,
    /// Its `metadata.name`.
    pub topic: String,
    /// Its `metadata.uid`. A Topic that is made again after it was deleted and retained takes the record over.
    pub topic_uid: String,
    /// What becomes of it.
    pub state: TopicState,
    /// Each partition below this has had a Lease: one that is missing was lost, with its leader epoch. Raised when all of `config.partitions` have been
    /// made, so that an operator that ends before leaves none that its successor would take for lost.
    #[serde(default)]
    pub partitions_made: u32,
    /// Name, partitions and configuration. `partitions` may be ahead of the Leases there are.
    pub config: TopicConfig,
}

/// What becomes of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TopicState {
    /// It is served.
    Active,
    /// Its Topic is gone, its records are kept, and it is not served.
    Retained,
    /// Each broker deletes what it has of it, and takes itself out of each partition's `replicas`.
    Deleting,
}

impl TopicRecord {
    /// The name of the ConfigMap for a topic of that name (for clients).
    pub fn object_name(cluster: &str, topic: &str) -> String {
        let digest = Sha256::digest(topic.as_bytes());
        let hash: String = digest[..16].iter().map(|b| format!("{b:02x}")).collect();
        format!("{cluster}-topic-{hash}")
    }

    /// Reads it.
    ///
    /// # Errors
    /// If the ConfigMap is not a topic's record.
    pub fn read(object: &ConfigMap) -> Result<Self, LeaseError> {
        let text = object.data.as_ref().and_then(|data| data.get(DATA_KEY));
        lease::read_document(text, || lease::name(&object.metadata), DATA_KEY)
    }

    /// Writes it into its ConfigMap.
    pub fn write(&self, object: &mut ConfigMap, cluster: &str) {
        object.metadata.name = Some(Self::object_name(cluster, &self.config.name));
        let labels = object.metadata.labels.get_or_insert_default();
        labels.extend(Role::Topic.labels(cluster));
        labels.insert(TOPIC_LABEL.to_owned(), self.topic_id.to_string());
        let data = object.data.get_or_insert_default();
        data.insert(DATA_KEY.to_owned(), lease::write_document(self));
    }
}
