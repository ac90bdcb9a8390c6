//! Batches that lie: each is refused, with an error that says what is wrong and without work or memory in proportion to the lie.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::Write;

use bytes::Bytes;
use millrace_record::{
    BatchBuilder, BatchError, BatchOptions, Compression, DecodeLimits, HEADER_LEN, ProducerState,
    Record, RecordHeader, decode, validate,
};

const LIMITS: DecodeLimits = DecodeLimits {
    max_decompressed_bytes: 1 << 20,
};

fn batch(compression: Compression) -> Vec<u8> {
    let mut builder = BatchBuilder::new(BatchOptions {
        compression,
        ..Default::default()
    });
    builder.append(1000, Some(b"k1"), Some(b"v1"), &[]);
    builder.append(1001, Some(b"k2"), Some(b"v2"), &[]);
    builder.build().unwrap().to_vec()
}

/// A batch with this many records, whose (compressed) bytes are `records`, checksum right.
fn forge(compression: Compression, count: i32, records: &[u8]) -> Bytes {
    let mut batch = batch(compression);
    batch.truncate(HEADER_LEN);
    batch.extend_from_slice(records);
    let length = batch.len() as i32 - 12;
    batch[8..12].copy_from_slice(&length.to_be_bytes());
    batch[23..27].copy_from_slice(&(count - 1).to_be_bytes());
    batch[57..61].copy_from_slice(&count.to_be_bytes());
    seal(batch)
}

fn seal(mut batch: Vec<u8>) -> Bytes {
    let crc = crc32c::crc32c(&batch[21..]);
    batch[17..21].copy_from_slice(&crc.to_be_bytes());
    batch.into()
}

fn read(batch: &Bytes) -> Result<Vec<Record>, BatchError> {
    decode(batch, &LIMITS)?.collect()
}

#[track_caller]
fn assert_invalid<T: std::fmt::Debug>(result: Result<T, BatchError>, reason: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, BatchError::Invalid { .. }), "{error:?}");
    assert!(
        error.to_string().contains(reason),
        "`{error}` does not say `{reason}`"
    );
}

#[test]
fn lies_in_the_header_are_refused_by_name() {
    let cases: &[(usize, &[u8], &str)] = &[
        (8, &0_i32.to_be_bytes(), "batch length 0"),
        (8, &48_i32.to_be_bytes(), "batch length 48"),
        (8, &(-1_i32).to_be_bytes(), "batch length -1"),
        (8, &i32::MIN.to_be_bytes(), "batch length -2147483648"),
        (8, &60_i32.to_be_bytes(), "bytes follow the batch"),
        (21, &5_u16.to_be_bytes(), "compression code 5"),
        (21, &7_u16.to_be_bytes(), "compression code 7"),
        (23, &(-1_i32).to_be_bytes(), "last offset delta -1"),
        (
            23,
            &2_i32.to_be_bytes(),
            "last offset delta 2 does not fit 2 records",
        ),
        (
            23,
            &0_i32.to_be_bytes(),
            "last offset delta 0 does not fit 2 records",
        ),
        (57, &0_i32.to_be_bytes(), "record count is 0"),
        (57, &(-7_i32).to_be_bytes(), "record count is -7"),
        (57, &i32::MIN.to_be_bytes(), "record count is -2147483648"),
        (
            57,
            &i32::MAX.to_be_bytes(),
            "last offset delta 1 does not fit 2147483647 records",
        ),
        (43, &9_i64.to_be_bytes(), "base sequence -1 of producer 9"),
        (
            0,
            &i64::MAX.to_be_bytes(),
            "offsets from 9223372036854775807 on overflow",
        ),
    ];
    for (at, bytes, reason) in cases {
        let mut lying = batch(Compression::None);
        lying[*at..at + bytes.len()].copy_from_slice(bytes);
        assert_invalid(validate(&seal(lying)), reason);
    }
}

#[test]
fn other_formats_and_two_gigabyte_claims_are_refused_before_anything_is_read() {
    for magic in [0, 1, 3, -1_i8] {
        let mut other = batch(Compression::None);
        other[16] = magic as u8;
        assert_eq!(
            validate(&other),
            Err(BatchError::UnsupportedMagic { magic })
        );
    }
    let mut huge = batch(Compression::None);
    huge[8..12].copy_from_slice(&i32::MAX.to_be_bytes());
    let available = huge.len();
    let truncated = BatchError::Truncated {
        needed: i32::MAX as usize + 12,
        available,
    };
    assert_eq!(validate(&huge), Err(truncated.clone()));
    assert_eq!(read(&huge.into()), Err(truncated));
}

#[test]
fn a_corrupt_batch_says_both_checksums() {
    let mut corrupt = batch(Compression::None);
    let expected = crc32c::crc32c(&corrupt[21..]);
    *corrupt.last_mut().unwrap() ^= 1;
    let actual = crc32c::crc32c(&corrupt[21..]);
    assert_eq!(
        validate(&corrupt),
        Err(BatchError::CorruptCrc { expected, actual })
    );
    assert_eq!(
        read(&corrupt.into()),
        Err(BatchError::CorruptCrc { expected, actual })
    );
}

#[test]
fn lies_in_records_are_refused_by_name() {
    // A sound record: length 6, attributes, timestamp delta, offset delta, null key, null value, no headers.
    let sound: &[u8] = &[12, 0, 0, 0, 1, 1, 0];
    assert_eq!(read(&forge(Compression::None, 1, sound)).unwrap().len(), 1);
    let huge: &[u8] = &[0xfe, 0xff, 0xff, 0xff, 0x0f];
    let with = |before: &[u8], after: &[u8]| [before, huge, after].concat();
    let cases: &[(i32, Vec<u8>, &str)] = &[
        (1, [sound, &[0]].concat(), "1 bytes follow the last record"),
        (
            2,
            [sound, sound].concat(),
            "record 2 of 2 (byte 7 of its records): its offset delta is out of order",
        ),
        (
            1,
            vec![12, 0, 0, 2, 1, 1, 0],
            "offset delta is out of order or past",
        ),
        (
            1,
            vec![12, 0, 0, 1, 1, 1, 0],
            "offset delta is out of order or past",
        ),
        (1, vec![11, 0, 0, 0, 1, 1, 0], "its length is negative"),
        (1, vec![14, 0, 0, 0, 1, 1, 0], "a length runs past its end"),
        (1, vec![10, 0, 0, 0, 1, 1, 0], "it ends within a field"),
        (
            1,
            vec![14, 0, 0, 0, 1, 1, 0, 0],
            "bytes follow its last header",
        ),
        (1, vec![12, 0, 0, 0, 3, 1, 0], "a length is negative"),
        (1, vec![12, 0, 0, 0, 1, 3, 0], "a length is negative"),
        (1, vec![12, 0, 0, 0, 1, 1, 1], "header count is negative"),
        (
            1,
            vec![16, 0, 0, 0, 1, 1, 2, 1, 0],
            "a header's key is absent",
        ),
        (1, vec![12, 0, 0, 0, 1, 1, 2], "header count is larger"),
        (
            1,
            with(&[], &[0, 0, 0, 1, 1, 0]),
            "a length runs past its end",
        ),
        (
            1,
            with(&[20, 0, 0, 0], &[1, 0]),
            "a length runs past its end",
        ),
        (
            1,
            with(&[20, 0, 0, 0, 1], &[0]),
            "a length runs past its end",
        ),
        (1, with(&[20, 0, 0, 0, 1, 1], &[]), "header count is larger"),
        (
            1,
            vec![0xff, 0xff, 0xff, 0xff, 0x7f, 0, 0],
            "a varint overflows",
        ),
        (
            3,
            [sound, sound].concat(),
            "3 records need at least 21 bytes, it has 14",
        ),
        (i32::MAX, sound.to_vec(), "2147483647 records need at least"),
        (1, vec![], "1 records need at least 7 bytes, it has 0"),
    ];
    for (count, records, reason) in cases {
        assert_invalid(read(&forge(Compression::None, *count, records)), reason);
    }
}

#[test]
fn reading_ends_at_the_first_broken_record() {
    let records = [
        &[12, 0, 0, 0, 1, 1, 0][..],
        &[12, 0, 0, 0, 1, 1, 0],
        &[12, 0, 0, 4, 1, 1, 0],
    ]
    .concat();
    let mut records = decode(&forge(Compression::None, 3, &records), &LIMITS).unwrap();
    assert!(records.next().unwrap().is_ok());
    assert!(records.next().unwrap().is_err());
    assert_eq!(records.next(), None);
}

#[test]
fn a_list_of_headers_is_held_to_the_limit() {
    let headers = vec![
        RecordHeader {
            key: Bytes::new(),
            value: None
        };
        20_000
    ];
    let mut builder = BatchBuilder::new(BatchOptions::default());
    builder.append(0, None, None, &headers);
    let batch = builder.build().unwrap();
    assert_eq!(
        decode(&batch, &DecodeLimits::default())
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .headers,
        headers
    );
    assert_invalid(read(&batch), "headers take more memory");
}

#[test]
fn batches_thinned_or_emptied_by_compaction_are_read_but_not_taken() {
    let mut thinned = batch(Compression::None);
    thinned[23..27].copy_from_slice(&9_i32.to_be_bytes());
    let thinned = seal(thinned);
    assert_eq!(read(&thinned).unwrap().len(), 2);
    assert_invalid(validate(&thinned), "last offset delta 9");

    let mut emptied = forge(Compression::None, 0, &[]).to_vec();
    emptied[23..27].copy_from_slice(&9_i32.to_be_bytes());
    let emptied = seal(emptied);
    assert_eq!(read(&emptied).unwrap(), []);
    assert_invalid(validate(&emptied), "record count is 0");

    let mut hiding = forge(Compression::None, 0, &[12, 0, 0, 0, 1, 1, 0]).to_vec();
    hiding[23..27].copy_from_slice(&9_i32.to_be_bytes());
    assert_invalid(read(&seal(hiding)), "no records and yet 7 bytes");
}

#[test]
fn compression_bombs_stop_at_the_limit() {
    let bomb = vec![0; 8 << 20];
    for compression in [
        Compression::Gzip,
        Compression::Snappy,
        Compression::Lz4,
        Compression::Zstd,
    ] {
        let mut builder = BatchBuilder::new(BatchOptions {
            compression,
            ..Default::default()
        });
        builder.append(0, None, Some(&bomb), &[]);
        let records = builder.size() - HEADER_LEN;
        let batch = builder.build().unwrap();
        assert!(batch.len() < bomb.len() / 20, "{compression}");
        validate(&batch).unwrap();
        assert_eq!(
            read(&batch),
            Err(BatchError::TooLarge { limit: 1 << 20 }),
            "{compression}"
        );
        let exact = DecodeLimits {
            max_decompressed_bytes: records,
        };
        assert_eq!(decode(&batch, &exact).unwrap().count(), 1, "{compression}");
        let short = DecodeLimits {
            max_decompressed_bytes: records - 1,
        };
        assert!(
            matches!(decode(&batch, &short), Err(BatchError::TooLarge { .. })),
            "{compression}"
        );
    }
}

#[test]
fn data_that_its_codec_cannot_read_is_invalid() {
    for compression in [
        Compression::Gzip,
        Compression::Snappy,
        Compression::Lz4,
        Compression::Zstd,
    ] {
        let sound = Bytes::from(batch(compression));
        let data = &sound[HEADER_LEN..];
        for broken in [
            &b"not compressed at all"[..],
            &data[..data.len() / 2],
            &[data, b"more"].concat(),
        ] {
            assert_invalid(read(&forge(compression, 2, broken)), "");
        }
        // Two records where one is promised.
        let fewer = read(&forge(compression, 1, data));
        assert!(fewer.is_err(), "{compression}");
    }
}

#[test]
fn a_size_that_snappy_claims_is_not_believed() {
    // A raw block that says 4 GiB - 1 and holds one literal byte.
    let raw = [0xff, 0xff, 0xff, 0xff, 0x0f, 0x00, b'x'];
    assert_invalid(
        read(&forge(Compression::Snappy, 1, &raw)),
        "claims to hold 4294967295",
    );
    let mut framed = b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01".to_vec();
    framed.extend_from_slice(&i32::MAX.to_be_bytes());
    framed.extend_from_slice(&raw);
    assert_invalid(
        read(&forge(Compression::Snappy, 1, &framed)),
        "a block is cut short",
    );
}

#[test]
fn foreign_ways_to_write_a_codec_are_read() {
    let plain = batch(Compression::None);
    let records = &plain[HEADER_LEN..];
    let expected = read(&plain.clone().into()).unwrap();
    let (front, back) = records.split_at(9);

    let raw_snappy = snap::raw::Encoder::new().compress_vec(records).unwrap();
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let framed = |bytes: &[u8]| {
        let block = snap::raw::Encoder::new().compress_vec(bytes).unwrap();
        [
            &b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01"[..],
            &(block.len() as u32).to_be_bytes(),
            &block,
        ]
        .concat()
    };
    let lz4 = {
        use lz4_flex::frame::{BlockMode, FrameEncoder, FrameInfo};
        let info = FrameInfo::new()
            .block_mode(BlockMode::Linked)
            .content_checksum(true)
            .block_checksums(true);
        let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
        encoder.write_all(records).unwrap();
        encoder.finish().unwrap()
    };
    let streamed = zstd::stream::encode_all(records, 19).unwrap();
    let zstd = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).unwrap();
    let cases = [
        ("snappy without framing", Compression::Snappy, raw_snappy),
        (
            "snappy streams joined",
            Compression::Snappy,
            [framed(front), framed(back)].concat(),
        ),
        (
            "gzip members joined",
            Compression::Gzip,
            [gzip(front), gzip(back)].concat(),
        ),
        (
            "lz4 with linked blocks and checksums",
            Compression::Lz4,
            lz4,
        ),
        ("zstd without content size", Compression::Zstd, streamed),
        (
            "zstd frames joined",
            Compression::Zstd,
            [zstd(front), zstd(back)].concat(),
        ),
    ];
    for (what, compression, data) in cases {
        assert_eq!(
            read(&forge(compression, 2, &data)).as_ref(),
            Ok(&expected),
            "{what}"
        );
    }
}

#[test]
fn an_empty_batch_cannot_be_built() {
    assert_invalid(
        BatchBuilder::new(BatchOptions::default()).build(),
        "it has no records",
    );
}

#[test]
fn sequences_wrap_at_the_largest_as_kafkas_do() {
    let mut builder = BatchBuilder::new(BatchOptions::default());
    for _ in 0..3 {
        builder.append(0, None, None, &[]);
    }
    assert!(!builder.is_empty());
    builder.set_producer(ProducerState {
        id: 1,
        epoch: 0,
        base_sequence: i32::MAX - 1,
    });
    assert_eq!(
        validate(&builder.build().unwrap()).unwrap().last_sequence(),
        0
    );
}
