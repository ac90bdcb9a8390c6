//! What the operator would write for a topic, and what the brokers make of it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::{ListParams, PostParams};
use millrace_crds::coordination::{
    BrokerSession, PartitionAssignment, PartitionLease, Role, TopicRecord, TopicState,
};
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
        let records: Api<ConfigMap> = Api::namespaced(self.client.clone(), NAMESPACE);
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
            self.leases().create(&PostParams::default(), &lease).await?;
        }
        self.wait_until_whole(topic.name, Duration::from_secs(60))
            .await
    }

    /// Waits until each partition of a topic has a leader that lives and all its replicas in sync, each on the volume that its broker has now.
    ///
    /// # Errors
    /// If that takes longer.
    pub async fn wait_until_whole(&self, topic: &str, within: Duration) -> Result<()> {
        let begun = Instant::now();
        loop {
            let found = self.unwhole(topic).await;
            match found {
                Ok(found) if found.is_empty() => return Ok(()),
                found if begun.elapsed() >= within => {
                    bail!("topic {topic} is not whole after {within:?}: {found:?}")
                }
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// Partitions of a topic that lack a leader that lives, or a replica in sync, and what they lack.
    ///
    /// # Errors
    /// If the API server does not answer, or has no such topic.
    pub async fn unwhole(&self, topic: &str) -> Result<Vec<(i32, String)>> {
        let sessions: HashMap<i32, _> = self
            .list(Role::Broker)
            .await?
            .iter()
            .filter_map(|lease| BrokerSession::read(lease).ok())
            .map(|(session, held)| (session.broker_id, (session.store_id, held)))
            .collect();
        let lacking = |lease: &PartitionLease| {
            let assignment = &lease.assignment;
            let Some(leader) = assignment.leader else {
                return Some("no leader".to_owned());
            };
            let lives = |(_, held): &(Uuid, millrace_crds::coordination::Held)| {
                held.epoch == leader.broker_epoch && held.holder.is_some()
            };
            if !sessions.get(&leader.id).is_some_and(lives) {
                return Some(format!("its leader {} is gone", leader.id));
            }
            let missing = assignment.replicas.iter().find(|id| {
                let store = sessions.get(id).map(|(store, _)| *store);
                let in_sync = |replica: &millrace_crds::coordination::Replica| {
                    replica.id == **id && Some(replica.store) == store
                };
                !assignment.isr.iter().any(in_sync)
            });
            missing.map(|id| format!("replica {id} is not in sync"))
        };
        let partitions = self.partitions(topic).await?;
        Ok(partitions
            .iter()
            .filter_map(|lease| Some((lease.assignment.partition, lacking(lease)?)))
            .collect())
    }

    /// The partitions of a topic, as their Leases say.
    ///
    /// # Errors
    /// If the API server does not answer, or has no such topic.
    pub async fn partitions(&self, topic: &str) -> Result<Vec<PartitionLease>> {
        let records: Api<ConfigMap> = Api::namespaced(self.client.clone(), NAMESPACE);
        let object = records.get(&TopicRecord::object_name(CLUSTER, topic)).await;
        let record = TopicRecord::read(&object.with_context(|| format!("topic {topic}"))?)?;
        let mut found = Vec::new();
        for lease in self.list(Role::Partition).await? {
            let lease = PartitionLease::read(&lease)?;
            if lease.assignment.topic_id == record.topic_id {
                found.push(lease);
            }
        }
        found.sort_unstable_by_key(|lease| lease.assignment.partition);
        Ok(found)
    }

    async fn list(&self, role: Role) -> Result<Vec<Lease>> {
        let wanted = ListParams::default().labels(&role.selector(CLUSTER));
        Ok(self.leases().list(&wanted).await?.items)
    }

    fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }
}
