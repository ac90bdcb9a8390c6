//! What is said of a Cluster: pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use millrace_crds::cluster::status::{BrokerPhase, ClusterStatus, VolumeState};
use millrace_crds::conditions::{ConditionStatus, ConditionType, Observed, Reason, set_condition};
use millrace_crds::{Cluster, ClusterSpec};
use uuid::Uuid;

use super::brokers::Brokers;
use super::moves::Moves;
use super::objects;
use super::restart::Restart;
use crate::alive::Alive;
use crate::index::Topic;
use crate::problem::Problem;

/// With so many percent of a volume used someone should look.
const NEARLY_FULL: i32 = 85;

/// The partitions of a Cluster in numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) topics: i32,
    pub(super) partitions: i32,
    /// With internal ones, which the following count, too.
    pub(super) all: i32,
    pub(super) offline: i32,
    /// Of those that are offline: they had a leader once.
    pub(super) lost_leader: i32,
    pub(super) under_replicated: i32,
    pub(super) below_min_isr: i32,
}

impl Counts {
    /// Of topics that are served, with the in-sync replicas that each needs, their partitions are to be well. Internal ones are not counted, but must be
    /// well, too.
    pub(super) fn of<'a>(
        topics: i32,
        (served, internal): (&HashMap<Uuid, usize>, &BTreeSet<Uuid>),
        partitions: impl Iterator<Item = (&'a Uuid, &'a Topic)>,
        alive: &Alive,
    ) -> Self {
        let mut counts = Self {
            topics,
            ..Self::default()
        };
        for (topic_id, topic) in partitions {
            let there = count(topic.there.len());
            counts.all += there;
            if !internal.contains(topic_id) {
                counts.partitions += there;
            }
            let Some(needed) = served.get(topic_id) else {
                continue;
            };
            for held in topic.there.values() {
                let assignment = &held.lease.assignment;
                if alive.leader(assignment).is_none() {
                    counts.offline += 1;
                    counts.lost_leader += i32::from(!assignment.isr.is_empty());
                }
                let in_sync = alive.in_sync(assignment).len();
                counts.under_replicated += i32::from(in_sync < assignment.replicas.len());
                counts.below_min_isr += i32::from(in_sync < *needed);
            }
        }
        counts
    }
}

/// What the operator found and did.
pub(super) struct Found<'a> {
    /// Which partitions move; none if nothing is done.
    pub(super) moves: Option<&'a Moves>,
    pub(super) brokers: &'a Brokers,
    pub(super) stateful_set: Option<&'a StatefulSet>,
    /// How many pods there shall be for now.
    pub(super) pods: i32,
    pub(super) controller: Option<i32>,
    pub(super) counts: Counts,
    pub(super) restart: Restart,
    /// How full they are, by broker.
    pub(super) volumes: &'a BTreeMap<i32, VolumeState>,
    /// Volumes that are to grow.
    pub(super) growing: usize,
    pub(super) problem: Option<Problem>,
}

pub(super) fn status(cluster: &Cluster, found: &Found<'_>, now: &Time) -> ClusterStatus {
    let name = cluster.metadata.name.as_deref().unwrap_or_default();
    let namespace = cluster.metadata.namespace.as_deref().unwrap_or_default();
    let before = cluster.status.clone().unwrap_or_default();
    let spec = &cluster.spec;
    let mut brokers = found.brokers.states(found.pods);
    for broker in &mut brokers {
        broker.volume = found.volumes.get(&broker.id).cloned();
    }
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
        partitions_below_min_isr: Some(found.counts.below_min_isr),
        rebalance: found.moves.and_then(|moves| moves.status(cluster, now)),
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
    let rests = spec.hibernated && found.brokers.pods.is_empty();
    let reconciling = lack.is_some() && !stalled && !spec.paused && !rests;
    let (degraded, degraded_reason, degraded_message) = match &lack {
        // On purpose.
        Some(problem) if spec.hibernated => (false, problem.reason, problem.message.clone()),
        _ => degraded(&found.counts, found.volumes),
    };
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
    if spec.hibernated {
        let left = match pods {
            0 => String::new(),
            left => format!("{left} brokers are about to stop; "),
        };
        return Some(Problem::passing(
            Reason::Hibernated,
            format!(
                "{left}spec.hibernated is true: no broker runs, and their volumes are kept. Set it to false to have all back"
            ),
        ));
    }
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
    if let Some(topic) = found.moves.and_then(Moves::too_few) {
        return Some(Problem::stalled(
            Reason::TooFewBrokers,
            format!(
                "spec.replicas is {wanted}, and topic {topic} (status.topicId) has more replicas: no broker is removed. Set spec.replicas to {} again, or lower \
                 the Topic's spec.replicationFactor",
                found.pods
            ),
        ));
    }
    let needed = found.moves.map_or(0, Moves::needed);
    if found.pods > wanted {
        return Some(Problem::passing(
            Reason::Draining,
            format!(
                "{} brokers are to be removed; {needed} partitions move to the others first (status.rebalance)",
                found.pods - wanted
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

/// The gravest of what is wrong with partitions and volumes.
fn degraded(counts: &Counts, volumes: &BTreeMap<i32, VolumeState>) -> (bool, Reason, String) {
    if counts.lost_leader > 0 {
        let message = format!(
            "{} of {} partitions have no leader: none of their in-sync replicas is up. Bring the brokers back that held them",
            counts.lost_leader, counts.all
        );
        return (true, Reason::PartitionsOffline, message);
    }
    // Those that never had a leader hold nothing that could be short.
    let fresh = counts.offline - counts.lost_leader;
    let below = counts.below_min_isr - fresh;
    if below > 0 {
        let message = format!(
            "{below} of {} partitions have fewer in-sync replicas than acks=all needs, and refuse it. Bring the brokers back that are not up",
            counts.all
        );
        return (true, Reason::BelowMinIsr, message);
    }
    let under = counts.under_replicated - fresh;
    if under > 0 {
        let message = format!(
            "{under} of {} partitions have fewer in-sync replicas than replicas",
            counts.all
        );
        return (true, Reason::UnderReplicated, message);
    }
    let fullest = volumes
        .iter()
        .max_by_key(|(_, volume)| (volume.full, volume.used_percent));
    if let Some((id, volume)) = fullest {
        let next = "raise spec.storage.size, or lower the retention of Topics";
        if volume.full {
            let message =
                format!("the volume of broker {id} is full, and it refuses writes: {next}");
            return (true, Reason::VolumeFull, message);
        }
        if volume.used_percent >= NEARLY_FULL {
            let message = format!(
                "{} percent of the volume of broker {id} are used (status.brokers): {next}",
                volume.used_percent
            );
            return (true, Reason::VolumeNearlyFull, message);
        }
    }
    let message =
        "all partitions that ever had a leader have one, and all their replicas".to_owned();
    (false, Reason::AsSpecified, message)
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use millrace_crds::coordination::{Held, Leader, PartitionAssignment, PartitionLease, Replica};

    use super::*;
    use crate::index;

    const STORE: Uuid = Uuid::nil();

    /// A topic of one partition with three replicas: its leader and ISR as the Lease says.
    fn topic(leader: Option<i32>, isr: &[i32]) -> Topic {
        let mut assignment = PartitionAssignment::new(Uuid::nil(), 0, vec![0, 1, 2]);
        let broker_epoch = 1;
        assignment.leader = leader.map(|id| Leader { id, broker_epoch });
        let isr = isr.iter().map(|id| Replica {
            id: *id,
            store: STORE,
        });
        assignment.isr = isr.collect();
        let lease = PartitionLease {
            assignment,
            held: Held::default(),
        };
        let resource_version = String::new();
        let mut topic = Topic::default();
        topic.there.insert(
            0,
            index::Held {
                lease,
                resource_version,
            },
        );
        topic
    }

    #[test]
    fn the_gravest_is_told_of_those_that_are_alive() {
        let whole = || topic(Some(0), &[0, 1, 2]);
        let at_minimum = || topic(Some(0), &[0, 1]);
        let lost = || topic(None, &[1, 2]);
        let fresh = || topic(None, &[]);
        let (served, kept) = (Uuid::from_u128(1), Uuid::from_u128(2));
        // Topic and what it holds, brokers alive; offline, under-replicated, below the minimum of two.
        for (id, topic, alive, counted, reason) in [
            (
                served,
                whole(),
                &[0, 1, 2][..],
                (0, 0, 0),
                Reason::AsSpecified,
            ),
            (served, whole(), &[0, 1], (0, 1, 0), Reason::UnderReplicated),
            (served, whole(), &[0], (0, 1, 1), Reason::BelowMinIsr),
            (
                served,
                at_minimum(),
                &[0, 1, 2],
                (0, 1, 0),
                Reason::UnderReplicated,
            ),
            (
                served,
                at_minimum(),
                &[0, 2],
                (0, 1, 1),
                Reason::BelowMinIsr,
            ),
            (
                served,
                at_minimum(),
                &[],
                (1, 1, 1),
                Reason::PartitionsOffline,
            ),
            (served, lost(), &[0], (1, 1, 1), Reason::PartitionsOffline),
            (served, fresh(), &[0, 1, 2], (1, 1, 1), Reason::AsSpecified),
            (kept, lost(), &[0, 1, 2], (0, 0, 0), Reason::AsSpecified),
        ] {
            let case = format!("{topic:?}, alive {alive:?}");
            let alive = Alive(alive.iter().map(|id| (*id, STORE)).collect());
            let needed = HashMap::from([(served, 2)]);
            let counts = Counts::of(
                1,
                (&needed, &BTreeSet::new()),
                [(&id, &topic)].into_iter(),
                &alive,
            );
            let found = (
                counts.offline,
                counts.under_replicated,
                counts.below_min_isr,
            );
            assert_eq!(found, counted, "{case}");
            assert_eq!(counts.partitions, 1, "{case}");
            let (degraded, found, _) = degraded(&counts, &BTreeMap::new());
            assert_eq!(found, reason, "{case}");
            assert_eq!(degraded, reason != Reason::AsSpecified, "{case}");
        }
    }

    #[test]
    fn the_fullest_volume_is_told_of() {
        for (used, full, reason) in [
            (&[10, 84][..], false, Reason::AsSpecified),
            (&[10, 85], false, Reason::VolumeNearlyFull),
            (&[100, 99], true, Reason::VolumeFull),
        ] {
            let volume = |percent: &i32| VolumeState {
                capacity_bytes: 1,
                used_percent: *percent,
                full: full && *percent == 100,
                full_at: None,
            };
            let volumes = (0..).zip(used.iter().map(volume)).collect();
            let (degraded, found, _) = degraded(&Counts::default(), &volumes);
            assert_eq!(found, reason, "{used:?}");
            assert_eq!(degraded, reason != Reason::AsSpecified, "{used:?}");
        }
    }
}
