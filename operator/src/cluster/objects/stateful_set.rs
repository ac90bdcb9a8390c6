//! The StatefulSet: pods with a stable name and a volume each, which come back with no operator.

use millrace_crds::cluster::template::BROKER_CONTAINER;
use millrace_crds::{Cluster, DeletionPolicy};
use serde_json::{Value, json};

use super::labels::{labels, name, selecting};
use super::settings::{DATA, METRICS_PORT, client_port};
use super::{Inputs, broker_name, brokers_service, config_map, overlay};

/// Of the container: runs as in the images, which need no more.
const USER: i64 = 65532;
/// On a pod: a change of settings is a change of the pod.
const CONFIG_ANNOTATION: &str = "millrace.dev/config";
/// How long a broker may take to recover its store before Kubernetes gives it up: half an hour, asked every two seconds.
const STARTUP_PROBES: i32 = 900;

pub(super) fn stateful_set(cluster: &Cluster, inputs: &Inputs<'_>, config_hash: &str) -> Value {
    let cluster_name = name(cluster);
    let when_deleted = match cluster.spec.storage.on_delete {
        DeletionPolicy::Retain => "Retain",
        DeletionPolicy::Delete => "Delete",
    };
    json!({
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": broker_name(cluster_name)},
        "spec": {
            "replicas": inputs.replicas,
            "serviceName": brokers_service(cluster_name),
            "selector": {"matchLabels": selecting(cluster_name)},
            // In order, one broker that can't start would keep all after it away.
            "podManagementPolicy": "Parallel",
            // The operator restarts: it knows when that is safe.
            "updateStrategy": {"type": "OnDelete"},
            "persistentVolumeClaimRetentionPolicy": {"whenDeleted": when_deleted, "whenScaled": "Retain"},
            "volumeClaimTemplates": [claim(cluster, inputs)],
            "template": pod(cluster, inputs, config_hash),
        },
    })
}

fn claim(cluster: &Cluster, inputs: &Inputs<'_>) -> Value {
    let storage = &cluster.spec.storage;
    let mut claim = json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data", "labels": labels(name(cluster))},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": inputs.claim_template_size.unwrap_or(&storage.size)}},
        },
    });
    if let Some(class) = &storage.class_name {
        claim["spec"]["storageClassName"] = class.as_str().into();
    }
    claim
}

fn pod(cluster: &Cluster, inputs: &Inputs<'_>, config_hash: &str) -> Value {
    let spec = &cluster.spec;
    let cluster_name = name(cluster);
    let spread = |key: &str| {
        json!({
            "maxSkew": 1,
            "topologyKey": key,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": selecting(cluster_name)},
        })
    };
    let mut pod_spec = json!({
        "serviceAccountName": broker_name(cluster_name),
        "automountServiceAccountToken": true,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": 60,
        "securityContext": {
            "runAsNonRoot": true,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "topologySpreadConstraints": [spread(&spec.rack.topology_key), spread("kubernetes.io/hostname")],
        "containers": [container(cluster, inputs)],
    });
    if !spec.image_pull_secrets.is_empty() {
        pod_spec["imagePullSecrets"] = json!(spec.image_pull_secrets);
    }
    let mut template = json!({
        "metadata": {
            "labels": labels(cluster_name),
            "annotations": {CONFIG_ANNOTATION: config_hash},
        },
        "spec": pod_spec,
    });
    if let Some(over) = &spec.template {
        overlay::lay_over(&mut template, &json!(over));
    }
    template
}

fn container(cluster: &Cluster, inputs: &Inputs<'_>) -> Value {
    let spec = &cluster.spec;
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    // The pod's address and not its name: of a pod that is made again DNS tells late, and after an outage of the control plane very late.
    let advertise = format!("$(MILLRACE_POD_IP):{}", client_port(spec));
    let probe = |path: &str, period: i32, failures: i32| {
        json!({
            "httpGet": {"path": path, "port": "metrics"},
            "periodSeconds": period,
            "timeoutSeconds": 5,
            "failureThreshold": failures,
        })
    };
    let mut container = json!({
        "name": BROKER_CONTAINER,
        "image": spec.image.as_deref().unwrap_or(inputs.default_image),
        "envFrom": [{"configMapRef": {"name": config_map(name(cluster))}}],
        "env": [
            field("MILLRACE_POD", "metadata.name"),
            field("MILLRACE_POD_UID", "metadata.uid"),
            field("MILLRACE_POD_IP", "status.podIP"),
            {"name": "MILLRACE_ADVERTISE", "value": advertise},
        ],
        "ports": [
            {"name": "grpc", "containerPort": client_port(spec), "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
        ],
        "startupProbe": probe("/healthz", 2, STARTUP_PROBES),
        "livenessProbe": probe("/healthz", 10, 6),
        "readinessProbe": probe("/readyz", 2, 3),
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": true,
        },
        "volumeMounts": [{"name": "data", "mountPath": DATA}],
    });
    if let Some(policy) = spec.image_pull_policy {
        container["imagePullPolicy"] = json!(policy);
    }
    if let Some(resources) = &spec.resources {
        container["resources"] = json!(resources);
    }
    container
}
