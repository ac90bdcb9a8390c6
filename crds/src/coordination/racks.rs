//! The racks of a Cluster's brokers. A broker can't read its node's labels; the operator can.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ConfigMap;
use serde::{Deserialize, Serialize};

use super::Role;
use super::lease::{self, LeaseError};

const DATA_KEY: &str = "racks.json";

/// The racks of a Cluster's brokers, as far as they are known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Racks {
    /// By broker id.
    pub racks: BTreeMap<i32, String>,
}

impl Racks {
    /// The name of the ConfigMap.
    pub fn object_name(cluster: &str) -> String {
        format!("{cluster}-racks")
    }

    /// Reads it.
    ///
    /// # Errors
    /// If the ConfigMap holds no racks.
    pub fn read(object: &ConfigMap) -> Result<Self, LeaseError> {
        let text = object.data.as_ref().and_then(|data| data.get(DATA_KEY));
        lease::read_document(text, || lease::name(&object.metadata), DATA_KEY)
    }

    /// Whether this is the ConfigMap of racks.
    pub fn is_in(object: &ConfigMap) -> bool {
        let labels = object.metadata.labels.as_ref();
        let role = labels.and_then(|labels| labels.get(super::ROLE_LABEL));
        role.is_some_and(|role| role == Role::Racks.as_str())
    }

    /// The ConfigMap's `data`.
    pub fn data(&self) -> BTreeMap<String, String> {
        [(DATA_KEY.to_owned(), lease::write_document(self))].into()
    }
}
