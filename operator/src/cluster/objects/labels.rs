//! Labels and owner of what belongs to a Cluster.

use millrace_crds::Cluster;
use millrace_crds::coordination::CLUSTER_LABEL;
use serde_json::{Value, json};

/// Holds the hash of an object as it was applied: what was taken out of a spec is seen by it.
pub(crate) const APPLIED_ANNOTATION: &str = "millrace.dev/applied";

pub(super) fn name(cluster: &Cluster) -> &str {
    cluster.metadata.name.as_deref().unwrap_or_default()
}

pub(super) fn namespace(cluster: &Cluster) -> &str {
    cluster.metadata.namespace.as_deref().unwrap_or_default()
}

/// By which the brokers' pods are found. It never changes: a StatefulSet's selector can't.
pub(super) fn selecting(cluster: &str) -> Value {
    json!({
        "app.kubernetes.io/name": "millrace",
        "app.kubernetes.io/component": "broker",
        "app.kubernetes.io/instance": cluster,
    })
}

/// The same for a command line or a scale subresource.
pub(crate) fn selector(cluster: &str) -> String {
    format!(
        "app.kubernetes.io/component=broker,app.kubernetes.io/instance={cluster},app.kubernetes.io/name=millrace"
    )
}

/// All labels of what belongs to a Cluster.
pub(super) fn labels(cluster: &str) -> Value {
    let mut labels = selecting(cluster);
    labels["app.kubernetes.io/managed-by"] = "millrace-operator".into();
    labels[CLUSTER_LABEL] = cluster.into();
    labels
}

/// Gives the object its namespace, its labels and its owner.
pub(super) fn own(cluster: &Cluster, mut object: Value) -> Value {
    let metadata = &mut object["metadata"];
    metadata["namespace"] = namespace(cluster).into();
    metadata["labels"] = labels(name(cluster));
    // Without blockOwnerDeletion: that needs the right to change the Cluster's finalizers' subresource, and nothing waits for it.
    metadata["ownerReferences"] = json!([{
        "apiVersion": "millrace.dev/v1alpha1",
        "kind": "Cluster",
        "name": name(cluster),
        "uid": cluster.metadata.uid.as_deref().unwrap_or_default(),
        "controller": true,
    }]);
    object
}
