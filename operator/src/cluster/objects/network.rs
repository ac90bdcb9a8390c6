//! How the brokers are reached.

use millrace_crds::Cluster;
use serde_json::{Value, json};

use super::broker_name;
use super::labels::{name, selecting};
use super::settings::{METRICS_PORT, client_port};

/// Gives each broker a DNS name, also while it is not ready: brokers and clients find it by its session, not by readiness.
pub(super) fn brokers_service(cluster: &Cluster) -> Value {
    let cluster_name = name(cluster);
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": super::brokers_service(cluster_name)},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": true,
            "selector": selecting(cluster_name),
            "ports": [port("grpc", client_port(&cluster.spec)), port("metrics", METRICS_PORT)],
        },
    })
}

/// Any broker that is ready: from there clients learn of all.
pub(super) fn bootstrap_service(cluster: &Cluster) -> Value {
    let cluster_name = name(cluster);
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": super::bootstrap_service(cluster_name)},
        "spec": {
            "type": "ClusterIP",
            "selector": selecting(cluster_name),
            "ports": [port("grpc", client_port(&cluster.spec))],
        },
    })
}

fn port(name: &str, number: i32) -> Value {
    json!({"name": name, "port": number, "targetPort": name, "protocol": "TCP"})
}

/// Clients, the operator and scrapers come from anywhere, to these two ports only.
pub(super) fn network_policy(cluster: &Cluster) -> Value {
    let cluster_name = name(cluster);
    let open = |port: i32| json!({"ports": [{"protocol": "TCP", "port": port}]});
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": broker_name(cluster_name)},
        "spec": {
            "podSelector": {"matchLabels": selecting(cluster_name)},
            "policyTypes": ["Ingress"],
            "ingress": [open(client_port(&cluster.spec)), open(METRICS_PORT)],
        },
    })
}
