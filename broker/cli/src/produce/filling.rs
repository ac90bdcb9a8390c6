//! A buffer that reads fill from behind and whole records leave at the front, without copies.

use bytes::{Bytes, BytesMut};

/// The bytes held, and initialised room behind them for the next read.
#[derive(Debug, Default)]
pub(super) struct Filling {
    buffer: BytesMut,
    held: usize,
}

impl Filling {
    /// Ensures room for a read of at least `min` bytes. A new buffer has room for `chunk` bytes, or twice what is held if
    /// that is more, so that a large record is moved few times.
    pub(super) fn make_room(&mut self, min: usize, chunk: usize) {
        if self.buffer.len() - self.held >= min {
            return;
        }
        let mut larger = BytesMut::zeroed(chunk.max(self.held * 2));
        larger[..self.held].copy_from_slice(self.held());
        self.buffer = larger;
    }

    /// Where the next read goes.
    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.buffer[self.held..]
    }

    /// Takes note that a read put `count` bytes into the room.
    pub(super) fn filled(&mut self, count: usize) {
        self.held = self.buffer.len().min(self.held + count);
    }

    /// What was read and not taken.
    pub(super) fn held(&self) -> &[u8] {
        &self.buffer[..self.held]
    }

    /// Takes the first `count` bytes, at most those held.
    pub(super) fn take(&mut self, count: usize) -> Bytes {
        let count = count.min(self.held);
        self.held -= count;
        self.buffer.split_to(count).freeze()
    }
}
