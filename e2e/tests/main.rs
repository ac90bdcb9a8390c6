//! What a user of Millrace may rely on, checked against the real programs: `millrace-broker` and `millrace`.

// .clippy.toml allows it in tests, but does not know their helper functions here.
#![allow(clippy::unwrap_used)]

mod abuse;
mod backup;
mod boundary;
mod cli;
mod compaction;
mod crash;
mod disk_full;
mod errors;
mod fetch;
mod groups;
mod history;
mod observe;
mod produce;
mod python;
mod raw;
mod retention;
mod transactions;
mod walkthrough;
