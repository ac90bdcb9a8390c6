//! Three nodes of Kafka, each of them broker and controller.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use millrace_e2e::daemon::{Daemon, Usage};
use millrace_e2e::free_port;
use millrace_e2e::wires::{Node, Wires};
use rustix::process::Signal;
use tempfile::TempDir;

use super::{BROKERS, MIN_IN_SYNC, Partition, REPLICAS};
use crate::peer::{Topic, kafka};

pub(crate) struct KafkaTrio {
    pub(super) tools: kafka::Tools,
    pub(super) wires: Wires,
    nodes: Vec<Member>,
    /// Started when it is asked first.
    describer: Option<kafka::Running>,
    // Last: fields drop in this order, and the folder can go only after the processes.
    _folder: TempDir,
}

struct Member {
    dir: PathBuf,
    process: Option<Daemon>,
}

impl KafkaTrio {
    pub(super) async fn start(
        install: &kafka::Install,
        folder: TempDir,
        breakable: bool,
        topics: &[Topic],
    ) -> Result<Self> {
        let wires = Wires::default();
        let address = || SocketAddr::from(([127, 0, 0, 1], free_port()));
        let front = |id, target| {
            if breakable {
                wires.front(Node::Broker(id), target)
            } else {
                target
            }
        };
        let mut nodes = Vec::new();
        let mut voters = Vec::new();
        for id in 0..BROKERS {
            let (broker, controller) = (address(), address());
            voters.push(format!("{id}@{}", front(id, controller)));
            nodes.push(kafka::Node {
                id,
                broker,
                controller,
                advertised: front(id, broker),
                voters: String::new(),
                replicas: REPLICAS,
                min_in_sync: MIN_IN_SYNC,
            });
        }
        let voters = voters.join(",");
        let addresses: Vec<_> = nodes.iter().map(|n| n.advertised.to_string()).collect();
        let mut this = Self {
            tools: kafka::Tools {
                address: addresses.join(","),
                install: install.clone(),
            },
            wires,
            nodes: Vec::new(),
            describer: None,
            _folder: folder,
        };
        for mut node in nodes {
            node.voters.clone_from(&voters);
            let dir = this._folder.path().join(format!("node-{}", node.id));
            fs::create_dir_all(&dir)?;
            install.format(&dir, &node).await?;
            this.nodes.push(Member { dir, process: None });
        }
        this.start_ended()?;
        for node in &mut this.nodes {
            if let Some(process) = &mut node.process {
                kafka::started(process).await?;
            }
        }
        for topic in topics {
            let min = format!("min.insync.replicas={MIN_IN_SYNC}");
            this.tools.create_topic(topic, REPLICAS, &[&min]).await?;
        }
        Ok(this)
    }

    pub(super) fn usage(&self) -> Result<Vec<Usage>> {
        let processes = self.nodes.iter().filter_map(|node| node.process.as_ref());
        processes.map(Daemon::usage).collect()
    }

    pub(super) fn signal(&mut self, id: i32, signal: Signal) -> Result<()> {
        let process = self.node(id)?.process.as_ref();
        process.context("the node does not run")?.signal(signal)
    }

    pub(super) fn kill(&mut self, id: i32) -> Result<()> {
        self.node(id)?.process = None;
        Ok(())
    }

    /// Deletes all that is on the volume of a node that does not run, but for what makes it this node and one of the controllers.
    pub(super) fn wipe(&mut self, id: i32) -> Result<()> {
        const KEPT: [&str; 3] = [
            "meta.properties",
            "bootstrap.checkpoint",
            "__cluster_metadata-0",
        ];
        let node = self.node(id)?;
        ensure!(
            node.process.is_none(),
            "node {id} runs: its volume is in use"
        );
        for entry in fs::read_dir(node.dir.join("data"))? {
            let entry = entry?;
            if KEPT.iter().any(|kept| entry.file_name() == *kept) {
                continue;
            }
            match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(entry.path())?,
                false => fs::remove_file(entry.path())?,
            }
        }
        Ok(())
    }

    pub(super) async fn describe(&mut self, topic: &str) -> Result<Vec<Partition>> {
        let describer = match &mut self.describer {
            Some(describer) => describer,
            none => none.insert(self.tools.start_bench("describe", &[])?),
        };
        let described = describer.ask(topic).await?;
        described.split_whitespace().map(Partition::parse).collect()
    }

    pub(super) fn start_ended(&mut self) -> Result<()> {
        for (id, node) in (0..).zip(&mut self.nodes) {
            let runs = match &mut node.process {
                Some(process) => process.ended()?.is_none(),
                None => false,
            };
            if !runs {
                let process = self.tools.install.run_node(&node.dir)?;
                self.wires
                    .claim(process.pid()?.as_raw_nonzero().get(), Node::Broker(id));
                node.process = Some(process);
            }
        }
        Ok(())
    }

    pub(super) async fn stop(self) -> Result<()> {
        // All at once: the last ones alone would have no quorum to be let go by.
        let processes = self.nodes.into_iter().filter_map(|node| node.process);
        futures::future::try_join_all(processes.map(kafka::stopped)).await?;
        Ok(())
    }

    fn node(&mut self, id: i32) -> Result<&mut Member> {
        let index = usize::try_from(id).ok();
        let node = index.and_then(|index| self.nodes.get_mut(index));
        node.with_context(|| format!("there is no node {id}"))
    }
}

impl Partition {
    /// `LEADER:IN_SYNC`.
    fn parse(text: &str) -> Result<Self> {
        let parsed = text.split_once(':').and_then(|(leader, in_sync)| {
            let leader: i32 = leader.parse().ok()?;
            Some(Self {
                leader: (leader >= 0).then_some(leader),
                in_sync: in_sync.parse().ok()?,
            })
        });
        parsed.with_context(|| format!("KafkaBench described a partition as {text:?}"))
    }
}
