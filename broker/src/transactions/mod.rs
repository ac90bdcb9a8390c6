//! Transactions over several partitions, and offsets of groups (KIP-98, KIP-890). A transactional id's coordinator is the leader of its partition of the
//! internal topic [`TOPIC`].
//!
//! Pure, and driven by tests: [`shard`] (all transactional ids of a partition). Thin around it: [`entry`] (what is kept), [`coordinator`] (what
//! a [shard](crate::shards) does with it), [`courier`] (tells participants).
//!
//! # How a transaction goes
//! Each has a producer epoch of its own.
//! 1. A partition is added: the coordinator keeps that, and then lets its leader know of the transaction, which takes nothing of it before.
//!    So whoever has something of a transaction is known to the coordinator, and is told how it ended.
//! 2. It is ended: once the coordinator has kept how, that stands. Whatever happens, every participant is told until it has confirmed; only then
//!    the next transaction of the same id may begin.
//! 3. A participant that is told keeps a marker, which fences the transaction's epoch: what is still on its way can't come in after its end, nor
//!    end the next one. So everything may be told twice, and by whoever is or was the coordinator.

mod coordinator;
mod courier;
mod entry;
mod shard;
#[cfg(test)]
mod tests;

pub(crate) use self::coordinator::{Request, Transactions, coordinate};
pub(crate) use millrace_crds::TRANSACTIONS_TOPIC as TOPIC;

/// Who writes: a producer id and an epoch, which is that of one transaction.
pub(crate) type Producer = (i64, i16);

/// Why a request on a transaction is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TransactionError {
    #[error(
        "transactional id {0:?} is not known: it was never taken over, or not used for a week; begin with InitTransactions"
    )]
    Unknown(String),
    #[error(
        "transactional id {id:?}: producer {producer_id} with epoch {epoch} is fenced, as another one has taken over; end this one"
    )]
    Fenced {
        id: String,
        producer_id: i64,
        epoch: i16,
    },
    #[error(
        "transactional id {0:?}: the last transaction has not ended everywhere yet; try again in a moment"
    )]
    Concurrent(String),
    #[error(
        "transactional id {0:?}: the transaction was aborted, since its time was over or another producer has taken over; abort it here, too, and begin another one"
    )]
    Aborted(String),
    #[error("transactional id {0:?}: the transaction is committed; begin another one")]
    Committed(String),
    #[error("{0}")]
    Limit(String),
    #[error("{field}: {message}")]
    Invalid {
        field: &'static str,
        message: String,
    },
}
