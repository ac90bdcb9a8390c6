//! Brokers that can't come back, since their volume is on a node that is gone, as local disks are. They get a new volume on another node, which the others
//! fill, if those have all that was on it. Else a person must say that it is given up.
//!
//! What is deleted here can't be had back: it is decided on what is known, and looked up once more at the API server itself.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::{ListParams, PartialObjectMeta};
use kube::runtime::events::EventType;
use kube::{Api, ResourceExt};
use millrace_crds::Cluster;
use millrace_crds::conditions::Reason;
use millrace_crds::coordination::{PartitionAssignment, PartitionLease, Role};
use tracing::warn;
use uuid::Uuid;

use super::Seen;
use crate::alive::Alive;
use crate::context::Context;
use crate::error::{Doing, Error};
use crate::index::ClusterId;
use crate::problem::Problem;

/// The label by which a volume says which node it is on.
const HOSTNAME: &str = "kubernetes.io/hostname";
/// A node that is gone may be back by then.
const GRACE: Duration = Duration::from_secs(30);
/// How many partitions a message names.
const NAMED: usize = 10;

/// Since when volumes are seen to be gone, by Cluster and claim.
pub(crate) type GoneSince = BTreeMap<(ClusterId, String), Instant>;

/// Gives brokers new volumes for those that are gone. What keeps it from that.
pub(super) async fn replace(
    context: &Context,
    cluster: &Cluster,
    id: &ClusterId,
    seen: &Seen,
) -> Result<Option<Problem>, Error> {
    let mut problem = None;
    let mut gone = BTreeSet::new();
    for (ordinal, pod) in seen
        .brokers
        .pods
        .iter()
        .filter(|(_, pod)| finds_no_node(pod))
    {
        let name = seen.brokers.claim_name(*ordinal);
        let claim = seen.claims.iter().find(|claim| claim.name_any() == name);
        let claim = claim.filter(|claim| claim.metadata.deletion_timestamp.is_none());
        let Some(claim) = claim else { continue };
        let Some(lost) = lost(context, claim).await? else {
            continue;
        };
        let key = (id.clone(), name.clone());
        gone.insert(key.clone());
        let since = *context
            .view
            .gone_since
            .lock()
            .entry(key)
            .or_insert_with(Instant::now);
        if since.elapsed() < GRACE {
            continue;
        }
        let pod_name = pod.name_any();
        let in_the_way = match seen.brokers.known_id(*ordinal) {
            Some(broker) => only_there(context, id, broker, &seen.alive).await?,
            None => vec!["what it had, of which no session tells".to_owned()],
        };
        if !in_the_way.is_empty() {
            let some = in_the_way[..in_the_way.len().min(NAMED)].join(", ");
            let more = in_the_way.len().saturating_sub(NAMED);
            let more = match more {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            let message = format!(
                "the volume of {pod_name} {lost}, and no other broker that is up has all of {some}{more}. Bring it back, or the brokers that have. To go on \
                 without those records: `kubectl delete pvc/{name} pod/{pod_name}`, and uncleanLeaderElection: true in those Topics"
            );
            problem = Some(Problem::stalled(Reason::VolumeLost, message));
            continue;
        }
        context.delete::<PersistentVolumeClaim>(claim).await?;
        context.delete::<Pod>(pod).await?;
        let note = format!(
            "the volume of {pod_name} {lost}. It gets a new one, and copies from the other brokers, which have all that was on it"
        );
        warn!(cluster = id.name, namespace = id.namespace, "{note}");
        let reason = Reason::VolumeLost.as_str();
        context
            .event(cluster, EventType::Warning, reason, note)
            .await;
    }
    let mut since = context.view.gone_since.lock();
    since.retain(|key, _| key.0 != *id || gone.contains(key));
    Ok(problem)
}

/// Whether the scheduler finds no node for it.
fn finds_no_node(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|s| s.conditions.as_ref());
    let mut conditions = conditions.into_iter().flatten();
    pod.metadata.deletion_timestamp.is_none()
        && conditions.any(|c| c.type_ == "PodScheduled" && c.status == "False")
}

/// What has become of a claim's volume, if it is gone.
async fn lost(context: &Context, claim: &PersistentVolumeClaim) -> Result<Option<String>, Error> {
    let Some(name) = claim
        .spec
        .as_ref()
        .and_then(|spec| spec.volume_name.as_ref())
    else {
        return Ok(None);
    };
    let volumes = Api::<PersistentVolume>::all(context.client.clone());
    let found = volumes.get_opt(name).await;
    let Some(volume) = found.doing(|| format!("read PersistentVolume {name}"))? else {
        return Ok(Some(format!("was PersistentVolume {name}, which is gone")));
    };
    let known = context.view.nodes.all();
    let Some(names) = gone_nodes(&volume, known.iter().map(AsRef::as_ref)) else {
        return Ok(None);
    };
    let names: Vec<&str> = names.into_iter().collect();
    let labels = format!("{HOSTNAME} in ({})", names.join(","));
    let nodes = Api::<Node>::all(context.client.clone());
    let of_names = ListParams::default().labels(&labels);
    let there = nodes.list_metadata(&of_names).await;
    let there = there.doing(|| "list Nodes".to_owned())?;
    let is_gone = there.items.is_empty();
    Ok(is_gone.then(|| format!("was on node {}, which is gone", names.join(" or "))))
}

/// The nodes to which the volume is bound, if none of them is there. One that is bound to a zone or the like is kept, however few nodes are there now.
fn gone_nodes<'a, 'n>(
    volume: &'a PersistentVolume,
    nodes: impl Iterator<Item = &'n PartialObjectMeta<Node>>,
) -> Option<BTreeSet<&'a str>> {
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
    (is_gone && !names.is_empty()).then_some(names)
}

/// The partitions, as `topic/partition`, of which no other broker that is up has all, or of which that can't be told.
async fn only_there(
    context: &Context,
    id: &ClusterId,
    broker: i32,
    alive: &Alive,
) -> Result<Vec<String>, Error> {
    let topics: Vec<(Uuid, String, u32)> = {
        let records = context.view.records.lock();
        let of_cluster = records.of(id);
        of_cluster
            .map(|record| {
                (
                    record.topic_id,
                    record.config.name.clone(),
                    record.partitions_made,
                )
            })
            .collect()
    };
    let known: Vec<_> = {
        let partitions = context.view.partitions.lock();
        let topics = partitions.topics(id);
        topics
            .flat_map(|(_, topic)| topic.there.values().map(|held| held.lease.clone()))
            .collect()
    };
    let only = find_only_there(&topics, &known, broker, alive);
    if !only.is_empty() {
        return Ok(only);
    }
    let selector = Role::selector_of(&[Role::Partition], &id.name);
    let leases = context.api::<Lease>(&id.namespace);
    let leases = leases.list(&ListParams::default().labels(&selector)).await;
    let leases = leases.doing(|| "list the Leases of partitions".to_owned())?;
    // One that can't be read is one too few.
    let now = leases.items.iter().map(PartitionLease::read);
    let now: Vec<_> = now.filter_map(Result::ok).collect();
    Ok(find_only_there(&topics, &now, broker, alive))
}

/// The same of these Leases, for topics that have so many partitions.
fn find_only_there(
    topics: &[(Uuid, String, u32)],
    leases: &[PartitionLease],
    broker: i32,
    alive: &Alive,
) -> Vec<String> {
    let mut of_topic: BTreeMap<Uuid, BTreeMap<i32, &PartitionAssignment>> = BTreeMap::new();
    for PartitionLease { assignment, .. } in leases {
        let partitions = of_topic.entry(assignment.topic_id).or_default();
        partitions.insert(assignment.partition, assignment);
    }
    let mut only = Vec::new();
    for (topic_id, name, made) in topics {
        let known = of_topic.remove(topic_id).unwrap_or_default();
        let made = i32::try_from(*made).unwrap_or(i32::MAX);
        let all: BTreeSet<i32> = known.keys().copied().chain(0..made).collect();
        for index in all {
            // Without its Lease no one knows who has it.
            let has_it =
                |assignment: &&PartitionAssignment| is_only_there(assignment, broker, alive);
            if known.get(&index).is_none_or(has_it) {
                only.push(format!("{name}/{index}"));
            }
        }
    }
    // Of a topic without a record.
    for (topic_id, known) in of_topic {
        let only_here = known
            .iter()
            .filter(|(_, assignment)| is_only_there(assignment, broker, alive));
        only.extend(only_here.map(|(index, _)| format!("{topic_id}/{index}")));
    }
    only
}

fn is_only_there(assignment: &PartitionAssignment, broker: i32, alive: &Alive) -> bool {
    let mut in_sync = assignment.isr.iter();
    in_sync.any(|replica| replica.id == broker) && alive.in_sync(assignment).is_empty()
}

#[cfg(test)]
mod tests {
    use millrace_crds::coordination::{Held, Replica};
    use serde_json::{Value, json};

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
            (Value::Null, &[][..]),
            (bound(json!([])), &[]),
            (bound(json!([on(HOSTNAME, &["node-1"])])), &[]),
            (bound(json!([on(HOSTNAME, &["node-3"])])), &["node-3"]),
            (bound(json!([on(HOSTNAME, &["node-3", "node-2"])])), &[]),
            (bound(json!([on("zone", &["b"])])), &[]),
            (
                bound(json!([on(HOSTNAME, &["node-3"]), on("zone", &["b"])])),
                &[],
            ),
        ] {
            let volume = json!({"spec": {"nodeAffinity": affinity}});
            let volume = serde_json::from_value(volume).unwrap();
            let found = gone_nodes(&volume, nodes.iter()).unwrap_or_default();
            assert_eq!(Vec::from_iter(found), expected, "{affinity}");
        }
    }

    fn store(id: i32) -> Uuid {
        Uuid::from_u128(id as u128 + 10)
    }

    fn alive(brokers: &[i32]) -> Alive {
        Alive(brokers.iter().map(|id| (*id, store(*id))).collect())
    }

    fn lease(topic: u128, index: i32, isr: &[i32]) -> PartitionLease {
        let mut assignment = PartitionAssignment::new(Uuid::from_u128(topic), index, vec![0, 1, 2]);
        let replica = |id: &i32| Replica {
            id: *id,
            store: store(*id),
        };
        assignment.isr = isr.iter().map(replica).collect();
        let held = Held::default();
        PartitionLease { assignment, held }
    }

    #[test]
    fn what_only_the_lost_volume_has_is_not_given_up() {
        for (isr, brokers, expected) in [
            (&[0, 1, 2][..], &[0, 1][..], false),
            (&[0, 2], &[1], true),
            (&[2], &[0, 1], true),
            // It was out of sync already.
            (&[0], &[1], false),
        ] {
            let found = is_only_there(&lease(1, 0, isr).assignment, 2, &alive(brokers));
            assert_eq!(found, expected, "{isr:?} {brokers:?}");
        }
        // One that is up with another volume does not have it.
        let other = Alive([(0, Uuid::from_u128(99))].into());
        assert!(is_only_there(&lease(1, 0, &[0, 2]).assignment, 2, &other));
    }

    #[test]
    fn what_can_not_be_told_is_not_given_up() {
        let topics = [(Uuid::from_u128(1), "orders".to_owned(), 2)];
        let safe = |index| lease(1, index, &[0, 2]);
        for (leases, expected) in [
            (vec![safe(0), safe(1)], &[][..]),
            (vec![safe(0), safe(1), lease(1, 2, &[2])], &["orders/2"]),
            // One that was made has no Lease, or none that can be read.
            (vec![safe(1)], &["orders/0"]),
            (vec![], &["orders/0", "orders/1"]),
            // Without a record.
            (
                vec![safe(0), safe(1), lease(3, 0, &[2]), lease(3, 1, &[0, 2])],
                &["00000000-0000-0000-0000-000000000003/0"],
            ),
        ] {
            let found = find_only_there(&topics, &leases, 2, &alive(&[0, 1]));
            assert_eq!(found, expected);
        }
    }
}
