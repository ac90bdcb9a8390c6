//! Free space on the store's volume, and whether writes to it work. Writes stop while space is scarce, so that the store keeps room
//! for its own housekeeping, and for a moment after one has failed.

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
    used_bytes: AtomicU64,
    /// Forgotten once it is a while ago and space is enough.
    failed_write: Mutex<Option<FailedWrite>>,
}

#[derive(Debug)]
struct FailedWrite {
    at: Instant,
    /// `None`: there was no space.
    cause: Option<StorageError>,
}

/// Whether writes are accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskState {
    /// There is room.
    Enough,
    /// There is not; reads go on.
    Full,
    /// A write has just failed for another reason; reads go on.
    Failing,
}

impl DiskSpace {
    pub(super) fn new(path: &Path, required_bytes: u64) -> Self {
        let disk = DiskSpace {
            path: path.to_owned(),
            required_bytes,
            free_bytes: AtomicU64::new(u64::MAX),
            total_bytes: AtomicU64::new(0),
            used_bytes: AtomicU64::new(0),
            failed_write: Mutex::new(None),
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
            let used = volume.f_blocks.saturating_sub(volume.f_bfree);
            self.used_bytes
                .store(used.saturating_mul(volume.f_frsize), Ordering::Relaxed);
            if self.has_room() {
                self.failed_write
                    .lock()
                    .take_if(|failed| failed.at.elapsed() >= PAUSE);
            }
        }
        (before, self.state())
    }

    /// Whether the volume has room, whatever writes have met.
    pub(super) fn has_room(&self) -> bool {
        self.free_bytes() >= self.required_bytes
    }

    /// Refuses writes for a moment, since one has failed. Returns what to tell those who wrote.
    pub(super) fn note_write_failure(&self, error: &StorageError) -> StorageError {
        let cause = self.cause(error);
        let other = (!matches!(cause, StorageError::DiskFull { .. })).then(|| cause.clone());
        *self.failed_write.lock() = Some(FailedWrite {
            at: Instant::now(),
            cause: other,
        });
        cause
    }

    /// What a failed write is to be called: a full disk if the error or the volume says so, else the error itself.
    pub(super) fn cause(&self, error: &StorageError) -> StorageError {
        self.look();
        if error.is_lack_of_space() || !self.has_room() {
            self.full()
        } else {
            error.clone()
        }
    }

    fn full(&self) -> StorageError {
        StorageError::DiskFull {
            free_bytes: self.free_bytes(),
            required_bytes: self.required_bytes,
        }
    }

    /// Whether writes are accepted.
    pub fn state(&self) -> DiskState {
        match self.check() {
            Ok(()) => DiskState::Enough,
            Err(StorageError::DiskFull { .. }) => DiskState::Full,
            Err(_) => DiskState::Failing,
        }
    }

    /// An error while writes are refused.
    pub fn check(&self) -> Result<(), StorageError> {
        if !self.has_room() {
            return Err(self.full());
        }
        match &*self.failed_write.lock() {
            None => Ok(()),
            Some(FailedWrite { cause: None, .. }) => Err(self.full()),
            Some(FailedWrite {
                cause: Some(error), ..
            }) => Err(error.clone()),
        }
    }

    /// Bytes free at the last look.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes.load(Ordering::Relaxed)
    }

    /// Bytes used at the last look. Some file systems keep bytes for root that are neither used nor free.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Bytes that must be free for writes.
    pub fn required_bytes(&self) -> u64 {
        self.required_bytes
    }

    /// Bytes of the volume.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rocks(text: &str) -> StorageError {
        StorageError::Rocks(text.to_owned())
    }

    #[test]
    fn a_failed_write_is_called_a_full_disk_only_if_space_is_lacking() {
        let dir = tempfile::tempdir().unwrap();
        let full = "IO error: No space left on device: While appending to file: 000004.log";
        let quota = "IO error: While appending to file: 000004.log: Disk quota exceeded";
        let broken = "IO error: While appending to file: 000004.log: Input/output error";
        for (required, text, state) in [
            (0, full, DiskState::Full),
            (0, quota, DiskState::Full),
            (0, broken, DiskState::Failing),
            (u64::MAX, broken, DiskState::Full),
        ] {
            let disk = DiskSpace::new(dir.path(), required);
            let told = disk.note_write_failure(&rocks(text));
            assert_eq!(disk.state(), state, "{text}");
            assert_eq!(told.to_string(), disk.check().unwrap_err().to_string());
            let words = match state {
                DiskState::Failing => broken,
                _ => "the disk is full",
            };
            assert!(told.to_string().contains(words), "{told}");
        }
    }

    #[test]
    fn writes_are_tried_again_after_a_pause() {
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskSpace::new(dir.path(), 0);
        disk.note_write_failure(&rocks("IO error: Input/output error"));
        assert_eq!(disk.look(), (DiskState::Failing, DiskState::Failing));
        let failed = disk.failed_write.lock().take();
        *disk.failed_write.lock() = failed.map(|failed| FailedWrite {
            at: failed.at.checked_sub(PAUSE).unwrap(),
            ..failed
        });
        assert_eq!(disk.look(), (DiskState::Failing, DiskState::Enough));
        assert!(disk.check().is_ok());
    }
}
