//! One transactional producer, one transaction after another: how many, and how long each takes from its first record until its end is settled.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use hdrhistogram::Histogram;
use millrace_client::Record;
use serde::Deserialize;

use crate::Bench;
use crate::peer::{Durability, Target, Topic, run};
use crate::table::Report;

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Records of each transaction.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 1_000])]
    records: Vec<u32>,
    /// Bytes of each value.
    #[arg(long, default_value_t = 1_000)]
    size: usize,
    /// Each transaction writes to all of them, if it has so many records.
    #[arg(long, default_value_t = 6)]
    partitions: u32,
    /// How long is measured, after as long again to warm up, but no more than 10 s.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

const TOPIC: &str = "transactions";

/// What came of it.
#[derive(Debug, Deserialize)]
struct Ended {
    transactions: u64,
    seconds: f64,
    p50_ns: u64,
    p99_ns: u64,
}

pub(crate) async fn transactions(bench: &Bench, options: &Options) -> Result<Report> {
    let title = format!(
        "Transactions of {} B records into {} partitions, one after another",
        options.size, options.partitions
    );
    let mut report = Report::new(title, crate::KAFKA);
    for peer in bench.turns("transactions") {
        let topics = vec![Topic::new(TOPIC, options.partitions)];
        let broker = bench.peers.start(peer, Durability::Os, topics).await?;
        for &records in &options.records {
            let ended = load(&broker.target(), options, records).await?;
            let mut add = |metric: &str, value| {
                report.add(
                    peer,
                    format!("{records} records each, {metric}"),
                    None,
                    value,
                );
            };
            let rate = ended.transactions as f64 / ended.seconds;
            add("transactions/s", rate);
            add("records/s", rate * f64::from(records));
            add("p50 ms", ended.p50_ns as f64 / 1e6);
            add("p99 ms", ended.p99_ns as f64 / 1e6);
        }
        broker.stop().await?;
    }
    Ok(report)
}

async fn load(target: &Target, options: &Options, records: u32) -> Result<Ended> {
    let (warm_up, seconds) = (options.seconds.min(10), options.seconds);
    match target {
        Target::Millrace(bootstrap) => {
            let client = bootstrap.client().await?;
            let producer = client.producer().linger(Duration::ZERO);
            let mut producer = producer.build_transactional("bench").await?;
            let value = Bytes::from(vec![7_u8; options.size]);
            let mut run = async |seconds| {
                let mut histogram = Histogram::<u64>::new(3)?;
                let begun = Instant::now();
                while begun.elapsed() < Duration::from_secs(seconds) {
                    let one = Instant::now();
                    let transaction = producer.begin().await?;
                    for record in 0..records {
                        let partition = i32::try_from(record % options.partitions)?;
                        let record = Record::to(TOPIC).partition(partition);
                        transaction.send(record.value(value.clone())).await?;
                    }
                    transaction.commit().await?;
                    histogram.record(u64::try_from(one.elapsed().as_nanos())?)?;
                }
                Ok::<_, anyhow::Error>(Ended {
                    transactions: histogram.len(),
                    seconds: begun.elapsed().as_secs_f64(),
                    p50_ns: histogram.value_at_quantile(0.5),
                    p99_ns: histogram.value_at_quantile(0.99),
                })
            };
            run(warm_up).await?;
            run(seconds).await
        }
        Target::Kafka(tools) => {
            let args = [
                TOPIC.to_owned(),
                options.partitions.to_string(),
                options.size.to_string(),
                records.to_string(),
                warm_up.to_string(),
                seconds.to_string(),
            ];
            let output = run(tools.bench("-Xmx512m", "transactions", &args)).await?;
            let line = output.lines().last().context("KafkaBench said nothing")?;
            let ended: Ended = serde_json::from_str(line)?;
            ensure!(ended.transactions > 0, "no transaction ended");
            Ok(ended)
        }
    }
}
