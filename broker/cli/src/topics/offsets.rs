//! `millrace topics offsets`.

use clap::Args;
use millrace_client::{Client, OffsetSpec, PartitionInfo};
use serde::Serialize;

use crate::connection::{self, Connection};
use crate::failure::Failure;
use crate::points::{Point, format_time, parse_point};
use crate::print::{Printable, print};
use crate::text::Layout;

const AFTER_HELP: &str = "\
Examples:
  millrace topics offsets orders                   where each partition ends
  millrace topics offsets orders --at earliest     where each partition begins
  millrace topics offsets orders --at '1h ago'     the first record at or after that time
  millrace topics offsets orders --at @2026-01-31T12:00:00Z -o json";

/// Find an offset in each partition of a topic.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Offsets {
    /// The topic
    name: String,

    /// earliest, latest or a time: @RFC3339, @MILLISECONDS, '1h ago'
    #[arg(long, default_value = "latest", value_name = "POINT", value_parser = parse_at)]
    at: Point,

    /// How to print
    #[arg(long, short = 'o', value_enum, default_value = "table")]
    output: Layout,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    topic: String,
    partition: i32,
    /// Null: no record is as new as the time asked for.
    offset: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timestamp_ms: Option<i64>,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Lines(Vec<Line>);

fn parse_at(text: &str) -> Result<Point, String> {
    match parse_point(text)? {
        Point::Offset(_) | Point::BeforeEnd(_) => Err(
            "write earliest, latest or a time: @2026-01-31T12:00:00Z, @MILLISECONDS, '1h ago'"
                .to_owned(),
        ),
        point => Ok(point),
    }
}

impl Offsets {
    pub(super) async fn run(self, connection: &Connection) -> Result<(), Failure> {
        let client = connection.open().await?;
        let topic = connection::describe(&client, &self.name).await?;
        let mut lines = Vec::new();
        for info in &topic.partitions {
            lines.push(find(&client, &topic.name, info, self.at).await?);
        }
        print(&Lines(lines), self.output)
    }
}

async fn find(
    client: &Client,
    topic: &str,
    info: &PartitionInfo,
    at: Point,
) -> Result<Line, Failure> {
    // The ends came with the topic's description.
    let (offset, timestamp_ms) = match at {
        Point::Earliest => {
            let extent = connection::extent(topic, info)?;
            (Some(extent.log_start_offset), None)
        }
        Point::Time(ms) => {
            let found = client
                .list_offset(topic, info.partition, OffsetSpec::Timestamp(ms))
                .await?;
            (
                found.map(|at| at.offset),
                found.and_then(|at| at.timestamp_ms),
            )
        }
        Point::Latest | Point::Offset(_) | Point::BeforeEnd(_) => {
            let extent = connection::extent(topic, info)?;
            (Some(extent.high_watermark), None)
        }
    };
    Ok(Line {
        topic: topic.to_owned(),
        partition: info.partition,
        offset,
        timestamp_ms,
    })
}

impl Printable for Lines {
    fn columns(&self) -> &'static [&'static str] {
        &["topic", "#partition", "#offset", "timestamp"]
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let row = |line: &Line| {
            vec![
                line.topic.clone(),
                line.partition.to_string(),
                line.offset
                    .map_or_else(|| "none".to_owned(), |offset| offset.to_string()),
                line.timestamp_ms
                    .map_or_else(|| "-".to_owned(), format_time),
            ]
        };
        self.0.iter().map(row).collect()
    }

    fn names(&self) -> Vec<String> {
        let name = |line: &Line| format!("{}-{}", line.topic, line.partition);
        self.0.iter().map(name).collect()
    }
}
