//! Where replicas are put: pure and deterministic.
//!
//! Of each partition no two replicas are in one rack while there are enough racks; then the broker with the fewest replicas is taken, then the
//! rack with the fewest, then the lowest id. The preferred leader, first in the list, is the chosen broker that is preferred least often. What
//! is placed already is not moved here ([`crate::balance`] does that): growing a topic only adds.

use std::collections::BTreeMap;

/// A broker that may hold replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) id: i32,
    /// Where it is, if that is known.
    pub(crate) rack: Option<String>,
}

/// How much a broker holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Load {
    pub(crate) replicas: usize,
    pub(crate) preferred: usize,
}

/// What each broker holds.
pub(crate) type Loads = BTreeMap<i32, Load>;

/// Takes one partition's replicas out of the count.
pub(crate) fn discount(loads: &mut Loads, replicas: &[i32]) {
    for (index, id) in replicas.iter().enumerate() {
        let load = loads.entry(*id).or_default();
        load.replicas = load.replicas.saturating_sub(1);
        load.preferred = load.preferred.saturating_sub(usize::from(index == 0));
    }
}

/// Counts one partition's replicas.
pub(crate) fn count(loads: &mut Loads, replicas: &[i32]) {
    for (index, id) in replicas.iter().enumerate() {
        let load = loads.entry(*id).or_default();
        load.replicas += 1;
        load.preferred += usize::from(index == 0);
    }
}

/// Too few brokers for the copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooFewBrokers {
    pub(crate) brokers: usize,
}

/// Places new partitions, given what the brokers hold of all topics and what they hold of this one, which are both updated. Within a topic the balance
/// comes first: it is the unit of load.
pub(crate) fn place(
    candidates: &[Candidate],
    factor: usize,
    partitions: impl IntoIterator<Item = i32>,
    own: &mut Loads,
    all: &mut Loads,
) -> Result<BTreeMap<i32, Vec<i32>>, TooFewBrokers> {
    if candidates.len() < factor || factor == 0 {
        let brokers = candidates.len();
        return Err(TooFewBrokers { brokers });
    }
    let mut placed = BTreeMap::new();
    for partition in partitions {
        let mut replicas = choose(candidates, &[], factor, own, all);
        prefer(&mut replicas, own, all);
        count(own, &replicas);
        count(all, &replicas);
        placed.insert(partition, replicas);
    }
    Ok(placed)
}

/// Chooses brokers for a partition that those of `kept` hold already, and go on holding, until there are `factor`, or no candidate is left.
pub(crate) fn choose(
    candidates: &[Candidate],
    kept: &[Candidate],
    factor: usize,
    own: &Loads,
    all: &Loads,
) -> Vec<i32> {
    let load = |loads: &Loads, id: i32| loads.get(&id).copied().unwrap_or_default();
    let rack_load = |rack: &Option<String>| {
        let there = candidates.iter().filter(|other| other.rack == *rack);
        there
            .map(|other| load(own, other.id).replicas)
            .sum::<usize>()
    };
    let mut chosen: Vec<&Candidate> = kept.iter().collect();
    while chosen.len() < factor {
        let free = candidates
            .iter()
            .filter(|candidate| chosen.iter().all(|other| other.id != candidate.id));
        let best = free.min_by_key(|candidate| {
            (
                sharing(candidate, chosen.iter().copied()),
                load(own, candidate.id).replicas,
                load(all, candidate.id).replicas,
                rack_load(&candidate.rack),
                candidate.id,
            )
        });
        let Some(best) = best else { break };
        chosen.push(best);
    }
    chosen.iter().map(|candidate| candidate.id).collect()
}

/// How many of the others are in the candidate's rack.
pub(crate) fn sharing<'a>(
    candidate: &Candidate,
    others: impl Iterator<Item = &'a Candidate>,
) -> usize {
    others
        .filter(|other| candidate.rack.is_some() && other.rack == candidate.rack)
        .count()
}

/// Puts that broker first which is preferred least often.
pub(crate) fn prefer(replicas: &mut [i32], own: &Loads, all: &Loads) {
    let load = |loads: &Loads, id: i32| loads.get(&id).copied().unwrap_or_default();
    let preferred = replicas.iter().copied().min_by_key(|id| {
        (
            load(own, *id).preferred,
            load(all, *id).preferred,
            load(all, *id).replicas,
            *id,
        )
    });
    if let Some(at) = replicas.iter().position(|id| Some(*id) == preferred) {
        replicas[..=at].rotate_right(1);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `0a 1a 2b 3`: ids and racks.
    fn brokers(text: &str) -> Vec<Candidate> {
        let parse = |word: &str| {
            let digits = word.trim_end_matches(char::is_alphabetic);
            let rack = &word[digits.len()..];
            Candidate {
                id: digits.parse().unwrap(),
                rack: (!rack.is_empty()).then(|| rack.to_owned()),
            }
        };
        text.split_whitespace().map(parse).collect()
    }

    fn placed(candidates: &str, factor: usize, partitions: i32) -> Vec<Vec<i32>> {
        let (mut own, mut all) = (Loads::new(), Loads::new());
        let placed = place(
            &brokers(candidates),
            factor,
            0..partitions,
            &mut own,
            &mut all,
        );
        placed.unwrap().into_values().collect()
    }

    #[test]
    fn replicas_and_preferred_leaders_go_round() {
        for (candidates, factor, partitions, expected) in [
            ("0", 1, 2, vec![vec![0], vec![0]]),
            ("0 1 2", 1, 4, vec![vec![0], vec![1], vec![2], vec![0]]),
            (
                "0 1 2",
                3,
                3,
                vec![vec![0, 1, 2], vec![1, 0, 2], vec![2, 0, 1]],
            ),
            ("0a 1a 2b", 2, 2, vec![vec![0, 2], vec![1, 2]]),
            (
                "0a 1a 2b 3b",
                2,
                4,
                vec![vec![0, 2], vec![1, 3], vec![2, 0], vec![3, 1]],
            ),
        ] {
            assert_eq!(
                placed(candidates, factor, partitions),
                expected,
                "{candidates}"
            );
        }
    }

    #[test]
    fn the_first_partition_of_a_topic_goes_where_least_is() {
        let candidates = brokers("0 1 2");
        let mut all = Loads::new();
        count(&mut all, &[0, 1]);
        count(&mut all, &[0, 2]);
        let placed = place(&candidates, 1, 0..1, &mut Loads::new(), &mut all);
        assert_eq!(placed.unwrap()[&0], [1]);
    }

    #[test]
    fn more_copies_than_brokers_are_refused() {
        let (mut own, mut all) = (Loads::new(), Loads::new());
        let refused = place(&brokers("0 1"), 3, 0..1, &mut own, &mut all);
        assert_eq!(refused, Err(TooFewBrokers { brokers: 2 }));
    }

    fn spread(values: impl Iterator<Item = usize> + Clone) -> usize {
        values.clone().max().unwrap_or(0) - values.min().unwrap_or(0)
    }

    proptest! {
        #[test]
        fn brokers_of_one_rack_each_hold_and_lead_equally(brokers in 1_usize..12, factor in 1_usize..6, partitions in 1_i32..200) {
            let factor = factor.min(brokers);
            let candidates: Vec<_> = (0..).take(brokers).map(|id| Candidate { id, rack: None }).collect();
            let (mut own, mut all) = (Loads::new(), Loads::new());
            let placed = place(&candidates, factor, 0..partitions, &mut own, &mut all).unwrap();
            for id in 0..brokers { own.entry(id.try_into().unwrap()).or_default(); }
            prop_assert!(spread(own.values().map(|load| load.replicas)) <= 1);
            prop_assert!(spread(own.values().map(|load| load.preferred)) <= 2, "{own:?}");
            for replicas in placed.values() {
                let distinct: std::collections::BTreeSet<_> = replicas.iter().collect();
                prop_assert_eq!(distinct.len(), factor);
            }
        }

        #[test]
        fn no_rack_holds_two_copies_while_there_are_enough_racks(racks in prop::collection::vec(1_usize..4, 3..6), partitions in 1_i32..60) {
            let mut candidates = Vec::new();
            for (rack, brokers) in racks.iter().enumerate() {
                for _ in 0..*brokers {
                    let id = i32::try_from(candidates.len()).unwrap();
                    candidates.push(Candidate { id, rack: Some(rack.to_string()) });
                }
            }
            let (mut own, mut all) = (Loads::new(), Loads::new());
            let placed = place(&candidates, 3, 0..partitions, &mut own, &mut all).unwrap();
            for replicas in placed.values() {
                let used: std::collections::BTreeSet<_> = replicas.iter().map(|id| candidates[usize::try_from(*id).unwrap()].rack.clone()).collect();
                prop_assert_eq!(used.len(), 3);
            }
        }

        #[test]
        fn a_topic_that_grows_is_as_balanced_as_one_made_at_once(brokers in 1_usize..8, first in 1_i32..40, more in 1_i32..40) {
            let candidates: Vec<_> = (0..).take(brokers).map(|id| Candidate { id, rack: None }).collect();
            let factor = brokers.min(3);
            let (mut own, mut all) = (Loads::new(), Loads::new());
            let mut grown = place(&candidates, factor, 0..first, &mut own, &mut all).unwrap();
            grown.extend(place(&candidates, factor, first..first + more, &mut own, &mut all).unwrap());
            let at_once = place(&candidates, factor, 0..first + more, &mut Loads::new(), &mut Loads::new()).unwrap();
            prop_assert_eq!(grown, at_once);
        }
    }
}
