//! The producer's settings as options, shared by `produce` and `bench`.

use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use millrace_client::{Acks, Client, Compression, Partitioner, Producer};

use crate::failure::Failure;

/// How batches are made and sent.
#[derive(Debug, Args)]
#[command(next_help_heading = "Producer options")]
pub(crate) struct ProducerSettings {
    /// Who must have a record before it counts as stored
    #[arg(long, value_enum, default_value = "all")]
    acks: AcksOption,

    /// How the partition is chosen of records that name none
    #[arg(long, value_enum, default_value = "key-hash", value_name = "HOW")]
    partitioner: PartitionerOption,

    /// How batches are compressed: none, gzip, snappy, lz4 or zstd
    #[arg(long, default_value = "none", value_name = "CODEC")]
    compression: Compression,

    /// How long a batch waits for more records
    #[arg(long, default_value = "5ms", value_name = "TIME", value_parser = humantime::parse_duration)]
    linger: Duration,

    /// A batch of this size is sent without waiting
    #[arg(long, default_value = "128KiB", value_name = "SIZE")]
    batch_size: ByteSize,

    /// Memory for records that are not stored yet; at the limit, reading input waits
    #[arg(long, default_value = "64MiB", value_name = "SIZE")]
    buffer_size: ByteSize,

    /// How long to try to store a record before giving up
    #[arg(long, default_value = "2m", value_name = "TIME", value_parser = humantime::parse_duration)]
    delivery_timeout: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AcksOption {
    /// All in-sync replicas
    #[value(alias = "-1")]
    All,
    /// The leader
    #[value(alias = "1")]
    Leader,
    /// No one: records may be lost without a word
    #[value(alias = "0")]
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PartitionerOption {
    /// By the key's murmur2 hash, as Kafka; without a key as sticky
    KeyHash,
    /// One partition until its batch is full, then another
    Sticky,
    /// One after another
    RoundRobin,
    /// By chance
    Random,
}

impl ProducerSettings {
    /// Builds the producer.
    pub(crate) async fn build(&self, client: &Client) -> Result<Producer, Failure> {
        let acks = match self.acks {
            AcksOption::All => Acks::All,
            AcksOption::Leader => Acks::Leader,
            AcksOption::None => Acks::None,
        };
        let partitioner = match self.partitioner {
            PartitionerOption::KeyHash => Partitioner::KeyHash,
            PartitionerOption::Sticky => Partitioner::Sticky,
            PartitionerOption::RoundRobin => Partitioner::RoundRobin,
            PartitionerOption::Random => Partitioner::Random,
        };
        let producer = client
            .producer()
            .acks(acks)
            .partitioner(partitioner)
            .compression(self.compression)
            .linger(self.linger)
            .batch_bytes(size("--batch-size", self.batch_size)?)
            .max_buffered_bytes(size("--buffer-size", self.buffer_size)?)
            .delivery_timeout(self.delivery_timeout)
            .build()
            .await?;
        Ok(producer)
    }

    /// How long the producer tries to store a record.
    pub(crate) fn delivery_timeout(&self) -> Duration {
        self.delivery_timeout
    }

    /// Whether the broker says what became of a record.
    pub(crate) fn acknowledged(&self) -> bool {
        self.acks != AcksOption::None
    }
}

fn size(option: &str, size: ByteSize) -> Result<usize, Failure> {
    usize::try_from(size.as_u64()).map_err(|_| {
        Failure::usage(format!(
            "{option} {size} is more than this machine can address"
        ))
    })
}
