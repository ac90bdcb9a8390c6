//! What a follower does in a session with its leader: when it says where its log ends, and which of the leader's answers still count.

use std::time::{Duration, Instant};

use super::{Follower, Position};

/// A leader that does not lead yet is asked again after this, then after twice as long, up to the most.
const MIN_RETRY: Duration = Duration::from_millis(10);
const MAX_RETRY: Duration = Duration::from_millis(500);

/// A partition that is followed, in one session.
#[derive(Clone, Debug)]
pub struct Following {
    follower: Follower,
    /// The offset that comes next, once all that was handed to the log is appended.
    next: i64,
    /// Appends that are not answered yet.
    appending: usize,
    /// The leader's high watermark.
    high_watermark: i64,
    state: State,
    retry: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Its position was sent, and nothing has come of it yet.
    Asked,
    /// The leader sends what comes next.
    Following,
    /// It cuts off, or drops, what it has and the leader has not.
    Cutting,
    /// Its position is to be sent again, from then on, when nothing is being appended.
    Again(Instant),
    /// It can't follow: a person has to see to it, or it is being made something else.
    Stopped,
}

/// Batches that do not come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotNext {
    /// What would.
    pub expected: i64,
}

impl Following {
    /// Whose position is to be sent at once.
    pub fn new(follower: Follower, now: Instant) -> Self {
        Self {
            follower,
            next: 0,
            appending: 0,
            high_watermark: 0,
            state: State::Again(now),
            retry: MIN_RETRY,
        }
    }

    /// Whom it follows, in which epoch.
    pub fn follower(&self) -> &Follower {
        &self.follower
    }

    /// The leader's high watermark, as far as it was told.
    pub fn high_watermark(&self) -> i64 {
        self.high_watermark
    }

    /// When its position is to be sent, if it is and nothing is being appended.
    pub fn due(&self) -> Option<Instant> {
        match self.state {
            State::Again(at) if self.appending == 0 => Some(at),
            _ => None,
        }
    }

    /// Its position was sent; `None` if it follows no more.
    pub fn on_sent(&mut self, position: Option<&Position>) {
        match position {
            Some(position) => {
                self.next = position.log_end;
                self.state = State::Asked;
            }
            None => self.state = State::Stopped,
        }
    }

    /// Whether what the leader says counts. Otherwise it has been given up, or is to be asked for anew.
    pub fn is_awaiting(&self) -> bool {
        matches!(self.state, State::Asked | State::Following)
    }

    /// Whether it has not been given up, nor waits to be asked for anew.
    pub fn is_busy(&self) -> bool {
        !matches!(self.state, State::Again(_) | State::Stopped)
    }

    /// The leader sends what comes next, and how far all is committed.
    pub fn on_data(&mut self, high_watermark: i64) {
        self.state = State::Following;
        self.high_watermark = self.high_watermark.max(high_watermark);
    }

    /// Batches from `first` up to `end` are about to be appended.
    pub fn takes(&mut self, first: i64, end: i64) -> Result<(), NotNext> {
        if first != self.next {
            return Err(NotNext {
                expected: self.next,
            });
        }
        self.next = end;
        self.appending += 1;
        Ok(())
    }

    /// An append was answered.
    pub fn on_appended(&mut self) {
        self.appending -= 1;
        self.retry = MIN_RETRY;
    }

    /// An append failed.
    pub fn on_not_appended(&mut self, now: Instant) {
        self.appending -= 1;
        self.on_failure(now);
    }

    /// The leader does not lead in this epoch, or not yet.
    pub fn on_not_leading(&mut self, now: Instant) {
        self.state = State::Again(now + self.retry);
        self.retry = (self.retry * 2).min(MAX_RETRY);
    }

    /// The leader refuses the position. Whether the log is to be put right for that: not if something was appended since. It was another
    /// position then, and the answer to the present one may be another.
    pub fn heeds_refusal(&mut self, now: Instant) -> bool {
        let was_asked = self.state == State::Asked || broken!(BeginAnewAnytime);
        self.state = match was_asked {
            true => State::Cutting,
            false => State::Again(now),
        };
        was_asked
    }

    /// The log was put right.
    pub fn on_cut(&mut self, now: Instant) {
        self.state = State::Again(now);
    }

    /// What was to be done failed: to be tried again after a pause.
    pub fn on_failure(&mut self, now: Instant) {
        self.retry = MAX_RETRY;
        self.on_not_leading(now);
    }

    /// The log can't be put right.
    pub fn stop(&mut self) {
        self.state = State::Stopped;
    }

    /// Whether it was given up.
    #[cfg(test)]
    pub(crate) fn is_stopped(&self) -> bool {
        self.state == State::Stopped
    }
}
