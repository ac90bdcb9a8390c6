//! The brokers' settings, as the environment variables that a broker reads.

use std::collections::BTreeMap;

use millrace_crds::Cluster;
use millrace_crds::cluster::broker::{BrokerConfig, LogFormat};
use millrace_crds::cluster::listeners::ListenerType;
use millrace_crds::cluster::{ClusterSpec, Durability};
use serde_json::{Value, json};

use super::labels::{name, namespace};

/// Where a broker serves metrics and its health.
pub(super) const METRICS_PORT: i32 = 7071;
/// Where the volume is mounted.
pub(super) const DATA: &str = "/var/lib/millrace";

/// The port of the listener within Kubernetes. The API server sees to it that there is one.
pub(crate) fn client_port(spec: &ClusterSpec) -> i32 {
    let internal = spec
        .listeners
        .iter()
        .find(|listener| listener.type_ == ListenerType::ClusterIP);
    internal.map_or(7070, |listener| listener.port)
}

/// What is the same for all brokers. What differs is in the container's `env`.
pub(super) fn config_map(cluster: &Cluster) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": super::config_map(name(cluster))},
        "data": settings(cluster),
    })
}

fn settings(cluster: &Cluster) -> BTreeMap<&'static str, String> {
    let spec = &cluster.spec;
    let uid = cluster.metadata.uid.clone().unwrap_or_default();
    let durability = match spec.durability {
        Durability::Fsync => "fsync",
        Durability::Os => "os",
    };
    let mut settings = BTreeMap::from([
        ("MILLRACE_CLUSTER", name(cluster).to_owned()),
        ("MILLRACE_CLUSTER_UID", uid),
        ("MILLRACE_NAMESPACE", namespace(cluster).to_owned()),
        ("MILLRACE_LISTEN", format!("0.0.0.0:{}", client_port(spec))),
        ("MILLRACE_METRICS_LISTEN", format!("0.0.0.0:{METRICS_PORT}")),
        ("MILLRACE_DATA", DATA.to_owned()),
        ("MILLRACE_DURABILITY", durability.to_owned()),
        (
            "MILLRACE_LEASE_DURATION",
            format!("{}s", spec.lease.duration_seconds),
        ),
        (
            "MILLRACE_LEASE_RENEW",
            format!("{}s", spec.lease.renew_seconds),
        ),
    ]);
    settings.extend(written(&spec.config));
    settings
}

/// The settings that the spec has. Of all others the broker knows the default.
fn written(config: &BrokerConfig) -> impl Iterator<Item = (&'static str, String)> {
    fn text(value: Option<&impl ToString>) -> Option<String> {
        value.map(ToString::to_string)
    }
    let json = config.log.format == LogFormat::Json;
    [
        ("MILLRACE_WRITE_BUFFER", text(config.write_buffer.as_ref())),
        (
            "MILLRACE_WRITE_BUFFERS",
            text(config.write_buffers.as_ref()),
        ),
        (
            "MILLRACE_WRITE_BUFFER_AGE",
            text(config.write_buffer_age.as_ref()),
        ),
        ("MILLRACE_BLOCK_CACHE", text(config.block_cache.as_ref())),
        ("MILLRACE_TAIL_CACHE", text(config.tail_cache.as_ref())),
        (
            "MILLRACE_REQUEST_MEMORY",
            text(config.request_memory.as_ref()),
        ),
        (
            "MILLRACE_RESPONSE_MEMORY",
            text(config.response_memory.as_ref()),
        ),
        ("MILLRACE_MAX_REQUEST", text(config.max_request.as_ref())),
        (
            "MILLRACE_MAX_CONNECTIONS",
            text(config.max_connections.as_ref()),
        ),
        (
            "MILLRACE_MIN_FREE_DISK",
            text(config.min_free_disk.as_ref()),
        ),
        (
            "MILLRACE_RETENTION_INTERVAL",
            text(config.retention_interval.as_ref()),
        ),
        (
            "MILLRACE_PRODUCER_EXPIRATION",
            text(config.producer_expiration.as_ref()),
        ),
        ("MILLRACE_REPLICA_LAG", text(config.replica_lag.as_ref())),
        (
            "MILLRACE_CATCH_UP_RATE",
            text(config.catch_up_rate.as_ref()),
        ),
        ("MILLRACE_DRAIN", text(config.drain.as_ref())),
        ("MILLRACE_LOG_JSON", json.then(|| "true".to_owned())),
        ("RUST_LOG", config.log.level.clone()),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name, value?)))
}
