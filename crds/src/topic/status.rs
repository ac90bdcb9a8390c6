//! What is so of a topic, as the operator reports it.
//!
//! It is bounded: the API server keeps each object in memory and sends it to all who watch, and a topic may have 10,000 partitions.
//! So at most [`MAX_LISTED_PARTITIONS`] are listed, those in trouble first, and the totals are of all.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::conditions::MAX_CONDITIONS;
use crate::config::MAX_REPLICATION_FACTOR;

/// The most partitions that a status lists.
pub const MAX_LISTED_PARTITIONS: usize = 100;

/// What is so of a topic.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TopicStatus {
    /// Whether all is well, and if not, why and what to do. Wait for `Ready`.
    #[serde(default)]
    #[schemars(length(max = MAX_CONDITIONS))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,

    /// The `metadata.generation` of the spec that the operator has acted on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// The topic's id: that of its records, which outlive the Topic if `deletionPolicy` is `Retain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub topic_id: Option<String>,

    /// The name that producers and consumers use: with the namespace in front, as `shop..orders`, if the Cluster is in another one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 249))]
    pub topic_name: Option<String>,

    /// How many partitions the topic has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions: Option<i32>,

    /// How many replicas each partition shall have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replication_factor: Option<i32>,

    /// How many replicas must have a record before `acks=all` is answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_in_sync_replicas: Option<i32>,

    /// How many partitions have no leader, hence can be neither written nor read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions_offline: Option<i32>,

    /// How many partitions have fewer in-sync replicas than replicas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions_under_replicated: Option<i32>,

    /// How many partitions have fewer in-sync replicas than `acks=all` needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partitions_below_min_isr: Option<i32>,

    /// The bytes of all partitions, each counted once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,

    /// At most 100 partitions: those in trouble first, then by number. `millrace topics describe` shows all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_LISTED_PARTITIONS))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["partition".into()]))]
    pub partition_states: Vec<PartitionState>,
}

/// One partition. Offsets are as of the operator's last look.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PartitionState {
    /// Its number.
    pub partition: i32,
    /// The broker that leads it; absent if none does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leader: Option<i32>,
    /// How many times leadership has changed.
    #[serde(default)]
    pub leader_epoch: i32,
    /// The brokers that hold it, the preferred leader first.
    #[serde(default)]
    #[schemars(length(max = MAX_REPLICATION_FACTOR))]
    pub replicas: Vec<i32>,
    /// The brokers that are up and in sync.
    #[serde(default)]
    #[schemars(length(max = MAX_REPLICATION_FACTOR))]
    pub isr: Vec<i32>,
    /// The brokers that are away and hold all that was acknowledged: each may lead once it is back (Kafka's ELR).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_REPLICATION_FACTOR))]
    pub eligible: Vec<i32>,
    /// The oldest offset that is held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_start_offset: Option<i64>,
    /// The offset after the newest record that consumers may read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high_watermark: Option<i64>,
}

impl PartitionState {
    /// How urgent it is: without a leader, then short of what `acks=all` needs, then short of replicas, then all others.
    fn rank(&self, needed: usize) -> u8 {
        match self.leader {
            None => 0,
            Some(_) if self.isr.len() < needed => 1,
            Some(_) if self.isr.len() < self.replicas.len() => 2,
            Some(_) => 3,
        }
    }
}

impl TopicStatus {
    /// Counts the partitions, and lists as many as may be.
    pub fn set_partitions(&mut self, mut states: Vec<PartitionState>, min_in_sync_replicas: i32) {
        let count = |is: &dyn Fn(&PartitionState) -> bool| {
            let matching = states.iter().filter(|state| is(state)).count();
            Some(i32::try_from(matching).unwrap_or(i32::MAX))
        };
        let needed = usize::try_from(min_in_sync_replicas).unwrap_or(0);
        self.partitions = count(&|_| true);
        self.partitions_offline = count(&|state| state.leader.is_none());
        self.partitions_under_replicated = count(&|state| state.isr.len() < state.replicas.len());
        self.partitions_below_min_isr = count(&|state| state.isr.len() < needed);
        self.min_in_sync_replicas = Some(min_in_sync_replicas);
        states.sort_by_key(|state| (state.rank(needed), state.partition));
        states.truncate(MAX_LISTED_PARTITIONS);
        self.partition_states = states;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(partition: i32, leader: Option<i32>, isr: &[i32]) -> PartitionState {
        PartitionState {
            partition,
            leader,
            leader_epoch: 0,
            replicas: vec![0, 1, 2],
            isr: isr.to_vec(),
            eligible: Vec::new(),
            log_start_offset: Some(0),
            high_watermark: Some(10),
        }
    }

    #[test]
    fn the_list_is_bounded_with_trouble_first_and_the_totals_are_of_all() {
        let mut states: Vec<_> = (0..1000).map(|n| state(n, Some(0), &[0, 1, 2])).collect();
        states[500] = state(500, Some(0), &[0, 1]);
        states[600] = state(600, Some(0), &[0]);
        states[700] = state(700, None, &[1]);
        let mut status = TopicStatus::default();
        status.set_partitions(states, 2);
        assert_eq!(status.partitions, Some(1000));
        assert_eq!(status.partitions_offline, Some(1));
        assert_eq!(status.partitions_under_replicated, Some(3));
        assert_eq!(status.partitions_below_min_isr, Some(2));
        assert_eq!(status.partition_states.len(), MAX_LISTED_PARTITIONS);
        let first = status.partition_states.iter().map(|state| state.partition);
        assert_eq!(first.take(5).collect::<Vec<_>>(), [700, 600, 500, 0, 1]);
    }

    #[test]
    fn the_status_of_an_unseen_topic_is_read() {
        let status: TopicStatus =
            serde_json::from_value(crate::conditions::initial_status()).unwrap();
        assert_eq!(status.conditions[0].status, "Unknown");
        assert_eq!(status.partitions, None);
    }
}
