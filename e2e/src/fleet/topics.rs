//! What the operator would write for a topic.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::PostParams;
use millrace_crds::coordination::{PartitionAssignment, PartitionLease, TopicRecord, TopicState};
use millrace_crds::{INTERNAL_TOPICS, Topic, TopicConfig, TopicDefaults};
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
        self.create(TopicConfig::resolve(&resource, NAMESPACE, defaults)?)
            .await
    }

    /// Makes the topics that groups and transactions need.
    ///
    /// # Errors
    /// As [`create_topic`](Fleet::create_topic).
    pub async fn create_internal_topics(&self, replicas: usize) -> Result<()> {
        for name in INTERNAL_TOPICS {
            let replicas = u32::try_from(replicas)?;
            self.create(TopicConfig::internal(name, replicas)).await?;
        }
        Ok(())
    }

    async fn create(&self, config: TopicConfig) -> Result<()> {
        let topic_id = Uuid::new_v4();
        let (name, partitions) = (config.name.clone(), config.partitions);
        let replication_factor = config.replication_factor as usize;
        let record = TopicRecord {
            topic_id,
            namespace: NAMESPACE.to_owned(),
            topic: name.clone(),
            topic_uid: topic_id.to_string(),
            state: TopicState::Active,
            partitions_made: partitions,
            config,
        };
        let mut object = ConfigMap::default();
        record.write(&mut object, CLUSTER);
        let records = self.leases.records();
        records.create(&PostParams::default(), &object).await?;
        let brokers: Vec<i32> = self.brokers.iter().map(|broker| broker.id()).collect();
        for partition in 0..i32::try_from(partitions)? {
            let first = usize::try_from(partition)?;
            let replicas = brokers.iter().cycle().skip(first % brokers.len());
            let replicas: Vec<i32> = replicas.take(replication_factor).copied().collect();
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
        self.leases.wait_until_whole(&name, within).await
    }
}
