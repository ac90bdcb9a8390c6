//! Makes of a Cluster what it asks for: see what is there, decide, act, report.

mod apply;
mod brokers;
mod claims;
mod diagnosis;
mod moves;
mod objects;
mod removal;
mod restart;
mod status;
mod stranded;
mod support;
mod sweep;

pub(crate) use brokers::Brokers;
pub(crate) use stranded::GoneSince;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt;
use kube::api::ListParams;
use kube::runtime::controller::Action;
use kube::runtime::events::EventType;
use millrace_crds::conditions::Reason;
use millrace_crds::coordination::{PartitionAssignment, TopicState};
use millrace_crds::{Cluster, is_internal_topic};
use serde_json::json;
use tracing::info;

use self::apply::{Applied, apply};
use self::moves::Moves;
use self::objects::{Inputs, broker_name, objects};
use self::restart::{Restart, restart};
use self::status::{Counts, Found};
use crate::alive::Alive;
use crate::context::{Context, now};
use crate::error::Error;
use crate::index::ClusterId;
use crate::observe::Kind;
use crate::problem::Problem;
use crate::topic::make_internal;

/// What can't be watched, such as why pods could not be made, is looked at again after this.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// Partitions that have arrived make room for the next ones.
const MOVING: Duration = Duration::from_secs(1);
/// A missed change is put right after this at the latest.
const BACKSTOP: Duration = Duration::from_secs(600);

pub(crate) async fn reconcile(
    cluster: Arc<Cluster>,
    context: Arc<Context>,
) -> Result<Action, Error> {
    let id = ClusterId::new(
        &cluster.namespace().unwrap_or_default(),
        &cluster.name_any(),
    );
    if cluster.metadata.deletion_timestamp.is_some() {
        let done = removal::remove(&context, &cluster, &id).await?;
        return Ok(match done {
            true => Action::await_change(),
            // The last pod's end is a change, but one of Leases that it took along might not be.
            false => Action::requeue(LOOK_AGAIN),
        });
    }
    let seen = see(&context, &id);
    context.view.now_alive(&id, seen.alive.clone());
    let set = context
        .view
        .stateful_sets
        .get(&id.namespace, &broker_name(&id.name));
    let mut outcome = Outcome::default();
    if let Some(message) = support::unsupported(&cluster.spec) {
        outcome.problem = Some(Problem::stalled(Reason::NotSupported, message));
    } else if !cluster.spec.paused {
        act(&context, &cluster, &id, &seen, set.as_deref(), &mut outcome).await?;
    }
    if outcome.problem.is_none() {
        outcome.problem = problem(&context, &id, &seen, set.as_deref()).await;
    }
    report(&context, &cluster, &id, &seen, set.as_deref(), outcome).await
}

/// What is there.
struct Seen {
    brokers: Brokers,
    alive: Alive,
    claims: Vec<Arc<PersistentVolumeClaim>>,
    controller: Option<i32>,
    /// How many pods must stay, since they hold replicas.
    holding: i32,
    /// The pods, by ordinal, that must not restart now.
    needed: BTreeSet<i32>,
    counts: Counts,
}

/// What came of acting.
#[derive(Default)]
struct Outcome {
    problem: Option<Problem>,
    restart: Option<Restart>,
    growing: usize,
    moves: Option<Moves>,
}

/// The brokers of a Cluster, for the placement of replicas too.
pub(crate) fn brokers(context: &Context, id: &ClusterId) -> Brokers {
    let view = &context.view;
    let mut brokers = Brokers {
        cluster: id.name.clone(),
        sessions: view.sessions.lock().brokers(id),
        pods: BTreeMap::new(),
        racks: BTreeMap::new(),
    };
    let cluster = view.clusters.get(&id.namespace, &id.name);
    let key = cluster.map(|cluster| cluster.spec.rack.topology_key.clone());
    for pod in view.pods.all() {
        let ordinal = brokers.ordinal(&pod.name_any());
        if pod.namespace().as_deref() != Some(&id.namespace) {
            continue;
        }
        let Some(ordinal) = ordinal else { continue };
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        let node = node.and_then(|node| view.nodes.get("", node));
        let rack = node.and_then(|node| node.labels().get(key.as_deref()?).cloned());
        if let Some(rack) = rack {
            brokers.racks.insert(ordinal, rack);
        }
        brokers.pods.insert(ordinal, pod);
    }
    brokers
}

fn see(context: &Context, id: &ClusterId) -> Seen {
    let view = &context.view;
    let brokers = brokers(context, id);
    let alive = brokers.alive();
    let claims = view.claims.all().into_iter().filter(|claim| {
        let name = claim.name_any();
        let ordinal = name
            .strip_prefix("data-")
            .and_then(|pod| brokers.ordinal(pod));
        claim.namespace().as_deref() == Some(&id.namespace) && ordinal.is_some()
    });
    let claims = claims.collect();
    let records = view.records.lock();
    let (internal, topics): (Vec<_>, Vec<_>) = records
        .of(id)
        .partition(|record| is_internal_topic(&record.config.name));
    let internal: BTreeSet<_> = internal.iter().map(|record| record.topic_id).collect();
    let topics = topics.len();
    // One that is kept without its Topic, or is being deleted, has no leaders on purpose.
    let active = records.of(id).filter(|r| r.state == TopicState::Active);
    let served: HashMap<_, _> = active
        .map(|record| {
            let needed = record.config.min_insync_replicas.unwrap_or(1);
            (record.topic_id, needed as usize)
        })
        .collect();
    drop(records);
    let partitions = view.partitions.lock();
    let counts = Counts::of(
        i32::try_from(topics).unwrap_or(i32::MAX),
        (&served, &internal),
        partitions.topics(id),
        &alive,
    );
    let held = partitions.topics(id).flat_map(|(_, topic)| {
        let there = topic.there.values();
        // Who is in sync has what others may lack.
        let replicas = there.flat_map(|held| {
            let PartitionAssignment { replicas, isr, .. } = &held.lease.assignment;
            let in_sync = isr.iter().map(|replica| replica.id);
            replicas.iter().copied().chain(in_sync)
        });
        replicas.chain(topic.reserved.values().flatten().copied())
    });
    let holding = brokers.pods_for(held);
    let served = partitions
        .topics(id)
        .filter_map(|(topic_id, topic)| Some((topic, *served.get(topic_id)?)));
    let assigned = served.flat_map(|(topic, needed)| {
        let there = topic.there.values();
        there.map(move |held| (&held.lease.assignment, needed))
    });
    let needed = restart::needed(assigned).into_iter();
    let needed = needed.map(|id| brokers.ordinal_of(id)).collect();
    drop(partitions);
    let controller = view.sessions.lock().controller(id);
    Seen {
        brokers,
        alive,
        claims,
        controller,
        holding,
        needed,
        counts,
    }
}

/// How many pods there shall be: none that holds a replica is removed.
fn pods(cluster: &Cluster, seen: &Seen) -> i32 {
    match cluster.spec.hibernated {
        true => 0,
        false => cluster.spec.replicas.max(seen.holding),
    }
}

async fn act(
    context: &Context,
    cluster: &Cluster,
    id: &ClusterId,
    seen: &Seen,
    set: Option<&StatefulSet>,
    outcome: &mut Outcome,
) -> Result<(), Error> {
    let finalizer = removal::wanted(cluster);
    context
        .set_finalizer(cluster, removal::FINALIZER, finalizer)
        .await?;
    match apply_all(context, cluster, seen, set).await {
        Ok(Applied::Created) => {
            let note = format!(
                "made StatefulSet {} and what belongs to it",
                broker_name(&id.name)
            );
            context
                .event(cluster, EventType::Normal, "Created", note)
                .await;
        }
        Ok(_) => {}
        Err(error) if error.refused() => {
            let message = format!("{error}. Correct the spec, or what refuses it");
            outcome.problem = Some(Problem::stalled(Reason::Refused, message));
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    let growth = claims::growth(
        &seen.claims,
        &context.view.storage_classes.all(),
        &cluster.spec.storage.size,
    );
    for claim in &growth.patch {
        claims::grow(context, &id.namespace, claim, &cluster.spec.storage.size).await?;
        let note = format!("asked for {} for {claim}", cluster.spec.storage.size.0);
        context
            .event(cluster, EventType::Normal, "GrowingStorage", note)
            .await;
    }
    outcome.growing = growth.growing;
    outcome.problem = growth.problem;
    let stranded = stranded::replace(context, cluster, id, seen).await?;
    outcome.problem = stranded.or(outcome.problem.take());
    if let Some(set) = set {
        let restart = restart(set, &seen.brokers.pods, seen.controller, &seen.needed);
        outcome.restart = Some(restart);
        if let Some(ordinal) = restart.next {
            restart_broker(context, cluster, seen, ordinal).await?;
        }
    }
    if cluster.spec.hibernated {
        // Whoever has what is not to be seen now.
        return Ok(());
    }
    let problem = make_internal(context, cluster, id, seen.alive.0.len()).await?;
    outcome.problem = outcome.problem.take().or(problem);
    let moves = Moves::of(context, cluster, id, &seen.brokers, &seen.alive);
    // One thing after the other: a broker that restarts can't copy.
    if outcome.restart.is_none_or(|restart| restart.outdated == 0) {
        moves.begin(context, cluster, id).await?;
    }
    outcome.moves = Some(moves);
    sweep::sweep(context, id).await
}

/// Applies all objects, those first that the pods need.
async fn apply_all(
    context: &Context,
    cluster: &Cluster,
    seen: &Seen,
    set: Option<&StatefulSet>,
) -> Result<Applied, Error> {
    let racks = seen.brokers.racks();
    let inputs = Inputs {
        racks: &racks,
        may_stop: seen.needed.is_empty(),
        default_image: &context.default_image,
        replicas: pods(cluster, seen),
        claim_template_size: set.and_then(template_size),
    };
    let objects = objects(cluster, &inputs);
    let view = &context.view;
    apply(context, &view.service_accounts, &objects.service_account).await?;
    apply(context, &view.roles, &objects.role).await?;
    apply(context, &view.role_bindings, &objects.role_binding).await?;
    apply(context, &view.config_maps, &objects.config_map).await?;
    apply(context, &view.config_maps, &objects.racks).await?;
    apply(context, &view.services, &objects.brokers_service).await?;
    apply(context, &view.services, &objects.bootstrap_service).await?;
    apply(context, &view.network_policies, &objects.network_policy).await?;
    apply(
        context,
        &view.disruption_budgets,
        &objects.disruption_budget,
    )
    .await?;
    apply(context, &view.stateful_sets, &objects.stateful_set).await
}

fn template_size(set: &StatefulSet) -> Option<&Quantity> {
    let templates = set.spec.volume_claim_templates.as_ref()?;
    let requests = templates.first()?.spec.as_ref()?.resources.as_ref()?;
    requests.requests.as_ref()?.get("storage")
}

async fn restart_broker(
    context: &Context,
    cluster: &Cluster,
    seen: &Seen,
    ordinal: i32,
) -> Result<(), Error> {
    let Some(pod) = seen.brokers.pods.get(&ordinal) else {
        return Ok(());
    };
    let name = pod.name_any();
    if !context.delete::<Pod>(pod).await? {
        return Ok(());
    }
    info!(pod = name, "restarted for a change of its pod");
    let note = format!("{name} restarts: its pod is not as the Cluster's spec says any more");
    context
        .event(cluster, EventType::Normal, "RestartingBroker", note)
        .await;
    Ok(())
}

/// Why brokers do not come up.
async fn problem(
    context: &Context,
    id: &ClusterId,
    seen: &Seen,
    set: Option<&StatefulSet>,
) -> Option<Problem> {
    let classes = context.view.storage_classes.all();
    let claims = seen.claims.iter();
    let of_claims = claims
        .filter_map(|claim| diagnosis::of_claim(claim, &classes))
        .next();
    let pods = seen.brokers.pods.values();
    let of_pods = || {
        pods.filter_map(|pod| diagnosis::of_pod(pod))
            .min_by_key(|problem| !problem.stalled)
    };
    if let Some(problem) = of_claims.or_else(of_pods) {
        return Some(problem);
    }
    let wanted = set?.spec.replicas?;
    let made = i32::try_from(seen.brokers.pods.len()).unwrap_or(i32::MAX);
    if made >= wanted {
        return None;
    }
    refusal(context, id)
        .await
        .map(|note| diagnosis::of_refusal(&note))
}

/// The newest word of the StatefulSet's controller on what it could not make. It is said nowhere but in an Event.
async fn refusal(context: &Context, id: &ClusterId) -> Option<String> {
    let fields = format!(
        "regarding.kind=StatefulSet,regarding.name={},reason=FailedCreate",
        broker_name(&id.name)
    );
    let events = context.api::<Event>(&id.namespace);
    let found = events.list(&ListParams::default().fields(&fields)).await;
    let newest = found.ok()?.items.into_iter().max_by_key(|event| {
        let series = event
            .series
            .as_ref()
            .map(|series| series.last_observed_time.0);
        let last = event.deprecated_last_timestamp.as_ref().map(|time| time.0);
        series.max(last).max(
            event
                .metadata
                .creation_timestamp
                .as_ref()
                .map(|time| time.0),
        )
    });
    newest?.note
}

async fn report(
    context: &Context,
    cluster: &Cluster,
    id: &ClusterId,
    seen: &Seen,
    set: Option<&StatefulSet>,
    outcome: Outcome,
) -> Result<Action, Error> {
    let none = Restart {
        outdated: 0,
        next: None,
    };
    let restart = outcome.restart.unwrap_or(none);
    let incomplete = outcome.problem.is_some()
        || restart.outdated > 0
        || seen.brokers.pods.len() < pods(cluster, seen).unsigned_abs() as usize;
    let is_moving = outcome.moves.as_ref().is_some_and(Moves::is_busy);
    let volumes = context.view.volumes.lock().of(id);
    let found = Found {
        volumes: &volumes,
        moves: outcome.moves.as_ref(),
        brokers: &seen.brokers,
        stateful_set: set,
        pods: pods(cluster, seen),
        controller: seen.controller,
        counts: seen.counts,
        restart,
        growing: outcome.growing,
        problem: outcome.problem,
    };
    let status = status::status(cluster, &found, &now());
    if cluster.status.as_ref() != Some(&status) {
        context.write_status(cluster, json!(status)).await?;
        let told = cluster
            .status
            .as_ref()
            .map_or(&[][..], |status| &status.conditions);
        let now = &status.conditions;
        context.tell(Kind::Cluster, cluster, told, now).await;
        info!(
            cluster = id.name,
            namespace = id.namespace,
            ready = status.ready_replicas,
            "status written"
        );
    }
    Ok(Action::requeue(if is_moving {
        MOVING
    } else if incomplete {
        LOOK_AGAIN
    } else {
        BACKSTOP
    }))
}
