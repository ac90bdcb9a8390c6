//! The two brokers that are compared, behind one face: start on a fresh folder, restart on the same, stop, measure.

pub(crate) mod kafka;
pub(crate) mod millrace;

use std::net::TcpListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use tempfile::TempDir;

pub(crate) use millrace_e2e::daemon::{Daemon, own_cpu, own_written, run, tools_cpu};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Peer {
    Millrace,
    Kafka,
}

/// When an append with acks=all is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Durability {
    /// Once the operating system has it: the default of both.
    Os,
    /// Once it is on the disk: `--durability fsync` and `flush.messages=1`.
    Fsync,
}

pub(crate) struct Topic {
    pub(crate) name: String,
    pub(crate) partitions: u32,
    pub(crate) compacted: bool,
}

impl Topic {
    pub(crate) fn new(name: impl Into<String>, partitions: u32) -> Self {
        let name = name.into();
        Self {
            name,
            partitions,
            compacted: false,
        }
    }

    /// Compacted whenever a tenth of it is new.
    pub(crate) fn compacted(name: impl Into<String>, partitions: u32) -> Self {
        Self {
            compacted: true,
            ..Self::new(name, partitions)
        }
    }
}

/// A broker's folder and what it is told to host. Removed when dropped.
pub(crate) struct Site {
    dir: TempDir,
    durability: Durability,
    topics: Vec<Topic>,
}

/// What is needed to start either broker.
pub(crate) struct Peers {
    pub(crate) millrace: Option<millrace::Install>,
    pub(crate) kafka: Option<kafka::Install>,
    pub(crate) work: PathBuf,
}

impl Peers {
    /// Finds Millrace beside this program, and fetches Kafka if it is not there yet; only those that are `wanted`.
    pub(crate) async fn find(
        wanted: &[Peer],
        work: PathBuf,
        broker_args: Vec<String>,
    ) -> Result<Self> {
        let exe = std::env::current_exe()?;
        let profile = exe.parent().context("this program has no folder")?;
        let target = profile
            .parent()
            .context("this program is not in a target folder")?;
        let (mut millrace, mut kafka) = (None, None);
        if wanted.contains(&Peer::Millrace) {
            millrace = Some(millrace::Install::beside(profile, broker_args)?);
        }
        if wanted.contains(&Peer::Kafka) {
            kafka = Some(kafka::Install::prepare(target.join("bench/kafka")).await?);
        }
        Ok(Self {
            millrace,
            kafka,
            work,
        })
    }

    /// Starts a broker on an empty folder, with its topics.
    pub(crate) async fn start(
        &self,
        peer: Peer,
        durability: Durability,
        topics: Vec<Topic>,
    ) -> Result<Broker> {
        let dir = tempfile::Builder::new()
            .prefix("broker-")
            .tempdir_in(&self.work)
            .with_context(|| format!("can't make a folder in {}", self.work.display()))?;
        self.restart(
            peer,
            Site {
                dir,
                durability,
                topics,
            },
        )
        .await
    }

    /// Starts a broker on a folder that an earlier one left.
    pub(crate) async fn restart(&self, peer: Peer, site: Site) -> Result<Broker> {
        match peer {
            Peer::Millrace => {
                let millrace = self
                    .millrace
                    .as_ref()
                    .context("Millrace is not among the peers")?;
                Ok(Broker::Millrace(millrace.start(site).await?))
            }
            Peer::Kafka => {
                let kafka = self
                    .kafka
                    .as_ref()
                    .context("Kafka is not among the peers")?;
                Ok(Broker::Kafka(kafka.start(site).await?))
            }
        }
    }
}

/// A broker that serves.
pub(crate) enum Broker {
    Millrace(millrace::Broker),
    Kafka(kafka::Broker),
}

impl Broker {
    pub(crate) fn process(&self) -> &Daemon {
        match self {
            Self::Millrace(broker) => &broker.process,
            Self::Kafka(broker) => &broker.process,
        }
    }

    /// Where all is that it writes.
    pub(crate) fn folder(&self) -> &Path {
        match self {
            Self::Millrace(broker) => broker.site.dir.path(),
            Self::Kafka(broker) => broker.site.dir.path(),
        }
    }

    /// For clients.
    pub(crate) fn target(&self) -> Target {
        match self {
            Self::Millrace(broker) => Target::Millrace(broker.bootstrap.clone()),
            Self::Kafka(broker) => Target::Kafka(broker.tools.clone()),
        }
    }

    /// Asks it to stop, as Kubernetes would, and waits for it.
    pub(crate) async fn stop(self) -> Result<Site> {
        match self {
            Self::Millrace(broker) => broker.stop().await,
            Self::Kafka(broker) => broker.stop().await,
        }
    }

    /// kill -9.
    pub(crate) fn kill(self) -> Site {
        match self {
            Self::Millrace(broker) => broker.site,
            Self::Kafka(broker) => broker.site,
        }
    }
}

/// One broker or several, as clients see them.
pub(crate) enum Target {
    Millrace(millrace::Bootstrap),
    Kafka(kafka::Tools),
}

impl Target {
    /// How many records the topic holds, summed over its partitions, by the brokers' own account.
    pub(crate) async fn records_in(&self, topic: &str) -> Result<u64> {
        match self {
            Self::Millrace(bootstrap) => bootstrap.records_in(topic).await,
            Self::Kafka(tools) => tools.records_in(topic).await,
        }
    }
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
