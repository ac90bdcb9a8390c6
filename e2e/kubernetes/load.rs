//! An app that produces while something happens, and what became of its records.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use millrace_e2e::kubernetes::{Installed, Kubernetes, Pods, is_ready, launcher_path};
use millrace_e2e::repository;

const OBJECTS: [&str; 2] = ["cluster/main", "topic/events"];
/// Lines a second that the app produces.
const RATE: usize = 2000;

/// Installs Millrace, and makes a Cluster `main` and a topic `events` of these documents, both ready, in a namespace of this name and process. `None`: this
/// Kubernetes is not the test's own, and nothing may be broken in it.
pub(crate) fn begin<'a>(
    kubernetes: &'a Kubernetes,
    name: &str,
    documents: &str,
) -> Option<Pods<'a>> {
    if !kubernetes.is_launched() {
        println!("left out: nothing is broken in a Kubernetes that is not this test's own");
        return None;
    }
    let (installed, _) = Installed::install(kubernetes);
    let namespace = format!("{name}-{}", std::process::id());
    let pods = Pods::create(installed, &namespace, documents);
    for object in OBJECTS {
        pods.installed
            .wait(60, &namespace, object, "Ready", is_ready);
    }
    Some(pods)
}

/// Removes what [`begin`] has made.
pub(crate) fn end(pods: Pods<'_>) {
    pods.delete_all(&["topic/events", "cluster/main"]);
    pods.installed.uninstall();
}

/// The command line, in the network of the first node: that one is left alone.
pub(crate) fn millrace(pods: &Pods<'_>, arguments: &[&str]) -> Command {
    let mut command = Command::new(launcher_path());
    command
        .args(["in", "1"])
        .arg(repository().join("target/release/millrace"))
        .args(["--bootstrap", &pods.bootstrap()])
        .args(arguments);
    command
}

/// Produces for as long as that takes. Each record must be acknowledged, and be there once.
///
/// # Panics
/// If that is not so.
pub(crate) fn under_load<T>(pods: &Pods<'_>, topic: &str, act: impl FnOnce() -> T) -> T {
    let mut app = millrace(pods, &["produce", topic])
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
    let done = act();
    enough.store(true, Ordering::Release);
    let written = writer.join().unwrap();
    let finished = app.wait_with_output().unwrap();
    let log = String::from_utf8_lossy(&finished.stderr);
    assert!(finished.status.success(), "the app failed: {log}");
    let consumed = millrace(pods, &["consume", topic]).output().unwrap();
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
    done
}
