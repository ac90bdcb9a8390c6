//! Telling callers what became of their records: one completion for each batch, shared by a [`Delivery`] for each record.
//!
//! Not responsible for deciding the outcome: the sender does.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, Waker},
};

use parking_lot::Mutex;

use crate::error::Error;

/// Where a record went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordMeta {
    /// The topic's name.
    pub topic: Arc<str>,
    /// The partition's index.
    pub partition: i32,
    /// The record's offset; -1 if unknown: with [`Acks::None`](crate::Acks::None), or when the broker no longer remembers
    /// where a batch went that it had received before.
    pub offset: i64,
    /// Milliseconds since the Unix epoch: the broker's clock if the topic says so, else the producer's.
    pub timestamp_ms: i64,
}

/// What a broker said of a whole batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ack {
    pub(crate) base_offset: Option<i64>,
    pub(crate) log_append_time_ms: Option<i64>,
}

/// The outcome of one batch: set once, then all who wait are woken.
#[derive(Debug)]
pub(crate) struct Completion {
    pub(crate) topic: Arc<str>,
    pub(crate) partition: i32,
    outcome: OnceLock<Result<Ack, Error>>,
    waiting: Mutex<Vec<Waker>>,
}

impl Completion {
    pub(crate) fn new(topic: Arc<str>, partition: i32) -> Arc<Self> {
        Arc::new(Completion {
            topic,
            partition,
            outcome: OnceLock::new(),
            waiting: Mutex::default(),
        })
    }

    /// The first outcome counts.
    pub(crate) fn complete(&self, outcome: Result<Ack, Error>) {
        let waiting = {
            // Under the lock, so that nobody registers between the outcome and the wake-up.
            let mut waiting = self.waiting.lock();
            if self.outcome.set(outcome).is_err() {
                return;
            }
            std::mem::take(&mut *waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }

    pub(crate) fn outcome(&self) -> Option<&Result<Ack, Error>> {
        self.outcome.get()
    }

    /// Waits for the whole batch.
    pub(crate) fn delivery(self: Arc<Self>, index: i32, timestamp_ms: i64) -> Delivery {
        Delivery {
            completion: self,
            index,
            timestamp_ms,
            waker: None,
        }
    }
}

/// A record on its way. Resolves when the broker has it as [`Acks`](crate::Acks) says, or when it failed for good. Dropping it
/// changes nothing for the record.
#[derive(Debug)]
#[must_use = "await it to learn whether the record was written; drop it explicitly if you don't care"]
pub struct Delivery {
    completion: Arc<Completion>,
    index: i32,
    timestamp_ms: i64,
    /// Where this future's waker is in the completion's list, so that polling again replaces it.
    waker: Option<u32>,
}

impl Delivery {
    /// The record's topic.
    pub fn topic(&self) -> &Arc<str> {
        &self.completion.topic
    }

    /// The partition chosen for the record.
    pub fn partition(&self) -> i32 {
        self.completion.partition
    }

    fn meta(&self, ack: &Ack) -> RecordMeta {
        RecordMeta {
            topic: self.completion.topic.clone(),
            partition: self.completion.partition,
            offset: ack
                .base_offset
                .map_or(-1, |base| base.saturating_add(self.index.into())),
            timestamp_ms: ack.log_append_time_ms.unwrap_or(self.timestamp_ms),
        }
    }
}

impl Future for Delivery {
    type Output = Result<RecordMeta, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if this.completion.outcome.get().is_none() {
            let mut waiting = this.completion.waiting.lock();
            if this.completion.outcome.get().is_none() {
                match this.waker.and_then(|at| waiting.get_mut(at as usize)) {
                    Some(waker) => waker.clone_from(cx.waker()),
                    None => {
                        this.waker = u32::try_from(waiting.len()).ok();
                        waiting.push(cx.waker().clone());
                    }
                }
                return Poll::Pending;
            }
        }
        match this.completion.outcome.get() {
            Some(Ok(ack)) => Poll::Ready(Ok(this.meta(ack))),
            Some(Err(error)) => Poll::Ready(Err(error.clone())),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use futures::{FutureExt, future::join_all};

    #[tokio::test]
    async fn all_records_of_a_batch_learn_its_outcome_with_their_own_offset() {
        let completion = Completion::new("t".into(), 2);
        let waiting: Vec<_> = (0..3)
            .map(|i| completion.clone().delivery(i, 7 + i64::from(i)))
            .collect();
        let all = tokio::spawn(join_all(waiting));
        tokio::task::yield_now().await;
        completion.complete(Ok(Ack {
            base_offset: Some(40),
            log_append_time_ms: None,
        }));
        completion.complete(Err(Error::new(ErrorKind::TimedOut, "too late to matter")));
        let metas: Vec<_> = all.await.unwrap().into_iter().map(Result::unwrap).collect();
        assert_eq!(
            metas
                .iter()
                .map(|m| (m.offset, m.timestamp_ms))
                .collect::<Vec<_>>(),
            [(40, 7), (41, 8), (42, 9)]
        );
        assert_eq!((&*metas[0].topic, metas[0].partition), ("t", 2));
    }

    #[tokio::test]
    async fn polling_again_does_not_pile_up_wakers() {
        let completion = Completion::new("t".into(), 0);
        let mut delivery = completion.clone().delivery(0, 0);
        for _ in 0..100 {
            assert!((&mut delivery).now_or_never().is_none());
        }
        assert_eq!(completion.waiting.lock().len(), 1);
        completion.complete(Ok(Ack {
            base_offset: None,
            log_append_time_ms: Some(5),
        }));
        let meta = delivery.await.unwrap();
        assert_eq!((meta.offset, meta.timestamp_ms), (-1, 5));
    }
}
