//! The broker's configuration: every flag with its unit, default and reason, in one place.

use std::{
    convert::Infallible,
    net::{Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use bytesize::ByteSize;
use clap::Parser;

use crate::{
    coordination::{Membership, Timing},
    storage::{Durability, StorageOptions},
};

/// The Millrace broker.
#[derive(Clone, Debug, Parser)]
#[command(version, about, after_help = EXAMPLES)]
pub struct Config {
    /// The folder of the store; created if it does not exist.
    #[arg(
        long,
        env = "MILLRACE_DATA",
        default_value = "data",
        value_name = "DIR"
    )]
    pub data: PathBuf,
    /// Topic resources (`kind: Topic`): a YAML file or a folder of them. Followed while the broker runs.
    #[arg(long, env = "MILLRACE_TOPICS", value_name = "PATH")]
    pub topics: Option<PathBuf>,
    /// Where clients connect (gRPC).
    #[arg(
        long,
        env = "MILLRACE_LISTEN",
        default_value = "127.0.0.1:7070",
        value_name = "ADDR"
    )]
    pub listen: SocketAddr,
    /// The address that clients are told to use, host:port. Default: the one it listens on.
    #[arg(
        long,
        env = "MILLRACE_ADVERTISE",
        value_name = "HOST:PORT",
        value_parser = advertised
    )]
    pub advertise: Option<String>,
    /// The Cluster to take part in, coordinated through the Kubernetes API server. Without it the broker runs alone.
    #[arg(long, env = "MILLRACE_CLUSTER", value_name = "NAME", conflicts_with = "topics", requires_all = ["namespace", "pod", "pod_uid", "advertise"])]
    pub cluster: Option<String>,
    /// The Cluster's `metadata.uid`: the broker's own Leases are deleted with it.
    #[arg(
        long,
        env = "MILLRACE_CLUSTER_UID",
        value_name = "UID",
        requires = "cluster"
    )]
    pub cluster_uid: Option<String>,
    /// The Cluster's namespace.
    #[arg(long, env = "MILLRACE_NAMESPACE", value_name = "NAME")]
    pub namespace: Option<String>,
    /// This pod's name. With an empty volume, the number at its end becomes the broker's id.
    #[arg(long, env = "MILLRACE_POD", value_name = "NAME")]
    pub pod: Option<String>,
    /// This pod's `metadata.uid`.
    #[arg(long, env = "MILLRACE_POD_UID", value_name = "UID")]
    pub pod_uid: Option<String>,
    /// A broker of the Cluster that has not renewed its Lease for so long is given up.
    #[arg(
        long,
        env = "MILLRACE_LEASE_DURATION",
        default_value = "6s",
        value_name = "TIME"
    )]
    pub lease_duration: humantime::Duration,
    /// How often this broker renews its Lease.
    #[arg(
        long,
        env = "MILLRACE_LEASE_RENEW",
        default_value = "2s",
        value_name = "TIME"
    )]
    pub lease_renew: humantime::Duration,
    /// A replica that has not had all of its leader's log at any time within so long is no longer in sync: `acks=all` does not wait
    /// for it any more (Kafka's replica.lag.time.max.ms).
    #[arg(
        long,
        env = "MILLRACE_REPLICA_LAG",
        default_value = "10s",
        value_name = "TIME"
    )]
    pub replica_lag: humantime::Duration,
    /// What this broker sends at most in a second, on average, to replicas that are not in sync: those that move, or come back. They never are if more than that is
    /// written. As much as it can if absent.
    #[arg(long, env = "MILLRACE_CATCH_UP_RATE", value_parser = rate, value_name = "SIZE")]
    pub catch_up_rate: Option<ByteSize>,
    /// Where /metrics, /healthz, /readyz and /restartable are served (HTTP).
    #[arg(
        long,
        env = "MILLRACE_METRICS_LISTEN",
        default_value = "127.0.0.1:7071",
        value_name = "ADDR"
    )]
    pub metrics_listen: SocketAddr,
    /// When an append is acknowledged: `os`, once the write-ahead log is handed to the operating system, or `fsync`.
    #[arg(long, env = "MILLRACE_DURABILITY", default_value_t = Durability::Os)]
    pub durability: Durability,
    /// Size of a write buffer. Larger ones make reads of old data more sequential, smaller ones need less memory.
    #[arg(
        long,
        env = "MILLRACE_WRITE_BUFFER",
        default_value = "16MiB",
        value_name = "SIZE"
    )]
    pub write_buffer: ByteSize,
    /// Write buffers at most: one that fills, the others on their way to disk.
    #[arg(long, env = "MILLRACE_WRITE_BUFFERS", default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=64), value_name = "N")]
    pub write_buffers: u8,
    /// A write buffer goes to disk after this time even if it is not full, so that retention can act on it.
    #[arg(
        long,
        env = "MILLRACE_WRITE_BUFFER_AGE",
        default_value = "10m",
        value_name = "TIME"
    )]
    pub write_buffer_age: humantime::Duration,
    /// Memory for reads of old data and for file indexes.
    #[arg(
        long,
        env = "MILLRACE_BLOCK_CACHE",
        default_value = "32MiB",
        value_name = "SIZE"
    )]
    pub block_cache: ByteSize,
    /// Memory for the newest batches, from which consumers that keep up are served.
    #[arg(
        long,
        env = "MILLRACE_TAIL_CACHE",
        default_value = "16MiB",
        value_name = "SIZE"
    )]
    pub tail_cache: ByteSize,
    /// Memory for requests while they are received, and again for appends that wait for the writer.
    #[arg(
        long,
        env = "MILLRACE_REQUEST_MEMORY",
        default_value = "32MiB",
        value_name = "SIZE"
    )]
    pub request_memory: ByteSize,
    /// Memory for responses until they are sent.
    #[arg(
        long,
        env = "MILLRACE_RESPONSE_MEMORY",
        default_value = "64MiB",
        value_name = "SIZE"
    )]
    pub response_memory: ByteSize,
    /// The largest request.
    #[arg(
        long,
        env = "MILLRACE_MAX_REQUEST",
        default_value = "8MiB",
        value_name = "SIZE"
    )]
    pub max_request: ByteSize,
    /// Connections at most; one more is closed at once.
    #[arg(
        long,
        env = "MILLRACE_MAX_CONNECTIONS",
        default_value_t = 10_000,
        value_name = "N"
    )]
    pub max_connections: usize,
    /// Writes are refused while the volume has less than this free; reads go on.
    #[arg(
        long,
        env = "MILLRACE_MIN_FREE_DISK",
        default_value = "512MiB",
        value_name = "SIZE"
    )]
    pub min_free_disk: ByteSize,
    /// How often retention looks for what to remove.
    #[arg(
        long,
        env = "MILLRACE_RETENTION_INTERVAL",
        default_value = "30s",
        value_name = "TIME"
    )]
    pub retention_interval: humantime::Duration,
    /// An idempotent producer is forgotten if it has not written to a partition for this long.
    #[arg(
        long,
        env = "MILLRACE_PRODUCER_EXPIRATION",
        default_value = "7d",
        value_name = "TIME"
    )]
    pub producer_expiration: humantime::Duration,
    /// How long clients may take to end their streams when the broker stops. What was accepted is finished in any case.
    #[arg(
        long,
        env = "MILLRACE_DRAIN",
        default_value = "5s",
        value_name = "TIME"
    )]
    pub drain: humantime::Duration,
    /// Log lines as JSON.
    #[arg(long, env = "MILLRACE_LOG_JSON")]
    pub log_json: bool,
}

const EXAMPLES: &str = "\
Examples:
  millrace-broker --topics manifests/samples
  millrace-broker --data /var/lib/millrace --durability fsync --listen 0.0.0.0:7070 --advertise broker.example:7070

The environment variable RUST_LOG sets what is logged, e.g. RUST_LOG=millrace_broker=debug.";

/// What of the configuration the services act on.
#[derive(Clone, Debug)]
pub struct ServiceOptions {
    /// Connections at most.
    pub max_connections: usize,
    /// Bytes of one request at most.
    pub max_request_bytes: usize,
    /// Bytes of requests being received or handled at most, all together.
    pub request_bytes: usize,
    /// Bytes of responses not yet sent at most, all together.
    pub response_bytes: usize,
    /// Bytes that are sent in a second to followers that are behind, at most.
    pub catch_up_rate: Option<u64>,
    /// Bytes that a client may send on one stream before the broker has read them.
    pub stream_window_bytes: u32,
    /// The same for all streams of a connection. With idle or slow readers it is what each connection can take.
    pub connection_window_bytes: u32,
    /// How long clients may take to end their streams when the broker stops.
    pub drain: Duration,
}

impl Config {
    /// What storage acts on.
    pub fn storage(&self) -> StorageOptions {
        StorageOptions {
            durability: self.durability,
            generation_bytes: bytes(self.write_buffer),
            write_buffers: self.write_buffers.into(),
            generation_age: self.write_buffer_age.into(),
            block_cache_bytes: bytes(self.block_cache),
            tail_cache_bytes: bytes(self.tail_cache),
            queued_bytes: bytes(self.request_memory),
            min_free_bytes: self.min_free_disk.as_u64(),
            retention_interval: self.retention_interval.into(),
            producer_expiration: self.producer_expiration.into(),
            ..StorageOptions::new(&self.data)
        }
    }

    /// The Cluster to take part in, if it is to.
    pub fn membership(&self) -> Option<Membership> {
        Some(Membership {
            cluster: self.cluster.clone()?,
            cluster_uid: self.cluster_uid.clone(),
            namespace: self.namespace.clone()?,
            pod: self.pod.clone()?,
            pod_uid: self.pod_uid.clone()?,
            address: self.advertise.clone()?,
            timing: Timing {
                duration: self.lease_duration.into(),
                renewal: self.lease_renew.into(),
            },
            replica_lag: self.replica_lag.into(),
        })
    }

    /// What the services act on.
    pub fn service(&self) -> ServiceOptions {
        ServiceOptions {
            max_connections: self.max_connections,
            max_request_bytes: bytes(self.max_request),
            request_bytes: bytes(self.request_memory),
            response_bytes: bytes(self.response_memory),
            catch_up_rate: self.catch_up_rate.map(|rate| rate.as_u64()),
            stream_window_bytes: 512 << 10,
            connection_window_bytes: 1 << 20,
            drain: self.drain.into(),
        }
    }
}

fn bytes(size: ByteSize) -> usize {
    usize::try_from(size.as_u64()).unwrap_or(usize::MAX)
}

/// Bytes in a second, of which there must be some for anything to go on.
fn rate(text: &str) -> Result<ByteSize, String> {
    const LEAST: ByteSize = ByteSize::kib(64);
    let rate: ByteSize = text.parse()?;
    match rate >= LEAST {
        true => Ok(rate),
        false => Err(format!("{rate} is too little; at least {LEAST}")),
    }
}

/// With brackets around an IPv6 address, which Kubernetes gives pods without.
fn advertised(address: &str) -> Result<String, Infallible> {
    Ok(match address.rsplit_once(':') {
        Some((host, port)) if host.parse::<Ipv6Addr>().is_ok() => format!("[{host}]:{port}"),
        _ => address.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_address_gets_brackets() {
        for (given, expected) in [
            ("fd00:10::2:7070", "[fd00:10::2]:7070"),
            ("[fd00:10::2]:7070", "[fd00:10::2]:7070"),
            ("10.0.1.2:7070", "10.0.1.2:7070"),
            ("main-0.main.shop.svc:7070", "main-0.main.shop.svc:7070"),
        ] {
            let config = Config::parse_from(["millrace-broker", "--advertise", given]);
            assert_eq!(config.advertise.as_deref(), Some(expected));
        }
    }
}
