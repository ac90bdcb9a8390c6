//! The store as a whole: real RocksDB in a temporary folder.

mod compaction;
mod delete;
mod leadership;
mod topics;
mod transactions;

use std::{
    path::Path,
    pin::pin,
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    task::{Context, Wake, Waker},
    time::Duration,
};

use bytes::Bytes;
use millrace_record::{
    BatchBuilder, BatchHeader, BatchOptions, ProducerState, TimestampType, decode,
    set_log_append_time, split,
};
use tokio::sync::Notify;
use uuid::Uuid;

use super::*;

const CONFIG: LogConfig = LogConfig {
    compaction: None,
    max_message_bytes: 1 << 20,
    timestamp_type: TimestampType::CreateTime,
    timestamp_after_max: Duration::from_secs(3600),
    retention: Retention {
        time: None,
        bytes: None,
    },
};

fn options(path: &Path) -> StorageOptions {
    StorageOptions {
        generation_bytes: 256 << 10,
        tail_cache_bytes: 64 << 10,
        min_free_bytes: 0,
        ..StorageOptions::new(path)
    }
}

fn open(path: &Path) -> (Arc<Store>, RecoveryReport) {
    Store::open(options(path)).unwrap()
}

/// Truncates as followers do, and leads again if it has led before.
async fn cut(store: &Store, log: &StoredPartition, offset: i64) -> Result<i64, StorageError> {
    let led = log.leader_epoch();
    let _ = log.follow(0);
    let result = store.truncate(log, 0, offset).await;
    if let Some(epoch) = led {
        log.lead(epoch)?;
    }
    result
}

/// A batch of records with these values, stamped `timestamp_ms`.
fn batch(values: &[&str], timestamp_ms: i64, producer: Option<ProducerState>) -> Bytes {
    let mut builder = BatchBuilder::new(BatchOptions {
        producer,
        ..BatchOptions::default()
    });
    for value in values {
        builder.append(timestamp_ms, None, Some(value.as_bytes()), &[]);
    }
    builder.build().unwrap()
}

async fn append(
    store: &Store,
    log: &StoredPartition,
    batches: Vec<Bytes>,
) -> Result<Appended, StorageError> {
    let epoch = log.leader_epoch().ok_or(StorageError::NotLed)?;
    let append = PartitionAppend::new(log.clone(), epoch, batches)?;
    store.append(vec![append]).await?.await.unwrap().remove(0)
}

/// Partitions of a broker of a Cluster.
fn ensure_partitions(
    store: &Store,
    topic_id: Uuid,
    indexes: &[i32],
    config: LogConfig,
) -> Result<StoredTopic, StorageError> {
    store.ensure_partitions(topic_id, "t", indexes, config)?;
    Ok(store.topic(topic_id).unwrap())
}

/// A partition of a broker of a Cluster.
fn ensure_partition(
    store: &Store,
    topic_id: Uuid,
    index: i32,
    config: LogConfig,
) -> Result<StoredPartition, StorageError> {
    let topic = ensure_partitions(store, topic_id, &[index], config)?;
    Ok(topic.partitions[&index].clone())
}

/// The first partition of a broker that runs alone.
fn first_partition(store: &Store) -> StoredPartition {
    store.topic_named("t").unwrap().partitions[&0].clone()
}

fn logs_of(topic: &StoredTopic) -> Vec<StoredPartition> {
    topic.partitions.values().cloned().collect()
}

/// Everything from `offset` on, as (offset, value), read the way fetch does it.
fn read_all(
    store: &Store,
    log: &PartitionLog,
    offset: i64,
    max_bytes: usize,
) -> Vec<(i64, String)> {
    let mut records = Vec::new();
    let mut next = offset;
    while next < log.log_end() {
        let read = match store
            .read_memory(log, next, max_bytes, true, UpTo::LogEnd)
            .unwrap()
        {
            Some(read) => read,
            None => store
                .read_disk(log, next, max_bytes, true, UpTo::LogEnd)
                .unwrap(),
        };
        assert!(!read.batches.is_empty(), "no progress at {next}");
        for batch in read.batches.into_iter().flat_map(split) {
            let batch = batch.unwrap();
            for record in decode(&batch, &Default::default()).unwrap() {
                let record = record.unwrap();
                if record.offset >= next {
                    records.push((
                        record.offset,
                        String::from_utf8(record.value.unwrap().to_vec()).unwrap(),
                    ));
                }
            }
            next = BatchHeader::parse(&batch).unwrap().last_offset() + 1;
        }
    }
    records
}

/// Appends `count` batches of three records round robin over the partitions; the values tell where they belong.
async fn fill(store: &Store, logs: &[StoredPartition], count: usize) {
    let padding = "x".repeat(1000);
    for i in 0..count {
        let log = &logs[i % logs.len()];
        let from = log.log_end();
        let values: Vec<String> = (from..from + 3)
            .map(|o| format!("{}/{o} {padding}", log.index))
            .collect();
        let values: Vec<&str> = values.iter().map(String::as_str).collect();
        let appended = append(store, log, vec![batch(&values, i as i64, None)])
            .await
            .unwrap();
        assert_eq!(appended.base_offset, from);
    }
}

fn assert_contiguous(store: &Store, log: &PartitionLog, from: i64) {
    for max_bytes in [1, 10_000, 1 << 20] {
        let records = read_all(store, log, from, max_bytes);
        assert_eq!(records.len() as i64, log.log_end() - from);
        for (i, (offset, value)) in records.iter().enumerate() {
            assert_eq!(*offset, from + i as i64);
            assert!(
                value.starts_with(&format!("{}/{offset} ", log.index)),
                "{offset}: {value:.20}"
            );
        }
    }
}

#[tokio::test]
async fn what_is_appended_is_read_back_from_memory_and_from_disk_over_many_generations() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let topic = store.ensure_topic("t", 3, CONFIG).unwrap();
    fill(&store, &logs_of(&topic), 900).await;
    assert!(
        store
            .read_memory(&topic.partitions[&0], 0, 1, true, UpTo::HighWatermark)
            .unwrap()
            .is_none(),
        "the beginning left memory"
    );
    for log in topic.partitions.values() {
        assert_eq!(log.log_end(), 900);
        for from in [0, 1, 449, 898, 899] {
            assert_contiguous(&store, log, from);
        }
    }
    store.close();
}

#[tokio::test]
async fn a_reopened_store_has_everything_after_a_clean_and_an_unclean_stop() {
    let dir = tempfile::tempdir().unwrap();
    let copy = tempfile::tempdir().unwrap();
    let (store, report) = open(dir.path());
    assert_eq!((report.incarnation, report.partitions), (1, 0));
    let topic = store.ensure_topic("t", 2, CONFIG).unwrap();
    fill(&store, &logs_of(&topic), 301).await;
    // What kill -9 leaves: the files as they are, with the writer in the middle of a generation.
    copy_database(dir.path(), copy.path(), "log");
    copy_database(dir.path(), copy.path(), "meta");
    store.close();
    drop((topic, store));
    for (path, clean) in [(dir.path(), true), (copy.path(), false)] {
        let (store, report) = open(path);
        assert_eq!(
            (report.clean, report.incarnation, report.partitions),
            (clean, 2, 2)
        );
        assert_eq!(report.replayed_batches > 0, !clean);
        let topic = store.topic_named("t").unwrap();
        let size: u64 = topic.partitions.values().map(|log| log.size_bytes()).sum();
        assert_eq!(report.bytes, size);
        for log in topic.partitions.values() {
            assert_contiguous(&store, log, 0);
        }
        fill(&store, &logs_of(&topic), 40).await;
        for log in topic.partitions.values() {
            assert_contiguous(&store, log, 0);
        }
        store.close();
    }
}

#[tokio::test]
async fn duplicates_get_their_original_offset_and_gaps_are_refused_across_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let producer = |base_sequence| {
        Some(ProducerState {
            id: 7,
            epoch: 0,
            base_sequence,
        })
    };
    {
        let (store, _) = open(dir.path());
        let topic = store.ensure_topic("t", 1, CONFIG).unwrap();
        let log = &topic.partitions[&0];
        for sequence in 0..3 {
            let appended = append(&store, log, vec![batch(&["a"], 0, producer(sequence))])
                .await
                .unwrap();
            assert_eq!(appended.base_offset, i64::from(sequence));
        }
        // Two batches of one append, the first a duplicate: the second is appended.
        let both = vec![batch(&["a"], 0, producer(2)), batch(&["b"], 0, producer(3))];
        assert_eq!(append(&store, log, both).await.unwrap().base_offset, 2);
        assert_eq!(log.log_end(), 4);
        // All or none: the second does not follow, so the first is not appended either.
        let gap = vec![batch(&["c"], 0, producer(4)), batch(&["d"], 0, producer(9))];
        assert!(matches!(
            append(&store, log, gap).await,
            Err(StorageError::Sequence(SequenceError::OutOfOrder { .. }))
        ));
        assert_eq!(log.log_end(), 4);
        store.close();
    }
    for _ in 0..2 {
        let (store, _) = open(dir.path());
        let log = first_partition(&store);
        assert_eq!(
            append(&store, &log, vec![batch(&["a"], 0, producer(1))])
                .await
                .unwrap()
                .base_offset,
            1
        );
        assert!(
            append(&store, &log, vec![batch(&["x"], 0, producer(8))])
                .await
                .is_err()
        );
        assert_eq!(log.log_end(), 4);
        store.close();
    }
}

/// One record of an idempotent producer.
fn of_producer(id: i64, base_sequence: i32) -> Bytes {
    let producer = ProducerState {
        id,
        epoch: 0,
        base_sequence,
    };
    batch(&["a"], 0, Some(producer))
}

#[tokio::test]
async fn a_forgotten_producer_stays_forgotten_after_a_restart() {
    for truncated in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path());
        let topic = store.ensure_topic("t", 1, CONFIG).unwrap();
        let log = &topic.partitions[&0];
        append(&store, log, vec![of_producer(1, 0)]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
        // As many as a partition remembers: one more, and the first, idle for longest, has to go.
        let others = (2..=20_000).map(|id| of_producer(id, 0)).collect();
        append(&store, log, others).await.unwrap();
        store.seal().await.unwrap();
        let one_more = vec![of_producer(20_001, 0)];
        append(&store, log, one_more).await.unwrap();
        if truncated {
            assert_eq!(cut(&store, log, 20_000).await.unwrap(), 20_000);
        }
        store.close();
        drop((topic, store));
        let (store, _) = open(dir.path());
        let log = first_partition(&store);
        let next = append(&store, &log, vec![of_producer(1, 1)]).await;
        assert!(
            matches!(
                next,
                Err(StorageError::Sequence(SequenceError::OutOfOrder {
                    expected: 0,
                    ..
                }))
            ),
            "{next:?}"
        );
        store.close();
    }
}

#[tokio::test]
async fn sequences_that_a_crash_of_the_machine_took_stay_free() {
    let dir = tempfile::tempdir().unwrap();
    let copy = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let topic = store.ensure_topic("t", 1, CONFIG).unwrap();
    let log = &topic.partitions[&0];
    for sequence in 0..6 {
        append(&store, log, vec![of_producer(7, sequence)])
            .await
            .unwrap();
        if sequence == 2 {
            store.seal().await.unwrap();
            copy_database(dir.path(), copy.path(), "log");
        }
    }
    store.seal().await.unwrap();
    copy_database(dir.path(), copy.path(), "meta");
    store.close();
    drop((topic, store));
    let (store, report) = open(copy.path());
    assert_eq!(report.lost_records, 3);
    store.close();
    drop(store);
    let (store, _) = open(copy.path());
    let log = first_partition(&store);
    let appended = append(&store, &log, vec![of_producer(7, 3)]).await.unwrap();
    assert_eq!((appended.base_offset, log.log_end()), (3, 4));
    store.close();
}

#[tokio::test]
async fn truncation_cuts_at_batch_bounds_in_active_and_sealed_generations_and_survives_a_restart() {
    for (to, new_end) in [(890, 888), (400, 399), (3, 3), (0, 0)] {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path());
        let topic = store.ensure_topic("t", 2, CONFIG).unwrap();
        fill(&store, &logs_of(&topic), 600).await;
        let [log, other] = &logs_of(&topic)[..] else {
            unreachable!()
        };
        assert_eq!(cut(&store, log, to).await.unwrap(), new_end);
        assert_eq!((log.log_end(), log.high_watermark()), (new_end, new_end));
        assert_contiguous(&store, log, 0);
        fill(&store, std::slice::from_ref(log), 50).await;
        assert_contiguous(&store, log, 0);
        assert_contiguous(&store, other, 0);
        let size = log.size_bytes();
        store.close();
        drop((topic, store));
        let (store, _) = open(dir.path());
        let log = first_partition(&store);
        assert_eq!((log.log_end(), log.size_bytes()), (new_end + 150, size));
        assert_contiguous(&store, &log, 0);
        store.close();
    }
}

fn disk_bytes(path: &Path) -> u64 {
    let files = std::fs::read_dir(path.join("log")).unwrap();
    let sst = files
        .map(|file| file.unwrap())
        .filter(|file| file.path().extension().is_some_and(|e| e == "sst"));
    // One may go while we look.
    let sizes = sst.filter_map(|file| Some(file.metadata().ok()?.len()));
    sizes.sum()
}

/// Retention and its files on the way down settle within this time or never.
async fn until(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..200 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("timed out: {what}");
}

#[tokio::test]
async fn retention_by_size_keeps_the_newest_and_gives_the_space_back() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let retention = Retention {
        time: None,
        bytes: Some(500_000),
    };
    let topic = store
        .ensure_topic(
            "t",
            2,
            LogConfig {
                retention,
                ..CONFIG
            },
        )
        .unwrap();
    fill(&store, &logs_of(&topic), 2000).await;
    store.seal().await.unwrap();
    let before = disk_bytes(dir.path());
    until("space is given back", || {
        store.retain().unwrap();
        disk_bytes(dir.path()) < 2_200_000
    })
    .await;
    assert!(before > 5_000_000, "{before}");
    for log in topic.partitions.values() {
        assert!(log.log_start() > 0);
        assert!(
            (500_000..900_000).contains(&log.size_bytes()),
            "{}",
            log.size_bytes()
        );
        assert_contiguous(&store, log, log.log_start());
        assert!(matches!(
            store.read_memory(log, 0, 1, true, UpTo::HighWatermark),
            Err(StorageError::OffsetOutOfRange { .. })
        ));
    }
    let bounds: Vec<_> = topic
        .partitions
        .values()
        .map(|log| (log.log_start(), log.log_end(), log.size_bytes()))
        .collect();
    store.close();
    drop((topic, store));
    let (store, _) = open(dir.path());
    let topic = store.topic_named("t").unwrap();
    let reopened: Vec<_> = topic
        .partitions
        .values()
        .map(|log| (log.log_start(), log.log_end(), log.size_bytes()))
        .collect();
    assert_eq!(bounds, reopened);
    store.close();
}

#[tokio::test]
async fn retention_by_time_spares_what_is_kept_for_ever_in_the_same_generations() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    // The batches' timestamps are near 1970: everything in a sealed generation is too old.
    let retention = Retention {
        time: Some(Duration::from_secs(3600)),
        bytes: None,
    };
    let short = store
        .ensure_topic(
            "short",
            1,
            LogConfig {
                retention,
                ..CONFIG
            },
        )
        .unwrap();
    let kept = store.ensure_topic("kept", 1, CONFIG).unwrap();
    // Three of four batches are short-lived.
    let logs: Vec<_> = [&short, &short, &short, &kept]
        .map(|topic| topic.partitions[&0].clone())
        .into();
    fill(&store, &logs, 2000).await;
    store.seal().await.unwrap();
    until("the short-lived part is given back", || {
        store.retain().unwrap();
        disk_bytes(dir.path()) < 2_200_000
    })
    .await;
    assert_eq!(
        (logs[0].log_start(), logs[0].size_bytes()),
        (logs[0].log_end(), 0)
    );
    assert_contiguous(&store, &logs[3], 0);
    fill(&store, &logs, 100).await;
    assert_contiguous(&store, &logs[0], logs[0].log_start());
    store.close();
}

#[tokio::test]
async fn a_byte_is_written_twice_and_never_again() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let topic = store.ensure_topic("t", 10, CONFIG).unwrap();
    fill(&store, &logs_of(&topic), 4000).await;
    store.close();
    let statistics = store.statistics().unwrap();
    let ticker = |name: &str| -> u64 {
        let line = statistics
            .lines()
            .find(|line| line.starts_with(&format!("{name} COUNT")))
            .unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let produced: u64 = topic.partitions.values().map(|log| log.size_bytes()).sum();
    let written = ticker("rocksdb.wal.bytes")
        + ticker("rocksdb.flush.write.bytes")
        + ticker("rocksdb.compact.write.bytes");
    let amplification = written as f64 / produced as f64;
    assert!(amplification < 2.2, "{amplification:.3}");
}

#[tokio::test]
async fn offsets_are_found_by_time_in_old_and_new_runs() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let topic = store.ensure_topic("t", 1, CONFIG).unwrap();
    let log = &topic.partitions[&0];
    // Batch i is stamped i and holds the offsets from 3 i on.
    fill(&store, &logs_of(&topic), 300).await;
    for stamp in [0, 1, 150, 299] {
        assert_eq!(
            store.find_timestamp(log, stamp).unwrap(),
            Some((3 * stamp, stamp))
        );
    }
    assert_eq!(store.find_timestamp(log, -5).unwrap(), Some((0, 0)));
    assert_eq!(store.find_timestamp(log, 300).unwrap(), None);
    store.close();
}

#[tokio::test]
async fn a_bad_batch_is_refused_and_leaves_other_partitions_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let topic = store.ensure_topic("t", 2, CONFIG).unwrap();
    let [bad, good] = &logs_of(&topic)[..] else {
        unreachable!()
    };
    let mut flipped = batch(&["a"], 0, None).to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    assert!(matches!(
        append(&store, bad, vec![flipped.into()]).await,
        Err(StorageError::Batch(_))
    ));
    let large = batch(&["x".repeat(2 << 20).as_str()], 0, None);
    assert!(matches!(
        append(&store, bad, vec![large]).await,
        Err(StorageError::TooLarge { .. })
    ));
    let control = BatchBuilder::new(BatchOptions {
        control: true,
        ..BatchOptions::default()
    });
    let mut control = control;
    control.append(0, Some(b"\0\0\0\0"), Some(b""), &[]);
    assert!(matches!(
        append(&store, bad, vec![control.build().unwrap()]).await,
        Err(StorageError::Control)
    ));
    let mut stamped = batch(&["a"], 0, None).to_vec();
    set_log_append_time(&mut stamped, 1);
    assert!(matches!(
        append(&store, bad, vec![stamped.into()]).await,
        Err(StorageError::Stamped)
    ));
    assert_eq!(
        append(&store, good, vec![batch(&["b"], 0, None)])
            .await
            .unwrap()
            .base_offset,
        0
    );
    assert_eq!(bad.log_end(), 0);
    store.close();
}

#[tokio::test]
async fn log_append_time_stamps_records_with_the_brokers_clock() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let config = LogConfig {
        timestamp_type: TimestampType::LogAppendTime,
        ..CONFIG
    };
    let topic = store.ensure_topic("t", 1, config).unwrap();
    let log = &topic.partitions[&0];
    let stamp = append(&store, log, vec![batch(&["a"], 5, None)])
        .await
        .unwrap()
        .log_append_time_ms
        .unwrap();
    assert!((crate::now_ms() - stamp).abs() < 60_000);
    let read = store
        .read_memory(log, 0, 1, true, UpTo::HighWatermark)
        .unwrap()
        .unwrap();
    let record = decode(&read.batches[0], &Default::default())
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    assert_eq!(record.timestamp_ms, stamp);
    store.close();
}

#[tokio::test]
async fn a_timestamp_far_ahead_is_refused_unless_the_broker_stamps_records() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let topic = store.ensure_topic("t", 1, CONFIG).unwrap();
    let log = &topic.partitions[&0];
    let hours_ahead =
        |hours: i64| batch(&["a"], crate::now_ms() + hours * 3_600_000 - 60_000, None);
    append(&store, log, vec![hours_ahead(1)]).await.unwrap();
    // All or none, as with every refused batch.
    let two = vec![hours_ahead(0), hours_ahead(2)];
    assert!(matches!(
        append(&store, log, two).await,
        Err(StorageError::Timestamp { timestamp_ms, max_timestamp_ms }) if timestamp_ms > max_timestamp_ms
    ));
    for change in [
        LogConfig {
            timestamp_after_max: Duration::from_secs(3 * 3600),
            ..CONFIG
        },
        LogConfig {
            timestamp_type: TimestampType::LogAppendTime,
            ..CONFIG
        },
    ] {
        store.ensure_topic("t", 1, change).unwrap();
        append(&store, log, vec![hours_ahead(2)]).await.unwrap();
    }
    assert_eq!(log.log_end(), 3);
    store.close();
}

#[tokio::test]
async fn with_fsync_nothing_is_readable_or_acknowledged_before_it_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    let options = StorageOptions {
        durability: Durability::Fsync,
        ..options(dir.path())
    };
    let (store, _) = Store::open(options).unwrap();
    let topic = store.ensure_topic("t", 3, CONFIG).unwrap();
    fill(&store, &logs_of(&topic), 60).await;
    for log in topic.partitions.values() {
        assert_eq!(log.high_watermark(), 60);
        assert_contiguous(&store, log, 0);
    }
    store.close();
}

/// Holds up whoever wakes it until it is released.
struct Obstacle {
    reached: Sender<()>,
    released: parking_lot::Mutex<Receiver<()>>,
}

impl Wake for Obstacle {
    fn wake(self: Arc<Self>) {
        self.reached.send(()).unwrap();
        self.released.lock().recv().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn truncation_never_leaves_a_high_watermark_above_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let options = StorageOptions {
        durability: Durability::Fsync,
        ..options(dir.path())
    };
    let (store, _) = Store::open(options).unwrap();
    let topic = store.ensure_topic("t", 2, CONFIG).unwrap();
    let [before, log] = &logs_of(&topic)[..] else {
        unreachable!()
    };
    // The syncer is held up where it wakes a consumer, with an append to complete that comes right after.
    let (reached, is_reached) = channel();
    let (release, released) = channel();
    let obstacle = Arc::new(Obstacle {
        reached,
        released: parking_lot::Mutex::new(released),
    });
    let consumer = Arc::new(Notify::new());
    before.notify_on_append(&consumer);
    let mut waiting = pin!(consumer.notified());
    let waker = Waker::from(obstacle);
    let polled = waiting.as_mut().poll(&mut Context::from_waker(&waker));
    assert!(polled.is_pending());
    let mut answers = Vec::new();
    for log in [before, log] {
        let append = PartitionAppend::new(log.clone(), 1, vec![batch(&["a"], 0, None)]).unwrap();
        answers.push(store.append(vec![append]).await.unwrap());
    }
    is_reached.recv().unwrap();
    until("both are written", || log.log_end() > 0).await;
    let truncated = tokio::spawn({
        let (store, log) = (store.clone(), log.clone());
        log.follow(2).unwrap();
        async move { store.truncate(&log, 2, 0).await }
    });
    // Long enough for a truncation that does not wait.
    tokio::time::sleep(Duration::from_millis(200)).await;
    release.send(()).unwrap();
    assert_eq!(truncated.await.unwrap().unwrap(), 0);
    for answer in answers {
        answer.await.unwrap().remove(0).unwrap();
    }
    assert_eq!((log.log_end(), log.high_watermark()), (0, 0));
    store.close();
}

#[tokio::test]
async fn a_second_store_on_the_same_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let second = Store::open(options(dir.path()));
    assert!(
        matches!(second, Err(StorageError::Open { .. })),
        "a folder has one owner"
    );
    store.close();
}

/// Copies a database as kill -9 would leave it. Nothing is appended meanwhile, but flushes may still be under way: then again.
fn copy_database(from: &Path, to: &Path, database: &str) {
    let (from, to) = (from.join(database), to.join(database));
    let listing = || -> Option<Vec<_>> {
        let mut files: Vec<_> = std::fs::read_dir(&from)
            .unwrap()
            .map(|entry| {
                Some((
                    entry.as_ref().ok()?.file_name(),
                    entry.as_ref().ok()?.metadata().ok()?.len(),
                ))
            })
            .collect::<Option<_>>()?;
        files.sort();
        Some(files)
    };
    let copied = || {
        let before = listing()?;
        std::fs::create_dir_all(&to).unwrap();
        for (name, _) in &before {
            std::fs::copy(from.join(name), to.join(name)).ok()?;
        }
        std::thread::sleep(Duration::from_millis(50));
        (listing()? == before).then_some(())
    };
    while copied().is_none() {
        // It is not there if a file went while they were listed.
        let _ = std::fs::remove_dir_all(&to);
    }
}

#[tokio::test]
async fn what_a_crash_of_the_machine_leaves_is_a_prefix_of_each_log() {
    // One of the two databases kept more of its unsynced end than the other.
    for later in ["log", "meta"] {
        let dir = tempfile::tempdir().unwrap();
        let copy = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path());
        let topic = store.ensure_topic("t", 2, CONFIG).unwrap();
        fill(&store, &logs_of(&topic), 301).await;
        let earlier = if later == "log" { "meta" } else { "log" };
        copy_database(dir.path(), copy.path(), earlier);
        let end = topic.partitions[&0].log_end();
        // Four generations: fewer than may be unflushed at a time.
        fill(&store, &logs_of(&topic), 300).await;
        let later_end = topic.partitions[&0].log_end();
        copy_database(dir.path(), copy.path(), later);
        store.close();
        drop((topic, store));
        for reopened in 0..2 {
            let (store, report) = open(copy.path());
            let topic = store.topic_named("t").unwrap();
            let expected = if later == "log" { later_end } else { end };
            assert_eq!(
                topic.partitions[&0].log_end(),
                expected + 90 * reopened,
                "{later}, {reopened}: {report}"
            );
            assert_eq!(
                report.lost_records > 0,
                later == "meta" && reopened == 0,
                "{report}"
            );
            for log in topic.partitions.values() {
                assert_contiguous(&store, log, 0);
            }
            fill(&store, &logs_of(&topic), 60).await;
            for log in topic.partitions.values() {
                assert_contiguous(&store, log, 0);
            }
            store.close();
        }
    }
}
