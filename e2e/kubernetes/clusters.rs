//! Clusters: what may be applied, and how they may be changed.

use serde_json::json;

use crate::objects::{Kind::Cluster, Objects, assert_accepted, assert_refused};

/// A spec with what must be there, and more.
fn with(more: &str) -> String {
    format!("storage: {{size: 10Gi}}\n{more}")
}

pub(crate) async fn good_ones_are_accepted(objects: &Objects<'_>) {
    for spec in [
        "",
        "replicas: 1",
        "replicas: 100",
        "resources: {requests: {cpu: 2, memory: 1Gi}, limits: {cpu: 500m}}",
        "durability: Os",
        "topicDefaults: {partitions: 12, replicationFactor: 3, minInSyncReplicas: 3}",
        "topicNamespaces: {from: All}",
        "topicNamespaces: {from: Listed, names: [shop, billing]}",
        "topicNamespaces: {from: Selector, selector: {matchLabels: {team: shop}}}",
        "listeners: [{name: a, port: 7070}, {name: b, port: 9092, type: NodePort, serviceAnnotations: {a: b}}]",
        "rack: {topologyKey: kubernetes.io/hostname}",
        "config: {blockCache: 1GiB, maxRequest: 8MiB, requestMemory: 32MiB, drain: 10s, log: {level: 'info,millrace_broker=debug'}}",
        "config: {maxRequest: 65536}",
        "config: {replicaLag: 1m30s}",
        "config: {catchUpRate: 50MiB}",
        "lease: {durationSeconds: 10, renewSeconds: 5}",
        "rebalance: {mode: Manual, concurrency: 5}",
        "hibernated: true",
        "paused: true",
        "image: registry.example:5000/millrace@sha256:0123\nimagePullPolicy: Always\nimagePullSecrets: [{name: a}]",
    ] {
        let spec = with(spec);
        assert_accepted(&objects.try_new(Cluster, "main", &spec).await, &spec);
    }
}

pub(crate) async fn bad_ones_are_refused_with_a_sentence(objects: &Objects<'_>) {
    for (spec, sentence) in [
        (
            "replicas: 0",
            "spec.replicas in body should be greater than or equal to 1",
        ),
        (
            "replicas: 101",
            "spec.replicas in body should be less than or equal to 100",
        ),
        (
            "replicas: 2\ntopicDefaults: {replicationFactor: 3}",
            "topicDefaults.replicationFactor can't be more than replicas: there would be no brokers for the copies",
        ),
        (
            "topicDefaults: {replicationFactor: 1, minInSyncReplicas: 2}",
            "minInSyncReplicas can't be more than replicationFactor: such topics could never accept acks=all",
        ),
        (
            "replicas: 1\ntopicDefaults: {minInSyncReplicas: 2}",
            "topicDefaults.minInSyncReplicas can't be more than topics have replicas",
        ),
        (
            "resources: {limits: {cpu: two}}",
            "spec.resources.limits.cpu in body should match",
        ),
        (
            "rebalance: {mode: auto}",
            r#"spec.rebalance.mode: Unsupported value: "auto": supported values: "Auto", "Manual""#,
        ),
        (
            "durability: fsync",
            r#"spec.durability: Unsupported value: "fsync": supported values: "Fsync", "Os""#,
        ),
        (
            "topicNamespaces: {from: Listed}",
            "topicNamespaces.names belongs to from: Listed, and must be there with it",
        ),
        (
            "topicNamespaces: {names: [shop]}",
            "topicNamespaces.names belongs to from: Listed",
        ),
        (
            "topicNamespaces: {from: Selector}",
            "topicNamespaces.selector belongs to from: Selector, and must be there with it",
        ),
        (
            "listeners: []",
            "spec.listeners in body should have at least 1 items",
        ),
        (
            "listeners: [{name: a, port: 7070}, {name: b, port: 7070}]",
            "two listeners can't have one port",
        ),
        (
            "listeners: [{name: a, port: 7070}, {name: a, port: 8070}]",
            "spec.listeners[1]: Duplicate value",
        ),
        (
            "listeners: [{name: a, port: 7070, type: NodePort}]",
            "one listener must be of type ClusterIP: the bootstrap address of apps in this Kubernetes",
        ),
        (
            "listeners: [{name: a, port: 443}]",
            "spec.listeners[0].port in body should be greater than or equal to 1024",
        ),
        (
            "listeners: [{name: a, port: 7071}]",
            "ports 7071 to 7079 are for metrics and for the brokers among themselves",
        ),
        (
            "listeners: [{name: a, port: 7070, serviceAnnotations: {a: b}}]",
            "serviceAnnotations are for listeners of type NodePort or LoadBalancer",
        ),
        (
            "rack: {topologyKey: 'a b'}",
            "spec.rack.topologyKey in body should match",
        ),
        (
            "config: {writeBuffer: 1KiB}",
            "writeBuffer must be from 1Mi to 4Gi bytes",
        ),
        (
            "config: {maxRequest: 64MiB, requestMemory: 32MiB}",
            "maxRequest can't be more than requestMemory: such a request could never be received",
        ),
        (
            "config: {drain: soon}",
            "spec.config.drain in body should match",
        ),
        (
            "config: {catchUpRate: 1Ki}",
            "catchUpRate must be from 64Ki to 1Ti bytes",
        ),
        (
            "config: {replicaLag: 1s}",
            "replicaLag must be from 2s to 1h",
        ),
        (
            "config: {replicaLag: 1d}",
            "spec.config.replicaLag in body should match",
        ),
        (
            "config: {writeBuffers: 1}",
            "spec.config.writeBuffers in body should be greater than or equal to 2",
        ),
        (
            "lease: {durationSeconds: 3, renewSeconds: 2}",
            "lease.durationSeconds must be at least twice lease.renewSeconds",
        ),
        (
            "template: {spec: {containers: [{name: broker, image: mine}]}}",
            "the container broker takes its image and resources from spec.image and spec.resources",
        ),
        (
            "template: {spec: {restartPolicy: Never}}",
            "template.spec.restartPolicy must stay Always",
        ),
        (
            "template: {metadata: {labels: {app.kubernetes.io/name: mine}}}",
            "labels that begin with millrace.dev/ or app.kubernetes.io/ are the operator's",
        ),
        (
            "template: {spec: {tolerations: [{key: 1}]}}",
            "spec.template.spec.tolerations[0].key in body must be of type string",
        ),
    ] {
        let spec = with(spec);
        let answer = objects.try_new(Cluster, "main", &spec).await;
        assert_refused(&answer, &spec, sentence);
    }
    for (name, spec, sentence) in [
        ("main", "{}", "spec.storage: Required value"),
        ("main", "storage: {}", "spec.storage.size: Required value"),
        (
            "main",
            "storage: {size: big}",
            "spec.storage.size in body should match",
        ),
        (
            "main",
            "storage: {size: 1023Mi}",
            "storage.size must be at least 1Gi: brokers refuse writes before a volume is full",
        ),
        (
            "main",
            "storage: {size: 1Gi, onDelete: Keep}",
            r#"spec.storage.onDelete: Unsupported value: "Keep""#,
        ),
        (
            "my.cluster",
            "storage: {size: 1Gi}",
            "a Cluster's name has at most 40 characters and no dots",
        ),
    ] {
        let answer = objects.try_new(Cluster, name, spec).await;
        assert_refused(&answer, &format!("{name}: {spec}"), sentence);
    }
}

pub(crate) async fn changes_that_can_never_work_are_refused(objects: &Objects<'_>) {
    let name = "changed";
    let spec = "storage: {size: 1Ti, className: fast}\ntopicDefaults: {replicationFactor: 3}";
    objects.make(Cluster, name, spec).await;
    for (change, sentence) in [
        (
            "{storage: {size: 1000Gi}}",
            "storage.size can only grow: no volume can be made smaller",
        ),
        (
            "{storage: {className: slow}}",
            "storage.className can't change: volumes stay where they are",
        ),
        (
            "{storage: {className: null}}",
            "storage.className can't change",
        ),
        (
            "{replicas: 2}",
            "topicDefaults.replicationFactor can't be more than replicas",
        ),
    ] {
        let answer = objects.try_change(Cluster, name, change).await;
        assert_refused(&answer, change, sentence);
    }
    for change in [
        "{storage: {size: 1024Gi}}",
        "{storage: {size: 2Ti, onDelete: Delete}}",
        "{replicas: 9}",
        "{paused: true}",
    ] {
        assert_accepted(&objects.try_change(Cluster, name, change).await, change);
    }
}

pub(crate) async fn what_is_laid_over_pods_is_kept_as_written(objects: &Objects<'_>) {
    let spec = with(
        "template: {spec: {dnsPolicy: Default, volumes: [{name: a, emptyDir: {}}], containers: [{name: broker, env: [{name: A, value: b}]}]}}",
    );
    let made = objects.try_new(Cluster, "main", &spec).await.unwrap();
    let kept = json!({
        "dnsPolicy": "Default",
        "volumes": [{"name": "a", "emptyDir": {}}],
        "containers": [{"name": "broker", "env": [{"name": "A", "value": "b"}]}],
    });
    assert_eq!(made.data["spec"]["template"]["spec"], kept);
    // Of what is typed here, what a pod does not have is not kept.
    let spec = with("resources: {limits: {cpu: 2}}");
    let made = objects.try_new(Cluster, "main", &spec).await.unwrap();
    let typed: millrace_crds::Cluster = made.try_parse().unwrap();
    let limits = typed.spec.resources.unwrap().limits.unwrap();
    assert_eq!(limits["cpu"].0, "2");
}

pub(crate) async fn a_status_with_all_its_fields_is_kept(objects: &Objects<'_>) {
    let name = "reported";
    let made = objects.make(Cluster, name, &with("")).await;
    let ready = &made.data["status"]["conditions"][0];
    assert_eq!(ready["type"], "Ready", "{ready}");
    assert_eq!(ready["status"], "Unknown", "{ready}");
    let status = json!({
        "conditions": [{"type": "Ready", "status": "False", "reason": "BrokersNotReady", "message": "",
                        "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1}],
        "observedGeneration": 1, "replicas": 3, "readyReplicas": 2, "selector": "millrace.dev/cluster=reported",
        "controller": 1, "bootstrapAddress": "reported:7070", "version": "0.1.0", "topics": 2, "partitions": 12,
        "partitionsOffline": 0, "partitionsUnderReplicated": 4, "partitionsBelowMinIsr": 1,
        "rebalance": {"state": "Moving", "proposal": "0123", "partitions": 9, "moving": 2, "moved": 1, "startedAt": "2026-01-01T00:00:00Z",
                      "estimatedEnd": "2026-01-01T00:10:00Z"},
        "brokers": [{"id": 0, "storeId": "s", "claimName": "data-0", "podName": "p", "rack": "a", "state": "Serving"}],
    });
    let written = objects.set_status(Cluster, name, &status).await;
    assert_eq!(written.data["status"], status);
}
