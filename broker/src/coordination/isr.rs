//! The task that changes the in-sync replicas of the partitions led here: it asks each leader what is to be done, and writes and reads
//! Leases for it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use millrace_crds::coordination::PartitionLease;
use tokio::time::MissedTickBehavior;
use tracing::{info, warn};

use super::{api::ApiError, context::Context, membership::now};
use crate::{
    partition::{HostedReplica, PartitionKey},
    replication::IsrStep,
};

/// How often leaders are asked. Also at once when a broker goes or comes.
const INTERVAL: Duration = Duration::from_millis(200);
/// Writes and reads at a time.
const MAX_CALLS: usize = 64;

/// What a call brought.
enum Answer {
    State(Box<PartitionLease>),
    Unknown,
    Refused,
}

type Call = BoxFuture<'static, (Arc<HostedReplica>, i32, Answer)>;

pub(super) struct IsrChanges {
    context: Arc<Context>,
    calls: FuturesUnordered<Call>,
    /// Where the last round ended for lack of room, and whether it did.
    from: usize,
    short: bool,
}

impl IsrChanges {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            calls: FuturesUnordered::new(),
            from: 0,
            short: false,
        }
    }

    pub(super) async fn run(mut self) {
        let context = self.context.clone();
        let mut ticks = tokio::time::interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some((replica, epoch, answer)) = self.calls.next(), if !self.calls.is_empty() => {
                    let now = Instant::now();
                    match answer {
                        Answer::State(state) => replica.on_isr_answer(epoch, Some(&state), now),
                        Answer::Unknown => replica.on_isr_answer(epoch, None, now),
                        Answer::Refused => replica.on_isr_refused(epoch, now),
                    }
                    // When a broker dies, many have something to be written: as fast as the API server takes it, and not so many at each tick.
                    if self.short && self.calls.len() <= MAX_CALLS / 2 {
                        self.ask();
                    }
                }
                _ = ticks.tick() => self.ask(),
                () = context.peers.changed() => self.ask(),
            }
        }
    }

    fn ask(&mut self) {
        let now = Instant::now();
        let all = self.context.hosting.all();
        let context = self.context.clone();
        let peers = |id| context.peers.get(id);
        let mut asked = 0;
        self.short = false;
        for (key, replica) in all.iter().cycle().skip(self.from).take(all.len()) {
            if self.calls.len() >= MAX_CALLS {
                self.short = true;
                break;
            }
            asked += 1;
            if let Some(step) = replica.isr_step(now, peers) {
                self.act(*key, replica.clone(), step);
            }
        }
        self.from = match all.len() {
            0 => 0,
            len => (self.from + asked) % len,
        };
    }

    fn act(&mut self, key: PartitionKey, replica: Arc<HostedReplica>, step: IsrStep) {
        let context = self.context.clone();
        let Some((known, mut object)) = context.topics.lease(key) else {
            replica.on_isr_refused(replica.log().leader_epoch().unwrap_or(-1), Instant::now());
            return;
        };
        let epoch = known.held.epoch;
        let call = async move {
            let name = object.metadata.name.clone().unwrap_or_default();
            let result = match step {
                IsrStep::Read => context.api.lease(&name).await,
                IsrStep::Write(mut next) => {
                    let (_, partition_epoch) = next.epochs();
                    if known.epochs() != (epoch, partition_epoch - 1) || next.held.epoch != epoch {
                        // The leader has yet to hear of a newer state.
                        return (replica, next.held.epoch, Answer::State(Box::new(known)));
                    }
                    if next.assignment.isr != known.assignment.isr {
                        context.metrics.proposed_isr();
                        let log = replica.log();
                        let ids = |lease: &PartitionLease| {
                            lease
                                .assignment
                                .isr
                                .iter()
                                .map(|r| r.id)
                                .collect::<Vec<_>>()
                        };
                        info!(topic = %log.topic, partition = log.index, from = ?ids(&known), to = ?ids(&next), "in-sync replicas change");
                    }
                    next.held.renewed = Some(now());
                    next.write(&mut object, &context.claimant.cluster);
                    match context.api.write(&object).await {
                        Err(ApiError::Conflict(_)) => context.api.lease(&name).await,
                        written => written.map(Some),
                    }
                }
            };
            let answer = match result {
                Ok(Some(lease)) => match PartitionLease::read(&lease) {
                    Ok(state) => {
                        context.topics.apply(lease);
                        Answer::State(Box::new(state))
                    }
                    Err(error) => {
                        warn!(%error, "in-sync replicas can't be changed");
                        Answer::Refused
                    }
                },
                Ok(None) | Err(ApiError::NotFound(_)) => Answer::Refused,
                Err(error @ ApiError::Refused { .. }) => {
                    warn!(%error, "in-sync replicas can't be changed");
                    Answer::Refused
                }
                Err(_) => Answer::Unknown,
            };
            (replica, epoch, answer)
        };
        self.calls.push(call.boxed());
    }
}
