//! Consumers that read all partitions from the beginning, and note what they get as they get it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use futures::FutureExt;
use millrace_client::{ConsumedRecord, Consumer, Error, OffsetSpec, StartFrom};
use millrace_e2e::history::{Event, Seen};

use crate::load::{Load, TOPIC};

/// Records noted at a time.
const PIECE: usize = 500;

/// How far a reader has got, by partition: the next offset.
pub(crate) struct Reader {
    id: u32,
    next: Vec<AtomicI64>,
}

impl Reader {
    pub(crate) fn new(id: u32, partitions: i32) -> Arc<Self> {
        Arc::new(Self {
            id,
            next: (0..partitions).map(|_| AtomicI64::new(0)).collect(),
        })
    }

    /// Whether it has read all up to these ends.
    pub(crate) fn has_reached(&self, ends: &[i64]) -> bool {
        let mut both = self.next.iter().zip(ends);
        both.all(|(next, end)| next.load(Ordering::Relaxed) >= *end)
    }

    /// Reads until dropped.
    pub(crate) async fn read(self: Arc<Self>, load: Arc<Load>) -> Result<()> {
        let mut consumer = self.connect(&load).await;
        loop {
            let first = consumer.next_record().await;
            let mut records = Vec::new();
            let mut came = Some(first);
            while let Some(next) = came {
                match next.context("the stream of records ended")? {
                    Ok(record) => records.push(record),
                    Err(error) => {
                        self.note(&load, std::mem::take(&mut records))?;
                        self.refused(&load, &error)?;
                    }
                }
                // What is there already, in one line.
                came = (records.len() < PIECE)
                    .then(|| consumer.next_record().now_or_never())
                    .flatten();
            }
            self.note(&load, records)?;
        }
    }

    async fn connect(&self, load: &Load) -> Consumer {
        loop {
            let built = async {
                let client = millrace_client::Client::connect(load.bootstrap.as_str()).await?;
                let consumer = client.consumer().topic(TOPIC).start(StartFrom::Offset(0));
                consumer.build().await
            };
            match built.await {
                Ok(consumer) => return consumer,
                Err(error) => {
                    load.told("consumer that connects", &error);
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        }
    }

    /// One event for each run of offsets that follow each other.
    fn note(&self, load: &Load, records: Vec<ConsumedRecord>) -> Result<()> {
        let at = load.recorder.now();
        let mut by_partition: BTreeMap<i32, Vec<(i64, Seen)>> = BTreeMap::new();
        for consumed in records {
            let seen = Seen::parse(&consumed.record.value.unwrap_or_default());
            let of_partition = by_partition.entry(consumed.partition).or_default();
            of_partition.push((consumed.record.offset, seen));
        }
        for (partition, records) in by_partition {
            for run in records.chunk_by(|(before, _), (after, _)| *after == before + 1) {
                let Some((offset, _)) = run.first() else {
                    continue;
                };
                load.record(&Event::Read {
                    reader: self.id,
                    partition,
                    offset: *offset,
                    values: run.iter().map(|(_, seen)| seen.clone()).collect(),
                    at,
                })?;
            }
            let last = records.last().map_or(0, |(offset, _)| offset + 1);
            let next = usize::try_from(partition).ok();
            if let Some(next) = next.and_then(|partition| self.next.get(partition)) {
                next.store(last, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// A failure that no retry cures is for the history.
    fn refused(&self, load: &Load, error: &Error) -> Result<()> {
        load.told("consumer", error);
        if error.is_retriable() {
            return Ok(());
        }
        load.record(&Event::Refused {
            reader: self.id,
            partition: error.partition().unwrap_or_default(),
            error: error.to_string(),
            at: load.recorder.now(),
        })
    }
}

/// Where the partitions end, as their leaders say.
pub(crate) async fn ends(load: &Load) -> Result<Vec<i64>> {
    let client = load.client().await?;
    let mut ends = Vec::new();
    for partition in 0..load.partitions {
        let found = client.list_offset(TOPIC, partition, OffsetSpec::Latest);
        let found = found
            .await
            .with_context(|| format!("the end of partition {partition}"))?;
        ends.push(found.context("a partition has no end")?.offset);
    }
    Ok(ends)
}
