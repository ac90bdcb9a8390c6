//! Whether this process is controller, as follows from the controller's Lease.

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Office {
    /// To be controller in that epoch from now on.
    Take(i32),
    /// To be it no longer.
    Leave,
    /// What it was.
    AsBefore,
}

/// What follows for a process that is controller in epoch `known`, or is not, if the Lease says that it is in epoch `held`, or is not. One that is
/// controller anew, and saw nothing of who was in between, must not renew the Lease in the epoch before: it would fall, and whoever
/// has seen it higher would take no notice of it any more.
pub(crate) fn office(known: Option<i32>, held: Option<i32>) -> Office {
    match (known, held) {
        (None, Some(epoch)) => Office::Take(epoch),
        (Some(known), Some(epoch)) if known < epoch && !broken!(KeepOffice) => Office::Take(epoch),
        (Some(_), None) => Office::Leave,
        _ => Office::AsBefore,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_is_one_in_the_newest_epoch_that_its_lease_says() {
        for (known, held, expected) in [
            (None, None, Office::AsBefore),
            (None, Some(4), Office::Take(4)),
            (Some(4), Some(4), Office::AsBefore),
            (Some(2), Some(4), Office::Take(4)),
            (Some(4), None, Office::Leave),
        ] {
            assert_eq!(office(known, held), expected, "{known:?} {held:?}");
        }
    }
}
