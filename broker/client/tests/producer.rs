//! The producer against a cluster that fails on purpose.

#![allow(clippy::unwrap_used)]

mod fake;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use fake::{Cluster, Fault};
use futures::future::join_all;
use millrace_client::{
    Acks, Backpressure, Client, Compression, ErrorKind, Partitioner, Producer, Record,
};
use millrace_proto::v1::ErrorReason;

async fn cluster(brokers: usize, partitions: usize) -> (Cluster, Client) {
    let cluster = Cluster::start(brokers).await;
    cluster.topic("t", partitions);
    let client = Client::builder(cluster.address())
        .request_timeout(Duration::from_secs(2))
        .metadata_refresh(Duration::from_millis(200))
        .connect()
        .await
        .unwrap();
    (cluster, client)
}

fn record(partition: i32, value: usize) -> Record {
    Record::to("t")
        .partition(partition)
        .value(value.to_string())
}

async fn close(producer: Producer) {
    producer.close(Duration::from_secs(20)).await.unwrap();
}

fn numbers(until: usize) -> Vec<String> {
    (0..until).map(|n| n.to_string()).collect()
}

#[tokio::test]
async fn a_record_is_delivered_with_its_offset_and_everything_it_carries() {
    let (cluster, client) = cluster(1, 3).await;
    let producer = client
        .producer()
        .compression(Compression::Zstd)
        .build()
        .await
        .unwrap();
    let sent = Record::to("t")
        .key("21")
        .value("v")
        .header("h", "1")
        .null_header("h")
        .timestamp_ms(1234);
    let first = producer.send(sent.clone()).await.unwrap();
    let second = producer.send(sent).await.unwrap();
    let first = first.await.unwrap();
    assert_eq!(
        (&*first.topic, first.offset, first.timestamp_ms),
        ("t", 0, 1234)
    );
    assert_eq!(first.partition, (-973932308_i32 & i32::MAX) % 3);
    assert_eq!(second.await.unwrap().offset, 1);
    close(producer).await;
    let state = cluster.state.lock();
    let batch = &state.topics["t"].logs[first.partition as usize].batches[0];
    let records = millrace_record::decode(batch, &Default::default()).unwrap();
    let record = records.map(Result::unwrap).next().unwrap();
    assert_eq!(record.key.as_deref(), Some(&b"21"[..]));
    assert_eq!(record.headers.len(), 2);
    assert_eq!(record.headers[1].value, None);
    assert_eq!(record.timestamp_ms, 1234);
}

/// The promise of idempotence, under every fault at once: for many seeds, all that was acknowledged is there once, in order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_fails_every_record_arrives_once_and_in_order() {
    for seed in 0..8 {
        let (cluster, client) = cluster(2, 4).await;
        let mut random = fastrand::Rng::with_seed(seed);
        let mut left = 40;
        cluster.produce_faults(move |_| {
            if left == 0 || random.u8(..) < 90 {
                return Fault::None;
            }
            left -= 1;
            match random.u8(..9) {
                0 => Fault::DropBefore,
                1 => Fault::DropAfter,
                2 => Fault::AppendAndTimeOut,
                3 => Fault::Reject(ErrorReason::Throttled),
                4 => Fault::Reject(ErrorReason::DiskFull),
                5 => Fault::Refuse(ErrorReason::Throttled),
                6 => Fault::Refuse(ErrorReason::ShuttingDown),
                7 => Fault::AnswerLater,
                _ => Fault::Delay(Duration::from_millis(20)),
            }
        });
        let builder = client
            .producer()
            .linger(Duration::ZERO)
            .batch_bytes(300)
            .max_request_bytes(1000);
        let producer = builder.build().await.unwrap();
        let mover = tokio::spawn({
            let state = cluster.state.clone();
            async move {
                for turn in 0..8 {
                    tokio::time::sleep(Duration::from_millis(60)).await;
                    state.lock().move_leader("t", turn % 4, turn % 2);
                }
            }
        });
        let mut deliveries = Vec::new();
        for n in 0..500 {
            for partition in 0..4 {
                deliveries.push(producer.send(record(partition, n)).await.unwrap());
            }
            if n % 25 == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        let metas = join_all(deliveries).await;
        mover.await.unwrap();
        close(producer).await;
        let state = cluster.state.lock();
        for partition in 0..4 {
            assert_eq!(
                state.values("t", partition),
                numbers(500),
                "seed {seed}, partition {partition}"
            );
        }
        for (n, meta) in metas.into_iter().enumerate() {
            let meta = meta.unwrap_or_else(|e| panic!("seed {seed}, record {n}: {e}"));
            let expected = (n / 4) as i64;
            assert!(
                meta.offset == expected || meta.offset == -1,
                "seed {seed}: {meta:?} instead of {expected}"
            );
        }
    }
}

#[tokio::test]
async fn a_gap_after_a_failure_for_good_is_closed_under_a_new_producer_id() {
    let (cluster, client) = cluster(1, 1).await;
    let producer = client
        .producer()
        .linger(Duration::ZERO)
        .batch_bytes(100)
        .build()
        .await
        .unwrap();
    producer.send(record(0, 0)).await.unwrap().await.unwrap();
    // The record "1" is poison to whatever request it is in.
    cluster.produce_faults(|request| {
        let batches = request
            .partitions
            .iter()
            .flat_map(|records| &records.batches);
        let mut records =
            batches.flat_map(|batch| millrace_record::decode(batch, &Default::default()).unwrap());
        match records.any(|record| record.unwrap().value.as_deref() == Some(b"1")) {
            true => Fault::Reject(ErrorReason::InvalidBatch),
            false => Fault::None,
        }
    });
    let failed = producer.send(record(0, 1)).await.unwrap();
    // The first of them are in the same request, and must not suffer for it.
    let rest = join_all((2..50).map(|n| producer.send(record(0, n)))).await;
    assert_eq!(failed.await.unwrap_err().kind(), ErrorKind::InvalidBatch);
    for delivery in rest {
        delivery.unwrap().await.unwrap();
    }
    close(producer).await;
    let values: Vec<String> = numbers(50).into_iter().filter(|n| n != "1").collect();
    assert_eq!(cluster.state.lock().values("t", 0), values);
}

#[tokio::test]
async fn delivery_timeout_bounds_the_wait_and_later_records_get_through() {
    let (cluster, client) = cluster(1, 1).await;
    let timeout = Duration::from_millis(600);
    let builder = client
        .producer()
        .linger(Duration::ZERO)
        .batch_bytes(100)
        .delivery_timeout(timeout);
    let producer = builder.build().await.unwrap();
    producer.send(record(0, 0)).await.unwrap().await.unwrap();
    // All attempts of the next record, also one that is on its way when its time is over.
    let mut rejected = None;
    cluster.produce_faults(move |request| {
        let batch = &request.partitions[0].batches[0];
        match rejected.get_or_insert_with(|| batch.clone()) == batch {
            true => Fault::Reject(ErrorReason::Throttled),
            false => Fault::None,
        }
    });
    let begin = Instant::now();
    let error = producer
        .send(record(0, 1))
        .await
        .unwrap()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert_eq!((error.topic(), error.partition()), (Some("t"), Some(0)));
    assert!(
        error.to_string().contains("THROTTLED"),
        "names the cause: {error}"
    );
    assert!(
        begin.elapsed() < timeout + Duration::from_millis(300),
        "{:?}",
        begin.elapsed()
    );
    producer.send(record(0, 2)).await.unwrap().await.unwrap();
    close(producer).await;
    assert_eq!(cluster.state.lock().values("t", 0), ["0", "2"]);
}

#[tokio::test]
async fn a_broker_that_never_answers_is_given_up_at_the_deadline() {
    let (cluster, client) = cluster(1, 1).await;
    cluster.next_produce_faults([Fault::Swallow]);
    let producer = client
        .producer()
        .delivery_timeout(Duration::from_millis(300))
        .build()
        .await
        .unwrap();
    let begin = Instant::now();
    let error = producer
        .send(record(0, 0))
        .await
        .unwrap()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(
        begin.elapsed() < Duration::from_millis(600),
        "{:?}",
        begin.elapsed()
    );
}

#[tokio::test]
async fn linger_gathers_records_and_flush_does_not_wait_for_it() {
    let (cluster, client) = cluster(1, 1).await;
    let producer = client
        .producer()
        .linger(Duration::from_secs(60))
        .build()
        .await
        .unwrap();
    for n in 0..100 {
        drop(producer.send(record(0, n)).await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(cluster.state.lock().batch_count("t"), 0);
    producer.flush().await.unwrap();
    assert_eq!(cluster.state.lock().batch_count("t"), 1);
    assert_eq!(cluster.state.lock().values("t", 0), numbers(100));
    cluster.next_produce_faults([Fault::Reject(ErrorReason::InvalidBatch)]);
    drop(producer.send(record(0, 1)).await.unwrap());
    assert_eq!(
        producer.flush().await.unwrap_err().kind(),
        ErrorKind::InvalidBatch
    );
}

#[tokio::test]
async fn a_full_buffer_does_what_backpressure_says() {
    let (cluster, client) = cluster(1, 1).await;
    cluster.produce_faults(|_| Fault::Delay(Duration::from_millis(300)));
    let big = || Record::to("t").value(vec![b'x'; 3000]);
    let builder = client
        .producer()
        .max_buffered_bytes(10_000)
        .batch_bytes(4000);

    let failing = builder
        .clone()
        .backpressure(Backpressure::Fail)
        .build()
        .await
        .unwrap();
    let mut taken = 0;
    let error = loop {
        match failing.send(big()).await {
            Ok(_) => taken += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::BufferFull);
    assert!((2..=3).contains(&taken), "{taken}");
    let returned = failing.try_send(big()).unwrap_err();
    assert_eq!(returned.error.kind(), ErrorKind::BufferFull);
    assert_eq!(returned.record.value.unwrap().len(), 3000);

    let patient = builder
        .clone()
        .backpressure(Backpressure::WaitAtMost(Duration::from_millis(50)))
        .build()
        .await
        .unwrap();
    let begin = Instant::now();
    while patient.send(big()).await.is_ok() {}
    assert!(begin.elapsed() >= Duration::from_millis(50));

    let waiting = builder.build().await.unwrap();
    let deliveries: Vec<_> = join_all((0..12).map(|_| waiting.send(big()))).await;
    for delivery in join_all(deliveries.into_iter().map(Result::unwrap)).await {
        delivery.unwrap();
    }
    let too_large = waiting
        .send(Record::to("t").value(vec![0; 20_000]))
        .await
        .unwrap_err();
    assert_eq!(too_large.kind(), ErrorKind::RecordTooLarge);
}

#[tokio::test]
async fn waiting_callers_make_open_batches_go_although_they_linger() {
    let (_cluster, client) = cluster(1, 8).await;
    let builder = client
        .producer()
        .max_buffered_bytes(8000)
        .linger(Duration::from_secs(60));
    let producer = builder
        .partitioner(Partitioner::RoundRobin)
        .build()
        .await
        .unwrap();
    let all = async {
        for _ in 0..200 {
            drop(
                producer
                    .send(Record::to("t").value(vec![b'x'; 500]))
                    .await
                    .unwrap(),
            );
        }
    };
    tokio::time::timeout(Duration::from_secs(10), all)
        .await
        .unwrap();
}

#[tokio::test]
async fn what_cannot_be_sent_fails_at_once() {
    let (cluster, client) = cluster(1, 2).await;
    let producer = client.producer().build().await.unwrap();
    let kind = async |record| producer.send(record).await.unwrap_err().kind();
    assert_eq!(kind(Record::to("none")).await, ErrorKind::UnknownTopic);
    assert_eq!(kind(record(2, 0)).await, ErrorKind::UnknownPartition);
    assert_eq!(
        kind(Record::to("t").value(vec![0; 2 << 20])).await,
        ErrorKind::RecordTooLarge
    );
    // Partitions that were added meanwhile are found.
    cluster.topic("t", 3);
    producer.send(record(2, 0)).await.unwrap().await.unwrap();
    producer.close(Duration::from_secs(1)).await.unwrap();
    assert_eq!(kind(record(0, 0)).await, ErrorKind::Closed);
}

#[tokio::test]
async fn try_send_fetches_metadata_in_the_background() {
    let (_cluster, client) = cluster(1, 1).await;
    let producer = client.producer().build().await.unwrap();
    let returned = producer.try_send(record(0, 0)).unwrap_err();
    assert_eq!(returned.error.kind(), ErrorKind::NotReady);
    let delivery = loop {
        match producer.try_send(record(0, 0)) {
            Ok(delivery) => break delivery,
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    delivery.await.unwrap();
}

#[test]
fn try_send_works_outside_of_a_runtime() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (_cluster, producer) = runtime.block_on(async {
        let (cluster, client) = cluster(1, 1).await;
        (cluster, client.producer().build().await.unwrap())
    });
    let delivery = loop {
        match producer.try_send(record(0, 0)) {
            Ok(delivery) => break delivery,
            Err(refused) => assert_eq!(refused.error.kind(), ErrorKind::NotReady),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    runtime.block_on(delivery).unwrap();
}

#[tokio::test]
async fn acks_none_does_not_wait_for_an_answer() {
    let (cluster, client) = cluster(1, 1).await;
    cluster.produce_faults(|_| Fault::Delay(Duration::from_millis(500)));
    let producer = client
        .producer()
        .acks(Acks::None)
        .linger(Duration::ZERO)
        .build()
        .await
        .unwrap();
    let begin = Instant::now();
    let meta = producer.send(record(0, 0)).await.unwrap().await.unwrap();
    assert_eq!(meta.offset, -1);
    assert!(begin.elapsed() < Duration::from_millis(400));
    close(producer).await;
    assert_eq!(cluster.state.lock().values("t", 0), ["0"]);
    let refused = client
        .producer()
        .acks(Acks::None)
        .idempotent(true)
        .build()
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidRequest);
}

#[tokio::test]
async fn close_gives_up_at_its_time_out_and_fails_what_is_left() {
    let (cluster, client) = cluster(1, 1).await;
    cluster.produce_faults(|_| Fault::Swallow);
    let producer = client.producer().build().await.unwrap();
    let delivery = producer.send(record(0, 0)).await.unwrap();
    let error = producer
        .close(Duration::from_millis(100))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert_eq!(delivery.await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn a_dropped_producer_and_dropped_deliveries_still_send() {
    let (cluster, client) = cluster(1, 1).await;
    let producer = client
        .producer()
        .linger(Duration::from_secs(60))
        .build()
        .await
        .unwrap();
    drop(producer.send(record(0, 0)).await.unwrap());
    drop(producer);
    let written = async {
        while cluster.state.lock().values("t", 0) != ["0"] {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), written)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_fenced_producer_ends() {
    let (cluster, client) = cluster(1, 1).await;
    let producer = client.producer().build().await.unwrap();
    cluster.next_produce_faults([Fault::Reject(ErrorReason::FencedProducer)]);
    let error = producer
        .send(record(0, 0))
        .await
        .unwrap()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FencedProducer);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(
        producer.send(record(0, 1)).await.unwrap_err().kind(),
        ErrorKind::FencedProducer
    );
}

#[tokio::test]
async fn a_deleted_topic_fails_its_records() {
    let (cluster, client) = cluster(1, 1).await;
    let producer = client.producer().build().await.unwrap();
    producer.send(record(0, 0)).await.unwrap().await.unwrap();
    cluster.state.lock().topics.remove("t");
    let error = producer
        .send(record(0, 1))
        .await
        .unwrap()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnknownTopic);
    let error = loop {
        match producer.send(record(0, 2)).await {
            Err(error) => break error,
            Ok(delivery) => drop(delivery.await),
        }
    };
    assert_eq!(error.kind(), ErrorKind::UnknownTopic);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tasks_share_one_producer() {
    let (cluster, client) = cluster(2, 10).await;
    let producer = client
        .producer()
        .batch_bytes(2000)
        .max_buffered_bytes(100_000)
        .build()
        .await
        .unwrap();
    let topic: Arc<str> = "t".into();
    let tasks = (0..10).map(|partition| {
        let (producer, topic) = (producer.clone(), topic.clone());
        tokio::spawn(async move {
            for n in 0..2000 {
                let record = Record::to(topic.clone())
                    .partition(partition)
                    .value(n.to_string());
                drop(producer.send(record).await.unwrap());
            }
        })
    });
    join_all(tasks.collect::<Vec<_>>()).await;
    close(producer).await;
    for partition in 0..10 {
        assert_eq!(cluster.state.lock().values("t", partition), numbers(2000));
    }
}

#[tokio::test]
async fn an_unreachable_broker_is_named() {
    let connect = |bootstrap: &str| {
        let builder = Client::builder(bootstrap).connect_timeout(Duration::from_secs(2));
        builder.connect()
    };
    let error = connect("127.0.0.1:1").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Transport);
    let text = error.to_string();
    for once in ["127.0.0.1:1", "connect error", "refused"] {
        assert_eq!(text.matches(once).count(), 1, "{once:?} in {text:?}");
    }
    for invalid in ["", "no address"] {
        let begin = Instant::now();
        let error = connect(invalid).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidRequest, "{invalid:?}");
        assert!(begin.elapsed() < Duration::from_millis(100), "{invalid:?}");
    }
}

#[tokio::test]
async fn a_broker_that_refuses_connections_for_a_second_is_waited_for() {
    let cluster = Cluster::start(1).await;
    let late = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = late.local_addr().unwrap();
    drop(late);
    let target = cluster.address();
    let opening = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(800)).await;
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        while let Ok((mut client, _)) = listener.accept().await {
            let mut broker = tokio::net::TcpStream::connect(&target).await.unwrap();
            tokio::spawn(
                async move { tokio::io::copy_bidirectional(&mut client, &mut broker).await },
            );
        }
    });
    let begin = Instant::now();
    let client = Client::connect(address.to_string()).await.unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(700));
    assert!(client.metadata(&[]).await.is_ok());
    opening.abort();
}

/// A listener whose queue of connections nobody empties: connections open, and nothing is ever answered.
fn hung_broker() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

#[tokio::test]
async fn every_bootstrap_address_is_tried_and_one_that_hangs_does_not_hold_up_the_others() {
    let (cluster, _) = cluster(1, 1).await;
    let (_listener, hung) = hung_broker();
    let bootstrap = format!("127.0.0.1:1,{hung},{}", cluster.address());
    let begin = Instant::now();
    let client = Client::connect(bootstrap).await.unwrap();
    assert_eq!(client.metadata(&["t"]).await.unwrap().topics.len(), 1);
    assert!(
        begin.elapsed() < Duration::from_secs(2),
        "{:?}",
        begin.elapsed()
    );
}
