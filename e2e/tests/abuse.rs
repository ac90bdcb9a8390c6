//! Clients that do not play by the rules: the broker stays within its memory and goes on serving the others.

use std::time::Duration;

use millrace_e2e::{Broker, Refusal, SOON, batch, batch_of, eventually, refusal};
use millrace_proto::v1::{
    FetchFormat, FetchPartition, FetchRequest, GetMetadataRequest, PartitionRecords,
    ProduceRequest, ProduceStreamRequest,
};
use millrace_record::{BatchOptions, Compression};
use prost::Message;
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::json;
use tokio::{net::TcpStream, sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

use crate::raw::{call, connect, framed};

const MIB: u64 = 1 << 20;
const MAX_FETCH: u64 = 8 * MIB;
const BUDGET: u64 = 24 * MIB;
const STALLED: usize = 32;
const UNREAD: usize = 128;

#[tokio::test(flavor = "multi_thread")]
async fn consumers_that_stop_reading_lose_their_connection_and_cost_no_more_than_the_budget() {
    let broker = Broker::setup()
        .topic("t", json!({}))
        .flag("--response-memory", "24MiB")
        .flag("--tail-cache", "8MiB")
        .flag("--write-buffer", "8MiB")
        .start();
    let mut api = broker.api().await;
    for _ in 0..40 {
        let noise: Vec<u8> = std::iter::repeat_with(|| fastrand::u8(..))
            .take(500_000)
            .collect();
        api.append("t", 0, vec![batch([&noise], None), batch([&noise], None)])
            .await
            .unwrap();
    }
    assert_eq!(api.read_all("t", 0, 0).await.len(), 80);
    let before = broker.resident_bytes();

    let from = FetchPartition {
        topic: "t".into(),
        partition: 0,
        offset: 0,
        max_bytes: 0,
    };
    let request = FetchRequest {
        min_bytes: 1,
        partitions: vec![from],
        ..Default::default()
    }
    .encode_to_vec();
    let mut stalled = Vec::new();
    for _ in 0..STALLED {
        let mut sender = connect(broker.address()).await.expect("a connection");
        let request = framed(request.len() as u32, &request);
        // Neither is the response's body read, nor its window ever widened.
        let call = call(&mut sender, "ConsumerService/Fetch", request, true);
        stalled.push((sender, call));
    }
    // Beside the budget: responses being read from disk, and the block cache.
    let limit = 2 * BUDGET + 16 * MIB;
    assert!(
        limit < STALLED as u64 * MAX_FETCH / 2,
        "without a budget it would be far more"
    );
    let closed = || async {
        let grown = broker.resident_bytes().saturating_sub(before);
        assert!(grown < limit, "{} MiB more than before", grown / MIB);
        (broker.metric("millrace_connections") < STALLED as f64).then_some(())
    };
    // Writes are not concerned.
    api.append("t", 0, vec![batch(["in time"], None)])
        .await
        .unwrap();
    eventually(
        "connections are closed that nobody reads from",
        SOON * 2,
        closed,
    )
    .await;
    broker.wait_for_log("its client did not read a response", SOON);
    drop(stalled);
    timeout(SOON, api.fetch("t", 0, 80))
        .await
        .expect("memory comes back with the connections")
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_about_all_topics_that_nobody_reads_cost_no_more_than_the_budget() {
    let mut setup = Broker::setup()
        .topic("small", json!({}))
        .flag("--response-memory", "8MiB");
    for topic in ["a", "b", "c", "d", "e"] {
        setup = setup.topic(topic, json!({ "partitions": 10_000 }));
    }
    let broker = setup.start();
    let mut api = broker.api().await;
    let all = api
        .metadata
        .get_metadata(GetMetadataRequest::default())
        .await
        .unwrap();
    let answer = all.into_inner().encoded_len() as u64;
    let before = broker.resident_bytes();
    let mut stalled = Vec::new();
    for _ in 0..UNREAD {
        let mut sender = connect(broker.address()).await.expect("a connection");
        let call = call(
            &mut sender,
            "MetadataService/GetMetadata",
            framed(0, &[]),
            true,
        );
        stalled.push((sender, call));
    }
    let limit = 24 * MIB;
    assert!(
        limit < UNREAD as u64 * answer / 2,
        "without a budget it would be far more: {answer} bytes each"
    );
    // Three seconds, in which all would have been answered.
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let grown = broker.resident_bytes().saturating_sub(before);
        assert!(grown < limit, "{} MiB more than before", grown / MIB);
        // Who asks for little does not wait.
        assert_eq!(api.offsets("small", 0).await, (0, 0));
    }
    drop(stalled);
    let request = GetMetadataRequest::default();
    timeout(SOON, api.metadata.get_metadata(request))
        .await
        .expect("memory comes back with the connections")
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn producers_that_never_finish_a_message_lose_it_and_cost_no_more_than_the_budget() {
    let broker = Broker::setup()
        .topic("t", json!({}))
        .flag("--request-memory", "32MiB")
        .start();
    let mut api = broker.api().await;
    api.append("t", 0, vec![batch(["a"], None)]).await.unwrap();
    let before = broker.resident_bytes();
    let mut unfinished = Vec::new();
    for number in 0..6 {
        let mut sender = connect(broker.address()).await.expect("a connection");
        let method = ["ProducerService/Produce", "ProducerService/ProduceStream"][number % 2];
        // 8 MiB are announced, 1 MiB comes, and then no more.
        let call = call(
            &mut sender,
            method,
            framed(8 << 20, &vec![0; 1 << 20]),
            false,
        );
        unfinished.push((sender, call));
    }
    // There is room for four of the six; whoever comes later waits, but not for ever.
    let appended = timeout(SOON * 2, api.append("t", 0, vec![batch(["b"], None)])).await;
    assert_eq!(appended.expect("others are served").unwrap().base_offset, 1);
    let grown = broker.resident_bytes().saturating_sub(before);
    assert!(grown < 48 * MIB, "{} MiB more than before", grown / MIB);
    drop(unfinished);
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_claim_gigabytes_are_refused_at_once() {
    let broker = Broker::setup().topic("t", json!({})).start();
    let before = broker.resident_bytes();
    for claimed in [9 << 20, i32::MAX as u32, u32::MAX] {
        let mut sender = connect(broker.address()).await.expect("a connection");
        let (response, _stream) = call(
            &mut sender,
            "ProducerService/Produce",
            framed(claimed, &[7; 1000]),
            false,
        );
        let response = timeout(SOON, response).await.expect("an answer").unwrap();
        let status = match response.headers().get("grpc-status") {
            Some(status) => status.clone(),
            None => timeout(SOON, response.into_body().trailers())
                .await
                .unwrap()
                .unwrap()
                .unwrap()["grpc-status"]
                .clone(),
        };
        // OUT_OF_RANGE is what tonic says to a message beyond the limit.
        assert!(
            ["8", "11"].contains(&status.to_str().unwrap()),
            "a message of {claimed} bytes: status {status:?}"
        );
    }
    let grown = broker.resident_bytes().saturating_sub(before);
    assert!(grown < 16 * MIB, "{} MiB more than before", grown / MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn millions_of_empty_elements_are_refused_before_they_take_memory() {
    let broker = Broker::setup().topic("t", json!({})).start();
    let before = broker.peak_resident_bytes();
    // An empty element is a tag and a length of 0. Metadata requests have a limit of 4 MiB, the others of 8.
    for (method, tag, bytes) in [
        ("ProducerService/Produce", 0x1a, 8 << 20),
        ("ConsumerService/Fetch", 0x2a, 8 << 20),
        ("ConsumerService/ListOffsets", 0x0a, 8 << 20),
        ("MetadataService/GetMetadata", 0x0a, 4 << 20),
    ] {
        let mut sender = connect(broker.address()).await.expect("a connection");
        let message = [tag, 0].repeat(bytes / 2);
        let request = framed(message.len() as u32, &message);
        let (response, _stream) = call(&mut sender, method, request, true);
        let response = timeout(SOON, response).await.expect("an answer").unwrap();
        let status = tonic::Status::from_header_map(response.headers()).expect("a refusal");
        let refused = refusal(&status);
        assert_eq!(
            (refused.code, refused.reason.as_str()),
            (Code::InvalidArgument, "INVALID_REQUEST"),
            "{method}"
        );
        assert!(refused.message.contains("elements"), "{}", refused.message);
    }
    // Twice the largest message; its elements alone would take 320 MiB.
    let grown = broker.peak_resident_bytes() - before;
    assert!(grown < 64 * MIB, "{} MiB at its peak", grown / MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compression_bomb_is_not_inflated() {
    let broker = Broker::setup()
        .topic("t", json!({ "partitions": 2 }))
        .start();
    let mut api = broker.api().await;
    let options = BatchOptions {
        compression: Compression::Zstd,
        ..Default::default()
    };
    let bomb = batch_of([vec![0; 400 << 20]], options);
    assert!(bomb.len() < 1 << 20, "{} bytes", bomb.len());
    api.append("t", 0, vec![bomb.clone()]).await.unwrap();
    api.append("t", 1, vec![batch(["harmless"], None)])
        .await
        .unwrap();
    let before = broker.resident_bytes();
    let at = |partition| FetchPartition {
        topic: "t".into(),
        partition,
        offset: 0,
        max_bytes: 0,
    };
    let format = FetchFormat::Records.into();
    let request = FetchRequest {
        format,
        partitions: vec![at(0), at(1)],
        ..Default::default()
    };
    let results = api
        .consumer
        .fetch(request)
        .await
        .unwrap()
        .into_inner()
        .results;
    let refused = Refusal::from(
        results[0]
            .error
            .clone()
            .expect("it is refused as plain records"),
    );
    assert_eq!(refused.reason, "INVALID_BATCH", "{refused:?}");
    assert_eq!(
        results[1].records.len(),
        1,
        "the other partition is unaffected"
    );
    let grown = broker.resident_bytes().saturating_sub(before);
    assert!(grown < 160 * MIB, "{} MiB more than before", grown / MIB);
    // As a batch it is passed on as it came.
    assert_eq!(
        api.fetch("t", 0, 0).await.unwrap().results[0].batches[0].len(),
        bomb.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_idle_connections_cost_little_and_one_too_many_is_told() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    let count: usize = 3_000;
    let setup = Broker::setup().topic("t", json!({}));
    let broker = setup
        .flag("--max-connections", &(count + 1).to_string())
        .start();
    let mut api = broker.api().await;
    api.append("t", 0, vec![batch(["a"], None)]).await.unwrap();
    let before = broker.resident_bytes();
    let mut idle = Vec::with_capacity(count);
    for number in 0..count {
        idle.push(
            connect(broker.address())
                .await
                .unwrap_or_else(|| panic!("connection {number}")),
        );
    }
    let all_there =
        || async { (broker.metric("millrace_connections") == (count + 1) as f64).then_some(()) };
    eventually("all connections are counted", SOON, all_there).await;
    let each = broker.resident_bytes().saturating_sub(before) / count as u64;
    println!(
        "{each} bytes of memory for each idle connection, {} open files",
        broker.open_files()
    );
    assert!(each < 40_000, "{each} bytes for each idle connection");
    assert!(broker.open_files() > count);
    assert_eq!(
        api.append("t", 0, vec![batch(["b"], None)])
            .await
            .unwrap()
            .base_offset,
        1
    );

    // The operating system accepts it before the broker closes it.
    drop(TcpStream::connect(broker.address()).await.unwrap());
    let refused =
        || async { (broker.metric("millrace_connections_refused_total") == 1.0).then_some(()) };
    eventually("one connection too many is refused", SOON, refused).await;
    broker.wait_for_log("raise --max-connections", SOON);
    drop(idle);
    let gone = || async { (broker.metric("millrace_connections") == 1.0).then_some(()) };
    eventually("closed connections are no longer counted", SOON, gone).await;
    assert_eq!(
        broker
            .api()
            .await
            .append("t", 0, vec![batch(["c"], None)])
            .await
            .unwrap()
            .base_offset,
        2
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_produce_stream_keeps_nothing_of_its_last_message() {
    const STREAMS: u64 = 48;
    const MESSAGE: usize = 6 << 20;
    let broker = Broker::setup().start();
    let before = broker.resident_bytes();
    let noise = "x".repeat(MESSAGE);
    let mut idle = Vec::new();
    for _ in 0..STREAMS {
        // Refused, which is all that matters here: it was received and decoded before that.
        let partition = PartitionRecords {
            topic: "absent".into(),
            batches: vec![noise.clone().into()],
            ..Default::default()
        };
        let request = ProduceStreamRequest {
            request: Some(ProduceRequest {
                partitions: vec![partition],
                ..Default::default()
            }),
            ..Default::default()
        };
        let (sender, requests) = mpsc::channel(1);
        sender.send(request).await.unwrap();
        let mut producer = broker.api().await.producer;
        let answers = producer.produce_stream(ReceiverStream::new(requests)).await;
        let mut answers = answers.unwrap().into_inner();
        let answer = answers.message().await.unwrap().expect("an answer");
        assert_eq!(answer.response.unwrap().results.len(), 1);
        idle.push((sender, answers));
    }
    let held = STREAMS * MESSAGE as u64;
    eventually("the messages' memory is given back", SOON, || async {
        let grown = broker.resident_bytes().saturating_sub(before);
        (grown < held / 4).then_some(())
    })
    .await;
}
