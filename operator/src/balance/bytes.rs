//! Evens out how much brokers hold where the numbers of replicas are even already: two replicas of one topic change places, a larger and a smaller one, so
//! that the numbers stay as they are. One such exchange at a time: what it costs is that both are copied, hence small differences are let be.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;

use super::{Move, Partition};
use crate::placement::{Candidate, sharing};

/// Brokers that are less apart than this, or than [`SHARE`] of what they hold on average, are let be.
const LEAST: u64 = 1 << 30;
const SHARE: f64 = 0.2;
/// An exchange must take away so much of the difference.
const GAIN: f64 = 0.25;
/// Of partitions whose size fits so many are tried: racks and other replicas may stand against the first.
const TRIES: usize = 8;

/// A replica: its partition, and its place in that one's list.
#[derive(Clone, Copy)]
struct Replica<'a> {
    partition: &'a Partition,
    bytes: u64,
    at: usize,
}

/// The exchange that brings two brokers closest, of the two that are farthest apart and have one; none as long as not all sizes are known.
pub(super) fn even_out(settled: &[&Partition], brokers: &BTreeMap<i32, &Candidate>) -> Vec<Move> {
    let mut held: BTreeMap<i32, u64> = brokers.keys().map(|id| (*id, 0)).collect();
    for partition in settled {
        let Some(bytes) = partition.bytes else {
            return Vec::new();
        };
        for id in &partition.replicas {
            *held.entry(*id).or_default() += bytes;
        }
    }
    let mean = held.values().sum::<u64>() as f64 / held.len().max(1) as f64;
    let least = LEAST.max((SHARE * mean) as u64);
    let pairs = held.iter().flat_map(|(from, most)| {
        let with = held
            .iter()
            .map(move |(to, few)| (most.saturating_sub(*few), *from, *to));
        with.filter(|(apart, ..)| *apart >= least)
    });
    let mut pairs: Vec<(u64, i32, i32)> = pairs.collect();
    pairs.sort_by_key(|(apart, from, to)| (Reverse(*apart), *from, *to));
    if pairs.is_empty() {
        return Vec::new();
    }
    let replicas: BTreeMap<i32, _> = held
        .keys()
        .map(|id| (*id, replicas(settled, *id)))
        .collect();
    let found = pairs
        .iter()
        .find_map(|(apart, from, to)| between(*apart, &replicas[from], &replicas[to], brokers));
    found.map_or_else(Vec::new, Into::into)
}

/// A broker's replicas, the smallest first, by topic and by whether it is preferred to lead them.
type Replicas<'a> = HashMap<(Uuid, bool), Vec<Replica<'a>>>;

/// The best exchange of two brokers that are so far apart.
fn between(
    apart: u64,
    larger: &Replicas<'_>,
    smaller: &Replicas<'_>,
    brokers: &BTreeMap<i32, &Candidate>,
) -> Option<[Move; 2]> {
    let mut best: Option<(u64, [Move; 2])> = None;
    for large in larger.values().flatten() {
        // Both first in their lists, or neither: who is preferred to lead stays even as well.
        let others = smaller.get(&(large.partition.key.0, large.at == 0));
        let others = others.map_or(&[][..], Vec::as_slice);
        // They would be equal with one that is smaller by half of what is between them.
        let ideal = large.bytes.saturating_sub(apart / 2);
        let near = others.partition_point(|small| small.bytes < ideal);
        let first = near.saturating_sub(TRIES / 2);
        for small in others.iter().skip(first).take(TRIES) {
            let left = apart.abs_diff(2 * large.bytes.saturating_sub(small.bytes));
            let gains = left as f64 <= (1.0 - GAIN) * apart as f64;
            if gains
                && best.as_ref().is_none_or(|(least, _)| left < *least)
                && let Some(exchange) = exchange(large, small, brokers)
            {
                best = Some((left, exchange));
            }
        }
    }
    best.map(|(_, exchange)| exchange)
}

fn replicas<'a>(settled: &[&'a Partition], broker: i32) -> Replicas<'a> {
    let mut found = Replicas::new();
    for partition in settled {
        let at = partition.replicas.iter().position(|id| *id == broker);
        if let (Some(at), Some(bytes)) = (at, partition.bytes) {
            let of_kind = found.entry((partition.key.0, at == 0)).or_default();
            of_kind.push(Replica {
                partition,
                bytes,
                at,
            });
        }
    }
    for replicas in found.values_mut() {
        replicas.sort_by_key(|replica| (replica.bytes, replica.partition.key));
    }
    found
}

/// Both partitions with the two replicas in each other's place, if each then is on as many brokers and in as many racks.
fn exchange(
    one: &Replica<'_>,
    other: &Replica<'_>,
    brokers: &BTreeMap<i32, &Candidate>,
) -> Option<[Move; 2]> {
    let (from, to) = (
        one.partition.replicas[one.at],
        other.partition.replicas[other.at],
    );
    let moved = |replica: &Replica<'_>, to: i32| {
        let replicas = &replica.partition.replicas;
        if replicas.contains(&to) {
            return None;
        }
        let others = || {
            let others = replicas.iter().filter(|id| **id != replicas[replica.at]);
            others.filter_map(|id| brokers.get(id).copied())
        };
        let (before, after) = (brokers.get(&replicas[replica.at])?, brokers.get(&to)?);
        if sharing(after, others()) > sharing(before, others()) {
            return None;
        }
        let mut replicas = replicas.clone();
        replicas[replica.at] = to;
        Some(replica.partition.to(replicas))
    };
    Some([moved(one, to)?, moved(other, from)?])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::{Plan, plan};
    use super::*;

    const GIB: u64 = 1 << 30;

    fn partition(index: i32, replicas: &[i32], gib: u64) -> Partition {
        Partition {
            key: (Uuid::nil(), index),
            factor: replicas.len(),
            replicas: replicas.to_vec(),
            in_sync: replicas.iter().copied().collect(),
            bytes: Some(gib * GIB),
        }
    }

    fn brokers(racks: &[Option<&str>]) -> Vec<Candidate> {
        let rack = |rack: &Option<&str>| rack.map(str::to_owned);
        (0..)
            .zip(racks.iter().map(rack))
            .map(|(id, rack)| Candidate { id, rack })
            .collect()
    }

    fn planned(brokers: &[Candidate], partitions: &[Partition]) -> Plan {
        let alive: BTreeSet<i32> = brokers.iter().map(|broker| broker.id).collect();
        plan(brokers, &alive, partitions)
    }

    #[test]
    fn a_large_and_a_small_partition_change_places() {
        let two = brokers(&[None, None]);
        let partitions = |sizes: [u64; 4]| {
            let on = [[0], [1], [0], [1]];
            let all = (0..).zip(on.iter().zip(sizes));
            let all = all.map(|(index, (on, gib))| partition(index, on, gib));
            all.collect::<Vec<_>>()
        };
        for (sizes, exchanged) in [
            // 17 to 3, and then 10 to 10.
            ([8, 1, 9, 2], Some(([0], [1]))),
            ([10, 10, 10, 10], None),
            // Apart by a tenth.
            ([11, 10, 10, 9], None),
            // All in one: nothing makes that better.
            ([20, 0, 0, 0], None),
        ] {
            let found = planned(&two, &partitions(sizes)).balancing;
            let Some(([large], [small])) = exchanged else {
                assert!(found.is_empty(), "{sizes:?}: {found:?}");
                continue;
            };
            let moves: Vec<_> = found.iter().map(|m| (m.key.1, &m.replicas[..])).collect();
            assert_eq!(moves, [(large, &[1][..]), (small, &[0][..])], "{sizes:?}");
        }
        let mut unknown = partitions([8, 1, 9, 2]);
        unknown[1].bytes = None;
        assert!(planned(&two, &unknown).balancing.is_empty());
    }

    #[test]
    fn racks_are_kept() {
        let four = brokers(&[Some("a"), Some("a"), Some("b"), Some("b")]);
        // The fullest, 2, could give the last one to 1, the emptiest, for what that would hold twice in rack b then.
        let partitions = [
            partition(0, &[0, 2], 9),
            partition(1, &[0, 2], 9),
            partition(2, &[1, 3], 1),
            partition(3, &[1, 3], 1),
            partition(4, &[2], 5),
        ];
        let found = planned(&four, &partitions).balancing;
        for step in found.iter().filter(|step| step.replicas.len() == 2) {
            let racks: BTreeSet<bool> = step.replicas.iter().map(|id| *id < 2).collect();
            assert_eq!(racks.len(), 2, "{found:?}");
        }
        assert!(!found.is_empty());
    }

    proptest! {
        /// It comes to an end, and no broker gets more replicas or leaders than it had.
        #[test]
        fn exchanges_end(sizes in prop::collection::vec(0..20_u64, 30)) {
            let five = brokers(&[None; 5]);
            let mut partitions: Vec<Partition> = (0..)
                .zip(&sizes)
                .map(|(index, gib)| partition(index, &[index % 5, (index + 1) % 5, (index + 2) % 5], *gib))
                .collect();
            let mut steps = 0;
            loop {
                let found = planned(&five, &partitions).balancing;
                if found.is_empty() {
                    break;
                }
                steps += 1;
                prop_assert!(steps < 1_000);
                for step in found {
                    let partition = &mut partitions[step.key.1 as usize];
                    partition.in_sync = step.replicas.iter().copied().collect();
                    partition.replicas = step.replicas;
                }
                let (mut held, mut led) = ([0; 5], [0; 5]);
                for partition in &partitions {
                    partition.replicas.iter().for_each(|id| held[*id as usize] += 1);
                    led[partition.replicas[0] as usize] += 1;
                }
                prop_assert_eq!((held, led), ([18; 5], [6; 5]));
            }
        }
    }
}
