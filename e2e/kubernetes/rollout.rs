//! The brokers' image is changed while an app produces: to one that does not exist, to this version's, and back to the one of the release before.

use std::time::{Duration, Instant};

use millrace_e2e::kubernetes::{Kubernetes, Pods, cluster_with_topic, condition, is_well, uid};
use serde_json::{Value, json};

use crate::load::{begin, end, under_load};

const TOPIC: &str = "events";
/// In which a second broker would have followed the first.
const WATCHED: Duration = Duration::from_secs(15);

pub(crate) fn versions_change_and_a_change_that_does_not_work_stops_at_one_broker(
    kubernetes: &Kubernetes,
) {
    let Some(pods) = begin(kubernetes, "rollout", &cluster_with_topic(TOPIC)) else {
        return;
    };
    let previous = pods.installed.provide_previous();
    if previous.is_none() {
        println!("left out: the release before this one, which e2e/previous builds");
    }
    under_load(&pods, TOPIC, || {
        if let Some(previous) = &previous {
            roll(
                &pods,
                "the release before",
                &json!({"image": previous}),
                false,
            );
        }
        fail(&pods);
        let annotation = json!({"metadata": {"annotations": {"example.com/change": "1"}}});
        let change = json!({"image": null, "template": annotation});
        roll(&pods, "this version", &change, true);
        if let Some(previous) = &previous {
            roll(&pods, "back again", &json!({"image": previous}), false);
        }
    });
    end(pods);
}

/// All brokers restart, one after the other.
fn roll(pods: &Pods<'_>, what: &str, change: &Value, to_this: bool) {
    let before = uids(pods);
    let begun = Instant::now();
    pods.patch_spec("cluster/main", change);
    let is_done = |cluster: Option<&Value>| is_well(cluster) && changed(pods, &before) == 3;
    let cluster = "cluster/main";
    let (installed, namespace) = (&pods.installed, pods.namespace());
    installed.wait(120, namespace, cluster, what, is_done);
    let cluster = installed.get(namespace, cluster).unwrap();
    let version = &cluster["status"]["version"];
    assert_eq!(version == env!("CARGO_PKG_VERSION"), to_this, "{version}");
    println!(
        "{what}, {version}: all restarted after {:.1} s",
        begun.elapsed().as_secs_f64()
    );
}

/// One broker does not come up, and the others are left alone.
fn fail(pods: &Pods<'_>) {
    let (installed, namespace) = (&pods.installed, pods.namespace());
    installed.wait(60, namespace, "cluster/main", "well", is_well);
    let before = uids(pods);
    let nowhere = json!({"image": "nowhere.invalid/none:1"});
    pods.patch_spec("cluster/main", &nowhere);
    let what = "stopped at one broker";
    installed.wait(60, namespace, "cluster/main", what, |cluster| {
        condition(cluster, "Stalled").is_some_and(|(_, reason, _)| reason == "ImagePullFailed")
    });
    let cluster = installed.get(namespace, "cluster/main");
    let (_, _, message) = condition(cluster.as_ref(), "Stalled").unwrap();
    println!("an image that does not exist: {message}");
    std::thread::sleep(WATCHED);
    let changed = changed(pods, &before);
    assert_eq!(changed, 1, "more than one broker was restarted");
}

fn uids(pods: &Pods<'_>) -> Vec<Option<Value>> {
    let pod = |id| {
        let pod = format!("pod/{}", Pods::pod(id));
        uid(pods.installed.get(pods.namespace(), &pod).as_ref())
    };
    (0..3).map(pod).collect()
}

fn changed(pods: &Pods<'_>, before: &[Option<Value>]) -> usize {
    let now = uids(pods);
    let changed = before.iter().zip(&now).filter(|(one, other)| one != other);
    changed.count()
}
