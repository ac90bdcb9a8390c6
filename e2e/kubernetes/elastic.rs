//! Brokers and replicas that come and go while an app produces.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use millrace_e2e::kubernetes::{Kubernetes, Pods, cluster_with_topic, condition, is_well};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::load::{begin, end, millrace, under_load};

const TOPIC: &str = "events";
const WITHIN: u64 = 120;

pub(crate) fn brokers_and_replicas_come_and_go(kubernetes: &Kubernetes) {
    // By a label that no node has: where nodes are racks and some have two brokers, those hold less each.
    let no_racks = "replicas: 3, rack: {topologyKey: example.com/rack}";
    let documents = cluster_with_topic(TOPIC).replacen("replicas: 3", no_racks, 1);
    let Some(pods) = begin(kubernetes, "elastic", &documents) else {
        return;
    };
    under_load(&pods, TOPIC, || {
        come_and_go(&pods);
        drain_nodes(&pods);
    });
    sleep_and_wake(&pods);
    end(pods);
}

/// No pods, no condition that calls for anyone, and afterwards all is there again.
fn sleep_and_wake(pods: &Pods<'_>) {
    let (installed, namespace) = (&pods.installed, pods.namespace());
    let count = || {
        let consumed = millrace(pods, &["consume", TOPIC]).output().unwrap();
        assert!(consumed.status.success());
        consumed
            .stdout
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
    };
    let hibernate = |hibernated: bool| {
        pods.patch_spec("cluster/main", &json!({"hibernated": hibernated}));
    };
    let before = count();
    hibernate(true);
    let took = installed.wait(90, namespace, "cluster/main", "asleep", |cluster| {
        let is = |kind, status| {
            condition(cluster, kind).is_some_and(|(s, r, _)| (s, r) == (status, "Hibernated"))
        };
        let pods = cluster.map(|cluster| cluster["status"]["replicas"].clone());
        pods == Some(0.into())
            && is("Ready", "False")
            && is("Degraded", "False")
            && condition(cluster, "Reconciling").is_none()
    });
    println!("asleep after {:.1} s", took.as_secs_f64());
    hibernate(false);
    let took = installed.wait(90, namespace, "cluster/main", "awake", is_well);
    println!("awake after {:.1} s", took.as_secs_f64());
    assert_eq!(count(), before);
}

fn come_and_go(pods: &Pods<'_>) {
    let (installed, namespace) = (&pods.installed, pods.namespace());
    let scale = |brokers: usize| {
        let replicas = format!("--replicas={brokers}");
        installed.kubectl(&["scale", "-n", namespace, "cluster/main", &replicas]);
    };
    let whole = |what: &str, brokers: usize, factor: usize, partitions: usize| {
        let begun = Instant::now();
        let is_done = |cluster: Option<&Value>| {
            is_well(cluster)
                && cluster.is_some_and(|cluster| {
                    let status = &cluster["status"];
                    status["replicas"] == brokers && status["rebalance"].is_null()
                })
        };
        let (cluster, topic) = ("cluster/main", "topic/events");
        installed.wait(WITHIN, namespace, cluster, what, is_done);
        installed.wait(WITHIN, namespace, topic, what, |topic| {
            is_well(topic) && topic.is_some_and(|t| is_spread(t, brokers, factor, partitions))
        });
        println!("{what} after {:.1} s", begun.elapsed().as_secs_f64());
    };

    scale(5);
    whole("spread over five brokers", 5, 3, 6);
    pods.patch_spec("topic/events", &json!({"replicationFactor": 4}));
    whole("four replicas", 5, 4, 6);
    let wider = json!({"replicationFactor": 3, "partitions": 12});
    pods.patch_spec("topic/events", &wider);
    whole("three replicas of twelve partitions", 5, 3, 12);
    scale(3);
    // While partitions move.
    std::thread::sleep(Duration::from_millis(500));
    pods.signal(1, Signal::KILL);
    pods.signal(4, Signal::KILL);
    whole("back on three brokers", 3, 3, 12);
    scale(2);
    let what = "refused";
    installed.wait(30, namespace, "cluster/main", what, |cluster| {
        condition(cluster, "Stalled").is_some_and(|(_, reason, _)| reason == "TooFewBrokers")
    });
    let cluster = installed.get(namespace, "cluster/main").unwrap();
    assert_eq!(cluster["status"]["replicas"], 3, "a broker was removed");
    scale(3);
    whole("as before", 3, 3, 12);
}

/// One node after the other, without waiting for anything but `kubectl drain`.
fn drain_nodes(pods: &Pods<'_>) {
    let (installed, namespace) = (&pods.installed, pods.namespace());
    for node in 1..=3 {
        let begun = Instant::now();
        let node = format!("node-{node}");
        let options = [
            "--ignore-daemonsets",
            "--delete-emptydir-data",
            "--timeout=55s",
        ];
        let drain = [&["drain", &node], &options[..]].concat();
        let drained = installed.kubernetes.kubectl(drain, "");
        installed.kubectl(&["uncordon", &node]);
        drained.success();
        println!(
            "{node} drained after {:.1} s",
            begun.elapsed().as_secs_f64()
        );
    }
    installed.wait(WITHIN, namespace, "cluster/main", "well", is_well);
}

/// Whether so many partitions have so many replicas each, as many on each broker as on the others, give or take one.
fn is_spread(topic: &Value, brokers: usize, factor: usize, partitions: usize) -> bool {
    let Some(states) = topic["status"]["partitionStates"].as_array() else {
        return false;
    };
    let ids = |state: &Value, of: &str| {
        let ids = state[of].as_array().into_iter().flatten();
        ids.filter_map(Value::as_u64).collect::<BTreeSet<_>>()
    };
    let mut counts = vec![0; brokers];
    for state in states {
        let replicas = ids(state, "replicas");
        if replicas.len() != factor || replicas != ids(state, "isr") {
            return false;
        }
        for id in replicas {
            match counts.get_mut(id as usize) {
                Some(count) => *count += 1,
                None => return false,
            }
        }
    }
    let (least, most) = (counts.iter().min(), counts.iter().max());
    states.len() == partitions && most.copied() <= least.map(|least| least + 1)
}
