//! Deleted partitions: gone at once and for good, with their space.

use std::{sync::mpsc, time::Instant};

use super::{
    leadership::{hold_up_writer, queue},
    topics::open_claimed,
    *,
};
use crate::storage::{delete::clear_deleted, keys, writer::Command};

const ONE: Uuid = Uuid::from_u128(1);
const TWO: Uuid = Uuid::from_u128(2);

/// Partitions of topic `t`, led in epoch 1.
fn led(store: &Store, topic_id: Uuid, indexes: &[i32]) -> Vec<StoredPartition> {
    let topic = ensure_partitions(store, topic_id, indexes, CONFIG).unwrap();
    let logs = logs_of(&topic);
    logs.iter().for_each(|log| log.lead(1).unwrap());
    logs
}

/// The kinds of entries that `meta` holds of a partition.
fn entries(store: &Store, id: PartitionId) -> String {
    let mut kinds = String::new();
    let [runs, producers] = [keys::runs(id), keys::producers(id)];
    let [epochs, committed] = [keys::epochs(id), keys::high_watermark(id)];
    let start = keys::log_start(id);
    for prefix in [keys::deleted(id), runs, producers, start, epochs, committed] {
        let mut held = false;
        let each = |_: &[u8], _: &[u8]| {
            held = true;
            Ok(())
        };
        store.db.scan_meta(&prefix, each).unwrap();
        if held {
            kinds.push(prefix[0].into());
        }
    }
    kinds
}

/// How far a deletion got before the broker was killed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reached {
    Nothing,
    Gone,
    /// The writer has sealed a generation before it was told.
    GoneThenSealed,
    Forgotten,
    Cleared,
}

#[tokio::test]
async fn a_crash_leaves_a_deleted_partition_whole_or_gone_and_others_alone() {
    use Reached::*;
    for reached in [Nothing, Gone, GoneThenSealed, Forgotten, Cleared] {
        let dir = tempfile::tempdir().unwrap();
        let copy = tempfile::tempdir().unwrap();
        let store = open_claimed(dir.path());
        let logs = led(&store, ONE, &[0, 1, 2]);
        let [kept, deleted, _] = &logs[..] else {
            unreachable!()
        };
        let producer = vec![of_producer(7, 0)];
        append(&store, deleted, producer).await.unwrap();
        store.seal().await.unwrap();
        assert_eq!(entries(&store, deleted.id), "RIEH");
        store.delete_partitions(&[(ONE, 2)]).unwrap();
        // Sealed generations, and one that is being filled. Two thirds of each will be dead.
        let written = [kept.clone(), deleted.clone(), deleted.clone()];
        fill(&store, &written, 601).await;
        if reached != Nothing {
            let gone = store.take_out_of_sight(&[(ONE, 1)]).unwrap();
            if reached == GoneThenSealed {
                store.seal().await.unwrap();
            }
            if [Forgotten, Cleared].contains(&reached) {
                let (reply, done) = mpsc::channel();
                let forget = Command::Forget { logs: gone, reply };
                store.writer.send(forget).ok().unwrap();
                assert_eq!(done.recv().unwrap().len(), 1);
            }
            if reached == Cleared {
                clear_deleted(&store.db, &store.generations).unwrap();
                assert_eq!(entries(&store, deleted.id), "");
            }
        }
        copy_database(dir.path(), copy.path(), "log");
        copy_database(dir.path(), copy.path(), "meta");
        let (kept, deleted) = (kept.log_end(), deleted.clone());
        store.close();
        drop((logs, written, store));
        for reopened in 0..2 {
            let store = open_claimed(copy.path());
            let log = store.partition(ONE, 0).unwrap();
            assert_eq!(log.log_end(), kept + 300 * reopened, "{reached:?}");
            let whole = store.partition(ONE, 1);
            assert_eq!(whole.is_some(), reached == Nothing);
            match whole {
                Some(log) => {
                    assert_eq!(log.log_end(), deleted.log_end());
                    assert_eq!(read_all(&store, &log, 0, 1 << 20).len(), 1201);
                }
                None => assert_eq!(entries(&store, deleted.id), "", "{reached:?}"),
            }
            assert_contiguous(&store, &log, 0);
            log.lead(2).unwrap();
            fill(&store, std::slice::from_ref(&log), 100).await;
            assert_contiguous(&store, &log, 0);
            if reached != Nothing {
                store.seal().await.unwrap();
                let live = log.size_bytes();
                until("what was deleted is given back", || {
                    store.retain().unwrap();
                    disk_bytes(copy.path()) < 2 * live
                })
                .await;
                assert_contiguous(&store, &log, 0);
            }
            store.close();
        }
    }
}

#[tokio::test]
async fn generations_that_deleted_partitions_shared_are_rewritten_once_less_than_half_of_them_lives()
 {
    let dir = tempfile::tempdir().unwrap();
    let store = open_claimed(dir.path());
    let mut logs = led(&store, ONE, &[0, 1, 2]);
    logs.extend(led(&store, TWO, &[0]));
    fill(&store, &logs, 2000).await;
    store.seal().await.unwrap();
    until("all generations are files", || {
        !store.db.has_unflushed_generations()
    })
    .await;
    let full = disk_bytes(dir.path());
    // Three of four parts live, two, one, none.
    for (deleted, most) in [(0, full), (1, full), (2, full * 55 / 100), (3, 10_000)] {
        let log = &logs[deleted];
        store
            .delete_partitions(&[(log.topic_id, log.index)])
            .unwrap();
        until("space is given back", || {
            store.retain().unwrap();
            disk_bytes(dir.path()) <= most
        })
        .await;
        for log in &logs[deleted + 1..] {
            assert_contiguous(&store, log, 0);
        }
    }
    assert!(store.topics().is_empty());
    store.close();
}

#[tokio::test]
async fn whoever_holds_on_to_a_deleted_partition_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_claimed(dir.path());
    let logs = led(&store, ONE, &[0, 4]);
    let [other, log] = &logs[..] else {
        unreachable!()
    };
    fill(&store, &logs, 10).await;
    let waiter = Arc::new(Notify::new());
    log.notify_on_append(&waiter);
    let release = hold_up_writer(&store);
    let queued = queue(&store, log, 1).await;
    let spared = queue(&store, other, 1).await;
    let deleting = std::thread::spawn({
        let store = store.clone();
        move || store.delete_partitions(&[(ONE, 4)])
    });
    waiter.notified().await;
    let (held, new) = (log.clone(), queue(&store, log, 1).await);
    release();
    deleting.join().unwrap().unwrap();
    spared.await.unwrap().remove(0).unwrap();
    for answer in [queued, new] {
        let refused = answer.await.unwrap().remove(0);
        assert!(matches!(refused, Err(StorageError::Deleted)), "{refused:?}");
    }
    let is_deleted = |error| assert!(matches!(error, StorageError::Deleted));
    is_deleted(
        store
            .read_memory(&held, 0, 1, true, UpTo::HighWatermark)
            .unwrap_err(),
    );
    is_deleted(
        store
            .read_disk(&held, 0, 1, true, UpTo::HighWatermark)
            .unwrap_err(),
    );
    is_deleted(store.find_timestamp(&held, 0).unwrap_err());
    is_deleted(cut(&store, &held, 0).await.unwrap_err());
    is_deleted(held.lead(2).unwrap_err());
    is_deleted(held.check_offset(0).unwrap_err());
    assert_eq!((held.leader_epoch(), held.active_run()), (None, None));
    assert_eq!(read_all(&store, other, 0, 1 << 20).len(), 16);
    // Deleted again, it is passed over; created again, it is another.
    store.delete_partitions(&[(ONE, 4)]).unwrap();
    let again = ensure_partition(&store, ONE, 4, CONFIG).unwrap();
    assert!(again.id > held.id);
    assert_eq!((again.log_end(), again.size_bytes()), (0, 0));
    store.close();
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_partitions_are_deleted_in_one_go_while_others_are_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_claimed(dir.path());
    let indexes: Vec<i32> = (0..10_000).collect();
    let logs = led(&store, ONE, &indexes);
    let kept = led(&store, TWO, &[0]).remove(0);
    for round in 0..2 {
        for (log, number) in logs.iter().zip(0..) {
            let producer = vec![of_producer(number, round)];
            let append = PartitionAppend::new(log.clone(), 1, producer).unwrap();
            drop(store.append(vec![append]).await.unwrap());
        }
        store.seal().await.unwrap();
    }
    let slowest = tokio::spawn({
        let (store, kept) = (store.clone(), kept.clone());
        async move {
            let mut slowest = Duration::ZERO;
            while store.topic(TWO).is_some() {
                let begun = Instant::now();
                if append(&store, &kept, vec![batch(&["a"], 0, None)])
                    .await
                    .is_err()
                {
                    break;
                }
                slowest = slowest.max(begun.elapsed());
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            slowest
        }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let all: Vec<_> = indexes.iter().map(|index| (ONE, *index)).collect();
    store.delete_partitions(&all).unwrap();
    assert!(store.topic(ONE).is_none());
    for log in logs.iter().step_by(997) {
        assert_eq!(entries(&store, log.id), "");
    }
    let end = kept.log_end();
    store.settled().await.unwrap();
    assert!(end > 0, "appends went on");
    store.delete_partitions(&[(TWO, 0)]).unwrap();
    let slowest = slowest.await.unwrap();
    assert!(slowest < Duration::from_secs(1), "{slowest:?}");
    store.close();
}
