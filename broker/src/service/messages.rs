//! The requests of a produce stream, read from its body here rather than by tonic. Tonic's reader keeps the memory of a stream's last
//! message until the next one comes, which nothing bounds: ten thousand idle streams could each hold the largest message.
//! Here a message's memory is taken when there is room for it, and is its batches' own once they are decoded.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use http_body::Body as HttpBody;
use millrace_proto::{codec, v1::ProduceStreamRequest};
use parking_lot::Mutex;
use tokio::time::Sleep;
use tonic::{Request, Status, body::Body};

use super::memory::{Admission, Permit, Prefix, RequestBudget, STALL};

/// Room made at once for a message whose bytes have yet to come.
const FIRST_BYTES: usize = 64 << 10;

/// A produce stream's requests.
pub(super) struct Messages {
    body: Body,
    /// Received and not yet used.
    frame: Bytes,
    state: State,
    admission: Admission,
    max_message: usize,
    /// For the message that is being received or handled; the next one is asked for only then.
    memory: Option<Permit>,
    /// When the message that has begun must be complete.
    deadline: Option<Pin<Box<Sleep>>>,
}

enum State {
    /// Before or in a message's prefix.
    Prefix(Prefix),
    /// A message of so many bytes waits for memory.
    Waiting(usize),
    /// A message of so many bytes is being received.
    Message(BytesMut, usize),
    /// Nothing more can be read.
    Ended,
}

/// Travels with the request to its handler. Extensions must be cloneable, hence the `Arc`.
#[derive(Clone)]
struct HandedOver(Arc<Mutex<Option<Messages>>>);

impl Messages {
    /// Takes a request's body over; tonic sees an empty one.
    pub(super) fn take_over(
        request: http::Request<Body>,
        budget: &RequestBudget,
    ) -> http::Request<Body> {
        let (mut parts, body) = request.into_parts();
        let messages = Messages {
            body,
            frame: Bytes::new(),
            state: State::Prefix(Prefix::default()),
            admission: budget.admission(),
            max_message: budget.max_message(),
            memory: None,
            deadline: None,
        };
        parts
            .extensions
            .insert(HandedOver(Arc::new(Mutex::new(Some(messages)))));
        http::Request::from_parts(parts, Body::empty())
    }

    /// What [`Self::take_over`] left with the request.
    pub(super) fn of<T>(request: &mut Request<T>) -> Result<Messages, Status> {
        request
            .extensions_mut()
            .remove::<HandedOver>()
            .and_then(|HandedOver(messages)| messages.lock().take())
            .ok_or_else(|| Status::internal("the stream's body was not handed over"))
    }

    /// The next request. Cancel safe. The memory of the one before is given back.
    pub(super) async fn next(&mut self) -> Option<Result<ProduceStreamRequest, Status>> {
        let next = std::future::poll_fn(|cx| self.poll_message(cx)).await;
        Some(next?.and_then(codec::decode_request))
    }

    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Status>>> {
        loop {
            match &mut self.state {
                State::Prefix(prefix) => {
                    if prefix.is_empty() {
                        self.memory = None;
                        self.deadline = None;
                    }
                    if let Some((compressed, length)) = prefix.fill(&mut self.frame) {
                        let length = length as usize;
                        if compressed != 0 || length > self.max_message {
                            self.state = State::Ended;
                            return Poll::Ready(Some(Err(match compressed {
                                0 => too_large(length, self.max_message),
                                _ => compressed_message(),
                            })));
                        }
                        self.state = State::Waiting(length);
                        continue;
                    }
                }
                State::Waiting(length) => {
                    let length = *length;
                    self.memory = ready!(self.admission.poll(cx, length));
                    // A claim alone takes no memory: what is promised has to come first.
                    let buffer = BytesMut::with_capacity(length.min(FIRST_BYTES));
                    self.deadline = Some(Box::pin(tokio::time::sleep(STALL)));
                    self.state = State::Message(buffer, length);
                    continue;
                }
                State::Message(buffer, length) => {
                    let missing = *length - buffer.len();
                    let take = missing.min(self.frame.len());
                    if buffer.capacity() - buffer.len() < take {
                        buffer.reserve(missing);
                    }
                    buffer.extend_from_slice(&self.frame[..take]);
                    self.frame.advance(take);
                    if take == missing {
                        let message = std::mem::take(buffer).freeze();
                        self.state = State::Prefix(Prefix::default());
                        return Poll::Ready(Some(Ok(message)));
                    }
                }
                State::Ended => return Poll::Ready(None),
            }
            if let Err(end) = ready!(self.poll_frame(cx)) {
                self.state = State::Ended;
                self.memory = None;
                return Poll::Ready(end.map(Err));
            }
        }
    }

    /// Waits until there is something in `frame`. `Err` at the end of the stream: with a status if it is no good one.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Option<Status>>> {
        while self.frame.is_empty() {
            let between = matches!(&self.state, State::Prefix(prefix) if prefix.is_empty());
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.frame = data;
                        // The wait for memory that may follow is not the client's.
                        self.deadline
                            .get_or_insert_with(|| Box::pin(tokio::time::sleep(STALL)));
                    }
                }
                Poll::Ready(Some(Err(status))) => return Poll::Ready(Err(Some(status))),
                Poll::Ready(None) if between => return Poll::Ready(Err(None)),
                Poll::Ready(None) => return Poll::Ready(Err(Some(cut_off()))),
                Poll::Pending => {
                    let deadline = self.deadline.as_mut().filter(|_| !between);
                    if deadline.is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
                        return Poll::Ready(Err(Some(stalled())));
                    }
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }
}

fn too_large(length: usize, max: usize) -> Status {
    Status::out_of_range(format!(
        "a message of {length} bytes; {max} are allowed: send smaller ones, or raise the broker's --max-request"
    ))
}

fn compressed_message() -> Status {
    Status::unimplemented(
        "a compressed message; compress record batches instead, which stay so on their whole way",
    )
}

fn cut_off() -> Status {
    Status::invalid_argument("the stream ended within a message")
}

/// Also for messages that tonic reads.
pub(super) fn stalled() -> Status {
    Status::deadline_exceeded(format!(
        "a message was begun and not completed within {STALL:?}"
    ))
}
