//! What the parts of coordination share.

use std::sync::Arc;

use super::{
    api::ClusterApi,
    coordinator::{Timing, Topics},
    session::Claimant,
};
use crate::{
    directory::Directory,
    fetching::Fetching,
    observe::Metrics,
    partition::{Hosting, Peers},
    replication::{self, Me},
};

/// One process in its Cluster.
pub(super) struct Context {
    pub(super) api: ClusterApi,
    pub(super) claimant: Arc<Claimant>,
    pub(super) me: Me,
    pub(super) timing: Timing,
    pub(super) replication: replication::Timing,
    pub(super) directory: Arc<Directory>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) topics: Topics,
    pub(super) peers: Arc<Peers>,
    pub(super) hosting: Arc<Hosting>,
    pub(super) fetching: Fetching,
}
