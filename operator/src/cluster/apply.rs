//! Brings objects to what they shall be, with server-side apply, and only if they are not.

use std::sync::Arc;

use kube::Api;
use kube::api::{Patch, PatchParams};
use serde::Serialize;
use serde_json::Value;

use crate::cache::Cache;
use crate::context::{Context, MANAGER, Namespaced};
use crate::error::{Doing, Error};

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Applied {
    /// It was as it shall be.
    Same,
    /// It was not there.
    Created,
    /// It was otherwise.
    Changed,
}

pub(super) async fn apply<K>(
    context: &Context,
    cache: &Arc<Cache<K>>,
    desired: &Value,
) -> Result<Applied, Error>
where
    K: Namespaced + Serialize + Send + Sync + 'static,
{
    let text = |field: &str| desired["metadata"][field].as_str().unwrap_or_default();
    let (namespace, name) = (text("namespace"), text("name"));
    let there = cache.get(namespace, name);
    if let Some(there) = &there {
        let observed = serde_json::to_value(&**there).unwrap_or_default();
        if holds(&observed, desired) {
            return Ok(Applied::Same);
        }
    }
    let api: Api<K> = context.api(namespace);
    let params = PatchParams::apply(MANAGER).force();
    api.patch(name, &params, &Patch::Apply(desired))
        .await
        .doing(|| format!("apply {} {namespace}/{name}", K::kind(&())))?;
    Ok(match there {
        Some(_) => Applied::Changed,
        None => Applied::Created,
    })
}

/// Whether all that is desired is so. What others have added to maps is theirs.
fn holds(observed: &Value, desired: &Value) -> bool {
    match (observed, desired) {
        (Value::Object(observed), Value::Object(desired)) => {
            desired.iter().all(|(field, desired)| {
                observed
                    .get(field)
                    .map_or(is_empty(desired), |observed| holds(observed, desired))
            })
        }
        (Value::Array(observed), Value::Array(desired)) => {
            let mut pairs = observed.iter().zip(desired);
            observed.len() == desired.len() && pairs.all(|(o, d)| holds(o, d))
        }
        (observed, desired) => observed == desired,
    }
}

/// The API server leaves out what is empty.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_object_is_left_alone_only_if_all_that_is_desired_is_so() {
        for (observed, desired, expected) in [
            (json!({"a": 1, "default": 2}), json!({"a": 1}), true),
            (json!({"a": 2}), json!({"a": 1}), false),
            (json!({}), json!({"a": 1}), false),
            (json!({}), json!({"a": {}}), true),
            (
                json!({"l": [{"a": 1, "b": 2}]}),
                json!({"l": [{"a": 1}]}),
                true,
            ),
            (json!({"l": [1, 2]}), json!({"l": [1]}), false),
            (json!({"l": [2]}), json!({"l": [1]}), false),
            (json!({"m": {"x": 1, "y": 2}}), json!({"m": {"x": 1}}), true),
        ] {
            assert_eq!(holds(&observed, &desired), expected, "{observed} {desired}");
        }
    }
}
