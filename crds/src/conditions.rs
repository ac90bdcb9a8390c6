//! The conditions of a `Cluster` or `Topic`: which there are, why, and how one is set.
//!
//! Made for `kubectl wait --for=condition=Ready`, for kstatus (Flux, Helm 4's `--wait`) and for Argo CD alike:
//! - [`ConditionType::Ready`] and [`ConditionType::Degraded`] are always there, and `Ready` is `Unknown` from the first moment: the CRD has it as
//!   the default of `status`, since kstatus takes an object without conditions for finished.
//! - [`ConditionType::Reconciling`] and [`ConditionType::Stalled`] are kstatus' own and there only while they are true. There is no `Progressing`: it would
//!   say the same as `Reconciling`, and kstatus reads it of Deployments only.
//! - Types are states, never events, and no type is a negation of `Ready`: Argo CD and people take any `True` for good.
//! - A message says what to do, if there is something to do.

use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde_json::{Value, json};

/// The most conditions that a status may hold.
pub(crate) const MAX_CONDITIONS: usize = 16;
/// A message is cut to this many bytes: it is for people, and each status is in the API server's memory.
const MAX_MESSAGE_BYTES: usize = 1024;

/// What a condition is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ConditionType {
    /// It does all that its spec asks for. The one to wait for.
    Ready,
    /// It serves, but less than it should: replicas are behind or away.
    Degraded,
    /// The operator is bringing it to its spec. Only there while true.
    Reconciling,
    /// It can't come to its spec without a person. Only there while true.
    Stalled,
}

impl ConditionType {
    /// As it is written in a status.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Degraded => "Degraded",
            Self::Reconciling => "Reconciling",
            Self::Stalled => "Stalled",
        }
    }

    /// Whether it is there only while it is true.
    pub const fn only_while_true(self) -> bool {
        matches!(self, Self::Reconciling | Self::Stalled)
    }
}

impl fmt::Display for ConditionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConditionStatus {
    /// It does.
    True,
    /// It does not.
    False,
    /// No one knows yet.
    Unknown,
}

impl ConditionStatus {
    /// As it is written in a status.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for ConditionStatus {
    fn from(holds: bool) -> Self {
        if holds { Self::True } else { Self::False }
    }
}

/// Declares the reasons and their spelling once.
macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Why a condition is as it is. Scripts and alerts read these: a name never changes its meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[doc = $doc])+ $name,)+ }

        impl Reason {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// As it is written in a status.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)+ }
            }
        }
    };
}

reasons! {
    /// The operator has not seen the object yet.
    Pending,
    /// All is as the spec asks.
    AsSpecified,
    /// `spec.paused` is true: the operator leaves it alone.
    Paused,
    /// `spec.hibernated` is true: no broker runs, and their volumes are kept.
    Hibernated,
    /// The object is being deleted.
    Deleting,
    /// A rule that the API server could not check is broken.
    InvalidSpec,
    /// The API server refused something that the operator made of the spec, such as a field of `spec.template`.
    Refused,
    /// The spec asks for something that no release so far can do.
    NotSupported,
    /// An object between operator and brokers can't be read: someone edited it, or a later release wrote it.
    Unreadable,

    /// Fewer brokers are up than asked for.
    BrokersNotReady,
    /// Brokers are added.
    ScalingOut,
    /// Partitions move away from brokers that are to be removed.
    Draining,
    /// Brokers restart one by one, each once the ISRs are full.
    RollingRestart,
    /// Volumes grow.
    GrowingStorage,
    /// Nodes can't pull the brokers' image.
    ImagePullFailed,
    /// The storage class that was asked for does not exist, or none was asked for and there is no default.
    StorageClassNotFound,
    /// A quota of the namespace does not allow another pod or volume.
    QuotaExceeded,
    /// There is no node on which a broker may run.
    Unschedulable,
    /// A broker starts and ends again and again.
    BrokerCrashing,
    /// A volume can't grow: its storage class does not allow it.
    StorageNotExpandable,
    /// A broker's volume is full, and it refuses writes.
    VolumeFull,
    /// A broker's volume is nearly full.
    VolumeNearlyFull,
    /// A broker's volume was on a node that is gone, and no other broker that is up has all that was on it.
    VolumeLost,
    /// No broker is controller: leaders are not elected.
    NoController,

    /// `spec.clusterRef` names a Cluster that does not exist.
    ClusterNotFound,
    /// The Cluster is there, but not ready.
    ClusterNotReady,
    /// The Cluster's `topicNamespaces` do not admit the topic's namespace.
    NamespaceNotAllowed,
    /// Another Topic of the namespace has the name already.
    NameTaken,
    /// The Cluster has fewer brokers than the topic wants replicas.
    TooFewBrokers,
    /// Partitions are made.
    Creating,
    /// Replicas move between brokers.
    Reassigning,
    /// Partitions have no leader.
    PartitionsOffline,
    /// Partitions have fewer in-sync replicas than replicas.
    UnderReplicated,
    /// Partitions have fewer in-sync replicas than `acks=all` needs.
    BelowMinIsr,
    /// A partition's Lease was deleted and no one knows its leader epoch: a person must decide.
    LeaseLost,
    /// All stores that held what was acknowledged are lost: a person must decide.
    ReplicasLost,
}

/// What a condition shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    /// What it is about.
    pub condition: ConditionType,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// Why.
    pub reason: Reason,
    /// For people: what is, and what to do.
    pub message: String,
}

/// Sets a condition, or takes away one that is there [only while true](ConditionType::only_while_true). The time of the last transition
/// changes only when the status does. Returns whether anything has changed, hence whether the status must be written.
pub fn set_condition(
    conditions: &mut Vec<Condition>,
    observed: &Observed,
    generation: Option<i64>,
    now: &Time,
) -> bool {
    let type_ = observed.condition.as_str();
    let held = conditions.iter().position(|held| held.type_ == type_);
    if observed.condition.only_while_true() && observed.status != ConditionStatus::True {
        return held.map(|index| conditions.remove(index)).is_some();
    }
    let status = observed.status.as_str();
    let last_transition_time = held
        .map(|index| &conditions[index])
        .filter(|held| held.status == status)
        .map_or_else(|| now.clone(), |held| held.last_transition_time.clone());
    let new = Condition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: observed.reason.as_str().to_owned(),
        message: cut(&observed.message).to_owned(),
        observed_generation: generation,
        last_transition_time,
    };
    match held {
        Some(index) if conditions[index] == new => false,
        Some(index) => {
            conditions[index] = new;
            true
        }
        None => {
            conditions.push(new);
            true
        }
    }
}

/// The condition of that type.
pub fn condition(conditions: &[Condition], type_: ConditionType) -> Option<&Condition> {
    conditions.iter().find(|held| held.type_ == type_.as_str())
}

/// The status of an object that the operator has not seen: the CRD's default.
pub(crate) fn initial_status() -> Value {
    json!({"conditions": [{
        "type": ConditionType::Ready.as_str(),
        "status": ConditionStatus::Unknown.as_str(),
        "reason": Reason::Pending.as_str(),
        "message": "Waiting for the operator",
        "lastTransitionTime": "1970-01-01T00:00:00Z",
    }]})
}

fn cut(message: &str) -> &str {
    let end = (0..=MAX_MESSAGE_BYTES.min(message.len()))
        .rev()
        .find(|end| message.is_char_boundary(*end));
    &message[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: u32) -> Time {
        serde_json::from_value(json!(format!("2026-01-01T00:00:{second:02}Z"))).unwrap()
    }

    fn observed(condition: ConditionType, status: ConditionStatus, reason: Reason) -> Observed {
        let message = String::new();
        Observed {
            condition,
            status,
            reason,
            message,
        }
    }

    #[test]
    fn the_last_transition_is_when_the_status_changed() {
        use ConditionStatus::{False, True, Unknown};
        let mut conditions = Vec::new();
        let steps = [
            // second, status, reason, generation; changed?, transition
            (1, Unknown, Reason::Pending, 1, true, 1),
            (2, Unknown, Reason::Pending, 1, false, 1),
            (3, False, Reason::Creating, 1, true, 3),
            (4, False, Reason::BrokersNotReady, 1, true, 3),
            (5, False, Reason::BrokersNotReady, 2, true, 3),
            (6, True, Reason::AsSpecified, 2, true, 6),
            (7, True, Reason::AsSpecified, 2, false, 6),
        ];
        for (second, status, reason, generation, changed, transition) in steps {
            let new = observed(ConditionType::Ready, status, reason);
            let answer = set_condition(&mut conditions, &new, Some(generation), &at(second));
            assert_eq!(answer, changed, "second {second}");
            let ready = condition(&conditions, ConditionType::Ready).unwrap();
            assert_eq!(ready.last_transition_time, at(transition));
            assert_eq!(ready.status, status.as_str());
            assert_eq!(ready.reason, reason.as_str());
            assert_eq!(ready.observed_generation, Some(generation));
            assert_eq!(conditions.len(), 1);
        }
    }

    #[test]
    fn other_conditions_stay_and_the_abnormal_ones_go_when_they_are_over() {
        use ConditionStatus::{False, True};
        let mut conditions = Vec::new();
        let mut set = |type_, status| {
            let new = observed(type_, status, Reason::Draining);
            let changed = set_condition(&mut conditions, &new, None, &at(1));
            let types: Vec<String> = conditions.iter().map(|c| c.type_.clone()).collect();
            (changed, types.join(" "))
        };
        let (ready, reconciling) = (ConditionType::Ready, ConditionType::Reconciling);
        assert_eq!(set(ready, False), (true, "Ready".into()));
        assert_eq!(set(reconciling, False), (false, "Ready".into()));
        assert_eq!(set(reconciling, True), (true, "Ready Reconciling".into()));
        assert_eq!(set(reconciling, False), (true, "Ready".into()));
        assert_eq!(
            set(ConditionType::Degraded, False),
            (true, "Ready Degraded".into())
        );
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let long = "x".to_owned() + &"é".repeat(MAX_MESSAGE_BYTES);
        assert_eq!(cut(&long).len(), MAX_MESSAGE_BYTES - 1);
        assert_eq!(cut("short"), "short");
    }

    #[test]
    fn reasons_are_legal() {
        for reason in Reason::ALL {
            let name = reason.as_str();
            assert!(name.starts_with(|c: char| c.is_ascii_uppercase()), "{name}");
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric()), "{name}");
        }
    }
}
