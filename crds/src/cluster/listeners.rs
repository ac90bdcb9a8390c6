//! Where clients connect.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The most listeners of a Cluster.
pub(crate) const MAX_LISTENERS: usize = 8;
/// The port of the listener that is there by default.
const DEFAULT_PORT: i32 = 7070;

/// A port on which every broker serves clients, and how it is reached.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.port < 7071 || self.port > 7079")
        .message("ports 7071 to 7079 are for metrics and for the brokers among themselves: use another one"),
    validation = Rule::new("!has(self.serviceAnnotations) || self.type != 'ClusterIP'")
        .message("serviceAnnotations are for listeners of type NodePort or LoadBalancer")
)]
pub struct Listener {
    /// Its name; also of the port in the Service.
    #[schemars(
        length(min = 1, max = 15),
        regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
    )]
    pub name: String,

    /// The port, from 1024 on, since brokers run without privileges.
    #[schemars(range(min = 1024, max = 65535))]
    pub port: i32,

    /// How it is reached: `ClusterIP` from within Kubernetes; `NodePort` and `LoadBalancer` from outside too, with a Service for each broker.
    #[serde(default, rename = "type")]
    pub type_: ListenerType,

    /// The certificate. Without one, connections are not encrypted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<ListenerTls>,

    /// Annotations of the Services, for what makes load balancers and names.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = 64))]
    pub service_annotations: Option<BTreeMap<String, String>>,
}

/// How a listener is reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum ListenerType {
    /// From within Kubernetes.
    #[default]
    ClusterIP,
    /// Through a port of every node.
    NodePort,
    /// Through a load balancer for each broker and one for bootstrapping.
    LoadBalancer,
}

/// A listener's certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ListenerTls {
    /// A Secret of type `kubernetes.io/tls` in the Cluster's namespace, as cert-manager makes it. A new certificate is taken up without a restart.
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: String,
}

pub(crate) fn default_listeners() -> Vec<Listener> {
    vec![Listener {
        name: "clients".to_owned(),
        port: DEFAULT_PORT,
        type_: ListenerType::ClusterIP,
        tls: None,
        service_annotations: None,
    }]
}
