//! A broker among several, coordinated through a Kubernetes API server: wires session, coordinator and replicas together.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::{Client, Resource};
use millrace_crds::{
    Cluster,
    coordination::{BrokerSession, PartitionLease, Replica, TopicRecord, TopicState},
};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use uuid::Uuid;

use super::{
    api::{ApiError, ClusterApi, ConnectError, connect},
    context::Context,
    coordinator::{Coordinator, Timing, Topics},
    election::{leave, needs},
    isr::IsrChanges,
    membership::{self, Renewal, SessionLost},
    replicas::{Replicas, Wanted},
    session::{ClaimError, Claimant},
};
use crate::{
    directory::ClusterView,
    fetching::Fetching,
    observe::Metrics,
    replication::{self, Me},
    storage::{BrokerIdentity, StorageError, Store},
};

/// Before an ISR change that could not be written is looked at again.
const ISR_PAUSE: Duration = Duration::from_secs(1);
/// How long handing over may take, and leaving the ISR after that.
const DRAIN_LIMIT: Duration = Duration::from_secs(20);
const LEAVE_ISR: Duration = Duration::from_secs(1);
const DRAIN_POLL: Duration = Duration::from_millis(20);
/// Leases at a time that are read or written for what this broker deletes.
const MAX_LEAVES: usize = 16;
/// After something failed.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Where and as what a broker takes part in a Cluster.
#[derive(Clone, Debug)]
pub struct Membership {
    /// The Cluster's name.
    pub cluster: String,
    /// Its `metadata.uid`, so that Leases of sessions go with it.
    pub cluster_uid: Option<String>,
    /// Its namespace.
    pub namespace: String,
    /// This pod's name. With an empty volume, the broker's id is the number at its end.
    pub pod: String,
    /// This pod's `metadata.uid`.
    pub pod_uid: String,
    /// Where clients reach this broker.
    pub address: String,
    /// How long sessions last.
    pub timing: Timing,
    /// How long a replica may lag behind before it is no longer in sync.
    pub replica_lag: Duration,
}

/// Why a broker can't take part in its Cluster.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The pod's name has no ordinal.
    #[error(
        "pod {pod:?} has no number at the end of its name, and the volume no broker id: brokers run in a StatefulSet"
    )]
    NoOrdinal {
        /// The pod's name.
        pod: String,
    },
    /// The volume belongs to another broker, or can't be claimed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// There is no API to talk to.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The session is someone else's.
    #[error(transparent)]
    Claim(#[from] ClaimError),
}

/// A broker that takes part.
pub struct Member {
    /// The broker's id.
    pub broker_id: i32,
    /// Resolves if another process has taken this one's session: it must not go on. For one to wait for.
    pub lost: Option<oneshot::Receiver<SessionLost>>,
    context: Arc<Context>,
    renewal: Renewal,
    coordinator: JoinHandle<()>,
}

impl Membership {
    /// What volumes are claimed for.
    pub fn cluster_id(&self) -> String {
        format!("{}/{}", self.namespace, self.cluster)
    }

    /// Takes part: claims volume and session, and returns when the Cluster's state is known. Others may connect from then on: the listener
    /// must be there before. Gives up being controller when stopped.
    pub async fn join(
        self,
        store: Arc<Store>,
        cluster: ClusterView,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Result<Member, JoinError> {
        let client = connect(metrics.clone()).await?;
        self.join_through(client, store, cluster, metrics, stop)
            .await
    }

    /// The same through a client that is there already.
    pub(super) async fn join_through(
        self,
        client: Client,
        store: Arc<Store>,
        cluster: ClusterView,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Result<Member, JoinError> {
        let broker_id = self.broker_id(&store)?;
        let api = ClusterApi::new(&client, &self.namespace);
        let claimant = Arc::new(Claimant {
            cluster: self.cluster.clone(),
            owner: self.owner(),
            session: BrokerSession {
                broker_id,
                store_id: store.store_id(),
                pod: self.pod.clone(),
                address: self.address.clone(),
                release: env!("CARGO_PKG_VERSION").to_owned(),
                draining: false,
            },
            identity: format!("{}/{}/{}", self.pod, self.pod_uid, Uuid::new_v4().simple()),
            duration_seconds: i32::try_from(self.timing.duration.as_secs()).unwrap_or(i32::MAX),
            starts: store.incarnation(),
            draining: Arc::default(),
        });
        let session = membership::claim(&api, &claimant).await?;
        let me = Me {
            id: broker_id,
            epoch: session.epoch,
            store: store.store_id(),
        };
        info!(broker = broker_id, epoch = me.epoch, "session claimed");
        let (renewal, lost) = session.keep(api.clone(), claimant.clone(), self.timing.renewal);
        let fetching = Fetching::new(
            me,
            cluster.cluster_id,
            store.clone(),
            cluster.peers.clone(),
            metrics.clone(),
            stop.clone(),
        );
        let context = Arc::new(Context {
            api,
            claimant,
            me,
            timing: self.timing,
            replication: replication::Timing {
                lag: self.replica_lag,
                pause: ISR_PAUSE,
            },
            directory: cluster.directory,
            metrics,
            topics: Topics::default(),
            peers: cluster.peers,
            hosting: cluster.hosting,
            fetching,
        });
        let (ready, mut synced) = watch::channel(false);
        let coordinator = Coordinator::new(context.clone(), ready);
        let coordinator = tokio::spawn(coordinator.run(stop.clone()));
        let follower = Follower(context.clone());
        let replicas = Replicas::new(context.clone(), store);
        tokio::spawn(
            stop.clone()
                .run_until_cancelled_owned(follower.run(replicas)),
        );
        let isr_changes = IsrChanges::new(context.clone());
        tokio::spawn(stop.run_until_cancelled_owned(isr_changes.run()));
        // Fails only if the task ended, since it was stopped.
        let _ = synced.wait_for(|synced| *synced).await;
        Ok(Member {
            broker_id,
            lost: Some(lost),
            context,
            renewal,
            coordinator,
        })
    }

    /// The id on the volume; if it has none, the pod's ordinal, from then on.
    fn broker_id(&self, store: &Store) -> Result<i32, JoinError> {
        let cluster = self.cluster_id();
        let ordinal = || {
            let digits = self.pod.rsplit('-').next();
            let no_ordinal = || JoinError::NoOrdinal {
                pod: self.pod.clone(),
            };
            digits
                .and_then(|digits| digits.parse().ok())
                .ok_or_else(no_ordinal)
        };
        let broker_id = match store.identity() {
            Some(identity) => identity.broker_id,
            None => ordinal()?,
        };
        store.claim(BrokerIdentity { cluster, broker_id })?;
        Ok(broker_id)
    }

    fn owner(&self) -> Option<OwnerReference> {
        Some(OwnerReference {
            api_version: Cluster::api_version(&()).into_owned(),
            kind: Cluster::kind(&()).into_owned(),
            name: self.cluster.clone(),
            uid: self.cluster_uid.clone()?,
            ..OwnerReference::default()
        })
    }
}

impl Member {
    /// Hands over what others can take, before this process stops: it says so in its session, the controller elects other leaders, and
    /// those take it out of the ISR, so that no one waits for it. Until then it serves. Returns when that is done, or has taken too long.
    pub async fn drain(&self) {
        let context = &self.context;
        let own = context.me.replica();
        let stays = |replica: &Replica| *replica != own && !context.peers.get(replica.id).gone;
        let leads = |lease: &PartitionLease| {
            let leader = lease.assignment.leader;
            leader.is_some_and(|leader| leader.id == own.id)
                && lease.assignment.isr.iter().any(stays)
        };
        let in_sync = |lease: &PartitionLease| {
            lease.assignment.isr.contains(&own) && lease.assignment.isr.iter().any(stays)
        };
        context.claimant.draining.store(true, Ordering::Release);
        self.renewal.at_once();
        let begun = Instant::now();
        let mut handed_over = None;
        loop {
            let led = context.topics.count(leads);
            if led == 0 {
                let since: Instant = *handed_over.get_or_insert_with(Instant::now);
                // Some stay: fewer would be in sync than their topics ask for.
                if context.topics.count(in_sync) == 0 || since.elapsed() > LEAVE_ISR {
                    break;
                }
            }
            if begun.elapsed() > DRAIN_LIMIT {
                warn!(
                    partitions = led,
                    "no one took these partitions over: they have no leader until others are elected"
                );
                break;
            }
            tokio::time::sleep(DRAIN_POLL).await;
        }
        info!(took = ?begun.elapsed(), "leaderships are handed over");
    }

    /// To ask whether this process may stop.
    pub fn restart_gate(&self) -> RestartGate {
        RestartGate(self.context.clone())
    }

    /// Gives up the session, last of all.
    pub async fn leave(self) {
        let _ = self.coordinator.await;
        self.renewal.leave().await;
    }
}

/// Says whether the brokers can do without this one.
pub struct RestartGate(Arc<Context>);

impl RestartGate {
    /// The partitions, as `topic/partition`, that can't: they would have fewer replicas in sync than `acks=all` needs.
    pub fn held_by(&self) -> Vec<String> {
        let context = &self.0;
        let own = context.me.replica();
        let gone = |id: i32| context.peers.get(id).gone;
        context
            .topics
            .named(|assignment, min_in_sync| needs(assignment, own, min_in_sync, gone))
    }
}

/// The task that follows topics one by one.
struct Follower(Arc<Context>);

impl Follower {
    async fn run(self, mut replicas: Replicas) {
        let mut to_retry = BTreeSet::new();
        let mut retries = tokio::time::interval(RETRY_PAUSE);
        retries.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let changed = tokio::select! {
                changed = self.0.topics.changed() => changed,
                _ = retries.tick(), if !to_retry.is_empty() => {
                    for topic_id in std::mem::take(&mut to_retry) {
                        self.0.topics.mark(topic_id);
                    }
                    continue;
                }
            };
            for mut wanted in changed {
                let topic_id = wanted.topic_id;
                let leaving = self.is_to_be_deleted(&wanted).await;
                let let_go = replicas.let_go(&wanted);
                let unconfirmed = self.confirm_let_go(&mut wanted, let_go).await;
                let work = move || {
                    let done = match &leaving {
                        Ok(Some(_)) => replicas.delete(topic_id),
                        Ok(None) | Err(_) => replicas.follow(&wanted),
                    };
                    (replicas, done, leaving)
                };
                let (back, done, leaving) = match tokio::task::spawn_blocking(work).await {
                    Ok(result) => result,
                    // The process ends, and with it the threads for such work.
                    Err(error) if error.is_cancelled() => return,
                    Err(error) => {
                        error!(%error, "following the Cluster's topics failed: this broker must be started again");
                        std::process::abort();
                    }
                };
                replicas = back;
                let failed = match (done, leaving) {
                    (Err(error), _) => Some(error.to_string()),
                    (Ok(()), Err(error)) => Some(error.to_string()),
                    (Ok(()), Ok(Some(partitions))) => self.leave(topic_id, partitions).await,
                    (Ok(()), Ok(None)) => unconfirmed.err().map(|error| error.to_string()),
                };
                if let Some(error) = failed {
                    warn!(topic = %topic_id, error, "a topic can't be brought to what it should be; trying again");
                    if to_retry.is_empty() {
                        retries.reset();
                    }
                    to_retry.insert(topic_id);
                }
            }
        }
    }

    /// Takes note of those of the partitions that others still hold in this broker's place, as the API server says. One that has changed meanwhile is looked at
    /// again.
    async fn confirm_let_go(&self, wanted: &mut Wanted, let_go: Vec<i32>) -> Result<(), ApiError> {
        let cluster = &self.0.claimant.cluster;
        let (now, later) = let_go.split_at(let_go.len().min(MAX_LEAVES));
        for index in later {
            // Leaders that change are not kept waiting for all of them.
            self.0.topics.mark_partition((wanted.topic_id, *index));
        }
        let names = now.iter().filter_map(|index| {
            let known = wanted.partitions.get(index)?;
            Some((*index, known.assignment.lease_name(cluster)))
        });
        let reads =
            names.map(|(index, name)| async move { (index, self.0.api.lease(&name).await) });
        for (index, read) in futures::future::join_all(reads).await {
            let Some(lease) = read? else { continue };
            let read = PartitionLease::read(&lease).ok();
            if read.as_ref() == wanted.partitions.get(&index) {
                wanted.let_go.insert(index);
            }
            self.0.topics.apply(lease);
        }
        Ok(())
    }

    /// The partitions of a topic that is being deleted and of which this broker is a replica. Deleting can't be undone, so the API server is
    /// asked, not the cache.
    async fn is_to_be_deleted(&self, wanted: &Wanted) -> Result<Option<BTreeSet<i32>>, ApiError> {
        let is_deleting = |record: &TopicRecord| {
            record.topic_id == wanted.topic_id && record.state == TopicState::Deleting
        };
        let Some(record) = wanted.record.as_ref().filter(|record| is_deleting(record)) else {
            return Ok(None);
        };
        let mine: BTreeSet<i32> = wanted
            .partitions
            .iter()
            .filter(|(_, lease)| lease.assignment.replicas.contains(&self.0.me.id))
            .map(|(index, _)| *index)
            .collect();
        if mine.is_empty() {
            return Ok(None);
        }
        let name = TopicRecord::object_name(&self.0.claimant.cluster, &record.config.name);
        let now = self.0.api.record(&name).await?;
        let confirmed = now
            .and_then(|object| TopicRecord::read(&object).ok())
            .is_some_and(|record| is_deleting(&record));
        Ok(confirmed.then_some(mine))
    }

    /// Tells the operator that this broker has nothing of these partitions any more. What went wrong, if something did.
    async fn leave(&self, topic_id: Uuid, partitions: BTreeSet<i32>) -> Option<String> {
        let leaves = partitions.into_iter().map(|partition| async move {
            let (lease, mut object) = self.0.topics.lease((topic_id, partition))?;
            let next = leave(&lease, self.0.me.id)?;
            next.write(&mut object, &self.0.claimant.cluster);
            let name = object.metadata.name.clone().unwrap_or_default();
            let written = match self.0.api.write(&object).await {
                Err(ApiError::NotFound(_)) => return None,
                Err(ApiError::Conflict(_)) => match self.0.api.lease(&name).await {
                    Ok(Some(current)) => {
                        self.0.topics.apply(current);
                        return Some(format!("{name} was changed meanwhile"));
                    }
                    other => other.map(|_| None),
                },
                other => other.map(Some),
            };
            match written {
                Ok(Some(lease)) => self.0.topics.apply(lease),
                Ok(None) => {}
                Err(error) => return Some(error.to_string()),
            }
            None
        });
        let failures = futures::stream::iter(leaves).buffer_unordered(MAX_LEAVES);
        failures
            .filter_map(std::future::ready)
            .collect::<Vec<_>>()
            .await
            .pop()
    }
}
