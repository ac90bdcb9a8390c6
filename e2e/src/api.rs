//! Short forms of what tests do most with the gRPC API, with nothing but the generated stubs.

use std::collections::HashMap;

use bytes::Bytes;
use millrace_proto::{
    ERROR_DOMAIN,
    v1::{
        Error, FetchPartition, FetchRequest, FetchResponse, GetMetadataRequest, PartitionRecords,
        ProduceRequest, ProduceResult, consumer_service_client::ConsumerServiceClient,
        metadata_service_client::MetadataServiceClient,
        producer_service_client::ProducerServiceClient,
    },
};
use millrace_record::{
    BatchBuilder, BatchHeader, BatchOptions, DecodeLimits, ProducerState, Record, decode, split,
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;

use crate::SOON;

const MAX_MESSAGE: usize = 64 << 20;

/// The services of one broker.
#[derive(Clone)]
pub struct Api {
    /// The connection.
    pub channel: Channel,
    /// `ProducerService`.
    pub producer: ProducerServiceClient<Channel>,
    /// `ConsumerService`.
    pub consumer: ConsumerServiceClient<Channel>,
    /// `MetadataService`.
    pub metadata: MetadataServiceClient<Channel>,
}

impl Api {
    pub(crate) async fn connect(address: &str) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
        let channel = endpoint
            .timeout(SOON)
            .connect()
            .await
            .expect("the broker takes connections");
        Api {
            producer: ProducerServiceClient::new(channel.clone()),
            consumer: ConsumerServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE),
            metadata: MetadataServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_MESSAGE),
            channel,
        }
    }

    /// Appends batches to one partition.
    pub async fn append(
        &mut self,
        topic: &str,
        partition: i32,
        batches: Vec<Bytes>,
    ) -> Result<ProduceResult, Status> {
        let records = PartitionRecords {
            topic: topic.to_owned(),
            partition,
            batches,
            records: Vec::new(),
        };
        let request = ProduceRequest {
            partitions: vec![records],
            ..ProduceRequest::default()
        };
        Ok(self
            .producer
            .produce(request)
            .await?
            .into_inner()
            .results
            .remove(0))
    }

    /// Reads what is there at once, from one partition.
    pub async fn fetch(
        &mut self,
        topic: &str,
        partition: i32,
        offset: i64,
    ) -> Result<FetchResponse, Status> {
        let from = FetchPartition {
            topic: topic.to_owned(),
            partition,
            offset,
            max_bytes: 0,
        };
        let request = FetchRequest {
            partitions: vec![from],
            ..FetchRequest::default()
        };
        Ok(self.consumer.fetch(request).await?.into_inner())
    }

    /// Reads all records of a partition from `offset` up to the high watermark.
    ///
    /// # Panics
    /// If reading fails or stands still, or an offset is missing or comes twice.
    pub async fn read_all(&mut self, topic: &str, partition: i32, offset: i64) -> Vec<Record> {
        let mut records = Vec::new();
        let mut next = offset;
        let mut stood_at = None;
        loop {
            let response = self.fetch(topic, partition, next).await;
            let response =
                response.unwrap_or_else(|error| panic!("{topic}/{partition} from {next}: {error}"));
            let result = &response.results[0];
            if next >= result.high_watermark {
                return records;
            }
            // It may have risen after the read, but not twice.
            let stands_still = result.batches.is_empty() && stood_at == Some(next);
            assert!(
                !stands_still,
                "{topic}/{partition}: nothing at {next}, before the high watermark"
            );
            stood_at = Some(next);
            for batch in result.batches.iter().cloned().flat_map(split) {
                let batch = batch.expect("the batch is whole");
                for record in decode(&batch, &DecodeLimits::default()).expect("the batch is whole")
                {
                    let record = record.expect("the record is whole");
                    if record.offset < offset {
                        continue;
                    }
                    assert_eq!(
                        record.offset, next,
                        "{topic}/{partition}: offsets have no gaps"
                    );
                    next += 1;
                    records.push(record);
                }
                assert_eq!(
                    BatchHeader::parse(&batch).expect("a header").last_offset() + 1,
                    next
                );
            }
        }
    }

    /// The first and the next offset of a partition.
    pub async fn offsets(&mut self, topic: &str, partition: i32) -> (i64, i64) {
        let request = GetMetadataRequest {
            topics: vec![topic.to_owned()],
        };
        let answer = self
            .metadata
            .get_metadata(request)
            .await
            .expect("metadata")
            .into_inner();
        let index = usize::try_from(partition).expect("a partition");
        let found = &answer.topics[0].partitions[index];
        (
            found.log_start_offset.expect("of the leader"),
            found.high_watermark.expect("of the leader"),
        )
    }
}

/// A batch of records with these values, without keys, stamped with the time.
pub fn batch<V: AsRef<[u8]>>(
    values: impl IntoIterator<Item = V>,
    producer: Option<ProducerState>,
) -> Bytes {
    batch_of(
        values,
        BatchOptions {
            producer,
            ..BatchOptions::default()
        },
    )
}

/// The same with all options.
pub fn batch_of<V: AsRef<[u8]>>(
    values: impl IntoIterator<Item = V>,
    options: BatchOptions,
) -> Bytes {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("it is after 1970");
    let now_ms = i64::try_from(now.as_millis()).expect("it is before the year 292 million");
    let mut builder = BatchBuilder::new(options);
    for value in values {
        builder.append(now_ms, None, Some(value.as_ref()), &[]);
    }
    builder.build().expect("a legal batch")
}

/// Why a request, or a part of it, was refused.
#[derive(Debug)]
pub struct Refusal {
    /// The gRPC code; `Ok` for a part of a request that was not refused as a whole.
    pub code: Code,
    /// The reason, as in `error.proto` but without prefix.
    pub reason: String,
    /// For people.
    pub message: String,
    /// The details.
    pub metadata: HashMap<String, String>,
}

impl Refusal {
    /// A detail; empty if it is not there.
    pub fn detail(&self, key: &str) -> &str {
        self.metadata.get(key).map_or("", String::as_str)
    }
}

/// What a status says, in its `google.rpc.ErrorInfo`.
///
/// # Panics
/// If it has none of ours.
#[track_caller]
pub fn refusal(status: &Status) -> Refusal {
    let Some(info) = status.get_details_error_info() else {
        panic!("a status without ErrorInfo: {status:?}")
    };
    assert_eq!(info.domain, ERROR_DOMAIN);
    Refusal {
        code: status.code(),
        reason: info.reason,
        message: status.message().to_owned(),
        metadata: info.metadata,
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let reason = error
            .reason()
            .as_str_name()
            .trim_start_matches("ERROR_REASON_")
            .to_owned();
        Refusal {
            code: Code::Ok,
            reason,
            message: error.message,
            metadata: error.metadata,
        }
    }
}
