//! What people ask about transactions.

use std::{collections::BTreeMap, sync::Arc};

use millrace_proto::{TRANSACTIONS_TOPIC, v1};

use crate::{Client, Error, group::flat, transport::Transport};

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
        let mut all = BTreeMap::new();
        self.refresh(&[TRANSACTIONS_TOPIC.to_owned()]).await?;
        for address in self.cached().brokers() {
            let mut service = self.transport().transactions(&address)?;
            let limit = self.transport().request_timeout();
            let call = service.list_transactions(v1::ListTransactionsRequest {});
            let response = Transport::call(&address, limit, call).await?;
            let some = response
                .transactions
                .into_iter()
                .map(TransactionSummary::from);
            all.extend(some.map(|summary| (summary.transactional_id.clone(), summary)));
        }
        Ok(all.into_values().collect())
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
