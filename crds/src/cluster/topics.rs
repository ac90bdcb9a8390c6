//! What a Cluster says to Topics: its defaults, and from where they may come.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{MAX_PARTITIONS, MAX_REPLICATION_FACTOR};

/// What Topics take that don't say it themselves. A change is for new Topics: it never changes those that are there.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new(
        "!has(self.minInSyncReplicas) || !has(self.replicationFactor) || self.minInSyncReplicas <= self.replicationFactor"
    ).message("minInSyncReplicas can't be more than replicationFactor: such topics could never accept acks=all")
)]
pub struct ClusterTopicDefaults {
    /// How many partitions.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = MAX_PARTITIONS))]
    pub partitions: i32,

    /// How many brokers hold a copy of each partition. By default 3, or all brokers if there are fewer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_REPLICATION_FACTOR))]
    pub replication_factor: Option<i32>,

    /// How many of them must have a record before `acks=all` is answered. By default all but one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_REPLICATION_FACTOR))]
    pub min_in_sync_replicas: Option<i32>,
}

impl Default for ClusterTopicDefaults {
    fn default() -> Self {
        Self {
            partitions: one(),
            replication_factor: None,
            min_in_sync_replicas: None,
        }
    }
}

/// From which namespaces Topics may name the Cluster. Those in the Cluster's own namespace always may.
#[derive(KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(self.from == 'Listed') == has(self.names)")
        .message("topicNamespaces.names belongs to from: Listed, and must be there with it"),
    validation = Rule::new("(self.from == 'Selector') == has(self.selector)")
        .message("topicNamespaces.selector belongs to from: Selector, and must be there with it")
)]
pub struct TopicNamespaces {
    /// `Same`: the Cluster's namespace only. `Listed`: those in `names` too. `Selector`: those with certain labels too. `All`: every namespace.
    #[serde(default)]
    pub from: TopicNamespacesFrom,

    /// With `Listed`: the namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256), inner(length(min = 1, max = 63)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub names: Option<Vec<String>>,

    /// With `Selector`: the labels of the namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
}

/// Which namespaces, in a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum TopicNamespacesFrom {
    /// The Cluster's own.
    #[default]
    Same,
    /// Those in a list too.
    Listed,
    /// Those with certain labels too.
    Selector,
    /// Every one.
    All,
}

impl TopicNamespaces {
    /// Whether a Topic in that namespace, which has these labels, may name a Cluster in `cluster_namespace`.
    pub fn admit(
        &self,
        cluster_namespace: &str,
        namespace: &str,
        labels: &BTreeMap<String, String>,
    ) -> bool {
        if namespace == cluster_namespace {
            return true;
        }
        match self.from {
            TopicNamespacesFrom::Same => false,
            TopicNamespacesFrom::All => true,
            TopicNamespacesFrom::Listed => self.names.iter().flatten().any(|n| n == namespace),
            TopicNamespacesFrom::Selector => self
                .selector
                .as_ref()
                .is_some_and(|selector| matches(selector, labels)),
        }
    }
}

/// As Kubernetes matches labels. An operator that is not known matches nothing.
fn matches(selector: &LabelSelector, labels: &BTreeMap<String, String>) -> bool {
    let equal = |(key, value): (&String, &String)| labels.get(key) == Some(value);
    let mut wanted = selector.match_labels.iter().flatten();
    let mut expressions = selector.match_expressions.iter().flatten();
    wanted.all(equal)
        && expressions.all(|expression| {
            let value = labels.get(&expression.key);
            let listed = |value| expression.values.iter().flatten().any(|v| v == value);
            match expression.operator.as_str() {
                "In" => value.is_some_and(listed),
                "NotIn" => !value.is_some_and(listed),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

fn one() -> i32 {
    1
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn topics_come_only_from_namespaces_that_are_admitted() {
        let labels = BTreeMap::from([("team".to_owned(), "shop".to_owned())]);
        let selector = |key: &str, operator: &str, values: &[&str]| json!({"from": "Selector", "selector": {"matchExpressions": [{"key": key, "operator": operator, "values": values}]}});
        for (allowed, admitted) in [
            (json!({}), false),
            (json!({"from": "All"}), true),
            (json!({"from": "Listed", "names": ["shop"]}), true),
            (json!({"from": "Listed", "names": ["shops"]}), false),
            (
                json!({"from": "Selector", "selector": {"matchLabels": {"team": "shop"}}}),
                true,
            ),
            (
                json!({"from": "Selector", "selector": {"matchLabels": {"team": "other"}}}),
                false,
            ),
            (json!({"from": "Selector", "selector": {}}), true),
            (selector("team", "In", &["a", "shop"]), true),
            (selector("team", "NotIn", &["a"]), true),
            (selector("none", "NotIn", &["a"]), true),
            (selector("team", "Exists", &[]), true),
            (selector("team", "DoesNotExist", &[]), false),
        ] {
            let namespaces: TopicNamespaces = serde_json::from_value(allowed.clone()).unwrap();
            assert_eq!(
                namespaces.admit("kafka", "shop", &labels),
                admitted,
                "{allowed}"
            );
            assert!(namespaces.admit("kafka", "kafka", &labels));
        }
    }
}
