//! `millrace bench consume`: how fast records that are there can be read and decoded.

use std::time::{Duration, Instant};

use clap::Args;
use millrace_client::StartFrom;

use super::report::{Report, ReportLayout};
use crate::connection::{self, Connection};
use crate::failure::Failure;

/// Measure how fast records are read.
#[derive(Debug, Args)]
#[command(
    after_help = "It reads from the beginning of all partitions to where they ended at the start, or until --records."
)]
pub(super) struct Consume {
    /// The topic to read
    topic: String,

    /// Stop after so many records
    #[arg(long, value_name = "N")]
    records: Option<u64>,

    /// How to print
    #[arg(long, short = 'o', value_enum, default_value = "text")]
    output: ReportLayout,
}

impl Consume {
    pub(super) async fn run(self, connection: &Connection) -> Result<(), Failure> {
        let client = connection.open().await?;
        let topic = connection::describe(&client, &self.topic).await?;
        let extents = topic
            .partitions
            .iter()
            .map(|info| connection::extent(&topic.name, info))
            .collect::<Result<Vec<_>, _>>()?;
        let held: i64 = extents
            .iter()
            .map(|e| e.high_watermark - e.log_start_offset)
            .sum();
        if held <= 0 {
            return Err(Failure::new(format!("topic `{}` is empty", topic.name))
                .hint(format!("fill it: millrace bench produce {}", topic.name)));
        }
        let mut open: Vec<Option<i64>> = extents
            .iter()
            .map(|e| (e.high_watermark > e.log_start_offset).then_some(e.high_watermark))
            .collect();
        let mut left = open.iter().flatten().count();
        let wanted = self.records.unwrap_or(u64::MAX);
        let start = Instant::now();
        let mut consumer = client
            .consumer()
            .topic(topic.name.as_str())
            .start(StartFrom::Earliest)
            .build()
            .await?;
        let (mut records, mut bytes) = (0_u64, 0_u64);
        while left > 0 && records < wanted {
            let next = tokio::time::timeout(Duration::from_secs(10), consumer.next_record()).await;
            // Behind the last record there may be a transaction's marker; the wait for more is not part of the figure.
            let Ok(Some(next)) = next else {
                return Err(Failure::new(format!("no record came for 10 s, after {records} of about {held}"))
                    .hint("look at the broker's log; `millrace consume` reads topics whose last offsets hold no records"));
            };
            let next = next?;
            let record = &next.record;
            records += 1;
            bytes += (record.key.as_ref().map_or(0, |k| k.len())
                + record.value.as_ref().map_or(0, |v| v.len())) as u64;
            let end = usize::try_from(next.partition)
                .ok()
                .and_then(|index| open.get_mut(index));
            if let Some(end) = end
                && end.is_some_and(|end| record.offset + 1 >= end)
            {
                *end = None;
                left -= 1;
            }
        }
        Report::new("consume", &topic.name, records, bytes, start.elapsed()).print(self.output)
    }
}
