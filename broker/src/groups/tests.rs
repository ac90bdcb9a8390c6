//! A coordinator that is crashed again and again, and members that come, go, die, hang and are cut off, drawn from a seed.
//!
//! At each step: no member that is one still believes to own what the coordinator has given to another one; what a member commits never lies before
//! what was committed, whoever committed it. When all is quiet again: each partition that someone reads has one owner, who knows it.
//! `MILLRACE_GROUPS_SEED=n cargo test -p millrace-broker groups::tests` replays one seed.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use fastrand::Rng;
use millrace_proto::v1::{
    Assignment, Assignor, CommitOffsetsRequest, FetchOffsetsRequest, GroupState,
    HoldOffsetsRequest, MemberHello, OffsetCommit, Subscription, TopicPartitions,
};
use uuid::Uuid;

use super::{
    GroupError, Shape, TopicPartition, Topology,
    entry::Entry,
    group::{SessionId, by_topic, flat},
    shard::{Said, Shard, Speaker},
};
use crate::shards::{Entry as _, Now};

const GROUP: &str = "g";
const SEEDS: u64 = 500;
const STEPS: usize = 400;

struct Client {
    id: String,
    instance: Option<String>,
    topics: Vec<String>,
    session: Option<SessionId>,
    /// With the next offset to be read.
    owned: BTreeMap<TopicPartition, i64>,
    epoch: i32,
    inbox: VecDeque<Result<Assignment, GroupError>>,
    outbox: VecDeque<(SessionId, Said)>,
    /// It does nothing until then.
    hangs_until: Instant,
}

struct World {
    rng: Rng,
    now: Instant,
    shard: Shard,
    log: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    topology: Topology,
    clients: Vec<Client>,
    sessions: SessionId,
    made: usize,
    committed: BTreeMap<TopicPartition, i64>,
    /// Nothing is broken any more.
    quiet: bool,
}

fn shape(id: u128, partitions: i32) -> Shape {
    Shape {
        id: Uuid::from_u128(id),
        partitions,
        racks: (0..partitions)
            .map(|n| Some(format!("r{}", n % 2).into()))
            .collect(),
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let topic = |n: i32| (format!("t{n}").into(), shape(n as u128, 2 + n));
        let mut world = Self {
            rng: Rng::with_seed(seed),
            now: Instant::now(),
            shard: Shard::default(),
            log: Vec::new(),
            topology: (0..3).map(topic).collect(),
            clients: Vec::new(),
            sessions: 0,
            made: 0,
            committed: BTreeMap::new(),
            quiet: false,
        };
        world.shard.set_topology(world.topology.clone());
        world
    }

    fn now(&self) -> Now {
        Now {
            instant: self.now,
            unix_ms: 0,
        }
    }

    fn chance(&mut self, one_in: u32) -> bool {
        !self.quiet && self.rng.u32(..one_in) == 0
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(self.rng.u64(0..400));
        if self.chance(8) && self.clients.len() < 6 {
            self.make_client();
        }
        if self.chance(40) {
            self.add_partition();
        }
        for index in 0..self.clients.len() {
            self.client(index);
        }
        if self.chance(30) && !self.clients.is_empty() {
            self.kill_client();
        }
        let lost = self.chance(25);
        self.round(lost);
        self.check();
    }

    fn make_client(&mut self) {
        self.made += 1;
        let instance = (self.rng.u32(..4) == 0).then(|| format!("i{}", self.rng.u32(..2)));
        let alive = |client: &Client| instance.is_some() && client.instance == instance;
        if self.clients.iter().any(alive) {
            return;
        }
        let topics: Vec<String> = (0..3)
            .filter(|_| self.rng.u32(..3) > 0)
            .map(|n| format!("t{n}"))
            .collect();
        if topics.is_empty() {
            return;
        }
        self.clients.push(Client {
            id: format!("m{}", self.made),
            instance,
            topics,
            session: None,
            owned: BTreeMap::new(),
            epoch: 0,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            hangs_until: self.now,
        });
    }

    fn add_partition(&mut self) {
        let topic: Arc<str> = format!("t{}", self.rng.u32(..3)).into();
        if let Some(shape) = self.topology.get_mut(&topic).filter(|s| s.partitions < 8) {
            shape.partitions += 1;
        }
        self.shard.set_topology(self.topology.clone());
    }

    fn kill_client(&mut self) {
        let index = self.rng.usize(..self.clients.len());
        let client = self.clients.remove(index);
        if let Some(session) = client.session {
            let said = match self.rng.bool() {
                true => Said::Left,
                false => Said::Disconnected,
            };
            self.say(&client.id, session, said);
        }
    }

    fn say(&mut self, id: &str, session: SessionId, said: Said) {
        let speaker = Speaker {
            group: GROUP.into(),
            member: id.into(),
            session,
        };
        self.shard.said(&speaker, said, self.now()).unwrap();
    }

    fn client(&mut self, index: usize) {
        if self.chance(60) {
            // Longer than its session, now and then.
            let pause = Duration::from_millis(self.rng.u64(..15_000));
            self.clients[index].hangs_until = self.now + pause;
        }
        let Client {
            hangs_until,
            session,
            ..
        } = self.clients[index];
        if hangs_until > self.now && !self.quiet {
            return;
        }
        match session {
            None => self.join(index),
            Some(session) if self.chance(50) => {
                // Its connection breaks; it notices at once, the coordinator too.
                let id = self.clients[index].id.clone();
                self.say(&id, session, Said::Disconnected);
                self.clients[index].disconnect();
            }
            Some(session) => {
                self.read_inbox(index);
                self.consume(index);
                let client = &mut self.clients[index];
                if client.session == Some(session) {
                    client.outbox.push_back((session, Said::Alive));
                }
                let count = self.rng.usize(..=self.clients[index].outbox.len());
                let count = if self.quiet { usize::MAX } else { count };
                for _ in 0..count {
                    let Some((session, said)) = self.clients[index].outbox.pop_front() else {
                        break;
                    };
                    let id = self.clients[index].id.clone();
                    self.say(&id, session, said);
                }
            }
        }
    }

    fn join(&mut self, index: usize) {
        self.sessions += 1;
        let session = self.sessions;
        let client = &mut self.clients[index];
        let hello = MemberHello {
            group_id: GROUP.into(),
            member_id: client.id.clone(),
            instance_id: client.instance.clone(),
            subscription: Some(Subscription {
                topics: client.topics.clone(),
                pattern: None,
                assignor: Assignor::Uniform.into(),
                // Of two racks, or of none.
                rack: Some(format!("r{}", index % 3)).filter(|_| index % 3 < 2),
            }),
            owned: by_topic(client.owned.keys()),
            ..MemberHello::default()
        };
        client.session = Some(session);
        let now = self.now();
        if self.shard.join(hello, session, now).is_err() {
            self.come_anew(index);
        }
    }

    fn read_inbox(&mut self, index: usize) {
        while let Some(told) = self.clients[index].inbox.pop_front() {
            match told {
                Ok(assignment) => {
                    let before = std::mem::take(&mut self.clients[index].owned);
                    let mut owned = BTreeMap::new();
                    for partition in flat(&assignment.partitions) {
                        let position = before.get(&partition).copied();
                        let position = position.unwrap_or_else(|| self.committed_at(&partition));
                        owned.insert(partition, position);
                    }
                    let client = &mut self.clients[index];
                    client.owned = owned;
                    client.epoch = assignment.epoch;
                    if let Some(session) = client.session {
                        let said = Said::Applied(assignment.version);
                        client.outbox.push_back((session, said));
                    }
                }
                Err(_) => self.come_anew(index),
            }
        }
    }

    /// It was taken for gone: it comes as another one, with nothing.
    fn come_anew(&mut self, index: usize) {
        self.made += 1;
        let id = format!("m{}", self.made);
        let client = &mut self.clients[index];
        client.id = id;
        client.owned.clear();
        client.disconnect();
    }

    fn committed_at(&self, (topic, partition): &TopicPartition) -> i64 {
        let request = FetchOffsetsRequest {
            group_id: GROUP.into(),
            partitions: vec![TopicPartitions {
                topic: topic.to_string(),
                partitions: vec![*partition],
            }],
        };
        let found = self.shard.fetch(&request).unwrap().offsets;
        found.first().map_or(0, |offset| offset.offset)
    }

    /// Reads some records, and commits that.
    fn consume(&mut self, index: usize) {
        let read = self.rng.i64(0..10);
        let client = &mut self.clients[index];
        let mut offsets = Vec::new();
        for ((topic, partition), position) in &mut client.owned {
            *position += read;
            offsets.push(OffsetCommit {
                topic: topic.to_string(),
                partition: *partition,
                offset: *position,
                leader_epoch: -1,
                metadata: String::new(),
            });
        }
        let (id, epoch) = (client.id.clone(), client.epoch);
        for commit in offsets {
            let key: TopicPartition = (commit.topic.as_str().into(), commit.partition);
            let offset = commit.offset;
            let request = CommitOffsetsRequest {
                group_id: GROUP.into(),
                member_id: id.clone(),
                epoch,
                offsets: vec![commit],
            };
            if self.shard.commit(request, self.now()).is_ok() {
                let before = self.committed_at(&key);
                assert_eq!(before, offset);
                let last = self.committed.insert(key.clone(), offset).unwrap_or(0);
                assert!(last <= offset, "{key:?}: committed {offset} after {last}");
            }
        }
    }

    /// Ends a round: what is to be kept is kept, and only then anyone hears of anything; or the coordinator dies, and another one knows only
    /// what had been kept before.
    fn round(&mut self, dies: bool) {
        self.shard.tick(self.now());
        let outcome = self.shard.settle(self.now);
        if dies {
            self.shard = Shard::default();
            for (key, value) in &self.log {
                let (key, value) = (key.clone().into(), value.clone().map(Bytes::from));
                let entry = Entry::decode(Some(key), value).unwrap();
                self.shard.replay(entry, self.now);
            }
            self.shard.replayed(self.topology.clone());
            self.clients.iter_mut().for_each(Client::disconnect);
            // Commits of that round were not acknowledged.
            let keys: Vec<TopicPartition> = self.committed.keys().cloned().collect();
            for key in keys {
                let kept = self.committed_at(&key);
                self.committed.insert(key, kept);
            }
            return;
        }
        self.log.extend(outcome.entries.iter().map(Entry::encode));
        if self.rng.u32(..50) == 0 {
            self.log = self.shard.snapshot().map(|entry| entry.encode()).collect();
        }
        for news in outcome.news {
            let client = self.clients.iter_mut();
            let mut client = client.filter(|client| client.session == Some(news.session));
            if let Some(client) = client.next() {
                client.inbox.push_back(news.assignment);
            }
        }
    }

    fn owners(&self) -> BTreeMap<TopicPartition, String> {
        let mut owners = BTreeMap::new();
        let Ok(described) = self.shard.describe(GROUP) else {
            return owners;
        };
        for member in described.members {
            for partition in [flat(&member.owned), flat(&member.revoking)].concat() {
                let id = member.member_id.clone();
                let before = owners.insert(partition.clone(), id);
                assert_eq!(before, None, "{partition:?} has two owners");
            }
        }
        owners
    }

    fn check(&self) {
        let owners = self.owners();
        let described = self.shard.describe(GROUP);
        let members = described.map(|group| group.members).unwrap_or_default();
        let members: BTreeSet<String> = members.into_iter().map(|m| m.member_id).collect();
        for client in &self.clients {
            for partition in client.owned.keys() {
                let owner = owners.get(partition);
                assert!(
                    owner.is_none_or(|owner| *owner == client.id) || !members.contains(&client.id),
                    "{} believes to own {partition:?}, which is {owner:?}'s",
                    client.id
                );
            }
        }
    }

    fn check_quiet(&self) {
        if self.clients.is_empty() {
            return;
        }
        let described = self.shard.describe(GROUP).unwrap();
        let summary = described.summary.unwrap();
        assert_eq!(summary.state(), GroupState::Stable, "{summary:?}");
        assert_eq!(described.members.len(), self.clients.len());
        let mut read = BTreeSet::new();
        for client in &self.clients {
            for topic in &client.topics {
                let topic: Arc<str> = topic.as_str().into();
                let count = self.topology[&topic].partitions;
                read.extend((0..count).map(|partition| (topic.clone(), partition)));
            }
        }
        let owned: Vec<&TopicPartition> =
            self.clients.iter().flat_map(|c| c.owned.keys()).collect();
        assert_eq!(owned.len(), read.len());
        assert_eq!(owned.into_iter().cloned().collect::<BTreeSet<_>>(), read);
    }
}

impl Client {
    fn disconnect(&mut self) {
        self.session = None;
        self.inbox.clear();
        self.outbox.clear();
    }
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
    }
    world.quiet = true;
    for _ in 0..400 {
        world.step();
    }
    world.check_quiet();
}

#[test]
fn one_owner_at_a_time_and_one_for_each_partition_in_the_end() {
    let seeds = match std::env::var("MILLRACE_GROUPS_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..SEEDS).collect::<Vec<u64>>(),
    };
    for seed in seeds {
        let failed = std::panic::catch_unwind(|| run(seed)).is_err();
        assert!(!failed, "replay with MILLRACE_GROUPS_SEED={seed}");
    }
}

/// Offsets of partition 0 of topic `t`, held for a transaction.
fn hold(shard: &mut Shard, producer: (i64, i32), offset: i64, now: Now) -> Result<(), GroupError> {
    let offsets = CommitOffsetsRequest {
        group_id: GROUP.into(),
        offsets: vec![OffsetCommit {
            topic: "t".into(),
            offset,
            ..OffsetCommit::default()
        }],
        ..CommitOffsetsRequest::default()
    };
    let request = HoldOffsetsRequest {
        producer_id: producer.0,
        producer_epoch: producer.1,
        offsets: Some(offsets),
    };
    shard.hold(request, now)
}

#[test]
fn offsets_wait_for_their_transaction_and_nothing_comes_late() {
    let now = Now {
        instant: Instant::now(),
        unix_ms: 0,
    };
    let topology: Topology = [("t".into(), shape(1, 1))].into();
    let mut shard = Shard::default();
    shard.set_topology(topology.clone());
    let mut log = Vec::new();
    let all = FetchOffsetsRequest {
        group_id: GROUP.into(),
        ..FetchOffsetsRequest::default()
    };
    let committed = |shard: &Shard| -> Result<Option<i64>, GroupError> {
        let offsets = shard.fetch(&all)?.offsets;
        Ok(offsets.first().map(|committed| committed.offset))
    };
    // Another coordinator knows the same.
    let again = |shard: &mut Shard, log: &mut Vec<Entry>| {
        log.extend(shard.settle(now.instant).entries);
        *shard = Shard::default();
        for entry in log.clone() {
            shard.replay(entry, now.instant);
        }
        shard.replayed(topology.clone());
    };
    hold(&mut shard, (7, 0), 5, now).unwrap();
    for _ in 0..2 {
        assert!(matches!(
            committed(&shard),
            Err(GroupError::OffsetsPending { .. })
        ));
        assert!(matches!(
            shard.delete(GROUP),
            Err(GroupError::OffsetsPending { .. })
        ));
        again(&mut shard, &mut log);
    }
    shard.close(GROUP, (7, 0), true, now).unwrap();
    assert_eq!(committed(&shard).unwrap(), Some(5));
    // Told twice, or that it is aborted, it stays as it is; and nothing is added to it.
    shard.close(GROUP, (7, 0), false, now).unwrap();
    assert!(matches!(
        hold(&mut shard, (7, 0), 9, now),
        Err(GroupError::TransactionEnded { .. })
    ));
    again(&mut shard, &mut log);
    assert_eq!(committed(&shard).unwrap(), Some(5));
    // One that is aborted; and one whose end comes before what it would have held.
    hold(&mut shard, (7, 1), 9, now).unwrap();
    shard.close(GROUP, (7, 1), false, now).unwrap();
    shard.close(GROUP, (8, 3), true, now).unwrap();
    assert!(matches!(
        hold(&mut shard, (8, 3), 9, now),
        Err(GroupError::TransactionEnded { .. })
    ));
    again(&mut shard, &mut log);
    assert_eq!(committed(&shard).unwrap(), Some(5));
    shard.delete(GROUP).unwrap();
    again(&mut shard, &mut log);
    assert_eq!(shard.list(), []);
}
