//! Tells participants, the leaders of partitions and the coordinators of groups, what becomes of a transaction; follows them when they move.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use futures::future::join_all;
use millrace_proto::{
    ERROR_DOMAIN,
    v1::{
        CloseTransactionRequest, HoldOffsetsRequest, OpenTransactionRequest, TopicPartitions,
        participant_service_client::ParticipantServiceClient,
    },
};
use parking_lot::Mutex;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;
use tracing::{debug, warn};

use super::{Producer, coordinator::Request, shard::Ending};
use crate::{
    directory::Directory,
    groups::{self, TopicPartition, by_topic, flat},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// One try. Participants answer once all their replicas in sync have it.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a producer waits for its partitions; it may ask again.
const OPEN_TIMEOUT: Duration = Duration::from_secs(15);
const MIN_PAUSE: Duration = Duration::from_millis(10);
const MAX_PAUSE: Duration = Duration::from_millis(500);
/// A topic that is not there for so long is gone, with all that a transaction wrote to it.
const TOPIC_GONE: Duration = Duration::from_secs(60);
/// Connections that are kept; a Cluster has fewer brokers.
const MAX_CHANNELS: usize = 1_000;

pub(super) struct Courier {
    directory: Arc<Directory>,
    channels: Mutex<HashMap<String, Channel>>,
    stop: CancellationToken,
}

/// What is still to be told of an end.
struct Untold {
    partitions: BTreeSet<TopicPartition>,
    groups: BTreeSet<String>,
}

impl Courier {
    pub(super) fn new(directory: Arc<Directory>, stop: CancellationToken) -> Self {
        Self {
            directory,
            channels: Mutex::default(),
            stop,
        }
    }

    /// Lets the partitions' leaders know of the transaction.
    pub(super) async fn open(
        &self,
        (producer_id, epoch): Producer,
        partitions: Vec<TopicPartitions>,
    ) -> Result<(), Status> {
        let deadline = Instant::now() + OPEN_TIMEOUT;
        let mut left: BTreeSet<TopicPartition> = flat(&partitions).into_iter().collect();
        let mut pause = MIN_PAUSE;
        loop {
            let (by_leader, unled) = self.by_leader(&left);
            let calls = by_leader
                .into_iter()
                .map(|(address, partitions)| async move {
                    let request = OpenTransactionRequest {
                        producer_id,
                        producer_epoch: epoch.into(),
                        partitions: by_topic(&partitions),
                    };
                    let opened = async {
                        let mut service = self.service(&address)?;
                        service.open_transaction(timed(request)).await
                    };
                    (partitions, opened.await.map(drop))
                });
            let mut failed = unled.first().map(|(topic, partition)| {
                Status::unavailable(format!("{topic}/{partition} has no leader now"))
            });
            for (partitions, opened) in join_all(calls).await {
                match opened {
                    Ok(()) => left.retain(|partition| !partitions.contains(partition)),
                    Err(error) if may_pass(&error) => failed = Some(error),
                    Err(error) => return Err(error),
                }
            }
            let Some(error) = failed else {
                return Ok(());
            };
            if Instant::now() + pause >= deadline {
                return Err(error);
            }
            debug!(%error, "letting partitions' leaders know of a transaction again");
            self.pause(&mut pause).await?;
        }
    }

    /// Has the group's coordinator hold offsets.
    pub(super) async fn hold(&self, request: HoldOffsetsRequest) -> Result<(), Status> {
        let deadline = Instant::now() + OPEN_TIMEOUT;
        let group = request.offsets.as_ref().map(|offsets| &offsets.group_id);
        let group = group.cloned().unwrap_or_default();
        let mut pause = MIN_PAUSE;
        loop {
            let held = async {
                let address = self.coordinator_of(&group).ok_or_else(|| {
                    Status::unavailable(format!("group {group} has no coordinator now"))
                })?;
                let mut service = self.service(&address)?;
                service.hold_offsets(timed(request.clone())).await
            };
            match held.await {
                Ok(_) => return Ok(()),
                Err(error) if may_pass(&error) && Instant::now() + pause < deadline => {
                    debug!(%error, group, "having a group's coordinator hold offsets again");
                    self.pause(&mut pause).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells all participants how the transaction ended, until all have confirmed that, as long as the shard is there.
    pub(super) async fn close(&self, ending: Ending, shard: &mpsc::WeakSender<Request>) {
        let Ending {
            id,
            producer,
            commit,
            partitions,
            groups,
        } = ending;
        let mut untold = Untold { partitions, groups };
        let mut missing_since: HashMap<Arc<str>, Instant> = HashMap::new();
        let mut pause = MIN_PAUSE;
        while !untold.partitions.is_empty() || !untold.groups.is_empty() {
            if let Some(error) = self.tell(&mut untold, producer, commit).await {
                debug!(%error, transactional_id = %id, "telling of a transaction's end again");
            }
            self.forget_gone(&mut untold, &mut missing_since);
            if untold.partitions.is_empty() && untold.groups.is_empty() {
                return;
            }
            if shard.strong_count() == 0 || self.pause(&mut pause).await.is_err() {
                return;
            }
        }
    }

    /// Tells everyone who is left once. The last failure, if there was one.
    async fn tell(
        &self,
        untold: &mut Untold,
        (producer_id, epoch): Producer,
        commit: bool,
    ) -> Option<Status> {
        let mut by_address: BTreeMap<String, (BTreeSet<TopicPartition>, BTreeSet<String>)> =
            BTreeMap::new();
        for (address, partitions) in self.by_leader(&untold.partitions).0 {
            by_address.entry(address).or_default().0 = partitions;
        }
        for group in &untold.groups {
            if let Some(address) = self.coordinator_of(group) {
                let at = by_address.entry(address).or_default();
                at.1.insert(group.clone());
            }
        }
        let calls = by_address
            .into_iter()
            .map(|(address, (partitions, groups))| async move {
                let request = CloseTransactionRequest {
                    producer_id,
                    producer_epoch: epoch.into(),
                    commit,
                    partitions: by_topic(&partitions),
                    groups: groups.iter().cloned().collect(),
                };
                let closed = async {
                    let mut service = self.service(&address)?;
                    service.close_transaction(timed(request)).await
                };
                (partitions, groups, closed.await)
            });
        let mut failed = None;
        for (partitions, groups, closed) in join_all(calls).await {
            match closed {
                Ok(_) => {
                    untold.partitions.retain(|told| !partitions.contains(told));
                    untold.groups.retain(|told| !groups.contains(told));
                }
                Err(error) => failed = Some(error),
            }
        }
        failed
    }

    /// Who would be told of a topic that is gone?
    fn forget_gone(&self, untold: &mut Untold, missing_since: &mut HashMap<Arc<str>, Instant>) {
        let now = Instant::now();
        untold.partitions.retain(|(topic, partition)| {
            let known = self.directory.topic(topic);
            let there = known.is_some_and(|topic| topic.partition(*partition).is_some());
            if there {
                missing_since.remove(topic);
                return true;
            }
            let since = *missing_since.entry(topic.clone()).or_insert(now);
            let gone = now - since > TOPIC_GONE;
            if gone {
                warn!(%topic, partition, "a transaction has ended that wrote to a partition which is gone");
            }
            !gone
        });
    }

    /// The partitions by their leaders' addresses, and those without a leader.
    fn by_leader(
        &self,
        partitions: &BTreeSet<TopicPartition>,
    ) -> (
        BTreeMap<String, BTreeSet<TopicPartition>>,
        Vec<TopicPartition>,
    ) {
        let mut led: BTreeMap<String, BTreeSet<TopicPartition>> = BTreeMap::new();
        let mut unled = Vec::new();
        for key in partitions {
            match self.leader(&key.0, key.1) {
                Some(address) => {
                    led.entry(address).or_default().insert(key.clone());
                }
                None => unled.push(key.clone()),
            }
        }
        (led, unled)
    }

    fn leader(&self, topic: &str, partition: i32) -> Option<String> {
        let partition = self.directory.topic(topic)?.partition(partition)?;
        self.directory
            .leader(&partition)
            .map(|(_, address)| address)
    }

    fn coordinator_of(&self, group: &str) -> Option<String> {
        let partition = self.directory.partition_of(groups::TOPIC, group)?;
        self.leader(groups::TOPIC, partition)
    }

    fn service(&self, address: &str) -> Result<ParticipantServiceClient<Channel>, Status> {
        let mut channels = self.channels.lock();
        if let Some(channel) = channels.get(address) {
            return Ok(ParticipantServiceClient::new(channel.clone()));
        }
        let endpoint = Endpoint::from_shared(format!("http://{address}"));
        let endpoint = endpoint.map_err(|error| Status::internal(error.to_string()))?;
        let channel = endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .connect_lazy();
        if channels.len() >= MAX_CHANNELS {
            channels.clear();
        }
        channels.insert(address.to_owned(), channel.clone());
        Ok(ParticipantServiceClient::new(channel))
    }

    /// Longer each time. An error if the broker is stopping.
    async fn pause(&self, pause: &mut Duration) -> Result<(), Status> {
        let slept = self
            .stop
            .run_until_cancelled(tokio::time::sleep(*pause))
            .await;
        *pause = (*pause * 2).min(MAX_PAUSE);
        slept.ok_or_else(|| Status::unavailable("the broker is stopping"))
    }
}

fn timed<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    request
}

/// Whether the same may succeed a moment later, perhaps elsewhere.
fn may_pass(error: &Status) -> bool {
    let info = error.get_details_error_info();
    let reason = info.filter(|info| info.domain == ERROR_DOMAIN);
    match reason.as_ref().map(|info| info.reason.as_str()) {
        Some(reason) => matches!(
            reason,
            "NOT_LEADER"
                | "SHUTTING_DOWN"
                | "NOT_ENOUGH_REPLICAS"
                | "TIMED_OUT"
                | "THROTTLED"
                | "DISK_FULL"
        ),
        None => matches!(
            error.code(),
            Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown
        ),
    }
}
