//! What an app is called where it runs: the name of its group unless it has another one, and what makes it a static member of a group without a
//! word. In Kubernetes both are in the pod's name.

use std::{
    collections::{BTreeSet, HashMap},
    env, fs,
    sync::{Arc, LazyLock},
};

use parking_lot::Mutex;

/// Names the app's group.
const GROUP: &str = "MILLRACE_GROUP";
/// The pod's name, where the host's is another one (`hostNetwork`); from the downward API.
const POD: &str = "POD_NAME";
/// What Kubernetes makes the ends of pods' names of.
const SUFFIX: &str = "bcdfghjklmnpqrstvwxz2456789";

/// The instances of this process, by group.
static INSTANCES: LazyLock<Mutex<HashMap<Arc<str>, BTreeSet<usize>>>> =
    LazyLock::new(Mutex::default);

/// A default group name: `MILLRACE_GROUP`, or in Kubernetes the name of the pod's workload, or the program's.
pub(crate) fn group() -> Option<Arc<str>> {
    if let Some(named) = env::var(GROUP).ok().filter(|name| !name.is_empty()) {
        return Some(named.into());
    }
    if let Some(pod) = pod() {
        return Some(workload(&pod).into());
    }
    let exe = env::current_exe().ok()?;
    Some(exe.file_stem()?.to_str()?.into())
}

/// What makes a static member.
#[derive(Debug, Clone)]
pub(crate) enum InstanceId {
    /// The app's word.
    Given(String),
    /// The pod's.
    Own(Arc<Instance>),
}

impl InstanceId {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Given(id) => id,
            Self::Own(instance) => &instance.id,
        }
    }
}

/// A place in a group that this process keeps over its restarts: taken until dropped.
#[derive(Debug)]
pub(crate) struct Instance {
    group: Arc<str>,
    number: usize,
    id: String,
}

impl Instance {
    /// The next one of this process in the group, if the process is a pod of a StatefulSet.
    pub(crate) fn take(group: &Arc<str>) -> Option<Arc<Self>> {
        Self::of(group, &pod()?)
    }

    fn of(group: &Arc<str>, pod: &str) -> Option<Arc<Self>> {
        ordinal(pod)?;
        let mut instances = INSTANCES.lock();
        let taken = instances.entry(group.clone()).or_default();
        let number = (0..).find(|number| !taken.contains(number))?;
        taken.insert(number);
        let id = match number {
            0 => pod.to_owned(),
            _ => format!("{pod}.{number}"),
        };
        let group = group.clone();
        Some(Arc::new(Self { group, number, id }))
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Some(taken) = INSTANCES.lock().get_mut(&self.group) {
            taken.remove(&self.number);
        }
    }
}

/// The pod's name, in Kubernetes.
fn pod() -> Option<String> {
    env::var_os("KUBERNETES_SERVICE_HOST")?;
    let named = env::var(POD).ok().filter(|name| !name.is_empty());
    let host = || fs::read_to_string("/proc/sys/kernel/hostname").ok();
    Some(named.or_else(host)?.trim().to_owned())
}

/// A StatefulSet's pod has its number at the end of its name.
fn ordinal(pod: &str) -> Option<u32> {
    let (_, number) = pod.rsplit_once('-')?;
    // What ends the names of other pods is longer.
    let is_number = (1..=4).contains(&number.len()) && number.bytes().all(|b| b.is_ascii_digit());
    let is_plain = number == "0" || !number.starts_with('0');
    (is_number && is_plain).then(|| number.parse().ok())?
}

/// What the pod belongs to: its name without what was added for each pod.
fn workload(pod: &str) -> &str {
    let random = |part: &str| part.chars().all(|c| SUFFIX.contains(c));
    let Some((rest, last)) = pod.rsplit_once('-') else {
        return pod;
    };
    if ordinal(pod).is_some() {
        return rest;
    }
    if last.len() != 5 || !random(last) {
        return pod;
    }
    match rest.rsplit_once('-') {
        // A Deployment's ReplicaSet has an end of its own.
        Some((name, hash)) if (6..=10).contains(&hash.len()) && random(hash) => name,
        _ => rest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workload_and_the_ordinal_are_in_the_pods_name() {
        for (pod, name, number) in [
            ("billing-0", "billing", Some(0)),
            ("billing-eu-12", "billing-eu", Some(12)),
            ("billing-7d9c8b6f5d-x2x4z", "billing", None),
            ("billing-x2x4z", "billing", None),
            ("billing-99999", "billing", None),
            ("billing", "billing", None),
            ("my-app", "my-app", None),
            ("my-house", "my-house", None),
            ("billing-007", "billing-007", None),
        ] {
            assert_eq!((workload(pod), ordinal(pod)), (name, number), "{pod}");
        }
    }

    #[test]
    fn consumers_of_one_pod_in_one_group_have_names_of_their_own() {
        let (first, other): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        let one = Instance::of(&first, "billing-3").unwrap();
        let two = Instance::of(&first, "billing-3").unwrap();
        let elsewhere = Instance::of(&other, "billing-3").unwrap();
        assert_eq!(
            [&*one.id, &*two.id, &*elsewhere.id],
            ["billing-3", "billing-3.1", "billing-3"]
        );
        drop(one);
        assert_eq!(Instance::of(&first, "billing-3").unwrap().id, "billing-3");
        assert!(Instance::of(&first, "billing-7d9c8b6f5d-x2x4z").is_none());
    }
}
