//! The brokers of a Cluster as pods, and what can be done to them: to their processes, the pods themselves, their volumes and their nodes.
//!
//! What touches processes and nodes works where [`Kubernetes::is_launched`](super::Kubernetes::is_launched): it breaks machines of this host.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::{Installed, launcher};
use crate::leases::CLUSTER;
use crate::{Finished, repository, run};

/// The table of packet filter rules.
const FILTER: &str = "millrace-e2e";
const FILTERED_WITHIN: Duration = Duration::from_secs(10);

/// Brokers 0, 1, … of the one Cluster in a namespace.
pub struct Pods<'a> {
    /// What the Cluster was made by.
    pub installed: Installed<'a>,
    namespace: String,
}

/// From whom a node is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CutFrom<'a> {
    /// Its cable is out.
    All,
    /// The control plane's machine.
    ApiServer,
    /// The nodes of these brokers.
    Brokers(&'a [i32]),
}

impl<'a> Pods<'a> {
    /// Makes a namespace, and a Cluster and whatever else these documents hold in it.
    ///
    /// # Panics
    /// If they are refused.
    pub fn create(installed: Installed<'a>, namespace: &str, documents: &str) -> Self {
        installed.kubectl(&["create", "namespace", namespace]);
        installed.apply(namespace, documents);
        Self {
            installed,
            namespace: namespace.to_owned(),
        }
    }

    /// Removes these objects, and the namespace.
    ///
    /// # Panics
    /// If that can't be done.
    pub fn delete_all(&self, objects: &[&str]) {
        let namespace = self.namespace.as_str();
        let delete = ["delete", "-n", namespace];
        self.installed.kubectl(&[&delete, objects].concat());
        self.installed.kubectl(&["delete", "namespace", namespace]);
    }

    /// Merges this into the spec of an object.
    ///
    /// # Panics
    /// If that is refused.
    #[track_caller]
    pub fn patch_spec(&self, object: &str, spec: &Value) {
        let patch = json!({ "spec": spec }).to_string();
        let to = ["patch", "-n", &self.namespace, object];
        let patch = [&to[..], &["--type", "merge", "-p", &patch]].concat();
        self.installed.kubectl(&patch);
    }

    /// Where the brokers are.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Where clients on a node find them.
    pub fn bootstrap(&self) -> String {
        format!("{CLUSTER}-bootstrap.{}.svc:7070", self.namespace)
    }

    /// The pod of a broker.
    pub fn pod(id: i32) -> String {
        format!("{CLUSTER}-broker-{id}")
    }

    /// Sends a signal to a broker's process. False if it has none now.
    ///
    /// # Panics
    /// If the processes of this machine can't be listed.
    pub fn signal(&self, id: i32, signal: Signal) -> bool {
        let kubernetes = self.installed.kubernetes;
        kubernetes.signal_broker(&Self::pod(id), signal)
    }

    /// Asks for a pod's deletion; it is made again.
    ///
    /// # Panics
    /// If that is refused.
    pub fn delete(&self, id: i32) {
        self.kubectl_delete(&format!("pod/{}", Self::pod(id)));
    }

    /// The same, together with its volume.
    ///
    /// # Panics
    /// If that is refused.
    pub fn delete_with_volume(&self, id: i32) {
        self.kubectl_delete(&format!("pvc/data-{}", Self::pod(id)));
        self.delete(id);
    }

    fn kubectl_delete(&self, object: &str) {
        let namespace = self.namespace.as_str();
        let delete = ["delete", "-n", namespace, object, "--wait=false"];
        self.installed.kubectl(&delete);
    }

    /// The number of the node that a broker's pod is on, if it is on one.
    ///
    /// # Panics
    /// If the API server does not answer.
    pub fn node(&self, id: i32) -> Option<String> {
        let pod = format!("pod/{}", Self::pod(id));
        let pod = self.installed.get(&self.namespace, &pod)?;
        let name = pod["spec"]["nodeName"].as_str()?;
        Some(name.trim_start_matches("node-").to_owned())
    }

    /// Drops packets of a broker's pod, in its own network, by these rules of a chain of nftables for what comes in and one for what goes out. False
    /// if it has no process now, so that its network can't be found.
    ///
    /// # Panics
    /// If the rules are refused.
    pub fn filter(&self, id: i32, incoming: &str, outgoing: &str) -> bool {
        let chain = |hook: &str, link: &str, rules: &str| {
            format!(
                "chain {hook} {{\n type filter hook {hook} priority 0\n {link} lo accept\n {rules}\n }}\n"
            )
        };
        let (incoming, outgoing) = (
            chain("input", "iif", incoming),
            chain("output", "oif", outgoing),
        );
        let table = format!("table inet {FILTER} {{\n {incoming} {outgoing} }}\n");
        self.nft(id, &table).map(Finished::success).is_some()
    }

    /// Takes these rules away. They go with the pod, too.
    ///
    /// # Panics
    /// If that does not end.
    pub fn unfilter(&self, id: i32) {
        // A pod that was made anew has none.
        self.nft(id, &format!("delete table inet {FILTER}\n"));
    }

    fn nft(&self, id: i32, commands: &str) -> Option<Finished> {
        let process = self.installed.kubernetes.broker_process(&Self::pod(id))?;
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &process.as_raw_nonzero().to_string()]);
        command.args(["nft", "-f", "-"]);
        let input = Some(commands.as_bytes());
        Some(run(&mut command, input, FILTERED_WITHIN))
    }

    /// The address of a broker's pod, if it has one.
    ///
    /// # Panics
    /// If the API server does not answer.
    pub fn address(&self, id: i32) -> Option<String> {
        let pod = format!("pod/{}", Self::pod(id));
        let pod = self.installed.get(&self.namespace, &pod)?;
        Some(pod["status"]["podIP"].as_str()?.to_owned())
    }

    /// Cuts a node off.
    ///
    /// # Panics
    /// If it can't be.
    pub fn cut(&self, node: &str, from: CutFrom<'_>) {
        let from = match from {
            CutFrom::All => None,
            CutFrom::ApiServer => Some("control".to_owned()),
            CutFrom::Brokers(ids) => {
                let nodes = ids.iter().filter_map(|id| self.node(*id));
                let nodes: Vec<_> = nodes.filter(|other| other != node).collect();
                Some(nodes.join(","))
            }
        };
        let mut cut = vec!["node", "cut", node];
        cut.extend(from.iter().flat_map(|from| ["--from", from]));
        launcher(cut).success();
    }

    /// Mends all cuts of a node.
    ///
    /// # Panics
    /// If that can't be done.
    pub fn heal(&self, node: &str) {
        launcher(["node", "heal", node]).success();
    }

    /// The folder of a broker's volume on this machine, if it has one.
    ///
    /// # Panics
    /// If the API server does not answer.
    pub fn volume(&self, id: i32) -> Option<PathBuf> {
        let claim = format!("pvc/data-{}", Self::pod(id));
        let claim = self.installed.get(&self.namespace, &claim)?;
        let name = claim["spec"]["volumeName"].as_str()?;
        let nodes = repository().join("target/cluster/state/volumes");
        let folders = nodes.read_dir().ok()?.flatten();
        let mut volumes = folders.map(|node| node.path().join(name));
        volumes.find(|folder| folder.is_dir())
    }
}
