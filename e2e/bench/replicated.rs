//! One producer, as fast as it can, to three brokers that all hold all of it.

use std::time::Duration;

use anyhow::Result;
use millrace_e2e::daemon::Usage;

use crate::Bench;
use crate::peer::Topic;
use crate::produce::{Load, Payloads, produce};
use crate::table::{Goal, Report};

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Bytes of each value.
    #[arg(long, default_value_t = 1_000)]
    size: usize,
    /// Bytes of values to send, in MB.
    #[arg(long, default_value_t = 1_000)]
    volume_mb: u64,
    #[arg(long, default_value_t = 6)]
    partitions: u32,
    #[arg(long, default_value_t = 5)]
    linger_ms: u64,
    #[arg(long, default_value_t = 128)]
    batch_kib: usize,
    /// Records that wait in the producer, of either kind, in MiB: what is measured as p99 is above all the wait there.
    #[arg(long, default_value_t = 32)]
    buffer_mib: usize,
}

const TOPIC: &str = "measured";
const WARM_UP: &str = "warm-up";
const MIB: f64 = 1024.0 * 1024.0;

pub(crate) async fn replicated(bench: &Bench, options: &Options) -> Result<Report> {
    let title = format!(
        "One producer of {} B, acks=all, three brokers, replication factor 3",
        options.size
    );
    let mut report = Report::new(title, crate::KAFKA);
    let payloads = Payloads::new(&bench.work, options.size)?;
    let records = options.volume_mb * 1_000_000 / options.size.max(1) as u64;
    for peer in bench.turns("replicated") {
        let topics = [TOPIC, WARM_UP].map(|name| Topic::new(name, options.partitions));
        let mut trio = bench.peers.start_three(peer, false, &topics).await?;
        let load = |topic: &str, records| Load {
            topic: topic.to_owned(),
            records,
            linger_ms: options.linger_ms,
            batch_bytes: options.batch_kib << 10,
            buffer_bytes: Some(options.buffer_mib << 20),
        };
        let target = trio.target();
        produce(&target, &load(WARM_UP, records / 5), &payloads).await?;
        let before = Sum::of(&trio.usage()?);
        let produced = produce(&target, &load(TOPIC, records), &payloads).await?;
        let after = Sum::of(&trio.usage()?);
        let mut add = |metric: &str, goal, value| report.add(peer, metric, goal, value);
        let per_s = produced.records_per_s;
        add("records/s", Some(Goal::RatioAtLeast(1.5)), per_s);
        add("MiB/s", None, per_s * options.size as f64 / MIB);
        let p99 = produced.p99.as_secs_f64() * 1_000.0;
        add("p99, ms", Some(Goal::RatioAtMost(1.0)), p99);
        let cpu = (after.cpu - before.cpu).as_secs_f64();
        add("CPU of the three brokers, s", None, cpu);
        let client_cpu = produced.client_cpu.as_secs_f64();
        add("CPU of the client, s", None, client_cpu);
        let peak = after.peak_rss as f64 / MIB;
        add("peak memory of the three brokers, MiB", None, peak);
        trio.stop().await?;
    }
    Ok(report)
}

/// Of several brokers.
struct Sum {
    cpu: Duration,
    peak_rss: u64,
}

impl Sum {
    fn of(usages: &[Usage]) -> Self {
        Self {
            cpu: usages.iter().map(|usage| usage.cpu).sum(),
            peak_rss: usages.iter().map(|usage| usage.peak_rss).sum(),
        }
    }
}
