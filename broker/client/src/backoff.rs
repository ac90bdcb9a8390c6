//! How long to wait before the next try, jittered so that clients don't retry in step, and the loop that does so.

use std::time::Duration;

use tokio::time::Instant;

use crate::error::{Error, ErrorKind};

const JITTERED_FROM: f64 = 0.5;
const LONGEST: Duration = Duration::from_secs(1);
/// The first wait for a broker that has too much to do.
const OVERLOAD: Duration = Duration::from_millis(50);
/// The first wait for the last transaction to end everywhere: as long as an acknowledgement takes.
const ENDING: Duration = Duration::from_millis(3);
/// The first wait for a leader, or for a broker that is away.
const SEARCH: Duration = Duration::from_millis(20);
/// A search looks at least so often while it is young: a failover should take no longer because of the client.
const SEARCH_YOUNG: Duration = Duration::from_millis(80);
/// After `n` tries a search waits `n` times this: a few hundredths of the time that it has taken already.
const SEARCH_OLD: Duration = Duration::from_millis(1);

/// The wait after this many failures in a row (at least one), the last of them for this reason.
pub(crate) fn delay(cause: ErrorKind, failures: u32) -> Duration {
    match cause {
        ErrorKind::Throttled | ErrorKind::DiskFull => jitter(doubled(OVERLOAD, failures)),
        ErrorKind::ConcurrentTransaction => jitter(doubled(ENDING, failures).min(SEARCH_YOUNG)),
        _ => search(failures),
    }
}

/// The wait before looking again for what was not there so many times: short at first, since most leaders are elected within a
/// second or two, and longer the longer it takes.
pub(crate) fn search(tries: u32) -> Duration {
    let limit = SEARCH_YOUNG.max(SEARCH_OLD.saturating_mul(tries));
    jitter(doubled(SEARCH, tries).min(limit))
}

fn doubled(first: Duration, failures: u32) -> Duration {
    first
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(LONGEST)
}

fn jitter(full: Duration) -> Duration {
    full.mul_f64(JITTERED_FROM + fastrand::f64() * (1.0 - JITTERED_FROM))
}

/// Repeats a call while its failure is retriable and time is left.
pub(crate) async fn until<T, F: Future<Output = Result<T, Error>>>(
    deadline: Instant,
    mut call: impl FnMut() -> F,
) -> Result<T, Error> {
    let mut failures = 0;
    loop {
        match call().await {
            Err(error) if error.is_retriable() => {
                failures += 1;
                let delay = delay(error.kind(), failures);
                if Instant::now() + delay >= deadline {
                    return Err(error);
                }
                tracing::warn!(%error, ?delay, failures, "retrying");
                tokio::time::sleep(delay).await;
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overload_is_given_time_and_a_search_is_quick_until_it_is_old() {
        use ErrorKind::{NotLeader, Throttled};
        for (cause, failures, full) in [
            (Throttled, 1, 50),
            (Throttled, 2, 100),
            (Throttled, 6, 1000),
            (Throttled, u32::MAX, 1000),
            (NotLeader, 1, 20),
            (NotLeader, 2, 40),
            (NotLeader, 3, 80),
            (NotLeader, 4, 80),
            (NotLeader, 50, 80),
            (NotLeader, 200, 200),
            (NotLeader, u32::MAX, 1000),
        ] {
            let delay = delay(cause, failures);
            let full = Duration::from_millis(full);
            assert!(
                delay <= full && delay >= full / 2,
                "{cause:?} {failures}: {delay:?}"
            );
        }
    }

    #[test]
    fn a_search_wastes_little_of_the_time_that_it_takes() {
        let mut taken = Duration::ZERO;
        for tries in 1..1000 {
            let longest = SEARCH_YOUNG.max(taken.mul_f64(0.1)).max(SEARCH);
            let next = search(tries);
            assert!(next <= longest.min(LONGEST), "{next:?} after {taken:?}");
            taken += next;
        }
    }
}
