//! Opening a store: reads what the last process left, replays the generation it was filling, and says what it found.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use bytesize::ByteSize;
use millrace_record::{BatchHeader, end_marker};
use rocksdb::{IteratorMode, ReadOptions, WriteBatch};
use tracing::warn;
use uuid::Uuid;

use crate::now_ms;

use super::{
    EpochCache, Generation, PartitionId, PartitionLog, StorageError, StorageOptions, StoredTopic,
    compaction,
    db::Db,
    descriptors::{FORMAT, StoreDescriptor, TopicDescriptor, decode_partition},
    keys,
    log::Bounds,
    run::Run,
    transactions::EndedTransactions,
    writer::{Active, GenerationBytes, Slot},
};

/// What a start found.
#[derive(Clone, Debug)]
pub struct RecoveryReport {
    /// The store's id.
    pub store_id: Uuid,
    /// Starts so far, this one included.
    pub incarnation: i32,
    /// The last process stopped in order.
    pub clean: bool,
    /// Topics held.
    pub topics: usize,
    /// Partitions held.
    pub partitions: usize,
    /// Generations on disk.
    pub generations: usize,
    /// Bytes of batches held.
    pub bytes: u64,
    /// Batches replayed from the generation that was being filled.
    pub replayed_batches: u64,
    /// Their bytes.
    pub replayed_bytes: u64,
    /// Records that `meta` knew and the log no longer has: a crash of the machine took them before they were on the disk.
    pub lost_records: i64,
    /// How long it took.
    pub took: Duration,
}

impl fmt::Display for RecoveryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stop = match (self.incarnation, self.clean) {
            (1, _) => "new store",
            (_, true) => "clean stop before",
            (_, false) => "unclean stop before",
        };
        write!(
            f,
            "{stop}; {} topics, {} partitions, {} in {} generations; replayed {} batches ({}), lost {} records, in {:?}",
            self.topics,
            self.partitions,
            ByteSize(self.bytes),
            self.generations,
            self.replayed_batches,
            ByteSize(self.replayed_bytes),
            self.lost_records,
            self.took,
        )
    }
}

/// What a start begins with.
pub(super) struct Recovered {
    pub store: StoreDescriptor,
    pub topics: Vec<StoredTopic>,
    pub slots: HashMap<PartitionId, Slot>,
    pub generations: BTreeMap<Generation, GenerationBytes>,
    pub generation: Generation,
    pub active: Active,
    pub report: RecoveryReport,
}

pub(super) fn recover(db: &Db, options: &StorageOptions) -> Result<Recovered, StorageError> {
    let begun = Instant::now();
    let clean = db.get_meta(keys::CLEAN_SHUTDOWN)?.is_some();
    let store = open_descriptor(db, options)?;
    let mut topics = read_topics(db)?;
    let mut generations = read_generations(db)?;
    let sealed = read_active_generation(db)?;
    // Flushed generations are on the disk. What a crash of the machine can have taken is in those that were not.
    let doubtful = match clean {
        true => sealed,
        false => Generation(sealed.0.saturating_sub(options.write_buffers as u32 + 1)),
    };
    let mut slots = HashMap::new();
    let mut epochs: HashMap<PartitionId, EpochCache> = HashMap::new();
    let mut ended: HashMap<PartitionId, EndedTransactions> = HashMap::new();
    let mut repair = Repair::default();
    // A store that no one has claimed belongs to a broker that runs alone, and leads all that it holds. Leadership is bound to
    // one process start, there as among several brokers.
    let leader_epoch = store.identity.is_none().then_some(store.incarnation);
    for (topic_id, index, id) in read_partitions(db)? {
        let topic = topics
            .get_mut(&topic_id)
            .ok_or_else(|| StorageError::Corrupt {
                what: format!("partition {index} of topic {topic_id}, which has no descriptor"),
            })?;
        let mut reader = PartitionReader {
            db,
            id,
            topic,
            index,
            repair: &mut repair,
        };
        let slot = reader.read(leader_epoch, doubtful)?;
        epochs.insert(id, reader.epochs(slot.next_offset)?);
        ended.insert(id, reader.ended()?);
        topic.partitions.insert(index, slot.log.clone());
        slots.insert(id, slot);
    }
    read_producers(db, &mut slots, &mut ended, &mut repair)?;
    let replayed = replay(
        db,
        sealed,
        &mut slots,
        (&mut epochs, &mut ended),
        &mut generations,
        &mut repair,
    )?;
    for (id, slot) in &slots {
        let high_watermark = match store.identity {
            // Of a broker that runs alone all that is there is committed.
            None => None,
            Some(_) => Some(read_offset(db, &keys::high_watermark(*id))?.unwrap_or(0)),
        };
        slot.log.recovered(
            (slot.next_offset, slot.cumulative_bytes),
            slot.run,
            epochs.remove(id).unwrap_or_default(),
            (
                ended.remove(id).unwrap_or_default(),
                slot.producers.first_open(),
            ),
            high_watermark,
        );
    }
    db.write_meta_durably(repair.batch)?;
    db.all_log_starts_set();
    let Replayed {
        generation,
        active,
        batches: replayed_batches,
        bytes: replayed_bytes,
    } = replayed;
    let report = RecoveryReport {
        store_id: store.store_id,
        incarnation: store.incarnation,
        clean,
        topics: topics.len(),
        partitions: slots.len(),
        generations: generations.len(),
        bytes: slots.values().map(|slot| slot.log.size_bytes()).sum(),
        replayed_batches,
        replayed_bytes,
        lost_records: repair.lost_records,
        took: begun.elapsed(),
    };
    Ok(Recovered {
        store,
        topics: topics.into_values().collect(),
        slots,
        generations,
        generation,
        active,
        report,
    })
}

/// Counts the start and takes back the mark of a clean stop.
fn open_descriptor(db: &Db, options: &StorageOptions) -> Result<StoreDescriptor, StorageError> {
    let mut store = match db.get_meta(keys::STORE)? {
        Some(value) => StoreDescriptor::decode(&value)?,
        None => StoreDescriptor::new(),
    };
    if store.format != FORMAT {
        return Err(StorageError::Format {
            path: options.path.clone(),
            found: store.format,
            supported: FORMAT,
        });
    }
    let clean = db.get_meta(keys::CLEAN_SHUTDOWN)?.is_some();
    if store.start(options.durability, boot_id(), clean) {
        warn!(store = %store.store_id, "the system went down before all was on the disk, and durability is not fsync: the store is taken for another one, and copies everything from the replicas that have it");
    }
    let mut batch = WriteBatch::default();
    store.put(&mut batch)?;
    batch.delete(keys::CLEAN_SHUTDOWN);
    db.write_meta_durably(batch)?;
    Ok(store)
}

/// This run of the operating system.
fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// The topics, without partitions yet.
fn read_topics(db: &Db) -> Result<HashMap<Uuid, StoredTopic>, StorageError> {
    let mut topics = HashMap::new();
    db.scan_meta(&[keys::TOPIC], |key, value| {
        let topic_id = keys::parse_topic(key).ok_or_else(|| StorageError::Corrupt {
            what: "the key of a topic".into(),
        })?;
        let TopicDescriptor { name, config } = TopicDescriptor::decode(topic_id, value)?;
        let topic = StoredTopic {
            name: name.into(),
            topic_id,
            config,
            partitions: BTreeMap::new(),
        };
        topics.insert(topic_id, topic);
        Ok(())
    })?;
    Ok(topics)
}

fn read_partitions(db: &Db) -> Result<Vec<(Uuid, i32, PartitionId)>, StorageError> {
    let mut partitions = Vec::new();
    db.scan_meta(&[keys::PARTITION], |key, value| {
        let corrupt = || StorageError::Corrupt {
            what: "the entry of a partition".into(),
        };
        let (topic_id, index) = keys::parse_partition(key).ok_or_else(corrupt)?;
        let id = decode_partition(value).ok_or_else(corrupt)?;
        partitions.push((topic_id, index, id));
        Ok(())
    })?;
    Ok(partitions)
}

fn read_generations(db: &Db) -> Result<BTreeMap<Generation, GenerationBytes>, StorageError> {
    let mut generations = BTreeMap::new();
    db.scan_meta(&[keys::GENERATION], |key, value| {
        let corrupt = || StorageError::Corrupt {
            what: "the entry of a generation".into(),
        };
        let number = key[1..].try_into().map_err(|_| corrupt())?;
        generations.insert(
            Generation(u32::from_be_bytes(number)),
            GenerationBytes::decode(value).ok_or_else(corrupt)?,
        );
        Ok(())
    })?;
    Ok(generations)
}

fn read_active_generation(db: &Db) -> Result<Generation, StorageError> {
    let Some(value) = db.get_meta(keys::ACTIVE_GENERATION)? else {
        return Ok(Generation(0));
    };
    let number = value.try_into().map_err(|_| StorageError::Corrupt {
        what: "the active generation".into(),
    })?;
    Ok(Generation(u32::from_be_bytes(number)))
}

fn read_offset(db: &Db, key: &[u8]) -> Result<Option<i64>, StorageError> {
    let Some(value) = db.get_meta(key)? else {
        return Ok(None);
    };
    let corrupt = |_| StorageError::Corrupt {
        what: "an offset of a partition".into(),
    };
    Ok(Some(i64::from_be_bytes(value.try_into().map_err(corrupt)?)))
}

/// What recovery puts right in `meta`.
#[derive(Default)]
struct Repair {
    batch: WriteBatch,
    lost_records: i64,
    /// Partitions whose end was lost.
    shortened: HashSet<PartitionId>,
}

struct PartitionReader<'a> {
    db: &'a Db,
    id: PartitionId,
    topic: &'a StoredTopic,
    index: i32,
    repair: &'a mut Repair,
}

impl PartitionReader<'_> {
    fn corrupt(&self, what: &str) -> StorageError {
        StorageError::Corrupt {
            what: format!("{what} of {}/{}", self.topic.name, self.index),
        }
    }

    /// A partition as its sealed runs leave it; those of `doubtful` generations and later are looked up in the log.
    fn read(
        &mut self,
        leader_epoch: Option<i32>,
        doubtful: Generation,
    ) -> Result<Slot, StorageError> {
        let (db, id) = (self.db, self.id);
        let log_start = read_offset(db, &keys::log_start(id))?.unwrap_or(0);
        let last = self.last_run(doubtful)?;
        let log_end = last.map_or(log_start, |run| log_start.max(run.last_offset + 1));
        let appended = last.map_or(0, |run| run.cumulative_bytes);
        let mut removed = appended;
        db.each_run(id, log_start, |run| {
            removed = removed.min(run.cumulative_bytes - run.bytes);
            Ok(false)
        })?;
        db.set_log_start(id, log_start);
        if let Some(compacted) = compaction::Compacted::of(db, id)? {
            db.set_compacted(id, &compacted);
        }
        let bounds = Bounds {
            log_start,
            log_end,
            removed_bytes: removed,
            appended_bytes: appended,
        };
        let topic = (self.topic.name.clone(), self.topic.topic_id);
        let log = PartitionLog::new(
            id,
            topic,
            self.index,
            self.topic.config,
            bounds,
            leader_epoch,
        );
        if let Some(value) = db.get_meta(&keys::newest_epoch(id))? {
            let value = value.try_into();
            let epoch = value.map_err(|_| self.corrupt("the newest epoch"))?;
            log.set_newest_epoch(i32::from_be_bytes(epoch));
        }
        Ok(Slot::new(Arc::new(log), log_end, appended))
    }

    /// The epochs of what is there.
    fn epochs(&self, log_end: i64) -> Result<EpochCache, StorageError> {
        let Some(value) = self.db.get_meta(&keys::epochs(self.id))? else {
            return Ok(EpochCache::default());
        };
        let mut epochs =
            EpochCache::decode(&value).ok_or_else(|| self.corrupt("the epoch cache"))?;
        epochs.truncate(log_end);
        Ok(epochs)
    }

    /// The transactions that have ended there.
    fn ended(&self) -> Result<EndedTransactions, StorageError> {
        let value = self.db.get_meta(&keys::ended(self.id))?;
        let decoded = EndedTransactions::decode(&value.unwrap_or_default());
        decoded.ok_or_else(|| self.corrupt("the ended transactions"))
    }

    /// The last run that the log really has.
    fn last_run(&mut self, doubtful: Generation) -> Result<Option<Run>, StorageError> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(keys::runs(self.id));
        options.set_iterate_upper_bound(keys::run(self.id, i64::MAX));
        for entry in self.db.meta().iterator_opt(IteratorMode::End, options) {
            let (key, value) = entry?;
            let last_offset = keys::parse_run(&key).ok_or_else(|| self.corrupt("a run's key"))?;
            let run = Run::decode(last_offset, &value)?;
            if run.generation < doubtful {
                return Ok(Some(run));
            }
            if let Some(run) = self.verified(run)? {
                return Ok(Some(run));
            }
        }
        Ok(None)
    }

    /// The run, cut back to what the log has of it.
    fn verified(&mut self, run: Run) -> Result<Option<Run>, StorageError> {
        let (db, id) = (self.db, self.id);
        if db
            .log()
            .get_pinned(keys::log(run.generation, id, run.last_offset))?
            .is_some()
        {
            return Ok(Some(run));
        }
        let mut held = Run {
            last_offset: run.first_offset - 1,
            bytes: 0,
            ..run
        };
        db.each_batch(id, &run, run.first_offset, |last_offset, batch| {
            held.last_offset = last_offset;
            held.bytes += batch.len() as u64;
            Ok(true)
        })?;
        held.cumulative_bytes = run.cumulative_bytes - run.bytes + held.bytes;
        self.repair.lost_records += run.last_offset - held.last_offset;
        self.repair.shortened.insert(id);
        self.repair.batch.delete(keys::run(id, run.last_offset));
        if held.bytes == 0 {
            return Ok(None);
        }
        self.repair
            .batch
            .put(keys::run(id, held.last_offset), held.encode());
        Ok(Some(held))
    }
}

fn read_producers(
    db: &Db,
    slots: &mut HashMap<PartitionId, Slot>,
    ended: &mut HashMap<PartitionId, EndedTransactions>,
    repair: &mut Repair,
) -> Result<(), StorageError> {
    db.scan_meta(&[keys::PRODUCER], |key, value| {
        let parse = || {
            let (partition, rest) = key[1..].split_first_chunk::<4>()?;
            Some((
                PartitionId(u32::from_be_bytes(*partition)),
                i64::from_be_bytes(rest.try_into().ok()?),
            ))
        };
        let corrupt = || StorageError::Corrupt {
            what: "the entry of a producer".into(),
        };
        let (partition, producer_id) = parse().ok_or_else(corrupt)?;
        if let Some(slot) = slots.get_mut(&partition) {
            slot.producers
                .load(producer_id, value)
                .ok_or_else(corrupt)?;
        }
        Ok(())
    })?;
    // Back to where the sealed runs end: what follows is replayed, or lost. Truncation stores what is known in the middle of a generation.
    for (id, slot) in slots {
        let of_partition = ended.entry(*id).or_default();
        let reopened = of_partition.truncate(slot.next_offset);
        let changed = slot.producers.truncate(slot.next_offset, &reopened);
        if !repair.shortened.contains(id) {
            continue;
        }
        for (producer_id, _) in changed {
            if let Some(value) = slot.producers.encode(producer_id) {
                repair.batch.put(keys::producer(*id, producer_id), value);
            }
        }
        repair.batch.put(keys::ended(*id), of_partition.encode());
    }
    Ok(())
}

/// What was read from the generations that `meta` does not know yet.
struct Replayed {
    generation: Generation,
    active: Active,
    batches: u64,
    bytes: u64,
}

/// Reads the generations from `first` on: the one that was being filled, and any before it whose end was not noted.
fn replay(
    db: &Db,
    first: Generation,
    slots: &mut HashMap<PartitionId, Slot>,
    (epochs, ended): (
        &mut HashMap<PartitionId, EpochCache>,
        &mut HashMap<PartitionId, EndedTransactions>,
    ),
    generations: &mut BTreeMap<Generation, GenerationBytes>,
    repair: &mut Repair,
) -> Result<Replayed, StorageError> {
    let mut replayed = Replayed {
        generation: first,
        active: Active::empty(),
        batches: 0,
        bytes: 0,
    };
    let now_ms = now_ms();
    let mut options = ReadOptions::default();
    // What compaction has written is known to `meta`, or not needed.
    options.set_iterate_upper_bound(keys::log(Generation::COMPACTED, PartitionId(0), 0));
    let mut iterator = db.log().raw_iterator_opt(options);
    iterator.seek(keys::log(first, PartitionId(0), 0));
    while let Some((key, value)) = iterator.item() {
        let corrupt = || StorageError::Corrupt {
            what: "a key of the log".into(),
        };
        let (generation, partition, last_offset) = keys::parse_log(key).ok_or_else(corrupt)?;
        if generation != replayed.generation {
            let bytes = seal(&replayed, slots, (epochs, ended), &mut repair.batch);
            generations.insert(replayed.generation, bytes);
            replayed.generation = generation;
            replayed.active = Active::empty();
            repair
                .batch
                .put(keys::ACTIVE_GENERATION, generation.0.to_be_bytes());
        }
        if let Some(slot) = slots.get_mut(&partition) {
            let header = BatchHeader::parse(value)?;
            let expected = slot.next_offset;
            if header.base_offset != expected || header.last_offset() != last_offset {
                let (topic, index, found) = (&slot.log.topic, slot.log.index, header.base_offset);
                let what =
                    format!("{topic}/{index}: a batch at offset {found} where {expected} is next");
                return Err(StorageError::Corrupt { what });
            }
            let of_partition = epochs.entry(partition).or_default();
            of_partition.note(header.leader_epoch, header.base_offset);
            if slot.run.is_none() {
                replayed.active.partitions.push(partition);
            }
            let bytes = value.len() as u64;
            slot.extend_run(
                generation,
                header.base_offset,
                last_offset,
                bytes,
                header.max_timestamp,
            );
            let mut changed = Vec::new();
            let marker = match header.attributes.is_control() {
                true => end_marker(&Bytes::copy_from_slice(value))?,
                false => None,
            };
            let ends =
                slot.producers
                    .appended(&header, marker, header.base_offset, now_ms, &mut changed);
            if let Some(ends) = ends {
                ended.entry(partition).or_default().push(ends);
            }
            slot.dirty_producers
                .extend(changed.into_iter().map(|(producer_id, _)| producer_id));
            replayed.active.bytes += bytes;
            replayed.active.memtable_bytes += value.len();
            replayed.bytes += bytes;
            replayed.batches += 1;
        } else {
            // Of a partition that was deleted.
            replayed.active.bytes += value.len() as u64;
            replayed.active.dead_bytes += value.len() as u64;
            replayed.active.memtable_bytes += value.len();
        }
        iterator.next();
    }
    iterator.status()?;
    Ok(replayed)
}

/// Notes the end of a generation that was filled, as the writer would have.
fn seal(
    replayed: &Replayed,
    slots: &mut HashMap<PartitionId, Slot>,
    (epochs, ended): (
        &HashMap<PartitionId, EpochCache>,
        &HashMap<PartitionId, EndedTransactions>,
    ),
    batch: &mut WriteBatch,
) -> GenerationBytes {
    for id in &replayed.active.partitions {
        if let Some(epochs) = epochs.get(id) {
            batch.put(keys::epochs(*id), epochs.encode());
        }
        if let Some(ended) = ended.get(id) {
            batch.put(keys::ended(*id), ended.encode());
        }
        if let Some(slot) = slots.get_mut(id) {
            slot.put_sealed(batch);
            slot.next_generation();
        }
    }
    let bytes = replayed.active.sealed();
    batch.put(keys::generation(replayed.generation), bytes.encode());
    bytes
}
