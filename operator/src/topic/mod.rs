//! Makes of a Topic what it asks for: its record, and a Lease for each partition.

mod decide;
mod internal;
mod partitions;
mod removal;
mod status;

pub(crate) use internal::make_internal;
pub(crate) use removal::{Progress, delete_records};

use std::sync::Arc;
use std::time::Duration;

use kube::ResourceExt;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use millrace_crds::conditions::Reason;
use millrace_crds::coordination::TopicRecord;
use millrace_crds::{Cluster, Topic};
use serde_json::json;
use tracing::info;

use self::decide::{Decision, Known, decide, missing};
use self::status::Found;
use crate::cluster::brokers;
use crate::context::{Context, now};
use crate::error::Error;
use crate::index::{self, ClusterId};
use crate::observe::Kind;
use crate::problem::Problem;
use crate::record::{self, Written};
use crate::view::cluster_of;

/// A decision that was overtaken is made again after this.
const AGAIN: Duration = Duration::from_millis(200);

pub(crate) async fn reconcile(topic: Arc<Topic>, context: Arc<Context>) -> Result<Action, Error> {
    let id = cluster_of(&topic);
    if topic.metadata.deletion_timestamp.is_some() {
        return delete(&context, &topic, &id).await;
    }
    let cluster = context.view.clusters.get(&id.namespace, &id.name);
    let record = record_of(&context, &topic, &id);
    let decision = decide(
        &topic,
        &known(&context, &topic, cluster.as_deref(), record.as_ref()),
    );
    let (decision, cluster) = match (decision, cluster) {
        (Ok(decision), Some(cluster)) => (decision, cluster),
        (Ok(_), None) => return Ok(Action::await_change()),
        (Err(problem), _) => {
            let mine = record
                .and_then(Result::ok)
                .filter(|record| is_of(record, &topic));
            return report(&context, &topic, &id, mine.as_ref(), Some(problem)).await;
        }
    };
    let record = decision.record().clone();
    if cluster.spec.paused {
        let problem = (!matches!(decision, Decision::Keep(_))).then(|| {
            let message = format!("Cluster {} is paused: nothing is changed", id.name);
            Problem::passing(Reason::Paused, message)
        });
        let mine = (!matches!(decision, Decision::Create(_))).then_some(&record);
        return report(&context, &topic, &id, mine, problem).await;
    }
    let wanted = removal::wanted(&topic);
    context
        .set_finalizer(&*topic, removal::FINALIZER, wanted)
        .await?;
    if write(&context, &topic, &id, &decision).await? == Written::Otherwise {
        return Ok(Action::requeue(AGAIN));
    }
    complete(&context, &topic, &cluster, &id, record).await
}

/// Makes the Leases that are missing, notes in the record that all are made, and reports.
async fn complete(
    context: &Context,
    topic: &Topic,
    cluster: &Cluster,
    id: &ClusterId,
    mut record: TopicRecord,
) -> Result<Action, Error> {
    let leases = context.view.partitions.lock().topic(id, record.topic_id);
    let missing = missing(&record, &leases);
    let lost = missing.lost.first().copied();
    let again: Vec<i32> = missing
        .again
        .iter()
        .map(|l| l.assignment.partition)
        .collect();
    let made_now = missing.new.len();
    let outcome = partitions::make(context, cluster, id, &record, missing).await?;
    let all_made = outcome.is_ok();
    if !again.is_empty() {
        let note = format!(
            "Leases of partitions {again:?} were deleted, and are made again in a later leader epoch"
        );
        context
            .event(topic, EventType::Warning, "LeaseMadeAgain", note)
            .await;
    }
    let problem = outcome.err().or_else(|| lost.map(|partition| {
        let lease = format!("{}-{}-{partition}", id.name, record.topic_id);
        Problem::stalled(
            Reason::LeaseLost,
            format!(
                "Lease {lease} was deleted while no operator ran, so no one knows the partition's leader epoch. Restore it from a backup, or delete the topic"
            ),
        )
    }));
    let partitions = record.config.partitions;
    if made_now > 0 && problem.is_none() {
        let (reason, note) = match made_now == partitions as usize {
            true => (
                "Created",
                format!(
                    "made topic {} with {partitions} partitions",
                    record.config.name
                ),
            ),
            false => (
                "Grown",
                format!("added {made_now} partitions; there are {partitions} now"),
            ),
        };
        context.event(topic, EventType::Normal, reason, note).await;
    }
    if all_made && record.partitions_made < partitions {
        let before = record.clone();
        record.partitions_made = partitions;
        if record::replace(context, id, &before, &record).await? == Written::Otherwise {
            return Ok(Action::requeue(AGAIN));
        }
    }
    report(context, topic, id, Some(&record), problem).await
}

async fn write(
    context: &Context,
    topic: &Topic,
    id: &ClusterId,
    decision: &Decision,
) -> Result<Written, Error> {
    match decision {
        Decision::Keep(_) => Ok(Written::Done),
        Decision::Create(record) => record::create(context, id, record).await,
        Decision::Replace { before, after } => {
            let written = record::replace(context, id, before, after).await?;
            if written == Written::Done && !is_of(before, topic) {
                let note = format!(
                    "took over the records that were kept of topic {}",
                    after.config.name
                );
                context
                    .event(topic, EventType::Normal, "TakenOver", note)
                    .await;
            }
            Ok(written)
        }
    }
}

fn known<'a>(
    context: &Context,
    topic: &Topic,
    cluster: Option<&'a Cluster>,
    record: Option<&'a Result<TopicRecord, String>>,
) -> Known<'a> {
    let view = &context.view;
    let namespace = topic.namespace().unwrap_or_default();
    let admitted = cluster.is_some_and(|cluster| {
        let labels = view.namespace_labels(&namespace);
        let own = cluster.namespace().unwrap_or_default();
        cluster
            .spec
            .topic_namespaces
            .admit(&own, &namespace, &labels)
    });
    let owner_lives = match record {
        Some(Ok(record)) => {
            let owner = view.topics.get(&record.namespace, &record.topic);
            owner.is_some_and(|owner| is_of(record, &owner))
        }
        _ => false,
    };
    Known {
        cluster,
        admitted,
        record,
        owner_lives,
    }
}

fn record_of(
    context: &Context,
    topic: &Topic,
    id: &ClusterId,
) -> Option<Result<TopicRecord, String>> {
    let name = topic.client_name(&id.namespace);
    let object = TopicRecord::object_name(&id.name, &name);
    context.view.records.lock().get(id, &object)
}

fn is_of(record: &TopicRecord, topic: &Topic) -> bool {
    topic.metadata.uid.as_ref() == Some(&record.topic_uid)
}

async fn delete(context: &Context, topic: &Topic, id: &ClusterId) -> Result<Action, Error> {
    if !topic
        .finalizers()
        .iter()
        .any(|held| held == removal::FINALIZER)
    {
        return Ok(Action::await_change());
    }
    let progress = removal::remove(context, topic, id).await?;
    match progress {
        Progress::Done => {
            info!(topic = status::full_name(topic), "deleted");
            Ok(Action::await_change())
        }
        Progress::Again => Ok(Action::requeue(AGAIN)),
        Progress::Waiting(_) => {
            let record = record_of(context, topic, id).and_then(Result::ok);
            let message = removal::told(topic, &progress);
            let problem = Problem::passing(Reason::Deleting, message);
            report(context, topic, id, record.as_ref(), Some(problem)).await
        }
    }
}

async fn report(
    context: &Context,
    topic: &Topic,
    id: &ClusterId,
    record: Option<&TopicRecord>,
    problem: Option<Problem>,
) -> Result<Action, Error> {
    let leases = match record {
        Some(record) => context.view.partitions.lock().topic(id, record.topic_id),
        None => index::Topic::default(),
    };
    let figures = record.and_then(|record| context.view.figures.lock().of(record.topic_id));
    let controller = context.view.sessions.lock().controller(id).is_some();
    let found = Found {
        record,
        leases: &leases,
        alive: &brokers(context, id).alive(),
        figures: figures.as_deref(),
        controller,
        problem,
    };
    let status = status::status(topic, &found, &now());
    if topic.status.as_ref() != Some(&status) {
        context.write_status(topic, json!(status)).await?;
        let told = topic
            .status
            .as_ref()
            .map_or(&[][..], |status| &status.conditions);
        let now = &status.conditions;
        context.tell(Kind::Topic, topic, told, now).await;
    }
    Ok(Action::await_change())
}
