//! `millrace consume --group`: as a member of a group, until it is stopped.

use std::io::Write;

use futures::FutureExt;
use millrace_client::{Client, Consumer, StartFrom};
use tokio_util::sync::CancellationToken;

use super::Consume;
use super::format::Place;
use crate::Outcome;
use crate::failure::Failure;
use crate::output::{self, Reader};
use crate::points::Point;

impl Consume {
    pub(super) async fn run_in_group(
        &self,
        client: &Client,
        interrupt: CancellationToken,
    ) -> Result<Outcome, Failure> {
        let start = match self.from {
            Point::Earliest => StartFrom::Earliest,
            Point::Latest => StartFrom::Latest,
            Point::Time(ms) => StartFrom::Timestamp(ms),
            Point::Offset(_) | Point::BeforeEnd(_) => {
                let message = "with --group, --from is earliest, latest or a time";
                return Err(Failure::usage(message)
                    .hint("`millrace groups reset` takes the others, one partition or all"));
            }
        };
        let group = self.group.as_deref().unwrap_or_default();
        let mut consumer = client.consumer().topic(self.topic.as_str()).group(group);
        if let Some(instance) = &self.instance_id {
            consumer = consumer.instance_id(instance.as_str());
        }
        if let Some(rack) = &self.rack {
            consumer = consumer.rack(rack.as_str());
        }
        let consumer = consumer.start(start).isolation(self.isolation());
        let mut consumer = consumer.build().await?;
        let copied = self.copy_all(&mut consumer, &interrupt).await;
        let Some(outcome) = copied.as_ref().ok().copied().flatten() else {
            // What no one has read is not committed.
            return copied.map(|_| Outcome::Done);
        };
        consumer.close().await?;
        Ok(outcome)
    }

    /// `None`: whoever read the output has gone.
    async fn copy_all(
        &self,
        consumer: &mut Consumer,
        interrupt: &CancellationToken,
    ) -> Result<Option<Outcome>, Failure> {
        let format = self.format();
        let mut out = output::stdout();
        let mut left = self.count.unwrap_or(u64::MAX);
        while left > 0 {
            let record = match consumer.next_record().now_or_never() {
                Some(record) => record,
                None => {
                    // Nothing is here at the moment: whoever reads gets what there is.
                    if output::reader(out.flush())? == Reader::Gone {
                        return Ok(None);
                    }
                    tokio::select! {
                        biased;
                        () = interrupt.cancelled() => return Ok(Some(Outcome::Interrupted)),
                        record = consumer.next_record() => record,
                    }
                }
            };
            let Some(record) = record else { break };
            let record = record?;
            let place = Place {
                topic: &record.topic,
                partition: record.partition,
            };
            let written = format.write(&mut out, place, &record.record, &self.null_value);
            if output::reader(written)? == Reader::Gone {
                return Ok(None);
            }
            left -= 1;
            if interrupt.is_cancelled() {
                output::reader(out.flush())?;
                return Ok(Some(Outcome::Interrupted));
            }
        }
        output::reader(out.flush())?;
        Ok(Some(Outcome::Done))
    }
}
