//! From produce to consume at a steady rate.
//!
//! Records leave on a fixed schedule and carry the time at which they were due, not the time at which they left: a stall counts
//! for every record that it delays (no coordinated omission). Producer and consumer are one process, so that one clock
//! measures both ends. KafkaBench.java does the same for Kafka.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::stream::{FuturesUnordered, StreamExt};
use hdrhistogram::Histogram;
use millrace_client::{Acks, Bytes, Producer, Record, StartFrom};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::Bench;
use crate::peer::{Broker, Durability, Topic, kafka, millrace, run};
use crate::table::{Goal, Report};

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Records a second.
    #[arg(long, default_value_t = 20_000)]
    rate: u64,
    /// Bytes of each value, at least 8.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(8..))]
    size: u64,
    /// How long to measure.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// How long the load runs before that.
    #[arg(long, default_value_t = 5)]
    warm_up: u64,
}

const TOPIC: &str = "latency";
const PARTITIONS: u32 = 6;

struct Latencies {
    sent: u64,
    acked: u64,
    received: u64,
    measured: u64,
    p50: Duration,
    p99: Duration,
    p999: Duration,
    max: Duration,
}

pub(crate) async fn latency(bench: &Bench, options: &Options) -> Result<Report> {
    let title = format!(
        "End-to-end latency at {} records/s of {} B, acks=all",
        options.rate, options.size
    );
    let mut report = Report::new(title, crate::KAFKA);
    for peer in bench.turns("latency") {
        let topics = vec![Topic::new(TOPIC, PARTITIONS)];
        let broker = bench.peers.start(peer, Durability::Os, topics).await?;
        let measured = match &broker {
            Broker::Millrace(broker) => ours(broker, options).await?,
            Broker::Kafka(broker) => theirs(broker, options).await?,
        };
        let (total, timed) = (options.total(), options.rate * options.seconds);
        ensure!(
            [
                measured.sent,
                measured.acked,
                measured.received,
                measured.measured
            ] == [total, total, total, timed],
            "of {total} records {} were sent, {} acknowledged, {} received, and of {timed} to be timed {} were",
            measured.sent,
            measured.acked,
            measured.received,
            measured.measured
        );
        let half = Some(Goal::RatioAtMost(0.5));
        let ms = |time: Duration| time.as_secs_f64() * 1_000.0;
        report.add(peer, "p50, ms", half, ms(measured.p50));
        report.add(peer, "p99, ms", half, ms(measured.p99));
        report.add(peer, "p99.9, ms", half, ms(measured.p999));
        report.add(peer, "max, ms", None, ms(measured.max));
        let usage = broker.process().usage()?;
        report.add(
            peer,
            "broker's peak memory, MiB",
            Some(Goal::RatioAtMost(0.25)),
            usage.peak_rss as f64 / f64::from(1 << 20),
        );
        broker.stop().await?;
    }
    Ok(report)
}

impl Options {
    fn total(&self) -> u64 {
        self.rate * (self.seconds + self.warm_up)
    }
}

async fn ours(broker: &millrace::Broker, options: &Options) -> Result<Latencies> {
    let producer = broker
        .client()
        .await?
        .producer()
        .acks(Acks::All)
        .linger(Duration::ZERO);
    let producer = producer.build().await?;
    let consumer = broker
        .client()
        .await?
        .consumer()
        .topic(TOPIC)
        .start(StartFrom::Earliest);
    let mut consumer = consumer.build().await?;
    let epoch = Instant::now();
    let start = Duration::from_millis(100);
    let (failed, mut failure) = mpsc::channel(1);
    let schedule = {
        let (options, runtime) = (options.clone(), Handle::current());
        // A thread, not a task: the runtime's timer has a resolution of a millisecond.
        move || {
            let sent = send_on_schedule(&producer, &runtime, &options, epoch, start);
            if sent.is_err() {
                // The receiver is gone if it failed first, and then there is nothing to tell it.
                let _ = failed.blocking_send(());
            }
            sent
        }
    };
    let sender = tokio::task::spawn_blocking(schedule);

    let measure_from = start + Duration::from_secs(options.warm_up);
    let mut histogram = Histogram::<u64>::new(3)?;
    let mut received = 0;
    let receive = async {
        while received < options.total() {
            let next = tokio::select! {
                next = consumer.next_record() => next.context("the stream of records ended")??,
                Some(()) = failure.recv() => break,
            };
            received += 1;
            let value = next.record.value.unwrap_or_default();
            let due = value
                .first_chunk()
                .context("a record came back without its time")?;
            let due = Duration::from_nanos(u64::from_be_bytes(*due));
            if due >= measure_from {
                let latency = epoch.elapsed().saturating_sub(due);
                histogram.record(u64::try_from(latency.as_nanos())?)?;
            }
        }
        Ok::<_, anyhow::Error>(())
    };
    let limit = Duration::from_secs(options.seconds + options.warm_up + 60);
    if tokio::time::timeout(limit, receive).await.is_err() {
        bail!(
            "only {received} of {} records came back in {limit:?}",
            options.total()
        );
    }
    let acked = sender.await??;
    let at = |quantile| Duration::from_nanos(histogram.value_at_quantile(quantile));
    Ok(Latencies {
        sent: options.total(),
        acked,
        received,
        measured: histogram.len(),
        p50: at(0.5),
        p99: at(0.99),
        p999: at(0.999),
        max: Duration::from_nanos(histogram.max()),
    })
}

/// Sends all records and returns how many were acknowledged.
fn send_on_schedule(
    producer: &Producer,
    runtime: &Handle,
    options: &Options,
    epoch: Instant,
    start: Duration,
) -> Result<u64> {
    let interval = Duration::from_secs(1) / u32::try_from(options.rate)?;
    let (answered, mut answers) = mpsc::channel(1 << 16);
    let counter = runtime.spawn(async move {
        let mut pending = FuturesUnordered::new();
        let mut acked: u64 = 0;
        loop {
            tokio::select! {
                Some(delivery) = answers.recv() => pending.push(delivery),
                Some(answer) = pending.next() => {
                    let _: millrace_client::RecordMeta = answer?;
                    acked += 1;
                }
                else => return Ok::<_, millrace_client::Error>(acked),
            }
        }
    });
    let mut due = start;
    for _ in 0..options.total() {
        while let Some(early) = due
            .checked_sub(epoch.elapsed())
            .filter(|early| !early.is_zero())
        {
            thread::sleep(early);
        }
        let mut value = vec![0; usize::try_from(options.size)?];
        value[..8].copy_from_slice(&u64::try_from(due.as_nanos())?.to_be_bytes());
        let delivery =
            runtime.block_on(producer.send(Record::to(TOPIC).value(Bytes::from(value))))?;
        if answered.blocking_send(delivery).is_err() {
            break;
        }
        due += interval;
    }
    drop(answered);
    Ok(runtime.block_on(counter)??)
}

async fn theirs(broker: &kafka::Broker, options: &Options) -> Result<Latencies> {
    let args = [
        TOPIC.to_owned(),
        PARTITIONS.to_string(),
        options.size.to_string(),
        options.rate.to_string(),
        options.seconds.to_string(),
        options.warm_up.to_string(),
    ];
    let out = run(broker.tools.bench("-Xmx512M", "latency", &args)).await?;
    let result = kafka::result(&out)?;
    Ok(Latencies {
        sent: result.get("sent")?,
        acked: result.get("acked")?,
        received: result.get("received")?,
        measured: result.get("measured")?,
        p50: Duration::from_nanos(result.get("p50_ns")?),
        p99: Duration::from_nanos(result.get("p99_ns")?),
        p999: Duration::from_nanos(result.get("p999_ns")?),
        max: Duration::from_nanos(result.get("max_ns")?),
    })
}
