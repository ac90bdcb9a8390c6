//! A batch on its way from the accumulator to a broker, and the unit of sending: batches of one partition that are appended,
//! acknowledged and retried together.
//!
//! Not responsible for when they are sent: see `accumulator`, `lane` and `sender`.

use std::sync::Arc;

use bytes::Bytes;
use millrace_record::{
    BatchBuilder, BatchError, BatchHeader, BatchOptions, DecodeLimits, ProducerState, decode,
};
use tokio::time::Instant;

use super::delivery::{Ack, Completion};
use crate::{error::Error, transport::MAX_MESSAGE_BYTES};

/// Records that will become, or are, one record batch.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Unique in the producer, ascending by age.
    pub(crate) id: u64,
    pub(crate) payload: Payload,
    pub(crate) completion: Arc<Completion>,
    /// Bytes taken from the producer's budget.
    pub(crate) reserved: usize,
    pub(crate) opened: Instant,
    pub(crate) deadline: Instant,
}

/// A batch's records, before and after encoding.
#[derive(Debug)]
pub(crate) enum Payload {
    Open(BatchBuilder),
    Built {
        bytes: Bytes,
        records: usize,
    },
    /// Building failed; the unit fails with it.
    Broken,
}

impl Batch {
    /// Bytes before compression, or as built.
    pub(crate) fn size(&self) -> usize {
        match &self.payload {
            Payload::Open(builder) => builder.size(),
            Payload::Built { bytes, .. } => bytes.len(),
            Payload::Broken => 0,
        }
    }

    pub(crate) fn records(&self) -> usize {
        match &self.payload {
            Payload::Open(builder) => builder.record_count(),
            Payload::Built { records, .. } => *records,
            Payload::Broken => 0,
        }
    }

    /// Compresses and encodes the batch as this producer's, or takes what was encoded before if nothing changed.
    fn encode(&mut self, producer: Option<ProducerState>) -> Result<Bytes, BatchError> {
        let (builder, records) = match std::mem::replace(&mut self.payload, Payload::Broken) {
            Payload::Open(mut builder) => {
                if let Some(producer) = producer {
                    builder.set_producer(producer);
                }
                let records = builder.record_count();
                (builder, records)
            }
            Payload::Built { bytes, records } => {
                let header = BatchHeader::parse(&bytes)?;
                if producer.is_none_or(|producer| producer == state_of(&header)) {
                    self.payload = Payload::Built {
                        bytes: bytes.clone(),
                        records,
                    };
                    return Ok(bytes);
                }
                (rebuild(&bytes, &header, producer)?, records)
            }
            Payload::Broken => {
                return Err(BatchError::Invalid {
                    reason: "it could not be built before".into(),
                });
            }
        };
        let bytes = builder.build()?;
        self.payload = Payload::Built {
            bytes: bytes.clone(),
            records,
        };
        Ok(bytes)
    }
}

fn state_of(header: &BatchHeader) -> ProducerState {
    ProducerState {
        id: header.producer_id,
        epoch: header.producer_epoch,
        base_sequence: header.base_sequence,
    }
}

/// The same records under another producer id: rare, so it may decode and encode them again.
fn rebuild(
    bytes: &Bytes,
    header: &BatchHeader,
    producer: Option<ProducerState>,
) -> Result<BatchBuilder, BatchError> {
    let compression = header.attributes.compression();
    let mut builder = BatchBuilder::new(BatchOptions {
        compression,
        producer,
        transactional: header.attributes.is_transactional(),
        ..Default::default()
    });
    // Own data, so the limit only has to be one that no batch of this producer can exceed.
    let limits = DecodeLimits {
        max_decompressed_bytes: i32::MAX as usize,
    };
    for record in decode(bytes, &limits)? {
        let record = record?;
        builder.append(
            record.timestamp_ms,
            record.key.as_deref(),
            record.value.as_deref(),
            &record.headers,
        );
    }
    Ok(builder)
}

/// Batches of one partition that go in one request, are appended all or none, and are retried as they are.
#[derive(Debug)]
pub(crate) struct Unit {
    /// The sender's index of the partition.
    pub(crate) slot: usize,
    /// Place in the partition's order, which sequences can't tell since they start over.
    pub(crate) order: u64,
    pub(crate) batches: Vec<Batch>,
    /// With the first batch's sequence.
    pub(crate) producer: Option<ProducerState>,
    /// Whether a broker may have appended it although no answer says so.
    pub(crate) is_in_doubt: bool,
    /// Why the last try failed.
    pub(crate) last_error: Option<Error>,
}

impl Unit {
    pub(crate) fn size(&self) -> usize {
        self.batches.iter().map(Batch::size).sum()
    }

    pub(crate) fn records(&self) -> usize {
        self.batches.iter().map(Batch::records).sum()
    }

    /// The oldest batch's, since all fail together.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.batches.first().map(|batch| batch.deadline)
    }

    /// Whether all callers have their answer already.
    pub(crate) fn is_settled(&self) -> bool {
        self.batches
            .iter()
            .all(|batch| batch.completion.outcome().is_some())
    }

    /// The batches as they go on the wire.
    pub(crate) fn encode(&mut self) -> Result<Vec<Bytes>, Error> {
        let mut producer = self.producer;
        let encoded = self.batches.iter_mut().map(|batch| {
            let records = batch.records();
            let bytes = batch
                .encode(producer)
                .and_then(|bytes| match bytes.len() {
                    // The channel would refuse the whole request.
                    len if len > MAX_MESSAGE_BYTES - 4096 => Err(BatchError::TooLarge {
                        limit: MAX_MESSAGE_BYTES,
                    }),
                    _ => Ok(bytes),
                })
                .map_err(|e| {
                    Error::from_batch(
                        &e,
                        &batch.completion.topic,
                        batch.completion.partition,
                        None,
                    )
                });
            if let Some(state) = &mut producer {
                state.base_sequence = sequence_after(state.base_sequence, records);
            }
            bytes
        });
        encoded.collect()
    }

    /// Gives each batch its part of the outcome.
    pub(crate) fn complete(&self, outcome: &Result<Ack, Error>) {
        let mut before = 0;
        for batch in &self.batches {
            let outcome = outcome.clone().map(|ack| Ack {
                base_offset: ack.base_offset.map(|base| base.saturating_add(before)),
                ..ack
            });
            before += batch.records() as i64;
            batch.completion.complete(outcome);
        }
    }
}

/// Kafka's rule: after `i32::MAX` comes 0.
pub(crate) fn sequence_after(sequence: i32, records: usize) -> i32 {
    ((sequence as u64 + records as u64) & 0x7fff_ffff) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_wrap_to_zero_as_kafkas_do() {
        assert_eq!(sequence_after(0, 10), 10);
        assert_eq!(sequence_after(i32::MAX, 1), 0);
        assert_eq!(sequence_after(i32::MAX - 1, 5), 3);
    }

    #[test]
    fn a_built_batch_can_change_its_producer_and_nothing_else() {
        let mut builder = BatchBuilder::new(BatchOptions {
            compression: millrace_record::Compression::Lz4,
            ..Default::default()
        });
        builder.append(1000, Some(b"k"), None, &[]);
        builder.append(990, None, Some(b""), &[]);
        let mut batch = Batch {
            id: 0,
            payload: Payload::Open(builder),
            completion: Completion::new("t".into(), 0),
            reserved: 0,
            opened: Instant::now(),
            deadline: Instant::now(),
        };
        let old = ProducerState {
            id: 1,
            epoch: 0,
            base_sequence: 7,
        };
        let first = batch.encode(Some(old)).unwrap();
        assert_eq!(
            batch.encode(Some(old)).unwrap(),
            first,
            "a retry sends the same bytes"
        );
        let new = ProducerState {
            id: 2,
            epoch: 0,
            base_sequence: 0,
        };
        let second = batch.encode(Some(new)).unwrap();
        assert_eq!(state_of(&millrace_record::validate(&second).unwrap()), new);
        let records = |bytes: &Bytes| -> Vec<_> {
            decode(bytes, &DecodeLimits::default())
                .unwrap()
                .map(Result::unwrap)
                .collect()
        };
        assert_eq!(records(&first), records(&second));
    }
}
