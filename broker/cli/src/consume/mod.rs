//! `millrace consume`: records of a topic to standard output, byte for byte.

mod format;
mod group;
mod range;

use std::io::{BufWriter, StdoutLock, Write};
use std::time::Duration;

use clap::{Args, ValueEnum};
use futures::FutureExt;
use millrace_client::{Bytes, Client, Consumer, Isolation, StartFrom, TopicInfo};
use tokio_util::sync::CancellationToken;

use self::format::{Format, Piece, Place, parse_template};
use self::range::{Range, ranges};
use crate::connection::{self, Connection};
use crate::failure::Failure;
use crate::output::{self, Reader};
use crate::points::{Point, parse_point};
use crate::text::{unescape, unescape_nonempty};
use crate::{Outcome, interrupt};

const AFTER_HELP: &str = r#"Examples:
  millrace consume orders                      what is there now
  millrace consume orders --from -10 -f        the last 10 of each partition, and on
  millrace consume orders --from latest -f     only what comes from now on
  millrace consume orders --from '1h ago' -o json | jq .value
  millrace consume orders --from @2026-01-31T12:00:00Z --to @2026-01-31T13:00:00Z
  millrace consume orders --group billing      share the topic with all who say the same
  millrace consume orders --partition 2 --from 1000 --to 1010 --format '%p:%o %d %k=%v\n'

Points in the log, for --from and --to:
  earliest, latest   the first record held; behind the last one
  42, -10            an offset; so many records before the end of each partition
  @TIME, '1h ago'    the first record at or after a time: RFC 3339, a date (UTC)
                     or milliseconds since 1970

Formats, for --format (escapes: \n \r \t \0 \\ \xNN):
  %t topic   %p partition    %o offset   %T timestamp in ms   %d as RFC 3339
  %k key     %K its length   %v value    %V its length (-1: null)
  %h headers as NAME=VALUE,NAME=VALUE    %% a percent sign

Records of one partition come in order; those of several partitions come as they
arrive. A reader that closes the pipe, as `head` does, ends the command quietly."#;

/// An idle consumer looks this often whether it has reached the end.
const IDLE: Duration = Duration::from_millis(100);

/// Consume records to standard output.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Consume {
    /// The topic
    topic: String,

    /// Where to begin
    #[arg(long, default_value = "earliest", value_name = "POINT", value_parser = parse_point, allow_hyphen_values = true)]
    from: Point,

    /// Where to stop: before this. Without --follow, never later than where the partitions end at the start
    #[arg(long, default_value = "end", value_name = "POINT", value_parser = parse_point, allow_hyphen_values = true)]
    to: Point,

    /// Share the topic with all consumers of this group: go on where it has got to (where that is nowhere, at --from), follow, and
    /// commit what was printed
    #[arg(long, short = 'g', value_name = "NAME", conflicts_with_all = ["to", "partition"])]
    group: Option<String>,

    /// In a group, be a static member: whoever comes back with the same name has what this one had
    #[arg(long, value_name = "NAME", requires = "group")]
    instance_id: Option<String>,

    /// In a group: where this member is, such as the zone of its node. It gets those partitions whose preferred leader is there, as far as all members
    /// have as many
    #[arg(long, value_name = "RACK", requires = "group")]
    rack: Option<String>,

    /// Only these partitions, separated by commas
    #[arg(long, short = 'p', value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(i32).range(0..))]
    partition: Vec<i32>,

    /// Also print records of transactions that are open or were aborted
    #[arg(long)]
    uncommitted: bool,

    /// Stop after so many records
    #[arg(long, short = 'n', value_name = "N")]
    count: Option<u64>,

    /// Wait for more at the end
    #[arg(long, short = 'f')]
    follow: bool,

    /// What to print of each record
    #[arg(
        long,
        short = 'o',
        value_enum,
        default_value = "value",
        value_name = "WHAT",
        conflicts_with = "format"
    )]
    output: Output,

    /// Print records by a template, such as '%p %o %k %v\n'
    #[arg(long, value_name = "TEMPLATE", value_parser = template)]
    format: Option<Template>,

    /// What stands between key and value; implies -o key-value
    #[arg(long, short = 'K', value_name = "BYTES", value_parser = unescape_nonempty, conflicts_with = "format")]
    key_separator: Option<Bytes>,

    /// What stands behind each record
    #[arg(long, short = 'D', default_value = r"\n", value_name = "BYTES", value_parser = unescape)]
    delimiter: Bytes,

    /// A zero byte stands behind each record, as for `xargs -0`
    #[arg(long, short = '0', conflicts_with = "delimiter")]
    null_delimited: bool,

    /// What to print for null, where that is not JSON
    #[arg(long, short = 'Z', default_value = "", value_name = "MARKER", value_parser = unescape)]
    null_value: Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// The value
    Value,
    /// The key, a separator (by default a tab) and the value
    KeyValue,
    /// One JSON object on each line, with everything
    Json,
}

/// A type of its own, since clap takes a `Vec` for an option that is given several times.
#[derive(Debug, Clone)]
struct Template(Vec<Piece>);

fn template(text: &str) -> Result<Template, String> {
    parse_template(text).map(Template)
}

impl Consume {
    pub(crate) async fn run(self, connection: &Connection) -> Result<Outcome, Failure> {
        let client = connection.open().await?;
        let interrupt = interrupt::listen()?;
        let topic = connection::describe(&client, &self.topic).await?;
        if self.group.is_some() {
            return self.run_in_group(&client, interrupt).await;
        }
        for partition in &self.partition {
            if topic
                .partitions
                .iter()
                .all(|info| info.partition != *partition)
            {
                return Err(connection::no_partition(&topic, *partition));
            }
        }
        let ranges = ranges(
            &client,
            &topic,
            &self.partition,
            self.from,
            self.to,
            self.follow,
            self.isolation(),
        )
        .await?;
        let open: Vec<i32> = topic
            .partitions
            .iter()
            .zip(&ranges)
            .filter(|(_, range)| {
                range.is_some_and(|range| !range.ends_before(range.from.max(range.seek)))
            })
            .map(|(info, _)| info.partition)
            .collect();
        if open.is_empty() || self.count == Some(0) {
            return Ok(Outcome::Done);
        }
        let consumer = consumer(&client, &topic, &open, &ranges, self.isolation()).await?;
        let copy = Copy {
            topic: topic.name,
            consumer,
            ranges,
            open,
            left: self.count.unwrap_or(u64::MAX),
            format: self.format(),
            null: self.null_value,
            out: output::stdout(),
        };
        copy.run(interrupt).await
    }

    fn isolation(&self) -> Isolation {
        match self.uncommitted {
            true => Isolation::ReadUncommitted,
            false => Isolation::ReadCommitted,
        }
    }

    fn format(&self) -> Format {
        if let Some(Template(pieces)) = &self.format {
            return Format::Template(pieces.clone());
        }
        let delimiter = match self.null_delimited {
            true => Bytes::from_static(b"\0"),
            false => self.delimiter.clone(),
        };
        match (self.output, &self.key_separator) {
            (Output::Json, _) => Format::Json,
            (_, Some(separator)) => Format::KeyValue {
                separator: separator.clone(),
                delimiter,
            },
            (Output::KeyValue, None) => Format::KeyValue {
                separator: Bytes::from_static(b"\t"),
                delimiter,
            },
            (Output::Value, None) => Format::Value { delimiter },
        }
    }
}

async fn consumer(
    client: &Client,
    topic: &TopicInfo,
    open: &[i32],
    ranges: &[Option<Range>],
    isolation: Isolation,
) -> Result<Consumer, Failure> {
    let partitions = open.iter().copied();
    let mut consumer = client
        .consumer()
        .partitions(topic.name.as_str(), partitions)
        .start(StartFrom::Earliest)
        .isolation(isolation)
        .build()
        .await?;
    for (info, range) in topic.partitions.iter().zip(ranges) {
        let Some(range) =
            range.filter(|range| info.extent.is_none_or(|e| range.seek != e.log_start_offset))
        else {
            continue;
        };
        if open.contains(&info.partition) {
            consumer
                .seek(&topic.name, info.partition, StartFrom::Offset(range.seek))
                .await?;
        }
    }
    Ok(consumer)
}

/// What is being copied to standard output.
struct Copy {
    topic: String,
    consumer: Consumer,
    /// By partition.
    ranges: Vec<Option<Range>>,
    /// Partitions whose end is not reached.
    open: Vec<i32>,
    /// Records until the count is reached.
    left: u64,
    format: Format,
    null: Bytes,
    out: BufWriter<StdoutLock<'static>>,
}

impl Copy {
    async fn run(mut self, interrupt: CancellationToken) -> Result<Outcome, Failure> {
        let copied = self.copy(&interrupt).await;
        // What was received before an error is printed.
        let flushed = output::reader(self.out.flush());
        let outcome = copied?;
        flushed?;
        Ok(outcome)
    }

    async fn copy(&mut self, interrupt: &CancellationToken) -> Result<Outcome, Failure> {
        while self.left > 0 && !self.open.is_empty() {
            let record = match self.consumer.next_record().now_or_never() {
                Some(record) => record,
                None => {
                    // Nothing is here at the moment: whoever reads gets what there is.
                    if output::reader(self.out.flush())? == Reader::Gone {
                        return Ok(Outcome::Done);
                    }
                    tokio::select! {
                        biased;
                        () = interrupt.cancelled() => return Ok(Outcome::Interrupted),
                        record = self.consumer.next_record() => record,
                        () = tokio::time::sleep(IDLE) => {
                            self.close_passed();
                            continue;
                        }
                    }
                }
            };
            let Some(record) = record else { break };
            let record = record?;
            let partition = record.partition;
            let Some(range) = range_of(&self.ranges, partition) else {
                continue;
            };
            let offset = record.record.offset;
            if range.contains(offset) {
                let place = Place {
                    topic: &self.topic,
                    partition,
                };
                let written = self
                    .format
                    .write(&mut self.out, place, &record.record, &self.null);
                if output::reader(written)? == Reader::Gone {
                    return Ok(Outcome::Done);
                }
                self.left -= 1;
            }
            if range.ends_before(offset + 1) {
                self.open.retain(|open| *open != partition);
            }
            if interrupt.is_cancelled() {
                return Ok(Outcome::Interrupted);
            }
        }
        Ok(Outcome::Done)
    }

    /// Closes partitions whose last offsets hold no record (a transaction's marker, or what compaction removed).
    fn close_passed(&mut self) {
        let Self {
            open,
            ranges,
            consumer,
            topic,
            ..
        } = self;
        open.retain(|partition| {
            let range = range_of(ranges, *partition);
            let position = consumer.position(topic, *partition);
            !matches!((range, position), (Some(range), Some(next)) if range.ends_before(next))
        });
    }
}

fn range_of(ranges: &[Option<Range>], partition: i32) -> Option<Range> {
    *ranges.get(usize::try_from(partition).ok()?)?
}
