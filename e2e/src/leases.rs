//! What the Leases of a Cluster say about it: who leads, who is in sync, who lives.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::ListParams;
use kube::{Api, Client};
use millrace_crds::coordination::{
    BrokerSession, Held, PartitionLease, Replica, Role, TopicRecord,
};
use uuid::Uuid;

/// The name of each Cluster that is made here.
pub(crate) const CLUSTER: &str = "main";

/// The Leases of a Cluster.
pub struct Leases {
    client: Client,
    namespace: String,
}

impl Leases {
    /// Those of the one Cluster in a namespace.
    pub fn new(client: Client, namespace: &str) -> Self {
        Self {
            client,
            namespace: namespace.to_owned(),
        }
    }

    /// How many writes of Leases the API server has carried out since it was started, as it counts them.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn writes(&self) -> Result<u64> {
        let request = http::Request::get("/metrics").body(Vec::new())?;
        let metrics = self.client.request_text(request).await?;
        let writes = metrics.lines().filter(|line| {
            line.starts_with("apiserver_request_total{")
                && line.contains("resource=\"leases\"")
                && line.contains("code=\"20")
                && ["POST", "PUT", "PATCH", "DELETE"]
                    .iter()
                    .any(|verb| line.contains(&format!("verb=\"{verb}\"")))
        });
        let count = |line: &str| -> Option<u64> { line.rsplit(' ').next()?.parse().ok() };
        writes
            .map(|line| count(line).with_context(|| format!("can't read {line}")))
            .sum()
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
        let sessions = self.sessions().await?;
        let lacking = |lease: &PartitionLease| {
            let assignment = &lease.assignment;
            let Some(leader) = assignment.leader else {
                return Some("no leader".to_owned());
            };
            let lives = |(_, held): &(Uuid, Held)| {
                held.epoch == leader.broker_epoch && held.holder.is_some()
            };
            if !sessions.get(&leader.id).is_some_and(lives) {
                return Some(format!("its leader {} is gone", leader.id));
            }
            let missing = assignment.replicas.iter().find(|id| {
                let store = sessions.get(id).map(|(store, _)| *store);
                let in_sync =
                    |replica: &Replica| replica.id == **id && Some(replica.store) == store;
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
        let name = TopicRecord::object_name(CLUSTER, topic);
        let object = self.records().get(&name).await;
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

    /// The volume with which a broker has registered last, if it ever did.
    ///
    /// # Errors
    /// If the API server does not answer.
    pub async fn store(&self, broker: i32) -> Result<Option<Uuid>> {
        let sessions = self.sessions().await?;
        Ok(sessions.get(&broker).map(|(store, _)| *store))
    }

    /// Of each broker, its volume, and who holds its Lease.
    async fn sessions(&self) -> Result<HashMap<i32, (Uuid, Held)>> {
        let leases = self.list(Role::Broker).await?;
        let sessions = leases
            .iter()
            .filter_map(|lease| BrokerSession::read(lease).ok());
        Ok(sessions
            .map(|(session, held)| (session.broker_id, (session.store_id, held)))
            .collect())
    }

    async fn list(&self, role: Role) -> Result<Vec<Lease>> {
        let wanted = ListParams::default().labels(&role.selector(CLUSTER));
        Ok(self.all().list(&wanted).await?.items)
    }

    pub(crate) fn all(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub(crate) fn records(&self) -> Api<ConfigMap> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }
}
