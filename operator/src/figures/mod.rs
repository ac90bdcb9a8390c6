//! How much partitions hold, which only their leaders know, and how full brokers' volumes are. It can't be watched, so the brokers are asked for it from time to time.

mod ask;
mod shown;
mod volumes;

pub(crate) use ask::follow;
pub(crate) use shown::Figures;
pub(crate) use volumes::Volumes;

use std::collections::{BTreeMap, HashMap};

use millrace_proto::v1::{GetMetadataResponse, PartitionMetadata};
use uuid::Uuid;

/// What a partition's leader says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Figure {
    pub(crate) leader_epoch: i32,
    pub(crate) log_start_offset: i64,
    pub(crate) high_watermark: i64,
    pub(crate) size_bytes: u64,
}

/// The figures of a topic's partitions, as far as they are known.
pub(crate) type TopicFigures = BTreeMap<i32, Figure>;

impl Figure {
    /// None from a broker that does not lead the partition.
    fn read(partition: &PartitionMetadata) -> Option<Self> {
        Some(Self {
            leader_epoch: partition.leader_epoch,
            log_start_offset: partition.log_start_offset?,
            high_watermark: partition.high_watermark?,
            size_bytes: partition.size_bytes?,
        })
    }
}

/// Adds a broker's answer to those of the Cluster's other brokers. Of two that take themselves for the leader, the later one is believed.
fn add(told: &mut HashMap<Uuid, TopicFigures>, answer: &GetMetadataResponse) {
    for topic in &answer.topics {
        let Ok(id) = Uuid::try_parse(&topic.topic_id) else {
            continue;
        };
        for partition in &topic.partitions {
            let Some(figure) = Figure::read(partition) else {
                continue;
            };
            let figures = told.entry(id).or_default();
            let known = figures.entry(partition.partition).or_insert(figure);
            if known.leader_epoch < figure.leader_epoch {
                *known = figure;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use millrace_proto::v1::TopicMetadata;

    use super::*;

    const TOPIC: Uuid = Uuid::from_u128(7);

    /// An answer on partition 0: leader epoch, and high watermark if the broker leads it.
    fn answer(
        topic_id: &str,
        leader_epoch: i32,
        high_watermark: Option<i64>,
    ) -> GetMetadataResponse {
        let partition = PartitionMetadata {
            leader_epoch,
            log_start_offset: high_watermark.map(|_| 1),
            high_watermark,
            size_bytes: high_watermark.map(|_| 100),
            ..PartitionMetadata::default()
        };
        GetMetadataResponse {
            topics: vec![TopicMetadata {
                topic_id: topic_id.to_owned(),
                partitions: vec![partition],
                ..TopicMetadata::default()
            }],
            ..GetMetadataResponse::default()
        }
    }

    #[test]
    fn the_latest_leader_is_believed_and_no_one_else() {
        for (answers, expected) in [
            (&[][..], None),
            (&[(3, None)], None),
            (&[(3, None), (3, Some(9))], Some(9)),
            (&[(3, Some(9)), (3, None)], Some(9)),
            (&[(3, Some(9)), (2, Some(50))], Some(9)),
            (&[(2, Some(50)), (3, Some(9))], Some(9)),
        ] {
            let mut told = HashMap::new();
            for (leader_epoch, high_watermark) in answers {
                let answer = answer(&TOPIC.to_string(), *leader_epoch, *high_watermark);
                add(&mut told, &answer);
            }
            let found = told.get(&TOPIC).map(|figures| figures[&0].high_watermark);
            assert_eq!(found, expected, "{answers:?}");
        }
    }

    #[test]
    fn a_topic_without_an_id_is_passed_over() {
        let mut told = HashMap::new();
        add(&mut told, &answer("orders", 1, Some(9)));
        assert!(told.is_empty());
    }
}
