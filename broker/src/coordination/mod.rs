//! Who is in the cluster and who leads what. Under Kubernetes these facts live in Leases; a broker that runs alone has the
//! embedded form, in which it is the only broker and leads every partition.

use crate::{service::Identity, storage::Store};

/// The broker id of a broker that runs alone.
const STANDALONE_BROKER_ID: i32 = 0;

/// The identity of a broker that runs alone. Its cluster is its store, and the leader epoch of its partitions is the store's
/// incarnation: leadership is bound to one process start, as it is among several brokers.
pub fn standalone(store: &Store, address: String) -> Identity {
    Identity {
        cluster_id: store.store_id().to_string(),
        broker_id: STANDALONE_BROKER_ID,
        address,
    }
}
