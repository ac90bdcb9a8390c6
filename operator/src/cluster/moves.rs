//! Gives partitions other replicas, some at a time. What there is to do is worked out anew each time from what is there ([`crate::balance`]), so that nothing is
//! lost with an operator that ends, and whatever a person changes meanwhile counts at once.

use std::collections::{BTreeSet, HashMap};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use millrace_crds::Cluster;
use millrace_crds::cluster::rebalance::{APPROVAL_ANNOTATION, RebalanceMode};
use millrace_crds::cluster::status::{RebalanceState, RebalanceStatus};
use millrace_crds::coordination::{PartitionAssignment, PartitionLease, TopicState};
use serde_json::json;

use super::brokers::Brokers;
use super::objects::hash;
use crate::alive::Alive;
use crate::balance::{Move, Partition, Plan, plan};
use crate::context::{Context, each, post_params};
use crate::error::{Doing, Error, conflict, not_found};
use crate::index::ClusterId;
use crate::placement::Candidate;

/// What there is to do, and whether it may be done.
pub(super) struct Moves {
    plan: Plan,
    /// The id of what evens the load out.
    proposal: Option<String>,
    /// That may be done.
    approved: bool,
}

impl Moves {
    /// What there is to do of a Cluster.
    pub(super) fn of(
        context: &Context,
        cluster: &Cluster,
        id: &ClusterId,
        brokers: &Brokers,
        alive: &Alive,
    ) -> Self {
        let records = context.view.records.lock();
        let active = records.of(id).filter(|r| r.state == TopicState::Active);
        let factors: HashMap<_, _> = active
            .map(|record| (record.topic_id, record.config.replication_factor as usize))
            .collect();
        drop(records);
        let mut partitions = Vec::new();
        let leases = context.view.partitions.lock();
        for (topic_id, topic) in leases.topics(id) {
            let Some(factor) = factors.get(topic_id) else {
                continue;
            };
            let figures = context.view.figures.lock().of(*topic_id);
            let bytes = |index: i32| Some(figures.as_ref()?.get(&index)?.size_bytes);
            partitions.extend(
                topic
                    .there
                    .iter()
                    .map(|(index, held)| partition(*factor, &held.lease.assignment, bytes(*index))),
            );
        }
        drop(leases);
        Self::new(cluster, brokers, alive, &mut partitions)
    }

    fn new(
        cluster: &Cluster,
        brokers: &Brokers,
        alive: &Alive,
        partitions: &mut [Partition],
    ) -> Self {
        let wanted = cluster.spec.replicas;
        // The last brokers go first.
        let last = |partition: &Partition| {
            let going = partition.replicas.iter().map(|id| brokers.ordinal_of(*id));
            going.filter(|ordinal| *ordinal >= wanted).max()
        };
        partitions.sort_by_key(|partition| (std::cmp::Reverse(last(partition)), partition.key));
        let mut staying = brokers.candidates(wanted);
        // One that is not known now is no reason to move what it holds.
        let known: BTreeSet<i32> = staying.iter().map(|broker| broker.id).collect();
        let held = partitions.iter().flat_map(|p| p.replicas.iter().copied());
        let unknown: BTreeSet<i32> = held
            .filter(|id| !known.contains(id) && brokers.ordinal_of(*id) < wanted)
            .collect();
        staying.extend(unknown.into_iter().map(|id| Candidate { id, rack: None }));
        let alive: BTreeSet<i32> = alive
            .0
            .keys()
            .copied()
            .filter(|id| known.contains(id))
            .collect();
        let plan = plan(&staying, &alive, partitions);
        let before = cluster.status.as_ref().and_then(|s| s.rebalance.as_ref());
        let approval = cluster.annotations().get(APPROVAL_ANNOTATION);
        let under_way = before.filter(|before| {
            before.state == RebalanceState::Moving && approval == before.proposal.as_ref()
        });
        let proposal = match under_way.and_then(|before| before.proposal.clone()) {
            Some(proposal) => Some(proposal),
            None => (!plan.balancing.is_empty()).then(|| id_of(&plan, partitions)),
        };
        let approved = match cluster.spec.rebalance.mode {
            RebalanceMode::Auto => true,
            RebalanceMode::Manual => proposal.is_some() && approval == proposal.as_ref(),
        };
        Self {
            plan,
            proposal,
            approved,
        }
    }

    /// A topic that has more replicas than there shall be brokers.
    pub(super) fn too_few(&self) -> Option<uuid::Uuid> {
        self.plan.too_few
    }

    /// How many partitions are to be elsewhere, and not only for balance.
    pub(super) fn needed(&self) -> usize {
        self.plan.needed.len() + self.plan.waiting + self.plan.moving
    }

    /// Whether something is to be looked at again soon.
    pub(super) fn is_busy(&self) -> bool {
        self.needed() > 0 || self.approved && !self.plan.balancing.is_empty()
    }

    /// Begins as many as may move at a time.
    pub(super) async fn begin(
        &self,
        context: &Context,
        cluster: &Cluster,
        id: &ClusterId,
    ) -> Result<(), Error> {
        let limit = usize::try_from(cluster.spec.rebalance.concurrency).unwrap_or(1);
        // Who catches up after a restart copies as well.
        let room = limit.saturating_sub(self.plan.moving + self.plan.catching_up);
        let moves = match self.plan.needed.is_empty() {
            false => &self.plan.needed,
            true if self.approved => &self.plan.balancing,
            true => return Ok(()),
        };
        let now: Vec<Move> = moves.iter().take(room).cloned().collect();
        each(now, |step| begin(context, id, step)).await
    }

    /// What is said of it.
    pub(super) fn status(&self, cluster: &Cluster, now: &Time) -> Option<RebalanceStatus> {
        let plan = &self.plan;
        let balancing = plan.balancing.len();
        let left = self.needed() + balancing;
        if left == 0 {
            return None;
        }
        let count = |number: usize| i32::try_from(number).unwrap_or(i32::MAX);
        let begun = plan.moving + plan.needed.len();
        let state = if begun > 0 || self.approved && balancing > 0 {
            RebalanceState::Moving
        } else if plan.waiting > 0 {
            RebalanceState::Waiting
        } else {
            RebalanceState::Proposed
        };
        let before = cluster.status.as_ref().and_then(|s| s.rebalance.as_ref());
        let before = before.filter(|_| state == RebalanceState::Moving);
        let before = before.filter(|before| before.state == RebalanceState::Moving);
        let moved = before.map_or(0, |before| {
            before.moved + (before.partitions - count(left)).max(0)
        });
        let started_at = match before.and_then(|before| before.started_at.clone()) {
            Some(started) => Some(started),
            None => (state == RebalanceState::Moving).then(|| now.clone()),
        };
        let estimated_end = started_at.as_ref().filter(|_| moved > 0).map(|started| {
            let each = now.0.duration_since(started.0) / moved;
            Time(now.0 + each * count(left))
        });
        Some(RebalanceStatus {
            state,
            proposal: self
                .proposal
                .clone()
                .filter(|_| cluster.spec.rebalance.mode == RebalanceMode::Manual && balancing > 0),
            partitions: count(left),
            moving: count(plan.moving),
            moved,
            started_at,
            estimated_end,
        })
    }
}

fn partition(factor: usize, assignment: &PartitionAssignment, bytes: Option<u64>) -> Partition {
    Partition {
        key: (assignment.topic_id, assignment.partition),
        factor,
        replicas: assignment.replicas.clone(),
        in_sync: assignment.isr.iter().map(|replica| replica.id).collect(),
        bytes,
    }
}

/// What a person approves. Which partitions even bytes out best changes while they are written to: there it is between which brokers, as long as these hold
/// what they do.
fn id_of(plan: &Plan, partitions: &[Partition]) -> String {
    let moves = plan.balancing.iter();
    if plan.by_bytes {
        let gaining =
            moves.flat_map(|step| step.replicas.iter().filter(|id| !step.from.contains(id)));
        let brokers: BTreeSet<i32> = gaining.copied().collect();
        let is_there = |id: &i32| brokers.contains(id);
        let held = partitions
            .iter()
            .filter(|p| p.replicas.iter().any(is_there));
        let held: Vec<_> = held.map(|p| json!([p.key, p.replicas])).collect();
        return hash::of(&json!([brokers, held]));
    }
    let each = moves.map(|step| json!([step.key, step.replicas]));
    hash::of(&each.collect())
}

/// Writes the new replicas into the partition's Lease, if it has those that they are to follow.
async fn begin(context: &Context, id: &ClusterId, step: Move) -> Result<(), Error> {
    let (topic_id, partition) = step.key;
    let name = PartitionAssignment::new(topic_id, partition, Vec::new()).lease_name(&id.name);
    let leases = context.api::<Lease>(&id.namespace);
    let mut object = match leases.get(&name).await {
        Err(error) if not_found(&error) => return Ok(()),
        answer => answer.doing(|| format!("read Lease {name}"))?,
    };
    let known = PartitionLease::read(&object)?;
    if known.assignment.replicas != step.from {
        return Ok(());
    }
    known.reassigned(step.replicas).write(&mut object, &id.name);
    let written = match leases.replace(&name, &post_params(), &object).await {
        // Decided anew when the change is seen.
        Err(error) if conflict(&error) || not_found(&error) => return Ok(()),
        answer => answer.doing(|| format!("write Lease {name}"))?,
    };
    context.view.partitions.lock().apply(&written);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;
    use uuid::Uuid;

    use super::*;

    fn cluster(mode: &str, rebalance: Option<&RebalanceStatus>, approval: Option<&str>) -> Cluster {
        let whole = json!({
            "apiVersion": "millrace.dev/v1alpha1", "kind": "Cluster",
            "metadata": {"name": "main", "annotations": approval.map(|id| json!({APPROVAL_ANNOTATION: id}))},
            "spec": {"replicas": 2, "storage": {"size": "1Gi"}, "rebalance": {"mode": mode}},
            "status": {"rebalance": rebalance},
        });
        serde_json::from_value::<Value>(whole)
            .and_then(serde_json::from_value)
            .unwrap()
    }

    /// Of a topic of six partitions with one replica each, the first `moved` of which are on broker 1 and all others on broker 0.
    fn moves(cluster: &Cluster, moved: i32) -> Moves {
        moves_of(cluster, moved, [None; 6])
    }

    /// The same, of so many GiB each.
    fn moves_of(cluster: &Cluster, moved: i32, sizes: [Option<u64>; 6]) -> Moves {
        let brokers = Brokers {
            cluster: "main".to_owned(),
            sessions: BTreeMap::new(),
            pods: BTreeMap::new(),
            racks: BTreeMap::new(),
        };
        let alive = Alive((0..2).map(|id| (id, Uuid::nil())).collect());
        let held = |index: i32| Partition {
            key: (Uuid::nil(), index),
            factor: 1,
            replicas: vec![i32::from(index < moved)],
            in_sync: [i32::from(index < moved)].into(),
            bytes: sizes[index as usize].map(|size| size << 30),
        };
        let mut partitions: Vec<_> = (0..6).map(held).collect();
        Moves::new(cluster, &brokers, &alive, &mut partitions)
    }

    fn at(text: &str) -> Time {
        Time(text.parse().unwrap())
    }

    #[test]
    fn load_is_evened_out_by_itself_or_once_a_person_has_approved_it() {
        let (begun, later) = (at("2026-01-01T00:00:00Z"), at("2026-01-01T00:01:00Z"));
        let auto = cluster("Auto", None, None);
        let found = moves(&auto, 0);
        assert!(found.is_busy());
        let status = found.status(&auto, &begun).unwrap();
        assert_eq!(
            (status.state, status.proposal),
            (RebalanceState::Moving, None)
        );

        let manual = cluster("Manual", None, None);
        let found = moves(&manual, 0);
        assert!(!found.is_busy());
        let proposed = found.status(&manual, &begun).unwrap();
        assert_eq!(
            (proposed.state, proposed.partitions),
            (RebalanceState::Proposed, 3)
        );
        assert_eq!(proposed.started_at, None);
        let id = proposed.proposal.clone().unwrap();

        let approved = cluster("Manual", Some(&proposed), Some(&id));
        let found = moves(&approved, 0);
        assert!(found.is_busy());
        let moving = found.status(&approved, &begun).unwrap();
        assert_eq!((moving.state, moving.moved), (RebalanceState::Moving, 0));
        assert_eq!(moving.started_at, Some(begun.clone()));

        // What is left is another plan, and approved with the first.
        let half = cluster("Manual", Some(&moving), Some(&id));
        let found = moves(&half, 1);
        let status = found.status(&half, &later).unwrap();
        assert_eq!((status.partitions, status.moved), (2, 1));
        assert_eq!(status.proposal.as_ref(), Some(&id));
        assert_eq!(status.estimated_end, Some(at("2026-01-01T00:03:00Z")));
        assert!(found.is_busy());

        let other = cluster("Manual", Some(&proposed), Some("another"));
        assert!(!moves(&other, 0).is_busy(), "that was not proposed");
        assert_eq!(moves(&auto, 3).status(&auto, &later), None);
    }

    #[test]
    fn evening_out_bytes_is_approved_whatever_sizes_have_become() {
        let manual = cluster("Manual", None, None);
        let proposed = |sizes: [u64; 6]| {
            let found = moves_of(&manual, 3, sizes.map(Some));
            let status = found.status(&manual, &at("2026-01-01T00:00:00Z"))?;
            status.proposal
        };
        assert_eq!(proposed([2; 6]), None);
        let first = proposed([9, 5, 1, 1, 1, 1]);
        assert!(first.is_some());
        assert_eq!(proposed([5, 9, 2, 1, 1, 1]), first);
    }
}
