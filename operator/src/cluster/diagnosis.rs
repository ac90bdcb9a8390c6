//! Why brokers do not come up, and what to do about it: pure, from what Kubernetes says of pods and claims.

use k8s_openapi::api::core::v1::{ContainerStatus, PersistentVolumeClaim, Pod};
use k8s_openapi::api::storage::v1::StorageClass;
use millrace_crds::conditions::Reason;

use crate::problem::Problem;

/// Marks the class that claims get that name none.
const DEFAULT_CLASS: &str = "storageclass.kubernetes.io/is-default-class";

/// What keeps a pod from coming up.
pub(super) fn of_pod(pod: &Pod) -> Option<Problem> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let status = pod.status.as_ref()?;
    let containers = status.container_statuses.iter().flatten();
    let all = status
        .init_container_statuses
        .iter()
        .flatten()
        .chain(containers);
    let stuck = all
        .into_iter()
        .find_map(|container| of_container(name, container));
    if stuck.is_some() {
        return stuck;
    }
    let mut conditions = status.conditions.iter().flatten();
    let scheduled = conditions.find(|c| c.type_ == "PodScheduled" && c.status == "False")?;
    let message = scheduled.message.as_deref().unwrap_or("no reason is given");
    Some(Problem::passing(
        Reason::Unschedulable,
        format!(
            "{name} can't be scheduled: {message}. Add nodes, or ask for less in spec.resources or spec.template"
        ),
    ))
}

fn of_container(pod: &str, container: &ContainerStatus) -> Option<Problem> {
    let waiting = container.state.as_ref()?.waiting.as_ref()?;
    let why = waiting.reason.as_deref().unwrap_or_default();
    let message = waiting.message.as_deref().unwrap_or(why);
    let image = &container.image;
    match why {
        "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
            Some(Problem::stalled(
                Reason::ImagePullFailed,
                format!(
                    "{pod}: the image {image} can't be pulled ({message}). Correct spec.image, or give access to it with spec.imagePullSecrets"
                ),
            ))
        }
        "CrashLoopBackOff" => {
            let last = container.last_state.as_ref();
            let ended = last.and_then(|last| last.terminated.as_ref());
            let ended = ended.map_or_else(String::new, |ended| {
                let said = ended.message.as_deref().map(str::trim).unwrap_or_default();
                format!(
                    " with code {}{}{said}",
                    ended.exit_code,
                    if said.is_empty() { "" } else { ": " }
                )
            });
            Some(Problem::stalled(
                Reason::BrokerCrashing,
                format!(
                    "{pod}: container {} ended {} times, last{ended}. Read `kubectl logs --previous {pod}`",
                    container.name, container.restart_count
                ),
            ))
        }
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
            Some(Problem::stalled(
                Reason::Refused,
                format!(
                    "{pod}: container {} can't be started: {message}. Correct spec.template",
                    container.name
                ),
            ))
        }
        _ => None,
    }
}

/// What keeps a claim from being bound.
pub(super) fn of_claim(
    claim: &PersistentVolumeClaim,
    classes: &[impl AsRef<StorageClass>],
) -> Option<Problem> {
    let pending = claim
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    if pending == Some("Bound") {
        return None;
    }
    let name = claim.metadata.name.as_deref().unwrap_or_default();
    let wanted = claim
        .spec
        .as_ref()
        .and_then(|spec| spec.storage_class_name.as_deref());
    let names = || {
        let names = classes
            .iter()
            .filter_map(|c| c.as_ref().metadata.name.as_deref());
        names.collect::<Vec<_>>().join(", ")
    };
    let found = |wanted: &str| {
        let mut names = classes.iter().map(|c| c.as_ref().metadata.name.as_deref());
        names.any(|name| name == Some(wanted))
    };
    let message = match wanted {
        Some("") => return None,
        Some(wanted) if !found(wanted) => format!(
            "{name}: there is no storage class {wanted} (there are: {}). Make it, or delete this Cluster and make it again with one that \
             exists in spec.storage.className, which can't change",
            names()
        ),
        None if !classes.iter().any(|class| is_default(class.as_ref())) => format!(
            "{name}: spec.storage.className is absent, and no storage class is the default (there are: {}). Mark one as the default",
            names()
        ),
        _ => return None,
    };
    Some(Problem::stalled(Reason::StorageClassNotFound, message))
}

fn is_default(class: &StorageClass) -> bool {
    let annotations = class.metadata.annotations.as_ref();
    annotations
        .and_then(|all| all.get(DEFAULT_CLASS))
        .is_some_and(|value| value == "true")
}

/// What the StatefulSet's controller says of pods or claims that it could not make.
pub(super) fn of_refusal(note: &str) -> Problem {
    if note.contains("exceeded quota") {
        return Problem::stalled(
            Reason::QuotaExceeded,
            format!(
                "a quota of the namespace does not allow another broker: {note}. Raise the quota, or ask for less"
            ),
        );
    }
    Problem::stalled(
        Reason::Refused,
        format!(
            "the API server refuses a broker's pod or volume: {note}. Correct spec.template, or what refuses it"
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;

    fn waiting(reason: &str, message: &str) -> Pod {
        let pod = json!({
            "metadata": {"name": "main-broker-0"},
            "status": {"containerStatuses": [{
                "name": "broker", "image": "nowhere/broker:1", "imageID": "", "ready": false, "restartCount": 4,
                "state": {"waiting": {"reason": reason, "message": message}},
                "lastState": {"terminated": {"exitCode": 1, "message": "can't listen"}},
            }]},
        });
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn a_pod_that_does_not_come_up_says_why_and_what_to_do() {
        for (pod, reason, words) in [
            (waiting("ContainerCreating", ""), None, vec![]),
            (
                waiting("ImagePullBackOff", "not found"),
                Some(Reason::ImagePullFailed),
                vec!["nowhere/broker:1", "not found", "spec.image"],
            ),
            (
                waiting("CrashLoopBackOff", "back-off"),
                Some(Reason::BrokerCrashing),
                vec!["4 times", "with code 1: can't listen", "kubectl logs"],
            ),
            (
                serde_json::from_value(json!({
                    "metadata": {"name": "main-broker-0"},
                    "status": {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes: Insufficient cpu"}]},
                }))
                .unwrap(),
                Some(Reason::Unschedulable),
                vec!["Insufficient cpu", "Add nodes"],
            ),
        ] {
            let found = of_pod(&pod);
            assert_eq!(found.as_ref().map(|problem| problem.reason), reason);
            for word in words {
                let message = &found.as_ref().unwrap().message;
                assert!(message.contains(word), "{message}");
            }
        }
    }

    #[test]
    fn a_claim_whose_class_is_not_there_says_which_are() {
        let class = |name: &str, default: &str| -> Arc<StorageClass> {
            let class = json!({
                "metadata": {"name": name, "annotations": {"storageclass.kubernetes.io/is-default-class": default}},
                "provisioner": "x",
            });
            Arc::new(serde_json::from_value(class).unwrap())
        };
        let claim = |class: Value, phase: &str| -> PersistentVolumeClaim {
            let claim = json!({"metadata": {"name": "data-0"}, "spec": {"storageClassName": class}, "status": {"phase": phase}});
            serde_json::from_value(claim).unwrap()
        };
        let standard = [class("standard", "true")];
        let none = [class("standard", "false")];
        for (claim, classes, found) in [
            (claim(json!("standard"), "Pending"), &standard, false),
            (claim(json!("fast"), "Pending"), &standard, true),
            (claim(json!("fast"), "Bound"), &standard, false),
            (claim(Value::Null, "Pending"), &standard, false),
            (claim(Value::Null, "Pending"), &none, true),
        ] {
            let problem = of_claim(&claim, classes);
            assert_eq!(problem.is_some(), found, "{claim:?}");
            if let Some(problem) = problem {
                assert!(problem.message.contains("standard"), "{}", problem.message);
            }
        }
    }

    #[test]
    fn a_quota_is_told_from_other_refusals() {
        let quota = of_refusal("pods \"main-broker-0\" is forbidden: exceeded quota: small");
        assert_eq!(quota.reason, Reason::QuotaExceeded);
        assert_eq!(of_refusal("spec.x: Invalid value").reason, Reason::Refused);
    }
}
