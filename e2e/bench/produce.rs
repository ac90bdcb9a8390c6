//! One producer, as fast as it can.
//!
//! Kafka's load is its own ProducerPerformance. Both sides send the same 1,000 random lines in random order
//! (`--payload-file`): that costs either of them less than making each payload up anew.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::FutureExt;
use hdrhistogram::Histogram;
use millrace_client::{Acks, Bytes, Delivery, Record};
use tempfile::TempDir;

use crate::peer::{Target, kafka, own_cpu, run, tools_cpu};

/// What to send.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub(crate) topic: String,
    pub(crate) records: u64,
    pub(crate) linger_ms: u64,
    pub(crate) batch_bytes: usize,
    /// Records that wait in the producer; each producer's own default if not set.
    pub(crate) buffer_bytes: Option<usize>,
}

/// What came of it. All records were acknowledged, and the broker has just as many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Produced {
    pub(crate) records_per_s: f64,
    pub(crate) client_cpu: Duration,
    /// From handing a record to the producer to hearing that it is written, the wait for those before it included. Of Millrace it is heard of no
    /// sooner than the next look, every some hundred records.
    pub(crate) p99: Duration,
}

/// Random lines of one length.
pub(crate) struct Payloads {
    dir: TempDir,
    pub(crate) size: usize,
    values: Vec<Bytes>,
}

impl Payloads {
    pub(crate) fn new(work: &Path, size: usize) -> Result<Self> {
        const LINES: usize = 1_000;
        let mut random = fastrand::Rng::with_seed(7);
        let values: Vec<Bytes> = (0..LINES)
            .map(|_| (0..size).map(|_| random.uppercase() as u8).collect())
            .collect();
        let dir = tempfile::tempdir_in(work)?;
        let mut text = values.join(&b'\n');
        text.push(b'\n');
        fs::write(dir.path().join("payloads"), text)?;
        Ok(Self { dir, size, values })
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.dir.path().join("payloads")
    }
}

/// Sends the load, and checks that all of it was acknowledged and is there.
pub(crate) async fn produce(target: &Target, load: &Load, payloads: &Payloads) -> Result<Produced> {
    let before = target.records_in(&load.topic).await?;
    let produced = match target {
        Target::Millrace(bootstrap) => millrace(&bootstrap.client().await?, load, payloads).await?,
        Target::Kafka(tools) => kafka(tools, load, payloads).await?,
    };
    let held = target.records_in(&load.topic).await? - before;
    ensure!(
        held == load.records,
        "{} records were acknowledged, but topic {} has {held} more than before",
        load.records,
        load.topic
    );
    Ok(produced)
}

async fn millrace(
    client: &millrace_client::Client,
    load: &Load,
    payloads: &Payloads,
) -> Result<Produced> {
    let mut producer = client
        .producer()
        .acks(Acks::All)
        .linger(Duration::from_millis(load.linger_ms))
        .batch_bytes(load.batch_bytes);
    if let Some(bytes) = load.buffer_bytes {
        producer = producer.max_buffered_bytes(bytes);
    }
    let producer = producer.build().await?;
    let mut random = fastrand::Rng::with_seed(11);
    let mut unanswered = Unanswered::new()?;
    let (start, cpu) = (Instant::now(), own_cpu()?);
    for _ in 0..load.records {
        let value = payloads.values[random.usize(..payloads.values.len())].clone();
        let record = Record::to(load.topic.as_str()).value(value);
        let sent = Instant::now();
        unanswered.push(producer.send(record).await?, sent)?;
    }
    let latencies = unanswered.finish().await?;
    let acked = latencies.len();
    let elapsed = start.elapsed();
    let client_cpu = own_cpu()? - cpu;
    ensure!(
        acked == load.records,
        "{acked} of {} records were acknowledged",
        load.records
    );
    producer.close(Duration::from_secs(30)).await?;
    Ok(Produced {
        records_per_s: acked as f64 / elapsed.as_secs_f64(),
        client_cpu,
        p99: Duration::from_micros(latencies.value_at_quantile(0.99)),
    })
}

/// Deliveries not answered yet, oldest first. The producer's own buffer bounds how many there are.
struct Unanswered {
    deliveries: VecDeque<(Delivery, Instant)>,
    pushed: u64,
    /// Of those answered, in microseconds.
    latencies: Histogram<u64>,
}

impl Unanswered {
    fn new() -> Result<Self> {
        Ok(Self {
            deliveries: VecDeque::new(),
            pushed: 0,
            latencies: Histogram::new(3)?,
        })
    }

    fn push(&mut self, delivery: Delivery, sent: Instant) -> Result<()> {
        const LOOK_EVERY: u64 = 256;
        self.deliveries.push_back((delivery, sent));
        self.pushed += 1;
        if self.pushed.is_multiple_of(LOOK_EVERY) {
            let now = Instant::now();
            while let Some((delivery, sent)) = self.deliveries.front_mut() {
                let Some(answer) = delivery.now_or_never() else {
                    break;
                };
                answer?;
                self.latencies.record(micros(now - *sent))?;
                self.deliveries.pop_front();
            }
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<Histogram<u64>> {
        for (delivery, sent) in self.deliveries.drain(..) {
            delivery.await?;
            self.latencies.record(micros(sent.elapsed()))?;
        }
        Ok(self.latencies)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

async fn kafka(tools: &kafka::Tools, load: &Load, payloads: &Payloads) -> Result<Produced> {
    let mut properties = vec![
        "acks=all".to_owned(),
        "compression.type=none".to_owned(),
        format!("linger.ms={}", load.linger_ms),
        format!("batch.size={}", load.batch_bytes),
    ];
    properties.extend(
        load.buffer_bytes
            .map(|bytes| format!("buffer.memory={bytes}")),
    );
    let cpu = tools_cpu()?;
    let out =
        run(tools.producer_tool(&load.topic, load.records, &payloads.file(), -1, &properties))
            .await?;
    let client_cpu = tools_cpu()? - cpu;
    // 2000000 records sent, 145000.1 records/sec (138.28 MB/sec), 2.31 ms avg latency, 40.00 ms max latency, 1 ms 50th, 2 ms 95th, 3 ms 99th, …
    let total = out.lines().rfind(|line| line.contains("99.9th"));
    let total = total.with_context(|| format!("ProducerPerformance printed no total:\n{out}"))?;
    let mut words = total.split([' ', ',']).filter(|word| !word.is_empty());
    let sent: u64 = words.next().unwrap_or_default().parse()?;
    let records_per_s = words.nth(2).unwrap_or_default().parse()?;
    let p99 = total
        .split(", ")
        .find_map(|part| part.strip_suffix(" ms 99th"));
    let p99 = p99.with_context(|| format!("ProducerPerformance printed no p99: {total}"))?;
    ensure!(
        sent == load.records,
        "Kafka acknowledged {sent} of {} records",
        load.records
    );
    Ok(Produced {
        records_per_s,
        client_cpu,
        p99: Duration::from_millis(p99.parse()?),
    })
}
