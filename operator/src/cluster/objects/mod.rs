//! The objects of a Cluster, as they shall be: pure, from its spec alone. Each is what server-side apply takes, hence holds only what the operator
//! has an opinion on.

mod access;
pub(super) mod hash;
mod labels;
mod network;
mod overlay;
mod settings;
mod stateful_set;
#[cfg(test)]
mod tests;

pub(crate) use labels::{APPLIED_ANNOTATION, selector};
pub(crate) use settings::client_port;

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use millrace_crds::Cluster;
use millrace_crds::coordination::{ROLE_LABEL, Racks, Role};
use serde_json::{Value, json};

/// What the brokers' pods, their claims' owner and so on are called.
pub(crate) fn broker_name(cluster: &str) -> String {
    format!("{cluster}-broker")
}

/// The headless Service, by which each broker has a DNS name.
pub(crate) fn brokers_service(cluster: &str) -> String {
    format!("{cluster}-brokers")
}

/// The Service at which apps begin.
pub(crate) fn bootstrap_service(cluster: &str) -> String {
    format!("{cluster}-bootstrap")
}

/// The ConfigMap of the brokers' settings.
pub(crate) fn config_map(cluster: &str) -> String {
    format!("{cluster}-config")
}

/// What desired objects depend on besides the Cluster.
pub(crate) struct Inputs<'a> {
    /// The brokers' image if the Cluster names none.
    pub(crate) default_image: &'a str,
    /// How many pods: more than the spec says while the last ones still hold replicas.
    pub(crate) replicas: i32,
    /// The size in the claim template of the StatefulSet that is there: it can't change.
    pub(crate) claim_template_size: Option<&'a Quantity>,
    /// Whether any broker may stop, and each partition has enough replicas in sync without it.
    pub(crate) may_stop: bool,
    /// Where the brokers are.
    pub(crate) racks: &'a Racks,
}

/// All objects of a Cluster.
#[derive(Clone, Debug)]
pub(crate) struct Objects {
    pub(crate) service_account: Value,
    pub(crate) role: Value,
    pub(crate) role_binding: Value,
    pub(crate) config_map: Value,
    pub(crate) racks: Value,
    pub(crate) brokers_service: Value,
    pub(crate) bootstrap_service: Value,
    pub(crate) network_policy: Value,
    pub(crate) disruption_budget: Value,
    pub(crate) stateful_set: Value,
}

/// The objects that a Cluster shall have.
pub(crate) fn objects(cluster: &Cluster, inputs: &Inputs<'_>) -> Objects {
    let settings = settings::config_map(cluster);
    let stateful_set = stateful_set::stateful_set(cluster, inputs, &hash::of(&settings["data"]));
    let finish = |object| hash::stamp(labels::own(cluster, object));
    Objects {
        service_account: finish(access::service_account(cluster)),
        role: finish(access::role(cluster)),
        role_binding: finish(access::role_binding(cluster)),
        config_map: finish(settings),
        racks: hash::stamp(racks(cluster, inputs.racks)),
        brokers_service: finish(network::brokers_service(cluster)),
        bootstrap_service: finish(network::bootstrap_service(cluster)),
        network_policy: finish(network::network_policy(cluster)),
        disruption_budget: finish(disruption_budget(cluster, inputs.may_stop)),
        stateful_set: finish(stateful_set),
    }
}

/// For the brokers, which can't read their nodes' labels.
fn racks(cluster: &Cluster, racks: &Racks) -> Value {
    let object = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": Racks::object_name(labels::name(cluster))},
        "data": racks.data(),
    });
    let mut object = labels::own(cluster, object);
    object["metadata"]["labels"][ROLE_LABEL] = Role::Racks.as_str().into();
    object
}

/// Drains and upgrades of nodes take one broker at a time, and the next one only once partitions are whole again: a pod may be ready long before its
/// replicas are in sync. One that is not ready serves no one, and may go at any time.
fn disruption_budget(cluster: &Cluster, may_stop: bool) -> Value {
    let name = labels::name(cluster);
    let most = i32::from(may_stop);
    json!({
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": broker_name(name)},
        "spec": {
            "maxUnavailable": most,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": labels::selecting(name)},
        },
    })
}
