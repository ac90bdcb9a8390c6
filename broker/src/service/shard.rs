//! The way of a request to the shard of groups or transactions that it is for.

use std::time::Duration;

use millrace_proto::v1::ErrorReason;

use super::{Broker, error::ApiError};
use crate::shards::{Machine, NotCoordinator, Reply, RoundError, Shards};

/// How long a round may take, most of which is waiting for replicas, and what follows from it.
const ROUND: Duration = Duration::from_secs(30);

impl Broker {
    /// Asks the shard that the key belongs to. `what` it is, for people.
    pub(super) async fn ask_shard<M: Machine, T, E: Into<ApiError>>(
        &self,
        shards: &Shards<M>,
        (what, key): (&str, &str),
        request: impl FnOnce(Reply<T, E>) -> M::Request,
    ) -> Result<T, ApiError> {
        if self.is_stopping() {
            return Err(ApiError::shutting_down());
        }
        match tokio::time::timeout(ROUND, shards.ask(key, request)).await {
            Ok(Ok(Ok(answer))) => Ok(answer),
            Ok(Ok(Err(RoundError::Refused(error)))) => Err(error.into()),
            Ok(Ok(Err(RoundError::NotEnoughReplicas(error)))) => {
                let partition = shards.partition_of(key).unwrap_or_default();
                Err(ApiError::not_enough_replicas(
                    shards.topic(),
                    partition,
                    error,
                ))
            }
            Ok(Err(not_here)) => Err(self.not_coordinator(not_here)),
            Err(_) => {
                let message = format!(
                    "{what} {key}: not on all replicas in sync within {ROUND:?}; it may still be"
                );
                Err(ApiError::new(ErrorReason::TimedOut, message))
            }
        }
    }

    fn not_coordinator(&self, NotCoordinator { topic, partition }: NotCoordinator) -> ApiError {
        let partition = partition.unwrap_or_default();
        let known = self.directory.topic(topic);
        match known.and_then(|topic| topic.partition(partition)) {
            Some(known) => self.not_leader(topic, partition, &known),
            None => ApiError::new(
                ErrorReason::NotLeader,
                format!("the internal topic {topic} has not been made yet; try again in a moment"),
            )
            .with("topic", topic),
        }
    }
}
