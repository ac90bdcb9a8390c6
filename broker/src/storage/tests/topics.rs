//! Topics by id and by name, sparse partitions, and whose store it is.

use super::*;

const ONE: Uuid = Uuid::from_u128(1);
const TWO: Uuid = Uuid::from_u128(2);

/// Opens a store for a broker of a cluster.
pub(super) fn open_claimed(path: &Path) -> Arc<Store> {
    let (store, _) = open(path);
    store.claim(identity("main", 3)).unwrap();
    store
}

fn identity(cluster: &str, broker_id: i32) -> BrokerIdentity {
    BrokerIdentity {
        cluster: cluster.into(),
        broker_id,
    }
}

#[tokio::test]
async fn sparse_partitions_of_two_topics_of_one_name_are_held_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open_claimed(dir.path());
    let held = [(ONE, 7), (TWO, 7), (ONE, 2), (ONE, 1_000_000)];
    for (topic_id, index) in held {
        let log = ensure_partition(&store, topic_id, index, CONFIG).unwrap();
        assert_eq!((log.topic_id, log.index), (topic_id, index));
        log.lead(1).unwrap();
        fill(&store, &[log], 10 + index as usize % 10).await;
    }
    for reopened in [false, true] {
        if reopened {
            store.close();
            drop(store);
            store = open_claimed(dir.path());
        }
        let topics = store.topics();
        let of = |topic: &StoredTopic| (topic.topic_id, logs_of(topic).len());
        let mut sizes: Vec<_> = topics.iter().map(of).collect();
        sizes.sort();
        assert_eq!(sizes, [(ONE, 3), (TWO, 1)]);
        let indexes: Vec<i32> = store.topic(ONE).unwrap().partitions.into_keys().collect();
        assert_eq!(indexes, [2, 7, 1_000_000]);
        for (topic_id, index) in held {
            let log = store.partition(topic_id, index).unwrap();
            assert_eq!(log.log_end(), 3 * (10 + i64::from(index) % 10));
            assert_contiguous(&store, &log, 0);
            let again = ensure_partition(&store, topic_id, index, CONFIG);
            assert!(Arc::ptr_eq(&log, &again.unwrap()));
        }
        assert!(store.partition(TWO, 2).is_none());
        assert!(store.partition(Uuid::from_u128(3), 2).is_none());
    }
    store.close();
}

#[tokio::test]
async fn a_topics_configuration_reaches_all_its_partitions_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open_claimed(dir.path());
    for topic_id in [ONE, TWO] {
        let topic = ensure_partitions(&store, topic_id, &[0, 4, 4], CONFIG).unwrap();
        assert_eq!(topic.partitions.len(), 2);
    }
    let smaller = LogConfig {
        max_message_bytes: 1000,
        ..CONFIG
    };
    store.ensure_partitions(TWO, "t", &[], smaller).unwrap();
    for reopened in [false, true] {
        if reopened {
            store.close();
            drop(store);
            store = open_claimed(dir.path());
        }
        assert_eq!(store.topics().len(), 2);
        for (topic_id, config) in [(ONE, CONFIG), (TWO, smaller)] {
            let topic = store.topic(topic_id).unwrap();
            assert_eq!(topic.config, config);
            assert!(logs_of(&topic).iter().all(|log| log.config() == config));
        }
    }
    store.close();
}

#[tokio::test]
async fn a_store_belongs_to_the_broker_that_claimed_it_first() {
    let dir = tempfile::tempdir().unwrap();
    for claimed in [false, true] {
        let (store, _) = open(dir.path());
        let owner = identity("main", 3);
        assert_eq!(store.identity(), claimed.then(|| owner.clone()));
        if !claimed {
            assert!(matches!(
                ensure_partition(&store, ONE, 0, CONFIG),
                Err(StorageError::Unclaimed)
            ));
        }
        store.claim(owner.clone()).unwrap();
        assert_eq!(store.identity(), Some(owner));
        for other in [identity("main", 4), identity("other", 3)] {
            let message = store.claim(other.clone()).unwrap_err().to_string();
            for named in ["broker 3 of cluster main".into(), other.to_string()] {
                assert!(message.contains(&named), "{message}");
            }
        }
        assert!(matches!(
            store.ensure_topic("t", 1, CONFIG),
            Err(StorageError::Claimed { .. })
        ));
        store.close();
    }
    let alone = tempfile::tempdir().unwrap();
    let (store, _) = open(alone.path());
    store.ensure_topic("t", 1, CONFIG).unwrap();
    assert!(matches!(
        store.claim(identity("main", 3)),
        Err(StorageError::UsedAlone { topics: 1 })
    ));
    assert_eq!(store.identity(), None);
    store.close();
}
