//! The producer: its configuration and its public face.
//!
//! `send` appends to a batch in the [`accumulator`]; the [`sender`], a background task, drains batches into requests on the
//! [`link`]s to the brokers; [`lane`] keeps each partition in order; a [`Delivery`] tells the caller how it went.

mod accumulator;
mod batch;
mod delivery;
mod lane;
mod link;
mod record;
mod route;
mod sender;
mod stream;
mod transaction;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use millrace_proto::v1;
use millrace_record::{BatchBuilder, Compression, HEADER_LEN};
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::watch, time::Instant};

pub use delivery::{Delivery, RecordMeta};
pub use record::Record;
pub use transaction::{Transaction, TransactionalProducer};

use self::{
    accumulator::{Accumulator, Appended, Partition, Refused},
    route::Route,
    sender::Sender,
    transaction::Transactions,
};
use crate::{
    Client, backoff,
    error::{Error, ErrorKind},
    metadata::Topic,
    partitioner::Partitioner,
    transport::MAX_MESSAGE_BYTES,
};

/// The most that `max_request_bytes` can be: well below what a broker takes by default (8 MiB), which would end the stream.
const MAX_REQUEST_BYTES: usize = 4 << 20;

/// When a record counts as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Acks {
    /// When it is on every in-sync replica.
    #[default]
    All,
    /// When it is on the leader.
    Leader,
    /// When it is handed to the connection: failures after that go unnoticed, and offsets are unknown.
    None,
}

impl Acks {
    fn to_proto(self) -> v1::Acks {
        match self {
            Acks::All => v1::Acks::All,
            Acks::Leader => v1::Acks::Leader,
            Acks::None => v1::Acks::None,
        }
    }
}

/// What [`Producer::send`] does when the buffer is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backpressure {
    /// Waits for room.
    #[default]
    Wait,
    /// Waits for room, but no longer than this.
    WaitAtMost(Duration),
    /// Fails with [`ErrorKind::BufferFull`].
    Fail,
}

/// Configures a [`Producer`]. `{:?}` prints all settings.
#[derive(Debug, Clone)]
pub struct ProducerBuilder {
    client: Client,
    config: Config,
    idempotent: Option<bool>,
    transaction_timeout: Duration,
}

#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) acks: Acks,
    pub(crate) linger: Duration,
    pub(crate) batch_bytes: usize,
    pub(crate) max_request_bytes: usize,
    pub(crate) max_buffered_bytes: usize,
    pub(crate) max_in_flight: usize,
    pub(crate) compression: Compression,
    pub(crate) partitioner: Partitioner,
    pub(crate) delivery_timeout: Duration,
    pub(crate) backpressure: Backpressure,
}

impl ProducerBuilder {
    pub(crate) fn new(client: Client) -> Self {
        let config = Config {
            acks: Acks::All,
            linger: Duration::from_millis(5),
            batch_bytes: 128 << 10,
            max_request_bytes: 1 << 20,
            max_buffered_bytes: 64 << 20,
            max_in_flight: 5,
            compression: Compression::None,
            partitioner: Partitioner::KeyHash,
            delivery_timeout: Duration::from_secs(120),
            backpressure: Backpressure::Wait,
        };
        ProducerBuilder {
            client,
            config,
            idempotent: None,
            transaction_timeout: Duration::from_secs(60),
        }
    }

    /// When a record counts as written. Default: [`Acks::All`].
    pub fn acks(mut self, acks: Acks) -> Self {
        self.config.acks = acks;
        self
    }

    /// How long an open batch waits for more records. Zero sends as soon as there is a free place in flight, so that batches
    /// grow by themselves under load. Default: 5 ms, as Kafka's since 4.0: larger batches save both sides more time than the
    /// wait costs, at all but the lowest rates.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.config.linger = linger;
        self
    }

    /// A batch is full at this many bytes before compression, or at the topic's `max_message_bytes` if that is less. A larger
    /// record gets a batch of its own. At most 4 MiB. Default: 128 KiB.
    pub fn batch_bytes(mut self, bytes: usize) -> Self {
        self.config.batch_bytes = bytes;
        self
    }

    /// A request ends with the batch that would exceed this, unless it is the first. At most 4 MiB.
    /// Default: 1 MiB.
    pub fn max_request_bytes(mut self, bytes: usize) -> Self {
        self.config.max_request_bytes = bytes;
        self
    }

    /// The most bytes of records that wait or are under way. Requests in flight are encoded beside that: for each broker at
    /// most `max_in_flight` times `max_request_bytes`. Default: 64 MiB.
    pub fn max_buffered_bytes(mut self, bytes: usize) -> Self {
        self.config.max_buffered_bytes = bytes;
        self
    }

    /// How many requests may be under way to each broker. Without idempotence, more than one can change the order of records
    /// when a request fails and is repeated. Default: 5.
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.config.max_in_flight = requests;
        self
    }

    /// How batches are compressed. Default: not.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.config.compression = compression;
        self
    }

    /// How records without [`Record::partition`] are spread. Default: [`Partitioner::KeyHash`].
    pub fn partitioner(mut self, partitioner: Partitioner) -> Self {
        self.config.partitioner = partitioner;
        self
    }

    /// How long a record may take from `send` to its acknowledgement, all waits and retries included. Default: 120 s.
    pub fn delivery_timeout(mut self, timeout: Duration) -> Self {
        self.config.delivery_timeout = timeout;
        self
    }

    /// What `send` does when the buffer is full. Default: [`Backpressure::Wait`].
    pub fn backpressure(mut self, backpressure: Backpressure) -> Self {
        self.config.backpressure = backpressure;
        self
    }

    /// Whether the broker recognises batches that it has already, so that retries neither repeat nor reorder records.
    /// Default: true, unless `acks` is [`Acks::None`], which has no retries.
    pub fn idempotent(mut self, idempotent: bool) -> Self {
        self.idempotent = Some(idempotent);
        self
    }

    /// A transaction that takes longer is aborted; readers of committed records wait for it that long. At most 15 min. Default: 60 s.
    pub fn transaction_timeout(mut self, timeout: Duration) -> Self {
        self.transaction_timeout = timeout;
        self
    }

    /// Starts a producer that sends in transactions, under an id that the app keeps over its restarts: one for each of its instances that
    /// writes at the same time, such as the pod's name in a StatefulSet. Takes the id over from whoever had it, and aborts what
    /// that one had open.
    pub async fn build_transactional(
        self,
        transactional_id: impl Into<Arc<str>>,
    ) -> Result<TransactionalProducer, Error> {
        TransactionalProducer::build(self, transactional_id.into()).await
    }

    /// Starts the producer, whose work is done on the Tokio runtime that this is called in.
    pub async fn build(self) -> Result<Producer, Error> {
        self.start(None).await
    }

    async fn start(self, transactions: Option<Arc<Transactions>>) -> Result<Producer, Error> {
        let ProducerBuilder {
            client,
            config,
            idempotent,
            ..
        } = self;
        let invalid = |message: &str| Err(Error::new(ErrorKind::InvalidRequest, message));
        if config.max_in_flight == 0 || config.max_in_flight > 1000 {
            return invalid("max_in_flight must be from 1 to 1000");
        }
        if config.batch_bytes == 0 || config.batch_bytes > MAX_REQUEST_BYTES {
            return invalid("batch_bytes must be from 1 to 4 MiB");
        }
        if config.max_request_bytes == 0 || config.max_request_bytes > MAX_REQUEST_BYTES {
            return invalid("max_request_bytes must be from 1 to 4 MiB");
        }
        if config.max_buffered_bytes < 4096 || config.max_buffered_bytes > u32::MAX as usize {
            return invalid("max_buffered_bytes must be from 4 KiB to 4 GiB");
        }
        if config.delivery_timeout < config.linger {
            return invalid("delivery_timeout must not be less than linger");
        }
        if idempotent == Some(true) && config.acks == Acks::None {
            return invalid(
                "an idempotent producer needs answers: set acks to All or Leader, or idempotent to false",
            );
        }
        if transactions.is_some() && (idempotent == Some(false) || config.acks != Acks::All) {
            return invalid("a transactional producer is idempotent, with acks All");
        }
        let runtime = Handle::try_current().map_err(|error| {
            let message = format!("build the producer within a Tokio runtime: {error}");
            Error::new(ErrorKind::InvalidRequest, message)
        })?;
        let is_idempotent = idempotent.unwrap_or(config.acks != Acks::None);
        let identity = match &transactions {
            Some(transactions) => Some(transactions.current().1),
            None if !is_idempotent => None,
            None => Some(backoff::until(client.deadline(), || client.new_identity()).await?),
        };
        let accumulator = Accumulator::new(
            config.compression,
            config.batch_bytes,
            config.linger,
            config.delivery_timeout,
            config.max_buffered_bytes,
            transactions.is_some(),
        );
        let shared = Arc::new(Shared {
            client,
            config,
            runtime,
            accumulator,
            routes: ArcSwap::default(),
            partitions: Mutex::default(),
            finished: watch::channel(false).0,
            transactions,
        });
        let sender = Sender::new(shared.clone(), identity);
        shared.runtime.spawn(sender.run());
        Ok(Producer {
            handle: Arc::new(Last { shared }),
        })
    }
}

/// What a producer's callers and its sender share.
pub(crate) struct Shared {
    client: Client,
    config: Config,
    /// Where the producer's tasks run: `try_send` may be called from anywhere.
    runtime: Handle,
    accumulator: Accumulator,
    routes: ArcSwap<HashMap<Arc<str>, Arc<Route>>>,
    /// Every partition ever used, by slot. Also the lock under which `routes` changes.
    partitions: Mutex<Vec<Arc<Partition>>>,
    finished: watch::Sender<bool>,
    transactions: Option<Arc<Transactions>>,
}

impl Shared {
    fn partition_count(&self) -> usize {
        self.partitions.lock().len()
    }

    fn partitions_from(&self, slot: usize) -> Vec<Arc<Partition>> {
        self.partitions
            .lock()
            .get(slot..)
            .unwrap_or_default()
            .to_vec()
    }

    fn topics(&self) -> Vec<String> {
        self.routes
            .load()
            .keys()
            .map(|topic| topic.to_string())
            .collect()
    }

    /// The topic is gone: the next `send` asks for it anew.
    fn forget(&self, topic: &str) {
        let _lock = self.partitions.lock();
        let mut routes = HashMap::clone(&self.routes.load());
        if routes.remove(topic).is_some() {
            self.routes.store(Arc::new(routes));
        }
    }

    /// Makes the topic's route, or adds partitions to it.
    fn take_over(&self, name: &Arc<str>, topic: &Topic) {
        let mut partitions = self.partitions.lock();
        let routes = self.routes.load();
        let known = routes
            .get(name)
            .map(|route| route.partitions.clone())
            .unwrap_or_default();
        if topic.leaders.len() <= known.len() || topic.leaders.is_empty() {
            return;
        }
        let max_message_bytes = match topic.max_message_bytes {
            0 => MAX_MESSAGE_BYTES,
            bytes => bytes,
        };
        let mut all = known;
        for index in all.len()..topic.leaders.len() {
            // A partition's index came from an i32.
            let partition = Partition::new(
                partitions.len(),
                name.clone(),
                index as i32,
                max_message_bytes,
            );
            let partition = Arc::new(partition);
            partition
                .available
                .store(topic.leaders[index].address.is_some(), Ordering::Relaxed);
            partitions.push(partition.clone());
            all.push(partition);
        }
        let mut routes = HashMap::clone(&routes);
        routes.insert(name.clone(), Arc::new(Route::new(name.clone(), all)));
        self.routes.store(Arc::new(routes));
    }

    /// After a refresh: topics may have more partitions.
    fn take_over_growth(&self) {
        for name in self.routes.load().keys() {
            if let Some(topic) = self.client.cached().topic(name) {
                self.take_over(name, &topic);
            }
        }
    }

    /// Makes the route of a topic that isn't known yet.
    async fn find_route(&self, name: &Arc<str>) -> Result<(), Error> {
        let patience = self
            .config
            .delivery_timeout
            .min(self.client.transport().request_timeout());
        let topic = self.client.topic(name, Instant::now() + patience).await?;
        if topic.leaders.is_empty() {
            return Err(Error::unknown_partition(name, 0, 0));
        }
        self.take_over(name, &topic);
        Ok(())
    }

    /// `None`: the topic isn't known yet.
    fn append(&self, record: &Record, granted: &mut usize) -> Option<Result<Appended, Refused>> {
        if let Some(closed) = self.accumulator.closed.get() {
            return Some(Err(Refused::Failed(closed.clone())));
        }
        let routes = self.routes.load();
        let route = routes.get(&record.topic)?;
        let timestamp_ms = record.timestamp_ms.unwrap_or_else(now_ms);
        Some(route.append(
            &self.accumulator,
            self.config.partitioner,
            record,
            timestamp_ms,
            granted,
        ))
    }
}

fn now_ms() -> i64 {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

/// Sends records. Cheap to clone; clones share one buffer and one connection to each broker.
///
/// Call [`close`](Producer::close) before the last clone is dropped, else what is still buffered may be lost with the runtime.
#[derive(Clone)]
pub struct Producer {
    handle: Arc<Last>,
}

/// Notices when the last [`Producer`] goes.
struct Last {
    shared: Arc<Shared>,
}

impl fmt::Debug for Producer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Producer")
            .field("config", &self.handle.shared.config)
            .finish_non_exhaustive()
    }
}

/// A record that was not taken, given back.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct TrySendError {
    /// The record.
    pub record: Record,
    /// Why.
    pub error: Error,
}

impl Producer {
    /// Puts a record in the buffer. Waits only for room there (see [`Backpressure`]), and the first time for the topic's
    /// metadata. Await the [`Delivery`] to learn whether the record was written; dropping it changes nothing.
    ///
    /// Cancel safe: a record is either in the buffer or not.
    pub async fn send(&self, record: Record) -> Result<Delivery, Error> {
        match self.handle.shared.append(&record, &mut 0) {
            Some(Ok(appended)) => {
                if appended.sealed {
                    // Lets the sender have its turn on a runtime with one thread.
                    tokio::task::yield_now().await;
                }
                Ok(appended.delivery)
            }
            Some(Err(Refused::Failed(error))) if error.kind() != ErrorKind::UnknownPartition => {
                Err(error)
            }
            _ => self.send_patiently(record).await,
        }
    }

    /// Puts a record in the buffer if that is possible at once, else gives it back. May be called outside of a runtime.
    ///
    /// The metadata of a topic that this producer hasn't used yet is fetched in the background; until it is there, this fails
    /// with [`ErrorKind::NotReady`].
    #[allow(clippy::result_large_err)] // The record comes back by value, that is the point.
    pub fn try_send(&self, record: Record) -> Result<Delivery, TrySendError> {
        let error = match self.handle.shared.append(&record, &mut 0) {
            Some(Ok(appended)) => return Ok(appended.delivery),
            Some(Err(Refused::Failed(error))) => error,
            Some(Err(Refused::NoRoom | Refused::Switch)) => self.buffer_full(),
            None => {
                let (shared, topic) = (self.handle.shared.clone(), record.topic.clone());
                let message = format!(
                    "the metadata of topic `{topic}` is being fetched; try again, or use `send`"
                );
                let runtime = shared.runtime.clone();
                runtime.spawn(async move {
                    if let Err(error) = shared.find_route(&topic).await {
                        tracing::warn!(%topic, %error, "can't get the topic's metadata");
                    }
                });
                Error::new(ErrorKind::NotReady, message)
            }
        };
        Err(TrySendError { record, error })
    }

    /// Sends everything that is in the buffer now, whether due or not, and waits for the outcome. Fails with the first failure
    /// among those records, so that callers who drop deliveries learn of it.
    pub async fn flush(&self) -> Result<(), Error> {
        let accumulator = &self.handle.shared.accumulator;
        let incomplete = accumulator.incomplete();
        if incomplete.is_empty() {
            return Ok(());
        }
        accumulator.tell(|inbox| inbox.flush = true);
        let mut outcome = Ok(());
        for completion in incomplete {
            let delivered = completion.delivery(0, 0).await;
            outcome = outcome.and(delivered.map(drop));
        }
        outcome
    }

    /// Takes no more records, sends what is in the buffer, and ends the producer and all its clones. What is not acknowledged
    /// within `timeout` fails, and so does this call.
    pub async fn close(&self, timeout: Duration) -> Result<(), Error> {
        let shared = &self.handle.shared;
        let _ = shared.accumulator.closed.set(Error::closed("producer"));
        shared.accumulator.budget.close();
        shared.accumulator.tell(|inbox| inbox.close = true);
        let mut finished = shared.finished.subscribe();
        if tokio::time::timeout(timeout, finished.wait_for(|&finished| finished))
            .await
            .is_ok()
        {
            return Ok(());
        }
        let unsent = shared.accumulator.incomplete().len();
        shared.accumulator.tell(|inbox| inbox.abort = true);
        // The sender does not wait for anything on its way out.
        let _ = finished.wait_for(|&finished| finished).await;
        let message =
            format!("closing took longer than {timeout:?}; {unsent} batches were given up");
        Err(Error::new(ErrorKind::TimedOut, message))
    }

    /// The way of `send` that may wait.
    #[cold]
    async fn send_patiently(&self, record: Record) -> Result<Delivery, Error> {
        let shared = &self.handle.shared;
        let patience = match shared.config.backpressure {
            Backpressure::Wait => None,
            Backpressure::WaitAtMost(wait) => Some(Instant::now() + wait),
            Backpressure::Fail => Some(Instant::now()),
        };
        let mut looked_again = false;
        let mut grant = Grant { shared, bytes: 0 };
        loop {
            match shared.append(&record, &mut grant.bytes) {
                None => shared.find_route(&record.topic).await?,
                Some(Ok(appended)) => return Ok(appended.delivery),
                Some(Err(Refused::Failed(error))) => {
                    // The topic may have got more partitions.
                    if error.kind() != ErrorKind::UnknownPartition || looked_again {
                        return Err(error);
                    }
                    looked_again = true;
                    shared.client.refresh(&[record.topic.to_string()]).await?;
                    shared.take_over_growth();
                }
                Some(Err(Refused::NoRoom | Refused::Switch)) => {
                    // Enough to begin a new batch, whatever happens meanwhile.
                    let (key, value) = (record.key.as_deref(), record.value.as_deref());
                    let needed =
                        HEADER_LEN + BatchBuilder::max_record_size(key, value, &record.headers);
                    grant
                        .acquire(needed, patience)
                        .await
                        .ok_or_else(|| self.buffer_full())??;
                }
            }
        }
    }

    fn buffer_full(&self) -> Error {
        let bytes = self.handle.shared.config.max_buffered_bytes;
        Error::new(
            ErrorKind::BufferFull,
            format!(
                "the producer's buffer of {bytes} bytes is full: the brokers are slower than this producer; wait, send less or \
                 raise max_buffered_bytes"
            ),
        )
    }
}

/// Bytes of the budget that a waiting `send` holds; given back if it is cancelled.
struct Grant<'a> {
    shared: &'a Shared,
    bytes: usize,
}

impl Grant<'_> {
    /// `None`: not within `patience`.
    async fn acquire(
        &mut self,
        bytes: usize,
        patience: Option<Instant>,
    ) -> Option<Result<(), Error>> {
        let accumulator = &self.shared.accumulator;
        let short = bytes.saturating_sub(self.bytes);
        let _waiting = Waiting::new(accumulator);
        let permits = accumulator
            .budget
            .acquire_many(u32::try_from(short).unwrap_or(u32::MAX));
        let permit = match patience {
            None => permits.await,
            Some(until) => tokio::time::timeout_at(until, permits).await.ok()?,
        };
        Some(match permit {
            Ok(permit) => {
                permit.forget();
                self.bytes += short;
                Ok(())
            }
            Err(_) => Err(accumulator
                .closed
                .get()
                .cloned()
                .unwrap_or_else(|| Error::closed("producer"))),
        })
    }
}

impl Drop for Grant<'_> {
    fn drop(&mut self) {
        self.shared.accumulator.budget.add_permits(self.bytes);
    }
}

/// Counts a caller that waits for room.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(accumulator: &'a Accumulator) -> Self {
        accumulator.waiting.fetch_add(1, Ordering::AcqRel);
        accumulator.news.notify_one();
        Waiting(&accumulator.waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Last {
    fn drop(&mut self) {
        let accumulator = &self.shared.accumulator;
        let batches = accumulator.incomplete().len();
        if batches > 0 && accumulator.closed.get().is_none() {
            let waiting: usize = self
                .shared
                .partitions
                .lock()
                .iter()
                .map(|p| p.records())
                .sum();
            tracing::warn!(
                unsent_records = waiting,
                unacknowledged_batches = batches,
                "producer dropped without close; sending on in the background while the runtime lives"
            );
        }
        accumulator.tell(|inbox| inbox.close = true);
    }
}
