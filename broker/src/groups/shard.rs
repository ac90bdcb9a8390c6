//! The groups of one partition of the internal topic. Pure: what is to be kept, and what members are to be told then, comes out.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use millrace_proto::v1::{
    self, CommitOffsetsRequest, DescribeGroupResponse, FetchOffsetsRequest, FetchOffsetsResponse,
    GroupSummary, MemberHello,
};

use super::{
    GroupError, Topology,
    entry::Entry,
    group::{Group, Outcome, SessionId, check_id},
};

/// So many groups one coordinator keeps for each partition of the internal topic.
const MAX_GROUPS: usize = 100_000;
/// Offsets of a group without members are forgotten after this, as Kafka's are.
const OFFSET_RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);
/// Partitions of one commit or query.
const MAX_PARTITIONS: usize = 10_000;

/// Time, of the clock that measures and of the one that people read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Now {
    pub(crate) instant: Instant,
    pub(crate) unix_ms: i64,
}

/// What a member says on its stream after its hello.
#[derive(Clone, Debug)]
pub(crate) enum Said {
    Alive,
    Applied(u64),
    Subscribed(v1::Subscription),
    Left,
    /// Nothing more: the stream broke.
    Disconnected,
}

/// Who says it.
#[derive(Clone, Debug)]
pub(crate) struct Speaker {
    pub(crate) group: Arc<str>,
    pub(crate) member: Arc<str>,
    pub(crate) session: SessionId,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Shard {
    groups: HashMap<Arc<str>, Group>,
    topology: Topology,
    outcome: Outcome,
    /// Of which something may follow.
    changed: BTreeSet<Arc<str>>,
}

impl Shard {
    /// Takes in what was kept, in order.
    pub(crate) fn replay(&mut self, entry: Entry, now: Instant) {
        let name: Arc<str> = entry.group.into();
        let group = self.groups.entry(name.clone());
        let group = group.or_insert_with(|| Group::new(&name));
        group.replay(entry.what, now);
    }

    /// All that was kept has been replayed.
    pub(crate) fn replayed(&mut self, topology: Topology) {
        self.topology = topology;
        self.groups.retain(|_, group| !group.is_nothing());
        self.groups.values_mut().for_each(Group::replayed);
        self.changed.extend(self.groups.keys().cloned());
    }

    /// What topics there are now.
    pub(crate) fn set_topology(&mut self, topology: Topology) {
        if topology != self.topology {
            self.topology = topology;
            self.groups.values_mut().for_each(Group::topology_changed);
            self.changed.extend(self.groups.keys().cloned());
        }
    }

    /// A member joins. How often it is to give a sign of life.
    pub(crate) fn join(
        &mut self,
        hello: MemberHello,
        session: SessionId,
        now: Now,
    ) -> Result<Duration, GroupError> {
        let outcome = &mut std::mem::take(&mut self.outcome);
        let name = hello.group_id.clone();
        self.changed.insert(name.as_str().into());
        let joined = self
            .make(&name)
            .and_then(|group| group.join(hello, session, now.instant, outcome));
        self.outcome = std::mem::take(outcome);
        self.drop_if_nothing(&name);
        joined
    }

    /// A member says something.
    pub(crate) fn said(
        &mut self,
        speaker: &Speaker,
        said: Said,
        now: Now,
    ) -> Result<(), GroupError> {
        let Some(group) = self.groups.get_mut(&speaker.group) else {
            return Ok(());
        };
        if !matches!(said, Said::Alive) {
            self.changed.insert(speaker.group.clone());
        }
        let (member, session, outcome) = (&*speaker.member, speaker.session, &mut self.outcome);
        match said {
            Said::Alive => group.alive(member, session, now.instant),
            Said::Applied(version) => {
                group.applied(member, session, version, now.instant, outcome);
            }
            Said::Subscribed(subscription) => {
                group.subscribe(member, session, subscription, now.instant, outcome)?;
            }
            Said::Left => group.leave(member, session, now.instant, now.unix_ms, outcome),
            Said::Disconnected => group.disconnected(member, session, now.instant),
        }
        Ok(())
    }

    pub(crate) fn commit(
        &mut self,
        request: CommitOffsetsRequest,
        now: Now,
    ) -> Result<(), GroupError> {
        let CommitOffsetsRequest {
            group_id,
            member_id,
            epoch,
            offsets,
        } = request;
        check_count(offsets.len())?;
        if !member_id.is_empty() && !self.groups.contains_key(group_id.as_str()) {
            return Err(GroupError::UnknownMember {
                group: group_id,
                member: member_id,
            });
        }
        let outcome = &mut std::mem::take(&mut self.outcome);
        let topology = std::mem::take(&mut self.topology);
        let committed = self.make(&group_id).and_then(|group| {
            group.commit(&member_id, epoch, offsets, &topology, now.unix_ms, outcome)
        });
        self.outcome = std::mem::take(outcome);
        self.topology = topology;
        self.drop_if_nothing(&group_id);
        committed
    }

    pub(crate) fn fetch(
        &self,
        request: &FetchOffsetsRequest,
    ) -> Result<FetchOffsetsResponse, GroupError> {
        check_id("group_id", &request.group_id)?;
        check_count(request.partitions.iter().map(|t| t.partitions.len()).sum())?;
        let Some(group) = self.groups.get(request.group_id.as_str()) else {
            return Ok(FetchOffsetsResponse::default());
        };
        let mut offsets = Vec::new();
        for topic in &request.partitions {
            let name: Arc<str> = topic.topic.as_str().into();
            for &partition in &topic.partitions {
                offsets.extend(group.offset(&(name.clone(), partition), &self.topology));
            }
        }
        if request.partitions.is_empty() {
            offsets = group.offsets(&self.topology);
        }
        Ok(FetchOffsetsResponse { offsets })
    }

    /// All groups, by name.
    pub(crate) fn list(&self) -> Vec<GroupSummary> {
        let sorted: BTreeMap<&Arc<str>, &Group> = self.groups.iter().collect();
        sorted.into_values().map(Group::summary).collect()
    }

    pub(crate) fn describe(&self, group: &str) -> Result<DescribeGroupResponse, GroupError> {
        let found = self.groups.get(group);
        let found = found.ok_or_else(|| GroupError::UnknownGroup(group.to_owned()))?;
        Ok(found.describe(&self.topology))
    }

    pub(crate) fn delete(&mut self, group: &str) -> Result<(), GroupError> {
        let found = self.groups.get_mut(group);
        let found = found.ok_or_else(|| GroupError::UnknownGroup(group.to_owned()))?;
        found.delete(&mut self.outcome)?;
        self.groups.remove(group);
        Ok(())
    }

    /// What time alone brings.
    pub(crate) fn tick(&mut self, now: Now) {
        let retention = i64::try_from(OFFSET_RETENTION.as_millis()).unwrap_or(i64::MAX);
        let mut forgotten = Vec::new();
        for (name, group) in &mut self.groups {
            if group.expire(now.instant, now.unix_ms, &mut self.outcome) {
                self.changed.insert(name.clone());
            }
            let since = group.empty_since_ms();
            if since.is_some_and(|since| since.saturating_add(retention) <= now.unix_ms) {
                forgotten.push(name.clone());
            }
        }
        for name in forgotten {
            // It has no members: that can't be refused.
            let _ = self.delete(&name);
        }
    }

    /// What follows from all that was said since the last call.
    pub(crate) fn settle(&mut self, now: Instant) -> Outcome {
        for name in std::mem::take(&mut self.changed) {
            if let Some(group) = self.groups.get_mut(&name) {
                group.settle(&self.topology, now, &mut self.outcome);
            }
        }
        std::mem::take(&mut self.outcome)
    }

    /// All of it, as it would be written if nothing had been.
    pub(crate) fn snapshot(&self) -> impl Iterator<Item = Entry> {
        self.groups.values().flat_map(Group::snapshot)
    }

    fn make(&mut self, name: &str) -> Result<&mut Group, GroupError> {
        check_id("group_id", name)?;
        if !self.groups.contains_key(name) && self.groups.len() >= MAX_GROUPS {
            return Err(GroupError::limit(format!(
                "{MAX_GROUPS} groups are kept by one coordinator; delete some, or spread them over more brokers"
            )));
        }
        let key: Arc<str> = name.into();
        Ok(self.groups.entry(key).or_insert_with(|| Group::new(name)))
    }

    fn drop_if_nothing(&mut self, name: &str) {
        if self.groups.get(name).is_some_and(Group::is_nothing) {
            self.groups.remove(name);
        }
    }
}

fn check_count(partitions: usize) -> Result<(), GroupError> {
    match partitions {
        0..=MAX_PARTITIONS => Ok(()),
        _ => Err(GroupError::limit(format!(
            "{partitions} partitions in one request; {MAX_PARTITIONS} are allowed"
        ))),
    }
}
