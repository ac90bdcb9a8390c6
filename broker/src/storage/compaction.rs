//! Compaction by key: of each key the last record stays, at its offset; what was aborted goes, and so do records by which keys were deleted (tombstones), after
//! a while.
//!
//! A pass over a partition looks at what was never looked at (its *dirty* runs) and notes the last offset of each key there, by a hash of the key: with 128 bits and a seed
//! that no one knows, two keys with one hash do not happen. Then it writes all runs up to there anew, without what is superseded, into files of their own
//! ([`Generation::COMPACTED`]), which RocksDB takes in as they are: each byte that stays is written once more, and to no write-ahead log. One write of `meta` puts the
//! new runs in place of the old ones, so a crash leaves the one or the other; the old generations go as whatever retention has removed.
//!
//! Offsets never change, and none is missing: where nothing is left of batches that lay side by side, one without records stands for them all. A producer's last batch
//! stays without its records for as long as the producer is remembered, so that a follower that copies this log knows its sequence, and so does the marker of a
//! transaction.
//!
//! Each replica compacts for itself, up to what is committed and stable. Leaders and followers need not be as far as each other.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use bytesize::ByteSize;
use millrace_record::{BatchHeader, DecodeLimits, Record, Thinned};
use rocksdb::{IngestExternalFileOptions, SstFileWriter, WriteBatch};
use tracing::{info, warn};
use twox_hash::XxHash3_128;
use uuid::Uuid;

use super::{
    Compaction, Generation, PartitionId, PartitionLog, StorageError, StorageOptions,
    db::Db,
    keys,
    retention::{bury, millis, put_generations},
    run::Run,
    transactions::Ended,
    writer::{GenerationBytes, Generations},
};
use crate::now_ms;

/// Bytes of batches in one file.
const FILE_BYTES: u64 = 64 << 20;
/// Where files are made.
const FOLDER: &str = "compaction";

/// How far a partition is compacted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Compacted {
    /// All before was looked at.
    pub end: i64,
    /// It is in generations of compaction from this one on.
    pub first: Generation,
    /// The last generation of the writer's whose runs were replaced.
    pub through: Generation,
    /// Up to which offset all had been looked at, and when (milliseconds since the Unix epoch), as long as a tombstone's time may depend on it.
    looked: Vec<(i64, i64)>,
}

impl Compacted {
    /// As `meta` has it.
    pub(super) fn of(db: &Db, partition: PartitionId) -> Result<Option<Self>, StorageError> {
        let Some(value) = db.get_meta(&keys::compacted(partition))? else {
            return Ok(None);
        };
        let decoded = Self::decode(&value);
        decoded.map(Some).ok_or_else(|| StorageError::Corrupt {
            what: format!("how far partition {} is compacted", partition.0),
        })
    }

    /// Of a log that is cut at `end`, what comes there again was never looked at.
    pub(super) fn cut(
        db: &Db,
        partition: PartitionId,
        end: i64,
        batch: &mut WriteBatch,
    ) -> Result<(), StorageError> {
        if let Some(mut compacted) = Self::of(db, partition)?
            && compacted.end > end
        {
            compacted.end = end;
            for (offset, _) in &mut compacted.looked {
                *offset = end.min(*offset);
            }
            batch.put(keys::compacted(partition), compacted.encode());
        }
        Ok(())
    }

    /// Value: end i64, first and through generation u32, then for each look its offset and time i64; big-endian. Since format 3.
    fn encode(&self) -> Vec<u8> {
        let mut value = Vec::with_capacity(16 + 16 * self.looked.len());
        value.extend_from_slice(&self.end.to_be_bytes());
        value.extend_from_slice(&self.first.0.to_be_bytes());
        value.extend_from_slice(&self.through.0.to_be_bytes());
        for (offset, at_ms) in &self.looked {
            value.extend_from_slice(&offset.to_be_bytes());
            value.extend_from_slice(&at_ms.to_be_bytes());
        }
        value
    }

    fn decode(value: &[u8]) -> Option<Self> {
        let (end, rest) = value.split_first_chunk::<8>()?;
        let (first, rest) = rest.split_first_chunk::<4>()?;
        let (through, rest) = rest.split_first_chunk::<4>()?;
        let (looked, []) = rest.as_chunks::<16>() else {
            return None;
        };
        let number = |bytes: &[u8]| Some(i64::from_be_bytes(bytes.try_into().ok()?));
        let look = |entry: &[u8; 16]| Some((number(&entry[..8])?, number(&entry[8..])?));
        Some(Self {
            end: i64::from_be_bytes(*end),
            first: Generation(u32::from_be_bytes(*first)),
            through: Generation(u32::from_be_bytes(*through)),
            looked: looked.iter().map(look).collect::<Option<_>>()?,
        })
    }

    /// Before this offset tombstones have been seen for so long that they may go.
    fn tombstones_end(&self, delete_retention: Duration, now_ms: i64) -> i64 {
        let old = self.looked.iter().rev();
        let old = old.filter(|(_, at_ms)| at_ms.saturating_add(millis(delete_retention)) <= now_ms);
        old.map(|(offset, _)| *offset).max().unwrap_or(0)
    }

    /// Takes note that all before `end` was looked at now. What is of no more use goes.
    fn look(&mut self, end: i64, delete_retention: Duration, now_ms: i64) {
        let past = self.tombstones_end(delete_retention, now_ms);
        self.looked.retain(|(offset, _)| *offset >= past);
        self.end = end;
        self.looked.push((end, now_ms));
    }
}

/// Compacts partitions, one after the other.
pub(super) struct Compactor {
    db: Arc<Db>,
    generations: Generations,
    folder: PathBuf,
    producer_expiration: Duration,
    next: AtomicU32,
    max_keys: usize,
}

/// What a pass is about.
struct Pass<'a> {
    log: &'a PartitionLog,
    config: Compaction,
    before: Compacted,
    /// All runs up to where it goes.
    runs: Vec<Run>,
    end: i64,
    /// Before this, tombstones go.
    tombstones_end: i64,
    /// Of each producer: from where to where its transactions reach that were aborted.
    aborted: HashMap<i64, Vec<(i64, i64)>>,
    /// The last offset of each key that was not looked at before.
    latest: HashMap<[u8; 16], i64>,
    /// The last batch there of each producer.
    producers: HashMap<i64, i64>,
    seed: u64,
    now_ms: i64,
}

impl Compactor {
    /// Throws away what a crash has left, and goes on with generations that were never used.
    pub(super) fn open(
        db: Arc<Db>,
        generations: Generations,
        options: &StorageOptions,
    ) -> Result<Self, StorageError> {
        let folder = options.path.join(FOLDER);
        let made = remake(&folder);
        made.map_err(|error| StorageError::Rocks(format!("{}: {error}", folder.display())))?;
        let known = generations.lock();
        let mut last = known.keys().next_back().copied();
        let mut orphans = HashSet::new();
        for file in db.log().live_files()? {
            let ends = [file.start_key, file.end_key];
            let ends = ends
                .iter()
                .filter_map(|key| keys::parse_log(key.as_deref()?));
            for (generation, ..) in ends.filter(|(g, ..)| *g >= Generation::COMPACTED) {
                last = last.max(Some(generation));
                if !known.contains_key(&generation) {
                    orphans.insert(generation);
                }
            }
        }
        drop(known);
        for generation in orphans {
            // Taken in, and then the process ended before `meta` knew.
            let from = keys::log(generation, PartitionId(0), 0);
            let to = keys::log(generation, PartitionId(u32::MAX), i64::MAX);
            db.log().delete_file_in_range(from, to)?;
        }
        let next = last
            .map_or(0, |last| last.0 + 1)
            .max(Generation::COMPACTED.0);
        Ok(Self {
            db,
            generations,
            folder,
            producer_expiration: options.producer_expiration,
            next: AtomicU32::new(next),
            max_keys: options.compaction_keys,
        })
    }

    /// Compacts a partition, if it is due. Whether it may be due again at once. Blocks.
    pub(super) fn compact(
        &self,
        log: &PartitionLog,
        closing: &AtomicBool,
    ) -> Result<bool, StorageError> {
        let Some(config) = log.config().compaction else {
            return Ok(false);
        };
        let begun = Instant::now();
        let Some(mut pass) = self.due(log, config)? else {
            return Ok(false);
        };
        let all = pass.runs.len();
        self.note_keys(&mut pass, closing)?;
        let is_part = pass.runs.len() < all;
        let mut output = Output::new(self, log.id);
        self.write(&pass, &mut output, closing)?;
        let files = output.finish()?;
        if closing.load(Ordering::Acquire) {
            // What was written is thrown away at the next start.
            return Ok(false);
        }
        let (before, after) = (bytes(&pass.runs), bytes(&files.runs));
        if !self.replace(&pass, files)? {
            return Ok(false);
        }
        info!(topic = %log.topic, partition = log.index, before = %ByteSize(before), after = %ByteSize(after), up_to = pass.end, keys = pass.latest.len(), took = ?begun.elapsed(), "compacted");
        Ok(is_part)
    }

    /// What is to be done, if there is enough.
    fn due<'a>(
        &self,
        log: &'a PartitionLog,
        config: Compaction,
    ) -> Result<Option<Pass<'a>>, StorageError> {
        if log.check_held().is_err() {
            return Ok(None);
        }
        let now_ms = now_ms();
        let before = Compacted::of(&self.db, log.id)?.unwrap_or(Compacted {
            end: 0,
            first: Generation::COMPACTED,
            through: Generation(0),
            looked: Vec::new(),
        });
        let committed = log.stable_end();
        let oldest = |lag: Duration| now_ms.saturating_sub(millis(lag));
        let (log_start, mut runs) = (log.log_start(), Vec::new());
        self.db.each_run(log.id, log_start, |run| {
            let may = run.last_offset < committed
                && (config.min_lag.is_zero() || run.max_timestamp < oldest(config.min_lag));
            if may {
                runs.push(run);
            }
            Ok(may)
        })?;
        let is_dirty = |run: &&Run| run.last_offset >= before.end;
        let dirty: u64 = runs.iter().filter(is_dirty).map(|run| run.bytes).sum();
        let is_late = |run: &Run| {
            let lag = config.max_lag.map(oldest);
            lag.is_some_and(|oldest| run.max_timestamp < oldest)
        };
        let share = u128::from(bytes(&runs)) * u128::from(config.min_dirty_percent);
        let is_enough = u128::from(dirty) * 100 >= share;
        let is_due = dirty > 0 && (is_enough || runs.iter().filter(is_dirty).any(is_late));
        let end = runs.last().map_or(0, |run| run.last_offset + 1);
        Ok(is_due.then(|| Pass {
            log,
            config,
            tombstones_end: before.tombstones_end(config.delete_retention, now_ms),
            aborted: by_producer(&log.aborted_within(log_start, end)),
            before,
            runs,
            end,
            latest: HashMap::new(),
            producers: HashMap::new(),
            seed: Uuid::new_v4().as_u64_pair().0,
            now_ms,
        }))
    }

    /// Notes the keys of what was not looked at, as many as there is room for. The pass ends there.
    fn note_keys(&self, pass: &mut Pass<'_>, closing: &AtomicBool) -> Result<(), StorageError> {
        let mut ends = pass.runs.len();
        for (index, run) in pass.runs.clone().iter().enumerate() {
            if run.last_offset < pass.before.end || closing.load(Ordering::Acquire) {
                continue;
            }
            self.db
                .each_batch(pass.log.id, run, run.first_offset, |_, batch| {
                    pass.note(&Bytes::copy_from_slice(batch))?;
                    Ok(true)
                })?;
            if pass.latest.len() >= self.max_keys {
                ends = index + 1;
                break;
            }
        }
        pass.runs.truncate(ends);
        pass.end = pass.runs.last().map_or(0, |run| run.last_offset + 1);
        Ok(())
    }

    fn write(
        &self,
        pass: &Pass<'_>,
        output: &mut Output<'_>,
        closing: &AtomicBool,
    ) -> Result<(), StorageError> {
        let expired = pass.now_ms.saturating_sub(millis(self.producer_expiration));
        // Transactions of which there are records.
        let mut told: HashSet<(i64, i16)> = HashSet::new();
        for run in &pass.runs {
            if closing.load(Ordering::Acquire) {
                break;
            }
            self.db
                .each_batch(pass.log.id, run, run.first_offset, |_, batch| {
                    let batch = Bytes::copy_from_slice(batch);
                    let header = BatchHeader::parse(&batch)?;
                    match pass.keeps(&batch, &header, &told, expired)? {
                        Keep::Batch(kept) => {
                            if header.attributes.is_transactional() {
                                told.insert((header.producer_id, header.producer_epoch));
                            }
                            output.put(&header, &kept)?;
                        }
                        Keep::Offsets => output.leave_out(&header)?,
                    }
                    Ok(true)
                })?;
        }
        Ok(())
    }

    /// Puts the new runs in place of the old ones, if those are still there.
    fn replace(&self, pass: &Pass<'_>, files: Files) -> Result<bool, StorageError> {
        let Files { paths, runs } = files;
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        self.db.log().ingest_external_file_opts(&options, paths)?;
        let log = pass.log;
        // From before the runs are looked up until their bytes are counted as dead: as in retention.
        let mut table = self.generations.lock();
        let mut there = Vec::new();
        self.db.each_run(log.id, log.log_start(), |run| {
            there.push(run);
            Ok(run.last_offset + 1 < pass.end)
        })?;
        if log.check_held().is_err() || there != pass.runs {
            warn!(topic = %log.topic, partition = log.index, "not compacted: the log was cut meanwhile");
            return Ok(false);
        }
        let mut batch = WriteBatch::default();
        let mut changed: BTreeMap<Generation, GenerationBytes> = BTreeMap::new();
        for run in &pass.runs {
            batch.delete(keys::run(log.id, run.last_offset));
            bury(&table, &mut changed, run.generation, run.bytes);
        }
        let (old, new) = (bytes(&pass.runs), bytes(&runs));
        // What comes after keeps its place: what is gone is counted as removed from the front.
        let end = pass.runs.last().map_or(0, |run| run.cumulative_bytes);
        let mut cumulative = end - new;
        for run in &runs {
            cumulative += run.bytes;
            let run = Run {
                cumulative_bytes: cumulative,
                ..*run
            };
            batch.put(keys::run(log.id, run.last_offset), run.encode());
            let entry = GenerationBytes {
                total: run.bytes,
                live: run.bytes,
            };
            changed.insert(run.generation, entry);
        }
        put_generations(&changed, &mut batch);
        let mut compacted = pass.before.clone();
        compacted.look(pass.end, pass.config.delete_retention, pass.now_ms);
        compacted.first = runs.first().map_or(compacted.first, |run| run.generation);
        let written = pass.runs.iter().map(|run| run.generation);
        let written = written.filter(|generation| *generation < Generation::COMPACTED);
        compacted.through = compacted
            .through
            .max(written.max().unwrap_or(Generation(0)));
        batch.put(keys::compacted(log.id), compacted.encode());
        self.db.write_meta_durably(batch)?;
        table.extend(changed);
        self.db.set_compacted(log.id, &compacted);
        log.compacted(old.saturating_sub(new));
        Ok(true)
    }

    fn generation(&self) -> Generation {
        Generation(self.next.fetch_add(1, Ordering::Relaxed))
    }
}

enum Keep {
    /// This is left of it.
    Batch(Bytes),
    /// Nothing but that there was something.
    Offsets,
}

impl Pass<'_> {
    fn hash(&self, key: &[u8]) -> [u8; 16] {
        XxHash3_128::oneshot_with_seed(self.seed, key).to_ne_bytes()
    }

    fn note(&mut self, batch: &Bytes) -> Result<(), StorageError> {
        let header = BatchHeader::parse(batch)?;
        if header.producer_id >= 0 {
            self.producers
                .insert(header.producer_id, header.last_offset());
        }
        if header.attributes.is_control() || self.is_aborted(&header) {
            return Ok(());
        }
        for record in millrace_record::decode(batch, &DecodeLimits::default())? {
            let record = record?;
            if let Some(key) = &record.key {
                self.latest.insert(self.hash(key), record.offset);
            }
        }
        Ok(())
    }

    fn is_aborted(&self, header: &BatchHeader) -> bool {
        let aborted = self.aborted.get(&header.producer_id);
        let holds = |(first, last): &(i64, i64)| (*first..=*last).contains(&header.base_offset);
        header.attributes.is_transactional() && aborted.is_some_and(|all| all.iter().any(holds))
    }

    fn keeps(
        &self,
        batch: &Bytes,
        header: &BatchHeader,
        told: &HashSet<(i64, i16)>,
        expired: i64,
    ) -> Result<Keep, StorageError> {
        let transaction = (header.producer_id, header.producer_epoch);
        if header.attributes.is_control() {
            // Who reads the records before it needs it, and whoever copies the log, as long as its producer may come back.
            let is_needed = told.contains(&transaction) || header.max_timestamp > expired;
            return Ok(match is_needed {
                true => Keep::Batch(batch.clone()),
                false => Keep::Offsets,
            });
        }
        let thinned = match self.is_aborted(header) {
            true => Thinned::Nothing,
            false => {
                let keeps = |record: &Record| self.keeps_record(record);
                millrace_record::thin(batch, &DecodeLimits::default(), keeps)?
            }
        };
        Ok(match thinned {
            Thinned::Whole if header.record_count > 0 => Keep::Batch(batch.clone()),
            Thinned::Part(part) => Keep::Batch(part),
            // An empty one is whole, too.
            Thinned::Whole | Thinned::Nothing => {
                let is_last = match self.producers.get(&header.producer_id) {
                    Some(last) => *last == header.last_offset(),
                    None => header.producer_id >= 0 && header.max_timestamp > expired,
                };
                match is_last {
                    true => Keep::Batch(millrace_record::hollow(batch)?),
                    false => Keep::Offsets,
                }
            }
        })
    }

    fn keeps_record(&self, record: &Record) -> bool {
        let Some(key) = &record.key else {
            return true;
        };
        let latest = self.latest.get(&self.hash(key));
        let is_latest = latest.is_none_or(|latest| record.offset >= *latest);
        is_latest && (record.value.is_some() || record.offset >= self.tombstones_end)
    }
}

/// Files that were made.
struct Files {
    paths: Vec<PathBuf>,
    /// One of each, without cumulative bytes.
    runs: Vec<Run>,
}

/// Writes runs to files.
struct Output<'a> {
    compactor: &'a Compactor,
    partition: PartitionId,
    files: Files,
    writer: Option<SstFileWriter<'a>>,
    /// Offsets of which nothing is left, not written yet.
    gap: Option<Gap>,
}

#[derive(Clone, Copy)]
struct Gap {
    base_offset: i64,
    last_offset: i64,
    leader_epoch: i32,
    max_timestamp: i64,
}

impl<'a> Output<'a> {
    fn new(compactor: &'a Compactor, partition: PartitionId) -> Self {
        Self {
            compactor,
            partition,
            files: Files {
                paths: Vec::new(),
                runs: Vec::new(),
            },
            writer: None,
            gap: None,
        }
    }

    fn leave_out(&mut self, header: &BatchHeader) -> Result<(), StorageError> {
        // Epochs begin where they began: whoever copies the log learns them from the batches.
        if let Some(gap) = &mut self.gap
            && gap.leader_epoch == header.leader_epoch
            && header.last_offset() - gap.base_offset <= i64::from(i32::MAX)
        {
            gap.last_offset = header.last_offset();
            gap.max_timestamp = gap.max_timestamp.max(header.max_timestamp);
            return Ok(());
        }
        self.write_gap()?;
        self.gap = Some(Gap {
            base_offset: header.base_offset,
            last_offset: header.last_offset(),
            leader_epoch: header.leader_epoch,
            max_timestamp: header.max_timestamp,
        });
        Ok(())
    }

    fn put(&mut self, header: &BatchHeader, batch: &Bytes) -> Result<(), StorageError> {
        self.write_gap()?;
        self.write(
            (header.base_offset, header.last_offset()),
            header.max_timestamp,
            batch,
        )
    }

    fn write_gap(&mut self) -> Result<(), StorageError> {
        let Some(gap) = self.gap.take() else {
            return Ok(());
        };
        let Gap {
            base_offset,
            last_offset,
            leader_epoch,
            max_timestamp,
        } = gap;
        let batch = millrace_record::gap(base_offset, last_offset, leader_epoch, max_timestamp)?;
        self.write((base_offset, last_offset), max_timestamp, &batch)
    }

    fn write(
        &mut self,
        (base_offset, last_offset): (i64, i64),
        max_timestamp: i64,
        batch: &[u8],
    ) -> Result<(), StorageError> {
        if self.writer.is_none() {
            let generation = self.compactor.generation();
            let path = self.compactor.folder.join(format!("{}.sst", generation.0));
            let writer = SstFileWriter::create(self.compactor.db.log_options());
            writer.open(&path)?;
            self.writer = Some(writer);
            self.files.paths.push(path);
            self.files.runs.push(Run {
                generation,
                first_offset: base_offset,
                last_offset,
                bytes: 0,
                cumulative_bytes: 0,
                max_timestamp,
            });
        }
        let (Some(writer), Some(run)) = (&mut self.writer, self.files.runs.last_mut()) else {
            return Ok(());
        };
        writer.put(
            keys::log(run.generation, self.partition, last_offset),
            batch,
        )?;
        run.last_offset = last_offset;
        run.bytes += batch.len() as u64;
        run.max_timestamp = run.max_timestamp.max(max_timestamp);
        if run.bytes >= FILE_BYTES {
            self.close()?;
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), StorageError> {
        match self.writer.take() {
            Some(mut writer) => Ok(writer.finish()?),
            None => Ok(()),
        }
    }

    fn finish(mut self) -> Result<Files, StorageError> {
        self.write_gap()?;
        self.close()?;
        Ok(self.files)
    }
}

fn by_producer(aborted: &[Ended]) -> HashMap<i64, Vec<(i64, i64)>> {
    let mut by_producer: HashMap<i64, Vec<(i64, i64)>> = HashMap::new();
    for ended in aborted {
        let of_producer = by_producer.entry(ended.producer_id).or_default();
        of_producer.push((ended.first_offset, ended.last_offset));
    }
    by_producer
}

fn remake(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::create_dir_all(folder)
}

fn bytes(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tombstones_go_after_their_time_since_they_were_first_looked_at() {
        let day = Duration::from_secs(86_400);
        let mut compacted = Compacted {
            end: 0,
            first: Generation::COMPACTED,
            through: Generation(3),
            looked: Vec::new(),
        };
        assert_eq!(compacted.tombstones_end(day, 0), 0);
        compacted.look(100, day, 0);
        compacted.look(200, day, 1_000);
        assert_eq!(compacted.tombstones_end(day, 86_399_999), 0);
        assert_eq!(compacted.tombstones_end(day, 86_400_000), 100);
        compacted.look(300, day, 86_401_000);
        assert_eq!(compacted.looked, [(200, 1_000), (300, 86_401_000)]);
        assert_eq!(compacted.tombstones_end(day, 86_401_000), 200);
        assert_eq!(
            Compacted::decode(&compacted.encode()),
            Some(compacted.clone())
        );
        assert_eq!(Compacted::decode(&compacted.encode()[1..]), None);
    }
}
