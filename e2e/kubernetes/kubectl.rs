//! What a person sees with `kubectl`.

use serde_json::json;

use crate::objects::{Kind, Objects};

pub(crate) async fn misspelt_fields_are_refused(objects: &Objects<'_>) {
    let document = "apiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata: {name: misspelt}\nspec: {partitons: 6}\n";
    let arguments = ["apply", "-n", &objects.namespace, "-f", "-"];
    let refused = objects.kubernetes.kubectl(arguments, document);
    assert_ne!(refused.code, Some(0));
    let sentence = "unknown field \"spec.partitons\"";
    assert!(refused.stderr.contains(sentence), "{}", refused.stderr);
}

pub(crate) async fn fields_are_explained(objects: &Objects<'_>) {
    for (field, text) in [
        ("topic", "A topic: a named log of records"),
        ("topic.spec.partitions", "It can only grow"),
        ("topic.spec.deletionPolicy", "`Retain` keeps them"),
        (
            "topic.status.topicName",
            "The name that producers and consumers use",
        ),
        ("topic.status.conditions", "Wait for `Ready`"),
        (
            "mrt.spec.retention.time",
            "Records older than this are deleted",
        ),
        ("cluster.spec.replicas", "`kubectl scale`"),
        (
            "clusters.millrace.dev.spec.storage.size",
            "It can only grow",
        ),
        ("mrc.spec.listeners.type", "`LoadBalancer`"),
        ("mrc.spec.config.blockCache", "Memory for reads of old data"),
    ] {
        let explained = objects.kubernetes.kubectl(["explain", field], "").success();
        // It breaks lines where it likes.
        let words: Vec<String> = explained
            .text()
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        assert!(
            words.join(" ").contains(text),
            "{field}: {}",
            explained.text()
        );
    }
}

pub(crate) async fn clusters_are_scaled(objects: &Objects<'_>) {
    let name = "scaled";
    let spec = "storage: {size: 1Gi}\ntopicDefaults: {replicationFactor: 3}";
    objects.make(Kind::Cluster, name, spec).await;
    let scale = |replicas: &str| {
        let replicas = format!("--replicas={replicas}");
        let arguments = [
            "scale",
            "-n",
            &objects.namespace,
            "cluster/scaled",
            &replicas,
        ];
        objects.kubernetes.kubectl(arguments, "")
    };
    scale("5").success();
    let object = objects.api(Kind::Cluster).get(name).await.unwrap();
    assert_eq!(object.data["spec"]["replicas"], 5);
    for (replicas, sentence) in [
        ("2", "there would be no brokers for the copies"),
        ("0", "greater than or equal to 1"),
    ] {
        let refused = scale(replicas);
        assert_ne!(refused.code, Some(0));
        assert!(refused.stderr.contains(sentence), "{}", refused.stderr);
    }
    let status = json!({"replicas": 4, "selector": "millrace.dev/cluster=scaled"});
    objects.set_status(Kind::Cluster, name, &status).await;
    let scale = objects.api(Kind::Cluster).get_scale(name).await.unwrap();
    let status = scale.status.unwrap();
    assert_eq!(status.replicas, 4);
    assert_eq!(status.selector.unwrap(), "millrace.dev/cluster=scaled");
}

pub(crate) async fn lists_have_columns(objects: &Objects<'_>) {
    let spec = "{topicName: Listed, clusterRef: {name: main}}";
    objects.make(Kind::Topic, "listed", spec).await;
    let status = json!({"partitions": 6, "replicationFactor": 3, "partitionsOffline": 0, "partitionsUnderReplicated": 1,
                        "topicName": "Listed"});
    objects.set_status(Kind::Topic, "listed", &status).await;
    objects
        .make(Kind::Cluster, "listed", "storage: {size: 1Gi}")
        .await;
    for (kind, columns, cells) in [
        (
            "mrt",
            "NAME READY CLUSTER PARTITIONS REPLICAS OFFLINE UNDER-REPLICATED RETENTION AGE TOPIC CLEANUP DELETION REASON",
            "listed Unknown main 6 3 0 1 7d",
        ),
        (
            "mrc",
            "NAME READY BROKERS UP PARTITIONS OFFLINE UNDER-REPLICATED AGE BOOTSTRAP CONTROLLER VERSION REASON",
            "listed Unknown 3",
        ),
    ] {
        let arguments = [
            "get",
            kind,
            "listed",
            "-n",
            &objects.namespace,
            "-o",
            "wide",
        ];
        let printed = objects.kubernetes.kubectl(arguments, "").success().text();
        let lines: Vec<String> = printed
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(lines[0], columns);
        assert!(lines[1].starts_with(cells), "{printed}");
    }
    let all = ["get", "millrace", "-n", &objects.namespace, "-o", "name"];
    let all = objects.kubernetes.kubectl(all, "").success().text();
    for object in ["topic.millrace.dev/listed", "cluster.millrace.dev/listed"] {
        assert!(all.contains(object), "{all}");
    }
}

pub(crate) async fn who_waits_for_a_new_object_waits(objects: &Objects<'_>) {
    objects.make(Kind::Topic, "awaited", "{}").await;
    let wait = |time: &str| {
        let time = format!("--timeout={time}");
        let arguments = [
            "wait",
            "-n",
            &objects.namespace,
            "--for=condition=Ready",
            "topic/awaited",
            &time,
        ];
        objects.kubernetes.kubectl(arguments, "")
    };
    assert_ne!(wait("1s").code, Some(0));
    let ready = json!({"conditions": [{"type": "Ready", "status": "True", "reason": "AsSpecified", "message": "",
                                       "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1}]});
    objects.set_status(Kind::Topic, "awaited", &ready).await;
    wait("10s").success();
}

pub(crate) async fn the_samples_are_accepted(objects: &Objects<'_>) {
    let samples = millrace_e2e::repository().join("manifests/samples");
    let sample = |name: &str| samples.join(name).to_str().unwrap().to_owned();
    for name in ["", "clusters/main.yaml", "clusters/small.yaml"] {
        let path = sample(name);
        let arguments = ["apply", "-n", &objects.namespace, "-f", &path];
        objects.kubernetes.kubectl(arguments, "").success();
    }
    // It has namespaces of its own; here with other names, since it is deleted again and they may be someone's.
    let mut shared = std::fs::read_to_string(sample("clusters/shared.yaml")).unwrap();
    for namespace in ["millrace", "shop"] {
        let other = format!(": {}-{namespace}\n", objects.namespace);
        shared = shared.replace(&format!(": {namespace}\n"), &other);
    }
    let kubectl = |arguments: &[&str]| objects.kubernetes.kubectl(arguments, &shared);
    let applied = kubectl(&["apply", "-f", "-"]);
    let deleted = kubectl(&["delete", "--wait=false", "-f", "-"]);
    applied.success();
    deleted.success();
}
