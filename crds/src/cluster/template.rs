//! What is laid over the brokers' pods.
//!
//! It has the shape of a pod template. What people use most is typed, hence checked when it is applied; all else of a pod passes through as it
//! is, and if the API server refuses the pods for it, the condition says so. To type all would make the definition several times larger than what
//! `kubectl apply` can take.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, ResourceRequirements, Toleration, TopologySpreadConstraint,
};
use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::kubernetes_quantity;

/// The container that is the broker.
pub const BROKER_CONTAINER: &str = "broker";

/// What is laid over the brokers' pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PodTemplate {
    /// Labels and annotations of the pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metadata: Option<PodMetadata>,
    /// Fields of a pod's spec.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spec: Option<PodOverlay>,
}

/// Labels and annotations of the pods.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[x_kube(
    validation = Rule::new("!has(self.labels) || !self.labels.exists(key, key.startsWith('millrace.dev/') || key.startsWith('app.kubernetes.io/'))")
        .message("labels that begin with millrace.dev/ or app.kubernetes.io/ are the operator's: it finds the pods by them")
)]
pub struct PodMetadata {
    /// Labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64))]
    pub labels: Option<BTreeMap<String, String>>,
    /// Annotations.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64))]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// Fields of a pod's spec. Those that are not named here pass through as they are.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.restartPolicy) || self.restartPolicy == 'Always'")
        .message("template.spec.restartPolicy must stay Always: a broker that ends is started again")
)]
pub struct PodOverlay {
    /// The labels that a node must have.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64))]
    pub node_selector: Option<BTreeMap<String, String>>,

    /// On which nodes, and near or far from which pods. By default brokers of a Cluster keep off each other's nodes where they can.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,

    /// The taints that do not keep brokers away.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub tolerations: Option<Vec<Toleration>>,

    /// How evenly brokers are spread. By default over racks.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub topology_spread_constraints: Option<Vec<TopologySpreadConstraint>>,

    /// Which pods give way when a node is short.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,

    /// How long a broker may take to hand its leaderships over and stop.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 30, max = 86400))]
    pub termination_grace_period_seconds: Option<i64>,

    /// Always, if given.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub restart_policy: Option<String>,

    /// More containers; and of the container `broker` what is laid over it, such as `env` and `volumeMounts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub containers: Option<Vec<ContainerOverlay>>,

    /// All else.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// A container, or what is laid over the broker's. Fields that are not named here pass through as they are.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[x_kube(
    validation = Rule::new("self.name != 'broker' || (!has(self.image) && !has(self.command) && !has(self.args) && !has(self.resources))")
        .message("the container broker takes its image and resources from spec.image and spec.resources, and its options from spec.config")
)]
pub struct ContainerOverlay {
    /// Its name; `broker` is the broker.
    #[schemars(length(min = 1, max = 63))]
    pub name: String,
    /// Its image.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512))]
    pub image: Option<String>,
    /// Its program.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub command: Option<Vec<String>>,
    /// Its arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256))]
    pub args: Option<Vec<String>>,
    /// Its CPU and memory.
    #[serde(
        skip_serializing_if = "Option::is_none",
        default,
        deserialize_with = "kubernetes_quantity::numbers_as_text"
    )]
    #[schemars(schema_with = "resources_schema")]
    pub resources: Option<ResourceRequirements>,
    /// All else.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

/// The schema of [`ResourceRequirements`], with amounts that may be plain numbers.
pub(crate) fn resources_schema(generator: &mut SchemaGenerator) -> Schema {
    let mut schema = ResourceRequirements::json_schema(generator);
    for field in ["limits", "requests"] {
        if let Some(amounts) = schema.pointer_mut(&format!("/properties/{field}")) {
            amounts["additionalProperties"] = kubernetes_quantity::schema(generator).to_value();
        }
    }
    schema
}
