//! The records of all topics.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::ConfigMap;
use millrace_crds::coordination::{CLUSTER_LABEL, TopicRecord};
use uuid::Uuid;

use super::ClusterId;

/// The records of all Clusters, by the names of their ConfigMaps.
#[derive(Default)]
pub(crate) struct Records {
    clusters: HashMap<ClusterId, BTreeMap<String, Result<TopicRecord, String>>>,
    /// Which Topic a topic is of: namespace and name.
    topics: HashMap<Uuid, (String, String)>,
}

impl Records {
    /// Takes in a record.
    pub(crate) fn apply(&mut self, object: &ConfigMap) {
        let metadata = &object.metadata;
        let label = metadata.labels.as_ref().and_then(|l| l.get(CLUSTER_LABEL));
        let (Some(cluster), Some(name)) = (label, &metadata.name) else {
            return;
        };
        let namespace = metadata.namespace.as_deref().unwrap_or_default();
        let record = TopicRecord::read(object).map_err(|error| error.to_string());
        if let Ok(record) = &record {
            let topic = (record.namespace.clone(), record.topic.clone());
            self.topics.insert(record.topic_id, topic);
        }
        let records = self.clusters.entry(ClusterId::new(namespace, cluster));
        records.or_default().insert(name.clone(), record);
    }

    /// Takes note that a record is gone. Answers what it said.
    pub(crate) fn delete(&mut self, namespace: &str, name: &str) -> Option<TopicRecord> {
        let mut clusters = self.clusters.iter_mut();
        let records = clusters.find_map(|(id, records)| {
            (id.namespace == namespace && records.contains_key(name)).then_some(records)
        })?;
        let record = records.remove(name)?.ok()?;
        self.topics.remove(&record.topic_id);
        Some(record)
    }

    /// A record by the name of its ConfigMap.
    pub(crate) fn get(
        &self,
        cluster: &ClusterId,
        name: &str,
    ) -> Option<Result<TopicRecord, String>> {
        self.clusters.get(cluster)?.get(name).cloned()
    }

    /// All records of a Cluster that can be read.
    pub(crate) fn of(&self, cluster: &ClusterId) -> impl Iterator<Item = &TopicRecord> {
        let records = self.clusters.get(cluster).into_iter().flatten();
        records.filter_map(|(_, record)| record.as_ref().ok())
    }

    /// The Topic, by namespace and name, that a topic's record names.
    pub(crate) fn topic(&self, topic_id: Uuid) -> Option<&(String, String)> {
        self.topics.get(&topic_id)
    }
}
