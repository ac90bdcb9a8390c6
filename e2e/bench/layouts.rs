//! Which layout of batches in RocksDB costs least: the decision behind `broker/src/storage`, measured.
//!
//! Every layout gets the same appends (incompressible batches, round robin over the partitions, one write for 16 of them, write-ahead log,
//! no fsync) and the same write buffers; then one partition is read from its beginning. A plain file is the physical limit.

use std::{
    fs::File,
    io::Write,
    path::Path,
    time::Instant,
};

use rocksdb::{
    BlockBasedOptions, ColumnFamilyDescriptor, DB, DBCompactionStyle, DBCompressionType, FlushOptions, Options,
    ReadOptions, WriteBatch,
};

const GENERATION_BYTES: usize = 32 << 20;
const BATCHES_PER_WRITE: usize = 16;

/// How batches are keyed and what RocksDB does with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Key (partition, offset), leveled compaction.
    Leveled,
    /// Key (partition, offset), universal compaction.
    Universal,
    /// Key (partition, offset), values in blob files.
    Blobs,
    /// Key (generation, partition, offset); a generation is one write buffer.
    Generations,
}

/// What a layout cost.
#[derive(Clone, Debug)]
pub(crate) struct Cost {
    pub append_mb_per_s: f64,
    pub read_mb_per_s: f64,
    pub cpu_s_per_gb: f64,
    pub written_per_byte: f64,
    pub files: usize,
}

pub(crate) const ALL: [Layout; 4] = [Layout::Leveled, Layout::Universal, Layout::Blobs, Layout::Generations];

/// Appends `total_bytes` in batches of `batch_bytes` over `partitions`, then reads one partition.
pub(crate) fn run(
    layout: Layout,
    folder: &Path,
    partitions: u32,
    batch_bytes: usize,
    total_bytes: u64,
) -> Result<Cost, rocksdb::Error> {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_max_background_jobs(2);
    options.set_bytes_per_sync(1 << 20);
    options.set_wal_bytes_per_sync(1 << 20);
    options.set_max_total_wal_size(8 * GENERATION_BYTES as u64);
    options.set_allow_concurrent_memtable_write(false);
    options.enable_statistics();
    let db = DB::open_cf_descriptors(&options, folder, [ColumnFamilyDescriptor::new("default", family(layout))])?;
    let log = db.cf_handle("default").ok_or_else(|| unreachable_family())?;
    let mut batch_of_noise = vec![0; batch_bytes];
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    let cpu_before = cpu_seconds();
    let begun = Instant::now();
    let (mut appended, mut in_generation, mut generation) = (0_u64, 0, 0_u32);
    let mut offsets = vec![0_u64; partitions as usize];
    let mut next = 0;
    while appended < total_bytes {
        let mut write = WriteBatch::with_capacity_bytes(BATCHES_PER_WRITE * (batch_bytes + 64));
        for _ in 0..BATCHES_PER_WRITE {
            scramble(&mut batch_of_noise, &mut noise);
            let partition = next % partitions;
            next += 1;
            let offset = &mut offsets[partition as usize];
            *offset += 100;
            write.put_cf(log, key(layout, generation, partition, *offset), &batch_of_noise);
            appended += batch_bytes as u64;
            in_generation += batch_bytes;
        }
        db.write(write)?;
        if layout == Layout::Generations && in_generation >= GENERATION_BYTES {
            in_generation = 0;
            generation += 1;
            let mut flush = FlushOptions::default();
            flush.set_wait(false);
            db.flush_cf_opt(log, &flush)?;
        }
    }
    let append_s = begun.elapsed().as_secs_f64();
    db.flush()?;
    db.wait_for_compact(&rocksdb::WaitForCompactOptions::default())?;
    let cpu_s_per_gb = (cpu_seconds() - cpu_before) / (appended as f64 / 1e9);
    let begun = Instant::now();
    let read = read_partition(&db, layout, generation, 0)?;
    let read_s = begun.elapsed().as_secs_f64();
    assert_eq!(read, offsets[0] / 100 * batch_bytes as u64, "every batch is read");
    let written = tickers(&options, &[
        "rocksdb.wal.bytes",
        "rocksdb.flush.write.bytes",
        "rocksdb.compact.write.bytes",
        "rocksdb.blobdb.blob.file.bytes.written",
    ]);
    Ok(Cost {
        append_mb_per_s: appended as f64 / 1e6 / append_s,
        read_mb_per_s: read as f64 / 1e6 / read_s,
        cpu_s_per_gb,
        written_per_byte: written as f64 / appended as f64,
        files: db.live_files()?.len(),
    })
}

/// The same bytes appended to a plain file: MB/s and CPU seconds for each GB.
pub(crate) fn plain_file(path: &Path, batch_bytes: usize, total_bytes: u64) -> std::io::Result<(f64, f64)> {
    let mut file = File::create(path)?;
    let mut batch_of_noise = vec![0; batch_bytes];
    let mut noise = 1;
    let cpu_before = cpu_seconds();
    let begun = Instant::now();
    let mut appended = 0;
    while appended < total_bytes {
        scramble(&mut batch_of_noise, &mut noise);
        file.write_all(&batch_of_noise)?;
        appended += batch_bytes as u64;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let gigabytes = appended as f64 / 1e9;
    Ok((gigabytes * 1e3 / seconds, (cpu_seconds() - cpu_before) / gigabytes))
}

fn family(layout: Layout) -> Options {
    let mut options = Options::default();
    options.set_write_buffer_size(GENERATION_BYTES + GENERATION_BYTES / 4);
    options.set_max_write_buffer_number(3);
    options.set_compression_type(DBCompressionType::None);
    options.set_max_bytes_for_level_base(4 * GENERATION_BYTES as u64);
    options.set_target_file_size_base(GENERATION_BYTES as u64);
    let mut table = BlockBasedOptions::default();
    table.set_block_size(64 << 10);
    options.set_block_based_table_factory(&table);
    match layout {
        Layout::Leveled => {}
        Layout::Universal => options.set_compaction_style(DBCompactionStyle::Universal),
        Layout::Blobs => {
            options.set_enable_blob_files(true);
            options.set_min_blob_size(4 << 10);
        }
        Layout::Generations => {
            options.set_num_levels(2);
            options.set_level_compaction_dynamic_level_bytes(false);
            options.set_level_zero_file_num_compaction_trigger(1);
        }
    }
    options
}

fn key(layout: Layout, generation: u32, partition: u32, offset: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(16);
    if layout == Layout::Generations {
        key.extend_from_slice(&generation.to_be_bytes());
    }
    key.extend_from_slice(&partition.to_be_bytes());
    key.extend_from_slice(&offset.to_be_bytes());
    key
}

fn read_partition(db: &DB, layout: Layout, last_generation: u32, partition: u32) -> Result<u64, rocksdb::Error> {
    let generations = if layout == Layout::Generations { 0..=last_generation } else { 0..=0 };
    let mut read = 0;
    for generation in generations {
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(key(layout, generation, partition + 1, 0));
        options.set_readahead_size(256 << 10);
        options.fill_cache(false);
        let mut iterator = db.raw_iterator_opt(options);
        iterator.seek(key(layout, generation, partition, 0));
        while let Some(value) = iterator.value() {
            read += value.len() as u64;
            iterator.next();
        }
        iterator.status()?;
    }
    Ok(read)
}

fn tickers(options: &Options, names: &[&str]) -> u64 {
    let text = options.get_statistics().unwrap_or_default();
    let value = |name: &&str| {
        let line = text.lines().find(|line| line.split(' ').next() == Some(name))?;
        line.rsplit(' ').next()?.parse::<u64>().ok()
    };
    names.iter().filter_map(value).sum()
}

/// Makes a batch that does not compress and differs from the one before, at the cost of a few words.
fn scramble(batch: &mut [u8], noise: &mut u64) {
    for word in batch.chunks_exact_mut(512) {
        *noise ^= *noise << 13;
        *noise ^= *noise >> 7;
        *noise ^= *noise << 17;
        word[..8].copy_from_slice(&noise.to_le_bytes());
    }
}
