//! Whether all replicas hold the same: after everything has been mended and drained, their logs must be equal, byte for byte, up to what is committed.
//!
//! No client can ask a follower for what it has. So the brokers are ended, and their stores opened as brokers themselves would do it, with the
//! broker's own library: recovery included.

use std::collections::VecDeque;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use bytes::Bytes;
use millrace_broker::storage::{StorageOptions, Store, StoredPartition, UpTo};
use millrace_record::{BatchHeader, split};

/// Bytes read at a time from each store.
const PIECE: usize = 1 << 20;

/// What was compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Comparison {
    pub(crate) partitions: usize,
    /// Of each replica.
    pub(crate) bytes: u64,
    /// The first one.
    pub(crate) difference: Option<String>,
}

/// Compares the partitions of a topic on brokers that don't run, given by id and folder, from the greatest log start to `ends`: what the leaders
/// said was committed, by partition. Each has to be on `copies` brokers. Blocks.
pub(crate) fn compare(
    brokers: &[(i32, PathBuf)],
    topic: &str,
    ends: &[i64],
    copies: usize,
) -> Result<Comparison> {
    let open = |(id, folder): &(i32, PathBuf)| {
        let options = StorageOptions {
            min_free_bytes: 0,
            ..StorageOptions::new(folder)
        };
        let (store, _) =
            Store::open(options).with_context(|| format!("the store of broker {id}"))?;
        Ok((*id, store))
    };
    let stores: Vec<_> = brokers.iter().map(open).collect::<Result<_>>()?;
    let compared = compare_stores(&stores, topic, ends, copies);
    stores.iter().for_each(|(_, store)| store.close());
    compared
}

fn compare_stores(
    stores: &[(i32, Arc<Store>)],
    topic: &str,
    ends: &[i64],
    copies: usize,
) -> Result<Comparison> {
    let mut comparison = Comparison {
        partitions: 0,
        bytes: 0,
        difference: None,
    };
    for (partition, end) in (0..).zip(ends) {
        let held = stores.iter().filter_map(|(id, store)| {
            let topics = store.topics();
            let topic = topics.iter().find(|held| &*held.name == topic)?;
            let log = topic.partitions.get(&partition)?.clone();
            Some(Replica::new(*id, store, log))
        });
        let mut replicas: Vec<_> = held.collect();
        let difference = if replicas.len() == copies {
            compare_partition(&mut replicas, *end, &mut comparison.bytes)?
        } else {
            let on: Vec<_> = replicas.iter().map(|replica| replica.broker).collect();
            Some(format!("it is on brokers {on:?} instead of {copies}"))
        };
        if let Some(difference) = difference {
            comparison.difference = Some(format!("partition {partition}: {difference}"));
            break;
        }
        comparison.partitions += 1;
    }
    Ok(comparison)
}

fn compare_partition(
    replicas: &mut [Replica<'_>],
    end: i64,
    bytes: &mut u64,
) -> Result<Option<String>> {
    let starts = replicas.iter().map(|replica| replica.log.log_start());
    let mut offset = starts.max().unwrap_or_default();
    for replica in replicas.iter_mut() {
        replica.next = offset;
    }
    while offset < end {
        let mut first: Option<(i32, Bytes)> = None;
        for replica in replicas.iter_mut() {
            let Some(batch) = replica.next_batch()? else {
                return Ok(Some(format!(
                    "broker {} ends at {offset}, though all before {end} is committed",
                    replica.broker
                )));
            };
            match &first {
                None => first = Some((replica.broker, batch)),
                Some((_, expected)) if *expected == batch => {}
                Some((other, _)) => {
                    return Ok(Some(format!(
                        "the batches at offset {offset} on brokers {other} and {} differ",
                        replica.broker
                    )));
                }
            }
        }
        let Some((_, batch)) = first else { break };
        *bytes += batch.len() as u64;
        offset = BatchHeader::parse(&batch)?.last_offset() + 1;
    }
    Ok(None)
}

/// One copy of a partition, read batch by batch.
struct Replica<'a> {
    broker: i32,
    store: &'a Store,
    log: StoredPartition,
    /// The offset after the last batch that was read from the store.
    next: i64,
    batches: VecDeque<Bytes>,
}

impl<'a> Replica<'a> {
    fn new(broker: i32, store: &'a Store, log: StoredPartition) -> Self {
        Self {
            broker,
            store,
            log,
            next: 0,
            batches: VecDeque::new(),
        }
    }

    /// `None` at the end of the log.
    fn next_batch(&mut self) -> Result<Option<Bytes>> {
        if self.batches.is_empty() && self.next < self.log.log_end() {
            let (store, log) = (self.store, &self.log);
            let read = store.read_disk(log, self.next, PIECE, true, UpTo::LogEnd);
            let read = read.with_context(|| format!("broker {}", self.broker))?;
            for batch in read.batches.into_iter().flat_map(split) {
                let batch = batch?;
                self.next = BatchHeader::parse(&batch)?.last_offset() + 1;
                self.batches.push_back(batch);
            }
        }
        Ok(self.batches.pop_front())
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            partitions, bytes, ..
        } = self;
        write!(
            f,
            "replicas: {partitions} partitions, {bytes} bytes of each replica: "
        )?;
        match &self.difference {
            None => write!(f, "equal up to the high watermark"),
            Some(difference) => write!(f, "equal, then {difference}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use millrace_broker::storage::{BrokerIdentity, LogConfig, PartitionAppend, Retention};
    use millrace_record::{BatchBuilder, BatchOptions, TimestampType};
    use tempfile::TempDir;
    use uuid::Uuid;

    use super::*;

    const CONFIG: LogConfig = LogConfig {
        compaction: None,
        max_message_bytes: 1 << 20,
        timestamp_type: TimestampType::CreateTime,
        timestamp_after_max: Duration::from_secs(3600),
        retention: Retention {
            time: None,
            bytes: None,
        },
    };

    /// Folders of brokers 0, 1, …, that hold one partition each with batches of these values.
    async fn brokers(values: &[&[&str]]) -> (TempDir, Vec<(i32, PathBuf)>) {
        let dir = tempfile::tempdir().unwrap();
        let topic_id = Uuid::new_v4();
        let mut made = Vec::new();
        for (broker_id, values) in (0..).zip(values) {
            let folder = dir.path().join(broker_id.to_string());
            let options = StorageOptions {
                min_free_bytes: 0,
                ..StorageOptions::new(&folder)
            };
            let (store, _) = Store::open(options).unwrap();
            let cluster = "c".to_owned();
            store.claim(BrokerIdentity { cluster, broker_id }).unwrap();
            store
                .ensure_partitions(topic_id, "t", &[0], CONFIG)
                .unwrap();
            let log = store.partition(topic_id, 0).unwrap();
            log.lead(1).unwrap();
            for value in *values {
                let mut builder = BatchBuilder::new(BatchOptions::default());
                builder.append(1_700_000_000_000, None, Some(value.as_bytes()), &[]);
                let batches = vec![builder.build().unwrap()];
                let append = PartitionAppend::new(log.clone(), 1, batches).unwrap();
                let appended = store.append(vec![append]).await.unwrap();
                appended.await.unwrap().remove(0).unwrap();
            }
            store.close();
            made.push((broker_id, folder));
        }
        (dir, made)
    }

    async fn difference(values: &[&[&str]], end: i64, copies: usize) -> Option<String> {
        let (_dir, brokers) = brokers(values).await;
        compare(&brokers, "t", &[end], copies).unwrap().difference
    }

    #[tokio::test]
    async fn replicas_that_hold_the_same_are_equal_as_often_as_one_looks() {
        let same: &[&str] = &["one", "two"];
        let (_dir, brokers) = brokers(&[same, same, same]).await;
        for _ in 0..2 {
            let compared = compare(&brokers, "t", &[2], 3).unwrap();
            assert_eq!((compared.partitions, compared.difference), (1, None));
            assert!(compared.bytes > 2 * millrace_record::HEADER_LEN as u64);
        }
    }

    #[tokio::test]
    async fn one_byte_that_differs_is_found() {
        let values: &[&[&str]] = &[&["one", "two"], &["one", "two"], &["one", "twp"]];
        let expected = "partition 0: the batches at offset 1 on brokers 0 and 2 differ";
        assert_eq!(difference(values, 2, 3).await.unwrap(), expected);
        // What is not committed may differ.
        assert_eq!(difference(values, 1, 3).await, None);
    }

    #[tokio::test]
    async fn a_replica_that_lacks_something_is_found() {
        let values: &[&[&str]] = &[&["one", "two"], &["one"]];
        let expected = "partition 0: broker 1 ends at 1, though all before 2 is committed";
        assert_eq!(difference(values, 2, 2).await.unwrap(), expected);
        let expected = "partition 0: it is on brokers [0, 1] instead of 3";
        assert_eq!(difference(values, 1, 3).await.unwrap(), expected);
    }
}
