//! Retention: by size and by time, giving disk space back, and leaving alone what stays.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use millrace_client::{ErrorKind, Record};
use millrace_e2e::{Api, Broker, BrokerSetup, Refusal, SOON, batch, eventually, refusal};
use millrace_record::{BatchBuilder, BatchOptions};
use serde_json::json;
use tonic::Code;

const MIB: u64 = 1 << 20;
/// Records of 10,000 bytes; the value begins with its offset.
const PER_BATCH: i64 = 10;

fn small(setup: BrokerSetup) -> BrokerSetup {
    setup
        .flag("--write-buffer", "1MiB")
        .flag("--write-buffer-age", "1s")
        .flag("--retention-interval", "500ms")
}

fn values(from: i64) -> Bytes {
    let padding: String = std::iter::repeat_with(fastrand::alphanumeric)
        .take(9_990)
        .collect();
    batch(
        (from..from + PER_BATCH).map(|offset| format!("{offset:09} {padding}")),
        None,
    )
}

async fn fill(api: &mut Api, topic: &str, partition: i32, records: i64) {
    let (_, from) = api.offsets(topic, partition).await;
    for offset in (from..from + records).step_by(PER_BATCH as usize) {
        let appended = api
            .append(topic, partition, vec![values(offset)])
            .await
            .unwrap();
        assert_eq!(appended.base_offset, offset);
    }
}

/// The rest is readable, all of it; what is gone says so.
async fn check_rest(api: &mut Api, topic: &str, partition: i32, end: i64) {
    let (start, high_watermark) = api.offsets(topic, partition).await;
    assert_eq!(high_watermark, end);
    let records = api.read_all(topic, partition, start).await;
    assert_eq!(records.len() as i64, end - start);
    for record in records {
        let value = record.value.unwrap();
        assert!(
            value.starts_with(format!("{:09} ", record.offset).as_bytes()),
            "record {}",
            record.offset
        );
    }
    if start > 0 {
        let gone: Refusal = refusal(&api.fetch(topic, partition, start - 1).await.unwrap_err());
        assert_eq!(
            (gone.reason.as_str(), gone.detail("log_start_offset")),
            ("OFFSET_OUT_OF_RANGE", &*start.to_string())
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_by_size_keeps_the_newest_and_gives_the_space_back() {
    let spec = json!({ "retention": { "bytes": "4MiB", "time": "forever" } });
    let mut broker = small(Broker::setup()).topic("t", spec).start();
    let empty = broker.disk_usage();
    let mut api = broker.api().await;
    fill(&mut api, "t", 0, 4_000).await;
    let freed = || async {
        let (start, end) = broker.api().await.offsets("t", 0).await;
        let kept = (end - start) as u64 * 10_000;
        // At least what is promised, at most that and one run more; and the same on disk, with the log of writes.
        (kept < 6 * MIB && broker.disk_usage() < empty + 10 * MIB).then_some(kept)
    };
    let kept = eventually("40 MB shrink to about 4 MiB", SOON, freed).await;
    assert!(
        kept >= 4 * MIB - 1_000_000,
        "retention keeps what it promises: {kept}"
    );
    check_rest(&mut api, "t", 0, 4_000).await;
    fill(&mut api, "t", 0, 100).await;
    check_rest(&mut api, "t", 0, 4_100).await;
    let (start, _) = api.offsets("t", 0).await;
    broker.kill_9();
    broker.restart();
    let mut api = broker.api().await;
    assert!(
        api.offsets("t", 0).await.0 >= start,
        "the log start offset never goes back"
    );
    check_rest(&mut api, "t", 0, 4_100).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_by_time_removes_what_is_old_and_only_that() {
    let broker = small(Broker::setup())
        .topic("t", json!({ "retention": { "time": "4s" } }))
        .start();
    let empty = broker.disk_usage();
    let mut api = broker.api().await;
    fill(&mut api, "t", 0, 2_000).await;
    assert!(broker.disk_usage() > empty + 15 * MIB);
    let all_gone =
        || async { (broker.api().await.offsets("t", 0).await == (2_000, 2_000)).then_some(()) };
    eventually("all is older than 4 s and goes", SOON, all_gone).await;
    let space_back = || async { (broker.disk_usage() < empty + 5 * MIB).then_some(()) };
    eventually("20 MB of disk come back", SOON, space_back).await;
    fill(&mut api, "t", 0, 10).await;
    check_rest(&mut api, "t", 0, 2_010).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_from_the_future_is_refused_and_does_not_hold_up_retention() {
    let broker = small(Broker::setup())
        .topic("t", json!({ "retention": { "time": "2s" } }))
        .topic("wide", json!({ "timestampAfterMax": "10000w" }))
        .topic("stamped", json!({ "timestampType": "LogAppendTime" }))
        .start();
    let mut api = broker.api().await;
    fill(&mut api, "t", 0, 10).await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let future = now.as_millis() as i64 + 100 * 365 * 24 * 3_600_000;
    let mut builder = BatchBuilder::new(BatchOptions::default());
    builder.append(future, None, Some(b"from the future"), &[]);
    let batch = builder.build().unwrap();
    let refused = api.append("t", 0, vec![batch.clone()]).await.unwrap_err();
    let refused = refusal(&refused);
    assert_eq!(
        (refused.code, refused.reason.as_str()),
        (Code::InvalidArgument, "INVALID_TIMESTAMP"),
        "{refused:?}"
    );
    let max: i64 = refused.detail("max_timestamp_ms").parse().unwrap();
    assert!(max < future && refused.detail("timestamp_ms") == future.to_string());
    // The client library says the same, and does not send it again.
    let client = broker.client().await;
    let producer = client.producer().build().await.unwrap();
    let record = Record::to("t")
        .value("from the future")
        .timestamp_ms(future);
    let error = producer.send(record).await.unwrap().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidTimestamp, "{error}");
    for accepting in ["wide", "stamped"] {
        api.append(accepting, 0, vec![batch.clone()]).await.unwrap();
    }
    let all_gone =
        || async { (broker.api().await.offsets("t", 0).await == (10, 10)).then_some(()) };
    eventually("all is older than 2 s and goes", SOON, all_gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_forgets_gives_space_back_beside_one_that_keeps_all() {
    let mut broker = small(Broker::setup())
        .topic(
            "short",
            json!({ "retention": { "bytes": "1MiB", "time": "forever" } }),
        )
        .topic("for-ever", json!({ "retention": { "time": "forever" } }))
        .start();
    let empty = broker.disk_usage();
    let mut api = broker.api().await;
    // Written by turns: they share every file.
    for _ in 0..100 {
        fill(&mut api, "short", 0, 30).await;
        fill(&mut api, "for-ever", 0, 10).await;
    }
    // 30 MB and 10 MB were written; 10 MB and a little stay.
    let freed = || async {
        let (start, end) = broker.api().await.offsets("short", 0).await;
        ((end - start) * 10_000 < 4 << 20 && broker.disk_usage() < empty + 17 * MIB).then_some(())
    };
    eventually(
        "the short topic's share of the disk comes back",
        SOON,
        freed,
    )
    .await;
    check_rest(&mut api, "short", 0, 3_000).await;
    assert_eq!(
        api.offsets("for-ever", 0).await,
        (0, 1_000),
        "the other topic is whole"
    );
    check_rest(&mut api, "for-ever", 0, 1_000).await;
    broker.terminate();
    broker.restart();
    let mut api = broker.api().await;
    check_rest(&mut api, "short", 0, 3_000).await;
    check_rest(&mut api, "for-ever", 0, 1_000).await;
    assert!(
        broker.disk_usage() < empty + 17 * MIB,
        "{} bytes",
        broker.disk_usage()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_retention_is_followed() {
    let broker = small(Broker::setup())
        .topic("t", json!({ "retention": { "time": "forever" } }))
        .start();
    let mut api = broker.api().await;
    fill(&mut api, "t", 0, 1_000).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(api.offsets("t", 0).await, (0, 1_000), "for ever");
    broker.declare(
        "t",
        json!({ "retention": { "bytes": "1MiB", "time": "forever" } }),
    );
    let freed = || async { (broker.api().await.offsets("t", 0).await.0 > 700).then_some(()) };
    eventually("the new retention takes effect", SOON, freed).await;
    check_rest(&mut api, "t", 0, 1_000).await;
}
