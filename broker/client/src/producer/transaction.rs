//! Transactions: the public face, and what the sender has to know of the one that is open.
//!
//! A partition's batches wait until the transaction's coordinator has made it part of the transaction; the sender sees to that. Whatever fails to
//! be delivered fails the transaction.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use millrace_proto::{
    TRANSACTIONS_TOPIC,
    v1::{self, transaction_service_client::TransactionServiceClient},
};
use millrace_record::ProducerState;
use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::{Response, Status, transport::Channel};

use super::{Delivery, Producer, ProducerBuilder, Record};
use crate::{
    Consumer, GroupOffset,
    coordinator::Coordinator,
    error::{Error, ErrorKind},
    group::by_topic,
    transport::Transport,
};

/// What callers and the sender share of transactions.
#[derive(Debug)]
pub(crate) struct Transactions {
    coordinator: Coordinator,
    timeout: Duration,
    current: Mutex<Current>,
    /// Whether the current one has failed: what was not sent of it is not sent any more.
    failed: AtomicBool,
}

#[derive(Debug)]
struct Current {
    /// Rises with each transaction.
    number: u64,
    identity: ProducerState,
    failed: Option<Error>,
    /// Whether the coordinator may know of it.
    begun: bool,
}

impl Transactions {
    /// Takes the transactional id over.
    pub(crate) async fn init(coordinator: Coordinator, timeout: Duration) -> Result<Self, Error> {
        let identity = init(&coordinator, timeout, None).await?;
        let current = Current {
            number: 0,
            identity,
            failed: None,
            begun: false,
        };
        Ok(Self {
            coordinator,
            timeout,
            current: Mutex::new(current),
            failed: AtomicBool::new(false),
        })
    }

    /// The current transaction's number, and who its producer is.
    pub(crate) fn current(&self) -> (u64, ProducerState) {
        let current = self.current.lock();
        (current.number, current.identity)
    }

    /// The transaction can't be committed any more.
    pub(crate) fn fail(&self, error: &Error) {
        let mut current = self.current.lock();
        current.failed.get_or_insert_with(|| error.clone());
        self.failed.store(true, Ordering::Release);
    }

    /// Why it can't be.
    pub(crate) fn failed(&self) -> Option<Error> {
        match self.failed.load(Ordering::Acquire) {
            true => self.current.lock().failed.clone(),
            false => None,
        }
    }

    /// Does something if it has failed, before another one can begin. Why it has.
    pub(crate) fn while_failed(&self, act: impl FnOnce()) -> Option<Error> {
        if !self.failed.load(Ordering::Acquire) {
            return None;
        }
        let current = self.current.lock();
        let failed = current.failed.clone()?;
        act();
        Some(failed)
    }

    fn begin(&self) {
        let mut current = self.current.lock();
        current.number += 1;
        current.failed = None;
        current.begun = false;
        self.failed.store(false, Ordering::Release);
    }

    /// Makes partitions part of the current transaction.
    pub(crate) async fn add_partitions(
        &self,
        partitions: &[(Arc<str>, i32)],
        deadline: Instant,
    ) -> Result<(), Error> {
        let identity = self.join();
        let request = v1::AddPartitionsRequest {
            transactional_id: self.coordinator.key().to_string(),
            producer_id: identity.id,
            producer_epoch: identity.epoch.into(),
            partitions: by_topic(partitions.iter()),
        };
        let call = |mut service: TransactionServiceClient<Channel>| {
            let request = request.clone();
            async move { service.add_partitions(request).await }
        };
        self.call(deadline, call).await.map(drop)
    }

    async fn add_offsets(
        &self,
        offsets: v1::CommitOffsetsRequest,
        deadline: Instant,
    ) -> Result<(), Error> {
        let identity = self.join();
        let request = v1::AddOffsetsRequest {
            transactional_id: self.coordinator.key().to_string(),
            producer_id: identity.id,
            producer_epoch: identity.epoch.into(),
            offsets: Some(offsets),
        };
        let call = |mut service: TransactionServiceClient<Channel>| {
            let request = request.clone();
            async move { service.add_offsets(request).await }
        };
        self.call(deadline, call).await.map(drop)
    }

    /// From now on the coordinator may know of it.
    fn join(&self) -> ProducerState {
        let mut current = self.current.lock();
        current.begun = true;
        current.identity
    }

    async fn end(&self, commit: bool, deadline: Instant) -> Result<(), Error> {
        let identity = {
            let current = self.current.lock();
            if !current.begun {
                return Ok(());
            }
            current.identity
        };
        let request = v1::EndTransactionRequest {
            transactional_id: self.coordinator.key().to_string(),
            producer_id: identity.id,
            producer_epoch: identity.epoch.into(),
            commit,
        };
        let call = |mut service: TransactionServiceClient<Channel>| {
            let request = request.clone();
            async move { service.end_transaction(request).await }
        };
        let next = self.call(deadline, call).await?;
        self.current.lock().identity = identity_of(next.producer_id, next.producer_epoch)?;
        Ok(())
    }

    /// Aborts what is left of the last transaction, unless another producer has taken over.
    async fn recover(&self) -> Result<(), Error> {
        let (_, identity) = self.current();
        let next = init(&self.coordinator, self.timeout, Some(identity)).await?;
        self.current.lock().identity = next;
        Ok(())
    }

    async fn call<T, F>(
        &self,
        deadline: Instant,
        call: impl Fn(TransactionServiceClient<Channel>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.coordinator
            .call(deadline, Transport::transactions, call)
            .await
    }
}

async fn init(
    coordinator: &Coordinator,
    timeout: Duration,
    known: Option<ProducerState>,
) -> Result<ProducerState, Error> {
    let request = v1::InitTransactionsRequest {
        transactional_id: coordinator.key().to_string(),
        timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
        producer_id: known.map(|known| known.id),
        producer_epoch: known.map(|known| known.epoch.into()),
    };
    let call = |mut service: TransactionServiceClient<Channel>| {
        let request = request.clone();
        async move { service.init_transactions(request).await }
    };
    let deadline = coordinator.client().deadline();
    let told = coordinator
        .call(deadline, Transport::transactions, call)
        .await?;
    identity_of(told.producer_id, told.producer_epoch)
}

fn identity_of(id: i64, epoch: i32) -> Result<ProducerState, Error> {
    let epoch = i16::try_from(epoch).map_err(|_| {
        let message = format!("a broker gave out producer epoch {epoch}");
        Error::new(ErrorKind::Transport, message)
    })?;
    Ok(ProducerState {
        id,
        epoch,
        base_sequence: 0,
    })
}

/// Sends records in transactions: readers of committed records see all of one, or nothing. For one task at a time.
///
/// Two producers can't have the same transactional id: whoever was built last fences all others, which then fail with
/// [`ErrorKind::FencedProducer`]. So an app that is started again under its id goes on safely, whatever its last process is still doing.
pub struct TransactionalProducer {
    producer: Producer,
    transactions: Arc<Transactions>,
    /// The last transaction was neither committed nor aborted, as far as is known.
    unsettled: bool,
}

impl fmt::Debug for TransactionalProducer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransactionalProducer")
            .field("transactional_id", self.transactions.coordinator.key())
            .finish_non_exhaustive()
    }
}

impl TransactionalProducer {
    pub(super) async fn build(builder: ProducerBuilder, id: Arc<str>) -> Result<Self, Error> {
        let client = builder.client.clone();
        let coordinator = Coordinator::new(client, TRANSACTIONS_TOPIC, id);
        let transactions = Transactions::init(coordinator, builder.transaction_timeout).await?;
        let transactions = Arc::new(transactions);
        Ok(Self {
            producer: builder.start(Some(transactions.clone())).await?,
            transactions,
            unsettled: false,
        })
    }

    /// Begins a transaction. Brokers hear of it with its first record. What is left of the last one, if that was dropped or could not be ended, is aborted
    /// first.
    pub async fn begin(&mut self) -> Result<Transaction<'_>, Error> {
        if self.unsettled {
            self.discard().await;
            self.transactions.recover().await?;
        }
        self.unsettled = true;
        self.transactions.begin();
        Ok(Transaction { producer: self })
    }

    /// Ends the producer. A transaction that is open is aborted by the next one with its id, or by its time-out.
    pub async fn close(self, timeout: Duration) -> Result<(), Error> {
        self.producer.close(timeout).await
    }

    /// Gives up what was not sent, and waits for what was.
    async fn discard(&self) {
        let error = Error::new(
            ErrorKind::TransactionAborted,
            "the transaction was aborted before this record was sent",
        );
        self.transactions.fail(&error);
        // It fails with what was given up.
        let _ = self.producer.flush().await;
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.producer.handle.shared.config.delivery_timeout
    }
}

/// An open transaction. Dropped, it is aborted when the next one begins, or by its time-out.
#[must_use = "a transaction that is not committed is aborted"]
pub struct Transaction<'a> {
    producer: &'a mut TransactionalProducer,
}

impl fmt::Debug for Transaction<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Transaction").field(&self.producer).finish()
    }
}

impl Transaction<'_> {
    /// Puts a record in the buffer, as [`Producer::send`] does; [`commit`](Transaction::commit) waits for all of them. Once one could not be
    /// delivered, all fail: abort the transaction.
    pub async fn send(&self, record: Record) -> Result<(), Error> {
        self.send_tracked(record).await.map(drop)
    }

    /// The same, for who wants to know where the record went.
    pub async fn send_tracked(&self, record: Record) -> Result<Delivery, Error> {
        match self.producer.transactions.failed() {
            Some(error) => Err(error),
            None => self.producer.producer.send(record).await,
        }
    }

    /// Commits what the consumer has returned so far, for its group, if the transaction is committed. The consumer must be a member of a group
    /// and not commit by itself (`auto_commit(None)`). Until the transaction ends, no one can read these offsets.
    ///
    /// Fails if a partition went to another member after records of it were returned: abort the transaction, and
    /// [`rewind`](Consumer::rewind) the consumer.
    pub async fn send_offsets(&self, consumer: &mut Consumer) -> Result<(), Error> {
        let read = consumer.positions().into_iter();
        let offsets = read.map(|(assigned, offset)| {
            GroupOffset::new(assigned.topic.clone(), assigned.partition, offset)
        });
        self.hold(consumer, offsets.collect()).await
    }

    /// The same for these offsets, of partitions that are the consumer's.
    pub async fn send_offsets_of(
        &self,
        consumer: &mut Consumer,
        offsets: impl IntoIterator<Item = GroupOffset>,
    ) -> Result<(), Error> {
        let offsets: Vec<GroupOffset> = offsets.into_iter().collect();
        consumer.check_offsets(&offsets).await?;
        self.hold(consumer, offsets).await
    }

    async fn hold(&self, consumer: &mut Consumer, offsets: Vec<GroupOffset>) -> Result<(), Error> {
        let transactions = &self.producer.transactions;
        if let Some(error) = transactions.failed() {
            return Err(error);
        }
        consumer
            .check_kept()
            .inspect_err(|error| transactions.fail(error))?;
        let committer = consumer.committer().await?;
        if offsets.is_empty() {
            return Ok(());
        }
        let offsets = v1::CommitOffsetsRequest {
            group_id: committer.group.to_string(),
            member_id: committer.member_id,
            epoch: committer.epoch,
            offsets: offsets.into_iter().map(v1::OffsetCommit::from).collect(),
        };
        let held = transactions
            .add_offsets(offsets, self.producer.deadline())
            .await;
        held.inspect_err(|error| transactions.fail(error))?;
        consumer.settled();
        Ok(())
    }

    /// Sends what is in the buffer, waits for it, and commits. If this fails with something but [`ErrorKind::TimedOut`] or
    /// [`ErrorKind::Transport`], the transaction is not committed; then, abort it, or begin another one.
    pub async fn commit(self) -> Result<(), Error> {
        let flushed = self.producer.producer.flush().await;
        let transactions = &self.producer.transactions;
        if let Some(error) = transactions.failed() {
            return Err(error);
        }
        flushed?;
        transactions.end(true, self.producer.deadline()).await?;
        self.producer.unsettled = false;
        Ok(())
    }

    /// Gives up what was not sent, and aborts: readers of committed records never see anything of it.
    pub async fn abort(self) -> Result<(), Error> {
        self.producer.discard().await;
        let deadline = self.producer.deadline();
        self.producer.transactions.end(false, deadline).await?;
        self.producer.unsettled = false;
        Ok(())
    }
}
