//! The internal topics of a Cluster, which no Topic asks for.

use millrace_crds::coordination::{TopicRecord, TopicState};
use millrace_crds::{Cluster, INTERNAL_TOPICS, TopicConfig};
use uuid::Uuid;

use super::{decide::missing, partitions};
use crate::context::Context;
use crate::error::Error;
use crate::index::ClusterId;
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
