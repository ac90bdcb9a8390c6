//! `millrace import`: a topic back from a backup. Record n of a partition's backup becomes offset n of the partition, so how far an import came is to be seen
//! in the topic itself, and one that was cut off goes on there, each record once.

use std::collections::VecDeque;
use std::time::Duration;

use clap::Args;
use futures::{StreamExt, TryStreamExt, stream};
use indicatif::ProgressBar;
use millrace_client::millrace_record::Record as Stored;
use millrace_client::{
    Client, Compression, ConsumedRecord, Delivery, Extent, Producer, Record, StartFrom, TopicInfo,
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::PARALLEL;
use super::place::Place;
use super::segment::{self, Segment};
use crate::connection::{self, Connection};
use crate::failure::Failure;
use crate::{Outcome, interrupt, progress};

const AFTER_HELP: &str = "\
Examples:
  millrace import orders --from /backup
  millrace import orders --from s3://backups/production --into orders-restored

The topic must be there, with as many partitions, and hold nothing but what an
import has brought: after Ctrl-C or a crash, or when the backup has grown, the
same command goes on where it was, each record once. No one else may write to
the topic until it is done.

Records keep their keys, values, headers, times and partitions, and their order;
offsets count from 0. Retention applies to their times: a topic that is to keep
old records needs retention to match.

Object stores are named s3://BUCKET/PREFIX; AWS_ENDPOINT, AWS_REGION,
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY say where they are and who asks.";

/// Records that were sent and whose fate is not looked at yet. The producer's own buffer bounds their bytes.
const PENDING_MAX: usize = 1 << 16;
/// What an import that was cut off had sent is in all in-sync replicas after this, or something is wrong.
const SETTLED_WITHIN: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(100);

/// Bring a topic back from a backup.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Import {
    /// The topic, by its name in the backup
    topic: String,

    /// Where from: a folder, or s3://BUCKET/PREFIX
    #[arg(long, value_name = "PLACE")]
    from: String,

    /// The topic to write to; by default of the same name
    #[arg(long, value_name = "TOPIC")]
    into: Option<String>,

    /// How batches are compressed: none, gzip, snappy, lz4 or zstd; by default as the first one was
    #[arg(long, value_name = "CODEC")]
    compression: Option<Compression>,

    /// How many partitions are written at a time
    #[arg(long, value_name = "N", default_value = PARALLEL, value_parser = clap::value_parser!(u8).range(1..))]
    parallel: u8,

    /// No progress bar and no summary
    #[arg(long, short = 'q')]
    quiet: bool,
}

impl Import {
    pub(crate) async fn run(self, connection: &Connection) -> Result<Outcome, Failure> {
        let place = Place::open(&self.from)?;
        let Some(manifest) = place.manifest(&self.topic).await? else {
            let (topic, place) = (&self.topic, &self.from);
            return Err(
                Failure::new(format!("there is no backup of topic `{topic}` in {place}"))
                    .hint("`millrace export` makes one"),
            );
        };
        let client = connection.open().await?;
        let interrupt = interrupt::listen()?;
        let into = self.into.as_deref().unwrap_or(&self.topic);
        let topic = connection::describe(&client, into).await?;
        if topic.partitions.len() != manifest.partitions {
            return Err(Failure::new(format!(
                "topic `{into}` has {} partitions, and the backup of `{}` has {}",
                topic.partitions.len(),
                self.topic,
                manifest.partitions
            ))
            .hint("records keep their partitions: import into a topic with as many"));
        }
        let mut backup = Vec::new();
        for info in &topic.partitions {
            let segments = place.segments(&self.topic, info.partition).await?;
            backup.push((info.partition, segments));
        }
        let all = || backup.iter().flat_map(|(_, segments)| segments);
        let compression = match (self.compression, all().next()) {
            (Some(codec), _) => codec,
            (None, Some(first)) => {
                segment::compression(&place.read(first).await?).unwrap_or_default()
            }
            (None, None) => Compression::default(),
        };
        let import = OneTopic {
            client: &client,
            producer: client.producer().compression(compression).build().await?,
            place: &place,
            topic: &topic,
            bar: progress::bar(self.quiet, Some(all().map(|segment| segment.bytes).sum())),
            interrupt: &interrupt,
        };
        let each =
            stream::iter(&backup).map(|(partition, there)| import.partition(*partition, there));
        let written = each.buffer_unordered(usize::from(self.parallel));
        let records = written.try_fold(0, async |sum, one| Ok(sum + one)).await?;
        import.bar.finish_and_clear();
        if !self.quiet {
            let held: u64 = all().map(|segment| segment.records).sum();
            eprintln!("{into}: {records} records written of {held} in the backup");
        }
        Ok(match interrupt.is_cancelled() {
            true => Outcome::Interrupted,
            false => Outcome::Done,
        })
    }
}

struct OneTopic<'a> {
    client: &'a Client,
    producer: Producer,
    place: &'a Place,
    topic: &'a TopicInfo,
    bar: ProgressBar,
    interrupt: &'a CancellationToken,
}

impl OneTopic<'_> {
    /// Writes what the partition lacks. Returns how many records that was.
    async fn partition(&self, partition: i32, backup: &[Segment]) -> Result<u64, Failure> {
        let extent = self.settled(partition).await?;
        let there = extent.high_watermark.unsigned_abs();
        let held: u64 = backup.iter().map(|segment| segment.records).sum();
        if there > held {
            return Err(self.foreign(
                partition,
                &format!("it has {there} records, and the backup {held}"),
            ));
        }
        // Where the record `there` is: its segment, and its index in that.
        let mut index = there;
        let mut segments = backup.iter();
        let mut deliveries = Deliveries {
            next: extent.high_watermark,
            pending: VecDeque::new(),
        };
        for segment in segments.by_ref() {
            self.bar.inc(segment.bytes);
            if index > segment.records {
                index -= segment.records;
                continue;
            }
            let records = self.read(segment).await?;
            let (before, after) = records.split_at(
                usize::try_from(index)
                    .unwrap_or(usize::MAX)
                    .min(records.len()),
            );
            if let Some(last) = before.last() {
                self.check_last(partition, extent, last).await?;
            }
            self.send(partition, after, &mut deliveries).await?;
            break;
        }
        for segment in segments {
            if self.interrupt.is_cancelled() {
                break;
            }
            let records = self.read(segment).await?;
            self.send(partition, &records, &mut deliveries).await?;
            self.bar.inc(segment.bytes);
        }
        while self.settle(partition, &mut deliveries).await? {}
        Ok(deliveries.next.unsigned_abs() - there)
    }

    /// The partition's extent once all that was sent to it is committed: what an import before this one had sent may still be on its way to the replicas.
    async fn settled(&self, partition: i32) -> Result<Extent, Failure> {
        let name = self.topic.name.as_str();
        let settled = async {
            loop {
                let topic = connection::describe(self.client, name).await?;
                let info = topic
                    .partitions
                    .iter()
                    .find(|info| info.partition == partition);
                let info = info.ok_or_else(|| connection::no_partition(&topic, partition))?;
                let extent = connection::extent(name, info)?;
                if extent.log_end_offset == extent.high_watermark {
                    return Ok(extent);
                }
                sleep(LOOK).await;
            }
        };
        timeout(SETTLED_WITHIN, settled).await.unwrap_or_else(|_| {
            Err(Failure::new(format!(
                "partition {partition} of topic `{name}` holds records that are not in enough replicas"
            ))
            .hint("`millrace topics describe` shows which replicas are in sync"))
        })
    }

    async fn read(&self, segment: &Segment) -> Result<Vec<Stored>, Failure> {
        let bytes = self.place.read(segment).await?;
        let damaged = || Failure::new(format!("{} in the backup is damaged", segment.path));
        let records: Vec<Stored> = segment::records(&bytes)
            .collect::<Result<_, _>>()
            .map_err(|error| damaged().because(error))?;
        match records.len() as u64 == segment.records {
            true => Ok(records),
            false => Err(damaged().hint(format!(
                "it holds {} records, and its name says {}",
                records.len(),
                segment.records
            ))),
        }
    }

    /// Whether the partition's last record is the one that the backup has there. One that retention has removed is taken for it.
    async fn check_last(
        &self,
        partition: i32,
        extent: Extent,
        expected: &Stored,
    ) -> Result<(), Failure> {
        let offset = extent.high_watermark - 1;
        if offset < extent.log_start_offset {
            return Ok(());
        }
        let name = self.topic.name.as_str();
        let mut consumer = self
            .client
            .consumer()
            .partitions(name, [partition])
            .start(StartFrom::Offset(offset))
            .build()
            .await?;
        let found = timeout(SETTLED_WITHIN, consumer.next_record()).await;
        let same = |found: &ConsumedRecord| {
            let (found, expected) = (&found.record, expected);
            found.offset == offset
                && found.key == expected.key
                && found.value == expected.value
                && found.headers == expected.headers
        };
        match found {
            Ok(Some(Ok(found))) if same(&found) => Ok(()),
            Ok(Some(Err(error))) => Err(error.into()),
            _ => Err(self.foreign(
                partition,
                &format!("its record at offset {offset} is not the backup's"),
            )),
        }
    }

    /// Sends records, as long as no one interrupts.
    async fn send(
        &self,
        partition: i32,
        records: &[Stored],
        deliveries: &mut Deliveries,
    ) -> Result<(), Failure> {
        for stored in records {
            if self.interrupt.is_cancelled() {
                break;
            }
            if deliveries.pending.len() >= PENDING_MAX {
                self.settle(partition, deliveries).await?;
            }
            let mut record = Record::to(self.topic.name.as_str()).partition(partition);
            record.key.clone_from(&stored.key);
            record.value.clone_from(&stored.value);
            record.headers.clone_from(&stored.headers);
            record.timestamp_ms = Some(stored.timestamp_ms);
            deliveries
                .pending
                .push_back(self.producer.send(record).await?);
        }
        Ok(())
    }

    /// Waits for the oldest delivery, if there is one.
    async fn settle(&self, partition: i32, deliveries: &mut Deliveries) -> Result<bool, Failure> {
        let Some(oldest) = deliveries.pending.pop_front() else {
            return Ok(false);
        };
        let offset = oldest.await?.offset;
        if offset != deliveries.next {
            let expected = deliveries.next;
            return Err(self.foreign(
                partition,
                &format!("a record came to offset {offset} in place of {expected}"),
            ));
        }
        deliveries.next += 1;
        Ok(true)
    }

    fn foreign(&self, partition: i32, what: &str) -> Failure {
        let name = &self.topic.name;
        Failure::new(format!(
            "partition {partition} of topic `{name}` is not as an import leaves it: {what}"
        ))
        .hint("someone else writes to the topic: import into one of its own, with --into")
    }
}

/// Records on their way, in order.
struct Deliveries {
    /// The offset that the oldest shall have.
    next: i64,
    pending: VecDeque<Delivery>,
}
