//! Connections: how many there may be, and how one is closed whose peer has stopped reading.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures::{Stream, stream, task::AtomicWaker};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tonic::transport::server::Connected;
use tracing::{debug, warn};

use crate::observe::{ConnectionGauge, Metrics};

/// What a request knows of the connection that it came by.
#[derive(Clone, Debug)]
pub(super) struct ConnectionInfo {
    pub(super) peer: SocketAddr,
    closed: Arc<CloseFlag>,
}

#[derive(Debug, Default)]
struct CloseFlag {
    closed: AtomicBool,
    reader: AtomicWaker,
}

impl ConnectionInfo {
    /// Ends the connection, with all requests on it.
    pub(super) fn close(&self) {
        self.closed.closed.store(true, Ordering::Release);
        self.closed.reader.wake();
    }
}

/// A client's connection.
pub(super) struct Connection {
    io: TcpStream,
    info: ConnectionInfo,
    _slot: OwnedSemaphorePermit,
    _gauge: ConnectionGauge,
}

/// Accepts connections. One too many is closed at once, which its client sees, rather than left waiting.
pub(super) fn accept(
    listener: TcpListener,
    max_connections: usize,
    metrics: Arc<Metrics>,
) -> impl Stream<Item = io::Result<Connection>> {
    let slots = Arc::new(Semaphore::new(max_connections));
    stream::unfold(
        (listener, slots, metrics),
        move |(listener, slots, metrics)| async move {
            loop {
                let (io, peer) = match listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of file descriptors, or a peer that was gone already: others are still served.
                        warn!(%error, "a connection could not be accepted");
                        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                        continue;
                    }
                };
                let Ok(slot) = slots.clone().try_acquire_owned() else {
                    metrics.connection_refused();
                    warn!(%peer, max_connections, "refused a connection: there are too many; raise --max-connections");
                    continue;
                };
                if let Err(error) = io.set_nodelay(true) {
                    debug!(%peer, %error, "TCP_NODELAY could not be set");
                }
                let info = ConnectionInfo {
                    peer,
                    closed: Arc::default(),
                };
                let connection = Connection {
                    io,
                    info,
                    _slot: slot,
                    _gauge: metrics.connection(),
                };
                return Some((Ok(connection), (listener, slots, metrics)));
            }
        },
    )
}

impl Connected for Connection {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        self.info.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let flag = &self.info.closed;
        flag.reader.register(cx.waker());
        if flag.closed.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}
