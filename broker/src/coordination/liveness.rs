//! Whether a broker's session, or the controller's, is still alive: it is as long as its Lease is seen to change.
//!
//! Time is this process' own monotonic clock; `renewTime` is never compared with any clock, since no two agree. What was not seen because the API
//! server was away counts as not having happened: after a gap every Lease gets its whole duration anew. Without that the first
//! moment after an outage would find all sessions expired, and elect everything away. For the same reason, when more than half of the
//! sessions seem to expire at once they get one more duration: it is far likelier that they can't renew than that they all died.
//!
//! It is about availability only. A session that is wrongly held for dead costs an election, and nothing else: see [`super::election`].

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

/// What is known of when Leases were last renewed.
#[derive(Debug)]
pub(crate) struct Liveness {
    duration: Duration,
    /// The Lease's version when it last changed, and when that was seen.
    seen: BTreeMap<String, (String, Instant)>,
    last_contact: Instant,
    in_touch_since: Instant,
    /// Set while more than half seemed dead and are given one more duration.
    guarded: Option<Instant>,
}

impl Liveness {
    /// Sessions whose Leases do not change for `duration` are dead.
    pub(crate) fn new(duration: Duration, now: Instant) -> Self {
        Self {
            duration,
            seen: BTreeMap::new(),
            last_contact: now,
            in_touch_since: now,
            guarded: None,
        }
    }

    /// A Lease was seen in that version.
    pub(crate) fn observe(&mut self, lease: &str, version: &str, now: Instant) {
        match self.seen.get_mut(lease) {
            Some((known, _)) if known == version => {}
            Some(known) => *known = (version.to_owned(), now),
            None => {
                self.seen
                    .insert(lease.to_owned(), (version.to_owned(), now));
            }
        }
    }

    /// A Lease is gone.
    pub(crate) fn forget(&mut self, lease: &str) {
        self.seen.remove(lease);
    }

    /// The API server has said something. It does so at least as often as this broker renews its own session, so a longer silence is a
    /// gap: the API server was away, or this process was stopped.
    pub(crate) fn contact(&mut self, now: Instant) {
        if self.is_out_of_touch(now) {
            self.in_touch_since = now;
        }
        self.last_contact = now;
    }

    /// The watch broke: from now on nothing is known until it is back.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.in_touch_since = now;
        self.guarded = None;
    }

    /// Which of these Leases have not been renewed in time.
    pub(crate) fn expired<'a>(
        &mut self,
        leases: impl IntoIterator<Item = &'a str>,
        now: Instant,
    ) -> BTreeSet<&'a str> {
        let mut all = 0;
        let silent: BTreeSet<&str> = leases
            .into_iter()
            .inspect(|_| all += 1)
            .filter(|lease| self.is_silent(lease, now))
            .collect();
        if silent.len() * 2 <= all {
            self.guarded = None;
            return silent;
        }
        let guarded = *self.guarded.get_or_insert(now);
        if now.duration_since(guarded) < self.duration {
            return BTreeSet::new();
        }
        silent
    }

    /// Whether this Lease alone has not been renewed in time.
    pub(crate) fn is_silent(&self, lease: &str, now: Instant) -> bool {
        if self.is_out_of_touch(now) {
            return false;
        }
        let changed = self.seen.get(lease).map(|(_, at)| *at);
        changed.is_some_and(|at| now.duration_since(at.max(self.in_touch_since)) > self.duration)
    }

    /// More than two renewals are missing where a duration is three of them.
    fn is_out_of_touch(&self, now: Instant) -> bool {
        now.duration_since(self.last_contact) > self.duration * 3 / 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DURATION: Duration = Duration::from_secs(6);
    const LEASES: [&str; 3] = ["a", "b", "c"];

    struct Observer {
        start: Instant,
        liveness: Liveness,
    }

    impl Observer {
        fn new() -> Self {
            let start = Instant::now();
            let liveness = Liveness::new(DURATION, start);
            Self { start, liveness }
        }

        fn at(&self, second: u64) -> Instant {
            self.start + Duration::from_secs(second)
        }

        /// Each second from `from` to `to` these Leases change, and the watch is up.
        fn run(&mut self, from: u64, to: u64, renewing: &[&str]) {
            for second in from..=to {
                let now = self.at(second);
                self.liveness.contact(now);
                for lease in renewing {
                    self.liveness.observe(lease, &second.to_string(), now);
                }
            }
        }

        fn expired(&mut self, second: u64) -> Vec<&'static str> {
            let now = self.at(second);
            self.liveness.expired(LEASES, now).into_iter().collect()
        }
    }

    #[test]
    fn a_lease_that_is_not_renewed_expires_after_its_duration() {
        let mut observer = Observer::new();
        observer.run(0, 10, &LEASES);
        observer.run(11, 16, &["a", "b"]);
        assert!(observer.expired(16).is_empty());
        observer.run(17, 17, &["a", "b"]);
        assert_eq!(observer.expired(17), ["c"]);
        observer.run(18, 18, &LEASES);
        assert!(observer.expired(18).is_empty());
    }

    #[test]
    fn a_lease_seen_again_in_the_same_version_was_not_renewed() {
        let mut observer = Observer::new();
        observer.run(0, 0, &LEASES);
        for second in 1..=7 {
            observer.run(second, second, &["a", "b"]);
            let now = observer.at(second);
            observer.liveness.observe("c", "0", now);
        }
        assert_eq!(observer.expired(7), ["c"]);
    }

    #[test]
    fn nothing_expires_while_nothing_can_be_seen_and_all_get_their_time_anew_after_it() {
        let mut observer = Observer::new();
        observer.run(0, 10, &LEASES);
        // The API server is away for ten minutes.
        assert!(observer.expired(600).is_empty());
        observer.run(610, 615, &["a"]);
        assert!(observer.expired(615).is_empty());
        observer.run(616, 617, &["a", "b"]);
        assert_eq!(observer.expired(617), ["c"]);
    }

    #[test]
    fn a_broken_watch_gives_all_their_time_anew() {
        let mut observer = Observer::new();
        observer.run(0, 10, &LEASES);
        observer.run(11, 15, &["a", "b"]);
        let now = observer.at(15);
        observer.liveness.restart(now);
        observer.run(16, 21, &["a", "b"]);
        assert!(observer.expired(21).is_empty());
        observer.run(22, 22, &["a", "b"]);
        assert_eq!(observer.expired(22), ["c"]);
    }

    #[test]
    fn more_than_half_at_once_get_one_more_duration() {
        let mut observer = Observer::new();
        observer.run(0, 10, &LEASES);
        observer.run(11, 17, &["a"]);
        assert!(observer.expired(17).is_empty());
        observer.run(18, 22, &["a"]);
        assert!(observer.expired(22).is_empty());
        observer.run(23, 23, &["a"]);
        assert_eq!(observer.expired(23), ["b", "c"]);
    }
}
