//! From `helm install` to `helm uninstall`, as a user goes through it, with what goes wrong on the way: one run, and a table of times.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use millrace_e2e::kubernetes::{Installed, Kubernetes, condition, is_ready};
use rustix::process::Signal;
use serde_json::Value;

/// Records that the app produces and consumes.
const RECORDS: usize = 1_000_000;

struct Journey<'a> {
    installed: Installed<'a>,
    namespace: String,
    times: Vec<(&'static str, Duration)>,
}

pub(crate) fn from_install_to_uninstall(kubernetes: &Kubernetes) {
    let (installed, took) = Installed::install(kubernetes);
    let mut journey = Journey {
        installed,
        namespace: format!("journey-{}", std::process::id()),
        times: vec![("helm install until the operator is ready", took)],
    };
    journey.make_a_cluster();
    journey.make_a_topic();
    journey.produce_and_consume();
    let read = journey.consume_in_a_group(&BTreeSet::new());
    journey.grow_while_the_operator_is_killed();
    journey.delete_a_broker_pod();
    journey.lose_the_controller();
    // Brokers came and went meanwhile, and with them the group's coordinator.
    journey.consume_in_a_group(&read);
    journey.repair_what_was_changed_by_hand();
    journey.delete_the_topic();
    journey.delete_the_cluster();
    let namespace = journey.namespace.clone();
    journey
        .installed
        .kubectl(&["delete", "namespace", &namespace]);
    let took = journey.installed.uninstall();
    journey.times.push(("helm uninstall", took));

    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (what, took) in &journey.times {
        table.add_row([(*what).to_owned(), format!("{:.2} s", took.as_secs_f64())]);
    }
    println!("{}", table.trim_fmt());
}

impl Journey<'_> {
    fn kubectl(&self, arguments: &[&str]) -> String {
        let mut all = vec!["-n", &self.namespace];
        all.extend(arguments);
        self.installed.kubectl(&all)
    }

    fn get(&self, object: &str) -> Value {
        let found = self.installed.get(&self.namespace, object);
        found.unwrap_or_else(|| panic!("{object} is not there"))
    }

    fn wait(
        &mut self,
        seconds: u64,
        object: &str,
        what: &str,
        wanted: impl Fn(Option<&Value>) -> bool,
    ) -> Duration {
        self.installed
            .wait(seconds, &self.namespace, object, what, wanted)
    }

    /// What the `millrace` of a broker's image prints, run in the Kubernetes.
    fn millrace(&self, arguments: &[&str]) -> String {
        let bootstrap = format!("main-bootstrap.{}.svc:7070", self.namespace);
        let begun = Instant::now();
        loop {
            let broker = (0..3)
                .map(|id| format!("main-broker-{id}"))
                .find(|pod| {
                    let pod = self.installed.get(&self.namespace, &format!("pod/{pod}"));
                    condition(pod.as_ref(), "Ready").is_some_and(|(status, _, _)| status == "True")
                })
                .unwrap();
            let exec = ["exec", "-n", &self.namespace, &broker, "--", "millrace"];
            let all = [&exec[..], &["--bootstrap", &bootstrap], arguments].concat();
            let finished = self.installed.kubernetes.kubectl(all, "");
            // A pod whose process has just been killed is called ready a little longer.
            let is_away = finished.stderr.contains("container not found");
            if !is_away || begun.elapsed() > Duration::from_secs(30) {
                return finished.success().text();
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// Which of the numbers that were produced are there.
    fn numbers(&self) -> BTreeSet<usize> {
        distinct(&self.millrace(&["consume", "orders"]))
    }

    /// The next thousand of them for the group, which has had `before` of them.
    fn consume_in_a_group(&self, before: &BTreeSet<usize>) -> BTreeSet<usize> {
        let group = ["consume", "orders", "--group", "billing", "-n", "1000"];
        let read = distinct(&self.millrace(&group));
        assert_eq!(read.len(), 1000);
        assert!(read.is_disjoint(before), "the group had read some before");
        let described = self.millrace(&["groups", "describe", "billing", "-o", "json"]);
        let described: Value = serde_json::from_str(&described).unwrap();
        let partitions = described["partitions"].as_array().unwrap().iter();
        let committed: i64 = partitions.filter_map(|p| p["committed"].as_i64()).sum();
        assert_eq!(committed as usize, before.len() + 1000, "{described}");
        read
    }

    fn make_a_cluster(&mut self) {
        self.installed
            .kubectl(&["create", "namespace", &self.namespace]);
        let enforce = "pod-security.kubernetes.io/enforce=restricted";
        self.installed
            .kubectl(&["label", "namespace", &self.namespace, enforce]);
        let cluster = "apiVersion: millrace.dev/v1alpha1\nkind: Cluster\nmetadata: {name: main}\nspec:\n  replicas: 3\n  \
                       storage: {size: 1Gi}\n  config: {retentionInterval: 2s, writeBufferAge: 5s}\n";
        let begun = Instant::now();
        self.installed.apply(&self.namespace, cluster);
        self.wait(60, "cluster/main", "Ready", is_ready);
        self.times
            .push(("Cluster of 3 applied until Ready", begun.elapsed()));
        let cluster = self.get("cluster/main");
        let status = &cluster["status"];
        assert_eq!(status["readyReplicas"], 3);
        assert_eq!(status["replicas"], 3);
        assert_eq!(status["brokers"].as_array().unwrap().len(), 3);
        assert_eq!(
            status["bootstrapAddress"],
            format!("main-bootstrap.{}.svc:7070", self.namespace)
        );
        let nodes: BTreeSet<&str> = status["brokers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|broker| broker["rack"].as_str().unwrap())
            .collect();
        assert_eq!(nodes.len(), 3, "each broker is in a zone of its own");
    }

    fn make_a_topic(&mut self) {
        let topic = "apiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata: {name: orders}\nspec: {partitions: 3, deletionPolicy: Delete}\n";
        let begun = Instant::now();
        self.installed.apply(&self.namespace, topic);
        self.wait(30, "topic/orders", "Ready", is_ready);
        self.times
            .push(("Topic of 3 partitions applied until Ready", begun.elapsed()));
        let topic = self.get("topic/orders");
        assert_eq!(topic["status"]["partitions"], 3);
        assert_eq!(topic["status"]["replicationFactor"], 3);
        assert_eq!(topic["status"]["partitionsOffline"], 0);
        let described = self.kubectl(&["describe", "topic/orders"]);
        for part in ["Ready", "Created", "Leader"] {
            assert!(described.contains(part), "{part} is not in {described}");
        }
    }

    fn produce_and_consume(&mut self) {
        let bootstrap = format!("main-bootstrap.{}.svc:7070", self.namespace);
        let numbers: String = (0..RECORDS).map(|number| format!("{number}\n")).collect();
        let overrides = r#"{"spec": {"securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "app", "image": "IMAGE", "stdin": true, "stdinOnce": true,
                "command": ["millrace", "--bootstrap", "BOOTSTRAP", "produce", "orders"],
                "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "capabilities": {"drop": ["ALL"]}}}]}}"#
            .replace("IMAGE", &self.installed.broker_image)
            .replace("BOOTSTRAP", &bootstrap);
        let overrides = format!("--overrides={overrides}");
        let image = format!("--image={}", self.installed.broker_image);
        let app = [
            "run",
            "app",
            "-n",
            &self.namespace,
            &image,
            "--restart=Never",
            "-i",
            "--quiet",
            &overrides,
        ];
        let begun = Instant::now();
        self.installed.kubernetes.kubectl(app, &numbers).success();
        let produced = begun.elapsed();
        let begun = Instant::now();
        let found = self.numbers();
        self.times
            .push(("an app's pod started, 1,000,000 records produced", produced));
        self.times
            .push(("1,000,000 records consumed and compared", begun.elapsed()));
        assert_eq!(found.len(), RECORDS);
        self.kubectl(&["delete", "pod/app", "--wait=false"]);
    }

    fn grow_while_the_operator_is_killed(&mut self) {
        let begun = Instant::now();
        let patch = r#"{"spec": {"partitions": 12}}"#;
        self.kubectl(&["patch", "topic/orders", "--type=merge", "-p", patch]);
        self.kill_operators();
        self.wait(60, "topic/orders", "Ready with 12 partitions", |topic| {
            is_ready(topic) && topic.is_some_and(|t| t["status"]["partitions"] == 12)
        });
        self.times.push((
            "3 to 12 partitions, all operators killed meanwhile",
            begun.elapsed(),
        ));
        assert_eq!(self.get("topic/orders")["status"]["partitionsOffline"], 0);
        assert_eq!(self.numbers().len(), RECORDS);

        // Twelve are made in a blink. Of these many some are there and some are not when the operators are killed.
        let wide = "apiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata: {name: wide}\nspec: {partitions: 1000, replicationFactor: 1}\n";
        let begun = Instant::now();
        self.installed.apply(&self.namespace, wide);
        let made = || {
            let arguments = ["get", "leases", "-o", "name"];
            self.kubectl(&arguments).lines().count()
        };
        while made() < 100 {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill_operators();
        let then = made();
        assert!(
            then < 1000,
            "all {then} Leases were made before the operators died"
        );
        self.wait(60, "topic/wide", "Ready", |topic| {
            is_ready(topic) && topic.is_some_and(|t| t["status"]["partitionsOffline"] == 0)
        });
        self.times.push((
            "Topic of 1,000 partitions, all operators killed meanwhile",
            begun.elapsed(),
        ));
        let selector = format!("millrace.dev/topic-id={}", self.topic_id("wide"));
        self.kubectl(&[
            "patch",
            "topic/wide",
            "--type=merge",
            "-p",
            r#"{"spec": {"deletionPolicy": "Delete"}}"#,
        ]);
        // The operators that were killed may still have been at work until now, and what none of them has seen none can act on.
        self.wait(
            60,
            "topic/wide",
            "held until its data is deleted",
            |topic| topic.is_some_and(|topic| topic["metadata"]["finalizers"].is_array()),
        );
        self.kubectl(&["delete", "topic/wide", "--timeout=50s"]);
        let begun = Instant::now();
        let left = || self.kubectl(&["get", "leases,configmaps", "-l", &selector, "-o", "name"]);
        while !left().is_empty() {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "left of the Topic: {}",
                left().lines().count()
            );
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn topic_id(&self, topic: &str) -> String {
        let topic = self.get(&format!("topic/{topic}"));
        topic["status"]["topicId"].as_str().unwrap().to_owned()
    }

    fn kill_operators(&self) {
        let operators = &self.installed.namespace;
        self.installed.kubectl(&[
            "delete",
            "pods",
            "-n",
            operators,
            "--all",
            "--force",
            "--grace-period=0",
        ]);
    }

    fn delete_a_broker_pod(&mut self) {
        let controller = self.controller();
        let led = |id: i64| {
            let topic = self.get("topic/orders");
            let states = topic["status"]["partitionStates"].as_array().unwrap();
            states.iter().any(|state| state["leader"] == id)
        };
        let other = (0..3).find(|id| *id != controller && led(*id)).unwrap();
        let pod = format!("pod/main-broker-{other}");
        let begun = Instant::now();
        self.installed.delete_pod(60, &self.namespace, &pod);
        self.wait(30, "topic/orders", "Ready", |topic| {
            is_ready(topic) && topic.is_some_and(|t| t["status"]["partitionsOffline"] == 0)
        });
        let took = begun.elapsed();
        assert_eq!(self.numbers().len(), RECORDS);
        self.times.push((
            "a broker's pod deleted until its partitions are served again",
            took,
        ));
    }

    fn lose_the_controller(&mut self) {
        let controller = self.controller();
        let pod = format!("pod/main-broker-{controller}");
        let taken_over = |old: &str| {
            let old = old.to_owned();
            move |lease: Option<&Value>| {
                let holder = lease.and_then(|l| l["spec"]["holderIdentity"].as_str());
                holder.is_some_and(|holder| holder != old)
            }
        };
        let holder = |lease: &Value| lease["spec"]["holderIdentity"].as_str().unwrap().to_owned();
        let old = holder(&self.get("lease/main-controller"));
        let begun = Instant::now();
        self.kubectl(&["delete", &pod, "--wait=false"]);
        self.wait(30, "lease/main-controller", "another's", taken_over(&old));
        self.times.push((
            "the controller's pod deleted until another is controller",
            begun.elapsed(),
        ));
        self.wait(60, "cluster/main", "Ready", |cluster| {
            is_ready(cluster) && cluster.is_some_and(|c| c["status"]["readyReplicas"] == 3)
        });
        let lease = self.get("lease/main-controller");
        let old = holder(&lease);
        let pod = old.split('/').next().unwrap().to_owned();
        let kubernetes = self.installed.kubernetes;
        if kubernetes.is_launched() {
            assert!(kubernetes.signal_broker(&pod, Signal::KILL));
            let begun = Instant::now();
            self.wait(30, "lease/main-controller", "another's", taken_over(&old));
            self.times.push((
                "the controller's process killed until another is controller",
                begun.elapsed(),
            ));
        }
        self.wait(60, "topic/orders", "Ready", |topic| {
            is_ready(topic) && topic.is_some_and(|t| t["status"]["partitionsOffline"] == 0)
        });
        assert_eq!(self.numbers().len(), RECORDS);
    }

    fn repair_what_was_changed_by_hand(&mut self) {
        let begun = Instant::now();
        self.kubectl(&["delete", "service/main-bootstrap", "pdb/main-broker"]);
        self.wait(20, "service/main-bootstrap", "made again", |o| o.is_some());
        self.wait(20, "pdb/main-broker", "made again", |o| o.is_some());
        self.times.push((
            "a Service deleted by hand until it is there again",
            begun.elapsed(),
        ));
        let id = self.topic_id("orders");
        let lease = format!("lease/main-{id}-0");
        let epoch = |lease: &Value| lease["spec"]["leaseTransitions"].as_i64().unwrap();
        let before = epoch(&self.get(&lease));
        self.kubectl(&["delete", &lease]);
        self.wait(
            20,
            &lease,
            "made again in a higher epoch, with a leader",
            |l| l.is_some_and(|l| epoch(l) > before && l["spec"]["holderIdentity"].is_string()),
        );
        self.wait(20, "topic/orders", "Ready", is_ready);
        assert_eq!(self.numbers().len(), RECORDS);
    }

    fn delete_the_topic(&mut self) {
        let id = self.topic_id("orders");
        // The broker whose process was killed has no figures until it is back.
        self.wait(60, "cluster/main", "Ready", is_ready);
        let before = self.stored_bytes();
        assert!(before > 1 << 20, "{before} bytes stored");
        let begun = Instant::now();
        self.kubectl(&["delete", "topic/orders", "--timeout=50s"]);
        self.times
            .push(("Topic deleted until it is gone", begun.elapsed()));
        let selector = format!("millrace.dev/topic-id={id}");
        let left = self.kubectl(&["get", "leases,configmaps", "-l", &selector, "-o", "name"]);
        assert_eq!(left, "");
        while self.stored_bytes() > before / 20 {
            assert!(
                begun.elapsed() < Duration::from_secs(60),
                "the space of a deleted topic does not come back: {} of {before} bytes are left",
                self.stored_bytes()
            );
            std::thread::sleep(Duration::from_millis(500));
        }
        self.times
            .push(("Topic deleted until its space is back", begun.elapsed()));
    }

    fn delete_the_cluster(&mut self) {
        // Volumes that are retained are of use with their records only, those of the internal topics among them.
        let records = ["get", "configmaps", "-l", "millrace.dev/role=topic", "-o"];
        let id = "jsonpath={.items[*].metadata.labels.millrace\\.dev/topic-id}";
        let internal = self.kubectl(&[&records[..], &[id]].concat());
        let internal: Vec<&str> = internal.split_whitespace().collect();
        assert_eq!(internal.len(), 2, "{internal:?}");
        let others = format!("millrace.dev/topic-id notin ({})", internal.join(","));
        let begun = Instant::now();
        self.kubectl(&["delete", "cluster/main", "--timeout=50s"]);
        loop {
            let kinds = "pods,statefulsets,services,configmaps,serviceaccounts,roles,rolebindings,pdb,networkpolicies,leases";
            let left: Vec<String> = self
                .kubectl(&["get", kinds, "-l", &others, "-o", "name"])
                .lines()
                // What every namespace has.
                .filter(|name| !name.ends_with("/default") && !name.ends_with("/kube-root-ca.crt"))
                .map(str::to_owned)
                .collect();
            if left.is_empty() {
                break;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(100),
                "left of the Cluster: {left:?}"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        self.times.push((
            "Cluster deleted until nothing is left but volumes",
            begun.elapsed(),
        ));
        let claims = self.kubectl(&["get", "pvc", "-o", "name"]);
        assert_eq!(claims.lines().count(), 3, "onDelete: Retain keeps {claims}");
    }

    fn controller(&self) -> i64 {
        let cluster = self.get("cluster/main");
        cluster["status"]["controller"].as_i64().unwrap()
    }

    /// Bytes of all brokers' files.
    fn stored_bytes(&self) -> u64 {
        let total =
            r#"millrace_rocksdb_property{database="log",property="rocksdb.total-sst-files-size"} "#;
        let of = |id: i32| -> u64 {
            let path = format!(
                "/api/v1/namespaces/{}/pods/main-broker-{id}:7071/proxy/metrics",
                self.namespace
            );
            let metrics = self.installed.kubectl(&["get", "--raw", &path]);
            let line = metrics.lines().find_map(|line| line.strip_prefix(total));
            line.unwrap().parse().unwrap()
        };
        (0..3).map(of).sum()
    }
}

/// The numbers of all lines, each of which is there once.
fn distinct(printed: &str) -> BTreeSet<usize> {
    let numbers: Vec<usize> = printed.lines().map(|line| line.parse().unwrap()).collect();
    let distinct: BTreeSet<usize> = numbers.iter().copied().collect();
    assert_eq!(numbers.len(), distinct.len(), "records came twice");
    distinct
}
