//! Deletes a topic: its record says so, each broker deletes what it holds and takes itself out of the Leases, and when no one is left Leases and
//! record go.

use std::collections::BTreeSet;

use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams, Preconditions};
use kube::runtime::events::EventType;
use millrace_crds::coordination::{TOPIC_LABEL, TopicRecord, TopicState};
use millrace_crds::{DeletionPolicy, Topic};

use super::{is_of, record_of};
use crate::context::{Context, each};
use crate::error::{Doing, Error, conflict, not_found};
use crate::index::{ClusterId, Held};
use crate::record::{self, Written};

/// Holds a Topic until its records are deleted.
pub(super) const FINALIZER: &str = "millrace.dev/records";

/// Whether a Topic needs the finalizer.
pub(super) fn wanted(topic: &Topic) -> bool {
    topic.spec.deletion_policy == DeletionPolicy::Delete
}

/// How far a deletion has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Nothing is left.
    Done,
    /// These brokers have not deleted yet what they hold.
    Waiting(BTreeSet<i32>),
    /// Something had changed meanwhile.
    Again,
}

/// Deletes the topic of a Topic that is being deleted, and lets go of the Topic.
pub(super) async fn remove(
    context: &Context,
    topic: &Topic,
    id: &ClusterId,
) -> Result<Progress, Error> {
    let record = record_of(context, topic, id).and_then(Result::ok);
    let mine = record.filter(|record| is_of(record, topic));
    // Without a Cluster there is no one who could delete, and a namespace must not wait for it.
    let cluster = context.view.clusters.get(&id.namespace, &id.name);
    let serves = cluster.is_some_and(|cluster| cluster.metadata.deletion_timestamp.is_none());
    if let Some(record) = mine.filter(|_| wanted(topic) && serves) {
        let progress = delete_records(context, id, &record).await?;
        if progress != Progress::Done {
            return Ok(progress);
        }
        let note = format!("deleted the records of topic {}", record.config.name);
        context
            .event(topic, EventType::Normal, "Deleted", note)
            .await;
    }
    context.set_finalizer(topic, FINALIZER, false).await?;
    Ok(Progress::Done)
}

/// Deletes a topic as far as it can be now.
pub(crate) async fn delete_records(
    context: &Context,
    id: &ClusterId,
    record: &TopicRecord,
) -> Result<Progress, Error> {
    let mut record = record.clone();
    if record.state != TopicState::Deleting {
        let deleting = TopicRecord {
            state: TopicState::Deleting,
            ..record.clone()
        };
        if record::replace(context, id, &record, &deleting).await? == Written::Otherwise {
            return Ok(Progress::Again);
        }
        record = deleting;
    }
    let there = context
        .view
        .partitions
        .lock()
        .topic(id, record.topic_id)
        .there;
    let (empty, held): (Vec<Held>, Vec<Held>) = there.into_values().partition(is_empty);
    each(empty, |held| delete(context, id, held)).await?;
    if !held.is_empty() {
        let replicas = held
            .iter()
            .flat_map(|held| held.lease.assignment.replicas.iter());
        return Ok(Progress::Waiting(replicas.copied().collect()));
    }
    // The cache may lack one that was made a moment ago.
    let leases = context.api::<Lease>(&id.namespace);
    let labelled = ListParams::default().labels(&format!("{TOPIC_LABEL}={}", record.topic_id));
    let left = leases.list(&labelled).await;
    let left = left.doing(|| format!("list the Leases of topic {}", record.config.name))?;
    if !left.items.is_empty() {
        let mut partitions = context.view.partitions.lock();
        for lease in &left.items {
            partitions.apply(lease);
        }
        return Ok(Progress::Again);
    }
    if record::delete(context, id, &record).await? == Written::Otherwise {
        return Ok(Progress::Again);
    }
    context.view.partitions.lock().forget(id, record.topic_id);
    Ok(Progress::Done)
}

/// No broker holds anything of it: all have taken themselves out, or none has ever led it.
fn is_empty(held: &Held) -> bool {
    let assignment = &held.lease.assignment;
    assignment.replicas.is_empty() || (assignment.isr.is_empty() && assignment.leader.is_none())
}

/// Deletes a Lease, if it is as it was seen: an election at the same time wins.
async fn delete(context: &Context, id: &ClusterId, held: Held) -> Result<(), Error> {
    let name = held.lease.assignment.lease_name(&id.name);
    let params = DeleteParams::default().preconditions(Preconditions {
        uid: None,
        resource_version: Some(held.resource_version),
    });
    let leases = context.api::<Lease>(&id.namespace);
    match leases.delete(&name, &params).await {
        Ok(_) => {}
        Err(error) if not_found(&error) => {}
        Err(error) if conflict(&error) => return Ok(()),
        Err(error) => return Err(error).doing(|| format!("delete Lease {name}")),
    }
    context.view.partitions.lock().delete(&id.namespace, &name);
    Ok(())
}

/// For people.
pub(super) fn told(topic: &Topic, progress: &Progress) -> String {
    match progress {
        Progress::Waiting(brokers) => {
            let brokers: Vec<String> = brokers.iter().map(ToString::to_string).collect();
            format!(
                "brokers {} have not deleted their records yet. If they can't come back, remove the finalizer {FINALIZER} from Topic {}",
                brokers.join(", "),
                topic.name_any()
            )
        }
        Progress::Done | Progress::Again => "its records are being deleted".to_owned(),
    }
}
