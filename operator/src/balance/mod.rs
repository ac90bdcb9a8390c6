//! Which partitions get other replicas: pure and deterministic.
//!
//! Some must: those on brokers that shall go, and those that have more or fewer replicas than their topic asks for. Others may, so that brokers hold as
//! much as each other: of each topic first, since a topic is the unit of load, and then of all together, and that they are preferred to lead
//! equally often; when that is so, that their volumes are as full. That waits until all brokers are up. No move puts two replicas of a partition into one rack that were in two. Each improves the balance, so this comes to an end, and asked again
//! afterwards nothing is left to do.
//!
//! A partition that is moving (others than its replicas are in sync, too) or catching up (one that is up is not in sync yet) is left alone, unless where it goes
//! must not be either.

mod bytes;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use uuid::Uuid;

use crate::placement::{Candidate, Load, Loads, choose, count, discount, prefer, sharing};

/// A topic's id, and a partition's index.
pub(crate) type Key = (Uuid, i32);

/// A partition.
#[derive(Clone, Debug)]
pub(crate) struct Partition {
    pub(crate) key: Key,
    /// How many replicas its topic asks for.
    pub(crate) factor: usize,
    /// The brokers that hold it, or shall.
    pub(crate) replicas: Vec<i32>,
    /// Those that are in sync.
    pub(crate) in_sync: BTreeSet<i32>,
    /// How much each of them holds, if that is known.
    pub(crate) bytes: Option<u64>,
}

impl Partition {
    fn to(&self, replicas: Vec<i32>) -> Move {
        Move {
            key: self.key,
            from: self.replicas.clone(),
            replicas,
        }
    }
}

/// New replicas of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) key: Key,
    /// As they are.
    pub(crate) from: Vec<i32>,
    pub(crate) replicas: Vec<i32>,
}

/// What there is to do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// What must be.
    pub(crate) needed: Vec<Move>,
    /// What evens the load out.
    pub(crate) balancing: Vec<Move>,
    /// That is for how much brokers hold, whose numbers of replicas are even.
    pub(crate) by_bytes: bool,
    /// Partitions that move already.
    pub(crate) moving: usize,
    /// Partitions whose replicas are the right ones, of which one that is up is not in sync yet.
    pub(crate) catching_up: usize,
    /// A topic that asks for more replicas than there are brokers that stay.
    pub(crate) too_few: Option<Uuid>,
    /// Partitions that must move, and can't before more brokers are up.
    pub(crate) waiting: usize,
}

/// Of brokers that stay, of which those may be given more that are alive.
pub(crate) fn plan(staying: &[Candidate], alive: &BTreeSet<i32>, partitions: &[Partition]) -> Plan {
    let mut plan = Plan::default();
    let brokers: BTreeMap<i32, &Candidate> = staying.iter().map(|b| (b.id, b)).collect();
    let able: Vec<Candidate> = staying
        .iter()
        .filter(|broker| alive.contains(&broker.id))
        .cloned()
        .collect();
    let mut loads = Balance::default();
    for partition in partitions {
        loads.count(&partition.key, &partition.replicas);
    }
    let mut settled = Vec::new();
    for partition in partitions {
        let must = partition.replicas.len() != partition.factor
            || partition
                .replicas
                .iter()
                .any(|id| !brokers.contains_key(id));
        if partition.factor > staying.len() {
            plan.too_few.get_or_insert(partition.key.0);
        } else if must {
            match needed(partition, &brokers, &able, &mut loads) {
                Some(replicas) => plan.needed.push(partition.to(replicas)),
                None => plan.waiting += 1,
            }
        } else if is_moving(partition) {
            plan.moving += 1;
        } else if is_catching_up(partition, alive) {
            plan.catching_up += 1;
        } else if partition
            .replicas
            .iter()
            .all(|id| partition.in_sync.contains(id))
        {
            settled.push(partition);
        }
    }
    // One that is away comes back with what it has, and its rack may not be known meanwhile.
    if able.len() == staying.len() {
        plan.balancing = even_out(&settled, &brokers, &able, &mut loads);
        if plan.balancing.is_empty() && settled.len() == partitions.len() {
            plan.balancing = bytes::even_out(&settled, &brokers);
            plan.by_bytes = !plan.balancing.is_empty();
        }
    }
    plan
}

fn is_moving(partition: &Partition) -> bool {
    let mut former = partition.in_sync.iter();
    former.any(|id| !partition.replicas.contains(id))
}

fn is_catching_up(partition: &Partition, alive: &BTreeSet<i32>) -> bool {
    let joins = |id: &i32| alive.contains(id) && !partition.in_sync.contains(id);
    // One that no one has led has nothing to copy.
    !partition.in_sync.is_empty() && partition.replicas.iter().any(joins)
}

/// The replicas that a partition must get; `None` as long as there are too few brokers to choose from.
fn needed(
    partition: &Partition,
    brokers: &BTreeMap<i32, &Candidate>,
    able: &[Candidate],
    loads: &mut Balance,
) -> Option<Vec<i32>> {
    loads.discount(&partition.key, &partition.replicas);
    let held = partition.replicas.iter();
    let mut kept: Vec<Candidate> = held
        .filter_map(|id| brokers.get(id).map(|broker| (*broker).clone()))
        .collect();
    let (own, all) = loads.of(&partition.key);
    while kept.len() > partition.factor {
        let worst = kept.iter().enumerate().max_by_key(|(index, broker)| {
            let others = kept.iter().filter(|other| other.id != broker.id);
            let load = |loads: &Loads| loads.get(&broker.id).map_or(0, |load| load.replicas);
            (
                // Whoever has nothing yet, or is away, is let go first.
                !partition.in_sync.contains(&broker.id),
                sharing(broker, others),
                load(own),
                load(all),
                *index,
            )
        });
        let worst = worst.map(|(index, _)| index)?;
        kept.remove(worst);
    }
    let mut replicas = choose(able, &kept, partition.factor, own, all);
    if replicas.len() < partition.factor {
        loads.count(&partition.key, &partition.replicas);
        return None;
    }
    if replicas.first() != partition.replicas.first() {
        prefer(&mut replicas, own, all);
    }
    loads.count(&partition.key, &replicas);
    Some(replicas)
}

/// Moves replicas, and who is preferred, as long as that evens something out.
fn even_out(
    settled: &[&Partition],
    brokers: &BTreeMap<i32, &Candidate>,
    able: &[Candidate],
    loads: &mut Balance,
) -> Vec<Move> {
    let mut now: Vec<Vec<i32>> = settled.iter().map(|p| p.replicas.clone()).collect();
    let mut changed = true;
    while std::mem::take(&mut changed) {
        for (partition, replicas) in settled.iter().zip(&mut now) {
            let key = &partition.key;
            for at in 0..replicas.len() {
                let Some(to) = better(key, replicas, at, brokers, able, loads) else {
                    continue;
                };
                loads.discount(key, replicas);
                replicas[at] = to;
                loads.count(key, replicas);
                changed = true;
            }
        }
    }
    changed = true;
    while std::mem::take(&mut changed) {
        for (partition, replicas) in settled.iter().zip(&mut now) {
            let key = &partition.key;
            for at in 1..replicas.len() {
                let preferred = |load: &Load| load.preferred;
                if loads.improves(key, replicas[0], replicas[at], preferred) {
                    loads.discount(key, replicas);
                    replicas.swap(0, at);
                    loads.count(key, replicas);
                    changed = true;
                }
            }
        }
    }
    let moves = settled.iter().zip(now);
    moves
        .filter(|(partition, replicas)| partition.replicas != *replicas)
        .map(|(partition, replicas)| partition.to(replicas))
        .collect()
}

/// The broker to which a replica is better moved.
fn better(
    key: &Key,
    replicas: &[i32],
    at: usize,
    brokers: &BTreeMap<i32, &Candidate>,
    able: &[Candidate],
    loads: &Balance,
) -> Option<i32> {
    let from = brokers.get(&replicas[at])?;
    let others = || {
        let others = replicas.iter().filter(|id| **id != from.id);
        others.filter_map(|id| brokers.get(id).copied())
    };
    let sharing_now = sharing(from, others());
    let held = |load: &Load| load.replicas;
    let free = able.iter().filter(|to| !replicas.contains(&to.id));
    let better = free.filter(|to| {
        let shares = sharing(to, others());
        shares < sharing_now || shares == sharing_now && loads.improves(key, from.id, to.id, held)
    });
    let (own, all) = loads.of(key);
    let load = |loads: &Loads, id: i32| loads.get(&id).map_or(0, |load| load.replicas);
    better
        .min_by_key(|to| {
            (
                sharing(to, others()),
                load(own, to.id),
                load(all, to.id),
                to.id,
            )
        })
        .map(|to| to.id)
}

/// What brokers hold: of each topic, and of all.
#[derive(Default)]
struct Balance {
    topics: HashMap<Uuid, Loads>,
    all: Loads,
}

impl Balance {
    fn count(&mut self, key: &Key, replicas: &[i32]) {
        count(self.topics.entry(key.0).or_default(), replicas);
        count(&mut self.all, replicas);
    }

    fn discount(&mut self, key: &Key, replicas: &[i32]) {
        discount(self.topics.entry(key.0).or_default(), replicas);
        discount(&mut self.all, replicas);
    }

    fn of(&self, key: &Key) -> (&Loads, &Loads) {
        static NONE: Loads = Loads::new();
        (self.topics.get(&key.0).unwrap_or(&NONE), &self.all)
    }

    /// Whether one less there and one more here is better: for the topic, or for all together and no worse for the topic.
    fn improves(&self, key: &Key, from: i32, to: i32, measure: impl Fn(&Load) -> usize) -> bool {
        let (own, all) = self.of(key);
        let apart = |loads: &Loads| {
            let of = |id: i32| loads.get(&id).map_or(0, &measure);
            of(from).saturating_sub(of(to))
        };
        apart(own) >= 2 || apart(own) == 1 && apart(all) >= 2
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::placement::place;

    fn brokers(racks: &[Option<u8>]) -> Vec<Candidate> {
        let broker = |(id, rack): (i32, &Option<u8>)| Candidate {
            id,
            rack: rack.map(|rack| rack.to_string()),
        };
        (0..).zip(racks).map(broker).collect()
    }

    fn topic(number: u128, replicas: &BTreeMap<i32, Vec<i32>>) -> Vec<Partition> {
        let partition = |(index, replicas): (&i32, &Vec<i32>)| Partition {
            key: (Uuid::from_u128(number), *index),
            factor: replicas.len(),
            replicas: replicas.clone(),
            in_sync: replicas.iter().copied().collect(),
            bytes: None,
        };
        replicas.iter().map(partition).collect()
    }

    fn placed(brokers: &[Candidate], sizes: &[i32], factor: usize) -> Vec<Partition> {
        let mut all = Loads::new();
        let mut partitions = Vec::new();
        for (number, size) in (0..).zip(sizes) {
            let placed = place(brokers, factor, 0..*size, &mut Loads::new(), &mut all);
            partitions.extend(topic(number, &placed.unwrap()));
        }
        partitions
    }

    /// As if all of it was done and is in sync.
    fn done(partitions: &mut [Partition], moves: &[Move]) {
        for step in moves {
            let partition = partitions.iter_mut().find(|p| p.key == step.key).unwrap();
            partition.replicas = step.replicas.clone();
            partition.in_sync = step.replicas.iter().copied().collect();
        }
    }

    fn ids(brokers: &[Candidate]) -> BTreeSet<i32> {
        brokers.iter().map(|broker| broker.id).collect()
    }

    fn loads(partitions: &[Partition]) -> Loads {
        let mut loads = Loads::new();
        partitions
            .iter()
            .for_each(|p| count(&mut loads, &p.replicas));
        loads
    }

    #[test]
    fn new_brokers_get_their_share_and_no_more_moves_than_that_takes() {
        let five = brokers(&[None; 5]);
        let mut partitions = placed(&five[..3], &[30], 3);
        let found = plan(&five, &ids(&five), &partitions);
        assert!(found.needed.is_empty());
        let moved = |step: &Move| {
            let before = partitions.iter().find(|p| p.key == step.key).unwrap();
            let new = step
                .replicas
                .iter()
                .filter(|id| !before.replicas.contains(id));
            new.count()
        };
        // 18 each of the two new ones.
        assert_eq!(found.balancing.iter().map(moved).sum::<usize>(), 36);
        done(&mut partitions, &found.balancing);
        for load in loads(&partitions).values() {
            assert_eq!((load.replicas, load.preferred), (18, 6));
        }
        assert_eq!(plan(&five, &ids(&five), &partitions), Plan::default());
    }

    #[test]
    fn what_is_on_brokers_that_go_is_moved_first() {
        let five = brokers(&[None; 5]);
        let mut partitions = placed(&five, &[10], 3);
        let found = plan(&five[..3], &ids(&five), &partitions);
        let goes = |partition: &&Partition| partition.replicas.iter().any(|id| *id >= 3);
        assert_eq!(found.needed.len(), partitions.iter().filter(goes).count());
        done(&mut partitions, &found.needed);
        assert!(loads(&partitions).keys().all(|id| *id < 3));
        let left = plan(&five[..3], &ids(&five), &partitions);
        assert!(left.needed.is_empty());
    }

    #[test]
    fn fewer_brokers_than_replicas_are_refused_and_nothing_is_moved() {
        let three = brokers(&[None; 3]);
        let partitions = placed(&three, &[4], 3);
        let found = plan(&three[..2], &ids(&three), &partitions);
        assert_eq!(found.too_few, Some(Uuid::from_u128(0)));
        assert!(found.needed.is_empty() && found.balancing.is_empty());
    }

    #[test]
    fn a_topic_gets_more_and_fewer_replicas() {
        let four = brokers(&[Some(0), Some(0), Some(1), Some(1)]);
        let mut partitions = placed(&four, &[8], 2);
        for (factor, away) in [(3, None), (4, None), (2, Some(3)), (1, None)] {
            for partition in &mut partitions {
                partition.factor = factor;
                partition.in_sync.retain(|id| Some(*id) != away);
            }
            let found = plan(&four, &ids(&four), &partitions);
            assert_eq!(found.needed.len(), 8, "{factor}");
            for step in &found.needed {
                assert_eq!(step.replicas.len(), factor);
                assert!(away.is_none_or(|away| !step.replicas.contains(&away)));
            }
            done(&mut partitions, &found.needed);
        }
    }

    #[test]
    fn what_moves_is_left_alone_unless_it_must_go_elsewhere() {
        let three = brokers(&[None; 3]);
        let mut partitions = placed(&three[..2], &[1], 1);
        partitions[0].replicas = vec![1];
        partitions[0].in_sync = [0].into();
        let found = plan(&three, &ids(&three), &partitions);
        assert_eq!((found.moving, found.needed.len()), (1, 0));
        assert!(found.balancing.is_empty());
        // Broker 1 is not to be one any more.
        let staying = [three[0].clone(), three[2].clone()];
        let found = plan(&staying, &ids(&three), &partitions);
        assert_eq!(found.needed[0].replicas, [0]);
    }

    #[test]
    fn brokers_that_are_not_up_are_given_nothing() {
        let three = brokers(&[None; 3]);
        let partitions = placed(&three[..2], &[6], 1);
        let found = plan(&three, &[0, 1].into(), &partitions);
        assert_eq!(found, Plan::default());
        let found = plan(&three[1..], &[0].into(), &partitions);
        assert_eq!((found.needed.len(), found.waiting), (0, 3));
    }

    proptest! {
        /// Wherever replicas are: after all is done nothing is left to do, each partition has as many as it shall, on brokers that stay, and no more of them together
        /// in a rack than before.
        #[test]
        fn a_plan_ends_in_balance(
            racks in prop::collection::vec(prop::option::of(0..3_u8), 1..7),
            sizes in prop::collection::vec(0..12_i32, 1..4),
            going in 0..3_usize,
            shuffle in prop::collection::vec(any::<u64>(), 40),
        ) {
            let all = brokers(&racks);
            let staying = &all[..all.len() - going.min(all.len() - 1)];
            let factor = staying.len().min(3);
            let mut partitions = placed(&all, &sizes, factor);
            for (partition, seed) in partitions.iter_mut().zip(&shuffle) {
                let mut ids: Vec<i32> = all.iter().map(|broker| broker.id).collect();
                ids.sort_by_key(|id| (seed >> (8 * id)) & 0xff);
                ids.truncate(factor);
                partition.in_sync = ids.iter().copied().collect();
                partition.replicas = ids;
            }
            let together = |partition: &Partition| {
                let held = || partition.replicas.iter().map(|id| &all[*id as usize]);
                held().map(|broker| sharing(broker, held().filter(|other| other.id != broker.id))).sum::<usize>()
            };
            let first = plan(staying, &ids(&all), &partitions);
            prop_assert_eq!(first.too_few, None);
            let before: BTreeMap<Key, usize> = partitions.iter().map(|p| (p.key, together(p))).collect();
            done(&mut partitions, &first.needed);
            done(&mut partitions, &first.balancing);
            let second = plan(staying, &ids(&all), &partitions);
            prop_assert!(second.needed.is_empty());
            done(&mut partitions, &second.balancing);
            prop_assert_eq!(plan(staying, &ids(&all), &partitions), Plan::default());
            for partition in &partitions {
                prop_assert_eq!(partition.replicas.len(), factor);
                let distinct: BTreeSet<_> = partition.replicas.iter().collect();
                prop_assert_eq!(distinct.len(), factor);
                prop_assert!(partition.replicas.iter().all(|id| (*id as usize) < staying.len()));
                if going == 0 {
                    prop_assert!(together(partition) <= before[&partition.key]);
                }
            }
        }
    }
}
