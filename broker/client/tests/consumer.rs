//! The consumer against a cluster that fails on purpose.

#![allow(clippy::unwrap_used)]

mod fake;

use std::{collections::HashMap, time::Duration};

use fake::Cluster;
use futures::StreamExt;
use millrace_client::{Client, ConsumedRecord, Consumer, ErrorKind, OffsetSpec, StartFrom};
use millrace_record::{BatchBuilder, BatchOptions};
use tokio::time::timeout;
use tonic::Code;

async fn cluster(brokers: usize, partitions: usize) -> (Cluster, Client) {
    let cluster = Cluster::start(brokers).await;
    cluster.topic("t", partitions);
    let client = Client::builder(cluster.address())
        .request_timeout(Duration::from_secs(2))
        .metadata_refresh(Duration::from_millis(100))
        .connect()
        .await
        .unwrap();
    (cluster, client)
}

/// One batch; timestamps are ten times the values.
fn batch(values: std::ops::Range<usize>) -> Vec<u8> {
    let mut builder = BatchBuilder::new(BatchOptions::default());
    for value in values {
        builder.append(
            value as i64 * 10,
            Some(b"k"),
            Some(value.to_string().as_bytes()),
            &[],
        );
    }
    builder.build().unwrap().to_vec()
}

fn fill(cluster: &Cluster, partition: usize, values: usize, per_batch: usize) {
    for first in (0..values).step_by(per_batch) {
        cluster.append_raw(
            "t",
            partition,
            &batch(first..values.min(first + per_batch)),
            |_| {},
        );
    }
}

async fn next(consumer: &mut Consumer) -> ConsumedRecord {
    timeout(Duration::from_secs(10), consumer.next_record())
        .await
        .expect("a record in time")
        .unwrap()
        .unwrap()
}

fn value(consumed: &ConsumedRecord) -> usize {
    String::from_utf8(consumed.record.value.clone().unwrap().to_vec())
        .unwrap()
        .parse()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_record_comes_once_and_in_order_while_leaders_move_and_calls_fail() {
    let (cluster, client) = cluster(2, 5).await;
    for partition in 0..5 {
        fill(&cluster, partition, 2000, 7);
    }
    let mut random = fastrand::Rng::with_seed(1);
    cluster.state.lock().fetch_faults = Some(Box::new(move || {
        (random.u8(..) < 40).then_some(Code::Unavailable)
    }));
    let mut consumer = client
        .consumer()
        .topic("t")
        .max_bytes(100_000)
        .max_partition_bytes(3000)
        .build()
        .await
        .unwrap();
    let mut seen: HashMap<i32, usize> = HashMap::new();
    for n in 0..10_000 {
        let consumed = next(&mut consumer).await;
        let expected = seen.entry(consumed.partition).or_default();
        assert_eq!(
            (value(&consumed), consumed.record.offset),
            (*expected, *expected as i64)
        );
        *expected += 1;
        if n % 1500 == 0 {
            cluster.state.lock().move_leader("t", n % 5, n % 2);
        }
    }
    assert_eq!(consumer.position("t", 3), Some(2000));
    assert_eq!(consumer.high_watermark("t", 3), Some(2000));
    assert_eq!(consumer.position("t", 5), None);
    assert!(
        timeout(Duration::from_millis(100), consumer.next())
            .await
            .is_err(),
        "nothing comes twice"
    );
}

#[tokio::test]
async fn starts_where_it_is_told_even_within_a_batch() {
    let (cluster, client) = cluster(1, 1).await;
    fill(&cluster, 0, 100, 10);
    for (start, first) in [
        (StartFrom::Earliest, 0),
        (StartFrom::Offset(57), 57),
        (StartFrom::Timestamp(333), 34),
    ] {
        let mut consumer = client
            .consumer()
            .topic("t")
            .start(start)
            .build()
            .await
            .unwrap();
        assert_eq!(value(&next(&mut consumer).await), first, "{start:?}");
        assert_eq!(value(&next(&mut consumer).await), first + 1, "{start:?}");
    }
    for start in [StartFrom::Latest, StartFrom::Timestamp(i64::MAX)] {
        let mut consumer = client
            .consumer()
            .topic("t")
            .start(start)
            .build()
            .await
            .unwrap();
        assert!(
            timeout(Duration::from_millis(50), consumer.next())
                .await
                .is_err()
        );
        let base = cluster.state.lock().topics["t"].logs[0].next;
        cluster.append_raw("t", 0, &batch(7..8), |_| {});
        assert_eq!(next(&mut consumer).await.record.offset, base);
    }
    let at = client
        .list_offset("t", 0, OffsetSpec::Timestamp(333))
        .await
        .unwrap()
        .unwrap();
    assert_eq!((at.offset, at.timestamp_ms), (34, Some(340)));
    assert_eq!(
        client
            .list_offset("t", 0, OffsetSpec::Timestamp(i64::MAX))
            .await
            .unwrap(),
        None
    );
    let unknown = client
        .list_offset("t", 9, OffsetSpec::Latest)
        .await
        .unwrap_err();
    assert_eq!(unknown.kind(), ErrorKind::UnknownPartition);
}

#[tokio::test]
async fn seek_goes_back_and_forth_and_drops_what_was_fetched() {
    let (cluster, client) = cluster(1, 2).await;
    fill(&cluster, 0, 100, 10);
    let mut consumer = client
        .consumer()
        .partitions("t", [0])
        .build()
        .await
        .unwrap();
    for n in 0..15 {
        assert_eq!(value(&next(&mut consumer).await), n);
    }
    assert_eq!(consumer.position("t", 0), Some(15));
    for to in [3, 88, 40] {
        consumer.seek("t", 0, StartFrom::Offset(to)).await.unwrap();
        assert_eq!(consumer.position("t", 0), Some(to));
        for n in 0..12 {
            assert_eq!(value(&next(&mut consumer).await), to as usize + n);
        }
    }
    let error = consumer
        .seek("t", 1, StartFrom::Earliest)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidRequest);
    // Also while a long poll waits at the end.
    consumer.seek("t", 0, StartFrom::Latest).await.unwrap();
    assert!(
        timeout(Duration::from_millis(50), consumer.next())
            .await
            .is_err()
    );
    consumer
        .seek("t", 0, StartFrom::Timestamp(500))
        .await
        .unwrap();
    let at_once = timeout(Duration::from_millis(300), consumer.next_record())
        .await
        .unwrap();
    assert_eq!(value(&at_once.unwrap().unwrap()), 50);
}

#[tokio::test]
async fn an_offset_out_of_range_is_told_with_the_range_and_cured_by_seek() {
    let (cluster, client) = cluster(1, 2).await;
    fill(&cluster, 0, 100, 10);
    fill(&cluster, 1, 10, 10);
    cluster.state.lock().topics.get_mut("t").unwrap().logs[0].start = 20;
    let mut consumer = client
        .consumer()
        .topic("t")
        .start(StartFrom::Offset(5))
        .build()
        .await
        .unwrap();
    let mut error = None;
    let mut others = Vec::new();
    while others.len() < 5 || error.is_none() {
        match timeout(Duration::from_secs(5), consumer.next())
            .await
            .unwrap()
            .unwrap()
        {
            Ok(consumed) => others.push((consumed.partition, value(&consumed))),
            Err(told) => assert!(error.replace(told).is_none(), "told once"),
        }
    }
    assert_eq!(others, [(1, 5), (1, 6), (1, 7), (1, 8), (1, 9)]);
    let error = error.unwrap();
    assert_eq!(
        (error.kind(), error.partition()),
        (ErrorKind::OffsetOutOfRange, Some(0))
    );
    assert_eq!(error.metadata()["log_start_offset"], "20");
    assert!(
        timeout(Duration::from_millis(200), consumer.next())
            .await
            .is_err()
    );
    consumer.seek("t", 0, StartFrom::Earliest).await.unwrap();
    assert_eq!(next(&mut consumer).await.record.offset, 20);
}

#[tokio::test]
async fn a_damaged_batch_is_an_error_that_names_it_and_the_next_one_follows() {
    let (cluster, client) = cluster(1, 1).await;
    cluster.append_raw("t", 0, &batch(0..10), |_| {});
    cluster.append_raw("t", 0, &batch(10..20), |bytes| {
        *bytes.last_mut().unwrap() ^= 1
    });
    cluster.append_raw("t", 0, &batch(20..30), |bytes| bytes[16] = 9); // The format's version.
    cluster.append_raw("t", 0, &batch(30..40), |_| {});
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    for n in 0..10 {
        assert_eq!(value(&next(&mut consumer).await), n);
    }
    for (kind, offset) in [
        (ErrorKind::CorruptBatch, "10"),
        (ErrorKind::InvalidBatch, "20"),
    ] {
        let error = timeout(Duration::from_secs(5), consumer.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.topic(), error.partition()),
            (kind, Some("t"), Some(0)),
            "{error}"
        );
        assert_eq!(error.metadata()["offset"], offset);
        assert!(
            error.to_string().contains(&format!("offset {offset}")),
            "{error}"
        );
    }
    for n in 30..40 {
        assert_eq!(value(&next(&mut consumer).await), n);
    }
}

#[tokio::test]
async fn a_slow_caller_makes_fetching_pause() {
    let (cluster, client) = cluster(1, 4).await;
    for partition in 0..4 {
        fill(&cluster, partition, 20_000, 100);
    }
    let builder = client
        .consumer()
        .topic("t")
        .max_buffered_bytes(200_000)
        .max_partition_bytes(20_000);
    let mut consumer = builder.build().await.unwrap();
    next(&mut consumer).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let fetched = cluster.state.lock().fetched_bytes;
    assert!(fetched <= 200_000, "{fetched} bytes fetched ahead");
    assert!(fetched >= 60_000, "{fetched} bytes fetched ahead");
    for _ in 1..80_000 {
        next(&mut consumer).await;
    }
}

#[tokio::test]
async fn new_partitions_of_a_topic_join_from_their_beginning() {
    let (cluster, client) = cluster(2, 1).await;
    let mut consumer = client
        .consumer()
        .topic("t")
        .start(StartFrom::Latest)
        .build()
        .await
        .unwrap();
    cluster.topic("t", 3);
    fill(&cluster, 2, 5, 5);
    for n in 0..5 {
        let consumed = next(&mut consumer).await;
        assert_eq!((consumed.partition, value(&consumed)), (2, n));
    }
    assert_eq!(consumer.position("t", 2), Some(5));
    consumer.seek("t", 2, StartFrom::Earliest).await.unwrap();
    assert_eq!(value(&next(&mut consumer).await), 0);
}

#[tokio::test]
async fn whole_batches_come_as_they_are_stored() {
    let (cluster, client) = cluster(1, 1).await;
    fill(&cluster, 0, 30, 10);
    let mut batches = client
        .consumer()
        .topic("t")
        .start(StartFrom::Offset(15))
        .build_batches()
        .await
        .unwrap();
    let first = batches.next_batch().await.unwrap().unwrap();
    assert_eq!(
        (
            first.header.base_offset,
            first.header.record_count,
            first.partition
        ),
        (10, 10, 0)
    );
    let offsets: Vec<i64> = first
        .records()
        .unwrap()
        .map(|record| record.unwrap().offset)
        .collect();
    assert_eq!(offsets, [15, 16, 17, 18, 19]);
    assert_eq!(batches.position("t", 0), Some(20));
    assert_eq!(
        first.bytes,
        cluster.state.lock().topics["t"].logs[0].batches[1]
    );
    batches.seek("t", 0, StartFrom::Earliest).await.unwrap();
    assert_eq!(batches.next().await.unwrap().unwrap().header.base_offset, 0);
}

#[tokio::test]
async fn what_cannot_be_read_is_refused_when_building() {
    let (_cluster, client) = cluster(1, 1).await;
    let kind =
        async |builder: millrace_client::ConsumerBuilder| builder.build().await.unwrap_err().kind();
    assert_eq!(kind(client.consumer()).await, ErrorKind::InvalidRequest);
    assert_eq!(
        kind(client.consumer().topic("none")).await,
        ErrorKind::UnknownTopic
    );
    assert_eq!(
        kind(client.consumer().partitions("t", [4])).await,
        ErrorKind::UnknownPartition
    );
    let metadata = client.metadata(&[]).await.unwrap();
    assert_eq!(
        (metadata.cluster_id.as_str(), metadata.topics.len()),
        ("fake", 1)
    );
    assert_eq!(
        client.metadata(&["none"]).await.unwrap_err().kind(),
        ErrorKind::UnknownTopic
    );
}
