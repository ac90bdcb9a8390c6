//! `millrace groups reset`.

use clap::Args;
use millrace_client::{ErrorKind, GroupOffset};
use serde::Serialize;

use crate::connection::{self, Connection};
use crate::failure::Failure;
use crate::points::{Point, offset_of, parse_point};
use crate::print::{Printable, print, shown};
use crate::text::Layout;

const AFTER_HELP: &str = "\
Examples:
  millrace groups reset billing orders --to earliest --dry-run     what it would do
  millrace groups reset billing orders --to '1h ago'
  millrace groups reset billing orders --partition 2 --to 1000

The group must have no members: stop its consumers first.";

/// Have a consumer group go on elsewhere in a topic.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Reset {
    /// The group; made if there is none
    group: String,

    /// The topic
    topic: String,

    /// Where to go on: earliest, latest, an offset, -N (the last N records), @TIME, '1h ago'
    #[arg(long, value_name = "POINT", value_parser = parse_point, allow_hyphen_values = true)]
    to: Point,

    /// Only these partitions, separated by commas
    #[arg(long, short = 'p', value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(i32).range(0..))]
    partition: Vec<i32>,

    /// Only print what would be done
    #[arg(long)]
    dry_run: bool,

    /// How to print
    #[arg(long, short = 'o', value_enum, default_value = "table")]
    output: Layout,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    topic: String,
    partition: i32,
    /// Null if nothing was committed.
    before: Option<i64>,
    after: i64,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Lines(Vec<Line>);

impl Reset {
    pub(super) async fn run(self, connection: &Connection) -> Result<(), Failure> {
        let client = connection.open().await?;
        let topic = connection::describe(&client, &self.topic).await?;
        for partition in &self.partition {
            if topic.partitions.iter().all(|p| p.partition != *partition) {
                return Err(connection::no_partition(&topic, *partition));
            }
        }
        let before = client.group_offsets(&self.group).await?;
        let mut lines = Vec::new();
        for info in &topic.partitions {
            if !self.partition.is_empty() && !self.partition.contains(&info.partition) {
                continue;
            }
            let extent = connection::extent(&topic.name, info)?;
            let wanted = offset_of(&client, &topic.name, info.partition, extent, self.to).await?;
            let (first, last) = (extent.log_start_offset, extent.high_watermark);
            if wanted < first || wanted > last {
                return Err(Failure::new(format!(
                    "offset {wanted} is not in partition {} of topic `{}`, which reaches from {first} to {last}",
                    info.partition, topic.name
                ))
                .hint("`--to earliest` and `--to latest` always are"));
            }
            let committed = before
                .iter()
                .find(|c| *c.topic == *topic.name && c.partition == info.partition);
            lines.push(Line {
                topic: topic.name.clone(),
                partition: info.partition,
                before: committed.map(|committed| committed.offset),
                after: wanted,
            });
        }
        if !self.dry_run {
            let offsets = lines
                .iter()
                .map(|line| GroupOffset::new(topic.name.as_str(), line.partition, line.after));
            let reset = client.reset_group(&self.group, offsets).await;
            reset.map_err(|error| match error.kind() {
                ErrorKind::GroupNotEmpty => Failure::from(error).hint(format!(
                    "`millrace groups describe {}` shows who they are",
                    self.group
                )),
                _ => error.into(),
            })?;
        }
        print(&Lines(lines), self.output)
    }
}

impl Printable for Lines {
    fn columns(&self) -> &'static [&'static str] {
        &["topic", "#partition", "#before", "#after"]
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let row = |line: &Line| {
            vec![
                line.topic.clone(),
                line.partition.to_string(),
                shown(line.before),
                line.after.to_string(),
            ]
        };
        self.0.iter().map(row).collect()
    }

    fn names(&self) -> Vec<String> {
        let name = |line: &Line| format!("{}/{}", line.topic, line.partition);
        self.0.iter().map(name).collect()
    }
}
