//! Who is at the other end of a connection.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};

use procfs::process::{FDTarget, Process};

/// An end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Node {
    /// A broker.
    Broker(i32),
    /// The API server.
    Api,
    /// Whoever is none of the others.
    Client,
}

/// Which process is which node.
#[derive(Default)]
pub(super) struct Processes(Mutex<HashMap<i32, Node>>);

impl Processes {
    pub(super) fn claim(&self, pid: i32, node: Node) {
        let mut processes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A broker has one process, and its former one has none of its sockets any more.
        processes.retain(|_, other| *other != node);
        processes.insert(pid, node);
    }

    /// Whose socket has the local address `from` and the remote one `to`. What can't be found is a client's.
    pub(super) fn owner(&self, from: SocketAddr, to: SocketAddr) -> Node {
        let Some(inode) = inode(from, to) else {
            return Node::Client;
        };
        let processes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let owns = |pid: &i32| {
            let files = Process::new(*pid).and_then(|process| process.fd());
            files.is_ok_and(|files| {
                files
                    .flatten()
                    .any(|file| matches!(file.target, FDTarget::Socket(found) if found == inode))
            })
        };
        let found = processes.iter().find(|(pid, _)| owns(pid));
        found.map_or(Node::Client, |(_, node)| *node)
    }
}

fn inode(from: SocketAddr, to: SocketAddr) -> Option<u64> {
    // A JVM's sockets are IPv6 ones, whoever they talk to.
    let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    let sockets = procfs::net::tcp().into_iter().chain(procfs::net::tcp6());
    sockets
        .flatten()
        .find(|socket| plain(socket.local_address) == from && plain(socket.remote_address) == to)
        .map(|socket| socket.inode)
}
