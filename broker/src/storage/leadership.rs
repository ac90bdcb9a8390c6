//! What this broker is to a partition, and in which epoch: one word, since the writer compares it for every append.

use std::sync::atomic::{AtomicI64, Ordering};

use super::StorageError;

/// Beyond every epoch.
const NEITHER: i64 = i64::MIN;
const DELETED: i64 = i64::MAX;
/// Added to the epoch in which the partition is followed.
const FOLLOWED: i64 = 1 << 40;

/// Led in an epoch, followed in an epoch, neither, or deleted; the last for good.
#[derive(Debug)]
pub(super) struct Leadership(AtomicI64);

impl Leadership {
    pub(super) fn new(epoch: Option<i32>) -> Self {
        Leadership(AtomicI64::new(epoch.map_or(NEITHER, i64::from)))
    }

    /// The epoch in which the partition is led, if it is.
    pub(super) fn epoch(&self) -> Option<i32> {
        i32::try_from(self.0.load(Ordering::Acquire)).ok()
    }

    pub(super) fn lead(&self, epoch: i32) -> Result<(), StorageError> {
        self.change(epoch.into())
    }

    pub(super) fn follow(&self, epoch: i32) -> Result<(), StorageError> {
        self.change(FOLLOWED + i64::from(epoch))
    }

    /// What is deleted is neither led nor followed anyway.
    pub(super) fn resign(&self) {
        let _ = self.change(NEITHER);
    }

    pub(super) fn delete(&self) {
        self.0.store(DELETED, Ordering::Release);
    }

    /// An error if the partition is deleted.
    pub(super) fn check_held(&self) -> Result<(), StorageError> {
        match self.0.load(Ordering::Acquire) {
            DELETED => Err(StorageError::Deleted),
            _ => Ok(()),
        }
    }

    /// An error unless the partition is led in exactly this epoch.
    pub(super) fn check_led_in(&self, epoch: i32) -> Result<(), StorageError> {
        self.check(epoch.into(), epoch)
    }

    /// An error unless the partition is followed in exactly this epoch.
    pub(super) fn check_followed_in(&self, epoch: i32) -> Result<(), StorageError> {
        self.check(FOLLOWED + i64::from(epoch), epoch)
    }

    fn check(&self, wanted: i64, epoch: i32) -> Result<(), StorageError> {
        let now = self.0.load(Ordering::Acquire);
        if now == wanted {
            return Ok(());
        }
        Err(match i32::try_from(now) {
            Ok(current) => StorageError::FencedLeader { epoch, current },
            Err(_) if now == DELETED => StorageError::Deleted,
            Err(_) => StorageError::NotLed,
        })
    }

    fn change(&self, to: i64) -> Result<(), StorageError> {
        let unless_deleted = |now| (now != DELETED).then_some(to);
        match self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, unless_deleted)
        {
            Ok(_) => Ok(()),
            Err(_) => Err(StorageError::Deleted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_append_passes_in_exactly_the_epoch_in_which_the_partition_is_led() {
        let leadership = Leadership::new(None);
        assert!(matches!(
            leadership.check_led_in(0),
            Err(StorageError::NotLed)
        ));
        for epoch in [0, 7, i32::MAX, i32::MIN] {
            leadership.lead(epoch).unwrap();
            assert_eq!(leadership.epoch(), Some(epoch));
            assert!(leadership.check_led_in(epoch).is_ok());
            for other in [epoch.wrapping_sub(1), epoch.wrapping_add(1)] {
                assert!(matches!(
                    leadership.check_led_in(other),
                    Err(StorageError::FencedLeader { epoch, current })
                        if (epoch, Some(current)) == (other, leadership.epoch())
                ));
            }
        }
        leadership.follow(7).unwrap();
        assert_eq!(leadership.epoch(), None);
        assert!(leadership.check_followed_in(7).is_ok());
        for refused in [leadership.check_followed_in(8), leadership.check_led_in(7)] {
            assert!(matches!(refused, Err(StorageError::NotLed)));
        }
        leadership.resign();
        assert_eq!(leadership.epoch(), None);
        assert!(leadership.check_followed_in(7).is_err());
        assert!(matches!(
            leadership.check_led_in(7),
            Err(StorageError::NotLed)
        ));
    }

    #[test]
    fn a_deleted_partition_is_never_led_again() {
        let leadership = Leadership::new(Some(3));
        leadership.delete();
        assert!(matches!(leadership.lead(4), Err(StorageError::Deleted)));
        leadership.resign();
        assert_eq!(leadership.epoch(), None);
        for error in [leadership.check_led_in(3), leadership.check_held()] {
            assert!(matches!(error, Err(StorageError::Deleted)));
        }
    }
}
