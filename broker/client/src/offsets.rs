//! Finding offsets: asks each partition's leader, follows leaders that move.
//!
//! Not responsible for what a consumer does with them.

use std::{collections::HashMap, sync::Arc};

use millrace_proto::v1;
use tokio::time::Instant;

use crate::{
    Client, backoff,
    error::{Error, ErrorKind},
    refresh::STUCK,
    transport::Transport,
};

/// Which offset to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OffsetSpec {
    /// The first offset still held.
    Earliest,
    /// The offset that the next record will get.
    Latest,
    /// The first record whose timestamp, in milliseconds since the Unix epoch, is at or after this.
    Timestamp(i64),
}

/// An offset that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OffsetAt {
    /// The offset.
    pub offset: i64,
    /// The found record's timestamp, for queries by time.
    pub timestamp_ms: Option<i64>,
}

/// One query of several.
#[derive(Debug, Clone)]
pub(crate) struct Query {
    pub(crate) topic: Arc<str>,
    pub(crate) partition: i32,
    pub(crate) spec: OffsetSpec,
}

/// Finds one offset.
pub(crate) async fn find_one(
    client: &Client,
    topic: &Arc<str>,
    partition: i32,
    spec: OffsetSpec,
    deadline: Instant,
) -> Result<Option<OffsetAt>, Error> {
    let query = Query {
        topic: topic.clone(),
        partition,
        spec,
    };
    let mut found = find(client, vec![query], deadline).await?;
    found
        .pop()
        .ok_or_else(|| Error::new(ErrorKind::Transport, "the broker's answer has no result"))
}

/// Finds several offsets, in the order of the queries. The first failure that no retry cures until `deadline` fails all.
pub(crate) async fn find(
    client: &Client,
    queries: Vec<Query>,
    deadline: Instant,
) -> Result<Vec<Option<OffsetAt>>, Error> {
    let mut found: Vec<Option<Option<OffsetAt>>> = vec![None; queries.len()];
    let mut failures = 0;
    loop {
        let open: Vec<usize> = (0..queries.len()).filter(|&i| found[i].is_none()).collect();
        if open.is_empty() {
            return Ok(found.into_iter().flatten().collect());
        }
        let before = leaders(client, &queries, &open);
        let Err(error) = round(client, &queries, &open, &mut found, deadline).await else {
            continue;
        };
        failures += 1;
        let delay = backoff::delay(error.kind(), failures);
        if !error.is_retriable() || Instant::now() + delay >= deadline {
            return Err(error);
        }
        tracing::warn!(%error, ?delay, failures, "retrying to find offsets");
        // A new leader is asked without delay.
        if leaders(client, &queries, &open) != before {
            continue;
        }
        if let Err(error) = client.refresh(&topics(&queries, &open)).await {
            tracing::warn!(%error, "can't refresh metadata");
        }
        if leaders(client, &queries, &open) == before {
            tokio::time::sleep(delay).await;
        }
    }
}

fn leaders(client: &Client, queries: &[Query], of: &[usize]) -> Vec<Option<Arc<str>>> {
    let queries = of.iter().map(|&i| &queries[i]);
    queries
        .map(|query| client.cached().leader(&query.topic, query.partition))
        .collect()
}

fn topics(queries: &[Query], of: &[usize]) -> Vec<String> {
    let mut topics: Vec<String> = of.iter().map(|&i| queries[i].topic.to_string()).collect();
    topics.sort();
    topics.dedup();
    topics
}

/// Asks every leader once for what is still open.
async fn round(
    client: &Client,
    queries: &[Query],
    open: &[usize],
    found: &mut [Option<Option<OffsetAt>>],
    deadline: Instant,
) -> Result<(), Error> {
    let mut by_leader: HashMap<Arc<str>, Vec<usize>> = HashMap::new();
    for &i in open {
        let Query {
            topic, partition, ..
        } = &queries[i];
        let partitions = client.topic(topic, deadline).await?.leaders.len();
        if usize::try_from(*partition).map_or(true, |p| p >= partitions) {
            return Err(Error::unknown_partition(topic, *partition, partitions));
        }
        let leader = client.cached().leader(topic, *partition);
        by_leader
            .entry(leader.ok_or_else(|| Error::no_leader(topic, *partition))?)
            .or_default()
            .push(i);
    }
    for (address, indices) in by_leader {
        // The protocol takes at most 10,000 queries in one request.
        for indices in indices.chunks(10_000) {
            ask(client, &address, queries, indices, found).await?;
        }
    }
    Ok(())
}

/// Waits until metadata names another leader for any of the partitions that a broker is asked about.
async fn deposed(client: &Client, address: &Arc<str>, queries: &[Query], asked: &[usize]) {
    let topics = topics(queries, asked);
    loop {
        tokio::time::sleep(STUCK).await;
        if let Err(error) = client.refresh(&topics).await {
            tracing::warn!(%error, "can't refresh metadata");
        }
        let mut leaders = leaders(client, queries, asked).into_iter().flatten();
        if leaders.any(|leader| leader != *address) {
            return;
        }
    }
}

async fn ask(
    client: &Client,
    address: &Arc<str>,
    queries: &[Query],
    indices: &[usize],
    found: &mut [Option<Option<OffsetAt>>],
) -> Result<(), Error> {
    let to_proto = |&i: &usize| v1::OffsetQuery {
        topic: queries[i].topic.to_string(),
        partition: queries[i].partition,
        spec: Some(match queries[i].spec {
            OffsetSpec::Earliest => v1::offset_query::Spec::Earliest(v1::Earliest {}),
            OffsetSpec::Latest => v1::offset_query::Spec::Latest(v1::Latest {}),
            OffsetSpec::Timestamp(ms) => v1::offset_query::Spec::TimestampMs(ms),
        }),
    };
    let request = v1::ListOffsetsRequest {
        queries: indices.iter().map(to_proto).collect(),
        isolation: v1::IsolationLevel::ReadCommitted.into(),
    };
    let mut service = client.transport().offsets(address)?;
    let limit = client.transport().request_timeout();
    let call = Transport::call(address, limit, service.list_offsets(request));
    let answer = tokio::select! {
        answer = call => answer,
        () = deposed(client, address, queries, indices) => {
            let message = format!("broker {address} had not answered when another became the leader");
            Err(Error::new(ErrorKind::Transport, message))
        }
    };
    let response = answer.inspect_err(|error| {
        if let (Some(topic), Some(partition)) = (error.topic(), error.partition()) {
            client.cached().apply_hint(topic, partition, error);
        }
    })?;
    if response.results.len() != indices.len() {
        let (got, wanted) = (response.results.len(), indices.len());
        return Err(Error::new(
            ErrorKind::Transport,
            format!("broker {address} answered {got} of {wanted} offset queries"),
        ));
    }
    let mut failure = None;
    for (&i, result) in indices.iter().zip(response.results) {
        match result.error {
            Some(error) => {
                let error = Error::from_proto(error).at(&queries[i].topic, queries[i].partition);
                client
                    .cached()
                    .apply_hint(&queries[i].topic, queries[i].partition, &error);
                failure = Some(error);
            }
            None => {
                found[i] = Some(result.offset.map(|offset| OffsetAt {
                    offset,
                    timestamp_ms: result.timestamp_ms,
                }));
            }
        }
    }
    failure.map_or(Ok(()), Err)
}
