//! The connection to one broker: a produce stream with several requests under way, opened when needed and again after a failure.
//!
//! Responsible for encoding (compression, checksum), for matching answers to requests and for time-outs. Not responsible for
//! order and retries: everything that fails goes back to the sender.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use millrace_proto::v1;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Acks, batch::Unit, delivery::Ack};
use crate::{
    Client,
    error::{Error, ErrorKind},
    transport::Transport,
};

/// The broker gets `request_timeout` for the request; its answer gets this much more to arrive.
const GRACE: Duration = Duration::from_secs(2);

/// What came of one request, or of all at once when the stream broke.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) broker: usize,
    /// How many requests are over.
    pub(crate) requests: usize,
    pub(crate) units: Vec<(Unit, Result<Ack, Error>)>,
    /// Whether it was the connection that failed.
    pub(crate) is_down: bool,
}

pub(crate) struct Link {
    pub(crate) broker: usize,
    pub(crate) address: Arc<str>,
    pub(crate) client: Client,
    pub(crate) acks: Acks,
    pub(crate) max_in_flight: usize,
    pub(crate) answers: mpsc::Sender<Answer>,
}

struct Stream {
    requests: mpsc::Sender<v1::ProduceStreamRequest>,
    answers: Streaming<v1::ProduceStreamResponse>,
}

struct Outstanding {
    id: u64,
    overdue: Instant,
    units: Vec<Unit>,
}

impl Link {
    /// Sends what comes until the sender hangs up.
    pub(crate) async fn run(self, mut requests: mpsc::Receiver<Vec<Unit>>) {
        let mut stream: Option<Stream> = None;
        let mut outstanding: VecDeque<Outstanding> = VecDeque::new();
        let mut next_id = 0;
        loop {
            let overdue = outstanding.front().map(|request| request.overdue);
            let broken = tokio::select! {
                units = requests.recv() => {
                    let Some(units) = units else { return };
                    next_id += 1;
                    self.send(units, next_id, &mut stream, &mut outstanding).await.err()
                }
                answer = next_answer(&mut stream), if stream.is_some() => match answer {
                    Ok(answer) => self.on_answer(answer, &mut outstanding).await.err(),
                    Err(status) => Some(self.broken(&status)),
                },
                () = sleep_until(overdue.unwrap_or_else(Instant::now)), if overdue.is_some() => {
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

    fn broken(&self, status: &Option<Status>) -> Error {
        match status {
            Some(status) => Error::from_status(status, &self.address),
            None => Error::new(
                ErrorKind::Transport,
                format!("broker {} ended the produce stream", self.address),
            ),
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
            self.answer(Answer {
                broker: self.broker,
                requests,
                units: unfit,
                is_down: false,
            })
            .await;
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
        outstanding.push_back(Outstanding {
            id,
            overdue: Instant::now() + timeout + GRACE,
            units: sent,
        });
        match stream {
            // There is a place for every request in flight, so this fails only if the stream is gone.
            Some(stream) => stream
                .requests
                .send(request)
                .await
                .map_err(|_| self.broken(&None)),
            None => {
                *stream = Some(self.open(request, timeout).await?);
                Ok(())
            }
        }
    }

    /// Opens the stream with its first request on the way, for servers that answer nothing before they got one.
    async fn open(
        &self,
        first: v1::ProduceStreamRequest,
        timeout: Duration,
    ) -> Result<Stream, Error> {
        let (requests, body) = mpsc::channel(self.max_in_flight + 1);
        let mut service = self.client.transport().producer(&self.address)?;
        requests.send(first).await.map_err(|_| self.broken(&None))?;
        let call = service.produce_stream(ReceiverStream::new(body));
        let answers = Transport::call(&self.address, timeout, call).await?;
        Ok(Stream { requests, answers })
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
                units
                    .into_iter()
                    .map(|unit| (unit, Err(error.clone())))
                    .collect()
            }
            None => units
                .into_iter()
                .zip(results.into_iter().map(outcome))
                .collect(),
        };
        self.answer(Answer {
            broker: self.broker,
            requests: 1,
            units,
            is_down: false,
        })
        .await;
        Ok(())
    }

    fn nonsense(&self, what: &str) -> Error {
        Error::new(
            ErrorKind::Transport,
            format!("broker {} {what}; is it of the same version?", self.address),
        )
    }

    async fn fail_all(&self, error: Error, outstanding: &mut VecDeque<Outstanding>) {
        let requests = outstanding.len();
        let units = outstanding.drain(..).flat_map(|request| request.units);
        let units = units.map(|unit| (unit, Err(error.clone()))).collect();
        tracing::warn!(broker = %self.address, %error, requests, "the produce stream broke");
        self.answer(Answer {
            broker: self.broker,
            requests,
            units,
            is_down: true,
        })
        .await;
    }

    async fn answer(&self, answer: Answer) {
        // Fails only when the sender is gone and has told its callers.
        let _ = self.answers.send(answer).await;
    }
}

/// The next answer; `None` as the error means a regular end.
async fn next_answer(
    stream: &mut Option<Stream>,
) -> Result<v1::ProduceStreamResponse, Option<Status>> {
    match stream {
        Some(stream) => stream.answers.message().await.map_err(Some)?.ok_or(None),
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
