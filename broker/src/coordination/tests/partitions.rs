//! Who leads what, and what becomes of data.

use std::time::Duration;

use k8s_openapi::api::{coordination::v1::Lease, core::v1::ConfigMap};
use millrace_crds::coordination::{
    BrokerSession, CLUSTER_LABEL, Held, Leader, PartitionLease, ROLE_LABEL, Replica, Role,
    TopicState,
};
use uuid::Uuid;

use super::{
    api_server::{Answer, Call, LATE, Verb, first},
    cluster::{CLUSTER, Cluster, TIMING, always, eventually, pod},
};

/// A write of a partition's Lease.
fn is_election(call: &Call) -> bool {
    call.is_write() && !call.name.starts_with("main-broker") && call.name != "main-controller"
}

#[test]
fn a_partition_is_led_where_its_data_is_in_a_higher_epoch_after_a_restart() {
    let cluster = Cluster::default();
    let broker = cluster.start(0);
    let other = cluster.start(1);
    let topic = cluster.topic("orders", &[vec![0], vec![1]]);
    assert_eq!(cluster.led(&broker, topic, 0), 1);
    assert_eq!(cluster.led(&other, topic, 1), 1);
    assert_eq!(broker.append(topic, 0).unwrap(), 0);
    let store = broker.store.store_id();
    drop(broker);
    let broker = cluster.start(0);
    assert_eq!(cluster.led(&broker, topic, 0), 2);
    assert_eq!(broker.append(topic, 0).unwrap(), 1);
    let isr = cluster.lease(topic, 0).assignment.isr;
    assert_eq!(isr.iter().map(|r| r.store).collect::<Vec<_>>(), [store]);
    assert_eq!(cluster.leader(topic, 1), (Some(1), 1));
}

#[test]
fn a_session_that_was_deleted_by_hand_while_its_broker_was_down_brings_no_epoch_back() {
    let cluster = Cluster::default();
    let broker = cluster.start(0);
    let topic = cluster.topic("orders", &[vec![0]]);
    assert_eq!(cluster.led(&broker, topic, 0), 1);
    drop(broker);
    cluster.server.delete("leases", "main-broker-0");
    let broker = cluster.start(0);
    eventually("it is elected anew", || {
        cluster.leader(topic, 0) == (Some(0), 2)
    });
    assert_eq!(cluster.led(&broker, topic, 0), 2);
    assert_eq!(cluster.session(0).unwrap().epoch, 2);
}

#[test]
fn a_broker_without_which_acks_all_would_be_refused_says_so() {
    let cluster = Cluster::default();
    let broker = cluster.start(0);
    let held_by = || broker.member.as_ref().unwrap().restart_gate().held_by();
    assert!(held_by().is_empty());
    let topic = cluster.topic("orders", &[vec![0, 1], vec![0]]);
    assert_eq!(cluster.led(&broker, topic, 0), 1);
    eventually("it knows", || held_by() == ["orders/0"]);
}

#[test]
fn an_election_whose_answer_was_lost_is_not_written_twice() {
    let cluster = Cluster::default();
    let _lost = cluster.server.fault(first(1, Answer::Lost, is_election));
    let broker = cluster.start(0);
    let topic = cluster.topic("orders", &[vec![0]]);
    assert_eq!(cluster.led(&broker, topic, 0), 1);
    always("nothing more is written", TIMING.duration, || {
        cluster.lease(topic, 0).epochs() == (1, 1)
    });
}

#[test]
fn an_election_of_a_controller_that_is_gone_comes_too_late_and_breaks_nothing() {
    let cluster = Cluster::default();
    let controller = cluster.start(0);
    eventually("there is a controller", || {
        cluster.controller() == Some((0, 1))
    });
    let broker = cluster.start(1);
    let late = move |call: &Call| is_election(call) && call.client == pod(0);
    let delay = Answer::Later(Duration::from_secs(6));
    let _late = cluster.server.fault(first(usize::MAX, delay, late));
    let topic = cluster.topic("orders", &[vec![1, 2]]);
    let mut calls = Vec::new();
    eventually("the first controller elects", || {
        calls.extend(cluster.server.take_calls());
        calls.iter().any(is_election)
    });
    drop(controller);
    assert_eq!(cluster.led(&broker, topic, 0), 1);
    assert_eq!(broker.append(topic, 0).unwrap(), 0);
    eventually("the late write comes", || {
        calls.extend(cluster.server.take_calls());
        calls.iter().any(|call| call.client == LATE)
    });
    assert_eq!(cluster.lease(topic, 0).epochs(), (1, 1));
    assert_eq!(cluster.led(&broker, topic, 0), 1);
    assert_eq!(broker.append(topic, 0).unwrap(), 1);
}

#[test]
fn while_the_api_server_is_away_all_goes_on_and_nothing_is_elected_away_after_it() {
    let cluster = Cluster::default();
    let brokers: Vec<_> = (0..3).map(|id| cluster.start(id)).collect();
    let topic = cluster.topic("orders", &[vec![0], vec![1], vec![2]]);
    for (index, broker) in (0..).zip(&brokers) {
        assert_eq!(cluster.led(broker, topic, index), 1);
    }
    let all_lead = || {
        (0..).zip(&brokers).all(|(index, broker)| {
            broker.leads(topic, index) == Some(1) && broker.append(topic, index).is_ok()
        })
    };
    let away = cluster.server.away();
    always("all lead", 3 * TIMING.duration, all_lead);
    let before: Vec<_> = (0..3).map(|id| cluster.session(id)).collect();
    drop(away);
    eventually("all renew", || {
        (0..)
            .zip(&before)
            .all(|(id, before)| cluster.session(id) != *before)
    });
    always("nothing is elected", 2 * TIMING.duration, || {
        all_lead() && (0..3).all(|index| cluster.lease(topic, index).epochs() == (1, 1))
    });
}

#[test]
fn a_leader_at_which_no_other_broker_is_heard_of_hands_over() {
    let cluster = Cluster::default();
    // None of these reaches another one: only the Leases tell that they are alive.
    let brokers: Vec<_> = (0..3).map(|id| cluster.start(id)).collect();
    let topic = cluster.topic("orders", &[vec![0, 1, 2]]);
    assert_eq!(cluster.led(&brokers[0], topic, 0), 1);
    eventually("it is handed over", || {
        cluster.leader(topic, 0) == (Some(1), 2)
    });
    let isr = cluster.lease(topic, 0).assignment.isr;
    assert_eq!(isr.iter().map(|r| r.id).collect::<Vec<_>>(), [1, 2]);
    eventually("the new leader knows", || {
        brokers[1].leads(topic, 0) == Some(2)
    });
}

#[test]
fn a_leader_that_was_gone_before_anyone_watched_leads_no_more() {
    let cluster = Cluster::default();
    let topic = cluster.topic("orders", &[vec![8], vec![9]]);
    let session = BrokerSession {
        broker_id: 9,
        store_id: Uuid::from_u128(9),
        pod: pod(9),
        address: "x:1".into(),
        release: "0".into(),
        draining: false,
    };
    let mut object = Lease::default();
    let held = Held {
        holder: Some("dead".into()),
        epoch: 4,
        duration_seconds: Some(2),
        ..Held::default()
    };
    session.write(&mut object, CLUSTER, held);
    cluster.server.put("leases", &object);
    // 8 has no session, and 9 one that no one renews.
    for (index, id) in [(0, 8), (1, 9)] {
        let mut lease = cluster.lease(topic, index);
        let store = Uuid::from_u128(9);
        lease.assignment.isr = vec![Replica { id, store }];
        lease.assignment.leader = Some(Leader {
            id,
            broker_epoch: 4,
        });
        lease.assignment.partition_epoch = 1;
        lease.held.epoch = 3;
        cluster.write_lease(&lease);
    }
    let _broker = cluster.start(0);
    for index in 0..2 {
        eventually("no one leads", || cluster.leader(topic, index) == (None, 3));
    }
}

#[test]
fn a_lease_that_was_deleted_by_hand_while_its_topic_is_served_changes_nothing() {
    let cluster = Cluster::default();
    let broker = cluster.start(0);
    let topic = cluster.topic("orders", &[vec![0]]);
    assert_eq!(cluster.led(&broker, topic, 0), 1);
    let lease = cluster.lease(topic, 0);
    let name = lease.assignment.lease_name(CLUSTER);
    cluster.server.delete("leases", &name);
    // A topic that comes later is led: the deletion was seen by then.
    let later = cluster.topic("later", &[vec![0]]);
    assert_eq!(cluster.led(&broker, later, 0), 1);
    assert_eq!(broker.leads(topic, 0), Some(1));
    assert_eq!(broker.append(topic, 0).unwrap(), 0);
    // Nor does a Lease that is older than what was.
    let mut older = lease.clone();
    (older.held.epoch, older.assignment.partition_epoch) = (0, 0);
    older.assignment.leader = None;
    cluster.write_lease(&older);
    let later = cluster.topic("latest", &[vec![0]]);
    assert_eq!(cluster.led(&broker, later, 0), 1);
    assert_eq!(broker.leads(topic, 0), Some(1));
    // It is restored in a higher epoch.
    let mut restored = lease;
    restored.held.epoch = 7;
    restored.assignment.leader = None;
    cluster.write_lease(&restored);
    assert_eq!(cluster.led(&broker, topic, 0), 8);
    assert_eq!(broker.append(topic, 0).unwrap(), 1);
}

#[test]
fn a_deleted_topics_data_goes_once_the_record_was_read_anew_and_the_broker_leaves() {
    let cluster = Cluster::default();
    let broker = cluster.start(0);
    let topic = cluster.topic("orders", &[vec![0], vec![0]]);
    cluster.led(&broker, topic, 0);
    cluster.led(&broker, topic, 1);
    let unread = cluster.server.fault(|call| {
        (call.verb == Verb::Get && call.resource == "configmaps").then_some(Answer::Status(503))
    });
    cluster.server.take_calls();
    cluster.write_record("orders", topic, TopicState::Deleting);
    let mut reads = 0;
    eventually("the record is asked for", || {
        let calls = cluster.server.take_calls();
        reads += calls
            .iter()
            .filter(|c| c.verb == Verb::Get && c.resource == "configmaps")
            .count();
        reads >= 2
    });
    assert!(
        broker
            .store
            .topic(topic)
            .is_some_and(|held| held.partitions.len() == 2)
    );
    assert_eq!(cluster.lease(topic, 0).assignment.replicas, [0]);
    drop(unread);
    eventually("the broker leaves", || {
        (0..2).all(|index| cluster.lease(topic, index).assignment.replicas.is_empty())
    });
    assert!(broker.store.topic(topic).is_none());
    assert!(broker.directory.topic("orders").is_none());
}

#[test]
fn late_news_of_a_deletion_that_was_taken_back_delete_nothing() {
    let cluster = Cluster::default();
    let broker = cluster.start(0);
    let topic = cluster.topic("orders", &[vec![0]]);
    cluster.led(&broker, topic, 0);
    assert_eq!(broker.append(topic, 0).unwrap(), 0);
    let server = &cluster.server;
    server.hold(&pod(0), Some(server.version()));
    cluster.write_record("orders", topic, TopicState::Deleting);
    let deleting = server.version();
    cluster.write_record("orders", topic, TopicState::Active);
    server.take_calls();
    server.hold(&pod(0), Some(deleting));
    eventually("the record is asked for", || {
        let calls = server.take_calls();
        calls
            .iter()
            .any(|c| c.verb == Verb::Get && c.resource == "configmaps")
    });
    server.hold(&pod(0), None);
    cluster.led(&broker, topic, 0);
    assert_eq!(broker.append(topic, 0).unwrap(), 1);
}

#[test]
fn what_can_not_be_read_is_left_out_and_the_rest_goes_on() {
    let cluster = Cluster::default();
    let spoil = |suffix: &str| {
        for role in [Role::Partition, Role::Broker] {
            let mut lease = Lease::default();
            lease.metadata.name = Some(format!("main-{}-{suffix}", role.as_str()));
            lease.metadata.labels = Some(
                [(CLUSTER_LABEL, CLUSTER), (ROLE_LABEL, role.as_str())]
                    .map(|(k, v)| (k.to_owned(), v.to_owned()))
                    .into(),
            );
            cluster.server.put("leases", &lease);
            let place = format!("millrace.dev/{}", role.as_str());
            lease.metadata.annotations = Some([(place, "{".to_owned())].into());
            lease.metadata.name = Some(format!("main-{}-{suffix}-2", role.as_str()));
            cluster.server.put("leases", &lease);
        }
        let mut record = ConfigMap::default();
        record.metadata.name = Some(format!("main-topic-{suffix}"));
        record.metadata.labels = Some(
            [(CLUSTER_LABEL, CLUSTER), (ROLE_LABEL, Role::Topic.as_str())]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into(),
        );
        cluster.server.put("configmaps", &record);
    };
    spoil("a");
    let broker = cluster.start(0);
    spoil("b");
    let topic = cluster.topic("orders", &[vec![0]]);
    assert_eq!(cluster.led(&broker, topic, 0), 1);
}

#[test]
fn requests_at_rest_do_not_depend_on_the_number_of_partitions() {
    let at_rest = |partitions: usize| {
        let cluster = Cluster::default();
        let broker = cluster.start(0);
        let topic = cluster.topic("orders", &vec![vec![0]; partitions]);
        eventually("all are led", || {
            (0..)
                .take(partitions)
                .all(|index| broker.leads(topic, index).is_some())
        });
        cluster.server.take_calls();
        let before = cluster.session(0);
        let mut renewals = 0;
        let mut last = before;
        eventually("the session is renewed four times", || {
            let session = cluster.session(0);
            renewals += usize::from(session != last);
            last = session;
            renewals == 4
        });
        let mut calls: Vec<_> = cluster
            .server
            .take_calls()
            .into_iter()
            .map(|call| (call.verb == Verb::Update, call.name))
            .collect();
        assert!(calls.len() <= 12, "{partitions} partitions: {calls:?}");
        calls.sort();
        calls.dedup();
        calls
    };
    let few = at_rest(10);
    assert_eq!(few.len(), 2, "{few:?}");
    assert_eq!(at_rest(2_000), few);
}

#[test]
fn partitions_that_can_not_be_written_keep_no_other_one_waiting() {
    let cluster = Cluster::default();
    let broker = cluster.start(0);
    let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
    let _refused = cluster.server.fault(move |call| {
        (is_election(call) && call.name.contains(&one.to_string())).then_some(Answer::Status(403))
    });
    cluster.make_topic("refused", one, &vec![vec![0]; 50]);
    cluster.server.take_calls();
    let mut elections = 0;
    eventually("more are refused than are written at a time", || {
        elections += cluster
            .server
            .take_calls()
            .iter()
            .filter(|c| is_election(c))
            .count();
        elections >= 32
    });
    cluster.make_topic("orders", two, &[vec![0]]);
    assert_eq!(cluster.led(&broker, two, 0), 1);
}

#[test]
fn elections_that_meet_nothing_but_conflicts_do_not_hammer_the_api_server() {
    let cluster = Cluster::default();
    let broker = cluster.start(0);
    let storm = cluster
        .server
        .fault(first(usize::MAX, Answer::Status(409), is_election));
    let topic = cluster.topic("orders", &[vec![0]]);
    let elections = || {
        let calls = cluster.server.take_calls();
        calls.iter().filter(|call| is_election(call)).count()
    };
    eventually("it is tried", || elections() > 0);
    std::thread::sleep(Duration::from_secs(2));
    let tried = elections();
    assert!(tried <= 10, "{tried} elections in two seconds");
    drop(storm);
    assert_eq!(cluster.led(&broker, topic, 0), 1);
}

#[test]
fn an_older_lease_that_was_put_back_is_not_written_again_and_again() {
    let cluster = Cluster::default();
    let _controller = cluster.start(0);
    eventually("there is a controller", || {
        cluster.controller() == Some((0, 1))
    });
    let broker = cluster.start(1);
    let topic = cluster.topic("orders", &[vec![1]]);
    assert_eq!(cluster.led(&broker, topic, 0), 1);
    let mut older = cluster.lease(topic, 0);
    (older.held.epoch, older.assignment.partition_epoch) = (0, 0);
    cluster.write_lease(&older);
    drop(broker);
    let elections = || {
        let calls = cluster.server.take_calls();
        calls.iter().filter(|call| is_election(call)).count()
    };
    elections();
    eventually("it is tried", || elections() > 0);
    std::thread::sleep(Duration::from_secs(2));
    let tried = elections();
    assert!(tried <= 10, "{tried} elections in two seconds");
}

#[test]
fn a_topic_that_can_not_be_deleted_is_tried_once_at_a_time_whatever_happens_to_it() {
    let cluster = Cluster::default();
    let broker = cluster.start(0);
    let topic = cluster.topic("orders", &[vec![0]]);
    cluster.led(&broker, topic, 0);
    let is_read = |call: &Call| call.verb == Verb::Get && call.resource == "configmaps";
    let _unread = cluster
        .server
        .fault(first(usize::MAX, Answer::Status(503), is_read));
    cluster.write_record("orders", topic, TopicState::Deleting);
    eventually("no one leads", || cluster.leader(topic, 0).0.is_none());
    let mut reads = 0;
    for _ in 0..20 {
        let mut lease: PartitionLease = cluster.lease(topic, 0);
        lease.assignment.partition_epoch += 1;
        let before = reads;
        cluster.write_lease(&lease);
        eventually("the record is asked for", || {
            reads += cluster
                .server
                .take_calls()
                .iter()
                .filter(|c| is_read(c))
                .count();
            reads > before
        });
    }
    std::thread::sleep(Duration::from_millis(1500));
    cluster.server.take_calls();
    std::thread::sleep(Duration::from_secs(2));
    let reads = cluster
        .server
        .take_calls()
        .iter()
        .filter(|c| is_read(c))
        .count();
    assert!(reads <= 4, "{reads} reads in two seconds");
}
