//! Who leads a partition: a pure function of its Lease, its topic and the brokers that are alive.
//!
//! Safe whoever runs it and however stale what it knows: the new state replaces exactly the one that was read (compare-and-swap),
//! and only a replica in the ISR *of that very state* is elected, by the id of its store. A controller that was deposed can so
//! at worst make an election that was not needed. Unclean elections are the exception, and need a controller that is sure to be one.

use std::collections::BTreeMap;

use millrace_crds::coordination::{
    Leader, PartitionAssignment, PartitionLease, Replica, TopicState,
};
use uuid::Uuid;

/// A broker that is alive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LiveBroker {
    /// Its process.
    pub(crate) epoch: i32,
    /// What is on its volume.
    pub(crate) store: Uuid,
    /// Its pod.
    pub(crate) pod: String,
    /// It is about to stop.
    pub(crate) draining: bool,
    /// It has been alive for long enough to be given leaderships that others have.
    pub(crate) settled: bool,
}

/// What of a topic's configuration elections depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TopicRules {
    /// Whether it is served at all.
    pub(crate) state: TopicState,
    /// `min.insync.replicas`.
    pub(crate) min_in_sync: usize,
    /// Whether a replica that may lack acknowledged records may lead if no other is left.
    pub(crate) unclean: bool,
}

/// Why a state follows another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// A replica of the ISR leads, since no one does or the last one can't go on.
    Clean,
    /// The preferred leader leads again.
    Preferred,
    /// A replica that may lack acknowledged records leads, since no other is left.
    Unclean,
    /// No one can lead.
    Offline,
}

/// The state that shall follow, if another than this one shall.
pub(crate) fn elect(
    lease: &PartitionLease,
    topic: TopicRules,
    alive: &BTreeMap<i32, LiveBroker>,
    controller_epoch: i32,
) -> Option<(PartitionLease, Reason)> {
    let assignment = &lease.assignment;
    let is_alive = |leader: &Leader| {
        let broker = alive.get(&leader.id);
        broker.is_some_and(|broker| broker.epoch == leader.broker_epoch)
    };
    let offline = || {
        let isr = assignment.isr.clone();
        (next(lease, None, isr, controller_epoch), Reason::Offline)
    };
    if topic.state != TopicState::Active {
        return assignment.leader.is_some().then(offline);
    }
    let elected = |(id, broker): (i32, &LiveBroker), reason| {
        let isr = match reason {
            Reason::Unclean => vec![Replica {
                id,
                store: broker.store,
            }],
            _ => isr_after(lease, id, topic.min_in_sync, alive),
        };
        let mut next = next(lease, Some((id, broker)), isr, controller_epoch);
        if reason == Reason::Unclean {
            next.assignment.last_unclean_epoch = Some(next.held.epoch);
        }
        (next, reason)
    };
    let may_lead = |id: &i32| {
        let broker = alive.get(id).filter(|broker| !broker.draining)?;
        let is_new = assignment.isr.is_empty() && lease.held.epoch == 0;
        // No one has led a new partition, so there is no record that a replica could lack.
        let store = broker.store;
        let is_in_sync =
            assignment.isr.contains(&Replica { id: *id, store }) || broken!(ElectAnyone);
        (is_new || is_in_sync).then_some((*id, broker))
    };
    let leader = assignment.leader.filter(is_alive);
    let leads_on = leader.filter(|leader| !alive[&leader.id].draining);
    if let Some(leader) = leads_on {
        // Who is to hold the partition no longer hands it to whichever can take it.
        let is_listed = assignment.replicas.contains(&leader.id);
        let eligible = if is_listed {
            1
        } else {
            assignment.replicas.len()
        };
        let mut preferred = assignment.replicas.iter().take(eligible);
        return preferred
            .find_map(|id| may_lead(id).filter(|(_, broker)| broker.settled))
            .filter(|(id, _)| *id != leader.id)
            .map(|preferred| elected(preferred, Reason::Preferred));
    }
    // In the order of preference. Of the ISR also who is to be a replica no longer: it has everything, and there may be no one else.
    let in_sync = assignment.isr.iter().map(|replica| &replica.id);
    let in_sync = in_sync.filter(|_| !broken!(ElectListedOnly));
    if let Some(candidate) = assignment.replicas.iter().chain(in_sync).find_map(may_lead) {
        return Some(elected(candidate, Reason::Clean));
    }
    if leader.is_some() {
        // It is about to stop, and leads to the end.
        return None;
    }
    let last_resort = || {
        let mut replicas = assignment.replicas.iter();
        replicas.find_map(|id| {
            let broker = alive.get(id)?;
            // Not at once: those of the ISR may be starting, too.
            (broker.settled && !broker.draining).then_some((*id, broker))
        })
    };
    if topic.unclean
        && !assignment.isr.is_empty()
        && let Some(candidate) = last_resort()
    {
        return Some(elected(candidate, Reason::Unclean));
    }
    assignment.leader.is_some().then(offline)
}

/// The state in which another replica leads than a live one that none of the others can reach. Only if that one is not in sync any more
/// then: nothing could be committed without it, and it might be preferred.
pub(crate) fn hand_over(
    lease: &PartitionLease,
    topic: TopicRules,
    alive: &BTreeMap<i32, LiveBroker>,
    isolated: i32,
) -> Option<PartitionLease> {
    let mut others = alive.clone();
    others.remove(&isolated);
    let (next, reason) = elect(lease, topic, &others, lease.assignment.controller_epoch)?;
    let is_rid = next.assignment.isr.iter().all(|r| r.id != isolated);
    (reason == Reason::Clean && is_rid).then_some(next)
}

/// The ISR under a new leader: without those that can't keep up, as far as `min.insync.replicas` allows. Removing is safe, since who is
/// left has all that is committed; fewer than the minimum would leave too few that may be elected. A new partition's is all that
/// are alive.
fn isr_after(
    lease: &PartitionLease,
    leader: i32,
    min_in_sync: usize,
    alive: &BTreeMap<i32, LiveBroker>,
) -> Vec<Replica> {
    let PartitionAssignment { replicas, isr, .. } = &lease.assignment;
    let keeps_up = |replica: &Replica| {
        let broker = alive.get(&replica.id);
        broker.is_some_and(|broker| broker.store == replica.store && !broker.draining)
    };
    if isr.is_empty() {
        let of = |id: &i32| {
            let store = alive.get(id)?.store;
            Some(Replica { id: *id, store })
        };
        return replicas.iter().filter_map(of).filter(keeps_up).collect();
    }
    let floor = min_in_sync.min(isr.len()).max(1);
    let mut room = isr.len() - floor;
    let mut kept = isr.clone();
    kept.retain(|replica| {
        let drop = room > 0 && replica.id != leader && !keeps_up(replica);
        room -= usize::from(drop);
        !drop
    });
    kept
}

/// Whether the partition would have fewer replicas in sync than `acks=all` needs without this one. Those that are gone do not count.
pub(super) fn needs(
    assignment: &PartitionAssignment,
    own: Replica,
    min_in_sync: usize,
    gone: impl Fn(i32) -> bool,
) -> bool {
    let isr = assignment.isr.iter();
    let in_sync = isr.filter(|replica| **replica == own || !gone(replica.id));
    assignment.isr.contains(&own) && assignment.spares_none(in_sync.count(), min_in_sync)
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
    isr: Vec<Replica>,
    controller_epoch: i32,
) -> PartitionLease {
    let mut held = lease.held.clone();
    held.holder = leader.map(|(_, broker)| broker.pod.clone());
    // Each leader, also one that is elected anew after a restart, has an epoch of its own.
    held.epoch += i32::from(leader.is_some());
    let assignment = PartitionAssignment {
        isr,
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
    const RULES: TopicRules = TopicRules {
        state: TopicState::Active,
        min_in_sync: 1,
        unclean: false,
    };

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
                settled: true,
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
                lease(&isr, Some((0, 1)), 3),
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
            let found = elect(&lease, RULES, &alive(alive_now), CONTROLLER_EPOCH);
            let found = found.map(|(next, _)| next);
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
            let by = next.assignment.leader;
            assert!(
                by.is_none_or(|by| next.assignment.isr.iter().any(|r| r.id == by.id)),
                "{name}"
            );
        }
    }

    #[test]
    fn a_leader_that_shall_hold_it_no_longer_hands_over_to_whoever_has_it() {
        let all = alive(&[(0, 1, 10), (1, 1, 11), (2, 1, 12)]);
        for (isr, expected) in [
            (&[(0, 10)][..], None),
            (&[(0, 10), (2, 12)], Some(2)),
            (&[(0, 10), (1, 11), (2, 12)], Some(1)),
        ] {
            let mut moved = lease(isr, Some((0, 1)), 3);
            moved.assignment.replicas = vec![1, 2];
            let next = elect(&moved, RULES, &all, CONTROLLER_EPOCH);
            let leader = next.and_then(|(next, _)| next.assignment.leader);
            assert_eq!(leader.map(|leader| leader.id), expected, "{isr:?}");
        }
    }

    #[test]
    fn an_election_drops_who_can_not_keep_up_but_leaves_as_many_as_must_be_in_sync() {
        let isr = [(0, 10), (1, 11), (2, 12)];
        for (name, lease, alive_now, min_in_sync, expected) in [
            (
                "a new partition has all that are alive",
                lease(&[], None, 0),
                &[(1, 1, 11), (2, 1, 12)][..],
                2,
                &[1, 2][..],
            ),
            (
                "who is gone is dropped",
                lease(&isr, Some((0, 1)), 3),
                &[(1, 1, 11), (2, 1, 12)],
                2,
                &[1, 2],
            ),
            (
                "or is about to stop",
                lease(&isr, Some((0, 1)), 3),
                &[(0, -1, 10), (1, 1, 11), (2, 1, 12)],
                2,
                &[1, 2],
            ),
            (
                "or lost its data",
                lease(&isr, Some((0, 1)), 3),
                &[(0, 2, 77), (1, 1, 11), (2, 1, 12)],
                2,
                &[1, 2],
            ),
            (
                "but not below the minimum",
                lease(&isr, Some((0, 1)), 3),
                &[(2, 1, 12)],
                2,
                &[1, 2],
            ),
            (
                "nor below what there is",
                lease(&isr[1..], Some((1, 1)), 3),
                &[(2, 1, 12)],
                3,
                &[1, 2],
            ),
            (
                "and never the leader",
                lease(&isr[..2], Some((0, 1)), 3),
                &[(1, 1, 11)],
                1,
                &[1],
            ),
        ] {
            let rules = TopicRules {
                min_in_sync,
                ..RULES
            };
            let (next, reason) = elect(&lease, rules, &alive(alive_now), CONTROLLER_EPOCH).unwrap();
            let ids: Vec<i32> = next.assignment.isr.iter().map(|r| r.id).collect();
            assert_eq!(
                (ids.as_slice(), reason),
                (expected, Reason::Clean),
                "{name}"
            );
        }
    }

    #[test]
    fn the_preferred_leader_gets_its_partition_back_once_it_has_settled() {
        let led = lease(&[(0, 10), (1, 11)], Some((1, 1)), 3);
        let mut brokers = alive(&[(0, 1, 10), (1, 1, 11)]);
        let (next, reason) = elect(&led, RULES, &brokers, CONTROLLER_EPOCH).unwrap();
        assert_eq!(
            (next.assignment.leader.unwrap().id, reason),
            (0, Reason::Preferred)
        );
        assert_eq!(next.held.epoch, 4);
        assert_eq!(elect(&next, RULES, &brokers, CONTROLLER_EPOCH), None);
        let not_in_sync = lease(&[(1, 11)], Some((1, 1)), 3);
        assert_eq!(elect(&not_in_sync, RULES, &brokers, CONTROLLER_EPOCH), None);
        brokers.get_mut(&0).unwrap().settled = false;
        assert_eq!(elect(&led, RULES, &brokers, CONTROLLER_EPOCH), None);
    }

    #[test]
    fn a_replica_that_may_lack_records_leads_only_where_the_topic_says_so_and_that_is_noted() {
        let led = lease(&[(0, 10)], Some((0, 1)), 3);
        let mut brokers = alive(&[(1, 1, 11), (2, 1, 12)]);
        let (offline, reason) = elect(&led, RULES, &brokers, CONTROLLER_EPOCH).unwrap();
        assert_eq!((offline.assignment.leader, reason), (None, Reason::Offline));
        let rules = TopicRules {
            unclean: true,
            ..RULES
        };
        let (next, reason) = elect(&offline, rules, &brokers, CONTROLLER_EPOCH).unwrap();
        assert_eq!(
            (next.assignment.leader.unwrap().id, reason),
            (1, Reason::Unclean)
        );
        assert_eq!(next.assignment.last_unclean_epoch, Some(next.held.epoch));
        assert_eq!(
            next.assignment.isr,
            [Replica {
                id: 1,
                store: store(11)
            }]
        );
        brokers
            .values_mut()
            .for_each(|broker| broker.settled = false);
        assert_eq!(elect(&offline, rules, &brokers, CONTROLLER_EPOCH), None);
        // A clean one is always better.
        let back = alive(&[(0, 2, 10), (1, 1, 11)]);
        let (next, reason) = elect(&offline, rules, &back, CONTROLLER_EPOCH).unwrap();
        assert_eq!(
            (next.assignment.leader.unwrap().id, reason),
            (0, Reason::Clean)
        );
        assert_eq!(next.assignment.last_unclean_epoch, None);
    }

    #[test]
    fn the_last_one_in_sync_leads_although_it_is_to_be_a_replica_no_longer() {
        let mut led = lease(&[(3, 13)], Some((0, 1)), 3);
        let (next, reason) = elect(
            &led,
            RULES,
            &alive(&[(1, 1, 11), (3, 1, 13)]),
            CONTROLLER_EPOCH,
        )
        .unwrap();
        assert_eq!(
            (next.assignment.leader.unwrap().id, reason),
            (3, Reason::Clean)
        );
        assert_eq!(next.assignment.isr, led.assignment.isr);
        // Who stays a replica comes first.
        led.assignment.isr.push(Replica {
            id: 1,
            store: store(11),
        });
        let (next, _) = elect(
            &led,
            RULES,
            &alive(&[(1, 1, 11), (3, 1, 13)]),
            CONTROLLER_EPOCH,
        )
        .unwrap();
        assert_eq!(next.assignment.leader.unwrap().id, 1);
    }

    #[test]
    fn an_isolated_leader_hands_over_where_the_others_can_go_on_without_it() {
        let isr = [(0, 10), (1, 11), (2, 12)];
        let all = alive(&[(0, 1, 10), (1, 1, 11), (2, 1, 12)]);
        let rules = |min_in_sync| TopicRules {
            min_in_sync,
            unclean: true,
            ..RULES
        };
        let led = lease(&isr, Some((0, 1)), 3);
        let next = hand_over(&led, rules(2), &all, 0).unwrap();
        assert_eq!(next.assignment.leader.unwrap().id, 1);
        assert_eq!(next.assignment.isr, led.assignment.isr[1..]);
        assert_eq!(next.held.epoch, 4);
        assert_eq!(next.assignment.controller_epoch, 0);
        // And it stays so, whatever the controller thinks of the one that handed over.
        assert_eq!(elect(&next, rules(2), &all, CONTROLLER_EPOCH), None);
        assert_eq!(hand_over(&led, rules(3), &all, 0), None);
        let alone = lease(&isr[..1], Some((0, 1)), 3);
        assert_eq!(hand_over(&alone, rules(1), &all, 0), None);
    }

    #[test]
    fn topics_that_are_not_served_have_no_leaders() {
        let alive = alive(&[(0, 1, 10)]);
        for state in [TopicState::Retained, TopicState::Deleting] {
            let led = lease(&[(0, 10)], Some((0, 1)), 3);
            let rules = TopicRules { state, ..RULES };
            let (next, _) = elect(&led, rules, &alive, CONTROLLER_EPOCH).unwrap();
            assert_eq!(next.assignment.leader, None);
            assert_eq!(next.assignment.isr, led.assignment.isr);
            assert_eq!(next.held.epoch, 3);
            assert_eq!(elect(&next, rules, &alive, CONTROLLER_EPOCH), None);
        }
    }

    #[test]
    fn who_can_not_be_spared_is_in_sync_with_no_more_than_are_needed() {
        for (isr, gone, min_in_sync, expected) in [
            (&[(0, 10), (1, 11), (2, 12)][..], &[][..], 2, false),
            (&[(0, 10), (1, 11), (2, 12)], &[2], 2, true),
            (&[(0, 10), (1, 11)], &[], 2, true),
            (&[(0, 10), (1, 11)], &[], 1, false),
            (&[(0, 10)], &[], 1, true),
            (&[(1, 11)], &[], 1, false),
            // With another volume than now.
            (&[(0, 99)], &[], 1, false),
            // All are needed: no restart can spare one.
            (&[(0, 10), (1, 11), (2, 12)], &[], 3, false),
        ] {
            let own = Replica {
                id: 0,
                store: store(10),
            };
            let assignment = lease(isr, None, 1).assignment;
            let found = needs(&assignment, own, min_in_sync, |id| gone.contains(&id));
            assert_eq!(found, expected, "{isr:?} {gone:?} {min_in_sync}");
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
