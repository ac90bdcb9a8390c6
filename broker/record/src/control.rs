//! Control batches: the markers that end a transaction in a partition (KIP-98).
//!
//! A marker is one record. Its key is version i16 = 0 and type i16 (0 abort, 1 commit); its value is version i16 = 0 and the
//! coordinator's epoch i32; big-endian.

use bytes::Bytes;

use crate::{
    BatchBuilder, BatchError, BatchHeader, BatchOptions, DecodeLimits, ProducerState, decode,
};

const VERSION: i16 = 0;
const ABORT: i16 = 0;
const COMMIT: i16 = 1;

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EndMarker {
    /// Nothing of it counts.
    Abort,
    /// All of it counts.
    Commit,
}

/// Builds the batch that ends a producer's transaction in a partition.
pub fn marker_batch(
    end: EndMarker,
    producer_id: i64,
    producer_epoch: i16,
    coordinator_epoch: i32,
    timestamp_ms: i64,
) -> Result<Bytes, BatchError> {
    let mut builder = BatchBuilder::new(BatchOptions {
        producer: Some(ProducerState {
            id: producer_id,
            epoch: producer_epoch,
            base_sequence: -1,
        }),
        transactional: true,
        control: true,
        ..BatchOptions::default()
    });
    let kind = match end {
        EndMarker::Abort => ABORT,
        EndMarker::Commit => COMMIT,
    };
    let key = [VERSION.to_be_bytes(), kind.to_be_bytes()].concat();
    let mut value = VERSION.to_be_bytes().to_vec();
    value.extend_from_slice(&coordinator_epoch.to_be_bytes());
    builder.append(timestamp_ms, Some(&key), Some(&value), &[]);
    builder.build()
}

/// What a control batch marks; `None` if it is something else than the end of a transaction.
pub fn end_marker(batch: &Bytes) -> Result<Option<EndMarker>, BatchError> {
    if !BatchHeader::parse(batch)?.attributes.is_control() {
        return Ok(None);
    }
    let mut records = decode(batch, &DecodeLimits::default())?;
    let Some(record) = records.next().transpose()? else {
        return Ok(None);
    };
    let key = record.key.unwrap_or_default();
    // Later versions may add to it, not change what is there.
    let Some(kind) = key.get(2..4) else {
        return Err(BatchError::invalid("the key of its marker is cut short"));
    };
    Ok(match i16::from_be_bytes([kind[0], kind[1]]) {
        ABORT => Some(EndMarker::Abort),
        COMMIT => Some(EndMarker::Commit),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::validate;

    #[test]
    fn a_marker_says_what_it_marks() {
        for end in [EndMarker::Abort, EndMarker::Commit] {
            let batch = marker_batch(end, 7, 3, 1, 1_700_000_000_000).unwrap();
            let header = validate(&batch).unwrap();
            assert!(header.attributes.is_control() && header.attributes.is_transactional());
            assert_eq!(
                (
                    header.producer_id,
                    header.producer_epoch,
                    header.base_sequence
                ),
                (7, 3, -1)
            );
            assert_eq!(end_marker(&batch).unwrap(), Some(end));
        }
    }

    #[test]
    fn other_batches_mark_nothing_and_a_short_key_is_an_error() {
        let batch = |control, key: &[u8]| {
            let mut builder = BatchBuilder::new(BatchOptions {
                control,
                ..BatchOptions::default()
            });
            builder.append(0, Some(key), None, &[]);
            builder.build().unwrap()
        };
        assert_eq!(end_marker(&batch(false, &[0, 0, 0, 1])).unwrap(), None);
        assert_eq!(end_marker(&batch(true, &[0, 0, 0, 9])).unwrap(), None);
        assert!(end_marker(&batch(true, &[0, 0, 0])).is_err());
    }
}
