//! Figures of the consumer groups that this broker coordinates, asked for when they are wanted.

use std::{
    fmt,
    sync::{Arc, OnceLock, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::gauge::ConstGauge,
};

use crate::groups::{self, GroupFigures, Groups};

/// Partitions of groups that are shown; more would be too much for whoever collects them.
const MOST: usize = 10_000;
/// How long who collects metrics waits for it.
const PATIENCE: Duration = Duration::from_secs(1);

/// The way to the groups, and what they said last.
#[derive(Default)]
pub(super) struct GroupWatch {
    groups: OnceLock<Weak<Groups>>,
    figures: Mutex<Vec<GroupFigures>>,
}

impl GroupWatch {
    pub(super) fn set(&self, groups: &Arc<Groups>) {
        // Set once, by the one broker of a process.
        let _ = self.groups.set(Arc::downgrade(groups));
    }

    /// Asks them.
    pub(super) async fn look(&self) {
        let Some(groups) = self.groups.get().and_then(Weak::upgrade) else {
            return;
        };
        // A shard whose replicas are away answers when they are back; what is known then is what it said before.
        let asked = groups.ask_all(groups::Request::Figures);
        let Ok(figures) = tokio::time::timeout(PATIENCE, asked).await else {
            return;
        };
        let mut figures = figures.concat();
        figures.sort_by(|a, b| a.group.cmp(&b.group));
        *self.figures.lock() = figures;
    }
}

pub(super) struct GroupCollector {
    pub(super) watch: Arc<GroupWatch>,
}

impl fmt::Debug for GroupCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupCollector")
    }
}

impl Collector for GroupCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let figures = self.watch.figures.lock();
        let kind = ConstGauge::<i64>::new(0).metric_type();
        let help = "Members of a consumer group";
        let mut metric = encoder.encode_descriptor("group_members", help, None, kind)?;
        for of_group in figures.iter().take(MOST) {
            let labels = [("group", of_group.group.to_string())];
            let members = i64::try_from(of_group.members).unwrap_or(i64::MAX);
            ConstGauge::new(members).encode(metric.encode_family(&labels)?)?;
        }
        let help = "The next offset that a consumer group reads, as committed";
        let mut metric = encoder.encode_descriptor("group_committed_offset", help, None, kind)?;
        let all = figures.iter().flat_map(|of_group| {
            let offsets = of_group.offsets.iter();
            offsets.map(move |offset| (&of_group.group, offset))
        });
        for (group, (topic, partition, offset)) in all.take(MOST) {
            let labels = [
                ("group", group.to_string()),
                ("topic", topic.to_string()),
                ("partition", partition.to_string()),
            ];
            ConstGauge::new(*offset).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
