//! What a Topic's record shall say, or why it can't: pure.

use kube::ResourceExt;
use millrace_crds::conditions::Reason;
use millrace_crds::coordination::{PartitionLease, TopicRecord, TopicState};
use millrace_crds::{Cluster, Compression, Topic, TopicConfig, TopicDefaults, TopicError};
use uuid::Uuid;

use crate::index;
use crate::problem::Problem;

/// What is known of a Topic's surroundings.
pub(super) struct Known<'a> {
    /// The Cluster that it names, if it is there.
    pub(super) cluster: Option<&'a Cluster>,
    /// The Cluster admits the Topic's namespace.
    pub(super) admitted: bool,
    /// The record of the topic's name.
    pub(super) record: Option<&'a Result<TopicRecord, String>>,
    /// The Topic that the record names is there.
    pub(super) owner_lives: bool,
}

/// What is to be done with the record.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Decision {
    /// It is as it shall be.
    Keep(TopicRecord),
    /// It is to be made.
    Create(TopicRecord),
    /// It is to be changed.
    Replace {
        before: Box<TopicRecord>,
        after: Box<TopicRecord>,
    },
}

impl Decision {
    /// The record as it shall be.
    pub(super) fn record(&self) -> &TopicRecord {
        match self {
            Self::Keep(record) | Self::Create(record) => record,
            Self::Replace { after, .. } => after.as_ref(),
        }
    }
}

pub(super) fn decide(topic: &Topic, known: &Known<'_>) -> Result<Decision, Problem> {
    let named = &topic.spec.cluster_ref;
    let Some(cluster) = known.cluster else {
        let namespace = named
            .namespace
            .as_deref()
            .or(topic.metadata.namespace.as_deref());
        return Err(Problem::stalled(
            Reason::ClusterNotFound,
            format!(
                "there is no Cluster {} in namespace {}; make it, or make this Topic again with the right spec.clusterRef, which can't change",
                named.name,
                namespace.unwrap_or_default()
            ),
        ));
    };
    if !known.admitted {
        return Err(Problem::stalled(
            Reason::NamespaceNotAllowed,
            format!(
                "Cluster {} does not admit Topics of namespace {}; add it to the Cluster's spec.topicNamespaces",
                named.name,
                topic.namespace().unwrap_or_default()
            ),
        ));
    }
    if cluster.metadata.deletion_timestamp.is_some() {
        let message = format!("Cluster {} is being deleted", named.name);
        return Err(Problem::passing(Reason::ClusterNotReady, message));
    }
    if let Some(message) = unsupported(topic) {
        return Err(Problem::stalled(Reason::NotSupported, message));
    }
    let cluster_namespace = cluster.namespace().unwrap_or_default();
    let uid = topic.uid().unwrap_or_default();
    match known.record {
        None => {
            let defaults = cluster.spec.resolved_topic_defaults();
            let config = resolve(topic, &cluster_namespace, defaults)?;
            enough_brokers(cluster, &config)?;
            Ok(Decision::Create(TopicRecord {
                topic_id: Uuid::new_v4(),
                namespace: topic.namespace().unwrap_or_default(),
                topic: topic.name_any(),
                topic_uid: uid,
                state: TopicState::Active,
                partitions_made: 0,
                config,
            }))
        }
        Some(Err(reason)) => Err(Problem::stalled(
            Reason::Unreadable,
            format!("the topic's record can't be read: {reason}"),
        )),
        Some(Ok(record)) => {
            if record.topic_uid != uid && known.owner_lives {
                return Err(taken(record));
            }
            if record.state == TopicState::Deleting {
                let message =
                    "a topic of this name is still being deleted; this one is made when it is gone";
                return Err(Problem::passing(Reason::Deleting, message.to_owned()));
            }
            let config = resolve(topic, &cluster_namespace, as_made(record))?;
            only_grows(record, &config)?;
            if config.replication_factor > record.config.replication_factor {
                enough_brokers(cluster, &config)?;
            }
            let after = TopicRecord {
                topic_id: record.topic_id,
                namespace: topic.namespace().unwrap_or_default(),
                topic: topic.name_any(),
                topic_uid: uid,
                state: TopicState::Active,
                partitions_made: record.partitions_made,
                config,
            };
            Ok(match after == *record {
                true => Decision::Keep(after),
                false => Decision::Replace {
                    before: Box::new(record.clone()),
                    after: Box::new(after),
                },
            })
        }
    }
}

/// A change of the Cluster's defaults is for new topics: those that are there keep what they were made with.
fn as_made(record: &TopicRecord) -> TopicDefaults {
    TopicDefaults {
        partitions: record.config.partitions,
        replication_factor: record.config.replication_factor,
        min_insync_replicas: record.config.min_insync_replicas,
    }
}

fn resolve(
    topic: &Topic,
    cluster_namespace: &str,
    defaults: TopicDefaults,
) -> Result<TopicConfig, Problem> {
    let invalid = |error: TopicError| Problem::stalled(Reason::InvalidSpec, error.to_string());
    TopicConfig::resolve(topic, cluster_namespace, defaults).map_err(invalid)
}

fn enough_brokers(cluster: &Cluster, config: &TopicConfig) -> Result<(), Problem> {
    let brokers = cluster.spec.replicas.unsigned_abs();
    if config.replication_factor <= brokers {
        return Ok(());
    }
    Err(too_few_brokers(
        config.replication_factor,
        brokers as usize,
        &cluster.name_any(),
    ))
}

pub(super) fn too_few_brokers(factor: u32, brokers: usize, cluster: &str) -> Problem {
    Problem::stalled(
        Reason::TooFewBrokers,
        format!(
            "spec.replicationFactor is {factor}, and Cluster {cluster} has {brokers} brokers: lower it, or raise the Cluster's spec.replicas"
        ),
    )
}

fn taken(record: &TopicRecord) -> Problem {
    Problem::stalled(
        Reason::NameTaken,
        format!(
            "Topic {}/{} has the topic name {} already; delete one of the two, or make this one again with another spec.topicName",
            record.namespace, record.topic, record.config.name
        ),
    )
}

fn only_grows(record: &TopicRecord, config: &TopicConfig) -> Result<(), Problem> {
    let held = &record.config;
    if config.partitions < held.partitions {
        return Err(Problem::stalled(
            Reason::InvalidSpec,
            format!(
                "spec.partitions is {}, and the topic has {}: partitions can only grow. Set it to {} or more, or make a new Topic",
                config.partitions, held.partitions, held.partitions
            ),
        ));
    }
    Ok(())
}

/// What a Topic can say and no broker so far does.
fn unsupported(topic: &Topic) -> Option<String> {
    let spec = &topic.spec;
    (spec.compression != Compression::Producer).then(|| {
        format!(
            "spec.compression {:?} is not supported yet; use Producer, and let producers compress",
            spec.compression
        )
    })
}

/// The partitions that have no Lease.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Missing {
    /// Never had one.
    pub(super) new: Vec<i32>,
    /// Had one that was seen: what it shall be when it is made again, in a leader epoch that no one has seen.
    pub(super) again: Vec<PartitionLease>,
    /// Had one, and what it said is not known.
    pub(super) lost: Vec<i32>,
}

/// Compares a record with the Leases.
pub(super) fn missing(record: &TopicRecord, leases: &index::Topic) -> Missing {
    let mut missing = Missing::default();
    for (partition, number) in (0..).zip(0..record.config.partitions) {
        if leases.there.contains_key(&partition) || leases.unreadable.contains_key(&partition) {
            continue;
        }
        match leases.gone.get(&partition) {
            Some(gone) => missing.again.push(again(gone)),
            None if number < record.partitions_made => missing.lost.push(partition),
            None => missing.new.push(partition),
        }
    }
    missing
}

fn again(gone: &PartitionLease) -> PartitionLease {
    let mut lease = gone.clone();
    lease.held.epoch += 1;
    lease.held.holder = None;
    lease.assignment.partition_epoch += 1;
    lease.assignment.leader = None;
    lease.assignment.write_id = Uuid::new_v4();
    lease
}

#[cfg(test)]
mod tests {
    use millrace_crds::coordination::{Held, Leader, PartitionAssignment, Replica};
    use serde_json::{Value, json};

    use super::*;

    fn topic(spec: Value) -> Topic {
        let whole = json!({
            "apiVersion": "millrace.dev/v1alpha1", "kind": "Topic",
            "metadata": {"name": "orders", "namespace": "shop", "uid": "uid"},
            "spec": spec,
        });
        serde_json::from_value(whole).unwrap()
    }

    fn cluster(replicas: i32) -> Cluster {
        let whole = json!({
            "apiVersion": "millrace.dev/v1alpha1", "kind": "Cluster",
            "metadata": {"name": "main", "namespace": "shop"},
            "spec": {"replicas": replicas, "storage": {"size": "1Gi"}, "topicDefaults": {"partitions": 6}},
        });
        serde_json::from_value(whole).unwrap()
    }

    fn known<'a>(
        cluster: Option<&'a Cluster>,
        record: Option<&'a Result<TopicRecord, String>>,
    ) -> Known<'a> {
        Known {
            cluster,
            admitted: true,
            record,
            owner_lives: false,
        }
    }

    fn record(spec: Value) -> TopicRecord {
        let cluster = cluster(3);
        let decision = decide(&topic(spec), &known(Some(&cluster), None)).unwrap();
        decision.record().clone()
    }

    #[test]
    fn a_new_topic_gets_its_clusters_defaults() {
        let record = record(json!({}));
        assert_eq!(record.state, TopicState::Active);
        assert_eq!(
            (record.namespace.as_str(), record.topic.as_str()),
            ("shop", "orders")
        );
        assert_eq!(record.config.partitions, 6);
        assert_eq!(record.config.replication_factor, 3);
        assert_eq!(record.config.min_insync_replicas, Some(2));
    }

    #[test]
    fn a_change_of_the_defaults_leaves_topics_that_are_there() {
        let before = record(json!({}));
        let held = Ok(before.clone());
        let mut cluster = cluster(3);
        cluster.spec.topic_defaults.partitions = 9;
        let decision = decide(&topic(json!({})), &known(Some(&cluster), Some(&held))).unwrap();
        assert_eq!(decision, Decision::Keep(before));
    }

    #[test]
    fn what_can_not_be_says_why() {
        let cluster = cluster(3);
        let held = Ok(record(json!({})));
        let mut other = record(json!({}));
        other.topic_uid = "other".into();
        let other = Ok(other);
        let mut deleting = record(json!({}));
        deleting.state = TopicState::Deleting;
        let deleting = Ok(deleting);
        let spoilt = Err("spoilt".to_owned());
        let some = Some(&cluster);
        let rival = || Known {
            owner_lives: true,
            ..known(some, Some(&other))
        };
        let outsider = || Known {
            admitted: false,
            ..known(some, None)
        };
        for (spec, known, reason, word) in [
            (
                json!({}),
                known(None, None),
                Reason::ClusterNotFound,
                "no Cluster main in namespace shop",
            ),
            (
                json!({}),
                outsider(),
                Reason::NamespaceNotAllowed,
                "spec.topicNamespaces",
            ),
            (
                json!({"replicationFactor": 4}),
                known(some, None),
                Reason::TooFewBrokers,
                "has 3 brokers",
            ),
            (json!({}), rival(), Reason::NameTaken, "shop/orders"),
            (
                json!({}),
                known(some, Some(&deleting)),
                Reason::Deleting,
                "still being deleted",
            ),
            (
                json!({}),
                known(some, Some(&spoilt)),
                Reason::Unreadable,
                "spoilt",
            ),
            (
                json!({"partitions": 5}),
                known(some, Some(&held)),
                Reason::InvalidSpec,
                "can only grow",
            ),
            (
                json!({"replicationFactor": 4}),
                known(some, Some(&held)),
                Reason::TooFewBrokers,
                "has 3 brokers",
            ),
            (
                json!({"compression": "Zstd"}),
                known(some, None),
                Reason::NotSupported,
                "Zstd",
            ),
            (
                json!({"topicName": "__x"}),
                known(some, None),
                Reason::InvalidSpec,
                "__",
            ),
        ] {
            let problem = decide(&topic(spec.clone()), &known).unwrap_err();
            assert_eq!(problem.reason, reason, "{spec}");
            assert!(problem.message.contains(word), "{}", problem.message);
        }
    }

    #[test]
    fn a_topic_that_was_retained_is_taken_over_with_its_id() {
        let cluster = cluster(3);
        let mut before = record(json!({}));
        before.topic_uid = "before".into();
        before.state = TopicState::Retained;
        let held = Ok(before.clone());
        let decision = decide(
            &topic(json!({"partitions": 8})),
            &known(Some(&cluster), Some(&held)),
        );
        let Ok(Decision::Replace { after, .. }) = decision else {
            panic!("{decision:?}");
        };
        assert_eq!(after.topic_id, before.topic_id);
        assert_eq!(after.topic_uid, "uid");
        assert_eq!(after.state, TopicState::Active);
        assert_eq!(after.config.partitions, 8);
    }

    #[test]
    fn what_a_dead_operator_began_is_completed_and_never_taken_for_lost() {
        let cluster = cluster(3);
        // So many partitions had been made for certain, and so many Leases are there.
        for (state, owner, partitions, made, there, lost, new) in [
            // The first creation was cut short.
            (TopicState::Active, "uid", 3, 0, 1, 0..0, 1..3),
            // Growth was.
            (TopicState::Active, "uid", 12, 3, 5, 0..0, 5..12),
            // The record was not marked any more.
            (TopicState::Active, "uid", 12, 3, 12, 0..0, 12..12),
            // Creation or growth was, then the Topic was deleted and its records retained, and this one takes them over.
            (TopicState::Retained, "before", 3, 0, 1, 0..0, 1..3),
            (TopicState::Retained, "before", 12, 3, 5, 0..0, 5..12),
            // Leases that were there for certain were deleted while no operator ran.
            (TopicState::Active, "uid", 12, 12, 10, 10..12, 0..0),
            (TopicState::Active, "uid", 12, 3, 1, 1..3, 3..12),
            (TopicState::Retained, "before", 3, 3, 1, 1..3, 0..0),
        ] {
            let spec = json!({"partitions": partitions});
            let mut held = record(spec.clone());
            held.state = state;
            held.topic_uid = owner.into();
            held.partitions_made = made;
            let mut leases = index::Topic::default();
            for partition in 0..there {
                let lease = PartitionLease {
                    assignment: PartitionAssignment::new(held.topic_id, partition, vec![0]),
                    held: Held::default(),
                };
                let resource_version = "1".into();
                let held = index::Held {
                    lease,
                    resource_version,
                };
                leases.there.insert(partition, held);
            }
            let held = Ok(held);
            let decision = decide(&topic(spec), &known(Some(&cluster), Some(&held))).unwrap();
            let missing = missing(decision.record(), &leases);
            let case = format!("{state:?} {made} of {partitions}, {there} there");
            assert_eq!(missing.lost, lost.collect::<Vec<_>>(), "{case}");
            assert_eq!(missing.new, new.collect::<Vec<_>>(), "{case}");
        }
    }

    #[test]
    fn a_lease_that_was_deleted_comes_back_in_a_later_epoch_with_its_isr_and_without_a_leader() {
        let mut record = record(json!({"partitions": 4}));
        record.partitions_made = 1;
        let isr = vec![Replica {
            id: 1,
            store: Uuid::from_u128(9),
        }];
        let mut assignment = PartitionAssignment::new(record.topic_id, 1, vec![1, 2]);
        assignment.partition_epoch = 7;
        assignment.isr = isr.clone();
        assignment.leader = Some(Leader {
            id: 1,
            broker_epoch: 2,
        });
        let held = Held {
            holder: Some("x".into()),
            epoch: 4,
            ..Held::default()
        };
        let mut leases = index::Topic::default();
        leases.gone.insert(1, PartitionLease { assignment, held });
        leases.unreadable.insert(2, "spoilt".into());
        let missing = missing(&record, &leases);
        assert_eq!(missing.lost, [0]);
        assert_eq!(missing.new, [3]);
        let [again] = missing.again.as_slice() else {
            panic!("{missing:?}");
        };
        assert_eq!(again.epochs(), (5, 8));
        assert_eq!(again.assignment.isr, isr);
        assert_eq!(again.assignment.leader, None);
        assert_eq!(again.held.holder, None);
    }
}
