//! Producers who wait until their records are committed.

use std::collections::BTreeMap;

use tokio::sync::oneshot;

use crate::storage::StorageError;

type Waiter = oneshot::Sender<Result<(), StorageError>>;

/// By the offset that the high watermark has to reach.
#[derive(Default)]
pub(super) struct Waiters {
    by_end: BTreeMap<(i64, u64), Waiter>,
    added: u64,
    /// From so many on those who gave up are looked for.
    crowd: usize,
}

/// As many as gave up and are still here, at least.
const CROWD: usize = 1024;

impl Waiters {
    pub(super) fn add(&mut self, end: i64, waiter: Waiter) {
        if self.by_end.len() >= self.crowd.max(CROWD) {
            self.by_end.retain(|_, waiter| !waiter.is_closed());
            self.crowd = 2 * self.by_end.len();
        }
        self.added += 1;
        self.by_end.insert((end, self.added), waiter);
    }

    /// Takes out those whose records lie before the high watermark.
    pub(super) fn take(&mut self, high_watermark: i64) -> Waiters {
        let later = self.by_end.split_off(&(high_watermark + 1, 0));
        Waiters {
            by_end: std::mem::replace(&mut self.by_end, later),
            ..Waiters::default()
        }
    }

    pub(super) fn succeed(self) {
        for waiter in self.by_end.into_values() {
            let _ = waiter.send(Ok(()));
        }
    }

    pub(super) fn fail(self, error: &StorageError) {
        for waiter in self.by_end.into_values() {
            let _ = waiter.send(Err(error.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_answered_once_the_high_watermark_is_at_its_end() {
        let mut waiters = Waiters::default();
        let mut add = |end| {
            let (sender, receiver) = oneshot::channel();
            waiters.add(end, sender);
            receiver
        };
        let mut waiting = [add(5), add(10), add(10), add(11)];
        waiters.take(4).succeed();
        assert!(waiting.iter_mut().all(|w| w.try_recv().is_err()));
        waiters.take(10).succeed();
        for waiter in &mut waiting[..3] {
            assert!(matches!(waiter.try_recv(), Ok(Ok(()))));
        }
        waiters.fail(&StorageError::NotLed);
        assert!(matches!(
            waiting[3].try_recv(),
            Ok(Err(StorageError::NotLed))
        ));
    }

    #[test]
    fn those_who_gave_up_do_not_gather() {
        let mut waiters = Waiters::default();
        let (kept, _waiting) = oneshot::channel();
        waiters.add(1, kept);
        for end in 0..10 * CROWD as i64 {
            waiters.add(end, oneshot::channel().0);
        }
        assert!(waiters.by_end.len() <= CROWD + 1);
        assert!(waiters.by_end.contains_key(&(1, 1)));
    }
}
