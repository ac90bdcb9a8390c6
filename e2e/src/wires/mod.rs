//! A network that can be broken, in user space: TCP proxies in front of brokers and API server, each of which passes bytes on as the links between
//! the two ends allow.
//!
//! A link has a direction: what travels from one [`Node`] to another. A connection uses two of them, whichever side opened it, so that one-way cuts
//! are as they are in a real network. Everybody is told the same address of a broker; who has connected is found out by which process owns
//! the other end of the socket. So no broker needs to know of any of this.
//!
//! A cut is a cable pulled out, not a connection closed: nothing arrives, nothing is refused, and what was sent comes late if the cable is put
//! back. New connections are taken and then silent, as with a peer that hangs. What is not cut but dead refuses, as without a proxy.

mod front;
mod node;
mod pump;

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

pub use node::Node;

use crate::ports::free_port;
use front::Front;
use node::Processes;

/// How a link is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Nothing gets through.
    pub cut: bool,
    /// Everything arrives this much later.
    pub delay: Duration,
    /// No more than so many bytes a second.
    pub bytes_per_second: Option<u64>,
    /// Connections that use it are reset each time that this changes.
    pub resets: u64,
}

type Links = Mutex<HashMap<(Node, Node), watch::Sender<Link>>>;

/// All links and proxies. Dropping it ends them and their connections.
#[derive(Default)]
pub struct Wires {
    links: Arc<Links>,
    processes: Arc<Processes>,
    proxies: Mutex<JoinSet<()>>,
}

impl Wires {
    /// A proxy in front of what `node` listens on at `target`. Where to reach it: refused while nothing listens there.
    pub fn front(&self, node: Node, target: SocketAddr) -> SocketAddr {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()));
        let front = Front {
            links: self.links.clone(),
            processes: self.processes.clone(),
            node,
            address,
            target,
            ended: Arc::default(),
        };
        let mut proxies = self.proxies.lock().unwrap_or_else(PoisonError::into_inner);
        proxies.spawn(front.run());
        address
    }

    /// Says that a process is that node's from now on.
    pub fn claim(&self, pid: i32, node: Node) {
        self.processes.claim(pid, node);
    }

    /// Changes the link from one node to another.
    pub fn set(&self, from: Node, to: Node, change: impl FnOnce(&mut Link)) {
        sender(&self.links, from, to).send_modify(change);
    }

    /// Changes both links between two nodes.
    pub fn between(&self, one: Node, other: Node, change: impl Fn(&mut Link)) {
        self.set(one, other, &change);
        self.set(other, one, &change);
    }

    /// Cuts a node off from others, both ways.
    pub fn cut(&self, node: Node, others: impl IntoIterator<Item = Node>) {
        for other in others {
            self.between(node, other, |link| link.cut = true);
        }
    }

    /// Mends all links. Connections are as they were.
    pub fn heal(&self) {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        for link in links.values() {
            link.send_modify(|link| {
                *link = Link {
                    resets: link.resets,
                    ..Link::default()
                }
            });
        }
    }
}

fn sender(links: &Links, from: Node, to: Node) -> watch::Sender<Link> {
    let mut links = links.lock().unwrap_or_else(PoisonError::into_inner);
    links.entry((from, to)).or_default().clone()
}

#[cfg(test)]
mod tests;
