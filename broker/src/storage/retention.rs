//! Retention: moves log start offsets forward and gives the space back, without rewriting what stays.
//!
//! A partition loses whole runs, oldest first, never the active one. A generation of which nothing is live any more goes as a
//! file. Where topics with different retention share a generation, it is rewritten once more than half of it is dead,
//! hence each byte that stays at most about once for each halving.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use bytesize::ByteSize;
use rocksdb::{BottommostLevelCompaction, CompactOptions, WriteBatch};
use tracing::{debug, info};

use crate::now_ms;

use super::{
    Generation, PartitionId, PartitionLog, StorageError,
    db::Db,
    keys,
    run::Run,
    writer::{GenerationBytes, Generations},
};

/// Applies the partition's retention. Returns the bytes that it lost.
pub(super) fn apply(
    db: &Db,
    generations: &Generations,
    log: &PartitionLog,
) -> Result<u64, StorageError> {
    let retention = log.config().retention;
    let released = log.released();
    if retention.time.is_none() && retention.bytes.is_none() && released <= log.log_start() {
        return Ok(0);
    }
    let oldest_ms = retention
        .time
        .map(|time| now_ms().saturating_sub(millis(time)));
    // Locked from before the runs are read: a deletion or truncation must not count one of them as dead, too.
    let mut table = generations.lock();
    if log.check_held().is_err() {
        return Ok(0);
    }
    let mut size = log.size_bytes();
    let mut dead = Vec::new();
    // What is part of an open transaction is needed until that is over.
    let committed = log.stable_end();
    db.each_run(log.id, log.log_start(), |run| {
        if run.last_offset >= committed {
            return Ok(false);
        }
        let too_old = oldest_ms.is_some_and(|oldest| run.max_timestamp < oldest);
        let too_much = retention
            .bytes
            .is_some_and(|limit| size.saturating_sub(run.bytes) >= limit);
        let goes = too_old || too_much || run.last_offset < released;
        if goes {
            size = size.saturating_sub(run.bytes);
            dead.push(run);
        }
        Ok(goes)
    })?;
    remove(db, &mut table, log, &dead)
}

/// Takes bytes of runs out of what their generation has of use, in what is to follow the table.
pub(super) fn bury(
    table: &BTreeMap<Generation, GenerationBytes>,
    changed: &mut BTreeMap<Generation, GenerationBytes>,
    generation: Generation,
    bytes: u64,
) {
    if let Some(known) = table.get(&generation) {
        let entry = changed.entry(generation).or_insert(*known);
        entry.live = entry.live.saturating_sub(bytes);
    }
}

/// Adds to a write what is stored of generations.
pub(super) fn put_generations(
    changed: &BTreeMap<Generation, GenerationBytes>,
    batch: &mut WriteBatch,
) {
    for (generation, bytes) in changed {
        batch.put(keys::generation(*generation), bytes.encode());
    }
}

/// Removes the oldest runs of a partition.
fn remove(
    db: &Db,
    table: &mut BTreeMap<Generation, GenerationBytes>,
    log: &PartitionLog,
    dead: &[Run],
) -> Result<u64, StorageError> {
    let Some(last) = dead.last() else {
        return Ok(0);
    };
    let log_start = last.last_offset + 1;
    let mut batch = WriteBatch::default();
    // The log start offset comes first in the same write: reads are clipped to it, whatever files still hold.
    batch.put(keys::log_start(log.id), log_start.to_be_bytes());
    let mut freed = 0;
    // The table is changed only after the write: a failed one must not count a run as dead.
    let mut changed: BTreeMap<Generation, GenerationBytes> = BTreeMap::new();
    for run in dead {
        batch.delete(keys::run(log.id, run.last_offset));
        freed += run.bytes;
        bury(table, &mut changed, run.generation, run.bytes);
    }
    put_generations(&changed, &mut batch);
    db.write_meta_durably(batch)?;
    table.extend(changed);
    db.set_log_start(log.id, log_start);
    log.advance_log_start(log_start, last.cumulative_bytes);
    debug!(topic = %log.topic, partition = log.index, log_start, freed, "retention");
    Ok(freed)
}

/// Gives the space of dead generations back. Blocks for as long as rewriting takes, if any is due.
pub(super) fn reclaim(
    db: &Db,
    generations: &Generations,
    closing: &AtomicBool,
) -> Result<(), StorageError> {
    let table: BTreeMap<Generation, GenerationBytes> = generations.lock().clone();
    let dead: Vec<Generation> = table
        .iter()
        .filter(|(_, bytes)| bytes.live == 0)
        .map(|(generation, _)| *generation)
        .collect();
    // A file may hold several generations: neighbours go together, so that it lies within one range.
    for span in dead.chunk_by(|a, b| a.0 + 1 == b.0) {
        if let (Some(first), Some(last)) = (span.first(), span.last()) {
            db.log()
                .delete_file_in_range(first_key(*first), last_key(*last))?;
        }
    }
    for (&generation, &bytes) in &table {
        if bytes.live > 0 && bytes.live < bytes.total / 2 && !closing.load(Ordering::Acquire) {
            rewrite(db, generations, generation, bytes)?;
        }
    }
    forget(db, generations, &dead)
}

/// Drops dead generations from the table once no file holds them.
fn forget(db: &Db, generations: &Generations, dead: &[Generation]) -> Result<(), StorageError> {
    if dead.is_empty() || db.has_unflushed_generations() {
        // What is still in memory is in no file yet, and would be forgotten before its file is there.
        return Ok(());
    }
    let files = log_files(db)?;
    let mut gone = Vec::new();
    for &generation in dead {
        let holders: Vec<_> = files
            .iter()
            .filter(|file| file.generations.contains(&generation))
            .collect();
        if holders.iter().any(|file| file.level == 0) {
            // On its way down; tried again next time.
            continue;
        }
        if !holders.is_empty() {
            // Shares a file with a live one: the compaction filter takes it out.
            compact(db, generation);
        }
        gone.push(generation);
    }
    let mut batch = WriteBatch::default();
    let mut freed = 0;
    let mut table = generations.lock();
    for generation in &gone {
        batch.delete(keys::generation(*generation));
        freed += table.remove(generation).map_or(0, |bytes| bytes.total);
    }
    drop(table);
    db.write_meta_durably(batch)?;
    if !gone.is_empty() {
        info!(generations = gone.len(), freed = %ByteSize(freed), "retention gave space back");
    }
    Ok(())
}

/// Rewrites one generation without its dead part: the compaction filter drops what is below the log start offsets.
fn rewrite(
    db: &Db,
    generations: &Generations,
    generation: Generation,
    bytes: GenerationBytes,
) -> Result<(), StorageError> {
    compact(db, generation);
    let mut batch = WriteBatch::default();
    if let Some(entry) = generations.lock().get_mut(&generation) {
        entry.total = bytes.live;
        batch.put(keys::generation(generation), entry.encode());
    }
    db.write_meta_durably(batch)?;
    info!(generation = generation.0, kept = %ByteSize(bytes.live), dropped = %ByteSize(bytes.total - bytes.live), "rewrote a generation that was mostly dead");
    Ok(())
}

/// Runs the compaction filter over the files that hold a generation.
fn compact(db: &Db, generation: Generation) {
    let mut options = CompactOptions::default();
    options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
    options.set_exclusive_manual_compaction(false);
    db.log().compact_range_opt(
        Some(first_key(generation)),
        Some(last_key(generation)),
        &options,
    );
}

/// A file of the log family.
struct LogFile {
    level: i32,
    generations: RangeInclusive<Generation>,
}

fn log_files(db: &Db) -> Result<Vec<LogFile>, StorageError> {
    let of = |key: &Option<Vec<u8>>| {
        key.as_deref()
            .and_then(keys::parse_log)
            .map(|(generation, ..)| generation)
    };
    let files = db.log().live_files()?;
    let file = |file: &rocksdb::LiveFile| {
        Some(LogFile {
            level: file.level,
            generations: of(&file.start_key)?..=of(&file.end_key)?,
        })
    };
    Ok(files.iter().filter_map(file).collect())
}

fn first_key(generation: Generation) -> [u8; keys::LOG_KEY_LEN] {
    keys::log(generation, PartitionId(0), 0)
}

fn last_key(generation: Generation) -> [u8; keys::LOG_KEY_LEN] {
    keys::log(generation, PartitionId(u32::MAX), i64::MAX)
}

pub(super) fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}
