//! From where to where each partition is read.

use millrace_client::{Client, Extent, Isolation, TopicInfo};

use crate::connection;
use crate::failure::Failure;
use crate::points::{Point, offset_of};

/// The offsets wanted of one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    /// The first.
    pub(super) from: i64,
    /// Where the consumer begins: `from`, unless that is outside the log.
    pub(super) seek: i64,
    /// Before this one reading ends; `None`: never.
    pub(super) to: Option<i64>,
}

impl Range {
    /// Whether the record at the offset is wanted.
    pub(super) fn contains(&self, offset: i64) -> bool {
        offset >= self.from && self.to.is_none_or(|to| offset < to)
    }

    /// Whether nothing is wanted any more, once this is the next offset.
    pub(super) fn ends_before(&self, next: i64) -> bool {
        self.to.is_some_and(|to| next >= to)
    }
}

/// Finds the range of every chosen partition; the index is the partition's. `follow`: the end of the log is no end.
pub(super) async fn ranges(
    client: &Client,
    topic: &TopicInfo,
    partitions: &[i32],
    from: Point,
    to: Point,
    follow: bool,
    isolation: Isolation,
) -> Result<Vec<Option<Range>>, Failure> {
    let mut ranges = vec![None; topic.partitions.len()];
    for (info, range) in topic.partitions.iter().zip(&mut ranges) {
        if !partitions.is_empty() && !partitions.contains(&info.partition) {
            continue;
        }
        let extent = connection::extent(&topic.name, info)?;
        let offset = |point| offset_of(client, &topic.name, info.partition, extent, point);
        let from = offset(from).await?;
        let to = match (follow, to) {
            (true, Point::Latest) => None,
            (_, to) => Some(offset(to).await?),
        };
        *range = Some(range_of(extent, isolation, from, to, follow));
    }
    Ok(ranges)
}

fn range_of(
    extent: Extent,
    isolation: Isolation,
    from: i64,
    to: Option<i64>,
    follow: bool,
) -> Range {
    let end = match isolation {
        Isolation::ReadCommitted => extent.last_stable_offset,
        Isolation::ReadUncommitted => extent.high_watermark,
    };
    Range {
        from,
        seek: from.clamp(
            extent.log_start_offset,
            extent.high_watermark.max(extent.log_start_offset),
        ),
        to: match follow {
            true => to,
            // What comes in from now on is not waited for.
            false => Some(to.unwrap_or(i64::MAX).min(end)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_stays_inside_the_log() {
        let log = Extent {
            log_start_offset: 10,
            high_watermark: 22,
            last_stable_offset: 20,
            log_end_offset: 22,
            size_bytes: 0,
        };
        for (from, to, follow, expected) in [
            // from, to, follow -> seek, end
            (10, None, false, (10, Some(20))),
            (10, None, true, (10, None)),
            (15, Some(18), false, (15, Some(18))),
            (15, Some(30), false, (15, Some(20))),
            (15, Some(30), true, (15, Some(30))),
            (3, None, false, (10, Some(20))),
            (25, None, false, (22, Some(20))),
            (25, None, true, (22, None)),
        ] {
            let range = range_of(log, Isolation::ReadCommitted, from, to, follow);
            assert_eq!((range.seek, range.to), expected, "{from} {to:?} {follow}");
            assert_eq!(range.from, from);
        }
        let all = range_of(log, Isolation::ReadUncommitted, 10, None, false);
        assert_eq!(all.to, Some(22));
    }

    #[test]
    fn only_offsets_of_the_range_are_wanted() {
        let range = Range {
            from: 12,
            seek: 12,
            to: Some(14),
        };
        let wanted: Vec<i64> = (10..20).filter(|&offset| range.contains(offset)).collect();
        assert_eq!(wanted, [12, 13]);
        assert!(!range.ends_before(13));
        assert!(range.ends_before(14));
        let endless = Range { to: None, ..range };
        assert!(endless.contains(i64::MAX) && !endless.ends_before(i64::MAX));
    }
}
