//! The brokers' image is changed to one that does not exist, and then to one that does, while an app produces.

use std::time::{Duration, Instant};

use millrace_e2e::kubernetes::{Kubernetes, Pods, cluster_with_topic, condition, is_well};
use serde_json::Value;

use crate::load::{begin, end, under_load};

const TOPIC: &str = "events";
/// In which a second broker would have followed the first.
const WATCHED: Duration = Duration::from_secs(15);

pub(crate) fn a_change_that_does_not_work_stops_at_one_broker(kubernetes: &Kubernetes) {
    let documents = cluster_with_topic(TOPIC);
    let Some(pods) = begin(kubernetes, "rollout", &documents) else {
        return;
    };
    under_load(&pods, TOPIC, || change(&pods));
    end(pods);
}

fn change(pods: &Pods<'_>) {
    let (installed, namespace) = (&pods.installed, pods.namespace());
    let patch = |spec: &str| {
        let patch = format!("{{\"spec\": {spec}}}");
        let object = ["patch", "-n", namespace, "cluster/main"];
        installed.kubectl(&[&object[..], &["--type", "merge", "-p", &patch]].concat());
    };
    let uids = || (0..3).map(|id| uid(pods, id)).collect::<Vec<_>>();
    let count = |before: &[Option<Value>]| {
        let now = uids();
        let changed = before.iter().zip(&now).filter(|(one, other)| one != other);
        changed.count()
    };
    installed.wait(60, namespace, "cluster/main", "well", is_well);
    let before = uids();
    patch(r#"{"image": "nowhere.invalid/none:1"}"#);
    let what = "stopped at one broker";
    installed.wait(60, namespace, "cluster/main", what, |cluster| {
        condition(cluster, "Stalled").is_some_and(|(_, reason, _)| reason == "ImagePullFailed")
    });
    let cluster = installed.get(namespace, "cluster/main");
    let (_, _, message) = condition(cluster.as_ref(), "Stalled").unwrap();
    println!("an image that does not exist: {message}");
    std::thread::sleep(WATCHED);
    assert_eq!(count(&before), 1, "more than one broker was restarted");
    let begun = Instant::now();
    patch(
        r#"{"image": null, "template": {"metadata": {"annotations": {"example.com/change": "1"}}}}"#,
    );
    installed.wait(
        120,
        namespace,
        "cluster/main",
        "changed and well",
        |cluster| is_well(cluster) && count(&before) == 3,
    );
    println!(
        "another one: all restarted after {:.1} s",
        begun.elapsed().as_secs_f64()
    );
}

fn uid(pods: &Pods<'_>, id: i32) -> Option<Value> {
    let pod = pods
        .installed
        .get(pods.namespace(), &format!("pod/{}", Pods::pod(id)))?;
    Some(pod["metadata"]["uid"].clone())
}
