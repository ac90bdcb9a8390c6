//! The Leases that brokers renew: each broker's session, and the controller's.

use k8s_openapi::api::coordination::v1::Lease;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Role;
use super::lease::{self, Held, LeaseError};

const BROKER_ANNOTATION: &str = "millrace.dev/broker";
const CONTROLLER_ANNOTATION: &str = "millrace.dev/controller";

/// What a broker says of itself in its session's Lease. `spec.holderIdentity` names the process, `<pod>/<pod UID>/<random>`; nobody holds
/// the Lease of a broker that ended in good order. `spec.leaseTransitions` is the broker epoch: one more for each process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BrokerSession {
    /// The broker's id, as its volume says.
    pub broker_id: i32,
    /// What is on its volume. A volume that lost its data has another.
    pub store_id: Uuid,
    /// The pod.
    pub pod: String,
    /// Where clients reach it: `host:port`.
    pub address: String,
    /// The release that it runs.
    pub release: String,
    /// It is about to stop: it takes no more leaderships.
    #[serde(default)]
    pub draining: bool,
}

impl BrokerSession {
    /// The name of a broker's Lease.
    pub fn lease_name(cluster: &str, broker_id: i32) -> String {
        format!("{cluster}-broker-{broker_id}")
    }

    /// Reads a session.
    ///
    /// # Errors
    /// If the Lease is not one.
    pub fn read(lease: &Lease) -> Result<(Self, Held), LeaseError> {
        let session = lease::read_annotation(&lease.metadata, BROKER_ANNOTATION)?;
        Ok((session, Held::read(lease)?))
    }

    /// Writes the session into its Lease.
    pub fn write(&self, lease: &mut Lease, cluster: &str, held: Held) {
        lease.metadata.name = Some(Self::lease_name(cluster, self.broker_id));
        lease::write(lease, cluster, Role::Broker, BROKER_ANNOTATION, self, held);
    }
}

/// Who is controller. `spec.holderIdentity` is that of the broker's session, `spec.leaseTransitions` the controller epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ControllerState {
    /// The broker that is, or was last, controller.
    pub broker_id: i32,
    /// Its epoch then: the process, not its successor, is controller.
    pub broker_epoch: i32,
}

impl ControllerState {
    /// The name of the controller's Lease.
    pub fn lease_name(cluster: &str) -> String {
        format!("{cluster}-controller")
    }

    /// Reads it.
    ///
    /// # Errors
    /// If the Lease is not the controller's.
    pub fn read(lease: &Lease) -> Result<(Self, Held), LeaseError> {
        let state = lease::read_annotation(&lease.metadata, CONTROLLER_ANNOTATION)?;
        Ok((state, Held::read(lease)?))
    }

    /// Writes it into its Lease.
    pub fn write(&self, lease: &mut Lease, cluster: &str, held: Held) {
        lease.metadata.name = Some(Self::lease_name(cluster));
        lease::write(
            lease,
            cluster,
            Role::Controller,
            CONTROLLER_ANNOTATION,
            self,
            held,
        );
    }
}
