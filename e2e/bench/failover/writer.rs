//! A producer that writes to each partition at an interval and notes when it is told that a record is written. Millrace's is a task here, Kafka's is
//! KafkaBench.java; both use the system's monotonic clock.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use millrace_client::{Acks, Bytes, Client, Record};
use rustix::time::{ClockId, clock_gettime};
use tokio::process::{Child, ChildStdin};
use tokio::task::JoinHandle;

use super::{Options, TOPIC};
use crate::peer::{Target, kafka, millrace};

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

pub(crate) struct Writer {
    heard: Arc<Mutex<Heard>>,
    side: Side,
}

enum Side {
    Millrace(JoinHandle<Result<()>>),
    Kafka { child: Child, input: ChildStdin },
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

    /// Fails if it has ended.
    pub(crate) async fn check(&mut self) -> Result<()> {
        match &mut self.side {
            Side::Millrace(task) if task.is_finished() => {
                task.await??;
                bail!("the writer has ended")
            }
            Side::Millrace(_) => {}
            Side::Kafka { child, .. } => {
                ensure!(child.try_wait()?.is_none(), "the writer has ended");
            }
        }
        Ok(())
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
            Side::Kafka { mut child, input } => {
                // The end of its input is its own.
                drop(input);
                child.wait().await?;
            }
        }
        Ok(())
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
    let kafka::Running {
        child,
        input,
        mut output,
    } = tools.start_bench("write", &args)?;
    tokio::spawn(async move {
        while let Ok(Some(line)) = output.next_line().await {
            let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            match ack(&line) {
                Some((partition, at)) if partition < heard.acks.len() => {
                    heard.acks[partition].push(at);
                }
                _ => heard.errors.push(line),
            }
        }
    });
    Ok(Side::Kafka { child, input })
}

/// `ack PARTITION NANOSECONDS`.
fn ack(line: &str) -> Option<(usize, u64)> {
    let (partition, at) = line.strip_prefix("ack ")?.split_once(' ')?;
    Some((partition.parse().ok()?, at.parse().ok()?))
}
