//! A full disk refuses writes and says so, keeps serving reads, and takes writes again when there is space: all without a
//! restart. On a volume of its own, hence for root only. A disk that fails otherwise is told apart.

use bytes::Bytes;
use millrace_e2e::volume::Volume;
use millrace_e2e::{Api, Broker, SOON, batch, eventually, refusal};
use serde_json::json;
use tempfile::TempDir;
use tonic::Code;

/// `None` if this user may not mount. The folder goes last: it can't be removed while something is mounted there.
fn mount(bytes: u64) -> Option<(Volume, TempDir)> {
    let dir = tempfile::Builder::new()
        .prefix("millrace-e2e-volume-")
        .tempdir()
        .unwrap();
    match Volume::mount(dir.path(), bytes) {
        Ok(volume) => Some((volume, dir)),
        Err(error) => {
            eprintln!("SKIPPED: a full disk needs a volume of its own: {error:#}");
            None
        }
    }
}

fn values(number: i64) -> Bytes {
    batch([format!("{number} {}", "x".repeat(20_000))], None)
}

/// Appends until it is refused; returns the next number.
async fn append_until_refused(api: &mut Api, mut number: i64) -> (i64, tonic::Status) {
    for _ in 0..20_000 {
        match api.append("t", 0, vec![values(number)]).await {
            Ok(appended) => {
                assert_eq!(
                    appended.base_offset, number,
                    "what is acknowledged has the next offset"
                );
                number += 1;
            }
            Err(status) => return (number, status),
        }
    }
    panic!("400 MB went onto a volume of 64 MiB");
}

async fn check(api: &mut Api, count: i64) {
    let records = api.read_all("t", 0, 0).await;
    assert_eq!(
        records.len() as i64,
        count,
        "what was acknowledged, and nothing else"
    );
    for record in records {
        assert!(
            record
                .value
                .unwrap()
                .starts_with(format!("{} ", record.offset).as_bytes())
        );
    }
}

async fn fill_and_free(volume: &Volume, reserve: &str, leave: u64) {
    let mut broker = Broker::setup()
        .topic("t", json!({ "retention": { "time": "forever" } }))
        .flag("--write-buffer", "2MiB")
        .flag("--min-free-disk", reserve)
        .data(&volume.folder().join("data"))
        .start();
    let mut api = broker.api().await;
    let mut count = 0;
    for round in 0..2 {
        for _ in 0..100 {
            assert_eq!(
                api.append("t", 0, vec![values(count)])
                    .await
                    .unwrap()
                    .base_offset,
                count
            );
            count += 1;
        }
        volume.fill(leave).unwrap();
        let (acknowledged, refused) = append_until_refused(&mut api, count).await;
        count = acknowledged;
        let refused = refusal(&refused);
        assert_eq!(
            (refused.code, refused.reason.as_str()),
            (Code::ResourceExhausted, "DISK_FULL"),
            "{refused:?}"
        );
        for detail in ["free_bytes", "required_bytes"] {
            assert!(
                refused.detail(detail).parse::<u64>().is_ok(),
                "{detail} in {refused:?}"
            );
        }
        assert!(
            refused.message.contains("disk is full"),
            "{}",
            refused.message
        );
        assert_eq!(broker.metric("millrace_disk_full"), 1.0);
        assert_eq!(broker.get("/readyz").status, 200, "it still serves reads");
        check(&mut api, count).await;
        let still = refusal(&api.append("t", 0, vec![values(count)]).await.unwrap_err());
        assert_eq!(still.reason, "DISK_FULL");

        volume.free().unwrap();
        let accepted = || async {
            broker
                .api()
                .await
                .append("t", 0, vec![values(count)])
                .await
                .ok()
        };
        let appended = eventually(
            &format!("writes are taken again, round {round}"),
            SOON,
            accepted,
        )
        .await;
        assert_eq!(appended.base_offset, count);
        count += 1;
        assert_eq!(broker.metric("millrace_disk_full"), 0.0);
        check(&mut api, count).await;
    }
    broker.kill_9();
    broker.restart();
    let mut api = broker.api().await;
    check(&mut api, count).await;
    assert_eq!(
        api.append("t", 0, vec![values(count)])
            .await
            .unwrap()
            .base_offset,
        count
    );
    broker.terminate();
    broker.restart();
    check(&mut broker.api().await, count + 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_stop_while_less_than_the_reserve_is_free() {
    if let Some((volume, _dir)) = mount(128 << 20) {
        fill_and_free(&volume, "24MiB", 30 << 20).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_to_the_last_byte_costs_no_record() {
    if let Some((volume, _dir)) = mount(64 << 20) {
        fill_and_free(&volume, "0", 1 << 20).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retention_that_is_shrunk_frees_half_of_a_full_disk() {
    let Some((volume, _dir)) = mount(128 << 20) else {
        return;
    };
    let mut broker = Broker::setup()
        .topic("t", json!({ "retention": { "time": "forever" } }))
        .flag("--write-buffer", "2MiB")
        .flag("--retention-interval", "500ms")
        .flag("--min-free-disk", "24MiB")
        .data(&volume.folder().join("data"))
        .start();
    let mut api = broker.api().await;
    let (count, refused) = append_until_refused(&mut api, 0).await;
    assert_eq!(refusal(&refused).reason, "DISK_FULL");
    let full = broker.disk_usage();

    let half = full / 2;
    let spec = json!({ "retention": { "time": "forever", "bytes": half } });
    broker.declare("t", spec);
    let accepted = || async {
        let appended = broker.api().await.append("t", 0, vec![values(count)]).await;
        appended.ok()
    };
    let appended = eventually("writes are taken again", SOON, accepted).await;
    assert_eq!(appended.base_offset, count);
    // Less what a store needs for itself.
    eventually("half of the records' space is free", SOON, || async {
        (broker.disk_usage() < full * 2 / 3).then_some(())
    })
    .await;
    broker.kill_9();
    broker.restart();
    let mut api = broker.api().await;
    let (start, end) = api.offsets("t", 0).await;
    assert_eq!(end, count + 1);
    assert!(
        count / 4 < start && start < count * 3 / 4,
        "{start} of {count}"
    );
    let records = api.read_all("t", 0, start).await;
    assert_eq!(records.len() as i64, end - start);
    for record in records {
        let number = format!("{} ", record.offset);
        assert!(record.value.unwrap().starts_with(number.as_bytes()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fails_is_not_called_full() {
    let mut broker = Broker::setup()
        .topic("t", json!({}))
        .survives_file_size_limit()
        .start();
    let mut api = broker.api().await;
    for number in 0..10 {
        api.append("t", 0, vec![values(number)]).await.unwrap();
    }
    broker.limit_file_size(Some(0));
    // While it pauses, too.
    for _ in 0..2 {
        let refused = refusal(&api.append("t", 0, vec![values(10)]).await.unwrap_err());
        assert_eq!(
            (refused.code, refused.reason.as_str()),
            (Code::Internal, "STORAGE"),
            "{refused:?}"
        );
        assert!(refused.message.contains("File too large"), "{refused:?}");
    }
    assert_eq!(broker.metric("millrace_disk_full"), 0.0);
    assert_eq!(broker.get("/readyz").status, 200, "it still serves reads");
    check(&mut api, 10).await;
    broker.limit_file_size(None);
    broker.kill_9();
    broker.restart();
    let mut api = broker.api().await;
    check(&mut api, 10).await;
    let appended = api.append("t", 0, vec![values(10)]).await.unwrap();
    assert_eq!(appended.base_offset, 10);
}
