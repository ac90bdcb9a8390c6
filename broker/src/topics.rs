//! The topics of a standalone broker: declared in YAML files, the same documents that Kubernetes takes, and followed while it
//! runs. A topic that is no longer declared is kept, with its data: only a person deletes data.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use millrace_crds::{
    CleanupPolicy, INTERNAL_TOPICS, Topic, TopicConfig, TopicError, TopicFileError,
    is_internal_topic, read_topics,
};
use millrace_record::TimestampType;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    directory::{self, Directory},
    storage::{
        Compaction, LogConfig, Retention, StorageError, Store, StoredPartition, StoredTopic,
    },
};

/// The id of a broker that runs alone.
const BROKER_ID: i32 = 0;

/// How often the files are looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_secs(2);

/// Why the declared topics could not be brought about.
#[derive(Debug, thiserror::Error)]
pub enum TopicsError {
    /// A file can't be read, or a document in it is wrong.
    #[error(transparent)]
    File(#[from] TopicFileError),
    /// A topic's spec contradicts itself.
    #[error("topic {name}: {source}")]
    Topic {
        /// The resource's name.
        name: String,
        /// What is wrong.
        source: TopicError,
    },
    /// Storage refused.
    #[error("topic {name}: {source}")]
    Storage {
        /// The topic's name.
        name: String,
        /// Why.
        source: StorageError,
    },
}

/// The topics of a broker that runs alone.
#[derive(Clone)]
pub struct Standalone {
    store: Arc<Store>,
    directory: Arc<Directory>,
}

impl Standalone {
    /// All topics that the store holds are served.
    pub fn new(store: Arc<Store>, directory: Arc<Directory>, address: &str) -> Self {
        directory.set_brokers([(BROKER_ID, address.to_owned())].into());
        let standalone = Self { store, directory };
        for topic in standalone.store.topics() {
            standalone.publish(&topic);
        }
        standalone
    }

    /// Creates the internal topics that do not exist. Blocks.
    pub fn make_internal(&self) -> Result<(), TopicsError> {
        for name in INTERNAL_TOPICS {
            self.bring_about(&TopicConfig::internal(name, 1))?;
        }
        Ok(())
    }

    /// Creates the declared topics that do not exist, and brings the others to what is declared. Blocks.
    pub fn apply(&self, path: &Path) -> Result<(), TopicsError> {
        let declared: Vec<TopicConfig> = read_topics(path)?
            .iter()
            .map(config_of)
            .collect::<Result<_, _>>()?;
        for topic in &declared {
            self.bring_about(topic)?;
        }
        let names: BTreeSet<&str> = declared.iter().map(|topic| topic.name.as_str()).collect();
        for topic in self.store.topics() {
            if !names.contains(&*topic.name) && !is_internal_topic(&topic.name) {
                warn!(topic = %topic.name, "held, but declared in no file: it is kept and served");
            }
        }
        Ok(())
    }

    /// Applies changes of the files until told to stop. A wrong file changes nothing.
    pub async fn follow(self, path: PathBuf, stop: CancellationToken) {
        let mut seen = fingerprint(&path).ok();
        while stop
            .run_until_cancelled(tokio::time::sleep(FOLLOW_INTERVAL))
            .await
            .is_some()
        {
            let now = fingerprint(&path).ok();
            if now == seen {
                continue;
            }
            seen = now;
            let (standalone, path) = (self.clone(), path.clone());
            match tokio::task::spawn_blocking(move || standalone.apply(&path)).await {
                Ok(Ok(())) => info!("topic files changed and were applied"),
                Ok(Err(error)) => {
                    error!(%error, "topic files changed, but can't be applied; the topics stay as they were")
                }
                Err(error) => error!(%error, "applying the topic files failed"),
            }
        }
    }

    fn bring_about(&self, topic: &TopicConfig) -> Result<(), TopicsError> {
        if topic.replication_factor > 1 {
            let wanted = topic.replication_factor;
            info!(
                topic = topic.name,
                wanted, "a standalone broker holds one replica of each partition"
            );
        }
        let held = self
            .store
            .topic_named(&topic.name)
            .map_or(0, |topic| topic.partitions.len());
        let partitions = topic.partitions as usize;
        if held > partitions {
            warn!(
                topic = topic.name,
                held,
                declared = partitions,
                "partitions can be added, never removed: all are kept"
            );
        }
        let stored = self
            .store
            .ensure_topic(&topic.name, partitions.max(held), log_config(topic))
            .map_err(|source| TopicsError::Storage {
                name: topic.name.clone(),
                source,
            })?;
        self.publish(&stored);
        if held < partitions {
            info!(
                topic = topic.name,
                partitions,
                added = partitions - held,
                "topic created or grown"
            );
        }
        Ok(())
    }

    fn publish(&self, topic: &StoredTopic) {
        let partition = |log: &StoredPartition| directory::Partition {
            leader: Some(BROKER_ID),
            leader_epoch: log.leader_epoch().unwrap_or_default(),
            replicas: vec![BROKER_ID],
            isr: vec![BROKER_ID],
            log: Some(log.clone()),
            replica: None,
        };
        let published = directory::Topic::new(
            topic.name.clone(),
            topic.topic_id,
            topic.config.max_message_bytes,
        );
        let partitions = topic.partitions.iter();
        published.set(partitions.map(|(index, log)| (*index, partition(log))));
        self.directory.publish(Arc::new(published));
    }
}

fn config_of(topic: &Topic) -> Result<TopicConfig, TopicsError> {
    TopicConfig::try_from(topic).map_err(|source| {
        let name = topic.metadata.name.clone().unwrap_or_default();
        TopicsError::Topic { name, source }
    })
}

/// What of a topic's configuration storage acts on.
pub(crate) fn log_config(topic: &TopicConfig) -> LogConfig {
    LogConfig {
        max_message_bytes: topic.max_message_bytes as usize,
        timestamp_type: match topic.timestamp_type {
            millrace_crds::TimestampType::CreateTime => TimestampType::CreateTime,
            millrace_crds::TimestampType::LogAppendTime => TimestampType::LogAppendTime,
        },
        timestamp_after_max: topic.timestamp_after_max,
        retention: match topic.cleanup_policy {
            CleanupPolicy::Compact => Retention::default(),
            CleanupPolicy::Delete | CleanupPolicy::CompactAndDelete => Retention {
                time: topic.retention_time,
                bytes: topic.retention_bytes,
            },
        },
        compaction: match topic.cleanup_policy {
            CleanupPolicy::Delete => None,
            CleanupPolicy::Compact | CleanupPolicy::CompactAndDelete => Some(Compaction {
                min_lag: topic.compaction.min_lag,
                max_lag: topic.compaction.max_lag,
                delete_retention: topic.compaction.delete_retention,
                min_dirty_percent: topic.compaction.min_dirty_percent,
            }),
        },
    }
}

/// Names, sizes and times of the files: they change when a file does.
fn fingerprint(path: &Path) -> io::Result<Vec<(PathBuf, u64, SystemTime)>> {
    let of = |path: PathBuf| {
        let metadata = std::fs::metadata(&path)?;
        Ok((path, metadata.len(), metadata.modified()?))
    };
    if !path.is_dir() {
        return Ok(vec![of(path.to_owned())?]);
    }
    let mut files = std::fs::read_dir(path)?
        .map(|entry| of(entry?.path()))
        .collect::<io::Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}
