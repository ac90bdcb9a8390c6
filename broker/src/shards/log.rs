//! A shard's partition of the internal topic: reads what was kept, and keeps more.

use std::{sync::Arc, time::Duration};

use millrace_record::{BatchBuilder, BatchError, BatchOptions, DecodeLimits, decode, split};

use super::{Entry, EntryError};
use crate::{
    directory::Led,
    now_ms,
    storage::{PartitionAppend, StorageError, Store, UpTo},
};

/// Bytes read at a time.
const READ: usize = 4 << 20;
/// A batch is ended once it is so large; the largest entry fits beside it in what the topic allows.
const BATCH: usize = 256 << 10;
/// How often a new leader is asked whether it knows by now how far its log is committed.
const POLL: Duration = Duration::from_millis(10);

/// Why a log can't be read or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error("a batch at offset {offset} can't be read: {source}")]
    Batch { offset: i64, source: BatchError },
    #[error("the record at offset {offset} is none of a coordinator's: {source}")]
    Entry { offset: i64, source: EntryError },
    #[error("reading failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

pub(super) struct StateLog {
    pub(super) store: Arc<Store>,
    pub(super) led: Led,
}

impl StateLog {
    /// Whether what is written would be taken.
    pub(super) fn is_led(&self) -> bool {
        self.led.is_led()
    }

    /// Reads all that is kept; returns its bytes. Waits until all of it is committed: what a leader that died had not got through, counts or
    /// doesn't, but from then on it is settled.
    pub(super) async fn read<E: Entry>(&self, mut each: impl FnMut(E)) -> Result<u64, LogError> {
        let end = loop {
            if let Some(end) = self.led.latest() {
                break end;
            }
            if !self.is_led() {
                return Err(StorageError::NotLed.into());
            }
            tokio::time::sleep(POLL).await;
        };
        let log = &self.led.log;
        let mut next = log.log_start();
        let mut bytes = 0;
        while next < end {
            let (store, source, from) = (self.store.clone(), log.clone(), next);
            let read = move || store.read_disk(&source, from, READ, true, UpTo::HighWatermark);
            let read = match self
                .store
                .read_memory(log, next, READ, true, UpTo::HighWatermark)?
            {
                Some(read) => read,
                None => tokio::task::spawn_blocking(read).await??,
            };
            if read.batches.is_empty() {
                break;
            }
            bytes += read.bytes as u64;
            for batch in read.batches.into_iter().flat_map(split) {
                let offset = next;
                let wrong = |source| LogError::Batch { offset, source };
                let records = decode(&batch.map_err(wrong)?, &DecodeLimits::default());
                for record in records.map_err(wrong)? {
                    let record = record.map_err(wrong)?;
                    next = record.offset + 1;
                    let offset = record.offset;
                    let entry = E::decode(record.key, record.value);
                    each(entry.map_err(|source| LogError::Entry { offset, source })?);
                }
            }
        }
        Ok(bytes)
    }

    /// Appends entries, all or none, and waits until they are committed. The first one's offset, and their bytes.
    pub(super) async fn append<E: Entry>(&self, entries: &[E]) -> Result<(i64, u64), LogError> {
        let now_ms = now_ms();
        let mut batches = Vec::new();
        let mut builder = BatchBuilder::new(BatchOptions::default());
        for entry in entries {
            if builder.size() > BATCH {
                let full =
                    std::mem::replace(&mut builder, BatchBuilder::new(BatchOptions::default()));
                batches.push(full.build().map_err(StorageError::from)?);
            }
            let (key, value) = entry.encode();
            builder.append(now_ms, Some(&key), value.as_deref(), &[]);
        }
        batches.push(builder.build().map_err(StorageError::from)?);
        let bytes = batches.iter().map(|batch| batch.len() as u64).sum();
        let append = PartitionAppend::new(self.led.log.clone(), self.led.epoch, batches)?;
        let answer = self.store.append(vec![append]).await?;
        let answer = answer.await.map_err(|_| StorageError::Closed)?;
        let appended = answer.into_iter().next().ok_or(StorageError::Closed)??;
        self.led.committed(appended.end_offset).await?;
        Ok((appended.base_offset, bytes))
    }

    /// What lies before is said again after it: it may go.
    pub(super) fn release_before(&self, offset: i64) {
        self.led.log.release_before(offset);
    }
}
