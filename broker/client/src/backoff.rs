//! How long to wait before the next try: exponential from 50 ms to 1 s, jittered so that clients don't retry in step.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(1);

/// The wait after this many failures in a row (at least one).
pub(crate) fn delay(failures: u32) -> Duration {
    let full = FIRST
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(LONGEST);
    full.mul_f64(0.5 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_from_fifty_milliseconds_to_one_second() {
        for (failures, full) in [(1, 50), (2, 100), (4, 400), (6, 1000), (u32::MAX, 1000)] {
            let delay = delay(failures);
            let full = Duration::from_millis(full);
            assert!(delay <= full && delay >= full / 2, "{failures}: {delay:?}");
        }
    }
}
