//! How logs get from leaders to followers: one session for each pair of brokers, opened by the follower. Which answers count is for the real
//! [`Following`] to say, and what a position is worth for the real [`Leader`](crate::replication::Leader).

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use millrace_crds::coordination::Replica;

use super::{
    coverage::Seen,
    log::Batch,
    net::{Request, Response, Way},
    process::{Cx, Process},
    queue::Event,
};
use crate::{
    partition::{HEARTBEAT, PartitionKey, SILENCE},
    replication::{Cut, Follower, Following, LogEnds, Position, PositionCheck},
};

/// Batches in one message, and those that may be sent without an acknowledgement.
const MESSAGE: usize = 4;
const WINDOW: usize = 12;
/// How late the second copy of a message may be, in milliseconds.
const ECHO: u64 = 6_000;

/// A follower's side of a session.
pub(super) struct Link {
    /// The process there, as its session in the Cluster says.
    epoch: i32,
    state: LinkState,
    assigned: BTreeMap<PartitionKey, Follower>,
    following: BTreeMap<u32, (PartitionKey, Following)>,
    last_handle: u32,
    heard: Instant,
    sent: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LinkState {
    /// No one is there.
    Away,
    /// To be opened, from then on.
    Closed(Instant),
    Opening(Instant),
    Open(u64),
}

/// A leader's side.
pub(super) struct Serving {
    follower: Replica,
    heard: Instant,
    sent: Instant,
    partitions: BTreeMap<u32, Sending>,
    /// Of each partition the handle that counts.
    handles: BTreeMap<PartitionKey, u32>,
}

struct Sending {
    key: PartitionKey,
    epoch: i32,
    /// The next offset to send.
    next: i64,
    acknowledged: i64,
    /// The high watermark that was told last.
    told: i64,
}

impl Link {
    fn new(now: Instant) -> Self {
        Self {
            epoch: 0,
            state: LinkState::Away,
            assigned: BTreeMap::new(),
            following: BTreeMap::new(),
            last_handle: 0,
            heard: now,
            sent: now,
        }
    }

    fn add(&mut self, key: PartitionKey, following: Following) {
        self.last_handle += 1;
        self.following.insert(self.last_handle, (key, following));
    }

    fn close(&mut self, until: Instant) {
        self.state = LinkState::Closed(until);
        self.following.clear();
    }
}

impl Cx<'_> {
    fn send(&mut self, session: u64, way: Way, event: impl Fn() -> Event) {
        if self.rng.u32(0..self.swarm.loss) == 0 {
            self.net.lose(session, way);
        }
        let in_order = !self.swarm.is_disordered;
        let at = self.at + self.swarm.network.draw(self.rng);
        let echo = (!in_order && self.rng.u32(0..10) == 0).then(|| at + self.rng.u64(0..ECHO));
        for at in [Some(at), echo].into_iter().flatten() {
            if let Some(at) = self.net.arrival(session, way, at, in_order) {
                self.queue.push(at, event());
            }
        }
    }

    fn request(&mut self, session: u64, request: &Request) {
        self.send(session, Way::ToLeader, || {
            Event::Request(session, request.clone())
        });
    }

    fn respond(&mut self, session: u64, response: &Response) {
        self.send(session, Way::ToFollower, || {
            Event::Response(session, response.clone())
        });
    }
}

// The follower's side.
impl Process {
    pub(super) fn set_peers(&mut self, sessions: &BTreeMap<i32, i32>, cx: &mut Cx) {
        for (id, link) in &mut self.links {
            if !sessions.contains_key(id) && link.state != LinkState::Away {
                link.close(cx.now);
                link.state = LinkState::Away;
            }
        }
        for (id, epoch) in sessions.iter().filter(|(id, _)| **id != self.pid.broker) {
            let link = self.links.entry(*id).or_insert_with(|| Link::new(cx.now));
            if link.state == LinkState::Away || link.epoch != *epoch {
                link.epoch = *epoch;
                link.close(cx.now);
            }
        }
    }

    pub(super) fn follow(&mut self, key: PartitionKey, follower: Follower, cx: &mut Cx) {
        let leader = follower.leader;
        let link = self.links.entry(leader);
        let link = link.or_insert_with(|| Link::new(cx.now));
        link.assigned.insert(key, follower);
        if let LinkState::Open(_) = link.state {
            link.add(key, Following::new(follower, cx.now));
        }
        self.send_positions(cx);
    }

    pub(super) fn unfollow(&mut self, key: PartitionKey, cx: &mut Cx) {
        for link in self.links.values_mut() {
            if link.assigned.remove(&key).is_none() {
                continue;
            }
            let following = link.following.iter();
            let of = following.filter(|(_, (of, _))| *of == key);
            let handles: Vec<u32> = of.map(|(handle, _)| *handle).collect();
            for handle in handles {
                link.following.remove(&handle);
                if let LinkState::Open(session) = link.state {
                    cx.request(session, &Request::Stopped { handle });
                }
            }
        }
    }

    pub(super) fn tick_sessions(&mut self, cx: &mut Cx) {
        let store = self.me.replica();
        for (id, link) in &mut self.links {
            match link.state {
                LinkState::Closed(at) if at <= cx.now => {
                    link.state = LinkState::Opening(cx.now);
                    let at = cx.at + cx.swarm.network.draw(cx.rng);
                    let (from, to, epoch) = (self.pid, *id, link.epoch);
                    cx.queue.push(
                        at,
                        Event::Connect {
                            from,
                            store,
                            to,
                            epoch,
                        },
                    );
                }
                LinkState::Opening(since) if cx.now - since > Duration::from_secs(1) => {
                    link.close(cx.now);
                }
                LinkState::Open(_) if cx.now.saturating_duration_since(link.heard) > SILENCE => {
                    cx.coverage.note(Seen::SessionReset);
                    link.close(cx.now);
                }
                LinkState::Open(session)
                    if cx.now.saturating_duration_since(link.sent) >= HEARTBEAT =>
                {
                    link.sent = cx.now;
                    cx.request(session, &Request::Heartbeat);
                }
                _ => {}
            }
        }
        self.send_positions(cx);
        self.tick_serving(cx);
    }

    pub(super) fn on_connected(
        &mut self,
        (leader, epoch): (i32, i32),
        session: Option<u64>,
        cx: &mut Cx,
    ) {
        let Some(link) = self.links.get_mut(&leader) else {
            return;
        };
        if !matches!(link.state, LinkState::Opening(_)) || link.epoch != epoch {
            return;
        }
        let Some(session) = session else {
            cx.coverage.note(Seen::ConnectionRefused);
            let pause = Duration::from_millis(cx.rng.u64(20..500));
            link.close(cx.now + pause);
            self.peers.refused(leader, link.epoch);
            return;
        };
        link.state = LinkState::Open(session);
        link.heard = cx.now;
        for (key, follower) in link.assigned.clone() {
            link.add(key, Following::new(follower, cx.now));
        }
        self.peers.reached(leader);
        self.send_positions(cx);
    }

    pub(super) fn on_reset(&mut self, session: u64, cx: &mut Cx) {
        for link in self.links.values_mut() {
            if link.state == LinkState::Open(session) {
                cx.coverage.note(Seen::SessionReset);
                link.close(cx.now);
            }
        }
        self.serving.remove(&session);
    }

    /// Sends the positions that are due, each under a new handle: what comes for the old one counts no more.
    pub(super) fn send_positions(&mut self, cx: &mut Cx) {
        for link in self.links.values_mut() {
            let LinkState::Open(session) = link.state else {
                continue;
            };
            let following = link.following.iter();
            let due = following.filter(|(_, (key, following))| {
                // What the session before had under way comes first.
                let log = self.disk.logs.get(key);
                let is_settled = log.is_some_and(|log| log.durable_end() == log.log_end());
                is_settled && following.due().is_some_and(|at| at <= cx.now)
            });
            let due: Vec<u32> = due.map(|(handle, _)| *handle).collect();
            for old in due {
                let Some((key, mut following)) = link.following.remove(&old) else {
                    continue;
                };
                let epoch = following.follower().epoch;
                let hosted = self.hosted.get(&key);
                let is_followed = hosted.is_some_and(|h| h.follower_of(epoch).is_some());
                let log = self.disk.logs.get(&key).filter(|_| is_followed);
                let position = log.map(Follower::position);
                following.on_sent(position.as_ref());
                link.add(key, following);
                if let Some(position) = position {
                    link.sent = cx.now;
                    let handle = link.last_handle;
                    let request = Request::Position {
                        handle,
                        key,
                        epoch,
                        position,
                    };
                    cx.request(session, &request);
                }
            }
        }
    }

    pub(super) fn on_response(&mut self, session: u64, response: Response, cx: &mut Cx) {
        let mut links = self.links.values_mut();
        let Some(link) = links.find(|link| link.state == LinkState::Open(session)) else {
            return;
        };
        link.heard = cx.now;
        match response {
            Response::Heartbeat => {}
            Response::Data {
                handle,
                high_watermark,
                batches,
            } => {
                let Some((key, following)) = link.following.get_mut(&handle) else {
                    return;
                };
                if following.is_awaiting() {
                    following.on_data(high_watermark);
                    let (key, epoch) = (*key, following.follower().epoch);
                    let known = following.high_watermark();
                    self.show_committed(key, epoch, known, cx);
                    self.append(session, handle, &batches, cx);
                }
            }
            Response::NotLeading { handle } => {
                if let Some((_, following)) = link.following.get_mut(&handle)
                    && following.is_awaiting()
                {
                    following.on_not_leading(cx.now);
                }
            }
            Response::Diverging { handle, .. } | Response::OutOfRange { handle, .. } => {
                self.on_refused(session, handle, &response, cx);
            }
        }
        self.send_positions(cx);
    }

    fn following(&mut self, session: u64, handle: u32) -> Option<&mut (PartitionKey, Following)> {
        let mut links = self.links.values_mut();
        let link = links.find(|link| link.state == LinkState::Open(session))?;
        link.following.get_mut(&handle)
    }

    fn append(&mut self, session: u64, handle: u32, batches: &[Batch], cx: &mut Cx) {
        let (Some(first), Some(last)) = (batches.first(), batches.last()) else {
            return;
        };
        let pid = self.pid;
        let Some((key, following)) = self.following(session, handle) else {
            return;
        };
        let key = *key;
        let epoch = following.follower().epoch;
        if following.takes(first.base, last.end()).is_err() {
            cx.coverage.note(Seen::OutOfOrder);
            following.on_failure(cx.now);
            return;
        }
        let hosted = self.hosted.get(&key);
        let is_followed = hosted.is_some_and(|hosted| hosted.follower_of(epoch).is_some());
        let log = self.disk.logs.get_mut(&key);
        let Some(log) = log.filter(|log| is_followed && log.log_end() == first.base) else {
            if let Some((_, following)) = self.following(session, handle) {
                following.on_not_appended(cx.now);
            }
            return;
        };
        for batch in batches {
            log.append(*batch);
            cx.oracle.on_appended(key, pid, false, *batch, log);
        }
        if broken!(ForgetProducers) {
            log.forget_producers();
        }
        cx.trace.line(cx.at, || {
            format!("{pid} copies up to {} in epoch {epoch}", last.end())
        });
        cx.sync(pid, key, log, Some((session, handle)));
    }

    /// What was appended in a session is on the disk.
    pub(super) fn on_appended(&mut self, session: u64, handle: u32, end: i64, cx: &mut Cx) {
        let Some((key, following)) = self.following(session, handle) else {
            return;
        };
        following.on_appended();
        let (key, epoch) = (*key, following.follower().epoch);
        let known = following.high_watermark();
        self.show_committed(key, epoch, known, cx);
        let durable_end = end;
        cx.request(
            session,
            &Request::Acknowledge {
                handle,
                durable_end,
            },
        );
    }

    fn show_committed(&mut self, key: PartitionKey, epoch: i32, leaders: i64, cx: &mut Cx) {
        let hosted = self.hosted.get(&key);
        if hosted.is_none_or(|hosted| hosted.follower_of(epoch).is_none()) {
            return;
        }
        let Some(log) = self.disk.logs.get_mut(&key) else {
            return;
        };
        let before = log.high_watermark;
        log.high_watermark = before.max(Follower::high_watermark(leaders, &*log));
        let span = (before, log.high_watermark);
        cx.oracle.on_shown(key, self.pid, log, span);
    }

    fn on_refused(&mut self, session: u64, handle: u32, refusal: &Response, cx: &mut Cx) {
        let pid = self.pid;
        let Some((key, following)) = self.following(session, handle) else {
            return;
        };
        if !following.is_awaiting() {
            return;
        }
        if !following.heeds_refusal(cx.now) {
            cx.coverage.note(Seen::LateRefusal);
            return;
        }
        let key = *key;
        let epoch = following.follower().epoch;
        let hosted = self.hosted.get(&key);
        let follower = hosted.and_then(|hosted| hosted.follower_of(epoch));
        let (Some(follower), Some(log)) = (follower, self.disk.logs.get_mut(&key)) else {
            return;
        };
        let high_watermark = log.high_watermark;
        let (done, what) = match *refusal {
            Response::OutOfRange { log_start, .. } => {
                let at = follower.begin_anew(epoch, log_start, &*log, high_watermark);
                let begin = |at: Option<i64>| at.map(|at| log.begin_at(at));
                (at.map(begin), Seen::BeganAnew)
            }
            Response::Diverging { end, .. } if !broken!(KeepDiverging) => {
                let cut = follower.cut(epoch, end, &*log, high_watermark);
                let truncate = |cut: Option<Cut>| cut.map(|Cut(at)| log.truncate(at));
                (cut.map(truncate), Seen::Cut)
            }
            _ => (Ok(None), Seen::Cut),
        };
        cx.dirty.insert(key);
        if let Some((_, following)) = self.following(session, handle) {
            following.on_cut(cx.now);
        }
        match done {
            Ok(done) => {
                if done.is_some() {
                    cx.coverage.note(what);
                    cx.trace.line(cx.at, || {
                        let log = &self.disk.logs[&key];
                        let span = (log.log_start(), log.log_end());
                        format!("{pid} {what:?} for {refusal:?}: {span:?}")
                    });
                }
            }
            Err(diverged) => {
                if !cx.oracle.may_have_lost(key) {
                    cx.oracle
                        .fail("no replica has to cut what is committed", || {
                            format!("{pid}: {diverged}")
                        });
                }
                if let Some((_, following)) = self.following(session, handle) {
                    following.stop();
                }
            }
        }
    }

    /// Whether a person has to see to it.
    pub(super) fn has_stopped_following(&self, key: PartitionKey) -> bool {
        let mut links = self.links.values();
        links.any(|link| {
            let mut following = link.following.values();
            following.any(|(of, following)| *of == key && following.is_stopped())
        })
    }
}

// The leader's side.
impl Process {
    pub(super) fn on_request(
        &mut self,
        session: u64,
        follower: Replica,
        request: Request,
        cx: &mut Cx,
    ) {
        self.peers.heard(follower.id, cx.now);
        let serving = self.serving.entry(session).or_insert_with(|| Serving {
            follower,
            heard: cx.now,
            sent: cx.now,
            partitions: BTreeMap::new(),
            handles: BTreeMap::new(),
        });
        serving.heard = cx.now;
        match request {
            Request::Heartbeat => {}
            Request::Stopped { handle } => {
                serving.partitions.remove(&handle);
            }
            Request::Acknowledge {
                handle,
                durable_end,
            } => {
                let Some(sending) = serving.partitions.get_mut(&handle) else {
                    return;
                };
                // What it was not sent it can't have.
                let end = durable_end.min(sending.next);
                sending.acknowledged = sending.acknowledged.max(end);
                let (key, epoch) = (sending.key, sending.epoch);
                let now = cx.now;
                self.change_leader(key, cx, |leader, _| {
                    if leader.epoch() == epoch {
                        leader.on_acknowledged(follower, end, now);
                    }
                });
                self.pump(session, handle, cx);
            }
            Request::Position {
                handle,
                key,
                epoch,
                position,
            } => self.on_position(session, (handle, key), epoch, position, cx),
        }
    }

    fn on_position(
        &mut self,
        session: u64,
        (handle, key): (u32, PartitionKey),
        epoch: i32,
        position: Position,
        cx: &mut Cx,
    ) {
        let Some(serving) = self.serving.get_mut(&session) else {
            return;
        };
        let follower = serving.follower;
        if let Some(old) = serving.handles.insert(key, handle) {
            serving.partitions.remove(&old);
        }
        let now = cx.now;
        let checked = self.change_leader(key, cx, |leader, log| {
            let leads = leader.epoch() == epoch;
            leads.then(|| leader.on_position(follower, &position, log, now))
        });
        let log_start = self.disk.logs.get(&key).map_or(0, LogEnds::log_start);
        let response = match checked.flatten() {
            Some(PositionCheck::Prefix) => {
                let sending = Sending {
                    key,
                    epoch,
                    next: position.log_end,
                    acknowledged: position.log_end,
                    told: -1,
                };
                if let Some(serving) = self.serving.get_mut(&session) {
                    serving.partitions.insert(handle, sending);
                }
                return self.pump(session, handle, cx);
            }
            Some(PositionCheck::Diverging(end)) => Response::Diverging { handle, end },
            Some(PositionCheck::OutOfRange) => Response::OutOfRange { handle, log_start },
            None => Response::NotLeading { handle },
        };
        cx.respond(session, &response);
    }

    /// Sends what a follower has not got yet.
    fn pump(&mut self, session: u64, handle: u32, cx: &mut Cx) {
        let Some(serving) = self.serving.get_mut(&session) else {
            return;
        };
        let Some(sending) = serving.partitions.get_mut(&handle) else {
            return;
        };
        let hosted = self.hosted.get_mut(&sending.key);
        let leads = hosted.is_some_and(|hosted| hosted.leader_of(sending.epoch).is_some());
        let Some(log) = self.disk.logs.get(&sending.key).filter(|_| leads) else {
            serving.partitions.remove(&handle);
            return cx.respond(session, &Response::NotLeading { handle });
        };
        if sending.next < log.log_start() {
            let log_start = log.log_start();
            serving.partitions.remove(&handle);
            return cx.respond(session, &Response::OutOfRange { handle, log_start });
        }
        serving.sent = cx.now;
        let high_watermark = log.high_watermark;
        let under_way = log.batches(sending.acknowledged, sending.next).len();
        let unsent = log.batches(sending.next, log.log_end());
        let unsent = &unsent[..unsent.len().min(WINDOW.saturating_sub(under_way))];
        if unsent.is_empty() && sending.told < high_watermark {
            let batches = Vec::new();
            let data = Response::Data {
                handle,
                high_watermark,
                batches,
            };
            cx.respond(session, &data);
        }
        for some in unsent.chunks(MESSAGE) {
            let batches = some.to_vec();
            let data = Response::Data {
                handle,
                high_watermark,
                batches,
            };
            cx.respond(session, &data);
        }
        sending.told = high_watermark;
        sending.next = unsent.last().map_or(sending.next, Batch::end);
    }

    /// Tells followers that the log got longer, or more of it is committed.
    pub(super) fn send_news(&mut self, key: PartitionKey, cx: &mut Cx) {
        let handle_in = |serving: &Serving| {
            let mut partitions = serving.partitions.iter();
            let of = partitions.find(|(_, sending)| sending.key == key);
            of.map(|(handle, _)| *handle)
        };
        let of = self.serving.iter();
        let of: Vec<_> = of
            .filter_map(|(id, s)| Some((*id, handle_in(s)?)))
            .collect();
        for (session, handle) in of {
            self.pump(session, handle, cx);
        }
    }

    fn tick_serving(&mut self, cx: &mut Cx) {
        self.serving
            .retain(|_, serving| cx.now.saturating_duration_since(serving.heard) <= SILENCE);
        for (session, serving) in &mut self.serving {
            if cx.now.saturating_duration_since(serving.sent) >= HEARTBEAT {
                serving.sent = cx.now;
                cx.respond(*session, &Response::Heartbeat);
            }
        }
        // Those who are told nothing more, since it leads no more.
        let all = self.serving.iter();
        let all = all.flat_map(|(id, s)| s.partitions.keys().map(|handle| (*id, *handle)));
        for (session, handle) in all.collect::<Vec<_>>() {
            self.pump(session, handle, cx);
        }
    }
}
