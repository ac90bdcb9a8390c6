//! A broker's claim on its session Lease: what is written when it starts, renews and ends.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use k8s_openapi::{
    api::coordination::v1::Lease,
    apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference},
};
use millrace_crds::coordination::{BrokerSession, Held, LeaseError};

/// One process of a broker.
#[derive(Clone, Debug)]
pub(crate) struct Claimant {
    /// The Cluster's name.
    pub(crate) cluster: String,
    /// So that the session goes with its Cluster.
    pub(crate) owner: Option<OwnerReference>,
    /// What it says of itself.
    pub(crate) session: BrokerSession,
    /// `<pod>/<pod UID>/<random>`: no two processes have the same.
    pub(crate) identity: String,
    /// How long without a change until the session counts as dead.
    pub(crate) duration_seconds: i32,
    /// How often its store was opened: a process of it has at least this epoch, though the Lease that counts them was deleted. In an epoch of an
    /// earlier process it would go on leading what that one led.
    pub(crate) starts: i32,
    /// It is about to stop.
    pub(crate) draining: Arc<AtomicBool>,
}

/// Why a session can't be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another broker has the id.
    #[error(
        "broker id {id} belongs to pod {holder} (Lease {lease}): two volumes claim the same id; if that pod is gone for good, delete the Lease"
    )]
    Taken {
        /// The id.
        id: i32,
        /// The Lease.
        lease: String,
        /// Its holder's pod.
        holder: String,
    },
    /// The Lease is not a broker's session.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

impl Claimant {
    /// The Lease's name.
    pub(crate) fn lease_name(&self) -> String {
        BrokerSession::lease_name(&self.cluster, self.session.broker_id)
    }

    /// The Lease to write in place of `current` to become its holder, in the next broker epoch.
    ///
    /// A process of the same pod is gone by now: Kubernetes runs one process of a pod at a time, and a force-deleted twin finds out when it
    /// renews. A process of another pod is not, unless it gave the session up.
    pub(crate) fn claim(
        &self,
        current: Option<Lease>,
        now: MicroTime,
    ) -> Result<Lease, ClaimError> {
        let mut lease = current.unwrap_or_default();
        let mut epoch = 0;
        if lease.metadata.resource_version.is_some() {
            let (session, held) = BrokerSession::read(&lease)?;
            if held.holder.is_some() && session.pod != self.session.pod {
                return Err(ClaimError::Taken {
                    id: self.session.broker_id,
                    lease: self.lease_name(),
                    holder: session.pod,
                });
            }
            epoch = held.epoch;
        }
        lease.metadata.owner_references = self.owner.clone().map(|owner| vec![owner]);
        let held = Held {
            holder: Some(self.identity.clone()),
            epoch: self.starts.max(epoch + 1),
            duration_seconds: Some(self.duration_seconds),
            acquired: Some(now.clone()),
            renewed: Some(now),
        };
        self.session.write(&mut lease, &self.cluster, held);
        Ok(lease)
    }

    /// The Lease to write in place of `current`, which this process holds, to renew it; `None` if it does not hold it any more.
    pub(crate) fn renew(&self, current: Lease, now: MicroTime) -> Option<Lease> {
        self.rewrite(current, |held| held.renewed = Some(now))
    }

    /// The same to give it up: the broker has stopped in good order, and no one waits for it.
    pub(crate) fn release(&self, current: Lease) -> Option<Lease> {
        self.rewrite(current, |held| held.holder = None)
    }

    fn rewrite(&self, mut lease: Lease, change: impl FnOnce(&mut Held)) -> Option<Lease> {
        let (_, mut held) = BrokerSession::read(&lease).ok()?;
        if held.holder.as_deref() != Some(&self.identity) {
            return None;
        }
        change(&mut held);
        let session = BrokerSession {
            draining: self.draining.load(Ordering::Acquire),
            ..self.session.clone()
        };
        session.write(&mut lease, &self.cluster, held);
        Some(lease)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn claimant(pod: &str, boot: &str) -> Claimant {
        Claimant {
            cluster: "main".into(),
            owner: None,
            session: BrokerSession {
                broker_id: 3,
                store_id: Uuid::from_u128(1),
                pod: pod.into(),
                address: format!("{pod}:7070"),
                release: "0".into(),
                draining: false,
            },
            identity: format!("{pod}/uid/{boot}"),
            duration_seconds: 6,
            starts: 1,
            draining: Arc::default(),
        }
    }

    fn now() -> MicroTime {
        MicroTime(jiff::Timestamp::UNIX_EPOCH)
    }

    /// As the API server would keep it.
    fn stored(mut lease: Lease) -> Lease {
        lease.metadata.resource_version = Some("1".into());
        lease
    }

    fn held(lease: &Lease) -> Held {
        BrokerSession::read(lease).unwrap().1
    }

    #[test]
    fn each_process_has_an_epoch_of_its_own() {
        let first = claimant("p", "1").claim(None, now()).unwrap();
        assert_eq!(held(&first).epoch, 1);
        let second = claimant("p", "2")
            .claim(Some(stored(first.clone())), now())
            .unwrap();
        assert_eq!(held(&second).epoch, 2);
        assert_eq!(held(&second).holder.as_deref(), Some("p/uid/2"));
        // The first one, should it still run, sees that it is not the holder any more.
        assert_eq!(claimant("p", "1").renew(stored(second), now()), None);
    }

    #[test]
    fn a_session_of_another_pod_is_not_taken_unless_it_was_given_up() {
        let theirs = stored(claimant("p", "1").claim(None, now()).unwrap());
        let mine = claimant("q", "1");
        let refused = mine.claim(Some(theirs.clone()), now()).unwrap_err();
        assert!(
            refused.to_string().contains("belongs to pod p"),
            "{refused}"
        );
        let given_up = stored(claimant("p", "1").release(theirs).unwrap());
        let taken = mine.claim(Some(given_up), now()).unwrap();
        assert_eq!(held(&taken).epoch, 2);
    }

    #[test]
    fn renewing_changes_nothing_but_the_time() {
        let claimed = stored(claimant("p", "1").claim(None, now()).unwrap());
        let later = MicroTime(jiff::Timestamp::from_second(9).unwrap());
        let renewed = claimant("p", "1").renew(claimed.clone(), later).unwrap();
        let mut expected = held(&claimed);
        expected.renewed = held(&renewed).renewed;
        assert_eq!(held(&renewed), expected);
        assert_ne!(renewed, claimed);
    }
}
