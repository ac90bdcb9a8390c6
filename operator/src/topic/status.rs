//! What is said of a Topic: pure.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use millrace_crds::conditions::{ConditionStatus, ConditionType, Observed, Reason, set_condition};
use millrace_crds::coordination::TopicRecord;
use millrace_crds::{PartitionState, Topic, TopicStatus};

use crate::index;
use crate::problem::Problem;

/// What the operator found and did.
pub(super) struct Found<'a> {
    /// The topic's record, if the Topic has one.
    pub(super) record: Option<&'a TopicRecord>,
    pub(super) leases: &'a index::Topic,
    /// So many partitions are known to have had a Lease.
    pub(super) made: i32,
    /// A broker of the Cluster is controller.
    pub(super) controller: bool,
    pub(super) problem: Option<Problem>,
}

pub(super) fn status(topic: &Topic, found: &Found<'_>, now: &Time) -> TopicStatus {
    let before = topic.status.clone().unwrap_or_default();
    let mut status = TopicStatus {
        conditions: before.conditions,
        observed_generation: topic.metadata.generation,
        // As of the operator's last look at the brokers.
        size_bytes: before.size_bytes,
        ..TopicStatus::default()
    };
    if let Some(record) = found.record {
        let config = &record.config;
        status.topic_id = Some(record.topic_id.to_string());
        status.topic_name = Some(config.name.clone());
        status.replication_factor = i32::try_from(config.replication_factor).ok();
        let min = config.min_insync_replicas.unwrap_or(1);
        status.min_in_sync_replicas = i32::try_from(min).ok();
        let states = found.leases.there.values().map(state).collect();
        status.set_partitions(states, status.min_in_sync_replicas.unwrap_or(1));
        status.partitions = Some(found.made);
    }
    for observed in conditions(topic, &status, found) {
        set_condition(
            &mut status.conditions,
            &observed,
            topic.metadata.generation,
            now,
        );
    }
    status
}

fn state(held: &index::Held) -> PartitionState {
    let assignment = &held.lease.assignment;
    PartitionState {
        partition: assignment.partition,
        leader: assignment.leader.map(|leader| leader.id),
        leader_epoch: held.lease.held.epoch,
        replicas: assignment.replicas.clone(),
        isr: assignment.isr.iter().map(|replica| replica.id).collect(),
        log_start_offset: None,
        high_watermark: None,
    }
}

fn conditions(topic: &Topic, status: &TopicStatus, found: &Found<'_>) -> [Observed; 4] {
    let lack = lack(topic, status, found);
    let partitions = status.partitions.unwrap_or(0);
    let (reason, message, stalled) = match &lack {
        Some(problem) => (problem.reason, problem.message.clone(), problem.stalled),
        None => (
            Reason::AsSpecified,
            format!("all {partitions} partitions have a leader"),
            false,
        ),
    };
    let (degraded, degraded_reason, degraded_message) = degraded(status, found);
    let observed = |condition, holds: bool, reason, message: &str| Observed {
        condition,
        status: ConditionStatus::from(holds),
        reason,
        message: message.to_owned(),
    };
    [
        observed(ConditionType::Ready, lack.is_none(), reason, &message),
        observed(
            ConditionType::Degraded,
            degraded,
            degraded_reason,
            &degraded_message,
        ),
        observed(
            ConditionType::Reconciling,
            lack.is_some() && !stalled,
            reason,
            &message,
        ),
        observed(ConditionType::Stalled, stalled, reason, &message),
    ]
}

fn lack(topic: &Topic, status: &TopicStatus, found: &Found<'_>) -> Option<Problem> {
    if let Some(problem) = &found.problem {
        return Some(problem.clone());
    }
    if let Some((partition, reason)) = found.leases.unreadable.iter().next() {
        let message = format!("partition {partition}: {reason}");
        return Some(Problem::stalled(Reason::Unreadable, message));
    }
    let wanted = found.record.map_or(0, |record| record.config.partitions);
    let there = found.leases.there.len();
    if there < wanted as usize {
        let message = format!("{there} of {wanted} partitions are made");
        return Some(Problem::passing(Reason::Creating, message));
    }
    let offline = status.partitions_offline.unwrap_or(0);
    if offline == 0 {
        return None;
    }
    let cluster = &topic.spec.cluster_ref.name;
    if !found.controller {
        return Some(Problem::passing(
            Reason::ClusterNotReady,
            format!(
                "{offline} of {wanted} partitions have no leader, and Cluster {cluster} has no controller that could elect one; see its conditions"
            ),
        ));
    }
    Some(Problem::passing(
        Reason::PartitionsOffline,
        format!(
            "{offline} of {wanted} partitions have no leader; one is elected as soon as a broker of their in-sync replicas is up (status.partitionStates)"
        ),
    ))
}

fn degraded(status: &TopicStatus, found: &Found<'_>) -> (bool, Reason, String) {
    let partitions = status.partitions.unwrap_or(0);
    let there = found.leases.there.values();
    let lost_leader = there
        .filter(|held| held.lease.assignment.leader.is_none() && has_led(held))
        .count();
    // Those that never had a leader hold nothing that could be short.
    let fresh = i32::try_from(found.leases.there.len() - found.led()).unwrap_or(0);
    let below = status.partitions_below_min_isr.unwrap_or(0) - fresh;
    let under = status.partitions_under_replicated.unwrap_or(0) - fresh;
    if lost_leader > 0 {
        let message = format!("{lost_leader} of {partitions} partitions lost their leader");
        return (true, Reason::PartitionsOffline, message);
    }
    if below > 0 {
        let message = format!(
            "{below} of {partitions} partitions have fewer in-sync replicas than the {} that acks=all needs, and refuse it",
            status.min_in_sync_replicas.unwrap_or(1)
        );
        return (true, Reason::BelowMinIsr, message);
    }
    if under > 0 {
        let message =
            format!("{under} of {partitions} partitions have fewer in-sync replicas than replicas");
        return (true, Reason::UnderReplicated, message);
    }
    let message = "no partition that ever had a leader lacks it or a replica".to_owned();
    (false, Reason::AsSpecified, message)
}

impl Found<'_> {
    /// How many partitions have ever had a leader.
    fn led(&self) -> usize {
        let there = self.leases.there.values();
        there.filter(|held| has_led(held)).count()
    }
}

/// Only a partition that never had a leader has no ISR.
fn has_led(held: &index::Held) -> bool {
    !held.lease.assignment.isr.is_empty()
}

/// For logs.
pub(super) fn full_name(topic: &Topic) -> String {
    format!(
        "{}/{}",
        topic.namespace().unwrap_or_default(),
        topic.name_any()
    )
}
