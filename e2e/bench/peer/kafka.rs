//! Apache Kafka as a peer: fetched from Maven Central once, then run as its own start scripts would run it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};

use super::{Daemon, Durability, Site, Topic, free_port, run};

const POM: &str = include_str!("../kafka/pom.xml");
const BENCH: &str = include_str!("../kafka/KafkaBench.java");
const SERVER: &str = include_str!("../kafka/server.properties");
const LOG4J: &str = include_str!("../kafka/log4j2.yaml");

/// What kafka-run-class.sh gives every JVM.
const JVM: [&str; 9] = [
    "-server",
    "-XX:+UseG1GC",
    "-XX:MaxGCPauseMillis=20",
    "-XX:InitiatingHeapOccupancyPercent=35",
    "-XX:+ExplicitGCInvokesConcurrent",
    "-XX:MaxInlineLevel=15",
    "-Djava.awt.headless=true",
    // Its tools print numbers as the locale has them.
    "-Duser.language=en",
    "-Duser.country=US",
];
/// What kafka-server-start.sh gives the broker.
const BROKER_HEAP: [&str; 2] = ["-Xmx1G", "-Xms1G"];
/// What kafka-producer-perf-test.sh and kafka-consumer-perf-test.sh take.
const TOOL_HEAP: &str = "-Xmx512M";

#[derive(Clone)]
pub(crate) struct Install {
    dir: PathBuf,
}

pub(crate) struct Broker {
    // Before `site`: fields drop in this order, and the folder can go only after the process.
    pub(crate) process: Daemon,
    pub(crate) site: Site,
    pub(crate) tools: Tools,
}

/// Kafka's own tools and KafkaBench.java, for some brokers.
#[derive(Clone)]
pub(crate) struct Tools {
    pub(crate) address: String,
    pub(crate) install: Install,
}

/// One of one or more nodes, each of them broker and controller.
pub(crate) struct Node {
    pub(crate) id: i32,
    pub(crate) broker: SocketAddr,
    pub(crate) controller: SocketAddr,
    /// Where others reach it as broker.
    pub(crate) advertised: SocketAddr,
    /// All controllers: `id@host:port,...`.
    pub(crate) voters: String,
    pub(crate) replicas: usize,
    pub(crate) min_in_sync: usize,
}

impl Install {
    /// Fetches Kafka into `dir`, unless it is there already.
    pub(super) async fn prepare(dir: PathBuf) -> Result<Self> {
        fs::create_dir_all(&dir)?;
        let this = Self { dir };
        // The copies of the sources are written last: they say that what was made from them is complete.
        let (pom, bench) = (this.dir.join("pom.xml"), this.dir.join("KafkaBench.java"));
        fs::write(this.dir.join("log4j2.yaml"), LOG4J)?;
        if fs::read_to_string(&pom).is_ok_and(|have| have == POM)
            && fs::read_to_string(&bench).is_ok_and(|have| have == BENCH)
        {
            return Ok(this);
        }
        eprintln!(
            "fetching Apache Kafka from Maven Central into {} …",
            this.dir.display()
        );
        let build = tempfile::tempdir_in(&this.dir)?;
        fs::write(build.path().join("pom.xml"), POM)?;
        let mut maven = Command::new("mvn");
        maven
            .args([
                "-q",
                "-B",
                "dependency:copy-dependencies",
                "-DincludeScope=runtime",
            ])
            .arg(format!("-DoutputDirectory={}", this.jars().display()))
            .current_dir(build.path());
        run(maven).await.context(
            "can't fetch Kafka: this needs `mvn` (Debian: apt-get install maven) and a network",
        )?;
        let source = build.path().join("KafkaBench.java");
        fs::write(&source, BENCH)?;
        let mut javac = Command::new("javac");
        javac.arg("-cp").arg(this.jars().join("*"));
        javac.arg("-d").arg(this.dir.join("classes")).arg(source);
        run(javac)
            .await
            .context("can't compile KafkaBench.java: this needs a JDK of version 17 or newer")?;
        fs::write(bench, BENCH)?;
        fs::write(pom, POM)?;
        Ok(this)
    }

    pub(super) async fn start(&self, site: Site) -> Result<Broker> {
        let dir = site.dir.path();
        let address = || free_port().map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let (broker, controller) = (address()?, address()?);
        let node = Node {
            id: 1,
            broker,
            controller,
            advertised: broker,
            voters: format!("1@{controller}"),
            replicas: 1,
            min_in_sync: 1,
        };
        let fresh = self.format(dir, &node).await?;
        let mut process = self.run_node(dir)?;
        started(&mut process).await?;
        let tools = Tools {
            address: broker.to_string(),
            install: self.clone(),
        };
        if fresh {
            for topic in &site.topics {
                let flush = (site.durability == Durability::Fsync).then_some("flush.messages=1");
                // The newest segment is never compacted: as large as a generation of Millrace's.
                let compacted = [
                    "cleanup.policy=compact",
                    "min.cleanable.dirty.ratio=0.1",
                    "segment.bytes=16777216",
                ];
                let compacted = compacted.into_iter().filter(|_| topic.compacted);
                let config: Vec<_> = flush.into_iter().chain(compacted).collect();
                tools.create_topic(topic, 1, &config).await?;
            }
        }
        Ok(Broker {
            process,
            site,
            tools,
        })
    }

    /// Writes a node's configuration into its folder, and formats it unless that was done. Whether it was not.
    pub(crate) async fn format(&self, dir: &Path, node: &Node) -> Result<bool> {
        let (data, properties) = (dir.join("data"), dir.join("server.properties"));
        let text = SERVER
            .replace("{node}", &node.id.to_string())
            .replace("{voters}", &node.voters)
            .replace("{data}", &data.display().to_string())
            .replace("{broker}", &node.broker.to_string())
            .replace("{advertised}", &node.advertised.to_string())
            .replace("{controller}", &node.controller.to_string())
            .replace("{factor}", &node.replicas.to_string())
            .replace("{min}", &node.min_in_sync.to_string());
        fs::write(&properties, text)?;
        if data.exists() {
            return Ok(false);
        }
        let mut format = self.java(&[TOOL_HEAP], "kafka.tools.StorageTool");
        format
            .args(["format", "-t", "MillraceBenchmarks000A", "-c"])
            .arg(&properties);
        run(format).await.context("can't format Kafka's folder")?;
        Ok(true)
    }

    /// Starts the node of a formatted folder, without waiting until it serves.
    pub(crate) fn run_node(&self, dir: &Path) -> Result<Daemon> {
        let mut command = self.java(&BROKER_HEAP, "kafka.Kafka");
        command.arg(dir.join("server.properties"));
        Daemon::spawn("Kafka", &mut command, dir.join("kafka.log"))
    }

    fn java(&self, heap: &[&str], class: &str) -> Command {
        let log4j = self.dir.join("log4j2.yaml");
        let class_path = format!(
            "{}:{}",
            self.jars().join("*").display(),
            self.dir.join("classes").display()
        );
        let mut command = Command::new("java");
        command
            .args(heap)
            .args(JVM)
            .arg(format!(
                "-Dlog4j2.configurationFile=file:{}",
                log4j.display()
            ))
            .args(["-cp", &class_path, class]);
        command
    }

    fn jars(&self) -> PathBuf {
        self.dir.join("jars")
    }
}

/// Waits until a node serves.
pub(crate) async fn started(process: &mut Daemon) -> Result<()> {
    process
        .printed("Kafka Server started", Duration::from_secs(600))
        .await
}

impl Tools {
    /// One of Kafka's own tools, with the heap that its script gives it.
    pub(crate) fn tool(&self, class: &str) -> Command {
        let mut command = self
            .install
            .java(&[TOOL_HEAP], &format!("org.apache.kafka.tools.{class}"));
        command.args(["--bootstrap-server", &self.address]);
        command
    }

    /// ProducerPerformance names the broker in another way than the other tools do.
    pub(crate) fn producer_tool(
        &self,
        topic: &str,
        records: u64,
        payloads: &Path,
        throughput: i64,
        properties: &[String],
    ) -> Command {
        let mut command = self
            .install
            .java(&[TOOL_HEAP], "org.apache.kafka.tools.ProducerPerformance");
        command
            .args(["--topic", topic, "--num-records", &records.to_string()])
            .arg("--payload-file")
            .arg(payloads)
            .args(["--throughput", &throughput.to_string(), "--producer-props"])
            .arg(format!("bootstrap.servers={}", self.address))
            .args(properties);
        command
    }

    /// A load of KafkaBench.java.
    pub(crate) fn bench(&self, heap: &str, load: &str, args: &[String]) -> Command {
        let mut command = self.install.java(&[heap], "KafkaBench");
        command.args([load, &self.address]).args(args);
        command
    }

    /// A load of KafkaBench.java that goes on until its standard input ends.
    pub(crate) fn start_bench(&self, load: &str, args: &[String]) -> Result<Running> {
        let mut child = tokio::process::Command::from(self.bench(TOOL_HEAP, load, args))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // It warns of each try to reach a broker that failed.
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let input = child.stdin.take().context("standard input is piped")?;
        let output = child.stdout.take().context("standard output is piped")?;
        Ok(Running {
            child,
            input,
            output: BufReader::new(output).lines(),
        })
    }

    pub(crate) async fn create_topic(
        &self,
        topic: &Topic,
        replicas: usize,
        config: &[&str],
    ) -> Result<()> {
        let mut create = self.tool("TopicCommand");
        create
            .args(["--create", "--topic", &topic.name])
            .args(["--replication-factor", &replicas.to_string()])
            .args(["--partitions", &topic.partitions.to_string()]);
        for config in config {
            create.args(["--config", config]);
        }
        run(create)
            .await
            .with_context(|| format!("can't create topic {} in Kafka", topic.name))?;
        Ok(())
    }

    pub(super) async fn records_in(&self, topic: &str) -> Result<u64> {
        let mut tool = self.tool("GetOffsetShell");
        tool.args(["--topic", topic]);
        let mut sum = 0;
        for line in run(tool).await?.lines() {
            // topic:partition:offset
            let offset = line.rsplit(':').next().unwrap_or_default();
            sum += offset
                .parse::<u64>()
                .with_context(|| format!("GetOffsetShell printed {line:?}"))?;
        }
        Ok(sum)
    }
}

/// A load of KafkaBench.java.
pub(crate) struct Running {
    pub(crate) child: Child,
    pub(crate) input: ChildStdin,
    pub(crate) output: Lines<BufReader<ChildStdout>>,
}

impl Running {
    /// Says a line, and returns the one that answers it.
    pub(crate) async fn ask(&mut self, line: &str) -> Result<String> {
        self.input.write_all(format!("{line}\n").as_bytes()).await?;
        next(&mut self.output).await
    }

    /// Ends its input, and returns the line that answers that.
    pub(crate) async fn end(mut self) -> Result<String> {
        drop(self.input);
        next(&mut self.output).await
    }
}

async fn next(output: &mut Lines<BufReader<ChildStdout>>) -> Result<String> {
    let line = output.next_line().await?;
    line.context("KafkaBench has ended")
}

impl Broker {
    pub(super) async fn stop(self) -> Result<Site> {
        stopped(self.process).await?;
        Ok(self.site)
    }
}

/// SIGTERM, and its end.
pub(crate) async fn stopped(process: Daemon) -> Result<()> {
    const SIGTERM_TAKEN: i32 = 143;
    let status = process.terminate().await?;
    ensure!(
        matches!(status.code(), Some(0 | SIGTERM_TAKEN)),
        "Kafka ended with {status} after SIGTERM"
    );
    Ok(())
}

/// The line of JSON that KafkaBench.java prints at its end.
pub(crate) struct Outcome(serde_json::Value);

/// Finds it in what the program printed.
pub(crate) fn result(out: &str) -> Result<Outcome> {
    let line = out.lines().rfind(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("KafkaBench printed no result:\n{out}"))?;
    Ok(Outcome(serde_json::from_str(line)?))
}

impl Outcome {
    pub(crate) fn get(&self, name: &str) -> Result<u64> {
        let value = self.0.get(name).and_then(serde_json::Value::as_u64);
        value.with_context(|| format!("KafkaBench's result has no {name}: {}", self.0))
    }
}
