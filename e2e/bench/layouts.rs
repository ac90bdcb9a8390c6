//! Which layout of batches in RocksDB costs least: the decision behind `broker/src/storage`, measured without a broker.
//!
//! Every layout gets the same appends (incompressible batches, round robin over the partitions, several in one write, write-ahead
//! log, no fsync, flushes past the page cache), the same write buffers and a new folder; then one partition is read from its
//! beginning, from the disk. A plain file is the physical limit. Not responsible for what the broker adds to its batches: see
//! `throughput`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rocksdb::statistics::{StatsLevel, Ticker};
use rocksdb::{
    BlockBasedOptions, DB, DBCompactionStyle, DBCompressionType, FlushOptions, ReadOptions,
    WaitForCompactOptions, WriteBatch,
};
use rustix::fs::{Advice, fadvise};
use tokio::task::yield_now;

use crate::Bench;
use crate::peer::{own_cpu, own_written};
use crate::table::Comparison;

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    partitions: u32,
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1_024))]
    batch_kib: u32,
    /// MB to append in each layout.
    #[arg(long, default_value_t = 3_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    volume_mb: u64,
}

/// What the broker's storage has by default.
const GENERATION_BYTES: usize = 16 << 20;
const BATCHES_PER_WRITE: u32 = 16;
const LAYOUTS: [Layout; 5] = [
    Layout::Leveled,
    Layout::Universal,
    Layout::Blobs,
    Layout::GenerationsOfTwo,
    Layout::Generations,
];

/// How batches are keyed and what RocksDB does with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Key (partition, offset), leveled compaction.
    Leveled,
    /// Key (partition, offset), universal compaction.
    Universal,
    /// Key (partition, offset), values in blob files.
    Blobs,
    /// As [`Layout::Generations`], with a second column family beside the batches: RocksDB then syncs the log at each flush.
    GenerationsOfTwo,
    /// Key (generation, partition, offset); a generation is one write buffer, and its file is never rewritten.
    Generations,
}

/// What a layout cost.
struct Cost {
    appended: u64,
    append: Duration,
    cpu: Duration,
    /// By RocksDB's own counters.
    written: Option<u64>,
    /// By the kernel's.
    reached_disk: u64,
    read: u64,
    read_time: Duration,
}

pub(crate) async fn layouts(bench: &Bench, options: &Options) -> Result<Comparison> {
    let mut comparison = Comparison::new(
        format!(
            "{} MB in batches of {} KiB over {} partitions, by layout",
            options.volume_mb, options.batch_kib, options.partitions
        ),
        &[
            "append, MB/s",
            "CPU, s/GB",
            "bytes written / byte",
            "bytes that reached the disk / byte",
            "read one partition, MB/s",
        ],
    );
    for round in 1..=bench.rounds {
        eprintln!("layouts, round {round} of {}", bench.rounds);
        for layout in LAYOUTS {
            let cost = layout
                .cost(&bench.work, options)
                .await
                .with_context(|| format!("{layout:?}"))?;
            comparison.add(layout.title(), &cost.figures());
        }
        let cost = plain_file(&bench.work, options)
            .await
            .context("plain file")?;
        comparison.add("plain file", &cost.figures());
    }
    Ok(comparison)
}

impl Layout {
    fn title(self) -> &'static str {
        match self {
            Self::Leveled => "(partition, offset), leveled compaction",
            Self::Universal => "(partition, offset), universal compaction",
            Self::Blobs => "(partition, offset), blob files",
            Self::GenerationsOfTwo => "generations, two column families in one database",
            Self::Generations => "generations, one column family: Millrace",
        }
    }

    fn has_generations(self) -> bool {
        matches!(self, Self::GenerationsOfTwo | Self::Generations)
    }

    /// Appends and reads in a new folder in `work`. Its blocking calls are short, with a yield between them, so that dropping it
    /// ends it, and the database is closed before its folder goes.
    async fn cost(self, work: &Path, options: &Options) -> Result<Cost> {
        let folder = tempfile::tempdir_in(work)?;
        let database = self.database();
        let mut families = vec![("default", database.clone())];
        if self == Self::GenerationsOfTwo {
            families.push(("x", rocksdb::Options::default()));
        }
        let db = DB::open_cf_with_opts(&database, folder.path(), families)?;
        let mut batches = Batches::new(options);
        let mut generation_bytes = 0;
        let mut generation = 0_u32;
        rustix::fs::sync();
        let (cpu, disk, start) = (own_cpu()?, own_written()?, Instant::now());
        while !batches.done() {
            let mut write = WriteBatch::with_capacity_bytes(
                BATCHES_PER_WRITE as usize * (batches.batch_bytes + 64),
            );
            for _ in 0..BATCHES_PER_WRITE {
                let (partition, offset, batch) = batches.next();
                write.put(self.key(generation, partition, offset), batch);
            }
            generation_bytes += write.size_in_bytes();
            db.write(write)?;
            if self.has_generations() && generation_bytes >= GENERATION_BYTES {
                generation_bytes = 0;
                generation += 1;
                let mut flush = FlushOptions::default();
                flush.set_wait(false);
                db.flush_opt(&flush)?;
            }
            yield_now().await;
        }
        let append = start.elapsed();
        db.flush()?;
        db.wait_for_compact(&WaitForCompactOptions::default())?;
        let cpu = own_cpu()? - cpu;
        rustix::fs::sync();
        let reached_disk = own_written()?.saturating_sub(disk);
        // Blob files too are written by flushes and compactions, and counted there.
        let written = [
            Ticker::WalFileBytes,
            Ticker::FlushWriteBytes,
            Ticker::CompactWriteBytes,
        ];
        let written = written.map(|ticker| database.get_ticker_count(ticker));
        forget_cached(folder.path())?;
        let start = Instant::now();
        let (read, count) = self.read(&db, generation, 0)?;
        let read_time = start.elapsed();
        ensure!(
            count == batches.in_first_partition(),
            "{count} batches of the {} in partition 0 were read",
            batches.in_first_partition()
        );
        Ok(Cost {
            appended: batches.bytes(),
            append,
            cpu,
            written: Some(written.iter().sum()),
            reached_disk,
            read,
            read_time,
        })
    }

    fn database(self) -> rocksdb::Options {
        let mut options = rocksdb::Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.enable_statistics();
        options.set_statistics_level(StatsLevel::ExceptTimers);
        options.set_max_background_jobs(8);
        options.set_bytes_per_sync(1 << 20);
        // As the broker does, where the file system can.
        options.set_use_direct_io_for_flush_and_compaction(true);
        options.set_allow_concurrent_memtable_write(false);
        options.set_compression_type(DBCompressionType::None);
        options.set_write_buffer_size(GENERATION_BYTES);
        options.set_max_write_buffer_number(3);
        options.set_max_bytes_for_level_base(4 * GENERATION_BYTES as u64);
        options.set_target_file_size_base(2 * GENERATION_BYTES as u64);
        let mut table = BlockBasedOptions::default();
        table.set_block_size(64 << 10);
        options.set_block_based_table_factory(&table);
        match self {
            Self::Leveled => {}
            Self::Universal => options.set_compaction_style(DBCompactionStyle::Universal),
            Self::Blobs => {
                options.set_enable_blob_files(true);
                options.set_min_blob_size(4 << 10);
            }
            Self::GenerationsOfTwo | Self::Generations => {
                // Room for a whole generation: it is flushed when it ends, never before.
                options.set_write_buffer_size(GENERATION_BYTES + GENERATION_BYTES / 4);
                // Files never overlap, so each moves from the first level to the second as it is.
                options.set_num_levels(2);
                options.set_level_compaction_dynamic_level_bytes(false);
                options.set_level_zero_file_num_compaction_trigger(1);
            }
        }
        options
    }

    fn key(self, generation: u32, partition: u32, offset: u64) -> Vec<u8> {
        let mut key = Vec::with_capacity(16);
        if self.has_generations() {
            key.extend_from_slice(&generation.to_be_bytes());
        }
        key.extend_from_slice(&partition.to_be_bytes());
        key.extend_from_slice(&offset.to_be_bytes());
        key
    }

    /// Bytes and count of a partition's batches.
    fn read(self, db: &DB, last_generation: u32, partition: u32) -> Result<(u64, u64)> {
        let (mut bytes, mut count) = (0, 0);
        for generation in 0..=last_generation {
            let mut options = ReadOptions::default();
            options.set_iterate_upper_bound(self.key(generation, partition + 1, 0));
            options.set_readahead_size(256 << 10);
            options.fill_cache(false);
            let mut iterator = db.raw_iterator_opt(options);
            iterator.seek(self.key(generation, partition, 0));
            while let Some(batch) = iterator.value() {
                bytes += batch.len() as u64;
                count += 1;
                iterator.next();
            }
            iterator.status()?;
        }
        Ok((bytes, count))
    }
}

impl Cost {
    /// In the order of the table's columns.
    fn figures(&self) -> [Option<f64>; 5] {
        let per_byte = |bytes: u64| bytes as f64 / self.appended as f64;
        [
            Some(self.appended as f64 / 1e6 / self.append.as_secs_f64()),
            Some(self.cpu.as_secs_f64() / (self.appended as f64 / 1e9)),
            self.written.map(per_byte),
            Some(per_byte(self.reached_disk)),
            Some(self.read as f64 / 1e6 / self.read_time.as_secs_f64()),
        ]
    }
}

/// The same bytes appended to one file, as fast as the page cache takes them, then as many as a partition has read from its
/// beginning.
async fn plain_file(work: &Path, options: &Options) -> Result<Cost> {
    let folder = tempfile::tempdir_in(work)?;
    let path = folder.path().join("log");
    let mut file = File::create(&path)?;
    let mut batches = Batches::new(options);
    rustix::fs::sync();
    let (cpu, disk, start) = (own_cpu()?, own_written()?, Instant::now());
    while !batches.done() {
        for _ in 0..BATCHES_PER_WRITE {
            let (_, _, batch) = batches.next();
            file.write_all(batch)?;
        }
        yield_now().await;
    }
    let (append, cpu) = (start.elapsed(), own_cpu()? - cpu);
    rustix::fs::sync();
    let reached_disk = own_written()?.saturating_sub(disk);
    forget_cached(folder.path())?;
    let mut file = File::open(&path)?;
    let mut batch = vec![0; batches.batch_bytes];
    let start = Instant::now();
    for _ in 0..batches.in_first_partition() {
        file.read_exact(&mut batch)?;
    }
    Ok(Cost {
        appended: batches.bytes(),
        append,
        cpu,
        written: None,
        reached_disk,
        read: batches.in_first_partition() * batches.batch_bytes as u64,
        read_time: start.elapsed(),
    })
}

/// Batches that don't compress, for each partition in turn, and how many there were.
struct Batches {
    noise: Vec<u8>,
    batch_bytes: usize,
    partitions: u32,
    wanted: u64,
    count: u64,
}

impl Batches {
    const RECORDS: u64 = 100;
    /// Batches begin at changing places of the noise, so that none is like the one before and none costs time to make.
    const SHIFTS: usize = 64 << 10;

    fn new(options: &Options) -> Self {
        let batch_bytes = options.batch_kib as usize * 1024;
        let mut noise = vec![0; batch_bytes + Self::SHIFTS];
        fastrand::Rng::with_seed(5).fill(&mut noise);
        Self {
            noise,
            batch_bytes,
            partitions: options.partitions,
            wanted: (options.volume_mb * 1_000_000).div_ceil(batch_bytes as u64),
            count: 0,
        }
    }

    fn done(&self) -> bool {
        self.count >= self.wanted
    }

    /// Partition, last offset and bytes of the next batch.
    fn next(&mut self) -> (u32, u64, &[u8]) {
        let (turn, partitions) = (self.count, u64::from(self.partitions));
        self.count += 1;
        let shift = turn as usize * 4_099 % Self::SHIFTS;
        (
            (turn % partitions) as u32,
            (turn / partitions + 1) * Self::RECORDS - 1,
            &self.noise[shift..shift + self.batch_bytes],
        )
    }

    fn bytes(&self) -> u64 {
        self.count * self.batch_bytes as u64
    }

    fn in_first_partition(&self) -> u64 {
        self.count.div_ceil(u64::from(self.partitions))
    }
}

/// Takes the folder's files, which must be synced, out of the page cache: reads then come from the disk.
fn forget_cached(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fadvise(File::open(entry.path())?, 0, None, Advice::DontNeed)?;
        }
    }
    Ok(())
}
