//! What there is to see when brokers die and do not come back: conditions and Events of the Topic and of its Cluster, from the beginning to the end.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use millrace_e2e::kubernetes::{Installed, Kubernetes, cluster_with_topic, condition, is_well};
use serde_json::Value;

const OBJECTS: [&str; 2] = ["topic/events", "cluster/main"];

pub(crate) fn conditions_and_events_tell_when_it_begins_and_when_it_is_over(
    kubernetes: &Kubernetes,
) {
    if !kubernetes.is_launched() {
        println!("left out: nothing is broken in a Kubernetes that is not this test's own");
        return;
    }
    let (installed, _) = Installed::install(kubernetes);
    let namespace = format!("degraded-{}", std::process::id());
    installed.kubectl(&["create", "namespace", &namespace]);
    installed.apply(&namespace, &cluster_with_topic("events"));
    for object in OBJECTS {
        installed.wait(90, &namespace, object, "well", is_well);
    }
    let begun = [
        events(&installed, &namespace, "Topic"),
        events(&installed, &namespace, "Cluster"),
    ];
    println!("Events until all was well: {begun:?}");

    // Their volumes are here, and here they can't be started.
    let cordon = Cordon::begin(kubernetes);
    for (pod, reason) in [
        ("pod/main-broker-1", "UnderReplicated"),
        ("pod/main-broker-2", "BelowMinIsr"),
    ] {
        let kill = ["delete", pod, "--grace-period=0", "--force"];
        installed.kubectl(&[&kill[..], &["-n", &namespace]].concat());
        for object in OBJECTS {
            let took = installed.wait(30, &namespace, object, reason, |object| {
                condition(object, "Degraded").is_some_and(|(s, r, _)| (s, r) == ("True", reason))
            });
            let found = installed.get(&namespace, object);
            let (_, _, message) = condition(found.as_ref(), "Degraded").unwrap();
            println!("{pod} killed: {object} is {reason} after {took:.1?}: {message}");
        }
    }
    for object in OBJECTS {
        let status = installed.get(&namespace, object).unwrap()["status"].clone();
        // Those of the internal topics must be well, too.
        let internal = 16 * i32::from(object.starts_with("cluster"));
        let below = 6 + internal;
        assert_eq!(status["partitionsBelowMinIsr"], below, "{object}: {status}");
        assert_eq!(status["partitionsOffline"], 0, "{object}: {status}");
    }
    drop(cordon);
    for object in OBJECTS {
        let took = installed.wait(90, &namespace, object, "well again", is_well);
        println!("{object} is well again after {took:.1?}");
    }
    // That a broker is away is told by the Cluster, not by each of its Topics.
    for (kind, told, not_told) in [
        (
            "Topic",
            &["Warning BelowMinIsr", "Normal Recovered"][..],
            &["Warning UnderReplicated"][..],
        ),
        (
            "Cluster",
            &[
                "Warning UnderReplicated",
                "Warning BelowMinIsr",
                "Normal Recovered",
            ],
            &[],
        ),
    ] {
        let begun = Instant::now();
        loop {
            let found = events(&installed, &namespace, kind);
            let has = |event: &&&str| found.contains(**event);
            if told.iter().all(|event| has(&event)) {
                assert!(!not_told.iter().any(|event| has(&event)), "{found:?}");
                println!("Events of the {kind}: {found:?}");
                break;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(10),
                "Events of the {kind}: {found:?}"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    installed.kubectl(&[&["delete", "-n", &namespace], &OBJECTS[..]].concat());
    installed.kubectl(&["delete", "namespace", &namespace]);
    installed.uninstall();
}

/// Type and reason of all Events of the objects of a kind.
fn events(installed: &Installed<'_>, namespace: &str, kind: &str) -> BTreeSet<String> {
    let of_kind = format!("involvedObject.kind={kind}");
    let arguments = [
        "get",
        "events",
        "-n",
        namespace,
        "--field-selector",
        &of_kind,
        "-o",
        "json",
    ];
    let events: Value = serde_json::from_str(&installed.kubectl(&arguments)).unwrap();
    let events = events["items"].as_array().unwrap().iter();
    events
        .map(|event| {
            let text = |field: &str| event[field].as_str().unwrap().to_owned();
            format!("{} {}", text("type"), text("reason"))
        })
        .collect()
}

/// While this is there, no pod is started on any node.
struct Cordon<'a> {
    kubernetes: &'a Kubernetes,
    nodes: Vec<String>,
}

impl<'a> Cordon<'a> {
    fn begin(kubernetes: &'a Kubernetes) -> Self {
        let nodes = kubernetes.kubectl(["get", "nodes", "-o", "name"], "");
        let nodes = nodes.success().text().lines().map(str::to_owned).collect();
        let this = Self { kubernetes, nodes };
        this.run("cordon").success();
        this
    }

    fn run(&self, verb: &str) -> millrace_e2e::Finished {
        let nodes = self.nodes.iter().map(String::as_str);
        let arguments: Vec<&str> = [verb].into_iter().chain(nodes).collect();
        self.kubernetes.kubectl(arguments, "")
    }
}

/// After a failure too: the Kubernetes may be used by others.
impl Drop for Cordon<'_> {
    fn drop(&mut self) {
        self.run("uncordon");
    }
}
