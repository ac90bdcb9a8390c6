//! Free space on the store's volume. Writes stop while it is scarce, so that the store keeps room for its own housekeeping.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::StorageError;

/// No write is tried for this long after one has failed. RocksDB recovers by itself once there is room, but only in a moment when
/// none of its flushes runs, and each failed write leads to one; they give up after a second.
const PAUSE: Duration = Duration::from_secs(2);

/// What the volume had at the last look.
#[derive(Debug)]
pub struct DiskSpace {
    path: PathBuf,
    required_bytes: u64,
    free_bytes: AtomicU64,
    total_bytes: AtomicU64,
    /// When a write met a full disk; forgotten once it is a while ago and space is enough.
    write_failed: Mutex<Option<Instant>>,
}

/// Whether writes are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskState {
    /// There is room.
    Enough,
    /// There is not; reads go on.
    Full,
}

impl DiskSpace {
    pub(super) fn new(path: &Path, required_bytes: u64) -> Self {
        let disk = DiskSpace {
            path: path.to_owned(),
            required_bytes,
            free_bytes: AtomicU64::new(u64::MAX),
            total_bytes: AtomicU64::new(0),
            write_failed: Mutex::new(None),
        };
        disk.look();
        disk
    }

    /// Asks the operating system again. Returns the state before and after.
    pub(super) fn look(&self) -> (DiskState, DiskState) {
        let before = self.state();
        // A volume that can't be asked is left to fail on write, where the error is exact.
        if let Ok(volume) = rustix::fs::statvfs(&self.path) {
            self.free_bytes.store(
                volume.f_bavail.saturating_mul(volume.f_frsize),
                Ordering::Relaxed,
            );
            self.total_bytes.store(
                volume.f_blocks.saturating_mul(volume.f_frsize),
                Ordering::Relaxed,
            );
            if self.has_room() {
                self.write_failed
                    .lock()
                    .take_if(|failed| failed.elapsed() >= PAUSE);
            }
        }
        (before, self.state())
    }

    /// Whether the volume has room, whatever writes have met.
    pub(super) fn has_room(&self) -> bool {
        self.free_bytes() >= self.required_bytes
    }

    /// A write failed, in all likelihood for lack of space, whatever the last look said.
    pub(super) fn note_write_failure(&self) {
        *self.write_failed.lock() = Some(Instant::now());
    }

    /// Whether writes are accepted.
    pub fn state(&self) -> DiskState {
        let full = self.write_failed.lock().is_some() || !self.has_room();
        if full {
            DiskState::Full
        } else {
            DiskState::Enough
        }
    }

    /// An error while writes are refused.
    pub fn check(&self) -> Result<(), StorageError> {
        match self.state() {
            DiskState::Enough => Ok(()),
            DiskState::Full => Err(StorageError::DiskFull {
                free_bytes: self.free_bytes(),
                required_bytes: self.required_bytes,
            }),
        }
    }

    /// Bytes free at the last look.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of the volume.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }
}
