//! Makes partitions' Leases: placed while nothing else is placed, then created some at a time.

use k8s_openapi::api::coordination::v1::Lease;
use millrace_crds::Cluster;
use millrace_crds::coordination::{Held, PartitionAssignment, PartitionLease, TopicRecord};

use super::decide::{Missing, too_few_brokers};
use crate::cluster::brokers;
use crate::context::{Context, each, post_params};
use crate::error::{Doing, Error, conflict};
use crate::index::ClusterId;
use crate::placement::{Loads, count, place};
use crate::problem::Problem;

/// Makes what is missing. The inner error is for the status.
pub(super) async fn make(
    context: &Context,
    cluster: &Cluster,
    id: &ClusterId,
    record: &TopicRecord,
    missing: Missing,
) -> Result<Result<(), Problem>, Error> {
    let mut leases = missing.again;
    if !missing.new.is_empty() {
        match placed(context, cluster, id, record, &missing.new).await {
            Ok(new) => leases.extend(new),
            Err(problem) => return Ok(Err(problem)),
        }
    }
    each(leases, |lease| create(context, id, lease)).await?;
    Ok(Ok(()))
}

async fn placed(
    context: &Context,
    cluster: &Cluster,
    id: &ClusterId,
    record: &TopicRecord,
    new: &[i32],
) -> Result<Vec<PartitionLease>, Problem> {
    let candidates = brokers(context, id).candidates(cluster.spec.replicas);
    let factor = record.config.replication_factor;
    let _alone = context.placing.lock().await;
    let mut partitions = context.view.partitions.lock();
    let (mut own, mut all) = (Loads::new(), Loads::new());
    for (topic_id, topic) in partitions.topics(id) {
        let there = topic
            .there
            .values()
            .map(|held| &held.lease.assignment.replicas);
        for replicas in there.chain(topic.reserved.values()) {
            count(&mut all, replicas);
            if *topic_id == record.topic_id {
                count(&mut own, replicas);
            }
        }
    }
    let reserved = partitions.topic(id, record.topic_id).reserved;
    let unplaced = new
        .iter()
        .copied()
        .filter(|new| !reserved.contains_key(new));
    let placed = place(&candidates, factor as usize, unplaced, &mut own, &mut all)
        .map_err(|few| too_few_brokers(factor, few.brokers, &id.name))?;
    partitions.reserve(id, record.topic_id, placed.clone());
    let mut replicas = reserved;
    replicas.extend(placed);
    let leases = new.iter().filter_map(|partition| {
        let replicas = replicas.get(partition)?.clone();
        Some(PartitionLease {
            assignment: PartitionAssignment::new(record.topic_id, *partition, replicas),
            held: Held::default(),
        })
    });
    Ok(leases.collect())
}

async fn create(context: &Context, id: &ClusterId, partition: PartitionLease) -> Result<(), Error> {
    let mut lease = Lease::default();
    partition.write(&mut lease, &id.name);
    let name = lease.metadata.name.clone().unwrap_or_default();
    let leases = context.api::<Lease>(&id.namespace);
    let made = match leases.create(&post_params(), &lease).await {
        Err(error) if conflict(&error) => leases.get(&name).await,
        answer => answer,
    };
    let made = made.doing(|| format!("make Lease {name}"))?;
    // So that a reconcile that comes before the watch knows it.
    context.view.partitions.lock().apply(&made);
    Ok(())
}
