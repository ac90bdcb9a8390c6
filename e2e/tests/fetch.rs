//! Fetch and list offsets through the gRPC API.

use std::time::Duration;

use millrace_e2e::{Api, Broker, SOON, batch};
use millrace_proto::v1::{
    Earliest, FetchPartition, FetchRequest, FetchResponse, Latest, ListOffsetsRequest, OffsetQuery,
    PartitionRecords, ProduceRequest, Record, offset_query::Spec,
};
use serde_json::json;
use tokio::time::{Instant, timeout};

fn from(partition: i32, offset: i64, max_bytes: u32) -> FetchPartition {
    FetchPartition {
        topic: "t".into(),
        partition,
        offset,
        max_bytes,
    }
}

async fn fetch(
    api: &Api,
    min_bytes: u32,
    max_wait_ms: u32,
    max_bytes: u32,
    partitions: Vec<FetchPartition>,
) -> FetchResponse {
    let request = FetchRequest {
        min_bytes,
        max_wait_ms,
        max_bytes,
        partitions,
        ..FetchRequest::default()
    };
    api.consumer
        .clone()
        .fetch(request)
        .await
        .unwrap()
        .into_inner()
}

fn bytes_of(response: &FetchResponse) -> Vec<usize> {
    response
        .results
        .iter()
        .map(|result| result.batches.iter().map(|batch| batch.len()).sum())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_poll_returns_as_soon_as_there_is_enough_and_otherwise_when_time_is_up() {
    let broker = Broker::setup()
        .topic("t", json!({ "partitions": 2 }))
        .start();
    let mut api = broker.api().await;
    let kilobyte = || batch(["x".repeat(1_000)], None);

    let begun = Instant::now();
    let response = fetch(&api, 1, 300, 0, vec![from(0, 0, 0)]).await;
    assert!(
        begun.elapsed() >= Duration::from_millis(300),
        "it waited only {:?}",
        begun.elapsed()
    );
    assert_eq!(bytes_of(&response), [0]);
    assert_eq!(response.results[0].high_watermark, 0);

    let waiting = api.clone();
    let poll = tokio::spawn(async move {
        let response = fetch(&waiting, 1, 60_000, 0, vec![from(0, 0, 0), from(1, 0, 0)]).await;
        (response, Instant::now())
    });
    // Whether the poll has reached the broker by now does not matter for what must hold.
    let appended = api.append("t", 1, vec![kilobyte()]).await.unwrap();
    assert_eq!(appended.base_offset, 0);
    let (response, _) = timeout(SOON / 2, poll)
        .await
        .expect("long before its 60 s are up")
        .unwrap();
    assert_eq!(
        (response.results.len(), response.results[0].partition),
        (1, 1),
        "partitions without news are left out"
    );

    let waiting = api.clone();
    let mut poll = tokio::spawn(async move {
        fetch(
            &waiting,
            2_500,
            60_000,
            0,
            vec![from(0, 0, 0), from(1, 0, 0)],
        )
        .await
    });
    api.append("t", 0, vec![kilobyte()]).await.unwrap();
    let early = timeout(Duration::from_millis(200), &mut poll).await;
    assert!(early.is_err(), "2,500 bytes are wanted, 2,200 are there");
    api.append("t", 0, vec![kilobyte()]).await.unwrap();
    let response = timeout(SOON / 2, poll)
        .await
        .expect("there is enough now")
        .unwrap();
    assert!(bytes_of(&response).iter().sum::<usize>() >= 2_500);

    let response = timeout(SOON / 2, fetch(&api, 0, 60_000, 0, vec![from(0, 2, 0)]))
        .await
        .expect("min_bytes 0 never waits");
    assert_eq!(bytes_of(&response), [0]);

    let begun = Instant::now();
    let response = fetch(&api, 1 << 20, 400, 0, vec![from(0, 0, 0)]).await;
    assert!(begun.elapsed() >= Duration::from_millis(400));
    assert!(
        bytes_of(&response)[0] > 2_000,
        "when time is up, what is there comes"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_keeps_to_its_limits_but_always_makes_progress() {
    let broker = Broker::setup()
        .topic("t", json!({ "partitions": 3 }))
        .flag("--tail-cache", "64KiB")
        .start();
    let mut api = broker.api().await;
    let batches = || vec![batch(["x".repeat(10_000)], None); 20];
    let size = batches()[0].len();
    for partition in 0..2 {
        api.append("t", partition, batches()).await.unwrap();
    }
    let big = batch(["x".repeat(500_000)], None);
    api.append("t", 2, vec![big.clone(), batch(["small"], None)])
        .await
        .unwrap();

    let all = || vec![from(0, 0, 0), from(1, 0, 0), from(2, 0, 0)];
    let response = fetch(&api, 0, 0, 5 * size as u32, all()).await;
    assert_eq!(
        bytes_of(&response),
        [5 * size],
        "partitions are read in the order of the request until it is full"
    );
    let limited = vec![from(0, 0, 3 * size as u32 + 1), from(1, 4, 2 * size as u32)];
    let response = fetch(&api, 0, 0, 0, limited).await;
    assert_eq!(
        bytes_of(&response),
        [3 * size, 2 * size],
        "each partition has its own limit"
    );

    // 1 byte is less than any batch: the first comes all the same, alone; later partitions wait for their turn.
    let response = fetch(&api, 0, 0, 1, vec![from(2, 0, 1), from(0, 0, 0)]).await;
    assert_eq!(bytes_of(&response), [big.len()]);
    for offset in 0..20 {
        let response = fetch(&api, 0, 0, 1, vec![from(0, offset, 1)]).await;
        assert_eq!(bytes_of(&response), [size]);
    }
    assert_eq!(
        bytes_of(&fetch(&api, 0, 0, 0, all()).await),
        [
            20 * size,
            20 * size,
            big.len() + batch(["small"], None).len()
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn offsets_are_found_by_end_and_by_time() {
    let broker = Broker::setup()
        .topic("t", json!({ "partitions": 2 }))
        .start();
    let mut api = broker.api().await;
    let record = |ms| Record {
        timestamp_ms: Some(ms),
        ..Default::default()
    };
    // Two batches; time goes back within the first.
    for times in [[1_000, 3_000, 2_000], [4_000, 4_000, 5_000]] {
        let records = times.into_iter().map(record).collect();
        let partitions = vec![PartitionRecords {
            topic: "t".into(),
            records,
            ..Default::default()
        }];
        api.producer
            .produce(ProduceRequest {
                partitions,
                ..Default::default()
            })
            .await
            .unwrap();
    }
    let at = Spec::TimestampMs;
    let (earliest, latest) = (Spec::Earliest(Earliest {}), Spec::Latest(Latest {}));
    let cases = [
        (0, earliest, Some(0), None),
        (0, latest, Some(6), None),
        (0, at(0), Some(0), Some(1_000)),
        (0, at(1_000), Some(0), Some(1_000)),
        (0, at(1_001), Some(1), Some(3_000)),
        (0, at(2_000), Some(1), Some(3_000)),
        (0, at(3_001), Some(3), Some(4_000)),
        (0, at(4_000), Some(3), Some(4_000)),
        (0, at(5_000), Some(5), Some(5_000)),
        (0, at(5_001), None, None),
        (1, earliest, Some(0), None),
        (1, latest, Some(0), None),
        (1, at(0), None, None),
    ];
    let query = |(partition, spec, ..): &(i32, Spec, _, _)| OffsetQuery {
        topic: "t".into(),
        partition: *partition,
        spec: Some(*spec),
    };
    let mut queries: Vec<_> = cases.iter().map(query).collect();
    queries.push(OffsetQuery {
        topic: "absent".into(),
        partition: 0,
        spec: Some(latest),
    });
    let results = api
        .consumer
        .list_offsets(ListOffsetsRequest {
            queries,
            ..ListOffsetsRequest::default()
        })
        .await
        .unwrap()
        .into_inner()
        .results;
    for (result, (partition, spec, offset, timestamp_ms)) in results.iter().zip(&cases) {
        assert_eq!(
            (&result.offset, &result.timestamp_ms),
            (offset, timestamp_ms),
            "partition {partition}, {spec:?}"
        );
    }
    assert!(results[cases.len()].error.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_longer_fits_in_memory_is_read_from_disk_while_more_is_written() {
    let broker = Broker::setup()
        .topic("t", json!({ "partitions": 2 }))
        .flag("--write-buffer", "1MiB")
        .flag("--tail-cache", "64KiB")
        .flag("--block-cache", "1MiB")
        .start();
    let api = broker.api().await;
    let writer = |partition: i32| {
        let mut api = api.clone();
        async move {
            for i in 0..100_i64 {
                let values =
                    (0..10).map(|j| format!("{partition} {} {}", i * 10 + j, "x".repeat(5_000)));
                let appended = api
                    .append("t", partition, vec![batch(values, None)])
                    .await
                    .unwrap();
                assert_eq!(appended.base_offset, i * 10);
            }
        }
    };
    let reader = |partition: i32| {
        let mut api = api.clone();
        async move {
            let mut next = 0;
            while next < 1_000 {
                for record in api.read_all("t", partition, next).await {
                    let value =
                        String::from_utf8_lossy(record.value.as_ref().unwrap()).into_owned();
                    assert!(
                        value.starts_with(&format!("{partition} {next} ")),
                        "{value:.30} at {next}"
                    );
                    next += 1;
                }
            }
        }
    };
    let all = async { tokio::join!(writer(0), writer(1), reader(0), reader(0), reader(1)) };
    timeout(SOON, all)
        .await
        .expect("reading keeps up with writing");
}
