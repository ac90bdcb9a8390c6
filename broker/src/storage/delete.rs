//! Deleting partitions, in steps of which each can be the last before a crash:
//!
//! 1. One durable write to `meta` takes the partitions' entries away and marks their numbers as deleted. From here on they are gone:
//!    a start finds no partition, only the mark.
//! 2. They are taken out of sight: looked up they are not found, and who holds on to one is told that it is deleted.
//! 3. The writer drops what it knows of them, hence nothing of them is written to `meta` any more.
//! 4. Their runs, producers and log start offsets are deleted, their generations count their bytes as dead, and the marks go. A start
//!    and the next retention pass finish what a crash or an error left of this.
//!
//! The space comes back as [`retention`](super::retention) gives it back: generations in which nothing lives go as files, those of
//! which less than half lives are rewritten. The compaction filter drops what belongs to no partition.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::mpsc::channel,
};

use rocksdb::WriteBatch;
use tracing::info;
use uuid::Uuid;

use super::{
    Generation, PartitionId, StorageError, Store, StoredPartition,
    db::Db,
    keys,
    retention::{bury, put_generations},
    writer::{Command, GenerationBytes, Generations},
};

/// Entries of `meta` deleted in one write. The generations are locked meanwhile, and the writer waits for them when it seals one.
const CHUNK: usize = 4096;

impl Store {
    /// Deletes partitions for good, named by topic id and index; those that are not held are passed over. A topic goes with the last of its
    /// partitions. After a crash all of them are there or none; none once this has returned. Their space comes back with the next
    /// retention passes. Blocks.
    pub fn delete_partitions(&self, partitions: &[(Uuid, i32)]) -> Result<(), StorageError> {
        let _turn = self.deletions.lock();
        let deleted = self.take_out_of_sight(partitions)?;
        if deleted.is_empty() {
            return Ok(());
        }
        let count = deleted.len();
        let (reply, forgotten) = channel();
        self.writer
            .send(Command::Forget {
                logs: deleted,
                reply,
            })
            .map_err(|_| StorageError::Closed)?;
        // What the writer knew may be much: it is freed here.
        drop(forgotten.recv().map_err(|_| StorageError::Closed)?);
        clear_deleted(&self.db, &self.generations)?;
        info!(partitions = count, "deleted");
        Ok(())
    }

    /// Finishes deletions that an error has cut short.
    pub(super) fn finish_deletions(&self) -> Result<(), StorageError> {
        let _turn = self.deletions.lock();
        clear_deleted(&self.db, &self.generations)
    }

    pub(super) fn take_out_of_sight(
        &self,
        partitions: &[(Uuid, i32)],
    ) -> Result<Vec<StoredPartition>, StorageError> {
        // No topic changes meanwhile.
        let _descriptor = self.descriptor.lock();
        let mut batch = WriteBatch::default();
        let mut deleted: BTreeMap<Uuid, BTreeMap<i32, StoredPartition>> = BTreeMap::new();
        for &(topic_id, index) in partitions {
            if let Some(log) = self.partition(topic_id, index) {
                batch.delete(keys::partition(topic_id, index));
                batch.put(keys::deleted(log.id), []);
                deleted.entry(topic_id).or_default().insert(index, log);
            }
        }
        let topics = self.topics.read();
        for (topic_id, deleted) in &deleted {
            let held = topics.get(*topic_id);
            if held.is_some_and(|topic| topic.partitions.len() == deleted.len()) {
                batch.delete(keys::topic(*topic_id));
            }
        }
        drop(topics);
        if deleted.is_empty() {
            return Ok(Vec::new());
        }
        self.db.write_meta_durably(batch)?;
        let mut topics = self.topics.write();
        for (topic_id, deleted) in &deleted {
            topics.remove(*topic_id, deleted.keys());
        }
        drop(topics);
        let deleted: Vec<_> = deleted
            .into_values()
            .flat_map(BTreeMap::into_values)
            .collect();
        for log in &deleted {
            log.delete();
        }
        self.db.forget_log_starts(deleted.iter().map(|log| log.id));
        Ok(deleted)
    }
}

/// Deletes what `meta` still holds of partitions that are marked as deleted. The writer must have forgotten them.
pub(super) fn clear_deleted(db: &Db, generations: &Generations) -> Result<(), StorageError> {
    let mut marked = VecDeque::new();
    db.scan_meta(&[keys::DELETED], |key, _| {
        let id = keys::parse_deleted(key).ok_or_else(|| StorageError::Corrupt {
            what: "the mark of a deleted partition".into(),
        })?;
        marked.push_back(id);
        Ok(())
    })?;
    while !marked.is_empty() {
        clear_some(db, generations, &mut marked)?;
    }
    Ok(())
}

/// One write of [`clear_deleted`]. Takes off those that are done with.
fn clear_some(
    db: &Db,
    generations: &Generations,
    marked: &mut VecDeque<PartitionId>,
) -> Result<(), StorageError> {
    // Locked from before the runs are read until their bytes are counted as dead: retention must not count one, too.
    let mut table = generations.lock();
    let mut batch = WriteBatch::default();
    let mut changed: BTreeMap<Generation, GenerationBytes> = BTreeMap::new();
    let mut done = BTreeSet::new();
    for &id in marked.iter() {
        let mut all = true;
        db.each_run(id, 0, |run| {
            all = batch.len() < CHUNK;
            if all {
                batch.delete(keys::run(id, run.last_offset));
                bury(&table, &mut changed, run.generation, run.bytes);
            }
            Ok(all)
        })?;
        if !all {
            break;
        }
        db.scan_meta(&keys::producers(id), |key, _| {
            batch.delete(key);
            Ok(())
        })?;
        batch.delete(keys::log_start(id));
        batch.delete(keys::epochs(id));
        batch.delete(keys::ended(id));
        batch.delete(keys::high_watermark(id));
        batch.delete(keys::compacted(id));
        batch.delete(keys::newest_epoch(id));
        batch.delete(keys::deleted(id));
        done.insert(id);
        if batch.len() >= CHUNK {
            break;
        }
    }
    put_generations(&changed, &mut batch);
    db.write_meta(batch)?;
    table.extend(changed);
    marked.retain(|id| !done.contains(id));
    Ok(())
}
