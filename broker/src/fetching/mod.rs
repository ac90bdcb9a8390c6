//! Following: one task and one session for each other broker, which carries all partitions that this one follows and that one leads. A
//! session is kept with each broker that is up, whether or not it leads anything: that it breaks is the first sign of a death.

mod session;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    error::Error as StdError,
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use millrace_proto::v1::replication_service_client::ReplicationServiceClient;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use tracing::{debug, info, warn};

use self::session::Session;
use crate::{
    observe::Metrics,
    partition::{HostedReplica, PartitionKey, Peers, SILENCE},
    replication::{Follower, Me},
    storage::Store,
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Between attempts to connect: short, since how fast a new leader's followers reach it is how fast it can acknowledge.
const MIN_PAUSE: Duration = Duration::from_millis(20);
const MAX_PAUSE: Duration = Duration::from_millis(500);
/// A session that held for so long is begun anew at once; one that did not, after longer and longer pauses.
const SETTLED: Duration = Duration::from_secs(1);
/// What a leader may have sent that this broker has not read yet, for one session.
const WINDOW: u32 = 4 << 20;
/// The largest message from a leader: a batch may be as large as the largest request.
const MAX_MESSAGE: usize = 64 << 20;

/// Another broker as its session says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// Its process.
    pub epoch: i32,
    /// Where it listens.
    pub address: String,
}

/// What a session is to follow, and what of it changed since it looked last.
#[derive(Default)]
struct Assigned {
    partitions: HashMap<PartitionKey, (Follower, Arc<HostedReplica>)>,
    changed: BTreeSet<PartitionKey>,
}

/// One other broker.
struct Leader {
    id: i32,
    assigned: Mutex<Assigned>,
    wake: Notify,
    address: watch::Sender<Option<PeerAddress>>,
}

/// What all sessions share.
struct Shared {
    me: Me,
    cluster_id: String,
    store: Arc<Store>,
    peers: Arc<Peers>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
}

/// All sessions of this broker as a follower.
pub struct Fetching {
    shared: Arc<Shared>,
    leaders: Mutex<BTreeMap<i32, Arc<Leader>>>,
}

impl Fetching {
    /// For this process, until stopped.
    pub fn new(
        me: Me,
        cluster_id: String,
        store: Arc<Store>,
        peers: Arc<Peers>,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Self {
        let shared = Arc::new(Shared {
            me,
            cluster_id,
            store,
            peers,
            metrics,
            stop,
        });
        Self {
            shared,
            leaders: Mutex::default(),
        }
    }

    /// The brokers that are up, this one among them or not.
    pub fn set_peers(&self, peers: &BTreeMap<i32, PeerAddress>) {
        for leader in self.leaders.lock().values() {
            if !peers.contains_key(&leader.id) {
                leader
                    .address
                    .send_if_modified(|known| known.take().is_some());
            }
        }
        for (id, peer) in peers.iter().filter(|(id, _)| **id != self.shared.me.id) {
            self.leader(*id).address.send_if_modified(|known| {
                let is_new = known.as_ref() != Some(peer);
                *known = Some(peer.clone());
                is_new
            });
        }
    }

    /// Follows a partition. Whoever followed it before must have been told to stop.
    pub fn follow(&self, key: PartitionKey, follower: Follower, replica: Arc<HostedReplica>) {
        let leader = self.leader(follower.leader);
        let mut assigned = leader.assigned.lock();
        assigned.partitions.insert(key, (follower, replica));
        assigned.changed.insert(key);
        drop(assigned);
        leader.wake.notify_one();
    }

    /// No longer follows the partition.
    pub fn unfollow(&self, key: PartitionKey) {
        for leader in self.leaders.lock().values() {
            let mut assigned = leader.assigned.lock();
            if assigned.partitions.remove(&key).is_some() {
                assigned.changed.insert(key);
                drop(assigned);
                leader.wake.notify_one();
            }
        }
    }

    fn leader(&self, id: i32) -> Arc<Leader> {
        let mut leaders = self.leaders.lock();
        let new = || {
            let leader = Arc::new(Leader {
                id,
                assigned: Mutex::default(),
                wake: Notify::new(),
                address: watch::channel(None).0,
            });
            let shared = self.shared.clone();
            let stop = shared.stop.clone();
            tokio::spawn(stop.run_until_cancelled_owned(run(shared, leader.clone())));
            leader
        };
        leaders.entry(id).or_insert_with(new).clone()
    }
}

/// Keeps a session with one other broker, as long as that one is up.
async fn run(shared: Arc<Shared>, leader: Arc<Leader>) {
    let mut addresses = leader.address.subscribe();
    let mut pause = MIN_PAUSE;
    // Since when it is not reached, and whether that was said.
    let mut unreached: Option<(Instant, bool)> = None;
    loop {
        let Ok(peer) = addresses
            .wait_for(Option::is_some)
            .await
            .map(|peer| peer.clone())
        else {
            return;
        };
        let Some(peer) = peer else { continue };
        let begun = Instant::now();
        let ended = tokio::select! {
            ended = keep(&shared, &leader, &peer) => ended,
            // Another process, or none: what is under way with the last one is of no use.
            _ = addresses.wait_for(|now| now.as_ref() != Some(&peer)) => continue,
        };
        let (broker, address) = (leader.id, &peer.address);
        match ended {
            Ended::Refused => {
                shared.peers.refused(broker, peer.epoch);
                unreached = None;
            }
            Ended::NotReached(error) => {
                debug!(broker, address, error, "not reached");
                let (since, said) = unreached.get_or_insert((begun, false));
                if !*said && since.elapsed() > SILENCE {
                    warn!(
                        broker,
                        address,
                        error,
                        "a broker with a live session has not been reached for {SILENCE:?}: what it leads can't be followed"
                    );
                    *said = true;
                }
            }
            Ended::Broken(cause) => {
                info!(broker, address, cause, "the session with a broker ended");
                unreached = None;
                if begun.elapsed() > SETTLED {
                    pause = MIN_PAUSE;
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

/// How a session ended.
enum Ended {
    /// Nothing listens at the address.
    Refused,
    /// It did not begin.
    NotReached(String),
    /// It broke.
    Broken(String),
}

async fn keep(shared: &Arc<Shared>, leader: &Leader, peer: &PeerAddress) -> Ended {
    let endpoint = match Endpoint::from_shared(format!("http://{}", peer.address)) {
        Ok(endpoint) => endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .tcp_nodelay(true),
        Err(error) => {
            warn!(broker = leader.id, address = peer.address, %error, "the broker's address is none");
            return Ended::NotReached(error.to_string());
        }
    };
    let channel = match endpoint.connect().await {
        Ok(channel) => channel,
        Err(error) if is_refused(&error) => return Ended::Refused,
        Err(error) => return Ended::NotReached(error.to_string()),
    };
    let mut client = ReplicationServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    shared.peers.reached(leader.id);
    match Session::run(shared, leader, &mut client).await {
        Ok(()) => Ended::Broken("the broker ended it".to_owned()),
        Err(status) => Ended::Broken(status.message().to_owned()),
    }
}

fn is_refused(error: &(dyn StdError + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return error.kind() == io::ErrorKind::ConnectionRefused;
        }
        cause = error.source();
    }
    false
}
