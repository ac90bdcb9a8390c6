//! A shard of transactions at work: what follows once something is kept is the [courier's](super::courier).

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use millrace_proto::v1::{
    AddOffsetsRequest, AddPartitionsRequest, EndTransactionRequest, HoldOffsetsRequest,
    InitTransactionsRequest, TransactionSummary,
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{
    Producer, TOPIC, TransactionError,
    courier::Courier,
    entry::Entry,
    shard::{Ending, Shard},
};
use crate::{
    directory::Directory,
    partition::NotEnoughReplicas,
    shards::{self, Answer, Machine, Now, Shards, answer, refuse},
    storage::Store,
};

/// How long to wait while too few replicas are in sync.
const AGAIN: Duration = Duration::from_millis(100);

/// Requests for the next transaction of an id wait for so long until all know of the last one's end, and so many of them.
const WAIT: Duration = Duration::from_secs(5);
const MAX_WAITING: usize = 16;

/// How a request on a transaction is answered.
type Reply<T> = shards::Reply<T, TransactionError>;

/// What a shard can be asked.
pub(crate) enum Request {
    Init(InitTransactionsRequest, Reply<Producer>),
    /// Answered with what the partitions' leaders said.
    AddPartitions(AddPartitionsRequest, Reply<Result<(), Status>>),
    /// Answered with what the group's coordinator said.
    AddOffsets(AddOffsetsRequest, Reply<Result<(), Status>>),
    End(EndTransactionRequest, Reply<Producer>),
    List(Reply<Vec<TransactionSummary>>),
    /// All participants of a transaction know that it has ended.
    Told(Arc<str>, Producer, Reply<()>),
}

/// All shards of transactions on this broker.
pub(crate) type Transactions = Shards<TransactionMachine>;

/// Begins to coordinate the transactions whose shards are led here. `new_id` gives a producer id that no one has had.
pub(crate) fn coordinate(
    store: Arc<Store>,
    directory: Arc<Directory>,
    new_id: fn() -> i64,
    stop: CancellationToken,
) -> Arc<Transactions> {
    let courier = Arc::new(Courier::new(directory.clone(), stop.clone()));
    let make = move |requests| TransactionMachine {
        shard: Shard::new(new_id),
        courier: courier.clone(),
        requests,
        endings: Vec::new(),
        waiting: HashMap::new(),
    };
    Shards::new(TOPIC, store, directory, make, stop)
}

/// A shard of transactions, and those who carry its messages.
pub(crate) struct TransactionMachine {
    shard: Shard,
    courier: Arc<Courier>,
    /// The way back to this shard.
    requests: mpsc::WeakSender<Request>,
    /// To be told once all of a round is kept.
    endings: Vec<Ending>,
    /// Requests, by transactional id, that come before all know that its last transaction has ended, and until when they wait for that.
    waiting: HashMap<Arc<str>, Vec<(Instant, Request)>>,
}

impl Machine for TransactionMachine {
    type Entry = Entry;
    type Request = Request;

    fn replay(&mut self, entry: Entry, _: Now) {
        self.shard.replay(entry);
    }

    fn replayed(&mut self, _: Now) {
        self.shard.replayed();
    }

    fn len(&self) -> usize {
        self.shard.len()
    }

    fn begin(&mut self, now: Now, ticked: bool) {
        if ticked {
            self.shard.tick(now);
            self.give_up_waiting(now);
        }
    }

    fn take_in(&mut self, request: Request, now: Now) -> Answer {
        let shard = &mut self.shard;
        match request {
            Request::Init(request, reply) => {
                let before = match (request.producer_id, request.producer_epoch) {
                    (Some(id), Some(epoch)) => producer(id, epoch).map(Some),
                    _ => Ok(None),
                };
                let id = &request.transactional_id;
                let made =
                    before.and_then(|before| shard.init(id, request.timeout_ms, before, now));
                match made {
                    Err(TransactionError::Concurrent(id)) => {
                        self.wait(id, Request::Init(request, reply), now)
                    }
                    made => answer(reply, made),
                }
            }
            Request::AddPartitions(request, reply) => {
                let added =
                    producer(request.producer_id, request.producer_epoch).and_then(|producer| {
                        let (id, partitions) = (&request.transactional_id, &request.partitions);
                        shard.add_partitions(id, producer, partitions, now)?;
                        Ok(producer)
                    });
                if let Err(TransactionError::Concurrent(id)) = added {
                    return self.wait(id, Request::AddPartitions(request, reply), now);
                }
                let courier = self.courier.clone();
                followed(reply, added, move |producer| async move {
                    courier.open(producer, request.partitions).await
                })
            }
            Request::AddOffsets(request, reply) => {
                let added =
                    producer(request.producer_id, request.producer_epoch).and_then(|producer| {
                        let id = &request.transactional_id;
                        let group = request.offsets.as_ref().map(|o| o.group_id.as_str());
                        shard.add_group(id, producer, group.unwrap_or_default(), now)?;
                        Ok(producer)
                    });
                if let Err(TransactionError::Concurrent(id)) = added {
                    return self.wait(id, Request::AddOffsets(request, reply), now);
                }
                let courier = self.courier.clone();
                followed(reply, added, move |(producer_id, epoch)| async move {
                    courier
                        .hold(HoldOffsetsRequest {
                            producer_id,
                            producer_epoch: epoch.into(),
                            offsets: request.offsets,
                        })
                        .await
                })
            }
            Request::End(request, reply) => {
                let ended =
                    producer(request.producer_id, request.producer_epoch).and_then(|producer| {
                        shard.end(&request.transactional_id, producer, request.commit, now)
                    });
                answer(reply, ended)
            }
            Request::List(reply) => answer(reply, Ok(shard.list())),
            Request::Told(id, producer, reply) => {
                shard.told(&id, producer, now);
                let mut answers = vec![answer(reply, Ok(()))];
                for (_, request) in self.waiting.remove(&id).unwrap_or_default() {
                    answers.push(self.take_in(request, now));
                }
                Box::new(|| answers.into_iter().for_each(|answer| answer()))
            }
        }
    }

    fn refuse(request: Request, error: NotEnoughReplicas) {
        match request {
            Request::Init(_, reply) | Request::End(_, reply) => refuse(reply, error),
            Request::AddPartitions(_, reply) => refuse(reply, error),
            Request::AddOffsets(_, reply) => refuse(reply, error),
            Request::List(reply) => refuse(reply, error),
            Request::Told(.., reply) => refuse(reply, error),
        }
    }

    fn settle(&mut self, _: Now) -> Vec<Entry> {
        let (entries, mut endings) = self.shard.settle();
        self.endings.append(&mut endings);
        entries
    }

    fn kept(&mut self) {
        for ending in std::mem::take(&mut self.endings) {
            let (courier, requests) = (self.courier.clone(), self.requests.clone());
            tokio::spawn(async move {
                let (id, producer) = (ending.id.clone(), ending.producer);
                courier.close(ending, &requests).await;
                // If the shard is gone meanwhile, the next one tells them all again.
                while let Some(shard) = requests.upgrade() {
                    let (reply, answer) = oneshot::channel();
                    let told = Request::Told(id.clone(), producer, reply);
                    if shard.send(told).await.is_err() || !matches!(answer.await, Ok(Err(_))) {
                        return;
                    }
                    drop(shard);
                    tokio::time::sleep(AGAIN).await;
                }
            });
        }
    }

    fn snapshot(&self) -> Vec<Entry> {
        self.shard.snapshot()
    }
}

impl TransactionMachine {
    /// Has a request wait until all know of the last transaction's end. A producer that was told of it goes on at once.
    fn wait(&mut self, id: String, request: Request, now: Now) -> Answer {
        let waiting = self.waiting.entry(id.as_str().into()).or_default();
        if waiting.len() >= MAX_WAITING {
            return concurrent(id, request);
        }
        waiting.push((now.instant + WAIT, request));
        Box::new(|| {})
    }

    fn give_up_waiting(&mut self, now: Now) {
        self.waiting.retain(|id, waiting| {
            for (_, request) in waiting.extract_if(.., |(until, _)| *until <= now.instant) {
                concurrent(id.to_string(), request)();
            }
            !waiting.is_empty()
        });
    }
}

/// The answer to a request that comes too early.
fn concurrent(id: String, request: Request) -> Answer {
    let error = TransactionError::Concurrent(id);
    match request {
        Request::Init(_, reply) | Request::End(_, reply) => answer(reply, Err(error)),
        Request::AddPartitions(_, reply) => answer(reply, Err(error)),
        Request::AddOffsets(_, reply) => answer(reply, Err(error)),
        Request::List(reply) => answer(reply, Err(error)),
        Request::Told(.., reply) => answer(reply, Err(error)),
    }
}

/// Once all is kept, something else follows, whose outcome is the answer.
fn followed<F: Future<Output = Result<(), Status>> + Send + 'static>(
    reply: Reply<Result<(), Status>>,
    result: Result<Producer, TransactionError>,
    follow: impl FnOnce(Producer) -> F + Send + 'static,
) -> Answer {
    match result {
        Err(error) => answer(reply, Err(error)),
        Ok(producer) => Box::new(move || {
            tokio::spawn(async move {
                let followed = follow(producer).await;
                // Who asked may be gone.
                let _ = reply.send(Ok(followed));
            });
        }),
    }
}

fn producer(producer_id: i64, epoch: i32) -> Result<Producer, TransactionError> {
    match i16::try_from(epoch) {
        Ok(epoch) if epoch >= 0 => Ok((producer_id, epoch)),
        _ => Err(TransactionError::Invalid {
            field: "producer_epoch",
            message: format!("{epoch} is no epoch"),
        }),
    }
}
