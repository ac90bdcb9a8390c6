//! What is said of a Cluster: pure.

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use millrace_crds::cluster::status::{BrokerPhase, ClusterStatus};
use millrace_crds::conditions::{ConditionStatus, ConditionType, Observed, Reason, set_condition};
use millrace_crds::{Cluster, ClusterSpec};

use super::brokers::Brokers;
use super::objects;
use super::restart::Restart;
use crate::index::Topic;
use crate::problem::Problem;

/// The partitions of a Cluster in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) topics: i32,
    pub(super) partitions: i32,
    pub(super) offline: i32,
    /// Of those that are offline: they had a leader once.
    pub(super) lost_leader: i32,
    pub(super) under_replicated: i32,
}

impl Counts {
    pub(super) fn of<'a>(topics: i32, partitions: impl Iterator<Item = &'a Topic>) -> Self {
        let mut counts = Self {
            topics,
            ..Self::default()
        };
        for held in partitions.flat_map(|topic| topic.there.values()) {
            let assignment = &held.lease.assignment;
            counts.partitions += 1;
            if assignment.leader.is_none() {
                counts.offline += 1;
                counts.lost_leader += i32::from(!assignment.isr.is_empty());
            }
            let short = assignment.isr.len() < assignment.replicas.len();
            counts.under_replicated += i32::from(short);
        }
        counts
    }
}

/// What the operator found and did.
pub(super) struct Found<'a> {
    pub(super) brokers: &'a Brokers,
    pub(super) stateful_set: Option<&'a StatefulSet>,
    /// How many pods there shall be for now.
    pub(super) pods: i32,
    pub(super) controller: Option<i32>,
    pub(super) counts: Counts,
    pub(super) restart: Restart,
    /// Volumes that are to grow.
    pub(super) growing: usize,
    pub(super) problem: Option<Problem>,
}

pub(super) fn status(cluster: &Cluster, found: &Found<'_>, now: &Time) -> ClusterStatus {
    let name = cluster.metadata.name.as_deref().unwrap_or_default();
    let namespace = cluster.metadata.namespace.as_deref().unwrap_or_default();
    let before = cluster.status.clone().unwrap_or_default();
    let spec = &cluster.spec;
    let brokers = found.brokers.states(found.pods);
    let serving = brokers
        .iter()
        .filter(|b| matches!(b.state, BrokerPhase::Serving | BrokerPhase::Draining));
    let ready = count(serving.count());
    let generation = cluster.metadata.generation;
    let mut conditions = before.conditions;
    for observed in conditions_of(spec, found, ready) {
        set_condition(&mut conditions, &observed, generation, now);
    }
    ClusterStatus {
        conditions,
        observed_generation: generation,
        replicas: Some(count(found.brokers.pods.len())),
        ready_replicas: Some(ready),
        selector: Some(objects::selector(name)),
        controller: found.controller,
        bootstrap_address: Some(format!(
            "{}.{namespace}.svc:{}",
            objects::bootstrap_service(name),
            objects::client_port(spec)
        )),
        version: found.brokers.version(),
        topics: Some(found.counts.topics),
        partitions: Some(found.counts.partitions),
        partitions_offline: Some(found.counts.offline),
        partitions_under_replicated: Some(found.counts.under_replicated),
        brokers,
    }
}

fn conditions_of(spec: &ClusterSpec, found: &Found<'_>, ready: i32) -> [Observed; 4] {
    let observed = |condition, status, reason, message: String| Observed {
        condition,
        status,
        reason,
        message,
    };
    let wanted = spec.replicas;
    let lack = lack(spec, found, ready);
    let all_up = || format!("{ready} of {wanted} brokers are up");
    let (reason, message) = match &lack {
        Some(problem) => (problem.reason, problem.message.clone()),
        None if spec.paused => (
            Reason::Paused,
            format!("{}; spec.paused is true, so nothing is changed", all_up()),
        ),
        None => (Reason::AsSpecified, all_up()),
    };
    let stalled = lack.as_ref().is_some_and(|problem| problem.stalled);
    let reconciling = lack.is_some() && !stalled && !spec.paused;
    let (degraded, degraded_reason, degraded_message) = degraded(found);
    [
        observed(
            ConditionType::Ready,
            ConditionStatus::from(lack.is_none()),
            reason,
            message.clone(),
        ),
        observed(
            ConditionType::Degraded,
            ConditionStatus::from(degraded),
            degraded_reason,
            degraded_message,
        ),
        observed(
            ConditionType::Reconciling,
            ConditionStatus::from(reconciling),
            reason,
            message.clone(),
        ),
        observed(
            ConditionType::Stalled,
            ConditionStatus::from(stalled),
            reason,
            message,
        ),
    ]
}

/// What is missing to all that the spec asks for, the gravest first.
fn lack(spec: &ClusterSpec, found: &Found<'_>, ready: i32) -> Option<Problem> {
    if let Some(problem) = &found.problem {
        return Some(problem.clone());
    }
    let wanted = spec.replicas;
    let pods = count(found.brokers.pods.len());
    if found.stateful_set.is_none() || pods < wanted {
        return Some(Problem::passing(
            Reason::ScalingOut,
            format!("{pods} of {wanted} brokers are made"),
        ));
    }
    if found.restart.outdated > 0 {
        return Some(Problem::passing(
            Reason::RollingRestart,
            format!(
                "{} brokers are to restart for a change of their pod; one restarts at a time, while all others are up ({ready} of {wanted} are) and have enough replicas in sync without it",
                found.restart.outdated
            ),
        ));
    }
    if ready < wanted {
        return Some(Problem::passing(
            Reason::BrokersNotReady,
            format!(
                "{ready} of {wanted} brokers are up; see the pods {}-*",
                objects::broker_name(&found.brokers.cluster)
            ),
        ));
    }
    if found.pods > wanted {
        return Some(Problem::stalled(
            Reason::Draining,
            format!(
                "{} pods stay though spec.replicas is {wanted}: the last ones hold replicas, and moving them is not supported yet. Set spec.replicas \
                 to {}, or delete the topics that they hold",
                found.pods, found.pods
            ),
        ));
    }
    if pods > wanted {
        return Some(Problem::passing(
            Reason::Draining,
            format!("{} brokers are removed; they hold nothing", pods - wanted),
        ));
    }
    if found.growing > 0 {
        return Some(Problem::passing(
            Reason::GrowingStorage,
            format!("{} volumes grow to {}", found.growing, spec.storage.size.0),
        ));
    }
    found.controller.is_none().then(|| {
        Problem::passing(
            Reason::NoController,
            "no broker is controller, so no leader is elected; brokers are about to agree on one, and if not, their logs say why".to_owned(),
        )
    })
}

fn degraded(found: &Found<'_>) -> (bool, Reason, String) {
    let counts = &found.counts;
    if counts.lost_leader > 0 {
        let message = format!(
            "{} of {} partitions have no leader: none of their in-sync replicas is up. Bring the brokers back that held them",
            counts.lost_leader, counts.partitions
        );
        return (true, Reason::PartitionsOffline, message);
    }
    let under = counts.under_replicated - (counts.offline - counts.lost_leader);
    if under > 0 {
        let message = format!(
            "{under} of {} partitions have fewer in-sync replicas than replicas",
            counts.partitions
        );
        return (true, Reason::UnderReplicated, message);
    }
    let message =
        "all partitions that ever had a leader have one, and all their replicas".to_owned();
    (false, Reason::AsSpecified, message)
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}
