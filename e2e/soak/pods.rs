//! Brokers that are pods of a real Kubernetes: the one of this machine (`e2e/cluster`), whose processes and nodes can be broken, or the one that
//! `KUBECONFIG` names, where only pods and volumes can be deleted.
//!
//! Clients must reach brokers by the names of their Services. On this machine they do so from a node of their own, which no broker is on and no
//! fault befalls: the program starts itself there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millrace_e2e::kubernetes::{
    CutFrom, Installed, Kubernetes, Pods, is_ready, launcher, launcher_path,
};
use millrace_e2e::leases::Leases;
use rustix::process::Signal;
use tokio::task::block_in_place;

use crate::copiers::COPY;
use crate::load::TOPIC;
use crate::plan::{Fault, Kind};
use crate::soak::Options;
use crate::target::Target;

/// How long a broker that was killed, or whose pod was deleted, may take to have a process again.
const PROCESS_WITHIN: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(100);

/// Running brokers.
pub(crate) struct PodBrokers<'a> {
    pods: Pods<'a>,
    leases: Leases,
    ids: Vec<i32>,
    folder: PathBuf,
    /// Nodes that a fault has cut off.
    cut: Vec<String>,
    /// The node that no pod may be on.
    cordoned: Option<String>,
}

/// Runs this program once more, with the same arguments, in the network of a node that is there for it alone.
pub(crate) async fn run_on_a_node(options: &Options) -> Result<()> {
    // It ends, with all that runs on it, when this is dropped.
    let _kubernetes = block_in_place(Kubernetes::start);
    let node = node_of_clients(options);
    block_in_place(|| launcher(["up", "--nodes", &node]).success());
    let mut command = tokio::process::Command::new(launcher_path());
    command.args(["in", &node]).arg(std::env::current_exe()?);
    command.args(std::env::args_os().skip(1)).arg("--on-a-node");
    let status = command.kill_on_drop(true).status().await?;
    ensure!(status.success(), "the run on node {node} failed");
    Ok(())
}

/// One more than there are brokers.
fn node_of_clients(options: &Options) -> String {
    (options.brokers + 1).to_string()
}

impl<'a> PodBrokers<'a> {
    /// Installs the operator, and makes a Cluster and the topic.
    pub(crate) async fn start(
        kubernetes: &'a Kubernetes,
        options: &Options,
        folder: &Path,
    ) -> Result<Self> {
        let namespace = format!("soak-{}", std::process::id());
        let cordoned = kubernetes
            .is_launched()
            .then(|| format!("node-{}", node_of_clients(options)));
        let pods = block_in_place(|| {
            let (installed, _) = Installed::install(kubernetes);
            if let Some(node) = &cordoned {
                installed.kubectl(&["cordon", node]);
            }
            let pods = Pods::create(installed, &namespace, &documents(options));
            for object in ["cluster/main", "topic/soak", "topic/soak-copy"] {
                let installed = &pods.installed;
                installed.wait(120, &namespace, object, "Ready", is_ready);
            }
            pods
        });
        let leases = Leases::new(kubernetes.client().await?, &namespace);
        let within = Duration::from_secs(60);
        leases.wait_until_whole(TOPIC, within).await?;
        Ok(Self {
            pods,
            leases,
            ids: (0..options.brokers).collect(),
            folder: folder.to_owned(),
            cut: Vec::new(),
            cordoned,
        })
    }

    /// Mends whatever a run that did not come to its end has left broken.
    pub(crate) fn mend_all(&self) {
        if self.pods.installed.kubernetes.is_launched() {
            let nodes = (self.ids.len() + 1).to_string();
            block_in_place(|| launcher(["up", "--nodes", &nodes]).success());
        }
    }

    /// Removes all of it. What the brokers have logged is kept in the folder.
    pub(crate) fn uninstall(self) -> Result<()> {
        block_in_place(|| {
            self.keep_logs()?;
            self.pods
                .delete_all(&["topic/soak", "topic/soak-copy", "cluster/main"]);
            if let Some(node) = &self.cordoned {
                self.pods.installed.kubectl(&["uncordon", node]);
            }
            self.pods.installed.uninstall();
            Ok(())
        })
    }

    /// Of the process that runs, and of the one before it in the same pod.
    fn keep_logs(&self) -> Result<()> {
        for id in &self.ids {
            let folder = self.folder.join(format!("broker-{id}"));
            fs::create_dir_all(&folder)?;
            let log = |previous: &str| {
                let (pod, namespace) = (Pods::pod(*id), self.pods.namespace());
                let logs = ["logs", "-n", namespace, &pod, previous];
                // There may be none before it.
                let kubernetes = self.pods.installed.kubernetes;
                kubernetes.kubectl(logs, "").stdout
            };
            let both = [log("--previous=true"), log("--previous=false")].concat();
            fs::write(folder.join("log"), both)?;
        }
        Ok(())
    }

    /// Waits until something of a broker can be found: after an earlier fault it may not have a process yet.
    fn await_process<T>(&self, id: i32, look: impl Fn() -> Option<T>) -> Result<T> {
        let begun = Instant::now();
        loop {
            if let Some(found) = look() {
                return Ok(found);
            }
            ensure!(
                begun.elapsed() < PROCESS_WITHIN,
                "broker {id} has no process {PROCESS_WITHIN:?} after the last fault: `kubectl describe pod -n {} {}` says why",
                self.pods.namespace(),
                Pods::pod(id)
            );
            std::thread::sleep(LOOK);
        }
    }

    fn befall(&mut self, id: i32, fault: &Fault) -> Result<()> {
        let pods = &self.pods;
        let signal = |signal| self.await_process(id, || pods.signal(id, signal).then_some(()));
        let filter = |incoming: &str, outgoing: &str| {
            let filtered = || pods.filter(id, incoming, outgoing).then_some(());
            self.await_process(id, filtered)
        };
        let others: Vec<i32> = self
            .ids
            .iter()
            .copied()
            .filter(|other| *other != id)
            .collect();
        let from = match fault.kind {
            Kind::Kill => return signal(Signal::KILL),
            Kind::Pause => return signal(Signal::STOP),
            Kind::Restart => {
                pods.delete(id);
                return Ok(());
            }
            Kind::Wipe => {
                pods.delete_with_volume(id);
                return Ok(());
            }
            Kind::CutOneWay => {
                let addresses: Vec<_> = others.iter().filter_map(|id| pods.address(*id)).collect();
                return filter("", &format!("ip daddr {{ {} }} drop", addresses.join(", ")));
            }
            Kind::Loss => {
                let rule = format!("numgen random mod 100 < {} drop", fault.loss);
                return filter(&rule, &rule);
            }
            Kind::CutApi => CutFrom::ApiServer,
            Kind::CutBrokers => CutFrom::Brokers(&others),
            Kind::CutAll => CutFrom::All,
            Kind::Slow | Kind::FillDisk | Kind::SlowDisk | Kind::ApiServer => return Ok(()),
        };
        let node = self.await_process(id, || pods.node(id))?;
        pods.cut(&node, from);
        self.cut.push(node);
        Ok(())
    }
}

impl Target for PodBrokers<'_> {
    fn can_break(&self, kind: Kind) -> bool {
        match kind {
            Kind::Restart | Kind::Wipe => true,
            // The proxies and the library that these need are not in pods, and volumes are all on the disk of this machine.
            Kind::Slow | Kind::SlowDisk | Kind::FillDisk => false,
            _ => self.pods.installed.kubernetes.is_launched(),
        }
    }

    fn bootstrap(&self) -> String {
        self.pods.bootstrap()
    }

    async fn begin(&mut self, fault: &Fault) -> Result<Vec<String>> {
        block_in_place(|| {
            if fault.kind == Kind::ApiServer {
                launcher(["apiserver", "stop"]).success();
            }
            let mut ids = fault.brokers.iter();
            ids.try_for_each(|id| self.befall(*id, fault))?;
            Ok(Vec::new())
        })
    }

    async fn mend(&mut self, fault: &Fault) -> Result<()> {
        block_in_place(|| {
            for node in self.cut.drain(..) {
                self.pods.heal(&node);
            }
            for id in fault.brokers.iter().copied() {
                match fault.kind {
                    // Kubernetes may have started another process, which does not mind.
                    Kind::Pause => {
                        self.pods.signal(id, Signal::CONT);
                    }
                    Kind::CutOneWay | Kind::Loss => self.pods.unfilter(id),
                    _ => {}
                }
            }
            if fault.kind == Kind::ApiServer {
                launcher(["apiserver", "start"]).success();
            }
        });
        Ok(())
    }

    /// Kubernetes does that.
    async fn restart_ended(&mut self, _off: &[i32]) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn leases(&self) -> &Leases {
        &self.leases
    }

    /// Their volumes are copied while the processes stand still: what is there then is what a killed process leaves.
    async fn end(&mut self) -> Result<Option<Vec<(i32, PathBuf)>>> {
        if !self.pods.installed.kubernetes.is_launched() {
            return Ok(None);
        }
        block_in_place(|| {
            let stopped = |id: &i32| self.pods.signal(*id, Signal::STOP);
            ensure!(self.ids.iter().all(stopped), "a broker has no process");
            let copies = self.ids.iter().map(|id| Ok((*id, self.copy_volume(*id)?)));
            let copies: Result<Vec<_>> = copies.collect();
            // So that they can end in order.
            for id in &self.ids {
                self.pods.signal(*id, Signal::CONT);
            }
            Ok(Some(copies?))
        })
    }
}

impl PodBrokers<'_> {
    fn copy_volume(&self, id: i32) -> Result<PathBuf> {
        let volume = self.pods.volume(id);
        let volume = volume.with_context(|| format!("broker {id} has no volume"))?;
        let folder = self.folder.join(format!("broker-{id}"));
        fs::create_dir_all(&folder)?;
        let copy = folder.join("data");
        let copied = Command::new("cp")
            .arg("-a")
            .args([&volume, &copy])
            .status()?;
        ensure!(copied.success(), "can't copy {}", volume.display());
        Ok(copy)
    }
}

fn documents(options: &Options) -> String {
    let Options {
        brokers,
        partitions,
        replicas,
        min_in_sync,
        durability,
        ..
    } = options;
    // As Kubernetes' own fields write such values.
    let durability = if durability == "os" { "Os" } else { "Fsync" };
    let topic = |name| {
        format!(
            "---\napiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata: {{name: {name}}}\n\
             spec: {{partitions: {partitions}, replicationFactor: {replicas}, minInSyncReplicas: {min_in_sync}}}\n"
        )
    };
    format!(
        "apiVersion: millrace.dev/v1alpha1\nkind: Cluster\nmetadata: {{name: main}}\n\
         spec: {{replicas: {brokers}, durability: {durability}, storage: {{size: 1Gi}}}}\n{}{}",
        topic(TOPIC),
        topic(COPY)
    )
}
