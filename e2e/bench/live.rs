//! A producer that writes at a rate for as long as it takes, beside whatever else happens, and how long its writes take meanwhile. Millrace's is
//! a thread here, Kafka's is KafkaBench.java.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hdrhistogram::Histogram;
use millrace_client::{Acks, Partitioner};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::pace::{Latencies, Pace};
use crate::peer::{Target, kafka, millrace};

/// What it writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Bytes of each record.
    pub(crate) size: usize,
    /// Records a second.
    pub(crate) rate: u64,
    /// How long a record waits for others.
    pub(crate) linger: Duration,
    /// Each partition in turn, in place of one for each batch.
    pub(crate) round_robin: bool,
}

/// It writes with acks=all until it is dropped.
pub(crate) struct Live {
    side: Side,
    /// Acknowledged, as far as it was asked.
    acked: u64,
}

enum Side {
    Millrace(Sender),
    Kafka(Box<kafka::Running>),
}

struct Sender {
    heard: Arc<Mutex<Histogram<u64>>>,
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

impl Live {
    pub(crate) async fn start(target: &Target, topic: &'static str, load: Load) -> Result<Self> {
        let side = match target {
            Target::Millrace(bootstrap) => {
                Side::Millrace(Sender::start(bootstrap, topic, load).await?)
            }
            Target::Kafka(tools) => {
                let args = [
                    topic.to_owned(),
                    load.size.to_string(),
                    load.rate.to_string(),
                    load.linger.as_millis().to_string(),
                    load.round_robin.to_string(),
                ];
                Side::Kafka(Box::new(tools.start_bench("live", &args)?))
            }
        };
        Ok(Self { side, acked: 0 })
    }

    /// Of the records that were acknowledged since the last time.
    pub(crate) async fn latencies(&mut self) -> Result<Latencies> {
        let latencies = match &mut self.side {
            Side::Millrace(sender) => {
                if sender.thread.is_finished() {
                    (&mut sender.thread).await??;
                    bail!("the live producer has ended");
                }
                sender.take()
            }
            Side::Kafka(running) => told(&running.ask("").await?)?,
        };
        self.acked += latencies.count;
        Ok(latencies)
    }

    /// How many records were acknowledged, up to when that was last asked.
    pub(crate) fn acked(&self) -> u64 {
        self.acked
    }

    /// Waits for all that was sent. Returns how many records it was, each of them acknowledged.
    pub(crate) async fn stop(self) -> Result<u64> {
        match self.side {
            Side::Millrace(mut sender) => {
                sender.stopping.store(true, Ordering::Relaxed);
                (&mut sender.thread).await?
            }
            Side::Kafka(running) => Ok(self.acked + told(&running.end().await?)?.count),
        }
    }
}

fn told(line: &str) -> Result<Latencies> {
    Latencies::theirs(&kafka::result(line)?)
}

impl Sender {
    async fn start(
        bootstrap: &millrace::Bootstrap,
        topic: &'static str,
        load: Load,
    ) -> Result<Self> {
        let producer = bootstrap.client().await?.producer();
        let mut producer = producer.acks(Acks::All).linger(load.linger);
        if load.round_robin {
            producer = producer.partitioner(Partitioner::RoundRobin);
        }
        let producer = producer.build().await?;
        let heard = Arc::new(Mutex::new(Latencies::histogram()?));
        let stopping = Arc::new(AtomicBool::new(false));
        let epoch = Instant::now();
        let pace = Pace {
            topic,
            size: load.size,
            rate: load.rate,
            epoch,
            start: Duration::from_millis(100),
        };
        let send = {
            let (heard, stopping) = (heard.clone(), stopping.clone());
            let runtime = Handle::current();
            let more = move |_| !stopping.load(Ordering::Relaxed);
            let acked = move |due| {
                let nanos = epoch.elapsed().saturating_sub(due).as_nanos();
                let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
                heard.saturating_record(u64::try_from(nanos).unwrap_or(u64::MAX));
            };
            move || pace.send(&producer, &runtime, more, acked)
        };
        Ok(Self {
            heard,
            stopping,
            thread: tokio::task::spawn_blocking(send),
        })
    }

    fn take(&self) -> Latencies {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let latencies = Latencies::of(&heard);
        heard.reset();
        latencies
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        // The runtime waits for it.
        self.stopping.store(true, Ordering::Relaxed);
    }
}
