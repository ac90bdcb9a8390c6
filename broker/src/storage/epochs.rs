//! Which leader epoch wrote which part of a log: the epoch cache of KIP-101. Pure; it says what a scan of the log's batch headers
//! would say, and nothing else: an epoch in which nothing was appended is not in it.

/// The epochs of a log in which something was appended, oldest first, each with the offset at which it begins. Both rise strictly.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EpochCache {
    entries: Vec<(i32, i64)>,
}

/// The greatest epoch of a log up to another one, and the offset at which it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochEnd {
    /// `None`: the log has no such epoch, or no longer.
    pub epoch: Option<i32>,
    /// The offset after its last record; where the log starts if there is none.
    pub end_offset: i64,
}

impl EpochCache {
    /// The epoch of the last batch.
    pub fn last(&self) -> Option<i32> {
        self.entries.last().map(|(epoch, _)| *epoch)
    }

    /// A batch was appended. Epochs never fall.
    pub fn note(&mut self, epoch: i32, base_offset: i64) {
        if self.last().is_none_or(|last| last < epoch) {
            // Of an epoch that begins here, too, retention has removed everything.
            if !broken!(KeepEmptiedEpochs) {
                self.truncate(base_offset);
            }
            self.entries.push((epoch, base_offset));
        }
    }

    /// The greatest epoch not above `epoch`, and where it ends in a log that reaches from `log_start` to `log_end`.
    pub fn end_of(&self, epoch: i32, log_start: i64, log_end: i64) -> EpochEnd {
        let above = self.entries.partition_point(|(known, _)| *known <= epoch);
        let end_offset = self.entries.get(above).map_or(log_end, |(_, start)| *start);
        match above.checked_sub(1).and_then(|at| self.entries.get(at)) {
            Some((known, _)) => EpochEnd {
                epoch: Some(*known),
                end_offset,
            },
            None => EpochEnd {
                epoch: None,
                end_offset: log_start,
            },
        }
    }

    /// Everything from `offset` on is gone.
    pub fn truncate(&mut self, offset: i64) {
        self.entries.retain(|(_, start)| *start < offset);
    }

    /// Everything before `offset` is gone. Returns whether that changed anything.
    pub fn advance(&mut self, offset: i64) -> bool {
        let after = self.entries.partition_point(|(_, start)| *start <= offset);
        let Some(holder) = after.checked_sub(1) else {
            return false;
        };
        let old = holder > 0 || self.entries[0].1 != offset;
        self.entries.drain(..holder);
        self.entries[0].1 = offset;
        old
    }

    /// Value of `meta`'s epoch entries: for each epoch i32, start offset i64; big-endian. Since format 3.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut value = Vec::with_capacity(self.entries.len() * 12);
        for (epoch, start) in &self.entries {
            value.extend_from_slice(&epoch.to_be_bytes());
            value.extend_from_slice(&start.to_be_bytes());
        }
        value
    }

    /// `None` if the value is damaged.
    pub(crate) fn decode(value: &[u8]) -> Option<Self> {
        let (entries, []) = value.as_chunks::<12>() else {
            return None;
        };
        let entry = |entry: &[u8; 12]| {
            let (epoch, start) = entry.split_first_chunk::<4>()?;
            Some((
                i32::from_be_bytes(*epoch),
                i64::from_be_bytes(start.try_into().ok()?),
            ))
        };
        let entries: Vec<_> = entries.iter().map(entry).collect::<Option<_>>()?;
        let rising = entries.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1);
        rising.then_some(EpochCache { entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(entries: &[(i32, i64)]) -> EpochCache {
        let mut cache = EpochCache::default();
        for (epoch, start) in entries {
            cache.note(*epoch, *start);
        }
        cache
    }

    fn end(epoch: impl Into<Option<i32>>, end_offset: i64) -> EpochEnd {
        let epoch = epoch.into();
        EpochEnd { epoch, end_offset }
    }

    #[test]
    fn an_epoch_ends_where_the_next_one_begins() {
        let epochs = cache(&[(0, 0), (2, 10), (2, 15), (5, 20)]);
        let end_of = |epoch| epochs.end_of(epoch, 0, 30);
        assert_eq!(end_of(0), end(0, 10));
        assert_eq!(end_of(1), end(0, 10));
        assert_eq!(end_of(2), end(2, 20));
        assert_eq!(end_of(4), end(2, 20));
        assert_eq!(end_of(5), end(5, 30));
        assert_eq!(end_of(9), end(5, 30));
        assert_eq!(end_of(-1), end(None, 0));
        assert_eq!(EpochCache::default().end_of(3, 0, 0), end(None, 0));
    }

    #[test]
    fn what_retention_removed_of_an_epoch_ends_at_the_log_start() {
        let mut epochs = cache(&[(0, 0), (2, 10), (5, 20)]);
        assert!(!epochs.advance(0));
        assert!(epochs.advance(12));
        assert_eq!(epochs, cache(&[(2, 12), (5, 20)]));
        assert_eq!(epochs.end_of(0, 12, 30), end(None, 12));
        assert_eq!(epochs.end_of(2, 12, 30), end(2, 20));
        assert!(epochs.advance(30));
        assert_eq!(epochs, cache(&[(5, 30)]));
        assert!(!epochs.advance(30));
        assert!(!EpochCache::default().advance(7));
    }

    #[test]
    fn an_epoch_that_begins_where_retention_emptied_the_log_replaces_the_last_one() {
        let mut epochs = cache(&[(0, 0), (5, 20)]);
        epochs.advance(30);
        epochs.note(6, 30);
        assert_eq!(epochs, cache(&[(6, 30)]));
        assert_eq!(EpochCache::decode(&epochs.encode()), Some(epochs));
    }

    #[test]
    fn truncation_forgets_the_epochs_that_begin_beyond() {
        let mut epochs = cache(&[(0, 0), (2, 10), (5, 20)]);
        epochs.truncate(20);
        assert_eq!(epochs, cache(&[(0, 0), (2, 10)]));
        epochs.truncate(11);
        assert_eq!(epochs.last(), Some(2));
        epochs.truncate(0);
        assert_eq!(epochs, EpochCache::default());
    }

    #[test]
    fn the_stored_form_survives_and_damage_is_noticed() {
        let epochs = cache(&[(0, 0), (258, 3)]);
        let value = epochs.encode();
        assert_eq!(
            value,
            [
                0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 3
            ]
        );
        assert_eq!(EpochCache::decode(&value), Some(epochs));
        assert_eq!(EpochCache::decode(&value[1..]), None);
        let swapped = [&value[12..], &value[..12]].concat();
        assert_eq!(EpochCache::decode(&swapped), None);
    }
}
