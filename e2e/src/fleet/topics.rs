//! What the operator would write for a topic.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::PostParams;
use millrace_crds::coordination::{PartitionAssignment, PartitionLease, TopicRecord, TopicState};
use millrace_crds::{Topic, TopicConfig, TopicDefaults};
use serde_json::json;
use uuid::Uuid;

use super::{CLUSTER, Fleet, NAMESPACE};

/// A topic to make.
#[derive(Clone, Copy, Debug)]
pub struct NewTopic<'a> {
    /// Its name.
    pub name: &'a str,
    /// How many partitions.
    pub partitions: i32,
    /// On how many brokers each.
    pub replicas: usize,
    /// How many of them must have a record.
    pub min_in_sync: usize,
}

impl Fleet {
    /// Makes a topic, its preferred leaders spread over the brokers in turn. Returns when all partitions are whole.
    ///
    /// # Errors
    /// If it is there already, or does not become whole.
    pub async fn create_topic(&self, topic: NewTopic<'_>) -> Result<()> {
        let topic_id = Uuid::new_v4();
        let resource: Topic = serde_json::from_value(json!({
            "apiVersion": "millrace.dev/v1alpha1",
            "kind": "Topic",
            "metadata": { "name": topic.name },
            "spec": {
                "partitions": topic.partitions,
                "replicationFactor": topic.replicas,
                "minInSyncReplicas": topic.min_in_sync,
            },
        }))?;
        let defaults = TopicDefaults::STANDALONE;
        let record = TopicRecord {
            topic_id,
            namespace: NAMESPACE.to_owned(),
            topic: topic.name.to_owned(),
            topic_uid: topic_id.to_string(),
            state: TopicState::Active,
            partitions_made: u32::try_from(topic.partitions)?,
            config: TopicConfig::resolve(&resource, NAMESPACE, defaults)?,
        };
        let mut object = ConfigMap::default();
        record.write(&mut object, CLUSTER);
        let records = self.leases.records();
        records.create(&PostParams::default(), &object).await?;
        let brokers: Vec<i32> = self.brokers.iter().map(|broker| broker.id()).collect();
        for partition in 0..topic.partitions {
            let first = usize::try_from(partition)?;
            let replicas = brokers.iter().cycle().skip(first % brokers.len());
            let replicas: Vec<i32> = replicas.take(topic.replicas).copied().collect();
            let made = PartitionLease {
                assignment: PartitionAssignment::new(topic_id, partition, replicas),
                held: Default::default(),
            };
            let mut lease = Lease::default();
            made.write(&mut lease, CLUSTER);
            let leases = self.leases.all();
            leases.create(&PostParams::default(), &lease).await?;
        }
        let within = Duration::from_secs(60);
        self.leases.wait_until_whole(topic.name, within).await
    }
}
