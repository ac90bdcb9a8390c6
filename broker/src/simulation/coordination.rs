//! A process in its Cluster: claims and renews its session, watches Leases, stands for controller, elects, and writes what its leaders
//! decide on their ISRs. What production's tasks do around the real [`View`], [`Liveness`], [`Claimant`] and [`elect`], call by call: between a
//! call and its answer anything may happen.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::{coordination::v1::Lease, core::v1::ConfigMap},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use millrace_crds::coordination::{
    BrokerSession, ControllerState, Held, PartitionAssignment, PartitionLease,
};

use super::{
    coverage::Seen,
    kube::{Call, Outcome, name_of},
    process::{Cx, Disk, Pid, Process, Role},
    queue::{Event, Fate},
};
use crate::{
    coordination::{
        api::CALL_TIMEOUT,
        coordinator::{REFUSED_PAUSE, SETTLED, TICK, UNKNOWN_PAUSE},
        election::{LiveBroker, Reason, TopicRules, elect, hand_over},
        liveness::Liveness,
        office::{Office, office},
        replicas::min_in_sync,
        session::Claimant,
        view::{Item, View},
    },
    partition::{PartitionKey, SILENCE},
    replication::{IsrStep, Peer},
};

pub(super) const CLUSTER: &str = "main";
/// As brokers have them unless told otherwise.
const SESSION: Duration = Duration::from_secs(6);
const RENEWAL: Duration = Duration::from_secs(2);
/// A process that stops in order waits so long for others to lead what it leads.
const HANDOVER: Duration = Duration::from_secs(5);

/// What a call is for; its answer is taken in accordingly.
#[derive(Clone, Debug)]
enum Purpose {
    ReadToClaim,
    Claim,
    Renew,
    ReadToRenew,
    Release,
    Stand,
    Elect(Election),
    /// Whether this process is controller still, before it decides what can lose records.
    ConfirmOffice(Election, Box<Lease>),
    /// Of the leader of that epoch.
    ChangeIsr(PartitionKey, i32),
    ReadIsr(PartitionKey, i32),
    /// Whether others hold it still, before what is here is deleted.
    ConfirmLetGo(PartitionKey),
}

#[derive(Clone, Debug)]
struct Election {
    key: PartitionKey,
    /// The version that was to be replaced.
    replaced: Option<String>,
}

/// Whether a write has failed, and what is there instead is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attempt {
    First,
    ReadAfter(Duration),
}

pub(super) struct Coordination {
    claimant: Claimant,
    /// Its session's Lease as it was written last.
    session: Option<Lease>,
    renewed: Option<Instant>,
    view: View,
    liveness: Liveness,
    alive: BTreeMap<i32, LiveBroker>,
    since: BTreeMap<i32, (i32, Instant)>,
    /// The controller epoch, while this process is controller.
    controller: Option<i32>,
    office_renewed: Instant,
    /// Since when no other broker was heard of at this one.
    isolated: Option<Instant>,
    is_standing: bool,
    in_flight: BTreeSet<PartitionKey>,
    resting: BTreeMap<PartitionKey, Instant>,
    is_synced: bool,
    last_event: Instant,
    /// The watch that counts, and the event that comes next in it.
    stream: u64,
    next: usize,
    calls: BTreeMap<u64, (Purpose, Attempt)>,
    call_count: u64,
    stopping: Option<Instant>,
}

fn stamp(cx: &Cx) -> MicroTime {
    let time = jiff::Timestamp::from_millisecond(cx.at as i64);
    MicroTime(time.unwrap_or(jiff::Timestamp::UNIX_EPOCH))
}

impl Coordination {
    pub(super) fn new(pid: Pid, disk: &Disk, record: &ConfigMap) -> Self {
        // Set when it starts.
        let now = Instant::now();
        let pod = format!("broker-{}", pid.broker);
        let mut view = View::default();
        view.apply_record(record);
        Self {
            claimant: Claimant {
                cluster: CLUSTER.to_owned(),
                owner: None,
                session: BrokerSession {
                    broker_id: pid.broker,
                    store_id: disk.store,
                    address: pod.clone(),
                    release: String::new(),
                    draining: false,
                    pod: pod.clone(),
                },
                identity: format!("{pod}/{}", pid.boot),
                duration_seconds: SESSION.as_secs() as i32,
                starts: disk.starts,
                draining: Default::default(),
            },
            session: None,
            renewed: None,
            view,
            liveness: Liveness::new(SESSION, now),
            alive: BTreeMap::new(),
            since: BTreeMap::new(),
            controller: None,
            office_renewed: now,
            isolated: None,
            is_standing: false,
            in_flight: BTreeSet::new(),
            resting: BTreeMap::new(),
            is_synced: false,
            last_event: now,
            stream: 0,
            next: 0,
            calls: BTreeMap::new(),
            call_count: 0,
            stopping: None,
        }
    }

    /// A partition's Lease as it is known.
    pub(super) fn lease(&self, key: PartitionKey) -> Option<PartitionLease> {
        let seen = self.view.partitions().get(&key)?;
        Some(seen.lease.clone())
    }

    /// The brokers that have a session, each with its epoch.
    pub(super) fn sessions(&self) -> BTreeMap<i32, i32> {
        let sessions = self.view.sessions().iter();
        let held = sessions.filter(|(_, seen)| seen.held.holder.is_some());
        held.map(|(id, seen)| (*id, seen.held.epoch)).collect()
    }

    /// Whether it is not known yet what became of an ISR change.
    pub(super) fn is_changing_isr(&self, key: PartitionKey) -> bool {
        let mut calls = self.calls.values();
        calls.any(|(purpose, _)| {
            matches!(purpose, Purpose::ChangeIsr(of, _) | Purpose::ReadIsr(of, _) if *of == key)
        })
    }

    /// Whether no other broker is heard of, and not just at the first look.
    fn is_isolated(&self, now: Instant) -> bool {
        let isolated = self.isolated;
        isolated.is_some_and(|since| now.saturating_duration_since(since) >= TICK)
    }

    fn is_draining(&self) -> bool {
        self.claimant.draining.load(Ordering::Acquire)
    }
}

impl Process {
    fn call(&mut self, purpose: Purpose, attempt: Attempt, call: Call, pause: u64, cx: &mut Cx) {
        let coordination = &mut self.coordination;
        coordination.call_count += 1;
        let number = coordination.call_count;
        coordination.calls.insert(number, (purpose, attempt));
        let bad = cx.rng.u32(0..cx.swarm.api_failures) == 0;
        let is_write = matches!(call, Call::Write(_));
        let fate = match bad.then(|| cx.rng.u32(0..5)) {
            None => Fate::Done,
            Some(0 | 1) => Fate::AnswerLost,
            Some(2) => Fate::Lost,
            Some(3) if is_write => Fate::Refused,
            Some(_) => Fate::Failed,
        };
        let sent = cx.at + pause;
        let until = sent + CALL_TIMEOUT.as_millis() as u64;
        let arrives = sent + cx.swarm.api.draw(cx.rng);
        let from = self.pid;
        let called = Event::Called {
            from,
            number,
            call,
            fate,
            until,
        };
        if !cx.net.without_api.contains(&from.broker) {
            cx.queue.push(arrives, called);
        }
        let outcome = Outcome::Unknown;
        cx.queue.push(
            until,
            Event::Answered {
                to: from,
                number,
                outcome,
            },
        );
    }

    pub(super) fn on_answer(&mut self, number: u64, outcome: Outcome, cx: &mut Cx) {
        let Some((purpose, attempt)) = self.coordination.calls.remove(&number) else {
            return;
        };
        match purpose {
            Purpose::ReadToClaim => self.on_read_to_claim(outcome, cx),
            Purpose::Claim => match self.own_session(&outcome) {
                true => self.on_claimed(outcome, cx),
                false => self.claim(cx),
            },
            Purpose::Renew | Purpose::ReadToRenew => self.on_renewed(purpose, outcome, cx),
            Purpose::Release => self.has_ended = true,
            Purpose::Stand | Purpose::Elect(_) => self.on_written(purpose, attempt, outcome, cx),
            Purpose::ConfirmOffice(election, next) => self.on_office(election, next, outcome, cx),
            Purpose::ChangeIsr(key, epoch) => match outcome {
                Outcome::Conflict => self.read_isr(key, epoch, cx),
                _ => self.on_isr(key, epoch, outcome, cx),
            },
            Purpose::ReadIsr(key, epoch) => self.on_isr(key, epoch, outcome, cx),
            Purpose::ConfirmLetGo(key) => self.on_let_go(key, outcome, cx),
        }
    }

    // Its session.

    pub(super) fn start_coordination(&mut self, cx: &mut Cx) {
        self.coordination.liveness = Liveness::new(SESSION, cx.now);
        self.coordination.office_renewed = cx.now;
        self.coordination.last_event = cx.now;
        self.claim(cx);
    }

    fn claim(&mut self, cx: &mut Cx) {
        let name = self.coordination.claimant.lease_name();
        let read = Call::Read(name);
        self.call(Purpose::ReadToClaim, Attempt::First, read, 0, cx);
    }

    fn own_session(&self, outcome: &Outcome) -> bool {
        let Outcome::Is(Some(lease)) = outcome else {
            return false;
        };
        let read = BrokerSession::read(lease);
        read.is_ok_and(|(_, held)| {
            held.holder.as_deref() == Some(&*self.coordination.claimant.identity)
        })
    }

    fn on_read_to_claim(&mut self, outcome: Outcome, cx: &mut Cx) {
        if self.own_session(&outcome) {
            return self.on_claimed(outcome, cx);
        }
        let Outcome::Is(current) = outcome else {
            return self.claim(cx);
        };
        let current = current.map(|lease| *lease);
        match self.coordination.claimant.claim(current, stamp(cx)) {
            Ok(lease) => {
                let write = Call::Write(Box::new(lease));
                self.call(Purpose::Claim, Attempt::First, write, 0, cx);
            }
            Err(error) => cx
                .oracle
                .fail("a broker can claim its session", || error.to_string()),
        }
    }

    fn on_claimed(&mut self, outcome: Outcome, cx: &mut Cx) {
        let Outcome::Is(Some(lease)) = outcome else {
            return;
        };
        let Ok((_, held)) = BrokerSession::read(&lease) else {
            return;
        };
        self.me.epoch = held.epoch;
        self.coordination.session = Some(*lease);
        self.coordination.renewed = Some(cx.now);
        cx.trace.line(cx.at, || {
            format!("{} is up in epoch {}", self.pid, held.epoch)
        });
        self.list(cx);
    }

    /// Writes the session, or gives it up.
    fn rewrite(&mut self, purpose: Purpose, cx: &mut Cx) {
        let coordination = &mut self.coordination;
        let Some(lease) = coordination.session.clone() else {
            return;
        };
        let next = match purpose {
            Purpose::Release => coordination.claimant.release(lease),
            _ => coordination.claimant.renew(lease, stamp(cx)),
        };
        match next {
            Some(next) => {
                coordination.renewed = Some(cx.now);
                self.call(purpose, Attempt::First, Call::Write(Box::new(next)), 0, cx);
            }
            None => {
                cx.coverage.note(Seen::SessionLost);
                self.has_ended = true;
            }
        }
    }

    fn on_renewed(&mut self, purpose: Purpose, outcome: Outcome, cx: &mut Cx) {
        match outcome {
            Outcome::Is(Some(lease)) => {
                self.coordination.session = Some(*lease);
                if matches!(purpose, Purpose::ReadToRenew) {
                    self.rewrite(Purpose::Renew, cx);
                }
            }
            Outcome::Conflict => {
                let read = Call::Read(self.coordination.claimant.lease_name());
                self.call(Purpose::ReadToRenew, Attempt::First, read, 0, cx);
            }
            // Tried again when it is due.
            _ => {}
        }
    }

    fn is_renewing(&self) -> bool {
        let mut calls = self.coordination.calls.values();
        calls.any(|(purpose, _)| matches!(purpose, Purpose::Renew | Purpose::ReadToRenew))
    }

    /// Stops in order: others are to lead what it leads, and then it gives its session up.
    pub(super) fn begin_stop(&mut self, cx: &mut Cx) {
        if self.coordination.session.is_none() || self.coordination.stopping.is_some() {
            return;
        }
        self.coordination.stopping = Some(cx.now + HANDOVER);
        let draining = &self.coordination.claimant.draining;
        draining.store(true, Ordering::Release);
        self.rewrite(Purpose::Renew, cx);
    }

    // What it sees.

    /// Lists everything, to watch from there on.
    fn list(&mut self, cx: &mut Cx) {
        self.coordination.stream += 1;
        self.coordination.last_event = cx.now;
        let delay = cx.swarm.api.draw(cx.rng);
        let list = Event::List(self.pid, self.coordination.stream);
        cx.queue.push(cx.at + delay, list);
    }

    pub(super) fn is_watching(&self, stream: u64) -> bool {
        self.coordination.stream == stream
    }

    /// The event that comes next in its watch.
    pub(super) fn next_event(&self) -> usize {
        self.coordination.next
    }

    pub(super) fn on_watch_broken(&mut self, cx: &mut Cx) {
        if self.coordination.session.is_some() {
            cx.coverage.note(Seen::WatchBroken);
            self.coordination.liveness.restart(cx.now);
            self.list(cx);
        }
    }

    pub(super) fn on_listed(&mut self, objects: Vec<Lease>, next: usize, cx: &mut Cx) {
        self.coordination.next = next;
        self.coordination.view.begin_list();
        for lease in objects {
            self.on_event(lease, cx);
        }
        let gone = self.coordination.view.end_list();
        gone.into_iter().for_each(|item| self.on_changed(item, cx));
        self.coordination.is_synced = true;
        self.act(cx);
    }

    pub(super) fn on_events(&mut self, events: &[Lease], cx: &mut Cx) {
        self.coordination.next += events.len();
        for lease in events {
            self.on_event(lease.clone(), cx);
        }
    }

    fn on_event(&mut self, lease: Lease, cx: &mut Cx) {
        let coordination = &mut self.coordination;
        coordination.last_event = cx.now;
        coordination.liveness.contact(cx.now);
        let spec = lease.spec.as_ref();
        if spec.is_some_and(|spec| spec.lease_duration_seconds.is_some())
            && let Some(version) = &lease.metadata.resource_version
        {
            let name = name_of(&lease);
            coordination.liveness.observe(&name, version, cx.now);
        }
        self.apply(lease, cx);
    }

    fn apply(&mut self, lease: Lease, cx: &mut Cx) {
        if let Some(item) = self.coordination.view.apply(lease) {
            self.on_changed(item, cx);
        }
    }

    fn on_changed(&mut self, item: Item, cx: &mut Cx) {
        match item {
            Item::Session(_) => self.on_sessions(cx),
            Item::Controller => self.on_controller(cx),
            Item::Partition(key) => {
                let delay = cx.swarm.serve.draw(cx.rng);
                cx.queue.push(cx.at + delay, Event::Serve(self.pid, key));
                self.decide(key, cx);
            }
            Item::Topic(_) | Item::Racks => {}
        }
    }

    fn on_sessions(&mut self, cx: &mut Cx) {
        let sessions = self.coordination.sessions();
        self.set_peers(&sessions, cx);
        self.look_who_is_alive(cx);
    }

    fn look_who_is_alive(&mut self, cx: &mut Cx) {
        let coordination = &mut self.coordination;
        let sessions = coordination.view.sessions().values();
        let held: Vec<_> = sessions.filter(|seen| seen.held.holder.is_some()).collect();
        let name = |id| BrokerSession::lease_name(CLUSTER, id);
        let names: Vec<_> = held.iter().map(|s| name(s.session.broker_id)).collect();
        let expired = coordination
            .liveness
            .expired(names.iter().map(String::as_str), cx.now);
        let live: Vec<_> = held
            .iter()
            .zip(&names)
            .filter(|(seen, name)| {
                let (id, epoch) = (seen.session.broker_id, seen.held.epoch);
                !expired.contains(name.as_str()) && !self.peers.is_refused(id, epoch)
            })
            .map(|(seen, _)| seen)
            .collect();
        coordination.since.retain(|id, (epoch, _)| {
            let mut live = live.iter();
            live.any(|seen| (seen.session.broker_id, seen.held.epoch) == (*id, *epoch))
        });
        let mut alive = BTreeMap::new();
        for seen in live {
            let (id, epoch) = (seen.session.broker_id, seen.held.epoch);
            let (_, since) = *coordination.since.entry(id).or_insert((epoch, cx.now));
            let broker = LiveBroker {
                epoch,
                store: seen.session.store_id,
                pod: seen.session.pod.clone(),
                draining: seen.session.draining,
                settled: cx.now.saturating_duration_since(since) >= SETTLED,
            };
            alive.insert(id, broker);
        }
        if alive != coordination.alive {
            let sessions = alive.iter();
            let sessions = sessions.map(|(id, broker)| (*id, (broker.epoch, broker.draining)));
            self.peers.set_sessions(&sessions.collect(), cx.now);
            coordination.alive = alive;
            self.decide_all(cx);
        }
    }

    // What it does.

    pub(super) fn tick_coordination(&mut self, cx: &mut Cx) {
        let coordination = &self.coordination;
        let renewed = coordination.renewed;
        let is_due = renewed.is_some_and(|at| cx.now.saturating_duration_since(at) >= RENEWAL);
        if is_due && !self.is_renewing() {
            self.rewrite(Purpose::Renew, cx);
        }
        let last_event = self.coordination.last_event;
        if self.coordination.session.is_some()
            && cx.now.saturating_duration_since(last_event) > SESSION
        {
            self.list(cx);
        }
        if self.coordination.is_synced {
            self.act(cx);
        }
        self.tick_stop(cx);
    }

    fn tick_stop(&mut self, cx: &mut Cx) {
        let Some(deadline) = self.coordination.stopping else {
            return;
        };
        let mut hosted = self.hosted.values();
        let leads = hosted.any(|hosted| matches!(hosted.role, Role::Leader(_)));
        let mut calls = self.coordination.calls.values();
        let is_released = calls.any(|(purpose, _)| matches!(purpose, Purpose::Release));
        if (!leads || cx.now >= deadline) && !is_released {
            self.rewrite(Purpose::Release, cx);
        }
    }

    fn act(&mut self, cx: &mut Cx) {
        self.look_who_is_alive(cx);
        let resting = self.coordination.resting.iter();
        let rested = resting.filter(|(_, until)| **until <= cx.now);
        let rested: Vec<_> = rested.map(|(key, _)| *key).collect();
        for key in rested {
            self.coordination.resting.remove(&key);
            self.decide(key, cx);
        }
        self.look_for_isolation(cx);
        let coordination = &self.coordination;
        let is_due = match coordination.controller {
            Some(_) => {
                cx.now
                    .saturating_duration_since(coordination.office_renewed)
                    >= RENEWAL
            }
            None => self.is_vacant(cx.now),
        };
        if is_due && !self.coordination.is_standing {
            self.stand(cx);
        }
    }

    /// A leader that no other broker can reach is of no use, and is the one that knows; so it hands over.
    fn look_for_isolation(&mut self, cx: &mut Cx) {
        if !self.peers.is_isolated(self.me.id, SILENCE, cx.now) {
            self.coordination.isolated = None;
            return;
        }
        let coordination = &mut self.coordination;
        coordination.isolated.get_or_insert(cx.now);
        if coordination.is_isolated(cx.now) {
            let partitions = coordination.view.partitions().keys();
            let due = partitions.filter(|key| !coordination.resting.contains_key(key));
            let due: Vec<_> = due.copied().collect();
            due.into_iter().for_each(|key| self.decide(key, cx));
        }
    }

    fn is_vacant(&self, now: Instant) -> bool {
        let coordination = &self.coordination;
        if coordination.is_draining() {
            return false;
        }
        let Some(controller) = coordination.view.controller() else {
            return true;
        };
        let state = &controller.state;
        let alive = coordination.alive.get(&state.broker_id);
        let gone = alive.is_none_or(|broker| broker.epoch != state.broker_epoch);
        let sessions = coordination.view.sessions();
        controller.held.holder.is_none()
            || (gone && sessions.contains_key(&state.broker_id))
            || coordination
                .liveness
                .is_silent(&ControllerState::lease_name(CLUSTER), now)
    }

    fn stand(&mut self, cx: &mut Cx) {
        let coordination = &mut self.coordination;
        let (mut lease, epoch) = match coordination.view.controller() {
            Some(seen) => (seen.object.clone(), seen.held.epoch),
            None => (Lease::default(), 0),
        };
        let held = Held {
            holder: Some(coordination.claimant.identity.clone()),
            epoch: coordination.controller.unwrap_or(epoch + 1),
            duration_seconds: Some(coordination.claimant.duration_seconds),
            acquired: None,
            renewed: Some(stamp(cx)),
        };
        let state = ControllerState {
            broker_id: self.me.id,
            broker_epoch: self.me.epoch,
        };
        state.write(&mut lease, CLUSTER, held);
        coordination.is_standing = true;
        coordination.office_renewed = cx.now;
        let write = Call::Write(Box::new(lease));
        self.call(Purpose::Stand, Attempt::First, write, 0, cx);
    }

    fn on_controller(&mut self, cx: &mut Cx) {
        let coordination = &mut self.coordination;
        let holder = coordination.view.controller();
        let mine = holder
            .filter(|seen| seen.held.holder.as_deref() == Some(&*coordination.claimant.identity));
        let held = mine.map(|seen| seen.held.epoch);
        match office(coordination.controller, held) {
            Office::Take(epoch) => {
                cx.coverage.note(Seen::ControllerChanged);
                coordination.controller = Some(epoch);
                coordination.office_renewed = cx.now;
                self.decide_all(cx);
            }
            Office::Leave => {
                coordination.controller = None;
                coordination.resting.clear();
            }
            Office::AsBefore => {}
        }
    }

    fn decide_all(&mut self, cx: &mut Cx) {
        let partitions = self.coordination.view.partitions();
        let keys: Vec<_> = partitions.keys().copied().collect();
        keys.into_iter().for_each(|key| self.decide(key, cx));
    }

    /// Elects, if this process is controller, or a leader that can't go on, and another state shall follow.
    fn decide(&mut self, key: PartitionKey, cx: &mut Cx) {
        let coordination = &mut self.coordination;
        if coordination.in_flight.contains(&key) {
            return;
        }
        let Some(seen) = coordination.view.partitions().get(&key) else {
            return;
        };
        let Some(record) = coordination.view.topics().get(&key.0) else {
            return;
        };
        let rules = TopicRules {
            state: record.state,
            min_in_sync: min_in_sync(record),
            unclean: record.config.unclean_leader_election,
        };
        let alive = &coordination.alive;
        let leader = seen.lease.assignment.leader;
        let leads = leader.is_some_and(|l| (l.id, l.broker_epoch) == (self.me.id, self.me.epoch));
        let decided = match coordination.controller {
            _ if leads && coordination.is_isolated(cx.now) => {
                let next = hand_over(&seen.lease, rules, alive, self.me.id);
                next.inspect(|_| cx.coverage.note(Seen::HandedOver))
                    .map(|next| (next, Reason::Clean))
            }
            Some(epoch) => elect(&seen.lease, rules, alive, epoch),
            None => None,
        };
        let Some((next, reason)) = decided else {
            return;
        };
        cx.coverage.note(match reason {
            Reason::Clean if seen.lease.held.epoch == 0 => Seen::ElectedFirst,
            Reason::Clean => Seen::ElectedClean,
            Reason::Preferred => Seen::ElectedPreferred,
            Reason::Unclean => Seen::ElectedUnclean,
            Reason::Offline => Seen::Offline,
        });
        let assignment = &next.assignment;
        if let Some(leader) = assignment.leader
            && !assignment.replicas.contains(&leader.id)
        {
            cx.coverage.note(Seen::ElectedFormer);
        }
        cx.trace.line(cx.at, || {
            let (epochs, isr) = (next.epochs(), &next.assignment.isr);
            let isr: Vec<_> = isr.iter().map(|replica| replica.id).collect();
            let leader = next.assignment.leader.map(|leader| leader.id);
            format!(
                "{} elects {leader:?} {epochs:?} {reason:?} isr {isr:?}",
                self.pid
            )
        });
        let mut object = seen.object.clone();
        next.write(&mut object, CLUSTER);
        coordination.in_flight.insert(key);
        let election = Election {
            key,
            replaced: object.metadata.resource_version.clone(),
        };
        if reason == Reason::Unclean {
            let purpose = Purpose::ConfirmOffice(election, Box::new(object));
            let read = Call::Read(ControllerState::lease_name(CLUSTER));
            self.call(purpose, Attempt::First, read, 0, cx);
        } else {
            let write = Call::Write(Box::new(object));
            self.call(Purpose::Elect(election), Attempt::First, write, 0, cx);
        }
    }

    fn on_office(&mut self, election: Election, next: Box<Lease>, outcome: Outcome, cx: &mut Cx) {
        let mine = match outcome {
            Outcome::Is(Some(lease)) => ControllerState::read(&lease).is_ok_and(|(_, held)| {
                let identity = &self.coordination.claimant.identity;
                Some(held.epoch) == self.coordination.controller
                    && held.holder.as_ref() == Some(identity)
            }),
            _ => false,
        };
        let purpose = Purpose::Elect(election);
        match mine {
            true => self.call(purpose, Attempt::First, Call::Write(next), 0, cx),
            false => self.on_known(purpose, None, REFUSED_PAUSE, cx),
        }
    }

    /// A write of the controller's, or what was read after one that failed.
    fn on_written(&mut self, purpose: Purpose, attempt: Attempt, outcome: Outcome, cx: &mut Cx) {
        if let Attempt::ReadAfter(pause) = attempt {
            let lease = match outcome {
                Outcome::Is(lease) => lease.map(|lease| *lease),
                _ => None,
            };
            return self.on_known(purpose, lease, pause, cx);
        }
        let wait = match outcome {
            Outcome::Is(lease) => {
                let lease = lease.map(|lease| *lease);
                return self.on_known(purpose, lease, Duration::ZERO, cx);
            }
            Outcome::NotFound | Outcome::Refused => {
                return self.on_known(purpose, None, REFUSED_PAUSE, cx);
            }
            Outcome::Conflict => 0,
            Outcome::Unknown => UNKNOWN_PAUSE.as_millis() as u64,
        };
        let name = match &purpose {
            Purpose::Elect(election) => {
                let seen = self.coordination.view.partitions().get(&election.key);
                seen.map(|seen| name_of(&seen.object)).unwrap_or_default()
            }
            _ => ControllerState::lease_name(CLUSTER),
        };
        let after = Attempt::ReadAfter(UNKNOWN_PAUSE);
        self.call(purpose, after, Call::Read(name), wait, cx);
    }

    /// What is there now, if that is known, and how long to wait if it is nothing new.
    fn on_known(
        &mut self,
        purpose: Purpose,
        lease: Option<Lease>,
        mut pause: Duration,
        cx: &mut Cx,
    ) {
        let Purpose::Elect(Election { key, replaced }) = purpose else {
            self.coordination.is_standing = false;
            if let Some(lease) = lease {
                self.apply(lease, cx);
            }
            return;
        };
        self.coordination.in_flight.remove(&key);
        if let Some(lease) = lease {
            if lease.metadata.resource_version != replaced {
                pause = REFUSED_PAUSE;
            }
            self.apply(lease, cx);
        }
        let known = self.coordination.view.partitions().get(&key);
        if known.is_none_or(|seen| seen.object.metadata.resource_version != replaced) {
            self.decide(key, cx);
        } else if self.coordination.controller.is_some() || self.coordination.isolated.is_some() {
            self.coordination.resting.insert(key, cx.now + pause);
        }
    }

    // What it holds no longer.

    /// Asks the API server itself whether others hold what is to be deleted here.
    pub(super) fn confirm_let_go(&mut self, key: PartitionKey, cx: &mut Cx) {
        let mut calls = self.coordination.calls.values();
        if calls.any(|(purpose, _)| matches!(purpose, Purpose::ConfirmLetGo(of) if *of == key)) {
            return;
        }
        let name = PartitionAssignment::new(key.0, key.1, Vec::new()).lease_name(CLUSTER);
        let read = Call::Read(name);
        self.call(Purpose::ConfirmLetGo(key), Attempt::First, read, 0, cx);
    }

    fn on_let_go(&mut self, key: PartitionKey, outcome: Outcome, cx: &mut Cx) {
        let Outcome::Is(Some(lease)) = outcome else {
            cx.queue.push(cx.at + 1_000, Event::Serve(self.pid, key));
            return;
        };
        let read = PartitionLease::read(&lease);
        self.apply(*lease, cx);
        // What is known by now may be newer than what was read.
        match read.is_ok_and(|read| self.coordination.lease(key) == Some(read)) {
            true => self.let_go(key, cx),
            false => cx.queue.push(cx.at, Event::Serve(self.pid, key)),
        }
    }

    // The in-sync replicas of what it leads.

    pub(super) fn ask_leaders(&mut self, cx: &mut Cx) {
        let keys: Vec<_> = self.hosted.keys().copied().collect();
        let now = cx.now;
        let known: BTreeMap<i32, Peer> = (0..cx.swarm.brokers)
            .map(|id| (id, self.peers.get(id)))
            .collect();
        let peers = |id| known.get(&id).copied().unwrap_or_default();
        for key in keys {
            let asked = self.change_leader(key, cx, |leader, _| {
                let step = leader.isr_step(now, peers);
                (leader.in_sync(now, peers), leader.epoch(), step)
            });
            let Some((in_sync, epoch, step)) = asked else {
                continue;
            };
            if let Some(hosted) = self.hosted.get_mut(&key) {
                hosted.in_sync = in_sync;
            }
            if let Some(step) = step {
                self.change_isr(key, epoch, step, cx);
            }
        }
    }

    fn change_isr(&mut self, key: PartitionKey, leads: i32, step: IsrStep, cx: &mut Cx) {
        let Some(seen) = self.coordination.view.partitions().get(&key) else {
            return;
        };
        let epoch = seen.lease.held.epoch;
        let IsrStep::Write(next) = step else {
            return self.read_isr(key, epoch, cx);
        };
        let (_, partition_epoch) = next.epochs();
        if seen.lease.epochs() != (epoch, partition_epoch - 1) || next.held.epoch != epoch {
            // The leader has yet to hear of a newer state.
            let known = seen.lease.clone();
            self.on_isr_state(key, leads, Some(&known), cx);
            return;
        }
        self.note_isr(&seen.lease, &next, cx);
        let mut object = seen.object.clone();
        next.write(&mut object, CLUSTER);
        let purpose = Purpose::ChangeIsr(key, epoch);
        let write = Call::Write(Box::new(object));
        self.call(purpose, Attempt::First, write, 0, cx);
    }

    fn note_isr(&self, known: &PartitionLease, next: &PartitionLease, cx: &mut Cx) {
        let (old, new) = (&known.assignment.isr, &next.assignment.isr);
        if old == new {
            cx.coverage.note(Seen::Fenced);
        }
        if new.iter().any(|n| old.iter().all(|o| o.id != n.id)) {
            cx.coverage.note(Seen::IsrGrown);
        }
        if old.iter().any(|o| new.iter().all(|n| o.id != n.id)) {
            cx.coverage.note(Seen::IsrShrunk);
        }
        if new
            .iter()
            .any(|n| old.iter().any(|o| o.id == n.id && o != n))
        {
            cx.coverage.note(Seen::StoreReplaced);
        }
        cx.trace.line(cx.at, || {
            let ids = |isr: &[millrace_crds::coordination::Replica]| -> Vec<i32> {
                isr.iter().map(|replica| replica.id).collect()
            };
            let (old, new) = (ids(old), ids(new));
            format!(
                "{} proposes {:?} isr {old:?} to {new:?}",
                self.pid,
                next.epochs()
            )
        });
    }

    fn read_isr(&mut self, key: PartitionKey, epoch: i32, cx: &mut Cx) {
        let Some(seen) = self.coordination.view.partitions().get(&key) else {
            return;
        };
        let read = Call::Read(name_of(&seen.object));
        self.call(Purpose::ReadIsr(key, epoch), Attempt::First, read, 0, cx);
    }

    fn on_isr(&mut self, key: PartitionKey, epoch: i32, outcome: Outcome, cx: &mut Cx) {
        match outcome {
            Outcome::Is(Some(lease)) => {
                let Ok(state) = PartitionLease::read(&lease) else {
                    return;
                };
                self.apply(*lease, cx);
                self.on_isr_state(key, epoch, Some(&state), cx);
            }
            Outcome::Is(None) | Outcome::NotFound | Outcome::Refused => {
                let now = cx.now;
                self.change_leader(key, cx, |leader, _| {
                    if leader.epoch() == epoch {
                        leader.on_isr_refused(now);
                    }
                });
            }
            Outcome::Conflict | Outcome::Unknown => {
                cx.coverage.note(Seen::IsrUnknown);
                self.on_isr_state(key, epoch, None, cx);
            }
        }
    }

    fn on_isr_state(
        &mut self,
        key: PartitionKey,
        epoch: i32,
        state: Option<&PartitionLease>,
        cx: &mut Cx,
    ) {
        let now = cx.now;
        self.change_leader(key, cx, |leader, _| {
            if leader.epoch() == epoch {
                leader.on_isr_answer(state, now);
            }
        });
    }
}
