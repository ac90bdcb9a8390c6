//! The groups of one partition of the internal topic. Pure: what is to be kept, and what members are to be told then, comes out.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use millrace_proto::v1::{
    self, CommitOffsetsRequest, DescribeGroupResponse, FetchOffsetsRequest, FetchOffsetsResponse,
    GroupSummary, HoldOffsetsRequest, MemberHello,
};

use super::{
    GroupError, Topology,
    entry::Entry,
    group::{Group, GroupFigures, Outcome, SessionId, check_id},
};
use crate::shards::Now;

/// So many groups one coordinator keeps for each partition of the internal topic.
const MAX_GROUPS: usize = 100_000;
/// Offsets of a group without members are forgotten after this, as Kafka's are.
const OFFSET_RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);
/// Partitions of one commit or query.
const MAX_PARTITIONS: usize = 10_000;

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
        let name = hello.group_id.clone();
        self.changed.insert(name.as_str().into());
        let group = make(&mut self.groups, &name)?;
        let joined = group.join(hello, session, now.instant, &mut self.outcome);
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
        check_known(&self.groups, &group_id, &member_id)?;
        let group = make(&mut self.groups, &group_id)?;
        let offsets = group.check_offsets(&member_id, epoch, offsets, &self.topology, now.unix_ms);
        let committed =
            offsets.map(|offsets| group.keep_offsets(offsets, now.unix_ms, &mut self.outcome));
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
        group.check_settled(&request.partitions)?;
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

    /// Offsets that are committed if a transaction is.
    pub(crate) fn hold(&mut self, request: HoldOffsetsRequest, now: Now) -> Result<(), GroupError> {
        let producer = (request.producer_id, producer_epoch(request.producer_epoch)?);
        let CommitOffsetsRequest {
            group_id,
            member_id,
            epoch,
            offsets,
        } = request.offsets.unwrap_or_default();
        check_count(offsets.len())?;
        check_known(&self.groups, &group_id, &member_id)?;
        let group = make(&mut self.groups, &group_id)?;
        let offsets = group.check_offsets(&member_id, epoch, offsets, &self.topology, now.unix_ms);
        let held = offsets
            .and_then(|offsets| group.hold(producer, offsets, now.unix_ms, &mut self.outcome));
        self.drop_if_nothing(&group_id);
        held
    }

    /// A transaction has ended.
    pub(crate) fn close(
        &mut self,
        group: &str,
        producer: (i64, i16),
        commit: bool,
        now: Now,
    ) -> Result<(), GroupError> {
        let group = make(&mut self.groups, group)?;
        group.close(producer, commit, now.unix_ms, &mut self.outcome)
    }

    /// How many groups there are.
    pub(crate) fn len(&self) -> usize {
        self.groups.len()
    }

    /// All groups, by name.
    pub(crate) fn list(&self) -> Vec<GroupSummary> {
        let sorted: BTreeMap<&Arc<str>, &Group> = self.groups.iter().collect();
        sorted.into_values().map(Group::summary).collect()
    }

    pub(crate) fn figures(&self) -> Vec<GroupFigures> {
        let groups = self.groups.values();
        groups.map(|group| group.figures(&self.topology)).collect()
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

    fn drop_if_nothing(&mut self, name: &str) {
        if self.groups.get(name).is_some_and(Group::is_nothing) {
            self.groups.remove(name);
        }
    }
}

/// The group of that name, new if there is none.
fn make<'a>(
    groups: &'a mut HashMap<Arc<str>, Group>,
    name: &str,
) -> Result<&'a mut Group, GroupError> {
    check_id("group_id", name)?;
    if !groups.contains_key(name) && groups.len() >= MAX_GROUPS {
        return Err(GroupError::limit(format!(
            "{MAX_GROUPS} groups are kept by one coordinator; delete some, or spread them over more brokers"
        )));
    }
    let key: Arc<str> = name.into();
    Ok(groups.entry(key).or_insert_with(|| Group::new(name)))
}

/// A member of a group that is not there is none.
fn check_known(
    groups: &HashMap<Arc<str>, Group>,
    group: &str,
    member: &str,
) -> Result<(), GroupError> {
    match member.is_empty() || groups.contains_key(group) {
        true => Ok(()),
        false => Err(GroupError::UnknownMember {
            group: group.to_owned(),
            member: member.to_owned(),
        }),
    }
}

fn producer_epoch(epoch: i32) -> Result<i16, GroupError> {
    i16::try_from(epoch)
        .map_err(|_| GroupError::invalid("producer_epoch", format!("{epoch} is no epoch")))
}

fn check_count(partitions: usize) -> Result<(), GroupError> {
    match partitions {
        0..=MAX_PARTITIONS => Ok(()),
        _ => Err(GroupError::limit(format!(
            "{partitions} partitions in one request; {MAX_PARTITIONS} are allowed"
        ))),
    }
}
