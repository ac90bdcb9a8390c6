//! One consumer reads a topic from its beginning, as fast as it can. Kafka's load is its own ConsumerPerformance.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millrace_client::{Client, StartFrom};

use crate::peer::{Broker, own_cpu, run, tools_cpu};

/// What came of it. Just as many records came as there are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fetched {
    pub(crate) records_per_s: f64,
    pub(crate) client_cpu: Duration,
}

/// Reads `records` records of `size` bytes each.
pub(crate) async fn fetch(
    broker: &Broker,
    topic: &str,
    records: u64,
    size: usize,
) -> Result<Fetched> {
    match broker {
        Broker::Millrace(broker) => millrace(&broker.client().await?, topic, records, size).await,
        Broker::Kafka(broker) => {
            let mut tool = broker.tools.tool("ConsumerPerformance");
            tool.args(["--topic", topic, "--messages", &records.to_string()]);
            tool.args(["--timeout", "60000", "--hide-header"]);
            let cpu = tools_cpu()?;
            let out = run(tool).await?;
            let client_cpu = tools_cpu()? - cpu;
            Ok(Fetched {
                records_per_s: kafka_result(&out, records)?,
                client_cpu,
            })
        }
    }
}

async fn millrace(client: &Client, topic: &str, records: u64, size: usize) -> Result<Fetched> {
    const LIMIT: Duration = Duration::from_secs(1_800);
    let (start, cpu) = (Instant::now(), own_cpu()?);
    let mut consumer = client
        .consumer()
        .topic(topic)
        .start(StartFrom::Earliest)
        .build()
        .await?;
    let read = async {
        for n in 0..records {
            let next = consumer.next_record().await;
            let next =
                next.with_context(|| format!("the stream ended after {n} of {records} records"))??;
            let length = next.record.value.as_ref().map_or(0, |value| value.len());
            ensure!(length == size, "record {n} has {length} bytes, not {size}");
        }
        Ok(())
    };
    tokio::time::timeout(LIMIT, read)
        .await
        .with_context(|| format!("{records} records did not come in {LIMIT:?}"))??;
    let elapsed = start.elapsed();
    Ok(Fetched {
        records_per_s: records as f64 / elapsed.as_secs_f64(),
        client_cpu: own_cpu()? - cpu,
    })
}

/// Takes the fetch phase alone, without the seconds for joining a group: what is best for Kafka.
fn kafka_result(out: &str, records: u64) -> Result<f64> {
    // start, end, MB, MB/s, records, records/s, ms of rebalance, ms of fetch, MB/s of fetch, records/s of fetch
    let line = out.lines().rfind(|line| line.split(", ").count() == 10);
    let line = line.with_context(|| format!("ConsumerPerformance printed no total:\n{out}"))?;
    let fields: Vec<_> = line.split(", ").collect();
    let read: u64 = fields[4].parse()?;
    ensure!(
        read == records,
        "Kafka's consumer read {read} of {records} records"
    );
    Ok(fields[9].parse()?)
}
