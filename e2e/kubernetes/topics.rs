//! Topics: what may be applied, and how they may be changed.

use serde_json::json;

use crate::objects::{Kind::Topic, Objects, assert_accepted, assert_refused};

pub(crate) async fn good_ones_are_accepted(objects: &Objects<'_>) {
    let long = "t".repeat(249);
    for (name, spec) in [
        ("orders", "{}"),
        (
            "orders",
            "{partitions: 10000, replicationFactor: 32, minInSyncReplicas: 32}",
        ),
        ("orders", "{topicName: Orders_1.v2}"),
        ("orders", &format!("{{topicName: {long}}}")),
        ("shop.orders", "{}"),
        ("orders", "{retention: {time: forever}}"),
        ("orders", "{retention: {time: 1d 12h, bytes: 1.5GiB}}"),
        ("orders", "{retention: {bytes: 1024}}"),
        ("orders", "{maxMessageBytes: 64MiB}"),
        ("orders", "{maxMessageBytes: 128}"),
        ("orders", "{maxMessageBytes: 64 kB}"),
        ("orders", "{cleanupPolicy: Compact}"),
        (
            "orders",
            "{cleanupPolicy: Compact, compaction: {minLag: 1h, maxLag: 7d, deleteRetention: 2d, minDirtyPercent: 30}}",
        ),
        (
            "orders",
            "{cleanupPolicy: CompactAndDelete, retention: {bytes: 1GiB}}",
        ),
        ("orders", "{compression: Zstd}"),
        (
            "orders",
            "{timestampType: LogAppendTime, timestampAfterMax: 1w}",
        ),
        (
            "orders",
            "{uncleanLeaderElection: true, deletionPolicy: Delete}",
        ),
        ("orders", "{clusterRef: {name: shared, namespace: kafka}}"),
        ("orders", "{minInSyncReplicas: 2}"),
    ] {
        let answer = objects.try_new(Topic, name, spec).await;
        assert_accepted(&answer, &format!("{name}: {spec}"));
    }
}

pub(crate) async fn bad_ones_are_refused_with_a_sentence(objects: &Objects<'_>) {
    let long = "t".repeat(250);
    let qualified = "t".repeat(185);
    for (name, spec, sentence) in [
        (
            "a",
            "{partitions: 0}",
            "spec.partitions in body should be greater than or equal to 1",
        ),
        (
            "a",
            "{partitions: 10001}",
            "spec.partitions in body should be less than or equal to 10000",
        ),
        (
            "a",
            "{partitions: six}",
            "spec.partitions in body must be of type integer",
        ),
        (
            "a",
            "{replicationFactor: 33}",
            "spec.replicationFactor in body should be less than or equal to 32",
        ),
        (
            "a",
            "{minInSyncReplicas: 0}",
            "spec.minInSyncReplicas in body should be greater than or equal to 1",
        ),
        (
            "a",
            "{replicationFactor: 2, minInSyncReplicas: 3}",
            "minInSyncReplicas can't be more than replicationFactor: such a topic could never accept acks=all",
        ),
        (
            "a",
            "{topicName: a/b}",
            "spec.topicName in body should match",
        ),
        ("a", "{topicName: ''}", "spec.topicName"),
        ("a", "{topicName: .}", "a topic can't be named ."),
        (
            "a",
            "{topicName: shop..orders}",
            "its name can't contain .. (that is what clients put between a namespace and a name)",
        ),
        (
            "a",
            "{topicName: __offsets}",
            "names that begin with __ are for the brokers' own topics",
        ),
        ("a", &format!("{{topicName: {long}}}"), "spec.topicName"),
        (
            &long,
            "{}",
            "metadata.name is longer than the 249 characters of a topic name: set spec.topicName",
        ),
        (
            &qualified,
            "{clusterRef: {name: shared, namespace: kafka}}",
            "the name of a topic in another namespace than its Cluster has at most 184 characters",
        ),
        (
            "a",
            "{clusterRef: {name: Main}}",
            "spec.clusterRef.name in body should match",
        ),
        (
            "a",
            "{clusterRef: {namespace: kafka}}",
            "spec.clusterRef.name: Required value",
        ),
        (
            "a",
            "{retention: {time: 7 days}}",
            "spec.retention.time in body should match",
        ),
        (
            "a",
            "{retention: {time: -1d}}",
            "spec.retention.time in body should match",
        ),
        (
            "a",
            "{retention: {bytes: -1}}",
            "spec.retention.bytes in body should be greater than or equal to 0",
        ),
        (
            "a",
            "{retention: {bytes: 10 gigs}}",
            "spec.retention.bytes in body should match",
        ),
        (
            "a",
            "{cleanupPolicy: Compact, retention: {bytes: 1GiB}}",
            "retention.bytes deletes nothing from a topic that is only compacted",
        ),
        (
            "a",
            "{compaction: {minDirtyPercent: 0}}",
            "spec.compaction.minDirtyPercent in body should be greater than or equal to 1",
        ),
        (
            "a",
            "{compaction: {minLag: soon}}",
            "spec.compaction.minLag in body should match",
        ),
        (
            "a",
            "{cleanupPolicy: compact}",
            r#"spec.cleanupPolicy: Unsupported value: "compact": supported values: "Delete", "Compact", "CompactAndDelete""#,
        ),
        (
            "a",
            "{compression: brotli}",
            "spec.compression: Unsupported value",
        ),
        (
            "a",
            "{maxMessageBytes: 127}",
            "maxMessageBytes must be from 128 to 64Mi bytes",
        ),
        (
            "a",
            "{maxMessageBytes: 65 MiB}",
            "maxMessageBytes must be from 128 to 64Mi bytes",
        ),
        (
            "a",
            "{maxMessageBytes: big}",
            "spec.maxMessageBytes in body should match",
        ),
        (
            "a",
            "{timestampType: Now}",
            "spec.timestampType: Unsupported value",
        ),
        (
            "a",
            "{timestampAfterMax: forever}",
            "spec.timestampAfterMax in body should match",
        ),
        (
            "a",
            "{deletionPolicy: Orphan}",
            r#"spec.deletionPolicy: Unsupported value: "Orphan": supported values: "Retain", "Delete""#,
        ),
    ] {
        let answer = objects.try_new(Topic, name, spec).await;
        assert_refused(&answer, &format!("{name}: {spec}"), sentence);
    }
}

pub(crate) async fn changes_that_would_lose_records_are_refused(objects: &Objects<'_>) {
    let name = "changed";
    let spec = "{partitions: 6, topicName: Changed, clusterRef: {name: main}}";
    objects.make(Topic, name, spec).await;
    for (change, sentence) in [
        (
            "{partitions: 5}",
            "partitions can only grow: records keep their places, so make a new Topic to have fewer",
        ),
        ("{partitions: null}", "partitions can only grow"),
        (
            "{topicName: Other}",
            "topicName can't change: make a new Topic",
        ),
        (
            "{topicName: null}",
            "topicName can't change: make a new Topic",
        ),
        (
            "{clusterRef: {name: other}}",
            "clusterRef can't change: records don't move between Clusters, so make a new Topic",
        ),
        (
            "{clusterRef: {namespace: kafka}}",
            "clusterRef can't change: records don't move between Clusters",
        ),
    ] {
        let answer = objects.try_change(Topic, name, change).await;
        assert_refused(&answer, change, sentence);
    }
    for change in [
        "{partitions: 7}",
        "{replicationFactor: 3, minInSyncReplicas: 2}",
        "{retention: {time: 1d}, cleanupPolicy: CompactAndDelete}",
        "{deletionPolicy: Delete}",
        // Null is what a field is given to have its default again.
        "{maxMessageBytes: null, clusterRef: null}",
    ] {
        assert_accepted(&objects.try_change(Topic, name, change).await, change);
    }
}

pub(crate) async fn partitions_that_the_cluster_chose_only_grow(objects: &Objects<'_>) {
    let name = "defaulted";
    objects.make(Topic, name, "{}").await;
    objects
        .set_status(Topic, name, &json!({"partitions": 6}))
        .await;
    let fewer = objects.try_change(Topic, name, "{partitions: 5}").await;
    assert_refused(
        &fewer,
        "5 of 6",
        "partitions can only grow, and the topic has more already (status.partitions)",
    );
    assert_accepted(
        &objects.try_change(Topic, name, "{partitions: 6}").await,
        "6 of 6",
    );
    // A Topic whose records were retained may say less than there is: its status is written again and again all the same.
    objects.make(Topic, "from-git", "{partitions: 3}").await;
    for partitions in [6, 7] {
        let status = json!({"partitions": partitions});
        objects.set_status(Topic, "from-git", &status).await;
    }
}
