//! What Events tell of an object's conditions: pure. A condition says how things are; an Event, that it has begun or is over.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::events::EventType;
use millrace_crds::conditions::{ConditionType, Reason, condition};

use crate::observe::Kind;

/// The reason of the Event that tells that an object is not degraded any more.
const RECOVERED: &str = "Recovered";

/// An Event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct News {
    pub(crate) type_: EventType,
    pub(crate) reason: String,
    pub(crate) note: String,
}

/// What is new in the conditions, compared with those that were told before.
pub(crate) fn news(kind: Kind, told: &[Condition], now: &[Condition]) -> Vec<News> {
    let stalled = |conditions| holding(conditions, ConditionType::Stalled);
    let degraded = |conditions| {
        let degraded = holding(conditions, ConditionType::Degraded);
        degraded.filter(|degraded| is_told_of(kind, degraded))
    };
    let warnings = [
        begun(stalled(told), stalled(now)),
        begun(degraded(told), degraded(now)),
    ];
    let mut news: Vec<News> = warnings.into_iter().flatten().collect();
    if let Some(before) = degraded(told)
        && degraded(now).is_none()
        && let Some(after) = condition(now, ConditionType::Degraded)
        && after.reason != Reason::Deleting.as_str()
    {
        news.push(News {
            type_: EventType::Normal,
            reason: RECOVERED.to_owned(),
            note: format!("{} is over: {}", before.reason, after.message),
        });
    }
    news
}

/// Each broker that restarts leaves all Topics with fewer replicas: their Cluster tells that for them.
fn is_told_of(kind: Kind, degraded: &Condition) -> bool {
    match kind {
        Kind::Cluster => true,
        Kind::Topic => degraded.reason != Reason::UnderReplicated.as_str(),
    }
}

fn holding(conditions: &[Condition], type_: ConditionType) -> Option<&Condition> {
    condition(conditions, type_).filter(|condition| condition.status == "True")
}

fn begun(before: Option<&Condition>, now: Option<&Condition>) -> Option<News> {
    let now = now.filter(|now| before.is_none_or(|before| before.reason != now.reason))?;
    Some(News {
        type_: EventType::Warning,
        reason: now.reason.clone(),
        note: now.message.clone(),
    })
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    /// Conditions as words: `Degraded=UnderReplicated` holds, `Degraded!AsSpecified` does not.
    fn conditions(words: &str) -> Vec<Condition> {
        let condition = |word: &str| {
            let (type_, reason) = word.split_once(['=', '!']).unwrap();
            let status = if word.contains('=') { "True" } else { "False" };
            Condition {
                type_: type_.to_owned(),
                status: status.to_owned(),
                reason: reason.to_owned(),
                message: format!("of {reason}"),
                observed_generation: None,
                last_transition_time: Time(Timestamp::UNIX_EPOCH),
            }
        };
        words.split_whitespace().map(condition).collect()
    }

    #[test]
    fn events_tell_what_has_begun_and_what_is_over() {
        const WELL: &str = "Degraded!AsSpecified";
        let begun = |reason: &str| format!("Warning {reason}: of {reason}");
        let over =
            |before: &str, after: &str| format!("Normal Recovered: {before} is over: of {after}");
        let (offline, below, under) = (
            "Degraded=PartitionsOffline",
            "Degraded=BelowMinIsr",
            "Degraded=UnderReplicated",
        );
        for (kind, told, now, expected) in [
            (Kind::Cluster, "", WELL, vec![]),
            (Kind::Cluster, "", under, vec![begun("UnderReplicated")]),
            (Kind::Cluster, WELL, under, vec![begun("UnderReplicated")]),
            (Kind::Cluster, under, under, vec![]),
            (Kind::Cluster, under, below, vec![begun("BelowMinIsr")]),
            (Kind::Cluster, below, under, vec![begun("UnderReplicated")]),
            (
                Kind::Cluster,
                under,
                WELL,
                vec![over("UnderReplicated", "AsSpecified")],
            ),
            (Kind::Topic, WELL, under, vec![]),
            (Kind::Topic, under, WELL, vec![]),
            (Kind::Topic, under, below, vec![begun("BelowMinIsr")]),
            (Kind::Topic, WELL, offline, vec![begun("PartitionsOffline")]),
            (Kind::Topic, offline, below, vec![begun("BelowMinIsr")]),
            (
                Kind::Topic,
                below,
                under,
                vec![over("BelowMinIsr", "UnderReplicated")],
            ),
            (
                Kind::Topic,
                below,
                WELL,
                vec![over("BelowMinIsr", "AsSpecified")],
            ),
            (Kind::Topic, offline, "Degraded!Deleting", vec![]),
            // What needs a person.
            (
                Kind::Topic,
                "",
                "Stalled=NameTaken",
                vec![begun("NameTaken")],
            ),
            (
                Kind::Topic,
                "Stalled=NameTaken",
                "Stalled=NameTaken",
                vec![],
            ),
            (
                Kind::Topic,
                "Stalled=NameTaken",
                "Stalled=LeaseLost",
                vec![begun("LeaseLost")],
            ),
            (Kind::Topic, "Stalled=NameTaken", WELL, vec![]),
            (
                Kind::Cluster,
                WELL,
                "Degraded=UnderReplicated Stalled=BrokerCrashing",
                vec![begun("BrokerCrashing"), begun("UnderReplicated")],
            ),
        ] {
            let found = news(kind, &conditions(told), &conditions(now));
            let found: Vec<String> = found
                .iter()
                .map(|news| format!("{:?} {}: {}", news.type_, news.reason, news.note))
                .collect();
            assert_eq!(found, expected, "{kind:?}: {told:?}, then {now:?}");
        }
    }
}
