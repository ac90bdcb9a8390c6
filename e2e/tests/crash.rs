//! `kill -9` in a loop while idempotent producers write: what was acknowledged is there, once, in order, where it was said to be.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use millrace_client::{Client, Record};
use millrace_e2e::{Api, Broker, SOON, batch, eventually};
use millrace_proto::v1::InitProducerRequest;
use millrace_record::ProducerState;
use serde_json::json;
use tokio::{task::JoinHandle, time::Instant};

const PRODUCERS: usize = 3;
const PARTITIONS: i32 = 4;
/// Records under way of each producer.
const IN_FLIGHT: usize = 400;

#[tokio::test(flavor = "multi_thread")]
async fn fifty_kills_under_load_lose_repeat_and_reorder_nothing() {
    kill_in_a_loop("os", 50).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_under_load_lose_repeat_and_reorder_nothing_with_fsync() {
    kill_in_a_loop("fsync", 12).await;
}

/// What one producer was told: for each record it sent, in order, where it went.
type Acknowledged = Vec<(i32, i64)>;

async fn kill_in_a_loop(durability: &str, kills: u32) {
    let begun = Instant::now();
    let mut broker = Broker::setup()
        .topic(
            "t",
            json!({ "partitions": PARTITIONS, "retention": { "time": "forever" } }),
        )
        .topic("witness", json!({ "retention": { "time": "forever" } }))
        .flag("--durability", durability)
        // Small, so that kills also meet generations on their way to disk.
        .flag("--write-buffer", "1MiB")
        .start();
    let stop = Arc::new(AtomicBool::new(false));
    let counts: Vec<Arc<AtomicU64>> = (0..PRODUCERS).map(|_| Arc::default()).collect();
    let mut producers: Vec<JoinHandle<Acknowledged>> = Vec::new();
    for (id, count) in counts.iter().enumerate() {
        let client = broker.client().await;
        producers.push(tokio::spawn(produce(
            client,
            id,
            stop.clone(),
            count.clone(),
        )));
    }
    let mut witness = Witness::new(&mut broker.api().await).await;
    for kill in 0..kills {
        // Each producer has had answers since the last start; then the blow falls at any moment.
        let before: Vec<u64> = counts
            .iter()
            .map(|count| count.load(Ordering::Relaxed))
            .collect();
        let all_go_on = || async {
            let go_on = counts
                .iter()
                .zip(&before)
                .all(|(count, before)| count.load(Ordering::Relaxed) > before + 50);
            go_on.then_some(())
        };
        eventually(
            &format!("every producer goes on after kill {kill}"),
            SOON,
            all_go_on,
        )
        .await;
        witness.write(&mut broker.api().await).await;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(0..250))).await;
        broker.kill_9();
        broker.restart();
        broker.wait_for_log("unclean stop before", SOON);
        witness.insist(&mut broker.api().await).await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = Vec::new();
    for producer in producers {
        acknowledged.push(
            producer
                .await
                .expect("every record was acknowledged in the end"),
        );
    }
    let total = verify(&mut broker.api().await, &acknowledged).await;
    let log = broker.terminate();
    assert!(!log.contains("ERROR"), "{log}");
    println!(
        "{durability}: {kills} kills, {total} records, all there, once, in order; {:?}",
        begun.elapsed()
    );
}

/// Writes without pause until told to stop. Every record must be acknowledged in the end, whatever happens to the broker.
async fn produce(
    client: Client,
    id: usize,
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
) -> Acknowledged {
    let producer = client
        .producer()
        .linger(Duration::from_millis(1))
        .batch_bytes(4 << 10)
        .delivery_timeout(Duration::from_secs(120))
        .build()
        .await
        .expect("a producer");
    let mut acknowledged = Vec::new();
    let mut under_way = std::collections::VecDeque::new();
    let mut number = 0_u64;
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        if !stopping {
            let partition = fastrand::i32(0..PARTITIONS);
            let value = format!("{id} {number} {}", "x".repeat(fastrand::usize(0..300)));
            let record = Record::to("t").partition(partition).value(value);
            under_way.push_back(producer.send(record).await.expect("the buffer has room"));
            number += 1;
        }
        if under_way.len() >= IN_FLIGHT || stopping {
            let Some(delivery) = under_way.pop_front() else {
                break;
            };
            let meta = delivery
                .await
                .unwrap_or_else(|error| panic!("record {} of {id}: {error:?}", acknowledged.len()));
            acknowledged.push((meta.partition, meta.offset));
            count.fetch_add(1, Ordering::Relaxed);
            if acknowledged.len().is_multiple_of(IN_FLIGHT / 4) {
                // Bounds the rate: the point is many crashes, not many records.
                tokio::time::sleep(Duration::from_millis(4)).await;
            }
        }
    }
    producer.close(SOON).await.expect("nothing is left to send");
    acknowledged
}

/// An idempotent producer on the bare API that sends its last batches again after each crash.
struct Witness {
    id: i64,
    batches: Vec<(Bytes, i64)>,
}

impl Witness {
    async fn new(api: &mut Api) -> Self {
        let id = api
            .producer
            .init_producer(InitProducerRequest {})
            .await
            .expect("an id")
            .into_inner()
            .producer_id;
        Witness {
            id,
            batches: Vec::new(),
        }
    }

    async fn write(&mut self, api: &mut Api) {
        for _ in 0..3 {
            let base_sequence = i32::try_from(self.batches.len() * 2).expect("it is small");
            let sent = batch(
                ["a", "b"],
                Some(ProducerState {
                    id: self.id,
                    epoch: 0,
                    base_sequence,
                }),
            );
            let offset = api
                .append("witness", 0, vec![sent.clone()])
                .await
                .expect("it is appended")
                .base_offset;
            self.batches.push((sent, offset));
        }
    }

    /// Whatever of the last five batches comes again is answered with the offset of the first time.
    async fn insist(&self, api: &mut Api) {
        for (sent, offset) in &self.batches[self.batches.len().saturating_sub(5)..] {
            let again = api
                .append("witness", 0, vec![sent.clone()])
                .await
                .expect("it is a duplicate, not an error");
            assert_eq!(again.base_offset, *offset);
        }
        let (_, end) = api.offsets("witness", 0).await;
        assert_eq!(
            end,
            self.batches.len() as i64 * 2,
            "duplicates are not appended"
        );
    }
}

/// Compares the log with what producers were told; returns how many records it holds.
async fn verify(api: &mut Api, acknowledged: &[Acknowledged]) -> usize {
    let mut found: HashMap<(usize, u64), (i32, i64)> = HashMap::new();
    for partition in 0..PARTITIONS {
        let mut last: HashMap<usize, u64> = HashMap::new();
        // Also checks that offsets have no gaps.
        for record in api.read_all("t", partition, 0).await {
            let value = record.value.expect("all records have values");
            let text = String::from_utf8_lossy(&value);
            let mut words = text.split(' ');
            let id: usize = words
                .next()
                .and_then(|word| word.parse().ok())
                .expect("a producer");
            let number: u64 = words
                .next()
                .and_then(|word| word.parse().ok())
                .expect("a number");
            let before = last.insert(id, number);
            assert!(
                before < Some(number),
                "partition {partition}: {number} of producer {id} after {before:?}"
            );
            let other = found.insert((id, number), (partition, record.offset));
            assert_eq!(
                other, None,
                "record {number} of producer {id} is there twice"
            );
        }
    }
    for (id, acknowledged) in acknowledged.iter().enumerate() {
        for (number, told) in acknowledged.iter().enumerate() {
            let there = found.get(&(id, number as u64));
            assert_eq!(
                there,
                Some(told),
                "record {number} of producer {id}: where it is, where it was said to be"
            );
        }
    }
    let all: usize = acknowledged.iter().map(Vec::len).sum();
    assert_eq!(found.len(), all, "nothing is there that was not sent");
    all
}
