use serde_json::{Value, json};

use super::*;

fn cluster(spec: Value) -> Cluster {
    let mut whole = json!({"storage": {"size": "10Gi"}});
    if let (Some(whole), Some(spec)) = (whole.as_object_mut(), spec.as_object()) {
        whole.extend(spec.clone());
    }
    let mut cluster = Cluster::new("main", serde_json::from_value(whole).unwrap());
    cluster.metadata.namespace = Some("shop".into());
    cluster.metadata.uid = Some("cluster-uid".into());
    cluster
}

fn made(spec: Value) -> Objects {
    let cluster = cluster(spec);
    let racks = Racks {
        racks: [(0, "a".to_owned())].into(),
    };
    let inputs = Inputs {
        racks: &racks,
        may_stop: true,
        default_image: "millrace-broker:0.1.0",
        replicas: cluster.spec.replicas,
        claim_template_size: None,
    };
    objects(&cluster, &inputs)
}

fn all(objects: &Objects) -> [&Value; 10] {
    [
        &objects.service_account,
        &objects.role,
        &objects.role_binding,
        &objects.config_map,
        &objects.racks,
        &objects.brokers_service,
        &objects.bootstrap_service,
        &objects.network_policy,
        &objects.disruption_budget,
        &objects.stateful_set,
    ]
}

#[test]
fn the_objects_of_a_cluster_have_the_names_that_all_parts_know() {
    let objects = made(json!({}));
    let names: Vec<String> = all(&objects)
        .iter()
        .map(|object| {
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            format!(
                "{} {}",
                text(&object["kind"]),
                text(&object["metadata"]["name"])
            )
        })
        .collect();
    assert_eq!(
        names,
        [
            "ServiceAccount main-broker",
            "Role main-broker",
            "RoleBinding main-broker",
            "ConfigMap main-config",
            "ConfigMap main-racks",
            "Service main-brokers",
            "Service main-bootstrap",
            "NetworkPolicy main-broker",
            "PodDisruptionBudget main-broker",
            "StatefulSet main-broker",
        ]
    );
}

#[test]
fn each_object_belongs_to_the_cluster() {
    for object in all(&made(json!({}))) {
        let metadata = &object["metadata"];
        assert_eq!(metadata["namespace"], "shop");
        assert_eq!(metadata["ownerReferences"][0]["uid"], "cluster-uid");
        assert_eq!(metadata["ownerReferences"][0]["controller"], true);
        let mut labels = metadata["labels"].clone();
        // Of the racks only.
        labels.as_object_mut().unwrap().remove("millrace.dev/role");
        assert_eq!(
            labels,
            json!({
                "app.kubernetes.io/name": "millrace",
                "app.kubernetes.io/component": "broker",
                "app.kubernetes.io/instance": "main",
                "app.kubernetes.io/managed-by": "millrace-operator",
                "millrace.dev/cluster": "main",
            })
        );
        assert!(metadata["annotations"][APPLIED_ANNOTATION].is_string());
    }
}

#[test]
fn each_setting_reaches_the_broker_under_the_name_that_it_reads() {
    let objects = made(json!({
        "durability": "Os",
        "listeners": [{"name": "clients", "port": 9000}],
        "lease": {"durationSeconds": 10, "renewSeconds": 3},
        "config": {
            "writeBuffer": "32MiB", "writeBuffers": 4, "writeBufferAge": "5m", "blockCache": "64Mi", "tailCache": "8MiB",
            "requestMemory": "40MiB", "responseMemory": "50MiB", "maxRequest": 1048576, "maxConnections": 500,
            "minFreeDisk": "1GiB", "retentionInterval": "10s", "producerExpiration": "1d", "replicaLag": "30s", "catchUpRate": "50MiB", "drain": "7s",
            "log": {"level": "debug", "format": "Json"},
        },
    }));
    assert_eq!(
        objects.config_map["data"],
        json!({
            "MILLRACE_CLUSTER": "main",
            "MILLRACE_CLUSTER_UID": "cluster-uid",
            "MILLRACE_NAMESPACE": "shop",
            "MILLRACE_LISTEN": "0.0.0.0:9000",
            "MILLRACE_METRICS_LISTEN": "0.0.0.0:7071",
            "MILLRACE_DATA": "/var/lib/millrace",
            "MILLRACE_DURABILITY": "os",
            "MILLRACE_LEASE_DURATION": "10s",
            "MILLRACE_LEASE_RENEW": "3s",
            "MILLRACE_WRITE_BUFFER": "32MiB",
            "MILLRACE_WRITE_BUFFERS": "4",
            "MILLRACE_WRITE_BUFFER_AGE": "5m",
            "MILLRACE_BLOCK_CACHE": "64Mi",
            "MILLRACE_TAIL_CACHE": "8MiB",
            "MILLRACE_REQUEST_MEMORY": "40MiB",
            "MILLRACE_RESPONSE_MEMORY": "50MiB",
            "MILLRACE_MAX_REQUEST": "1048576",
            "MILLRACE_MAX_CONNECTIONS": "500",
            "MILLRACE_MIN_FREE_DISK": "1GiB",
            "MILLRACE_RETENTION_INTERVAL": "10s",
            "MILLRACE_PRODUCER_EXPIRATION": "1d",
            "MILLRACE_REPLICA_LAG": "30s",
            "MILLRACE_CATCH_UP_RATE": "50MiB",
            "MILLRACE_DRAIN": "7s",
            "MILLRACE_LOG_JSON": "true",
            "RUST_LOG": "debug",
        })
    );
    let container = &objects.stateful_set["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(
        container["env"][3],
        json!({"name": "MILLRACE_ADVERTISE", "value": "$(MILLRACE_POD_IP):9000"})
    );
    assert_eq!(objects.bootstrap_service["spec"]["ports"][0]["port"], 9000);
}

#[test]
fn settings_that_are_not_written_are_left_to_the_broker() {
    let data = &made(json!({"config": {"log": {"format": "Text"}}})).config_map["data"];
    for absent in ["MILLRACE_WRITE_BUFFER", "MILLRACE_LOG_JSON", "RUST_LOG"] {
        assert_eq!(data.get(absent), None, "{absent}");
    }
}

#[test]
fn a_change_of_settings_changes_the_pods_and_nothing_else_does() {
    let hash =
        |spec| made(spec).stateful_set["spec"]["template"]["metadata"]["annotations"].clone();
    assert_eq!(hash(json!({})), hash(json!({"replicas": 5})));
    assert_ne!(hash(json!({})), hash(json!({"config": {"drain": "9s"}})));
}

#[test]
fn pods_pass_the_restricted_level() {
    let pod = made(json!({})).stateful_set["spec"]["template"]["spec"].clone();
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(
        pod["securityContext"]["seccompProfile"]["type"],
        "RuntimeDefault"
    );
    let context = &pod["containers"][0]["securityContext"];
    assert_eq!(context["allowPrivilegeEscalation"], false);
    assert_eq!(context["capabilities"]["drop"], json!(["ALL"]));
    assert_eq!(context["readOnlyRootFilesystem"], true);
}

#[test]
fn brokers_are_spread_over_racks_and_nodes_unless_the_template_says_otherwise() {
    let spread = |spec: Value| {
        let pod = made(spec).stateful_set["spec"]["template"]["spec"].clone();
        let constraints = pod["topologySpreadConstraints"].as_array().cloned();
        let keys = constraints.unwrap_or_default();
        let keys = keys
            .iter()
            .map(|c| c["topologyKey"].as_str().unwrap().to_owned());
        keys.collect::<Vec<_>>()
    };
    assert_eq!(
        spread(json!({})),
        ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    );
    assert_eq!(
        spread(json!({"rack": {"topologyKey": "rack"}})),
        ["rack", "kubernetes.io/hostname"]
    );
    let over = json!({"template": {"spec": {"topologySpreadConstraints": [
        {"maxSkew": 2, "topologyKey": "own", "whenUnsatisfiable": "DoNotSchedule"}
    ]}}});
    assert_eq!(spread(over), ["own"]);
}

#[test]
fn the_template_is_laid_over_the_pods() {
    let objects = made(json!({"template": {
        "metadata": {"labels": {"team": "shop"}, "annotations": {"a": "b"}},
        "spec": {
            "nodeSelector": {"disk": "nvme"},
            "terminationGracePeriodSeconds": 90,
            "dnsPolicy": "Default",
            "volumes": [{"name": "extra", "emptyDir": {}}],
            "containers": [
                {"name": "broker", "env": [{"name": "EXTRA", "value": "1"}], "volumeMounts": [{"name": "extra", "mountPath": "/extra"}]},
                {"name": "sidecar", "image": "x"},
            ],
        },
    }}));
    let template = &objects.stateful_set["spec"]["template"];
    assert_eq!(template["metadata"]["labels"]["team"], "shop");
    assert_eq!(
        template["metadata"]["labels"]["millrace.dev/cluster"],
        "main"
    );
    assert_eq!(template["metadata"]["annotations"]["a"], "b");
    let pod = &template["spec"];
    assert_eq!(pod["nodeSelector"], json!({"disk": "nvme"}));
    assert_eq!(pod["terminationGracePeriodSeconds"], 90);
    assert_eq!(pod["dnsPolicy"], "Default");
    assert_eq!(pod["containers"].as_array().unwrap().len(), 2);
    let broker = &pod["containers"][0];
    assert_eq!(broker["image"], "millrace-broker:0.1.0");
    assert_eq!(broker["env"].as_array().unwrap().len(), 5);
    assert_eq!(broker["env"][4]["name"], "EXTRA");
    assert_eq!(broker["volumeMounts"].as_array().unwrap().len(), 2);
}

#[test]
fn what_becomes_of_the_volumes_follows_the_spec() {
    let policy =
        |spec| made(spec).stateful_set["spec"]["persistentVolumeClaimRetentionPolicy"].clone();
    assert_eq!(
        policy(json!({})),
        json!({"whenDeleted": "Retain", "whenScaled": "Retain"})
    );
    assert_eq!(
        policy(json!({"storage": {"size": "1Gi", "onDelete": "Delete"}})),
        json!({"whenDeleted": "Delete", "whenScaled": "Retain"})
    );
}

#[test]
fn the_claim_template_of_a_stateful_set_that_is_there_does_not_change() {
    let cluster = cluster(json!({"storage": {"size": "20Gi", "className": "fast"}}));
    let held = Quantity("10Gi".into());
    for (there, size) in [(None, "20Gi"), (Some(&held), "10Gi")] {
        let inputs = Inputs {
            racks: &Racks::default(),
            may_stop: true,
            default_image: "x",
            replicas: 3,
            claim_template_size: there,
        };
        let claim = &objects(&cluster, &inputs).stateful_set["spec"]["volumeClaimTemplates"][0];
        assert_eq!(claim["spec"]["resources"]["requests"]["storage"], size);
        assert_eq!(claim["spec"]["storageClassName"], "fast");
    }
}

#[test]
fn no_broker_is_evicted_while_a_partition_needs_it() {
    for (may_stop, most) in [(true, 1), (false, 0)] {
        let inputs = Inputs {
            racks: &Racks::default(),
            may_stop,
            default_image: "x",
            replicas: 3,
            claim_template_size: None,
        };
        let budget = objects(&cluster(json!({})), &inputs).disruption_budget;
        assert_eq!(budget["spec"]["maxUnavailable"], most);
    }
}
