//! Memory that requests take while they are received and responses until they are sent: bounded for all clients together, so that
//! neither a client that never finishes its message nor one that stops reading can take more than the budget, or keep it.

use std::{
    collections::BTreeMap,
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
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep},
};
use tokio_util::sync::PollSemaphore;
use tonic::{Response, Status, body::Body};
use tracing::warn;

use super::{
    connection::ConnectionInfo,
    messages::{Messages, stalled},
};

/// Budgets are counted in this many bytes.
const UNIT: usize = 1 << 10;
/// Messages up to this size have a budget of their own.
const SMALL_MESSAGE: usize = 64 << 10;
const SMALL_BUDGET: usize = 8 << 20;
/// A message that has begun must be complete, and a response must be read, within this time.
pub(super) const STALL: Duration = Duration::from_secs(30);

/// The budget for responses.
pub(super) struct ResponseBudget {
    units: Arc<Semaphore>,
    total: u32,
    unsent: Arc<Mutex<Unsent>>,
}

/// Responses on their way, by the order in which they began.
#[derive(Default)]
struct Unsent {
    begun: u64,
    responses: BTreeMap<u64, (Instant, ConnectionInfo)>,
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
    unsent: Arc<Mutex<Unsent>>,
    number: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.unsent.lock().responses.remove(&self.number);
    }
}

impl ResponseBudget {
    pub(super) fn new(bytes: usize) -> Self {
        let total = units(bytes);
        ResponseBudget {
            units: Arc::new(Semaphore::new(total as usize)),
            total,
            unsent: Arc::default(),
        }
    }

    /// Holds the memory until the response is sent.
    pub(super) fn attach<T>(
        &self,
        memory: ResponseMemory,
        response: &mut Response<T>,
        connection: Option<ConnectionInfo>,
    ) {
        let mut unsent = self.unsent.lock();
        let number = unsent.begun;
        unsent.begun += 1;
        if let Some(connection) = connection {
            unsent
                .responses
                .insert(number, (Instant::now(), connection));
        }
        drop(unsent);
        response.extensions_mut().insert(Held {
            _guard: Arc::new(Guard {
                _memory: memory.0,
                unsent: self.unsent.clone(),
                number,
            }),
        });
    }

    /// Disconnects peers that do not read a response in time. Runs until it is dropped.
    pub(super) async fn watch_peers(&self) {
        let mut look = tokio::time::interval(STALL / 30);
        loop {
            let now = look.tick().await;
            let mut unsent = self.unsent.lock();
            while let Some(oldest) = unsent.responses.first_entry()
                && now.saturating_duration_since(oldest.get().0) >= STALL
            {
                let (_, connection) = oldest.remove();
                warn!(peer = %connection.peer, "closed a connection: its client did not read a response within {STALL:?}");
                connection.close();
            }
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
}

/// Moves what [`ResponseBudget::attach`] left with a response into its body's data, to live as long: the body itself is gone as
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

    /// Meters a request: its message waits for its part of the budget before it is received.
    pub(super) fn meter(&self, mut request: http::Request<Body>) -> http::Request<Body> {
        if request.uri().path().ends_with("/ProduceStream") {
            return Messages::take_over(request, self);
        }
        if request.uri().path().ends_with("/Replicate") {
            // Brokers tell one another positions; what they send of records is bounded by windows.
            return request;
        }
        let streams = STREAMS
            .iter()
            .any(|name| request.uri().path().ends_with(name));
        let memory = RequestMemory::default();
        request.extensions_mut().insert(memory.clone());
        request.map(|body| Body::new(self.metered(body, streams, memory, STALL)))
    }

    fn metered(
        &self,
        body: Body,
        streams: bool,
        memory: RequestMemory,
        stall: Duration,
    ) -> MeteredBody {
        MeteredBody {
            body,
            streams,
            admission: self.admission(),
            max_message: self.max_message,
            state: Metered::Prefix(Prefix::default()),
            pending: Bytes::new(),
            memory,
            stall,
            deadline: None,
        }
    }

    pub(super) fn admission(&self) -> Admission {
        Admission {
            large: PollSemaphore::new(self.large.clone()),
            small: PollSemaphore::new(self.small.clone()),
            large_total: self.large_total,
        }
    }

    /// Bytes of one message at most.
    pub(super) fn max_message(&self) -> usize {
        self.max_message
    }
}

/// A part of the budget.
pub(super) type Permit = OwnedSemaphorePermit;

/// One request's place in the queue for memory.
pub(super) struct Admission {
    large: PollSemaphore,
    small: PollSemaphore,
    large_total: u32,
}

impl Admission {
    /// Waits until a message of `length` bytes fits.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, length: usize) -> Poll<Option<Permit>> {
        match length {
            ..=SMALL_MESSAGE => self.small.poll_acquire_many(cx, units(length)),
            _ => self
                .large
                .poll_acquire_many(cx, units(length).min(self.large_total)),
        }
    }
}

/// Methods that take one message after another, however long that takes: between two of them a stream holds no memory, and may be silent.
const STREAMS: [&str; 2] = ["/Join", "/ServerReflectionInfo"];

/// Follows gRPC's framing (one byte for compression, four for the length, then the message) to know when the message begins.
struct MeteredBody {
    body: Body,
    /// More messages may come.
    streams: bool,
    admission: Admission,
    max_message: usize,
    state: Metered,
    /// Received, but not yet passed on: the message waits for memory.
    pending: Bytes,
    /// For the message that is being received or handled.
    memory: RequestMemory,
    /// How long a message may take from when it has begun.
    stall: Duration,
    deadline: Option<Pin<Box<Sleep>>>,
}

#[derive(Clone, Copy)]
enum Metered {
    /// Before or in a message's prefix.
    Prefix(Prefix),
    /// In the message, of which so many bytes are still to come. Of the only one: in it until the end.
    Message(usize),
}

/// What has come of the five bytes before a message.
#[derive(Clone, Copy, Default)]
pub(super) struct Prefix {
    bytes: [u8; 5],
    len: usize,
}

impl Prefix {
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes what is missing from `source`. Once complete: the compression flag and the message's length.
    pub(super) fn fill(&mut self, source: &mut impl Buf) -> Option<(u8, u32)> {
        let taken = source.remaining().min(self.bytes.len() - self.len);
        source.copy_to_slice(&mut self.bytes[self.len..self.len + taken]);
        self.len += taken;
        let [compressed, length @ ..] = self.bytes;
        (self.len == self.bytes.len()).then(|| (compressed, u32::from_be_bytes(length)))
    }
}

impl MeteredBody {
    /// Waits for the memory of a message that begins in `pending`. Returns how many bytes may be passed on: no more than to its end, if others may
    /// come after it.
    fn poll_admit(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
        let mut rest = &self.pending[..];
        let mut state = self.state;
        if let Metered::Prefix(prefix) = &mut state
            && let Some((_, length)) = prefix.fill(&mut rest)
        {
            let length = length as usize;
            // A message beyond the limit is refused by tonic as soon as it sees the prefix.
            let admitted = ready!(self.admission.poll(cx, length.min(self.max_message)));
            *self.memory.0.lock() = admitted;
            self.deadline = None;
            state = Metered::Message(length);
        }
        if let Metered::Message(left) = &mut state
            && self.streams
        {
            let taken = rest.len().min(*left);
            rest = &rest[taken..];
            *left -= taken;
            if *left == 0 {
                state = Metered::Prefix(Prefix::default());
            }
        } else {
            rest = &[];
        }
        self.state = state;
        if self.is_between() {
            self.deadline = None;
        } else {
            self.deadline
                .get_or_insert_with(|| Box::pin(tokio::time::sleep(self.stall)));
        }
        Poll::Ready(self.pending.len() - rest.len())
    }

    /// Whether no message has begun that is not passed on.
    fn is_between(&self) -> bool {
        matches!(&self.state, Metered::Prefix(prefix) if prefix.is_empty())
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
        if this.pending.is_empty() {
            if this.streams && this.is_between() {
                // Whoever asks for more is done with what came before.
                *this.memory.0.lock() = None;
            }
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
                        return Poll::Ready(Some(Err(stalled())));
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

#[cfg(test)]
mod tests {
    use futures::{FutureExt, future::poll_fn};
    use tokio::sync::mpsc;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    /// What a client sends, as it sends it.
    struct Sent(mpsc::UnboundedReceiver<Bytes>);

    impl HttpBody for Sent {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            self.0
                .poll_recv(cx)
                .map(|data| Some(Ok(Frame::data(data?))))
        }
    }

    struct Stream {
        client: mpsc::UnboundedSender<Bytes>,
        body: MeteredBody,
        budget: RequestBudget,
    }

    fn stream(streams: bool) -> Stream {
        let (client, sent) = mpsc::unbounded_channel();
        let budget = RequestBudget::new(1 << 20, 1 << 20);
        let memory = RequestMemory::default();
        let body = budget.metered(Body::new(Sent(sent)), streams, memory, SHORT);
        Stream {
            client,
            body,
            budget,
        }
    }

    impl Stream {
        fn send(&self, bytes: &[u8]) {
            self.client.send(Bytes::copy_from_slice(bytes)).unwrap();
        }

        /// How much the handler gets; nothing if it has to wait.
        async fn next(&mut self) -> Option<Result<usize, Status>> {
            let frame = poll_fn(|cx| Pin::new(&mut self.body).poll_frame(cx)).now_or_never()?;
            Some(frame.unwrap().map(|frame| frame.into_data().unwrap().len()))
        }

        fn held(&self) -> usize {
            units(SMALL_BUDGET) as usize - self.budget.small.available_permits()
        }
    }

    /// A message of 3 bytes.
    const MESSAGE: [u8; 8] = [0, 0, 0, 0, 3, 1, 2, 3];

    #[tokio::test]
    async fn a_stream_holds_memory_for_a_message_at_a_time_and_may_be_silent_in_between() {
        let mut stream = stream(true);
        // Two and a half in one piece.
        stream.send(&[&MESSAGE[..], &MESSAGE, &MESSAGE[..6]].concat());
        for held in [0, 1] {
            assert_eq!(stream.held(), held);
            assert_eq!(stream.next().await.unwrap().unwrap(), MESSAGE.len());
        }
        assert_eq!(stream.next().await.unwrap().unwrap(), 6);
        assert!(stream.next().await.is_none());
        assert_eq!(stream.held(), 1, "the third has begun");
        stream.send(&MESSAGE[6..]);
        assert_eq!(stream.next().await.unwrap().unwrap(), 2);
        assert!(stream.next().await.is_none());
        assert_eq!(stream.held(), 0, "nothing has begun");
        tokio::time::sleep(2 * SHORT).await;
        assert!(stream.next().await.is_none());
        stream.send(&MESSAGE[..6]);
        assert_eq!(stream.next().await.unwrap().unwrap(), 6);
        tokio::time::sleep(2 * SHORT).await;
        assert!(stream.next().await.unwrap().is_err(), "it was not finished");
        assert_eq!(stream.held(), 0);
    }

    #[tokio::test]
    async fn the_only_message_holds_its_memory_until_the_end_which_must_come_in_time() {
        let mut stream = stream(false);
        stream.send(&MESSAGE);
        assert_eq!(stream.next().await.unwrap().unwrap(), MESSAGE.len());
        assert!(stream.next().await.is_none());
        assert_eq!(stream.held(), 1);
        tokio::time::sleep(2 * SHORT).await;
        assert!(stream.next().await.unwrap().is_err());
        assert_eq!(stream.held(), 0);
    }
}
