//! Calls to the coordinator of a group or of a transactional id, which is the leader of its partition of an internal topic; follows it when it moves.

use std::sync::Arc;

use millrace_record::key_partition;
use tokio::time::Instant;
use tonic::{Response, Status};

use crate::{
    Client, backoff,
    error::{Error, ErrorKind},
    transport::Transport,
};

/// The way to one coordinator.
#[derive(Debug, Clone)]
pub(crate) struct Coordinator {
    client: Client,
    topic: &'static str,
    key: Arc<str>,
}

impl Coordinator {
    /// That of a key of an internal topic.
    pub(crate) fn new(client: Client, topic: &'static str, key: Arc<str>) -> Self {
        Self { client, topic, key }
    }

    /// The group or the transactional id.
    pub(crate) fn key(&self) -> &Arc<str> {
        &self.key
    }

    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// The key's partition of the internal topic, and its leader's address.
    pub(crate) async fn find(&self, deadline: Instant) -> Result<(i32, Arc<str>), Error> {
        let topic = self.client.topic(self.topic, deadline).await;
        let topic = topic.map_err(|error| match error.kind() {
            ErrorKind::UnknownTopic => Error::new(
                ErrorKind::NotLeader,
                format!(
                    "the cluster has no topic {} yet: it is made once all brokers are up",
                    self.topic
                ),
            ),
            _ => error,
        })?;
        let count = u32::try_from(topic.leaders.len()).unwrap_or(u32::MAX);
        let partition = key_partition(self.key.as_bytes(), count.max(1)) as i32;
        let leader = self.client.cached().leader(self.topic, partition);
        let leader = leader.ok_or_else(|| Error::no_leader(&self.topic.into(), partition))?;
        Ok((partition, leader))
    }

    /// What is to be done about a failure before the next try: takes over a hint, or asks for metadata.
    pub(crate) async fn look_again(&self, asked: Option<(i32, Arc<str>)>, error: &Error) {
        if let Some((partition, address)) = asked {
            let metadata = self.client.cached();
            metadata.apply_hint(self.topic, partition, error);
            if metadata.leader(self.topic, partition).as_ref() != Some(&address) {
                return;
            }
        }
        if let Err(error) = self.client.refresh(&[self.topic.to_owned()]).await {
            tracing::debug!(%error, "can't look for a coordinator");
        }
    }

    /// Calls the coordinator's service, again while that may help and time is left.
    pub(crate) async fn call<S, T, F>(
        &self,
        deadline: Instant,
        service: impl Fn(&Transport, &Arc<str>) -> Result<S, Error>,
        call: impl Fn(S) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut failures = 0;
        loop {
            let mut asked = None;
            let result = async {
                let (partition, address) = self.find(deadline).await?;
                asked = Some((partition, address.clone()));
                let service = service(self.client.transport(), &address)?;
                let limit = self.client.transport().request_timeout();
                let left = deadline.saturating_duration_since(Instant::now());
                Transport::call(&address, limit.min(left), call(service)).await
            }
            .await;
            let error = match result {
                Err(error) if error.is_retriable() => error,
                other => return other,
            };
            failures += 1;
            let delay = backoff::delay(error.kind(), failures);
            if Instant::now() + delay >= deadline {
                return Err(error);
            }
            tracing::debug!(%error, ?delay, failures, "asking the coordinator again");
            if matches!(
                error.kind(),
                ErrorKind::ConcurrentTransaction | ErrorKind::OffsetsPending
            ) {
                // It is the right one, and needs time.
                tokio::time::sleep(delay).await;
                continue;
            }
            let before = asked.clone();
            self.look_again(asked, &error).await;
            let known = self.find(deadline).await.ok();
            if known.is_none() || known == before {
                tokio::time::sleep(delay).await;
            }
        }
    }
}

/// What every broker says: the coordinators of an internal topic are spread over them.
pub(crate) async fn each<S, T, F>(
    client: &Client,
    topic: &str,
    service: impl Fn(&Transport, &Arc<str>) -> Result<S, Error>,
    call: impl Fn(S) -> F,
) -> Result<Vec<T>, Error>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    client.refresh(&[topic.to_owned()]).await?;
    let mut answers = Vec::new();
    for address in client.cached().brokers() {
        let limit = client.transport().request_timeout();
        let service = service(client.transport(), &address)?;
        answers.push(Transport::call(&address, limit, call(service)).await?);
    }
    Ok(answers)
}
