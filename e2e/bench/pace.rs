//! Records that leave on a fixed schedule, and how long they take from when they were due, not from when they left: a stall counts
//! for every record that it delays (no coordinated omission). KafkaBench.java does the same for Kafka.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use futures::FutureExt;
use futures::stream::{FuturesUnordered, StreamExt};
use hdrhistogram::Histogram;
use millrace_client::{Bytes, Producer, Record};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::peer::{Peer, kafka};
use crate::table::{Goal, Report};

/// What leaves when.
pub(crate) struct Pace {
    pub(crate) topic: &'static str,
    /// Bytes of each value, at least 8: it begins with the time since `epoch` at which it was due, in nanoseconds.
    pub(crate) size: usize,
    /// Records a second.
    pub(crate) rate: u64,
    pub(crate) epoch: Instant,
    /// When the first one is due, since `epoch`.
    pub(crate) start: Duration,
}

impl Pace {
    /// Sends records as long as `more`, told how many have left, wants another one. `acked` is told of each that is acknowledged when it
    /// was due. Returns how many were. Blocks: it is for a thread, not a task, since the runtime's timer has a resolution of a millisecond.
    pub(crate) fn send(
        &self,
        producer: &Producer,
        runtime: &Handle,
        mut more: impl FnMut(u64) -> bool,
        mut acked: impl FnMut(Duration) + Send + 'static,
    ) -> Result<u64> {
        let interval = Duration::from_secs(1) / u32::try_from(self.rate)?;
        let (answered, mut answers) = mpsc::channel(1 << 16);
        let counter = runtime.spawn(async move {
            let mut pending = FuturesUnordered::new();
            let mut count: u64 = 0;
            loop {
                tokio::select! {
                    Some(answer) = answers.recv() => pending.push(answer),
                    Some((due, answer)) = pending.next() => {
                        let _: millrace_client::RecordMeta = answer?;
                        acked(due);
                        count += 1;
                    }
                    else => return Ok::<_, millrace_client::Error>(count),
                }
            }
        });
        let mut due = self.start;
        let mut sent = 0;
        while more(sent) {
            while let Some(early) = due
                .checked_sub(self.epoch.elapsed())
                .filter(|early| !early.is_zero())
            {
                thread::sleep(early);
            }
            let mut value = vec![0; self.size];
            value[..8].copy_from_slice(&u64::try_from(due.as_nanos())?.to_be_bytes());
            let record = Record::to(self.topic).value(Bytes::from(value));
            let delivery = runtime.block_on(producer.send(record))?;
            let answer = delivery.map(move |answer| (due, answer));
            if answered.blocking_send(answer).is_err() {
                break;
            }
            due += interval;
            sent += 1;
        }
        drop(answered);
        Ok(runtime.block_on(counter)??)
    }
}

/// How long records took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latencies {
    /// How many records.
    pub(crate) count: u64,
    p50: Duration,
    p99: Duration,
    p999: Duration,
    max: Duration,
}

impl Latencies {
    /// For them, in nanoseconds.
    pub(crate) fn histogram() -> Result<Histogram<u64>> {
        const LONGEST: u64 = 600_000_000_000;
        Ok(Histogram::new_with_max(LONGEST, 3)?)
    }

    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| Duration::from_nanos(histogram.value_at_quantile(quantile));
        Self {
            count: histogram.len(),
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: Duration::from_nanos(histogram.max()),
        }
    }

    /// As KafkaBench.java measured them.
    pub(crate) fn theirs(outcome: &kafka::Outcome) -> Result<Self> {
        let time = |name| outcome.get(name).map(Duration::from_nanos);
        Ok(Self {
            count: outcome.get("measured")?,
            p50: time("p50_ns")?,
            p99: time("p99_ns")?,
            p999: time("p999_ns")?,
            max: time("max_ns")?,
        })
    }

    /// A row for each figure, its name after `when`. Of the slowest one nothing is demanded.
    pub(crate) fn add_to(&self, report: &mut Report, peer: Peer, when: &str, goal: Option<Goal>) {
        let rows = [
            ("p50", self.p50, goal),
            ("p99", self.p99, goal),
            ("p99.9", self.p999, goal),
            ("max", self.max, None),
        ];
        for (name, time, goal) in rows {
            let ms = time.as_secs_f64() * 1_000.0;
            report.add(peer, format!("{when}{name}, ms"), goal, ms);
        }
    }
}
