//! Brokers that can't come back, since their volume is on a node that is gone, as local disks are. They get a new volume on another node, which the others
//! fill, if those have all that was on it. Else a person must say that it is given up.

use std::collections::BTreeSet;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::PartialObjectMeta;
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};
use millrace_crds::Cluster;
use millrace_crds::conditions::Reason;
use millrace_crds::coordination::PartitionAssignment;
use tracing::warn;

use super::{Seen, delete};
use crate::alive::Alive;
use crate::context::Context;
use crate::error::{Doing, Error};
use crate::index::ClusterId;
use crate::problem::Problem;

/// The label by which a volume says which node it is on.
const HOSTNAME: &str = "kubernetes.io/hostname";
/// A node that was taken out by mistake may be back by then.
const GRACE: Duration = Duration::from_secs(30);

/// Gives brokers new volumes for those that are gone. What keeps it from that.
pub(super) async fn replace(
    context: &Context,
    cluster: &Cluster,
    id: &ClusterId,
    seen: &Seen,
) -> Result<Option<Problem>, Error> {
    let mut problem = None;
    for (ordinal, pod) in &seen.brokers.pods {
        let name = seen.brokers.claim_name(*ordinal);
        let claim = seen.claims.iter().find(|claim| claim.name_any() == name);
        let volume = claim.and_then(|claim| claim.spec.as_ref()?.volume_name.clone());
        let (true, Some(claim), Some(volume)) =
            (finds_no_node(pod, Timestamp::now()), claim, volume)
        else {
            continue;
        };
        let volumes = Api::<PersistentVolume>::all(context.client.clone());
        let found = volumes.get_opt(&volume).await;
        let found = found.doing(|| format!("read PersistentVolume {volume}"))?;
        let nodes = context.view.nodes.all();
        let lost = match &found {
            Some(found) => gone_node(found, nodes.iter().map(AsRef::as_ref))
                .map(|node| format!("was on node {node}, which is gone")),
            None => Some(format!("was PersistentVolume {volume}, which is gone")),
        };
        let Some(lost) = lost else { continue };
        let pod_name = pod.name_any();
        let only = only_there(context, id, seen.brokers.id(*ordinal), &seen.alive);
        if let Some(first) = only.first() {
            let message = format!(
                "the volume of {pod_name} {lost}, and no other broker that is up has all of {first}{}. Bring it back, or the brokers that have. To go on \
                 without those records: `kubectl delete pvc/{name} pod/{pod_name}`",
                match only.len() - 1 {
                    0 => String::new(),
                    more => format!(" and {more} more partitions"),
                }
            );
            problem = Some(Problem::stalled(Reason::VolumeLost, message));
            continue;
        }
        let note = format!(
            "the volume of {pod_name} {lost}. It gets a new one, and copies from the other brokers, which have all that was on it"
        );
        warn!(cluster = id.name, namespace = id.namespace, "{note}");
        delete::<PersistentVolumeClaim>(context, claim).await?;
        delete::<Pod>(context, pod).await?;
        let reason = Reason::VolumeLost.as_str();
        context
            .event(cluster, EventType::Warning, reason, note)
            .await;
    }
    Ok(problem)
}

/// Whether the scheduler has found no node for it for a while.
fn finds_no_node(pod: &Pod, now: Timestamp) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    let made = pod.metadata.creation_timestamp.as_ref();
    conditions.any(|c| c.type_ == "PodScheduled" && c.status == "False")
        && pod.metadata.deletion_timestamp.is_none()
        && made.is_some_and(|made| now.duration_since(made.0).unsigned_abs() >= GRACE)
}

/// The node to which the volume is bound, if there is none of that name. One that is bound to a zone or the like is kept, however few nodes are there now.
fn gone_node<'a>(
    volume: &PersistentVolume,
    nodes: impl Iterator<Item = &'a PartialObjectMeta<Node>>,
) -> Option<String> {
    let affinity = volume.spec.as_ref()?.node_affinity.as_ref()?;
    let terms = &affinity.required.as_ref()?.node_selector_terms;
    let mut names = BTreeSet::new();
    // It may be on a node that fits any of the terms, each of which has to name its nodes.
    for term in terms {
        let mut by_name = term.match_expressions.iter().flatten();
        let by_name = by_name.find(|e| e.key == HOSTNAME && e.operator == "In")?;
        names.extend(by_name.values.iter().flatten().map(String::as_str));
    }
    let mut there = nodes.filter_map(|node| node.labels().get(HOSTNAME));
    let is_gone = !there.any(|name| names.contains(name.as_str()));
    let first = names.first().filter(|_| is_gone)?;
    Some((*first).to_owned())
}

/// The partitions of which no other broker that is up has all, as `topic/partition`.
fn only_there(
    context: &Context,
    id: &ClusterId,
    broker: Option<i32>,
    alive: &Alive,
) -> Vec<String> {
    let records = context.view.records.lock();
    let partitions = context.view.partitions.lock();
    let mut only = Vec::new();
    for (topic_id, topic) in partitions.topics(id) {
        let record = records.of(id).find(|record| record.topic_id == *topic_id);
        for (index, held) in &topic.there {
            if is_only_there(&held.lease.assignment, broker, alive) {
                let name = record.map_or_else(|| topic_id.to_string(), |r| r.config.name.clone());
                only.push(format!("{name}/{index}"));
            }
        }
    }
    only
}

fn is_only_there(assignment: &PartitionAssignment, broker: Option<i32>, alive: &Alive) -> bool {
    let mut in_sync = assignment.isr.iter();
    in_sync.any(|replica| Some(replica.id) == broker) && alive.in_sync(assignment).is_empty()
}

#[cfg(test)]
mod tests {
    use millrace_crds::coordination::Replica;
    use serde_json::{Value, json};
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_volume_is_gone_with_its_node_and_not_with_a_zone() {
        let node = |name: &str| -> PartialObjectMeta<Node> {
            let labels = json!({"kubernetes.io/hostname": name, "zone": "a"});
            serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}})).unwrap()
        };
        let nodes = [node("node-1"), node("node-2")];
        let on = |key: &str, values: &[&str]| json!({"matchExpressions": [{"key": key, "operator": "In", "values": values}]});
        let bound = |terms: Value| json!({"required": {"nodeSelectorTerms": terms}});
        for (affinity, expected) in [
            (Value::Null, None),
            (bound(json!([])), None),
            (bound(json!([on(HOSTNAME, &["node-1"])])), None),
            (bound(json!([on(HOSTNAME, &["node-3"])])), Some("node-3")),
            (bound(json!([on(HOSTNAME, &["node-3", "node-2"])])), None),
            (bound(json!([on("zone", &["b"])])), None),
            (
                bound(json!([on(HOSTNAME, &["node-3"]), on("zone", &["b"])])),
                None,
            ),
        ] {
            let volume = json!({"spec": {"nodeAffinity": affinity}});
            let volume = serde_json::from_value(volume).unwrap();
            let found = gone_node(&volume, nodes.iter());
            assert_eq!(found.as_deref(), expected, "{affinity}");
        }
    }

    #[test]
    fn what_only_the_lost_volume_has_is_not_given_up() {
        let store = |id: i32| Uuid::from_u128(id as u128 + 10);
        for (isr, alive, expected) in [
            (&[0, 1, 2][..], &[0, 1][..], false),
            (&[0, 2], &[1], true),
            (&[2], &[0, 1], true),
            // It was out of sync already.
            (&[0], &[1], false),
        ] {
            let mut assignment = PartitionAssignment::new(Uuid::nil(), 0, vec![0, 1, 2]);
            let replica = |id: &i32| Replica {
                id: *id,
                store: store(*id),
            };
            assignment.isr = isr.iter().map(replica).collect();
            let alive = Alive(alive.iter().map(|id| (*id, store(*id))).collect());
            let found = is_only_there(&assignment, Some(2), &alive);
            assert_eq!(found, expected, "{isr:?} {alive:?}");
        }
        // One that is up with another volume does not have it.
        let mut assignment = PartitionAssignment::new(Uuid::nil(), 0, vec![0, 2]);
        let replica = |id| Replica {
            id,
            store: store(id),
        };
        assignment.isr = [0, 2].map(replica).to_vec();
        let other = Alive([(0, Uuid::from_u128(99))].into());
        assert!(is_only_there(&assignment, Some(2), &other));
    }

    #[test]
    fn a_pod_is_waited_for_a_while() {
        let made: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let pod = |status: &str| -> Pod {
            let condition = json!({"type": "PodScheduled", "status": status});
            let metadata = json!({"creationTimestamp": "2026-01-01T00:00:00Z"});
            let pod = json!({"metadata": metadata, "status": {"conditions": [condition]}});
            serde_json::from_value(pod).unwrap()
        };
        let after = |seconds| made + Duration::from_secs(seconds);
        assert!(!finds_no_node(&pod("False"), after(29)));
        assert!(finds_no_node(&pod("False"), after(30)));
        assert!(!finds_no_node(&pod("True"), after(30)));
    }
}
