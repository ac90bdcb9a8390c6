//! The `Cluster` resource: a set of brokers that hold topics together.
//!
//! One idea, one module: [`storage`], [`listeners`], [`template`], [`broker`], [`lease`], [`topics`] and [`status`]. The rules are in CEL, for the
//! API server, so that every mistake that can be is refused when the document is applied, with no webhook that could be down.
//! The operator writes to the status only.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

pub mod broker;
pub mod lease;
pub mod listeners;
pub mod rebalance;
pub mod status;
pub mod storage;
pub mod template;
pub mod topics;

use k8s_openapi::api::core::v1::{LocalObjectReference, ResourceRequirements};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::broker::BrokerConfig;
use self::lease::LeaseTiming;
use self::listeners::{Listener, MAX_LISTENERS, default_listeners};
use self::rebalance::Rebalance;
use self::status::ClusterStatus;
use self::storage::Storage;
use self::template::{PodTemplate, resources_schema};
use self::topics::{ClusterTopicDefaults, TopicNamespaces};
use crate::config::TopicDefaults;
use crate::kubernetes_quantity;

/// The most brokers of a Cluster. Each renews a Lease every few seconds.
pub const MAX_BROKERS: i32 = 100;
const DEFAULT_BROKERS: i32 = 3;
/// Three replicas, of which two must have a record: one broker can be away, and records outlive one lost volume.
const DEFAULT_REPLICATION_FACTOR: u32 = 3;

/// What a cluster of brokers should be.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "millrace.dev",
    version = "v1alpha1",
    kind = "Cluster",
    plural = "clusters",
    shortname = "mrc",
    category = "millrace",
    namespaced,
    status = "ClusterStatus",
    derive = "PartialEq",
    doc = "A cluster of brokers that hold topics together.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    validation = Rule::new("self.metadata.name.size() <= 40 && !self.metadata.name.contains('.')")
        .message("a Cluster's name has at most 40 characters and no dots: pods, Services and Leases are named after it"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Brokers", type_ = "integer", json_path = ".spec.replicas"),
    printcolumn(name = "Up", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "Partitions", type_ = "integer", json_path = ".status.partitions"),
    printcolumn(name = "Offline", type_ = "integer", json_path = ".status.partitionsOffline"),
    printcolumn(name = "Under-replicated", type_ = "integer", json_path = ".status.partitionsUnderReplicated"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Bootstrap", type_ = "string", json_path = ".status.bootstrapAddress", priority = 1),
    printcolumn(name = "Controller", type_ = "integer", json_path = ".status.controller", priority = 1),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.version", priority = 1),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].reason"#, priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.topicDefaults.replicationFactor) || self.topicDefaults.replicationFactor <= self.replicas")
        .message("topicDefaults.replicationFactor can't be more than replicas: there would be no brokers for the copies"),
    validation = Rule::new(
        "!has(self.topicDefaults.minInSyncReplicas) || has(self.topicDefaults.replicationFactor) || \
         self.topicDefaults.minInSyncReplicas <= (self.replicas < 3 ? self.replicas : 3)"
    ).message("topicDefaults.minInSyncReplicas can't be more than topics have replicas (by default 3, or replicas if that is less)")
)]
pub struct ClusterSpec {
    /// How many brokers. Fewer: the operator moves what the last ones hold to the others first, one broker after the other. `kubectl scale`
    /// changes it.
    #[serde(default = "default_replicas")]
    #[schemars(range(min = 1, max = MAX_BROKERS))]
    pub replicas: i32,

    /// The brokers' image. By default the one that the operator was released with.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^\S+$"))]
    pub image: Option<String>,

    /// When nodes pull the image. By default as Kubernetes does: always for `latest`, otherwise if it is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<ImagePullPolicy>,

    /// Secrets with which nodes pull the image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub image_pull_secrets: Vec<LocalObjectReference>,

    /// The volume of each broker.
    pub storage: Storage,

    /// CPU and memory of each broker, as in a container.
    #[serde(
        skip_serializing_if = "Option::is_none",
        default,
        deserialize_with = "kubernetes_quantity::numbers_as_text"
    )]
    #[schemars(schema_with = "resources_schema")]
    pub resources: Option<ResourceRequirements>,

    /// When a record counts as stored: `Fsync`, once it is on the volume, or `Os`, once the operating system has it. With `Os` a node that loses
    /// power loses its newest records, and its copy counts as lost: several at once can lose what was acknowledged.
    #[serde(default)]
    pub durability: Durability,

    /// What Topics take that don't say it themselves.
    #[serde(default)]
    pub topic_defaults: ClusterTopicDefaults,

    /// From which namespaces Topics may name this Cluster.
    #[serde(default)]
    pub topic_namespaces: TopicNamespaces,

    /// Where clients connect.
    #[serde(default = "default_listeners")]
    #[schemars(length(min = 1, max = MAX_LISTENERS))]
    #[x_kube(
        merge_strategy = ListMerge::Map(vec!["name".into()]),
        validation = Rule::new("self.all(l, self.exists_one(other, other.port == l.port))")
            .message("two listeners can't have one port"),
        validation = Rule::new("self.exists(l, l.type == 'ClusterIP')")
            .message("one listener must be of type ClusterIP: the bootstrap address of apps in this Kubernetes")
    )]
    pub listeners: Vec<Listener>,

    /// How copies are spread: no two in one rack while there are enough racks.
    #[serde(default)]
    pub rack: Rack,

    /// How partitions are spread anew over brokers that were added.
    #[serde(default)]
    pub rebalance: Rebalance,

    /// What is laid over the brokers' pods: scheduling, labels, annotations, more containers and volumes. The shape is a pod template's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub template: Option<PodTemplate>,

    /// The brokers' own settings.
    #[serde(default)]
    pub config: BrokerConfig,

    /// How fast a broker that has gone silent is given up.
    #[serde(default)]
    pub lease: LeaseTiming,

    /// No broker runs while this is true, and nothing is served; volumes and all that is on them are kept, and what was there is there again when it is
    /// false.
    #[serde(default)]
    pub hibernated: bool,

    /// The operator changes nothing while this is true. The brokers go on, and leaders are elected as ever.
    #[serde(default)]
    pub paused: bool,
}

/// When nodes pull an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ImagePullPolicy {
    /// Each time.
    Always,
    /// If it is not there.
    IfNotPresent,
    /// Never.
    Never,
}

/// When a record counts as stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Durability {
    /// Once it is on the volume.
    #[default]
    Fsync,
    /// Once the operating system has it.
    Os,
}

/// How copies are spread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Rack {
    /// The label of nodes whose value is a broker's rack.
    #[serde(default = "default_topology_key")]
    #[schemars(
        length(min = 1, max = 317),
        regex(
            pattern = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$"
        )
    )]
    pub topology_key: String,
}

impl Default for Rack {
    fn default() -> Self {
        Self {
            topology_key: default_topology_key(),
        }
    }
}

impl ClusterSpec {
    /// What Topics take that don't say it themselves.
    pub fn resolved_topic_defaults(&self) -> TopicDefaults {
        let number = |written: Option<i32>| written.and_then(|n| u32::try_from(n).ok());
        let brokers = number(Some(self.replicas)).unwrap_or(1).max(1);
        let written = &self.topic_defaults;
        let factor = number(written.replication_factor);
        let replication_factor = factor.unwrap_or(DEFAULT_REPLICATION_FACTOR.min(brokers));
        let min = number(written.min_in_sync_replicas);
        TopicDefaults {
            partitions: number(Some(written.partitions)).unwrap_or(1),
            replication_factor,
            // One copy may be away, if there is more than one.
            min_insync_replicas: Some(min.unwrap_or(replication_factor.saturating_sub(1).max(1))),
        }
    }
}

fn default_replicas() -> i32 {
    DEFAULT_BROKERS
}

fn default_topology_key() -> String {
    "topology.kubernetes.io/zone".to_owned()
}

#[cfg(test)]
mod tests {
    use kube::core::cel::{validate_cel, validate_cel_update};
    use serde_json::{Value, json};

    use super::*;

    fn cluster(spec: Value) -> Cluster {
        let mut whole = json!({"storage": {"size": "10Gi"}});
        if let (Some(whole), Some(spec)) = (whole.as_object_mut(), spec.as_object()) {
            whole.extend(spec.clone());
        }
        let mut cluster = Cluster::new("main", serde_json::from_value(whole).unwrap());
        cluster.metadata.namespace = Some("kafka".into());
        cluster
    }

    #[test]
    fn a_cluster_that_says_only_its_size_has_the_documented_defaults() {
        let spec = cluster(json!({})).spec;
        assert_eq!(spec.replicas, 3);
        assert_eq!(spec.durability, Durability::Fsync);
        assert_eq!(spec.storage.on_delete, crate::DeletionPolicy::Retain);
        assert_eq!(spec.rack.topology_key, "topology.kubernetes.io/zone");
        assert_eq!(spec.listeners, default_listeners());
        assert_eq!(spec.lease.duration_seconds, 6);
        assert!(!spec.paused);
        let written = serde_json::to_value(&spec).unwrap();
        assert_eq!(
            serde_json::from_value::<ClusterSpec>(written).unwrap(),
            spec
        );
    }

    #[test]
    fn topics_have_as_many_copies_as_there_are_brokers_for() {
        for (spec, expected) in [
            (json!({}), (1, 3, Some(2))),
            (json!({"replicas": 1}), (1, 1, Some(1))),
            (json!({"replicas": 2}), (1, 2, Some(1))),
            (json!({"replicas": 9}), (1, 3, Some(2))),
            (
                json!({"replicas": 5, "topicDefaults": {"partitions": 6, "replicationFactor": 5, "minInSyncReplicas": 3}}),
                (6, 5, Some(3)),
            ),
        ] {
            let defaults = cluster(spec.clone()).spec.resolved_topic_defaults();
            let found = (
                defaults.partitions,
                defaults.replication_factor,
                defaults.min_insync_replicas,
            );
            assert_eq!(found, expected, "{spec}");
        }
    }

    #[test]
    fn the_api_server_refuses_what_can_never_work() {
        for (spec, accepted) in [
            (json!({}), true),
            (
                json!({"replicas": 2, "topicDefaults": {"replicationFactor": 3}}),
                false,
            ),
            (json!({"topicDefaults": {"minInSyncReplicas": 4}}), false),
            (
                json!({"topicDefaults": {"replicationFactor": 1, "minInSyncReplicas": 2}}),
                false,
            ),
            (
                json!({"lease": {"durationSeconds": 3, "renewSeconds": 2}}),
                false,
            ),
            (
                json!({"listeners": [{"name": "a", "port": 8000}, {"name": "b", "port": 8000}]}),
                false,
            ),
            (
                json!({"listeners": [{"name": "a", "port": 8000, "type": "NodePort"}]}),
                false,
            ),
            (json!({"config": {"replicaLag": "2s"}}), true),
            (json!({"config": {"replicaLag": "1m30s"}}), true),
            (json!({"config": {"replicaLag": "1999ms"}}), false),
            (json!({"config": {"replicaLag": "61m"}}), false),
            (json!({"topicNamespaces": {"from": "Listed"}}), false),
            (
                json!({"topicNamespaces": {"from": "Listed", "names": ["shop"]}}),
                true,
            ),
            (
                json!({"template": {"spec": {"containers": [{"name": "broker", "image": "x"}]}}}),
                false,
            ),
        ] {
            let verdict = validate_cel(&cluster(spec.clone()));
            assert_eq!(verdict.is_ok(), accepted, "{spec}: {verdict:?}");
        }
    }

    #[test]
    fn storage_can_only_grow_where_it_is() {
        let storage = |storage: Value| cluster(json!({"storage": storage}));
        for (old, new, accepted) in [
            (json!({"size": "1Ti"}), json!({"size": "1024Gi"}), true),
            (json!({"size": "1Ti"}), json!({"size": "2Ti"}), true),
            (json!({"size": "1Ti"}), json!({"size": "1000Gi"}), false),
            (
                json!({"size": "1Ti", "className": "a"}),
                json!({"size": "1Ti", "className": "b"}),
                false,
            ),
            (
                json!({"size": "1Ti"}),
                json!({"size": "1Ti", "className": "b"}),
                false,
            ),
            (
                json!({"size": "1Ti"}),
                json!({"size": "1Ti", "onDelete": "Delete"}),
                true,
            ),
        ] {
            let verdict = validate_cel_update(&storage(new.clone()), &storage(old.clone()));
            assert_eq!(verdict.is_ok(), accepted, "{old} to {new}: {verdict:?}");
        }
    }

    #[test]
    fn fields_of_the_pod_template_that_are_not_ours_are_kept() {
        let template = json!({
            "metadata": {"labels": {"team": "shop"}},
            "spec": {"nodeSelector": {"disk": "nvme"}, "dnsPolicy": "Default", "hostAliases": [{"ip": "1.2.3.4"}]},
        });
        let read = cluster(json!({"template": template.clone()}));
        assert_eq!(serde_json::to_value(read.spec.template).unwrap(), template);
    }
}
