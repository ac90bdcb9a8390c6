//! What goes wrong with nodes, pods and processes while an app produces: nothing that was acknowledged is lost, nothing comes twice, and the
//! app's requests succeed in the end. Each failure ends before the next one begins, and the partitions must be whole again in between.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use millrace_e2e::kubernetes::{
    CutFrom, Installed, Kubernetes, Pods, cluster_with_topic, is_ready, is_well, launcher,
    launcher_path,
};
use millrace_e2e::repository;
use rustix::process::Signal;

/// Lines a second that the app produces.
const RATE: usize = 2000;
/// How long a pause or a cut lasts: longer than a session lives without renewal, and than a replica may lag.
const LONG: Duration = Duration::from_secs(12);
const TOPIC: &str = "events";

pub(crate) fn nothing_acknowledged_is_lost(kubernetes: &Kubernetes) {
    if !kubernetes.is_launched() {
        println!("left out: nothing is broken in a Kubernetes that is not this test's own");
        return;
    }
    let (installed, _) = Installed::install(kubernetes);
    let namespace = format!("failures-{}", std::process::id());
    let pods = Pods::create(installed, &namespace, &cluster_with_topic(TOPIC));
    for object in ["cluster/main", "topic/events"] {
        let installed = &pods.installed;
        installed.wait(60, &namespace, object, "Ready", is_ready);
    }
    let times = break_things_under_load(&pods);
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["failure", "all replicas in sync again after its end"]);
    for (what, took) in times {
        table.add_row([what.to_owned(), format!("{:.1} s", took.as_secs_f64())]);
    }
    println!("{table}");
    pods.delete_all(&["topic/events", "cluster/main"]);
    pods.installed.uninstall();
}

/// The command line, in the network of the first node: that one is left alone.
fn millrace(pods: &Pods<'_>, arguments: &[&str]) -> Command {
    let mut command = Command::new(launcher_path());
    command
        .args(["in", "1"])
        .arg(repository().join("target/release/millrace"))
        .args(["--bootstrap", &pods.bootstrap()])
        .args(arguments);
    command
}

fn break_things_under_load(pods: &Pods<'_>) -> Vec<(&'static str, Duration)> {
    let mut app = millrace(pods, &["produce", TOPIC])
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
    let times = break_things(pods);
    enough.store(true, Ordering::Release);
    let written = writer.join().unwrap();
    let finished = app.wait_with_output().unwrap();
    let log = String::from_utf8_lossy(&finished.stderr);
    assert!(finished.status.success(), "the app failed: {log}");
    let consumed = millrace(pods, &["consume", TOPIC]).output().unwrap();
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

fn break_things(pods: &Pods<'_>) -> Vec<(&'static str, Duration)> {
    let (installed, namespace) = (&pods.installed, pods.namespace());
    // The broker whose node may be broken: the app is on the first one.
    let node = |id: &i32| pods.node(*id).filter(|node| node != "1");
    let (broken, node) = (0..3).find_map(|id| Some((id, node(&id)?))).unwrap();
    let others: Vec<i32> = (0..3).filter(|id| *id != broken).collect();
    let mut times = Vec::new();
    let mut after = |what: &'static str| {
        let begun = Instant::now();
        installed.wait(90, namespace, "topic/events", "whole", is_well);
        times.push((what, begun.elapsed()));
    };
    let leader = |partition: usize| {
        let topic = installed.get(namespace, "topic/events").unwrap();
        let state = &topic["status"]["partitionStates"][partition];
        i32::try_from(state["leader"].as_i64().unwrap()).unwrap()
    };
    let kill = |id| assert!(pods.signal(id, Signal::KILL), "broker {id} does not run");
    let delete = |id| installed.delete_pod(90, namespace, &format!("pod/{}", Pods::pod(id)));
    let sleep = std::thread::sleep;

    sleep(Duration::from_secs(2));
    kill(leader(0));
    sleep(Duration::from_secs(2));
    after("a leader's process killed");
    // Not the last of them: Kubernetes' own controllers have lost their leases then, and take their time.
    launcher(["apiserver", "stop"]).success();
    sleep(LONG);
    launcher(["apiserver", "start"]).success();
    sleep(Duration::from_secs(2));
    after("the API server away for 12 s");
    delete(leader(1));
    after("a leader's pod deleted");
    launcher(["node", "pause", &node]).success();
    sleep(LONG);
    launcher(["node", "resume", &node]).success();
    sleep(Duration::from_secs(2));
    after("a node stood still for 12 s");
    for (what, from) in [
        (
            "a node cut off from the API server for 12 s",
            CutFrom::ApiServer,
        ),
        (
            "a node cut off from the other brokers for 12 s",
            CutFrom::Brokers(&others),
        ),
        ("a node cut off from all for 12 s", CutFrom::All),
    ] {
        pods.cut(&node, from);
        sleep(LONG);
        pods.heal(&node);
        sleep(Duration::from_secs(2));
        after(what);
    }
    let claim = format!("pvc/data-{}", Pods::pod(broken));
    installed.kubectl(&["delete", "-n", namespace, &claim, "--wait=false"]);
    delete(broken);
    after("a broker's pod deleted together with its volume");
    kill(0);
    kill(1);
    sleep(Duration::from_secs(2));
    after("two of three brokers' processes killed");
    times
}
