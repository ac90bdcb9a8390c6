//! The bound on prefetched bytes: the fetcher takes, the caller gives back with each batch that it is done with.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

#[derive(Debug)]
pub(crate) struct Buffer {
    limit: usize,
    used: AtomicUsize,
    pub(crate) freed: Notify,
}

impl Buffer {
    pub(crate) fn new(limit: usize) -> Self {
        Buffer {
            limit,
            used: AtomicUsize::new(0),
            freed: Notify::new(),
        }
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Takes `bytes` if there is room. An empty buffer takes anything, so that a consumer always gets on.
    pub(crate) fn try_take(&self, bytes: usize) -> bool {
        let fits = |used: usize| {
            let after = used.checked_add(bytes)?;
            (used == 0 || after <= self.limit).then_some(after)
        };
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, fits)
            .is_ok()
    }

    /// Corrects an estimate that was taken before.
    pub(crate) fn settle(&self, estimated: usize, actual: usize) {
        if actual > estimated {
            self.used.fetch_add(actual - estimated, Ordering::AcqRel);
        } else {
            self.give_back(estimated - actual);
        }
    }

    pub(crate) fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
        self.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_its_limit_and_yet_takes_one_thing_that_is_larger() {
        let buffer = Buffer::new(100);
        assert!(buffer.try_take(60));
        assert!(!buffer.try_take(60));
        assert!(buffer.try_take(40));
        buffer.settle(40, 10);
        assert!(buffer.try_take(30));
        buffer.give_back(100);
        assert!(buffer.try_take(500));
        assert!(!buffer.try_take(1));
    }
}
