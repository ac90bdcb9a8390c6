//! Which broker is restarted next, for a change of its pod: pure.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use millrace_crds::coordination::PartitionAssignment;

use super::brokers::is_ready;

/// A pod of the StatefulSet has the revision in this label.
const REVISION: &str = "controller-revision-hash";

/// What there is to restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Restart {
    /// How many pods are not as they shall be.
    pub(super) outdated: usize,
    /// The pod to delete now, by ordinal: its successor is as it shall be.
    pub(super) next: Option<i32>,
}

/// The brokers that must not stop now, since partitions can spare none of those that are in sync. Of each partition its `min.insync.replicas`.
pub(super) fn needed<'a>(
    partitions: impl Iterator<Item = (&'a PartitionAssignment, usize)>,
) -> BTreeSet<i32> {
    let short = partitions.filter(|(assignment, min_in_sync)| {
        assignment.spares_none(assignment.isr.len(), *min_in_sync)
    });
    let in_sync = short.flat_map(|(assignment, _)| &assignment.isr);
    in_sync.map(|replica| replica.id).collect()
}

/// The pods that are outdated. One that serves is restarted only while all brokers do and it is not needed, the controller last; one that
/// does not serve any more loses nothing, and a new revision may be what mends it.
pub(super) fn restart(
    set: &StatefulSet,
    pods: &BTreeMap<i32, Arc<Pod>>,
    controller: Option<i32>,
    needed: &BTreeSet<i32>,
) -> Restart {
    let none = Restart {
        outdated: 0,
        next: None,
    };
    let Some(status) = &set.status else {
        return none;
    };
    // The revision is not that of the newest spec yet.
    if status.observed_generation < set.metadata.generation {
        return none;
    }
    let wanted = set.spec.replicas.unwrap_or(0);
    let revision = status.update_revision.as_deref();
    let outdated: Vec<(i32, &Arc<Pod>)> = pods
        .iter()
        .filter(|(ordinal, pod)| **ordinal < wanted && revision_of(pod) != revision)
        .map(|(ordinal, pod)| (*ordinal, pod))
        .collect();
    let ready = pods.iter().filter(|(o, pod)| **o < wanted && is_ready(pod));
    let all_ready = i32::try_from(ready.count()) == Ok(wanted);
    let going = |pod: &Pod| pod.metadata.deletion_timestamp.is_some();
    let broken = outdated
        .iter()
        .find(|(_, pod)| !is_ready(pod) && !going(pod));
    let serving = outdated
        .iter()
        .filter(|(ordinal, _)| all_ready && !needed.contains(ordinal))
        .max_by_key(|(ordinal, _)| (Some(*ordinal) != controller, *ordinal));
    Restart {
        outdated: outdated.len(),
        next: broken.or(serving).map(|(ordinal, _)| *ordinal),
    }
}

fn revision_of(pod: &Pod) -> Option<&str> {
    pod.metadata
        .labels
        .as_ref()?
        .get(REVISION)
        .map(String::as_str)
}

#[cfg(test)]
mod tests {
    use millrace_crds::coordination::Replica;
    use serde_json::json;
    use uuid::Uuid;

    use super::*;

    fn set(observed: i64) -> StatefulSet {
        let set = json!({
            "metadata": {"generation": 2},
            "spec": {"replicas": 3, "selector": {}, "template": {}, "serviceName": "x"},
            "status": {"observedGeneration": observed, "updateRevision": "new", "replicas": 3},
        });
        serde_json::from_value(set).unwrap()
    }

    /// A letter for each pod: n(ew), o(ld); upper case: ready; -: none; x: old, being deleted.
    fn pods(text: &str) -> BTreeMap<i32, Arc<Pod>> {
        (0..)
            .zip(text.chars())
            .filter(|(_, letter)| *letter != '-')
            .map(|(ordinal, letter)| {
                let revision = if letter.eq_ignore_ascii_case(&'n') {
                    "new"
                } else {
                    "old"
                };
                let ready = if letter.is_ascii_uppercase() {
                    "True"
                } else {
                    "False"
                };
                let mut pod = json!({
                    "metadata": {"labels": {"controller-revision-hash": revision}},
                    "status": {"conditions": [{"type": "Ready", "status": ready}]},
                });
                if letter == 'x' {
                    pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
                }
                (ordinal, Arc::new(serde_json::from_value(pod).unwrap()))
            })
            .collect()
    }

    #[test]
    fn one_broker_restarts_at_a_time_and_only_while_all_serve() {
        for (there, controller, outdated, next) in [
            ("NNN", Some(0), 0, None),
            ("OOO", Some(0), 3, Some(2)),
            ("OOO", Some(2), 3, Some(1)),
            ("OON", Some(0), 2, Some(1)),
            ("OOn", Some(0), 2, None),
            ("OO-", Some(0), 2, None),
            ("ONN", Some(0), 1, Some(0)),
            // Two that serve, and one that an older revision keeps from it.
            ("OOo", Some(0), 3, Some(2)),
            ("OOx", Some(0), 3, None),
            ("ooo", None, 3, Some(0)),
        ] {
            let found = restart(&set(2), &pods(there), controller, &BTreeSet::new());
            assert_eq!(found, Restart { outdated, next }, "{there}");
        }
    }

    #[test]
    fn nothing_restarts_for_a_spec_that_is_not_taken_in_yet() {
        let found = restart(&set(1), &pods("OOO"), None, &BTreeSet::new());
        assert_eq!(found.next, None);
    }

    #[test]
    fn a_broker_without_which_acks_all_would_be_refused_is_left_alone() {
        // Replicas, those of them in sync, the least that must be, and who is needed then.
        for (replicas, isr, min_in_sync, expected) in [
            (&[0, 1, 2][..], &[0, 1, 2][..], 2, &[][..]),
            (&[0, 1, 2], &[0, 2], 2, &[0, 2]),
            (&[0, 1, 2], &[0, 2], 1, &[]),
            (&[0, 1, 2], &[0], 1, &[0]),
            (&[0, 1], &[0, 1], 2, &[]),
            (&[0], &[0], 1, &[]),
        ] {
            let mut assignment = PartitionAssignment::new(Uuid::nil(), 0, replicas.to_vec());
            let in_sync = |id: &i32| Replica {
                id: *id,
                store: Uuid::nil(),
            };
            assignment.isr = isr.iter().map(in_sync).collect();
            let found = needed([(&assignment, min_in_sync)].into_iter());
            assert_eq!(Vec::from_iter(found), expected, "{isr:?} of {replicas:?}");
        }
        let needed = BTreeSet::from([1, 2]);
        assert_eq!(
            restart(&set(2), &pods("OOO"), Some(1), &needed).next,
            Some(0)
        );
        assert_eq!(restart(&set(2), &pods("NOO"), Some(1), &needed).next, None);
        // It does not serve anyway.
        assert_eq!(
            restart(&set(2), &pods("NOo"), Some(1), &needed).next,
            Some(2)
        );
    }
}
