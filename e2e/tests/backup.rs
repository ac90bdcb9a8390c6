//! Topics into a folder and back, through the command line: what is copied, that it goes on after being killed, and what is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use millrace_client::millrace_record;
use millrace_client::{Client, Compression, Record, StartFrom};
use millrace_e2e::{Broker, SOON, eventually};
use serde_json::json;
use tokio::time::timeout;

/// Each of so many bytes: several segments of 64 KiB, and long enough to be killed on the way.
const RECORDS: usize = 40_000;
const VALUE: usize = 200;
const PARTITIONS: i32 = 2;

async fn start() -> Broker {
    let spec = json!({ "partitions": PARTITIONS });
    Broker::setup()
        .topic("orders", spec.clone())
        .topic("restored", spec.clone())
        .topic("again", spec)
        .topic("wider", json!({ "partitions": PARTITIONS + 1 }))
        .start()
}

/// Records with all that a record can have, the first of them `first`.
async fn produce(client: &Client, topic: &str, first: usize, count: usize) {
    let producer = client.producer().compression(Compression::Zstd);
    let producer = producer.build().await.unwrap();
    for n in first..first + count {
        // Values that zstd can't shrink away.
        let value: String = (0..VALUE)
            .map(|i| char::from(b'a' + ((n * 31 + i * i * 7 + n * i) % 26) as u8))
            .collect();
        let mut record = Record::to(topic)
            .partition((n % 2) as i32)
            .timestamp_ms(1_700_000_000_000 + n as i64)
            .header("n", n.to_string())
            .null_header("none");
        if n % 3 != 0 {
            record = record.key(format!("k{n}"));
        }
        if n % 5 != 0 {
            record = record.value(value);
        }
        drop(producer.send(record).await.unwrap());
    }
    producer.close(SOON).await.unwrap();
}

/// All records of a partition, their offsets aside.
async fn read(client: &Client, topic: &str, partition: i32) -> Vec<millrace_record::Record> {
    let consumer = client.consumer().partitions(topic, [partition]);
    let mut consumer = consumer.start(StartFrom::Earliest).build().await.unwrap();
    let mut records = Vec::new();
    while let Ok(record) = timeout(Duration::from_secs(1), consumer.next_record()).await {
        let mut record = record.unwrap().unwrap().record;
        record.offset = 0;
        records.push(record);
    }
    records
}

async fn assert_equal(client: &Client, one: &str, other: &str) {
    for partition in 0..PARTITIONS {
        let (one, other) = (
            read(client, one, partition).await,
            read(client, other, partition).await,
        );
        assert_eq!(one.len(), other.len(), "partition {partition}");
        assert!(one == other, "partition {partition} differs");
    }
}

async fn high_watermark(client: &Client, topic: &str) -> i64 {
    let metadata = client.metadata(&[topic]).await.unwrap();
    let partitions = &metadata.topics[0].partitions;
    let marks = partitions.iter().map(|p| p.extent.unwrap().high_watermark);
    marks.sum()
}

fn segments(place: &Path, topic: &str) -> Vec<PathBuf> {
    let partition = place.join(topic).join("00000");
    let files = fs::read_dir(partition).unwrap();
    let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_comes_back_as_it_was_whenever_export_and_import_are_killed() {
    let broker = start().await;
    let client = broker.client().await;
    produce(&client, "orders", 0, RECORDS).await;
    let mut aborted = client.producer().build_transactional("t").await.unwrap();
    let transaction = aborted.begin().await.unwrap();
    let never = Record::to("orders").partition(0).value("never committed");
    drop(
        transaction
            .send_tracked(never)
            .await
            .unwrap()
            .await
            .unwrap(),
    );
    transaction.abort().await.unwrap();

    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("backup");
    let to = place.to_str().unwrap();
    let export = ["export", "orders", "--to", to, "--segment-size", "64KiB"];
    let killed = broker.cli().start(&export);
    eventually("some segments", SOON, || async {
        let some = place.join("orders/00000").exists() && segments(&place, "orders").len() > 2;
        some.then_some(())
    })
    .await;
    drop(killed);
    broker.cli().run(&export).success();
    let first = segments(&place, "orders");
    // What has come since, and nothing else.
    produce(&client, "orders", RECORDS, 1_000).await;
    let told = broker.cli().run(&export).success().stderr;
    assert!(told.contains("orders: 1000 records"), "{told}");
    let then = segments(&place, "orders");
    assert_eq!(then[..first.len()], first);
    assert!(then.len() > first.len());
    let told = broker.cli().run(&export).success().stderr;
    assert!(told.contains("orders: 0 records"), "{told}");

    let import = ["import", "orders", "--from", to, "--into", "restored"];
    for at_least in [1, 10_000] {
        let killed = broker.cli().start(&import);
        eventually("some records", SOON, || async {
            (high_watermark(&client, "restored").await >= at_least).then_some(())
        })
        .await;
        drop(killed);
    }
    broker.cli().run(&import).success();
    assert_equal(&client, "orders", "restored").await;
    // A backup that has grown.
    produce(&client, "orders", RECORDS + 1_000, 500).await;
    broker.cli().run(&export).success();
    let told = broker.cli().run(&import).success().stderr;
    assert!(
        told.contains("restored: 500 records written of 41500"),
        "{told}"
    );
    assert_equal(&client, "orders", "restored").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_would_make_a_wrong_copy_is_refused() {
    let broker = start().await;
    let client = broker.client().await;
    produce(&client, "orders", 0, 100).await;
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().to_str().unwrap();
    let refused = |arguments: &[&str], code: i32, why: &str| {
        let finished = broker.cli().run(arguments);
        let told = finished.stderr.clone();
        assert_eq!(finished.code, Some(code), "{arguments:?}: {told}");
        assert!(told.contains(why), "{arguments:?}: {told}");
    };
    refused(
        &["export", "--to", "gs://bucket"],
        2,
        "no support for gs://",
    );
    refused(
        &["export", "none", "--to", to],
        1,
        "topic `none` does not exist",
    );
    refused(
        &["export", "--to", to, "--segment-size", "1KiB"],
        2,
        "between 64KiB and 1GiB",
    );
    refused(
        &["import", "orders", "--from", to],
        1,
        "there is no backup of topic `orders`",
    );
    refused(&["export", "--to", "/proc/backup"], 1, "can't write");
    // All topics.
    broker.cli().run(&["export", "--to", to]).success();
    for topic in ["orders", "restored", "again", "wider"] {
        assert!(folder.path().join(topic).join("topic.json").exists());
    }
    let import = |into: &'static str| ["import", "orders", "--from", to, "--into", into];
    refused(&import("wider"), 1, "has 3 partitions, and the backup");
    // A topic that has records of its own: as many, fewer, more.
    produce(&client, "again", 7, 60).await;
    refused(&import("again"), 1, "is not the backup's");
    produce(&client, "again", 7, 60).await;
    refused(&import("again"), 1, "and the backup 50");
    // The topic itself holds what the backup does.
    let told = broker
        .cli()
        .run(&["import", "orders", "--from", to])
        .success()
        .stderr;
    assert!(told.contains("orders: 0 records written of 100"), "{told}");

    let segment = &segments(folder.path(), "orders")[0];
    let good = fs::read(segment).unwrap();
    let mut damaged = good.clone();
    damaged[good.len() / 2] ^= 1;
    for bytes in [&damaged[..], &good[..good.len() - 1], &good[..0]] {
        fs::write(segment, bytes).unwrap();
        refused(&import("restored"), 1, "is damaged");
    }
    let overlapping = segment.with_file_name(format!("{:020}-{:020}-1.batches", 1, 2));
    fs::write(&overlapping, &good).unwrap();
    refused(&import("restored"), 1, "hold the same offsets");
    fs::rename(&overlapping, segment.with_file_name("notes.txt")).unwrap();
    refused(&import("restored"), 1, "is not the name of a segment");
    fs::remove_file(segment.with_file_name("notes.txt")).unwrap();
    fs::write(segment, &good).unwrap();
    broker.cli().run(&import("restored")).success();
    assert_equal(&client, "orders", "restored").await;

    // Another topic of the same name.
    let manifest = folder.path().join("orders/topic.json");
    let text = fs::read_to_string(&manifest).unwrap();
    let id = text
        .split("\"topicId\": \"")
        .nth(1)
        .unwrap()
        .split('"')
        .next()
        .unwrap();
    fs::write(&manifest, text.replace(id, "another")).unwrap();
    refused(
        &["export", "orders", "--to", to],
        1,
        "is of another topic of that name",
    );
    fs::write(&manifest, text.replace("\"format\": 1", "\"format\": 2")).unwrap();
    refused(&import("restored"), 1, "has format 2");
}
