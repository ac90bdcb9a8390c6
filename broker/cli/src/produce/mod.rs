//! `millrace produce`: records from standard input or files into a topic, byte for byte.

mod filling;
mod input;
mod pending;
mod settings;
mod shape;

use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use memchr::memmem::Finder;
use millrace_client::{Bytes, Delivery, Error, ErrorKind, Producer, Record};
use tokio_util::sync::CancellationToken;

use self::input::{Delimiter, InputError};
use self::pending::Pending;
pub(crate) use self::settings::ProducerSettings;
use self::shape::{Keys, Shape};
use crate::connection::{self, Connection};
use crate::failure::Failure;
use crate::text::{self, unescape, unescape_nonempty};
use crate::{Outcome, interrupt, progress};

const AFTER_HELP: &str = r"Examples:
  echo 'hello' | millrace produce greetings
  millrace produce orders --file orders.tsv --key-separator '\t' --compression zstd
  find . -type f -print0 | millrace produce paths --null-delimited
  millrace produce pictures --whole-file --file cat.png --key cat -H type=image/png
  printf 'user-7\tGONE\n' | millrace produce users --key-separator '\t' --null-value GONE

Every byte between two delimiters is the record: carriage returns, spaces and
bytes that are no UTF-8 included. An empty line is a record with an empty value.
The first record that can't be stored ends the command. What was stored before
stays, and the last line on standard error tells how much that was.";

/// Produce records from standard input or files.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Produce {
    /// The topic
    topic: String,

    /// Read this file instead of standard input (may be given several times)
    #[arg(long, short = 'f', value_name = "FILE")]
    file: Vec<PathBuf>,

    /// What ends a record; escapes: \n \r \t \0 \\ \xNN
    #[arg(long, short = 'D', default_value = r"\n", value_name = "BYTES", value_parser = unescape_nonempty)]
    delimiter: Bytes,

    /// Records end with a zero byte, as from `find -print0`
    #[arg(long, short = '0', conflicts_with_all = ["delimiter", "whole_file"])]
    null_delimited: bool,

    /// Each file (or all of standard input) is one record
    #[arg(long, conflicts_with = "delimiter")]
    whole_file: bool,

    /// What stands before the first of these bytes is the key, what stands behind it the value
    #[arg(long, short = 'K', value_name = "BYTES", value_parser = unescape_nonempty)]
    key_separator: Option<Bytes>,

    /// What to do with a record without key separator
    #[arg(
        long,
        value_enum,
        default_value = "error",
        requires = "key_separator",
        value_name = "WHAT"
    )]
    missing_key: MissingKey,

    /// One key for all records
    #[arg(long, short = 'k', conflicts_with = "key_separator", value_parser = unescape)]
    key: Option<Bytes>,

    /// A header for all records (may be given several times)
    #[arg(long, short = 'H', value_name = "NAME=VALUE", value_parser = header)]
    header: Vec<(String, Bytes)>,

    /// A value (or key) of exactly these bytes becomes null: a tombstone
    #[arg(long, short = 'Z', value_name = "MARKER", value_parser = unescape)]
    null_value: Option<Bytes>,

    /// Send all records to this partition
    #[arg(long, short = 'p', value_name = "N", value_parser = clap::value_parser!(i32).range(0..))]
    partition: Option<i32>,

    /// No progress bar and no summary
    #[arg(long, short = 'q')]
    quiet: bool,

    #[command(flatten)]
    settings: ProducerSettings,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MissingKey {
    /// Stop with an error that names the record
    Error,
    /// Give it a null key
    Null,
}

impl Produce {
    pub(crate) async fn run(self, connection: &Connection) -> Result<Outcome, Failure> {
        let (inputs, total_bytes) = open(&self.file)?;
        let client = connection.open().await?;
        let topic = connection::describe(&client, &self.topic).await?;
        if let Some(partition) = self.partition
            && topic
                .partitions
                .iter()
                .all(|info| info.partition != partition)
        {
            return Err(connection::no_partition(&topic, partition));
        }
        let producer = self.settings.build(&client).await?;
        let bar = progress::bar(self.quiet, total_bytes);
        if !self.quiet && self.file.is_empty() && io::stdin().is_terminal() {
            eprintln!("one record for each line; Ctrl-D ends");
        }
        let delimiter = match (self.whole_file, self.null_delimited) {
            (true, _) => Delimiter::EndOfInput,
            (_, true) => Delimiter::Bytes(Bytes::from_static(b"\0")),
            _ => Delimiter::Bytes(self.delimiter.clone()),
        };
        let mut run = Run {
            shape: self.shape(),
            producer,
            interrupt: interrupt::listen()?,
            bar,
            pending: Pending::default(),
            sent: 0,
        };
        let began = Instant::now();
        let end = run.send_all(inputs, delimiter).await;
        run.finish(self.settings_timeout()).await;
        run.report(end, &self, began.elapsed())
    }

    fn shape(&self) -> Shape {
        let keys = match (&self.key, &self.key_separator) {
            (Some(key), _) => Keys::Fixed(key.clone()),
            (None, Some(separator)) => Keys::Before {
                separator: Box::new(Finder::new(separator).into_owned()),
                may_be_missing: self.missing_key == MissingKey::Null,
            },
            (None, None) => Keys::None,
        };
        Shape {
            topic: self.topic.as_str().into(),
            keys,
            null: self.null_value.clone(),
            headers: self.header.clone(),
            partition: self.partition,
        }
    }

    /// The producer gives up by itself before this.
    fn settings_timeout(&self) -> Duration {
        self.settings.delivery_timeout() + Duration::from_secs(5)
    }
}

/// Why no more records were sent.
enum End {
    OfInput,
    Interrupted,
    Input(InputError),
    MissingKey,
    Refused(Error),
    /// A delivery failed: `Pending` knows which.
    Failed,
}

struct Run {
    shape: Shape,
    producer: Producer,
    interrupt: CancellationToken,
    bar: ProgressBar,
    pending: Pending,
    /// Records handed to the producer.
    sent: u64,
}

impl Run {
    async fn send_all(
        &mut self,
        inputs: Vec<(String, Box<dyn Read + Send>)>,
        delimiter: Delimiter,
    ) -> End {
        let interrupt = self.interrupt.clone();
        let mut input = input::start(inputs, delimiter);
        loop {
            // While a person types, failures must not wait for the next line.
            let chunk = tokio::select! {
                biased;
                () = interrupt.cancelled() => return End::Interrupted,
                chunk = input.next() => chunk,
            };
            let chunk = match chunk {
                None => return End::OfInput,
                Some(Err(error)) => return End::Input(error),
                Some(Ok(chunk)) => chunk,
            };
            for piece in chunk.records() {
                let Ok((record, size)) = self.shape.record(piece) else {
                    return End::MissingKey;
                };
                let delivery = match self.send(record).await {
                    Some(Ok(delivery)) => delivery,
                    Some(Err(error)) => return End::Refused(error),
                    None => return End::Interrupted,
                };
                self.sent += 1;
                if !self.pending.push(delivery, size).await {
                    return End::Failed;
                }
            }
            self.bar.inc(chunk.input_bytes() as u64);
            self.pending.settle_ready();
            if self.pending.failure().is_some() {
                return End::Failed;
            }
        }
    }

    /// Hands a record to the producer, waiting for room; `None` if interrupted meanwhile.
    async fn send(&self, record: Record) -> Option<Result<Delivery, Error>> {
        let refused = match self.producer.try_send(record) {
            Ok(delivery) => return Some(Ok(delivery)),
            Err(refused) => refused,
        };
        match refused.error.kind() {
            ErrorKind::BufferFull | ErrorKind::NotReady => tokio::select! {
                biased;
                sent = self.producer.send(refused.record) => Some(sent),
                () = self.interrupt.cancelled() => None,
            },
            _ => Some(Err(refused.error)),
        }
    }

    /// Sends what the producer still holds and learns what became of it.
    async fn finish(&mut self, timeout: Duration) {
        // A failure to flush is the failure of a delivery, which is reported with its record.
        let _ = self.producer.flush().await;
        self.pending.settle().await;
        let _ = self.producer.close(timeout).await;
        self.bar.finish_and_clear();
    }

    fn report(self, end: End, args: &Produce, took: Duration) -> Result<Outcome, Failure> {
        let (stored, bytes) = (self.pending.stored(), self.pending.stored_bytes());
        if !args.quiet {
            let verb = match args.settings.acknowledged() {
                true => "produced",
                false => "sent",
            };
            eprintln!(
                "{verb} {}, {} bytes to {} in {} ({}){}",
                text::records(stored),
                bytes,
                args.topic,
                text::duration(took),
                text::rates(stored, bytes, took),
                if matches!(end, End::Interrupted) {
                    ", interrupted"
                } else {
                    ""
                },
            );
        }
        let next = self.sent + 1;
        if let Some((number, error)) = self.pending.failure() {
            let lost = self.sent - stored;
            let failure = Failure::from(error.clone());
            return Err(failure.prefix(format!(
                "record {number} was not stored ({stored} of {} were, {lost} were not)",
                self.sent
            )));
        }
        match end {
            End::OfInput | End::Failed => Ok(Outcome::Done),
            End::Interrupted => Ok(Outcome::Interrupted),
            End::Refused(error) => {
                Err(Failure::from(error).prefix(format!("record {next} was not stored")))
            }
            End::MissingKey => {
                let hint = "look at that line of the input; --missing-key null takes such records \
                            without a key";
                Err(Failure::new(format!("record {next} has no key separator")).hint(hint))
            }
            End::Input(error) => {
                let failure = Failure::new(format!("{error}, at record {next}"));
                Err(match &error {
                    InputError::Read { source, .. } => failure.because(source),
                    InputError::TooLarge { .. } => {
                        failure.hint("is the delimiter right? See --delimiter")
                    }
                    InputError::Died => failure.hint("this is a fault of millrace: report it"),
                })
            }
        }
    }
}

type Inputs = Vec<(String, Box<dyn Read + Send>)>;

/// Opens the inputs; the total of their bytes is known if all are plain files.
fn open(files: &[PathBuf]) -> Result<(Inputs, Option<u64>), Failure> {
    if files.is_empty() {
        let stdin: Box<dyn Read + Send> = Box::new(io::stdin());
        return Ok((vec![("standard input".to_owned(), stdin)], None));
    }
    let mut total = Some(0);
    let mut inputs: Inputs = Vec::new();
    for path in files {
        let (file, size) = open_file(path)?;
        total = total.zip(size).map(|(total, size)| total + size);
        inputs.push((path.display().to_string(), Box::new(file)));
    }
    Ok((inputs, total))
}

fn open_file(path: &Path) -> Result<(File, Option<u64>), Failure> {
    let failed = |error| Failure::new(format!("can't open {}", path.display())).because(error);
    let file = File::open(path).map_err(failed)?;
    let about = file.metadata().map_err(failed)?;
    if about.is_dir() {
        return Err(Failure::new(format!("{} is a folder", path.display())).hint("name a file"));
    }
    Ok((file, about.is_file().then_some(about.len())))
}

fn header(text: &str) -> Result<(String, Bytes), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => {
            Ok((name.to_owned(), Bytes::copy_from_slice(value.as_bytes())))
        }
        _ => Err("write NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_cut_at_the_first_equals_sign() {
        assert_eq!(
            header("a=b=c"),
            Ok(("a".into(), Bytes::from_static(b"b=c")))
        );
        assert_eq!(header("a="), Ok(("a".into(), Bytes::new())));
        assert!(header("=b").is_err());
        assert!(header("a").is_err());
    }
}
