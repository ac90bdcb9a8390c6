//! Brokers with real stores on an [`ApiServer`] in memory, each in a runtime of its own so that it can be killed.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::{coordination::v1::Lease, core::v1::ConfigMap};
use millrace_crds::{
    TopicConfig,
    coordination::{
        BrokerSession, ControllerState, Held, PartitionAssignment, PartitionLease, TopicRecord,
        TopicState,
    },
};
use millrace_record::{BatchBuilder, BatchOptions};
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::{runtime::Runtime, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::api_server::ApiServer;
use crate::{
    coordination::{JoinError, Member, Membership, Timing},
    directory::{ClusterView, Directory},
    observe::Metrics,
    storage::{PartitionAppend, StorageError, StorageOptions, Store},
};

pub(super) const CLUSTER: &str = "main";
pub(super) const TIMING: Timing = Timing {
    duration: Duration::from_secs(2),
    renewal: Duration::from_millis(500),
};
/// Far more than anything takes: what does not come until then never does.
const PATIENCE: Duration = Duration::from_secs(60);

/// A Cluster.
#[derive(Default)]
pub(super) struct Cluster {
    pub(super) server: ApiServer,
    volumes: Mutex<BTreeMap<i32, TempDir>>,
}

/// A broker's process.
pub(super) struct Broker {
    pub(super) id: i32,
    pub(super) store: Arc<Store>,
    pub(super) directory: Arc<Directory>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    joining: Option<JoinHandle<Result<Member, JoinError>>>,
    pub(super) member: Option<Member>,
    runtime: Option<Runtime>,
}

/// Waits until that holds.
pub(super) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "never came: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Looks again and again whether that holds for so long.
pub(super) fn always(what: &str, duration: Duration, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while begun.elapsed() < duration {
        assert!(holds(), "does not hold: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Cluster {
    /// A broker that has joined.
    pub(super) fn start(&self, id: i32) -> Broker {
        let mut broker = self.begin(id);
        broker.joined();
        broker
    }

    /// A broker that is about to join.
    pub(super) fn begin(&self, id: i32) -> Broker {
        let path = {
            let mut volumes = self.volumes.lock();
            let volume = volumes.entry(id).or_insert_with(|| TempDir::new().unwrap());
            volume.path().to_owned()
        };
        let options = StorageOptions {
            generation_bytes: 256 << 10,
            tail_cache_bytes: 64 << 10,
            min_free_bytes: 0,
            ..StorageOptions::new(path)
        };
        let (store, _) = Store::open(options).unwrap();
        let directory = Arc::new(Directory::default());
        let stop = CancellationToken::new();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let membership = Membership {
            cluster: CLUSTER.into(),
            cluster_uid: None,
            namespace: "shop".into(),
            pod: pod(id),
            pod_uid: "uid".into(),
            address: format!("{}:7070", pod(id)),
            timing: TIMING,
            replica_lag: Duration::from_secs(10),
        };
        let metrics = Metrics::new(store.clone(), Arc::default());
        let joining = {
            let client = {
                let _within = runtime.enter();
                self.server.client(&pod(id))
            };
            let cluster = ClusterView {
                cluster_id: membership.cluster_id(),
                directory: directory.clone(),
                ..ClusterView::default()
            };
            let (store, metrics, stop) = (store.clone(), metrics.clone(), stop.clone());
            runtime.spawn(membership.join_through(client, store, cluster, metrics, stop))
        };
        Broker {
            id,
            store,
            directory,
            metrics,
            stop,
            joining: Some(joining),
            member: None,
            runtime: Some(runtime),
        }
    }

    /// A topic whose partitions have these replicas.
    pub(super) fn topic(&self, name: &str, replicas: &[Vec<i32>]) -> Uuid {
        let topic = Uuid::new_v4();
        self.make_topic(name, topic, replicas);
        topic
    }

    /// A topic of that id.
    pub(super) fn make_topic(&self, name: &str, topic: Uuid, replicas: &[Vec<i32>]) {
        self.write_record(name, topic, TopicState::Active);
        for (index, replicas) in (0..).zip(replicas) {
            let assignment = PartitionAssignment::new(topic, index, replicas.clone());
            self.write_lease(&PartitionLease {
                assignment,
                held: Held::default(),
            });
        }
    }

    /// Writes a topic's record.
    pub(super) fn write_record(&self, name: &str, topic_id: Uuid, state: TopicState) {
        self.server
            .put("configmaps", &record(name, topic_id, state));
    }

    /// Writes a partition's Lease, whatever is there.
    pub(super) fn write_lease(&self, lease: &PartitionLease) {
        let mut object = Lease::default();
        lease.write(&mut object, CLUSTER);
        self.server.put("leases", &object);
    }

    /// A partition as its Lease says.
    pub(super) fn lease(&self, topic: Uuid, index: i32) -> PartitionLease {
        let name = PartitionAssignment::new(topic, index, Vec::new()).lease_name(CLUSTER);
        PartitionLease::read(&self.server.get("leases", &name).unwrap()).unwrap()
    }

    /// Who leads a partition, in which epoch.
    pub(super) fn leader(&self, topic: Uuid, index: i32) -> (Option<i32>, i32) {
        let lease = self.lease(topic, index);
        (lease.assignment.leader.map(|l| l.id), lease.held.epoch)
    }

    /// A broker's session.
    pub(super) fn session(&self, id: i32) -> Option<Held> {
        let lease: Lease = self
            .server
            .get("leases", &BrokerSession::lease_name(CLUSTER, id))?;
        Some(BrokerSession::read(&lease).unwrap().1)
    }

    /// The controller, and its epoch.
    pub(super) fn controller(&self) -> Option<(i32, i32)> {
        let name = ControllerState::lease_name(CLUSTER);
        let lease: Lease = self.server.get("leases", &name)?;
        let (state, held) = ControllerState::read(&lease).unwrap();
        held.holder.map(|_| (state.broker_id, held.epoch))
    }

    /// Waits until a partition has a leader that knows it.
    pub(super) fn led(&self, broker: &Broker, topic: Uuid, index: i32) -> i32 {
        eventually("the partition is led", || {
            let (leader, epoch) = self.leader(topic, index);
            leader == Some(broker.id) && broker.leads(topic, index) == Some(epoch)
        });
        self.leader(topic, index).1
    }
}

impl Broker {
    /// Waits until it has joined.
    pub(super) fn joined(&mut self) {
        let runtime = self.runtime.as_ref().unwrap();
        let joining = self.joining.take().unwrap();
        let joined = runtime.block_on(async { tokio::time::timeout(PATIENCE, joining).await });
        self.member = Some(joined.unwrap().unwrap().unwrap());
    }

    /// The epoch in which it leads a partition.
    pub(super) fn leads(&self, topic: Uuid, index: i32) -> Option<i32> {
        self.store.partition(topic, index)?.leader_epoch()
    }

    /// Appends a record.
    pub(super) fn append(&self, topic: Uuid, index: i32) -> Result<i64, StorageError> {
        let mut builder = BatchBuilder::new(BatchOptions::default());
        builder.append(1, None, Some(b"x"), &[]);
        let log = self.store.partition(topic, index).unwrap();
        let epoch = log.leader_epoch().ok_or(StorageError::NotLed)?;
        let append = PartitionAppend::new(log, epoch, vec![builder.build().unwrap()])?;
        let runtime = self.runtime.as_ref().unwrap();
        let appended = runtime.block_on(async {
            self.store
                .append(vec![append])
                .await?
                .await
                .unwrap()
                .remove(0)
        });
        Ok(appended?.base_offset)
    }

    /// Stops it in good order.
    pub(super) fn stop(mut self) {
        self.stop.cancel();
        let member = self.member.take().unwrap();
        self.runtime.as_ref().unwrap().block_on(member.leave());
    }

    /// Whether it thinks that it is controller.
    pub(super) fn is_controller(&self) -> bool {
        let metrics = self.metrics.encode().unwrap();
        metrics.lines().any(|line| line == "millrace_controller 1")
    }
}

impl Drop for Broker {
    /// The process is gone at once.
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(PATIENCE);
        }
        self.store.close();
    }
}

/// A broker's pod, and the name of its client.
pub(super) fn pod(id: i32) -> String {
    format!("main-broker-{id}")
}

/// A topic's record.
pub(super) fn record(name: &str, topic_id: Uuid, state: TopicState) -> ConfigMap {
    let document = serde_json::json!({
        "apiVersion": "millrace.dev/v1alpha1", "kind": "Topic", "metadata": {"name": name}, "spec": {}
    });
    let record = TopicRecord {
        topic_id,
        namespace: "shop".into(),
        topic: name.into(),
        topic_uid: "uid".into(),
        state,
        partitions_made: 0,
        config: TopicConfig::try_from(&serde_json::from_value(document).unwrap()).unwrap(),
    };
    let mut object = ConfigMap::default();
    record.write(&mut object, CLUSTER);
    object
}
