//! One producer over many partitions, acknowledged only when on the disk: Kafka syncs a file for each batch of each partition
//! (`flush.messages=1`), Millrace one log for all.

use anyhow::Result;

use crate::Bench;
use crate::peer::Durability;
use crate::table::Report;
use crate::throughput::{Case, Plan, throughput};

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    #[arg(long, default_value_t = 100_000)]
    records: u64,
    /// Bytes of each value.
    #[arg(long, default_value_t = 1_000)]
    size: usize,
    #[arg(long, default_value_t = 100)]
    partitions: u32,
    #[arg(long, default_value_t = 5)]
    linger_ms: u64,
    /// Sizes of batches to try. 16 KiB is the default of Kafka's producer; larger ones spare Kafka syncs.
    #[arg(long, value_delimiter = ',', default_values_t = [16, 128])]
    batch_kib: Vec<usize>,
}

pub(crate) async fn fsync(bench: &Bench, options: &Options) -> Result<Report> {
    let cases = options.batch_kib.iter().map(|kib| Case {
        name: format!("{} B in batches of {kib} KiB", options.size),
        size: options.size,
        records: options.records,
        batch_bytes: kib * 1024,
    });
    let plan = Plan {
        title: "Produce with fsync, one producer, acks=all",
        durability: Durability::Fsync,
        partitions: options.partitions,
        linger_ms: options.linger_ms,
        cases: cases.collect(),
        produce: Some(10.0),
        fetch: None,
    };
    throughput(bench, &plan).await
}
