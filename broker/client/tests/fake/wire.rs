//! The wire to a fake broker, which can be cut, or silent as to a process that is stopped.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::{JoinHandle, JoinSet},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Up,
    /// Connections open and stay open, and nothing passes until it is up again.
    Hung,
    /// Connections are refused, and those that there were are closed.
    Dead,
}

pub struct Wire {
    pub address: SocketAddr,
    mode: watch::Sender<Mode>,
    task: JoinHandle<()>,
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Wire {
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (mode, seen) = watch::channel(Mode::Up);
        let task = tokio::spawn(run(listener, address, target, seen));
        Wire {
            address,
            mode,
            task,
        }
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn run(
    first: TcpListener,
    address: SocketAddr,
    target: SocketAddr,
    mut mode: watch::Receiver<Mode>,
) {
    let mut first = Some(first);
    loop {
        let listener = match first.take() {
            Some(listener) => listener,
            None => TcpListener::bind(address).await.unwrap(),
        };
        let mut connections = JoinSet::new();
        let mut dying = mode.clone();
        loop {
            tokio::select! {
                _ = dying.wait_for(|mode| *mode == Mode::Dead) => break,
                accepted = listener.accept() => {
                    let (client, _) = accepted.unwrap();
                    client.set_nodelay(true).unwrap();
                    connections.spawn(connect(client, target, mode.clone()));
                }
            }
        }
        drop((listener, connections));
        if mode.wait_for(|mode| *mode != Mode::Dead).await.is_err() {
            return;
        }
    }
}

async fn connect(client: TcpStream, target: SocketAddr, mode: watch::Receiver<Mode>) {
    let broker = TcpStream::connect(target).await.unwrap();
    broker.set_nodelay(true).unwrap();
    let (from_client, to_client) = client.into_split();
    let (from_broker, to_broker) = broker.into_split();
    tokio::select! {
        _ = pump(from_client, to_broker, mode.clone()) => {}
        _ = pump(from_broker, to_client, mode) => {}
    }
}

async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut mode: watch::Receiver<Mode>,
) -> Option<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await.ok().filter(|read| *read > 0)?;
        mode.wait_for(|mode| *mode == Mode::Up).await.ok()?;
        to.write_all(&buffer[..read]).await.ok()?;
    }
}
