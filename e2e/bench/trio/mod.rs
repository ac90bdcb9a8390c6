//! Three brokers of either kind behind one face: start, break, mend, and what they say of a topic.
//!
//! Brokers are numbered from 0. If they are to be breakable, they reach each other, and clients them, through `wires`.

mod kafka;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millrace_e2e::daemon::Usage;
use millrace_e2e::fleet::{Fleet, FleetSetup, NewTopic};
use millrace_e2e::wires::{Node, Wires};
use tempfile::TempDir;
use tokio::time::sleep;

use crate::peer::{Peer, Peers, Target, Topic, millrace};
use kafka::KafkaTrio;

/// How many brokers there are, and copies of each partition.
pub(crate) const BROKERS: i32 = 3;
pub(crate) const REPLICAS: usize = 3;
/// How many copies `acks=all` waits for at least.
pub(crate) const MIN_IN_SYNC: usize = 2;

/// Three running brokers.
pub(crate) enum Trio {
    Millrace {
        // Before the folder: fields drop in this order.
        fleet: Box<Fleet>,
        _folder: TempDir,
    },
    Kafka(Box<KafkaTrio>),
}

/// A partition as brokers describe it.
pub(crate) struct Partition {
    pub(crate) leader: Option<i32>,
    /// How many replicas are in sync.
    pub(crate) in_sync: usize,
}

impl Peers {
    /// Starts three brokers on empty folders, with topics that all of them hold.
    pub(crate) async fn start_three(
        &self,
        peer: Peer,
        breakable: bool,
        topics: &[Topic],
    ) -> Result<Trio> {
        let folder = tempfile::Builder::new()
            .prefix("trio-")
            .tempdir_in(&self.work)?;
        match peer {
            Peer::Millrace => {
                let install = self.millrace.as_ref();
                let install = install.context("Millrace is not among the peers")?;
                let setup = FleetSetup {
                    program: install.program.clone(),
                    folder: folder.path().to_owned(),
                    brokers: BROKERS,
                    args: install.args.clone(),
                    breakable,
                    volume_bytes: None,
                    slow_disks: false,
                };
                let fleet = Box::new(Fleet::start(setup).await?);
                for topic in topics {
                    let topic = NewTopic {
                        name: &topic.name,
                        partitions: i32::try_from(topic.partitions)?,
                        replicas: REPLICAS,
                        min_in_sync: MIN_IN_SYNC,
                    };
                    fleet.create_topic(topic).await?;
                }
                Ok(Trio::Millrace {
                    fleet,
                    _folder: folder,
                })
            }
            Peer::Kafka => {
                let install = self.kafka.as_ref();
                let install = install.context("Kafka is not among the peers")?;
                let kafka = KafkaTrio::start(install, folder, breakable, topics).await?;
                Ok(Trio::Kafka(Box::new(kafka)))
            }
        }
    }
}

impl Trio {
    /// For clients.
    pub(crate) fn target(&self) -> Target {
        match self {
            Self::Millrace { fleet, .. } => {
                Target::Millrace(millrace::Bootstrap(fleet.bootstrap()))
            }
            Self::Kafka(kafka) => Target::Kafka(kafka.tools.clone()),
        }
    }

    /// What each broker has used.
    pub(crate) fn usage(&mut self) -> Result<Vec<Usage>> {
        match self {
            Self::Millrace { fleet, .. } => fleet.brokers().iter_mut().map(|b| b.usage()).collect(),
            Self::Kafka(kafka) => kafka.usage(),
        }
    }

    /// The partitions of a topic, by index.
    pub(crate) async fn describe(&mut self, topic: &str) -> Result<Vec<Partition>> {
        match self {
            Self::Millrace { fleet, .. } => {
                let partitions = fleet.leases().partitions(topic).await?;
                let partitions = partitions.iter().map(|lease| Partition {
                    leader: lease.assignment.leader.map(|leader| leader.id),
                    in_sync: lease.assignment.isr.len(),
                });
                Ok(partitions.collect())
            }
            Self::Kafka(kafka) => kafka.describe(topic).await,
        }
    }

    /// Whether all replicas of all partitions of a topic are in sync.
    pub(crate) async fn is_whole(&mut self, topic: &str) -> Result<bool> {
        if let Self::Millrace { fleet, .. } = self {
            return Ok(fleet.leases().unwhole(topic).await?.is_empty());
        }
        let partitions = self.describe(topic).await?;
        let whole =
            |partition: &Partition| partition.leader.is_some() && partition.in_sync == REPLICAS;
        Ok(!partitions.is_empty() && partitions.iter().all(whole))
    }

    /// Waits until it holds for each partition of a topic. Returns how long that took.
    pub(crate) async fn until(
        &mut self,
        topic: &str,
        within: Duration,
        what: &str,
        holds: impl Fn(&Partition) -> bool,
    ) -> Result<Duration> {
        let begun = Instant::now();
        loop {
            let partitions = self.describe(topic).await?;
            let left = partitions.iter().filter(|p| !holds(p)).count();
            let took = begun.elapsed();
            if left == 0 && !partitions.is_empty() {
                return Ok(took);
            }
            ensure!(
                took < within,
                "after {within:?}, {left} of {} partitions are not {what}",
                partitions.len()
            );
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// How many Leases were written, if that is what it coordinates by.
    pub(crate) async fn lease_writes(&self) -> Result<Option<u64>> {
        match self {
            Self::Millrace { fleet, .. } => fleet.leases().writes().await.map(Some),
            Self::Kafka(_) => Ok(None),
        }
    }

    /// SIGTERM, without waiting.
    pub(crate) fn begin_to_stop(&mut self, id: i32) -> Result<()> {
        match self {
            Self::Millrace { fleet, .. } => fleet.broker(id)?.begin_to_stop(),
            Self::Kafka(kafka) => kafka.signal(id, rustix::process::Signal::TERM),
        }
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self, id: i32) -> Result<()> {
        match self {
            Self::Millrace { fleet, .. } => fleet.broker(id)?.kill(),
            Self::Kafka(kafka) => kafka.kill(id)?,
        }
        Ok(())
    }

    /// Deletes all records that a broker has which does not run.
    pub(crate) fn wipe(&mut self, id: i32) -> Result<()> {
        match self {
            Self::Millrace { fleet, .. } => fleet.broker(id)?.wipe(),
            Self::Kafka(kafka) => kafka.wipe(id),
        }
    }

    /// SIGSTOP.
    pub(crate) fn pause(&mut self, id: i32) -> Result<()> {
        match self {
            Self::Millrace { fleet, .. } => fleet.broker(id)?.pause(),
            Self::Kafka(kafka) => kafka.signal(id, rustix::process::Signal::STOP),
        }
    }

    /// SIGCONT.
    pub(crate) fn resume(&mut self, id: i32) -> Result<()> {
        match self {
            Self::Millrace { fleet, .. } => fleet.broker(id)?.resume(),
            Self::Kafka(kafka) => kafka.signal(id, rustix::process::Signal::CONT),
        }
    }

    /// Takes the broker's network cable out.
    pub(crate) fn cut_off(&self, id: i32) {
        self.isolate(id);
        let others = [Node::Api, Node::Client];
        self.wires().cut(Node::Broker(id), others);
    }

    /// Cuts it off from the other brokers only.
    pub(crate) fn isolate(&self, id: i32) {
        let others = (0..BROKERS).filter(|other| *other != id);
        self.wires().cut(Node::Broker(id), others.map(Node::Broker));
    }

    /// Mends the network.
    pub(crate) fn heal(&self) {
        self.wires().heal();
    }

    /// Starts again what has ended, without waiting until it serves.
    pub(crate) fn start_ended(&mut self) -> Result<()> {
        match self {
            Self::Millrace { fleet, .. } => {
                for id in 0..BROKERS {
                    let broker = fleet.broker(id)?;
                    broker.ended()?;
                    if broker.state() == millrace_e2e::fleet::State::Off {
                        fleet.start_broker(id)?;
                    }
                }
                Ok(())
            }
            Self::Kafka(kafka) => kafka.start_ended(),
        }
    }

    /// Ends all.
    pub(crate) async fn stop(self) -> Result<()> {
        match self {
            Self::Millrace { mut fleet, .. } => {
                for broker in fleet.brokers() {
                    broker.stop().await?;
                }
                Ok(())
            }
            Self::Kafka(kafka) => kafka.stop().await,
        }
    }

    fn wires(&self) -> &Wires {
        match self {
            Self::Millrace { fleet, .. } => fleet.wires(),
            Self::Kafka(kafka) => &kafka.wires,
        }
    }
}
