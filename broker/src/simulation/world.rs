//! A run: brokers, an API server, a network, clients and faults, all of them events in one queue, drawn from one seed. After each event the
//! oracle is asked; in the end everything heals, and has to be well again before long.

use std::{
    collections::BTreeSet,
    sync::LazyLock,
    time::{Duration, Instant},
};

use fastrand::Rng;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::ConfigMap};
use millrace_crds::{
    Topic, TopicConfig,
    coordination::{
        ControllerState, PartitionAssignment, PartitionLease, Replica, TopicRecord, TopicState,
    },
};
use uuid::Uuid;

use super::{
    clients::{Consumer, Producer},
    coordination::CLUSTER,
    coverage::{Coverage, Seen},
    kube::{Call, Kube, Outcome},
    net::{Ends, Net, Way},
    oracle::{Oracle, Violation},
    process::{Cx, Disk, Fetched, Pid, Process, Produce, Produced},
    queue::{Event, Fate, Queue},
    swarm::Swarm,
    trace::Trace,
};
use crate::partition::PartitionKey;

const TOPIC: Uuid = Uuid::from_u128(1);
/// A run of more events goes round in circles.
const EVENTS: u64 = 2_000_000;

/// Instants can't be made from nothing: all are offsets from this one.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// A node, its volume and its pod.
pub(super) struct Node {
    /// `None` while a process has it.
    pub(super) disk: Option<Disk>,
    pub(super) process: Option<Process>,
    /// How far its clock is ahead, in milliseconds, and how fast it goes, in thousandths.
    pub(super) ahead: u64,
    pub(super) rate: u64,
    pub(super) paused_until: u64,
    /// What came while it stood still.
    pub(super) held: Vec<Event>,
    /// Its watch brings nothing until then.
    pub(super) stalled_until: u64,
    pub(super) boots: u64,
}

impl Node {
    /// What its clock says.
    fn clock(&self, at: u64) -> u64 {
        self.ahead + at * self.rate / 1000
    }

    /// Its clock goes as fast as all others from now on.
    pub(super) fn mend_clock(&mut self, at: u64) {
        self.ahead = self.clock(at) - at;
        self.rate = 1000;
    }

    pub(super) fn disk(&self) -> Option<&Disk> {
        match &self.process {
            Some(process) => Some(&process.disk),
            None => self.disk.as_ref(),
        }
    }
}

pub(super) struct World {
    pub(super) at: u64,
    pub(super) rng: Rng,
    pub(super) swarm: Swarm,
    pub(super) queue: Queue,
    pub(super) net: Net,
    pub(super) kube: Kube,
    pub(super) nodes: Vec<Node>,
    pub(super) oracle: Oracle,
    pub(super) coverage: Coverage,
    pub(super) trace: Trace,
    pub(super) dirty: BTreeSet<PartitionKey>,
    pub(super) record: ConfigMap,
    pub(super) keys: Vec<PartitionKey>,
    pub(super) producers: Vec<Producer>,
    pub(super) consumers: Vec<Consumer>,
    pub(super) values: u64,
    pub(super) producer_ids: i64,
    pub(super) healed_at: Option<u64>,
    pub(super) is_well: bool,
}

impl World {
    pub(super) fn new(seed: u64, keeps_trace: bool) -> Self {
        let mut rng = Rng::with_seed(seed);
        let swarm = Swarm::draw(&mut rng);
        let keys: Vec<PartitionKey> = (0..swarm.partitions).map(|i| (TOPIC, i)).collect();
        let mut world = Self {
            at: 0,
            record: record(&swarm),
            swarm,
            queue: Queue::default(),
            net: Net::default(),
            kube: Kube::default(),
            nodes: Vec::new(),
            oracle: Oracle::default(),
            coverage: Coverage::default(),
            trace: Trace::default(),
            dirty: BTreeSet::new(),
            keys,
            producers: Vec::new(),
            consumers: Vec::new(),
            values: 0,
            producer_ids: 0,
            healed_at: None,
            is_well: false,
            rng,
        };
        world.trace.is_kept = keeps_trace;
        world.kube.ignores_versions = broken!(WriteAnyVersion);
        world.set_up();
        world
    }

    fn set_up(&mut self) {
        for _ in 0..self.swarm.brokers {
            let node = Node {
                disk: Some(self.new_disk()),
                process: None,
                ahead: self.rng.u64(1_000_000..2_000_000),
                rate: self
                    .rng
                    .choice([500, 900, 1000, 1000, 1100, 2000])
                    .unwrap_or(1000),
                paused_until: 0,
                held: Vec::new(),
                stalled_until: 0,
                boots: 0,
            };
            self.nodes.push(node);
        }
        for (_, index) in self.keys.clone() {
            let replicas = self.placement();
            let lease = PartitionLease {
                assignment: PartitionAssignment::new(TOPIC, index, replicas),
                held: Default::default(),
            };
            let mut object = Lease::default();
            lease.write(&mut object, CLUSTER);
            self.kube.call(Call::Write(Box::new(object)));
        }
        for id in 0..self.swarm.brokers {
            let at = self.rng.u64(0..1_000);
            self.queue.push(at, Event::Restart(id));
        }
        for index in 0..self.swarm.producers {
            let key = self.keys[self.rng.usize(0..self.keys.len())];
            let id = match self.rng.u32(0..8) {
                0 => -1,
                _ => self.new_producer_id(),
            };
            let all = self.rng.u32(0..5) > 0;
            self.producers.push(Producer::new(key, id, all));
            self.queue.push(500, Event::Producer(index));
        }
        for index in 0..self.swarm.consumers {
            let key = self.keys[self.rng.usize(0..self.keys.len())];
            self.consumers.push(Consumer {
                key,
                next: 0,
                epoch: 0,
            });
            self.queue.push(500, Event::Consumer(index));
        }
        self.queue.push(2_000, Event::Fault);
        self.queue.push(self.swarm.chaos, Event::Heal);
    }

    pub(super) fn new_disk(&mut self) -> Disk {
        Disk {
            store: Uuid::from_u128(self.rng.u128(..)),
            starts: 0,
            logs: Default::default(),
        }
    }

    pub(super) fn new_producer_id(&mut self) -> i64 {
        self.producer_ids += 1;
        self.producer_ids
    }

    /// Replicas for a partition, the preferred one first.
    pub(super) fn placement(&mut self) -> Vec<i32> {
        let mut ids: Vec<i32> = (0..self.swarm.brokers).collect();
        self.rng.shuffle(&mut ids);
        ids.truncate(self.swarm.replication);
        ids
    }

    /// Runs to the end, or to the first thing that must not happen.
    pub(super) fn run(&mut self) -> Option<Violation> {
        for _ in 0..EVENTS {
            let Some((at, event)) = self.queue.pop() else {
                break;
            };
            self.at = at;
            if let Some(node) = self.paused(&event) {
                node.held.push(event);
                continue;
            }
            self.trace.hash((at, std::mem::discriminant(&event)));
            self.on_event(event);
            self.end_processes();
            self.look();
            if self.oracle.violation.is_some() || self.is_well {
                self.trace.hash(self.rng.get_seed());
                return self.oracle.violation.take();
            }
        }
        self.oracle
            .fail("a run ends", || "it goes round in circles".to_owned());
        self.oracle.violation.take()
    }

    /// What the event is for, if that stands still.
    fn paused(&mut self, event: &Event) -> Option<&mut Node> {
        let broker = match event {
            Event::Tick(pid) | Event::Serve(pid, _) | Event::Reset(pid, _) => pid.broker,
            Event::Synced { pid, .. }
            | Event::Listed { pid, .. }
            | Event::Watch(pid, _)
            | Event::Connected { pid, .. }
            | Event::Answered { to: pid, .. } => pid.broker,
            Event::Request(session, _) => self.net.ends(*session)?.leader.broker,
            Event::Response(session, _) => self.net.ends(*session)?.follower.broker,
            Event::Produce(broker, _) | Event::Fetch { broker, .. } => *broker,
            _ => return None,
        };
        let node = &mut self.nodes[broker as usize];
        (node.paused_until > self.at).then_some(node)
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Tick(pid) => self.with(pid, |process, cx| process.on_tick(cx)),
            Event::Serve(pid, key) => {
                self.note_stale(pid, key);
                self.with(pid, |process, cx| process.serve(key, cx));
            }
            Event::Synced {
                pid,
                key,
                sync,
                session,
            } => self.with(pid, |process, cx| process.on_synced(key, sync, session, cx)),
            Event::Called {
                from,
                number,
                call,
                fate,
                until,
            } => self.on_call((from, number), call, fate, until),
            Event::Answered {
                to,
                number,
                outcome,
            } => {
                if !self.net.without_api.contains(&to.broker) || matches!(outcome, Outcome::Unknown)
                {
                    self.with(to, |process, cx| process.on_answer(number, outcome, cx));
                }
            }
            Event::List(pid, stream) => self.on_list(pid, stream),
            Event::Listed {
                pid,
                stream,
                objects,
                next,
            } => {
                if !self.reaches_api(pid.broker) {
                    self.queue.push(self.at + 500, Event::List(pid, stream));
                } else if self.is_watching(pid, stream) {
                    self.with(pid, |process, cx| process.on_listed(objects, next, cx));
                    self.queue.push(self.at, Event::Watch(pid, stream));
                }
            }
            Event::Watch(pid, stream) => self.on_watch(pid, stream),
            Event::Connect {
                from,
                store,
                to,
                epoch,
            } => self.on_connect((from, store), to, epoch),
            Event::Connected {
                pid,
                leader,
                epoch,
                session,
            } => self.with(pid, |process, cx| {
                process.on_connected((leader, epoch), session, cx)
            }),
            Event::Request(session, request) => {
                if let Some(ends) = self.net.ends(session) {
                    self.with(ends.leader, |process, cx| {
                        process.on_request(session, ends.store, request, cx)
                    });
                }
            }
            Event::Response(session, response) => {
                if let Some(ends) = self.net.ends(session) {
                    self.with(ends.follower, |process, cx| {
                        process.on_response(session, response, cx)
                    });
                }
            }
            Event::Reset(pid, session) => {
                self.with(pid, |process, cx| process.on_reset(session, cx));
                self.net.close(session);
            }
            Event::Producer(index) => self.on_producer(index),
            Event::Produce(broker, request) => {
                if let Some(pid) = self.process_of(broker) {
                    self.note_deposed(pid, request.key);
                    self.with(pid, |process, cx| process.on_produce(request, cx));
                }
            }
            Event::Acknowledged(key, value, base) => {
                let mut not_before = self.producers.iter();
                let not_before = not_before.find_map(|producer| producer.not_before(value));
                let not_before = not_before.unwrap_or(0);
                self.oracle.on_acknowledged(key, value, base, not_before);
            }
            Event::Produced(request, answer) => self.on_produced(request, answer),
            Event::Consumer(index) => self.on_consumer(index),
            Event::Fetch {
                consumer,
                broker,
                key,
                offset,
                epoch,
            } => self.on_fetch(consumer, broker, key, (offset, epoch)),
            Event::Fetched {
                consumer,
                key,
                offset,
                by,
                epoch,
                fetched,
            } => self.on_fetched(consumer, key, offset, (by, epoch), fetched),
            Event::Fault => self.on_fault(),
            Event::Restart(broker) => self.restart(broker),
            Event::Resume(broker) => self.resume(broker),
            Event::ApiBack => self.kube.down = false,
            Event::Heal => self.heal(),
            Event::LookWhetherHealed => self.look_whether_healed(),
        }
    }

    /// Has a process do something, if it is there still.
    pub(super) fn with(&mut self, pid: Pid, act: impl FnOnce(&mut Process, &mut Cx)) {
        let node = &mut self.nodes[pid.broker as usize];
        let now = *START + Duration::from_millis(node.clock(self.at));
        let Some(process) = node.process.as_mut().filter(|process| process.pid == pid) else {
            return;
        };
        let mut cx = Cx {
            at: self.at,
            now,
            rng: &mut self.rng,
            queue: &mut self.queue,
            net: &mut self.net,
            oracle: &mut self.oracle,
            coverage: &mut self.coverage,
            trace: &mut self.trace,
            swarm: &self.swarm,
            dirty: &mut self.dirty,
        };
        act(process, &mut cx);
    }

    pub(super) fn process_of(&self, broker: i32) -> Option<Pid> {
        let process = self.nodes[broker as usize].process.as_ref()?;
        Some(process.pid)
    }

    fn is_up(&self, pid: Pid) -> bool {
        self.process_of(pid.broker) == Some(pid)
    }

    // The API server.

    fn reaches_api(&self, broker: i32) -> bool {
        !self.kube.down && !self.net.without_api.contains(&broker)
    }

    fn on_call(&mut self, (from, number): (Pid, u64), call: Call, fate: Fate, until: u64) {
        // A request that has left arrives, whatever became of who sent it.
        if self.kube.down || fate == Fate::Lost {
            return;
        }
        let outcome = match fate {
            Fate::Refused => Outcome::Refused,
            Fate::Failed => Outcome::Unknown,
            _ => self.write_or_read(call.clone()),
        };
        match (&outcome, &call) {
            (Outcome::Refused, _) => self.coverage.note(Seen::Refused),
            (Outcome::Conflict, _) => self.coverage.note(Seen::Conflict),
            (Outcome::Is(_), Call::Write(_)) => {
                if self.at > until {
                    self.coverage.note(Seen::LateWrite);
                }
                if fate == Fate::AnswerLost {
                    self.coverage.note(Seen::AnswerLost);
                }
            }
            _ => {}
        }
        if fate == Fate::AnswerLost {
            return;
        }
        let at = self.at + self.swarm.api.draw(&mut self.rng);
        let to = from;
        self.queue.push(
            at,
            Event::Answered {
                to,
                number,
                outcome,
            },
        );
    }

    pub(super) fn write_or_read(&mut self, call: Call) -> Outcome {
        let new = match &call {
            Call::Write(lease) => PartitionLease::read(lease).ok(),
            Call::Read(_) => None,
        };
        let Some(new) = new else {
            let before = self.controller_epoch();
            let outcome = self.kube.call(call);
            self.oracle
                .on_controller_epoch(before, self.controller_epoch());
            return outcome;
        };
        let key = (new.assignment.topic_id, new.assignment.partition);
        let old = self.lease(key);
        let outcome = self.kube.call(call);
        if let Outcome::Is(_) = outcome {
            self.trace
                .hash((new.epochs(), new.assignment.leader, &new.assignment.isr));
            self.trace.line(self.at, || {
                let isr = new.assignment.isr.iter();
                let isr: Vec<_> = isr.map(|replica| replica.id).collect();
                let (epochs, leader) = (new.epochs(), new.assignment.leader);
                let replicas = &new.assignment.replicas;
                format!(
                    "Lease {} {epochs:?} {leader:?} isr {isr:?} of {replicas:?}",
                    key.1
                )
            });
            self.oracle.on_lease(key, old.as_ref(), &new);
            self.dirty.insert(key);
        }
        outcome
    }

    fn controller_epoch(&self) -> Option<i32> {
        let lease = self.kube.get(&ControllerState::lease_name(CLUSTER))?;
        lease.spec.as_ref()?.lease_transitions
    }

    pub(super) fn lease(&self, key: PartitionKey) -> Option<PartitionLease> {
        let name = PartitionAssignment::new(key.0, key.1, Vec::new()).lease_name(CLUSTER);
        PartitionLease::read(self.kube.get(&name)?).ok()
    }

    fn is_watching(&self, pid: Pid, stream: u64) -> bool {
        let process = self.nodes[pid.broker as usize].process.as_ref();
        process.is_some_and(|process| process.pid == pid && process.is_watching(stream))
    }

    fn on_list(&mut self, pid: Pid, stream: u64) {
        if !self.is_watching(pid, stream) {
            return;
        }
        if !self.reaches_api(pid.broker) {
            self.queue.push(self.at + 500, Event::List(pid, stream));
            return;
        }
        let (objects, next) = match self.swarm.has_stale_lists && self.healed_at.is_none() {
            true => self.kube.list_before(self.rng.usize(0..60)),
            false => self.kube.list(),
        };
        let at = self.at + self.swarm.api.draw(&mut self.rng);
        self.queue.push(
            at,
            Event::Listed {
                pid,
                stream,
                objects,
                next,
            },
        );
    }

    fn on_watch(&mut self, pid: Pid, stream: u64) {
        if !self.is_watching(pid, stream) {
            return;
        }
        let node = &self.nodes[pid.broker as usize];
        let next = node.process.as_ref().map_or(0, Process::next_event);
        if self.reaches_api(pid.broker) && self.at >= node.stalled_until {
            let events = self.kube.events(next);
            let some = self.rng.usize(0..=events.len());
            let events = events[..some].to_vec();
            self.with(pid, |process, cx| process.on_events(&events, cx));
        }
        let delay = 10 + self.swarm.watch.draw(&mut self.rng);
        self.queue.push(self.at + delay, Event::Watch(pid, stream));
    }

    fn note_stale(&mut self, pid: Pid, key: PartitionKey) {
        let process = self.nodes[pid.broker as usize].process.as_ref();
        let known = process.and_then(|process| process.coordination.lease(key));
        if known.map(|known| known.epochs()) < self.lease(key).map(|lease| lease.epochs()) {
            self.coverage.note(Seen::StaleServe);
        }
    }

    fn note_deposed(&mut self, pid: Pid, key: PartitionKey) {
        let process = self.nodes[pid.broker as usize].process.as_ref();
        let leads_in = process.and_then(|process| process.leads_in(key));
        let newest = self.lease(key).map(|lease| lease.held.epoch);
        if leads_in.is_some() && leads_in < newest {
            self.coverage.note(Seen::SentToDeposed);
        }
    }

    // The network.

    fn on_connect(&mut self, (from, store): (Pid, Replica), to: i32, epoch: i32) {
        let (a, b) = (from.broker, to);
        if self.net.is_cut(a, b) || self.net.is_cut(b, a) || !self.is_up(from) {
            return;
        }
        let session = self.process_of(to).map(|leader| {
            self.net.open(Ends {
                follower: from,
                store,
                leader,
            })
        });
        let at = self.at + self.swarm.network.draw(&mut self.rng);
        let connected = Event::Connected {
            pid: from,
            leader: to,
            epoch,
            session,
        };
        self.queue.push(at, connected);
    }

    /// Ends a session; whoever can still be told sees it, after what is on its way.
    pub(super) fn reset(&mut self, session: u64) {
        let Some(ends) = self.net.ends(session) else {
            return;
        };
        for (way, pid) in [
            (Way::ToLeader, ends.leader),
            (Way::ToFollower, ends.follower),
        ] {
            let at = self.at + self.swarm.network.draw(&mut self.rng);
            if let Some(at) = self.net.arrival(session, way, at, true) {
                self.queue.push(at, Event::Reset(pid, session));
            }
            self.net.lose(session, way);
        }
    }

    // Clients.

    /// Where some broker believes the leader of a partition to be.
    fn find_leader(&mut self, key: PartitionKey) -> Option<i32> {
        let broker = self.rng.usize(0..self.nodes.len());
        let process = self.nodes[broker].process.as_ref()?;
        let lease = process.coordination.lease(key)?;
        lease.assignment.leader.map(|leader| leader.id)
    }

    fn on_producer(&mut self, index: usize) {
        let pace = match self.healed_at {
            Some(_) => 50,
            None => self.rng.u64(1..=self.swarm.pace),
        };
        self.queue.push(self.at + pace, Event::Producer(index));
        let key = self.producers[index].key;
        if self.producers[index].target.is_none() {
            self.producers[index].target = self.find_leader(key);
        }
        let makes = self.healed_at.is_none_or(|healed| self.at < healed + 1_000);
        let (not_before, at) = (self.oracle.acknowledged_end(key), self.at);
        let producer = &mut self.producers[index];
        if makes && producer.in_flight() < self.swarm.in_flight {
            self.values += 1;
            let count = self.rng.i32(1..=self.swarm.batch_records);
            producer.make(self.values, count, not_before, at);
        }
        let Some(target) = producer.target else {
            return;
        };
        let requests = producer.take_due(index, at);
        if requests.len() > 1 {
            // Sent again, perhaps for want of an answer: who knows where the leader is now.
            producer.target = None;
        }
        for request in requests {
            let at = self.at + self.swarm.network.draw(&mut self.rng);
            self.queue.push(at, Event::Produce(target, request));
        }
    }

    fn on_produced(&mut self, request: Produce, answer: Produced) {
        let producer = &mut self.producers[request.client];
        let value = request.batch.value;
        if producer.on_answer(value, answer, self.at) {
            self.coverage.note(Seen::ProducerRenewed);
            let id = self.new_producer_id();
            self.producers[request.client].renew(id);
        }
    }

    fn on_consumer(&mut self, index: usize) {
        let pause = self.rng.u64(20..200);
        self.queue.push(self.at + pause, Event::Consumer(index));
        let Consumer { key, next, epoch } = self.consumers[index];
        if let Some(broker) = self.find_leader(key) {
            let at = self.at + self.swarm.network.draw(&mut self.rng);
            let fetch = Event::Fetch {
                consumer: index,
                broker,
                key,
                offset: next,
                epoch,
            };
            self.queue.push(at, fetch);
        }
    }

    fn on_fetch(
        &mut self,
        consumer: usize,
        broker: i32,
        key: PartitionKey,
        (offset, known): (i64, i32),
    ) {
        let Some(process) = self.nodes[broker as usize].process.as_ref() else {
            return;
        };
        let (epoch, fetched) = process.on_fetch(key, offset, known);
        let at = self.at + self.swarm.network.draw(&mut self.rng);
        let by = process.pid;
        let fetched = Event::Fetched {
            consumer,
            key,
            offset,
            by,
            epoch,
            fetched,
        };
        self.queue.push(at, fetched);
    }

    fn on_fetched(
        &mut self,
        index: usize,
        key: PartitionKey,
        offset: i64,
        (by, epoch): (Pid, i32),
        fetched: Fetched,
    ) {
        let consumer = &mut self.consumers[index];
        if consumer.next != offset || consumer.epoch > epoch {
            return;
        }
        match fetched {
            Fetched::NotLeading => {}
            Fetched::OutOfRange { log_start, log_end } => {
                consumer.epoch = epoch;
                if offset > log_end && !self.oracle.may_have_lost(key) {
                    self.oracle
                        .fail("what was read once is there in later epochs", || {
                            format!("{by} of epoch {epoch} ends at {log_end} before {offset}")
                        });
                }
                self.coverage.note(Seen::ConsumerReset);
                consumer.next = log_start;
            }
            Fetched::Batches(batches) => {
                consumer.epoch = epoch;
                for batch in batches {
                    self.oracle.on_read(key, by, consumer.next, &batch);
                    consumer.next = batch.end();
                }
            }
        }
    }
}

/// The topic as the operator would have recorded it.
fn record(swarm: &Swarm) -> ConfigMap {
    let document = serde_json::json!({
        "apiVersion": "millrace.dev/v1alpha1", "kind": "Topic", "metadata": {"name": "orders"}, "spec": {}
    });
    let topic: Topic = serde_json::from_value(document).expect("the document is a Topic");
    let config = TopicConfig::try_from(&topic).expect("the Topic is legal");
    let record = TopicRecord {
        topic_id: TOPIC,
        namespace: "shop".to_owned(),
        topic: "orders".to_owned(),
        topic_uid: "uid".to_owned(),
        state: TopicState::Active,
        partitions_made: swarm.partitions.unsigned_abs(),
        config: TopicConfig {
            partitions: swarm.partitions.unsigned_abs(),
            replication_factor: swarm.replication as u32,
            min_insync_replicas: Some(swarm.min_isr as u32),
            unclean_leader_election: swarm.unclean,
            ..config
        },
    };
    let mut object = ConfigMap::default();
    record.write(&mut object, CLUSTER);
    object
}
