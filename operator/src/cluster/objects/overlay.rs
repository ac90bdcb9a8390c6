//! Lays `spec.template` over the pods as people expect it of Kubernetes: maps are merged, lists of named things by their key, and
//! all other lists are replaced.

use serde_json::Value;

/// The lists whose items have a key, as in Kubernetes' own merges.
fn key(list: &str) -> Option<&'static str> {
    match list {
        "containers" | "initContainers" | "volumes" | "env" | "imagePullSecrets" => Some("name"),
        "volumeMounts" => Some("mountPath"),
        "volumeDevices" => Some("devicePath"),
        "ports" => Some("containerPort"),
        _ => None,
    }
}

pub(super) fn lay_over(base: &mut Value, over: &Value) {
    let Some(over) = over.as_object() else {
        *base = over.clone();
        return;
    };
    let Some(base) = base.as_object_mut() else {
        *base = Value::Object(over.clone());
        return;
    };
    for (field, value) in over {
        let held = base.entry(field).or_insert(Value::Null);
        match (key(field), held.as_array_mut(), value.as_array()) {
            (Some(key), Some(held), Some(items)) => merge(held, items, key),
            _ => lay_over(held, value),
        }
    }
}

fn merge(held: &mut Vec<Value>, items: &[Value], key: &str) {
    for item in items {
        match held.iter_mut().find(|other| other[key] == item[key]) {
            Some(other) => lay_over(other, item),
            None => held.push(item.clone()),
        }
    }
}
