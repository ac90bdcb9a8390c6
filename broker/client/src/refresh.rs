//! When to ask for metadata again: at once when something new went wrong, then less and less often while asking brings nothing.
//! One question at a time.

use std::time::Duration;

use tokio::time::Instant;

use crate::backoff;

/// Whoever has waited so long for a leader's answer asks whether it is still the leader: a broker that hangs won't say.
pub(crate) const STUCK: Duration = Duration::from_millis(500);

/// After so long without a question the next one begins a new search. Longer than any pause within one.
const QUIET: Duration = Duration::from_secs(2);
/// The least between two questions.
const LEAST: Duration = Duration::from_millis(10);

/// The pace of one task's questions.
#[derive(Debug, Default)]
pub(crate) struct Refresh {
    wanted: bool,
    is_running: bool,
    rounds: u32,
    finished: Option<Instant>,
    not_before: Option<Instant>,
}

impl Refresh {
    /// Something isn't known yet: ask, or go on asking.
    pub(crate) fn want(&mut self) {
        self.wanted = true;
    }

    /// Something has just gone wrong that was well before: what the last answer said is outdated.
    pub(crate) fn want_at_once(&mut self) {
        self.wanted = true;
        self.rounds = 0;
        self.not_before = self.finished.map(|finished| finished + LEAST);
    }

    /// Whether to ask now. Whoever gets true asks, and says so when done.
    pub(crate) fn start(&mut self, now: Instant) -> bool {
        let starts =
            self.wanted && !self.is_running && self.not_before.is_none_or(|time| time <= now);
        if starts {
            self.wanted = false;
            self.is_running = true;
            if self.finished.is_none_or(|finished| now - finished > QUIET) {
                self.rounds = 0;
            }
        }
        starts
    }

    /// The answer came, or none. Also after an answer the next question waits: a leader may still be missing.
    pub(crate) fn finish(&mut self, now: Instant) {
        self.is_running = false;
        self.rounds = self.rounds.saturating_add(1);
        self.finished = Some(now);
        self.not_before = Some(now + backoff::search(self.rounds));
    }

    /// When `start` will be true, if that is a matter of time.
    pub(crate) fn due(&self) -> Option<Instant> {
        self.not_before.filter(|_| self.wanted && !self.is_running)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_question_at_a_time_the_next_after_a_pause_and_news_shorten_it() {
        let mut refresh = Refresh::default();
        let mut now = Instant::now();
        assert!(!refresh.start(now), "nobody wants it");
        refresh.want();
        assert!(refresh.start(now));
        refresh.want();
        assert!(!refresh.start(now), "one at a time");
        assert_eq!(refresh.due(), None);
        for _ in 0..100 {
            refresh.finish(now);
            assert!(!refresh.start(now), "after a pause");
            now = refresh.due().unwrap();
            assert!(refresh.start(now));
            refresh.want();
        }
        refresh.finish(now);
        let patient = refresh.due().unwrap();
        assert!(patient - now >= Duration::from_millis(50));
        refresh.want_at_once();
        assert_eq!(refresh.due(), Some(now + LEAST));
        assert!(refresh.start(now + LEAST));
        refresh.finish(now + LEAST);
        refresh.want();
        assert!(refresh.due().unwrap() - now <= LEAST + Duration::from_millis(20));
    }

    #[test]
    fn a_new_search_is_quick_again() {
        let mut refresh = Refresh::default();
        let mut now = Instant::now();
        for _ in 0..500 {
            refresh.want();
            assert!(refresh.start(now));
            refresh.finish(now);
            now += Duration::from_secs(1);
        }
        now += QUIET;
        refresh.want();
        assert!(refresh.start(now));
        refresh.finish(now);
        refresh.want();
        assert!(refresh.due().unwrap() - now <= Duration::from_millis(20));
    }
}
