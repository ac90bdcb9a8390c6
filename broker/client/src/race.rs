//! Asking several brokers for what any of them can tell: the next is asked as soon as one fails or is slow, and the first success
//! counts. So a broker that hangs costs little, and one that is well is asked alone.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::time::timeout;

use crate::error::{Error, ErrorKind};

/// How long a broker has before the next one is asked as well.
const HEAD_START: Duration = Duration::from_millis(50);
/// How many may be asked at a time.
const MOST: usize = 8;

/// Calls one broker after another until one succeeds, or fails in a way that others would, too.
pub(crate) async fn first_success<T, F: Future<Output = Result<T, Error>>>(
    addresses: impl IntoIterator<Item = Arc<str>>,
    call: impl Fn(Arc<str>) -> F,
) -> Result<T, Error> {
    let mut addresses = addresses.into_iter().peekable();
    let mut running = FuturesUnordered::new();
    let mut last = Error::new(ErrorKind::Transport, "no broker is known");
    loop {
        if running.len() < MOST
            && let Some(address) = addresses.next()
        {
            running.push(call(address));
        }
        let may_wait = addresses.peek().is_none() || running.len() >= MOST;
        let next = match may_wait {
            true => running.next().await,
            false => match timeout(HEAD_START, running.next()).await {
                Ok(next) => next,
                Err(_slow) => continue,
            },
        };
        match next {
            None => return Err(last),
            Some(Err(error)) if error.is_retriable() => last = error,
            Some(done) => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(names: &'static [&'static str]) -> impl Iterator<Item = Arc<str>> {
        names.iter().map(|&name| name.into())
    }

    async fn answer(address: Arc<str>) -> Result<Arc<str>, Error> {
        match &*address {
            "hangs" => std::future::pending().await,
            "slow" => tokio::time::sleep(HEAD_START * 2).await,
            "refuses" => return Err(Error::new(ErrorKind::Transport, "refused")),
            "denies" => return Err(Error::new(ErrorKind::InvalidRequest, "denied")),
            _ => {}
        }
        Ok(address)
    }

    #[tokio::test]
    async fn brokers_that_hang_or_refuse_don_t_keep_others_from_answering() {
        for (names, expected) in [
            (&["good", "denies"][..], Ok("good")),
            (&["refuses", "good"], Ok("good")),
            (&["hangs", "refuses", "hangs", "good"], Ok("good")),
            (&["slow", "hangs"], Ok("slow")),
            (&["hangs", "denies", "good"], Err(ErrorKind::InvalidRequest)),
            (&["refuses", "refuses"], Err(ErrorKind::Transport)),
            (&[], Err(ErrorKind::Transport)),
        ] {
            let told = timeout(HEAD_START * 20, first_success(addresses(names), answer)).await;
            let told = told.expect("nobody waits for the one that hangs");
            assert_eq!(told.as_deref().map_err(Error::kind), expected, "{names:?}");
        }
    }
}
