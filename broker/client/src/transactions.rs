//! What people ask about transactions.

use std::{collections::BTreeMap, sync::Arc};

use millrace_proto::{
    TRANSACTIONS_TOPIC,
    v1::{self, transaction_service_client::TransactionServiceClient},
};
use tonic::transport::Channel;

use crate::{
    Client, Error,
    coordinator::{self, Coordinator},
    group::flat,
    transport::Transport,
};

/// What a transactional id is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransactionState {
    /// No transaction is open.
    Idle,
    /// One is.
    Open,
    /// It is committed, and not everyone knows yet.
    Committing,
    /// It is aborted, and not everyone knows yet.
    Aborting,
}

/// A transactional id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransactionSummary {
    /// The app's choice.
    pub transactional_id: String,
    /// What it is doing.
    pub state: TransactionState,
    /// Of the current or the next transaction.
    pub producer_id: i64,
    /// Of the current or the next transaction.
    pub producer_epoch: i32,
    /// When the current one began: milliseconds since the Unix epoch.
    pub since_ms: Option<i64>,
    /// How long one may take, in milliseconds.
    pub timeout_ms: u32,
    /// Where the current one writes to.
    pub partitions: Vec<(Arc<str>, i32)>,
    /// Of which groups it commits offsets.
    pub groups: Vec<String>,
}

impl Client {
    /// All transactional ids of the cluster, by name.
    pub async fn transactions(&self) -> Result<Vec<TransactionSummary>, Error> {
        let list = |mut service: TransactionServiceClient<Channel>| async move {
            let request = v1::ListTransactionsRequest {};
            service.list_transactions(request).await
        };
        let topic = TRANSACTIONS_TOPIC;
        let lists = coordinator::each(self, topic, Transport::transactions, list).await?;
        let all = lists.into_iter().flat_map(|list| list.transactions);
        let all = all.map(|summary| (summary.transactional_id.clone(), summary.into()));
        Ok(all.collect::<BTreeMap<_, _>>().into_values().collect())
    }

    /// Aborts an open transaction, as its own producer could: that one is told so with its next call, and may begin another. An error if it has
    /// ended meanwhile, or another producer has taken over.
    pub async fn abort_transaction(&self, transaction: &TransactionSummary) -> Result<(), Error> {
        let id = transaction.transactional_id.as_str();
        let request = v1::EndTransactionRequest {
            transactional_id: id.to_owned(),
            producer_id: transaction.producer_id,
            producer_epoch: transaction.producer_epoch,
            commit: false,
        };
        let call = |mut service: TransactionServiceClient<Channel>| {
            let request = request.clone();
            async move { service.end_transaction(request).await }
        };
        let coordinator = Coordinator::new(self.clone(), TRANSACTIONS_TOPIC, id.into());
        let ended = coordinator.call(self.deadline(), Transport::transactions, call);
        ended.await.map(drop)
    }
}

impl From<v1::TransactionSummary> for TransactionSummary {
    fn from(summary: v1::TransactionSummary) -> Self {
        use v1::TransactionState as State;
        Self {
            state: match summary.state() {
                State::Idle | State::Unspecified => TransactionState::Idle,
                State::Open => TransactionState::Open,
                State::Committing => TransactionState::Committing,
                State::Aborting => TransactionState::Aborting,
            },
            partitions: flat(&summary.partitions),
            transactional_id: summary.transactional_id,
            producer_id: summary.producer_id,
            producer_epoch: summary.producer_epoch,
            since_ms: summary.since_ms,
            timeout_ms: summary.timeout_ms,
            groups: summary.groups,
        }
    }
}
