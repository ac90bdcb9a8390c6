//! Who leads what, and what becomes of data.

use super::cluster::Cluster;

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
