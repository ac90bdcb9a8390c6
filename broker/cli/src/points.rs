//! Points in a log as people name them: `earliest`, `-10`, `@2026-01-31T12:00:00Z`, `1h ago`.

use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use millrace_client::{Client, Extent, OffsetSpec};

use crate::failure::Failure;

/// A point in each partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Point {
    /// The first record still held.
    Earliest,
    /// After the last record.
    Latest,
    /// An offset.
    Offset(i64),
    /// So many records before the end.
    BeforeEnd(i64),
    /// The first record at or after this time, in milliseconds since the Unix epoch.
    Time(i64),
}

/// Parses any of the forms. Relative times are relative to now.
pub(crate) fn parse_point(text: &str) -> Result<Point, String> {
    parse_at(text, Timestamp::now())
}

fn parse_at(text: &str, now: Timestamp) -> Result<Point, String> {
    let bad = || {
        format!(
            "{text:?} is not a point in a log: write earliest, latest, an offset (42), the last N records (-N), a time \
             (@2026-01-31T12:00:00Z, @2026-01-31, @MILLISECONDS) or how long ago (\"1h ago\")"
        )
    };
    match text {
        "earliest" | "beginning" => return Ok(Point::Earliest),
        "latest" | "end" => return Ok(Point::Latest),
        _ => {}
    }
    if let Some(time) = text.strip_prefix('@') {
        return time_ms(time).map(Point::Time).ok_or_else(bad);
    }
    if let Some(age) = text.strip_suffix("ago") {
        let age: Duration = humantime::parse_duration(age.trim()).map_err(|_| bad())?;
        let then = i64::try_from(age.as_millis())
            .ok()
            .and_then(|age| now.as_millisecond().checked_sub(age));
        return then.map(Point::Time).ok_or_else(bad);
    }
    if let Some(count) = text.strip_prefix('-') {
        // Not `parse::<i64>` of the whole: "-0" and "--5" mean nothing.
        let count = count.parse::<u32>().ok().filter(|count| *count > 0);
        return count
            .map(|count| Point::BeforeEnd(count.into()))
            .ok_or_else(bad);
    }
    match text.parse::<i64>() {
        Ok(offset) if offset >= 0 => Ok(Point::Offset(offset)),
        _ => Err(bad()),
    }
}

/// The offset of a point in a partition's log. One that is given as such may lie outside of it.
pub(crate) async fn offset_of(
    client: &Client,
    topic: &str,
    partition: i32,
    extent: Extent,
    point: Point,
) -> Result<i64, Failure> {
    Ok(match point {
        Point::Earliest => extent.log_start_offset,
        Point::Latest => extent.high_watermark,
        Point::Offset(offset) => offset,
        Point::BeforeEnd(count) => (extent.high_watermark - count).max(extent.log_start_offset),
        Point::Time(ms) => client
            .list_offset(topic, partition, OffsetSpec::Timestamp(ms))
            .await?
            .map_or(extent.high_watermark, |at| at.offset),
    })
}

/// Milliseconds, RFC 3339, or a date or date and time in UTC.
fn time_ms(text: &str) -> Option<i64> {
    if let Ok(ms) = text.parse::<i64>() {
        return Some(ms);
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return Some(time.as_millisecond());
    }
    let civil: DateTime = text.parse().ok()?;
    let zoned = civil.to_zoned(TimeZone::UTC).ok()?;
    Some(zoned.timestamp().as_millisecond())
}

/// RFC 3339 with milliseconds, in UTC. A time beyond the calendar is printed as its number.
pub(crate) fn format_time(ms: i64) -> String {
    match Timestamp::from_millisecond(ms) {
        Ok(time) => format!("{time:.3}"),
        Err(_) => ms.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_are_read_as_people_write_them() {
        let now = Timestamp::from_millisecond(1_000_000_000_000).unwrap();
        for (text, point) in [
            ("earliest", Some(Point::Earliest)),
            ("beginning", Some(Point::Earliest)),
            ("latest", Some(Point::Latest)),
            ("end", Some(Point::Latest)),
            ("0", Some(Point::Offset(0))),
            ("42", Some(Point::Offset(42))),
            ("-5", Some(Point::BeforeEnd(5))),
            ("@1700000000123", Some(Point::Time(1_700_000_000_123))),
            ("@-1", Some(Point::Time(-1))),
            ("@1970-01-01T00:00:01Z", Some(Point::Time(1000))),
            ("@1970-01-01T01:00:01.5+01:00", Some(Point::Time(1500))),
            ("@1970-01-02", Some(Point::Time(86_400_000))),
            ("@1970-01-01T00:01", Some(Point::Time(60_000))),
            ("1h ago", Some(Point::Time(1_000_000_000_000 - 3_600_000))),
            (
                "1h 30m ago",
                Some(Point::Time(1_000_000_000_000 - 5_400_000)),
            ),
            ("2d ago", Some(Point::Time(1_000_000_000_000 - 172_800_000))),
            ("", None),
            ("-0", None),
            ("--5", None),
            ("-", None),
            ("+5", Some(Point::Offset(5))),
            ("5 ago", None),
            ("ago", None),
            ("@", None),
            ("@yesterday", None),
            ("@2026-13-01", None),
            ("9223372036854775808", None),
            ("first", None),
        ] {
            match parse_at(text, now) {
                Ok(got) => assert_eq!(Some(got), point, "{text:?}"),
                Err(error) => {
                    assert_eq!(None, point, "{text:?}: {error}");
                    assert!(error.contains(&format!("{text:?}")), "{error}");
                }
            }
        }
    }

    #[test]
    fn times_are_printed_in_utc_with_milliseconds() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (1_700_000_000_123, "2023-11-14T22:13:20.123Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
            (i64::MAX, "9223372036854775807"),
        ] {
            assert_eq!(format_time(ms), text);
        }
    }
}
