//! What operators see and do: metrics, probes, SIGTERM, topic files.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use millrace_client::{ErrorKind, Record};
use millrace_e2e::{Broker, SOON, batch, eventually};
use millrace_proto::v1::{FetchPartition, FetchRequest};
use serde_json::json;
use tokio::time::Instant;

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_what_the_broker_did_and_holds() {
    let broker = Broker::setup()
        .topic("t", json!({ "partitions": 2 }))
        .start();
    let mut api = broker.api().await;
    let sent = batch(["a", "b", "c"], None);
    for _ in 0..10 {
        api.append("t", 1, vec![sent.clone()]).await.unwrap();
    }
    api.append("absent", 0, vec![sent.clone()])
        .await
        .unwrap_err();
    api.read_all("t", 1, 0).await;

    let answer = broker.get("/metrics");
    assert_eq!(answer.status, 200);
    assert!(
        answer
            .content_type
            .starts_with("application/openmetrics-text"),
        "{}",
        answer.content_type
    );
    check_open_metrics(&answer.body);
    let partition =
        |name: &str| broker.metric(&format!("millrace_{name}{{topic=\"t\",partition=\"1\"}}"));
    assert_eq!(
        (
            partition("log_start_offset"),
            partition("log_end_offset"),
            partition("high_watermark")
        ),
        (0.0, 30.0, 30.0)
    );
    assert_eq!(partition("log_size_bytes"), 10.0 * sent.len() as f64);
    assert_eq!(
        broker.metric("millrace_produced_bytes_total"),
        10.0 * sent.len() as f64
    );
    assert!(broker.metric("millrace_fetched_bytes_total") >= 10.0 * sent.len() as f64);
    assert_eq!(
        broker.metric("millrace_request_duration_seconds_count{method=\"Produce\"}"),
        11.0
    );
    assert!(broker.metric("millrace_request_duration_seconds_sum{method=\"Produce\"}") > 0.0);
    assert_eq!(
        broker.metric("millrace_errors_total{reason=\"UNKNOWN_TOPIC\"}"),
        1.0
    );
    assert_eq!(broker.metric("millrace_connections"), 1.0);
    assert_eq!(broker.metric("millrace_disk_full"), 0.0);
    assert!(broker.metric("millrace_disk_free_bytes") > 0.0);
    assert!(broker.metric("millrace_rocksdb_ticker_total{name=\"rocksdb.wal.bytes\"}") > 0.0);
    assert!(broker.resident_bytes() > 0 && broker.open_files() > 0);
}

/// The format's rules, as far as a scraper would trip over them.
fn check_open_metrics(text: &str) {
    assert!(text.ends_with("# EOF\n"));
    let mut series = std::collections::BTreeSet::new();
    let mut buckets: Option<(String, f64)> = None;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line
            .rsplit_once(' ')
            .unwrap_or_else(|| panic!("no value in {line:?}"));
        let value: f64 = value
            .parse()
            .unwrap_or_else(|_| panic!("no number in {line:?}"));
        assert!(name.starts_with("millrace_"), "{line}");
        assert!(series.insert(name.to_owned()), "{name} is there twice");
        if let Some((before_le, rest)) = name.split_once("le=\"") {
            let (_, after_le) = rest.split_once('"').expect("a closing quote");
            let labels = format!("{before_le}{after_le}");
            let before = buckets.take().filter(|(before, _)| *before == labels);
            assert!(
                before.is_none_or(|(_, count)| value >= count),
                "a histogram's buckets add up: {line}"
            );
            buckets = Some((labels, value));
        }
    }
    for family in [
        "millrace_request_duration_seconds",
        "millrace_produced_bytes",
        "millrace_log_end_offset",
    ] {
        assert!(
            text.contains(&format!("# TYPE {family} "))
                && text.contains(&format!("# HELP {family} ")),
            "{family}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn probes_answer() {
    let broker = Broker::setup().start();
    for (path, status) in [
        ("/healthz", 200),
        ("/readyz", 200),
        ("/restartable", 200),
        ("/nothing", 404),
    ] {
        assert_eq!(broker.get(path).status, status, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_finishes_what_was_accepted_and_ends_with_0() {
    let mut broker = Broker::setup()
        .topic("t", json!({ "partitions": 3 }))
        .start();
    let acknowledged = Arc::new(AtomicU64::new(0));
    let mut producers = Vec::new();
    for _ in 0..3 {
        let (client, count) = (broker.client().await, acknowledged.clone());
        producers.push(tokio::spawn(async move {
            let producer = client
                .producer()
                .delivery_timeout(Duration::from_secs(2))
                .build()
                .await
                .unwrap();
            let mut under_way = std::collections::VecDeque::new();
            let mut places = Vec::new();
            loop {
                let Ok(delivery) = producer.send(Record::to("t").value("x".repeat(200))).await
                else {
                    return places;
                };
                under_way.push_back(delivery);
                if under_way.len() < 1_000 {
                    continue;
                }
                match under_way.pop_front().unwrap().await {
                    Ok(meta) => {
                        places.push((meta.partition, meta.offset));
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(error) => {
                        let expected = [
                            ErrorKind::ShuttingDown,
                            ErrorKind::Transport,
                            ErrorKind::TimedOut,
                        ];
                        assert!(expected.contains(&error.kind()), "{error:?}");
                        for delivery in under_way {
                            places.extend(
                                delivery
                                    .await
                                    .ok()
                                    .map(|meta| (meta.partition, meta.offset)),
                            );
                        }
                        return places;
                    }
                }
            }
        }));
    }
    let (api, mut consumer) = (broker.api().await, broker.api().await.consumer);
    let poll = tokio::spawn(async move {
        let from = FetchPartition {
            topic: "t".into(),
            partition: 0,
            offset: 0,
            max_bytes: 0,
        };
        let partitions = vec![from];
        // 8 MiB will not be there: this long poll is still open when the signal comes.
        consumer
            .fetch(FetchRequest {
                min_bytes: 1 << 30,
                max_wait_ms: 60_000,
                partitions,
                ..FetchRequest::default()
            })
            .await
    });
    eventually("a load", SOON, || async {
        (acknowledged.load(Ordering::Relaxed) > 3_000).then_some(())
    })
    .await;
    let begun = Instant::now();
    let log = broker.terminate();
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "it took {:?} to stop",
        begun.elapsed()
    );
    assert!(log.contains("stopped") && !log.contains("ERROR"), "{log}");
    let _ = poll.await.unwrap();
    drop(api);
    let mut places = Vec::new();
    for producer in producers {
        places.extend(producer.await.unwrap());
    }
    broker.restart();
    assert!(
        broker
            .log()
            .contains("clean stop before; 3 topics, 19 partitions"),
        "{}",
        broker.log()
    );
    assert!(
        broker.log().contains("replayed 0 batches"),
        "{}",
        broker.log()
    );
    let mut api = broker.api().await;
    let mut held = std::collections::HashSet::new();
    for partition in 0..3 {
        held.extend(
            api.read_all("t", partition, 0)
                .await
                .into_iter()
                .map(|record| (partition, record.offset)),
        );
    }
    let total = places.len();
    places.sort_unstable();
    places.dedup();
    assert_eq!(places.len(), total, "no offset was given twice");
    let lost: Vec<_> = places
        .iter()
        .filter(|place| !held.contains(place))
        .collect();
    assert!(
        lost.is_empty(),
        "{} acknowledged records are not there: {lost:?}",
        lost.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_topic_files_are_followed_and_wrong_ones_change_nothing() {
    let mut broker = Broker::setup()
        .topic("t", json!({ "partitions": 1 }))
        .start();
    let mut api = broker.api().await;
    api.append("t", 0, vec![batch(["kept"], None)])
        .await
        .unwrap();

    broker.declare("t", json!({ "partitions": 3 }));
    broker.declare("new", json!({ "maxMessageBytes": "1KiB" }));
    let grown = || async {
        let mut api = broker.api().await;
        let grown = api.append("t", 2, vec![batch(["a"], None)]).await.is_ok();
        (grown && api.append("new", 0, vec![batch(["a"], None)]).await.is_ok()).then_some(())
    };
    eventually("topic t grows and topic new appears", SOON, grown).await;

    fs::write(broker.topics().join("wrong.yaml"), "kind: Topic\n").unwrap();
    broker.wait_for_log("can't be applied", SOON);
    assert!(broker.log().contains("wrong.yaml"), "{}", broker.log());
    api.append("t", 0, vec![batch(["still served"], None)])
        .await
        .unwrap();

    // Fewer partitions, or no file at all: data is never removed.
    fs::remove_file(broker.topics().join("wrong.yaml")).unwrap();
    fs::remove_file(broker.topics().join("new.yaml")).unwrap();
    broker.declare("t", json!({ "partitions": 1 }));
    broker.wait_for_log("held, but declared in no file", SOON);
    broker.terminate();
    broker.restart();
    let mut api = broker.api().await;
    assert_eq!(api.read_all("t", 0, 0).await.len(), 2);
    assert!(!api.read_all("t", 2, 0).await.is_empty());
    assert!(!api.read_all("new", 0, 0).await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_can_not_start_says_why_and_ends_with_1() {
    let legal = "apiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata: { name: t }\n";
    let whole = format!("{legal}spec: {{}}\n");
    let cases = [
        ("partitions: [1, 2".to_owned(), "bad.yaml, document 1"),
        (
            format!("{legal}spec: {{ partitions: 0 }}\n"),
            "spec.partitions: 0 is not allowed",
        ),
        (
            format!("{legal}spec: {{ partition: 3 }}\n"),
            "unknown field",
        ),
        (format!("{whole}---\n{whole}"), "declared twice"),
        (
            "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: c }\n".to_owned(),
            "expected apiVersion: millrace.dev/v1alpha1",
        ),
    ];
    for (yaml, message) in cases {
        let setup = Broker::setup();
        fs::write(setup.topics().join("bad.yaml"), &yaml).unwrap();
        let failed = setup.start_and_fail();
        assert_eq!(failed.code, Some(1), "{yaml}: {}", failed.stderr);
        let last = failed.stderr.lines().last().unwrap_or_default();
        assert!(
            last.contains("ERROR") && last.contains(message),
            "{yaml}: {}",
            failed.stderr
        );
        assert!(!failed.stderr.contains("panicked"), "{}", failed.stderr);
    }

    let broker = Broker::setup().start();
    let failed = Broker::setup().data(broker.data()).start_and_fail();
    assert_eq!(failed.code, Some(1));
    assert!(
        failed.stderr.contains("is another broker using it"),
        "{}",
        failed.stderr
    );
    let failed = Broker::setup()
        .flag("--listen", broker.address())
        .start_and_fail();
    assert_eq!(failed.code, Some(1));
    assert!(
        failed
            .stderr
            .contains(&format!("can't listen on {}", broker.address())),
        "{}",
        failed.stderr
    );
    let failed = Broker::setup()
        .flag("--durability", "never")
        .start_and_fail();
    assert_eq!(failed.code, Some(2), "wrong usage");
    assert!(
        failed.stderr.contains("use os or fsync"),
        "{}",
        failed.stderr
    );
}
