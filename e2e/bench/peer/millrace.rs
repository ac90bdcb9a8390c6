//! Millrace as a peer: the broker program that was built together with this one.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use millrace_client::Client;

use super::{Daemon, Durability, Site, free_port};

pub(crate) struct Install {
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
}

pub(crate) struct Broker {
    // Before `site`: fields drop in this order, and the folder can go only after the process.
    pub(crate) process: Daemon,
    pub(crate) site: Site,
    pub(crate) bootstrap: Bootstrap,
}

/// Where brokers are reached.
#[derive(Clone)]
pub(crate) struct Bootstrap(pub(crate) String);

impl Install {
    pub(super) fn beside(dir: &Path, args: Vec<String>) -> Result<Self> {
        let program = dir.join("millrace-broker");
        ensure!(
            program.is_file(),
            "{} does not exist: build it first, with `cargo build --release -p millrace-broker`",
            program.display()
        );
        Ok(Self { program, args })
    }

    pub(super) async fn start(&self, site: Site) -> Result<Broker> {
        let dir = site.dir.path();
        let topics = dir.join("topics.yaml");
        fs::write(&topics, topics_yaml(&site)?)?;
        let address = format!("127.0.0.1:{}", free_port()?);
        let durability = match site.durability {
            Durability::Os => "os",
            Durability::Fsync => "fsync",
        };
        let mut command = Command::new(&self.program);
        command
            .arg("--data")
            .arg(dir.join("data"))
            .arg("--topics")
            .arg(&topics)
            .args(["--listen", &address, "--durability", durability])
            .args(["--metrics-listen", &format!("127.0.0.1:{}", free_port()?)])
            .args(&self.args)
            // At another level it would not say when it is ready.
            .env("RUST_LOG", "info");
        let mut process = Daemon::spawn("Millrace", &mut command, dir.join("millrace.log"))?;
        process
            .printed("ready address=", Duration::from_secs(120))
            .await?;
        Ok(Broker {
            process,
            site,
            bootstrap: Bootstrap(address),
        })
    }
}

impl Bootstrap {
    pub(crate) async fn client(&self) -> Result<Client> {
        Client::connect(&self.0)
            .await
            .with_context(|| format!("can't connect to {}", self.0))
    }

    pub(super) async fn records_in(&self, topic: &str) -> Result<u64> {
        let metadata = self.client().await?.metadata(&[topic]).await?;
        let offsets = metadata.topics.iter().flat_map(|topic| &topic.partitions);
        let ends = offsets.map(|partition| partition.extent.map(|extent| extent.high_watermark));
        let records: Option<i64> = ends.sum();
        Ok(u64::try_from(
            records.context("a partition has no leader")?,
        )?)
    }
}

impl Broker {
    pub(crate) async fn client(&self) -> Result<Client> {
        self.bootstrap.client().await
    }

    pub(super) async fn stop(self) -> Result<Site> {
        let status = self.process.terminate().await?;
        ensure!(
            status.success(),
            "Millrace ended with {status} after SIGTERM"
        );
        Ok(self.site)
    }
}

fn topics_yaml(site: &Site) -> Result<String> {
    let mut yaml = String::new();
    for topic in &site.topics {
        writeln!(
            yaml,
            "---\napiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata:\n  name: {}\nspec:\n  partitions: {}",
            topic.name, topic.partitions
        )?;
        if topic.compacted {
            let compaction = "  cleanupPolicy: Compact\n  compaction: {minDirtyPercent: 10}";
            writeln!(yaml, "{compaction}")?;
        }
    }
    Ok(yaml)
}
