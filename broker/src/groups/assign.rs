//! Who is to have which partition. Pure: the same input gives the same output.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::TopicPartition;

/// What a member may get, and what was meant for it before.
#[derive(Clone, Debug, Default)]
pub(crate) struct Candidate {
    /// The topics that it reads.
    pub(crate) topics: BTreeSet<Arc<str>>,
    /// What it has, or was to have.
    pub(crate) before: BTreeSet<TopicPartition>,
}

/// Members, by what they are ordered by: a static member's instance id, else its member id.
pub(crate) type Candidates = BTreeMap<Arc<str>, Candidate>;
/// Who is to have what.
pub(crate) type Target = BTreeMap<Arc<str>, BTreeSet<TopicPartition>>;

/// How many partitions each topic has.
pub(crate) type Counts = BTreeMap<Arc<str>, i32>;

/// Each member of all that read a topic gets as many of its partitions as the others, neighbours, in the members' order: so partition n of
/// topics that have as many, and the same readers, goes to the same member.
pub(crate) fn range(members: &Candidates, counts: &Counts) -> Target {
    let mut target = empty(members);
    for (topic, &count) in counts {
        let readers = members.iter().filter(|(_, m)| m.topics.contains(topic));
        let readers: Vec<&Arc<str>> = readers.map(|(id, _)| id).collect();
        for (index, id) in readers.iter().enumerate() {
            let bound = |index: usize| (count as usize * index / readers.len()) as i32;
            let share = (bound(index)..bound(index + 1)).map(|p| (topic.clone(), p));
            target.entry((*id).clone()).or_default().extend(share);
        }
    }
    target
}

/// Each member gets as many partitions as the others, give or take one, as far as what they read allows it, and keeps of what it had as much
/// as that leaves.
pub(crate) fn uniform(members: &Candidates, counts: &Counts) -> Target {
    let mut target = empty(members);
    let mut free: BTreeSet<TopicPartition> = BTreeSet::new();
    for (topic, &count) in counts {
        if members.values().any(|member| member.topics.contains(topic)) {
            free.extend((0..count).map(|partition| (topic.clone(), partition)));
        }
    }
    for (id, member) in members {
        for partition in &member.before {
            // Not in `free`: it is no more, or someone before has it, too.
            if member.topics.contains(&partition.0) && free.remove(partition) {
                target
                    .entry(id.clone())
                    .or_default()
                    .insert(partition.clone());
            }
        }
    }
    let mut balance = Balance::new(members, target);
    for partition in free {
        balance.give(partition);
    }
    balance.even_out();
    balance.target
}

fn empty(members: &Candidates) -> Target {
    let ids = members.keys();
    ids.map(|id| (id.clone(), BTreeSet::new())).collect()
}

/// A distribution, and its members by how much they have.
struct Balance<'a> {
    members: &'a Candidates,
    /// By topic: those who read it, by how many partitions they have.
    readers: BTreeMap<Arc<str>, BTreeSet<(usize, Arc<str>)>>,
    target: Target,
}

impl<'a> Balance<'a> {
    fn new(members: &'a Candidates, target: Target) -> Self {
        let mut readers: BTreeMap<Arc<str>, BTreeSet<(usize, Arc<str>)>> = BTreeMap::new();
        for (id, member) in members {
            for topic in &member.topics {
                let load = target[id].len();
                readers
                    .entry(topic.clone())
                    .or_default()
                    .insert((load, id.clone()));
            }
        }
        Self {
            members,
            readers,
            target,
        }
    }

    /// To whoever has least of those who read its topic.
    fn give(&mut self, partition: TopicPartition) {
        let least = self.readers.get(&partition.0).and_then(|r| r.first());
        if let Some((_, id)) = least.cloned() {
            self.change(&id, |owned| {
                owned.insert(partition);
            });
        }
    }

    /// Moves partitions from who has most to who has least, as long as that evens it out. Each move lessens the sum of the squares of what
    /// they have, so this ends.
    fn even_out(&mut self) {
        while let Some((from, to, partition)) = self.next_move() {
            self.change(&from, |owned| {
                owned.remove(&partition);
            });
            self.change(&to, |owned| {
                owned.insert(partition);
            });
        }
    }

    fn next_move(&self) -> Option<(Arc<str>, Arc<str>, TopicPartition)> {
        // The pair that is furthest apart in one topic, of which the one has something there.
        for readers in self.readers.values() {
            let Some((least, to)) = readers.first() else {
                continue;
            };
            let richer = readers
                .iter()
                .rev()
                .take_while(|(load, _)| load - least >= 2);
            for (_, from) in richer {
                let reads =
                    |partition: &&TopicPartition| self.members[to].topics.contains(&partition.0);
                // The last ones, so that the first stay where they were from the beginning.
                if let Some(partition) = self.target[from].iter().rev().find(reads) {
                    return Some((from.clone(), to.clone(), partition.clone()));
                }
            }
        }
        None
    }

    fn change(&mut self, id: &Arc<str>, change: impl FnOnce(&mut BTreeSet<TopicPartition>)) {
        let owned = self.target.entry(id.clone()).or_default();
        let before = owned.len();
        change(owned);
        let after = owned.len();
        for topic in &self.members[id].topics {
            if let Some(readers) = self.readers.get_mut(topic) {
                readers.remove(&(before, id.clone()));
                readers.insert((after, id.clone()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn members(of: &[(&str, &[&str])]) -> Candidates {
        of.iter()
            .map(|(id, topics)| {
                let topics = topics.iter().map(|&topic| topic.into()).collect();
                let before = BTreeSet::new();
                ((*id).into(), Candidate { topics, before })
            })
            .collect()
    }

    fn counts(of: &[(&str, i32)]) -> Counts {
        of.iter().map(|(t, n)| ((*t).into(), *n)).collect()
    }

    fn indexes(target: &Target, id: &str, topic: &str) -> Vec<i32> {
        let owned = target[id].iter().filter(|(t, _)| &**t == topic);
        owned.map(|(_, partition)| *partition).collect()
    }

    #[test]
    fn range_gives_neighbours_and_the_same_of_topics_alike() {
        let members = members(&[("a", &["x", "y"]), ("b", &["x", "y"]), ("c", &["x", "y"])]);
        let target = range(&members, &counts(&[("x", 7), ("y", 7)]));
        for (id, expected) in [("a", vec![0, 1]), ("b", vec![2, 3]), ("c", vec![4, 5, 6])] {
            assert_eq!(indexes(&target, id, "x"), expected);
            assert_eq!(indexes(&target, id, "y"), expected);
        }
    }

    #[test]
    fn a_member_that_joins_takes_only_what_evens_it_out() {
        let counts = counts(&[("x", 12)]);
        let mut candidates = members(&[("a", &["x"]), ("b", &["x"])]);
        let first = uniform(&candidates, &counts);
        assert_eq!(first["a"].len(), 6);
        for (id, owned) in &first {
            candidates.get_mut(id).unwrap().before = owned.clone();
        }
        candidates.extend(members(&[("c", &["x"])]));
        let second = uniform(&candidates, &counts);
        assert!(second.values().all(|owned| owned.len() == 4));
        for id in ["a", "b"] {
            assert!(second[id].is_subset(&first[id]), "{id} got something new");
        }
        for (id, owned) in &second {
            candidates.get_mut(id).unwrap().before = owned.clone();
        }
        candidates.remove("a");
        let third = uniform(&candidates, &counts);
        assert!(third.values().all(|owned| owned.len() == 6));
        for id in ["b", "c"] {
            assert!(third[id].is_superset(&second[id]), "{id} lost something");
        }
    }

    #[test]
    fn who_reads_more_topics_makes_room_in_those_that_others_read() {
        let candidates = members(&[("a", &["x", "y"]), ("b", &["x"])]);
        let target = uniform(&candidates, &counts(&[("x", 4), ("y", 4)]));
        assert_eq!(indexes(&target, "a", "y").len(), 4);
        assert_eq!(indexes(&target, "b", "x").len(), 4);
    }

    #[test]
    fn a_thousand_members_are_quickly_served() {
        let ids: Vec<String> = (0..1000).map(|n| format!("m{n:04}")).collect();
        let all: Vec<(&str, &[&str])> = ids.iter().map(|id| (id.as_str(), &["x"][..])).collect();
        let target = uniform(&members(&all), &counts(&[("x", 10_000)]));
        assert!(target.values().all(|owned| owned.len() == 10));
    }

    proptest! {
        /// Whatever members read and had: each partition that someone reads has one owner, who reads it; no one could be given one of
        /// another's who has two more; and asked again with this, nothing moves.
        #[test]
        fn uniform_is_complete_balanced_and_sticky(
            reads in proptest::collection::vec(proptest::collection::btree_set(0..4usize, 0..4), 0..7),
            sizes in proptest::collection::vec(0..9i32, 4),
            had in proptest::collection::vec((0..7usize, 0..4usize, 0..12i32), 0..30),
        ) {
            let topics: Vec<Arc<str>> = (0..4).map(|n| format!("t{n}").into()).collect();
            let counts: Counts = topics.iter().cloned().zip(sizes).collect();
            let mut candidates = Candidates::new();
            for (n, reads) in reads.iter().enumerate() {
                let topics = reads.iter().map(|t| topics[*t].clone()).collect();
                let before = had.iter().filter(|(m, ..)| *m == n)
                    .map(|(_, t, p)| (format!("t{t}").into(), *p)).collect();
                candidates.insert(format!("m{n}").into(), Candidate { topics, before });
            }
            for assign in [uniform, range] {
                let target = assign(&candidates, &counts);
                let mut owners: BTreeMap<&TopicPartition, &Arc<str>> = BTreeMap::new();
                for (id, owned) in &target {
                    for partition in owned {
                        prop_assert!(candidates[id].topics.contains(&partition.0));
                        prop_assert_eq!(owners.insert(partition, id), None);
                    }
                }
                for (topic, count) in &counts {
                    let read = candidates.values().any(|m| m.topics.contains(topic));
                    for partition in 0..*count {
                        prop_assert_eq!(owners.contains_key(&(topic.clone(), partition)), read);
                    }
                }
            }
            let target = uniform(&candidates, &counts);
            for owned in target.values() {
                for (to, other) in &target {
                    let could = owned.iter().any(|(topic, _)| candidates[to].topics.contains(topic));
                    prop_assert!(!could || owned.len() <= other.len() + 1);
                }
            }
            for (id, owned) in &target {
                candidates.get_mut(id).unwrap().before = owned.clone();
            }
            prop_assert_eq!(uniform(&candidates, &counts), target);
        }
    }
}
