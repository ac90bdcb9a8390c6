//! `millrace groups describe`: who reads what, and how far behind.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use clap::Args;
use millrace_client::{Client, GroupDescription};
use serde::Serialize;

use super::list::state;
use crate::connection::Connection;
use crate::failure::Failure;
use crate::print::{Printable, print, shown};
use crate::text::Layout;

/// Describe a consumer group: its members, what each reads, and how many records it lags behind.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  millrace groups describe billing\n  millrace groups describe billing -o json | jq '[.partitions[].lag] | add'"
)]
pub(crate) struct Describe {
    /// The group
    name: String,

    /// How to print
    #[arg(long, short = 'o', value_enum, default_value = "table")]
    output: Layout,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Description {
    group: String,
    state: &'static str,
    members: usize,
    epoch: i32,
    partitions: Vec<Partition>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Partition {
    topic: String,
    partition: i32,
    /// The next offset to be read; null if none was committed.
    committed: Option<i64>,
    /// Null if there is no leader who could be asked.
    high_watermark: Option<i64>,
    /// Offsets from the one to the other.
    lag: Option<i64>,
    /// The instance id of a static member, the member id of others; null if it is no one's.
    member: Option<String>,
    /// What the member calls itself.
    client: Option<String>,
}

impl Describe {
    pub(super) async fn run(self, connection: &Connection) -> Result<(), Failure> {
        let client = connection.open().await?;
        let group = client.describe_group(&self.name).await?;
        print(&describe(&client, group).await?, self.output)
    }
}

async fn describe(client: &Client, group: GroupDescription) -> Result<Description, Failure> {
    let mut partitions: BTreeMap<(Arc<str>, i32), Partition> = BTreeMap::new();
    let mut partition = |topic: &Arc<str>, partition: i32, fill: &dyn Fn(&mut Partition)| {
        let entry = partitions.entry((topic.clone(), partition));
        fill(entry.or_insert_with(|| Partition {
            topic: topic.to_string(),
            partition,
            committed: None,
            high_watermark: None,
            lag: None,
            member: None,
            client: None,
        }));
    };
    for committed in &group.offsets {
        partition(&committed.topic, committed.partition, &|entry| {
            entry.committed = Some(committed.offset);
        });
    }
    for member in &group.members {
        for (topic, index) in member.owned.iter().chain(&member.revoking) {
            partition(topic, *index, &|entry| {
                let id = member.instance_id.as_ref().unwrap_or(&member.member_id);
                entry.member = Some(id.clone());
                entry.client = Some(member.client_id.clone());
            });
        }
    }
    let topics: BTreeSet<&str> = partitions.keys().map(|(topic, _)| &**topic).collect();
    let topics: Vec<&str> = topics.into_iter().collect();
    if !topics.is_empty() {
        let cluster = client.metadata(&topics).await?;
        for topic in &cluster.topics {
            for info in &topic.partitions {
                let key = (topic.name.as_str().into(), info.partition);
                let Some(entry) = partitions.get_mut(&key) else {
                    continue;
                };
                entry.high_watermark = info.extent.map(|extent| extent.high_watermark);
                entry.lag = entry
                    .high_watermark
                    .zip(entry.committed)
                    .map(|(end, committed)| (end - committed).max(0));
            }
        }
    }
    Ok(Description {
        group: group.summary.group,
        state: state(group.summary.state),
        members: group.members.len(),
        epoch: group.summary.epoch,
        partitions: partitions.into_values().collect(),
    })
}

impl Printable for Description {
    fn heading(&self) -> String {
        let lag: i64 = self.partitions.iter().filter_map(|p| p.lag).sum();
        format!(
            "{}: {}, {} members, epoch {}, lag {lag}\n",
            self.group, self.state, self.members, self.epoch
        )
    }

    fn columns(&self) -> &'static [&'static str] {
        &[
            "topic",
            "#partition",
            "#committed",
            "#end",
            "#lag",
            "member",
            "client",
        ]
    }

    fn rows(&self) -> Vec<Vec<String>> {
        let row = |line: &Partition| {
            vec![
                line.topic.clone(),
                line.partition.to_string(),
                shown(line.committed),
                shown(line.high_watermark),
                shown(line.lag),
                shown(line.member.as_ref()),
                shown(line.client.as_ref()),
            ]
        };
        self.partitions.iter().map(row).collect()
    }

    fn names(&self) -> Vec<String> {
        vec![self.group.clone()]
    }
}
