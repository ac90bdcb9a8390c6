//! Brokers that did not answer lately: they are asked last, so that a broker that hangs does not hold up every question.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

/// How long a broker is suspect. Who is asked last may be well for long without anybody noticing.
const MEMORY: Duration = Duration::from_secs(10);

/// The suspects and since when they are. As many as a cluster has brokers.
#[derive(Debug, Default)]
pub(crate) struct Suspects(Mutex<HashMap<Arc<str>, Instant>>);

impl Suspects {
    /// Moves suspects to the end.
    pub(crate) fn sort(&self, addresses: &mut [Arc<str>], now: Instant) {
        let mut suspects = self.0.lock();
        suspects.retain(|_, since| now - *since < MEMORY);
        addresses.sort_by_key(|address| suspects.contains_key(address));
    }

    /// Runs a call to a broker, which is suspect if the call fails, or if nobody waits for it to end.
    pub(crate) async fn watch<T, E>(
        &self,
        address: Arc<str>,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        let mut watched = Watched {
            suspects: self,
            address,
            is_well: false,
        };
        let result = call.await;
        watched.is_well = result.is_ok();
        result
    }
}

struct Watched<'a> {
    suspects: &'a Suspects,
    address: Arc<str>,
    is_well: bool,
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        let mut suspects = self.suspects.0.lock();
        match self.is_well {
            true => suspects.remove(&self.address),
            false => suspects.insert(self.address.clone(), Instant::now()),
        };
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn who_failed_or_was_not_waited_for_comes_last_until_it_answers_or_time_passes() {
        let suspects = Suspects::default();
        let [a, b, c] = ["a", "b", "c"].map(Arc::<str>::from);
        let order = |now| {
            let mut addresses = [a.clone(), b.clone(), c.clone()];
            suspects.sort(&mut addresses, now);
            addresses.concat()
        };
        let now = Instant::now();
        assert_eq!(order(now), "abc");
        let _ = suspects.watch(a.clone(), async { Err::<(), ()>(()) }).await;
        assert_eq!(order(now), "bca");
        let hangs = suspects.watch(b.clone(), std::future::pending::<Result<(), ()>>());
        assert!(hangs.now_or_never().is_none());
        assert_eq!(order(now), "cab");
        let _ = suspects.watch(a.clone(), async { Ok::<(), ()>(()) }).await;
        assert_eq!(order(now), "acb");
        assert_eq!(order(now + MEMORY + Duration::from_secs(1)), "abc");
    }
}
