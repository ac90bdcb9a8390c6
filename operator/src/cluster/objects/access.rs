//! What brokers may do at the API server: the least.

use millrace_crds::Cluster;
use serde_json::{Value, json};

use super::broker_name;
use super::labels::{name, namespace};

pub(super) fn service_account(cluster: &Cluster) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": broker_name(name(cluster))},
        "automountServiceAccountToken": false,
    })
}

/// Leases are the brokers' coordination, and ConfigMaps the topics' records. A broker deletes neither.
pub(super) fn role(cluster: &Cluster) -> Value {
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": broker_name(name(cluster))},
        "rules": [
            {
                "apiGroups": ["coordination.k8s.io"],
                "resources": ["leases"],
                "verbs": ["get", "list", "watch", "create", "update"],
            },
            {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list", "watch"]},
        ],
    })
}

pub(super) fn role_binding(cluster: &Cluster) -> Value {
    let broker = broker_name(name(cluster));
    json!({
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": broker},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": broker},
        "subjects": [{"kind": "ServiceAccount", "name": broker, "namespace": namespace(cluster)}],
    })
}
