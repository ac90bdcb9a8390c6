//! The other brokers as this one knows them: whether they are alive, and when they were last heard of.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::replication::Peer;

/// All of them. What makes one gone or not also wakes those who [watch](Peers::changed).
#[derive(Debug, Default)]
pub struct Peers {
    peers: Mutex<BTreeMap<i32, Known>>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Known {
    /// Its process as its session says, and whether that stays.
    session: Option<(i32, bool)>,
    /// Since when that process is known.
    since: Option<Instant>,
    heard: Option<Instant>,
    /// The process that was seen to be gone: nothing listens at its address any more.
    refused: Option<i32>,
}

impl Known {
    /// Whether it is there, and stays.
    fn lives(&self) -> bool {
        self.session.is_some_and(|(epoch, stays)| {
            stays && self.refused.is_none_or(|refused| refused < epoch)
        })
    }
}

impl Peers {
    /// The brokers with a session: of each the broker epoch, and whether it is about to stop.
    pub fn set_sessions(&self, sessions: &BTreeMap<i32, (i32, bool)>, now: Instant) {
        let mut peers = self.peers.lock();
        for (id, known) in peers.iter_mut() {
            if !sessions.contains_key(id) {
                known.session = None;
            }
        }
        for (id, (epoch, draining)) in sessions {
            let known = peers.entry(*id).or_default();
            if known.session.is_none_or(|(known, _)| known != *epoch) {
                known.since = Some(now);
            }
            known.session = Some((*epoch, !draining));
        }
        drop(peers);
        self.changed.notify_waiters();
    }

    /// A follower was heard of.
    pub fn heard(&self, id: i32, now: Instant) {
        self.peers.lock().entry(id).or_default().heard = Some(now);
    }

    /// Nothing listens at the address of that process any more.
    pub fn refused(&self, id: i32, epoch: i32) {
        let mut peers = self.peers.lock();
        let known = peers.entry(id).or_default();
        let is_new = known.refused != Some(epoch);
        known.refused = Some(epoch);
        drop(peers);
        if is_new {
            self.changed.notify_waiters();
        }
    }

    /// The broker was reached.
    pub fn reached(&self, id: i32) {
        let mut peers = self.peers.lock();
        let was_refused = peers.entry(id).or_default().refused.take().is_some();
        drop(peers);
        if was_refused {
            self.changed.notify_waiters();
        }
    }

    /// Whether the process was seen to be gone.
    pub fn is_refused(&self, id: i32, epoch: i32) -> bool {
        let peers = self.peers.lock();
        peers.get(&id).is_some_and(|k| k.refused == Some(epoch))
    }

    /// What is known of a broker.
    pub fn get(&self, id: i32) -> Peer {
        let peers = self.peers.lock();
        let Some(known) = peers.get(&id) else {
            return Peer {
                heard: None,
                gone: true,
            };
        };
        Peer {
            heard: known.heard,
            gone: !known.lives(),
        }
    }

    /// Whether no other broker was heard of as a follower of this one for that long, though two or more of them have live sessions. Not
    /// all of them can be cut off at once so easily as this one.
    pub fn is_isolated(&self, me: i32, silence: Duration, now: Instant) -> bool {
        let peers = self.peers.lock();
        let others = peers.iter().filter(|(id, _)| **id != me);
        let live: Vec<&Known> = others
            .map(|(_, known)| known)
            .filter(|known| known.lives())
            .collect();
        let is_silent = |known: &&Known| {
            let last = known.heard.max(known.since);
            last.is_some_and(|last| now.saturating_duration_since(last) > silence)
        };
        live.len() >= 2 && live.iter().all(is_silent)
    }

    /// Waits until a broker went or came.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broker_is_gone_without_a_session_or_listener_or_when_it_is_about_to_stop() {
        let peers = Peers::default();
        assert!(peers.get(1).gone, "unknown");
        peers.set_sessions(&[(1, (4, false)), (2, (1, true))].into(), Instant::now());
        assert!(!peers.get(1).gone);
        assert!(peers.get(2).gone, "draining");
        peers.refused(1, 3);
        assert!(!peers.get(1).gone, "that was an earlier process");
        peers.refused(1, 4);
        assert!(peers.get(1).gone && peers.is_refused(1, 4));
        peers.reached(1);
        assert!(!peers.get(1).gone);
        peers.refused(1, 4);
        peers.set_sessions(&[(1, (5, false))].into(), Instant::now());
        assert!(!peers.get(1).gone, "another process");
        peers.set_sessions(&BTreeMap::new(), Instant::now());
        assert!(peers.get(1).gone);
        assert!(peers.get(1).heard.is_none());
        peers.heard(1, Instant::now());
        assert!(peers.get(1).heard.is_some());
    }

    #[test]
    fn a_broker_that_no_one_else_is_heard_of_at_is_isolated_if_there_are_others() {
        let peers = Peers::default();
        let silence = Duration::from_secs(3);
        let isolated = |after| peers.is_isolated(0, silence, Instant::now() + after);
        assert!(!isolated(2 * silence), "alone");
        peers.set_sessions(&[(0, (1, false)), (1, (1, false))].into(), Instant::now());
        assert!(!isolated(2 * silence), "the other one may be cut off");
        peers.set_sessions(
            &[(0, (1, false)), (1, (1, false)), (2, (1, false))].into(),
            Instant::now(),
        );
        assert!(!isolated(silence / 2), "they are new");
        assert!(isolated(2 * silence));
        peers.heard(2, Instant::now());
        assert!(!isolated(silence / 2) && isolated(2 * silence));
        peers.refused(2, 1);
        assert!(!isolated(2 * silence), "one of them is gone");
    }
}
