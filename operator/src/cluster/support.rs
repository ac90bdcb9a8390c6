//! What a Cluster's spec can say and no release so far can do. It is refused as a whole: to serve without encryption whoever asked for it
//! would be worse than not to serve.

use millrace_crds::cluster::ClusterSpec;
use millrace_crds::cluster::listeners::ListenerType;

/// What it is, and what to do.
pub(super) fn unsupported(spec: &ClusterSpec) -> Option<String> {
    for listener in &spec.listeners {
        let name = &listener.name;
        if listener.tls.is_some() {
            return Some(format!(
                "listener {name}: TLS is not supported yet; remove spec.listeners[].tls, or wait for a release that has it"
            ));
        }
        if listener.type_ != ListenerType::ClusterIP {
            return Some(format!(
                "listener {name}: type {:?} is not supported yet; use ClusterIP",
                listener.type_
            ));
        }
    }
    (spec.listeners.len() > 1).then(|| {
        "more than one listener is not supported yet; keep one of type ClusterIP".to_owned()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_nothing_serves_yet_is_never_ignored() {
        for (listeners, expected) in [
            (json!([{"name": "a", "port": 7070}]), None),
            (
                json!([{"name": "a", "port": 7070, "tls": {"secretName": "s"}}]),
                Some("TLS"),
            ),
            (
                json!([{"name": "a", "port": 7070}, {"name": "b", "port": 9000, "type": "NodePort"}]),
                Some("NodePort"),
            ),
            (
                json!([{"name": "a", "port": 7070}, {"name": "b", "port": 9000}]),
                Some("more than one"),
            ),
        ] {
            let spec = json!({"storage": {"size": "1Gi"}, "listeners": listeners});
            let found = unsupported(&serde_json::from_value(spec).unwrap());
            match expected {
                None => assert_eq!(found, None, "{listeners}"),
                Some(word) => assert!(found.unwrap().contains(word), "{listeners}"),
            }
        }
    }
}
