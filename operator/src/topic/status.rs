//! What is said of a Topic: pure.

use std::collections::HashMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use millrace_crds::conditions::{ConditionStatus, ConditionType, Observed, Reason, set_condition};
use millrace_crds::coordination::{Replica, TopicRecord, TopicState};
use millrace_crds::{PartitionState, Topic, TopicStatus};

use crate::alive::Alive;
use crate::figures::TopicFigures;
use crate::index;
use crate::problem::Problem;

/// What the operator found and did.
pub(super) struct Found<'a> {
    /// The topic's record, if the Topic has one.
    pub(super) record: Option<&'a TopicRecord>,
    pub(super) leases: &'a index::Topic,
    pub(super) alive: &'a Alive,
    /// What brokers say; none if they have not been asked yet.
    pub(super) figures: Option<&'a TopicFigures>,
    /// A broker of the Cluster is controller.
    pub(super) controller: bool,
    pub(super) problem: Option<Problem>,
}

pub(super) fn status(topic: &Topic, found: &Found<'_>, now: &Time) -> TopicStatus {
    let before = topic.status.clone().unwrap_or_default();
    let mut status = TopicStatus {
        conditions: before.conditions,
        observed_generation: topic.metadata.generation,
        ..TopicStatus::default()
    };
    if let Some(record) = found.record {
        let config = &record.config;
        status.topic_id = Some(record.topic_id.to_string());
        status.topic_name = Some(config.name.clone());
        status.replication_factor = i32::try_from(config.replication_factor).ok();
        let min = config.min_insync_replicas.unwrap_or(1);
        status.min_in_sync_replicas = i32::try_from(min).ok();
        let there = found.leases.there.values();
        let mut states: Vec<_> = there.map(|held| state(held, found.alive)).collect();
        match found.figures {
            Some(figures) => {
                status.size_bytes = size(&states, figures);
                show(&mut states, figures);
            }
            None => {
                status.size_bytes = before.size_bytes;
                keep(&mut states, &before.partition_states);
            }
        }
        status.set_partitions(states, status.min_in_sync_replicas.unwrap_or(1));
        status.partitions = i32::try_from(record.partitions_made).ok();
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

fn state(held: &index::Held, alive: &Alive) -> PartitionState {
    let assignment = &held.lease.assignment;
    PartitionState {
        partition: assignment.partition,
        leader: alive.leader(assignment),
        leader_epoch: held.lease.held.epoch,
        replicas: assignment.replicas.clone(),
        isr: alive.in_sync(assignment),
        eligible: alive.eligible(assignment),
        log_start_offset: None,
        high_watermark: None,
    }
}

fn show(states: &mut [PartitionState], figures: &TopicFigures) {
    for state in states {
        let figure = figures.get(&state.partition);
        state.log_start_offset = figure.map(|figure| figure.log_start_offset);
        state.high_watermark = figure.map(|figure| figure.high_watermark);
    }
}

/// Leaves what an operator before this one was told.
fn keep(states: &mut [PartitionState], before: &[PartitionState]) {
    let before: HashMap<i32, &PartitionState> = before
        .iter()
        .map(|before| (before.partition, before))
        .collect();
    for state in states {
        let before = before.get(&state.partition);
        state.log_start_offset = before.and_then(|before| before.log_start_offset);
        state.high_watermark = before.and_then(|before| before.high_watermark);
    }
}

/// The bytes of all partitions: none if those of one are not known, since a part would be taken for the whole.
fn size(states: &[PartitionState], figures: &TopicFigures) -> Option<i64> {
    let mut size = 0_u64;
    for state in states {
        size = size.saturating_add(figures.get(&state.partition)?.size_bytes);
    }
    Some(i64::try_from(size).unwrap_or(i64::MAX))
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
        return moving(found);
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
            "{offline} of {wanted} partitions have no leader; one is elected as soon as a broker that may lead is up (status.partitionStates[].eligible)"
        ),
    ))
}

/// Partitions that have more or fewer replicas than was asked for, or of which others are in sync, too.
fn moving(found: &Found<'_>) -> Option<Problem> {
    let factor = found.record?.config.replication_factor as usize;
    let there = found.leases.there.values();
    let assignments = there.map(|held| &held.lease.assignment);
    let differ = assignments.filter(|assignment| {
        let former = |replica: &Replica| !assignment.replicas.contains(&replica.id);
        assignment.replicas.len() != factor
            || assignment.isr.len() != factor && assignment.isr.iter().any(former)
    });
    let count = differ.count();
    let message = || {
        format!(
            "{count} partitions are on their way to {factor} replicas; see status.rebalance of the Cluster"
        )
    };
    (count > 0).then(|| Problem::passing(Reason::Reassigning, message()))
}

fn degraded(status: &TopicStatus, found: &Found<'_>) -> (bool, Reason, String) {
    if found
        .record
        .is_some_and(|record| record.state == TopicState::Deleting)
    {
        // Replicas leave on purpose.
        let message = "its records are being deleted".to_owned();
        return (false, Reason::Deleting, message);
    }
    let partitions = status.partitions.unwrap_or(0);
    let there = found.leases.there.values();
    let lost_leader = there
        .filter(|held| found.alive.leader(&held.lease.assignment).is_none() && has_led(held))
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
            "{below} of {partitions} partitions have fewer in-sync replicas than the {} that acks=all needs, and refuse it. Bring the brokers back that are not up",
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

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;
    use millrace_crds::conditions::condition;
    use millrace_crds::coordination::{Held, Leader, PartitionAssignment, PartitionLease, Replica};
    use serde_json::json;
    use uuid::Uuid;

    use super::*;
    use crate::figures::Figure;

    const TOPIC: Uuid = Uuid::from_u128(7);

    fn topic(status: Option<TopicStatus>) -> Topic {
        let whole = json!({
            "apiVersion": "millrace.dev/v1alpha1", "kind": "Topic",
            "metadata": {"name": "orders", "namespace": "shop", "uid": "uid"},
            "spec": {"partitions": 2},
        });
        let mut topic: Topic = serde_json::from_value(whole).unwrap();
        topic.status = status;
        topic
    }

    fn record(state: TopicState) -> TopicRecord {
        let topic = topic(None);
        TopicRecord {
            topic_id: TOPIC,
            namespace: "shop".into(),
            topic: "orders".into(),
            topic_uid: "uid".into(),
            state,
            partitions_made: 2,
            config: (&topic).try_into().unwrap(),
        }
    }

    fn leases(assignments: impl IntoIterator<Item = PartitionAssignment>) -> index::Topic {
        let mut leases = index::Topic::default();
        for assignment in assignments {
            let partition = assignment.partition;
            let lease = PartitionLease {
                assignment,
                held: Held::default(),
            };
            let held = index::Held {
                lease,
                resource_version: "1".into(),
            };
            leases.there.insert(partition, held);
        }
        leases
    }

    /// The status of a topic with two partitions.
    fn shown(before: Option<TopicStatus>, figures: Option<&TopicFigures>) -> TopicStatus {
        let new = |partition| PartitionAssignment::new(TOPIC, partition, vec![0]);
        let found = Found {
            record: Some(&record(TopicState::Active)),
            leases: &leases((0..2).map(new)),
            alive: &Alive::default(),
            figures,
            controller: true,
            problem: None,
        };
        status(&topic(before), &found, &Time(Timestamp::UNIX_EPOCH))
    }

    fn figures(high_watermarks: &[(i32, i64)]) -> TopicFigures {
        let figure = |(partition, high_watermark): &(i32, i64)| {
            let figure = Figure {
                leader_epoch: 1,
                log_start_offset: 1,
                high_watermark: *high_watermark,
                size_bytes: 100,
            };
            (*partition, figure)
        };
        high_watermarks.iter().map(figure).collect()
    }

    fn high_watermarks(status: &TopicStatus) -> Vec<Option<i64>> {
        let states = status.partition_states.iter();
        states.map(|state| state.high_watermark).collect()
    }

    #[test]
    fn a_status_shows_what_is_known_and_a_size_only_if_all_is() {
        for (known, expected, size) in [
            (&[(0, 5), (1, 6)][..], [Some(5), Some(6)], Some(200)),
            (&[(1, 6)], [None, Some(6)], None),
            (&[], [None, None], None),
            // A partition that has no Lease yet is none of the topic's.
            (&[(0, 5), (1, 6), (2, 7)], [Some(5), Some(6)], Some(200)),
        ] {
            let status = shown(None, Some(&figures(known)));
            assert_eq!(high_watermarks(&status), expected, "{known:?}");
            assert_eq!(status.size_bytes, size, "{known:?}");
        }
    }

    #[test]
    fn a_new_operator_leaves_a_status_as_it_is_until_it_has_asked() {
        let before = shown(None, Some(&figures(&[(0, 5), (1, 6)])));
        assert_eq!(shown(Some(before.clone()), None), before);
        let asked = shown(Some(before), Some(&TopicFigures::new()));
        assert_eq!(high_watermarks(&asked), [None, None]);
        assert_eq!(asked.size_bytes, None);
    }

    #[test]
    fn the_gravest_is_told_of_replicas_that_are_alive() {
        use Reason::{AsSpecified, BelowMinIsr, Deleting, PartitionsOffline, UnderReplicated};
        let store = Uuid::nil();
        // ISR of one of two partitions with three replicas, the brokers alive; offline, under-replicated and below the minimum of two.
        for (isr, alive, state, counted, reason) in [
            (
                &[0, 1, 2][..],
                &[0, 1, 2][..],
                TopicState::Active,
                [0, 0, 0],
                AsSpecified,
            ),
            (
                &[0, 1, 2],
                &[0, 1],
                TopicState::Active,
                [0, 2, 0],
                UnderReplicated,
            ),
            (
                &[0, 1],
                &[0, 1, 2],
                TopicState::Active,
                [0, 1, 0],
                UnderReplicated,
            ),
            (&[0, 1], &[0, 2], TopicState::Active, [0, 2, 1], BelowMinIsr),
            (&[0, 1], &[0], TopicState::Active, [0, 2, 2], BelowMinIsr),
            (
                &[0, 1],
                &[],
                TopicState::Active,
                [2, 2, 2],
                PartitionsOffline,
            ),
            // One that has never had a leader is short of nothing.
            (&[], &[0, 1, 2], TopicState::Active, [1, 1, 1], AsSpecified),
            (&[0], &[0, 1, 2], TopicState::Deleting, [0, 1, 1], Deleting),
        ] {
            let case = format!("ISR {isr:?}, alive {alive:?}");
            let assignment = |partition, isr: &[i32]| {
                let mut assignment = PartitionAssignment::new(TOPIC, partition, vec![0, 1, 2]);
                assignment.isr = isr.iter().map(|id| Replica { id: *id, store }).collect();
                let (id, broker_epoch) = (0, 1);
                assignment.leader = (!isr.is_empty()).then_some(Leader { id, broker_epoch });
                assignment
            };
            let mut record = record(state);
            record.config.min_insync_replicas = Some(2);
            let found = Found {
                record: Some(&record),
                leases: &leases([assignment(0, isr), assignment(1, &[0, 1, 2])]),
                alive: &Alive(alive.iter().map(|id| (*id, store)).collect()),
                figures: None,
                controller: true,
                problem: None,
            };
            let status = status(&topic(None), &found, &Time(Timestamp::UNIX_EPOCH));
            let found = [
                status.partitions_offline,
                status.partitions_under_replicated,
                status.partitions_below_min_isr,
            ];
            assert_eq!(found, counted.map(Some), "{case}");
            let degraded = condition(&status.conditions, ConditionType::Degraded).unwrap();
            assert_eq!(degraded.reason, reason.as_str(), "{case}");
            let holds = ![AsSpecified, Deleting].contains(&reason);
            assert_eq!(
                degraded.status,
                ConditionStatus::from(holds).as_str(),
                "{case}"
            );
        }
    }
}
