//! Transactions through the client, against a broker: all or nothing, whoever is killed.

use std::collections::BTreeMap;
use std::time::Duration;

use millrace_client::{
    Client, Consumer, ErrorKind, Isolation, OffsetSpec, Record, StartFrom, TransactionState,
    TransactionalProducer,
};
use millrace_e2e::{Broker, SOON, refusal};
use millrace_proto::v1::{
    AddPartitionsRequest, EndTransactionRequest, FetchFormat, FetchPartition, FetchRequest,
    InitTransactionsRequest, TopicPartitions, transaction_service_client::TransactionServiceClient,
};
use serde_json::json;
use tokio::time::timeout;

async fn start() -> Broker {
    Broker::setup()
        .topic("in", json!({ "partitions": 2 }))
        .topic("out", json!({ "partitions": 3 }))
        .start()
}

async fn producer(client: &Client, id: &str) -> TransactionalProducer {
    client.producer().build_transactional(id).await.unwrap()
}

/// Reads a topic until nothing has come for a while: the values, by partition.
async fn read(client: &Client, topic: &str, isolation: Isolation) -> BTreeMap<i32, Vec<String>> {
    let consumer = client.consumer().topic(topic).isolation(isolation);
    let mut consumer = consumer.start(StartFrom::Earliest).build().await.unwrap();
    let mut values: BTreeMap<i32, Vec<String>> = BTreeMap::new();
    while let Ok(record) = timeout(Duration::from_millis(700), consumer.next_record()).await {
        let record = record.unwrap().unwrap();
        let value = String::from_utf8(record.record.value.unwrap().to_vec()).unwrap();
        values.entry(record.partition).or_default().push(value);
    }
    values
}

fn sorted(values: &BTreeMap<i32, Vec<String>>) -> Vec<&str> {
    let mut all: Vec<&str> = values.values().flatten().map(String::as_str).collect();
    all.sort_unstable();
    all
}

fn record(partition: i32, value: &str) -> Record {
    Record::to("out")
        .partition(partition)
        .value(value.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_committed_records_see_all_of_a_transaction_or_nothing() {
    let broker = start().await;
    let client = broker.client().await;
    let mut producer = producer(&client, "p").await;
    let first = producer.begin().await.unwrap();
    for partition in 0..3 {
        first.send(record(partition, "a")).await.unwrap();
    }
    first.commit().await.unwrap();
    let second = producer.begin().await.unwrap();
    for partition in 0..3 {
        second.send(record(partition, "b")).await.unwrap();
        // What is open is in the log, and hidden.
        second
            .send_tracked(record(partition, "c"))
            .await
            .unwrap()
            .await
            .unwrap();
    }
    let plain = client.producer().build().await.unwrap();
    plain.send(record(0, "plain")).await.unwrap().await.unwrap();
    let committed = read(&client, "out", Isolation::ReadCommitted).await;
    assert_eq!(sorted(&committed), ["a", "a", "a"]);
    let all = read(&client, "out", Isolation::ReadUncommitted).await;
    assert_eq!(all.values().map(Vec::len).sum::<usize>(), 10);
    let latest = client
        .list_offset("out", 0, OffsetSpec::Latest)
        .await
        .unwrap();
    // The record and its marker.
    assert_eq!(latest.unwrap().offset, 2);
    second.abort().await.unwrap();
    let third = producer.begin().await.unwrap();
    third.send(record(1, "d")).await.unwrap();
    third.commit().await.unwrap();
    let committed = read(&client, "out", Isolation::ReadCommitted).await;
    assert_eq!(committed[&0], ["a", "plain"]);
    assert_eq!(committed[&1], ["a", "d"]);
    assert_eq!(committed[&2], ["a"]);
    let all = read(&client, "out", Isolation::ReadUncommitted).await;
    assert_eq!(all[&1], ["a", "b", "c", "d"]);
    let known = client.transactions().await.unwrap();
    assert_eq!(known.len(), 1);
    assert_eq!(known[0].transactional_id, "p");
}

#[tokio::test(flavor = "multi_thread")]
async fn aborted_records_stay_hidden_after_a_kill_and_when_read_from_the_middle() {
    let mut broker = start().await;
    let client = broker.client().await;
    let mut producer = producer(&client, "p").await;
    for round in 0..20 {
        let transaction = producer.begin().await.unwrap();
        for value in 0..5 {
            let value = format!("{round}/{value}");
            let sent = transaction.send_tracked(record(0, &value)).await.unwrap();
            // What is aborted is in the log, too.
            sent.await.unwrap();
        }
        match round % 2 {
            0 => transaction.commit().await.unwrap(),
            _ => transaction.abort().await.unwrap(),
        }
    }
    // A commit is settled before everyone has been told: wait until the last one has.
    let expected: Vec<String> = (0..20)
        .step_by(2)
        .flat_map(|round| (0..5).map(move |value| format!("{round}/{value}")))
        .collect();
    for _ in 0..2 {
        let committed = read(&client, "out", Isolation::ReadCommitted).await;
        assert_eq!(committed[&0], expected);
        broker.kill_9();
        broker.restart();
    }
    // From each offset on: each transaction has its records and a marker.
    let api = broker.api().await;
    for offset in 0..120 {
        let response = api
            .consumer
            .clone()
            .fetch(FetchRequest {
                format: FetchFormat::Records.into(),
                partitions: vec![FetchPartition {
                    topic: "out".to_owned(),
                    partition: 0,
                    offset,
                    max_bytes: 0,
                }],
                ..FetchRequest::default()
            })
            .await
            .unwrap()
            .into_inner();
        let result = &response.results[0];
        for record in &result.records {
            let value = String::from_utf8(record.value.clone().unwrap().to_vec()).unwrap();
            let round: u32 = value.split_once('/').unwrap().0.parse().unwrap();
            assert!(
                record.offset >= offset && round.is_multiple_of(2),
                "{value} at {offset}"
            );
        }
        let last = result
            .records
            .last()
            .map_or(offset, |record| record.offset + 1);
        // Whatever comes last, a reader gets on.
        assert!(result.next_offset.unwrap_or(last) > offset || last > offset);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_taken_over_is_fenced_and_what_it_had_open_is_aborted() {
    let broker = start().await;
    let client = broker.client().await;
    let mut old = producer(&client, "p").await;
    let transaction = old.begin().await.unwrap();
    transaction
        .send_tracked(record(0, "old"))
        .await
        .unwrap()
        .await
        .unwrap();
    let mut new = producer(&client, "p").await;
    let failed = transaction.commit().await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::FencedProducer, "{failed}");
    // It can't take over again by going on.
    let failed = old.begin().await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::FencedProducer, "{failed}");
    let transaction = new.begin().await.unwrap();
    transaction.send(record(0, "new")).await.unwrap();
    transaction.commit().await.unwrap();
    let committed = read(&client, "out", Isolation::ReadCommitted).await;
    assert_eq!(sorted(&committed), ["new"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_is_left_open_is_aborted_in_time() {
    let broker = start().await;
    let client = broker.client().await;
    let builder = client
        .producer()
        .transaction_timeout(Duration::from_secs(1));
    let mut producer = builder.build_transactional("p").await.unwrap();
    let transaction = producer.begin().await.unwrap();
    transaction
        .send_tracked(record(0, "late"))
        .await
        .unwrap()
        .await
        .unwrap();
    let open = client.transactions().await.unwrap();
    assert_eq!(open[0].state, TransactionState::Open);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let failed = transaction.commit().await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::TransactionAborted, "{failed}");
    // It goes on.
    let transaction = producer.begin().await.unwrap();
    transaction.send(record(0, "next")).await.unwrap();
    transaction.commit().await.unwrap();
    let committed = read(&client, "out", Isolation::ReadCommitted).await;
    assert_eq!(sorted(&committed), ["next"]);
    // The same for one that was dropped.
    let transaction = producer.begin().await.unwrap();
    transaction.send(record(0, "dropped")).await.unwrap();
    drop(transaction);
    let transaction = producer.begin().await.unwrap();
    transaction.send(record(0, "last")).await.unwrap();
    transaction.commit().await.unwrap();
    let committed = read(&client, "out", Isolation::ReadCommitted).await;
    assert_eq!(sorted(&committed), ["last", "next"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_aborts_the_transaction_of_an_app_that_hangs() {
    let broker = start().await;
    let client = broker.client().await;
    let mut producer = producer(&client, "p").await;
    let abort = ["transactions", "abort", "p"];
    let refused = broker.cli().run(&abort);
    assert_ne!(refused.code, Some(0));
    let told = refused.stderr;
    assert!(told.contains("has no open transaction"), "{told}");
    let transaction = producer.begin().await.unwrap();
    let sent = transaction.send_tracked(record(0, "lost")).await.unwrap();
    sent.await.unwrap();
    broker.cli().run(&abort).success();
    let failed = transaction.commit().await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::TransactionAborted, "{failed}");
    let transaction = producer.begin().await.unwrap();
    transaction.send(record(0, "next")).await.unwrap();
    transaction.commit().await.unwrap();
    let committed = read(&client, "out", Isolation::ReadCommitted).await;
    assert_eq!(sorted(&committed), ["next"]);
    let unknown = ["transactions", "abort", "q"];
    let told = broker.cli().run(&unknown).stderr;
    assert!(told.contains("there is no transactional id `q`"), "{told}");
}

/// A transaction that has returned records of a partition when that goes to another member does not commit them: the other one reads them, too.
#[tokio::test(flavor = "multi_thread")]
async fn what_goes_to_another_member_in_between_is_not_committed_twice() {
    let broker = start().await;
    let client = broker.client().await;
    let plain = client.producer().build().await.unwrap();
    for value in 0..10 {
        let record = Record::to("in")
            .partition(value % 2)
            .value(value.to_string());
        plain.send(record).await.unwrap().await.unwrap();
    }
    let mut consumer = member(&client).await;
    for _ in 0..10 {
        consumer.next_record().await.unwrap().unwrap();
    }
    let mut producer = producer(&client, "p").await;
    let transaction = producer.begin().await.unwrap();
    transaction.send(record(0, "x")).await.unwrap();
    let mut other = member(&client).await;
    // One of the two partitions is taken, which shows only if the consumer is asked for more.
    while consumer.assignment().len() == 2 {
        let _ = timeout(Duration::from_millis(50), consumer.next_record()).await;
    }
    let refused = transaction.send_offsets(&mut consumer).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotOwner, "{refused}");
    let failed = transaction.commit().await.unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::NotOwner, "{failed}");
    consumer.rewind().await.unwrap();
    for member in [&mut consumer, &mut other] {
        for _ in 0..5 {
            let record = timeout(SOON, member.next_record()).await;
            record.expect("all of it is read again").unwrap().unwrap();
        }
    }
    let transaction = producer.begin().await.unwrap();
    transaction.send_offsets(&mut consumer).await.unwrap();
    transaction.send_offsets(&mut other).await.unwrap();
    transaction.commit().await.unwrap();
    let offsets = client.group_offsets("g").await.unwrap();
    let committed: Vec<_> = offsets.iter().map(|o| (o.partition, o.offset)).collect();
    assert_eq!(committed, [(0, 5), (1, 5)]);
}

async fn member(client: &Client) -> Consumer {
    let consumer = client.consumer().topic("in").group("g").auto_commit(None);
    consumer.build().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn offsets_are_committed_with_the_transaction_or_not_at_all() {
    let broker = start().await;
    let client = broker.client().await;
    let plain = client.producer().build().await.unwrap();
    for value in 0..10 {
        let record = Record::to("in").partition(0).value(value.to_string());
        plain.send(record).await.unwrap().await.unwrap();
    }
    let mut consumer = member(&client).await;
    let mut producer = producer(&client, "p").await;
    let next = async |consumer: &mut Consumer| {
        let record = consumer.next_record().await.unwrap().unwrap();
        record.record.offset
    };
    for _ in 0..4 {
        next(&mut consumer).await;
    }
    let transaction = producer.begin().await.unwrap();
    transaction.send(record(0, "x")).await.unwrap();
    transaction.send_offsets(&mut consumer).await.unwrap();
    transaction.abort().await.unwrap();
    consumer.rewind().await.unwrap();
    assert_eq!(next(&mut consumer).await, 0);
    assert_eq!(next(&mut consumer).await, 1);
    let transaction = producer.begin().await.unwrap();
    transaction.send(record(0, "y")).await.unwrap();
    transaction.send_offsets(&mut consumer).await.unwrap();
    // Nobody may go on from what is not settled.
    let impatient = Client::builder(broker.address())
        .request_timeout(Duration::from_millis(300))
        .connect()
        .await
        .unwrap();
    let pending = impatient.group_offsets("g").await.unwrap_err();
    assert_eq!(pending.kind(), ErrorKind::OffsetsPending, "{pending}");
    transaction.commit().await.unwrap();
    let offsets = client.group_offsets("g").await.unwrap();
    let committed: Vec<_> = offsets.iter().map(|o| (o.partition, o.offset)).collect();
    assert!(committed.contains(&(0, 2)), "{committed:?}");
    consumer.rewind().await.unwrap();
    assert_eq!(next(&mut consumer).await, 2);
    // Who commits by itself has nothing to do with transactions.
    let consumer = client.consumer().topic("in").group("other").build().await;
    let mut consumer = consumer.unwrap();
    let transaction = producer.begin().await.unwrap();
    let refused = transaction.send_offsets(&mut consumer).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidRequest, "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_refused_with_a_sentence() {
    let broker = start().await;
    let url = format!("http://{}", broker.address());
    let mut service = TransactionServiceClient::connect(url).await.unwrap();
    let init = |id: &str, timeout_ms| InitTransactionsRequest {
        transactional_id: id.to_owned(),
        timeout_ms,
        ..InitTransactionsRequest::default()
    };
    let refused = service.init_transactions(init("", 0)).await.unwrap_err();
    assert_eq!(refusal(&refused).reason, "INVALID_REQUEST");
    let refused = service.init_transactions(init("p", 10_000_000)).await;
    assert_eq!(refusal(&refused.unwrap_err()).reason, "INVALID_REQUEST");
    let long = init(&"x".repeat(300), 0);
    let refused = service.init_transactions(long).await.unwrap_err();
    assert_eq!(refusal(&refused).reason, "LIMIT_EXCEEDED");
    let told = service.init_transactions(init("p", 0)).await.unwrap();
    let told = told.into_inner();
    let add = |topic: &str, partition, epoch| AddPartitionsRequest {
        transactional_id: "p".to_owned(),
        producer_id: told.producer_id,
        producer_epoch: epoch,
        partitions: vec![TopicPartitions {
            topic: topic.to_owned(),
            partitions: vec![partition],
        }],
    };
    for (request, reason) in [
        (add("none", 0, 0), "UNKNOWN_TOPIC"),
        (add("out", 9, 0), "UNKNOWN_PARTITION"),
        (add("__groups", 0, 0), "INVALID_REQUEST"),
        (add("out", 0, 7), "FENCED_PRODUCER"),
        (add("out", 0, -1), "INVALID_REQUEST"),
        (add("out", 0, 100_000), "INVALID_REQUEST"),
    ] {
        let refused = service.add_partitions(request).await.unwrap_err();
        assert_eq!(refusal(&refused).reason, reason, "{refused}");
    }
    let end = EndTransactionRequest {
        transactional_id: "unknown".to_owned(),
        commit: true,
        ..EndTransactionRequest::default()
    };
    let refused = service.end_transaction(end).await.unwrap_err();
    assert_eq!(refusal(&refused).reason, "UNKNOWN_TRANSACTIONAL_ID");
    // A batch of a transaction that no one has begun here.
    let client = broker.client().await;
    let builder = client.producer().delivery_timeout(SOON);
    let mut producer = builder.build_transactional("p").await.unwrap();
    let transaction = producer.begin().await.unwrap();
    let too_large = record(0, &"x".repeat(5 << 20));
    let refused = transaction.send(too_large).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::RecordTooLarge, "{refused}");
    transaction.send(record(0, "fits")).await.unwrap();
    transaction.commit().await.unwrap();
}

/// Counts the values of a topic that were committed.
async fn counts(client: &Client, topic: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for value in read(client, topic, Isolation::ReadCommitted)
        .await
        .into_values()
        .flatten()
    {
        *counts.entry(value).or_default() += 1;
    }
    counts
}

/// `millrace copy` and the broker, which is the coordinator of all, are killed again and again; every record is copied once.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_exact_whatever_is_killed() {
    const RECORDS: u32 = 3_000;
    let mut broker = start().await;
    let client = broker.client().await;
    let plain = client.producer().build().await.unwrap();
    let arguments = ["copy", "in", "out", "--group", "copier", "--every", "20ms"];
    let mut sent = 0;
    for round in 0..12 {
        let copy = broker.cli().start(&arguments);
        for _ in 0..RECORDS / 12 {
            let record = Record::to("in").partition(sent % 2).value(sent.to_string());
            drop(plain.send(record).await.unwrap());
            sent += 1;
            if sent % 10 == 0 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        plain.flush().await.unwrap();
        if round % 3 == 2 {
            broker.kill_9();
            broker.restart();
        }
        // Kills it.
        drop(copy);
    }
    let idle = [&arguments[..], &["--idle", "8s"]].concat();
    broker.cli().run(&idle).success();
    let counts = counts(&client, "out").await;
    let twice: Vec<_> = counts.iter().filter(|(_, count)| **count > 1).collect();
    assert!(twice.is_empty(), "{twice:?}");
    assert_eq!(counts.len(), sent as usize);
    // Something was aborted on the way, else this shows little.
    let all = read(&client, "out", Isolation::ReadUncommitted).await;
    assert!(all.values().map(Vec::len).sum::<usize>() > sent as usize);
}
