//! Millrace as a user installs it: the chart by Helm, into a namespace of its own, from images that were built of this repository's programs.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Kubernetes, launcher};
use crate::{Finished, repository, run};

const BUILT_WITHIN: Duration = Duration::from_secs(300);
/// How often an object is looked at while something is waited for.
const LOOK: Duration = Duration::from_millis(100);

/// An installed operator.
pub struct Installed<'a> {
    /// Where.
    pub kubernetes: &'a Kubernetes,
    /// The operator's.
    pub namespace: String,
    /// What the chart has brokers run.
    pub broker_image: String,
    is_there: bool,
}

/// Builds the images and brings them to the nodes; a Kubernetes that is not started here must have them already, in
/// `MILLRACE_IMAGE_REGISTRY`.
fn provide_images(kubernetes: &Kubernetes) -> String {
    let registry =
        std::env::var("MILLRACE_IMAGE_REGISTRY").unwrap_or_else(|_| "localhost".to_owned());
    if kubernetes.is_launched() {
        let build = repository().join("charts/images/build");
        run(&mut Command::new(build), None, BUILT_WITHIN).success();
        let archive = |name: &str| {
            let path = format!("target/images/millrace-{name}.tar");
            repository().join(path).display().to_string()
        };
        launcher(["load", &archive("broker"), &archive("operator")]).success();
    }
    registry
}

impl<'a> Installed<'a> {
    /// Installs, and returns how long Helm took until the operator was ready.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn install(kubernetes: &'a Kubernetes) -> (Self, Duration) {
        Self::install_chart(kubernetes, &repository().join("charts/millrace"))
    }

    /// The same with another chart.
    ///
    /// # Panics
    /// If it does not become ready.
    pub fn install_chart(kubernetes: &'a Kubernetes, chart: &Path) -> (Self, Duration) {
        let registry = provide_images(kubernetes);
        let namespace = format!("millrace-system-{}", std::process::id());
        let chart = chart.display().to_string();
        let set = format!("image.registry={registry}");
        let broker_image = format!("{registry}/millrace-broker:{}", env!("CARGO_PKG_VERSION"));
        // Before it is installed: what an installation that fails leaves behind goes, too.
        let this = Self {
            kubernetes,
            namespace,
            broker_image,
            is_there: true,
        };
        let begun = Instant::now();
        let arguments = [
            "install",
            "millrace",
            &chart,
            "--namespace",
            &this.namespace,
            "--create-namespace",
            "--set",
            &set,
            // Other tests have applied the CRDs.
            "--take-ownership",
            "--force-conflicts",
            "--wait",
            "--timeout",
            "50s",
        ];
        kubernetes.helm(arguments).success();
        let took = begun.elapsed();
        (this, took)
    }

    /// Brings the image of the release before this one to the nodes, if `e2e/previous` has built its programs. The image's name.
    ///
    /// # Panics
    /// If it can't be built or loaded.
    pub fn provide_previous(&self) -> Option<String> {
        let folder = repository().join("target/previous");
        // Of another one, perhaps, than the script is about.
        let built = std::fs::read_to_string(folder.join("built")).ok()?;
        let script = std::fs::read_to_string(repository().join("e2e/previous")).ok()?;
        if !script.contains(built.trim()) {
            return None;
        }
        let images = folder.join("images");
        let mut build = Command::new(repository().join("charts/images/build"));
        build.arg("broker");
        build.env("CARGO_TARGET_DIR", &folder);
        build.env("MILLRACE_IMAGE_ARCHIVES", &images);
        build.env("MILLRACE_IMAGE_REGISTRY", "localhost");
        build.env("MILLRACE_IMAGE_TAG", "previous");
        run(&mut build, None, BUILT_WITHIN).success();
        let archive = images.join("millrace-broker.tar");
        launcher(["load", &archive.display().to_string()]).success();
        Some("localhost/millrace-broker:previous".to_owned())
    }

    /// Runs `kubectl`, which must succeed, and returns what it prints.
    ///
    /// # Panics
    /// If it fails.
    #[track_caller]
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.kubernetes.kubectl(arguments, "").success().text()
    }

    /// Applies documents.
    ///
    /// # Panics
    /// If one is refused.
    #[track_caller]
    pub fn apply(&self, namespace: &str, documents: &str) {
        let arguments = ["apply", "-n", namespace, "-f", "-"];
        self.kubernetes.kubectl(arguments, documents).success();
    }

    /// An object, if it is there.
    ///
    /// # Panics
    /// If the API server does not answer.
    pub fn get(&self, namespace: &str, object: &str) -> Option<Value> {
        let arguments = [
            "get",
            "-n",
            namespace,
            object,
            "-o",
            "json",
            "--ignore-not-found",
        ];
        let printed = self.kubernetes.kubectl(arguments, "").success().text();
        serde_json::from_str(&printed).ok()
    }

    /// Waits until the object is as wanted, and returns how long that took.
    ///
    /// # Panics
    /// With what it is, if it does not become so.
    #[track_caller]
    pub fn wait(
        &self,
        seconds: u64,
        namespace: &str,
        object: &str,
        what: &str,
        wanted: impl Fn(Option<&Value>) -> bool,
    ) -> Duration {
        let begun = Instant::now();
        loop {
            let found = self.get(namespace, object);
            if wanted(found.as_ref()) {
                return begun.elapsed();
            }
            assert!(
                begun.elapsed() < Duration::from_secs(seconds),
                "{object} is not {what} after {seconds} s: {}",
                serde_json::to_string_pretty(&found).unwrap_or_default()
            );
            std::thread::sleep(LOOK);
        }
    }

    /// Deletes a pod, and waits until its successor is ready.
    ///
    /// # Panics
    /// If it does not become ready.
    #[track_caller]
    pub fn delete_pod(&self, seconds: u64, namespace: &str, pod: &str) {
        let before = uid(self.get(namespace, pod).as_ref());
        self.kubectl(&["delete", "-n", namespace, pod, "--wait=false"]);
        self.wait(seconds, namespace, pod, "made again and ready", |pod| {
            pod.is_some()
                && uid(pod) != before
                && condition(pod, "Ready").is_some_and(|(status, _, _)| status == "True")
        });
    }

    /// Uninstalls, and checks that nothing is left but what the chart says it keeps. Returns how long Helm took.
    ///
    /// # Panics
    /// If something is left.
    pub fn uninstall(mut self) -> Duration {
        let begun = Instant::now();
        self.helm_uninstall().success();
        let took = begun.elapsed();
        let kinds = "clusterroles,clusterrolebindings,flowschemas,prioritylevelconfigurations";
        let named = ["get", kinds, "-o", "name"];
        let left: Vec<String> = self
            .kubectl(&named)
            .lines()
            .filter(|name| name.contains("millrace"))
            .map(str::to_owned)
            .collect();
        assert!(left.is_empty(), "left after helm uninstall: {left:?}");
        let all = "deployments,pods,serviceaccounts,roles,rolebindings,poddisruptionbudgets,services,leases";
        let left: Vec<String> = self
            .kubectl(&["get", all, "-n", &self.namespace, "-o", "name"])
            .lines()
            // The operators' own election Lease outlives the last of them; it goes with the namespace.
            .filter(|name| !name.ends_with("/default") && !name.ends_with("/millrace-operator"))
            .map(str::to_owned)
            .collect();
        let terminating = left.iter().all(|name| name.starts_with("pod/"));
        assert!(
            terminating,
            "left in {} after helm uninstall: {left:?}",
            self.namespace
        );
        self.kubectl(&["delete", "namespace", &self.namespace]);
        took
    }
}

impl Installed<'_> {
    fn helm_uninstall(&mut self) -> Finished {
        self.is_there = false;
        let arguments = ["uninstall", "millrace", "-n", &self.namespace, "--wait"];
        self.kubernetes.helm(arguments)
    }
}

impl Installed<'_> {
    /// Prints what helps to find out why something failed.
    fn show(&self) {
        let print = |arguments: &[&str]| {
            let finished = self.kubernetes.kubectl(arguments, "");
            println!("\n$ kubectl {}\n{}", arguments.join(" "), finished.text());
        };
        let ours = "app.kubernetes.io/name=millrace";
        print(&["get", "pods,endpointslices", "-A", "-o", "wide"]);
        print(&["get", "events", "-A", "--sort-by=.lastTimestamp"]);
        print(&[
            "get",
            "leases",
            "-A",
            "-o",
            "yaml",
            "-l",
            "millrace.dev/role=broker",
        ]);
        let names =
            "jsonpath={range .items[*]}{.metadata.namespace}/{.metadata.name}{\"\\n\"}{end}";
        let pods = self
            .kubernetes
            .kubectl(["get", "pods", "-A", "-l", ours, "-o", names], "");
        for (namespace, pod) in pods.text().lines().filter_map(|line| line.split_once('/')) {
            print(&["logs", "-n", namespace, pod, "--tail=100"]);
        }
    }
}

/// After a failure, so that the next test can install its own.
impl Drop for Installed<'_> {
    fn drop(&mut self) {
        if self.is_there {
            self.show();
            self.helm_uninstall();
        }
    }
}

/// What tells an object from its successor of the same name.
pub fn uid(object: Option<&Value>) -> Option<Value> {
    Some(object?["metadata"]["uid"].clone())
}

/// A condition of an object: its status, reason and message.
pub fn condition<'v>(object: Option<&'v Value>, kind: &str) -> Option<(&'v str, &'v str, &'v str)> {
    let conditions = object?["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|c| c["type"] == kind)?;
    let text = |field: &str| found[field].as_str().unwrap_or_default();
    Some((text("status"), text("reason"), text("message")))
}

/// Whether it is Ready, as of its newest spec.
pub fn is_ready(object: Option<&Value>) -> bool {
    let current =
        |object: &Value| object["status"]["observedGeneration"] == object["metadata"]["generation"];
    condition(object, "Ready").is_some_and(|(status, _, _)| status == "True")
        && object.is_some_and(current)
}

/// Whether it is Ready, and nothing of it is lost, away or behind.
pub fn is_well(object: Option<&Value>) -> bool {
    is_ready(object)
        && condition(object, "Degraded").is_some_and(|(status, _, _)| status == "False")
}

/// The documents of a Cluster `main` of three brokers and of a topic in it with six partitions.
pub fn cluster_with_topic(topic: &str) -> String {
    format!(
        "apiVersion: millrace.dev/v1alpha1\nkind: Cluster\nmetadata: {{name: main}}\nspec: {{replicas: 3, storage: {{size: 1Gi}}}}\n---\n\
         apiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata: {{name: {topic}}}\nspec: {{partitions: 6}}\n"
    )
}
