//! Who leads a partition: a pure function of its Lease, its topic and the brokers that are alive.
//!
//! Safe whoever runs it and however stale what it knows: the new state replaces exactly the one that was read (compare-and-swap),
//! and only a replica in the ISR *of that very state* is elected, by the id of its store. A controller that was deposed can so
//! at worst make an election that was not needed.

use std::collections::BTreeMap;

use millrace_crds::coordination::{
    Leader, PartitionAssignment, PartitionLease, Replica, TopicState,
};
use uuid::Uuid;

/// A broker that is alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LiveBroker {
    /// Its process.
    pub(super) epoch: i32,
    /// What is on its volume.
    pub(super) store: Uuid,
    /// Its pod.
    pub(super) pod: String,
    /// It is about to stop.
    pub(super) draining: bool,
}

/// The state that shall follow, if another than this one shall.
pub(super) fn elect(
    lease: &PartitionLease,
    topic: TopicState,
    alive: &BTreeMap<i32, LiveBroker>,
    controller_epoch: i32,
) -> Option<PartitionLease> {
    let assignment = &lease.assignment;
    if topic != TopicState::Active {
        return assignment
            .leader
            .is_some()
            .then(|| next(lease, None, &assignment.isr, controller_epoch));
    }
    let leads = |leader: &Leader| {
        alive
            .get(&leader.id)
            .is_some_and(|broker| broker.epoch == leader.broker_epoch && !broker.draining)
    };
    if assignment.leader.as_ref().is_some_and(leads) {
        return None;
    }
    let in_sync = |id: i32, broker: &LiveBroker| {
        let store = broker.store;
        assignment.isr.contains(&Replica { id, store })
            // No one has led it, so there is no record that a replica could lack.
            || (assignment.isr.is_empty() && lease.held.epoch == 0)
    };
    let candidate = assignment.replicas.iter().find_map(|id| {
        let broker = alive.get(id)?;
        (!broker.draining && in_sync(*id, broker)).then_some((*id, broker))
    });
    match candidate {
        Some((id, broker)) => {
            let first = [Replica {
                id,
                store: broker.store,
            }];
            let isr = match assignment.isr.is_empty() {
                true => &first[..],
                false => &assignment.isr,
            };
            Some(next(lease, Some((id, broker)), isr, controller_epoch))
        }
        // A leader that is about to stop leads to the end; one that is gone does not.
        None => {
            let gone = |leader: &Leader| {
                alive
                    .get(&leader.id)
                    .is_none_or(|broker| broker.epoch != leader.broker_epoch)
            };
            assignment
                .leader
                .as_ref()
                .is_some_and(gone)
                .then(|| next(lease, None, &assignment.isr, controller_epoch))
        }
    }
}

/// The state in which a broker that has deleted its data of a deleted topic no longer is a replica.
pub(super) fn leave(lease: &PartitionLease, broker: i32) -> Option<PartitionLease> {
    let mut assignment = lease.assignment.clone();
    assignment.replicas.retain(|id| *id != broker);
    if assignment.replicas.len() == lease.assignment.replicas.len() {
        return None;
    }
    assignment.isr.retain(|replica| replica.id != broker);
    let leader = assignment.leader.take_if(|leader| leader.id == broker);
    let mut held = lease.held.clone();
    if leader.is_some() {
        held.holder = None;
    }
    Some(written(PartitionLease { assignment, held }))
}

fn next(
    lease: &PartitionLease,
    leader: Option<(i32, &LiveBroker)>,
    isr: &[Replica],
    controller_epoch: i32,
) -> PartitionLease {
    let mut held = lease.held.clone();
    held.holder = leader.map(|(_, broker)| broker.pod.clone());
    // Each leader, also one that is elected anew after a restart, has an epoch of its own.
    held.epoch += i32::from(leader.is_some());
    let assignment = PartitionAssignment {
        isr: isr.to_vec(),
        leader: leader.map(|(id, broker)| Leader {
            id,
            broker_epoch: broker.epoch,
        }),
        controller_epoch,
        ..lease.assignment.clone()
    };
    written(PartitionLease { assignment, held })
}

fn written(mut lease: PartitionLease) -> PartitionLease {
    lease.assignment.partition_epoch += 1;
    lease.assignment.write_id = Uuid::new_v4();
    lease
}

#[cfg(test)]
mod tests {
    use millrace_crds::coordination::Held;

    use super::*;

    const CONTROLLER_EPOCH: i32 = 7;

    fn store(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// Brokers given as (id, epoch, store); one with a negative epoch is draining.
    fn alive(brokers: &[(i32, i32, u128)]) -> BTreeMap<i32, LiveBroker> {
        let live = |&(id, epoch, number): &(i32, i32, u128)| {
            let broker = LiveBroker {
                epoch: epoch.abs(),
                store: store(number),
                pod: format!("main-broker-{id}"),
                draining: epoch < 0,
            };
            (id, broker)
        };
        brokers.iter().map(live).collect()
    }

    /// A partition of replicas 0, 1, 2 with that ISR as (id, store), and leader as (id, broker epoch), in leader epoch `epoch`.
    fn lease(isr: &[(i32, u128)], leader: Option<(i32, i32)>, epoch: i32) -> PartitionLease {
        let mut assignment = PartitionAssignment::new(store(99), 0, vec![0, 1, 2]);
        assignment.isr = isr
            .iter()
            .map(|&(id, number)| Replica {
                id,
                store: store(number),
            })
            .collect();
        assignment.leader = leader.map(|(id, broker_epoch)| Leader { id, broker_epoch });
        assignment.partition_epoch = 40;
        let held = Held {
            holder: leader.map(|(id, _)| format!("main-broker-{id}")),
            epoch,
            ..Held::default()
        };
        PartitionLease { assignment, held }
    }

    #[test]
    fn leaders_are_live_replicas_that_have_everything() {
        let all = [(0, 1, 10), (1, 1, 11), (2, 1, 12)];
        let isr = [(0, 10), (1, 11), (2, 12)];
        // What it is, who is alive, and who leads after it: None: nothing is written; Some(None): no one.
        for (name, lease, alive_now, expected) in [
            (
                "a new partition goes to its preferred leader",
                lease(&[], None, 0),
                &all[..],
                Some(Some(0)),
            ),
            (
                "or to the first one that is alive",
                lease(&[], None, 0),
                &all[1..],
                Some(Some(1)),
            ),
            (
                "a partition that was led and whose ISR is empty is never given an empty leader",
                lease(&[], None, 3),
                &all[..],
                None,
            ),
            (
                "a live leader stays",
                lease(&isr, Some((1, 1)), 3),
                &all[..],
                None,
            ),
            (
                "a dead one is followed by the first live member of the ISR",
                lease(&isr, Some((0, 1)), 3),
                &all[1..],
                Some(Some(1)),
            ),
            (
                "one that was started again is elected anew",
                lease(&isr, Some((0, 1)), 3),
                &[(0, 2, 10)],
                Some(Some(0)),
            ),
            (
                "a replica that is not in the ISR is never elected",
                lease(&[(0, 10)], Some((0, 1)), 3),
                &all[1..],
                Some(None),
            ),
            (
                "nor one whose volume lost its data",
                lease(&[(0, 10)], Some((0, 1)), 3),
                &[(0, 2, 77)],
                Some(None),
            ),
            (
                "without a leader and without a candidate nothing is written",
                lease(&[(0, 10)], None, 3),
                &all[1..],
                None,
            ),
            (
                "a broker that stops hands over",
                lease(&isr, Some((0, 1)), 3),
                &[(0, -1, 10), (2, 1, 12)],
                Some(Some(2)),
            ),
            (
                "but leads to the end if there is no one else",
                lease(&[(0, 10)], Some((0, 1)), 3),
                &[(0, -1, 10), (2, 1, 12)],
                None,
            ),
            (
                "a broker that stops is not elected",
                lease(&[(0, 10)], None, 3),
                &[(0, -1, 10)],
                None,
            ),
        ] {
            let found = elect(
                &lease,
                TopicState::Active,
                &alive(alive_now),
                CONTROLLER_EPOCH,
            );
            let leader = found
                .as_ref()
                .map(|next| next.assignment.leader.map(|leader| leader.id));
            assert_eq!(leader, expected, "{name}");
            let Some(next) = found else { continue };
            assert_eq!(next.assignment.partition_epoch, 41, "{name}");
            assert_ne!(
                next.assignment.write_id, lease.assignment.write_id,
                "{name}"
            );
            assert_eq!(next.assignment.controller_epoch, CONTROLLER_EPOCH, "{name}");
            let elected = i32::from(next.assignment.leader.is_some());
            assert_eq!(next.held.epoch, lease.held.epoch + elected, "{name}");
            assert_eq!(
                next.held.holder,
                leader.flatten().map(|id| format!("main-broker-{id}")),
                "{name}"
            );
            // Elections never shrink the ISR; the first one makes it.
            if !lease.assignment.isr.is_empty() {
                assert_eq!(next.assignment.isr, lease.assignment.isr, "{name}");
            } else {
                let leader = next.assignment.leader.unwrap().id;
                let ids: Vec<i32> = next.assignment.isr.iter().map(|r| r.id).collect();
                assert_eq!(ids, [leader], "{name}");
            }
        }
    }

    #[test]
    fn topics_that_are_not_served_have_no_leaders() {
        let alive = alive(&[(0, 1, 10)]);
        for state in [TopicState::Retained, TopicState::Deleting] {
            let led = lease(&[(0, 10)], Some((0, 1)), 3);
            let next = elect(&led, state, &alive, CONTROLLER_EPOCH).unwrap();
            assert_eq!(next.assignment.leader, None);
            assert_eq!(next.assignment.isr, led.assignment.isr);
            assert_eq!(next.held.epoch, 3);
            assert_eq!(elect(&next, state, &alive, CONTROLLER_EPOCH), None);
        }
    }

    #[test]
    fn a_broker_that_deleted_its_data_is_no_replica_any_more() {
        let led = lease(&[(0, 10), (1, 11)], Some((0, 1)), 3);
        let next = leave(&led, 1).unwrap();
        assert_eq!(next.assignment.replicas, [0, 2]);
        assert_eq!(next.assignment.isr.len(), 1);
        assert_eq!(next.held.holder.as_deref(), Some("main-broker-0"));
        let next = leave(&next, 0).unwrap();
        assert_eq!(next.assignment.replicas, [2]);
        assert_eq!(
            (next.assignment.leader, next.held.holder.as_deref()),
            (None, None)
        );
        assert_eq!(next.assignment.partition_epoch, 42);
        assert_eq!(leave(&next, 0), None);
    }
}
