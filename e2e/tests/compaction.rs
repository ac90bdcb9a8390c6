//! Compaction through the client: what a reader that comes later sees, and one that reads meanwhile, also after crashes.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_client::{Client, ErrorKind, Record, StartFrom};
use millrace_e2e::{Broker, SOON, eventually};
use serde_json::json;
use tokio::time::timeout;

const KEYS: u32 = 200;
const ROUNDS: u32 = 40;

/// Sends a record of 1 KB for each key, in each round another one; the last round deletes every tenth key.
async fn produce(client: &Client, rounds: std::ops::Range<u32>) {
    let producer = client.producer().build().await.unwrap();
    let padding = "x".repeat(1_000);
    for round in rounds {
        for key in 0..KEYS {
            let record = Record::to("t").key(format!("k{key}"));
            let record = match round == ROUNDS - 1 && key.is_multiple_of(10) {
                true => record,
                false => record.value(format!("{round} {padding}")),
            };
            drop(producer.send(record).await.unwrap());
        }
    }
    producer.close(SOON).await.unwrap();
}

/// The last round of each key, as a reader of the whole topic finds it, and how many records that took.
async fn state(client: &Client) -> (BTreeMap<String, Option<u32>>, usize) {
    let consumer = client.consumer().topic("t").start(StartFrom::Earliest);
    let mut consumer = consumer.build().await.unwrap();
    let (mut state, mut records) = (BTreeMap::new(), 0);
    while let Ok(record) = timeout(Duration::from_secs(1), consumer.next_record()).await {
        let record = record.unwrap().unwrap().record;
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let round = |value: &[u8]| text(value).split(' ').next().unwrap().parse().unwrap();
        let key = text(&record.key.unwrap());
        state.insert(key, record.value.as_deref().map(round));
        records += 1;
    }
    (state, records)
}

fn expected() -> BTreeMap<String, Option<u32>> {
    let last = |key: u32| (!key.is_multiple_of(10)).then_some(ROUNDS - 1);
    (0..KEYS)
        .map(|key| (format!("k{key}"), last(key)))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn of_each_key_the_last_record_is_left_and_crashes_change_nothing() {
    let spec = json!({
        "cleanupPolicy": "Compact",
        "compaction": {"minDirtyPercent": 1},
    });
    let mut broker = Broker::setup()
        // The newest batches are served from memory as they came.
        .flag("--tail-cache", "64KiB")
        .flag("--write-buffer", "1MiB")
        .flag("--write-buffer-age", "1s")
        .flag("--retention-interval", "200ms")
        .topic("t", spec)
        .start();
    let empty = broker.disk_usage();
    for round in 0..ROUNDS {
        produce(&broker.client().await, round..round + 1).await;
        if round % 10 == 5 {
            broker.kill_9();
            broker.restart();
        }
    }
    let few = || async {
        let (found, records) = state(&broker.client().await).await;
        assert_eq!(found, expected());
        // Of 8,000; tombstones are among them.
        (records == KEYS as usize).then_some(())
    };
    eventually(
        "one record is left of each key",
        Duration::from_secs(30),
        few,
    )
    .await;
    let size = || async {
        let metadata = broker.client().await.metadata(&["t"]).await.unwrap();
        let extent = metadata.topics[0].partitions[0].extent.unwrap();
        assert_eq!(extent.high_watermark, i64::from(KEYS * ROUNDS));
        (extent.size_bytes < 400_000 && broker.disk_usage() < empty + (10 << 20)).then_some(())
    };
    eventually("8 MB shrink to 200 KB", Duration::from_secs(30), size).await;

    let producer = broker.client().await.producer().build().await.unwrap();
    let sent = producer
        .send(Record::to("t").value("no key"))
        .await
        .unwrap();
    let refused = sent.await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidBatch, "{refused}");
    assert!(refused.to_string().contains("without a key"), "{refused}");
}
