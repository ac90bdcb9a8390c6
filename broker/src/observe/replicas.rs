//! Figures of the replicas that this broker hosts, counted when they are asked for. The names are Kafka's, in Prometheus' spelling.

use std::{fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::gauge::ConstGauge,
};

use crate::partition::{Hosting, Part};

pub(super) struct ReplicaCollector {
    pub(super) hosting: Arc<Hosting>,
}

impl fmt::Debug for ReplicaCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ReplicaCollector")
    }
}

impl Collector for ReplicaCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (mut leaders, mut followers, mut idle) = (0_i64, 0_i64, 0_i64);
        let (mut under_replicated, mut under_min) = (0_i64, 0_i64);
        for (_, replica) in self.hosting.all() {
            match replica.part() {
                Part::Leader(_) => leaders += 1,
                Part::Follower(_) => followers += 1,
                Part::Neither => idle += 1,
            }
            if let Some((in_sync, wanted)) = replica.isr_size() {
                under_replicated += i64::from(in_sync < wanted);
                under_min += i64::from(replica.check_in_sync().is_err());
            }
        }
        for (name, help, value) in [
            (
                "partitions_led",
                "Partitions that this broker leads",
                leaders,
            ),
            (
                "partitions_followed",
                "Partitions whose leader this broker follows",
                followers,
            ),
            (
                "partitions_without_leader",
                "Replicas here whose partition has no leader",
                idle,
            ),
            (
                "under_replicated_partitions",
                "Partitions led here of which not all replicas are in sync",
                under_replicated,
            ),
            (
                "under_min_isr_partitions",
                "Partitions led here that refuse acks=all, since fewer replicas than minInSyncReplicas are in sync and within reach",
                under_min,
            ),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}
