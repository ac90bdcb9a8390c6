//! From produce to consume at a steady rate.
//!
//! Producer and consumer are one process, so that one clock measures both ends. KafkaBench.java does the same for Kafka.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use millrace_client::{Acks, StartFrom};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::Bench;
use crate::pace::{Latencies, Pace};
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

struct Measured {
    sent: u64,
    acked: u64,
    received: u64,
    latencies: Latencies,
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
        let Measured {
            sent,
            acked,
            received,
            latencies,
        } = measured;
        let (total, timed) = (options.total(), options.rate * options.seconds);
        ensure!(
            [sent, acked, received, latencies.count] == [total, total, total, timed],
            "of {total} records {sent} were sent, {acked} acknowledged, {received} received, and of {timed} to be timed {} were",
            latencies.count
        );
        latencies.add_to(&mut report, peer, "", Some(Goal::RatioAtMost(0.5)));
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

async fn ours(broker: &millrace::Broker, options: &Options) -> Result<Measured> {
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
    let pace = Pace {
        topic: TOPIC,
        size: usize::try_from(options.size)?,
        rate: options.rate,
        epoch,
        start,
    };
    let schedule = {
        let (total, runtime) = (options.total(), Handle::current());
        move || {
            let sent = pace.send(&producer, &runtime, |sent| sent < total, |_| {});
            if sent.is_err() {
                // The receiver is gone if it failed first, and then there is nothing to tell it.
                let _ = failed.blocking_send(());
            }
            sent
        }
    };
    let sender = tokio::task::spawn_blocking(schedule);

    let measure_from = start + Duration::from_secs(options.warm_up);
    let mut histogram = Latencies::histogram()?;
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
    Ok(Measured {
        sent: options.total(),
        acked,
        received,
        latencies: Latencies::of(&histogram),
    })
}

async fn theirs(broker: &kafka::Broker, options: &Options) -> Result<Measured> {
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
    Ok(Measured {
        sent: result.get("sent")?,
        acked: result.get("acked")?,
        received: result.get("received")?,
        latencies: Latencies::theirs(&result)?,
    })
}
