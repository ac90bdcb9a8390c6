//! `millrace copy`: one topic into another, each record once, whatever crashes meanwhile. What an app does that processes records exactly once, in its
//! shortest form: read, process, send, and commit both what was sent and how far was read in one transaction.

use std::time::Duration;

use clap::Args;
use millrace_client::{Consumer, Error, ErrorKind, Record, Transaction, TransactionalProducer};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::connection::{self, Connection};
use crate::failure::Failure;
use crate::{Outcome, interrupt};

const AFTER_HELP: &str = "\
Examples:
  millrace copy orders orders-eu --group copier
  millrace copy orders orders-eu --group copier --transactional-id copier-0

Several may copy with the same group: they share the partitions. Each needs a
transactional id of its own, which it keeps when it is started again, such as the
name of its pod in a StatefulSet; the default is the group's name. It is a static
member of the group with that id, too: whoever is started again has its partitions
at once, and others get them after 45 s.

Records keep their keys, values, headers and times, and their partition if the
other topic has as many.";

/// Records of one transaction at most.
const MOST: u64 = 10_000;

/// Copy a topic into another, each record exactly once.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Copy {
    /// The topic to read
    from: String,

    /// The topic to write to
    to: String,

    /// The group that keeps how far was read
    #[arg(long, short = 'g', value_name = "NAME")]
    group: String,

    /// Who writes; whoever is started with it takes over from the one before. By default the group's name
    #[arg(long, value_name = "ID")]
    transactional_id: Option<String>,

    /// Commit at least so often while records come
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = humantime::parse_duration)]
    every: Duration,

    /// Stop once nothing has come for so long; by default never
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    idle: Option<Duration>,
}

impl Copy {
    pub(crate) async fn run(self, connection: &Connection) -> Result<Outcome, Failure> {
        let client = connection.open().await?;
        let interrupt = interrupt::listen()?;
        let id = self.transactional_id.as_deref().unwrap_or(&self.group);
        let from = connection::describe(&client, &self.from).await?;
        let to = connection::describe(&client, &self.to).await?;
        let same = from.partitions.len() == to.partitions.len();
        let mut producer = client.producer().build_transactional(id).await?;
        let mut consumer = client
            .consumer()
            .topic(self.from.as_str())
            .group(self.group.as_str())
            // Who is started again goes on at once where the process before was.
            .instance_id(id)
            .auto_commit(None)
            .build()
            .await?;
        let mut copied = 0;
        let outcome = loop {
            match self
                .transaction(&mut producer, &mut consumer, same, &interrupt)
                .await?
            {
                Some(0) => break Outcome::Done,
                Some(records) => copied += records,
                None if interrupt.is_cancelled() => break Outcome::Interrupted,
                // Nothing of it counts: what was read is read again.
                None => consumer.rewind().await?,
            }
        };
        consumer.close().await?;
        eprintln!("{copied} records copied");
        Ok(outcome)
    }

    /// Copies what comes for a while. How many records; `None`: it was aborted.
    async fn transaction(
        &self,
        producer: &mut TransactionalProducer,
        consumer: &mut Consumer,
        keep_partition: bool,
        interrupt: &CancellationToken,
    ) -> Result<Option<u64>, Failure> {
        let idle = self.idle.unwrap_or(Duration::MAX / 4);
        let first = tokio::select! {
            biased;
            () = interrupt.cancelled() => return Ok(None),
            record = tokio::time::timeout(idle.min(FOREVER), consumer.next_record()) => record,
        };
        let Ok(Some(first)) = first else {
            return Ok(Some(0));
        };
        let transaction = producer.begin().await?;
        let deadline = Instant::now() + self.every;
        let mut next = Some(first?);
        let mut records = 0;
        while let Some(consumed) = next.take() {
            let mut record = Record::to(self.to.as_str());
            if keep_partition {
                record = record.partition(consumed.partition);
            }
            record.key = consumed.record.key;
            record.value = consumed.record.value;
            record.headers = consumed.record.headers;
            record.timestamp_ms = Some(consumed.record.timestamp_ms);
            if let Err(error) = transaction.send(record).await {
                return self.aborted(transaction, error).await;
            }
            records += 1;
            if records < MOST
                && let Ok(Some(more)) = timeout_at(deadline, consumer.next_record()).await
            {
                next = Some(more?);
            }
        }
        if let Err(error) = transaction.send_offsets(consumer).await {
            return self.aborted(transaction, error).await;
        }
        match transaction.commit().await {
            Ok(()) => Ok(Some(records)),
            Err(error) if error.kind() == ErrorKind::FencedProducer => Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "a transaction is not committed: what was read is read again");
                Ok(None)
            }
        }
    }

    async fn aborted(
        &self,
        transaction: Transaction<'_>,
        error: Error,
    ) -> Result<Option<u64>, Failure> {
        if error.kind() == ErrorKind::FencedProducer {
            return Err(error.into());
        }
        tracing::warn!(%error, "a transaction is aborted: what was read is read again");
        // If that fails it is aborted when the next one begins.
        if let Err(error) = transaction.abort().await {
            tracing::warn!(%error, "a transaction can't be aborted now");
        }
        Ok(None)
    }
}

/// Longer than anyone waits; timers overflow on more.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
