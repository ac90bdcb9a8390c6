//! `millrace topics list`.

use bytesize::ByteSize;
use clap::Args;
use millrace_client::TopicInfo;
use serde::Serialize;

use crate::connection::Connection;
use crate::failure::Failure;
use crate::print::{Printable, print, shown};
use crate::text::Layout;

/// List all topics.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  millrace topics list\n  millrace topics list -o name | xargs -n1 millrace topics describe"
)]
pub(crate) struct List {
    /// How to print
    #[arg(long, short = 'o', value_enum, default_value = "table")]
    output: Layout,
}

/// One topic in a line.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    name: String,
    partitions: usize,
    replication_factor: usize,
    /// Offsets held; a little more than the records if the topic is compacted or has transactions. Null if a partition has no leader
    /// who could be asked.
    records: Option<i64>,
    size_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
#[serde(transparent)]
struct Lines(Vec<Line>);

impl List {
    pub(super) async fn run(self, connection: &Connection) -> Result<(), Failure> {
        let cluster = connection.open().await?.metadata(&[]).await?;
        let lines = Lines(cluster.topics.into_iter().map(Line::from).collect());
        print(&lines, self.output)
    }
}

impl From<TopicInfo> for Line {
    fn from(topic: TopicInfo) -> Self {
        let partitions = topic.partitions.iter();
        Self {
            partitions: topic.partitions.len(),
            replication_factor: partitions
                .clone()
                .map(|p| p.replicas.len())
                .max()
                .unwrap_or(0),
            records: partitions
                .clone()
                .map(|p| p.extent.map(|e| e.high_watermark - e.log_start_offset))
                .sum(),
            size_bytes: partitions.map(|p| p.extent.map(|e| e.size_bytes)).sum(),
            name: topic.name,
        }
    }
}

impl Printable for Lines {
    fn columns(&self) -> &'static [&'static str] {
        &["name", "#partitions", "#replicas", "#records", "#size"]
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let row = |line: &Line| {
            vec![
                line.name.clone(),
                line.partitions.to_string(),
                line.replication_factor.to_string(),
                shown(line.records),
                shown(line.size_bytes.map(ByteSize)),
            ]
        };
        self.0.iter().map(row).collect()
    }

    fn names(&self) -> Vec<String> {
        self.0.iter().map(|line| line.name.clone()).collect()
    }
}
