//! The transactions that have ended in one partition: what readers of committed records are to leave out, and what a truncation takes
//! back. Pure.

/// A transaction that has ended, or its part in this partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) producer_id: i64,
    pub(crate) epoch: i16,
    pub(crate) aborted: bool,
    pub(crate) first_offset: i64,
    /// Of the marker.
    pub(crate) last_offset: i64,
    /// The last stable offset after that, but for what is not committed: no transaction that ends later begins before it.
    pub(crate) stable_end: i64,
}

/// Those of one partition, by their markers' offsets. Committed ones are kept only as long as their markers may be truncated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct EndedTransactions(Vec<Ended>);

impl EndedTransactions {
    pub(crate) fn push(&mut self, ended: Ended) {
        // Replayed from the log, it may be known already.
        while self
            .0
            .pop_if(|known| known.last_offset >= ended.last_offset)
            .is_some()
        {}
        self.0.push(ended);
    }

    /// Forgets those whose markers are at or after `offset`: returns them, the last first, since they are open again.
    pub(crate) fn truncate(&mut self, offset: i64) -> Vec<Ended> {
        let kept = self.0.partition_point(|ended| ended.last_offset < offset);
        let mut cut = self.0.split_off(kept);
        cut.reverse();
        cut
    }

    /// Forgets those that lie before the log's beginning.
    pub(crate) fn advance(&mut self, log_start: i64) {
        self.0.retain(|ended| ended.last_offset >= log_start);
    }

    /// Forgets those that were committed, and whose markers are committed as well.
    pub(crate) fn settle(&mut self, high_watermark: i64) {
        self.0
            .retain(|ended| ended.aborted || ended.last_offset >= high_watermark);
    }

    /// Those that were aborted and have records from `offset` up to `end`.
    pub(crate) fn aborted_within(&self, offset: i64, end: i64) -> Vec<Ended> {
        let from = self.0.partition_point(|ended| ended.last_offset < offset);
        let mut within = Vec::new();
        for ended in &self.0[from..] {
            if ended.aborted && ended.first_offset < end && !broken!(ShowAborted) {
                within.push(*ended);
            }
            if ended.stable_end >= end {
                break;
            }
        }
        within
    }

    /// For each: producer id i64, epoch i16, aborted u8, first, last and stable offset i64; big-endian. Since format 3.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut value = Vec::with_capacity(self.0.len() * LEN);
        for ended in &self.0 {
            value.extend_from_slice(&ended.producer_id.to_be_bytes());
            value.extend_from_slice(&ended.epoch.to_be_bytes());
            value.push(ended.aborted.into());
            for offset in [ended.first_offset, ended.last_offset, ended.stable_end] {
                value.extend_from_slice(&offset.to_be_bytes());
            }
        }
        value
    }

    /// `None` if the value is damaged.
    pub(crate) fn decode(value: &[u8]) -> Option<Self> {
        let (all, []) = value.as_chunks::<LEN>() else {
            return None;
        };
        let one = |entry: &[u8; LEN]| {
            let offset = |at: usize| Some(i64::from_be_bytes(entry[at..at + 8].try_into().ok()?));
            Some(Ended {
                producer_id: offset(0)?,
                epoch: i16::from_be_bytes([entry[8], entry[9]]),
                aborted: entry[10] != 0,
                first_offset: offset(11)?,
                last_offset: offset(19)?,
                stable_end: offset(27)?,
            })
        };
        Some(Self(all.iter().map(one).collect::<Option<_>>()?))
    }
}

/// Bytes of one.
const LEN: usize = 35;

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(producer_id: i64, first_offset: i64, last_offset: i64, stable_end: i64) -> Ended {
        Ended {
            producer_id,
            epoch: 1,
            aborted: true,
            first_offset,
            last_offset,
            stable_end,
        }
    }

    /// Producer 1 from 0 to 10; 2 from 5 to 30, around 3 from 12 to 20.
    fn some() -> EndedTransactions {
        let mut some = EndedTransactions::default();
        some.push(ended(1, 0, 10, 5));
        some.push(ended(3, 12, 20, 5));
        some.push(ended(2, 5, 30, 31));
        some
    }

    fn ids(found: Vec<Ended>) -> Vec<i64> {
        found.into_iter().map(|ended| ended.producer_id).collect()
    }

    #[test]
    fn a_read_finds_those_that_it_meets() {
        for (offset, end, expected) in [
            (0, 5, vec![1]),
            (0, 6, vec![1, 2]),
            (11, 12, vec![2]),
            (11, 40, vec![3, 2]),
            (21, 31, vec![2]),
            (31, 40, vec![]),
        ] {
            let found = ids(some().aborted_within(offset, end));
            assert_eq!(found, expected, "{offset}..{end}");
        }
        let mut committed = some();
        committed.0[2].aborted = false;
        assert!(committed.aborted_within(21, 31).is_empty());
    }

    #[test]
    fn what_is_cut_off_comes_back_and_what_is_before_the_log_goes() {
        let mut cut = some();
        assert_eq!(ids(cut.truncate(20)), [2, 3]);
        assert_eq!(ids(cut.aborted_within(0, 100)), [1]);
        let mut advanced = some();
        advanced.advance(11);
        assert_eq!(ids(advanced.aborted_within(0, 100)), [3, 2]);
    }

    #[test]
    fn committed_ones_are_kept_until_their_markers_are_safe() {
        let mut some = some();
        some.0[1].aborted = false;
        some.settle(20);
        assert_eq!(some.0.len(), 3);
        some.settle(21);
        assert_eq!(some.0.len(), 2);
    }

    #[test]
    fn the_stored_form_keeps_everything_and_a_replayed_one_is_kept_once() {
        let mut known = some();
        assert_eq!(EndedTransactions::decode(&known.encode()), Some(some()));
        assert_eq!(EndedTransactions::decode(&known.encode()[1..]), None);
        known.push(ended(2, 5, 30, 31));
        assert_eq!(known, some());
    }
}
