//! What a consumer reads next from each partition. A pure state machine: fetch requests come out, answers go in and become items
//! for the caller.
//!
//! Not responsible for calls, tasks and memory (`fetcher`), nor for decoding records, which happens on the caller's side.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use millrace_proto::v1;
use millrace_record::{BatchError, BatchHeader, split};
use tokio::time::Instant;

use super::Isolation;
use crate::{
    backoff,
    error::{Error, ErrorKind},
    metadata::{Metadata, STALE_LEADER},
    refresh::Refresh,
};

/// The protocol's limit on partitions in one request.
const MAX_PARTITIONS: usize = 10_000;

/// How to fetch.
#[derive(Debug, Clone)]
pub(crate) struct FetchSettings {
    pub(crate) min_bytes: u32,
    pub(crate) max_wait: Duration,
    pub(crate) max_partition_bytes: u32,
    pub(crate) isolation: Isolation,
}

/// A partition that is read.
#[derive(Debug)]
pub(crate) struct Assigned {
    pub(crate) topic: Arc<str>,
    pub(crate) partition: i32,
    /// As the last answer said; -1 before there was one.
    pub(crate) high_watermark: AtomicI64,
    /// Up to here the caller is done with its records, as far as is known; -1 before there was one. For groups, as what follows.
    pub(crate) read: AtomicI64,
    /// What was committed of that.
    pub(crate) committed: AtomicI64,
}

impl Assigned {
    pub(crate) fn new(topic: Arc<str>, partition: i32) -> Arc<Self> {
        Arc::new(Assigned {
            topic,
            partition,
            high_watermark: AtomicI64::new(-1),
            read: AtomicI64::new(-1),
            committed: AtomicI64::new(-1),
        })
    }
}

/// Something for the caller.
#[derive(Debug)]
pub(crate) enum Item {
    /// A partition joined: it has the next index.
    Joined {
        assigned: Arc<Assigned>,
        offset: i64,
    },
    /// Whole batches, in order.
    Batches {
        index: usize,
        generation: u64,
        batches: Vec<Fetched>,
    },
    /// What lies before `next` has nothing for the caller.
    Skipped {
        index: usize,
        generation: u64,
        next: i64,
    },
    /// The partition failed. It goes on once the caller has taken this, unless it has to seek first.
    Failed {
        index: usize,
        generation: u64,
        error: Error,
    },
}

/// One batch, not yet decoded.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) header: Result<BatchHeader, BatchError>,
    pub(crate) bytes: Bytes,
    /// The first offset wanted of it.
    pub(crate) from: i64,
    /// Where to go on after it.
    pub(crate) next: i64,
}

/// What a fetch asked for one partition.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    index: usize,
    generation: u64,
    offset: i64,
}

#[derive(Debug)]
struct Cursor {
    assigned: Arc<Assigned>,
    /// Rises with each seek, so that what was fetched before is known as such.
    generation: u64,
    offset: i64,
    leader: Option<Arc<str>>,
    /// Waits for the caller: to take an error, or to seek.
    paused: bool,
    failures: u32,
    not_before: Option<Instant>,
    /// Whether records before `offset` have come, so that the log does reach that far.
    has_read: bool,
    /// Since when the leader says that its log does not.
    short_since: Option<Instant>,
    /// It is read no more.
    gone: bool,
}

impl Cursor {
    /// Whether a leader's word that the log does not hold `offset` counts. A leader that lost its leadership and doesn't know may
    /// have less than what was read already.
    fn is_out_of_range(&mut self, error: &Error, now: Instant) -> bool {
        let high_watermark = error.metadata().get("high_watermark");
        let is_short = high_watermark
            .and_then(|text| text.parse().ok())
            .is_some_and(|end: i64| end < self.offset);
        if !self.has_read || !is_short {
            return true;
        }
        now - *self.short_since.get_or_insert(now) >= STALE_LEADER
    }
}

/// All partitions of a consumer, by index.
#[derive(Debug)]
pub(crate) struct Cursors {
    settings: FetchSettings,
    cursors: Vec<Cursor>,
    /// Where the next request begins, so that every partition comes first once.
    turn: usize,
    /// The brokers that lead at least one partition.
    leaders: Vec<Arc<str>>,
    /// Brokers whose long polls ask for too much, or too little.
    outdated: Vec<Arc<str>>,
    pub(crate) refresh: Refresh,
}

impl Cursors {
    pub(crate) fn new(settings: FetchSettings) -> Self {
        Cursors {
            settings,
            cursors: Vec::new(),
            turn: 0,
            leaders: Vec::new(),
            outdated: Vec::new(),
            refresh: Refresh::default(),
        }
    }

    pub(crate) fn add(&mut self, assigned: Arc<Assigned>, offset: i64) {
        self.cursors.push(Cursor {
            assigned,
            generation: 0,
            offset,
            leader: None,
            paused: false,
            failures: 0,
            not_before: None,
            has_read: false,
            short_since: None,
            gone: false,
        });
    }

    /// Reads a partition from `offset`, under an index that is the next one or that of one that is read no more.
    pub(crate) fn assign(
        &mut self,
        index: usize,
        assigned: Arc<Assigned>,
        generation: u64,
        offset: i64,
    ) {
        if index == self.cursors.len() {
            self.add(assigned, offset);
        } else {
            self.seek(index, generation, offset);
            self.cursors[index].assigned = assigned;
        }
        self.cursors[index].generation = generation;
        self.cursors[index].gone = false;
    }

    /// Reads a partition no more. Returns the broker that may be working on it.
    pub(crate) fn remove(&mut self, index: usize, generation: u64) -> Option<Arc<str>> {
        let cursor = self.cursors.get_mut(index)?;
        cursor.generation = generation;
        cursor.gone = true;
        let leader = cursor.leader.take();
        self.list_leaders();
        leader
    }

    /// How many partitions of the topic are read, if it is read as a whole.
    pub(crate) fn partitions_of(&self, topic: &str) -> i32 {
        let of_topic = self
            .cursors
            .iter()
            .filter(|cursor| &*cursor.assigned.topic == topic);
        of_topic
            .map(|cursor| cursor.assigned.partition + 1)
            .max()
            .unwrap_or(0)
    }

    /// Looks up all leaders.
    pub(crate) fn find_leaders(&mut self, metadata: &Metadata) {
        for index in 0..self.cursors.len() {
            self.follow_leader(index, metadata);
        }
        let lacks_leader = |cursor: &Cursor| cursor.leader.is_none() && !cursor.gone;
        if self.cursors.iter().any(lacks_leader) {
            self.refresh.want();
        }
        self.list_leaders();
    }

    /// Looks up a partition's leader. A new one is asked without delay, and the last one no more. Returns whether it is new.
    fn follow_leader(&mut self, index: usize, metadata: &Metadata) -> bool {
        let cursor = &mut self.cursors[index];
        if cursor.gone {
            return false;
        }
        let leader = metadata.leader(&cursor.assigned.topic, cursor.assigned.partition);
        if leader == cursor.leader {
            return false;
        }
        self.outdated.extend(leader.clone());
        self.outdated
            .extend(std::mem::replace(&mut cursor.leader, leader));
        cursor.failures = 0;
        cursor.not_before = None;
        cursor.short_since = None;
        true
    }

    /// The brokers whose long polls don't ask for what they should, since the last call of this.
    pub(crate) fn take_outdated(&mut self) -> Vec<Arc<str>> {
        let mut outdated = std::mem::take(&mut self.outdated);
        outdated.sort();
        outdated.dedup();
        outdated
    }

    /// Partitions whose pause is over don't wait for the long poll that their leader is working on.
    pub(crate) fn end_pauses(&mut self, now: Instant) {
        for cursor in &mut self.cursors {
            if !cursor.paused && cursor.not_before.is_some_and(|time| time <= now) {
                cursor.not_before = None;
                self.outdated.extend(cursor.leader.clone());
            }
        }
    }

    fn list_leaders(&mut self) {
        self.leaders = self
            .cursors
            .iter()
            .filter_map(|cursor| cursor.leader.clone())
            .collect();
        self.leaders.sort();
        self.leaders.dedup();
    }

    /// The brokers that lead at least one partition.
    pub(crate) fn leaders(&self) -> Vec<Arc<str>> {
        self.leaders.clone()
    }

    /// Returns the broker that may be working on the old offset.
    pub(crate) fn seek(&mut self, index: usize, generation: u64, offset: i64) -> Option<Arc<str>> {
        let cursor = self.cursors.get_mut(index)?;
        cursor.generation = generation;
        cursor.offset = offset;
        cursor.paused = false;
        cursor.not_before = None;
        cursor.has_read = false;
        cursor.short_since = None;
        cursor.leader.clone()
    }

    /// The caller has taken an error.
    pub(crate) fn resume(&mut self, index: usize, generation: u64) {
        if let Some(cursor) = self
            .cursors
            .get_mut(index)
            .filter(|cursor| cursor.generation == generation)
        {
            cursor.paused = false;
        }
    }

    /// The next request to `leader` for the partitions of one of its lanes, if any of them can be read now.
    pub(crate) fn plan(
        &mut self,
        leader: &str,
        (lane, lanes): (usize, usize),
        max_bytes: u32,
        now: Instant,
    ) -> Option<(v1::FetchRequest, Vec<Asked>)> {
        let is_due = |cursor: &&Cursor| {
            cursor.leader.as_deref() == Some(leader)
                && cursor.assigned.partition.unsigned_abs() as usize % lanes == lane
                && !cursor.paused
                && cursor.not_before.is_none_or(|time| time <= now)
        };
        let count = self.cursors.len();
        let order = (0..count).map(|step| (self.turn + step) % count);
        let due: Vec<usize> = order
            .filter(|&i| is_due(&&self.cursors[i]))
            .take(MAX_PARTITIONS)
            .collect();
        self.turn = due.first()? + 1;
        let mut partitions = Vec::with_capacity(due.len());
        let mut asked = Vec::with_capacity(due.len());
        for index in due {
            let Cursor {
                assigned,
                generation,
                offset,
                ..
            } = &self.cursors[index];
            partitions.push(v1::FetchPartition {
                topic: assigned.topic.to_string(),
                partition: assigned.partition,
                offset: *offset,
                max_bytes: self.settings.max_partition_bytes,
            });
            asked.push(Asked {
                index,
                generation: *generation,
                offset: *offset,
            });
        }
        let request = v1::FetchRequest {
            min_bytes: self.settings.min_bytes,
            max_wait_ms: u32::try_from(self.settings.max_wait.as_millis()).unwrap_or(u32::MAX),
            max_bytes,
            format: v1::FetchFormat::Batches.into(),
            partitions,
            isolation: self.settings.isolation.to_proto().into(),
        };
        Some((request, asked))
    }

    /// When the next partition's backoff is over.
    pub(crate) fn next_due(&self, now: Instant) -> Option<Instant> {
        self.cursors
            .iter()
            .filter(|c| !c.paused)
            .filter_map(|c| c.not_before)
            .filter(|time| *time > now)
            .min()
    }

    /// The whole call to `broker` failed: either for the reason of its first partition, or because of the connection.
    pub(crate) fn on_failure(
        &mut self,
        broker: &str,
        asked: &[Asked],
        error: &Error,
        metadata: &Metadata,
        now: Instant,
    ) -> Vec<Item> {
        let is_about = |cursor: &Cursor| match (error.topic(), error.partition()) {
            (Some(topic), partition) => {
                &*cursor.assigned.topic == topic
                    && partition.is_none_or(|p| p == cursor.assigned.partition)
            }
            _ => true,
        };
        // The status tells of the first failed partition; the others will tell of themselves next time.
        let (named, rest): (Vec<Asked>, Vec<Asked>) = asked
            .iter()
            .partition(|asked| self.cursors.get(asked.index).is_some_and(&is_about));
        let concerned = if named.is_empty() { rest } else { named };
        concerned
            .into_iter()
            .filter_map(|asked| self.fail(broker, asked, error.clone(), metadata, now))
            .collect()
    }

    pub(crate) fn on_response(
        &mut self,
        broker: &str,
        asked: &[Asked],
        response: v1::FetchResponse,
        metadata: &Metadata,
        now: Instant,
    ) -> Vec<Item> {
        let mut items = Vec::new();
        // Results come in the order of the request, some left out.
        let mut rest = asked.iter();
        for result in response.results {
            let is_it = |asked: &&Asked| {
                let assigned = &self.cursors[asked.index].assigned;
                assigned.partition == result.partition && *assigned.topic == *result.topic
            };
            let Some(&asked) = rest.find(is_it) else {
                tracing::warn!(
                    topic = result.topic,
                    partition = result.partition,
                    "an unasked fetch result is ignored"
                );
                break;
            };
            match result.error {
                Some(error) => {
                    items.extend(self.fail(broker, asked, Error::from_proto(error), metadata, now))
                }
                None => {
                    let next_offset = result.next_offset;
                    let end = match self.settings.isolation {
                        Isolation::ReadCommitted => result.last_stable_offset,
                        Isolation::ReadUncommitted => result.high_watermark,
                    };
                    items.extend(self.advance(asked, end, result.batches, now));
                    items.extend(next_offset.and_then(|next| self.skip(asked, next)));
                }
            }
        }
        items
    }

    /// The broker has left out what lies before `next`.
    fn skip(&mut self, asked: Asked, next: i64) -> Option<Item> {
        let cursor = &mut self.cursors[asked.index];
        if cursor.generation != asked.generation || next <= cursor.offset {
            return None;
        }
        cursor.offset = next;
        cursor.has_read = true;
        let Asked {
            index, generation, ..
        } = asked;
        Some(Item::Skipped {
            index,
            generation,
            next,
        })
    }

    fn advance(
        &mut self,
        asked: Asked,
        high_watermark: i64,
        batches: Vec<Bytes>,
        now: Instant,
    ) -> Option<Item> {
        let cursor = &mut self.cursors[asked.index];
        if cursor.generation != asked.generation || cursor.offset != asked.offset {
            return None;
        }
        cursor.not_before = None;
        cursor.failures = 0;
        cursor.short_since = None;
        // A new leader may not know yet that what was read before is committed.
        let high_watermark = match cursor.has_read {
            true => high_watermark.max(cursor.offset),
            false => high_watermark,
        };
        cursor
            .assigned
            .high_watermark
            .store(high_watermark, Ordering::Relaxed);
        let some_came = !batches.is_empty();
        let mut fetched = Vec::with_capacity(batches.len());
        for batch in batches.into_iter().flat_map(split) {
            let (bytes, header) = match batch {
                Ok(bytes) => {
                    let header = BatchHeader::parse(&bytes);
                    (bytes, header)
                }
                Err(error) => (Bytes::new(), Err(error)),
            };
            let next = match &header {
                // Older than what was asked for, or its offsets make no sense: nothing of it is wanted.
                Ok(header)
                    if header.last_offset() < cursor.offset || header.last_offset() == i64::MAX =>
                {
                    continue;
                }
                Ok(header) => header.last_offset() + 1,
                // Not even its length is known: the next offset is the best guess.
                Err(_) => cursor.offset.saturating_add(1),
            };
            fetched.push(Fetched {
                header,
                bytes,
                from: cursor.offset,
                next,
            });
            cursor.offset = next;
            cursor.has_read = true;
        }
        if fetched.is_empty() && some_came {
            cursor.failures += 1;
            cursor.not_before = Some(now + backoff::search(cursor.failures));
            let Assigned {
                topic, partition, ..
            } = &*cursor.assigned;
            tracing::warn!(%topic, partition, offset = cursor.offset, "the broker sent only batches before the offset asked for");
        }
        let Asked {
            index, generation, ..
        } = asked;
        (!fetched.is_empty()).then_some(Item::Batches {
            index,
            generation,
            batches: fetched,
        })
    }

    fn fail(
        &mut self,
        broker: &str,
        asked: Asked,
        error: Error,
        metadata: &Metadata,
        now: Instant,
    ) -> Option<Item> {
        let cursor = self.cursors.get_mut(asked.index)?;
        if cursor.generation != asked.generation || cursor.offset != asked.offset {
            return None;
        }
        if cursor.leader.as_deref() != Some(broker) {
            // Another one is asked already, and knows better.
            return None;
        }
        let (topic, partition) = (cursor.assigned.topic.clone(), cursor.assigned.partition);
        let error = error.at(&topic, partition);
        cursor.failures = cursor.failures.saturating_add(1);
        let failures = cursor.failures;
        let delay = backoff::delay(error.kind(), failures);
        cursor.not_before = Some(now + delay);
        let is_final = match error.kind() {
            ErrorKind::OffsetOutOfRange => cursor.is_out_of_range(&error, now),
            _ => !error.is_retriable(),
        };
        match failures {
            1 => self.refresh.want_at_once(),
            _ => self.refresh.want(),
        }
        if is_final {
            cursor.paused = true;
            return Some(Item::Failed {
                index: asked.index,
                generation: asked.generation,
                error,
            });
        }
        tracing::warn!(%topic, partition, %error, ?delay, failures, "retrying to fetch");
        metadata.apply_hint(&topic, partition, &error);
        if self.follow_leader(asked.index, metadata) {
            self.list_leaders();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use millrace_record::{BatchBuilder, BatchOptions, set_base_offset};

    use super::*;

    fn metadata(epoch: i32, leader: i32) -> v1::GetMetadataResponse {
        let partition = |partition| v1::PartitionMetadata {
            partition,
            leader_id: leader,
            leader_epoch: epoch,
            ..Default::default()
        };
        v1::GetMetadataResponse {
            volume: None,
            cluster_id: String::new(),
            brokers: (1..3)
                .map(|id| v1::Broker {
                    id,
                    address: format!("b{id}:1"),
                })
                .collect(),
            topics: vec![v1::TopicMetadata {
                name: "t".into(),
                partitions: (0..3).map(partition).collect(),
                ..Default::default()
            }],
        }
    }

    fn fixture() -> (Cursors, Metadata) {
        let known = Metadata::default();
        known.apply(&metadata(1, 1)).unwrap();
        let settings = FetchSettings {
            min_bytes: 1,
            max_wait: Duration::from_millis(500),
            max_partition_bytes: 1000,
            isolation: Isolation::ReadUncommitted,
        };
        let mut cursors = Cursors::new(settings);
        for partition in 0..3 {
            cursors.add(Assigned::new("t".into(), partition), 10);
        }
        cursors.find_leaders(&known);
        (cursors, known)
    }

    fn batch(base: i64, records: usize) -> Bytes {
        let mut builder = BatchBuilder::new(BatchOptions::default());
        for _ in 0..records {
            builder.append(0, None, Some(b"v"), &[]);
        }
        let mut bytes = builder.build().unwrap().to_vec();
        set_base_offset(&mut bytes, base);
        bytes.into()
    }

    fn result(partition: i32, batches: Vec<Bytes>) -> v1::FetchResult {
        v1::FetchResult {
            topic: "t".into(),
            partition,
            high_watermark: 100,
            batches,
            ..Default::default()
        }
    }

    fn response(results: Vec<v1::FetchResult>) -> v1::FetchResponse {
        v1::FetchResponse { results }
    }

    fn offsets(cursors: &mut Cursors, now: Instant) -> Vec<(i32, i64)> {
        let (request, _) = cursors.plan("b1:1", (0, 1), 1, now).unwrap();
        let mut offsets: Vec<_> = request
            .partitions
            .iter()
            .map(|p| (p.partition, p.offset))
            .collect();
        offsets.sort();
        offsets
    }

    #[test]
    fn each_request_begins_with_another_partition() {
        let (mut cursors, _) = fixture();
        let now = Instant::now();
        let firsts: Vec<i32> = (0..4)
            .map(|_| cursors.plan("b1:1", (0, 1), 1, now).unwrap().0.partitions[0].partition)
            .collect();
        assert_eq!(firsts, [0, 1, 2, 0]);
        assert!(cursors.plan("b2:1", (0, 1), 1, now).is_none());
    }

    #[test]
    fn goes_on_after_the_last_batch_and_drops_what_is_older() {
        let (mut cursors, known) = fixture();
        let now = Instant::now();
        let (_, asked) = cursors.plan("b1:1", (0, 1), 1, now).unwrap();
        let batches = vec![batch(3, 2), batch(8, 5), batch(13, 1)];
        let items = cursors.on_response(
            "b1:1",
            &asked,
            response(vec![result(1, batches)]),
            &known,
            now,
        );
        let [
            Item::Batches {
                index: 1, batches, ..
            },
        ] = &items[..]
        else {
            panic!("{items:?}")
        };
        assert_eq!(
            cursors.cursors[1]
                .assigned
                .high_watermark
                .load(Ordering::Relaxed),
            100
        );
        assert_eq!(
            batches.iter().map(|b| (b.from, b.next)).collect::<Vec<_>>(),
            [(10, 13), (13, 14)]
        );
        assert_eq!(offsets(&mut cursors, now), [(0, 10), (1, 14), (2, 10)]);
    }

    #[test]
    fn what_the_broker_leaves_out_is_passed_over() {
        let (mut cursors, known) = fixture();
        let now = Instant::now();
        let plan = |cursors: &mut Cursors| cursors.plan("b1:1", (0, 1), 1000, now).unwrap().1;
        let asked = plan(&mut cursors);
        let mut left_out = result(asked[0].index as i32, vec![batch(10, 2)]);
        left_out.next_offset = Some(20);
        let items = cursors.on_response("b1:1", &asked, response(vec![left_out]), &known, now);
        assert!(matches!(
            items[..],
            [Item::Batches { .. }, Item::Skipped { next: 20, .. }]
        ));
        let asked = plan(&mut cursors);
        assert!(asked.iter().any(|asked| asked.offset == 20));
        // What is behind already is no news.
        let at = asked.iter().find(|asked| asked.offset == 20).unwrap();
        let mut stale = result(at.index as i32, Vec::new());
        stale.next_offset = Some(15);
        let items = cursors.on_response("b1:1", &[*at], response(vec![stale]), &known, now);
        assert!(items.is_empty());
    }

    #[test]
    fn an_answer_from_before_a_seek_is_dropped() {
        let (mut cursors, known) = fixture();
        let now = Instant::now();
        let (_, asked) = cursors.plan("b1:1", (0, 1), 1, now).unwrap();
        assert_eq!(cursors.seek(0, 1, 10).as_deref(), Some("b1:1"));
        let items = cursors.on_response(
            "b1:1",
            &asked,
            response(vec![result(0, vec![batch(10, 1)])]),
            &known,
            now,
        );
        assert!(items.is_empty());
        assert_eq!(offsets(&mut cursors, now)[0], (0, 10));
    }

    #[test]
    fn a_batch_without_readable_header_is_skipped_by_one_offset() {
        let (mut cursors, known) = fixture();
        let now = Instant::now();
        let (_, asked) = cursors.plan("b1:1", (0, 1), 1, now).unwrap();
        let batches = vec![Bytes::from_static(b"junk"), batch(12, 1)];
        let items = cursors.on_response(
            "b1:1",
            &asked,
            response(vec![result(0, batches)]),
            &known,
            now,
        );
        let [Item::Batches { batches, .. }] = &items[..] else {
            panic!("{items:?}")
        };
        assert!(batches[0].header.is_err());
        assert_eq!((batches[0].next, batches[1].next), (11, 13));
    }

    #[test]
    fn a_fatal_error_pauses_its_partition_only_until_the_caller_has_seen_it() {
        let (mut cursors, known) = fixture();
        let now = Instant::now();
        let (_, asked) = cursors.plan("b1:1", (0, 1), 1, now).unwrap();
        let failed = v1::FetchResult {
            error: Some(v1::Error {
                reason: v1::ErrorReason::OffsetOutOfRange.into(),
                ..Default::default()
            }),
            ..result(0, Vec::new())
        };
        let items = cursors.on_response("b1:1", &asked, response(vec![failed]), &known, now);
        let [
            Item::Failed {
                index: 0, error, ..
            },
        ] = &items[..]
        else {
            panic!("{items:?}")
        };
        assert_eq!(
            (error.kind(), error.partition()),
            (ErrorKind::OffsetOutOfRange, Some(0))
        );
        let later = now + Duration::from_secs(10);
        assert_eq!(offsets(&mut cursors, later), [(1, 10), (2, 10)]);
        cursors.resume(0, 0);
        assert_eq!(offsets(&mut cursors, later).len(), 3);
    }

    #[test]
    fn a_leader_that_moved_is_followed_at_once_and_a_failed_connection_after_a_pause() {
        let (mut cursors, known) = fixture();
        let now = Instant::now();
        let (_, asked) = cursors.plan("b1:1", (0, 1), 1, now).unwrap();
        let hint = [
            ("leader_id", "2"),
            ("leader_address", "b2:1"),
            ("leader_epoch", "2"),
        ];
        let moved = v1::FetchResult {
            error: Some(v1::Error {
                reason: v1::ErrorReason::NotLeader.into(),
                message: String::new(),
                metadata: hint
                    .map(|(k, v)| (k.to_owned(), v.to_owned()))
                    .into_iter()
                    .collect(),
            }),
            ..result(2, Vec::new())
        };
        assert!(
            cursors
                .on_response("b1:1", &asked, response(vec![moved]), &known, now)
                .is_empty()
        );
        assert!(cursors.refresh.start(now));
        assert_eq!(
            cursors.plan("b2:1", (0, 1), 1, now).unwrap().0.partitions[0].partition,
            2
        );

        let (_, asked) = cursors.plan("b1:1", (0, 1), 1, now).unwrap();
        let broken = Error::new(ErrorKind::Transport, "gone");
        assert!(
            cursors
                .on_failure("b1:1", &asked, &broken, &known, now)
                .is_empty()
        );
        assert!(cursors.plan("b1:1", (0, 1), 1, now).is_none());
        assert!(
            cursors
                .plan(
                    "b1:1",
                    (0, 1),
                    1,
                    cursors.next_due(now).unwrap() + Duration::from_secs(1)
                )
                .is_some()
        );
    }

    #[test]
    fn an_offset_is_out_of_range_only_if_a_leader_that_cannot_be_outdated_says_so() {
        for (broker, has_read, high_watermark, after, is_final) in [
            ("b1:1", false, 5, 0, true),
            ("b1:1", false, 50, 0, true),
            ("b1:1", true, 50, 0, true),
            ("b1:1", true, 5, 9, false),
            ("b1:1", true, 5, 10, true),
            ("b2:1", false, 5, 10, false),
            ("b2:1", true, 50, 10, false),
        ] {
            let (mut cursors, known) = fixture();
            let now = Instant::now();
            if has_read {
                let (_, asked) = cursors.plan("b1:1", (0, 1), 1, now).unwrap();
                let read = response(vec![result(0, vec![batch(10, 1)])]);
                cursors.on_response("b1:1", &asked, read, &known, now);
            }
            let details = [("high_watermark".to_owned(), high_watermark.to_string())];
            let refused = v1::FetchResult {
                error: Some(v1::Error {
                    reason: v1::ErrorReason::OffsetOutOfRange.into(),
                    message: String::new(),
                    metadata: details.into_iter().collect(),
                }),
                ..result(0, Vec::new())
            };
            let (_, asked) = cursors.plan("b1:1", (0, 1), 1, now).unwrap();
            let told: Vec<Item> = [0, after]
                .into_iter()
                .flat_map(|after| {
                    let refused = response(vec![refused.clone()]);
                    let at = now + Duration::from_secs(after);
                    cursors.on_response(broker, &asked, refused, &known, at)
                })
                .collect();
            assert_eq!(
                !told.is_empty(),
                is_final,
                "{broker} {has_read} {high_watermark} {after} s: {told:?}"
            );
        }
    }

    #[test]
    fn a_new_leader_or_the_end_of_a_pause_interrupts_the_polls_of_those_concerned() {
        let (mut cursors, known) = fixture();
        cursors.take_outdated();
        let now = Instant::now();
        let (_, asked) = cursors.plan("b1:1", (0, 1), 1, now).unwrap();
        let broken = Error::new(ErrorKind::Transport, "gone");
        cursors.on_failure("b1:1", &asked, &broken, &known, now);
        cursors.end_pauses(now);
        assert!(cursors.take_outdated().is_empty(), "the pause isn't over");
        cursors.end_pauses(now + Duration::from_secs(1));
        assert_eq!(cursors.take_outdated(), ["b1:1".into()]);

        cursors.on_failure("b1:1", &asked, &broken, &known, now);
        known.apply(&metadata(2, 2)).unwrap();
        cursors.find_leaders(&known);
        assert_eq!(cursors.take_outdated(), ["b1:1".into(), "b2:1".into()]);
        let (request, _) = cursors.plan("b2:1", (0, 1), 1, now).unwrap();
        assert_eq!(request.partitions.len(), 3, "without delay");
    }

    #[test]
    fn a_failed_call_is_blamed_on_the_partition_that_it_names() {
        let (mut cursors, known) = fixture();
        let now = Instant::now();
        let (_, asked) = cursors.plan("b1:1", (0, 1), 1, now).unwrap();
        let error = Error::unknown_partition(&"t".into(), 1, 1);
        let items = cursors.on_failure("b1:1", &asked, &error, &known, now);
        assert!(
            matches!(&items[..], [Item::Failed { index: 1, .. }]),
            "{items:?}"
        );
        assert_eq!(offsets(&mut cursors, now), [(0, 10), (2, 10)]);
    }
}
