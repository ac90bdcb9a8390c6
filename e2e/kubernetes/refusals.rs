//! Mistakes that the API server can't see: each ends in a condition that names cause and next step, and in nothing broken.

use millrace_e2e::kubernetes::{Installed, Kubernetes, condition, is_ready};
fn cluster(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: millrace.dev/v1alpha1\nkind: Cluster\nmetadata: {{name: {name}}}\nspec: {spec}\n---\n"
    )
}

fn topic(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata: {{name: {name}}}\nspec: {spec}\n---\n"
    )
}

pub(crate) fn mistakes_end_in_conditions_that_say_what_to_do(kubernetes: &Kubernetes) {
    let (installed, _) = Installed::install(kubernetes);
    let namespace = format!("refusals-{}", std::process::id());
    installed.kubectl(&["create", "namespace", &namespace]);
    let good = "{replicas: 1, storage: {size: 1Gi}}";
    let documents = cluster("main", good)
        + &cluster(
            "image",
            "{replicas: 1, storage: {size: 1Gi}, image: 'nowhere.invalid/none:1'}",
        )
        + &cluster(
            "class",
            "{replicas: 1, storage: {size: 1Gi, className: golden}}",
        )
        + &cluster(
            "large",
            "{replicas: 1, storage: {size: 1Gi}, resources: {requests: {memory: 100Ti}}}",
        )
        + &topic("good", "{partitions: 2, replicationFactor: 1}")
        + &topic("nowhere", "{clusterRef: {name: absent}}")
        + &topic("copies", "{replicationFactor: 5}")
        + &topic("first", "{topicName: same}");
    installed.apply(&namespace, &documents);
    // Not before the first has the name.
    installed.wait(60, &namespace, "topic/first", "Ready", is_ready);
    installed.apply(&namespace, &topic("second", "{topicName: same}"));

    let limited = format!("{namespace}-limited");
    installed.kubectl(&["create", "namespace", &limited]);
    installed.apply(
        &limited,
        "apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: none}\nspec: {hard: {pods: '0'}}\n",
    );
    installed.apply(&limited, &cluster("main", good));

    for (namespace, object, reason, parts) in [
        (
            &namespace,
            "topic/nowhere",
            "ClusterNotFound",
            &["absent"][..],
        ),
        (&namespace, "topic/copies", "TooFewBrokers", &["5", "1"]),
        (&namespace, "topic/second", "NameTaken", &["same", "first"]),
        (
            &namespace,
            "cluster/image",
            "ImagePullFailed",
            &["nowhere.invalid/none:1"],
        ),
        (
            &namespace,
            "cluster/class",
            "StorageClassNotFound",
            &["golden"],
        ),
        (&namespace, "cluster/large", "Unschedulable", &["memory"]),
        (&limited, "cluster/main", "QuotaExceeded", &["quota"]),
    ] {
        installed.wait(90, namespace, object, reason, |object| {
            condition(object, "Ready")
                .is_some_and(|(status, found, _)| status == "False" && found == reason)
        });
        let found = installed.get(namespace, object);
        let (_, _, message) = condition(found.as_ref(), "Ready").unwrap();
        println!("{object}: {reason}: {message}");
        for part in parts {
            assert!(message.contains(part), "{object}: {message}");
        }
    }
    let shrink = r#"{"spec": {"partitions": 1}}"#;
    let patch = [
        "patch",
        "-n",
        &namespace,
        "topic/good",
        "--type=merge",
        "-p",
        shrink,
    ];
    let refused = installed.kubernetes.kubectl(patch, "");
    assert!(
        refused.stderr.contains("partitions can only grow"),
        "{}",
        refused.stderr
    );

    // Nothing broken: the good ones serve, and those that are put right become good.
    installed.wait(30, &namespace, "cluster/main", "Ready", is_ready);
    installed.wait(30, &namespace, "topic/good", "Ready", is_ready);
    let image = r#"[{"op": "remove", "path": "/spec/image"}]"#;
    installed.kubectl(&[
        "patch",
        "-n",
        &namespace,
        "cluster/image",
        "--type=json",
        "-p",
        image,
    ]);
    installed.wait(60, &namespace, "cluster/image", "Ready", is_ready);
    installed.kubectl(&["delete", "-n", &limited, "resourcequota/none"]);
    // The controller of StatefulSets tries again after pauses that grow.
    installed.wait(90, &limited, "cluster/main", "Ready", is_ready);
    installed.kubectl(&["delete", "-n", &namespace, "topic/first", "--timeout=30s"]);
    installed.wait(60, &namespace, "topic/second", "Ready", is_ready);
    for namespace in [&namespace, &limited] {
        installed.kubectl(&["delete", "namespace", namespace, "--timeout=55s"]);
    }
    installed.uninstall();
}
