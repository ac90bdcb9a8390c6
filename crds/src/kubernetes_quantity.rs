//! Amounts in Kubernetes' own notation where Kubernetes' own types are used: `500m` CPUs, `100Gi` of storage.
//!
//! Kubernetes takes plain numbers too (`cpu: 2`), which the generated types do not: their schema would refuse what every manifest has, and one
//! number in a stored object would make a whole list unreadable.

use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use schemars::{Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, de::Error};
use serde_json::Value;

use crate::quantity::MAX_SIZE_LENGTH;

/// As the API server itself writes it for its own types.
const PATTERN: &str = r"^[+-]?([0-9]+|[0-9]+\.[0-9]*|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?([0-9]+|[0-9]+\.[0-9]*|\.[0-9]+)))?$";

/// The schema of an amount.
pub(crate) fn schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "x-kubernetes-int-or-string": true,
        "pattern": PATTERN,
        "maxLength": MAX_SIZE_LENGTH,
    })
}

/// Reads an amount that may be a plain number.
pub(crate) fn number_as_text<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Quantity, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::String(text) => Ok(Quantity(text)),
        Value::Number(number) => Ok(Quantity(number.to_string())),
        other => Err(D::Error::custom(format!(
            "{other} is not an amount such as \"100Gi\""
        ))),
    }
}

/// Reads the resources of a container, whose amounts may be plain numbers.
pub(crate) fn numbers_as_text<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<ResourceRequirements>, D::Error> {
    let mut value = Value::deserialize(deserializer)?;
    for field in ["limits", "requests"] {
        let amounts = value.get_mut(field).and_then(Value::as_object_mut);
        for amount in amounts.into_iter().flat_map(|amounts| amounts.values_mut()) {
            if let Value::Number(number) = amount {
                *amount = Value::String(number.to_string());
            }
        }
    }
    Option::deserialize(value).map_err(D::Error::custom)
}
