//! One of three brokers comes back with an empty volume and fetches everything anew: what live traffic notices of that, and how long it takes.
//!
//! The topic is filled, and a producer writes to it at a rate from then on, with acks=all: first undisturbed. Then a broker is killed and its
//! records are deleted. Once the other two lead all partitions without it, it is started again; the catch-up lasts from there, the start of its
//! process included, until it is in sync again on all partitions. That a killed leader is replaced is not measured here: `failover` does. The
//! high rate of `--live-rate` asks the other question: that live traffic does not starve the catch-up.
//!
//! Kafka's node loses the logs of all topics, but keeps its identity and what it knows as a controller, which on Millrace's side is not the
//! broker's to lose.

use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::time::sleep;

use crate::Bench;
use crate::live::{self, Live};
use crate::peer::{Peer, Topic};
use crate::produce::{Load, Payloads, produce};
use crate::table::{Goal, Report};
use crate::trio::{Partition, REPLICAS};

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// What the topic holds before, in GiB of values.
    #[arg(long, default_value_t = 2.0)]
    fill_gib: f64,
    /// Bytes of each value, at least 8.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(8..))]
    size: u32,
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..))]
    partitions: u32,
    /// Records a second that are written meanwhile.
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..))]
    live_rate: u32,
    /// How long live traffic is measured undisturbed.
    #[arg(long, default_value_t = 20)]
    seconds: u64,
    /// The longest that the catch-up may take, in seconds.
    #[arg(long, default_value_t = 600)]
    within: u64,
}

const TOPIC: &str = "caught-up";
/// Whose data is deleted. Each leads a third of the partitions.
const VICTIM: i32 = 2;
/// For live traffic to get going, and again after the death of a leader.
const WARM_UP: Duration = Duration::from_secs(10);
/// How long the other two may take to lead all.
const REPLACED_WITHIN: Duration = Duration::from_secs(60);

pub(crate) async fn catchup(bench: &Bench, options: &Options) -> Result<Report> {
    let title = format!(
        "An empty broker fetches {} GiB in {} partitions, beside {} records/s of {} B, acks=all, replication factor {REPLICAS}",
        options.fill_gib, options.partitions, options.live_rate, options.size
    );
    let mut report = Report::new(title, crate::KAFKA);
    let payloads = Payloads::new(&bench.work, options.size as usize)?;
    for peer in bench.turns("catchup") {
        round(bench, options, &payloads, peer, &mut report).await?;
    }
    Ok(report)
}

async fn round(
    bench: &Bench,
    options: &Options,
    payloads: &Payloads,
    peer: Peer,
    report: &mut Report,
) -> Result<()> {
    let topics = [Topic::new(TOPIC, options.partitions)];
    let mut trio = bench.peers.start_three(peer, false, &topics).await?;
    let target = trio.target();
    let fill = Load {
        topic: TOPIC.to_owned(),
        records: (options.fill_gib * f64::from(1 << 30) / f64::from(options.size)) as u64,
        linger_ms: 5,
        batch_bytes: 128 << 10,
        buffer_bytes: Some(32 << 20),
    };
    produce(&target, &fill, payloads).await?;
    // What the system has yet to write of that would disturb.
    tokio::task::spawn_blocking(rustix::fs::sync).await?;

    let load = live::Load {
        size: payloads.size,
        rate: options.live_rate.into(),
        linger: Duration::ZERO,
        round_robin: false,
    };
    let mut live = Live::start(&target, TOPIC, load).await?;
    sleep(WARM_UP).await;
    live.latencies().await?;
    sleep(Duration::from_secs(options.seconds)).await;
    let before = live.latencies().await?;

    trio.kill(VICTIM)?;
    trio.wipe(VICTIM)?;
    let is_without_it = |partition: &Partition| {
        partition.leader.is_some_and(|leader| leader != VICTIM) && partition.in_sync < REPLICAS
    };
    trio.until(TOPIC, REPLACED_WITHIN, "replaced", is_without_it)
        .await?;
    sleep(WARM_UP).await;
    live.latencies().await?;

    trio.start_ended()?;
    let within = Duration::from_secs(options.within);
    let is_whole = |partition: &Partition| partition.in_sync == REPLICAS;
    let took = trio.until(TOPIC, within, "in sync again", is_whole).await?;
    let during = live.latencies().await?;
    let fetched = fill.records + live.acked();
    let written = fill.records + live.stop().await?;
    let held = target.records_in(TOPIC).await?;
    ensure!(
        held == written,
        "{written} records were acknowledged, but topic {TOPIC} has {held}"
    );
    trio.stop().await?;

    before.add_to(report, peer, "before, ", None);
    during.add_to(report, peer, "catch-up, ", Some(Goal::AtMost(50.0)));
    let seconds = took.as_secs_f64();
    let mut add =
        |metric: &str, value| report.add(peer, format!("catch-up, {metric}"), None, value);
    add("live records/s", during.count as f64 / seconds);
    add("s", seconds);
    let bytes = fetched as f64 * f64::from(options.size);
    add("fetched, MB/s", bytes / 1e6 / seconds);
    Ok(())
}
