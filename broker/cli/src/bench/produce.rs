//! `millrace bench produce`: how fast records are stored, and how long each takes until it is acknowledged.

use std::time::{Duration, Instant};

use clap::Args;

use super::load::{self, Bounds, LoadOptions, Schedule, parse_rate};
use super::report::{Latencies, Report, ReportLayout};
use crate::connection::{self, Connection};
use crate::failure::Failure;
use crate::produce::ProducerSettings;

/// Measure how fast records are stored.
#[derive(Debug, Args)]
#[command(
    after_help = "Without --records and --duration it produces 1,000,000 records, or for 10 s if there is a --rate."
)]
pub(super) struct Produce {
    #[command(flatten)]
    load: LoadOptions,

    /// Records a second, each due at its time; by default as fast as possible
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    rate: Option<f64>,

    /// How to print
    #[arg(long, short = 'o', value_enum, default_value = "text")]
    output: ReportLayout,

    #[command(flatten)]
    settings: ProducerSettings,
}

impl Produce {
    pub(super) async fn run(self, connection: &Connection) -> Result<(), Failure> {
        let size = self.load.value_bytes()?;
        let client = connection.open().await?;
        let topic = connection::describe(&client, &self.load.topic).await?.name;
        let producer = self.settings.build(&client).await?;
        let bounds = self.load.bounds(match self.rate {
            None => Bounds {
                records: 1_000_000,
                duration: Duration::MAX,
            },
            Some(_) => Bounds {
                records: u64::MAX,
                duration: Duration::from_secs(10),
            },
        });
        let letters = load::letters();
        let mut latencies = Latencies::new()?;
        let mut records = 0;
        let start = Instant::now();
        let schedule = Schedule {
            start,
            rate: self.rate,
        };
        let value = move |_| load::cut(&letters, size);
        let mut load = load::start(producer.clone(), &topic, bounds, schedule, value);
        while let Some(group) = load.next().await? {
            for sent in group {
                sent.delivery.await?;
                latencies.record(sent.due.elapsed());
                records += 1;
            }
        }
        let took = start.elapsed();
        producer.close(self.settings.delivery_timeout()).await?;
        let of = match self.rate {
            Some(_) => "latency, from when due to acknowledged",
            None => "latency, from handed over to acknowledged",
        };
        Report::new("produce", &topic, records, records * size as u64, took)
            .with(of, &latencies)
            .print(self.output)
    }
}
