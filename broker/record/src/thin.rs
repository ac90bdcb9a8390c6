//! Compaction of one batch: some of its records stay, and all else of it does.
//!
//! As Kafka's log cleaner does it: offsets, timestamps and the producer's sequence are those of the whole batch, so the last offset delta no longer follows
//! from the record count. What stays is copied as it is.

use bytes::Bytes;

use crate::{BatchError, BatchHeader, DecodeLimits, HEADER_LEN, Record, compression, decode};

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Thinned {
    /// All its records stay.
    Whole,
    /// Some do.
    Part(Bytes),
    /// None does.
    Nothing,
}

/// Leaves out records that are not to be kept.
///
/// # Errors
/// If the batch is damaged, or holds more than `limits` allow.
pub fn thin(
    batch: &Bytes,
    limits: &DecodeLimits,
    mut keeps: impl FnMut(&Record) -> bool,
) -> Result<Thinned, BatchError> {
    let mut header = BatchHeader::parse(batch)?;
    let mut records = decode(batch, limits)?;
    let mut kept = Vec::new();
    let mut count = 0;
    while let Some((record, bytes)) = records.next_with_bytes() {
        let record = record?;
        if keeps(&record) {
            kept.extend_from_slice(&bytes);
            count += 1;
        }
    }
    if count == header.record_count {
        return Ok(Thinned::Whole);
    }
    if count == 0 {
        return Ok(Thinned::Nothing);
    }
    let mut thinned = compression::compress(header.attributes.compression(), &kept)?;
    header.record_count = count;
    header.seal(&mut thinned)?;
    Ok(Thinned::Part(thinned.into()))
}

/// A batch without records in place of one: it keeps what the header says of offsets, epoch, time and producer.
///
/// # Errors
/// If the header can't be read.
pub fn hollow(batch: &[u8]) -> Result<Bytes, BatchError> {
    let mut header = BatchHeader::parse(batch)?;
    header.record_count = 0;
    let mut hollow = vec![0; HEADER_LEN];
    header.seal(&mut hollow)?;
    Ok(hollow.into())
}

/// A batch without records and producer in place of all that lies from `base_offset` to `last_offset`, of that epoch.
///
/// # Errors
/// If there are more offsets than a batch can have.
pub fn gap(
    base_offset: i64,
    last_offset: i64,
    leader_epoch: i32,
    max_timestamp: i64,
) -> Result<Bytes, BatchError> {
    let last_offset_delta = i32::try_from(last_offset - base_offset);
    let last_offset_delta = last_offset_delta.map_err(|_| {
        BatchError::invalid(format!(
            "offsets {base_offset} to {last_offset} are more than a batch can have"
        ))
    })?;
    let header = BatchHeader {
        base_offset,
        leader_epoch,
        last_offset_delta,
        ..BatchHeader::empty(max_timestamp)
    };
    let mut gap = vec![0; HEADER_LEN];
    header.seal(&mut gap)?;
    Ok(gap.into())
}

/// The part of a [`gap`] that begins at `offset`: for who has what is before. `None`: the batch of this header is to be taken as it is.
///
/// # Errors
/// Never, of a header that was read.
pub fn gap_from(header: &BatchHeader, offset: i64) -> Result<Option<Bytes>, BatchError> {
    if header.record_count > 0 || header.base_offset >= offset || header.producer_id >= 0 {
        return Ok(None);
    }
    gap(
        offset,
        header.last_offset(),
        header.leader_epoch,
        header.max_timestamp,
    )
    .map(Some)
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::*;
    use crate::{BatchBuilder, BatchOptions, Compression, ProducerState, validate_stored};

    fn batch(compression: Compression) -> Bytes {
        let mut builder = BatchBuilder::new(BatchOptions {
            compression,
            ..BatchOptions::default()
        });
        for n in 0..10_u8 {
            builder.append(1_000 + i64::from(n), Some(&[n % 3]), Some(&[n]), &[]);
        }
        builder.set_producer(ProducerState {
            id: 7,
            epoch: 1,
            base_sequence: 100,
        });
        let mut batch = BytesMut::from(&builder.build().unwrap()[..]);
        crate::set_base_offset(&mut batch, 50);
        crate::set_leader_epoch(&mut batch, 4);
        batch.freeze()
    }

    fn records(batch: &Bytes) -> Vec<Record> {
        let records = decode(batch, &DecodeLimits::default()).unwrap();
        records.map(Result::unwrap).collect()
    }

    #[test]
    fn what_stays_is_as_it_was() {
        for compression in Compression::ALL {
            let whole = batch(compression);
            let keeps = |record: &Record| record.offset % 2 == 1;
            let Thinned::Part(part) = thin(&whole, &DecodeLimits::default(), keeps).unwrap() else {
                panic!("half of it stays");
            };
            let expected: Vec<_> = records(&whole).into_iter().filter(keeps).collect();
            assert_eq!(records(&part), expected, "{compression}");
            let (before, after) = (
                BatchHeader::parse(&whole).unwrap(),
                validate_stored(&part).unwrap(),
            );
            assert_eq!(after.last_offset(), before.last_offset());
            assert_eq!(after.last_sequence(), before.last_sequence());
            assert_eq!(
                (after.leader_epoch, after.producer_id, after.record_count),
                (4, 7, 5)
            );
            assert!(crate::validate(&part).is_err(), "no producer sends such");
            // Again, of what is left.
            let limits = DecodeLimits::default();
            let once = thin(&part, &limits, |record| record.offset == 53).unwrap();
            let Thinned::Part(once) = once else {
                panic!("one stays");
            };
            assert_eq!(records(&once).len(), 1);
            assert_eq!(thin(&once, &limits, |_| true).unwrap(), Thinned::Whole);
            assert_eq!(thin(&once, &limits, |_| false).unwrap(), Thinned::Nothing);
        }
    }

    #[test]
    fn a_producer_without_a_sequence_is_refused_here_too() {
        let producer = ProducerState {
            id: 7,
            epoch: 1,
            base_sequence: -1,
        };
        let mut builder = BatchBuilder::new(BatchOptions {
            producer: Some(producer),
            ..BatchOptions::default()
        });
        builder.append(0, None, None, &[]);
        let refused = validate_stored(&builder.build().unwrap()).unwrap_err();
        assert!(
            refused.to_string().contains("base sequence -1"),
            "{refused}"
        );
    }

    #[test]
    fn what_is_gone_leaves_its_offsets() {
        let hollow = hollow(&batch(Compression::Zstd)).unwrap();
        let header = validate_stored(&hollow).unwrap();
        assert_eq!((header.base_offset, header.last_offset()), (50, 59));
        assert_eq!((header.producer_id, header.last_sequence()), (7, 109));
        assert!(records(&hollow).is_empty());
        // A producer's last batch is needed whole.
        assert_eq!(gap_from(&header, 55).unwrap(), None);

        let whole = gap(10, 1_000_000, 3, 99).unwrap();
        assert!(records(&whole).is_empty());
        let header = validate_stored(&whole).unwrap();
        assert_eq!(gap_from(&header, 10).unwrap(), None);
        let rest = gap_from(&header, 11).unwrap().unwrap();
        let header = validate_stored(&rest).unwrap();
        assert_eq!((header.base_offset, header.last_offset()), (11, 1_000_000));
        assert_eq!((header.leader_epoch, header.producer_id), (3, -1));
        assert!(gap(0, i64::from(i32::MAX) + 1, 0, 0).is_err());
    }
}
