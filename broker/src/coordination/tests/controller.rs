//! Who is controller.

use super::cluster::{Cluster, TIMING, always, eventually, pod};

#[test]
fn there_is_one_controller_and_another_as_soon_as_it_stops_or_dies() {
    let cluster = Cluster::default();
    let mut brokers: Vec<_> = (0..3).map(|id| cluster.start(id)).collect();
    eventually("there is a controller", || cluster.controller().is_some());
    let (first, epoch) = cluster.controller().unwrap();
    assert_eq!(epoch, 1);
    always("it stays", TIMING.duration, || {
        cluster.controller() == Some((first, epoch))
    });

    let stopping = brokers
        .iter()
        .position(|broker| broker.id == first)
        .unwrap();
    brokers.remove(stopping).stop();
    eventually("another one takes over", || {
        cluster
            .controller()
            .is_some_and(|(id, epoch)| id != first && epoch == 2)
    });
    let (second, _) = cluster.controller().unwrap();
    let dying = brokers
        .iter()
        .position(|broker| broker.id == second)
        .unwrap();
    drop(brokers.remove(dying));
    eventually("the last one takes over", || {
        cluster.controller() == Some((brokers[0].id, 3))
    });
}

#[test]
fn a_controller_that_dies_is_succeeded_though_its_session_was_deleted_by_hand() {
    let cluster = Cluster::default();
    let first = cluster.start(0);
    eventually("there is a controller", || {
        cluster.controller() == Some((0, 1))
    });
    let _second = cluster.start(1);
    drop(first);
    cluster.server.delete("leases", &pod(0));
    eventually("the other one takes over", || {
        cluster.controller() == Some((1, 2))
    });
}

#[test]
fn a_controller_learns_that_it_is_not_when_its_lease_was_deleted_and_made_again_unseen() {
    let cluster = Cluster::default();
    let other = cluster.start(0);
    eventually("there is a controller", || {
        cluster.controller() == Some((0, 1))
    });
    let first = cluster.start(1);
    other.stop();
    eventually("the other one takes over", || {
        cluster.controller() == Some((1, 2))
    });
    eventually("it knows", || first.is_controller());
    let other = cluster.start(0);
    cluster.server.hold(&pod(1), Some(cluster.server.version()));
    cluster.server.delete("leases", "main-controller");
    eventually("another one is", || cluster.controller() == Some((0, 1)));
    cluster.server.compact();
    cluster.server.hold(&pod(1), None);
    eventually("the first one knows that it is not", || {
        !first.is_controller()
    });
    assert!(other.is_controller());
}
