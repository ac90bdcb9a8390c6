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
    /// Where it is.
    pub(crate) rack: Option<Arc<str>>,
}

/// Members, by what they are ordered by: a static member's instance id, else its member id.
pub(crate) type Candidates = BTreeMap<Arc<str>, Candidate>;
/// Who is to have what.
pub(crate) type Target = BTreeMap<Arc<str>, BTreeSet<TopicPartition>>;

/// How many partitions each topic has.
pub(crate) type Counts = BTreeMap<Arc<str>, i32>;

/// In which rack a partition is read best, where that is known.
pub(crate) type Places = BTreeMap<TopicPartition, Arc<str>>;

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
/// as that leaves. Who says in which rack it is gets what is read best there, as far as all have as many as before then.
pub(crate) fn uniform(members: &Candidates, counts: &Counts, places: &Places) -> Target {
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
    balance.bring_home(places);
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

    /// Has members whose rack is another than that of a partition of theirs change it for one of a member that is there: one that is not at home with that
    /// one either, or is with the first. So each change brings one home, and this ends.
    fn bring_home(&mut self, places: &Places) {
        let mut there: BTreeMap<&Arc<str>, Vec<&Arc<str>>> = BTreeMap::new();
        for (id, member) in self.members {
            if let Some(rack) = &member.rack {
                there.entry(rack).or_default().push(id);
            }
        }
        if there.is_empty() {
            return;
        }
        let owners = self.target.iter();
        let owned = owners.flat_map(|(id, owned)| owned.iter().map(move |p| (p, id)));
        let mut owners: BTreeMap<TopicPartition, Arc<str>> =
            owned.map(|(p, id)| (p.clone(), id.clone())).collect();
        let members = self.members;
        let is_home = |partition: &TopicPartition, id: &Arc<str>| {
            let place = places.get(partition);
            place.is_some() && place == members[id].rack.as_ref()
        };
        // What each could give away without loss.
        let astray = |(id, owned): (&Arc<str>, &BTreeSet<TopicPartition>)| {
            let astray = owned.iter().filter(|p| !is_home(p, id)).cloned();
            (id.clone(), astray.collect::<BTreeSet<_>>())
        };
        let mut astray: BTreeMap<Arc<str>, BTreeSet<TopicPartition>> =
            self.target.iter().map(astray).collect();
        // Loads stay as they are, unless everyone could have any of them; and else who has how many of each topic stays, too, so that there is no one with
        // few who could have one of another's.
        let mut topics = members.values().map(|member| &member.topics);
        let first = topics.next();
        let all_alike = topics.all(|topics| Some(topics) == first);
        let mut changed = true;
        while std::mem::take(&mut changed) {
            for (partition, rack) in places {
                let (Some(from), Some(hosts)) = (owners.get(partition).cloned(), there.get(rack))
                else {
                    continue;
                };
                if is_home(partition, &from) {
                    continue;
                }
                let reading = |id: &&&Arc<str>| members[**id].topics.contains(&partition.0);
                for &to in hosts.iter().filter(reading) {
                    let less = all_alike && self.target[to].len() < self.target[&from].len();
                    let may_have =
                        |p: &&TopicPartition| (all_alike || p.0 == partition.0) && *p != partition;
                    // One that is at home with the giver, if there is one.
                    let candidates = || astray[to].iter().filter(may_have);
                    let home = candidates().find(|p| is_home(p, &from));
                    let back = match less {
                        true => None,
                        false => match home.or_else(|| candidates().next()).cloned() {
                            Some(back) => Some(back),
                            None => continue,
                        },
                    };
                    let mut hand = |partition: &TopicPartition, from: &Arc<str>, to: &Arc<str>| {
                        self.change(from, |owned| {
                            owned.remove(partition);
                        });
                        self.change(to, |owned| {
                            owned.insert(partition.clone());
                        });
                        owners.insert(partition.clone(), to.clone());
                        astray.entry(from.clone()).or_default().remove(partition);
                        if !is_home(partition, to) {
                            astray
                                .entry(to.clone())
                                .or_default()
                                .insert(partition.clone());
                        }
                    };
                    hand(partition, &from, to);
                    if let Some(back) = back {
                        hand(&back, to, &from);
                    }
                    changed = true;
                    break;
                }
            }
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
                let candidate = Candidate {
                    topics,
                    ..Candidate::default()
                };
                ((*id).into(), candidate)
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

    /// No one has two more than another who could have one of those.
    fn assert_balanced(members: &Candidates, target: &Target) {
        for (id, owned) in target {
            for (to, other) in target {
                let could = owned
                    .iter()
                    .any(|(topic, _)| members[to].topics.contains(topic));
                assert!(
                    !could || owned.len() <= other.len() + 1,
                    "{id}, {to}: {target:?}"
                );
            }
        }
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
        let first = uniform(&candidates, &counts, &Places::new());
        assert_eq!(first["a"].len(), 6);
        for (id, owned) in &first {
            candidates.get_mut(id).unwrap().before = owned.clone();
        }
        candidates.extend(members(&[("c", &["x"])]));
        let second = uniform(&candidates, &counts, &Places::new());
        assert!(second.values().all(|owned| owned.len() == 4));
        for id in ["a", "b"] {
            assert!(second[id].is_subset(&first[id]), "{id} got something new");
        }
        for (id, owned) in &second {
            candidates.get_mut(id).unwrap().before = owned.clone();
        }
        candidates.remove("a");
        let third = uniform(&candidates, &counts, &Places::new());
        assert!(third.values().all(|owned| owned.len() == 6));
        for id in ["b", "c"] {
            assert!(third[id].is_superset(&second[id]), "{id} lost something");
        }
    }

    #[test]
    fn who_reads_more_topics_makes_room_in_those_that_others_read() {
        let candidates = members(&[("a", &["x", "y"]), ("b", &["x"])]);
        let target = uniform(&candidates, &counts(&[("x", 4), ("y", 4)]), &Places::new());
        assert_eq!(indexes(&target, "a", "y").len(), 4);
        assert_eq!(indexes(&target, "b", "x").len(), 4);
    }

    #[test]
    fn what_is_read_best_in_a_members_rack_is_given_to_it_and_all_have_as_many() {
        let racks: [Arc<str>; 3] = ["r0".into(), "r1".into(), "r2".into()];
        let ids: Vec<String> = (0..6).map(|n| format!("m{n}")).collect();
        let all: Vec<(&str, &[&str])> = ids.iter().map(|id| (id.as_str(), &["x"][..])).collect();
        let mut candidates = members(&all);
        for (n, candidate) in candidates.values_mut().enumerate() {
            candidate.rack = Some(racks[n % 3].clone());
        }
        let partitions = (0..32).map(|n| ("x".into(), n));
        let places: Places = partitions
            .map(|p: TopicPartition| (p.clone(), racks[(p.1 / 3 % 3) as usize].clone()))
            .collect();
        let target = uniform(&candidates, &counts(&[("x", 32)]), &places);
        let home = |(id, owned): (&Arc<str>, &BTreeSet<TopicPartition>)| {
            assert!((5..=6).contains(&owned.len()), "{id} has {}", owned.len());
            let rack = candidates[id].rack.as_ref();
            owned.iter().filter(|p| places.get(*p) == rack).count()
        };
        // Of 12, 11 and 9 that are best read in each, two members there have 12 at most: one of the 32 has to be read elsewhere.
        assert_eq!(target.iter().map(home).sum::<usize>(), 31);
    }

    #[test]
    fn who_reads_more_topics_gets_nothing_for_its_rack_that_others_with_less_could_have() {
        let mut candidates = members(&[("a", &["y"]), ("b", &["x", "y"]), ("c", &["x", "y", "z"])]);
        candidates.get_mut("b").unwrap().before = [("y".into(), 1)].into();
        candidates.get_mut("c").unwrap().rack = Some("r".into());
        let places = [(("y".into(), 1), "r".into())].into();
        let counts = counts(&[("x", 6), ("y", 5), ("z", 4)]);
        assert_balanced(&candidates, &uniform(&candidates, &counts, &places));
    }

    #[test]
    fn a_thousand_members_are_quickly_served() {
        let ids: Vec<String> = (0..1000).map(|n| format!("m{n:04}")).collect();
        let all: Vec<(&str, &[&str])> = ids.iter().map(|id| (id.as_str(), &["x"][..])).collect();
        let target = uniform(&members(&all), &counts(&[("x", 10_000)]), &Places::new());
        assert!(target.values().all(|owned| owned.len() == 10));
    }

    proptest! {
        /// Whatever members read and had: each partition that someone reads has one owner, who reads it; no one could be given one of
        /// another's who has two more; and asked again with this, nothing moves.
        #[test]
        fn uniform_is_complete_balanced_and_sticky(
            reads in proptest::collection::vec(proptest::collection::btree_set(0..4usize, 0..4), 0..7),
            sizes in proptest::collection::vec(0..9i32, 4),
            racks in proptest::collection::vec(proptest::option::of(0..3u8), 0..7),
            places in proptest::collection::btree_map((0..4usize, 0..9i32), 0..3u8, 0..20),
            had in proptest::collection::vec((0..7usize, 0..4usize, 0..12i32), 0..30),
        ) {
            let topics: Vec<Arc<str>> = (0..4).map(|n| format!("t{n}").into()).collect();
            let counts: Counts = topics.iter().cloned().zip(sizes).collect();
            let mut candidates = Candidates::new();
            for (n, reads) in reads.iter().enumerate() {
                let topics = reads.iter().map(|t| topics[*t].clone()).collect();
                let before = had.iter().filter(|(m, ..)| *m == n)
                    .map(|(_, t, p)| (format!("t{t}").into(), *p)).collect();
                let rack = racks.get(n % racks.len().max(1)).cloned().flatten().map(|rack| format!("r{rack}").into());
                candidates.insert(format!("m{n}").into(), Candidate { topics, before, rack });
            }
            let places: Places = places.into_iter()
                .map(|((t, p), rack)| ((format!("t{t}").into(), p), format!("r{rack}").into())).collect();
            for target in [uniform(&candidates, &counts, &places), range(&candidates, &counts)] {
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
            let target = uniform(&candidates, &counts, &places);
            assert_balanced(&candidates, &target);
            for (id, owned) in &target {
                candidates.get_mut(id).unwrap().before = owned.clone();
            }
            prop_assert_eq!(uniform(&candidates, &counts, &places), target);
        }
    }
}
