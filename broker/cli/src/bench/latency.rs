//! `millrace bench latency`: how long a record takes from the producer, through the broker, to a consumer that waits for it.

use std::time::{Duration, Instant};

use clap::Args;
use millrace_client::millrace_record::Record;
use millrace_client::{Bytes, Client, ConsumedRecord, Consumer, Error, StartFrom, TopicInfo};

use super::load::{self, Bounds, Load, LoadOptions, Schedule, parse_rate};
use super::report::{Latencies, Report, ReportLayout};
use crate::connection::{self, Connection};
use crate::failure::Failure;
use crate::produce::ProducerSettings;

/// Each value begins with the run's number and the record's index.
const STAMP_BYTES: usize = 16;
/// How long the last records may be on their way.
const LAST_RECORDS: Duration = Duration::from_secs(10);

/// Measure how long records take from producer to consumer.
#[derive(Debug, Args)]
#[command(after_help = "Without --records and --duration it runs for 10 s after the warm-up.")]
pub(super) struct Latency {
    #[command(flatten)]
    load: LoadOptions,

    /// Records a second, each due at its time
    #[arg(long, default_value = "1000", value_name = "N", value_parser = parse_rate)]
    rate: f64,

    /// Records of this first time are not counted
    #[arg(long, default_value = "2s", value_name = "TIME", value_parser = humantime::parse_duration)]
    warm_up: Duration,

    /// How to print
    #[arg(long, short = 'o', value_enum, default_value = "text")]
    output: ReportLayout,

    #[command(flatten)]
    settings: ProducerSettings,
}

impl Latency {
    pub(super) async fn run(self, connection: &Connection) -> Result<(), Failure> {
        let size = self.load.value_bytes()?.max(STAMP_BYTES);
        let client = connection.open().await?;
        let topic = connection::describe(&client, &self.load.topic).await?;
        let mut consumer = at_the_end(&client, &topic).await?;
        let producer = self.settings.build(&client).await?;
        let bounds = self.bounds();
        let run = fastrand::u64(..);
        let letters = load::letters();
        let schedule = Schedule {
            start: Instant::now(),
            rate: Some(self.rate),
        };
        let value = move |index| stamped(run, index, &letters, size);
        let load = load::start(producer.clone(), &topic.name, bounds, schedule, value);
        let acknowledged = tokio::spawn(acknowledge(
            load,
            schedule.start + self.warm_up,
            Latencies::new()?,
        ));

        let mut received = Received {
            run,
            schedule,
            count_from: schedule.start + self.warm_up,
            records: 0,
            latencies: Latencies::new()?,
        };
        let mut acknowledged = std::pin::pin!(acknowledged);
        let sent = loop {
            tokio::select! {
                record = consumer.next_record() => received.note(record)?,
                sent = &mut acknowledged => break sent,
            }
        };
        let sent =
            sent.map_err(|error| Failure::new("the producing half failed").because(error))??;
        let deadline = tokio::time::Instant::now() + LAST_RECORDS;
        while received.records < sent.records {
            match tokio::time::timeout_at(deadline, consumer.next_record()).await {
                Ok(record) => received.note(record)?,
                Err(_) => {
                    let missing = sent.records - received.records;
                    return Err(Failure::new(format!(
                        "{missing} of {} acknowledged records were not received within {LAST_RECORDS:?}",
                        sent.records
                    )));
                }
            }
        }
        let took = schedule.start.elapsed();
        producer.close(self.settings.delivery_timeout()).await?;
        Report::new(
            "latency",
            &topic.name,
            sent.records,
            sent.records * size as u64,
            took,
        )
        .with("end to end, from when due to received", &received.latencies)
        .with("produce, from when due to acknowledged", &sent.latencies)
        .print(self.output)
    }

    fn bounds(&self) -> Bounds {
        let measured = self.load.bounds(Bounds {
            records: u64::MAX,
            duration: Duration::from_secs(10),
        });
        let warm_up = (self.warm_up.as_secs_f64() * self.rate).ceil() as u64;
        Bounds {
            records: measured.records.saturating_add(warm_up),
            duration: measured.duration.saturating_add(self.warm_up),
        }
    }
}

/// A consumer of what comes from now on. It starts at known offsets, so that not even the first record is missed.
async fn at_the_end(client: &Client, topic: &TopicInfo) -> Result<Consumer, Failure> {
    let mut consumer = client
        .consumer()
        .topic(topic.name.as_str())
        .start(StartFrom::Latest)
        .build()
        .await?;
    for info in &topic.partitions {
        consumer
            .seek(
                &topic.name,
                info.partition,
                StartFrom::Offset(connection::extent(&topic.name, info)?.high_watermark),
            )
            .await?;
    }
    Ok(consumer)
}

fn stamped(run: u64, index: u64, letters: &Bytes, size: usize) -> Bytes {
    let mut value = Vec::with_capacity(size);
    value.extend_from_slice(&run.to_be_bytes());
    value.extend_from_slice(&index.to_be_bytes());
    value.extend_from_slice(&load::cut(letters, size - STAMP_BYTES));
    value.into()
}

/// The record's index, if it is of this run.
fn index_of(run: u64, record: &Record) -> Option<u64> {
    let (stamp, rest) = record.value.as_ref()?.split_first_chunk::<8>()?;
    let (index, _) = rest.split_first_chunk::<8>()?;
    (u64::from_be_bytes(*stamp) == run).then(|| u64::from_be_bytes(*index))
}

struct Sent {
    records: u64,
    latencies: Latencies,
}

async fn acknowledge(
    mut load: Load,
    count_from: Instant,
    latencies: Latencies,
) -> Result<Sent, Failure> {
    let mut sent = Sent {
        records: 0,
        latencies,
    };
    while let Some(group) = load.next().await? {
        for record in group {
            record.delivery.await?;
            sent.records += 1;
            if record.due >= count_from {
                sent.latencies.record(record.due.elapsed());
            }
        }
    }
    Ok(sent)
}

struct Received {
    run: u64,
    schedule: Schedule,
    count_from: Instant,
    records: u64,
    latencies: Latencies,
}

impl Received {
    fn note(&mut self, record: Option<Result<ConsumedRecord, Error>>) -> Result<(), Failure> {
        let Some(record) = record else {
            return Err(Failure::new("the consumer ended early"));
        };
        let record = record?;
        let due = index_of(self.run, &record.record).and_then(|index| self.schedule.due(index));
        if let Some(due) = due {
            self.records += 1;
            if due >= self.count_from {
                self.latencies.record(due.elapsed());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_records_of_this_run_are_known_again() {
        let letters = load::letters();
        let record = |value: Option<Bytes>| Record {
            offset: 0,
            timestamp_ms: 0,
            key: None,
            value,
            headers: Vec::new(),
        };
        for size in [16, 100] {
            let value = stamped(7, 42, &letters, size);
            assert_eq!(value.len(), size);
            assert_eq!(index_of(7, &record(Some(value.clone()))), Some(42));
            assert_eq!(index_of(8, &record(Some(value))), None);
        }
        assert_eq!(index_of(7, &record(Some("short".into()))), None);
        assert_eq!(index_of(7, &record(None)), None);
    }
}
