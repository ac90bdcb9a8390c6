//! What the client knows of the cluster: brokers, topics, leaders. Learnt from `GetMetadata` and from `NOT_LEADER` hints.
//!
//! Not responsible for when to ask again: producer and consumer do so on errors and at intervals.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use millrace_proto::v1;
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, LeaderHint};

/// A broker that lost its leadership may not know it for so long: until its session is over, 6 s by default, and some more
/// for clocks and pauses. What it says of a log's end in that time may be outdated.
pub(crate) const STALE_LEADER: Duration = Duration::from_secs(10);

/// A cluster as a broker described it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterMetadata {
    /// The cluster's id.
    pub cluster_id: String,
    /// The live brokers.
    pub brokers: Vec<BrokerInfo>,
    /// The topics asked for, or all of them.
    pub topics: Vec<TopicInfo>,
}

/// A broker and where to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerInfo {
    /// Unique in the cluster.
    pub id: i32,
    /// `host:port`.
    pub address: String,
}

/// A topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicInfo {
    /// The name.
    pub name: String,
    /// A UUID: a topic deleted and made again has another.
    pub id: String,
    /// Sorted by index.
    pub partitions: Vec<PartitionInfo>,
    /// The most bytes that a record batch may have.
    pub max_message_bytes: u32,
}

/// A partition, its leader and its log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionInfo {
    /// The index, from 0.
    pub partition: i32,
    /// The leader's broker id, if there is a leader.
    pub leader_id: Option<i32>,
    /// Rises with each change of leader.
    pub leader_epoch: i32,
    /// Broker ids; the first is the preferred leader.
    pub replicas: Vec<i32>,
    /// Broker ids of the in-sync replicas.
    pub isr: Vec<i32>,
    /// What its leader holds; `None` if there is no leader, or it can't be reached.
    pub extent: Option<Extent>,
}

/// How far a partition's log goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first offset still held.
    pub log_start_offset: i64,
    /// The first offset that consumers can't read yet.
    pub high_watermark: i64,
    /// The first offset that who reads only what is committed can't read yet: where the oldest open transaction begins, or the high watermark.
    pub last_stable_offset: i64,
    /// The first offset that no record has yet. Those from the high watermark on are on their way to the in-sync replicas.
    pub log_end_offset: i64,
    /// Bytes of record batches held.
    pub size_bytes: u64,
}

impl ClusterMetadata {
    /// Where the leaders are from which extents are missing, with the topics to ask them for.
    pub(crate) fn leaders_to_ask(&self) -> BTreeMap<Arc<str>, Vec<String>> {
        let addresses: HashMap<i32, Arc<str>> = self
            .brokers
            .iter()
            .map(|broker| (broker.id, broker.address.as_str().into()))
            .collect();
        let mut leaders: BTreeMap<Arc<str>, Vec<String>> = BTreeMap::new();
        for topic in &self.topics {
            let mut ids: Vec<i32> = topic
                .partitions
                .iter()
                .filter(|partition| partition.extent.is_none())
                .filter_map(|partition| partition.leader_id)
                .collect();
            ids.sort_unstable();
            ids.dedup();
            for address in ids.iter().filter_map(|id| addresses.get(id)) {
                let topics = leaders.entry(address.clone()).or_default();
                topics.push(topic.name.clone());
            }
        }
        leaders
    }

    /// Takes over the extents that a leader told.
    pub(crate) fn complete(&mut self, told: &v1::GetMetadataResponse) {
        for told in &told.topics {
            let same =
                |topic: &&mut TopicInfo| topic.name == told.name && topic.id == told.topic_id;
            let Some(topic) = self.topics.iter_mut().find(same) else {
                continue;
            };
            for (partition, told) in topic.partitions.iter_mut().zip(&told.partitions) {
                if partition.extent.is_none() {
                    partition.extent = Extent::of(told);
                }
            }
        }
    }

    /// Fails if a topic asked for does not exist.
    pub(crate) fn from_response(response: v1::GetMetadataResponse) -> Result<Self, Error> {
        let topics = response.topics.into_iter().map(|topic| match topic.error {
            Some(error) => Err(Error::from_proto(error)),
            None => Ok(TopicInfo {
                name: topic.name,
                id: topic.topic_id,
                partitions: topic
                    .partitions
                    .into_iter()
                    .map(PartitionInfo::from)
                    .collect(),
                max_message_bytes: topic.max_message_bytes,
            }),
        });
        Ok(ClusterMetadata {
            cluster_id: response.cluster_id,
            topics: topics.collect::<Result<_, _>>()?,
            brokers: response
                .brokers
                .into_iter()
                .map(|b| BrokerInfo {
                    id: b.id,
                    address: b.address,
                })
                .collect(),
        })
    }
}

impl From<v1::PartitionMetadata> for PartitionInfo {
    fn from(partition: v1::PartitionMetadata) -> Self {
        PartitionInfo {
            partition: partition.partition,
            leader_id: (partition.leader_id >= 0).then_some(partition.leader_id),
            leader_epoch: partition.leader_epoch,
            extent: Extent::of(&partition),
            replicas: partition.replica_ids,
            isr: partition.isr_ids,
        }
    }
}

impl Extent {
    fn of(partition: &v1::PartitionMetadata) -> Option<Self> {
        let high_watermark = partition.high_watermark?;
        Some(Extent {
            log_start_offset: partition.log_start_offset?,
            high_watermark,
            // A broker of an earlier release does not say.
            log_end_offset: partition.log_end_offset.unwrap_or(high_watermark),
            last_stable_offset: partition.last_stable_offset?,
            size_bytes: partition.size_bytes?,
        })
    }
}

/// A topic as the client needs it to route.
#[derive(Debug, Clone)]
pub(crate) struct Topic {
    pub(crate) id: String,
    pub(crate) max_message_bytes: usize,
    pub(crate) leaders: Vec<Leader>,
}

/// Who leads a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leader {
    pub(crate) epoch: i32,
    pub(crate) address: Option<Arc<str>>,
}

/// Whether a hint tells more than what is known. An epoch has one leader at most: of the same epoch only its address can be news.
fn is_news(known: &Leader, hint: &LeaderHint<'_>) -> bool {
    hint.epoch > known.epoch || (hint.epoch == known.epoch && known.address.is_none())
}

#[derive(Debug, Default)]
struct Snapshot {
    brokers: Vec<Arc<str>>,
    topics: HashMap<Arc<str>, Arc<Topic>>,
}

/// The routing knowledge that a client's producers and consumers share.
#[derive(Debug, Default)]
pub(crate) struct Metadata {
    current: ArcSwap<Snapshot>,
    changing: Mutex<()>,
}

impl Metadata {
    /// Addresses of the live brokers.
    pub(crate) fn brokers(&self) -> Vec<Arc<str>> {
        self.current.load().brokers.clone()
    }

    pub(crate) fn topic(&self, name: &str) -> Option<Arc<Topic>> {
        self.current.load().topics.get(name).cloned()
    }

    /// The address of the partition's leader, if known.
    pub(crate) fn leader(&self, topic: &str, partition: i32) -> Option<Arc<str>> {
        let current = self.current.load();
        let leaders = &current.topics.get(topic)?.leaders;
        leaders
            .get(usize::try_from(partition).ok()?)?
            .address
            .clone()
    }

    /// Takes over a response. A leader with a higher epoch that a hint told stays.
    pub(crate) fn apply(&self, response: &v1::GetMetadataResponse) -> Result<(), Error> {
        let addresses: HashMap<i32, Arc<str>> = response
            .brokers
            .iter()
            .map(|b| (b.id, Arc::from(b.address.as_str())))
            .collect();
        let mut fresh = Vec::with_capacity(response.topics.len());
        for topic in &response.topics {
            if topic.error.is_some() {
                fresh.push((topic.name.as_str(), None));
                continue;
            }
            if topic
                .partitions
                .iter()
                .enumerate()
                .any(|(index, p)| p.partition as usize != index)
            {
                return Err(Error::new(
                    ErrorKind::Transport,
                    format!(
                        "the broker's metadata of topic `{}` skips partitions; update the broker",
                        topic.name
                    ),
                ));
            }
            let leader = |p: &v1::PartitionMetadata| Leader {
                epoch: p.leader_epoch,
                address: addresses.get(&p.leader_id).cloned(),
            };
            let described = Topic {
                id: topic.topic_id.clone(),
                max_message_bytes: topic.max_message_bytes as usize,
                leaders: topic.partitions.iter().map(leader).collect(),
            };
            fresh.push((topic.name.as_str(), Some(described)));
        }

        let _one_at_a_time = self.changing.lock();
        let current = self.current.load();
        let mut topics = current.topics.clone();
        for (name, topic) in fresh {
            let Some(mut topic) = topic else {
                topics.remove(name);
                continue;
            };
            if let Some(known) = topics.get(name).filter(|known| known.id == topic.id) {
                for (leader, known) in topic.leaders.iter_mut().zip(&known.leaders) {
                    if known.epoch > leader.epoch {
                        *leader = known.clone();
                    }
                }
            }
            topics.insert(name.into(), Arc::new(topic));
        }
        let mut brokers: Vec<Arc<str>> = addresses.into_values().collect();
        brokers.sort();
        self.current.store(Arc::new(Snapshot { brokers, topics }));
        Ok(())
    }

    /// Takes over what a `NOT_LEADER` error tells of the leader, if it is newer than what is known.
    pub(crate) fn apply_hint(&self, topic: &str, partition: i32, error: &Error) {
        let Some(hint) = error.leader_hint() else {
            return;
        };
        let _one_at_a_time = self.changing.lock();
        let current = self.current.load();
        let Some(known) = current.topics.get(topic) else {
            return;
        };
        let index = usize::try_from(partition).unwrap_or(usize::MAX);
        if known
            .leaders
            .get(index)
            .is_none_or(|leader| !is_news(leader, &hint))
        {
            return;
        }
        tracing::debug!(
            topic,
            partition,
            leader = hint.id,
            address = hint.address,
            "leader changed"
        );
        let mut changed = Topic::clone(known);
        changed.leaders[index] = Leader {
            epoch: hint.epoch,
            address: Some(hint.address.into()),
        };
        let mut topics = current.topics.clone();
        topics.insert(topic.into(), Arc::new(changed));
        self.current.store(Arc::new(Snapshot {
            brokers: current.brokers.clone(),
            topics,
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(epoch: i32, leader_id: i32) -> v1::GetMetadataResponse {
        let broker = |id| v1::Broker {
            id,
            address: format!("b{id}:7070"),
        };
        v1::GetMetadataResponse {
            volume: None,
            cluster_id: "c".into(),
            brokers: vec![broker(1), broker(2)],
            topics: vec![v1::TopicMetadata {
                name: "t".into(),
                topic_id: "id".into(),
                partitions: vec![v1::PartitionMetadata {
                    leader_id,
                    leader_epoch: epoch,
                    ..Default::default()
                }],
                max_message_bytes: 1000,
                error: None,
            }],
        }
    }

    fn hint(epoch: i32, address: &str) -> Error {
        Error::new(ErrorKind::NotLeader, "moved").with([
            ("leader_id", "2".to_owned()),
            ("leader_address", address.to_owned()),
            ("leader_epoch", epoch.to_string()),
        ])
    }

    #[test]
    fn a_hint_of_a_newer_epoch_beats_older_metadata_until_that_catches_up() {
        let metadata = Metadata::default();
        metadata.apply(&response(4, 1)).unwrap();
        assert_eq!(metadata.leader("t", 0).as_deref(), Some("b1:7070"));
        metadata.apply_hint("t", 0, &hint(5, "b2:7070"));
        assert_eq!(metadata.leader("t", 0).as_deref(), Some("b2:7070"));
        metadata.apply(&response(4, 1)).unwrap();
        assert_eq!(
            metadata.leader("t", 0).as_deref(),
            Some("b2:7070"),
            "stale metadata must not undo it"
        );
        metadata.apply_hint("t", 0, &hint(5, "elsewhere:1"));
        assert_eq!(
            metadata.leader("t", 0).as_deref(),
            Some("b2:7070"),
            "a hint of the same epoch is no news"
        );
        metadata.apply(&response(6, 1)).unwrap();
        assert_eq!(metadata.leader("t", 0).as_deref(), Some("b1:7070"));
        metadata.apply_hint("t", 0, &hint(5, "b2:7070"));
        assert_eq!(
            metadata.leader("t", 0).as_deref(),
            Some("b1:7070"),
            "a hint of an older epoch is none"
        );
    }

    #[test]
    fn a_hint_of_the_same_epoch_tells_where_a_leader_is_whose_address_was_not_known() {
        let metadata = Metadata::default();
        // Told by a broker that doesn't know broker 3 yet.
        metadata.apply(&response(4, 3)).unwrap();
        assert_eq!(metadata.leader("t", 0), None);
        metadata.apply_hint("t", 0, &hint(4, "b3:7070"));
        assert_eq!(metadata.leader("t", 0).as_deref(), Some("b3:7070"));
    }

    #[test]
    fn a_topic_made_anew_starts_over_and_a_deleted_one_goes() {
        let metadata = Metadata::default();
        metadata.apply(&response(7, 1)).unwrap();
        let mut renewed = response(0, 2);
        renewed.topics[0].topic_id = "other".into();
        metadata.apply(&renewed).unwrap();
        assert_eq!(metadata.leader("t", 0).as_deref(), Some("b2:7070"));
        renewed.topics[0].error = Some(v1::Error::default());
        metadata.apply(&renewed).unwrap();
        assert!(metadata.topic("t").is_none());
    }

    #[test]
    fn a_partition_without_leader_has_no_address() {
        let metadata = Metadata::default();
        metadata.apply(&response(1, -1)).unwrap();
        assert_eq!(metadata.leader("t", 0), None);
        assert_eq!(metadata.leader("t", 1), None);
        assert_eq!(metadata.leader("t", -1), None);
    }

    #[test]
    fn metadata_that_skips_a_partition_is_refused() {
        let mut broken = response(1, 1);
        broken.topics[0].partitions[0].partition = 5;
        assert_eq!(
            Metadata::default().apply(&broken).unwrap_err().kind(),
            ErrorKind::Transport
        );
    }
}
