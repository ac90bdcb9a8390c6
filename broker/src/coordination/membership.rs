//! Membership of one process in its Cluster: its session is claimed before anything else, renewed as long as it runs, and given up last.

use std::{sync::Arc, time::Duration};

use k8s_openapi::{api::coordination::v1::Lease, apimachinery::pkg::apis::meta::v1::MicroTime};
use millrace_crds::coordination::BrokerSession;
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    api::{ApiError, ClusterApi},
    session::{ClaimError, Claimant},
};

/// How long to wait before trying again to claim a session.
const CLAIM_INTERVAL: Duration = Duration::from_secs(1);

/// The session is someone else's.
#[derive(Debug, thiserror::Error)]
#[error(
    "the session of broker {broker_id} was taken by another process: this one must not go on; it is started again if it should run"
)]
pub struct SessionLost {
    /// The broker.
    pub broker_id: i32,
}

/// A claimed session.
pub(super) struct Session {
    /// This process' broker epoch.
    pub(super) epoch: i32,
    lease: Lease,
}

/// A session that is renewed in the background.
pub(super) struct Renewal {
    at_once: Arc<Notify>,
    leave: CancellationToken,
    task: JoinHandle<()>,
}

/// Claims the session, however long the API server is away.
pub(super) async fn claim(api: &ClusterApi, claimant: &Claimant) -> Result<Session, ClaimError> {
    let name = claimant.lease_name();
    loop {
        let attempt = async {
            let current = api.lease(&name).await?;
            if let Some(session) = current.as_ref().and_then(|lease| own(claimant, lease)) {
                // The answer to an earlier attempt was lost.
                return Ok::<_, ApiError>(Ok(session));
            }
            match claimant.claim(current, now()) {
                Ok(lease) => {
                    let written = api.write(&lease).await?;
                    Ok(own(claimant, &written).map_or_else(|| Err(None), Ok))
                }
                Err(error) => Ok(Err(Some(error))),
            }
        };
        match attempt.await {
            Ok(Ok(session)) => return Ok(session),
            Ok(Err(Some(error))) => return Err(error),
            Ok(Err(None)) => {}
            Err(error) => warn!(%error, "the broker's session can't be claimed yet; trying again"),
        }
        tokio::time::sleep(CLAIM_INTERVAL).await;
    }
}

impl Session {
    /// Renews the session until told to leave. If it is lost, that is sent.
    pub(super) fn keep(
        self,
        api: ClusterApi,
        claimant: Arc<Claimant>,
        interval: Duration,
    ) -> (Renewal, oneshot::Receiver<SessionLost>) {
        let (lost, loss) = oneshot::channel();
        let leave = CancellationToken::new();
        let stop = leave.clone();
        let at_once = Arc::new(Notify::new());
        let asked = at_once.clone();
        let task = tokio::spawn(async move {
            let mut lease = self.lease;
            let mut ticks = tokio::time::interval(interval);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    () = stop.cancelled() => break,
                    _ = ticks.tick() => {}
                    () = asked.notified() => {}
                }
                let renew = |lease| claimant.renew(lease, now());
                match rewrite(&api, &mut lease, renew).await {
                    Ok(true) => {}
                    Ok(false) => {
                        let broker_id = claimant.session.broker_id;
                        let _ = lost.send(SessionLost { broker_id });
                        return;
                    }
                    Err(error) => warn!(%error, "the session can't be renewed; trying again"),
                }
            }
            let release = |lease| claimant.release(lease);
            match rewrite(&api, &mut lease, release).await {
                Ok(_) => info!("the session is given up"),
                Err(error) => warn!(%error, "the session can't be given up; it expires by itself"),
            }
        });
        (
            Renewal {
                at_once,
                leave,
                task,
            },
            loss,
        )
    }
}

impl Renewal {
    /// Writes the session now, as it has changed.
    pub(super) fn at_once(&self) {
        self.at_once.notify_one();
    }

    /// Gives the session up: who watches it sees at once that this process is gone.
    pub(super) async fn leave(self) {
        self.leave.cancel();
        let _ = self.task.await;
    }
}

/// Writes what `change` makes of the Lease, reading it again if someone else wrote it. `Ok(false)`: it is not this process' any more.
async fn rewrite(
    api: &ClusterApi,
    lease: &mut Lease,
    change: impl Fn(Lease) -> Option<Lease>,
) -> Result<bool, ApiError> {
    for _ in 0..3 {
        let Some(next) = change(lease.clone()) else {
            return Ok(false);
        };
        match api.write(&next).await {
            Ok(written) => {
                *lease = written;
                return Ok(true);
            }
            Err(ApiError::Conflict(name)) => match api.lease(&name).await? {
                Some(current) => *lease = current,
                None => make_again(lease),
            },
            // Someone deleted it. The process still is who it was.
            Err(ApiError::NotFound(_)) => make_again(lease),
            // If it was written all the same, the next attempt meets a conflict and reads it.
            Err(error) => return Err(error),
        }
    }
    Err(ApiError::Conflict(
        lease.metadata.name.clone().unwrap_or_default(),
    ))
}

fn make_again(lease: &mut Lease) {
    lease.metadata.resource_version = None;
    lease.metadata.uid = None;
    lease.metadata.creation_timestamp = None;
}

fn own(claimant: &Claimant, lease: &Lease) -> Option<Session> {
    let (_, held) = BrokerSession::read(lease).ok()?;
    let mine = held.holder.as_deref() == Some(&claimant.identity);
    mine.then(|| Session {
        epoch: held.epoch,
        lease: lease.clone(),
    })
}

/// For people who read Leases; no one compares it.
pub(super) fn now() -> MicroTime {
    MicroTime(jiff::Timestamp::now())
}
