//! One proxy: it listens while its target does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::node::{Node, Processes};
use super::{Links, pump, sender};

/// How often to look whether the target listens again.
const LOOK: Duration = Duration::from_millis(10);

/// A proxy.
#[derive(Clone)]
pub(super) struct Front {
    pub(super) links: Arc<Links>,
    pub(super) processes: Arc<Processes>,
    pub(super) node: Node,
    pub(super) address: SocketAddr,
    pub(super) target: SocketAddr,
    /// A connection's end at the target: it may have been the target's.
    pub(super) ended: Arc<Notify>,
}

impl Front {
    /// Runs until it is dropped, with all its connections.
    pub(super) async fn run(self) {
        let mut connections = JoinSet::new();
        loop {
            while !self.target_listens().await {
                tokio::time::sleep(LOOK).await;
            }
            // Fails while the port is taken by a connection that went out from it; the next look tries again.
            let Ok(listener) = TcpListener::bind(self.address).await else {
                tokio::time::sleep(LOOK).await;
                continue;
            };
            self.take(&listener, &mut connections).await;
        }
    }

    /// Takes connections until nothing listens at the target any more.
    async fn take(&self, listener: &TcpListener, connections: &mut JoinSet<()>) {
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((near, from)) => {
                        connections.spawn(self.clone().connection(near, from));
                    }
                    // No descriptors are left; that passes.
                    Err(_) => tokio::time::sleep(LOOK).await,
                },
                Some(_) = connections.join_next() => {}
                () = self.ended.notified() => {
                    if !self.target_listens().await {
                        return;
                    }
                }
            }
        }
    }

    async fn target_listens(&self) -> bool {
        TcpStream::connect(self.target).await.is_ok()
    }

    /// One connection, from its opening to its end.
    async fn connection(self, near: TcpStream, from: SocketAddr) {
        let peer = self.processes.owner(from, self.address);
        let there = sender(&self.links, peer, self.node).subscribe();
        let back = sender(&self.links, self.node, peer).subscribe();
        // Its first bytes have to get through, and the answer to them.
        pump::passable(&mut there.clone()).await;
        pump::passable(&mut back.clone()).await;
        match TcpStream::connect(self.target).await {
            Ok(far) => pump::both(near, far, there, back, &self.ended).await,
            Err(_) => {
                pump::reset(&near);
                self.ended.notify_one();
            }
        }
    }
}
