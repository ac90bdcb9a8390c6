//! Who is in the cluster and who leads what. Under Kubernetes these facts live in [Leases](millrace_crds::coordination); a broker that runs
//! alone is the only one there is and leads every partition.
//!
//! Pure, and driven by tests: [`view`] (what is known), [`liveness`] (who is alive), [`election`] (who leads), [`session`] (what a broker claims).
//! Thin around them: [`api`] (the calls), [`membership`] (a session's life), [`coordinator`] (the task that watches and elects),
//! [`replicas`] (what follows from it for this broker's store), and [`kubernetes`], which wires them.
//!
//! # When the API server is away
//! Nothing changes: who leads goes on leading, since being a leader has no time limit. What can't happen is a change of leaders. When it
//! is back every session has its whole duration anew before anyone is held for dead ([`liveness`]).
//!
//! # Requests at rest
//! A broker renews its own session, and the controller its Lease; all else comes by two watches. So the number of requests does not depend
//! on the number of partitions.

mod api;
mod coordinator;
mod election;
mod kubernetes;
mod liveness;
mod membership;
mod replicas;
mod session;
#[cfg(test)]
mod tests;
mod view;

pub use api::ConnectError;
pub use coordinator::Timing;
pub use kubernetes::{JoinError, Member, Membership};
pub use membership::SessionLost;
pub use session::ClaimError;
