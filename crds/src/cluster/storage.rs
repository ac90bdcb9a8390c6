//! The brokers' volumes.
//!
//! **A broker's identity is on its volume**, not in its pod's name: when a broker first starts on an empty volume, the operator gives
//! it an id and the broker writes it there, with the Cluster's uid and the id of its store. From then on the volume says who it is; a pod that
//! finds another Cluster's uid, or an id that is not the one in `status.brokers` for this claim, stops and says so. So a claim that is swapped, restored or bound to
//! another pod never makes a broker answer for records that it does not hold. The store's id changes whenever acknowledged records may be lost, an empty volume
//! included, and ISRs name stores, not brokers.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use crate::kubernetes_quantity;
use crate::topic::DeletionPolicy;

/// The volume of each broker.
#[derive(KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.className) == has(oldSelf.className) && (!has(self.className) || self.className == oldSelf.className)")
        .message("storage.className can't change: volumes stay where they are, so make a new Cluster to move")
)]
pub struct Storage {
    /// Its size, such as `100Gi`. It can only grow, and does so without a restart where the storage class allows it.
    #[serde(deserialize_with = "kubernetes_quantity::number_as_text")]
    #[schemars(schema_with = "kubernetes_quantity::schema")]
    #[x_kube(
        validation = Rule::new("quantity(string(self)).compareTo(quantity('1Gi')) >= 0")
            .message("storage.size must be at least 1Gi: brokers refuse writes before a volume is full"),
        validation = Rule::new("quantity(string(self)).compareTo(quantity(string(oldSelf))) >= 0")
            .message("storage.size can only grow: no volume can be made smaller")
    )]
    pub size: Quantity,

    /// The storage class. By default that of the Kubernetes cluster. It can't change.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub class_name: Option<String>,

    /// What becomes of the volumes when the Cluster is deleted: `Retain` keeps them, and a new Cluster of the same name takes them over;
    /// `Delete` deletes them with all records. Volumes of brokers that are removed by scaling in are empty and go in any case.
    #[serde(default)]
    pub on_delete: DeletionPolicy,
}
