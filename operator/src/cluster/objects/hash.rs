//! Hashes of desired objects. Keys of JSON objects are ordered here, so equal content has one hash.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::APPLIED_ANNOTATION;

/// 64 bits in hexadecimal: enough to tell one Cluster's revisions apart.
pub(crate) fn of(value: &Value) -> String {
    let digest = Sha256::digest(value.to_string().as_bytes());
    digest[..8].iter().map(|b| format!("{b:02x}")).collect()
}

/// Writes the object's hash into an annotation.
pub(super) fn stamp(mut object: Value) -> Value {
    let hash = of(&object);
    object["metadata"]["annotations"] = json!({ APPLIED_ANNOTATION: hash });
    object
}
