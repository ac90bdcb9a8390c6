//! Watches that break, lag, or lie still.

use super::{
    api_server::{Answer, Verb, first},
    cluster::{Cluster, TIMING, always, eventually, pod},
};
use millrace_crds::coordination::PartitionAssignment;

#[test]
fn a_watch_that_has_gone_silent_is_started_again_and_what_was_missed_is_caught_up() {
    let cluster = Cluster::default();
    let broker = cluster.start(0);
    let first = cluster.topic("first", &[vec![0]]);
    cluster.led(&broker, first, 0);
    cluster.server.silence("leases");
    cluster.server.silence("configmaps");
    let second = cluster.topic("second", &[vec![0]]);
    assert_eq!(cluster.led(&broker, second, 0), 1);
    assert_eq!(broker.leads(first, 0), Some(1));
}

#[test]
fn after_a_watch_was_too_old_all_is_listed_anew_and_what_vanished_is_noticed() {
    let cluster = Cluster::default();
    let broker = cluster.start(0);
    let gone = cluster.topic("gone", &[vec![0]]);
    let kept = cluster.topic("kept", &[vec![0]]);
    cluster.led(&broker, gone, 0);
    cluster.led(&broker, kept, 0);
    eventually("it is published", || {
        broker.directory.topic("gone").is_some()
    });
    let server = &cluster.server;
    server.hold(&pod(0), Some(server.version()));
    let lease = PartitionAssignment::new(gone, 0, Vec::new()).lease_name("main");
    server.delete("leases", &lease);
    let record = millrace_crds::coordination::TopicRecord::object_name("main", "gone");
    server.delete("configmaps", &record);
    server.compact();
    server.hold(&pod(0), None);
    eventually("it is withdrawn", || {
        broker.directory.topic("gone").is_none()
    });
    eventually("it is not led", || broker.leads(gone, 0).is_none());
    assert!(
        broker.store.topic(gone).is_some(),
        "data goes only when it is told to"
    );
    assert_eq!(cluster.led(&broker, kept, 0), 1);
    let later = cluster.topic("later", &[vec![0]]);
    assert_eq!(cluster.led(&broker, later, 0), 1);
}

#[test]
fn a_broker_whose_watches_lag_goes_on_and_is_not_elected_away() {
    let cluster = Cluster::default();
    let brokers: Vec<_> = (0..2).map(|id| cluster.start(id)).collect();
    let topic = cluster.topic("orders", &[vec![0], vec![1]]);
    for (index, broker) in (0..).zip(&brokers) {
        cluster.led(broker, topic, index);
    }
    for id in 0..2 {
        cluster
            .server
            .hold(&pod(id), Some(cluster.server.version()));
        always("all lead", 2 * TIMING.duration, || {
            (0..2).all(|index| cluster.lease(topic, index).epochs() == (1, 1))
        });
        cluster.server.hold(&pod(id), None);
    }
    for (index, broker) in (0..).zip(&brokers) {
        assert_eq!(broker.leads(topic, index), Some(1));
    }
}

#[test]
fn a_list_that_is_never_answered_is_asked_for_again() {
    for resource in ["leases", "configmaps"] {
        let cluster = Cluster::default();
        let _hung = cluster.server.fault(first(1, Answer::Never, move |call| {
            call.verb == Verb::List && call.resource == resource
        }));
        let _broker = cluster.start(0);
    }
}
