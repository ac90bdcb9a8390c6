//! Very many partitions in one broker: how long it takes to start, and to start again after a clean stop and after kill -9 under
//! light load; what it holds while idle; what it still takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use millrace_client::{Acks, Record};
use tokio::task::JoinSet;
use tokio::time::{interval, sleep};

use crate::Bench;
use crate::peer::{Broker, Durability, Peer, Topic, run};
use crate::produce::{Load, Payloads, produce};
use crate::table::Report;

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    #[arg(long, default_value_t = 10_000)]
    partitions: u32,
    /// Records to produce over all of them.
    #[arg(long, default_value_t = 1_000_000)]
    records: u64,
    /// Bytes of each value.
    #[arg(long, default_value_t = 1_000)]
    size: usize,
}

const TOPIC: &str = "partitions";
const LIGHT_LOAD: Duration = Duration::from_secs(5);
const LIGHT_LOAD_PER_S: u32 = 1_000;

pub(crate) async fn partitions(bench: &Bench, options: &Options) -> Result<Report> {
    let mut report = Report::new(
        format!("{} partitions in one broker", options.partitions),
        crate::KAFKA,
    );
    let payloads = Payloads::new(&bench.work, options.size)?;
    for peer in bench.turns("partitions") {
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
    const MIB: f64 = 1024.0 * 1024.0;
    let mut add = |metric: &str, value| report.add(peer, metric, None, value);
    let started = Instant::now();
    let topics = vec![Topic::new(TOPIC, options.partitions)];
    let broker = bench.peers.start(peer, Durability::Os, topics).await?;
    // With Kafka's tools that format the folder and make the topic, a JVM each.
    add(
        "first start, with the topic made, s",
        started.elapsed().as_secs_f64(),
    );
    ensure!(
        broker.target().records_in(TOPIC).await? == 0,
        "a new topic holds records"
    );
    let idle = broker.process().settled().await?;
    add("idle memory, MiB", idle.rss as f64 / MIB);
    add("idle open files", idle.open_files as f64);

    let stopped = Instant::now();
    let site = broker.stop().await?;
    add("clean stop, s", stopped.elapsed().as_secs_f64());
    let started = Instant::now();
    let broker = bench.peers.restart(peer, site).await?;
    add(
        "start after a clean stop, s",
        started.elapsed().as_secs_f64(),
    );
    broker.target().records_in(TOPIC).await?;

    let (acked, load) = light_load(&broker, options, payloads).await?;
    let site = broker.kill();
    drop(load);
    let started = Instant::now();
    let broker = bench.peers.restart(peer, site).await?;
    add("start after kill -9, s", started.elapsed().as_secs_f64());
    let held = broker.target().records_in(TOPIC).await?;
    let acked = acked.load(Ordering::Relaxed);
    ensure!(
        held >= acked,
        "{acked} records were acknowledged before kill -9, and {held} are left"
    );

    let load = Load {
        topic: TOPIC.to_owned(),
        records: options.records,
        linger_ms: 5,
        batch_bytes: 16 * 1024,
        buffer_bytes: None,
    };
    let produced = produce(&broker.target(), &load, payloads).await?;
    add(
        "produce over all partitions, records/s",
        produced.records_per_s,
    );
    let usage = broker.process().usage()?;
    add("peak memory, MiB", usage.peak_rss as f64 / MIB);
    add("open files after produce", usage.open_files as f64);
    broker.stop().await?;
    Ok(())
}

/// Lets a slow producer run for a while and returns while it still runs, with the count of what it has acknowledged. For
/// Kafka, whose tool tells no count before its end, that stays 0.
async fn light_load(
    broker: &Broker,
    options: &Options,
    payloads: &Payloads,
) -> Result<(Arc<AtomicU64>, JoinSet<Result<()>>)> {
    let acked = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    match broker {
        Broker::Millrace(broker) => {
            let producer = broker
                .client()
                .await?
                .producer()
                .acks(Acks::All)
                .build()
                .await?;
            let (count, partitions, size) = (Arc::clone(&acked), options.partitions, options.size);
            tasks.spawn(async move {
                let mut random = fastrand::Rng::with_seed(13);
                let mut ticks = interval(Duration::from_secs(1) / LIGHT_LOAD_PER_S);
                let mut answers = JoinSet::new();
                loop {
                    ticks.tick().await;
                    let partition = i32::try_from(random.u32(..partitions))?;
                    let record = Record::to(TOPIC).partition(partition).value(vec![0; size]);
                    let delivery = producer.send(record).await?;
                    let count = Arc::clone(&count);
                    answers.spawn(async move {
                        if delivery.await.is_ok() {
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                    while answers.try_join_next().is_some() {}
                }
            });
        }
        Broker::Kafka(broker) => {
            let records = u64::from(LIGHT_LOAD_PER_S) * 3_600;
            let properties = ["acks=all".to_owned()];
            let rate = LIGHT_LOAD_PER_S.into();
            let tool =
                broker
                    .tools
                    .producer_tool(TOPIC, records, &payloads.file(), rate, &properties);
            tasks.spawn(async move { run(tool).await.map(drop) });
        }
    }
    sleep(LIGHT_LOAD).await;
    if let Some(ended) = tasks.try_join_next() {
        ended??;
    }
    if matches!(broker, Broker::Millrace(_)) {
        ensure!(
            acked.load(Ordering::Relaxed) > 0,
            "nothing was acknowledged in {LIGHT_LOAD:?}"
        );
    }
    Ok((acked, tasks))
}
