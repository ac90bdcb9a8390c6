//! What keeps a Cluster or Topic from being what its spec asks for.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use millrace_crds::conditions::{ConditionType, Reason};

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

    /// Whether it needs a person, and the conditions do not say so yet.
    pub(crate) fn is_news(&self, conditions: &[Condition]) -> bool {
        let stalled = ConditionType::Stalled.as_str();
        let mut told = conditions.iter().filter(|held| held.type_ == stalled);
        self.stalled && !told.any(|held| held.reason == self.reason.as_str())
    }

    pub(crate) fn passing(reason: Reason, message: String) -> Self {
        Self {
            reason,
            message,
            stalled: false,
        }
    }
}
