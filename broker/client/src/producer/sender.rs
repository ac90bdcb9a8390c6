//! The producer's background task: drains the accumulator into requests, one link for each broker, and acts on the answers.
//!
//! One task owns all state of sending, so that nothing of it needs a lock. What to do with one partition's units is decided in
//! `lane`, encoding and streams are the links'; here is which partition goes to which broker, and when.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap, HashMap, VecDeque},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use millrace_record::ProducerState;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval_at, sleep_until},
};

use super::{
    Acks, Shared,
    accumulator::{Accumulator, Partition, Readiness},
    batch::{Batch, Unit},
    delivery::Ack,
    lane::{Lane, Verdict, timed_out},
    link::{Answer, Health, Link},
};
use crate::{
    backoff,
    error::{Error, ErrorKind},
    metadata::STALE_LEADER,
    refresh::{Refresh, STUCK},
};

/// How far ahead the sender looks when it has nothing to wait for.
const IDLE: Duration = Duration::from_secs(3600);

/// A partition and its sending state.
struct Seat {
    partition: Arc<Partition>,
    lane: Lane,
    /// Index of the leader.
    leader: Option<usize>,
    /// Where its units in flight are.
    via: Option<usize>,
    /// The broker in whose `ready` it is. Entries in others' are left over from earlier leaders.
    queued: Option<usize>,
    /// Whether to send the open batch although it isn't due.
    force: bool,
    /// The earliest entry among the timers.
    timer: Option<Instant>,
    /// The number of the transaction that the partition is part of; 0: none.
    joined: u64,
}

struct Broker {
    requests: mpsc::Sender<Vec<Unit>>,
    moved: Arc<Notify>,
    in_flight: usize,
    ready: VecDeque<usize>,
    failures: u32,
    not_before: Option<Instant>,
    /// Until then it counts as one that leaves requests unanswered.
    stuck_until: Option<Instant>,
}

/// The outcome of work beside sending.
enum Side {
    Refreshed(Result<(), Error>),
    Identity(Result<ProducerState, Error>),
    /// Partitions are part of the transaction of that number.
    Joined(u64, BTreeSet<usize>, Result<(), Error>),
}

pub(crate) struct Sender {
    shared: Arc<Shared>,
    seats: Vec<Seat>,
    brokers: Vec<Broker>,
    by_address: HashMap<Arc<str>, usize>,
    timers: BinaryHeap<Reverse<(Instant, usize)>>,
    answers: (mpsc::Sender<Answer>, mpsc::Receiver<Answer>),
    side: JoinSet<Side>,
    refresh: Refresh,
    identity: Option<ProducerState>,
    identity_wanted: bool,
    /// Partitions that need another producer id.
    outworn: Vec<usize>,
    /// Partitions that have to become part of the transaction, and whether others are doing so.
    joining: BTreeSet<usize>,
    is_joining: bool,
    closing: bool,
    fatal: Option<Error>,
}

impl Sender {
    pub(crate) fn new(shared: Arc<Shared>, identity: Option<ProducerState>) -> Self {
        Sender {
            shared,
            seats: Vec::new(),
            brokers: Vec::new(),
            by_address: HashMap::new(),
            timers: BinaryHeap::new(),
            answers: mpsc::channel(256),
            side: JoinSet::new(),
            refresh: Refresh::default(),
            identity,
            identity_wanted: false,
            outworn: Vec::new(),
            joining: BTreeSet::new(),
            is_joining: false,
            closing: false,
            fatal: None,
        }
    }

    fn accumulator(&self) -> &Accumulator {
        &self.shared.accumulator
    }

    /// Runs until the producer is closed and everything has its outcome, or until it is told to stop.
    pub(crate) async fn run(mut self) {
        let shared = self.shared.clone();
        let look = (shared.accumulator.delivery_timeout / 50)
            .clamp(Duration::from_millis(5), Duration::from_secs(1));
        let mut expiry = interval_at(Instant::now() + look, look);
        expiry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let refresh = shared.client.metadata_refresh();
        let mut upkeep = interval_at(Instant::now() + refresh, refresh);
        upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let now = Instant::now();
            let abort = self.read_news(now);
            if abort || self.fatal.is_some() || (self.closing && shared.accumulator.is_complete()) {
                break;
            }
            self.fire_timers(now);
            self.relieve_pressure(now);
            self.renew_identities(now);
            self.drop_failed();
            self.start_joining(now);
            self.dispatch(now);
            self.start_refresh(now);
            let wake = self.next_wake(now);
            tokio::select! {
                () = shared.accumulator.news.notified() => {}
                Some(answer) = self.answers.1.recv() => {
                    let now = Instant::now();
                    self.on_answer(answer, now);
                    while let Ok(answer) = self.answers.1.try_recv() {
                        self.on_answer(answer, now);
                    }
                }
                Some(done) = self.side.join_next(), if !self.side.is_empty() => match done {
                    Ok(Side::Refreshed(result)) => self.on_refreshed(result, Instant::now()),
                    Ok(Side::Identity(result)) => self.on_identity(result),
                    Ok(Side::Joined(number, slots, result)) => self.on_joined(number, slots, result, Instant::now()),
                    Err(error) => tracing::error!(%error, "a producer's background task failed"),
                },
                () = sleep_until(wake) => {}
                _ = expiry.tick() => self.expire(Instant::now()),
                _ = upkeep.tick() => self.refresh.want(),
            }
        }
        self.finish();
    }

    /// Returns whether to stop at once.
    fn read_news(&mut self, now: Instant) -> bool {
        let news = self.accumulator().read_news();
        for partition in news.partitions {
            self.adopt_new_partitions(partition.slot);
            self.touch(partition.slot, now);
        }
        let closes = news.close && !self.closing;
        self.closing |= news.close;
        if news.flush || closes {
            self.force_all(now);
        }
        news.abort
    }

    fn adopt_new_partitions(&mut self, slot: usize) {
        if slot < self.seats.len() {
            return;
        }
        let fresh = self.shared.partitions_from(self.seats.len());
        let patience = match self.shared.config.acks {
            Acks::All => STALE_LEADER,
            Acks::Leader | Acks::None => Duration::ZERO,
        };
        for partition in fresh {
            let leader = self.leader_of(&partition);
            let transactional = self.shared.transactions.is_some();
            let lane = Lane::new(self.identity, patience, transactional);
            self.seats.push(Seat {
                partition,
                lane,
                leader,
                via: None,
                queued: None,
                force: false,
                timer: None,
                joined: 0,
            });
        }
    }

    fn leader_of(&mut self, partition: &Partition) -> Option<usize> {
        let address = self
            .shared
            .client
            .cached()
            .leader(&partition.topic, partition.index);
        partition
            .available
            .store(address.is_some(), Ordering::Relaxed);
        let address = address?;
        if let Some(&broker) = self.by_address.get(&address) {
            return Some(broker);
        }
        let max_in_flight = self.shared.config.max_in_flight;
        let (requests, inbox) = mpsc::channel(max_in_flight);
        let broker = self.brokers.len();
        let moved = Arc::new(Notify::new());
        let link = Link {
            broker,
            address: address.clone(),
            client: self.shared.client.clone(),
            acks: self.shared.config.acks,
            max_in_flight,
            answers: self.answers.0.clone(),
            moved: moved.clone(),
        };
        tokio::spawn(link.run(inbox));
        self.brokers.push(Broker {
            requests,
            moved,
            in_flight: 0,
            ready: VecDeque::new(),
            failures: 0,
            not_before: None,
            stuck_until: None,
        });
        self.by_address.insert(address, broker);
        Some(broker)
    }

    /// Looks up the partition's leader. If it is another one, nothing waits for the last one any more.
    fn follow_leader(&mut self, slot: usize) {
        let partition = self.seats[slot].partition.clone();
        let leader = self.leader_of(&partition);
        let seat = &mut self.seats[slot];
        if seat.leader == leader {
            return;
        }
        seat.leader = leader;
        seat.queued = None;
        if leader.is_none() {
            return;
        }
        seat.lane.on_new_leader();
        if seat.lane.has_in_flight()
            && let Some(via) = seat.via.filter(|via| Some(*via) != leader)
        {
            self.brokers[via].moved.notify_one();
        }
    }

    fn force_all(&mut self, now: Instant) {
        self.adopt_new_partitions(self.shared.partition_count().saturating_sub(1));
        for slot in 0..self.seats.len() {
            self.seats[slot].force = true;
            self.touch(slot, now);
        }
    }

    /// Looks at one partition: puts it in its leader's queue if there is something to send, or sets a timer.
    fn touch(&mut self, slot: usize, now: Instant) {
        let Some(seat) = self.seats.get_mut(slot) else {
            return;
        };
        if seat.queued.is_some() {
            return;
        }
        let readiness = match seat.lane.next_retry() {
            Some(_) => Readiness::Ready,
            None => seat.partition.readiness(&self.shared.accumulator, now),
        };
        match readiness {
            Readiness::Empty => seat.force = false,
            Readiness::Lingering(due) if !seat.force => self.set_timer(slot, due),
            Readiness::Lingering(_) | Readiness::Ready => {
                if let Some(transactions) = &self.shared.transactions
                    && seat.joined != transactions.current().0
                {
                    self.joining.insert(slot);
                    return;
                }
                match (seat.lane.can_send(now), seat.leader) {
                    (true, Some(leader)) => {
                        seat.queued = Some(leader);
                        self.brokers[leader].ready.push_back(slot);
                    }
                    (true, None) => self.refresh.want(),
                    (false, _) => {
                        // If it waits for answers instead, they bring it back here.
                        if let Some(time) = seat.lane.not_before().filter(|time| *time > now) {
                            self.set_timer(slot, time);
                        }
                    }
                }
            }
        }
    }

    fn set_timer(&mut self, slot: usize, time: Instant) {
        let timer = &mut self.seats[slot].timer;
        if timer.is_none_or(|set| time < set) {
            *timer = Some(time);
            self.timers.push(Reverse((time, slot)));
        }
    }

    fn fire_timers(&mut self, now: Instant) {
        while let Some(&Reverse((time, slot))) = self.timers.peek().filter(|timer| timer.0.0 <= now)
        {
            self.timers.pop();
            if self.seats[slot].timer == Some(time) {
                self.seats[slot].timer = None;
                self.touch(slot, now);
            }
        }
    }

    /// Callers wait for room while all of it lies in open batches: those are sent although they aren't due.
    fn relieve_pressure(&mut self, now: Instant) {
        let is_idle = |broker: &Broker| broker.in_flight == 0 && broker.ready.is_empty();
        if self.accumulator().waiting.load(Ordering::Acquire) > 0
            && self.brokers.iter().all(is_idle)
        {
            self.force_all(now);
        }
    }

    fn dispatch(&mut self, now: Instant) {
        let max_in_flight = self.shared.config.max_in_flight;
        for index in 0..self.brokers.len() {
            loop {
                let broker = &self.brokers[index];
                let backs_off = broker.not_before.is_some_and(|time| time > now);
                if broker.in_flight >= max_in_flight || broker.ready.is_empty() || backs_off {
                    break;
                }
                let units = self.fill_request(index, now);
                if units.is_empty() {
                    break;
                }
                let broker = &mut self.brokers[index];
                broker.in_flight += 1;
                // A link has a place for each request in flight and ends only with this task.
                if let Err(error) = broker.requests.try_send(units) {
                    let units = error.into_inner().into_iter();
                    let lost = Error::new(ErrorKind::Transport, "the connection's task ended");
                    let units = units.map(|unit| (unit, Err(lost.clone()))).collect();
                    self.on_answer(
                        Answer {
                            broker: index,
                            requests: 1,
                            units,
                            health: Health::Down,
                        },
                        now,
                    );
                }
            }
        }
    }

    /// One request's units: at most one for each partition, so that all get their share.
    fn fill_request(&mut self, broker: usize, now: Instant) -> Vec<Unit> {
        let shared = self.shared.clone();
        let mut room = shared.config.max_request_bytes;
        let mut units: Vec<Unit> = Vec::new();
        let mut later = Vec::new();
        while let Some(slot) = self.brokers[broker].ready.pop_front() {
            let seat = &mut self.seats[slot];
            if seat.queued != Some(broker) {
                continue;
            }
            seat.queued = None;
            let transactions = shared.transactions.as_ref();
            let has_left = transactions.is_some_and(|t| t.current().0 != seat.joined);
            if seat.leader != Some(broker) || !seat.lane.can_send(now) || has_left {
                later.push(slot);
                continue;
            }
            if seat.lane.has_in_flight() && seat.via != Some(broker) {
                // What is under way at the old leader comes back first, else the order would be lost; that brings it back.
                continue;
            }
            let alone = units.is_empty();
            let unit = match seat.lane.next_retry() {
                Some(size) => {
                    if alone || size <= room {
                        seat.lane.send_again()
                    } else {
                        None
                    }
                }
                None => {
                    let batches =
                        seat.partition
                            .take(&shared.accumulator, now, room, alone, seat.force);
                    (!batches.is_empty()).then(|| seat.lane.send_new(slot, batches))
                }
            };
            let Some(unit) = unit else {
                let is_waiting = seat.lane.next_retry().is_some()
                    || seat.force
                    || seat.partition.readiness(&shared.accumulator, now) == Readiness::Ready;
                later.push(slot);
                if is_waiting && !alone {
                    break; // The request is full.
                }
                continue;
            };
            seat.via = Some(broker);
            room = room.saturating_sub(unit.size());
            units.push(unit);
            later.push(slot);
            if room == 0 {
                break;
            }
        }
        for slot in later {
            self.touch(slot, now);
        }
        units
    }

    fn on_answer(&mut self, answer: Answer, now: Instant) {
        let broker = &mut self.brokers[answer.broker];
        broker.in_flight = broker.in_flight.saturating_sub(answer.requests);
        match answer.health {
            Health::Well => {
                broker.failures = 0;
                broker.not_before = None;
                broker.stuck_until = None;
            }
            Health::Untold => {}
            Health::Stuck => broker.stuck_until = Some(now + 2 * STUCK),
            Health::Down => {
                broker.failures += 1;
                broker.not_before = Some(now + backoff::search(broker.failures));
                broker.stuck_until = None;
                match broker.failures {
                    1 => self.refresh.want_at_once(),
                    _ => self.refresh.want(),
                }
            }
        }
        for (unit, result) in answer.units {
            let slot = unit.slot;
            let partition = self.seats[slot].partition.clone();
            let result = result.map_err(|error| error.at(&partition.topic, partition.index));
            if let Err(error) = &result {
                let is_news = !self.seats[slot].lane.is_failing();
                self.learn_from(error, &partition, is_news);
                if error.kind() == ErrorKind::NotInTransaction {
                    self.seats[slot].joined = 0;
                }
            }
            let verdict = self.seats[slot].lane.on_answer(unit, result, now);
            self.follow_leader(slot);
            let seat = &mut self.seats[slot];
            if seat.leader.is_some_and(|leader| leader != answer.broker) {
                // It failed where the leader is no more, which says nothing of the new one.
                seat.lane.on_new_leader();
            }
            if seat.lane.outworn_identity().is_some() {
                self.outworn.push(slot);
            }
            if let Verdict::Done(unit, outcome) = verdict {
                if let Err(error) = outcome.as_ref().map_err(Error::clone)
                    && error.kind() == ErrorKind::FencedProducer
                {
                    self.fatal = Some(error);
                }
                self.settle(unit, &outcome);
            }
            self.touch(slot, now);
        }
    }

    fn learn_from(&mut self, error: &Error, partition: &Partition, is_news: bool) {
        match error.kind() {
            ErrorKind::UnknownTopic => self.shared.forget(&partition.topic),
            ErrorKind::NotLeader => {
                let metadata = self.shared.client.cached();
                metadata.apply_hint(&partition.topic, partition.index, error);
                match is_news {
                    true => self.refresh.want_at_once(),
                    false => self.refresh.want(),
                }
            }
            ErrorKind::Throttled | ErrorKind::DiskFull => {}
            // Perhaps from a broker that does not know yet that it leads no more.
            ErrorKind::OutOfOrderSequence => self.refresh.want(),
            _ if error.is_retriable() => self.refresh.want(),
            _ => {}
        }
    }

    fn settle(&self, unit: Unit, outcome: &Result<Ack, Error>) {
        // What was given up long ago may belong to a transaction before this one.
        if let Err(error) = outcome
            && !unit.is_settled()
        {
            self.fail_transaction(error);
        }
        unit.complete(outcome);
        for batch in unit.batches {
            self.accumulator().release(batch);
        }
    }

    fn fail_transaction(&self, error: &Error) {
        if let Some(transactions) = &self.shared.transactions {
            transactions.fail(error);
        }
    }

    fn fail(&self, batches: Vec<Batch>, error: &Error) {
        if !batches.is_empty() {
            self.fail_transaction(error);
        }
        for batch in batches {
            batch.completion.complete(Err(error.clone()));
            self.accumulator().release(batch);
        }
    }

    fn expire(&mut self, now: Instant) {
        if self.accumulator().is_complete() {
            return;
        }
        for slot in 0..self.seats.len() {
            let seat = &mut self.seats[slot];
            let (expired, answered) = seat.lane.expire(now);
            let unsent = seat.partition.expire(now);
            let (topic, index) = (seat.partition.topic.clone(), seat.partition.index);
            for unit in expired {
                let error = Err(timed_out(&unit));
                self.settle(unit, &error);
            }
            if !answered.is_empty() {
                let message = "a record was not acknowledged within delivery_timeout";
                let error = Error::new(ErrorKind::TimedOut, message);
                self.fail_transaction(&error.at(&topic, index));
            }
            answered
                .into_iter()
                .for_each(|id| self.accumulator().forget(id));
            if !unsent.is_empty() {
                let message = "not sent within delivery_timeout: its leader is missing, unreachable or too slow";
                self.fail(
                    unsent,
                    &Error::new(ErrorKind::TimedOut, message).at(&topic, index),
                );
            }
        }
    }

    fn renew_identities(&mut self, now: Instant) {
        for slot in std::mem::take(&mut self.outworn) {
            let Some(old) = self.seats[slot].lane.outworn_identity() else {
                continue;
            };
            match self.identity.filter(|identity| identity.id != old) {
                Some(identity) => {
                    self.seats[slot].lane.renew(identity);
                    self.touch(slot, now);
                }
                None => self.outworn.push(slot),
            }
        }
        if !self.outworn.is_empty() && !self.identity_wanted {
            self.identity_wanted = true;
            let client = self.shared.client.clone();
            let deadline = now + self.accumulator().delivery_timeout;
            self.side.spawn(async move {
                Side::Identity(backoff::until(deadline, || client.new_identity()).await)
            });
        }
    }

    fn on_identity(&mut self, result: Result<ProducerState, Error>) {
        self.identity_wanted = false;
        match result {
            Ok(identity) => self.identity = Some(identity),
            Err(error) => tracing::warn!(%error, "can't get a new producer id; trying again"),
        }
    }

    /// Gives up what waits to be sent for a transaction that has failed.
    fn drop_failed(&mut self) {
        let Some(transactions) = self.shared.transactions.clone() else {
            return;
        };
        let (mut units, mut unsent) = (Vec::new(), Vec::new());
        let failed = transactions.while_failed(|| {
            self.joining.clear();
            for seat in &mut self.seats {
                units.extend(seat.lane.take_retries());
                unsent.extend(seat.partition.take_all(false));
            }
        });
        let Some(error) = failed else {
            return;
        };
        for unit in units {
            self.settle(unit, &Err(error.clone()));
        }
        self.fail(unsent, &error);
    }

    /// Has partitions become part of the transaction, all that wait for it at once.
    fn start_joining(&mut self, now: Instant) {
        let Some(transactions) = self.shared.transactions.clone() else {
            return;
        };
        if self.is_joining || self.joining.is_empty() {
            return;
        }
        self.is_joining = true;
        let slots = std::mem::take(&mut self.joining);
        let partitions = slots.iter().map(|slot| {
            let partition = &self.seats[*slot].partition;
            (partition.topic.clone(), partition.index)
        });
        let partitions: Vec<(Arc<str>, i32)> = partitions.collect();
        let deadline = now + self.accumulator().delivery_timeout;
        let number = transactions.current().0;
        self.side.spawn(async move {
            let joined = transactions.add_partitions(&partitions, deadline).await;
            Side::Joined(number, slots, joined)
        });
    }

    fn on_joined(
        &mut self,
        number: u64,
        slots: BTreeSet<usize>,
        result: Result<(), Error>,
        now: Instant,
    ) {
        self.is_joining = false;
        let Some(transactions) = self.shared.transactions.clone() else {
            return;
        };
        let (current, identity) = transactions.current();
        match result {
            Ok(()) if number == current => {
                for &slot in &slots {
                    let seat = &mut self.seats[slot];
                    if seat.lane.enter(identity) {
                        seat.joined = number;
                    }
                }
            }
            Err(error) if error.kind() == ErrorKind::FencedProducer => self.fatal = Some(error),
            Err(error) if number == current => transactions.fail(&error),
            // Of the transaction before.
            Ok(()) | Err(_) => {}
        }
        for slot in slots {
            self.touch(slot, now);
        }
    }

    fn start_refresh(&mut self, now: Instant) {
        let is_stuck = |broker: &Broker| broker.stuck_until.is_some_and(|until| until > now);
        if self.brokers.iter().any(is_stuck) {
            self.refresh.want();
        }
        if self.seats.is_empty() || !self.refresh.start(now) {
            return;
        }
        let topics = self.shared.topics();
        if topics.is_empty() {
            self.refresh.finish(now);
            return;
        }
        let client = self.shared.client.clone();
        self.side
            .spawn(async move { Side::Refreshed(client.refresh(&topics).await.map(drop)) });
    }

    fn on_refreshed(&mut self, result: Result<(), Error>, now: Instant) {
        self.refresh.finish(now);
        match &result {
            Ok(()) => self.shared.take_over_growth(),
            Err(error) => {
                self.refresh.want();
                tracing::warn!(%error, "can't refresh metadata");
            }
        }
        if result.is_err() {
            return;
        }
        for slot in 0..self.seats.len() {
            self.follow_leader(slot);
            let partition = self.seats[slot].partition.clone();
            if self
                .shared
                .client
                .cached()
                .topic(&partition.topic)
                .is_none()
            {
                self.shared.forget(&partition.topic);
                let error = Err(Error::unknown_topic(&partition.topic));
                for unit in self.seats[slot].lane.take_retries() {
                    self.settle(unit, &error);
                }
                self.fail(
                    partition.take_all(false),
                    &Error::unknown_topic(&partition.topic),
                );
            }
            self.touch(slot, now);
        }
    }

    fn next_wake(&self, now: Instant) -> Instant {
        let timer = self.timers.peek().map(|timer| timer.0.0);
        let brokers = self
            .brokers
            .iter()
            .filter(|b| !b.ready.is_empty())
            .filter_map(|b| b.not_before);
        brokers
            .chain(timer)
            .chain(self.refresh.due())
            .filter(|time| *time > now)
            .min()
            .unwrap_or(now + IDLE)
    }

    /// Fails what is left, and lets nothing more in.
    fn finish(mut self) {
        let accumulator = &self.shared.accumulator;
        let error = self.fatal.take().unwrap_or_else(|| {
            Error::new(
                ErrorKind::Closed,
                "the producer was closed before this record was acknowledged",
            )
        });
        let _ = accumulator.closed.set(error.clone());
        accumulator.budget.close();
        self.adopt_new_partitions(self.shared.partition_count().saturating_sub(1));
        for slot in 0..self.seats.len() {
            let unsent = self.seats[slot].partition.take_all(true);
            self.fail(unsent, &error);
            for unit in self.seats[slot].lane.take_retries() {
                self.settle(unit, &Err(error.clone()));
            }
            for (id, completion) in self.seats[slot].lane.in_flight() {
                completion.complete(Err(error.clone()));
                self.accumulator().forget(*id);
            }
        }
        self.shared.finished.send_replace(true);
    }
}
