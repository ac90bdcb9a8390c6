//! The brokers' sessions and who is controller.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::coordination::v1::Lease;
use millrace_crds::coordination::{
    BrokerSession, CLUSTER_LABEL, ControllerState, Held, ROLE_LABEL, Role,
};

use super::ClusterId;

/// A broker as its session says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Broker {
    pub(crate) session: BrokerSession,
    /// Someone holds the session: it did not end in good order.
    pub(crate) held: bool,
    /// The pod of the process that holds it.
    pub(crate) pod_uid: Option<String>,
    pub(crate) epoch: i32,
}

#[derive(Clone, Debug, Default)]
struct Cluster {
    brokers: BTreeMap<i32, Broker>,
    controller: Option<(ControllerState, bool)>,
}

/// The sessions of all Clusters.
#[derive(Default)]
pub(crate) struct Sessions {
    clusters: HashMap<ClusterId, Cluster>,
}

impl Sessions {
    /// Takes in a Lease of a broker or the controller. Answers whose it is if it says something else than before: a mere renewal doesn't.
    pub(crate) fn apply(&mut self, lease: &Lease) -> Option<ClusterId> {
        let labels = lease.metadata.labels.as_ref()?;
        let namespace = lease.metadata.namespace.as_deref().unwrap_or_default();
        let id = ClusterId::new(namespace, labels.get(CLUSTER_LABEL)?);
        let role = labels.get(ROLE_LABEL)?.as_str();
        let cluster = self.clusters.entry(id.clone()).or_default();
        let changed = if role == Role::Broker.as_str() {
            // One that can't be read is none: the broker that wrote it says so itself.
            let (session, held) = BrokerSession::read(lease).ok()?;
            let new = Broker {
                held: is_held(&held),
                pod_uid: pod_uid(&held),
                epoch: held.epoch,
                session,
            };
            let before = cluster.brokers.insert(new.session.broker_id, new.clone());
            before != Some(new)
        } else if role == Role::Controller.as_str() {
            let (state, held) = ControllerState::read(lease).ok()?;
            let new = Some((state, is_held(&held)));
            let changed = cluster.controller != new;
            cluster.controller = new;
            changed
        } else {
            false
        };
        changed.then_some(id)
    }

    /// Takes note that a Lease is gone.
    pub(crate) fn delete(&mut self, namespace: &str, name: &str) -> Option<ClusterId> {
        for (id, cluster) in &mut self.clusters {
            if id.namespace != namespace {
                continue;
            }
            let before = cluster.brokers.len();
            let broker = |broker: &i32| BrokerSession::lease_name(&id.name, *broker) == name;
            cluster.brokers.retain(|id, _| !broker(id));
            let mut changed = cluster.brokers.len() != before;
            if ControllerState::lease_name(&id.name) == name {
                changed |= cluster.controller.take().is_some();
            }
            if changed {
                return Some(id.clone());
            }
        }
        None
    }

    /// The brokers that have ever had a session, by id.
    pub(crate) fn brokers(&self, cluster: &ClusterId) -> BTreeMap<i32, Broker> {
        let cluster = self.clusters.get(cluster);
        cluster
            .map(|cluster| cluster.brokers.clone())
            .unwrap_or_default()
    }

    /// The broker that is controller: the process that took the Lease still has its session.
    pub(crate) fn controller(&self, cluster: &ClusterId) -> Option<i32> {
        let cluster = self.clusters.get(cluster)?;
        let (state, held) = cluster.controller.as_ref()?;
        let broker = cluster.brokers.get(&state.broker_id)?;
        let lives = *held && broker.held && broker.epoch == state.broker_epoch;
        lives.then_some(state.broker_id)
    }
}

fn is_held(held: &Held) -> bool {
    held.holder.is_some()
}

/// A holder is `<pod>/<pod UID>/<random>`.
fn pod_uid(held: &Held) -> Option<String> {
    let uid = held.holder.as_deref()?.split('/').nth(1)?;
    Some(uid.to_owned())
}
