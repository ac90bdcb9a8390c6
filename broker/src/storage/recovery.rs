//! Opening a store: reads what the last process left, replays the generation it was filling, and says what it found.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use bytesize::ByteSize;
use millrace_record::BatchHeader;
use rocksdb::{IteratorMode, ReadOptions, WriteBatch};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::now_ms;

use super::{
    Generation, LogConfig, PartitionId, PartitionLog, StorageError, StorageOptions,
    db::Db,
    keys,
    run::Run,
    writer::{Active, GenerationBytes, Slot},
};

/// The format that this version writes. A store of a newer one is refused.
const FORMAT: u32 = 1;

/// `meta`'s descriptor of the store. JSON. Since format 1.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct StoreDescriptor {
    pub format: u32,
    /// Given to a new store: a store that lost its data is another one.
    pub store_id: Uuid,
    /// Counts the starts.
    pub incarnation: i32,
    pub next_partition_id: u32,
}

/// `meta`'s descriptor of a topic; its name is the key. JSON. Since format 1.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct TopicDescriptor {
    pub topic_id: Uuid,
    /// By index.
    pub partitions: Vec<u32>,
    pub config: LogConfig,
}

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
            "{stop}; {} topics, {} partitions, {} in {} generations; replayed {} batches ({}) in {:?}",
            self.topics,
            self.partitions,
            ByteSize(self.bytes),
            self.generations,
            self.replayed_batches,
            ByteSize(self.replayed_bytes),
            self.took,
        )
    }
}

/// What a start begins with.
pub(super) struct Recovered {
    pub store: StoreDescriptor,
    pub topics: BTreeMap<String, TopicDescriptor>,
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
    let topics = read_topics(db)?;
    let generations = read_generations(db)?;
    let generation = read_active_generation(db)?;
    let mut slots = HashMap::new();
    for (name, topic) in &topics {
        let name: Arc<str> = name.as_str().into();
        for (index, &id) in topic.partitions.iter().enumerate() {
            let index = i32::try_from(index).unwrap_or(i32::MAX);
            let slot = read_partition(
                db,
                PartitionId(id),
                name.clone(),
                index,
                topic.config,
                store.incarnation,
            )?;
            slots.insert(PartitionId(id), slot);
        }
    }
    read_producers(db, &mut slots)?;
    let (active, replayed_batches) = replay(db, generation, &mut slots)?;
    let report = RecoveryReport {
        store_id: store.store_id,
        incarnation: store.incarnation,
        clean,
        topics: topics.len(),
        partitions: slots.len(),
        generations: generations.len(),
        bytes: slots.values().map(|slot| slot.log.size_bytes()).sum(),
        replayed_batches,
        replayed_bytes: active.bytes,
        took: begun.elapsed(),
    };
    Ok(Recovered {
        store,
        topics,
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
        Some(value) => decode_json::<StoreDescriptor>("the store's descriptor", &value)?,
        None => StoreDescriptor {
            format: FORMAT,
            store_id: Uuid::new_v4(),
            incarnation: 0,
            next_partition_id: 0,
        },
    };
    if store.format > FORMAT {
        return Err(StorageError::Format {
            path: options.path.clone(),
            found: store.format,
            supported: FORMAT,
        });
    }
    store.incarnation += 1;
    let mut batch = WriteBatch::default();
    batch.put_cf(db.meta(), keys::STORE, encode_json(&store)?);
    batch.delete_cf(db.meta(), keys::CLEAN_SHUTDOWN);
    db.write(batch, true)?;
    Ok(store)
}

fn read_topics(db: &Db) -> Result<BTreeMap<String, TopicDescriptor>, StorageError> {
    let mut topics = BTreeMap::new();
    db.scan_meta(&[keys::TOPIC], |key, value| {
        let name = String::from_utf8_lossy(&key[1..]).into_owned();
        let descriptor = decode_json(&format!("the descriptor of topic {name}"), value)?;
        topics.insert(name, descriptor);
        Ok(())
    })?;
    Ok(topics)
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

/// A partition as its sealed runs leave it.
fn read_partition(
    db: &Db,
    id: PartitionId,
    topic: Arc<str>,
    index: i32,
    config: LogConfig,
    leader_epoch: i32,
) -> Result<Slot, StorageError> {
    let corrupt = |what: &str| StorageError::Corrupt {
        what: format!("{what} of {topic}/{index}"),
    };
    let log_start = match db.get_meta(&keys::log_start(id))? {
        Some(value) => i64::from_be_bytes(
            value
                .try_into()
                .map_err(|_| corrupt("the log start offset"))?,
        ),
        None => 0,
    };
    let (mut log_end, mut appended) = (log_start, 0);
    let mut options = ReadOptions::default();
    options.set_iterate_lower_bound(keys::run(id, 0));
    options.set_iterate_upper_bound(keys::run(PartitionId(id.0 + 1), 0));
    let last = db
        .rocks()
        .iterator_cf_opt(db.run(), options, IteratorMode::End)
        .next()
        .transpose()?;
    if let Some((key, value)) = last {
        let (_, last_offset) = keys::parse_run(&key).ok_or_else(|| corrupt("a run's key"))?;
        let run = Run::decode(last_offset, &value)?;
        log_end = log_end.max(run.last_offset + 1);
        appended = run.cumulative_bytes;
    }
    let mut removed = appended;
    db.each_run(id, log_start, |run| {
        removed = run.cumulative_bytes - run.bytes;
        Ok(false)
    })?;
    db.set_log_start(id, log_start);
    let log = PartitionLog::new(
        id,
        topic,
        index,
        config,
        log_start,
        log_end,
        (removed, appended),
        leader_epoch,
    );
    Ok(Slot::new(Arc::new(log), log_end, appended))
}

fn read_producers(db: &Db, slots: &mut HashMap<PartitionId, Slot>) -> Result<(), StorageError> {
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
    })
}

/// Reads the generation that was being filled: the only one whose runs and producers are not stored yet.
fn replay(
    db: &Db,
    generation: Generation,
    slots: &mut HashMap<PartitionId, Slot>,
) -> Result<(Active, u64), StorageError> {
    let mut active = Active::empty();
    let mut batches = 0;
    let now_ms = now_ms();
    let mut iterator = db.rocks().raw_iterator_cf(db.log());
    iterator.seek(keys::log(generation, PartitionId(0), 0));
    while let Some((key, value)) = iterator.item() {
        let corrupt = || StorageError::Corrupt {
            what: "a key of the log family".into(),
        };
        let (found, partition, last_offset) = keys::parse_log(key).ok_or_else(corrupt)?;
        if found != generation {
            return Err(StorageError::Corrupt {
                what: format!("generation {} follows the active one", found.0),
            });
        }
        if let Some(slot) = slots.get_mut(&partition) {
            let header = BatchHeader::parse(value)?;
            let expected = slot.next_offset;
            if header.base_offset != expected || header.last_offset() != last_offset {
                let log = &slot.log;
                return Err(StorageError::Corrupt {
                    what: format!(
                        "{}/{}: a batch at {} where {expected} is next",
                        log.topic, log.index, header.base_offset
                    ),
                });
            }
            if slot.run.is_none() {
                active.partitions.push(partition);
            }
            let bytes = value.len() as u64;
            slot.extend_run(
                generation,
                header.base_offset,
                last_offset,
                bytes,
                header.max_timestamp,
            );
            if header.producer_id >= 0 {
                slot.producers.appended(&header, header.base_offset, now_ms);
                slot.dirty_producers.insert(header.producer_id);
            }
            active.bytes += bytes;
            active.memtable_bytes += value.len();
            batches += 1;
        }
        iterator.next();
    }
    iterator.status()?;
    for id in &active.partitions {
        if let Some(slot) = slots.get(id)
            && let Some(run) = slot.run
        {
            slot.log.publish(run, std::iter::empty());
            slot.log.advance_high_watermark(slot.next_offset);
        }
    }
    Ok((active, batches))
}

pub(super) fn encode_json(value: &impl Serialize) -> Result<Vec<u8>, StorageError> {
    serde_json::to_vec(value)
        .map_err(|error| StorageError::Rocks(format!("a descriptor can't be encoded: {error}")))
}

fn decode_json<T: for<'a> Deserialize<'a>>(what: &str, value: &[u8]) -> Result<T, StorageError> {
    serde_json::from_slice(value).map_err(|error| StorageError::Corrupt {
        what: format!("{what}: {error}"),
    })
}
