//! A follower: what it tells its leader, and what of the leader's answers it may act on.

use super::{LogEnds, Position};
use crate::storage::EpochEnd;

/// A replica that follows a leader, in one leader epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Follower {
    /// The epoch.
    pub epoch: i32,
    /// The leader's broker id.
    pub leader: i32,
    /// The last epoch whose leader was elected although it may have lacked committed records.
    pub last_unclean_epoch: Option<i32>,
}

/// Where a log that is not a prefix of its leader's is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut(pub i64);

/// The leader lacks what this replica knows to be committed, and no unclean election explains it: it keeps its records and stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the leader's log ends at offset {cut} where this replica's has committed records up to {high_watermark}: records were lost on the leader. This replica keeps its own and stops following; compare the volumes, and restart this broker with an empty volume if the leader's log is to be kept"
)]
pub struct Diverged {
    /// Where it would have been cut.
    pub cut: i64,
    /// Up to here its records are committed.
    pub high_watermark: i64,
}

impl Follower {
    /// Where to go on.
    pub fn position(log: &impl LogEnds) -> Position {
        Position {
            log_end: log.log_end(),
            last_epoch: log.last_epoch().filter(|_| log.log_start() < log.log_end()),
            durable_end: log.durable_end(),
        }
    }

    /// Where to cut, as the leader of epoch `epoch` has an end of the last epoch that is another. `None` if that is no longer of interest.
    pub fn cut(
        &self,
        epoch: i32,
        diverging: EpochEnd,
        log: &impl LogEnds,
        high_watermark: i64,
    ) -> Result<Option<Cut>, Diverged> {
        if epoch != self.epoch {
            return Ok(None);
        }
        let own_end = match diverging.epoch {
            Some(epoch) => log.end_of_epoch(epoch).end_offset,
            None => log.log_start(),
        };
        let cut = own_end
            .min(diverging.end_offset)
            .min(log.log_end())
            .max(log.log_start());
        self.check_cut(cut, log, high_watermark)?;
        Ok(Some(Cut(cut)))
    }

    /// Where to begin anew, without all that is there, as the leader of epoch `epoch` has nothing that this log could be compared with:
    /// its own starts at `log_start`. `None` if that is no longer of interest. Only to be asked if nothing was appended since the
    /// position was sent to which this is the answer: an older one may have been of quite another log.
    pub fn begin_anew(
        &self,
        epoch: i32,
        log_start: i64,
        log: &impl LogEnds,
        high_watermark: i64,
    ) -> Result<Option<i64>, Diverged> {
        if epoch != self.epoch {
            return Ok(None);
        }
        self.check_cut(log_start, log, high_watermark)?;
        Ok(Some(log_start))
    }

    /// What is committed is cut only if an unclean election has lost it.
    fn check_cut(&self, cut: i64, log: &impl LogEnds, high_watermark: i64) -> Result<(), Diverged> {
        let unclean = self
            .last_unclean_epoch
            .is_some_and(|unclean| log.last_epoch().is_none_or(|last| last < unclean));
        match cut < high_watermark && !unclean {
            true => Err(Diverged {
                cut,
                high_watermark,
            }),
            false => Ok(()),
        }
    }

    /// The high watermark that follows from the leader's.
    pub fn high_watermark(leaders: i64, log: &impl LogEnds) -> i64 {
        leaders.min(log.log_end())
    }
}
