//! What producers and consumers saw while things broke, kept in a file, and an independent check of it.
//!
//! Responsible for the form of a history ([`Event`]), for writing it ([`Recorder`]) and for saying what in it can't be ([`check`]). Knows
//! nothing of brokers or faults: any program that can say what it sent and what it read can have its history checked.
//!
//! # What is checked
//! A partition is a log to which producers append and which consumers read from an offset on. The check is that of linearizability of the
//! appends: there must be one order of them that explains all answers, in which each append takes effect once, at some instant between its
//! invocation and its answer. Histories of registers or queues make this exponential; here the order is known, since reads and answers name
//! offsets, so n log n steps suffice. In detail, with `by(x)` as the earlier of x's acknowledgement and of the first time that anyone had read it:
//!
//! 1. Each offset has one value, whoever reads it, as often as they like, and each value one offset. So the offsets give *one* order.
//! 2. For no two appends holds `by(a) < invoked(b)` and `offset(b) < offset(a)`. Then let each append take effect at the latest invocation among
//!    those at its offset or before: that is never before its own invocation, by the condition never after `by`, and it grows with the offset.
//!    So these instants are the ones looked for. An append that broke the condition would have none.
//! 3. Each acknowledged append is in the log, at the offset that was answered, once all faults are mended and the whole log has been read.
//!    One that failed for certain isn't. One of unknown outcome may be either: it is in the order if it is in the log.
//! 4. Values of one producer come in the order in which it sent them, though it did not wait for one answer before it sent the next.
//! 5. Each consumer sees the log's offsets one by one, with no gap and no step back.
//!
//! What is not claimed: that a consumer sees the newest record at once. A read may be stale, never wrong.

mod check;
mod event;
mod record;
#[cfg(test)]
mod tests;

pub use check::{Counts, Verdict, Violation, check};
pub use event::{Event, Outcome, Seen, Value};
pub use record::{HistoryError, Recorder, read};
