//! What a backup of a partition consists of: whole record batches as brokers keep them, one after the other, in objects whose names say which.

use millrace_client::millrace_record::{
    BatchError, BatchHeader, DecodeLimits, Record, decode, split,
};
use millrace_client::{Bytes, Compression};
use object_store::path::Path;

const EXTENSION: &str = ".batches";

/// Some batches of a partition, in one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// The offset from which on it holds what the partition held.
    pub(super) first: i64,
    /// The offset after that.
    pub(super) next: i64,
    /// How many records that is: fewer than offsets, after compaction and transactions.
    pub(super) records: u64,
    pub(super) bytes: u64,
    pub(super) path: Path,
}

/// What is wrong with the names of a partition's segments.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NameError {
    #[error("{0} is not the name of a segment: FIRST-NEXT-RECORDS.batches")]
    Unreadable(String),
    #[error("{0} and {1} hold the same offsets: two exports ran at once, or into one place")]
    Overlap(Path, Path),
}

/// A segment's name. Names sort as their offsets do.
pub(super) fn name(first: i64, next: i64, records: u64) -> String {
    format!("{first:020}-{next:020}-{records}{EXTENSION}")
}

impl Segment {
    /// Reads the name of an object.
    pub(super) fn of(path: Path, bytes: u64) -> Result<Self, NameError> {
        let parse = || {
            let name = path.filename()?.strip_suffix(EXTENSION)?;
            let mut parts = name.split('-');
            let (first, next) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
            let records = parts.next()?.parse().ok()?;
            (parts.next().is_none() && 0 <= first && first < next).then_some((first, next, records))
        };
        let Some((first, next, records)) = parse() else {
            return Err(NameError::Unreadable(path.to_string()));
        };
        Ok(Self {
            first,
            next,
            records,
            bytes,
            path,
        })
    }
}

/// Sorts a partition's segments. Between two there may be a gap: retention came before the export.
pub(super) fn sorted(mut segments: Vec<Segment>) -> Result<Vec<Segment>, NameError> {
    segments.sort_by_key(|segment| (segment.first, segment.next));
    for pair in segments.windows(2) {
        if pair[1].first < pair[0].next {
            let (one, other) = (pair[0].path.clone(), pair[1].path.clone());
            return Err(NameError::Overlap(one, other));
        }
    }
    Ok(segments)
}

/// All records of a segment's bytes, checked.
pub(super) fn records(bytes: &Bytes) -> impl Iterator<Item = Result<Record, BatchError>> + use<> {
    split(bytes.clone()).flat_map(|batch| {
        let decoded = batch.and_then(|batch| decode(&batch, &DecodeLimits::default()));
        let (records, error) = match decoded {
            Ok(records) => (Some(records), None),
            Err(error) => (None, Some(Err(error))),
        };
        records.into_iter().flatten().chain(error)
    })
}

/// How the first batch is compressed.
pub(super) fn compression(bytes: &Bytes) -> Option<Compression> {
    let header = BatchHeader::parse(bytes).ok()?;
    Some(header.attributes.compression())
}

#[cfg(test)]
mod tests {
    use millrace_client::millrace_record::{BatchBuilder, BatchOptions};

    use super::*;

    fn segment(first: i64, next: i64) -> Segment {
        let path = Path::from(format!("t/0/{}", name(first, next, 1)));
        Segment::of(path, 0).unwrap()
    }

    #[test]
    fn a_name_says_what_the_segment_holds() {
        let read = segment(5, 1 << 40);
        assert_eq!((read.first, read.next, read.records), (5, 1 << 40, 1));
        for wrong in [
            "topic.json",
            "1-2.batches",
            "2-1-1.batches",
            "1-2-3-4.batches",
            "-1-2-3.batches",
        ] {
            let error = Segment::of(Path::from(wrong), 0).unwrap_err();
            assert!(
                error.to_string().contains("is not the name of a segment"),
                "{wrong}"
            );
        }
    }

    #[test]
    fn segments_are_sorted_and_may_have_gaps_but_not_overlap() {
        let firsts =
            |segments| sorted(segments).map(|s| s.iter().map(|s| s.first).collect::<Vec<_>>());
        assert_eq!(
            firsts(vec![segment(20, 30), segment(0, 10)]),
            Ok(vec![0, 20])
        );
        let error = firsts(vec![segment(0, 10), segment(9, 12)]).unwrap_err();
        assert!(
            error.to_string().contains("hold the same offsets"),
            "{error}"
        );
    }

    #[test]
    fn records_are_read_across_batches_and_damage_is_noticed() {
        let batch = |values: [&'static [u8]; 2]| {
            let mut builder = BatchBuilder::new(BatchOptions::default());
            for value in values {
                builder.append(1, None, Some(value), &[]);
            }
            builder.build().unwrap()
        };
        let whole: Vec<u8> = [batch([b"a", b"b"]), batch([b"c", b"d"])].concat();
        let read = |bytes: &[u8]| {
            let records = records(&Bytes::copy_from_slice(bytes));
            records
                .map(|r| r.map(|r| r.value.unwrap()))
                .collect::<Result<Vec<_>, _>>()
        };
        assert_eq!(read(&whole).unwrap(), ["a", "b", "c", "d"]);
        assert!(read(&whole[..whole.len() - 1]).is_err());
        assert!(read(&[&whole[..], b"x"].concat()).is_err());
        let mut changed = whole;
        *changed.last_mut().unwrap() ^= 1;
        assert!(read(&changed).is_err());
    }
}
