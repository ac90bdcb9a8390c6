//! Where records wait: each partition's open batch and its full ones, within one budget of bytes for the whole producer.
//!
//! Responsible for the hot path of `send` (lock, append, unlock) and for telling the sender what is new. Not responsible for
//! sequences, retries or brokers. There is no IO in here.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use millrace_record::{BatchBuilder, BatchOptions, Compression, HEADER_LEN};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, Semaphore},
    time::Instant,
};

use super::{
    batch::{Batch, Payload},
    delivery::{Completion, Delivery},
    record::Record,
};
use crate::error::{Error, ErrorKind};

/// A batch's builder begins with a buffer of this size.
const FIRST_RESERVATION: usize = 1024;

/// What the partitions of a producer share.
#[derive(Debug)]
pub(crate) struct Accumulator {
    pub(crate) compression: Compression,
    pub(crate) batch_bytes: usize,
    pub(crate) linger: Duration,
    pub(crate) delivery_timeout: Duration,
    /// One permit for each byte. Fair: who waits comes before who tries.
    pub(crate) budget: Semaphore,
    pub(crate) budget_bytes: usize,
    /// Whether batches are parts of transactions.
    transactional: bool,
    /// How many calls wait for room.
    pub(crate) waiting: AtomicUsize,
    /// Why nothing more is taken, once that is so.
    pub(crate) closed: OnceLock<Error>,
    inbox: Mutex<Inbox>,
    pub(crate) news: Notify,
    incomplete: Mutex<BTreeMap<u64, Arc<Completion>>>,
    next_id: AtomicU64,
}

/// What the sender has to look at. At most one entry for each batch, so the budget bounds it.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    pub(crate) partitions: Vec<Arc<Partition>>,
    pub(crate) flush: bool,
    /// Send what there is, then end.
    pub(crate) close: bool,
    /// End now.
    pub(crate) abort: bool,
}

impl Accumulator {
    pub(crate) fn new(
        compression: Compression,
        batch_bytes: usize,
        linger: Duration,
        delivery_timeout: Duration,
        budget_bytes: usize,
        transactional: bool,
    ) -> Self {
        Accumulator {
            compression,
            batch_bytes,
            linger,
            delivery_timeout,
            budget: Semaphore::new(budget_bytes),
            budget_bytes,
            transactional,
            waiting: AtomicUsize::new(0),
            closed: OnceLock::new(),
            inbox: Mutex::default(),
            news: Notify::new(),
            incomplete: Mutex::default(),
            next_id: AtomicU64::new(0),
        }
    }

    pub(crate) fn tell(&self, change: impl FnOnce(&mut Inbox)) {
        change(&mut self.inbox.lock());
        self.news.notify_one();
    }

    /// Takes the news; `close` and `abort` stay.
    pub(crate) fn read_news(&self) -> Inbox {
        let mut inbox = self.inbox.lock();
        Inbox {
            partitions: std::mem::take(&mut inbox.partitions),
            flush: std::mem::take(&mut inbox.flush),
            close: inbox.close,
            abort: inbox.abort,
        }
    }

    /// The batches whose outcome is open, oldest first. One that has just got it may not be released yet: it is of no interest any more.
    pub(crate) fn incomplete(&self) -> Vec<Arc<Completion>> {
        let incomplete = self.incomplete.lock();
        let open = incomplete.values().filter(|c| c.outcome().is_none());
        open.cloned().collect()
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.incomplete.lock().is_empty()
    }

    /// Nobody waits for the batch any more. Its bytes may still be in use.
    pub(crate) fn forget(&self, id: u64) {
        self.incomplete.lock().remove(&id);
    }

    /// Frees the batch and its share of the budget. Its completion must have its outcome.
    pub(crate) fn release(&self, batch: Batch) {
        let Batch {
            id,
            payload,
            reserved,
            ..
        } = batch;
        self.forget(id);
        drop(payload);
        self.budget.add_permits(reserved);
    }
}

/// Why a record was not taken.
#[derive(Debug)]
pub(crate) enum Refused {
    /// The budget is used up. With room for a batch of its own granted, the record is taken.
    NoRoom,
    /// Another partition's turn.
    Switch,
    Failed(Error),
}

/// What a successful append did.
#[derive(Debug)]
pub(crate) struct Appended {
    pub(crate) delivery: Delivery,
    /// Whether a batch became full.
    pub(crate) sealed: bool,
}

/// One partition's waiting records.
#[derive(Debug)]
pub(crate) struct Partition {
    /// The sender's index of it.
    pub(crate) slot: usize,
    pub(crate) topic: Arc<str>,
    pub(crate) index: i32,
    max_message_bytes: usize,
    /// Whether it has a leader, so that keyless records go elsewhere if not.
    pub(crate) available: AtomicBool,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    open: Option<Batch>,
    full: VecDeque<Batch>,
    closed: bool,
}

/// What a partition has for the sender.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    Empty,
    /// The open batch is due then.
    Lingering(Instant),
    Ready,
}

impl Partition {
    pub(crate) fn new(slot: usize, topic: Arc<str>, index: i32, max_message_bytes: usize) -> Self {
        Partition {
            slot,
            topic,
            index,
            max_message_bytes,
            available: AtomicBool::new(true),
            queue: Mutex::default(),
        }
    }

    /// Takes a record, if there is room. `granted` are bytes that the caller got from the budget; the rest of them stays his.
    /// With `may_switch`, a record that would begin a new batch is refused, so that the sticky partition can change.
    pub(crate) fn append(
        self: &Arc<Self>,
        accumulator: &Accumulator,
        record: &Record,
        timestamp_ms: i64,
        granted: &mut usize,
        may_switch: bool,
    ) -> Result<Appended, Refused> {
        let (key, value) = (record.key.as_deref(), record.value.as_deref());
        let record_size = BatchBuilder::max_record_size(key, value, &record.headers);
        if HEADER_LEN + record_size > self.max_message_bytes.min(accumulator.budget_bytes) {
            self.check_size(accumulator, record, record_size)
                .map_err(Refused::Failed)?;
        }
        let limit = accumulator.batch_bytes.min(self.max_message_bytes);
        let mut sealed = false;

        let mut queue = self.queue.lock();
        let queue = &mut *queue;
        if queue.closed {
            let closed = accumulator.closed.get().cloned();
            return Err(Refused::Failed(
                closed.unwrap_or_else(|| Error::closed("producer")),
            ));
        }
        if let Some(open) = queue.open.take_if(|open| open.size() + record_size > limit) {
            queue.full.push_back(open);
            accumulator.tell(|inbox| inbox.partitions.push(self.clone()));
            sealed = true;
        }
        if may_switch && queue.open.is_none() {
            return Err(Refused::Switch);
        }
        let batch = match &mut queue.open {
            Some(open) => {
                let short = (open.size() + record_size).saturating_sub(open.reserved);
                if short > 0 {
                    // Doubles, as the buffer does.
                    open.reserved +=
                        reserve(accumulator, short, open.reserved.min(limit), granted)?;
                }
                open
            }
            none => {
                let size = HEADER_LEN + record_size;
                let reserved = reserve(accumulator, size, FIRST_RESERVATION, granted)?;
                let batch = none.insert(self.open(accumulator, reserved));
                // Before `incomplete`, so that a flush which sees the batch there finds the news, too.
                accumulator.tell(|inbox| inbox.partitions.push(self.clone()));
                accumulator
                    .incomplete
                    .lock()
                    .insert(batch.id, batch.completion.clone());
                batch
            }
        };
        let Payload::Open(builder) = &mut batch.payload else {
            return Err(Refused::Failed(Error::new(
                ErrorKind::InvalidBatch,
                "the open batch is built already",
            )));
        };
        let index = builder.append(timestamp_ms, key, value, &record.headers);
        Ok(Appended {
            delivery: batch.completion.clone().delivery(index, timestamp_ms),
            sealed,
        })
    }

    fn open(&self, accumulator: &Accumulator, reserved: usize) -> Batch {
        let options = BatchOptions {
            compression: accumulator.compression,
            transactional: accumulator.transactional,
            ..Default::default()
        };
        let opened = Instant::now();
        Batch {
            id: accumulator.next_id.fetch_add(1, Ordering::Relaxed),
            payload: Payload::Open(BatchBuilder::new(options)),
            completion: Completion::new(self.topic.clone(), self.index),
            reserved,
            opened,
            deadline: opened + accumulator.delivery_timeout,
        }
    }

    /// The bound above is generous; a record that is too large is worth an exact look.
    #[cold]
    fn check_size(
        &self,
        accumulator: &Accumulator,
        record: &Record,
        bound: usize,
    ) -> Result<(), Error> {
        let too_large = |size: usize, limit: usize, name: &str| {
            let message = format!(
                "a record needs a batch of {size} bytes and {name} is {limit}; send smaller records or raise the limit"
            );
            let details = [
                ("size_bytes", size.to_string()),
                ("max_bytes", limit.to_string()),
            ];
            Err(Error::new(ErrorKind::RecordTooLarge, message)
                .with(details)
                .at(&self.topic, self.index))
        };
        if HEADER_LEN + bound > accumulator.budget_bytes {
            return too_large(
                HEADER_LEN + bound,
                accumulator.budget_bytes,
                "the producer's max_buffered_bytes",
            );
        }
        // With compression only the broker can tell.
        if accumulator.compression == Compression::None {
            let mut builder = BatchBuilder::new(BatchOptions::default());
            builder.append(
                0,
                record.key.as_deref(),
                record.value.as_deref(),
                &record.headers,
            );
            if builder.size() > self.max_message_bytes {
                return too_large(
                    builder.size(),
                    self.max_message_bytes,
                    "the topic's max_message_bytes",
                );
            }
        }
        Ok(())
    }

    pub(crate) fn readiness(&self, accumulator: &Accumulator, now: Instant) -> Readiness {
        let queue = self.queue.lock();
        match &queue.open {
            _ if !queue.full.is_empty() => Readiness::Ready,
            Some(open) if open.opened + accumulator.linger <= now => Readiness::Ready,
            Some(open) => Readiness::Lingering(open.opened + accumulator.linger),
            None => Readiness::Empty,
        }
    }

    /// Takes what is ready, or with `force` all there is, up to `room` bytes; with `alone` at least one batch.
    pub(crate) fn take(
        &self,
        accumulator: &Accumulator,
        now: Instant,
        mut room: usize,
        alone: bool,
        force: bool,
    ) -> Vec<Batch> {
        let mut taken = Vec::new();
        let mut queue = self.queue.lock();
        let mut fits = |batch: &Batch, first: bool| {
            let fits = batch.size() <= room || (first && alone);
            room = room.saturating_sub(batch.size());
            fits
        };
        while queue
            .full
            .front()
            .is_some_and(|batch| fits(batch, taken.is_empty()))
        {
            taken.extend(queue.full.pop_front());
        }
        if queue.full.is_empty() {
            let due = |open: &Batch| force || open.opened + accumulator.linger <= now;
            let first = taken.is_empty();
            taken.extend(queue.open.take_if(|open| due(open) && fits(open, first)));
        }
        taken
    }

    /// Takes what has waited too long.
    pub(crate) fn expire(&self, now: Instant) -> Vec<Batch> {
        let mut queue = self.queue.lock();
        let mut expired = Vec::new();
        while queue
            .full
            .front()
            .is_some_and(|batch| batch.deadline <= now)
        {
            expired.extend(queue.full.pop_front());
        }
        if queue.full.is_empty() {
            expired.extend(queue.open.take_if(|open| open.deadline <= now));
        }
        expired
    }

    /// Takes everything, and with `close` nothing more is let in.
    pub(crate) fn take_all(&self, close: bool) -> Vec<Batch> {
        let mut queue = self.queue.lock();
        queue.closed |= close;
        let mut all: Vec<Batch> = queue.full.drain(..).collect();
        all.extend(queue.open.take());
        all
    }

    /// Records that the sender has not taken yet.
    pub(crate) fn records(&self) -> usize {
        let queue = self.queue.lock();
        queue
            .full
            .iter()
            .chain(&queue.open)
            .map(Batch::records)
            .sum()
    }
}

/// Takes at least `needed` bytes from the budget, `wished` if it can.
fn reserve(
    accumulator: &Accumulator,
    needed: usize,
    wished: usize,
    granted: &mut usize,
) -> Result<usize, Refused> {
    if let Some(rest) = granted.checked_sub(needed) {
        *granted = rest;
        return Ok(needed);
    }
    for bytes in [needed.max(wished), needed] {
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        if let Ok(permit) = accumulator.budget.try_acquire_many(permits) {
            permit.forget();
            return Ok(bytes);
        }
    }
    Err(Refused::NoRoom)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: usize = 10_000;

    fn fixture(batch_bytes: usize, linger_ms: u64) -> (Accumulator, Arc<Partition>) {
        let linger = Duration::from_millis(linger_ms);
        let timeout = Duration::from_secs(60);
        let accumulator = Accumulator::new(
            Compression::None,
            batch_bytes,
            linger,
            timeout,
            BUDGET,
            false,
        );
        (
            accumulator,
            Arc::new(Partition::new(0, "t".into(), 0, 8000)),
        )
    }

    fn append(
        (accumulator, partition): &(Accumulator, Arc<Partition>),
        bytes: usize,
    ) -> Result<Appended, Refused> {
        let record = Record::to("t").value(vec![0; bytes]);
        partition.append(accumulator, &record, 0, &mut 0, false)
    }

    fn take(fixture: &(Accumulator, Arc<Partition>), room: usize, now: Instant) -> Vec<Batch> {
        fixture.1.take(&fixture.0, now, room, true, false)
    }

    #[test]
    fn a_batch_is_ready_when_full_or_when_linger_has_passed() {
        let fixture = fixture(1000, 5);
        let (accumulator, partition) = &fixture;
        let now = Instant::now();
        assert_eq!(partition.readiness(accumulator, now), Readiness::Empty);
        assert!(!append(&fixture, 400).unwrap().sealed);
        assert!(matches!(
            partition.readiness(accumulator, now),
            Readiness::Lingering(_)
        ));
        assert!(take(&fixture, 5000, now).is_empty());
        let later = Instant::now() + Duration::from_millis(5);
        assert_eq!(partition.readiness(accumulator, later), Readiness::Ready);
        assert!(!append(&fixture, 400).unwrap().sealed);
        assert!(append(&fixture, 400).unwrap().sealed);
        assert_eq!(partition.readiness(accumulator, now), Readiness::Ready);
        assert_eq!(
            take(&fixture, 5000, now)[0].records(),
            2,
            "only the full one is due"
        );
        assert_eq!(
            take(&fixture, 5000, Instant::now() + Duration::from_millis(5))[0].records(),
            1
        );
    }

    #[test]
    fn a_request_takes_what_fits_and_at_least_one_batch() {
        let fixture = fixture(500, 0);
        for _ in 0..4 {
            append(&fixture, 400).unwrap();
        }
        let now = Instant::now();
        assert_eq!(take(&fixture, 1000, now).len(), 2);
        assert_eq!(take(&fixture, 10, now).len(), 1);
        assert!(fixture.1.take(&fixture.0, now, 10, false, false).is_empty());
    }

    #[test]
    fn the_budget_bounds_what_is_appended_and_comes_back_with_the_release() {
        let fixture = fixture(2000, 0);
        let accepted = std::iter::from_fn(|| append(&fixture, 1000).ok()).count();
        assert!(matches!(append(&fixture, 1000), Err(Refused::NoRoom)));
        assert!(
            (6..10).contains(&accepted),
            "{accepted} records of 1,000 bytes in {BUDGET}"
        );
        let taken = fixture.1.take_all(false);
        let sizes: usize = taken.iter().map(Batch::size).sum();
        assert!(
            taken.iter().map(|batch| batch.reserved).sum::<usize>() <= BUDGET && sizes <= BUDGET
        );
        for batch in taken {
            assert!(batch.size() <= batch.reserved, "every byte is paid for");
            fixture.0.release(batch);
        }
        assert_eq!(fixture.0.budget.available_permits(), BUDGET);
        assert!(fixture.0.is_complete());
    }

    #[test]
    fn who_was_granted_room_for_a_batch_of_its_own_gets_in() {
        let fixture = fixture(2000, 0);
        while append(&fixture, 1000).is_ok() {}
        let record = Record::to("t").value(vec![0; 1000]);
        let needed = HEADER_LEN + BatchBuilder::max_record_size(None, record.value.as_deref(), &[]);
        let mut granted = needed;
        fixture
            .1
            .append(&fixture.0, &record, 0, &mut granted, false)
            .unwrap();
        assert!(granted < needed);
    }

    #[test]
    fn a_record_beyond_the_topics_limit_is_refused_to_the_byte() {
        let fixture = fixture(2000, 0);
        // 61 bytes of header, 11 around a value of this size.
        let mut largest = 8000 - HEADER_LEN - 20;
        while append(&fixture, largest + 1).is_ok() {
            fixture
                .1
                .take_all(false)
                .into_iter()
                .for_each(|batch| fixture.0.release(batch));
            largest += 1;
        }
        let Err(Refused::Failed(error)) = append(&fixture, largest + 1) else {
            panic!("refused for room")
        };
        assert_eq!(error.kind(), ErrorKind::RecordTooLarge);
        assert_eq!(error.metadata()["size_bytes"], "8001");
        assert_eq!(error.metadata()["max_bytes"], "8000");
    }

    #[test]
    fn what_waited_too_long_expires_oldest_first() {
        let fixture = fixture(500, 0);
        append(&fixture, 400).unwrap();
        append(&fixture, 400).unwrap();
        assert!(fixture.1.expire(Instant::now()).is_empty());
        assert_eq!(
            fixture
                .1
                .expire(Instant::now() + Duration::from_secs(60))
                .len(),
            2
        );
    }

    #[test]
    fn a_closed_partition_takes_nothing() {
        let fixture = fixture(500, 0);
        append(&fixture, 10).unwrap();
        assert_eq!(fixture.1.take_all(true).len(), 1);
        let Err(Refused::Failed(error)) = append(&fixture, 10) else {
            panic!("taken")
        };
        assert_eq!(error.kind(), ErrorKind::Closed);
    }
}
