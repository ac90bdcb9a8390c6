//! Produce and fetch side by side: in each round each broker starts on an empty folder, warms up, takes the load, and is
//! measured from outside.

use anyhow::Result;

use crate::Bench;
use crate::fetch::fetch;
use crate::peer::{Durability, Peer, Topic};
use crate::produce::{Load, Payloads, produce};
use crate::table::{Goal, Report};

/// What to run, and what must come of it.
pub(crate) struct Plan {
    pub(crate) title: &'static str,
    pub(crate) durability: Durability,
    pub(crate) partitions: u32,
    pub(crate) linger_ms: u64,
    pub(crate) cases: Vec<Case>,
    /// Millrace's records/s over Kafka's. `None`: not wanted, produce only to have something to fetch.
    pub(crate) produce: Option<f64>,
    /// As above; `None`: don't fetch.
    pub(crate) fetch: Option<f64>,
}

pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) size: usize,
    pub(crate) records: u64,
    pub(crate) batch_bytes: usize,
}

const MIB: f64 = 1024.0 * 1024.0;

pub(crate) async fn throughput(bench: &Bench, plan: &Plan) -> Result<Report> {
    let mut report = Report::new(plan.title, crate::KAFKA);
    for case in &plan.cases {
        let payloads = Payloads::new(&bench.work, case.size)?;
        for peer in bench.turns(&case.name) {
            round(bench, plan, case, &payloads, peer, &mut report).await?;
        }
    }
    Ok(report)
}

async fn round(
    bench: &Bench,
    plan: &Plan,
    case: &Case,
    payloads: &Payloads,
    peer: Peer,
    report: &mut Report,
) -> Result<()> {
    const TOPIC: &str = "measured";
    const WARM_UP: &str = "warm-up";
    let topics = vec![
        Topic::new(TOPIC, plan.partitions),
        Topic::new(WARM_UP, plan.partitions),
    ];
    let broker = bench.peers.start(peer, plan.durability, topics).await?;
    let load = |topic: &str, records| Load {
        topic: topic.to_owned(),
        records,
        linger_ms: plan.linger_ms,
        batch_bytes: case.batch_bytes,
        buffer_bytes: None,
    };
    let warm_up = (case.records / 5).max(1);
    produce(&broker.target(), &load(WARM_UP, warm_up), payloads).await?;
    let mut add = |metric: &str, goal, value| {
        report.add(peer, format!("{}: {metric}", case.name), goal, value)
    };

    let before = broker.process().settled().await?;
    let produced = produce(&broker.target(), &load(TOPIC, case.records), payloads).await?;
    let after = broker.process().settled().await?;
    if let Some(times) = plan.produce {
        let bytes = case.records as f64 * case.size as f64;
        add(
            "produce, records/s",
            Some(Goal::RatioAtLeast(times)),
            produced.records_per_s,
        );
        add(
            "produce, MiB/s",
            None,
            produced.records_per_s * case.size as f64 / MIB,
        );
        add(
            "produce, CPU of the broker, s",
            None,
            (after.cpu - before.cpu).as_secs_f64(),
        );
        add(
            "produce, CPU of the client, s",
            None,
            produced.client_cpu.as_secs_f64(),
        );
        add(
            "bytes written to disk / bytes produced",
            Some(Goal::AtMost(2.1)),
            after.written.saturating_sub(before.written) as f64 / bytes,
        );
        add(
            "broker's memory after produce, MiB",
            None,
            after.rss as f64 / MIB,
        );
        add(
            "broker's peak memory, MiB",
            Some(Goal::RatioAtMost(0.25)),
            after.peak_rss as f64 / MIB,
        );
    }
    if let Some(times) = plan.fetch {
        fetch(&broker, WARM_UP, warm_up, case.size).await?;
        let before = broker.process().usage()?;
        let fetched = fetch(&broker, TOPIC, case.records, case.size).await?;
        let after = broker.process().usage()?;
        add(
            "fetch, records/s",
            Some(Goal::RatioAtLeast(times)),
            fetched.records_per_s,
        );
        add(
            "fetch, MiB/s",
            None,
            fetched.records_per_s * case.size as f64 / MIB,
        );
        add(
            "fetch, CPU of the broker, s",
            None,
            (after.cpu - before.cpu).as_secs_f64(),
        );
        add(
            "fetch, CPU of the client, s",
            None,
            fetched.client_cpu.as_secs_f64(),
        );
        add(
            "broker's peak memory with fetch, MiB",
            Some(Goal::RatioAtMost(0.25)),
            after.peak_rss as f64 / MIB,
        );
    }
    broker.stop().await?;
    Ok(())
}
