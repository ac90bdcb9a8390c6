//! What holds for all batches: they read back as written, and damaged ones are refused or read as what their bytes say,
//! without panics and without more memory than allowed.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use bytes::Bytes;
use millrace_record::{
    BatchBuilder, BatchError, BatchHeader, BatchOptions, Compression, DecodeLimits, HEADER_LEN,
    ProducerState, Record, RecordHeader, decode, set_base_offset, set_log_append_time, split,
    validate,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

const LIMITS: DecodeLimits = DecodeLimits {
    max_decompressed_bytes: 1 << 20,
};

fn content() -> impl Strategy<Value = Option<Bytes>> {
    let bytes = prop_oneof![
        3 => vec(any::<u8>(), 0..40),
        1 => (any::<u8>(), 0..5_000_usize).prop_map(|(byte, length)| vec![byte; length]),
    ];
    option::of(bytes.prop_map(Bytes::from))
}

fn header() -> impl Strategy<Value = RecordHeader> {
    (vec(any::<u8>(), 0..12), content()).prop_map(|(key, value)| RecordHeader {
        key: key.into(),
        value,
    })
}

fn record() -> impl Strategy<Value = Record> {
    let timestamp = prop_oneof![4 => 1_700_000_000_000..1_700_000_100_000_i64, 1 => any::<i64>()];
    (timestamp, content(), content(), vec(header(), 0..4)).prop_map(
        |(timestamp_ms, key, value, headers)| Record {
            offset: 0,
            timestamp_ms,
            key,
            value,
            headers,
        },
    )
}

fn options() -> impl Strategy<Value = BatchOptions> {
    let producer =
        (0..=i64::MAX, 0..=i16::MAX, 0..=i32::MAX).prop_map(|(id, epoch, base_sequence)| {
            ProducerState {
                id,
                epoch,
                base_sequence,
            }
        });
    (
        select(&Compression::ALL[..]),
        option::of(producer),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(
            |(compression, producer, transactional, control)| BatchOptions {
                compression,
                producer,
                transactional,
                control,
            },
        )
}

fn build(options: BatchOptions, records: &[Record]) -> Bytes {
    let mut builder = BatchBuilder::new(options);
    for (n, record) in records.iter().enumerate() {
        let (key, value) = (record.key.as_deref(), record.value.as_deref());
        let before = builder.size();
        assert_eq!(
            builder.append(record.timestamp_ms, key, value, &record.headers),
            n as i32
        );
        assert!(
            builder.size() - before <= BatchBuilder::max_record_size(key, value, &record.headers)
        );
    }
    assert_eq!(builder.record_count(), records.len());
    builder.build().unwrap()
}

fn read(batch: &Bytes) -> Result<Vec<Record>, BatchError> {
    decode(batch, &LIMITS)?.collect()
}

/// Makes the checksum right again, as a hostile producer would.
fn reseal(batch: &mut [u8]) {
    if batch.len() >= HEADER_LEN {
        let crc = crc32c::crc32c(&batch[21..]);
        batch[17..21].copy_from_slice(&crc.to_be_bytes());
    }
}

/// Reads bytes of unknown origin in every way, and checks what must hold whatever they are.
fn read_untrusted(bytes: Bytes) {
    let checked = validate(&bytes);
    let mut yielded = 0;
    let decoded = decode(&bytes, &LIMITS);
    if let Ok(records) = decoded {
        let header = BatchHeader::parse(&bytes).unwrap();
        let mut last = None;
        for record in records.map_while(Result::ok) {
            assert!(last.is_none_or(|last| record.offset > last));
            assert!((header.base_offset..=header.last_offset()).contains(&record.offset));
            last = Some(record.offset);
            yielded += 1;
        }
        assert!(yielded <= header.record_count);
    } else {
        assert!(!matches!(decoded, Err(BatchError::CorruptCrc { .. })) || checked.is_err());
    }
    let whole: usize = split(bytes.clone())
        .map_while(Result::ok)
        .map(|batch| batch.len())
        .sum();
    assert!(whole <= bytes.len());
}

proptest! {
    #[test]
    fn batches_read_back_as_written(
        options in options(),
        records in vec(record(), 1..20),
        base_offset in 0..i64::MAX - 20,
        append_time in option::of(any::<i64>()),
    ) {
        let mut batch = build(options, &records).to_vec();
        set_base_offset(&mut batch, base_offset);
        if let Some(now) = append_time {
            set_log_append_time(&mut batch, now);
        }
        let batch = Bytes::from(batch);
        let header = validate(&batch).unwrap();
        prop_assert_eq!(header.size(), batch.len());
        prop_assert_eq!(header.attributes.compression(), options.compression);
        prop_assert_eq!(header.attributes.is_transactional(), options.transactional);
        prop_assert_eq!(header.attributes.is_control(), options.control);
        prop_assert_eq!(header.producer_id, options.producer.map_or(-1, |p| p.id));
        let newest = records.iter().map(|record| record.timestamp_ms).max().unwrap();
        prop_assert_eq!(header.max_timestamp, append_time.unwrap_or(newest));

        let expected: Vec<Record> = records
            .into_iter()
            .zip(base_offset..)
            .map(|(record, offset)| Record {
                offset,
                timestamp_ms: append_time.unwrap_or(record.timestamp_ms),
                ..record
            })
            .collect();
        prop_assert_eq!(read(&batch).unwrap(), expected);
    }

    #[test]
    fn batches_back_to_back_are_split_where_they_join(
        batches in vec((options(), vec(record(), 1..4)), 0..5),
        cut in any::<Index>(),
    ) {
        let batches: Vec<Bytes> = batches.iter().map(|(options, records)| build(*options, records)).collect();
        let joined = Bytes::from(batches.concat());
        let found: Vec<Bytes> = split(joined.clone()).collect::<Result<_, _>>().unwrap();
        prop_assert_eq!(&found, &batches);

        if !joined.is_empty() {
            let cut = cut.index(joined.len());
            let ends = batches.iter().scan(0, |end, batch| { *end += batch.len(); Some(*end) });
            let whole: Vec<usize> = ends.take_while(|end| *end <= cut).collect();
            let mut found = split(joined.slice(..cut));
            for batch in &batches[..whole.len()] {
                prop_assert_eq!(found.next(), Some(Ok(batch.clone())));
            }
            let at_a_joint = cut == whole.last().copied().unwrap_or(0);
            match found.next() {
                Some(Err(BatchError::Truncated { .. })) => prop_assert!(!at_a_joint),
                None => prop_assert!(at_a_joint),
                other => prop_assert!(false, "{:?}", other),
            }
            prop_assert_eq!(found.next(), None);
        }
    }

    #[test]
    fn a_changed_byte_is_noticed(
        options in options(),
        records in vec(record(), 1..6),
        at in any::<Index>(),
        flip in 1..=u8::MAX,
    ) {
        let mut batch = build(options, &records).to_vec();
        let at = at.index(batch.len());
        batch[at] ^= flip;
        let batch = Bytes::from(batch);
        match at {
            // Outside the checksum. A base offset near the end of the numbers may still be refused.
            0..=7 | 12..=15 => read_untrusted(batch),
            17..=20 => {
                let noticed = matches!(validate(&batch), Err(BatchError::CorruptCrc { .. }));
                prop_assert!(noticed);
                prop_assert!(read(&batch).is_err());
            }
            _ => {
                prop_assert!(validate(&batch).is_err());
                prop_assert!(read(&batch).is_err());
            }
        }
    }

    #[test]
    fn a_cut_batch_is_refused(options in options(), records in vec(record(), 1..6), at in any::<Index>()) {
        let batch = build(options, &records);
        let cut = batch.slice(..at.index(batch.len()));
        let truncated = matches!(validate(&cut), Err(BatchError::Truncated { .. }));
        prop_assert!(truncated);
        prop_assert!(read(&cut).is_err());
    }

    #[test]
    fn batches_broken_on_purpose_never_panic(
        options in options(),
        records in vec(record(), 1..6),
        edits in vec((any::<Index>(), any::<u8>()), 1..8),
        cut in option::of(any::<Index>()),
        mend_length in any::<bool>(),
    ) {
        let mut batch = build(options, &records).to_vec();
        for (at, byte) in edits {
            let at = at.index(batch.len());
            batch[at] = byte;
        }
        if let Some(cut) = cut {
            batch.truncate(cut.index(batch.len()));
        }
        if mend_length && batch.len() >= HEADER_LEN {
            let length = batch.len() as i32 - 12;
            batch[8..12].copy_from_slice(&length.to_be_bytes());
            batch[16] = 2;
        }
        reseal(&mut batch);
        read_untrusted(batch.into());
    }

    #[test]
    fn random_records_behind_a_good_header_never_panic(
        compression in select(&Compression::ALL[..]),
        count in prop_oneof![0..10_i32, any::<i32>()],
        payload in vec(any::<u8>(), 0..300),
        real_start in 0..24_usize,
    ) {
        let options = BatchOptions { compression, ..Default::default() };
        let model = Record { offset: 0, timestamp_ms: 1, key: None, value: Some(vec![1; 100].into()), headers: vec![] };
        // The start of real compressed data takes the decoders further than noise alone.
        let mut batch = build(options, &[model]).to_vec();
        batch.truncate(HEADER_LEN + real_start);
        batch.extend_from_slice(&payload);
        let length = batch.len() as i32 - 12;
        batch[8..12].copy_from_slice(&length.to_be_bytes());
        batch[23..27].copy_from_slice(&count.wrapping_sub(1).to_be_bytes());
        batch[57..61].copy_from_slice(&count.to_be_bytes());
        reseal(&mut batch);
        read_untrusted(batch.into());
    }

    #[test]
    fn random_bytes_never_panic(bytes in vec(any::<u8>(), 0..400)) {
        read_untrusted(bytes.into());
    }
}
