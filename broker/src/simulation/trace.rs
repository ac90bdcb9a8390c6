//! What happened, for people; and a number that is the same if the same happened.

use std::hash::{DefaultHasher, Hash, Hasher};

#[derive(Debug, Default)]
pub(super) struct Trace {
    /// Otherwise only the number is.
    pub(super) is_kept: bool,
    lines: Vec<String>,
    hasher: DefaultHasher,
}

impl Trace {
    pub(super) fn line(&mut self, at: u64, line: impl FnOnce() -> String) {
        if self.is_kept {
            self.lines.push(format!("{at:>7} {}", line()));
        }
    }

    pub(super) fn hash(&mut self, what: impl Hash) {
        what.hash(&mut self.hasher);
    }

    pub(super) fn number(&self) -> u64 {
        self.hasher.finish()
    }

    pub(super) fn lines(&self) -> &[String] {
        &self.lines
    }
}
