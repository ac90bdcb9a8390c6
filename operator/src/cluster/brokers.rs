//! Which brokers a Cluster has: pods, sessions and volumes seen together. A broker's id is on its volume; where there is no session yet, it is the ordinal
//! that a broker with an empty volume proposes.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodCondition};
use millrace_crds::cluster::status::{BrokerPhase, BrokerState};
use millrace_crds::cluster::template::BROKER_CONTAINER;
use millrace_crds::coordination::Racks;

use super::objects::broker_name;
use crate::alive::Alive;
use crate::index::Broker;
use crate::placement::Candidate;

/// The brokers of a Cluster as seen.
pub(crate) struct Brokers {
    pub(crate) cluster: String,
    pub(crate) sessions: BTreeMap<i32, Broker>,
    pub(crate) pods: BTreeMap<i32, Arc<Pod>>,
    /// The racks of pods that are on a node.
    pub(crate) racks: BTreeMap<i32, String>,
}

impl Brokers {
    pub(crate) fn pod_name(&self, ordinal: i32) -> String {
        format!("{}-{ordinal}", broker_name(&self.cluster))
    }

    pub(crate) fn claim_name(&self, ordinal: i32) -> String {
        format!("data-{}", self.pod_name(ordinal))
    }

    /// The number in a pod's name.
    pub(crate) fn ordinal(&self, pod: &str) -> Option<i32> {
        let number = pod.strip_prefix(&broker_name(&self.cluster))?;
        number.strip_prefix('-')?.parse().ok()
    }

    /// The sessions that name the pod.
    fn sessions_of(&self, ordinal: i32) -> impl Iterator<Item = (&i32, &Broker)> {
        let pod = self.pod_name(ordinal);
        let sessions = self.sessions.iter();
        sessions.filter(move |(_, broker)| broker.session.pod == pod)
    }

    /// The broker of a pod; none if the id that it would propose is another pod's.
    fn id(&self, ordinal: i32) -> Option<i32> {
        // A volume that was replaced leaves the session of the broker that was on it.
        let mine = self.sessions_of(ordinal);
        match mine.max_by_key(|(_, broker)| (broker.held, broker.epoch)) {
            Some((id, _)) => Some(*id),
            None => (!self.sessions.contains_key(&ordinal)).then_some(ordinal),
        }
    }

    /// The broker of a pod, if one session and no other tells.
    pub(super) fn known_id(&self, ordinal: i32) -> Option<i32> {
        let mut mine = self.sessions_of(ordinal);
        let (id, _) = mine.next()?;
        mine.next().is_none().then_some(*id)
    }

    /// The pod of a broker, by its ordinal.
    pub(super) fn ordinal_of(&self, id: i32) -> i32 {
        let pod = self.sessions.get(&id).map(|broker| &broker.session.pod);
        pod.and_then(|pod| self.ordinal(pod)).unwrap_or(id)
    }

    /// The brokers that may be given replicas, of so many pods.
    pub(crate) fn candidates(&self, replicas: i32) -> Vec<Candidate> {
        (0..replicas)
            .filter_map(|ordinal| {
                let rack = self.racks.get(&ordinal).cloned();
                self.id(ordinal).map(|id| Candidate { id, rack })
            })
            .collect()
    }

    /// The racks, by broker.
    pub(crate) fn racks(&self) -> Racks {
        let known = self.racks.iter();
        let racks = known.filter_map(|(ordinal, rack)| Some((self.id(*ordinal)?, rack.clone())));
        Racks {
            racks: racks.collect(),
        }
    }

    /// How many pods there must be for those brokers, which hold replicas, to be among them.
    pub(crate) fn pods_for(&self, holding: impl Iterator<Item = i32>) -> i32 {
        let ordinals = holding.map(|id| self.ordinal_of(id) + 1);
        ordinals.max().unwrap_or(0)
    }

    /// What they do, of so many pods.
    pub(crate) fn states(&self, replicas: i32) -> Vec<BrokerState> {
        (0..replicas)
            .filter_map(|ordinal| self.state(ordinal, self.id(ordinal)?))
            .collect()
    }

    fn state(&self, ordinal: i32, id: i32) -> Option<BrokerState> {
        let pod = self.pods.get(&ordinal);
        let broker = self.sessions.get(&id);
        let state = match (pod, broker) {
            (Some(_), Some(broker)) if broker.held && broker.session.draining => {
                BrokerPhase::Draining
            }
            (Some(pod), _) if is_ready(pod) => BrokerPhase::Serving,
            (Some(_), _) => BrokerPhase::Starting,
            (None, _) => BrokerPhase::Down,
        };
        Some(BrokerState {
            id,
            store_id: broker.map(|broker| broker.session.store_id.to_string()),
            claim_name: Some(self.claim_name(ordinal)),
            pod_name: Some(self.pod_name(ordinal)),
            rack: self.racks.get(&ordinal).cloned(),
            state,
            volume: None,
        })
    }

    /// Those that serve. One whose process has died is not alive, although it still has its session.
    pub(crate) fn alive(&self) -> Alive {
        let alive = self.pods.iter().filter_map(|(ordinal, pod)| {
            let id = self.id(*ordinal)?;
            let broker = self.sessions.get(&id)?;
            let lives = broker.held && (passes_probe(pod) || is_first_process(pod, broker));
            lives.then_some((id, broker.session.store_id))
        });
        Alive(alive.collect())
    }

    /// The lowest release that a broker runs.
    pub(crate) fn version(&self) -> Option<String> {
        let held = self.sessions.values().filter(|broker| broker.held);
        held.map(|broker| &broker.session.release)
            .min_by_key(|release| numbers(release))
            .cloned()
    }
}

/// A release's numbers, which order it.
fn numbers(release: &str) -> Vec<u64> {
    let parts = release.split(|c: char| !c.is_ascii_digit());
    parts.filter_map(|part| part.parse().ok()).collect()
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none() && passes_probe(pod)
}

/// Whether it serves: one that is asked to end goes on until it has handed over.
fn passes_probe(pod: &Pod) -> bool {
    readiness(pod).is_some_and(|ready| ready.status == "True")
}

fn readiness(pod: &Pod) -> Option<&PodCondition> {
    let mut conditions = pod.status.as_ref()?.conditions.iter().flatten();
    conditions.find(|condition| condition.type_ == "Ready")
}

/// Whether the session is of the pod's only process so far, which has not been probed yet. It may lead for seconds before it is.
fn is_first_process(pod: &Pod, broker: &Broker) -> bool {
    if broker.pod_uid != pod.metadata.uid {
        return false;
    }
    let statuses = pod.status.as_ref().map(|status| &status.container_statuses);
    let mut containers = statuses.into_iter().flatten().flatten();
    let container = containers.find(|container| container.name == BROKER_CONTAINER);
    // The session may be known before the start of the process that holds it.
    let Some(state) = container.and_then(|container| container.state.as_ref()) else {
        return true;
    };
    let since = readiness(pod).and_then(|ready| ready.last_transition_time.as_ref());
    let running = state.running.as_ref();
    let ceased_to_be_ready = match (
        since,
        running.and_then(|running| running.started_at.as_ref()),
    ) {
        (Some(since), Some(started)) => since.0 > started.0,
        _ => false,
    };
    let restarts = container.map_or(0, |container| container.restart_count);
    restarts == 0 && state.terminated.is_none() && !ceased_to_be_ready
}

#[cfg(test)]
mod tests {
    use millrace_crds::coordination::BrokerSession;
    use serde_json::json;
    use uuid::Uuid;

    use super::*;

    fn brokers(sessions: &[(i32, &str, &str)]) -> Brokers {
        let session = |(id, pod, release): &(i32, &str, &str)| {
            let session = BrokerSession {
                broker_id: *id,
                store_id: Uuid::nil(),
                pod: (*pod).to_owned(),
                address: String::new(),
                release: (*release).to_owned(),
                draining: false,
            };
            let broker = Broker {
                session,
                held: true,
                pod_uid: Some(format!("{pod}-uid")),
                epoch: 1,
            };
            (*id, broker)
        };
        Brokers {
            cluster: "main".into(),
            sessions: sessions.iter().map(session).collect(),
            pods: BTreeMap::new(),
            racks: BTreeMap::from([(1, "b".to_owned())]),
        }
    }

    #[test]
    fn a_broker_is_who_its_volume_says() {
        let ids = |brokers: &Brokers| {
            let candidates = brokers.candidates(3);
            candidates.iter().map(|c| c.id).collect::<Vec<_>>()
        };
        assert_eq!(ids(&brokers(&[])), [0, 1, 2]);
        assert_eq!(ids(&brokers(&[(1, "main-broker-1", "0.1.0")])), [0, 1, 2]);
        // The volumes of two brokers were swapped.
        let swapped = [(1, "main-broker-0", "0.1.0"), (0, "main-broker-1", "0.1.0")];
        assert_eq!(ids(&brokers(&swapped)), [1, 0, 2]);
        // Broker 2's volume is in pod 0: pod 2 has none that it could propose.
        assert_eq!(ids(&brokers(&[(2, "main-broker-0", "0.1.0")])), [2, 1]);
    }

    #[test]
    fn a_broker_is_alive_if_its_pod_is_ready_or_its_first_process_has_the_session() {
        // The session's process is of pod `main-broker-0-uid`; its container was started at second 5.
        let running = json!({"running": {"startedAt": "2026-01-01T00:00:05Z"}});
        let crashed = json!({"waiting": {"reason": "CrashLoopBackOff"}});
        let made = json!({"waiting": {"reason": "ContainerCreating"}});
        let ended = json!({"terminated": {"exitCode": 137}});
        for (case, uid, ready, since, restarts, state, held, alive) in [
            (
                "serves",
                "main-broker-0-uid",
                "True",
                8,
                0,
                &running,
                true,
                true,
            ),
            (
                "ended in good order",
                "main-broker-0-uid",
                "True",
                8,
                0,
                &running,
                false,
                false,
            ),
            (
                "not probed yet",
                "main-broker-0-uid",
                "False",
                4,
                0,
                &running,
                true,
                true,
            ),
            (
                "not probed yet, the session is its predecessor's",
                "new",
                "False",
                4,
                0,
                &running,
                true,
                false,
            ),
            (
                "ceased to be ready",
                "main-broker-0-uid",
                "False",
                20,
                0,
                &running,
                true,
                false,
            ),
            (
                "started, says its session",
                "main-broker-0-uid",
                "False",
                4,
                0,
                &made,
                true,
                true,
            ),
            (
                "its first process died",
                "main-broker-0-uid",
                "False",
                20,
                0,
                &ended,
                true,
                false,
            ),
            (
                "crashed",
                "main-broker-0-uid",
                "False",
                20,
                1,
                &crashed,
                true,
                false,
            ),
            (
                "a later process",
                "main-broker-0-uid",
                "False",
                4,
                1,
                &running,
                true,
                false,
            ),
            (
                "a later process, ready",
                "main-broker-0-uid",
                "True",
                8,
                1,
                &running,
                true,
                true,
            ),
        ] {
            let pod = json!({
                "metadata": {"uid": uid},
                "status": {
                    "conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": format!("2026-01-01T00:00:{since:02}Z")}],
                    "containerStatuses": [{
                        "name": "broker", "image": "", "imageID": "", "ready": false, "restartCount": restarts, "state": state,
                    }],
                },
            });
            let mut brokers = brokers(&[(7, "main-broker-0", "0.1.0")]);
            brokers.sessions.get_mut(&7).unwrap().held = held;
            brokers
                .pods
                .insert(0, Arc::new(serde_json::from_value(pod).unwrap()));
            let expected = alive.then_some((7, Uuid::nil()));
            assert_eq!(
                brokers.alive(),
                Alive(expected.into_iter().collect()),
                "{case}"
            );
            brokers.pods.clear();
            assert_eq!(
                brokers.alive(),
                Alive::default(),
                "{case}, and its pod is gone"
            );
        }
    }

    #[test]
    fn as_many_pods_stay_as_the_highest_broker_with_a_replica_needs() {
        for (sessions, holding, expected) in [
            (&[][..], &[][..], 0),
            (&[], &[0, 2], 3),
            (&[(7, "main-broker-1", "0.1.0")], &[0, 7], 2),
        ] {
            let found = brokers(sessions).pods_for(holding.iter().copied());
            assert_eq!(found, expected, "{holding:?}");
        }
    }

    #[test]
    fn the_version_is_the_lowest_that_runs() {
        let releases = [
            (0, "main-broker-0", "0.10.0"),
            (1, "main-broker-1", "0.9.1"),
        ];
        assert_eq!(brokers(&releases).version().as_deref(), Some("0.9.1"));
        assert_eq!(brokers(&[]).version(), None);
    }
}
