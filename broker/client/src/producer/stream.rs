//! One produce stream to a broker. Opening it does not block: a broker that hangs takes connections and never answers, and
//! whoever sends must be able to turn away from it.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};
use millrace_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    Client,
    error::{Error, ErrorKind},
    transport::Transport,
};

type Answers = Streaming<v1::ProduceStreamResponse>;

pub(crate) struct Stream {
    requests: mpsc::Sender<v1::ProduceStreamRequest>,
    state: State,
}

enum State {
    Opening(BoxFuture<'static, Result<Answers, Error>>),
    Open(Box<Answers>),
}

impl Stream {
    /// Begins to open a stream with room for so many requests that the broker has not read. Nothing happens before `next`.
    pub(crate) fn open(
        client: &Client,
        address: &str,
        room: usize,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let mut service = client.transport().producer(&address.into())?;
        let (requests, body) = mpsc::channel(room);
        let address = address.to_owned();
        // The first request is on its way by then, for servers that answer nothing before they got one.
        let opening = async move {
            let call = service.produce_stream(ReceiverStream::new(body));
            Transport::call(&address, timeout, call).await
        };
        Ok(Stream {
            requests,
            state: State::Opening(opening.boxed()),
        })
    }

    /// Sends a request, for which there must be room. Fails if the stream is gone.
    pub(crate) fn send(
        &self,
        request: v1::ProduceStreamRequest,
        address: &str,
    ) -> Result<(), Error> {
        self.requests.try_send(request).map_err(|_| ended(address))
    }

    /// The next answer. Cancel safe.
    pub(crate) async fn next(&mut self, address: &str) -> Result<v1::ProduceStreamResponse, Error> {
        loop {
            match &mut self.state {
                State::Opening(opening) => self.state = State::Open(Box::new(opening.await?)),
                State::Open(answers) => {
                    let next = answers.message().await;
                    let next = next.map_err(|status| Error::from_status(&status, address))?;
                    return next.ok_or_else(|| ended(address));
                }
            }
        }
    }
}

fn ended(address: &str) -> Error {
    Error::new(
        ErrorKind::Transport,
        format!("broker {address} ended the produce stream"),
    )
}
