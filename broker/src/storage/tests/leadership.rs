//! Who may append, and in which epoch.

use tokio::sync::oneshot;

use super::{topics::open_claimed, *};
use crate::storage::writer::Command;

const TOPIC: Uuid = Uuid::from_u128(1);

/// Holds the writer up in the middle of a seal until what it returns is called. The active generation must hold something.
pub(super) fn hold_up_writer(store: &Arc<Store>) -> impl FnOnce() + use<> {
    let (locked, is_locked) = channel();
    let (release, released) = channel::<()>();
    let generations = store.generations.clone();
    let thread = std::thread::spawn(move || {
        let _held = generations.lock();
        locked.send(()).unwrap();
        released.recv().unwrap();
    });
    is_locked.recv().unwrap();
    let (reply, _) = oneshot::channel();
    store.writer.send(Command::Seal { reply }).ok().unwrap();
    move || {
        release.send(()).unwrap();
        thread.join().unwrap();
    }
}

type Answer = oneshot::Receiver<Vec<Result<Appended, StorageError>>>;

/// Queues one record, accepted in this epoch.
pub(super) async fn queue(store: &Store, log: &StoredPartition, epoch: i32) -> Answer {
    let append = PartitionAppend::new(log.clone(), epoch, vec![batch(&["a"], 0, None)]).unwrap();
    store.append(vec![append]).await.unwrap()
}

/// The leader epochs of the batches in a log.
fn epochs(store: &Store, log: &PartitionLog) -> Vec<i32> {
    let read = store
        .read_disk(log, 0, 1 << 20, true, UpTo::HighWatermark)
        .unwrap();
    let batches = read.batches.into_iter().flat_map(split);
    let epoch = |batch: Bytes| BatchHeader::parse(&batch).unwrap().leader_epoch;
    batches.map(|batch| epoch(batch.unwrap())).collect()
}

#[tokio::test]
async fn a_broker_that_runs_alone_leads_what_it_holds_in_its_incarnation() {
    let dir = tempfile::tempdir().unwrap();
    for incarnation in [1, 2] {
        let (store, _) = open(dir.path());
        if incarnation == 2 {
            let recovered = first_partition(&store);
            assert_eq!(recovered.leader_epoch(), Some(2));
        }
        let topic = store.ensure_topic("t", incarnation as usize, CONFIG);
        for log in logs_of(&topic.unwrap()) {
            assert_eq!(log.leader_epoch(), Some(incarnation));
            append(&store, &log, vec![batch(&["a"], 0, None)])
                .await
                .unwrap();
            let expected = 1 + log.index..=incarnation;
            assert_eq!(epochs(&store, &log), expected.collect::<Vec<_>>());
        }
        store.close();
    }
}

#[tokio::test]
async fn a_broker_of_a_cluster_leads_nothing_until_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    for (epoch, end) in [(4, 0), (9, 1)] {
        let store = open_claimed(dir.path());
        let log = ensure_partition(&store, TOPIC, 5, CONFIG).unwrap();
        assert_eq!((log.leader_epoch(), log.log_end()), (None, end));
        let refused = queue(&store, &log, 4).await.await.unwrap().remove(0);
        assert!(matches!(refused, Err(StorageError::NotLed)));
        log.lead(epoch).unwrap();
        let appended = queue(&store, &log, epoch).await.await.unwrap().remove(0);
        assert_eq!(appended.unwrap().base_offset, end);
        store.close();
    }
    let store = open_claimed(dir.path());
    let log = store.partition(TOPIC, 5).unwrap();
    assert_eq!(epochs(&store, &log), [4, 9]);
    store.close();
}

#[tokio::test]
async fn what_is_queued_when_leadership_changes_is_refused_and_the_log_stands_still() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_claimed(dir.path());
    let topic = ensure_partitions(&store, TOPIC, &[0, 1], CONFIG).unwrap();
    let [log, other] = &logs_of(&topic)[..] else {
        unreachable!()
    };
    log.lead(1).unwrap();
    other.lead(1).unwrap();
    let before = queue(&store, log, 1).await;
    before.await.unwrap().remove(0).unwrap();
    let release = hold_up_writer(&store);
    let mut queued = Vec::new();
    for log in [log, other, log] {
        queued.push(queue(&store, log, 1).await);
    }
    log.resign();
    let unled = queue(&store, log, 1).await;
    release();
    store.settled().await.unwrap();
    assert_eq!((log.log_end(), other.log_end()), (1, 1));
    for (answer, is_led) in queued.into_iter().zip([false, true, false]) {
        // Answered already: nothing is pending once all is settled.
        let result = { answer }.try_recv().unwrap().remove(0);
        match is_led {
            true => assert_eq!(result.unwrap().base_offset, 0),
            false => assert!(matches!(result, Err(StorageError::NotLed))),
        }
    }
    let unled = { unled }.try_recv().unwrap().remove(0);
    assert!(matches!(unled, Err(StorageError::NotLed)));
    // Led again, in a later epoch: what was accepted in the one before stays refused.
    let release = hold_up_writer(&store);
    log.lead(1).unwrap();
    let old = queue(&store, log, 1).await;
    log.resign();
    log.lead(2).unwrap();
    let new = queue(&store, log, 2).await;
    release();
    assert!(matches!(
        old.await.unwrap().remove(0),
        Err(StorageError::FencedLeader {
            epoch: 1,
            current: 2
        })
    ));
    assert_eq!(new.await.unwrap().remove(0).unwrap().base_offset, 1);
    assert_eq!(epochs(&store, log), [1, 2]);
    store.close();
}

#[tokio::test]
async fn an_epoch_that_begins_in_a_log_emptied_by_retention_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_claimed(dir.path());
    // The batches' timestamps are near 1970.
    let retention = Retention {
        time: Some(Duration::from_secs(3600)),
        bytes: None,
    };
    let config = LogConfig {
        retention,
        ..CONFIG
    };
    let log = ensure_partition(&store, TOPIC, 0, config).unwrap();
    for (epoch, end) in [(5, 1), (6, 2)] {
        log.lead(epoch).unwrap();
        let appended = queue(&store, &log, epoch).await.await.unwrap().remove(0);
        assert_eq!(appended.unwrap().end_offset, end);
        store.seal().await.unwrap();
        if epoch == 5 {
            store.retain().unwrap();
            assert_eq!((log.log_start(), log.log_end()), (1, 1));
        }
    }
    store.close();
    drop((log, store));
    let store = open_claimed(dir.path());
    let log = store.partition(TOPIC, 0).unwrap();
    assert_eq!((log.log_end(), log.last_epoch()), (2, Some(6)));
    store.close();
}
