//! Producer and consumer while leaders move, die, hang and come back. All time-outs are long, so that none of them helps.

#![allow(clippy::unwrap_used)]

mod fake;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use fake::{Cluster, Fault, Mode};
use futures::future::join_all;
use millrace_client::{
    Client, Consumer, Delivery, ErrorKind, OffsetSpec, Producer, ProducerBuilder, Record, StartFrom,
};
use millrace_proto::v1::ErrorReason;
use tokio::time::{sleep, timeout};

/// Shorter than any time-out of the client.
const SOON: Duration = Duration::from_secs(3);

async fn cluster(brokers: usize, partitions: usize) -> (Cluster, Client) {
    let cluster = Cluster::start(brokers).await;
    cluster.topic("t", partitions);
    let bootstrap = cluster.state.lock().addresses.join(",");
    let client = Client::builder(bootstrap)
        .request_timeout(Duration::from_secs(60))
        .metadata_refresh(Duration::from_secs(60))
        .connect()
        .await
        .unwrap();
    (cluster, client)
}

/// One record makes a batch.
fn small_batches(client: &Client) -> ProducerBuilder {
    client.producer().linger(Duration::ZERO).batch_bytes(80)
}

async fn send(producer: &Producer, value: usize) -> Delivery {
    let record = Record::to("t").partition(0).value(value.to_string());
    producer.send(record).await.unwrap()
}

/// Sends a record and returns its offset.
async fn write(producer: &Producer, value: usize) -> i64 {
    let delivery = send(producer, value).await;
    soon(delivery).await.unwrap().offset
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(SOON, future).await.expect("done soon")
}

fn values(cluster: &Cluster) -> Vec<usize> {
    let values = cluster.state.lock().values("t", 0);
    values.iter().map(|value| value.parse().unwrap()).collect()
}

async fn read(consumer: &mut Consumer) -> usize {
    let consumed = soon(consumer.next_record()).await.unwrap().unwrap();
    let value = consumed.record.value.unwrap().to_vec();
    String::from_utf8(value).unwrap().parse().unwrap()
}

async fn nothing_comes(consumer: &mut Consumer) {
    let next = timeout(Duration::from_millis(300), consumer.next_record()).await;
    assert!(next.is_err(), "{next:?}");
}

fn in_order(until: usize) -> Vec<usize> {
    (0..until).collect()
}

#[tokio::test]
async fn a_hint_is_acted_on_without_metadata() {
    let (cluster, client) = cluster(3, 1).await;
    let producer = small_batches(&client).build().await.unwrap();
    // With a client of its own, else each would learn from the other's hints.
    let other = Client::connect(cluster.address()).await.unwrap();
    let mut consumer = other.consumer().topic("t").build().await.unwrap();
    write(&producer, 0).await;
    assert_eq!(read(&mut consumer).await, 0);
    cluster.state.lock().keeps_metadata_secret = true;
    for n in 1..4 {
        cluster.state.lock().move_leader("t", 0, n % 3);
        let begin = Instant::now();
        assert_eq!(write(&producer, n).await, n as i64);
        println!(
            "leader moved, with a hint: acknowledged after {:?}",
            begin.elapsed()
        );
        assert_eq!(read(&mut consumer).await, n);
    }
}

#[tokio::test]
async fn without_a_hint_metadata_is_asked_until_a_leader_is_elected() {
    let (cluster, client) = cluster(3, 1).await;
    cluster.state.lock().keeps_leaders_secret = true;
    let producer = small_batches(&client).build().await.unwrap();
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    for n in 0..6 {
        let delivery = send(&producer, n).await;
        sleep(Duration::from_millis(100 * n as u64)).await;
        cluster.state.lock().move_leader("t", 0, n % 3);
        let begin = Instant::now();
        assert_eq!(soon(delivery).await.unwrap().offset, n as i64);
        println!(
            "elected after {} ms: acknowledged {:?} later",
            100 * n,
            begin.elapsed()
        );
        assert_eq!(read(&mut consumer).await, n);
        println!(
            "elected after {} ms: read {:?} later",
            100 * n,
            begin.elapsed()
        );
        cluster.state.lock().depose_leader("t", 0);
    }
}

#[tokio::test]
async fn a_leader_that_dies_with_requests_under_way_is_followed_by_the_next() {
    let (cluster, client) = cluster(3, 1).await;
    let producer = small_batches(&client).build().await.unwrap();
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    write(&producer, 0).await;
    assert_eq!(read(&mut consumer).await, 0);
    let mut next = 1;
    for (leader, pause) in [(0, 0), (1, 300), (2, 1000), (0, 1500)] {
        cluster.produce_faults(|_| Fault::Swallow);
        let first = next;
        let mut deliveries = Vec::new();
        for _ in 0..5 {
            deliveries.push(send(&producer, next).await);
            sleep(Duration::from_millis(5)).await;
            next += 1;
        }
        cluster.set(leader, Mode::Dead);
        cluster.state.lock().depose_leader("t", 0);
        sleep(Duration::from_millis(pause)).await;
        cluster.next_produce_faults([]);
        cluster.state.lock().move_leader("t", 0, (leader + 1) % 3);
        let begin = Instant::now();
        let metas = soon(join_all(deliveries)).await;
        println!(
            "killed, {pause} ms without leader: acknowledged {:?} after election",
            begin.elapsed()
        );
        for (n, meta) in (first..).zip(metas) {
            assert_eq!(meta.unwrap().offset, n as i64);
        }
        for n in first..next {
            assert_eq!(read(&mut consumer).await, n);
        }
        cluster.set(leader, Mode::Up);
    }
    assert_eq!(values(&cluster), in_order(next));
}

#[tokio::test]
async fn a_leader_that_hangs_is_left_as_soon_as_metadata_names_another_and_counts_no_more() {
    let (cluster, client) = cluster(3, 1).await;
    let producer = small_batches(&client).build().await.unwrap();
    let mut consumer = client.consumer().topic("t").build().await.unwrap();
    write(&producer, 0).await;
    assert_eq!(read(&mut consumer).await, 0);
    let mut next = 1;
    for (leader, pause) in [(0, 0), (1, 700), (2, 1500)] {
        cluster.set(leader, Mode::Hung);
        let mut deliveries = Vec::new();
        for _ in 0..5 {
            deliveries.push(send(&producer, next).await);
            sleep(Duration::from_millis(5)).await;
            next += 1;
        }
        sleep(Duration::from_millis(pause)).await;
        cluster.state.lock().move_leader("t", 0, (leader + 1) % 3);
        let begin = Instant::now();
        for meta in soon(join_all(deliveries)).await {
            meta.unwrap();
        }
        println!(
            "hung for {pause} ms: acknowledged {:?} after election",
            begin.elapsed()
        );
        for n in next - 5..next {
            assert_eq!(read(&mut consumer).await, n);
        }
        println!(
            "hung for {pause} ms: read {:?} after election",
            begin.elapsed()
        );
        // What it had not read yet arrives now, and its answers.
        cluster.set(leader, Mode::Up);
        write(&producer, next).await;
        assert_eq!(read(&mut consumer).await, next);
        next += 1;
    }
    assert_eq!(values(&cluster), in_order(next));
}

#[tokio::test]
async fn offsets_are_found_although_a_leader_hangs_or_does_not_know_them_yet() {
    let (cluster, client) = cluster(2, 1).await;
    let producer = client.producer().build().await.unwrap();
    write(&producer, 0).await;
    cluster.state.lock().unavailable_offsets = 3;
    let latest = client.list_offset("t", 0, OffsetSpec::Latest);
    assert_eq!(soon(latest).await.unwrap().unwrap().offset, 1);
    cluster.set(0, Mode::Hung);
    let latest = client.list_offset("t", 0, OffsetSpec::Latest);
    let elect = async {
        sleep(Duration::from_millis(600)).await;
        cluster.state.lock().move_leader("t", 0, 1);
    };
    let (latest, ()) = soon(futures::future::join(latest, elect)).await;
    assert_eq!(latest.unwrap().unwrap().offset, 1);
}

#[tokio::test]
async fn a_batch_that_the_old_leader_had_committed_keeps_its_offset() {
    let (cluster, client) = cluster(2, 1).await;
    let producer = client.producer().build().await.unwrap();
    assert_eq!(write(&producer, 0).await, 0);
    cluster.next_produce_faults([Fault::DropAfter]);
    let committed = send(&producer, 1).await;
    sleep(Duration::from_millis(8)).await;
    cluster.state.lock().move_leader("t", 0, 1);
    assert_eq!(soon(committed).await.unwrap().offset, 1);
    assert_eq!(write(&producer, 2).await, 2);
    assert_eq!(values(&cluster), in_order(3));
}

#[tokio::test]
async fn a_new_leader_that_takes_any_sequence_gets_them_in_order_all_the_same() {
    let (cluster, client) = cluster(2, 1).await;
    let producer = small_batches(&client).build().await.unwrap();
    write(&producer, 0).await;
    cluster.produce_faults(|_| Fault::Swallow);
    let mut deliveries = Vec::new();
    for n in 1..6 {
        deliveries.push(send(&producer, n).await);
        sleep(Duration::from_millis(5)).await;
    }
    cluster.set(0, Mode::Dead);
    {
        let mut state = cluster.state.lock();
        state.forget_sequences("t", 0);
        state.move_leader("t", 0, 1);
    }
    cluster.next_produce_faults([Fault::Reject(ErrorReason::Throttled)]);
    for meta in soon(join_all(deliveries)).await {
        meta.unwrap();
    }
    assert_eq!(values(&cluster), in_order(6));
}

#[tokio::test]
async fn a_new_leader_that_has_the_first_batches_of_a_request_gets_the_others() {
    let (cluster, client) = cluster(2, 1).await;
    let producer = small_batches(&client)
        .max_in_flight(1)
        .build()
        .await
        .unwrap();
    write(&producer, 0).await;
    // While the first request is under way, batches gather for the second.
    let happened = Arc::new(AtomicBool::new(false));
    let happens = happened.clone();
    cluster.produce_faults(move |request| match request.partitions[0].batches.len() {
        3.. if !happens.swap(true, Ordering::Relaxed) => Fault::AppendPart(2),
        1 => Fault::Delay(Duration::from_millis(10)),
        _ => Fault::None,
    });
    let mut deliveries = Vec::new();
    for n in 1..40 {
        deliveries.push(send(&producer, n).await);
    }
    for (n, meta) in (1..).zip(soon(join_all(deliveries)).await) {
        assert_eq!(meta.unwrap().offset, n);
    }
    assert!(happened.load(Ordering::Relaxed));
    assert_eq!(values(&cluster), in_order(40));
}

#[tokio::test]
async fn a_batch_in_doubt_is_not_renumbered_because_a_deposed_leader_misses_what_was_before() {
    let (cluster, client) = cluster(2, 1).await;
    let producer = client.producer().build().await.unwrap();
    write(&producer, 0).await;
    let mut faults = vec![Fault::DropAfter];
    faults.extend([Fault::Reject(ErrorReason::OutOfOrderSequence); 6]);
    cluster.next_produce_faults(faults);
    assert_eq!(write(&producer, 1).await, 1);
    assert_eq!(write(&producer, 2).await, 2);
    assert_eq!(values(&cluster), in_order(3));
}

#[tokio::test]
async fn what_passes_is_waited_for_until_the_delivery_time_out() {
    for reason in [
        ErrorReason::NotLeader,
        ErrorReason::NotEnoughReplicas,
        ErrorReason::OffsetNotAvailable,
        ErrorReason::DiskFull,
        ErrorReason::Throttled,
        ErrorReason::ShuttingDown,
        ErrorReason::TimedOut,
    ] {
        let (cluster, client) = cluster(1, 1).await;
        let builder = client
            .producer()
            .delivery_timeout(Duration::from_millis(1500));
        let producer = builder.build().await.unwrap();
        cluster.next_produce_faults([Fault::Reject(reason); 3]);
        assert_eq!(write(&producer, 0).await, 0, "{reason:?}");
        cluster.produce_faults(move |_| Fault::Reject(reason));
        let error = soon(send(&producer, 1).await).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{reason:?}");
        let cause = reason.as_str_name().trim_start_matches("ERROR_REASON_");
        assert!(error.to_string().contains(cause), "{error}");
    }
}

#[tokio::test]
async fn a_leader_whose_log_ends_below_the_consumers_position_for_a_while_is_no_reason_to_fail() {
    for refuses in [false, true] {
        let (cluster, client) = cluster(2, 1).await;
        let producer = client.producer().build().await.unwrap();
        let mut consumer = client.consumer().topic("t").build().await.unwrap();
        for n in 0..4 {
            write(&producer, n).await;
            assert_eq!(read(&mut consumer).await, n);
        }
        {
            let mut state = cluster.state.lock();
            state.short = Some((1, 2, refuses));
            state.move_leader("t", 0, 1);
        }
        write(&producer, 4).await;
        nothing_comes(&mut consumer).await;
        assert_eq!(consumer.position("t", 0), Some(4));
        assert!(consumer.high_watermark("t", 0).unwrap() >= 4);
        // Either it catches up, or the real leader becomes known.
        match refuses {
            false => cluster.state.lock().short = None,
            true => cluster.state.lock().move_leader("t", 0, 0),
        }
        assert_eq!(read(&mut consumer).await, 4);
        // A caller's own wish for what isn't there is an error at once.
        cluster.state.lock().short = None;
        soon(consumer.seek("t", 0, StartFrom::Offset(100)))
            .await
            .unwrap();
        let error = soon(consumer.next_record()).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OffsetOutOfRange);
    }
}

#[tokio::test]
async fn a_partition_that_moves_does_not_wait_for_the_long_poll_of_its_new_leader() {
    let (cluster, client) = cluster(2, 2).await;
    let producer = client.producer().build().await.unwrap();
    let builder = client
        .consumer()
        .topic("t")
        .max_wait(Duration::from_secs(60));
    let mut consumer = builder.build().await.unwrap();
    write(&producer, 0).await;
    assert_eq!(read(&mut consumer).await, 0);
    // Partition 1 is polled at broker 1 all the while.
    for (n, broker) in [(1, 1), (2, 0), (3, 1)] {
        cluster.state.lock().move_leader("t", 0, broker);
        write(&producer, n).await;
        let begin = Instant::now();
        assert_eq!(read(&mut consumer).await, n);
        println!(
            "leader moved: read {:?} after the acknowledgement",
            begin.elapsed()
        );
    }
}

/// The promise of idempotence while brokers flap: for several seeds, all that is sent is there once and in order, and is read so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_brokers_die_hang_and_come_back_every_record_arrives_once_and_in_order() {
    for seed in 0..4 {
        let (cluster, client) = cluster(3, 1).await;
        let producer = small_batches(&client)
            .max_request_bytes(500)
            .build()
            .await
            .unwrap();
        let mut consumer = client.consumer().topic("t").build().await.unwrap();
        let chaos = async {
            let mut random = fastrand::Rng::with_seed(seed);
            for _ in 0..15 {
                let leader = cluster.state.lock().leader("t", 0).unwrap();
                match random.u8(..4) {
                    0 => cluster.set(leader, Mode::Dead),
                    1 => cluster.set(leader, Mode::Hung),
                    2 => cluster.next_produce_faults([Fault::DropAfter, Fault::AppendPart(1)]),
                    _ => {}
                }
                cluster.state.lock().keeps_leaders_secret = random.bool();
                sleep(Duration::from_millis(random.u64(..300))).await;
                cluster.state.lock().move_leader("t", 0, (leader + 1) % 3);
                sleep(Duration::from_millis(random.u64(..300))).await;
                cluster.set(leader, Mode::Up);
            }
        };
        let produce = async {
            let mut deliveries = Vec::new();
            for n in 0..2000 {
                deliveries.push(send(&producer, n).await);
                if n % 4 == 0 {
                    sleep(Duration::from_millis(3)).await;
                }
            }
            join_all(deliveries).await
        };
        let consume = async {
            for n in 0..2000 {
                assert_eq!(read(&mut consumer).await, n, "seed {seed}");
            }
        };
        let all = futures::future::join3(chaos, produce, consume);
        let ((), metas, ()) = timeout(Duration::from_secs(60), all).await.unwrap();
        for (n, meta) in metas.into_iter().enumerate() {
            let offset = meta.unwrap().offset;
            assert!(
                offset == n as i64 || offset == -1,
                "seed {seed}: {offset} of {n}"
            );
        }
        assert_eq!(values(&cluster), in_order(2000), "seed {seed}");
    }
}
