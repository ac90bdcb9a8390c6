//! The internal topics of a Cluster, which no Topic asks for.

use millrace_crds::coordination::{TopicRecord, TopicState};
use millrace_crds::{Cluster, INTERNAL_TOPICS, TopicConfig};
use uuid::Uuid;

use super::{decide::missing, partitions};
use crate::context::Context;
use crate::error::Error;
use crate::index::{self, ClusterId};
use crate::problem::Problem;
use crate::record;

/// Replicas of each partition, where there are so many brokers.
const REPLICAS: i32 = 3;

/// Makes what is missing of them. Where their replicas are is decided once, so this waits until all brokers are up (`alive` of them are): then their
/// zones are known.
pub(crate) async fn make_internal(
    context: &Context,
    cluster: &Cluster,
    id: &ClusterId,
    alive: usize,
) -> Result<Option<Problem>, Error> {
    let mut problem = None;
    for topic in INTERNAL_TOPICS {
        problem = problem.or(make(context, cluster, id, alive, topic).await?);
    }
    Ok(problem)
}

async fn make(
    context: &Context,
    cluster: &Cluster,
    id: &ClusterId,
    alive: usize,
    topic: &str,
) -> Result<Option<Problem>, Error> {
    let name = TopicRecord::object_name(&id.name, topic);
    let known = context.view.records.lock().get(id, &name);
    let record = match known {
        Some(Ok(record)) => record,
        // It is in the Cluster's status as any other.
        Some(Err(_)) => return Ok(None),
        None if alive < usize::try_from(cluster.spec.replicas).unwrap_or_default() => {
            return Ok(None);
        }
        None => {
            let replicas = cluster.spec.replicas.clamp(1, REPLICAS);
            let record = TopicRecord {
                topic_id: Uuid::new_v4(),
                namespace: id.namespace.clone(),
                topic: topic.to_owned(),
                topic_uid: String::new(),
                state: TopicState::Active,
                partitions_made: 0,
                config: TopicConfig::internal(topic, replicas.unsigned_abs()),
            };
            record::create(context, id, &record).await?;
            // Whoever made it: it is a change, which brings this here again.
            return Ok(None);
        }
    };
    if record.state != TopicState::Active {
        return Ok(None);
    }
    let leases = context.view.partitions.lock().topic(id, record.topic_id);
    if let Some(after) = resized(&record, cluster.spec.replicas, alive, &leases) {
        record::replace(context, id, &record, &after).await?;
        return Ok(None);
    }
    let lost = missing(&record, &leases);
    let made = partitions::make(context, cluster, id, &record, lost).await?;
    if made.is_ok() && record.partitions_made < record.config.partitions {
        let after = TopicRecord {
            partitions_made: record.config.partitions,
            ..record.clone()
        };
        record::replace(context, id, &record, &after).await?;
    }
    Ok(made.err())
}

/// The record for another number of brokers. Fewer replicas must be in sync from when there shall be fewer, more once there are more.
fn resized(
    record: &TopicRecord,
    brokers: i32,
    alive: usize,
    leases: &index::Topic,
) -> Option<TopicRecord> {
    let wanted = TopicConfig::internal(
        &record.config.name,
        brokers.clamp(1, REPLICAS).unsigned_abs(),
    );
    let factor = wanted.replication_factor;
    let held = &record.config;
    let mut after = record.clone();
    if factor < held.replication_factor || alive >= factor as usize {
        after.config.replication_factor = factor;
    }
    let in_sync = |held: &index::Held| held.lease.assignment.isr.len() >= factor as usize;
    if wanted.min_insync_replicas < held.min_insync_replicas || leases.there.values().all(in_sync) {
        after.config.min_insync_replicas = wanted.min_insync_replicas;
    }
    (after != *record).then_some(after)
}
