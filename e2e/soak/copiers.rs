//! Members of a group that copy the topic into another one, record by record, in transactions; they crash, too. In the end the copy must be the same:
//! nothing left out, nothing twice, each partition in its order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use millrace_client::{
    Client, Consumer, Error, ErrorKind, Record, StartFrom, TransactionalProducer,
};
use millrace_e2e::history::Seen;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::load::{Load, TOPIC};

/// The topic that is written.
pub(crate) const COPY: &str = "soak-copy";
const GROUP: &str = "copiers";
/// How long a transaction gathers records.
const GATHER: Duration = Duration::from_millis(100);
/// How long nothing may come while there must be something.
const PATIENCE: Duration = Duration::from_secs(60);

/// What copiers did.
#[derive(Debug, Default)]
pub(crate) struct Copied {
    committed: AtomicUsize,
    /// On purpose, or since something failed.
    aborted: AtomicUsize,
    crashed: AtomicUsize,
}

impl Copied {
    /// In a sentence.
    pub(crate) fn summary(&self) -> String {
        let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        format!(
            "copy: {} transactions committed, {} aborted or failed, {} copiers crashed",
            count(&self.committed),
            count(&self.aborted),
            count(&self.crashed)
        )
    }
}

/// Copies until told to stop.
pub(crate) async fn copy(
    load: Arc<Load>,
    copied: Arc<Copied>,
    index: u32,
    seed: u64,
    stop: CancellationToken,
) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(seed);
    while !stop.is_cancelled() {
        let Some(made) = stop.run_until_cancelled(connect(&load, index)).await else {
            break;
        };
        let (mut producer, mut consumer) = match made {
            Ok(made) => made,
            Err(error) => {
                load.told("copier that connects", &error);
                tokio::time::sleep(Duration::from_millis(500)).await;
                continue;
            }
        };
        while !stop.is_cancelled() {
            let fate = match random.u32(..200) {
                0 => Fate::Crash,
                1..20 => Fate::Abort,
                _ => Fate::Commit,
            };
            let done = transaction(&mut producer, &mut consumer, fate).await;
            match done {
                Ok(true) if fate == Fate::Crash => {
                    // Both are dropped as they are.
                    copied.crashed.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Ok(true) if fate == Fate::Commit => {
                    copied.committed.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                Ok(false) => continue,
                Ok(true) => {}
                Err(error) => {
                    load.told("copier", &error);
                    if error.kind() == ErrorKind::FencedProducer {
                        break;
                    }
                }
            }
            copied.aborted.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = consumer.rewind().await {
                load.told("copier that goes back", &error);
                break;
            }
        }
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Commit,
    Abort,
    Crash,
}

async fn connect(load: &Load, index: u32) -> Result<(TransactionalProducer, Consumer), Error> {
    let client = Client::connect(load.bootstrap.as_str()).await?;
    let id = format!("copier-{index}");
    let producer = client.producer().build_transactional(id).await?;
    let mut consumer = client.consumer().topic(TOPIC).group(GROUP);
    if index.is_multiple_of(2) {
        // A static member: who comes after a crash goes on at once.
        consumer = consumer.instance_id(format!("copier-{index}"));
    }
    let consumer = consumer.start(StartFrom::Earliest).auto_commit(None);
    Ok((producer, consumer.build().await?))
}

/// Copies what comes for a while. Whether there was anything.
async fn transaction(
    producer: &mut TransactionalProducer,
    consumer: &mut Consumer,
    fate: Fate,
) -> Result<bool, Error> {
    let Ok(first) = timeout(GATHER, consumer.next_record()).await else {
        return Ok(false);
    };
    let deadline = Instant::now() + GATHER;
    let transaction = producer.begin().await?;
    let mut next = first;
    while let Some(consumed) = next.take() {
        let consumed = consumed?;
        let mut record = Record::to(COPY).partition(consumed.partition);
        record.value = consumed.record.value;
        transaction.send(record).await?;
        if let Ok(more) = timeout_at(deadline, consumer.next_record()).await {
            next = more;
        }
    }
    match fate {
        Fate::Commit => {
            transaction.send_offsets(consumer).await?;
            transaction.commit().await?;
        }
        Fate::Abort => transaction.abort().await?,
        Fate::Crash => drop(transaction),
    }
    Ok(true)
}

/// Waits until all up to these ends is copied.
pub(crate) async fn copied_up_to(load: &Load, ends: &[i64]) -> Result<()> {
    let client = load.client().await?;
    loop {
        let offsets = client.group_offsets(GROUP).await;
        if let Ok(offsets) = offsets {
            let committed: BTreeMap<i32, i64> = offsets
                .into_iter()
                .map(|o| (o.partition, o.offset))
                .collect();
            let reached = |(partition, end): (i32, &i64)| {
                *end == 0 || committed.get(&partition).is_some_and(|at| at >= end)
            };
            if (0..).zip(ends).all(reached) {
                return Ok(());
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Compares the copy with the topic, up to these ends of the topic.
pub(crate) async fn compare(load: &Load, ends: &[i64]) -> Result<()> {
    let client = load.client().await?;
    for (partition, end) in (0..).zip(ends) {
        let original = values(&client, TOPIC, partition, usize::MAX, *end).await?;
        let copy = values(&client, COPY, partition, original.len(), i64::MAX).await?;
        if let Some(at) = original.iter().zip(&copy).position(|(a, b)| a != b) {
            let place = |of: &[Bytes]| of.iter().position(|value| *value == copy[at]);
            bail!(
                "partition {partition}: record {at} of the copy is {:?}, which is record {:?} of the topic, and in the copy record {:?} first",
                Seen::parse(&copy[at]),
                place(&original),
                place(&copy)
            );
        }
        ensure!(
            original.len() == copy.len(),
            "partition {partition}: the topic has {} records, the copy {}",
            original.len(),
            copy.len()
        );
    }
    Ok(())
}

/// The committed values of a partition: up to an offset, or until nothing more comes after so many.
async fn values(
    client: &Client,
    topic: &str,
    partition: i32,
    expected: usize,
    end: i64,
) -> Result<Vec<Bytes>> {
    let consumer = client.consumer().partitions(topic, [partition]);
    let mut consumer = consumer.start(StartFrom::Earliest).build().await?;
    let mut values = Vec::new();
    while consumer.position(topic, partition).unwrap_or(0) < end {
        // One more than expected is an error, and enough to see it.
        let patience = match values.len() < expected {
            true => PATIENCE,
            false => Duration::from_secs(1),
        };
        let Ok(next) = timeout(patience, consumer.next_record()).await else {
            break;
        };
        let record = next.context("the stream of records ended")??;
        values.push(record.record.value.unwrap_or_default());
    }
    Ok(values)
}
