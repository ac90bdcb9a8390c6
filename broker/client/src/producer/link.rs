//! The connection to one broker: a produce stream with several requests under way, opened when needed and again after a failure.
//!
//! Responsible for encoding (compression, checksum), for matching answers to requests and for time-outs. Not responsible for
//! order and retries: everything that fails goes back to the sender.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use millrace_proto::v1;
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep_until},
};

use super::{Acks, batch::Unit, delivery::Ack, stream::Stream};
use crate::{
    Client,
    error::{Error, ErrorKind},
    refresh::STUCK,
};

/// The broker gets `request_timeout` for the request; its answer gets this much more to arrive.
const GRACE: Duration = Duration::from_secs(2);

/// What came of requests.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) broker: usize,
    /// How many requests are over.
    pub(crate) requests: usize,
    pub(crate) units: Vec<(Unit, Result<Ack, Error>)>,
    pub(crate) health: Health,
}

/// What an answer says of the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Health {
    Well,
    /// Nothing.
    Untold,
    /// A request has had no answer for long. Told again while that is so.
    Stuck,
    /// The connection failed, and with it all requests under way.
    Down,
}

pub(crate) struct Link {
    pub(crate) broker: usize,
    pub(crate) address: Arc<str>,
    pub(crate) client: Client,
    pub(crate) acks: Acks,
    pub(crate) max_in_flight: usize,
    pub(crate) answers: mpsc::Sender<Answer>,
    /// Some partition has another leader now.
    pub(crate) moved: Arc<Notify>,
}

struct Outstanding {
    id: u64,
    sent: Instant,
    overdue: Instant,
    /// Without those that were given up. What the broker says of them later counts no more.
    units: Vec<Option<Unit>>,
}

impl Outstanding {
    fn has_units(&self) -> bool {
        self.units.iter().any(Option::is_some)
    }
}

impl Link {
    /// Sends what comes until the sender hangs up.
    pub(crate) async fn run(self, mut requests: mpsc::Receiver<Vec<Unit>>) {
        let mut stream: Option<Stream> = None;
        let mut outstanding: VecDeque<Outstanding> = VecDeque::new();
        let mut next_id = 0;
        let mut told_stuck: Option<Instant> = None;
        loop {
            let overdue = outstanding.front().map(|request| request.overdue);
            let awaited = outstanding.iter().find(|request| request.has_units());
            let stuck = awaited.map(|request| {
                let since = told_stuck.map_or(request.sent, |told| told.max(request.sent));
                since + STUCK
            });
            let now = Instant::now;
            let broken = tokio::select! {
                units = requests.recv() => {
                    let Some(units) = units else { return };
                    next_id += 1;
                    self.send(units, next_id, &mut stream, &mut outstanding).await.err()
                }
                answer = next_answer(&mut stream, &self.address) => match answer {
                    Ok(answer) => self.on_answer(answer, &mut outstanding).await.err(),
                    Err(error) => Some(error),
                },
                () = self.moved.notified() => {
                    self.give_up_moved(&mut outstanding).await;
                    None
                }
                () = sleep_until(stuck.unwrap_or_else(now)), if stuck.is_some() => {
                    told_stuck = Some(now());
                    self.answer(0, Vec::new(), Health::Stuck).await;
                    None
                }
                () = sleep_until(overdue.unwrap_or_else(now)), if overdue.is_some() => {
                    let message = format!("broker {} left a produce request unanswered for too long", self.address);
                    Some(Error::new(ErrorKind::Transport, message))
                }
            };
            if let Some(error) = broken {
                stream = None;
                self.fail_all(error, &mut outstanding).await;
            }
        }
    }

    async fn send(
        &self,
        units: Vec<Unit>,
        id: u64,
        stream: &mut Option<Stream>,
        outstanding: &mut VecDeque<Outstanding>,
    ) -> Result<(), Error> {
        let mut sent = Vec::with_capacity(units.len());
        let mut unfit = Vec::new();
        let mut partitions = Vec::with_capacity(units.len());
        for mut unit in units {
            match unit.encode() {
                Ok(batches) => {
                    if let Some(completion) = unit.batches.first().map(|batch| &batch.completion) {
                        partitions.push(v1::PartitionRecords {
                            topic: completion.topic.to_string(),
                            partition: completion.partition,
                            batches,
                            records: Vec::new(),
                        });
                    }
                    sent.push(unit);
                }
                Err(error) => unfit.push((unit, Err(error))),
            }
        }
        if !unfit.is_empty() {
            let requests = usize::from(sent.is_empty());
            self.answer(requests, unfit, Health::Untold).await;
        }
        if sent.is_empty() {
            return Ok(());
        }
        let timeout = self.client.transport().request_timeout();
        let request = v1::ProduceStreamRequest {
            correlation_id: id,
            request: Some(v1::ProduceRequest {
                acks: self.acks.to_proto().into(),
                timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX),
                partitions,
            }),
        };
        let units_of_none = self.acks == Acks::None;
        if units_of_none {
            // No answer tells more than that the broker received it, and callers don't want to know even that.
            let sent_off = Ok(Ack {
                base_offset: None,
                log_append_time_ms: None,
            });
            sent.iter().for_each(|unit| unit.complete(&sent_off));
        }
        let now = Instant::now();
        outstanding.push_back(Outstanding {
            id,
            sent: now,
            overdue: now + timeout + GRACE,
            units: sent.into_iter().map(Some).collect(),
        });
        let stream = match stream {
            Some(stream) => stream,
            none => {
                let room = self.max_in_flight + 1;
                none.insert(Stream::open(&self.client, &self.address, room, timeout)?)
            }
        };
        stream.send(request, &self.address)
    }

    async fn on_answer(
        &self,
        answer: v1::ProduceStreamResponse,
        outstanding: &mut VecDeque<Outstanding>,
    ) -> Result<(), Error> {
        let Some(at) = outstanding
            .iter()
            .position(|request| request.id == answer.correlation_id)
        else {
            return Err(self.nonsense("answered a request that was not made"));
        };
        let results = answer
            .response
            .map(|response| response.results)
            .unwrap_or_default();
        let expected = outstanding.get(at).map_or(0, |request| request.units.len());
        if answer.error.is_none() && results.len() != expected {
            return Err(self.nonsense("answered with another number of partitions than were sent"));
        }
        let units = outstanding
            .remove(at)
            .map(|request| request.units)
            .unwrap_or_default();
        let units = match answer.error {
            Some(error) => {
                let error = Error::from_proto(error);
                let units = units.into_iter().flatten();
                units.map(|unit| (unit, Err(error.clone()))).collect()
            }
            None => {
                let units = units.into_iter().zip(results);
                units
                    .filter_map(|(unit, result)| Some((unit?, outcome(result))))
                    .collect()
            }
        };
        self.answer(1, units, Health::Well).await;
        Ok(())
    }

    fn nonsense(&self, what: &str) -> Error {
        Error::new(
            ErrorKind::Transport,
            format!("broker {} {what}; is it of the same version?", self.address),
        )
    }

    /// Turns away from units whose partitions have another leader: the broker may hang, and the new leader knows what the old
    /// one has committed.
    async fn give_up_moved(&self, outstanding: &mut VecDeque<Outstanding>) {
        let metadata = self.client.cached();
        let mut moved = Vec::new();
        for unit in outstanding
            .iter_mut()
            .flat_map(|request| &mut request.units)
        {
            let leader = unit.as_ref().and_then(|unit| {
                let completion = &unit.batches.first()?.completion;
                metadata.leader(&completion.topic, completion.partition)
            });
            if let Some(leader) = leader.filter(|leader| *leader != self.address)
                && let Some(unit) = unit.take()
            {
                let message = format!(
                    "broker {} had not answered when {leader} became the leader",
                    self.address
                );
                moved.push((unit, Err(Error::new(ErrorKind::Transport, message))));
            }
        }
        if !moved.is_empty() {
            self.answer(0, moved, Health::Untold).await;
        }
    }

    async fn fail_all(&self, error: Error, outstanding: &mut VecDeque<Outstanding>) {
        let requests = outstanding.len();
        let units = outstanding
            .drain(..)
            .flat_map(|request| request.units)
            .flatten();
        let units = units.map(|unit| (unit, Err(error.clone()))).collect();
        tracing::warn!(broker = %self.address, %error, requests, "the produce stream broke");
        self.answer(requests, units, Health::Down).await;
    }

    async fn answer(
        &self,
        requests: usize,
        units: Vec<(Unit, Result<Ack, Error>)>,
        health: Health,
    ) {
        let answer = Answer {
            broker: self.broker,
            requests,
            units,
            health,
        };
        // Fails only when the sender is gone and has told its callers.
        let _ = self.answers.send(answer).await;
    }
}

async fn next_answer(
    stream: &mut Option<Stream>,
    address: &str,
) -> Result<v1::ProduceStreamResponse, Error> {
    match stream {
        Some(stream) => stream.next(address).await,
        None => std::future::pending().await,
    }
}

fn outcome(result: v1::ProduceResult) -> Result<Ack, Error> {
    match result.error {
        Some(error) => Err(Error::from_proto(error)),
        None => Ok(Ack {
            base_offset: (result.base_offset >= 0).then_some(result.base_offset),
            log_append_time_ms: result.log_append_time_ms,
        }),
    }
}
