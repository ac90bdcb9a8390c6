//! Producers that crash, hang and are taken over, a coordinator that is crashed again and again, and messages to participants that come late, twice and in
//! any order, drawn from a seed. Partitions are logs with the rules that the store has.
//!
//! At each step: who reads what is committed sees only values of transactions that were decided to be. When all is quiet again: each transaction is there as a
//! whole, once, or not at all; those whose producers were told so are; nothing is open.
//! `MILLRACE_TRANSACTIONS_SEED=n cargo test -p millrace-broker transactions::tests` replays one seed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use fastrand::Rng;
use millrace_proto::v1::TopicPartitions;
use millrace_record::{
    BatchBuilder, BatchHeader, BatchOptions, EndMarker, ProducerState, end_marker, marker_batch,
};

use super::{
    Producer, TransactionError,
    entry::Entry,
    shard::{Ending, Shard},
};
use crate::{
    groups::TopicPartition,
    mutation::{self, Mutation},
    shards::{Entry as _, Now},
    storage::{EndedTransactions, Producers, Verdict},
};

const SEEDS: u64 = 500;
const STEPS: usize = 400;
const PARTITIONS: i32 = 3;
const TIMEOUT_MS: u32 = 5_000;

static NEXT_ID: AtomicI64 = AtomicI64::new(1);

fn new_id() -> i64 {
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

/// A partition's log: who wrote what, and markers.
#[derive(Default)]
struct Log {
    producers: Producers,
    ended: EndedTransactions,
    records: Vec<(Producer, Option<u32>)>,
}

impl Log {
    fn append(&mut self, header: &BatchHeader, marker: Option<EndMarker>, value: Option<u32>) {
        let offset = self.records.len() as i64;
        let mut before = Vec::new();
        let ends = self
            .producers
            .appended(header, marker, offset, 0, &mut before);
        ends.into_iter().for_each(|ends| self.ended.push(ends));
        self.records
            .push(((header.producer_id, header.producer_epoch), value));
    }

    fn send(&mut self, (id, epoch): Producer, sequence: i32, value: u32) -> bool {
        let mut builder = BatchBuilder::new(BatchOptions {
            transactional: true,
            producer: Some(ProducerState {
                id,
                epoch,
                base_sequence: sequence,
            }),
            ..BatchOptions::default()
        });
        builder.append(0, None, None, &[]);
        let header = BatchHeader::parse(&builder.build().unwrap()).unwrap();
        match self.producers.check(&header) {
            Ok(Verdict::Append) => {
                self.append(&header, None, Some(value));
                true
            }
            Ok(Verdict::Duplicate { .. }) => true,
            Err(_) => false,
        }
    }

    fn close(&mut self, (id, epoch): Producer, commit: bool) {
        if self.producers.has_ended(id, epoch) {
            return;
        }
        let end = match commit {
            true => EndMarker::Commit,
            false => EndMarker::Abort,
        };
        let batch = marker_batch(end, id, epoch, 0, 0).unwrap();
        let header = BatchHeader::parse(&batch).unwrap();
        self.append(&header, end_marker(&batch).unwrap(), None);
    }

    /// What who reads what is committed sees.
    fn committed(&self) -> Vec<u32> {
        let all = self.records.len() as i64;
        let end = self.producers.first_open().unwrap_or(all);
        let aborted = self.ended.aborted_within(0, end);
        let visible = |offset: i64, producer: Producer| {
            !aborted.iter().any(|ended| {
                ended.producer_id == producer.0
                    && (ended.first_offset..=ended.last_offset).contains(&offset)
            })
        };
        let records = self.records.iter().enumerate().take(end as usize);
        let seen = records.filter(|(offset, (producer, _))| visible(*offset as i64, *producer));
        seen.filter_map(|(_, (_, value))| *value).collect()
    }
}

/// What is on its way to a participant.
#[derive(Clone)]
enum Message {
    Open(TopicPartition, Producer),
    Close(Ending),
    /// A batch: its partition, producer, sequence and value. It may come as late as its process hangs.
    Send(i32, Producer, i32, u32),
}

impl Message {
    /// Whether the coordinator sends it, for that producer.
    fn tells_of(&self, (id, _): Producer) -> bool {
        match self {
            Message::Open(_, producer) => producer.0 == id,
            Message::Close(ending) => ending.producer.0 == id,
            Message::Send(..) => false,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Outcome {
    Unknown,
    Committed,
    Aborted,
}

/// A process with a transactional id.
struct Client {
    id: String,
    producer: Option<Producer>,
    /// The transaction's number, and the next sequence of each partition.
    open: Option<(usize, BTreeMap<i32, i32>)>,
    /// It stands still.
    hangs: bool,
}

struct World {
    rng: Rng,
    now: Instant,
    ms: i64,
    shard: Shard,
    kept: Vec<(Vec<u8>, Option<Vec<u8>>)>,
    logs: Vec<Log>,
    clients: Vec<Client>,
    under_way: Vec<Message>,
    /// Values acknowledged in each transaction, and what its producer was told.
    transactions: Vec<(Vec<(i32, u32)>, Outcome)>,
    /// What the coordinator decided, by producer.
    decided: BTreeMap<Producer, bool>,
    values: BTreeMap<u32, usize>,
    next_value: u32,
    quiet: bool,
}

fn topic() -> std::sync::Arc<str> {
    "t".into()
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            now: Instant::now(),
            ms: 0,
            shard: Shard::new(new_id),
            kept: Vec::new(),
            logs: (0..PARTITIONS).map(|_| Log::default()).collect(),
            clients: Vec::new(),
            under_way: Vec::new(),
            transactions: Vec::new(),
            decided: BTreeMap::new(),
            values: BTreeMap::new(),
            next_value: 0,
            quiet: false,
        }
    }

    fn now(&self) -> Now {
        Now {
            instant: self.now,
            unix_ms: self.ms,
        }
    }

    fn chance(&mut self, one_in: u32) -> bool {
        !self.quiet && self.rng.u32(..one_in) == 0
    }

    /// Keeps what changed. If that is lost, the coordinator is another one, and nobody has heard anything of it.
    fn keep(&mut self) -> bool {
        let lost = self.chance(20);
        let (entries, endings) = self.shard.settle();
        if lost {
            self.reload();
            return false;
        }
        self.kept.extend(entries.iter().map(Entry::encode));
        for ending in endings {
            let before = self.decided.insert(ending.producer, ending.commit);
            assert!(before.is_none_or(|before| before == ending.commit));
            self.under_way.push(Message::Close(ending));
        }
        true
    }

    fn reload(&mut self) {
        self.shard = Shard::new(new_id);
        for (key, value) in self.kept.clone() {
            let entry = Entry::decode(Some(key.into()), value.map(Bytes::from)).unwrap();
            self.shard.replay(entry);
        }
        self.shard.replayed();
        self.keep();
    }

    fn step(&mut self) {
        let passed = self.rng.i64(0..200);
        self.ms += passed;
        self.now += Duration::from_millis(passed as u64);
        if self.clients.len() < 4 && !self.quiet {
            // Some take over from others that live.
            let id = format!("x{}", self.rng.u32(..3));
            self.clients.push(Client {
                id,
                producer: None,
                open: None,
                hangs: false,
            });
        }
        for index in 0..self.clients.len() {
            self.client(index);
        }
        if self.chance(15) && !self.clients.is_empty() {
            let index = self.rng.usize(..self.clients.len());
            self.clients.swap_remove(index);
        }
        if self.chance(30) {
            self.reload();
        }
        if self.chance(30) {
            self.forget();
        }
        for _ in 0..self.rng.usize(0..4) {
            self.deliver();
        }
        self.shard.tick(self.now());
        self.keep();
        self.check();
    }

    fn client(&mut self, index: usize) {
        if self.chance(40) {
            self.clients[index].hangs ^= true;
        }
        if self.clients[index].hangs {
            return;
        }
        let now = self.now();
        let client = &self.clients[index];
        let id = client.id.clone();
        let Some(producer) = client.producer else {
            let made = self.shard.init(&id, TIMEOUT_MS, None, now);
            if self.keep() {
                self.clients[index].producer = made.ok();
            }
            return;
        };
        if client.open.is_none() {
            if !self.quiet {
                self.transactions.push((Vec::new(), Outcome::Unknown));
                self.clients[index].open = Some((self.transactions.len() - 1, BTreeMap::new()));
            }
            return;
        }
        let ends = self.quiet || self.rng.u32(..6) == 0;
        match ends {
            false => self.send(index, producer),
            true => self.end(index, producer),
        }
    }

    fn send(&mut self, index: usize, producer: Producer) {
        let now = self.now();
        let id = self.clients[index].id.clone();
        let partition = self.rng.i32(0..PARTITIONS);
        let Some((number, sequences)) = self.clients[index].open.clone() else {
            return;
        };
        let Some(&sequence) = sequences.get(&partition) else {
            let added = [TopicPartitions {
                topic: "t".to_owned(),
                partitions: vec![partition],
            }];
            let added = self.shard.add_partitions(&id, producer, &added, now);
            if !self.keep() {
                return;
            }
            match added {
                Ok(()) => {
                    let open = Message::Open((topic(), partition), producer);
                    self.under_way.push(open.clone());
                    // It is answered once that has arrived; another one may come late.
                    self.arrive(open);
                    if let Some((_, sequences)) = &mut self.clients[index].open {
                        sequences.insert(partition, 0);
                    }
                }
                Err(TransactionError::Concurrent(_)) => {}
                Err(error) => self.refused(index, &error),
            }
            return;
        };
        let value = self.next_value;
        self.next_value += 1;
        self.values.insert(value, number);
        if self.chance(5) {
            let late = Message::Send(partition, producer, sequence, value);
            self.under_way.push(late);
        }
        if self.logs[partition as usize].send(producer, sequence, value) {
            self.transactions[number].0.push((partition, value));
            if let Some((_, sequences)) = &mut self.clients[index].open {
                sequences.insert(partition, sequence + 1);
            }
        } else {
            // What can't be delivered must not be committed.
            self.give_up(index, producer);
        }
    }

    fn end(&mut self, index: usize, producer: Producer) {
        let commit = self.rng.u32(..3) > 0;
        let Some((number, _)) = self.clients[index].open.clone() else {
            return;
        };
        let now = self.now();
        let ended = self
            .shard
            .end(&self.clients[index].id.clone(), producer, commit, now);
        if !self.keep() {
            // It does not know. A process that asks again is told the same.
            let again = self.now();
            let id = self.clients[index].id.clone();
            let ended = self.shard.end(&id, producer, commit, again);
            self.keep();
            if ended.is_err() {
                self.clients[index].open = None;
                self.clients[index].producer = None;
            }
            return;
        }
        match ended {
            Ok(next) => {
                self.transactions[number].1 = match commit {
                    true => Outcome::Committed,
                    false => Outcome::Aborted,
                };
                self.clients[index].producer = Some(next);
                self.clients[index].open = None;
            }
            Err(error) => self.refused(index, &error),
        }
    }

    fn give_up(&mut self, index: usize, producer: Producer) {
        let (id, now) = (self.clients[index].id.clone(), self.now());
        let number = self.clients[index].open.take().map(|(number, _)| number);
        let ended = self.shard.end(&id, producer, false, now);
        let kept = self.keep();
        self.clients[index].producer = None;
        if let (Some(number), true, Ok(next)) = (number, kept, ended) {
            self.transactions[number].1 = Outcome::Aborted;
            self.clients[index].producer = Some(next);
        }
    }

    /// Its transaction is over; a producer that is fenced ends, another one aborts and goes on.
    fn refused(&mut self, index: usize, error: &TransactionError) {
        match (error, self.clients[index].producer) {
            (TransactionError::Aborted(_), Some(producer)) => self.give_up(index, producer),
            _ => {
                self.clients[index].open = None;
                self.clients[index].producer = None;
            }
        }
    }

    fn arrive(&mut self, message: Message) {
        match message {
            Message::Open((_, partition), (id, epoch)) => {
                let producers = &mut self.logs[partition as usize].producers;
                // Refused if it has ended meanwhile.
                let _ = producers.announce(id, epoch);
            }
            Message::Close(ending) => {
                for (_, partition) in &ending.partitions {
                    self.logs[*partition as usize].close(ending.producer, ending.commit);
                }
            }
            Message::Send(partition, producer, sequence, value) => {
                self.logs[partition as usize].send(producer, sequence, value);
            }
        }
    }

    /// Partitions forget producers that have not written for long: longer than anything takes that the coordinator sends.
    fn forget(&mut self) {
        for producer in self.decided.keys() {
            if !self.under_way.iter().any(|m| m.tells_of(*producer)) {
                let logs = self.logs.iter_mut();
                logs.for_each(|log| log.producers.forget(producer.0));
            }
        }
    }

    fn deliver(&mut self) {
        if self.under_way.is_empty() {
            return;
        }
        let index = self.rng.usize(..self.under_way.len());
        let message = match self.chance(5) {
            // It comes again later.
            true => self.under_way[index].clone(),
            false => self.under_way.swap_remove(index),
        };
        self.arrive(message.clone());
        if let Message::Close(ending) = message {
            let now = self.now();
            self.shard.told(&ending.id, ending.producer, now);
            self.keep();
        }
    }

    fn check(&self) {
        for log in &self.logs {
            for value in log.committed() {
                let at = log.records.iter().find(|(_, known)| *known == Some(value));
                let (producer, _) = at.unwrap();
                assert_eq!(
                    self.decided.get(producer),
                    Some(&true),
                    "value {value} is seen"
                );
            }
        }
    }

    fn end_quietly(&mut self) {
        self.quiet = true;
        for client in &mut self.clients {
            client.hangs = false;
        }
        for _ in 0..200 {
            self.step();
        }
        let mut seen: BTreeMap<usize, BTreeSet<u32>> = BTreeMap::new();
        for (partition, log) in self.logs.iter().enumerate() {
            assert_eq!(log.producers.first_open(), None, "partition {partition}");
            for value in log.committed() {
                let number = self.values[&value];
                assert!(
                    seen.entry(number).or_default().insert(value),
                    "{value} twice"
                );
            }
        }
        for (number, (sent, outcome)) in self.transactions.iter().enumerate() {
            let sent: BTreeSet<u32> = sent.iter().map(|(_, value)| *value).collect();
            let seen = seen.remove(&number).unwrap_or_default();
            assert!(
                seen.is_empty() || seen == sent,
                "a part of transaction {number}"
            );
            match outcome {
                Outcome::Committed => assert_eq!(seen, sent, "transaction {number}"),
                Outcome::Aborted => assert!(seen.is_empty(), "transaction {number}"),
                Outcome::Unknown => {}
            }
        }
        let open = self
            .shard
            .list()
            .into_iter()
            .filter(|t| t.since_ms.is_some());
        assert_eq!(open.count(), 0);
    }
}

/// How many transactions were committed in the run of a seed, or what it broke.
fn run(seed: u64) -> std::thread::Result<usize> {
    std::panic::catch_unwind(|| {
        let mut world = World::new(seed);
        for _ in 0..STEPS {
            world.step();
        }
        world.end_quietly();
        let ends = world.transactions.iter().map(|(_, outcome)| *outcome);
        ends.filter(|outcome| *outcome == Outcome::Committed)
            .count()
    })
}

#[test]
fn each_broken_rule_is_noticed() {
    let mut missed = Vec::new();
    for broken in Mutation::TRANSACTIONS {
        mutation::set(Some(*broken));
        match (0..SEEDS).find(|seed| run(*seed).is_err()) {
            Some(seed) => println!("{broken:?}: noticed with seed {seed}"),
            None => missed.push(broken),
        }
        mutation::set(None);
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}

#[test]
fn transactions_are_atomic_whatever_crashes() {
    let seeds = match std::env::var("MILLRACE_TRANSACTIONS_SEED") {
        Ok(seed) => {
            let seed = seed.parse().unwrap();
            seed..seed + 1
        }
        Err(_) => 0..SEEDS,
    };
    let mut committed = 0;
    for seed in seeds {
        match run(seed) {
            Ok(count) => committed += count,
            Err(cause) => {
                eprintln!("MILLRACE_TRANSACTIONS_SEED={seed} replays this");
                std::panic::resume_unwind(cause);
            }
        }
    }
    assert!(committed > 0);
}

#[test]
fn a_producer_id_is_replaced_once_its_epochs_are_used_up() {
    let now = Now {
        instant: Instant::now(),
        unix_ms: 0,
    };
    let mut shard = Shard::new(new_id);
    let mut producer = shard.init("x", 0, None, now).unwrap();
    let first = producer;
    let partitions = [TopicPartitions {
        topic: "t".to_owned(),
        partitions: vec![0],
    }];
    for _ in 0..i16::MAX {
        shard
            .add_partitions("x", producer, &partitions, now)
            .unwrap();
        let next = shard.end("x", producer, true, now).unwrap();
        shard.told("x", producer, now);
        producer = next;
    }
    assert_ne!(producer.0, first.0);
    assert_eq!(producer.1, 0);
}

#[test]
fn who_is_taken_over_is_fenced_also_if_it_says_who_it_was() {
    let now = Now {
        instant: Instant::now(),
        unix_ms: 0,
    };
    let mut shard = Shard::new(new_id);
    let old = shard.init("x", 0, None, now).unwrap();
    let new = shard.init("x", 0, None, now).unwrap();
    let fenced = |result: Result<Producer, TransactionError>| {
        assert!(matches!(result, Err(TransactionError::Fenced { .. })));
    };
    fenced(shard.init("x", 0, Some(old), now));
    fenced(shard.end("x", old, true, now));
    assert!(shard.init("x", 0, Some(new), now).unwrap() > new);
    assert!(matches!(
        shard.end("y", new, true, now),
        Err(TransactionError::Unknown(_))
    ));
}
