//! Compaction by key: how long until of each key one record is left, what the disk had to write for that, and what producers notice.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use millrace_client::{Acks, Record};
use millrace_e2e::disk_usage;
use tokio::time::sleep;

use crate::Bench;
use crate::peer::{Durability, Target, Topic, run};
use crate::table::Report;

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Keys.
    #[arg(long, default_value_t = 1_000_000)]
    keys: u64,
    /// Records of each key, one round of all keys after the other.
    #[arg(long, default_value_t = 5)]
    versions: u64,
    /// Bytes of each value.
    #[arg(long, default_value_t = 100)]
    size: usize,
    #[arg(long, default_value_t = 6)]
    partitions: u32,
}

const TOPIC: &str = "compacted";
/// How often the size is looked at.
const LOOK: Duration = Duration::from_millis(250);
const WITHIN: Duration = Duration::from_secs(1800);
/// Kafka never compacts its newest segment, of 16 MiB here.
const SEGMENT: u64 = 16 << 20;
/// What a record takes besides its key and value, and what is not of the topic.
const OVERHEAD: u64 = 24;
const REST: u64 = 96 << 20;

pub(crate) async fn compaction(bench: &Bench, options: &Options) -> Result<Report> {
    let title = format!(
        "Compaction: {} records of {} B of each of {} keys, in {} partitions",
        options.versions, options.size, options.keys, options.partitions
    );
    let mut report = Report::new(title, crate::KAFKA);
    let record = options.size as u64 + 8 + OVERHEAD;
    // With a tenth more that was not looked at.
    let small = options.keys * record * 11 / 10 + u64::from(options.partitions) * SEGMENT + REST;
    let produced = options.keys * options.versions * record;
    for peer in bench.turns("compaction") {
        let topics = vec![Topic::compacted(TOPIC, options.partitions)];
        let broker = bench.peers.start(peer, Durability::Os, topics).await?;
        let begun = Instant::now();
        load(&broker.target(), options).await?;
        let written = begun.elapsed();
        let largest = disk_usage(broker.folder());
        while disk_usage(broker.folder()) > small {
            ensure!(
                begun.elapsed() < WITHIN,
                "{} bytes are left after {WITHIN:?}, and no more than {small} should be",
                disk_usage(broker.folder())
            );
            sleep(LOOK).await;
        }
        let compacted = begun.elapsed() - written;
        let usage = broker.process().settled().await?;
        let mut add = |metric: &str, value: f64| report.add(peer, metric, None, value);
        let records = (options.keys * options.versions) as f64;
        add(
            "records/s while it compacts",
            records / written.as_secs_f64(),
        );
        add("size when all is written, MB", largest as f64 / 1e6);
        add(
            "s more until about one record of each key is left",
            compacted.as_secs_f64(),
        );
        add("size then, MB", disk_usage(broker.folder()) as f64 / 1e6);
        add(
            "bytes written for each byte produced",
            usage.written as f64 / produced as f64,
        );
        add("CPU, s", usage.cpu.as_secs_f64());
        add(
            "peak memory, MiB",
            usage.peak_rss as f64 / f64::from(1 << 20),
        );
        broker.stop().await?;
    }
    Ok(report)
}

async fn load(target: &Target, options: &Options) -> Result<()> {
    match target {
        Target::Millrace(bootstrap) => {
            let client = bootstrap.client().await?;
            let producer = client.producer().acks(Acks::All);
            let producer = producer.linger(Duration::from_millis(5)).build().await?;
            let value = bytes::Bytes::from(vec![7_u8; options.size]);
            for _ in 0..options.versions {
                for key in 0..options.keys {
                    let mut record = Record::to(TOPIC).value(value.clone());
                    record.key = Some(key.to_be_bytes().to_vec().into());
                    drop(producer.send(record).await?);
                }
            }
            producer.close(Duration::from_secs(60)).await?;
        }
        Target::Kafka(tools) => {
            let args = [
                TOPIC.to_owned(),
                options.keys.to_string(),
                options.versions.to_string(),
                options.size.to_string(),
            ];
            run(tools.bench("-Xmx512m", "keyed", &args)).await?;
        }
    }
    Ok(())
}
