//! What goes wrong with nodes, pods and processes while an app produces: nothing that was acknowledged is lost, nothing comes twice, and the
//! app's requests succeed in the end. Each failure ends before the next one begins, and the partitions must be whole again in between.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use millrace_e2e::repository;

use crate::installed::{Installed, condition, is_ready};
use crate::kubernetes::{Kubernetes, launcher, launcher_path};

/// Lines a second that the app produces.
const RATE: usize = 2000;
/// How long a pause or a cut lasts: longer than a session lives without renewal, and than a replica may lag.
const LONG: Duration = Duration::from_secs(12);
const TOPIC: &str = "events";
const CLUSTER: &str = "apiVersion: millrace.dev/v1alpha1\nkind: Cluster\nmetadata: {name: main}\nspec: {replicas: 3, storage: {size: 1Gi}}\n---\n\
                       apiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata: {name: events}\nspec: {partitions: 6}\n";

struct Failures<'a> {
    installed: Installed<'a>,
    namespace: String,
    bootstrap: String,
}

pub(crate) fn nothing_acknowledged_is_lost(kubernetes: &Kubernetes) {
    if !kubernetes.is_launched() {
        println!("left out: nothing is broken in a Kubernetes that is not this test's own");
        return;
    }
    let (installed, _) = Installed::install(kubernetes);
    let namespace = format!("failures-{}", std::process::id());
    let failures = Failures {
        bootstrap: format!("main-bootstrap.{namespace}.svc:7070"),
        installed,
        namespace,
    };
    failures
        .installed
        .kubectl(&["create", "namespace", &failures.namespace]);
    failures.installed.apply(&failures.namespace, CLUSTER);
    failures.wait("cluster/main", 60);
    failures.wait("topic/events", 60);
    let times = failures.break_things_under_load();
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["failure", "all replicas in sync again after its end"]);
    for (what, took) in times {
        table.add_row([what.to_owned(), format!("{:.1} s", took.as_secs_f64())]);
    }
    println!("{table}");
    let namespace = &failures.namespace;
    let resources = ["topic/events", "cluster/main"];
    failures
        .installed
        .kubectl(&[&["delete", "-n", namespace], &resources[..]].concat());
    failures
        .installed
        .kubectl(&["delete", "namespace", namespace]);
    failures.installed.uninstall();
}

impl Failures<'_> {
    fn wait(&self, object: &str, seconds: u64) {
        self.installed
            .wait(seconds, &self.namespace, object, "Ready", is_ready);
    }

    /// The command line, in the network of the first node: that one is left alone.
    fn millrace(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(launcher_path());
        command
            .args(["in", "1"])
            .arg(repository().join("target/release/millrace"))
            .args(["--bootstrap", &self.bootstrap])
            .args(arguments);
        command
    }

    fn break_things_under_load(&self) -> Vec<(&'static str, Duration)> {
        let mut app = self
            .millrace(&["produce", TOPIC])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = app.stdin.take().unwrap();
        let enough = Arc::new(AtomicBool::new(false));
        let writer = std::thread::spawn({
            let enough = enough.clone();
            move || {
                let begun = Instant::now();
                let mut written = 0;
                while !enough.load(Ordering::Acquire) {
                    let due = begun.elapsed().as_millis() as usize * RATE / 1000;
                    let some: String = (written..due).map(|n| format!("{n}\n")).collect();
                    lines.write_all(some.as_bytes()).unwrap();
                    written = due.max(written);
                    std::thread::sleep(Duration::from_millis(5));
                }
                written
            }
        });
        let times = self.break_things();
        enough.store(true, Ordering::Release);
        let written = writer.join().unwrap();
        let finished = app.wait_with_output().unwrap();
        let log = String::from_utf8_lossy(&finished.stderr);
        assert!(finished.status.success(), "the app failed: {log}");
        let consumed = self.millrace(&["consume", TOPIC]).output().unwrap();
        assert!(consumed.status.success());
        let mut found: BTreeMap<usize, usize> = BTreeMap::new();
        for line in String::from_utf8(consumed.stdout).unwrap().lines() {
            *found.entry(line.parse().unwrap()).or_default() += 1;
        }
        let lost: Vec<usize> = (0..written).filter(|n| !found.contains_key(n)).collect();
        let twice: Vec<_> = found.iter().filter(|(_, times)| **times > 1).collect();
        assert!(
            lost.is_empty(),
            "{} of {written} lost: {lost:?}",
            lost.len()
        );
        assert!(twice.is_empty(), "{} came twice: {twice:?}", twice.len());
        println!("{written} records acknowledged and there once");
        times
    }

    fn break_things(&self) -> Vec<(&'static str, Duration)> {
        let nodes: Vec<String> = (0..3).map(|id| self.node(&pod(id))).collect();
        let index = |node: &str| {
            node.trim_start_matches(|c: char| !c.is_ascii_digit())
                .to_owned()
        };
        // The broker whose node may be broken: the app is on the first one.
        let broken = nodes.iter().position(|node| index(node) != "1").unwrap() as i32;
        let node = index(&nodes[broken as usize]);
        let others: Vec<String> = nodes
            .iter()
            .map(|n| index(n))
            .filter(|n| *n != node)
            .collect();
        let others = others.join(",");
        let namespace = &self.namespace;
        let mut times = Vec::new();
        let mut after = |what: &'static str| {
            let begun = Instant::now();
            self.installed
                .wait(90, namespace, "topic/events", "whole", |topic| {
                    is_ready(topic)
                        && condition(topic, "Degraded").is_some_and(|(s, _, _)| s == "False")
                });
            times.push((what, begun.elapsed()));
        };
        let leader = |partition: usize| {
            let topic = self.installed.get(namespace, "topic/events").unwrap();
            let state = &topic["status"]["partitionStates"][partition];
            pod(i32::try_from(state["leader"].as_i64().unwrap()).unwrap())
        };
        let kill = |pod: &str| self.installed.kubernetes.kill_process("MILLRACE_POD", pod);
        let delete = |pod: &str| {
            let pod = format!("pod/{pod}");
            self.installed.delete_pod(90, namespace, &pod);
        };
        let sleep = std::thread::sleep;

        sleep(Duration::from_secs(2));
        kill(&leader(0));
        sleep(Duration::from_secs(2));
        after("a leader's process killed");
        // Not the last of them: Kubernetes' own controllers have lost their leases then, and take their time.
        launcher(["apiserver", "stop"]).success();
        sleep(LONG);
        launcher(["apiserver", "start"]).success();
        sleep(Duration::from_secs(2));
        after("the API server away for 12 s");
        delete(&leader(1));
        after("a leader's pod deleted");
        launcher(["node", "pause", &node]).success();
        sleep(LONG);
        launcher(["node", "resume", &node]).success();
        sleep(Duration::from_secs(2));
        after("a node stood still for 12 s");
        for (what, from) in [
            (
                "a node cut off from the API server for 12 s",
                Some("control"),
            ),
            (
                "a node cut off from the other brokers for 12 s",
                Some(others.as_str()),
            ),
            ("a node cut off from all for 12 s", None),
        ] {
            let mut cut = vec!["node", "cut", node.as_str()];
            cut.extend(from.into_iter().flat_map(|from| ["--from", from]));
            launcher(cut).success();
            sleep(LONG);
            launcher(["node", "heal", &node]).success();
            sleep(Duration::from_secs(2));
            after(what);
        }
        let claim = format!("pvc/data-{}", pod(broken));
        self.installed
            .kubectl(&["delete", "-n", namespace, &claim, "--wait=false"]);
        delete(&pod(broken));
        after("a broker's pod deleted together with its volume");
        kill(&pod(0));
        kill(&pod(1));
        sleep(Duration::from_secs(2));
        after("two of three brokers' processes killed");
        times
    }

    fn node(&self, pod: &str) -> String {
        let pod = self
            .installed
            .get(&self.namespace, &format!("pod/{pod}"))
            .unwrap();
        pod["spec"]["nodeName"].as_str().unwrap().to_owned()
    }
}

fn pod(id: i32) -> String {
    format!("main-broker-{id}")
}
