//! Memory that requests take while they are received and responses until they are sent: bounded for all clients together, so that
//! neither a client that never finishes its message nor one that stops reading can take more than the budget, or keep it.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http_body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::Sleep,
};
use tokio_util::sync::PollSemaphore;
use tonic::{Response, Status, body::Body};
use tracing::warn;

use super::connection::ConnectionInfo;

/// Budgets are counted in this many bytes.
const UNIT: usize = 1 << 10;
/// Messages up to this size have a budget of their own.
const SMALL_MESSAGE: usize = 64 << 10;
const SMALL_BUDGET: usize = 8 << 20;
/// A message that has begun must be complete, and a response must be read, within this time.
pub(super) const STALL: Duration = Duration::from_secs(30);

/// The budget for responses.
#[derive(Clone, Debug)]
pub(super) struct ResponseBudget {
    units: Arc<Semaphore>,
    total: u32,
}

/// A response's part of the budget. Given back when the response has been sent or its connection is gone.
#[derive(Debug)]
pub(super) struct ResponseMemory(Option<OwnedSemaphorePermit>);

/// Travels with the response to [`hold_memory`]. Extensions must be cloneable, hence the `Arc`.
#[derive(Clone)]
struct Held {
    _guard: Arc<Guard>,
}

struct Guard {
    _memory: Option<OwnedSemaphorePermit>,
    /// Dropped with the response: ends the wait for a peer that does not read.
    _sent: Option<oneshot::Sender<()>>,
}

impl ResponseBudget {
    pub(super) fn new(bytes: usize) -> Self {
        let total = units(bytes);
        ResponseBudget {
            units: Arc::new(Semaphore::new(total as usize)),
            total,
        }
    }

    /// Waits until a response of `bytes` fits.
    pub(super) async fn acquire(&self, bytes: usize) -> ResponseMemory {
        ResponseMemory(
            self.units
                .clone()
                .acquire_many_owned(units(bytes).min(self.total))
                .await
                .ok(),
        )
    }
}

impl ResponseMemory {
    pub(super) fn none() -> Self {
        ResponseMemory(None)
    }

    /// Keeps room for `bytes` only.
    pub(super) fn shrink(&mut self, bytes: usize) {
        if let Some(permit) = &mut self.0 {
            let surplus = permit.num_permits().saturating_sub(units(bytes) as usize);
            drop(permit.split(surplus));
        }
    }

    /// Holds the memory until the response is sent. A peer that does not read it in time loses its connection.
    pub(super) fn attach<T>(self, response: &mut Response<T>, connection: Option<ConnectionInfo>) {
        let sent = connection.map(|connection| {
            let (sent, wait) = oneshot::channel::<()>();
            tokio::spawn(async move {
                if tokio::time::timeout(STALL, wait).await.is_err() {
                    warn!(peer = %connection.peer, "closed a connection: its client did not read a response within {STALL:?}");
                    connection.close();
                }
            });
            sent
        });
        response.extensions_mut().insert(Held {
            _guard: Arc::new(Guard {
                _memory: self.0,
                _sent: sent,
            }),
        });
    }
}

/// Moves what [`ResponseMemory::attach`] left with a response into its body's data, to live as long: the body itself is gone as
/// soon as the connection has taken its data over, which is long before a slow peer has read it.
pub(super) fn hold_memory(mut response: http::Response<Body>) -> http::Response<Body> {
    match response.extensions_mut().remove::<Held>() {
        Some(held) => response.map(|body| Body::new(HeldBody { body, held })),
        None => response,
    }
}

struct HeldBody {
    body: Body,
    held: Held,
}

/// Data of a response's body, with the memory that it takes.
struct HeldData {
    data: Bytes,
    _held: Held,
}

impl AsRef<[u8]> for HeldData {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl HttpBody for HeldBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        let hold = |data| {
            Bytes::from_owner(HeldData {
                data,
                _held: self.held.clone(),
            })
        };
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(hold))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The budget for requests.
#[derive(Clone, Debug)]
pub(super) struct RequestBudget {
    large: Arc<Semaphore>,
    /// Apart, so that metadata, fetches and health go on while large requests wait.
    small: Arc<Semaphore>,
    large_total: u32,
    max_message: usize,
}

/// A request's part of the budget, once it has one. A unary handler holds on to it while it holds on to the message.
#[derive(Clone, Debug, Default)]
pub(super) struct RequestMemory(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl RequestBudget {
    pub(super) fn new(bytes: usize, max_message: usize) -> Self {
        let large_total = units(bytes);
        RequestBudget {
            large: Arc::new(Semaphore::new(large_total as usize)),
            small: Arc::new(Semaphore::new(units(SMALL_BUDGET) as usize)),
            large_total,
            max_message,
        }
    }

    /// Meters a request: each of its messages waits for its part of the budget before it is received.
    pub(super) fn meter(&self, mut request: http::Request<Body>) -> http::Request<Body> {
        let memory = RequestMemory::default();
        let streaming = request.uri().path().ends_with("/ProduceStream");
        if !streaming {
            request.extensions_mut().insert(memory.clone());
        }
        request.map(|body| {
            Body::new(MeteredBody {
                body,
                large: PollSemaphore::new(self.large.clone()),
                small: PollSemaphore::new(self.small.clone()),
                budget: self.clone(),
                state: Metered::Prefix(Prefix::default()),
                streaming,
                pending: Bytes::new(),
                memory,
                deadline: None,
            })
        })
    }
}

/// Follows gRPC's framing (one byte for compression, four for the length, then the message) to know when a message begins.
struct MeteredBody {
    body: Body,
    budget: RequestBudget,
    large: PollSemaphore,
    small: PollSemaphore,
    state: Metered,
    /// Several messages may come; else one.
    streaming: bool,
    /// Received, but not yet passed on: its message waits for memory.
    pending: Bytes,
    /// For the message that is being received or handled; tonic asks for the next one of a stream only then.
    memory: RequestMemory,
    deadline: Option<Pin<Box<Sleep>>>,
}

#[derive(Clone, Copy)]
enum Metered {
    /// Before or in a message's prefix.
    Prefix(Prefix),
    /// So many bytes of the message are to come.
    Message(usize),
}

#[derive(Clone, Copy, Default)]
struct Prefix {
    bytes: [u8; 5],
    len: usize,
}

impl MeteredBody {
    fn is_between_messages(&self) -> bool {
        matches!(self.state, Metered::Prefix(Prefix { len: 0, .. }))
    }

    /// Waits for the memory of a message that begins in `pending`. Returns how many bytes may be passed on: up to the message's end at most.
    fn poll_admit(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
        let mut rest = &self.pending[..];
        let mut state = self.state;
        let mut begun = None;
        loop {
            match &mut state {
                _ if rest.is_empty() => break,
                Metered::Message(left) => {
                    let taken = rest.len().min(*left);
                    *left -= taken;
                    rest.advance(taken);
                    if *left == 0 {
                        state = Metered::Prefix(Prefix::default());
                        break;
                    }
                }
                Metered::Prefix(prefix) => {
                    prefix.bytes[prefix.len] = rest[0];
                    prefix.len += 1;
                    rest.advance(1);
                    if prefix.len == prefix.bytes.len() {
                        let [_, length @ ..] = prefix.bytes;
                        let length = u32::from_be_bytes(length) as usize;
                        if length == 0 {
                            state = Metered::Prefix(Prefix::default());
                            break;
                        }
                        // A message beyond the limit is refused by tonic as soon as it sees the prefix.
                        begun = Some(length.min(self.budget.max_message));
                        state = Metered::Message(length);
                    }
                }
            }
        }
        let admitted = self.pending.len() - rest.len();
        if let Some(length) = begun {
            let acquired = match length {
                ..=SMALL_MESSAGE => self.small.poll_acquire_many(cx, units(length)),
                _ => self
                    .large
                    .poll_acquire_many(cx, units(length).min(self.budget.large_total)),
            };
            *self.memory.0.lock() = ready!(acquired);
        }
        self.state = state;
        if self.streaming && self.is_between_messages() {
            self.deadline = None;
        } else if begun.is_some() || self.deadline.is_none() {
            self.deadline = Some(Box::pin(tokio::time::sleep(STALL)));
        }
        Poll::Ready(admitted)
    }
}

impl HttpBody for MeteredBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if this.streaming && this.is_between_messages() {
            // More is asked for and nothing is begun: all that was passed on has been handled.
            *this.memory.0.lock() = None;
        }
        if this.pending.is_empty() {
            match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => this.pending = data,
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
                Poll::Ready(other) => return Poll::Ready(other),
                Poll::Pending => {
                    let deadline = this.deadline.as_mut();
                    if deadline.is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
                        *this.memory.0.lock() = None;
                        let message =
                            format!("a message was begun and not completed within {STALL:?}");
                        return Poll::Ready(Some(Err(Status::deadline_exceeded(message))));
                    }
                    return Poll::Pending;
                }
            }
        }
        let admitted = ready!(this.poll_admit(cx));
        Poll::Ready(Some(Ok(Frame::data(this.pending.split_to(admitted)))))
    }

    fn is_end_stream(&self) -> bool {
        self.pending.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT))
        .unwrap_or(u32::MAX >> 3)
        .max(1)
}
