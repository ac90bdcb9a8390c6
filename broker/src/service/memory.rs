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
/// A message that has begun must be complete, and a response must be read, within this time.
const STALL: Duration = Duration::from_secs(30);

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
    units: Arc<Semaphore>,
    total: u32,
    max_message: usize,
}

impl RequestBudget {
    pub(super) fn new(bytes: usize, max_message: usize) -> Self {
        let total = units(bytes);
        RequestBudget {
            units: Arc::new(Semaphore::new(total as usize)),
            total,
            max_message,
        }
    }

    /// Meters a request: each of its messages waits for its part of the budget before it is received.
    pub(super) fn meter(&self, request: http::Request<Body>) -> http::Request<Body> {
        request.map(|body| {
            Body::new(MeteredBody {
                body,
                semaphore: PollSemaphore::new(self.units.clone()),
                budget: self.clone(),
                state: Metered::Prefix(Prefix::default()),
                pending: None,
                held: None,
                deadline: None,
            })
        })
    }
}

/// Follows gRPC's framing (one byte for compression, four for the length, then the message) to know when a message begins.
struct MeteredBody {
    body: Body,
    budget: RequestBudget,
    semaphore: PollSemaphore,
    state: Metered,
    /// Received, but not yet passed on: its message waits for memory.
    pending: Option<Bytes>,
    /// For the message that is being received or handled; tonic asks for the next one only then.
    held: Option<OwnedSemaphorePermit>,
    deadline: Option<Pin<Box<Sleep>>>,
}

enum Metered {
    /// Before or in a message's prefix.
    Prefix(Prefix),
    /// So many bytes of the message are to come.
    Message(usize),
}

#[derive(Default)]
struct Prefix {
    bytes: [u8; 5],
    len: usize,
}

impl MeteredBody {
    /// Waits for the memory of the messages that begin in `data`, and notes where it leaves off.
    fn poll_admit(&mut self, data: &Bytes, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        let mut rest = &data[..];
        let mut state = match &self.state {
            Metered::Prefix(prefix) => Metered::Prefix(Prefix {
                bytes: prefix.bytes,
                len: prefix.len,
            }),
            Metered::Message(left) => Metered::Message(*left),
        };
        let mut begun = None;
        while !rest.is_empty() {
            match &mut state {
                Metered::Message(left) => {
                    let taken = rest.len().min(*left);
                    *left -= taken;
                    rest.advance(taken);
                    if *left == 0 {
                        state = Metered::Prefix(Prefix::default());
                    }
                }
                Metered::Prefix(prefix) => {
                    prefix.bytes[prefix.len] = rest[0];
                    prefix.len += 1;
                    rest.advance(1);
                    if prefix.len == prefix.bytes.len() {
                        let [_, length @ ..] = prefix.bytes;
                        let length = u32::from_be_bytes(length) as usize;
                        // A message beyond the limit is refused by tonic as soon as it sees the prefix.
                        begun = Some(begun.unwrap_or(0).max(length.min(self.budget.max_message)));
                        state = if length == 0 {
                            Metered::Prefix(Prefix::default())
                        } else {
                            Metered::Message(length)
                        };
                    }
                }
            }
        }
        if let Some(length) = begun {
            // The one before has been handled, or this data would not have been asked for.
            self.held = None;
            let wanted = units(length).min(self.budget.total);
            let permit = ready!(self.semaphore.poll_acquire_many(cx, wanted));
            self.held = permit;
        }
        self.deadline = match state {
            Metered::Prefix(Prefix { len: 0, .. }) => None,
            _ if begun.is_none() && self.deadline.is_some() => self.deadline.take(),
            _ => Some(Box::pin(tokio::time::sleep(STALL))),
        };
        self.state = state;
        Poll::Ready(Ok(()))
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
        if this.pending.is_none() {
            if matches!(this.state, Metered::Prefix(Prefix { len: 0, .. })) {
                // More is asked for and nothing is begun: all that came has been handled.
                this.held = None;
            }
            match Pin::new(&mut this.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => this.pending = Some(data),
                    Err(frame) => return Poll::Ready(Some(Ok(frame))),
                },
                Poll::Ready(other) => return Poll::Ready(other),
                Poll::Pending => {
                    let late = this
                        .deadline
                        .as_mut()
                        .is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready());
                    if late {
                        this.held = None;
                        let message =
                            format!("a message was begun and not completed within {STALL:?}");
                        return Poll::Ready(Some(Err(Status::deadline_exceeded(message))));
                    }
                    return Poll::Pending;
                }
            }
        }
        let Some(data) = this.pending.take() else {
            return Poll::Pending;
        };
        match this.poll_admit(&data, cx) {
            Poll::Ready(admitted) => Poll::Ready(Some(admitted.map(|()| Frame::data(data)))),
            Poll::Pending => {
                this.pending = Some(data);
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.pending.is_none() && self.body.is_end_stream()
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
