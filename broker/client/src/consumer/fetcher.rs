//! The consumer's background task: long polls to each leader, the next as soon as the last is back and there is room for more.
//!
//! A leader that has much to send gets several at a time, for a share of its partitions each, so that it reads for some while the
//! others' bytes are on their way. Where little comes, one call for all of it costs both sides less, and comes back sooner.
//!
//! What to ask and what answers mean is decided in `cursors`; here are calls, cancellation, memory and metadata.

use std::{collections::HashMap, sync::Arc, time::Duration};

use millrace_proto::v1;
use tokio::{
    sync::{mpsc, oneshot},
    task::{AbortHandle, JoinSet},
    time::{Instant, MissedTickBehavior, interval_at, sleep_until},
};

use super::{
    buffer::Buffer,
    cursors::{Asked, Assigned, Cursors, Item},
};
use crate::{
    Client,
    error::Error,
    offsets::{self, OffsetSpec, Query},
    refresh::STUCK,
    transport::Transport,
};

/// What a batch costs beside its bytes while it waits.
pub(crate) const BATCH_OVERHEAD: usize = 200;
/// The least that a fetch asks for, however many brokers share the buffer.
const MIN_FETCH: usize = 64 << 10;
/// How far ahead the fetcher looks when it has nothing to wait for.
const IDLE: Duration = Duration::from_secs(3600);

/// A wish of the caller.
#[derive(Debug)]
pub(crate) enum Command {
    Seek {
        index: usize,
        generation: u64,
        offset: i64,
        done: oneshot::Sender<()>,
    },
    /// At most one for each partition, since it is paused until then.
    Resume { index: usize, generation: u64 },
    /// Read this, under an index that is the next one or that of a partition that was removed.
    Assign {
        index: usize,
        generation: u64,
        assigned: Arc<Assigned>,
        offset: i64,
    },
    /// Read it no more.
    Remove { index: usize, generation: u64 },
}

/// Polls at a time to a leader that sends much. From the disk, four bring a fifth more than two; six bring less.
const BUSY_LANES: usize = 4;
/// An answer of this size is much.
const MUCH: usize = 256 << 10;
/// A leader sends much until so long after its last such answer; one of its polls may bring little all the while.
const CALM: Duration = Duration::from_millis(100);

/// One of the polls of a leader: number `index` of `count`, each for its share of the partitions.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Lane {
    leader: Arc<str>,
    index: usize,
    count: usize,
}

/// Which leaders send much, and when they last did.
#[derive(Debug, Default)]
pub(crate) struct Pace(HashMap<Arc<str>, Instant>);

impl Pace {
    /// How many polls the leader gets at a time.
    fn lanes(&self, leader: &Arc<str>) -> usize {
        match self.0.contains_key(leader) {
            true => BUSY_LANES,
            false => 1,
        }
    }

    /// An answer of so many bytes came. Returns whether the number of polls is another one now.
    fn note(&mut self, leader: &Arc<str>, bytes: usize, now: Instant) -> bool {
        if bytes >= MUCH {
            return self.0.insert(leader.clone(), now).is_none();
        }
        let calm = self.0.get(leader).is_some_and(|last| now - *last > CALM);
        calm && self.0.remove(leader).is_some()
    }
}

struct Poll {
    sent: Instant,
    asked: Vec<Asked>,
    reserved: usize,
    task: AbortHandle,
}

enum Done {
    Fetched {
        lane: Lane,
        id: u64,
        result: Result<v1::FetchResponse, Error>,
    },
    Refreshed(Result<(), Error>),
    Joined(Result<Vec<(Arc<Assigned>, i64)>, Error>),
}

pub(crate) struct Fetcher {
    pub(crate) client: Client,
    pub(crate) cursors: Cursors,
    pub(crate) buffer: Arc<Buffer>,
    pub(crate) max_bytes: usize,
    pub(crate) max_wait: Duration,
    /// Topics read with all their partitions, also those to come.
    pub(crate) whole_topics: Vec<Arc<str>>,
    /// All topics.
    pub(crate) topics: Vec<String>,
    /// As many as the buffer has room for.
    pub(crate) items: mpsc::UnboundedSender<Item>,
    pub(crate) pace: Pace,
}

impl Fetcher {
    /// Runs until the consumer is dropped.
    pub(crate) async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let mut tasks: JoinSet<Done> = JoinSet::new();
        let mut polls: HashMap<Lane, (u64, Poll)> = HashMap::new();
        let mut next_id = 0;
        let mut is_joining = false;
        let interval = self.client.metadata_refresh();
        let mut upkeep = interval_at(Instant::now() + interval, interval);
        upkeep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.cursors.find_leaders(self.client.cached());
        loop {
            let now = Instant::now();
            self.cursors.end_pauses(now);
            let outdated = self.cursors.take_outdated();
            self.interrupt(outdated.into_iter(), &mut polls);
            let mut starved = false;
            let leaders = self.cursors.leaders();
            let lanes = leaders.iter().flat_map(|leader| {
                let count = self.pace.lanes(leader);
                (0..count).map(move |index| Lane {
                    leader: leader.clone(),
                    index,
                    count,
                })
            });
            for lane in lanes {
                if polls.contains_key(&lane) {
                    continue;
                }
                let share = (self.buffer.limit() / (2 * BUSY_LANES * leaders.len()))
                    .clamp(MIN_FETCH, self.max_bytes.max(MIN_FETCH));
                if !self.buffer.try_take(share) {
                    starved = true;
                    continue;
                }
                let max_bytes = u32::try_from(share.min(self.max_bytes)).unwrap_or(u32::MAX);
                let Some((request, asked)) =
                    self.cursors
                        .plan(&lane.leader, (lane.index, lane.count), max_bytes, now)
                else {
                    self.buffer.settle(share, 0);
                    continue;
                };
                next_id += 1;
                let call = fetch(
                    self.client.clone(),
                    lane.clone(),
                    next_id,
                    request,
                    self.max_wait,
                );
                let task = tasks.spawn(call);
                polls.insert(
                    lane,
                    (
                        next_id,
                        Poll {
                            sent: now,
                            asked,
                            reserved: share,
                            task,
                        },
                    ),
                );
            }
            let overdue = |poll: &(u64, Poll)| poll.1.sent + self.max_wait + STUCK;
            let overdue = polls.values().map(overdue).min();
            if overdue.is_some_and(|time| time <= now) {
                self.cursors.refresh.want();
            }
            if self.cursors.refresh.start(now) {
                let (client, topics) = (self.client.clone(), self.topics.clone());
                tasks
                    .spawn(async move { Done::Refreshed(client.refresh(&topics).await.map(drop)) });
            }
            let due = self.cursors.next_due(now).into_iter();
            let wake = due
                .chain(self.cursors.refresh.due())
                .chain(overdue.filter(|time| *time > now))
                .min();

            tokio::select! {
                command = commands.recv() => match command {
                    None => return,
                    Some(command) => {
                        let interrupted = self.obey(command);
                        self.interrupt(interrupted.into_iter(), &mut polls);
                    }
                },
                Some(done) = tasks.join_next(), if !tasks.is_empty() => match done {
                    Ok(Done::Fetched { lane, id, result }) => {
                        if polls.get(&lane).is_some_and(|poll| poll.0 == id)
                            && let Some((_, poll)) = polls.remove(&lane)
                        {
                            let came = self.on_fetched(&lane.leader, poll, result);
                            if self.pace.note(&lane.leader, came, Instant::now()) {
                                self.interrupt([lane.leader].into_iter(), &mut polls);
                            }
                        }
                    }
                    Ok(Done::Refreshed(result)) => {
                        self.cursors.refresh.finish(Instant::now());
                        if let Err(error) = result {
                            self.cursors.refresh.want();
                            tracing::warn!(%error, "can't refresh metadata");
                        }
                        self.cursors.find_leaders(self.client.cached());
                        let fresh = self.new_partitions();
                        if !fresh.is_empty() && !is_joining {
                            is_joining = true;
                            tasks.spawn(find_beginnings(self.client.clone(), fresh));
                        }
                    }
                    Ok(Done::Joined(result)) => {
                        is_joining = false;
                        match result {
                            Ok(joined) => self.join(joined),
                            Err(error) => tracing::warn!(%error, "can't find where new partitions begin; trying again"),
                        }
                        self.cursors.find_leaders(self.client.cached());
                    }
                    // An interrupted poll.
                    Err(error) if error.is_cancelled() => {}
                    Err(error) => tracing::error!(%error, "a consumer's background task failed"),
                },
                () = self.buffer.freed.notified(), if starved => {}
                () = sleep_until(wake.unwrap_or(now + IDLE)) => {}
                _ = upkeep.tick() => self.cursors.refresh.want(),
            }
        }
    }

    fn obey(&mut self, command: Command) -> Option<Arc<str>> {
        match command {
            Command::Seek {
                index,
                generation,
                offset,
                done,
            } => {
                let interrupted = self.cursors.seek(index, generation, offset);
                // The caller may have stopped waiting.
                let _ = done.send(());
                interrupted
            }
            Command::Resume { index, generation } => {
                self.cursors.resume(index, generation);
                None
            }
            Command::Assign {
                index,
                generation,
                assigned,
                offset,
            } => {
                if !self.topics.iter().any(|topic| **topic == *assigned.topic) {
                    self.topics.push(assigned.topic.to_string());
                }
                self.cursors.assign(index, assigned, generation, offset);
                self.cursors.find_leaders(self.client.cached());
                None
            }
            Command::Remove { index, generation } => self.cursors.remove(index, generation),
        }
    }

    /// Ends long polls that ask for something outdated.
    fn interrupt(
        &self,
        leaders: impl Iterator<Item = Arc<str>>,
        polls: &mut HashMap<Lane, (u64, Poll)>,
    ) {
        for leader in leaders {
            polls.retain(|lane, (_, poll)| {
                let concerned = lane.leader == leader;
                if concerned {
                    poll.task.abort();
                    self.buffer.settle(poll.reserved, 0);
                }
                !concerned
            });
        }
    }

    /// Returns the bytes that came.
    fn on_fetched(
        &mut self,
        leader: &str,
        poll: Poll,
        result: Result<v1::FetchResponse, Error>,
    ) -> usize {
        let now = Instant::now();
        let metadata = self.client.cached();
        let items = match result {
            Ok(response) => self
                .cursors
                .on_response(leader, &poll.asked, response, metadata, now),
            Err(error) => self
                .cursors
                .on_failure(leader, &poll.asked, &error, metadata, now),
        };
        let cost = |item: &Item| match item {
            Item::Batches { batches, .. } => {
                batches.iter().map(|b| b.bytes.len() + BATCH_OVERHEAD).sum()
            }
            _ => 0,
        };
        let came = items.iter().map(cost).sum();
        self.buffer.settle(poll.reserved, came);
        for item in items {
            // Fails only when the consumer is gone; then the commands end, too.
            let _ = self.items.send(item);
        }
        came
    }

    /// The partitions of whole topics that aren't read yet.
    fn new_partitions(&self) -> Vec<(Arc<str>, i32)> {
        let mut fresh = Vec::new();
        for name in &self.whole_topics {
            let Some(topic) = self.client.cached().topic(name) else {
                continue;
            };
            let count = i32::try_from(topic.leaders.len()).unwrap_or(i32::MAX);
            fresh.extend((self.cursors.partitions_of(name)..count).map(|p| (name.clone(), p)));
        }
        fresh
    }

    fn join(&mut self, joined: Vec<(Arc<Assigned>, i64)>) {
        for (assigned, offset) in joined {
            if assigned.partition == self.cursors.partitions_of(&assigned.topic) {
                tracing::info!(topic = %assigned.topic, partition = assigned.partition, "reading a new partition");
                let _ = self.items.send(Item::Joined {
                    assigned: assigned.clone(),
                    offset,
                });
                self.cursors.add(assigned, offset);
            }
        }
    }
}

async fn fetch(
    client: Client,
    lane: Lane,
    id: u64,
    request: v1::FetchRequest,
    max_wait: Duration,
) -> Done {
    let call = async {
        let mut service = client.transport().fetcher(&lane.leader)?;
        let limit = client.transport().request_timeout() + max_wait;
        Transport::call(&lane.leader, limit, service.fetch(request)).await
    };
    let result = call.await;
    Done::Fetched { lane, id, result }
}

/// Asks where partitions that are new begin. They are read from there: all that is in them came after the consumer started.
async fn find_beginnings(client: Client, partitions: Vec<(Arc<str>, i32)>) -> Done {
    let query = |(topic, partition): &(Arc<str>, i32)| Query {
        topic: topic.clone(),
        partition: *partition,
        spec: OffsetSpec::Earliest,
    };
    let queries = partitions.iter().map(query).collect();
    let found = offsets::find(&client, queries, client.deadline()).await;
    Done::Joined(found.map(|found| {
        let joined = partitions.into_iter().zip(found);
        joined
            .map(|((topic, partition), found)| {
                let offset = found.map_or(0, |at| at.offset);
                (Assigned::new(topic, partition), offset)
            })
            .collect()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leader_gets_more_polls_while_it_sends_much() {
        let leader: Arc<str> = "broker".into();
        let mut pace = Pace::default();
        let start = Instant::now();
        assert!(!pace.note(&leader, 100, start));
        assert_eq!(pace.lanes(&leader), 1);
        assert!(pace.note(&leader, MUCH, start));
        assert_eq!(pace.lanes(&leader), BUSY_LANES);
        // One of its polls may bring little.
        assert!(!pace.note(&leader, 100, start + CALM));
        assert!(!pace.note(&leader, MUCH, start + CALM));
        assert!(!pace.note(&leader, 100, start + 2 * CALM));
        assert!(pace.note(&leader, 100, start + 3 * CALM));
        assert_eq!(pace.lanes(&leader), 1);
    }
}
