//! Compaction: of each key the last record is left, where it was, and nothing else changes for anyone.

use std::collections::{BTreeMap, BTreeSet};

use millrace_record::{Compression, EndMarker};

use super::{
    transactions::{mark, send},
    *,
};

const COMPACTED: LogConfig = LogConfig {
    compaction: Some(Compaction {
        min_lag: Duration::ZERO,
        max_lag: None,
        delete_retention: Duration::from_secs(3600),
        min_dirty_percent: 1,
    }),
    ..CONFIG
};

/// Offset, key and value.
type Kept = (i64, String, Option<String>);

fn keyed(
    records: &[(String, Option<String>)],
    compression: Compression,
    producer: Option<ProducerState>,
) -> Bytes {
    let mut builder = BatchBuilder::new(BatchOptions {
        compression,
        producer,
        ..BatchOptions::default()
    });
    for (key, value) in records {
        let value = value.as_ref().map(|value| value.as_bytes());
        builder.append(0, Some(key.as_bytes()), value, &[]);
    }
    builder.build().unwrap()
}

/// Reads it all from the disk, since the newest batches are in memory as they came. No offset may be missing.
fn kept(store: &Store, log: &PartitionLog) -> Vec<Kept> {
    let mut records = Vec::new();
    let mut next = log.log_start();
    while next < log.log_end() {
        let read = store.read_disk(log, next, 10_000, true, UpTo::LogEnd);
        let read = read.unwrap();
        for batch in read.batches.into_iter().flat_map(split) {
            let batch = batch.unwrap();
            let header = millrace_record::validate_stored(&batch).unwrap();
            assert_eq!(header.base_offset, next, "an offset is missing");
            next = header.last_offset() + 1;
            if header.attributes.is_control() {
                continue;
            }
            let text = |bytes: Bytes| String::from_utf8(bytes.to_vec()).unwrap();
            for record in decode(&batch, &Default::default()).unwrap() {
                let record = record.unwrap();
                let key = record.key.map(text).unwrap_or_default();
                records.push((record.offset, key, record.value.map(text)));
            }
        }
    }
    records
}

/// What is left of `all` if everything before `end` is compacted.
fn compacted(all: &[Kept], end: i64) -> Vec<Kept> {
    let before = || all.iter().filter(|(offset, ..)| *offset < end);
    let latest: BTreeMap<&str, i64> = before().map(|(o, key, _)| (key.as_str(), *o)).collect();
    let latest: BTreeSet<i64> = latest.into_values().collect();
    let stays = |(offset, ..): &&Kept| *offset >= end || latest.contains(offset);
    all.iter().filter(stays).cloned().collect()
}

/// Writes batches of random records, and takes note of them.
struct Writer {
    random: fastrand::Rng,
    sequence: i32,
    all: Vec<Kept>,
}

impl Writer {
    fn new(seed: u64) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            sequence: 0,
            all: Vec::new(),
        }
    }

    async fn write(&mut self, store: &Store, log: &StoredPartition, batches: usize, keys: u32) {
        for _ in 0..batches {
            let count = self.random.usize(1..20);
            let random = &mut self.random;
            let mut record = || {
                let key = format!("k{}", random.u32(0..keys));
                let value = format!("{} {}", random.u64(..), "x".repeat(random.usize(0..100)));
                (key, (random.u8(0..20) > 0).then_some(value))
            };
            let records: Vec<_> = std::iter::repeat_with(&mut record).take(count).collect();
            let compression = Compression::ALL[self.random.usize(0..Compression::ALL.len())];
            let producer = self.random.bool().then(|| {
                let base_sequence = self.sequence;
                self.sequence += count as i32;
                ProducerState {
                    id: 7,
                    epoch: 0,
                    base_sequence,
                }
            });
            let batch = keyed(&records, compression, producer);
            let at = append(store, log, vec![batch]).await.unwrap().base_offset;
            let offsets = (at..).zip(records);
            self.all
                .extend(offsets.map(|(offset, (key, value))| (offset, key, value)));
        }
    }
}

/// A store with a compacted topic of one partition.
fn begin() -> (tempfile::TempDir, Arc<Store>, StoredPartition) {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    store.ensure_topic("t", 1, COMPACTED).unwrap();
    let log = first_partition(&store);
    (dir, store, log)
}

async fn seal_and_compact(store: &Store) {
    store.seal().await.unwrap();
    store.compact().unwrap();
}

#[tokio::test]
async fn of_each_key_the_last_record_is_left_where_it_was() {
    for (seed, keys, max_keys) in [(0, 50, 1 << 20), (1, 3_000, 1 << 20), (2, 3_000, 100)] {
        let dir = tempfile::tempdir().unwrap();
        let options = StorageOptions {
            compaction_keys: max_keys,
            ..options(dir.path())
        };
        let (mut store, _) = Store::open(options.clone()).unwrap();
        store.ensure_topic("t", 1, COMPACTED).unwrap();
        let mut writer = Writer::new(seed);
        for round in 0..4 {
            let log = first_partition(&store);
            writer.write(&store, &log, 300, keys).await;
            let end = log.log_end();
            seal_and_compact(&store).await;
            let size = log.size_bytes();
            writer.write(&store, &log, 20, keys).await;
            assert_eq!(
                kept(&store, &log),
                compacted(&writer.all, end),
                "round {round}"
            );
            // What was replaced is given back, once no one can be reading it any more.
            store.retain().unwrap();
            store.retain().unwrap();
            assert_eq!(
                kept(&store, &log),
                compacted(&writer.all, end),
                "round {round}"
            );
            if round == 1 {
                store.close();
                drop(store);
                store = Store::open(options.clone()).unwrap().0;
            }
            if round == 2 {
                let at_end = first_partition(&store).size_bytes();
                assert!(at_end < size + (64 << 10), "{at_end} after {size}");
            }
        }
        store.close();
    }
}

#[tokio::test]
async fn nothing_is_compacted_that_is_too_young_or_too_little() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let config = |min_lag: u64, min_dirty_percent: u8| LogConfig {
        compaction: Some(Compaction {
            min_lag: Duration::from_secs(min_lag),
            max_lag: None,
            delete_retention: Duration::ZERO,
            min_dirty_percent,
        }),
        ..CONFIG
    };
    store.ensure_topic("t", 1, config(1 << 40, 50)).unwrap();
    let log = first_partition(&store);
    let mut writer = Writer::new(3);
    writer.write(&store, &log, 300, 10).await;
    seal_and_compact(&store).await;
    assert_eq!(kept(&store, &log), writer.all, "too young");
    store.ensure_topic("t", 1, config(0, 50)).unwrap();
    store.compact().unwrap();
    let end = log.log_end();
    assert_eq!(kept(&store, &log), compacted(&writer.all, end));
    let held = log.size_bytes();
    writer.write(&store, &log, 1, 10).await;
    if log.size_bytes() < 2 * held {
        seal_and_compact(&store).await;
        assert_eq!(
            kept(&store, &log),
            compacted(&writer.all, end),
            "too little"
        );
    }
    store.close();
}

#[tokio::test]
async fn tombstones_outlive_the_pass_that_first_sees_them_and_then_go() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let config = LogConfig {
        compaction: Some(Compaction {
            delete_retention: Duration::ZERO,
            ..COMPACTED.compaction.unwrap()
        }),
        ..CONFIG
    };
    store.ensure_topic("t", 1, config).unwrap();
    let log = first_partition(&store);
    let one = |key: &str, value: Option<&str>| {
        let records = [(key.to_owned(), value.map(str::to_owned))];
        vec![keyed(&records, Compression::None, None)]
    };
    append(&store, &log, one("a", Some("1"))).await.unwrap();
    append(&store, &log, one("b", Some("2"))).await.unwrap();
    append(&store, &log, one("a", None)).await.unwrap();
    seal_and_compact(&store).await;
    let b = (1, "b".to_owned(), Some("2".to_owned()));
    assert_eq!(kept(&store, &log), [b.clone(), (2, "a".to_owned(), None)]);
    append(&store, &log, one("c", Some("3"))).await.unwrap();
    seal_and_compact(&store).await;
    let c = (3, "c".to_owned(), Some("3".to_owned()));
    assert_eq!(kept(&store, &log), [b, c]);
    store.close();
}

#[tokio::test]
async fn a_follower_copies_what_is_left_and_knows_the_producers() {
    let (leading, following) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (leader, _) = open(leading.path());
    let (follower, _) = open(following.path());
    leader.ensure_topic("t", 1, COMPACTED).unwrap();
    follower.ensure_topic("t", 1, COMPACTED).unwrap();
    let (log, copy) = (first_partition(&leader), first_partition(&follower));
    copy.follow(1).unwrap();
    let copy_up_to = async |end: i64| {
        while copy.log_end() < end {
            let next = copy.log_end();
            let read = leader.read_disk(&log, next, 3_000, true, UpTo::LogEnd);
            let read = read.unwrap();
            let append = PartitionAppend::replicated(copy.clone(), 1, read.batches).unwrap();
            let answer = follower.append(vec![append]).await.unwrap().await.unwrap();
            answer[0].as_ref().unwrap();
        }
    };
    let mut writer = Writer::new(4);
    writer.write(&leader, &log, 400, 30).await;
    // In the middle of what will be one gap.
    copy_up_to(log.log_end() / 2).await;
    writer.write(&leader, &log, 400, 30).await;
    let last = [("k".to_owned(), Some("v".to_owned()))];
    let producer = ProducerState {
        id: 8,
        epoch: 0,
        base_sequence: 0,
    };
    let last = keyed(&last, Compression::None, Some(producer));
    let at = append(&leader, &log, vec![last.clone()]).await.unwrap();
    let newer = keyed(&[("k".to_owned(), None)], Compression::None, None);
    append(&leader, &log, vec![newer]).await.unwrap();
    writer.write(&leader, &log, 400, 30).await;
    seal_and_compact(&leader).await;
    copy_up_to(log.log_end()).await;
    let left = kept(&leader, &log);
    let beyond = left.iter().filter(|(offset, ..)| *offset > at.base_offset);
    let copied = kept(&follower, &copy);
    let copied_beyond = copied
        .iter()
        .filter(|(offset, ..)| *offset > at.base_offset);
    assert!(beyond.eq(copied_beyond));
    // Nothing of that batch is left, and it is known all the same.
    copy.lead(2).unwrap();
    let again = append(&follower, &copy, vec![last]).await.unwrap();
    assert_eq!(again.base_offset, at.base_offset);
    assert!(left.iter().all(|(offset, ..)| *offset != at.base_offset));
    leader.close();
    follower.close();
}

#[tokio::test]
async fn what_was_aborted_goes_and_what_was_committed_is_as_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    store.ensure_topic("t", 1, CONFIG).unwrap();
    let log = first_partition(&store);
    // Without keys, hence left whole unless they were aborted.
    send(&store, &log, 0, &["a", "b"]).await;
    mark(&store, &log, EndMarker::Abort, 0).await;
    send(&store, &log, 1, &["c"]).await;
    mark(&store, &log, EndMarker::Commit, 1).await;
    send(&store, &log, 2, &["open"]).await;
    store.ensure_topic("t", 1, COMPACTED).unwrap();
    store.seal().await.unwrap();
    store.compact().unwrap();
    let values = |log: &PartitionLog| -> Vec<String> {
        let kept = kept(&store, log).into_iter();
        kept.filter_map(|(_, _, value)| value).collect()
    };
    // A run that reaches beyond what is stable waits.
    assert_eq!(values(&log), ["a", "b", "c", "open"]);
    mark(&store, &log, EndMarker::Commit, 2).await;
    store.compact().unwrap();
    assert_eq!(values(&log), ["c", "open"]);
    assert_eq!(log.stable_end(), log.log_end());
    store.close();
}

#[tokio::test]
async fn what_comes_again_after_a_cut_is_compacted_again_and_never_taken_for_what_was_replaced() {
    let (dir, store, log) = begin();
    let mut writer = Writer::new(7);
    writer.write(&store, &log, 600, 30).await;
    seal_and_compact(&store).await;
    let mut expected = compacted(&writer.all, log.log_end());
    let end = cut(&store, &log, log.log_end() / 2).await.unwrap();
    expected.retain(|(offset, ..)| *offset < end);
    for _ in 0..600 {
        let key = format!("k{}", writer.random.u32(0..30));
        let record = [(key.clone(), Some("v".to_owned()))];
        let batch = keyed(&record, Compression::None, None);
        let at = append(&store, &log, vec![batch]).await.unwrap().base_offset;
        expected.push((at, key, Some("v".to_owned())));
    }
    let expected = compacted(&expected, log.log_end());
    seal_and_compact(&store).await;
    assert_eq!(kept(&store, &log), expected);
    store.retain().unwrap();
    store.retain().unwrap();
    store.close();
    drop(store);
    let (store, _) = open(dir.path());
    assert_eq!(kept(&store, &first_partition(&store)), expected);
    store.close();
}

#[tokio::test]
async fn records_without_a_key_are_refused() {
    let (_dir, store, log) = begin();
    let refused = append(&store, &log, vec![batch(&["x"], 0, None)]).await;
    assert!(matches!(refused, Err(StorageError::NoKey)));
    assert_eq!(log.log_end(), 0);
    store.close();
}

#[tokio::test]
async fn what_a_crash_leaves_of_a_pass_is_thrown_away() {
    let (dir, store, log) = begin();
    let mut writer = Writer::new(5);
    writer.write(&store, &log, 300, 20).await;
    store.seal().await.unwrap();
    // Files that were taken in, and of which `meta` knows nothing.
    let path = dir.path().join("orphan.sst");
    let generation = Generation(Generation::COMPACTED.0 + 5);
    let options = rocksdb::Options::default();
    let mut orphan = rocksdb::SstFileWriter::create(&options);
    orphan.open(&path).unwrap();
    orphan
        .put(keys::log(generation, log.id, 9), b"no batch")
        .unwrap();
    orphan.finish().unwrap();
    store.db.log().ingest_external_file(vec![&path]).unwrap();
    store.close();
    drop(store);
    let (store, _) = open(dir.path());
    let log = first_partition(&store);
    assert_eq!(kept(&store, &log), writer.all);
    let end = log.log_end();
    seal_and_compact(&store).await;
    assert_eq!(kept(&store, &log), compacted(&writer.all, end));
    let files = store.db.log().live_files().unwrap();
    let of = |file: &rocksdb::LiveFile| keys::parse_log(file.start_key.as_deref()?);
    let generations = files
        .iter()
        .filter_map(of)
        .map(|(generation, ..)| generation);
    assert!(
        generations
            .collect::<Vec<_>>()
            .iter()
            .all(|g| *g != generation)
    );
    store.close();
}

#[tokio::test]
async fn retention_takes_what_compaction_has_left() {
    let (_dir, store, log) = begin();
    let mut writer = Writer::new(6);
    writer.write(&store, &log, 400, 1_000).await;
    seal_and_compact(&store).await;
    writer.write(&store, &log, 400, 1_000).await;
    store.seal().await.unwrap();
    let both = LogConfig {
        retention: Retention {
            time: None,
            bytes: Some(1),
        },
        ..COMPACTED
    };
    store.ensure_topic("t", 1, both).unwrap();
    store.retain().unwrap();
    store.retain().unwrap();
    let left = kept(&store, &log);
    let stays = |(offset, ..): &&Kept| *offset >= log.log_start();
    let expected: Vec<Kept> = writer.all.iter().filter(stays).cloned().collect();
    assert_eq!(left, expected);
    assert!(log.log_start() > 0);
    store.close();
}
