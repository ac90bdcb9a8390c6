//! One of several operators acts, elected by a Lease.
//!
//! No clocks are compared: a holder is given up when its Lease was not seen to change for as long as the Lease says, by the observer's own monotonic clock. Every
//! write is a create or a replace with `resourceVersion`. An operator that sees another in its place ends. Until it sees it both act, which is safe: all writes are compare-and-swap, or
//! server-side apply of what another would apply too.

mod lease;

pub(crate) use lease::{Election, ElectionError};

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;

/// A holder that is not seen to renew for so long is given up.
pub(crate) const DURATION: Duration = Duration::from_secs(15);

/// What to do with the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// There is none: make it.
    Create,
    /// No one holds it, or its holder is dead: take it.
    Take,
    /// It is ours: renew it.
    Renew,
    /// Another holds it.
    Wait,
}

/// Watches the Lease.
struct Observer {
    identity: String,
    /// The Lease's version, and when it was first seen.
    seen: Option<(String, Instant)>,
}

impl Observer {
    fn new(identity: String) -> Self {
        Self {
            identity,
            seen: None,
        }
    }

    fn step(&mut self, lease: Option<&Lease>, now: Instant) -> Step {
        let Some(lease) = lease else {
            self.seen = None;
            return Step::Create;
        };
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let since = match &self.seen {
            Some((seen, since)) if *seen == version => *since,
            _ => {
                self.seen = Some((version, now));
                now
            }
        };
        let spec = lease.spec.as_ref();
        let holder = spec.and_then(|spec| spec.holder_identity.as_deref());
        let told = spec.and_then(|spec| spec.lease_duration_seconds);
        let told = told.and_then(|seconds| u64::try_from(seconds).ok());
        let duration = told.map_or(DURATION, Duration::from_secs);
        match holder {
            None | Some("") => Step::Take,
            Some(holder) if holder == self.identity => Step::Renew,
            Some(_) if now.duration_since(since) >= duration => Step::Take,
            Some(_) => Step::Wait,
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::coordination::v1::LeaseSpec;

    use super::*;

    fn lease(holder: &str, version: &str) -> Lease {
        let mut lease = Lease::default();
        lease.metadata.resource_version = Some(version.to_owned());
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            ..LeaseSpec::default()
        });
        lease
    }

    #[test]
    fn a_holder_is_given_up_when_its_lease_is_not_seen_to_change() {
        let begun = Instant::now();
        let mut observer = Observer::new("me".to_owned());
        for (second, lease, expected) in [
            (0, None, Step::Create),
            (0, Some(lease("other", "1")), Step::Wait),
            (14, Some(lease("other", "1")), Step::Wait),
            (14, Some(lease("other", "2")), Step::Wait),
            (28, Some(lease("other", "2")), Step::Wait),
            (29, Some(lease("other", "2")), Step::Take),
            (30, Some(lease("me", "3")), Step::Renew),
            (90, Some(lease("me", "3")), Step::Renew),
            (91, Some(lease("", "4")), Step::Take),
        ] {
            let now = begun + Duration::from_secs(second);
            let found = observer.step(lease.as_ref(), now);
            assert_eq!(found, expected, "second {second}");
        }
    }
}
