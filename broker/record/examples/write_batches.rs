//! Writes record batches of every kind and a manifest of what was put in, for another implementation to read:
//! `cargo run -p millrace-record --example write_batches -- DIR`, then `e2e/compat/RecordBatches.java read DIR`.

#[path = "../tests/manifest/mod.rs"]
mod manifest;

use std::error::Error;
use std::fs;
use std::path::PathBuf;

use bytes::Bytes;
use millrace_record::{
    BatchBuilder, BatchOptions, Compression, ProducerState, Record, RecordHeader, TimestampType,
    set_base_offset, set_leader_epoch, set_log_append_time,
};

const TIME: i64 = 1_700_000_000_123;
const APPEND_TIME: i64 = 1_700_000_777_777;

/// What the broker decides about a batch.
#[derive(Default, Clone, Copy)]
struct Appended {
    base_offset: i64,
    leader_epoch: Option<i32>,
    log_append_time: bool,
}

struct Writer {
    dir: PathBuf,
    manifest: String,
}

impl Writer {
    /// Writes a file of several batches.
    fn save(
        &mut self,
        name: &str,
        batches: &[(BatchOptions, Appended, Vec<Record>)],
    ) -> Result<(), Box<dyn Error>> {
        let file = format!("{name}.batch");
        let mut bytes = Vec::new();
        for (options, appended, records) in batches {
            bytes.extend_from_slice(&self.batch(&file, *options, *appended, records)?);
        }
        fs::write(self.dir.join(file), bytes)?;
        Ok(())
    }

    fn batch(
        &mut self,
        file: &str,
        options: BatchOptions,
        appended: Appended,
        records: &[Record],
    ) -> Result<Vec<u8>, Box<dyn Error>> {
        let mut builder = BatchBuilder::new(options);
        for record in records {
            builder.append(
                record.timestamp_ms,
                record.key.as_deref(),
                record.value.as_deref(),
                &record.headers,
            );
        }
        let mut batch = builder.build()?.to_vec();
        set_base_offset(&mut batch, appended.base_offset);
        if let Some(epoch) = appended.leader_epoch {
            set_leader_epoch(&mut batch, epoch);
        }
        if appended.log_append_time {
            set_log_append_time(&mut batch, APPEND_TIME);
        }

        let producer = options.producer.unwrap_or(ProducerState {
            id: -1,
            epoch: -1,
            base_sequence: -1,
        });
        let newest = records
            .iter()
            .map(|record| record.timestamp_ms)
            .max()
            .ok_or("no records")?;
        let delta = records.len() as i64 - 1;
        let last_sequence = match producer.base_sequence {
            -1 => -1,
            base => ((i64::from(base) + delta) % (1 << 31)) as i32,
        };
        let line = manifest::Batch {
            file,
            compression: options.compression,
            timestamp_type: if appended.log_append_time {
                TimestampType::LogAppendTime
            } else {
                TimestampType::CreateTime
            },
            base_offset: appended.base_offset,
            last_offset: appended.base_offset + delta,
            leader_epoch: appended.leader_epoch.unwrap_or(-1),
            max_timestamp: if appended.log_append_time {
                APPEND_TIME
            } else {
                newest
            },
            producer: (producer.id, producer.epoch),
            sequences: (producer.base_sequence, last_sequence),
            transactional: options.transactional,
            control: options.control,
            delete_horizon: None,
            record_count: records.len() as i32,
        };
        self.manifest.push_str(&format!("{line}\n"));
        for (record, offset) in records.iter().zip(appended.base_offset..) {
            let timestamp_ms = if appended.log_append_time {
                APPEND_TIME
            } else {
                record.timestamp_ms
            };
            self.manifest.push_str(&manifest::record(&Record {
                offset,
                timestamp_ms,
                ..record.clone()
            }));
            self.manifest.push('\n');
        }
        Ok(batch)
    }
}

fn record(
    timestamp_ms: i64,
    key: Option<&[u8]>,
    value: Option<&[u8]>,
    headers: &[(&str, Option<&[u8]>)],
) -> Record {
    let bytes = Bytes::copy_from_slice;
    Record {
        offset: 0,
        timestamp_ms,
        key: key.map(bytes),
        value: value.map(bytes),
        headers: headers
            .iter()
            .map(|(key, value)| RecordHeader {
                key: bytes(key.as_bytes()),
                value: value.map(bytes),
            })
            .collect(),
    }
}

/// Null, empty and real keys and values, and headers of every kind.
fn mixed() -> Vec<Record> {
    vec![
        record(TIME, None, None, &[]),
        record(TIME + 1, Some(b""), Some(b""), &[]),
        record(TIME + 2, None, Some(b"value without a key"), &[]),
        record(TIME + 3, Some(b"key without a value"), None, &[]),
        record(
            TIME + 500,
            Some(b"key"),
            Some(b"value"),
            &[
                ("trace", Some(b"a1b2")),
                ("null", None),
                ("empty", Some(b"")),
                ("", Some(b"no name")),
                ("trace", Some(b"again")),
                ("größe", Some(&[0, 255, 127])),
            ],
        ),
        record(
            TIME - 1,
            Some(&[0, 255, 128]),
            Some(&words(300, 1)),
            &[("long", Some(&words(80, 2)))],
        ),
    ]
}

/// Bytes that compress about as well as text does.
fn words(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut out = Vec::with_capacity(length + 16);
    while out.len() < length {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        out.extend_from_slice(format!("word{} ", (state >> 33) % 700).as_bytes());
    }
    out.truncate(length);
    out
}

fn many() -> Vec<Record> {
    (0..3000_i64)
        .map(|n| {
            let key = format!("user-{}", n % 97);
            let value = words((n % 211) as usize, n as u64);
            record(
                TIME + n * 3 - (n % 7) * 1000,
                (n % 5 != 0).then_some(key.as_bytes()),
                Some(&value),
                &[],
            )
        })
        .collect()
}

fn main() -> Result<(), Box<dyn Error>> {
    let dir = PathBuf::from(
        std::env::args_os()
            .nth(1)
            .ok_or("usage: write_batches DIR")?,
    );
    fs::create_dir_all(&dir)?;
    let mut out = Writer {
        dir,
        manifest: String::new(),
    };
    let create = Appended::default();
    let append = Appended {
        log_append_time: true,
        ..create
    };
    let at = |base_offset, epoch| Appended {
        base_offset,
        leader_epoch: Some(epoch),
        log_append_time: false,
    };
    for compression in Compression::ALL {
        let options = BatchOptions {
            compression,
            ..Default::default()
        };
        out.save(
            &format!("{compression}-create"),
            &[(options, create, mixed())],
        )?;
        out.save(
            &format!("{compression}-append"),
            &[(options, append, mixed())],
        )?;
        out.save(
            &format!("{compression}-many"),
            &[(options, at(123_456_789, 9), many())],
        )?;
        let large = vec![
            record(TIME, Some(b"large"), Some(&words(200_000, 3)), &[]),
            record(TIME, None, Some(&vec![7; 1_000_000]), &[]),
        ];
        out.save(&format!("{compression}-large"), &[(options, create, large)])?;
        let transactional = BatchOptions {
            producer: Some(ProducerState {
                id: i64::MAX,
                epoch: i16::MAX,
                base_sequence: 42,
            }),
            transactional: true,
            ..options
        };
        out.save(
            &format!("{compression}-transactional"),
            &[(transactional, at(1_000_000_000_000, 7), mixed())],
        )?;
    }
    let none = BatchOptions::default();
    let producer = |id, epoch, base_sequence| {
        Some(ProducerState {
            id,
            epoch,
            base_sequence,
        })
    };
    let wraps = BatchOptions {
        producer: producer(4711, 3, i32::MAX - 1),
        ..none
    };
    out.save("idempotent-sequence-wraps", &[(wraps, create, mixed())])?;
    let times =
        [TIME, TIME - 90_000_000, 0, i64::MAX].map(|time| record(time, None, Some(b"when"), &[]));
    out.save("timestamps", &[(none, create, times.to_vec())])?;
    let marker = |id, epoch| BatchOptions {
        producer: producer(id, epoch, -1),
        transactional: true,
        control: true,
        ..none
    };
    let commit = record(TIME, Some(&[0, 0, 0, 1]), Some(&[0, 0, 0, 0, 0, 5]), &[]);
    let abort = record(TIME, Some(&[0, 0, 0, 0]), Some(&[0, 0, 0, 0, 0, 6]), &[]);
    out.save(
        "markers",
        &[
            (marker(12, 1), at(10, 1), vec![commit]),
            (marker(13, 0), at(11, 1), vec![abort]),
        ],
    )?;
    let snappy = BatchOptions {
        compression: Compression::Snappy,
        ..none
    };
    let gzip = BatchOptions {
        compression: Compression::Gzip,
        ..none
    };
    let appended = Appended {
        log_append_time: true,
        ..at(40, 0)
    };
    out.save(
        "several",
        &[
            (snappy, create, mixed()),
            (none, at(20, 0), mixed()),
            (gzip, appended, mixed()),
        ],
    )?;
    fs::write(out.dir.join("manifest.txt"), out.manifest)?;
    Ok(())
}
