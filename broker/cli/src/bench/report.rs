//! The figures of a benchmark, for people or as JSON.

use std::time::Duration;

use clap::ValueEnum;
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::failure::Failure;
use crate::{output, text};

/// Latencies from a microsecond to ten minutes, to three digits.
#[derive(Debug)]
pub(super) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(super) fn new() -> Result<Self, Failure> {
        Histogram::new_with_bounds(1, 600_000_000, 3)
            .map(Self)
            .map_err(|error| Failure::new(format!("can't make a histogram: {error}")))
    }

    pub(super) fn record(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        self.0.saturating_record(micros.max(1));
    }

    fn percentiles(&self, of: &'static str) -> Option<Percentiles> {
        (!self.0.is_empty()).then(|| Percentiles {
            of,
            samples: self.0.len(),
            mean_us: self.0.mean(),
            p50_us: self.0.value_at_quantile(0.5),
            p99_us: self.0.value_at_quantile(0.99),
            p999_us: self.0.value_at_quantile(0.999),
            max_us: self.0.max(),
        })
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Percentiles {
    of: &'static str,
    samples: u64,
    mean_us: f64,
    p50_us: u64,
    p99_us: u64,
    p999_us: u64,
    max_us: u64,
}

/// What was measured.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Report {
    benchmark: &'static str,
    topic: String,
    records: u64,
    bytes: u64,
    seconds: f64,
    records_per_second: f64,
    megabytes_per_second: f64,
    latencies: Vec<Percentiles>,
}

/// How a report is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ReportLayout {
    /// For people
    Text,
    /// For programs
    Json,
}

impl Report {
    /// Throughput. `bytes` are those of keys and values.
    pub(super) fn new(
        benchmark: &'static str,
        topic: &str,
        records: u64,
        bytes: u64,
        took: Duration,
    ) -> Self {
        let seconds = took.as_secs_f64().max(1e-6);
        Self {
            benchmark,
            topic: topic.to_owned(),
            records,
            bytes,
            seconds,
            records_per_second: records as f64 / seconds,
            megabytes_per_second: bytes as f64 / 1e6 / seconds,
            latencies: Vec::new(),
        }
    }

    /// Adds a row of percentiles.
    pub(super) fn with(mut self, of: &'static str, latencies: &Latencies) -> Self {
        self.latencies.extend(latencies.percentiles(of));
        self
    }

    pub(super) fn print(&self, layout: ReportLayout) -> Result<(), Failure> {
        match layout {
            ReportLayout::Text => output::print(&self.text()),
            ReportLayout::Json => {
                let json = serde_json::to_string(self)
                    .map_err(|error| Failure::new("can't print the result").because(error))?;
                output::print(&(json + "\n"))
            }
        }
    }

    fn text(&self) -> String {
        let took = Duration::from_secs_f64(self.seconds);
        let mut text = format!(
            "{} {}: {}, {} bytes in {}\n  {}\n",
            self.benchmark,
            self.topic,
            text::records(self.records),
            self.bytes,
            text::duration(took),
            text::rates(self.records, self.bytes, took),
        );
        let micros = |us| text::duration(Duration::from_micros(us));
        for row in &self.latencies {
            text += &format!(
                "  {}: p50 {}, p99 {}, p99.9 {}, max {} ({} samples)\n",
                row.of,
                micros(row.p50_us),
                micros(row.p99_us),
                micros(row.p999_us),
                micros(row.max_us),
                row.samples,
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_gives_throughput_and_percentiles() {
        let mut latencies = Latencies::new().unwrap();
        for ms in 1..=1000 {
            latencies.record(Duration::from_millis(ms));
        }
        let report = Report::new("produce", "t", 1000, 100_000, Duration::from_secs(2))
            .with("latency", &latencies)
            .with("never", &Latencies::new().unwrap());
        assert_eq!(
            report.text(),
            "produce t: 1000 records, 100000 bytes in 2.0 s\n  500 records/s, 0.1 MB/s\n  latency: p50 500.2 ms, p99 990.2 ms, \
             p99.9 999.4 ms, max 1.0 s (1000 samples)\n"
        );
    }
}
