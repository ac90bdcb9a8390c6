//! What more partitions cost three brokers that all hold all of them: start, throughput, latency at a steady rate, memory, and a broker that is killed.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::time::sleep;

use crate::Bench;
use crate::live::{self, Live};
use crate::peer::{Peer, Topic};
use crate::produce::{Load, Payloads, produce};
use crate::table::Report;
use crate::trio::{Partition, REPLICAS};

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How many partitions, one after the other.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 100, 1_000, 10_000])]
    partitions: Vec<u32>,
    /// Bytes of each value, at least 8.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(8..))]
    size: u32,
    /// Bytes of values to send as fast as they go, in MB.
    #[arg(long, default_value_t = 500)]
    volume_mb: u64,
    /// Records a second for latencies and while a broker dies, each partition in turn.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..))]
    live_rate: u32,
    /// How long latencies are measured.
    #[arg(long, default_value_t = 15)]
    seconds: u64,
}

const TOPIC: &str = "growing";
const VICTIM: i32 = 2;
const WARM_UP: Duration = Duration::from_secs(5);
/// Longer than any of these steps takes with either broker.
const WITHIN: Duration = Duration::from_secs(300);

pub(crate) async fn growth(bench: &Bench, options: &Options) -> Result<Vec<Report>> {
    let payloads = Payloads::new(&bench.work, options.size as usize)?;
    let mut reports = Vec::new();
    for partitions in &options.partitions {
        let title = format!("{partitions} partitions, three brokers, replication factor 3");
        let mut report = Report::new(title, crate::KAFKA);
        for peer in bench.turns(&format!("{partitions} partitions")) {
            round(bench, options, *partitions, &payloads, peer, &mut report).await?;
        }
        reports.push(report);
    }
    Ok(reports)
}

async fn round(
    bench: &Bench,
    options: &Options,
    partitions: u32,
    payloads: &Payloads,
    peer: Peer,
    report: &mut Report,
) -> Result<()> {
    const MIB: f64 = 1024.0 * 1024.0;
    let begun = Instant::now();
    let topics = [Topic::new(TOPIC, partitions)];
    let mut trio = bench.peers.start_three(peer, false, &topics).await?;
    let whole = |partition: &Partition| partition.leader.is_some() && partition.in_sync == REPLICAS;
    trio.until(TOPIC, WITHIN, "whole", whole).await?;
    let mut add = |metric: &str, value| report.add(peer, metric, None, value);
    add(
        "brokers started, topic made, all replicas in sync, s",
        begun.elapsed().as_secs_f64(),
    );
    let resident: u64 = trio.usage()?.iter().map(|usage| usage.rss).sum();
    add(
        "memory of the three brokers, idle, MiB",
        resident as f64 / MIB,
    );

    let target = trio.target();
    let load = Load {
        topic: TOPIC.to_owned(),
        records: options.volume_mb * 1_000_000 / u64::from(options.size),
        linger_ms: 5,
        batch_bytes: 128 << 10,
        buffer_bytes: Some(32 << 20),
    };
    let produced = produce(&target, &load, payloads).await?;
    add("records/s, acks=all", produced.records_per_s);
    let peak: u64 = trio.usage()?.iter().map(|usage| usage.peak_rss).sum();
    add("… memory, peak, MiB", peak as f64 / MIB);

    let live = live::Load {
        size: payloads.size,
        rate: options.live_rate.into(),
        linger: Duration::ZERO,
        round_robin: true,
    };
    let mut live = Live::start(&target, TOPIC, live).await?;
    sleep(WARM_UP).await;
    live.latencies().await?;
    sleep(Duration::from_secs(options.seconds)).await;
    let steady = live.latencies().await?;
    steady.add_to(report, peer, "steady rate, ", None);

    let begun = Instant::now();
    trio.kill(VICTIM)?;
    let replaced = |partition: &Partition| partition.leader.is_some_and(|id| id != VICTIM);
    trio.until(TOPIC, WITHIN, "replaced", replaced).await?;
    // Records that waited are acknowledged by then.
    sleep(WARM_UP).await;
    let during = live.latencies().await?;
    during.add_to(report, peer, "a broker killed, ", None);
    let mut add = |metric: &str, value| report.add(peer, metric, None, value);
    let started = Instant::now();
    trio.start_ended()?;
    trio.until(TOPIC, WITHIN, "in sync again", whole).await?;
    add(
        "… started again until all replicas are in sync, s",
        started.elapsed().as_secs_f64(),
    );
    let written = load.records + live.stop().await?;
    let held = target.records_in(TOPIC).await?;
    ensure!(
        held == written,
        "{written} records were acknowledged, and the topic has {held}, {:.0?} after a broker was killed",
        begun.elapsed()
    );
    trio.stop().await
}
