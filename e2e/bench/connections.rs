//! Many producers at once, each with its own connection and its own partition. Each replaces every record acknowledged by
//! another, with a bounded number in flight. KafkaBench.java does the same for Kafka, with all its producers in one JVM.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use millrace_client::{Acks, Bytes, Producer, Record};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::Bench;
use crate::peer::{Broker, Durability, Topic, kafka, millrace, own_cpu, run, tools_cpu};
use crate::table::{Goal, Report};

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Producers, connections and partitions.
    #[arg(long, default_value_t = 1_000)]
    producers: u32,
    /// Bytes of each value.
    #[arg(long, default_value_t = 1_000)]
    size: usize,
    /// Records not yet acknowledged, for each producer.
    #[arg(long, default_value_t = 64)]
    in_flight: usize,
    /// How long to measure.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// How long the load runs before that.
    #[arg(long, default_value_t = 10)]
    warm_up: u64,
    /// Acknowledge what is on the disk only (Kafka: flush.messages=1).
    #[arg(long)]
    fsync: bool,
}

const TOPIC: &str = "connections";

/// KafkaBench.java has the same.
const LINGER: Duration = Duration::from_millis(5);
const BATCH_BYTES: usize = 16_384;
const BUFFER_BYTES: usize = 1 << 20;

struct Outcome {
    /// Acknowledged while it was measured.
    measured: u64,
    elapsed: Duration,
    sent: u64,
    acked: u64,
    errors: u64,
    client_cpu: Duration,
}

pub(crate) async fn connections(bench: &Bench, options: &Options) -> Result<Report> {
    const MIB: f64 = 1024.0 * 1024.0;
    let (durability, durable, times) = match options.fsync {
        true => (Durability::Fsync, ", fsync", 10.0),
        false => (Durability::Os, "", 3.0),
    };
    let title = format!(
        "{} producers, each with its own connection and partition, {} B, acks=all{durable}",
        options.producers, options.size
    );
    let mut report = Report::new(title, crate::KAFKA);
    for peer in bench.turns("connections") {
        let topics = vec![Topic::new(TOPIC, options.producers)];
        let broker = bench.peers.start(peer, durability, topics).await?;
        let idle = broker.process().settled().await?;
        let outcome = match &broker {
            Broker::Millrace(broker) => ours(broker, options).await?,
            Broker::Kafka(broker) => theirs(broker, options).await?,
        };
        let end = broker.process().usage()?;
        let held = broker.target().records_in(TOPIC).await?;
        ensure!(
            outcome.errors == 0 && outcome.sent == outcome.acked && outcome.acked == held,
            "{} records were sent, {} acknowledged, {} failed, and the topic holds {held}",
            outcome.sent,
            outcome.acked,
            outcome.errors
        );
        let settled = broker.process().settled().await?;
        let rate = outcome.measured as f64 / outcome.elapsed.as_secs_f64();
        let quarter = Some(Goal::RatioAtMost(0.25));
        let bytes = outcome.acked as f64 * options.size as f64;
        let per_gb = |cpu: Duration| cpu.as_secs_f64() / (bytes / 1e9);
        report.add(peer, "records/s", Some(Goal::RatioAtLeast(times)), rate);
        report.add(peer, "MiB/s", None, rate * options.size as f64 / MIB);
        report.add(
            peer,
            "broker's memory at the end, MiB",
            quarter,
            end.rss as f64 / MIB,
        );
        report.add(
            peer,
            "broker's peak memory, MiB",
            quarter,
            end.peak_rss as f64 / MIB,
        );
        report.add(
            peer,
            "CPU of the broker, s/GB",
            None,
            per_gb(settled.cpu - idle.cpu),
        );
        report.add(
            peer,
            "CPU of the clients, s/GB",
            None,
            per_gb(outcome.client_cpu),
        );
        report.add(
            peer,
            "bytes written to disk / bytes produced",
            Some(Goal::AtMost(2.1)),
            settled.written.saturating_sub(idle.written) as f64 / bytes,
        );
        broker.stop().await?;
    }
    Ok(report)
}

#[derive(Default)]
struct Counters {
    sent: AtomicU64,
    acked: AtomicU64,
    errors: AtomicU64,
    stopping: AtomicBool,
}

async fn ours(broker: &millrace::Broker, options: &Options) -> Result<Outcome> {
    let cpu = own_cpu()?;
    let counters = Arc::new(Counters::default());
    let producers: Vec<Producer> = stream::iter(0..options.producers)
        .map(async |_| -> Result<Producer> {
            let producer = broker.client().await?.producer();
            let producer = producer
                .acks(Acks::All)
                .linger(LINGER)
                .batch_bytes(BATCH_BYTES);
            Ok(producer.max_buffered_bytes(BUFFER_BYTES).build().await?)
        })
        .buffered(8)
        .try_collect()
        .await?;
    let mut tasks = JoinSet::new();
    for (partition, producer) in (0..).zip(producers) {
        let (counters, options) = (Arc::clone(&counters), options.clone());
        tasks.spawn(send(producer, partition, options, counters));
    }
    sleep(Duration::from_secs(options.warm_up)).await;
    let (before, start) = (counters.acked.load(Ordering::Relaxed), Instant::now());
    sleep(Duration::from_secs(options.seconds)).await;
    let measured = counters.acked.load(Ordering::Relaxed) - before;
    let elapsed = start.elapsed();
    counters.stopping.store(true, Ordering::Relaxed);
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(Outcome {
        measured,
        elapsed,
        sent: counters.sent.load(Ordering::Relaxed),
        acked: counters.acked.load(Ordering::Relaxed),
        errors: counters.errors.load(Ordering::Relaxed),
        client_cpu: own_cpu()? - cpu,
    })
}

async fn send(
    producer: Producer,
    partition: i32,
    options: Options,
    counters: Arc<Counters>,
) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(u64::from(partition.unsigned_abs()));
    let value: Bytes = (0..options.size).map(|_| random.u8(..)).collect();
    let mut unanswered = VecDeque::with_capacity(options.in_flight);
    loop {
        while unanswered.len() < options.in_flight && !counters.stopping.load(Ordering::Relaxed) {
            let record = Record::to(TOPIC).partition(partition).value(value.clone());
            unanswered.push_back(producer.send(record).await?);
            counters.sent.fetch_add(1, Ordering::Relaxed);
        }
        let Some(oldest) = unanswered.pop_front() else {
            break;
        };
        match oldest.await {
            Ok(_) => counters.acked.fetch_add(1, Ordering::Relaxed),
            Err(_) => counters.errors.fetch_add(1, Ordering::Relaxed),
        };
    }
    producer
        .close(Duration::from_secs(60))
        .await
        .with_context(|| format!("the producer of partition {partition} did not close"))
}

async fn theirs(broker: &kafka::Broker, options: &Options) -> Result<Outcome> {
    let args = [
        TOPIC.to_owned(),
        options.producers.to_string(),
        options.size.to_string(),
        options.in_flight.to_string(),
        options.seconds.to_string(),
        options.warm_up.to_string(),
    ];
    let cpu = tools_cpu()?;
    let out = run(broker.tools.bench("-Xmx4G", "connections", &args)).await?;
    let result = kafka::result(&out)?;
    Ok(Outcome {
        measured: result.get("measured")?,
        elapsed: Duration::from_nanos(result.get("elapsed_ns")?),
        sent: result.get("sent")?,
        acked: result.get("acked")?,
        errors: result.get("errors")?,
        client_cpu: tools_cpu()? - cpu,
    })
}
