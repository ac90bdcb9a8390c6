//! The task that watches the Cluster's Leases and acts on what it sees: it keeps the [`View`], has this broker's replicas
//! [follow](super::replicas), stands for controller, and as controller elects leaders.
//!
//! Everything is level-triggered: an event only says what to look at again, and what is written is decided from what is known at that
//! moment. A write that failed, or whose answer was lost, is followed by a read and a fresh decision, never by the same write.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt, Stream, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use k8s_openapi::api::{coordination::v1::Lease, core::v1::ConfigMap};
use kube::{
    Api,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, ListSemantic, watcher},
    },
};
use millrace_crds::coordination::{
    BrokerSession, CLUSTER_LABEL, ControllerState, Held, PartitionAssignment, PartitionLease, Role,
    TopicState,
};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, watch},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use super::{
    api::{ApiError, ClusterApi},
    context::Context,
    election::{LiveBroker, Reason, TopicRules, elect, hand_over},
    liveness::Liveness,
    membership::now,
    office::{Office, office},
    replicas::{Wanted, min_in_sync},
    view::{Item, PartitionKey, SeenSession, View},
};
use crate::{fetching::PeerAddress, partition::SILENCE};

/// Elections that are being written at a time.
const MAX_WRITES: usize = 64;
/// The watches' pauses between attempts.
const MIN_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// How long to leave a Lease alone after a write of unknown outcome, or one that can't succeed for now.
pub(crate) const UNKNOWN_PAUSE: Duration = Duration::from_millis(500);
pub(crate) const REFUSED_PAUSE: Duration = Duration::from_secs(5);
/// A broker that has been alive for so long is given back the leaderships for which it is preferred.
pub(crate) const SETTLED: Duration = Duration::from_secs(10);
/// How often Leases are looked at for having expired.
pub(crate) const TICK: Duration = Duration::from_millis(500);

type Watch<K> = Pin<Box<dyn Stream<Item = watcher::Result<Event<K>>> + Send>>;

/// What a finished write means.
enum Written {
    /// A partition.
    Partition {
        key: PartitionKey,
        /// The version that was to be replaced.
        replaced: Option<String>,
        /// As it is now, if that is known.
        lease: Option<Lease>,
        /// If that is nothing new.
        pause: Duration,
    },
    /// The controller's Lease as it is now, if that is known.
    Controller(Option<Lease>),
}

/// How long sessions last, and how often they are renewed.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Without a change for so long, a session is dead.
    pub duration: Duration,
    /// How often it is renewed.
    pub renewal: Duration,
}

/// What the replicas' task is to look at.
#[derive(Default)]
pub(super) struct Topics {
    view: Mutex<View>,
    changed: Mutex<BTreeMap<Uuid, Changed>>,
    wake: Notify,
}

/// What of a topic is to be looked at again.
enum Changed {
    Whole,
    Partitions(BTreeSet<i32>),
}

impl Topics {
    /// The topics that changed since the last call; waits for one.
    pub(super) async fn changed(&self) -> Vec<Wanted> {
        loop {
            let changed = std::mem::take(&mut *self.changed.lock());
            if !changed.is_empty() {
                let changed = changed.into_iter();
                return changed.map(|(id, what)| self.wanted(id, &what)).collect();
            }
            self.wake.notified().await;
        }
    }

    /// Look at the whole topic again.
    pub(super) fn mark(&self, topic: Uuid) {
        self.changed.lock().insert(topic, Changed::Whole);
        self.wake.notify_one();
    }

    /// Look at the partition again.
    pub(super) fn mark_partition(&self, (topic, index): PartitionKey) {
        let mut changed = self.changed.lock();
        let of_topic = changed.entry(topic);
        let none = || Changed::Partitions(BTreeSet::new());
        if let Changed::Partitions(indexes) = of_topic.or_insert_with(none) {
            indexes.insert(index);
        }
        drop(changed);
        self.wake.notify_one();
    }

    fn wanted(&self, topic_id: Uuid, changed: &Changed) -> Wanted {
        let view = self.view.lock();
        let record = view.topics().get(&topic_id).cloned();
        let is_served = record
            .as_ref()
            .is_some_and(|record| record.state == TopicState::Active);
        let lease = |index: i32| {
            Some((
                index,
                view.partitions().get(&(topic_id, index))?.lease.clone(),
            ))
        };
        // `None` if one of them has no Lease any more.
        let some: Option<BTreeMap<_, _>> = match changed {
            Changed::Partitions(indexes) if is_served => {
                indexes.iter().map(|index| lease(*index)).collect()
            }
            _ => None,
        };
        let is_whole = some.is_none();
        let all = || {
            let all = view.partitions_of(topic_id);
            all.map(|(index, seen)| (index, seen.lease.clone()))
                .collect()
        };
        Wanted {
            topic_id,
            record,
            partitions: some.unwrap_or_else(all),
            is_whole,
            let_go: BTreeSet::new(),
        }
    }

    /// A partition's Lease as it is known, to be replaced.
    pub(super) fn lease(&self, key: PartitionKey) -> Option<(PartitionLease, Lease)> {
        let view = self.view.lock();
        let seen = view.partitions().get(&key)?;
        Some((seen.lease.clone(), seen.object.clone()))
    }

    /// The partitions of topics that are served, as `topic/partition`, of which that is so, given the topic's `min.insync.replicas`.
    pub(super) fn named(&self, is: impl Fn(&PartitionAssignment, usize) -> bool) -> Vec<String> {
        let view = self.view.lock();
        let mut named = Vec::new();
        for ((topic, index), seen) in view.partitions() {
            let record = view.topics().get(topic);
            if let Some(record) = record.filter(|record| record.state == TopicState::Active)
                && is(&seen.lease.assignment, min_in_sync(record))
            {
                named.push(format!("{}/{index}", record.config.name));
            }
        }
        named
    }

    /// Counts the partitions of which that is so.
    pub(super) fn count(&self, is: impl Fn(&PartitionLease) -> bool) -> usize {
        let view = self.view.lock();
        let leases = view.partitions().values();
        leases.filter(|seen| is(&seen.lease)).count()
    }

    /// A partition's Lease was written or read.
    pub(super) fn apply(&self, lease: Lease) {
        if let Some(Item::Partition(key)) = self.view.lock().apply(lease) {
            self.mark_partition(key);
        }
    }
}

/// The task.
pub(super) struct Coordinator {
    context: Arc<Context>,
    liveness: Liveness,
    alive: BTreeMap<i32, LiveBroker>,
    /// Since when each process is seen alive.
    since: BTreeMap<i32, (i32, Instant)>,
    /// The controller epoch, while this process is controller.
    controller: Option<i32>,
    /// Since when no other broker was heard of at this one.
    isolated: Option<Instant>,
    renewed: Instant,
    standing: bool,
    /// Partitions to decide on; those without a leader first.
    pending: BTreeSet<(bool, PartitionKey)>,
    in_flight: BTreeSet<PartitionKey>,
    /// Partitions that can't be written as it seems, and when to try again: they keep no other one waiting.
    resting: BTreeMap<PartitionKey, Instant>,
    writes: FuturesUnordered<BoxFuture<'static, Written>>,
    /// The lists that have been seen whole.
    synced: (bool, bool),
    ready: watch::Sender<bool>,
    last_event: Instant,
    /// Since when more of a list of topics is waited for.
    listing_topics: Option<Instant>,
}

impl Coordinator {
    /// A task for this process, which has claimed its session.
    pub(super) fn new(context: Arc<Context>, ready: watch::Sender<bool>) -> Self {
        let now = Instant::now();
        Self {
            liveness: Liveness::new(context.timing.duration, now),
            context,
            alive: BTreeMap::new(),
            since: BTreeMap::new(),
            controller: None,
            isolated: None,
            renewed: now,
            standing: false,
            pending: BTreeSet::new(),
            in_flight: BTreeSet::new(),
            resting: BTreeMap::new(),
            writes: FuturesUnordered::new(),
            synced: (false, false),
            ready,
            last_event: now,
            listing_topics: Some(now),
        }
    }

    /// Runs until stopped. If this process is controller then, it gives that up first, so that another takes over at once.
    pub(super) async fn run(mut self, stop: CancellationToken) {
        let cluster = self.context.claimant.cluster.clone();
        let peers = self.context.peers.clone();
        // One watch of all Leases: this broker's own renewals come through it, so that its silence tells that it is broken.
        let selector = format!("{}={cluster}", CLUSTER_LABEL);
        let records_selector = Role::selector_of(&[Role::Topic, Role::Racks], &cluster);
        let mut leases = watch(self.context.api.leases(), &selector);
        let mut records = watch(self.context.api.records(), &records_selector);
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                event = leases.next() => match event {
                    Some(Ok(event)) => self.on_lease(event),
                    Some(Err(error)) => {
                        warn!(%error, "the watch of Leases broke; trying again");
                        self.liveness.restart(Instant::now());
                    }
                    None => leases = watch(self.context.api.leases(), &selector),
                },
                event = records.next() => match event {
                    Some(Ok(event)) => self.on_record(event),
                    Some(Err(error)) => warn!(%error, "the watch of topics broke; trying again"),
                    None => records = watch(self.context.api.records(), &records_selector),
                },
                Some(written) = self.writes.next() => self.on_written(written),
                () = peers.changed() => self.on_tick(),
                _ = ticks.tick() => {
                    if self.is_silent() {
                        // A connection that died without a word.
                        self.last_event = Instant::now();
                        self.listing_topics = Some(self.last_event);
                        leases = watch(self.context.api.leases(), &selector);
                        records = watch(self.context.api.records(), &records_selector);
                    }
                    self.on_tick();
                }
            }
            self.write_elections();
        }
        self.step_down().await;
    }

    /// Whether not even this broker's renewals come through, or no list of topics that was asked for.
    fn is_silent(&self) -> bool {
        let limit = self
            .context
            .timing
            .duration
            .max(3 * self.context.timing.renewal);
        let waits = self.listing_topics.map(|since| since.elapsed());
        self.last_event.elapsed() > limit || waits.is_some_and(|waits| waits > limit)
    }

    fn on_lease(&mut self, event: Event<Lease>) {
        let now = Instant::now();
        self.last_event = now;
        self.liveness.contact(now);
        match event {
            Event::Init => self.context.topics.view.lock().begin_list(),
            Event::InitApply(lease) | Event::Apply(lease) => {
                self.observe(&lease, now);
                let changed = self.context.topics.view.lock().apply(lease);
                self.on_changed(changed);
            }
            Event::InitDone => {
                let gone = self.context.topics.view.lock().end_list();
                self.on_changed(gone);
                self.synced.0 = true;
                self.on_synced();
            }
            Event::Delete(lease) => {
                self.liveness
                    .forget(lease.metadata.name.as_deref().unwrap_or_default());
                let changed = self.context.topics.view.lock().delete(&lease);
                self.on_changed(changed);
            }
        }
    }

    /// Only Leases that are renewed are observed.
    fn observe(&mut self, lease: &Lease, now: Instant) {
        let renewed = lease
            .spec
            .as_ref()
            .is_some_and(|spec| spec.lease_duration_seconds.is_some());
        if let (true, Some(name), Some(version)) = (
            renewed,
            &lease.metadata.name,
            &lease.metadata.resource_version,
        ) {
            self.liveness.observe(name, version, now);
        }
    }

    fn on_record(&mut self, event: Event<ConfigMap>) {
        let listed = matches!(event, Event::InitDone);
        match event {
            Event::Init | Event::InitApply(_) => self.listing_topics = Some(Instant::now()),
            Event::InitDone => self.listing_topics = None,
            Event::Apply(_) | Event::Delete(_) => {}
        }
        let changed = {
            let mut view = self.context.topics.view.lock();
            match event {
                Event::Init => {
                    view.begin_record_list();
                    Vec::new()
                }
                Event::InitApply(record) | Event::Apply(record) => {
                    view.apply_record(&record).into_iter().collect()
                }
                Event::InitDone => view.end_record_list(),
                Event::Delete(record) => view.delete_record(&record).into_iter().collect(),
            }
        };
        self.on_changed(changed);
        if listed {
            self.synced.1 = true;
            self.on_synced();
        }
    }

    fn on_changed(&mut self, items: impl IntoIterator<Item = Item>) {
        for item in items {
            match item {
                Item::Session(_) => self.on_sessions(),
                Item::Racks => {
                    let racks = self.context.topics.view.lock().racks().clone();
                    self.context.directory.set_racks(racks);
                }
                Item::Controller => self.on_controller(),
                Item::Partition(key) => {
                    self.context.topics.mark_partition(key);
                    self.consider(key);
                }
                Item::Topic(id) => {
                    self.context.topics.mark(id);
                    let view = self.context.topics.view.lock();
                    let keys: Vec<_> = view
                        .partitions_of(id)
                        .map(|(index, _)| (id, index))
                        .collect();
                    drop(view);
                    keys.into_iter().for_each(|key| self.consider(key));
                }
            }
        }
    }

    fn on_synced(&mut self) {
        if self.synced == (true, true) {
            self.ready.send_replace(true);
            self.on_tick();
        }
    }

    fn on_sessions(&mut self) {
        let up = self.held_sessions();
        let address = |seen: &SeenSession| seen.session.address.clone();
        let brokers = up
            .iter()
            .map(|seen| (seen.session.broker_id, address(seen)));
        self.context.directory.set_brokers(brokers.collect());
        let peers = up.iter().map(|seen| {
            let peer = PeerAddress {
                epoch: seen.held.epoch,
                address: address(seen),
            };
            (seen.session.broker_id, peer)
        });
        self.context.fetching.set_peers(&peers.collect());
        self.look_who_is_alive();
    }

    /// The sessions of the brokers that have not given theirs up.
    fn held_sessions(&self) -> Vec<SeenSession> {
        let view = self.context.topics.view.lock();
        let sessions = view.sessions().values();
        let held = sessions.filter(|seen| seen.held.holder.is_some());
        held.cloned().collect()
    }

    fn look_who_is_alive(&mut self) {
        let cluster = &self.context.claimant.cluster;
        let now = Instant::now();
        let named = |seen: SeenSession| {
            let name = BrokerSession::lease_name(cluster, seen.session.broker_id);
            (name, seen)
        };
        let held: Vec<_> = self.held_sessions().into_iter().map(named).collect();
        let names = held.iter().map(|(name, _)| name.as_str());
        let expired = self.liveness.expired(names, now);
        let live: Vec<&SeenSession> = held
            .iter()
            .filter(|(name, seen)| {
                let (id, epoch) = (seen.session.broker_id, seen.held.epoch);
                !expired.contains(name.as_str()) && !self.context.peers.is_refused(id, epoch)
            })
            .map(|(_, seen)| seen)
            .collect();
        self.since.retain(|id, (epoch, _)| {
            let same =
                |seen: &&SeenSession| (seen.session.broker_id, seen.held.epoch) == (*id, *epoch);
            live.iter().any(same)
        });
        let mut alive = BTreeMap::new();
        for seen in &live {
            let (id, epoch) = (seen.session.broker_id, seen.held.epoch);
            let (_, since) = *self.since.entry(id).or_insert((epoch, now));
            let broker = LiveBroker {
                epoch,
                store: seen.session.store_id,
                pod: seen.session.pod.clone(),
                draining: seen.session.draining,
                settled: now.duration_since(since) >= SETTLED,
            };
            alive.insert(id, broker);
        }
        if alive != self.alive {
            for id in self.alive.keys().filter(|id| !alive.contains_key(id)) {
                info!(broker = id, "broker is gone");
            }
            self.alive = alive;
            let sessions = self.alive.iter();
            let sessions = sessions.map(|(id, broker)| (*id, (broker.epoch, broker.draining)));
            self.context.peers.set_sessions(&sessions.collect(), now);
            self.consider_all();
        }
    }

    fn on_controller(&mut self) {
        let holder = {
            let view = self.context.topics.view.lock();
            view.controller()
                .and_then(|c| Some((c.held.holder.clone()?, c.held.epoch)))
        };
        let mine = holder.filter(|(holder, _)| *holder == self.context.claimant.identity);
        match office(self.controller, mine.map(|(_, epoch)| epoch)) {
            Office::Take(epoch) => self.take_office(epoch),
            Office::Leave => {
                info!("another broker is controller now");
                self.leave_office();
            }
            Office::AsBefore => {}
        }
        self.on_tick();
    }

    fn take_office(&mut self, epoch: i32) {
        info!(epoch, "this broker is controller");
        self.controller = Some(epoch);
        self.renewed = Instant::now();
        self.context.metrics.set_controller(true);
        self.consider_all();
    }

    fn leave_office(&mut self) {
        self.controller = None;
        self.context.metrics.set_controller(false);
        self.pending.clear();
        self.resting.clear();
    }

    fn on_tick(&mut self) {
        if self.synced != (true, true) {
            return;
        }
        self.look_who_is_alive();
        let now = Instant::now();
        let rested = self.resting.iter().filter(|(_, until)| **until <= now);
        let rested: Vec<_> = rested.map(|(key, _)| *key).collect();
        for key in rested {
            self.resting.remove(&key);
            self.consider(key);
        }
        self.look_for_isolation(now);
        let due = match self.controller {
            Some(_) => self.renewed.elapsed() >= self.context.timing.renewal,
            None => self.is_vacant(),
        };
        if due && !self.standing {
            self.stand();
        }
    }

    /// A leader that no other broker can reach is of no use, though its session is alive. It is the one that knows; so it hands over.
    fn look_for_isolation(&mut self, now: Instant) {
        if !self
            .context
            .peers
            .is_isolated(self.context.me.id, SILENCE, now)
        {
            self.isolated = None;
            return;
        }
        self.isolated.get_or_insert(now);
        if !self.is_isolated() {
            return;
        }
        let view = self.context.topics.view.lock();
        let led = view
            .partitions()
            .iter()
            .filter(|(key, seen)| self.leads(&seen.lease) && !self.resting.contains_key(*key));
        let led: Vec<_> = led.map(|(key, _)| (true, *key)).collect();
        drop(view);
        self.pending.extend(led);
    }

    /// Not at the first look: this process may just have been stopped for a while.
    fn is_isolated(&self) -> bool {
        self.isolated.is_some_and(|since| since.elapsed() >= TICK)
    }

    /// Whether this process leads as the Lease says.
    fn leads(&self, lease: &PartitionLease) -> bool {
        let me = self.context.me;
        let leader = lease.assignment.leader;
        leader.is_some_and(|leader| (leader.id, leader.broker_epoch) == (me.id, me.epoch))
    }

    /// Whether no live process is controller.
    fn is_vacant(&self) -> bool {
        let view = self.context.topics.view.lock();
        let Some(controller) = view.controller() else {
            return true;
        };
        let name = ControllerState::lease_name(&self.context.claimant.cluster);
        let state = &controller.state;
        let gone = self
            .alive
            .get(&state.broker_id)
            .is_none_or(|broker| broker.epoch != state.broker_epoch);
        controller.held.holder.is_none()
            || (gone && view.sessions().contains_key(&state.broker_id))
            || self.liveness.is_silent(&name, Instant::now())
    }

    /// Writes this process into the controller's Lease: to become controller, or to renew it.
    fn stand(&mut self) {
        let (mut lease, epoch) = match self.context.topics.view.lock().controller() {
            Some(seen) => (seen.object.clone(), seen.held.epoch),
            None => (Lease::default(), 0),
        };
        let time = now();
        let held = Held {
            holder: Some(self.context.claimant.identity.clone()),
            epoch: self.controller.unwrap_or(epoch + 1),
            duration_seconds: Some(self.context.claimant.duration_seconds),
            acquired: match self.controller {
                Some(_) => lease
                    .spec
                    .as_ref()
                    .and_then(|spec| spec.acquire_time.clone()),
                None => Some(time.clone()),
            },
            renewed: Some(time),
        };
        lease.metadata.owner_references =
            self.context.claimant.owner.clone().map(|owner| vec![owner]);
        let state = ControllerState {
            broker_id: self.context.me.id,
            broker_epoch: self.context.me.epoch,
        };
        state.write(&mut lease, &self.context.claimant.cluster, held);
        self.standing = true;
        self.renewed = Instant::now();
        let api = self.context.api.clone();
        let write = async move {
            let (lease, pause) = write_or_read(&api, &lease).await;
            if lease.is_none() {
                tokio::time::sleep(pause).await;
            }
            Written::Controller(lease)
        };
        self.writes.push(write.boxed());
    }

    fn consider_all(&mut self) {
        if self.controller.is_none() {
            return;
        }
        let view = self.context.topics.view.lock();
        let keys = view.partitions().iter();
        self.pending = keys
            .map(|(key, seen)| (seen.lease.assignment.leader.is_some(), *key))
            .collect();
    }

    fn consider(&mut self, key: PartitionKey) {
        if self.controller.is_some() {
            self.pending.insert((true, key));
        }
    }

    /// Decides on what is pending, as far as there is room for writes.
    fn write_elections(&mut self) {
        while self.in_flight.len() < MAX_WRITES {
            let Some((_, key)) = self.pending.pop_first() else {
                return;
            };
            if self.in_flight.contains(&key) {
                // It is looked at again when that write is done.
                continue;
            }
            let Some((next, reason)) = self.decide(key) else {
                continue;
            };
            let epoch = self.controller;
            self.in_flight.insert(key);
            let context = self.context.clone();
            let write = async move {
                let replaced = next.metadata.resource_version.clone();
                let (lease, pause) = match reason {
                    Reason::Unclean if !is_controller(&context, epoch).await => {
                        (None, REFUSED_PAUSE)
                    }
                    _ => write_or_read(&context.api, &next).await,
                };
                Written::Partition {
                    key,
                    replaced,
                    lease,
                    pause,
                }
            };
            self.writes.push(write.boxed());
        }
    }

    /// As controller; or as a leader that can't go on.
    fn decide(&self, key: PartitionKey) -> Option<(Lease, Reason)> {
        let view = self.context.topics.view.lock();
        let seen = view.partitions().get(&key)?;
        let record = view.topics().get(&key.0)?;
        let rules = TopicRules {
            state: record.state,
            min_in_sync: min_in_sync(record),
            unclean: record.config.unclean_leader_election,
        };
        let (mut next, reason) = if self.is_isolated() && self.leads(&seen.lease) {
            let next = hand_over(&seen.lease, rules, &self.alive, self.context.me.id)?;
            warn!(topic = record.config.name, partition = key.1, to = ?next.assignment.leader, "no other broker is heard of at this one, though they are alive: the partition is handed over");
            (next, Reason::Clean)
        } else {
            elect(&seen.lease, rules, &self.alive, self.controller?)?
        };
        if reason == Reason::Unclean {
            self.context.metrics.elected_uncleanly();
            warn!(topic = record.config.name, partition = key.1, leader = ?next.assignment.leader, "no replica that was in sync is left: one that may lack acknowledged records leads, as the topic allows");
        }
        if next.assignment.leader.is_some() {
            self.context.metrics.elected();
            next.held.acquired = Some(now());
        }
        next.held.renewed = Some(now());
        let mut object = seen.object.clone();
        next.write(&mut object, &self.context.claimant.cluster);
        Some((object, reason))
    }

    fn on_written(&mut self, written: Written) {
        match written {
            Written::Controller(lease) => {
                self.standing = false;
                if let Some(lease) = lease {
                    let changed = self.context.topics.view.lock().apply(lease);
                    self.on_changed(changed);
                }
            }
            Written::Partition {
                key,
                replaced,
                lease,
                mut pause,
            } => {
                self.in_flight.remove(&key);
                if let Some(lease) = lease {
                    if lease.metadata.resource_version != replaced {
                        // If the view refuses it: an older state was put back, and stays.
                        pause = REFUSED_PAUSE;
                    }
                    self.context.topics.apply(lease);
                }
                let known = self.context.topics.lease(key);
                if known.is_none_or(|(_, object)| object.metadata.resource_version != replaced) {
                    self.consider(key);
                } else if self.controller.is_some() || self.isolated.is_some() {
                    // The same decision would be written on the same state, and fare the same.
                    self.resting.insert(key, Instant::now() + pause);
                }
            }
        }
    }

    async fn step_down(mut self) {
        if self.controller.is_none() {
            return;
        }
        self.leave_office();
        let controller = self.context.topics.view.lock().controller().cloned();
        let Some(mut seen) = controller else { return };
        seen.held.holder = None;
        seen.state
            .write(&mut seen.object, &self.context.claimant.cluster, seen.held);
        match self.context.api.write(&seen.object).await {
            Ok(_) => info!("this broker has given up being controller"),
            Err(error) => warn!(%error, "being controller can't be given up; it expires by itself"),
        }
    }
}

/// Whether this process is controller in that epoch, as the API server itself has it: what can lose records is not decided on what was
/// true a moment ago.
async fn is_controller(context: &Context, epoch: Option<i32>) -> bool {
    let name = ControllerState::lease_name(&context.claimant.cluster);
    let lease = context.api.lease(&name).await.ok().flatten();
    let held = lease.and_then(|lease| ControllerState::read(&lease).ok());
    held.is_some_and(|(_, held)| {
        Some(held.epoch) == epoch && held.holder.as_deref() == Some(&context.claimant.identity)
    })
}

/// Writes the Lease. If that fails, what is there instead, if that can be known, and how long to wait if it is nothing new.
async fn write_or_read(api: &ClusterApi, lease: &Lease) -> (Option<Lease>, Duration) {
    let name = lease.metadata.name.as_deref().unwrap_or_default();
    match api.write(lease).await {
        Ok(written) => return (Some(written), Duration::ZERO),
        Err(ApiError::Conflict(_)) => {}
        // The watch tells of it, too.
        Err(ApiError::NotFound(_)) => return (None, REFUSED_PAUSE),
        Err(error @ ApiError::Unknown { .. }) => {
            warn!(%error, "a Lease was perhaps not written");
            // Within the write, so that fewer are written to an API server that has too much to do.
            tokio::time::sleep(UNKNOWN_PAUSE).await;
        }
        Err(error @ ApiError::Refused { .. }) => {
            warn!(%error, "a Lease can't be written");
            return (None, REFUSED_PAUSE);
        }
    }
    (api.lease(name).await.ok().flatten(), UNKNOWN_PAUSE)
}

fn watch<K>(api: Api<K>, selector: &str) -> Watch<K>
where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let pauses = backon::ExponentialBuilder::default()
        .with_min_delay(MIN_PAUSE)
        .with_max_delay(MAX_PAUSE)
        .with_jitter()
        .without_max_times();
    // Lists bring what is true now: from an old state a broker that was started again might follow a leader that was deposed.
    let config = watcher::Config::default()
        .list_semantic(ListSemantic::MostRecent)
        .labels(selector);
    watcher(api, config)
        .backoff(watcher::ExponentialBackoff::from(pauses))
        .boxed()
}
