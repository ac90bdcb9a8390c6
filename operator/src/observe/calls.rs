//! Counts the requests to the API server by verb and resource, as its own metrics and RBAC name them.

use std::sync::Arc;

use http::{Method, Request, Uri};
use kube::client::Body;
use tower::util::MapRequestLayer;

use super::Metrics;

/// A layer around the client's connection.
pub(crate) fn count_calls(
    metrics: Arc<Metrics>,
) -> MapRequestLayer<impl Fn(Request<Body>) -> Request<Body> + Clone> {
    MapRequestLayer::new(move |request: Request<Body>| {
        let (verb, resource) = call(request.method(), request.uri());
        metrics.called(verb, resource);
        request
    })
}

/// The verb, and the resource with its subresource.
fn call(method: &Method, uri: &Uri) -> (&'static str, String) {
    let mut path = uri.path().split('/').skip_while(|part| part.is_empty());
    // `/api/v1/...` and `/apis/<group>/<version>/...`.
    let skipped = if path.next() == Some("apis") { 2 } else { 1 };
    let mut path = path.skip(skipped).peekable();
    let mut resource = path.next().unwrap_or_default();
    let mut name = path.next();
    if resource == "namespaces" && path.peek().is_some() {
        resource = path.next().unwrap_or_default();
        name = path.next();
    }
    let subresource = path.next();
    let watch = uri.query().is_some_and(|query| query.contains("watch="));
    let verb = match (method, name) {
        (&Method::GET, _) if watch => "watch",
        (&Method::GET, None) => "list",
        (&Method::GET, Some(_)) => "get",
        (&Method::POST, _) => "create",
        (&Method::PUT, _) => "update",
        (&Method::PATCH, _) => "patch",
        (&Method::DELETE, None) => "deletecollection",
        (&Method::DELETE, Some(_)) => "delete",
        _ => "other",
    };
    let resource = match subresource {
        Some(subresource) => format!("{resource}/{subresource}"),
        None => resource.to_owned(),
    };
    (verb, resource)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_the_words_of_rbac() {
        const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/shop/leases";
        for (method, uri, verb, resource) in [
            (Method::POST, format!("{LEASES}?"), "create", "leases"),
            (
                Method::GET,
                format!("{LEASES}?watch=true"),
                "watch",
                "leases",
            ),
            (Method::GET, format!("{LEASES}?limit=500"), "list", "leases"),
            (Method::PUT, format!("{LEASES}/a"), "update", "leases"),
            (Method::DELETE, format!("{LEASES}/a"), "delete", "leases"),
            (Method::DELETE, LEASES.into(), "deletecollection", "leases"),
            (Method::GET, "/api/v1/nodes".into(), "list", "nodes"),
            (
                Method::GET,
                "/api/v1/namespaces/shop".into(),
                "get",
                "namespaces",
            ),
            (
                Method::GET,
                "/api/v1/namespaces/shop/pods/a".into(),
                "get",
                "pods",
            ),
            (
                Method::PATCH,
                "/apis/millrace.dev/v1alpha1/namespaces/shop/topics/a/status".into(),
                "patch",
                "topics/status",
            ),
        ] {
            let uri: Uri = uri.parse().unwrap();
            assert_eq!(call(&method, &uri), (verb, resource.to_owned()), "{uri}");
        }
    }
}
