//! Batches written by Apache Kafka's Java client (kafka-clients 4.1.1) read as it says it wrote them. `golden/` was made by
//! `e2e/compat/check.sh --update-golden`.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod manifest;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use millrace_record::{
    BatchBuilder, BatchError, BatchHeader, BatchOptions, Compression, DecodeLimits, ProducerState,
    TimestampType, decode, set_base_offset, set_leader_epoch, set_log_append_time, split, validate,
};

/// Batches that compaction made, which a broker must not take from a producer.
const COMPACTED: [&str; 2] = ["compacted.batch", "compacted-empty.batch"];

/// The kept batches, or those that `check.sh` just made.
fn dir() -> PathBuf {
    match std::env::var_os("KAFKA_BATCHES") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
    }
}

fn golden() -> impl Iterator<Item = (String, Vec<Bytes>)> {
    let dir = dir();
    let manifest = std::fs::read_to_string(dir.join("manifest.txt")).unwrap();
    let mut files: Vec<String> = Vec::new();
    for line in manifest.lines().filter(|line| line.starts_with("batch ")) {
        let file = line.split(' ').nth(1).unwrap();
        if files.last().is_none_or(|last| last != file) {
            files.push(file.to_owned());
        }
    }
    files.into_iter().map(move |file| {
        let bytes = Bytes::from(std::fs::read(dir.join(&file)).unwrap());
        let batches = split(bytes).collect::<Result<_, _>>().unwrap();
        (file, batches)
    })
}

#[test]
fn kafkas_batches_hold_what_its_client_wrote() {
    let manifest = std::fs::read_to_string(dir().join("manifest.txt")).unwrap();
    let mut read = Vec::new();
    for (file, batches) in golden() {
        for batch in batches {
            let header = BatchHeader::parse(&batch).unwrap();
            read.push(manifest::Batch::of(&file, &header).to_string());
            for record in decode(&batch, &DecodeLimits::default()).unwrap() {
                read.push(manifest::record(&record.unwrap()));
            }
        }
    }
    let expected: Vec<&str> = manifest.lines().collect();
    assert!(expected.len() > 160, "the manifest lost lines");
    for (expected, read) in expected.iter().zip(&read) {
        assert_eq!(read, expected);
    }
    assert_eq!(read.len(), expected.len());
}

#[test]
fn kafkas_batches_pass_validation_unless_compacted() {
    for (file, batches) in golden() {
        for batch in batches {
            let checked = validate(&batch);
            if COMPACTED.contains(&file.as_str()) {
                assert!(
                    matches!(checked, Err(BatchError::Invalid { .. })),
                    "{file}: {checked:?}"
                );
            } else {
                assert_eq!(checked, BatchHeader::parse(&batch), "{file}");
            }
        }
    }
}

#[test]
fn uncompressed_batches_are_byte_for_byte_those_that_kafka_writes() {
    let mut compared = 0;
    for (file, batches) in golden().filter(|(file, _)| !COMPACTED.contains(&file.as_str())) {
        for kafkas in batches {
            let header = BatchHeader::parse(&kafkas).unwrap();
            // With log append time the records' own timestamps, which Kafka keeps in the bytes, cannot be read any more.
            if header.attributes.compression() != Compression::None
                || header.attributes.timestamp_type() == TimestampType::LogAppendTime
            {
                continue;
            }
            let mut builder = BatchBuilder::new(BatchOptions {
                transactional: header.attributes.is_transactional(),
                control: header.attributes.is_control(),
                ..Default::default()
            });
            builder.set_producer(ProducerState {
                id: header.producer_id,
                epoch: header.producer_epoch,
                base_sequence: header.base_sequence,
            });
            for record in decode(&kafkas, &DecodeLimits::default()).unwrap() {
                let record = record.unwrap();
                builder.append(
                    record.timestamp_ms,
                    record.key.as_deref(),
                    record.value.as_deref(),
                    &record.headers,
                );
            }
            let mut ours = builder.build().unwrap().to_vec();
            set_base_offset(&mut ours, header.base_offset);
            set_leader_epoch(&mut ours, header.leader_epoch);
            assert_eq!(kafkas, ours, "{file}");
            compared += 1;
        }
    }
    assert_eq!(compared, 7);
}

#[test]
fn log_append_time_is_set_as_kafka_sets_it() {
    let (_, created) = golden()
        .find(|(file, _)| file == "none-create.batch")
        .unwrap();
    let (_, appended) = golden()
        .find(|(file, _)| file == "none-append.batch")
        .unwrap();
    let mut ours = created[0].to_vec();
    set_log_append_time(
        &mut ours,
        BatchHeader::parse(&appended[0]).unwrap().max_timestamp,
    );
    assert_eq!(appended[0], ours);
}

#[test]
fn no_byte_of_kafkas_batches_can_change_unnoticed() {
    for (file, batches) in golden().filter(|(file, _)| !file.contains("large")) {
        for batch in batches {
            // Byte 0 to 7 and 12 to 15 (base offset, leader epoch) are the broker's and outside the checksum.
            for at in (8..12).chain(16..batch.len()) {
                let mut changed = batch.to_vec();
                changed[at] ^= 0x10;
                assert!(
                    decode(&changed.into(), &DecodeLimits::default()).is_err(),
                    "{file}: byte {at}"
                );
            }
        }
    }
}
