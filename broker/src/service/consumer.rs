//! Fetch and list offsets.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use millrace_proto::v1::{
    self, ErrorReason, FetchFormat, FetchPartition, FetchRequest, FetchResponse, FetchResult,
    Header, IsolationLevel, ListOffsetsRequest, ListOffsetsResponse, OffsetQuery, OffsetResult,
    consumer_service_server::ConsumerService, offset_query::Spec,
};
use millrace_record::{BatchError, BatchHeader, DecodeLimits, split};
use tokio::{sync::Notify, time::Instant};
use tonic::{Request, Response, Status};

use super::{
    Broker, connection::ConnectionInfo, error::ApiError, memory::ResponseMemory,
    producer::check_partition_count, sliced,
};
use crate::{
    directory::Led,
    observe::Method,
    storage::{Ended, ReadBatches, StorageError, StoredPartition, UpTo},
};

/// The most bytes that one response carries, whatever the request asks for.
pub(super) const MAX_FETCH_BYTES: usize = 8 << 20;
/// What a batch may become when it is decompressed for a caller that wants plain records; clients that decode themselves have no such limit.
const MAX_DECODED_BYTES: usize = 16 << 20;
/// What a response carries if it is made of plain records: stubs refuse messages beyond 4 MiB unless told otherwise.
const MAX_RECORD_BYTES: usize = 2 << 20;
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The consumer service.
pub(super) struct Consumer {
    pub(super) broker: Arc<Broker>,
}

/// One partition of a fetch request.
struct Wanted {
    topic: String,
    partition: i32,
    offset: i64,
    max_bytes: usize,
    up_to: UpTo,
    led: Result<Led, ApiError>,
}

/// What a request found, and how much.
struct Found {
    results: Vec<FetchResult>,
    bytes: usize,
    /// There was more than there was room for.
    full: bool,
    errors: Vec<ApiError>,
}

#[tonic::async_trait]
impl ConsumerService for Consumer {
    async fn fetch(
        &self,
        request: Request<FetchRequest>,
    ) -> Result<Response<FetchResponse>, Status> {
        let timer = self.broker.metrics.start(Method::Fetch);
        let connection = request.extensions().get::<ConnectionInfo>().cloned();
        let request = request.into_inner();
        let format = FetchFormat::try_from(request.format).map_err(|_| {
            ApiError::invalid(
                "format",
                format!("{} is not a value of FetchFormat", request.format),
            )
        })?;
        let up_to = up_to(request.isolation)?;
        check_partition_count(request.partitions.len())?;
        let max_bytes = match request.max_bytes as usize {
            0 => MAX_FETCH_BYTES,
            asked => asked.min(MAX_FETCH_BYTES),
        };
        let wanted: Vec<Wanted> = request
            .partitions
            .into_iter()
            .map(|p| self.resolve(p, max_bytes, up_to))
            .collect();
        let deadline =
            Instant::now() + Duration::from_millis(request.max_wait_ms.into()).min(MAX_WAIT);
        let min_bytes = (request.min_bytes as usize).min(max_bytes);
        let (mut found, memory) = self
            .collect_when_enough(&wanted, max_bytes, min_bytes, deadline)
            .await?;
        drop(timer);
        self.broker
            .metrics
            .refused(found.errors.iter().map(ApiError::reason_name));
        if found.errors.len() == wanted.len()
            && let Some(error) = found.errors.into_iter().next()
        {
            return Err(error.into());
        }
        self.broker.metrics.fetched(found.bytes);
        if format == FetchFormat::Records {
            let mut bytes = 0;
            for (result, wanted) in found.results.iter_mut().zip(&wanted) {
                plain_records(result, wanted.offset, &mut bytes);
            }
        }
        if found.bytes > 0 || found.results.iter().any(|r| r.next_offset.is_some()) {
            found.results.retain(|result| {
                !result.batches.is_empty()
                    || !result.records.is_empty()
                    || result.next_offset.is_some()
                    || result.error.is_some()
            });
        }
        let mut response = sliced::response(found.results);
        self.broker
            .response_memory
            .attach(memory, &mut response, connection);
        Ok(response)
    }

    async fn list_offsets(
        &self,
        request: Request<ListOffsetsRequest>,
    ) -> Result<Response<ListOffsetsResponse>, Status> {
        let _timer = self.broker.metrics.start(Method::ListOffsets);
        let ListOffsetsRequest { queries, isolation } = request.into_inner();
        let up_to = up_to(isolation)?;
        check_partition_count(queries.len())?;
        let mut results = Vec::with_capacity(queries.len());
        let mut first_error = None;
        let mut failed = 0;
        for query in queries {
            let (topic, partition) = (query.topic.clone(), query.partition);
            match self.find_offset(query, up_to).await {
                Ok((offset, timestamp_ms)) => {
                    results.push(OffsetResult {
                        topic,
                        partition,
                        offset,
                        timestamp_ms,
                        error: None,
                    });
                }
                Err(error) => {
                    failed += 1;
                    first_error.get_or_insert_with(|| error.clone());
                    let error = Some(v1::Error::from(error));
                    results.push(OffsetResult {
                        topic,
                        partition,
                        offset: None,
                        timestamp_ms: None,
                        error,
                    });
                }
            }
        }
        match first_error {
            Some(error) if failed == results.len() => Err(error.into()),
            _ => Ok(Response::new(ListOffsetsResponse { results })),
        }
    }
}

impl Consumer {
    fn resolve(&self, asked: FetchPartition, max_bytes: usize, up_to: UpTo) -> Wanted {
        let FetchPartition {
            topic,
            partition,
            offset,
            max_bytes: own_max,
        } = asked;
        let led = self.broker.partition(&topic, partition);
        let max_bytes = if own_max == 0 {
            max_bytes
        } else {
            max_bytes.min(own_max as usize)
        };
        Wanted {
            topic,
            partition,
            offset,
            max_bytes,
            up_to,
            led,
        }
    }

    /// Reads until there is enough, something failed, or time is up.
    async fn collect_when_enough(
        &self,
        wanted: &[Wanted],
        max_bytes: usize,
        min_bytes: usize,
        deadline: Instant,
    ) -> Result<(Found, ResponseMemory), ApiError> {
        loop {
            let waiter = Arc::new(Notify::new());
            // Asked to be woken before looking, so that nothing falls in between.
            for led in wanted.iter().filter_map(|wanted| wanted.led.as_ref().ok()) {
                led.log.notify_on_append(&waiter);
            }
            let now = Instant::now();
            let waiting = available(wanted) == Some(false) && min_bytes > 0 && now < deadline;
            if !waiting {
                let mut memory = self.broker.response_memory.acquire(max_bytes).await;
                let found = self.collect(wanted, max_bytes).await?;
                let enough = found.bytes >= min_bytes
                    || found.full
                    || !found.errors.is_empty()
                    || now >= deadline;
                if enough || self.broker.is_stopping() {
                    memory.shrink(found.bytes);
                    return Ok((found, memory));
                }
            }
            tokio::select! {
                () = waiter.notified() => {}
                () = tokio::time::sleep_until(deadline) => {}
                () = self.broker.stopping() => {
                    return Ok((self.collect(wanted, 0).await?, ResponseMemory::none()));
                }
            }
        }
    }

    async fn collect(&self, wanted: &[Wanted], max_bytes: usize) -> Result<Found, ApiError> {
        let mut found = Found {
            results: Vec::with_capacity(wanted.len()),
            bytes: 0,
            full: false,
            errors: Vec::new(),
        };
        for Wanted {
            topic,
            partition,
            offset,
            max_bytes: own_max,
            up_to,
            led,
        } in wanted
        {
            let room = max_bytes.saturating_sub(found.bytes).min(*own_max);
            let mut result = FetchResult {
                topic: topic.clone(),
                partition: *partition,
                ..FetchResult::default()
            };
            let read = match led {
                Ok(led) if !led.is_led() => {
                    Err(self
                        .broker
                        .failure(topic, *partition, &StorageError::NotLed))
                }
                Ok(led) => {
                    result.log_start_offset = led.log.log_start();
                    let at_least_one = found.bytes == 0 && max_bytes > 0;
                    let read = self
                        .read(&led.log, *offset, room, at_least_one, *up_to)
                        .await;
                    result.high_watermark = led.log.high_watermark();
                    result.last_stable_offset = led.log.stable_end();
                    read
                }
                Err(error) => Err(error.clone()),
            };
            match read {
                Ok((read, next_offset)) => {
                    found.bytes += read.bytes;
                    // What was left out is news, too.
                    found.full |= read.more || next_offset.is_some();
                    result.batches = read.batches;
                    result.next_offset = next_offset;
                }
                Err(error) => {
                    found.errors.push(error.clone());
                    result.error = Some(error.into());
                }
            }
            found.results.push(result);
        }
        Ok(found)
    }

    /// Reads batches, without those of aborted transactions if only what is committed is wanted. If any were left out: where to go on.
    async fn read(
        &self,
        log: &StoredPartition,
        offset: i64,
        max_bytes: usize,
        at_least_one: bool,
        up_to: UpTo,
    ) -> Result<(ReadBatches, Option<i64>), ApiError> {
        let read = self
            .read_all(log, offset, max_bytes, at_least_one, up_to)
            .await?;
        if up_to != UpTo::StableEnd || read.batches.is_empty() {
            return Ok((read, None));
        }
        // After the read: it has risen if anything has changed.
        let aborted = log.aborted_within(offset, log.stable_end());
        match aborted.is_empty() {
            true => Ok((read, None)),
            false => without(read, &aborted).map_err(unreadable),
        }
    }

    async fn read_all(
        &self,
        log: &StoredPartition,
        offset: i64,
        max_bytes: usize,
        at_least_one: bool,
        up_to: UpTo,
    ) -> Result<ReadBatches, ApiError> {
        let failed = |error| ApiError::storage(&log.topic, log.index, &error);
        let store = &self.broker.store;
        if let Some(read) = store
            .read_memory(log, offset, max_bytes, at_least_one, up_to)
            .map_err(failed)?
        {
            return Ok(read);
        }
        if max_bytes == 0 && !at_least_one {
            return Ok(ReadBatches::default());
        }
        let _turn = self
            .broker
            .disk_reads
            .acquire()
            .await
            .map_err(|_| ApiError::shutting_down())?;
        let (store, reader) = (store.clone(), log.clone());
        super::blocking(move || store.read_disk(&reader, offset, max_bytes, at_least_one, up_to))
            .await?
            .map_err(failed)
    }

    async fn find_offset(
        &self,
        query: OffsetQuery,
        up_to: UpTo,
    ) -> Result<(Option<i64>, Option<i64>), ApiError> {
        let led = self.broker.partition(&query.topic, query.partition)?;
        let log = &led.log;
        let latest = || {
            let unknown = || ApiError::offset_not_available(&query.topic, query.partition);
            led.latest().ok_or_else(unknown)?;
            Ok::<_, ApiError>(up_to.end(log))
        };
        match query.spec {
            None => Err(ApiError::invalid(
                "spec",
                "ask for earliest, latest or timestamp_ms",
            )),
            Some(Spec::Earliest(_)) => Ok((Some(log.log_start()), None)),
            Some(Spec::Latest(_)) => Ok((Some(latest()?), None)),
            Some(Spec::TimestampMs(timestamp_ms)) => {
                latest()?;
                let _turn = self
                    .broker
                    .disk_reads
                    .acquire()
                    .await
                    .map_err(|_| ApiError::shutting_down())?;
                let (store, reader) = (self.broker.store.clone(), log.clone());
                let found = super::blocking(move || store.find_timestamp(&reader, timestamp_ms))
                    .await?
                    .map_err(|error| ApiError::storage(&log.topic, log.index, &error))?;
                Ok((
                    found.map(|(offset, _)| offset),
                    found.map(|(_, timestamp_ms)| timestamp_ms),
                ))
            }
        }
    }
}

/// Whether any partition has something to say at once: `None` if one of them failed.
fn available(wanted: &[Wanted]) -> Option<bool> {
    let mut any = false;
    for Wanted {
        offset, led, up_to, ..
    } in wanted
    {
        let led = led.as_ref().ok().filter(|led| led.is_led())?;
        let log = &led.log;
        log.check_offset(*offset).ok()?;
        any |= *offset < up_to.end(log);
    }
    Some(any)
}

/// How far who asks for this may read.
fn up_to(isolation: i32) -> Result<UpTo, ApiError> {
    match IsolationLevel::try_from(isolation) {
        Ok(IsolationLevel::Unspecified | IsolationLevel::ReadCommitted) => Ok(UpTo::StableEnd),
        Ok(IsolationLevel::ReadUncommitted) => Ok(UpTo::HighWatermark),
        Err(_) => Err(ApiError::invalid(
            "isolation",
            format!("{isolation} is not a value of IsolationLevel"),
        )),
    }
}

/// The batches without those of aborted transactions, and where to go on if any were left out.
fn without(read: ReadBatches, aborted: &[Ended]) -> Result<(ReadBatches, Option<i64>), BatchError> {
    let is_aborted = |header: &BatchHeader| {
        let covers = |ended: &Ended| {
            ended.producer_id == header.producer_id
                && (ended.first_offset..=ended.last_offset).contains(&header.base_offset)
        };
        header.attributes.is_transactional() && aborted.iter().any(covers)
    };
    let mut kept = ReadBatches {
        more: read.more,
        ..ReadBatches::default()
    };
    let mut left_out = false;
    let mut next = None;
    for batch in read.batches.into_iter().flat_map(split) {
        let batch = batch?;
        let header = BatchHeader::parse(&batch)?;
        next = Some(header.last_offset() + 1);
        // Their markers go with them.
        match is_aborted(&header) {
            true => left_out = true,
            false => kept.push(batch),
        }
    }
    Ok((kept, next.filter(|_| left_out)))
}

/// Replaces a result's batches by the records in them, from `offset` on. Where to go on is said if some of them were not for people.
fn plain_records(result: &mut FetchResult, offset: i64, bytes: &mut usize) {
    let left_out = result.next_offset.take();
    let batches = std::mem::take(&mut result.batches);
    for batch in batches.into_iter().flat_map(split) {
        if *bytes >= MAX_RECORD_BYTES {
            return;
        }
        let before = result.records.len();
        let appended = batch
            .map_err(unreadable)
            .and_then(|batch| append_records(&batch, offset, bytes, &mut result.records));
        match appended {
            Ok(Some(end)) => {
                result.next_offset = (result.records.len() == before).then_some(end);
            }
            Ok(None) => {
                result.next_offset = None;
                return;
            }
            // What was readable goes out; the batch that is not is met again, first, by the next fetch.
            Err(error) => {
                if result.records.is_empty() {
                    result.error = Some(error.into());
                }
                return;
            }
        }
    }
    result.next_offset = left_out.or(result.next_offset);
}

fn unreadable(error: BatchError) -> ApiError {
    ApiError::new(
        ErrorReason::InvalidBatch,
        format!("the batch can't be decoded: {error}; fetch it as a batch, or skip it"),
    )
}

/// The offset after the batch, if there was room for all of it.
fn append_records(
    batch: &Bytes,
    offset: i64,
    bytes: &mut usize,
    records: &mut Vec<v1::Record>,
) -> Result<Option<i64>, ApiError> {
    let header = BatchHeader::parse(batch).map_err(unreadable)?;
    let end = header.last_offset() + 1;
    if header.attributes.is_control() {
        return Ok(Some(end));
    }
    let limits = DecodeLimits {
        max_decompressed_bytes: MAX_DECODED_BYTES,
    };
    for record in millrace_record::decode(batch, &limits).map_err(unreadable)? {
        let record = record.map_err(unreadable)?;
        if record.offset < offset {
            continue;
        }
        if *bytes >= MAX_RECORD_BYTES {
            return Ok(None);
        }
        let lengths =
            record.key.as_ref().map_or(0, Bytes::len) + record.value.as_ref().map_or(0, Bytes::len);
        *bytes += lengths + 32;
        let headers = record.headers.into_iter().map(|header| {
            *bytes += header.key.len() + header.value.as_ref().map_or(0, Bytes::len) + 8;
            Header {
                key: String::from_utf8_lossy(&header.key).into_owned(),
                value: header.value,
            }
        });
        records.push(v1::Record {
            headers: headers.collect(),
            key: record.key,
            value: record.value,
            timestamp_ms: Some(record.timestamp_ms),
            offset: record.offset,
        });
    }
    Ok(Some(end))
}
