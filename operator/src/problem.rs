//! What keeps a Cluster or Topic from being what its spec asks for.

use millrace_crds::conditions::Reason;

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Problem {
    pub(crate) reason: Reason,
    /// Cause and next step.
    pub(crate) message: String,
    /// It needs a person: nothing that is on its way will mend it.
    pub(crate) stalled: bool,
}

impl Problem {
    pub(crate) fn stalled(reason: Reason, message: String) -> Self {
        Self {
            reason,
            message,
            stalled: true,
        }
    }

    pub(crate) fn passing(reason: Reason, message: String) -> Self {
        Self {
            reason,
            message,
            stalled: false,
        }
    }
}
