//! What stands in the API server, byte for byte: operators and brokers of different releases read each other's.

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::ConfigMap;
use uuid::Uuid;

use super::*;
use crate::{Topic, TopicConfig};

const TOPIC_ID: Uuid = Uuid::from_u128(0x11);
const STORE: Uuid = Uuid::from_u128(0x22);
const WRITE: Uuid = Uuid::from_u128(0x33);

fn annotation<'a>(lease: &'a Lease, name: &str) -> &'a str {
    &lease.metadata.annotations.as_ref().unwrap()[name]
}

fn held(holder: &str, epoch: i32) -> Held {
    Held {
        holder: Some(holder.to_owned()),
        epoch,
        duration_seconds: None,
        acquired: None,
        renewed: None,
    }
}

#[test]
fn a_partition_is_written_as_it_always_was() {
    let mut assignment = PartitionAssignment::new(TOPIC_ID, 7, vec![2, 0]);
    assignment.write_id = WRITE;
    let mut lease = Lease::default();
    let fresh = PartitionLease {
        assignment: assignment.clone(),
        held: Held::default(),
    };
    fresh.write(&mut lease, "main");
    assert_eq!(
        annotation(&lease, "millrace.dev/partition"),
        r#"{"version":1,"topicId":"00000000-0000-0000-0000-000000000011","partition":7,"partitionEpoch":0,"replicas":[2,0],"isr":[],"controllerEpoch":0,"writeId":"00000000-0000-0000-0000-000000000033"}"#
    );
    assert_eq!(PartitionLease::read(&lease).unwrap(), fresh);

    assignment.isr = vec![Replica {
        id: 2,
        store: STORE,
    }];
    assignment.leader = Some(Leader {
        id: 2,
        broker_epoch: 4,
    });
    assignment.partition_epoch = 1;
    let led = PartitionLease {
        assignment,
        held: held("main-2", 1),
    };
    led.write(&mut lease, "main");
    assert_eq!(
        annotation(&lease, "millrace.dev/partition"),
        r#"{"version":1,"topicId":"00000000-0000-0000-0000-000000000011","partition":7,"partitionEpoch":1,"replicas":[2,0],"isr":[{"id":2,"store":"00000000-0000-0000-0000-000000000022"}],"leader":{"id":2,"brokerEpoch":4},"controllerEpoch":0,"writeId":"00000000-0000-0000-0000-000000000033"}"#
    );
    assert_eq!(PartitionLease::read(&lease).unwrap(), led);
    assert!(led.epochs() > fresh.epochs());
    assert_eq!(
        lease.metadata.name.as_deref(),
        Some("main-00000000-0000-0000-0000-000000000011-7")
    );
    let labels = lease.metadata.labels.unwrap();
    assert_eq!(labels[CLUSTER_LABEL], "main");
    assert_eq!(labels[ROLE_LABEL], "partition");
    assert_eq!(labels[TOPIC_LABEL], TOPIC_ID.to_string());
}

#[test]
fn sessions_and_the_controller_are_written_as_they_always_were() {
    let mut lease = Lease::default();
    let session = BrokerSession {
        broker_id: 2,
        store_id: STORE,
        pod: "main-2".into(),
        address: "main-2.main-brokers.shop.svc:7070".into(),
        release: "0.1.0".into(),
        draining: false,
    };
    session.write(&mut lease, "main", held("main-2/uid/boot", 4));
    assert_eq!(lease.metadata.name.as_deref(), Some("main-broker-2"));
    assert_eq!(
        annotation(&lease, "millrace.dev/broker"),
        r#"{"version":1,"brokerId":2,"storeId":"00000000-0000-0000-0000-000000000022","pod":"main-2","address":"main-2.main-brokers.shop.svc:7070","release":"0.1.0","draining":false}"#
    );
    assert_eq!(
        BrokerSession::read(&lease).unwrap(),
        (session, held("main-2/uid/boot", 4))
    );

    let mut lease = Lease::default();
    let state = ControllerState {
        broker_id: 2,
        broker_epoch: 4,
    };
    state.write(&mut lease, "main", held("main-2/uid/boot", 9));
    assert_eq!(lease.metadata.name.as_deref(), Some("main-controller"));
    assert_eq!(
        annotation(&lease, "millrace.dev/controller"),
        r#"{"version":1,"brokerId":2,"brokerEpoch":4}"#
    );
    assert_eq!(
        ControllerState::read(&lease).unwrap(),
        (state, held("main-2/uid/boot", 9))
    );
}

#[test]
fn a_topic_is_written_as_it_always_was() {
    let topic: Topic = serde_json::from_value(serde_json::json!({
        "apiVersion": "millrace.dev/v1alpha1", "kind": "Topic",
        "metadata": {"name": "orders"},
        "spec": {"partitions": 3, "retention": {"time": "1h"}}
    }))
    .unwrap();
    let record = TopicRecord {
        topic_id: TOPIC_ID,
        namespace: "shop".into(),
        topic: "orders".into(),
        topic_uid: "uid".into(),
        state: TopicState::Active,
        partitions_made: 2,
        config: TopicConfig::try_from(&topic).unwrap(),
    };
    let mut object = ConfigMap::default();
    record.write(&mut object, "main");
    assert_eq!(
        object.data.as_ref().unwrap()["topic.json"],
        concat!(
            r#"{"version":1,"topicId":"00000000-0000-0000-0000-000000000011","namespace":"shop","topic":"orders","topicUid":"uid","state":"Active","partitionsMade":2,"#,
            r#""config":{"name":"orders","partitions":3,"replicationFactor":1,"minInsyncReplicas":null,"cleanupPolicy":"Delete","retentionTimeMs":3600000,"#,
            r#""retentionBytes":null,"compression":"Producer","maxMessageBytes":1048576,"timestampType":"CreateTime","timestampAfterMaxMs":3600000,"#,
            r#""uncleanLeaderElection":false}}"#
        )
    );
    assert_eq!(
        object.metadata.name.as_deref(),
        Some("main-topic-1c168adb00d208e42f93314529f1fa9c")
    );
    assert_eq!(TopicRecord::read(&object).unwrap(), record);

    // Records had no count of Leases at first. None is then taken for lost.
    let data = object.data.as_mut().unwrap();
    let text = data.get_mut("topic.json").unwrap();
    *text = text.replace(r#""partitionsMade":2,"#, "");
    let first = TopicRecord::read(&object).unwrap();
    assert_eq!(first.partitions_made, 0);
}

#[test]
fn what_is_not_ours_is_refused_with_a_reason() {
    let mut lease = Lease::default();
    lease.metadata.name = Some("main-x".into());
    let refused = |lease: &Lease| PartitionLease::read(lease).unwrap_err().to_string();
    assert!(refused(&lease).starts_with("main-x has no millrace.dev/partition"));
    for (document, expected) in [
        ("{", "can't be read"),
        ("{}", "missing field `version`"),
        (r#"{"version":2}"#, "has version 2"),
        (r#"{"version":1,"topicId":"x"}"#, "can't be read"),
    ] {
        let annotations = lease.metadata.annotations.get_or_insert_default();
        annotations.insert("millrace.dev/partition".into(), document.into());
        let found = refused(&lease);
        assert!(found.contains(expected), "{document}: {found}");
    }
    let fresh = PartitionLease {
        assignment: PartitionAssignment::new(TOPIC_ID, 0, vec![0]),
        held: Held::default(),
    };
    fresh.write(&mut lease, "main");
    lease.spec.as_mut().unwrap().lease_transitions = Some(-1);
    assert!(refused(&lease).contains("an epoch is 0 or more"));
}
