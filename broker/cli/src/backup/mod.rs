//! `millrace export` and `millrace import`: topics into a folder or an object store, and back.

mod export;
mod import;
mod place;
mod segment;

pub(crate) use export::Export;
pub(crate) use import::Import;

/// Partitions that are copied at a time, by default: each takes the memory of a segment.
const PARALLEL: &str = "4";
