//! Refusals: each with its gRPC code and a machine-readable reason; and the services that every gRPC server should have.

use bytes::{Bytes, BytesMut};
use millrace_e2e::{Api, Broker, Refusal, batch, batch_of, refusal};
use millrace_proto::v1::{
    FetchPartition, FetchRequest, GetMetadataRequest, ListOffsetsRequest, OffsetQuery,
    PartitionRecords, ProduceRequest, Record,
};
use millrace_record::BatchOptions;
use serde_json::json;
use tonic::Code;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

async fn produce(api: &Api, request: ProduceRequest) -> Refusal {
    refusal(&api.producer.clone().produce(request).await.unwrap_err())
}

async fn append(api: &Api, topic: &str, partition: i32, batch: impl Into<Bytes>) -> Refusal {
    refusal(
        &api.clone()
            .append(topic, partition, vec![batch.into()])
            .await
            .unwrap_err(),
    )
}

async fn fetch(api: &Api, offset: i64) -> Refusal {
    refusal(&api.clone().fetch("t", 0, offset).await.unwrap_err())
}

#[track_caller]
fn check(refusal: &Refusal, code: Code, reason: &str, details: &[(&str, &str)]) {
    assert_eq!(
        (refusal.code, refusal.reason.as_str()),
        (code, reason),
        "{refusal:?}"
    );
    for (key, value) in details {
        assert_eq!(refusal.detail(key), *value, "{key} in {refusal:?}");
    }
    assert!(!refusal.message.is_empty());
}

/// A batch with one byte changed.
fn damaged(at: usize) -> Bytes {
    let mut bytes = BytesMut::from(&batch(["some value"], None)[..]);
    bytes[at] ^= 0x55;
    bytes.freeze()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_produce_says_why_in_code_reason_and_details() {
    let spec = json!({ "partitions": 3, "maxMessageBytes": "10KiB" });
    let broker = Broker::setup().topic("t", spec).start();
    let api = broker.api().await;
    let good = || batch(["a"], None);

    let refused = append(&api, "absent", 0, good()).await;
    check(
        &refused,
        Code::NotFound,
        "UNKNOWN_TOPIC",
        &[("topic", "absent")],
    );
    for partition in [3, -1, i32::MAX] {
        let refused = append(&api, "t", partition, good()).await;
        let partition = partition.to_string();
        let details = [
            ("topic", "t"),
            ("partition", partition.as_str()),
            ("partitions", "3"),
        ];
        check(&refused, Code::NotFound, "UNKNOWN_PARTITION", &details);
    }
    let large = batch(["x".repeat(11_000)], None);
    let refused = append(&api, "t", 1, large.clone()).await;
    let size = large.len().to_string();
    let details = [
        ("topic", "t"),
        ("partition", "1"),
        ("size_bytes", size.as_str()),
        ("max_bytes", "10240"),
    ];
    check(
        &refused,
        Code::InvalidArgument,
        "RECORD_TOO_LARGE",
        &details,
    );

    // Byte 8 begins the length, 16 is the format version, 17 begins the checksum, the last one is in the records.
    let end = good().len() - 1;
    for at in [17, end] {
        let refused = append(&api, "t", 0, damaged(at)).await;
        check(
            &refused,
            Code::InvalidArgument,
            "CORRUPT_BATCH",
            &[("topic", "t"), ("partition", "0")],
        );
        let (expected, actual) = (refused.detail("expected_crc"), refused.detail("actual_crc"));
        assert!(!expected.is_empty() && expected != actual, "{refused:?}");
    }
    let control = batch_of(
        ["a"],
        BatchOptions {
            control: true,
            ..Default::default()
        },
    );
    let two = [good(), good()].concat();
    let invalid: [(&str, Bytes); 7] = [
        ("empty", Bytes::new()),
        ("truncated", good().slice(..end)),
        ("header only", good().slice(..61)),
        ("length", damaged(8)),
        ("format version", damaged(16)),
        ("control batch", control),
        ("two in one field", two.into()),
    ];
    for (what, bytes) in invalid {
        let refused = append(&api, "t", 0, bytes).await;
        assert_eq!(refused.reason, "INVALID_BATCH", "{what}: {refused:?}");
        check(
            &refused,
            Code::InvalidArgument,
            "INVALID_BATCH",
            &[("topic", "t"), ("partition", "0")],
        );
    }

    let to = |batches, records| PartitionRecords {
        topic: "t".into(),
        partition: 0,
        batches,
        records,
    };
    let requests = [
        ("partitions", ProduceRequest::default()),
        (
            "partitions",
            ProduceRequest {
                partitions: vec![to(vec![], vec![])],
                ..Default::default()
            },
        ),
        (
            "partitions",
            ProduceRequest {
                partitions: vec![to(vec![good()], vec![Record::default()])],
                ..Default::default()
            },
        ),
        (
            "partitions",
            ProduceRequest {
                partitions: vec![to(vec![good()], vec![]); 10_001],
                ..Default::default()
            },
        ),
        (
            "acks",
            ProduceRequest {
                acks: 9,
                partitions: vec![to(vec![good()], vec![])],
                ..Default::default()
            },
        ),
    ];
    for (field, request) in requests {
        check(
            &produce(&api, request).await,
            Code::InvalidArgument,
            "INVALID_REQUEST",
            &[("field", field)],
        );
    }

    // All or none of one partition's batches; other partitions of the request are unaffected.
    let half_wrong = PartitionRecords {
        batches: vec![good(), damaged(end)],
        ..to(vec![], vec![])
    };
    let right = PartitionRecords {
        partition: 2,
        ..to(vec![good()], vec![])
    };
    let request = ProduceRequest {
        partitions: vec![half_wrong, right],
        ..Default::default()
    };
    let results = api
        .producer
        .clone()
        .produce(request)
        .await
        .unwrap()
        .into_inner()
        .results;
    let refused = Refusal::from(results[0].error.clone().unwrap());
    assert_eq!(
        (refused.reason.as_str(), results[1].base_offset),
        ("CORRUPT_BATCH", 0)
    );
    let mut api = api;
    assert_eq!(
        api.offsets("t", 0).await,
        (0, 0),
        "nothing that was refused is in the log"
    );
    assert_eq!(api.offsets("t", 2).await, (0, 1));
    assert!(broker.metric("millrace_errors_total{reason=\"CORRUPT_BATCH\"}") >= 3.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_fetch_or_search_says_why_in_code_reason_and_details() {
    let broker = Broker::setup().topic("t", json!({})).start();
    let mut api = broker.api().await;
    api.append("t", 0, vec![batch(["a", "b", "c"], None)])
        .await
        .unwrap();
    for offset in [-1, 4, i64::MAX, i64::MIN] {
        let text = offset.to_string();
        let details = [
            ("offset", text.as_str()),
            ("log_start_offset", "0"),
            ("high_watermark", "3"),
            ("partition", "0"),
        ];
        check(
            &fetch(&api, offset).await,
            Code::OutOfRange,
            "OFFSET_OUT_OF_RANGE",
            &details,
        );
    }
    let at = |topic: &str, partition| FetchPartition {
        topic: topic.into(),
        partition,
        offset: 0,
        max_bytes: 0,
    };
    let cases = [
        (vec![at("absent", 0)], 0, Code::NotFound, "UNKNOWN_TOPIC"),
        (vec![at("t", 1)], 0, Code::NotFound, "UNKNOWN_PARTITION"),
        (vec![], 0, Code::InvalidArgument, "INVALID_REQUEST"),
        (
            vec![at("t", 0)],
            7,
            Code::InvalidArgument,
            "INVALID_REQUEST",
        ),
    ];
    for (partitions, format, code, reason) in cases {
        let request = FetchRequest {
            partitions,
            format,
            min_bytes: 1,
            max_wait_ms: 60_000,
            ..Default::default()
        };
        check(
            &refusal(&api.consumer.fetch(request).await.unwrap_err()),
            code,
            reason,
            &[],
        );
    }
    // One bad partition does not keep the others waiting, nor does it hide them.
    let request = FetchRequest {
        partitions: vec![at("absent", 0), at("t", 0)],
        ..Default::default()
    };
    let results = api
        .consumer
        .fetch(request)
        .await
        .unwrap()
        .into_inner()
        .results;
    assert_eq!(
        Refusal::from(results[0].error.clone().unwrap()).reason,
        "UNKNOWN_TOPIC"
    );
    assert_eq!(results[1].batches.len(), 1);

    let query = OffsetQuery {
        topic: "t".into(),
        partition: 0,
        spec: None,
    };
    let refused = api
        .consumer
        .list_offsets(ListOffsetsRequest {
            queries: vec![query],
            ..ListOffsetsRequest::default()
        })
        .await
        .unwrap_err();
    check(
        &refusal(&refused),
        Code::InvalidArgument,
        "INVALID_REQUEST",
        &[("field", "spec")],
    );

    let request = GetMetadataRequest {
        topics: vec!["t".into(), "absent".into()],
    };
    let topics = api
        .metadata
        .get_metadata(request)
        .await
        .unwrap()
        .into_inner()
        .topics;
    assert_eq!(
        (topics[0].error.is_none(), topics[0].partitions.len()),
        (true, 1)
    );
    assert_eq!(
        Refusal::from(topics[1].error.clone().unwrap()).reason,
        "UNKNOWN_TOPIC"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_answer_as_grpc_tools_expect() {
    let broker = Broker::setup().start();
    let channel = broker.api().await.channel;
    let mut health = HealthClient::new(channel.clone());
    for service in [
        "",
        "millrace.v1.ProducerService",
        "millrace.v1.ConsumerService",
        "millrace.v1.MetadataService",
    ] {
        let request = HealthCheckRequest {
            service: service.into(),
        };
        let status = health.check(request).await.unwrap().into_inner().status;
        assert_eq!(status, ServingStatus::Serving as i32, "{service:?}");
    }

    let ask = |message| ServerReflectionRequest {
        host: String::new(),
        message_request: Some(message),
    };
    let requests = futures::stream::iter([
        ask(MessageRequest::ListServices(String::new())),
        ask(MessageRequest::FileContainingSymbol(
            "millrace.v1.ProducerService".into(),
        )),
    ]);
    let mut reflection = ServerReflectionClient::new(channel);
    let mut answers = reflection
        .server_reflection_info(requests)
        .await
        .unwrap()
        .into_inner();
    let mut next = async || {
        answers
            .message()
            .await
            .unwrap()
            .unwrap()
            .message_response
            .unwrap()
    };
    let MessageResponse::ListServicesResponse(list) = next().await else {
        panic!("not a list of services")
    };
    let names: Vec<&str> = list
        .service
        .iter()
        .map(|service| service.name.as_str())
        .collect();
    for service in ["ProducerService", "ConsumerService", "MetadataService"] {
        assert!(
            names.contains(&format!("millrace.v1.{service}").as_str()),
            "{service} in {names:?}"
        );
    }
    let MessageResponse::FileDescriptorResponse(files) = next().await else {
        panic!("not a file")
    };
    assert!(
        files
            .file_descriptor_proto
            .iter()
            .any(|file| file.windows(13).any(|w| w == b"ProduceStream"))
    );
}
