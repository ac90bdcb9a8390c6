//! Rules broken on purpose, one at a time: each must be noticed by the simulator. Only in tests.

use std::cell::Cell;

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// An ISR change whose outcome is unknown is taken for not written.
    RollBackUnknown,
    /// A store that lost its data counts as the one that it was.
    IgnoreStoreIds,
    /// A replica joins the ISR with all that is committed, but not all that was there when the epoch began.
    JoinBelowEpochStart,
    /// A smaller ISR counts before it is written.
    ShrinkBeforeWritten,
    /// A follower counts before its log was compared.
    CountUnchecked,
    /// The leader counts what it has not synced.
    CountUnsynced,
}

thread_local! {
    static ON: Cell<Option<Mutation>> = const { Cell::new(None) };
}

/// Breaks a rule on this thread, or none.
pub(crate) fn set(mutation: Option<Mutation>) {
    ON.set(mutation);
}

pub(crate) fn is_on(mutation: Mutation) -> bool {
    ON.get() == Some(mutation)
}
