//! Every metric with its name, unit and help text, in one place. Names and units follow Prometheus' conventions.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, atomic::AtomicU64},
    time::Instant,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeLabelValue, EncodeMetric, text::encode},
    metrics::{
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::Registry,
};

use super::{
    groups::{GroupCollector, GroupWatch},
    replicas::ReplicaCollector,
};
use crate::groups::Groups;
use crate::partition::Hosting;
use crate::storage::{DiskState, PartitionLog, Store, StoredTopic};

/// From 50 µs to 13 s.
const LATENCY_BUCKETS: [f64; 19] = [
    0.000_05, 0.000_1, 0.000_2, 0.000_4, 0.000_8, 0.001_6, 0.003_2, 0.006_4, 0.012_8, 0.025_6,
    0.051_2, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8,
];

/// A gRPC method.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Method {
    /// `Produce`.
    Produce,
    /// One request on a `ProduceStream`.
    ProduceStream,
    /// `InitProducer`.
    InitProducer,
    /// `Fetch`, including the wait for data.
    Fetch,
    /// `ListOffsets`.
    ListOffsets,
    /// `GetMetadata`.
    GetMetadata,
    /// `Join`, until the member is one.
    JoinGroup,
    /// `CommitOffsets`.
    CommitOffsets,
    /// `FetchOffsets`.
    FetchOffsets,
    /// `ListGroups`.
    ListGroups,
    /// `DescribeGroup`.
    DescribeGroup,
    /// `DeleteGroup`.
    DeleteGroup,
    /// `InitTransactions`.
    InitTransactions,
    /// `AddPartitions`, until their leaders know of it.
    AddPartitions,
    /// `AddOffsets`, until the group's coordinator holds them.
    AddOffsets,
    /// `EndTransaction`, until it is settled.
    EndTransaction,
    /// `ListTransactions`.
    ListTransactions,
    /// `OpenTransaction`.
    OpenTransaction,
    /// `CloseTransaction`.
    CloseTransaction,
    /// `HoldOffsets`.
    HoldOffsets,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MethodLabel {
    method: Method,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// A request to the Kubernetes API server.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ApiLabel {
    verb: &'static str,
    resource: &'static str,
}

/// The broker's metrics.
pub struct Metrics {
    registry: Registry,
    latency: Family<MethodLabel, Histogram>,
    errors: Family<ReasonLabel, Counter>,
    produced_bytes: Counter,
    fetched_bytes: Counter,
    replicated_bytes: Counter,
    isr_changes: Counter,
    unclean_elections: Counter,
    connections: Gauge,
    connections_refused: Counter,
    api_requests: Family<ApiLabel, Counter>,
    elections: Counter,
    controller: Gauge,
    groups: Arc<GroupWatch>,
}

/// Observes how long a request took when it is dropped.
pub(crate) struct Timer {
    latency: Histogram,
    begun: Instant,
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.latency.observe(self.begun.elapsed().as_secs_f64());
    }
}

/// Counts a connection for as long as it lives.
pub struct ConnectionGauge(Gauge);

impl Drop for ConnectionGauge {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Metrics {
    /// The metrics of a broker on this store, with these replicas.
    pub fn new(store: Arc<Store>, hosting: Arc<Hosting>) -> Arc<Self> {
        let mut registry = Registry::with_prefix("millrace");
        let latency = Family::<MethodLabel, Histogram>::new_with_constructor(|| {
            Histogram::new(LATENCY_BUCKETS)
        });
        registry.register(
            "request_duration_seconds",
            "How long requests took; Fetch includes the wait for data",
            latency.clone(),
        );
        let errors = Family::<ReasonLabel, Counter>::default();
        registry.register(
            "errors",
            "Partitions of requests, or whole requests, that failed, by reason",
            errors.clone(),
        );
        let produced_bytes = Counter::default();
        registry.register(
            "produced_bytes",
            "Bytes of record batches taken from producers",
            produced_bytes.clone(),
        );
        let fetched_bytes = Counter::default();
        registry.register(
            "fetched_bytes",
            "Bytes of record batches sent to consumers",
            fetched_bytes.clone(),
        );
        let replicated_bytes = Counter::default();
        registry.register(
            "replicated_bytes",
            "Bytes of record batches taken from leaders",
            replicated_bytes.clone(),
        );
        let isr_changes = Counter::default();
        registry.register(
            "isr_changes",
            "Changes of in-sync replicas that this broker, as leader, has proposed",
            isr_changes.clone(),
        );
        let unclean_elections = Counter::default();
        registry.register(
            "unclean_leader_elections",
            "Leaders that may lack acknowledged records, decided on by this broker as controller",
            unclean_elections.clone(),
        );
        let connections = Gauge::default();
        registry.register("connections", "Open gRPC connections", connections.clone());
        let connections_refused = Counter::<u64, AtomicU64>::default();
        registry.register(
            "connections_refused",
            "Connections closed since there were too many",
            connections_refused.clone(),
        );
        let api_requests = Family::<ApiLabel, Counter>::default();
        registry.register(
            "api_requests",
            "Requests to the Kubernetes API server, by verb and resource",
            api_requests.clone(),
        );
        let elections = Counter::default();
        registry.register(
            "leader_elections",
            "Leaders that this broker, as controller, has decided on",
            elections.clone(),
        );
        let controller = Gauge::default();
        registry.register(
            "controller",
            "Whether this broker is controller",
            controller.clone(),
        );
        registry.register_collector(Box::new(StoreCollector { store }));
        registry.register_collector(Box::new(ReplicaCollector { hosting }));
        let groups = Arc::new(GroupWatch::default());
        registry.register_collector(Box::new(GroupCollector {
            watch: groups.clone(),
        }));
        Arc::new(Metrics {
            registry,
            latency,
            errors,
            produced_bytes,
            fetched_bytes,
            replicated_bytes,
            isr_changes,
            unclean_elections,
            connections,
            connections_refused,
            api_requests,
            elections,
            controller,
            groups,
        })
    }

    /// Counts a request to the Kubernetes API server.
    pub(crate) fn api_request(&self, method: &http::Method, uri: &http::Uri) {
        let watch = uri
            .query()
            .is_some_and(|query| query.contains("watch=true"));
        let verb = match *method {
            http::Method::GET if watch => "watch",
            http::Method::GET => "get",
            http::Method::POST => "create",
            http::Method::PUT => "update",
            _ => "other",
        };
        let resource = match uri.path() {
            path if path.contains("/leases") => "leases",
            path if path.contains("/configmaps") => "configmaps",
            _ => "other",
        };
        self.api_requests
            .get_or_create(&ApiLabel { verb, resource })
            .inc();
    }

    /// Counts a leader that was decided on.
    pub(crate) fn elected(&self) {
        self.elections.inc();
    }

    /// Counts a leader that may lack acknowledged records.
    pub(crate) fn elected_uncleanly(&self) {
        self.unclean_elections.inc();
    }

    /// Counts a change of in-sync replicas that was proposed.
    pub(crate) fn proposed_isr(&self) {
        self.isr_changes.inc();
    }

    /// Counts bytes taken from a leader.
    pub(crate) fn replicated(&self, bytes: usize) {
        self.replicated_bytes.inc_by(bytes as u64);
    }

    /// Says whether this broker is controller.
    pub(crate) fn set_controller(&self, is: bool) {
        self.controller.set(is.into());
    }

    pub(crate) fn start(&self, method: Method) -> Timer {
        Timer {
            latency: self.latency.get_or_create(&MethodLabel { method }).clone(),
            begun: Instant::now(),
        }
    }

    pub(crate) fn produced(&self, bytes: usize) {
        self.produced_bytes.inc_by(bytes as u64);
    }

    pub(crate) fn fetched(&self, bytes: usize) {
        self.fetched_bytes.inc_by(bytes as u64);
    }

    pub(crate) fn refused(&self, reasons: impl Iterator<Item = &'static str>) {
        for reason in reasons {
            self.errors.get_or_create(&ReasonLabel { reason }).inc();
        }
    }

    pub(crate) fn connection(&self) -> ConnectionGauge {
        self.connections.inc();
        ConnectionGauge(self.connections.clone())
    }

    pub(crate) fn connection_refused(&self) {
        self.connections_refused.inc();
    }

    /// The groups whose figures are shown.
    pub(crate) fn watch_groups(&self, groups: &Arc<Groups>) {
        self.groups.set(groups);
    }

    /// Asks for what can't be counted at once; to be called before [`encode`](Self::encode).
    pub(crate) async fn look(&self) {
        self.groups.look().await;
    }

    /// All metrics in the OpenMetrics text format.
    pub(crate) fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Reads the store's figures when they are asked for.
struct StoreCollector {
    store: Arc<Store>,
}

impl fmt::Debug for StoreCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoreCollector")
    }
}

impl Collector for StoreCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        self.encode_partitions(&mut encoder)?;
        self.encode_disk(&mut encoder)?;
        self.encode_rocksdb(&mut encoder)
    }
}

impl StoreCollector {
    fn encode_partitions(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        type Figure = fn(&PartitionLog) -> i64;
        let figures: [(&str, &str, Figure); 4] = [
            ("log_start_offset", "The first offset still held", |log| {
                log.log_start()
            }),
            (
                "log_end_offset",
                "The offset that the next record will get",
                |log| log.log_end(),
            ),
            (
                "high_watermark",
                "The first offset that consumers can't read yet",
                |log| log.high_watermark(),
            ),
            ("log_size_bytes", "Bytes of record batches held", |log| {
                i64::try_from(log.size_bytes()).unwrap_or(i64::MAX)
            }),
        ];
        let topics = self.store.topics();
        let logs = shown(&topics);
        for (name, help, figure) in figures {
            let gauge = ConstGauge::<i64>::new(0);
            let mut metric = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            for log in &logs {
                let labels = [
                    ("topic", log.topic.to_string()),
                    ("partition", log.index.to_string()),
                ];
                ConstGauge::new(figure(log)).encode(metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }

    fn encode_disk(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let disk = self.store.disk();
        let figures = [
            (
                "disk_free_bytes",
                "Bytes free on the store's volume",
                disk.free_bytes(),
            ),
            (
                "disk_total_bytes",
                "Bytes of the store's volume",
                disk.total_bytes(),
            ),
            (
                "disk_full",
                "1 while writes are refused for lack of space",
                u64::from(disk.state() == DiskState::Full),
            ),
        ];
        for (name, help, value) in figures {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }

    fn encode_rocksdb(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let gauge = ConstGauge::<u64>::new(0);
        let help = "RocksDB's own properties, by database";
        let mut metric =
            encoder.encode_descriptor("rocksdb_property", help, None, gauge.metric_type())?;
        for (database, property, value) in self.store.properties() {
            let labels = [("database", database), ("property", property)];
            ConstGauge::new(value).encode(metric.encode_family(&labels)?)?;
        }
        let counter = ConstCounter::<u64>::new(0);
        let help = "RocksDB's own counters since the start, without those that are zero";
        let mut metric =
            encoder.encode_descriptor("rocksdb_ticker", help, None, counter.metric_type())?;
        let statistics = self.store.statistics().unwrap_or_default();
        for (name, value) in statistics.lines().filter_map(ticker) {
            ConstCounter::new(value).encode(metric.encode_family(&[("name", name)])?)?;
        }
        Ok(())
    }
}

/// One partition of each name and index. While a topic is being deleted another of its name may be there: what is led is shown.
fn shown(topics: &[StoredTopic]) -> Vec<&PartitionLog> {
    let mut shown: BTreeMap<(&str, i32), &PartitionLog> = BTreeMap::new();
    for log in topics.iter().flat_map(|topic| topic.partitions.values()) {
        let entry = shown.entry((&log.topic, log.index)).or_insert(log);
        if entry.leader_epoch().is_none() {
            *entry = log;
        }
    }
    shown.into_values().collect()
}

/// A line such as `rocksdb.wal.bytes COUNT : 1234`.
fn ticker(line: &str) -> Option<(&str, u64)> {
    let (name, value) = line.split_once(" COUNT : ")?;
    let value = value.trim().parse().ok().filter(|value| *value > 0)?;
    (!name.contains(' ')).then_some((name, value))
}

#[cfg(test)]
mod tests {
    use super::ticker;

    #[test]
    fn tickers_are_told_from_histograms() {
        assert_eq!(
            ticker("rocksdb.wal.bytes COUNT : 1234"),
            Some(("rocksdb.wal.bytes", 1234))
        );
        assert_eq!(ticker("rocksdb.wal.bytes COUNT : 0"), None);
        assert_eq!(
            ticker("rocksdb.db.write.micros P50 : 0.0 P95 : 0.0 COUNT : 3 SUM : 1"),
            None
        );
    }
}
