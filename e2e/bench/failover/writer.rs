//! A producer that writes to each partition at an interval and notes when it is told that a record is written. Millrace's is a task here, Kafka's is
//! KafkaBench.java; both use the system's monotonic clock.

use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use millrace_client::{Acks, Bytes, Client, Record};
use rustix::time::{ClockId, clock_gettime};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Options, TOPIC};
use crate::peer::{Target, kafka, millrace};
use crate::trio::{REPLICAS, Trio};

/// The time, as [`Writer`] has it.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let (seconds, nanos) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000_000_000 + nanos
}

/// What was heard since it was last forgotten.
#[derive(Default)]
struct Heard {
    /// By partition.
    acks: Vec<Vec<u64>>,
    errors: Vec<String>,
}

/// A partition as brokers describe it.
pub(crate) struct Partition {
    pub(crate) leader: Option<i32>,
    in_sync: usize,
}

pub(crate) struct Writer {
    heard: Arc<Mutex<Heard>>,
    side: Side,
}

enum Side {
    Millrace(JoinHandle<Result<()>>),
    Kafka {
        child: Child,
        commands: ChildStdin,
        states: mpsc::Receiver<String>,
    },
}

impl Writer {
    pub(crate) async fn start(target: &Target, topic: &str, options: &Options) -> Result<Self> {
        let heard = Arc::new(Mutex::new(Heard {
            acks: vec![Vec::new(); options.partitions as usize],
            errors: Vec::new(),
        }));
        let side = match target {
            Target::Millrace(bootstrap) => {
                let writing = write(bootstrap.clone(), options.clone(), heard.clone());
                Side::Millrace(tokio::spawn(writing))
            }
            Target::Kafka(tools) => start_kafka(tools, topic, options, heard.clone())?,
        };
        Ok(Self { heard, side })
    }

    /// The partitions, by index.
    pub(crate) async fn describe(&mut self, trio: &Trio) -> Result<Vec<Partition>> {
        match (&mut self.side, trio) {
            (Side::Millrace(task), Trio::Millrace { fleet, .. }) => {
                if task.is_finished() {
                    task.await??;
                    bail!("the writer has ended");
                }
                let partitions = fleet.leases().partitions(TOPIC).await?;
                let partitions = partitions.iter().map(|lease| Partition {
                    leader: lease.assignment.leader.map(|leader| leader.id),
                    in_sync: lease.assignment.isr.len(),
                });
                Ok(partitions.collect())
            }
            (
                Side::Kafka {
                    commands, states, ..
                },
                Trio::Kafka(_),
            ) => {
                commands.write_all(b"describe\n").await?;
                let state = states.recv().await.context("KafkaBench has ended")?;
                state.split_whitespace().map(Partition::parse).collect()
            }
            _ => bail!("a writer to one kind of brokers, and brokers of the other"),
        }
    }

    /// Whether all replicas of all partitions are in sync.
    pub(crate) async fn is_whole(&mut self, trio: &Trio) -> Result<bool> {
        if let Trio::Millrace { fleet, .. } = trio {
            return Ok(fleet.leases().unwhole(TOPIC).await?.is_empty());
        }
        let partitions = self.describe(trio).await?;
        let whole =
            |partition: &Partition| partition.leader.is_some() && partition.in_sync == REPLICAS;
        Ok(!partitions.is_empty() && partitions.iter().all(whole))
    }

    /// Looks at the acknowledgements of one partition.
    pub(crate) fn acks<T>(&self, partition: usize, look: impl FnOnce(&[u64]) -> T) -> T {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        look(heard.acks.get(partition).map_or(&[], Vec::as_slice))
    }

    /// Whether it holds for each partition.
    pub(crate) fn all(&self, holds: impl Fn(&[u64]) -> bool) -> bool {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.acks.iter().all(|acks| holds(acks))
    }

    /// How many writes failed for good; the first of them is shown.
    pub(crate) fn errors(&self) -> usize {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = heard.errors.first() {
            eprintln!("{} writes failed, first: {first}", heard.errors.len());
        }
        heard.errors.len()
    }

    /// Begins anew.
    pub(crate) fn forget(&self) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.acks.iter_mut().for_each(Vec::clear);
        heard.errors.clear();
    }

    pub(crate) async fn stop(self) -> Result<()> {
        match self.side {
            Side::Millrace(task) => task.abort(),
            Side::Kafka {
                mut child,
                commands,
                ..
            } => {
                // The end of its input is its own.
                drop(commands);
                child.wait().await?;
            }
        }
        Ok(())
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

async fn write(
    bootstrap: millrace::Bootstrap,
    options: Options,
    heard: Arc<Mutex<Heard>>,
) -> Result<()> {
    let timeout = Duration::from_millis(options.request_timeout_ms.into());
    let client = Client::builder(bootstrap.0).request_timeout(timeout);
    let client = client.connect().await?;
    let producer = client.producer().acks(Acks::All).linger(Duration::ZERO);
    let producer = producer.build().await?;
    let value = Bytes::from(vec![0; options.size]);
    let mut ticks = tokio::time::interval(Duration::from_millis(options.interval_ms.into()));
    loop {
        ticks.tick().await;
        for partition in 0..options.partitions {
            let index = i32::try_from(partition)?;
            let record = Record::to(TOPIC).partition(index).value(value.clone());
            let delivery = producer.send(record).await?;
            let heard = heard.clone();
            tokio::spawn(async move {
                let answer = delivery.await;
                let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
                match answer {
                    Ok(_) => heard.acks[partition as usize].push(now_ns()),
                    Err(error) => heard.errors.push(error.to_string()),
                }
            });
        }
    }
}

fn start_kafka(
    tools: &kafka::Tools,
    topic: &str,
    options: &Options,
    heard: Arc<Mutex<Heard>>,
) -> Result<Side> {
    let args = [
        topic.to_owned(),
        options.partitions.to_string(),
        options.size.to_string(),
        options.interval_ms.to_string(),
        options.request_timeout_ms.to_string(),
    ];
    let mut child = Command::from(tools.bench("-Xmx512M", "write", &args))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        // It warns of each try to reach the broker that failed.
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let commands = child.stdin.take().context("standard input is piped")?;
    let out = child.stdout.take().context("standard output is piped")?;
    let (described, states) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut lines = BufReader::new(out).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            if let Some(state) = line.strip_prefix("state") {
                // No one waits for it once the writer is being stopped.
                let _ = described.send(state.to_owned()).await;
                continue;
            }
            let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            match ack(&line) {
                Some((partition, at)) if partition < heard.acks.len() => {
                    heard.acks[partition].push(at);
                }
                _ => heard.errors.push(line),
            }
        }
    });
    Ok(Side::Kafka {
        child,
        commands,
        states,
    })
}

/// `ack PARTITION NANOSECONDS`.
fn ack(line: &str) -> Option<(usize, u64)> {
    let (partition, at) = line.strip_prefix("ack ")?.split_once(' ')?;
    Some((partition.parse().ok()?, at.parse().ok()?))
}
