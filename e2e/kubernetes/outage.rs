//! The API server stops, and the brokers are well: producers and consumers go on without one failed request, and when it is back
//! no partition has been elected away.

use std::process::{Command, Stdio};
use std::time::Duration;

use millrace_e2e::kubernetes::{
    Installed, Kubernetes, cluster_with_topic, is_ready, launcher, launcher_path,
};
use millrace_e2e::repository;
use serde_json::Value;

/// Several times the six seconds after which a session is dead. `MILLRACE_OUTAGE_SECONDS` makes it longer.
const DEFAULT_SECONDS: u64 = 25;
const AROUND: u64 = 10;

pub(crate) fn producers_and_consumers_go_on_without_the_api_server(kubernetes: &Kubernetes) {
    if !kubernetes.is_launched() {
        println!(
            "left out: the API server of a Kubernetes that is not this test's own is not stopped"
        );
        return;
    }
    let seconds = std::env::var("MILLRACE_OUTAGE_SECONDS")
        .map_or(DEFAULT_SECONDS, |seconds| seconds.parse().unwrap());
    let (installed, _) = Installed::install(kubernetes);
    let namespace = format!("outage-{}", std::process::id());
    installed.kubectl(&["create", "namespace", &namespace]);
    installed.apply(&namespace, &documents());
    installed.wait(60, &namespace, "cluster/main", "Ready", is_ready);
    installed.wait(30, &namespace, "topic/steady", "Ready", is_ready);
    wait_for_preferred_leaders(&installed, &namespace);
    let before = epochs(&installed, &namespace);
    // Partitions of the topic and of the internal one, brokers, and the controller.
    assert_eq!(before.len(), 6 + 16 + 3 + 1);

    // In a node's network, where it finds the brokers without asking the API server.
    let bootstrap = format!("main-bootstrap.{namespace}.svc:7070");
    let duration = format!("{}s", seconds + 2 * AROUND);
    let app = Command::new(launcher_path())
        .args(["in", "1"])
        .arg(repository().join("target/release/millrace"))
        .args(["--bootstrap", &bootstrap, "bench", "latency", "steady"])
        .args(["--rate", "2000", "--duration", &duration])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_secs(AROUND));
    launcher(["apiserver", "stop"]).success();
    std::thread::sleep(Duration::from_secs(seconds));
    launcher(["apiserver", "start"]).success();
    let finished = app.wait_with_output().unwrap();
    let (report, log) = (
        String::from_utf8_lossy(&finished.stdout),
        String::from_utf8_lossy(&finished.stderr),
    );
    assert!(finished.status.success(), "{report}\n{log}");
    assert!(!log.contains("WARN"), "a request failed: {log}");

    // All of it comes back, and no one was held for dead for having been unable to say that it lives.
    // Brokers lived on, but Kubernetes takes its time to see that its nodes did, too.
    installed.wait(180, &namespace, "cluster/main", "Ready", is_ready);
    std::thread::sleep(Duration::from_secs(AROUND));
    assert_eq!(epochs(&installed, &namespace), before);
    installed.wait(60, &namespace, "topic/steady", "Ready", is_ready);
    for id in 0..3 {
        let path =
            format!("/api/v1/namespaces/{namespace}/pods/main-broker-{id}:7071/proxy/metrics");
        let metrics = installed.kubectl(&["get", "--raw", &path]);
        let errors: Vec<&str> = metrics
            .lines()
            .filter(|line| line.starts_with("millrace_errors_total") && !line.ends_with(" 0"))
            .collect();
        assert!(
            errors.is_empty(),
            "broker {id} refused requests: {errors:?}"
        );
    }
    println!("API server away for {seconds} s, 2,000 records/s produced and consumed:\n{report}");
    installed.kubectl(&["delete", "-n", &namespace, "topic/steady", "cluster/main"]);
    // Kubernetes' own controllers have lost their leases, and take their time until they look at it again.
    installed.kubectl(&["delete", "namespace", &namespace, "--wait=false"]);
    let itself = format!("namespace/{namespace}");
    installed.wait(180, &namespace, &itself, "gone", |found| found.is_none());
    installed.uninstall();
}

/// This Kubernetes evicts pods 10 s after it has lost sight of a node, so that tests of that are short, and takes nodes for lost when its own controllers
/// come back from the outage before the nodes do. Here pods stay as long as they do by default.
fn documents() -> String {
    let tolerate = |condition: &str| {
        format!(
            "{{key: node.kubernetes.io/{condition}, operator: Exists, effect: NoExecute, tolerationSeconds: 300}}"
        )
    };
    let template = format!(
        "template: {{spec: {{tolerations: [{}, {}]}}}}",
        tolerate("not-ready"),
        tolerate("unreachable")
    );
    cluster_with_topic("steady").replacen("replicas: 3", &format!("replicas: 3, {template}"), 1)
}

/// Those that were elected before all brokers were up move to the preferred leaders once these have settled.
fn wait_for_preferred_leaders(installed: &Installed<'_>, namespace: &str) {
    let is_preferred = |lease: &Value| {
        let document = lease["metadata"]["annotations"]["millrace.dev/partition"].as_str();
        document.is_none_or(|document| {
            let partition: Value = serde_json::from_str(document).unwrap();
            partition["leader"]["id"] == partition["replicas"][0]
        })
    };
    for _ in 0..60 {
        let leases = leases(installed, namespace);
        if leases.len() == 6 + 16 + 3 + 1 && leases.iter().all(is_preferred) {
            return;
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    panic!("partitions are not led by their preferred leaders");
}

/// The epochs of all Leases: of partitions, sessions and the controller.
fn epochs(installed: &Installed<'_>, namespace: &str) -> Vec<(String, i64)> {
    leases(installed, namespace)
        .iter()
        .map(|lease| {
            let name = lease["metadata"]["name"].as_str().unwrap().to_owned();
            (name, lease["spec"]["leaseTransitions"].as_i64().unwrap())
        })
        .collect()
}

fn leases(installed: &Installed<'_>, namespace: &str) -> Vec<Value> {
    let arguments = ["get", "leases", "-n", namespace, "-o", "json"];
    let leases: Value = serde_json::from_str(&installed.kubectl(&arguments)).unwrap();
    leases["items"].as_array().unwrap().clone()
}
