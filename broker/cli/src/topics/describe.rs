//! `millrace topics describe`.

use bytesize::ByteSize;
use clap::Args;
use millrace_client::{PartitionInfo, TopicInfo};
use serde::Serialize;

use crate::connection::{self, Connection};
use crate::failure::Failure;
use crate::print::{Printable, print, shown};
use crate::text::Layout;

/// Describe a topic and each of its partitions.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  millrace topics describe orders\n  millrace topics describe orders -o json | jq '.partitions[].leader'"
)]
pub(crate) struct Describe {
    /// The topic
    name: String,

    /// How to print
    #[arg(long, short = 'o', value_enum, default_value = "table")]
    output: Layout,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Description {
    name: String,
    id: String,
    max_message_bytes: u32,
    partitions: Vec<Partition>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Partition {
    partition: i32,
    /// Null if there is none.
    leader: Option<i32>,
    leader_epoch: i32,
    replicas: Vec<i32>,
    in_sync_replicas: Vec<i32>,
    /// These are null if there is no leader who could be asked.
    log_start_offset: Option<i64>,
    high_watermark: Option<i64>,
    size_bytes: Option<u64>,
}

impl Describe {
    pub(super) async fn run(self, connection: &Connection) -> Result<(), Failure> {
        let client = connection.open().await?;
        let topic = connection::describe(&client, &self.name).await?;
        print(&Description::from(topic), self.output)
    }
}

impl From<TopicInfo> for Description {
    fn from(topic: TopicInfo) -> Self {
        Self {
            name: topic.name,
            id: topic.id,
            max_message_bytes: topic.max_message_bytes,
            partitions: topic.partitions.into_iter().map(Partition::from).collect(),
        }
    }
}

impl From<PartitionInfo> for Partition {
    fn from(info: PartitionInfo) -> Self {
        Self {
            partition: info.partition,
            leader: info.leader_id,
            leader_epoch: info.leader_epoch,
            replicas: info.replicas,
            in_sync_replicas: info.isr,
            log_start_offset: info.extent.map(|e| e.log_start_offset),
            high_watermark: info.extent.map(|e| e.high_watermark),
            size_bytes: info.extent.map(|e| e.size_bytes),
        }
    }
}

impl Printable for Description {
    fn heading(&self) -> String {
        format!(
            "Topic:             {}\nId:                {}\nPartitions:        {}\nMax message size:  {}\n\n",
            self.name,
            self.id,
            self.partitions.len(),
            ByteSize(self.max_message_bytes.into())
        )
    }

    fn columns(&self) -> &'static [&'static str] {
        &[
            "#partition",
            "#leader",
            "#epoch",
            "replicas",
            "isr",
            "#start",
            "#end",
            "#size",
        ]
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let ids = |ids: &[i32]| ids.iter().map(i32::to_string).collect::<Vec<_>>().join(",");
        let row = |p: &Partition| {
            vec![
                p.partition.to_string(),
                shown(p.leader),
                p.leader_epoch.to_string(),
                ids(&p.replicas),
                ids(&p.in_sync_replicas),
                shown(p.log_start_offset),
                shown(p.high_watermark),
                shown(p.size_bytes.map(ByteSize)),
            ]
        };
        self.partitions.iter().map(row).collect()
    }

    fn names(&self) -> Vec<String> {
        vec![self.name.clone()]
    }
}
