//! How full brokers' volumes are, and when they will be full: pure.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use millrace_crds::cluster::status::VolumeState;
use millrace_proto::v1::Volume;

use crate::index::ClusterId;

/// What is shown is looked at again after this, if no percentage has changed before.
const REFRESH: Duration = Duration::from_secs(600);
/// How far back it is looked for how fast a volume fills.
const WINDOW: Duration = Duration::from_secs(3600);
/// Less than that says nothing of the hours to come.
const SHORTEST: Duration = Duration::from_secs(600);
/// Nothing is foretold beyond this.
const HORIZON: Duration = Duration::from_secs(30 * 24 * 3600);

/// What is shown of each broker's volume.
#[derive(Default)]
pub(crate) struct Volumes {
    brokers: HashMap<(ClusterId, i32), Seen>,
}

struct Seen {
    shown: VolumeState,
    refreshed: Instant,
    /// When, and how many bytes were used; the oldest first.
    samples: VecDeque<(Instant, u64)>,
}

impl Volumes {
    /// Takes in what brokers told at that time. Answers the Clusters whose statuses are to be looked at.
    pub(super) fn take_in(
        &mut self,
        told: HashMap<(ClusterId, i32), Volume>,
        now: Instant,
        clock: Timestamp,
    ) -> HashSet<ClusterId> {
        let mut changed = HashSet::new();
        for (broker, volume) in told {
            let (before, mut samples) = match self.brokers.remove(&broker) {
                Some(seen) => (Some((seen.shown, seen.refreshed)), seen.samples),
                None => (None, VecDeque::new()),
            };
            samples.push_back((now, volume.used_bytes));
            while samples.front().is_some_and(|(at, _)| *at + WINDOW < now) {
                samples.pop_front();
            }
            let new = state(&volume, full_in(&volume, &samples), clock);
            let is_alike =
                |held: &VolumeState| (held.used_percent, held.full) == (new.used_percent, new.full);
            let (shown, refreshed) = match before {
                Some((held, at)) if is_alike(&held) && now < at + REFRESH => (held, at),
                before => {
                    if before.is_none_or(|(held, _)| held != new) {
                        changed.insert(broker.0.clone());
                    }
                    (new, now)
                }
            };
            let seen = Seen {
                shown,
                refreshed,
                samples,
            };
            self.brokers.insert(broker, seen);
        }
        // Of brokers that are gone or can't be reached the last word stands for a while.
        self.brokers.retain(|_, seen| {
            let last = seen.samples.back();
            last.is_some_and(|(at, _)| now < *at + WINDOW)
        });
        changed
    }

    /// What is known of a Cluster's volumes, by broker.
    pub(crate) fn of(&self, cluster: &ClusterId) -> BTreeMap<i32, VolumeState> {
        let brokers = self.brokers.iter().filter(|((of, _), _)| of == cluster);
        brokers
            .map(|((_, id), seen)| (*id, seen.shown.clone()))
            .collect()
    }
}

/// What can be used: the broker refuses writes before the last byte is.
fn usable(volume: &Volume) -> u64 {
    let all = volume.used_bytes.saturating_add(volume.free_bytes);
    all.saturating_sub(volume.required_free_bytes)
}

fn state(volume: &Volume, full_in: Option<Duration>, clock: Timestamp) -> VolumeState {
    let (used, usable) = (volume.used_bytes, usable(volume).max(1));
    let percent = (u128::from(used) * 100 / u128::from(usable)).min(100);
    // To the minute: it is an estimate.
    let full_at = full_in.and_then(|left| {
        let at = clock
            .checked_add(SignedDuration::try_from(left).ok()?)
            .ok()?;
        let minute = at.as_second() / 60 * 60;
        Timestamp::from_second(minute).ok()
    });
    VolumeState {
        capacity_bytes: i64::try_from(used.saturating_add(volume.free_bytes)).unwrap_or(i64::MAX),
        used_percent: percent as i32,
        full: volume.full,
        full_at: full_at.map(Time),
    }
}

/// How long until it is full, if it fills as it did in the time of the samples.
fn full_in(volume: &Volume, samples: &VecDeque<(Instant, u64)>) -> Option<Duration> {
    let ((begun, before), (now, used)) = (samples.front()?, samples.back()?);
    let took = now.duration_since(*begun);
    let grown = used.checked_sub(*before).filter(|grown| *grown > 0)?;
    if took < SHORTEST || volume.full {
        return None;
    }
    let left = usable(volume).saturating_sub(*used);
    let seconds = took.as_secs_f64() * left as f64 / grown as f64;
    let left = Duration::try_from_secs_f64(seconds).ok()?;
    (left <= HORIZON).then_some(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn cluster() -> ClusterId {
        ClusterId::new("shop", "main")
    }

    /// Of 11 GiB, of which one has to stay free.
    fn told(used: u64) -> HashMap<(ClusterId, i32), Volume> {
        let volume = Volume {
            used_bytes: used,
            free_bytes: 11 * GIB - used,
            required_free_bytes: GIB,
            full: used >= 10 * GIB,
        };
        HashMap::from([((cluster(), 2), volume)])
    }

    #[test]
    fn what_fills_is_foretold_and_what_rests_is_not_looked_at() {
        let begun = Instant::now();
        let clock = |second: u64| Timestamp::from_second(second as i64).unwrap();
        let mut volumes = Volumes::default();
        // Second, bytes used; whether the Cluster is looked at, the percentage, the second at which it will be full.
        for (second, used, look, percent, full_at) in [
            (0, 5 * GIB, true, 50, None),
            (30, 5 * GIB + 1, false, 50, None),
            // Too early to say.
            (300, 6 * GIB, true, 60, None),
            // A GiB in each 300 s.
            (600, 7 * GIB, true, 70, Some(1500)),
            (630, 7 * GIB + 1, false, 70, Some(1500)),
            (900, 8 * GIB, true, 80, Some(1500)),
            (1500, 10 * GIB, true, 100, None),
            // Retention.
            (1530, 2 * GIB, true, 20, None),
            (1560, 2 * GIB, false, 20, None),
        ] {
            let now = begun + Duration::from_secs(second);
            let changed = volumes.take_in(told(used), now, clock(second));
            assert_eq!(changed.contains(&cluster()), look, "second {second}");
            let shown = &volumes.of(&cluster())[&2];
            assert_eq!(shown.used_percent, percent, "second {second}");
            assert_eq!(shown.full, used >= 10 * GIB, "second {second}");
            let foretold = shown.full_at.as_ref().map(|time| time.0.as_second());
            assert_eq!(foretold, full_at, "second {second}");
        }
        let later = begun + Duration::from_secs(1560) + WINDOW;
        volumes.take_in(HashMap::new(), later, clock(9000));
        assert!(volumes.of(&cluster()).is_empty());
    }
}
