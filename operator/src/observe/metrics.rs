//! Every metric with its name, unit and help text, in one place.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric,
};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::view::View;

/// From 1 ms to 16 s.
const DURATION_BUCKETS: [f64; 15] = [
    0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.0, 2.0, 4.0, 8.0, 16.0,
];

/// Which kind of object was reconciled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Kind {
    Cluster,
    Topic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
enum Outcome {
    Done,
    Failed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReconcileLabels {
    kind: Kind,
    result: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    verb: &'static str,
    resource: String,
}

/// The operator's metrics.
pub(crate) struct Metrics {
    registry: Registry,
    reconciles: Family<ReconcileLabels, Counter>,
    durations: Family<KindLabel, Histogram>,
    calls: Family<CallLabels, Counter>,
    leader: Gauge,
    elected: AtomicBool,
    synced: AtomicBool,
}

impl Metrics {
    pub(crate) fn new(view: Arc<View>) -> Arc<Self> {
        let mut registry = Registry::with_prefix("millrace_operator");
        let reconciles = Family::default();
        registry.register(
            "reconciles",
            "Reconciles, by kind of object and result",
            reconciles.clone(),
        );
        let durations = Family::<KindLabel, Histogram>::new_with_constructor(|| {
            Histogram::new(DURATION_BUCKETS)
        });
        registry.register(
            "reconcile_duration_seconds",
            "How long reconciles took",
            durations.clone(),
        );
        let calls = Family::default();
        registry.register(
            "api_requests",
            "Requests to the API server, by verb and resource",
            calls.clone(),
        );
        let leader = Gauge::default();
        registry.register(
            "leader",
            "1 while this operator is the one that acts",
            leader.clone(),
        );
        registry.register_collector(Box::new(Conditions(view)));
        Arc::new(Self {
            registry,
            reconciles,
            durations,
            calls,
            leader,
            elected: AtomicBool::new(false),
            synced: AtomicBool::new(false),
        })
    }

    pub(crate) fn reconciled(&self, kind: Kind, took: Duration, done: bool) {
        let result = if done { Outcome::Done } else { Outcome::Failed };
        let labels = ReconcileLabels { kind, result };
        self.reconciles.get_or_create(&labels).inc();
        let duration = self.durations.get_or_create(&KindLabel { kind });
        duration.observe(took.as_secs_f64());
    }

    pub(super) fn called(&self, verb: &'static str, resource: String) {
        self.calls
            .get_or_create(&CallLabels { verb, resource })
            .inc();
    }

    /// This operator is the one that acts.
    pub(crate) fn set_elected(&self) {
        self.leader.set(1);
        self.elected.store(true, Ordering::Relaxed);
    }

    /// All that is there has been seen.
    pub(crate) fn set_synced(&self) {
        self.synced.store(true, Ordering::Relaxed);
    }

    pub(super) fn elected(&self) -> bool {
        self.elected.load(Ordering::Relaxed)
    }

    pub(super) fn synced(&self) -> bool {
        self.synced.load(Ordering::Relaxed)
    }

    /// All metrics in the OpenMetrics text format.
    pub(super) fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Counts conditions when they are asked for.
struct Conditions(Arc<View>);

impl fmt::Debug for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Conditions")
    }
}

impl Collector for Conditions {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        type Labels = (&'static str, String, String, String);
        let mut counts = std::collections::BTreeMap::<Labels, i64>::new();
        let mut count =
            |kind, conditions: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition]| {
                for condition in conditions {
                    let labels = (
                        kind,
                        condition.type_.clone(),
                        condition.status.clone(),
                        condition.reason.clone(),
                    );
                    *counts.entry(labels).or_default() += 1;
                }
            };
        for cluster in self.0.clusters.all() {
            let status = cluster.status.as_ref();
            count("Cluster", status.map_or(&[], |status| &status.conditions));
        }
        for topic in self.0.topics.all() {
            let status = topic.status.as_ref();
            count("Topic", status.map_or(&[], |status| &status.conditions));
        }
        let gauge = ConstGauge::<i64>::new(0);
        let help = "Clusters and Topics, by the conditions of their status";
        let mut metric =
            encoder.encode_descriptor("conditions", help, None, gauge.metric_type())?;
        for ((kind, condition, status, reason), number) in counts {
            let labels = [
                ("kind", kind.to_owned()),
                ("condition", condition),
                ("status", status),
                ("reason", reason),
            ];
            ConstGauge::new(number).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
