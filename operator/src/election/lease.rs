//! Reads and writes the election's Lease.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::{Api, Client};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use uuid::Uuid;

use super::{DURATION, Observer, Step};
use crate::context::post_params;
use crate::error::conflict;

const NAME: &str = "millrace-operator";
/// How often the Lease is looked at and renewed.
const INTERVAL: Duration = Duration::from_secs(2);
/// A call that takes longer is given up.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Why an operator stops to act.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ElectionError {
    /// Another one is elected.
    #[error(
        "another operator holds Lease {NAME}: {0}; this one ends, and stands by once it is started again"
    )]
    Lost(String),
}

/// An operator that stands for election.
pub(crate) struct Election {
    leases: Api<Lease>,
    namespace: String,
    identity: String,
}

/// An operator that is elected.
pub(crate) struct Elected {
    election: Election,
}

impl Election {
    pub(crate) fn new(client: Client, namespace: &str, pod: &str) -> Self {
        Self {
            leases: Api::namespaced(client, namespace),
            namespace: namespace.to_owned(),
            // Another process of the same pod is another operator.
            identity: format!("{pod}/{}", Uuid::new_v4()),
        }
    }

    /// Waits until it is elected.
    pub(crate) async fn win(self) -> Elected {
        let mut observer = Observer::new(self.identity.clone());
        let mut waiting = false;
        loop {
            match timeout(CALL_TIMEOUT, self.attempt(&mut observer)).await {
                Ok(Ok(true)) => {
                    info!(
                        identity = self.identity,
                        namespace = self.namespace,
                        "elected"
                    );
                    return Elected { election: self };
                }
                Ok(Ok(false)) if !waiting => {
                    waiting = true;
                    info!("another operator is elected; standing by");
                }
                Ok(Ok(false)) => {}
                Ok(Err(error)) => {
                    warn!(%error, "Lease {NAME} can't be read or written; it is tried again")
                }
                Err(_) => warn!("the API server does not answer; it is tried again"),
            }
            sleep(INTERVAL).await;
        }
    }

    /// Takes the Lease, if it can be. Answers whether it did.
    async fn attempt(&self, observer: &mut Observer) -> Result<bool, kube::Error> {
        let held = self.leases.get_opt(NAME).await?;
        let step = observer.step(held.as_ref(), Instant::now());
        let written = match (step, held) {
            (Step::Wait, _) => return Ok(false),
            (Step::Create, _) | (_, None) => {
                let mut lease = Lease::default();
                lease.metadata.name = Some(NAME.to_owned());
                lease.spec = Some(self.spec(0));
                self.leases.create(&post_params(), &lease).await
            }
            (Step::Take, Some(lease)) => self.replace(lease, 1).await,
            (Step::Renew, Some(lease)) => self.replace(lease, 0).await,
        };
        match written {
            Ok(_) => Ok(true),
            Err(error) if conflict(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn replace(&self, mut lease: Lease, transitions: i32) -> Result<Lease, kube::Error> {
        let before = lease.spec.take().unwrap_or_default();
        let mut spec = self.spec(
            before
                .lease_transitions
                .unwrap_or(0)
                .saturating_add(transitions),
        );
        if transitions == 0 {
            spec.acquire_time = before.acquire_time;
        }
        lease.spec = Some(spec);
        self.leases.replace(NAME, &post_params(), &lease).await
    }

    fn spec(&self, transitions: i32) -> LeaseSpec {
        let now = Some(MicroTime(Timestamp::now()));
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            lease_transitions: Some(transitions),
            acquire_time: now.clone(),
            renew_time: now,
            ..LeaseSpec::default()
        }
    }
}

impl Elected {
    /// Renews the Lease until another is seen to hold it. While the API server is away no one can act, hence it is no reason to end: the
    /// operator would be started again with ever longer pauses, and be missing when the API server is back.
    pub(crate) async fn hold(&self) -> ElectionError {
        loop {
            sleep(INTERVAL).await;
            match timeout(CALL_TIMEOUT, self.renew()).await {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(other))) => return ElectionError::Lost(other),
                Ok(Err(error)) => {
                    warn!(%error, "Lease {NAME} could not be renewed; it is tried again")
                }
                Err(_) => warn!("the API server does not answer; it is tried again"),
            }
        }
    }

    /// Answers who else holds it.
    async fn renew(&self) -> Result<Option<String>, kube::Error> {
        let election = &self.election;
        let Some(lease) = election.leases.get_opt(NAME).await? else {
            return Ok(Some("it was deleted".to_owned()));
        };
        let holder = lease
            .spec
            .as_ref()
            .and_then(|spec| spec.holder_identity.clone());
        if holder.as_deref() != Some(&election.identity) {
            return Ok(Some(holder.unwrap_or_else(|| "no one".to_owned())));
        }
        match election.replace(lease, 0).await {
            // Someone edited it; the next look tells who.
            Err(error) if conflict(&error) => Ok(None),
            answer => answer.map(|_| None),
        }
    }

    /// Gives the Lease up, so that another need not wait.
    pub(crate) async fn release(self) {
        let election = &self.election;
        let released = async {
            let mut lease = election.leases.get(NAME).await?;
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() == Some(&election.identity) {
                spec.holder_identity = None;
                election
                    .leases
                    .replace(NAME, &post_params(), &lease)
                    .await?;
            }
            Ok::<(), kube::Error>(())
        };
        match timeout(INTERVAL, released).await {
            Ok(Ok(())) => info!("gave Lease {NAME} up"),
            Ok(Err(error)) => {
                warn!(%error, "Lease {NAME} could not be given up; another waits until it expires")
            }
            Err(_) => warn!("Lease {NAME} could not be given up; another waits until it expires"),
        }
    }
}
