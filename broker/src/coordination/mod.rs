//! Who is in the cluster and who leads what. Under Kubernetes these facts live in [Leases](millrace_crds::coordination); a broker that runs
//! alone is the only one there is and leads every partition.
//!
//! Pure, and driven by tests: [`view`] (what is known), [`liveness`] (who is alive), [`election`] (who leads), [`session`] (what a broker claims),
//! [`office`] (whether it is controller).
//! Thin around them: [`api`] (the calls), [`membership`] (a session's life), [`coordinator`] (the task that watches and elects),
//! [`replicas`] (what follows from it for this broker's replicas), [`isr`] (writes what leaders decide on their in-sync replicas), and
//! [`kubernetes`], which wires them.
//!
//! # Who is dead, and how fast that is seen
//! Being wrong about it costs a needless election and is never unsafe, so brokers are quick:
//!
//! - A process that ends in order says so first: its session is *draining*, the controller elects others for what it leads, their leaders take
//!   it out of the ISR, and only then does it stop serving.
//! - A process that is killed: the kernel closes its connections at once, and every broker has one to every other
//!   ([`fetching`](crate::fetching)). Who finds that nothing listens at its address any more takes that process, by its broker epoch, for dead.
//! - A process that was started again has a new broker epoch: the one before it is gone by definition.
//! - A process that hangs, or whose node is cut off: its session's Lease is not seen to change for the Lease duration (6 s by default: three
//!   renewals, so that one lost answer and a slow API server do not matter, and shorter than what people wait for).
//!
//! # When the API server is away
//! Nothing changes: who leads goes on leading, since being a leader has no time limit. What can't happen is a change of leaders. When it
//! is back every session has its whole duration anew before anyone is held for dead ([`liveness`]). Nor can in-sync replicas change: if one of them
//! dies meanwhile, `acks=all` waits for it or for the API server.
//!
//! # Requests at rest
//! A broker renews its own session, and the controller its Lease; all else comes by two watches. So the number of requests does not depend
//! on the number of partitions.

pub(crate) mod api;
mod context;
pub(crate) mod coordinator;
pub(crate) mod election;
mod isr;
mod kubernetes;
pub(crate) mod liveness;
mod membership;
pub(crate) mod office;
pub(crate) mod replicas;
pub(crate) mod session;
#[cfg(test)]
mod tests;
pub(crate) mod view;

pub use api::ConnectError;
pub use coordinator::Timing;
pub use kubernetes::{JoinError, Member, Membership, RestartGate};
pub use membership::SessionLost;
pub use session::ClaimError;
