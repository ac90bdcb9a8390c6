//! Keeps what leaves a broker below a rate, on average: whoever sends waits for their turn, and says afterwards what they sent.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// What all senders share.
pub(super) struct Pace {
    /// `None`: as fast as it goes.
    bytes_per_second: Option<u64>,
    /// When the next one may send.
    free_at: Mutex<Option<Instant>>,
}

impl Pace {
    pub(super) fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second,
            free_at: Mutex::default(),
        }
    }

    /// Waits for a turn.
    pub(super) async fn turn(&self) {
        loop {
            let free_at = *self.free_at.lock();
            match free_at.filter(|at| *at > Instant::now()) {
                // Another one may send meanwhile.
                Some(at) => tokio::time::sleep_until(at.into()).await,
                None => return,
            }
        }
    }

    /// Counts what was sent in a turn.
    pub(super) fn sent(&self, bytes: usize) {
        self.sent_at(bytes, Instant::now());
    }

    fn sent_at(&self, bytes: usize, now: Instant) {
        if let Some(rate) = self.bytes_per_second.filter(|rate| *rate > 0) {
            let mut free_at = self.free_at.lock();
            // What was not used of the time before does not count.
            let begins = free_at.map_or(now, |at| at.max(now));
            let takes = Duration::from_secs_f64(bytes as f64 / rate as f64);
            *free_at = Some(begins + takes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_turn_comes_once_what_was_sent_has_had_its_time() {
        let now = Instant::now();
        let after = |seconds| Some(now + Duration::from_secs(seconds));
        let pace = Pace::new(Some(100));
        pace.sent_at(200, now);
        assert_eq!(*pace.free_at.lock(), after(2));
        // At the same time by another one.
        pace.sent_at(100, now);
        assert_eq!(*pace.free_at.lock(), after(3));
        pace.sent_at(100, now + Duration::from_secs(10));
        assert_eq!(*pace.free_at.lock(), after(11));
        let pace = Pace::new(None);
        pace.sent_at(usize::MAX, now);
        assert_eq!(*pace.free_at.lock(), None);
    }
}
