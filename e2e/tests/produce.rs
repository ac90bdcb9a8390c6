//! Produce through the gRPC API.

use std::collections::HashMap;

use bytes::Bytes;
use millrace_e2e::{Broker, Refusal, SOON, batch, batch_of, refusal};
use millrace_proto::v1::{
    Acks, FetchFormat, FetchPartition, FetchRequest, Header, InitProducerRequest, PartitionRecords,
    ProduceRequest, ProduceStreamRequest, Record,
};
use millrace_record::{BatchHeader, BatchOptions, Compression, ProducerState, TimestampType};
use serde_json::json;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

fn to(topic: &str, partition: i32, batches: Vec<Bytes>) -> PartitionRecords {
    PartitionRecords {
        topic: topic.to_owned(),
        partition,
        batches,
        records: Vec::new(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_level_of_acks_appends_and_all_but_none_tell_the_offset() {
    let broker = Broker::setup().topic("t", json!({})).start();
    let mut api = broker.api().await;
    for (acks, base_offset) in [
        (Acks::Unspecified, 0),
        (Acks::Leader, 2),
        (Acks::All, 4),
        (Acks::None, -1),
    ] {
        let partitions = vec![to("t", 0, vec![batch(["a", "b"], None)])];
        let request = ProduceRequest {
            acks: acks.into(),
            partitions,
            timeout_ms: 0,
        };
        let answer = api.producer.produce(request).await.unwrap().into_inner();
        assert_eq!(answer.results[0].base_offset, base_offset, "{acks:?}");
        assert_eq!(answer.results[0].error, None);
    }
    let from = FetchPartition {
        topic: "t".into(),
        partition: 0,
        offset: 6,
        max_bytes: 0,
    };
    let request = FetchRequest {
        min_bytes: 1,
        max_wait_ms: 30_000,
        partitions: vec![from],
        ..Default::default()
    };
    let answer = api.consumer.fetch(request).await.unwrap().into_inner();
    assert_eq!(
        answer.results[0].high_watermark, 8,
        "what was sent with acks=0 arrives all the same"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_appends_to_many_partitions_and_each_failed_one_says_why() {
    let broker = Broker::setup()
        .topic("many", json!({ "partitions": 50 }))
        .topic("t", json!({}))
        .start();
    let mut api = broker.api().await;
    let mut partitions: Vec<_> = (0..50)
        .rev()
        .map(|p| to("many", p, vec![batch([format!("{p}")], None)]))
        .collect();
    partitions.insert(10, to("absent", 0, vec![batch(["x"], None)]));
    partitions.insert(20, to("many", 50, vec![batch(["x"], None)]));
    partitions.push(to(
        "t",
        0,
        vec![batch(["1", "2"], None), batch(["3"], None)],
    ));
    let asked: Vec<_> = partitions
        .iter()
        .map(|p| (p.topic.clone(), p.partition))
        .collect();
    let request = ProduceRequest {
        partitions,
        ..Default::default()
    };
    let results = api
        .producer
        .produce(request)
        .await
        .unwrap()
        .into_inner()
        .results;
    let answered: Vec<_> = results
        .iter()
        .map(|r| (r.topic.clone(), r.partition))
        .collect();
    assert_eq!(answered, asked, "results come in the order of the request");
    for (index, result) in results.into_iter().enumerate() {
        let reason = result.error.map(|error| Refusal::from(error).reason);
        let expected = match index {
            10 => (-1, Some("UNKNOWN_TOPIC".to_owned())),
            20 => (-1, Some("UNKNOWN_PARTITION".to_owned())),
            _ => (0, None),
        };
        assert_eq!((result.base_offset, reason), expected, "entry {index}");
    }
    for partition in 0..50 {
        let records = api.read_all("many", partition, 0).await;
        assert_eq!(records.len(), 1);
        assert_eq!(
            records[0].value.as_deref(),
            Some(format!("{partition}").as_bytes())
        );
    }
    assert_eq!(
        api.read_all("t", 0, 0).await.len(),
        3,
        "several batches for one partition"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_pipelined_keeps_each_partitions_order_and_survives_refusals() {
    const REQUESTS: u64 = 600;
    let broker = Broker::setup()
        .topic("t", json!({ "partitions": 3 }))
        .start();
    let mut api = broker.api().await;
    let (sender, requests) = tokio::sync::mpsc::channel(REQUESTS as usize);
    let mut answers = api
        .producer
        .produce_stream(ReceiverStream::new(requests))
        .await
        .unwrap()
        .into_inner();
    // All are under way before the first answer is read.
    for id in 0..REQUESTS {
        let partition = (id % 3) as i32;
        let partitions = match id {
            100 => vec![to("absent", 0, vec![batch(["x"], None)])],
            200 => vec![],
            _ => vec![to("t", partition, vec![batch([format!("{id}")], None)])],
        };
        let request = Some(ProduceRequest {
            partitions,
            ..Default::default()
        });
        sender
            .send(ProduceStreamRequest {
                correlation_id: id,
                request,
            })
            .await
            .unwrap();
    }
    drop(sender);
    let mut offsets = HashMap::new();
    let mut refused = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        let whole = answer.error.map(Refusal::from);
        let part = answer
            .response
            .map(|response| response.results.into_iter().next().unwrap());
        match (whole, part) {
            (Some(error), None) => refused.push((answer.correlation_id, error.reason)),
            (None, Some(result)) => match result.error {
                Some(error) => refused.push((answer.correlation_id, Refusal::from(error).reason)),
                None => assert_eq!(
                    offsets.insert(answer.correlation_id, result.base_offset),
                    None
                ),
            },
            other => panic!("an answer has either results or an error: {other:?}"),
        }
    }
    refused.sort();
    assert_eq!(
        refused,
        [
            (100, "UNKNOWN_TOPIC".to_owned()),
            (200, "INVALID_REQUEST".to_owned())
        ]
    );
    assert_eq!(offsets.len() as u64, REQUESTS - 2);
    for partition in 0..3 {
        let records = api.read_all("t", partition, 0).await;
        let ids: Vec<u64> = records
            .iter()
            .map(|r| {
                String::from_utf8_lossy(r.value.as_ref().unwrap())
                    .parse()
                    .unwrap()
            })
            .collect();
        assert!(
            ids.is_sorted(),
            "partition {partition} keeps the order of the stream"
        );
        for (offset, id) in ids.iter().enumerate() {
            assert_eq!(offsets[id], offset as i64);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_records_go_in_and_come_out_as_they_are() {
    let broker = Broker::setup().topic("t", json!({})).start();
    let mut api = broker.api().await;
    let bytes = |bytes: &'static [u8]| Some(Bytes::from_static(bytes));
    let header = |key: &str, value: Option<Bytes>| Header {
        key: key.into(),
        value,
    };
    let record = |key, value, timestamp_ms| Record {
        key,
        value,
        timestamp_ms,
        ..Default::default()
    };
    let mut records = vec![
        record(bytes(b"key"), bytes(b"value"), Some(1_700_000_000_000)),
        record(None, bytes(b"null key"), Some(1)),
        record(bytes(b""), bytes(b"empty key"), Some(2)),
        record(bytes(b"null value"), None, Some(0)),
        record(bytes(b"empty value"), bytes(b""), Some(-1)),
        record(None, None, Some(1_700_000_000_001)),
        record(bytes(b"\x00\xff"), bytes(b"\xfe\x00\n"), Some(5)),
    ];
    records[0].headers = vec![
        header("a", bytes(b"1")),
        header("a", None),
        header("", bytes(b"")),
        header("ü", bytes(b"\xff")),
    ];
    let partitions = vec![PartitionRecords {
        topic: "t".into(),
        records: records.clone(),
        ..Default::default()
    }];
    api.producer
        .produce(ProduceRequest {
            partitions,
            ..Default::default()
        })
        .await
        .unwrap();
    for (offset, record) in records.iter_mut().enumerate() {
        record.offset = offset as i64;
    }
    for from in [0, 3, 6] {
        let partition = FetchPartition {
            topic: "t".into(),
            partition: 0,
            offset: from,
            max_bytes: 0,
        };
        let format = FetchFormat::Records.into();
        let request = FetchRequest {
            format,
            partitions: vec![partition],
            ..Default::default()
        };
        let answer = api.consumer.fetch(request).await.unwrap().into_inner();
        assert_eq!(
            answer.results[0].records,
            records[from as usize..],
            "from exactly the offset asked for"
        );
        assert!(answer.results[0].batches.is_empty());
    }
    // The same through batches.
    let read = api.read_all("t", 0, 0).await;
    for (read, sent) in read.iter().zip(&records) {
        assert_eq!(
            (&read.key, &read.value, Some(read.timestamp_ms)),
            (&sent.key, &sent.value, sent.timestamp_ms)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_of_every_compression_are_stored_as_sent_and_readable_as_plain_records() {
    let broker = Broker::setup().topic("t", json!({})).start();
    let mut api = broker.api().await;
    let codecs = [
        Compression::None,
        Compression::Gzip,
        Compression::Snappy,
        Compression::Lz4,
        Compression::Zstd,
    ];
    let values: Vec<String> = (0..500)
        .map(|i| format!("value {i} of many that look alike"))
        .collect();
    for (index, compression) in codecs.into_iter().enumerate() {
        let sent = batch_of(
            &values,
            BatchOptions {
                compression,
                ..Default::default()
            },
        );
        let offset = index as i64 * 500;
        assert_eq!(
            api.append("t", 0, vec![sent.clone()])
                .await
                .unwrap()
                .base_offset,
            offset
        );
        let stored = api
            .fetch("t", 0, offset)
            .await
            .unwrap()
            .results
            .remove(0)
            .batches
            .remove(0);
        let header = BatchHeader::parse(&stored).unwrap();
        assert_eq!(
            (header.base_offset, header.attributes.compression()),
            (offset, compression)
        );
        // All but base offset (8 bytes), length (4) and leader epoch (4).
        assert_eq!(
            stored[16..],
            sent[16..],
            "{compression}: not a byte is changed"
        );
        let from = FetchPartition {
            topic: "t".into(),
            partition: 0,
            offset: offset + 498,
            max_bytes: 0,
        };
        let format = FetchFormat::Records.into();
        let request = FetchRequest {
            format,
            partitions: vec![from],
            ..Default::default()
        };
        let records = api
            .consumer
            .fetch(request)
            .await
            .unwrap()
            .into_inner()
            .results
            .remove(0)
            .records;
        let read: Vec<_> = records
            .iter()
            .map(|r| (r.offset, r.value.as_deref().unwrap()))
            .collect();
        assert_eq!(
            read,
            [
                (offset + 498, values[498].as_bytes()),
                (offset + 499, values[499].as_bytes())
            ]
        );
    }
    assert_eq!(api.read_all("t", 0, 0).await.len(), 2_500);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topic_with_log_append_time_stamps_records_with_the_brokers_clock() {
    let broker = Broker::setup()
        .topic("stamped", json!({ "timestampType": "LogAppendTime" }))
        .start();
    let mut api = broker.api().await;
    let record = |ms| Record {
        value: Some("v".into()),
        timestamp_ms: Some(ms),
        ..Default::default()
    };
    let records = vec![record(1), record(2)];
    let partitions = vec![PartitionRecords {
        topic: "stamped".into(),
        records,
        ..Default::default()
    }];
    let answer = api
        .producer
        .produce(ProduceRequest {
            partitions,
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    let stamp = answer.results[0].log_append_time_ms.expect("a time");
    assert!(stamp > 1_600_000_000_000, "{stamp}");
    for record in api.read_all("stamped", 0, 0).await {
        assert_eq!(record.timestamp_ms, stamp);
    }
    for compression in [Compression::None, Compression::Zstd] {
        let sent = batch_of(
            ["a", "b"],
            BatchOptions {
                compression,
                ..Default::default()
            },
        );
        let result = api.append("stamped", 0, vec![sent]).await.unwrap();
        let stored = api
            .fetch("stamped", 0, result.base_offset)
            .await
            .unwrap()
            .results
            .remove(0)
            .batches
            .remove(0);
        let header =
            millrace_record::validate(&stored).expect("the checksum covers the new timestamp");
        assert_eq!(
            header.attributes.timestamp_type(),
            TimestampType::LogAppendTime
        );
        assert_eq!(Some(header.max_timestamp), result.log_append_time_ms);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_sent_again_gets_its_first_offset_and_a_gap_is_refused_also_after_restarts() {
    let mut broker = Broker::setup()
        .topic("t", json!({ "partitions": 2 }))
        .flag("--write-buffer", "1MiB")
        .start();
    let mut api = broker.api().await;
    let id = api
        .producer
        .init_producer(InitProducerRequest {})
        .await
        .unwrap()
        .into_inner()
        .producer_id;
    let other = api
        .producer
        .init_producer(InitProducerRequest {})
        .await
        .unwrap()
        .into_inner()
        .producer_id;
    assert_ne!(id, other);
    let of = |epoch, base_sequence| {
        batch(
            ["a", "b", "c"],
            Some(ProducerState {
                id,
                epoch,
                base_sequence,
            }),
        )
    };
    for round in 0..5 {
        assert_eq!(
            api.append("t", 0, vec![of(0, round * 3)])
                .await
                .unwrap()
                .base_offset,
            i64::from(round * 3)
        );
    }
    for restart in ["none", "SIGTERM", "kill -9"] {
        match restart {
            "SIGTERM" => drop(broker.terminate()),
            "kill -9" => broker.kill_9(),
            _ => {}
        }
        if restart != "none" {
            broker.restart();
            api = broker.api().await;
        }
        for round in 0..5 {
            let again = api.append("t", 0, vec![of(0, round * 3)]).await.unwrap();
            assert_eq!(
                again.base_offset,
                i64::from(round * 3),
                "after restart: {restart}"
            );
        }
        let gap = refusal(&api.append("t", 0, vec![of(0, 18)]).await.unwrap_err());
        assert_eq!(
            (gap.code, gap.reason.as_str()),
            (Code::FailedPrecondition, "OUT_OF_ORDER_SEQUENCE")
        );
        assert_eq!(
            (gap.detail("expected_sequence"), gap.detail("sequence")),
            ("15", "18")
        );
        assert_eq!(gap.detail("producer_id"), id.to_string());
        assert_eq!(api.offsets("t", 0).await, (0, 15), "nothing was appended");
        let fresh = api
            .producer
            .init_producer(InitProducerRequest {})
            .await
            .unwrap()
            .into_inner()
            .producer_id;
        assert!(
            fresh >= 0 && fresh != id && fresh != other,
            "a producer id is never given out twice"
        );
    }
    assert_eq!(
        api.append("t", 0, vec![of(0, 15)])
            .await
            .unwrap()
            .base_offset,
        15,
        "and the sequence goes on"
    );
    assert_eq!(
        api.append("t", 1, vec![of(0, 0)])
            .await
            .unwrap()
            .base_offset,
        0,
        "each partition counts for itself"
    );
    assert_eq!(
        api.append("t", 0, vec![of(1, 0)])
            .await
            .unwrap()
            .base_offset,
        18,
        "a new epoch begins at zero"
    );
    let fenced = refusal(&api.append("t", 0, vec![of(0, 18)]).await.unwrap_err());
    assert_eq!(
        (fenced.code, fenced.reason.as_str()),
        (Code::Aborted, "FENCED_PRODUCER")
    );
    assert_eq!(
        (
            fenced.detail("producer_epoch"),
            fenced.detail("current_epoch")
        ),
        ("0", "1")
    );
    for round in 1..10 {
        api.append("t", 0, vec![of(1, round * 3)]).await.unwrap();
    }
    let old = refusal(&api.append("t", 0, vec![of(1, 3)]).await.unwrap_err());
    assert_eq!(
        (old.code, old.reason.as_str()),
        (Code::AlreadyExists, "DUPLICATE_SEQUENCE")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_sends_what_it_is_given_and_reads_it_back() {
    use futures::StreamExt;
    use millrace_client::{Record, StartFrom};
    let broker = Broker::setup()
        .topic("t", json!({ "partitions": 4 }))
        .start();
    let client = broker.client().await;
    for compression in [Compression::None, Compression::Lz4] {
        let producer = client
            .producer()
            .compression(compression)
            .build()
            .await
            .unwrap();
        let mut deliveries = Vec::new();
        for i in 0..10_000 {
            let record = Record::to("t")
                .key(format!("key {}", i % 100))
                .value(format!("{compression} {i}"))
                .header("i", i.to_string());
            deliveries.push(producer.send(record).await.unwrap());
        }
        for delivery in deliveries {
            assert!(delivery.await.unwrap().offset >= 0);
        }
        producer.close(SOON).await.unwrap();
    }
    let mut consumer = client
        .consumer()
        .topic("t")
        .start(StartFrom::Earliest)
        .build()
        .await
        .unwrap();
    let mut last: HashMap<(Bytes, String), usize> = HashMap::new();
    for _ in 0..20_000 {
        let consumed = tokio::time::timeout(SOON, consumer.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        let record = consumed.record;
        let value = String::from_utf8(record.value.unwrap().to_vec()).unwrap();
        let (compression, i) = value.split_once(' ').unwrap();
        let i: usize = i.parse().unwrap();
        assert_eq!(
            record.headers[0].value.as_deref(),
            Some(i.to_string().as_bytes())
        );
        let before = last.insert((record.key.unwrap(), compression.to_owned()), i);
        assert_eq!(
            before.map_or(i % 100, |before| before + 100),
            i,
            "the records of a key come in order, each once"
        );
    }
    assert_eq!(last.len(), 200);
    assert!(last.values().all(|i| *i >= 9_900), "and none is missing");
}
