//! The rules one by one; the simulator drives them together.

use std::time::{Duration, Instant};

use millrace_crds::coordination::{
    Held, Leader as LeaseLeader, PartitionAssignment, PartitionLease, Replica,
};
use uuid::Uuid;

use super::*;
use crate::storage::EpochCache;

const LAG: Duration = Duration::from_secs(10);
const TIMING: Timing = Timing {
    lag: LAG,
    pause: Duration::from_secs(1),
};

/// A log of which all is durable.
struct Log {
    start: i64,
    end: i64,
    epochs: EpochCache,
}

impl Log {
    fn new(epochs: &[(i32, i64)], start: i64, end: i64) -> Self {
        let mut cache = EpochCache::default();
        for (epoch, offset) in epochs {
            cache.note(*epoch, *offset);
        }
        Log {
            start,
            end,
            epochs: cache,
        }
    }
}

impl LogEnds for Log {
    fn log_start(&self) -> i64 {
        self.start
    }
    fn log_end(&self) -> i64 {
        self.end
    }
    fn durable_end(&self) -> i64 {
        self.end
    }
    fn last_epoch(&self) -> Option<i32> {
        self.epochs.last()
    }
    fn end_of_epoch(&self, epoch: i32) -> EpochEnd {
        self.epochs.end_of(epoch, self.start, self.end)
    }
}

fn replica(id: i32) -> Replica {
    let store = Uuid::from_u128(u128::from(id.unsigned_abs()) + 10);
    Replica { id, store }
}

fn me() -> Me {
    let Replica { id, store } = replica(0);
    Me {
        id,
        epoch: 1,
        store,
    }
}

/// Led by broker 0 in epoch 5.
fn lease(isr: &[i32]) -> PartitionLease {
    let mut assignment = PartitionAssignment::new(Uuid::nil(), 0, vec![0, 1, 2]);
    assignment.isr = isr.iter().map(|id| replica(*id)).collect();
    assignment.leader = Some(LeaseLeader {
        id: 0,
        broker_epoch: 1,
    });
    assignment.partition_epoch = 7;
    let held = Held {
        epoch: 5,
        ..Held::default()
    };
    PartitionLease { assignment, held }
}

/// Leads with a log that ends at 100, committed up to 90.
fn leader(isr: &[i32], min_isr: usize, now: Instant) -> Leader {
    let log = Log::new(&[(4, 0)], 0, 100);
    Leader::new(me(), TIMING, lease(isr), min_isr, &log, 90, now)
}

fn near(now: Instant) -> impl Fn(i32) -> Peer {
    move |_| Peer {
        heard: Some(now),
        gone: false,
    }
}

fn proposed(step: Option<IsrStep>) -> Vec<i32> {
    match step {
        Some(IsrStep::Write(next)) => next.assignment.isr.iter().map(|r| r.id).collect(),
        other => panic!("no write: {other:?}"),
    }
}

#[test]
fn a_position_is_compared_by_the_last_epoch() {
    let log = Log::new(&[(1, 0), (3, 50), (4, 80)], 10, 100);
    let diverging = |epoch: i32, end_offset| {
        let epoch = (epoch >= 0).then_some(epoch);
        PositionCheck::Diverging(EpochEnd { epoch, end_offset })
    };
    for (name, log_end, last_epoch, expected) in [
        ("all of it", 100, 4, PositionCheck::Prefix),
        ("a part", 70, 3, PositionCheck::Prefix),
        ("just an epoch", 80, 3, PositionCheck::Prefix),
        ("more of an old epoch", 81, 3, diverging(3, 80)),
        ("more of the last epoch", 101, 4, diverging(4, 100)),
        (
            "an epoch that the leader does not have",
            60,
            2,
            diverging(1, 50),
        ),
        ("one later than the leader's", 60, 9, diverging(4, 100)),
        ("nothing of what there is", 9, 1, PositionCheck::OutOfRange),
        ("an old epoch that is gone", 5, 0, PositionCheck::OutOfRange),
        // These may be other records than those that were here.
        (
            "an old epoch that is gone, up to the start",
            10,
            0,
            PositionCheck::OutOfRange,
        ),
        ("or beyond it", 20, 0, PositionCheck::OutOfRange),
        ("empty, at the start", 10, -1, PositionCheck::Prefix),
        ("empty, before it", 0, -1, PositionCheck::OutOfRange),
        ("empty, beyond the end", 101, -1, PositionCheck::OutOfRange),
    ] {
        let position = Position {
            log_end,
            last_epoch: (last_epoch >= 0).then_some(last_epoch),
            durable_end: log_end,
        };
        assert_eq!(check_position(&position, &log), expected, "{name}");
    }
}

#[test]
fn a_follower_cuts_what_is_not_its_leaders_but_nothing_that_is_committed() {
    let log = Log::new(&[(1, 0), (3, 50)], 0, 90);
    let follower = Follower {
        epoch: 6,
        leader: 1,
        last_unclean_epoch: None,
    };
    let end = |epoch, end_offset| EpochEnd {
        epoch: Some(epoch),
        end_offset,
    };
    let cut = |follower: Follower, epoch, end, committed| follower.cut(epoch, end, &log, committed);
    assert_eq!(cut(follower, 6, end(3, 70), 60), Ok(Some(Cut(70))));
    assert_eq!(cut(follower, 6, end(2, 60), 40), Ok(Some(Cut(50))));
    assert_eq!(
        cut(follower, 5, end(3, 70), 60),
        Ok(None),
        "of another epoch"
    );
    let diverged = Diverged {
        cut: 70,
        high_watermark: 80,
    };
    assert_eq!(cut(follower, 6, end(3, 70), 80), Err(diverged));
    for (last_unclean_epoch, expected) in [(2, Err(diverged)), (4, Ok(Some(Cut(70))))] {
        let follower = Follower {
            last_unclean_epoch: Some(last_unclean_epoch),
            ..follower
        };
        assert_eq!(cut(follower, 6, end(3, 70), 80), expected);
    }
}

#[test]
fn a_follower_begins_anew_where_nothing_can_be_compared_but_never_below_what_is_committed() {
    let log = Log::new(&[(1, 40), (3, 50)], 40, 90);
    let follower = Follower {
        epoch: 6,
        leader: 1,
        last_unclean_epoch: None,
    };
    for (name, epoch, log_start, committed, unclean, expected) in [
        ("far behind", 6, 120, 90, None, Ok(Some(120))),
        (
            "with what no one knows of any more",
            6,
            60,
            60,
            None,
            Ok(Some(60)),
        ),
        ("of another epoch", 5, 120, 90, None, Ok(None)),
        (
            "committed",
            6,
            60,
            61,
            None,
            Err(Diverged {
                cut: 60,
                high_watermark: 61,
            }),
        ),
        (
            "lost by an unclean election",
            6,
            60,
            61,
            Some(4),
            Ok(Some(60)),
        ),
    ] {
        let follower = Follower {
            last_unclean_epoch: unclean,
            ..follower
        };
        let found = follower.begin_anew(epoch, log_start, &log, committed);
        assert_eq!(found, expected, "{name}");
    }
    // An empty log is like any other up to its end: there is nothing to compare.
    let mut emptied = Log::new(&[(3, 50)], 40, 90);
    assert_eq!(Follower::position(&emptied).last_epoch, Some(3));
    emptied.start = 90;
    assert_eq!(Follower::position(&emptied).last_epoch, None);
}

#[test]
fn a_follower_acts_on_answers_to_its_present_position_only() {
    let now = Instant::now();
    let follower = Follower {
        epoch: 6,
        leader: 1,
        last_unclean_epoch: None,
    };
    let position = Position {
        log_end: 90,
        last_epoch: Some(3),
        durable_end: 90,
    };
    let asked = || {
        let mut following = Following::new(follower, now);
        assert_eq!(following.due(), Some(now));
        following.on_sent(Some(&position));
        following
    };
    // Refused: the log is put right, and then it asks again.
    let mut following = asked();
    assert!(following.heeds_refusal(now) && !following.is_awaiting());
    assert_eq!(following.due(), None);
    following.on_cut(now);
    assert_eq!(following.due(), Some(now));
    // Refused late, when something has come of the position already.
    let mut following = asked();
    following.on_data(40);
    assert!(!following.heeds_refusal(now));
    assert_eq!(following.due(), Some(now));
    // Batches are taken in order, and it asks for none while some are being appended.
    let mut following = asked();
    following.on_data(40);
    assert_eq!(following.takes(89, 95), Err(NotNext { expected: 90 }));
    assert_eq!(following.takes(90, 95), Ok(()));
    assert_eq!(following.takes(95, 99), Ok(()));
    following.on_appended();
    following.on_not_appended(now);
    assert!(following.due().is_some_and(|at| at > now));
    assert_eq!(following.high_watermark(), 40);
}

#[test]
fn the_high_watermark_is_what_all_in_sync_replicas_have() {
    let now = Instant::now();
    let mut leader = leader(&[0, 1, 2], 2, now);
    assert!(!leader.knows_latest());
    leader.on_acknowledged(replica(1), 100, now);
    assert_eq!(leader.high_watermark(), 90);
    leader.on_acknowledged(replica(2), 95, now);
    assert_eq!(leader.high_watermark(), 95);
    leader.on_acknowledged(replica(2), 93, now);
    leader.on_durable(120);
    assert_eq!(leader.high_watermark(), 95);
    leader.on_acknowledged(replica(2), 110, now);
    assert_eq!(
        (leader.high_watermark(), leader.knows_latest()),
        (100, true)
    );
    // Another volume of the same broker is another replica.
    let other = Replica {
        id: 1,
        store: Uuid::nil(),
    };
    leader.on_acknowledged(other, 120, now);
    leader.on_acknowledged(replica(2), 120, now);
    assert_eq!(leader.high_watermark(), 100);
}

#[test]
fn nothing_is_committed_with_fewer_than_the_minimum_in_sync() {
    let now = Instant::now();
    let mut leader = leader(&[0], 2, now);
    leader.on_durable(120);
    assert_eq!(leader.high_watermark(), 90);
    assert_eq!(leader.in_sync(now, near(now)), 1);
    leader.set_min_isr(1);
    assert_eq!(leader.high_watermark(), 120);
}

#[test]
fn who_lags_or_is_gone_leaves_the_isr_down_to_the_minimum_and_comes_back_with_all() {
    let now = Instant::now();
    let mut leader = leader(&[0, 1, 2], 2, now);
    assert_eq!(leader.isr_step(now, near(now)), None);
    leader.on_acknowledged(replica(1), 100, now);
    let gone = |id| Peer {
        heard: Some(now),
        gone: id == 2,
    };
    assert_eq!(proposed(leader.isr_step(now, gone)), [0, 1]);
    assert_eq!(leader.isr_step(now, gone), None, "one change at a time");

    // Until it is written, who is about to leave still counts.
    leader.on_durable(110);
    leader.on_acknowledged(replica(1), 110, now);
    assert_eq!(leader.high_watermark(), 90);
    let mut written = lease(&[0, 1]);
    written.assignment.partition_epoch = 8;
    leader.on_isr_answer(Some(&written), now);
    assert_eq!(leader.high_watermark(), 110);

    // No further down, whatever happens.
    let later = now + 2 * LAG;
    assert_eq!(leader.isr_step(later, gone), None);
    assert_eq!(leader.in_sync(later, |_| Peer::default()), 1);

    let silent = |id| Peer {
        heard: Some(later - Duration::from_secs(5 * u64::from(id == 1))),
        gone: false,
    };
    leader.on_acknowledged(replica(1), 110, later);
    leader.on_acknowledged(replica(2), 105, later);
    assert_eq!(leader.in_sync(later, near(later)), 2);
    assert_eq!(
        leader.in_sync(later, silent),
        1,
        "though it lags not for long"
    );
    assert_eq!(leader.isr_step(later, near(later)), None, "it lacks some");
    leader.on_acknowledged(replica(2), 110, later);
    assert_eq!(proposed(leader.isr_step(later, near(later))), [0, 1, 2]);
}

#[test]
fn what_the_last_leader_left_counts_before_a_replica_joins() {
    let now = Instant::now();
    let mut leader = leader(&[0, 1], 1, now);
    leader.on_acknowledged(replica(2), 95, now);
    // It has all that is known to be committed, but 95 to 100 may be, too.
    assert_eq!(leader.isr_step(now, near(now)), None);
    leader.on_acknowledged(replica(2), 100, now);
    assert_eq!(proposed(leader.isr_step(now, near(now))), [0, 1, 2]);
}

#[test]
fn a_write_of_unknown_outcome_is_read_and_fenced_never_taken_back() {
    let now = Instant::now();
    let mut leader = leader(&[0, 1], 1, now);
    leader.on_acknowledged(replica(1), 100, now);
    leader.on_acknowledged(replica(2), 100, now);
    assert_eq!(proposed(leader.isr_step(now, near(now))), [0, 1, 2]);
    leader.on_isr_answer(None, now);
    leader.on_durable(120);
    leader.on_acknowledged(replica(1), 120, now);
    assert_eq!(leader.high_watermark(), 100, "broker 2 may be in sync");
    assert_eq!(leader.isr_step(now, near(now)), None);
    let later = now + TIMING.pause;
    assert_eq!(leader.isr_step(later, near(later)), Some(IsrStep::Read));
    // Unchanged: the write may still be on its way.
    leader.on_isr_answer(Some(&lease(&[0, 1])), later);
    assert_eq!(leader.high_watermark(), 100);
    let fence = leader.isr_step(later, near(later));
    let Some(IsrStep::Write(mut state)) = fence else {
        panic!("no fence: {fence:?}");
    };
    assert_eq!(state.assignment.isr, lease(&[0, 1]).assignment.isr);
    assert_eq!(state.assignment.partition_epoch, 8);
    // Either of them came first; this one did.
    leader.on_isr_answer(Some(&state), later);
    assert_eq!(leader.high_watermark(), 120);
    // A late word of an older state changes nothing.
    state.assignment.partition_epoch = 7;
    leader.adopt(&state);
    assert_eq!(leader.lease().assignment.partition_epoch, 8);
}

#[test]
fn who_shall_hold_it_no_longer_is_let_go_once_all_have_it_who_shall() {
    let now = Instant::now();
    // The replicas as they shall be, and the ISR that is proposed once broker 2 has everything: the leader stays until another one leads.
    for (replicas, expected) in [(vec![0, 2], [0, 2].as_slice()), (vec![1, 2], &[1, 2, 0])] {
        let state = lease(&[0, 1]).reassigned(replicas.clone());
        assert_eq!(state.epochs(), (6, 8), "an epoch of its own");
        let log = Log::new(&[(4, 0)], 0, 100);
        let mut leader = Leader::new(me(), TIMING, state, 1, &log, 90, now);
        leader.on_acknowledged(replica(1), 100, now);
        assert_eq!(leader.isr_step(now, near(now)), None, "{replicas:?}");
        leader.on_acknowledged(replica(2), 100, now);
        assert_eq!(proposed(leader.isr_step(now, near(now))), expected);
    }
}

#[test]
fn a_volume_that_lost_its_data_takes_its_place_again_with_all_of_it() {
    let now = Instant::now();
    let mut leader = leader(&[0, 1], 2, now);
    let emptied = Replica {
        id: 1,
        store: Uuid::from_u128(99),
    };
    leader.on_acknowledged(emptied, 0, now);
    assert_eq!(leader.isr_step(now, near(now)), None);
    leader.on_acknowledged(emptied, 100, now);
    let Some(IsrStep::Write(next)) = leader.isr_step(now, near(now)) else {
        panic!("it does not come back");
    };
    assert_eq!(next.assignment.isr, [replica(0), emptied]);
}

/// Each rule holds where it is kept, and does not where it is broken: so the switches do what they say.
#[test]
fn a_rule_that_is_broken_on_purpose_does_not_hold() {
    use crate::mutation::{
        self,
        Mutation::{self, *},
    };
    let now = Instant::now();
    let gone = |id| Peer {
        heard: Some(now),
        gone: id == 2,
    };
    let other_store = Replica {
        id: 1,
        store: Uuid::nil(),
    };
    type Case<'a> = (Mutation, Box<dyn Fn() -> bool + 'a>);
    let cases: [Case<'_>; 5] = [
        (
            RollBackUnknown,
            Box::new(|| {
                let mut leader = leader(&[0, 1, 2], 1, now);
                let step = leader.isr_step(now, gone);
                leader.on_isr_answer(None, now);
                step.is_some() && leader.isr_step(now, gone).is_none()
            }),
        ),
        (
            IgnoreStoreIds,
            Box::new(|| {
                let mut leader = leader(&[0, 1], 1, now);
                leader.on_acknowledged(other_store, 100, now);
                leader.high_watermark() == 90
            }),
        ),
        (
            ShrinkBeforeWritten,
            Box::new(|| {
                let mut leader = leader(&[0, 1, 2], 1, now);
                leader.on_acknowledged(replica(1), 100, now);
                leader.isr_step(now, gone);
                leader.high_watermark() == 90
            }),
        ),
        (
            CountUnchecked,
            Box::new(|| {
                let mut leader = leader(&[0, 1], 1, now);
                let log = Log::new(&[(4, 0)], 0, 100);
                let position = Position {
                    log_end: 100,
                    last_epoch: Some(3),
                    durable_end: 100,
                };
                leader.on_position(replica(1), &position, &log, now);
                leader.high_watermark() == 90
            }),
        ),
        (
            CountUnsynced,
            Box::new(|| {
                let mut leader = leader(&[0], 1, now);
                leader.on_appended(120);
                leader.on_durable(100);
                leader.high_watermark() == 100
            }),
        ),
    ];
    for (rule, holds) in cases {
        assert!(holds(), "{rule:?}");
        mutation::set(Some(rule));
        assert!(!holds(), "{rule:?} is not broken");
        mutation::set(None);
    }
}
