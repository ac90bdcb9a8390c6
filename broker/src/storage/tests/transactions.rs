//! Transactions in a partition: what readers of committed records see, whatever becomes of the log.

use millrace_record::EndMarker;

use super::*;

const PRODUCER: i64 = 7;

/// A batch of one record of a transaction.
fn part(value: &str, epoch: i16, sequence: i32) -> Bytes {
    let mut builder = BatchBuilder::new(BatchOptions {
        transactional: true,
        producer: Some(ProducerState {
            id: PRODUCER,
            epoch,
            base_sequence: sequence,
        }),
        ..BatchOptions::default()
    });
    builder.append(0, None, Some(value.as_bytes()), &[]);
    builder.build().unwrap()
}

async fn announce(store: &Store, log: &StoredPartition, epoch: i16) -> Result<(), StorageError> {
    let led = log.leader_epoch().unwrap();
    let announced = store.announce(vec![(log.clone(), led)], PRODUCER, epoch);
    announced.await.map_err(|(_, error)| error)
}

pub(super) async fn mark(store: &Store, log: &StoredPartition, end: EndMarker, epoch: i16) -> i64 {
    let led = log.leader_epoch().unwrap();
    let append = PartitionAppend::marker(log.clone(), led, end, (PRODUCER, epoch)).unwrap();
    let answer = store.append(vec![append]).await.unwrap().await.unwrap();
    answer[0].as_ref().unwrap().base_offset
}

/// Announces a transaction and sends records of it.
pub(super) async fn send(store: &Store, log: &StoredPartition, epoch: i16, values: &[&str]) {
    announce(store, log, epoch).await.unwrap();
    for (sequence, value) in values.iter().enumerate() {
        let batches = vec![part(value, epoch, sequence as i32)];
        append(store, log, batches).await.unwrap();
    }
}

/// What kill -9 would leave of the store.
fn killed(store: Arc<Store>, path: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for database in ["log", "meta"] {
        copy_database(path, copy.path(), database);
    }
    store.close();
    copy
}

/// The first offset that is not stable, and the first offsets of what was aborted before it.
fn seen(log: &PartitionLog) -> (i64, Vec<i64>) {
    let end = log.stable_end();
    let aborted = log.aborted_within(0, end);
    let firsts = aborted.iter().map(|ended| ended.first_offset);
    (end, firsts.collect())
}

#[tokio::test]
async fn what_is_open_is_not_stable_and_what_ends_is_once_for_all() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    store.ensure_topic("t", 1, CONFIG).unwrap();
    let log = first_partition(&store);
    append(&store, &log, vec![batch(&["before"], 0, None)])
        .await
        .unwrap();
    let unknown = append(&store, &log, vec![part("a", 0, 0)]).await;
    assert!(matches!(
        unknown,
        Err(StorageError::Sequence(
            SequenceError::NotInTransaction { .. }
        ))
    ));
    send(&store, &log, 0, &["a", "b"]).await;
    append(&store, &log, vec![batch(&["beside"], 0, None)])
        .await
        .unwrap();
    assert_eq!(seen(&log), (1, vec![]));
    assert_eq!(log.high_watermark(), 4);
    assert_eq!(mark(&store, &log, EndMarker::Abort, 0).await, 4);
    assert_eq!(seen(&log), (5, vec![1]));
    // Told twice, also otherwise, it stays as it is.
    assert_eq!(mark(&store, &log, EndMarker::Commit, 0).await, -1);
    assert_eq!(seen(&log), (5, vec![1]));
    // What comes late is refused, and can't be announced again.
    let late = append(&store, &log, vec![part("c", 0, 2)]).await;
    let ended = |error| {
        matches!(
            error,
            StorageError::Sequence(SequenceError::TransactionEnded { .. })
        )
    };
    assert!(ended(late.unwrap_err()));
    assert!(ended(announce(&store, &log, 0).await.unwrap_err()));
    // The next one.
    send(&store, &log, 1, &["d"]).await;
    let beside = ProducerState {
        id: PRODUCER,
        epoch: 1,
        base_sequence: 1,
    };
    let outside = append(&store, &log, vec![batch(&["x"], 0, Some(beside))]).await;
    assert!(matches!(
        outside,
        Err(StorageError::Sequence(
            SequenceError::OutsideTransaction { .. }
        ))
    ));
    assert_eq!(mark(&store, &log, EndMarker::Commit, 1).await, 6);
    assert_eq!(seen(&log), (7, vec![1]));
    store.close();
}

#[tokio::test]
async fn a_start_finds_what_was_open_and_what_was_aborted() {
    let dir = tempfile::tempdir().unwrap();
    for seals in [false, true] {
        let path = dir.path().join(seals.to_string());
        std::fs::create_dir(&path).unwrap();
        let (store, _) = open(&path);
        store.ensure_topic("t", 1, CONFIG).unwrap();
        let log = first_partition(&store);
        send(&store, &log, 0, &["a"]).await;
        mark(&store, &log, EndMarker::Abort, 0).await;
        if seals {
            store.seal().await.unwrap();
        }
        send(&store, &log, 1, &["b"]).await;
        if seals {
            store.seal().await.unwrap();
        }
        drop(log);
        let copy = killed(store, &path);
        let (store, _) = open(copy.path());
        let log = first_partition(&store);
        assert_eq!(seen(&log), (2, vec![0]), "sealed: {seals}");
        // The transaction goes on: the batch is its second.
        append(&store, &log, vec![part("c", 1, 1)]).await.unwrap();
        assert_eq!(mark(&store, &log, EndMarker::Abort, 1).await, 4);
        assert_eq!(seen(&log), (5, vec![0, 2]));
        store.close();
    }
}

#[tokio::test]
async fn a_truncation_takes_back_begins_and_ends() {
    let dir = tempfile::tempdir().unwrap();
    for seals in [false, true] {
        let path = dir.path().join(seals.to_string());
        std::fs::create_dir(&path).unwrap();
        let (store, _) = open(&path);
        store.ensure_topic("t", 1, CONFIG).unwrap();
        let log = first_partition(&store);
        send(&store, &log, 0, &["a", "b"]).await;
        mark(&store, &log, EndMarker::Abort, 0).await;
        send(&store, &log, 1, &["c"]).await;
        if seals {
            store.seal().await.unwrap();
        }
        // Behind the marker: what follows it has not begun.
        cut(&store, &log, 3).await.unwrap();
        assert_eq!(log.high_watermark(), 3);
        assert_eq!(seen(&log), (3, vec![0]), "sealed: {seals}");
        // Before the marker: the transaction is open again, and may end otherwise.
        cut(&store, &log, 2).await.unwrap();
        assert_eq!(log.stable_end(), 0, "sealed: {seals}");
        drop(log);
        let copy = killed(store, &path);
        let (store, _) = open(copy.path());
        let log = first_partition(&store);
        assert_eq!(log.stable_end(), 0, "sealed: {seals}");
        mark(&store, &log, EndMarker::Commit, 0).await;
        assert_eq!(seen(&log), (3, vec![]));
        // In the middle of it, and then before it.
        send(&store, &log, 1, &["d", "e"]).await;
        cut(&store, &log, 4).await.unwrap();
        assert_eq!(log.stable_end(), 3);
        cut(&store, &log, 3).await.unwrap();
        assert_eq!(seen(&log), (3, vec![]));
        send(&store, &log, 1, &["f"]).await;
        mark(&store, &log, EndMarker::Abort, 1).await;
        assert_eq!(seen(&log), (5, vec![3]));
        store.close();
    }
}

#[tokio::test]
async fn what_is_open_is_kept_whatever_the_retention() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path());
    let retention = Retention {
        time: None,
        bytes: Some(0),
    };
    let config = LogConfig {
        retention,
        ..CONFIG
    };
    store.ensure_topic("t", 1, config).unwrap();
    let log = first_partition(&store);
    send(&store, &log, 0, &["a"]).await;
    store.seal().await.unwrap();
    append(&store, &log, vec![batch(&["b"], 0, None)])
        .await
        .unwrap();
    store.retain().unwrap();
    assert_eq!(log.log_start(), 0);
    mark(&store, &log, EndMarker::Abort, 0).await;
    store.retain().unwrap();
    assert_eq!(log.log_start(), 1);
    assert_eq!(seen(&log), (3, vec![0]));
    store.seal().await.unwrap();
    append(&store, &log, vec![batch(&["c"], 0, None)])
        .await
        .unwrap();
    store.retain().unwrap();
    assert_eq!(log.log_start(), 3);
    assert_eq!(seen(&log), (4, vec![]));
    store.close();
}
