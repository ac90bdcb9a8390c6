//! `millrace export`: topics into a folder or an object store.

use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;
use futures::{StreamExt, TryStreamExt, stream};
use indicatif::ProgressBar;
use millrace_client::{Bytes, Client, PartitionInfo, StartFrom, TopicInfo};
use tokio_util::sync::CancellationToken;

use super::PARALLEL;
use super::place::{Manifest, Place};
use crate::connection::{self, Connection};
use crate::failure::Failure;
use crate::{Outcome, interrupt, progress};

const AFTER_HELP: &str = "\
Examples:
  millrace export orders --to /backup
  millrace export --to s3://backups/production

Each partition is copied up to where it ended when the export began, as far as
transactions were committed. What is in the backup already is not copied again:
after Ctrl-C, a crash or a day, the same command goes on where it was.

Object stores are named s3://BUCKET/PREFIX; AWS_ENDPOINT, AWS_REGION,
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY say where they are and who asks.";

/// A partition whose last offsets hold no record (a transaction's marker, or what compaction removed) is at its end without a batch that says so.
const IDLE: Duration = Duration::from_millis(200);
/// Batches that are read ahead.
const READ_AHEAD: usize = 8 << 20;
const SMALLEST_SEGMENT: u64 = 64 << 10;
/// The most that one request to an object store may write is 5 GiB; each is in memory meanwhile.
const LARGEST_SEGMENT: u64 = 1 << 30;

/// Back topics up: into a folder or an object store.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Export {
    /// The topics; by default all but internal ones
    topics: Vec<String>,

    /// Where to: a folder, or s3://BUCKET/PREFIX
    #[arg(long, value_name = "PLACE")]
    to: String,

    /// The size of the files or objects
    #[arg(long, value_name = "SIZE", default_value = "32MiB", value_parser = segment_size)]
    segment_size: ByteSize,

    /// How many partitions are copied at a time
    #[arg(long, value_name = "N", default_value = PARALLEL, value_parser = clap::value_parser!(u8).range(1..))]
    parallel: u8,

    /// No progress bar and no summary
    #[arg(long, short = 'q')]
    quiet: bool,
}

fn segment_size(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text.parse()?;
    match size.as_u64() {
        SMALLEST_SEGMENT..=LARGEST_SEGMENT => Ok(size),
        _ => Err("between 64KiB and 1GiB".to_owned()),
    }
}

impl Export {
    pub(crate) async fn run(self, connection: &Connection) -> Result<Outcome, Failure> {
        let place = Place::open(&self.to)?;
        let client = connection.open().await?;
        let interrupt = interrupt::listen()?;
        let mut topics = Vec::new();
        if self.topics.is_empty() {
            topics = client.metadata(&[]).await?.topics;
        }
        for topic in &self.topics {
            topics.push(connection::describe(&client, topic).await?);
        }
        for topic in topics {
            let bytes = |info: &PartitionInfo| info.extent.map_or(0, |extent| extent.size_bytes);
            let export = OneTopic {
                bar: progress::bar(self.quiet, Some(topic.partitions.iter().map(bytes).sum())),
                client: &client,
                place: &place,
                topic,
                segment_bytes: self.segment_size.as_u64() as usize,
                interrupt: &interrupt,
            };
            export.begin().await?;
            let copied = export.all(usize::from(self.parallel)).await?;
            export.bar.finish_and_clear();
            if !self.quiet {
                let (records, bytes) = (copied.records, ByteSize(copied.bytes));
                let (name, place) = (&export.topic.name, &self.to);
                eprintln!("{name}: {records} records ({bytes}) copied to {place}");
            }
            if interrupt.is_cancelled() {
                return Ok(Outcome::Interrupted);
            }
        }
        Ok(Outcome::Done)
    }
}

#[derive(Clone, Copy, Default)]
struct Copied {
    records: u64,
    bytes: u64,
}

struct OneTopic<'a> {
    client: &'a Client,
    place: &'a Place,
    topic: TopicInfo,
    segment_bytes: usize,
    bar: ProgressBar,
    interrupt: &'a CancellationToken,
}

impl OneTopic<'_> {
    /// Checks that what is there is of this topic.
    async fn begin(&self) -> Result<(), Failure> {
        let TopicInfo {
            name,
            id,
            partitions,
            ..
        } = &self.topic;
        if let Some(there) = self.place.manifest(name).await?
            && there.topic_id != *id
        {
            return Err(Failure::new(format!(
                "the backup of topic `{name}` is of another topic of that name ({}; this one is {id})",
                there.topic_id
            ))
            .hint("export into another place: what is there may be all that is left of the other one"));
        }
        let manifest = Manifest::new(name.clone(), id.clone(), partitions.len());
        self.place.write_manifest(&manifest).await
    }

    async fn all(&self, parallel: usize) -> Result<Copied, Failure> {
        let each = stream::iter(&self.topic.partitions).map(|info| self.partition(info));
        let add = |a: Copied, b: Copied| Copied {
            records: a.records + b.records,
            bytes: a.bytes + b.bytes,
        };
        let copied = each.buffer_unordered(parallel);
        copied
            .try_fold(Copied::default(), async |sum, one| Ok(add(sum, one)))
            .await
    }

    async fn partition(&self, info: &PartitionInfo) -> Result<Copied, Failure> {
        let (topic, partition) = (self.topic.name.as_str(), info.partition);
        let extent = connection::extent(topic, info)?;
        let there = self.place.segments(topic, partition).await?;
        // That much does not come again.
        self.bar
            .inc(there.iter().map(|segment| segment.bytes).sum());
        let mut begin = there
            .last()
            .map_or(extent.log_start_offset, |last| last.next);
        if begin > extent.high_watermark {
            return Err(Failure::new(format!(
                "the backup of partition {partition} of topic `{topic}` goes to offset {begin}, and the partition to {}: records were lost since",
                extent.high_watermark
            ))
            .hint("export into another place; what is lost is in this one"));
        }
        if begin < extent.log_start_offset {
            let lost = extent.log_start_offset;
            tracing::warn!(
                topic,
                partition,
                from = begin,
                to = lost,
                "retention has removed records before they were exported"
            );
            begin = lost;
        }
        let end = extent.last_stable_offset;
        let mut segment = Batches::new(begin);
        let mut copied = Copied::default();
        if begin >= end {
            return Ok(copied);
        }
        let mut consumer = self
            .client
            .consumer()
            .partitions(topic, [partition])
            .start(StartFrom::Offset(begin))
            .max_buffered_bytes(READ_AHEAD)
            .build_batches()
            .await?;
        while segment.next < end {
            let batch = tokio::select! {
                biased;
                () = self.interrupt.cancelled() => break,
                batch = consumer.next_batch() => batch,
                () = tokio::time::sleep(IDLE) => {
                    segment.next = consumer.position(topic, partition).unwrap_or(segment.next);
                    continue;
                }
            };
            let Some(batch) = batch else { break };
            let batch = batch?;
            if batch.header.base_offset >= end {
                break;
            }
            // What is damaged is no backup.
            for record in batch.records()? {
                record?;
            }
            self.bar.inc(batch.bytes.len() as u64);
            segment.next = consumer.position(topic, partition).unwrap_or(segment.next);
            let records = batch.header.record_count.unsigned_abs();
            if records > 0 {
                segment.records += u64::from(records);
                segment.bytes += batch.bytes.len();
                segment.batches.push(batch.bytes);
            }
            if segment.bytes >= self.segment_bytes {
                self.write(partition, &mut segment, &mut copied).await?;
            }
        }
        self.write(partition, &mut segment, &mut copied).await?;
        Ok(copied)
    }

    async fn write(
        &self,
        partition: i32,
        segment: &mut Batches,
        copied: &mut Copied,
    ) -> Result<(), Failure> {
        let done = std::mem::replace(segment, Batches::new(segment.next));
        if done.batches.is_empty() {
            // Offsets without records are looked at again next time, unless records come after them.
            segment.first = done.first;
            return Ok(());
        }
        copied.records += done.records;
        copied.bytes += done.bytes as u64;
        let offsets = (done.first, done.next);
        self.place
            .write(
                &self.topic.name,
                partition,
                offsets,
                done.records,
                done.batches,
            )
            .await
    }
}

/// A segment in the making.
struct Batches {
    first: i64,
    next: i64,
    records: u64,
    bytes: usize,
    batches: Vec<Bytes>,
}

impl Batches {
    fn new(first: i64) -> Self {
        Self {
            first,
            next: first,
            records: 0,
            bytes: 0,
            batches: Vec::new(),
        }
    }
}
