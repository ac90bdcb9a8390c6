//! One group: who is in it, who is to have what, who has it, and what was committed. Pure.
//!
//! In the manner of KIP-848: whenever members or partitions change, the *target* is computed anew, in a new epoch; each member then gives up what
//! is not meant for it any more, and gets what is as soon as no one else has it. Nobody else notices. In detail:
//!
//! - A partition has at most one owner: from when it is given to a member until this one has said that it stopped reading it, or is gone.
//! - What a member is told has a version. It has stopped once it says that it does as a version says in which the partition was missing.
//! - A member owns a partition *since* an epoch. It commits in the epoch that it was told last, which must not be older: what it read when it had the
//!   partition some time before is not its to commit. So no epoch is kept for each member, and a member whose partitions stay the
//!   same needs no write when others come and go.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use millrace_proto::v1::{
    self, Assignor, CommittedOffset, GroupLogGroup, GroupLogMember, GroupLogOffset, GroupLogOwned,
    GroupLogPartition, GroupLogTransaction, GroupState, GroupSummary, MemberHello, OffsetCommit,
    TopicPartitions,
};
use regex_lite::Regex;
use uuid::Uuid;

use super::{
    GroupError, Shape, TopicPartition, Topology,
    assign::{self, Candidate, Candidates, Counts, Places, Target},
    entry::{Entry, What},
};

/// Unless a member asks for something else.
const SESSION: Duration = Duration::from_secs(10);
const STATIC_SESSION: Duration = Duration::from_secs(45);
const REBALANCE: Duration = Duration::from_secs(60);
const SHORTEST_SESSION: Duration = Duration::from_secs(1);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// How long a member may be away whose connection broke: that of a process that was killed breaks at once.
const AWAY: Duration = Duration::from_secs(3);

const MAX_MEMBERS: usize = 10_000;
const MAX_ID_BYTES: usize = 255;
const MAX_TOPICS: usize = 1_000;
const MAX_PATTERN_BYTES: usize = 1_000;
const MAX_METADATA_BYTES: usize = 4_096;
/// Offsets that one transaction may commit.
const MAX_HELD: usize = 10_000;
/// Transactions that have ended, as many as are remembered, and for how long.
const MAX_ENDED: usize = 1_000;
const ENDED_MS: i64 = 24 * 3600 * 1000;

/// A stream on which a member is.
pub(crate) type SessionId = u64;

/// What a member is to be told.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct News {
    pub(crate) session: SessionId,
    /// `Err`: the stream ends with this.
    pub(crate) assignment: Result<v1::Assignment, GroupError>,
}

/// What follows from changes.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// To be kept, before anyone hears of them.
    pub(crate) entries: Vec<Entry>,
    /// For members, then.
    pub(crate) news: Vec<News>,
}

/// What is counted of a group.
#[derive(Clone, Debug)]
pub(crate) struct GroupFigures {
    pub(crate) group: Arc<str>,
    pub(crate) members: usize,
    /// Committed: topic, partition, offset.
    pub(crate) offsets: Vec<(Arc<str>, i32, i64)>,
}

#[derive(Debug)]
pub(crate) struct Group {
    name: Arc<str>,
    epoch: i32,
    empty_since_ms: Option<i64>,
    members: BTreeMap<Arc<str>, Member>,
    /// By member id.
    target: Target,
    owners: HashMap<TopicPartition, Arc<str>>,
    offsets: BTreeMap<TopicPartition, GroupLogOffset>,
    /// Transactions that commit offsets, by their producer ids. Those that have ended are remembered for a while, so that nothing comes late.
    transactions: BTreeMap<i64, GroupLogTransaction>,
    /// The target is to be computed anew.
    stale: bool,
    /// Someone may get or has to give something.
    unsettled: bool,
}

#[derive(Debug)]
struct Member {
    instance_id: Option<String>,
    client_id: String,
    subscription: v1::Subscription,
    pattern: Option<Regex>,
    session_timeout: Duration,
    rebalance_timeout: Duration,
    owned: BTreeMap<TopicPartition, Owned>,
    session: Option<SessionId>,
    /// Unless it gives a sign of life, it is gone then.
    deadline: Instant,
    /// The version that it was told last.
    told: u64,
    /// It has to be told again.
    news: bool,
}

#[derive(Clone, Copy, Debug)]
struct Owned {
    since: i32,
    revoking: Option<Revoking>,
}

#[derive(Clone, Copy, Debug)]
struct Revoking {
    /// The first version without it; `None` before it was told.
    version: Option<u64>,
    /// It must have stopped by then.
    by: Instant,
}

impl Group {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            epoch: 0,
            empty_since_ms: None,
            members: BTreeMap::new(),
            target: Target::new(),
            owners: HashMap::new(),
            offsets: BTreeMap::new(),
            transactions: BTreeMap::new(),
            stale: false,
            unsettled: false,
        }
    }

    /// Takes in what was kept.
    pub(crate) fn replay(&mut self, what: What, now: Instant) {
        match what {
            What::Group(value) => {
                let value = value.unwrap_or_default();
                self.epoch = value.epoch;
                self.empty_since_ms = value.empty_since_ms;
            }
            What::Member(id, None) => {
                self.members.remove(&*id);
            }
            What::Member(id, Some(value)) => {
                self.members.insert(id.into(), Member::restore(value, now));
            }
            What::Offset(partition, value) => {
                let key = (partition.topic.into(), partition.partition);
                match value {
                    Some(value) => self.offsets.insert(key, value),
                    None => self.offsets.remove(&key),
                };
            }
            What::Transaction(id, Some(value)) => {
                self.transactions.insert(id, value);
            }
            What::Transaction(id, None) => {
                self.transactions.remove(&id);
            }
        }
        self.stale = true;
    }

    /// Once all was replayed.
    pub(crate) fn replayed(&mut self) {
        let owned = self.members.iter().flat_map(|(id, member)| {
            let partitions = member.owned.keys();
            partitions.map(move |partition| (partition.clone(), id.clone()))
        });
        self.owners = owned.collect();
    }

    /// Nothing is known of it.
    pub(crate) fn is_nothing(&self) -> bool {
        self.epoch == 0
            && self.members.is_empty()
            && self.offsets.is_empty()
            && self.transactions.is_empty()
    }

    /// Topics or their partitions are others.
    pub(crate) fn topology_changed(&mut self) {
        self.stale |= !self.members.is_empty();
    }

    /// A member joins, or comes back.
    pub(crate) fn join(
        &mut self,
        hello: MemberHello,
        session: SessionId,
        now: Instant,
        outcome: &mut Outcome,
    ) -> Result<Duration, GroupError> {
        let claimed: BTreeSet<TopicPartition> = flat(&hello.owned).into_iter().collect();
        let id: Arc<str> = hello.member_id.as_str().into();
        let joined = Member::new(hello, session, now)?;
        let interval = joined.session_timeout / 3;
        let replaced = self.replaced(&id, &joined);
        if replaced.is_none() && !claimed.is_empty() {
            // It was taken for gone, and others may have what it had: it must know that before it is one of them again.
            return Err(self.unknown(&id));
        }
        if replaced.is_none() && self.members.len() >= MAX_MEMBERS {
            return Err(GroupError::limit(format!(
                "group {} has {MAX_MEMBERS} members, the most that one may have",
                self.name
            )));
        }
        let Some(before_id) = replaced else {
            self.members.insert(id.clone(), joined);
            self.stale = true;
            self.empty_since_ms = None;
            self.keep_member(&id, outcome);
            return Ok(interval);
        };
        let same = before_id == id;
        let Some(before) = self.members.remove(&before_id) else {
            return Ok(interval);
        };
        if let Some(session) = before.session {
            let error = GroupError::FencedMember {
                group: self.name.to_string(),
                member: before_id.to_string(),
            };
            let assignment = Err(error);
            outcome.news.push(News {
                session,
                assignment,
            });
        }
        let mut member = joined;
        self.stale |= member.subscription != before.subscription;
        let changed = !same || member.kept() != before.kept_like(&member);
        member.owned = before.owned;
        for (partition, owned) in std::mem::take(&mut member.owned) {
            match owned.revoking {
                // It has stopped, or is a new process, which never began.
                Some(_) if !same || !claimed.contains(&partition) => {
                    self.owners.remove(&partition);
                    self.unsettled = true;
                }
                Some(Revoking { by, .. }) => {
                    let revoking = Some(Revoking { version: None, by });
                    member.owned.insert(partition, Owned { revoking, ..owned });
                }
                None => {
                    self.owners.insert(partition.clone(), id.clone());
                    member.owned.insert(partition, owned);
                }
            }
        }
        self.members.insert(id.clone(), member);
        if !same {
            let target = self.target.remove(&before_id).unwrap_or_default();
            self.target.insert(id.clone(), target);
            self.forget_member(&before_id, outcome);
        }
        if changed || self.unsettled {
            self.keep_member(&id, outcome);
        }
        Ok(interval)
    }

    /// Whose place it takes: its own, or that of the process before with the same instance id.
    fn replaced(&self, id: &Arc<str>, joined: &Member) -> Option<Arc<str>> {
        if self.members.contains_key(id) {
            return Some(id.clone());
        }
        let instance = joined.instance_id.as_ref()?;
        let same = |member: &Member| member.instance_id.as_ref() == Some(instance);
        let mut found = self.members.iter().filter(|(_, member)| same(member));
        found.next().map(|(id, _)| id.clone())
    }

    /// The member on that stream, which has just given a sign of life.
    fn on(&mut self, id: &str, session: SessionId, now: Instant) -> Option<&mut Member> {
        let member = self.members.get_mut(id)?;
        (member.session == Some(session)).then(|| {
            member.deadline = now + member.session_timeout;
            member
        })
    }

    pub(crate) fn alive(&mut self, id: &str, session: SessionId, now: Instant) {
        self.on(id, session, now);
    }

    /// It does as that version says.
    pub(crate) fn applied(
        &mut self,
        id: &str,
        session: SessionId,
        version: u64,
        now: Instant,
        outcome: &mut Outcome,
    ) {
        let Some(member) = self.on(id, session, now) else {
            return;
        };
        let mut released = Vec::new();
        member.owned.retain(|partition, owned| {
            let told = owned.revoking.and_then(|revoking| revoking.version);
            let stopped = told.is_some_and(|told| told <= version);
            if stopped {
                released.push(partition.clone());
            }
            !stopped
        });
        if released.is_empty() {
            return;
        }
        for partition in &released {
            self.owners.remove(partition);
        }
        self.unsettled = true;
        self.keep_member(id, outcome);
    }

    pub(crate) fn subscribe(
        &mut self,
        id: &str,
        session: SessionId,
        subscription: v1::Subscription,
        now: Instant,
        outcome: &mut Outcome,
    ) -> Result<(), GroupError> {
        let pattern = check_subscription(&subscription)?;
        if let Some(member) = self.on(id, session, now)
            && member.subscription != subscription
        {
            member.subscription = subscription;
            member.pattern = pattern;
            self.stale = true;
            self.keep_member(id, outcome);
        }
        Ok(())
    }

    /// It goes. A static member is expected back.
    pub(crate) fn leave(
        &mut self,
        id: &str,
        session: SessionId,
        now: Instant,
        now_ms: i64,
        outcome: &mut Outcome,
    ) {
        match self.on(id, session, now) {
            Some(member) if member.instance_id.is_some() => member.session = None,
            Some(_) => self.remove(id, now_ms, outcome),
            None => {}
        }
    }

    /// Its stream broke.
    pub(crate) fn disconnected(&mut self, id: &str, session: SessionId, now: Instant) {
        let member = self.members.get_mut(id);
        if let Some(member) = member.filter(|member| member.session == Some(session)) {
            member.session = None;
            if member.instance_id.is_none() {
                member.deadline = member.deadline.min(now + AWAY);
            }
        }
    }

    /// Removes who has not given a sign of life, or does not stop what it was told to stop. Whether there was one.
    pub(crate) fn expire(&mut self, now: Instant, now_ms: i64, outcome: &mut Outcome) -> bool {
        let gone = |member: &Member| {
            let overdue = |owned: &Owned| owned.revoking.is_some_and(|r| r.by <= now);
            member.deadline <= now || member.owned.values().any(overdue)
        };
        let expired: Vec<(Arc<str>, Option<SessionId>)> = self
            .members
            .iter()
            .filter(|(_, member)| gone(member))
            .map(|(id, member)| (id.clone(), member.session))
            .collect();
        let any = !expired.is_empty();
        for (id, session) in expired {
            if let Some(session) = session {
                let assignment = Err(self.unknown(&id));
                outcome.news.push(News {
                    session,
                    assignment,
                });
            }
            self.remove(&id, now_ms, outcome);
        }
        any
    }

    fn unknown(&self, member: &str) -> GroupError {
        GroupError::UnknownMember {
            group: self.name.to_string(),
            member: member.to_owned(),
        }
    }

    fn remove(&mut self, id: &str, now_ms: i64, outcome: &mut Outcome) {
        let Some(member) = self.members.remove(id) else {
            return;
        };
        for partition in member.owned.keys() {
            self.owners.remove(partition);
        }
        self.target.remove(id);
        self.forget_member(id, outcome);
        self.stale = true;
        if self.members.is_empty() {
            self.empty_since_ms = Some(now_ms);
        }
    }

    /// Whether the member may commit these offsets; as they would be kept.
    pub(crate) fn check_offsets(
        &self,
        member: &str,
        epoch: i32,
        offsets: Vec<OffsetCommit>,
        topology: &Topology,
        now_ms: i64,
    ) -> Result<Vec<GroupLogOffset>, GroupError> {
        if member.is_empty() && !self.members.is_empty() {
            return Err(GroupError::NotEmpty {
                group: self.name.to_string(),
                members: self.members.len(),
            });
        }
        let mut entries = Vec::with_capacity(offsets.len());
        for commit in offsets {
            let key: TopicPartition = (commit.topic.as_str().into(), commit.partition);
            let topic_id = check_commit(&commit, topology)?;
            if !member.is_empty() {
                self.check_owner(member, epoch, &key)?;
            }
            let offset = CommittedOffset {
                topic: commit.topic,
                partition: commit.partition,
                offset: commit.offset,
                leader_epoch: commit.leader_epoch,
                metadata: commit.metadata,
                committed_at_ms: now_ms,
            };
            let topic_id = topic_id.to_string();
            let offset = Some(offset);
            entries.push(GroupLogOffset { topic_id, offset });
        }
        Ok(entries)
    }

    /// Keeps offsets.
    pub(crate) fn keep_offsets(
        &mut self,
        offsets: Vec<GroupLogOffset>,
        now_ms: i64,
        outcome: &mut Outcome,
    ) {
        self.begin_to_be(now_ms, outcome);
        for value in offsets {
            let Some(offset) = &value.offset else {
                continue;
            };
            let key = GroupLogPartition {
                topic: offset.topic.clone(),
                partition: offset.partition,
            };
            self.offsets
                .insert((key.topic.as_str().into(), key.partition), value.clone());
            outcome
                .entries
                .push(self.entry(What::Offset(key, Some(value))));
        }
    }

    fn begin_to_be(&mut self, now_ms: i64, outcome: &mut Outcome) {
        if self.is_nothing() {
            self.empty_since_ms = Some(now_ms);
            self.epoch = 1;
            self.keep_group(outcome);
        }
    }

    /// Keeps offsets until it is known whether the transaction is committed.
    pub(crate) fn hold(
        &mut self,
        (producer_id, epoch): (i64, i16),
        offsets: Vec<GroupLogOffset>,
        now_ms: i64,
        outcome: &mut Outcome,
    ) -> Result<(), GroupError> {
        let producer_epoch = i32::from(epoch);
        let before = self.transactions.get(&producer_id);
        let known_epoch = before.map_or(-1, |known| known.producer_epoch);
        let ended = before.is_some_and(|known| known.ended);
        if known_epoch > producer_epoch || (known_epoch == producer_epoch && ended) {
            return Err(GroupError::TransactionEnded {
                group: self.name.to_string(),
                producer_id,
                epoch,
            });
        }
        let held = before.filter(|known| !known.ended && known.producer_epoch == producer_epoch);
        let mut held = held.map_or_else(Vec::new, |known| known.offsets.clone());
        held.retain(|old| {
            !offsets
                .iter()
                .any(|new| partition_of(new) == partition_of(old))
        });
        held.extend(offsets);
        if held.len() > MAX_HELD {
            return Err(GroupError::limit(format!(
                "group {}: a transaction commits at most {MAX_HELD} offsets",
                self.name
            )));
        }
        self.begin_to_be(now_ms, outcome);
        let value = GroupLogTransaction {
            producer_epoch,
            ended: false,
            changed_ms: now_ms,
            offsets: held,
        };
        self.keep_transaction(producer_id, Some(value), outcome);
        Ok(())
    }

    /// The transaction has ended: what it holds is kept, or forgotten.
    pub(crate) fn close(
        &mut self,
        (producer_id, epoch): (i64, i16),
        commit: bool,
        now_ms: i64,
        outcome: &mut Outcome,
    ) -> Result<(), GroupError> {
        let producer_epoch = i32::from(epoch);
        let known = self.transactions.get(&producer_id);
        let over = |known: &GroupLogTransaction| {
            known.producer_epoch > producer_epoch
                || known.producer_epoch == producer_epoch && known.ended
        };
        if known.is_some_and(over) {
            return Ok(());
        }
        let held = known.filter(|known| known.producer_epoch == producer_epoch);
        let offsets = held.map_or_else(Vec::new, |known| known.offsets.clone());
        self.begin_to_be(now_ms, outcome);
        if commit {
            self.keep_offsets(offsets, now_ms, outcome);
        }
        let value = GroupLogTransaction {
            producer_epoch,
            ended: true,
            changed_ms: now_ms,
            offsets: Vec::new(),
        };
        self.keep_transaction(producer_id, Some(value), outcome);
        self.forget_transactions(now_ms, outcome);
        Ok(())
    }

    /// Those that ended long ago, and the oldest if there are too many: nothing of them is on its way any more.
    fn forget_transactions(&mut self, now_ms: i64, outcome: &mut Outcome) {
        let ended = self.transactions.iter().filter(|(_, known)| known.ended);
        let mut by_age: Vec<(i64, i64)> =
            ended.map(|(id, known)| (known.changed_ms, *id)).collect();
        by_age.sort_unstable();
        let too_many = by_age.len().saturating_sub(MAX_ENDED);
        let old = now_ms.saturating_sub(ENDED_MS);
        let forgotten = by_age.iter().enumerate();
        let forgotten = forgotten.filter(|(rank, (changed, _))| *rank < too_many || *changed < old);
        for (_, (_, id)) in forgotten {
            self.keep_transaction(*id, None, outcome);
        }
    }

    fn keep_transaction(
        &mut self,
        producer_id: i64,
        value: Option<GroupLogTransaction>,
        outcome: &mut Outcome,
    ) {
        match &value {
            Some(value) => self.transactions.insert(producer_id, value.clone()),
            None => self.transactions.remove(&producer_id),
        };
        outcome
            .entries
            .push(self.entry(What::Transaction(producer_id, value)));
    }

    /// An error if a transaction is open that may commit an offset of one of these partitions; of any, if none is named.
    pub(crate) fn check_settled(&self, partitions: &[TopicPartitions]) -> Result<(), GroupError> {
        let asked = |offset: &&CommittedOffset| {
            let of_topic = |topic: &TopicPartitions| {
                topic.topic == offset.topic && topic.partitions.contains(&offset.partition)
            };
            partitions.is_empty() || partitions.iter().any(of_topic)
        };
        let held = self.transactions.values().flat_map(|known| &known.offsets);
        match held.filter_map(|held| held.offset.as_ref()).find(asked) {
            None => Ok(()),
            Some(offset) => Err(GroupError::OffsetsPending {
                group: self.name.to_string(),
                topic: offset.topic.clone(),
                partition: offset.partition,
            }),
        }
    }

    fn check_owner(
        &self,
        member: &str,
        epoch: i32,
        partition: &TopicPartition,
    ) -> Result<(), GroupError> {
        let found = self.members.get(member);
        let found = found.ok_or_else(|| self.unknown(member))?;
        match found.owned.get(partition) {
            Some(owned) if owned.since <= epoch => Ok(()),
            _ => Err(GroupError::NotOwner {
                group: self.name.to_string(),
                member: member.to_owned(),
                topic: partition.0.to_string(),
                partition: partition.1,
                epoch,
            }),
        }
    }

    /// What was committed for a partition. Of another topic of the same name: nothing.
    pub(crate) fn offset(
        &self,
        partition: &TopicPartition,
        topology: &Topology,
    ) -> Option<CommittedOffset> {
        let kept = self.offsets.get(partition)?;
        let same = |shape: &Shape| shape.id.to_string() == kept.topic_id;
        topology
            .get(&partition.0)
            .is_none_or(same)
            .then(|| kept.offset.clone())
            .flatten()
    }

    /// All that was committed.
    pub(crate) fn offsets(&self, topology: &Topology) -> Vec<CommittedOffset> {
        let keys = self.offsets.keys();
        keys.filter_map(|key| self.offset(key, topology)).collect()
    }

    /// Forgets it, if it has no members.
    pub(crate) fn delete(&mut self, outcome: &mut Outcome) -> Result<(), GroupError> {
        if !self.members.is_empty() {
            return Err(GroupError::NotEmpty {
                group: self.name.to_string(),
                members: self.members.len(),
            });
        }
        let open = self.transactions.values().flat_map(|known| &known.offsets);
        if let Some(offset) = open.filter_map(|held| held.offset.as_ref()).next() {
            return Err(GroupError::OffsetsPending {
                group: self.name.to_string(),
                topic: offset.topic.clone(),
                partition: offset.partition,
            });
        }
        for id in std::mem::take(&mut self.transactions).into_keys() {
            outcome
                .entries
                .push(self.entry(What::Transaction(id, None)));
        }
        for (topic, partition) in std::mem::take(&mut self.offsets).into_keys() {
            let topic = topic.to_string();
            let key = GroupLogPartition { topic, partition };
            outcome.entries.push(self.entry(What::Offset(key, None)));
        }
        outcome.entries.push(self.entry(What::Group(None)));
        self.epoch = 0;
        self.empty_since_ms = None;
        Ok(())
    }

    /// Since when it has had no members.
    pub(crate) fn empty_since_ms(&self) -> Option<i64> {
        self.empty_since_ms
    }

    /// Gives everyone what is theirs, as far as no one else has it, and has everyone told what is new to them.
    pub(crate) fn settle(&mut self, topology: &Topology, now: Instant, outcome: &mut Outcome) {
        if std::mem::take(&mut self.stale) {
            self.retarget(topology, outcome);
        }
        if std::mem::take(&mut self.unsettled) {
            let mut changed: BTreeSet<Arc<str>> = BTreeSet::new();
            for (id, member) in &mut self.members {
                let meant = self.target.get(id);
                for (partition, owned) in &mut member.owned {
                    let stays = meant.is_some_and(|meant| meant.contains(partition));
                    if !stays && owned.revoking.is_none() {
                        let by = now + member.rebalance_timeout;
                        owned.revoking = Some(Revoking { version: None, by });
                        changed.insert(id.clone());
                    }
                }
                for partition in meant.into_iter().flatten() {
                    if !self.owners.contains_key(partition) {
                        self.owners.insert(partition.clone(), id.clone());
                        let since = self.epoch;
                        let revoking = None;
                        member
                            .owned
                            .insert(partition.clone(), Owned { since, revoking });
                        changed.insert(id.clone());
                    }
                }
            }
            for id in changed {
                self.keep_member(&id, outcome);
                if let Some(member) = self.members.get_mut(&id) {
                    member.news = true;
                }
            }
        }
        let epoch = self.epoch;
        for member in self.members.values_mut() {
            outcome.news.extend(member.tell(epoch));
        }
    }

    fn retarget(&mut self, topology: &Topology, outcome: &mut Outcome) {
        let mut ids: BTreeMap<Arc<str>, Arc<str>> = BTreeMap::new();
        let mut candidates = Candidates::new();
        let mut counts = Counts::new();
        let mut places = Places::new();
        for (id, member) in &self.members {
            let topics = member.topics(topology);
            for topic in &topics {
                let shape = &topology[topic];
                counts.insert(topic.clone(), shape.partitions);
                let racks = (0..).zip(&shape.racks);
                let known = racks.filter_map(|(index, rack)| Some((index, rack.clone()?)));
                places.extend(known.map(|(index, rack)| ((topic.clone(), index), rack)));
            }
            let before = match self.target.get(id) {
                Some(meant) => meant.clone(),
                None => member.owned.keys().cloned().collect(),
            };
            let order: Arc<str> = match &member.instance_id {
                Some(instance) => instance.as_str().into(),
                None => id.clone(),
            };
            ids.insert(order.clone(), id.clone());
            let rack = member.subscription.rack.as_deref().map(Into::into);
            let candidate = Candidate {
                topics,
                before,
                rack,
            };
            candidates.insert(order, candidate);
        }
        let target = match self.assignor() {
            Assignor::Range => assign::range(&candidates, &counts),
            Assignor::Uniform | Assignor::Unspecified => {
                assign::uniform(&candidates, &counts, &places)
            }
        };
        self.target = target
            .into_iter()
            .map(|(order, owned)| (ids[&order].clone(), owned))
            .collect();
        self.epoch += 1;
        self.unsettled = true;
        self.keep_group(outcome);
    }

    /// That for which most members ask.
    pub(crate) fn assignor(&self) -> Assignor {
        let range = |m: &&Member| m.subscription.assignor() == Assignor::Range;
        let asking = self.members.values().filter(range).count();
        match 2 * asking > self.members.len() {
            true => Assignor::Range,
            false => Assignor::Uniform,
        }
    }

    pub(crate) fn summary(&self) -> GroupSummary {
        let moving = |member: &Member| member.owned.values().any(|owned| owned.revoking.is_some());
        let lacking = |meant: &BTreeSet<TopicPartition>| {
            meant
                .iter()
                .any(|partition| !self.owners.contains_key(partition))
        };
        let state = if self.members.is_empty() {
            GroupState::Empty
        } else if self.stale
            || self.members.values().any(moving)
            || self.target.values().any(lacking)
        {
            GroupState::Rebalancing
        } else {
            GroupState::Stable
        };
        GroupSummary {
            group_id: self.name.to_string(),
            state: state.into(),
            members: u32::try_from(self.members.len()).unwrap_or(u32::MAX),
            epoch: self.epoch,
        }
    }

    pub(crate) fn figures(&self, topology: &Topology) -> GroupFigures {
        let offsets = self.offsets(topology).into_iter();
        GroupFigures {
            group: self.name.clone(),
            members: self.members.len(),
            offsets: offsets
                .map(|o| (o.topic.into(), o.partition, o.offset))
                .collect(),
        }
    }

    pub(crate) fn describe(&self, topology: &Topology) -> v1::DescribeGroupResponse {
        let member = |(id, member): (&Arc<str>, &Member)| {
            let owned = member.owned.iter();
            let (revoking, owned): (Vec<_>, Vec<_>) =
                owned.partition(|(_, owned)| owned.revoking.is_some());
            v1::GroupMember {
                member_id: id.to_string(),
                instance_id: member.instance_id.clone(),
                client_id: member.client_id.clone(),
                owned: by_topic(owned.into_iter().map(|(partition, _)| partition)),
                revoking: by_topic(revoking.into_iter().map(|(partition, _)| partition)),
                connected: member.session.is_some(),
            }
        };
        v1::DescribeGroupResponse {
            summary: Some(self.summary()),
            members: self.members.iter().map(member).collect(),
            offsets: self.offsets(topology),
            assignor: self.assignor().into(),
        }
    }

    /// All of it, as it would be written if nothing had been.
    pub(crate) fn snapshot(&self) -> Vec<Entry> {
        let mut all = vec![self.group_entry()];
        for (id, member) in &self.members {
            all.push(self.entry(What::Member(id.to_string(), Some(member.kept()))));
        }
        for ((topic, partition), value) in &self.offsets {
            let key = GroupLogPartition {
                topic: topic.to_string(),
                partition: *partition,
            };
            all.push(self.entry(What::Offset(key, Some(value.clone()))));
        }
        for (id, value) in &self.transactions {
            all.push(self.entry(What::Transaction(*id, Some(value.clone()))));
        }
        all
    }

    fn entry(&self, what: What) -> Entry {
        let group = self.name.to_string();
        Entry { group, what }
    }

    fn group_entry(&self) -> Entry {
        self.entry(What::Group(Some(GroupLogGroup {
            epoch: self.epoch,
            empty_since_ms: self.empty_since_ms,
        })))
    }

    fn keep_group(&self, outcome: &mut Outcome) {
        outcome.entries.push(self.group_entry());
    }

    fn keep_member(&self, id: &str, outcome: &mut Outcome) {
        if let Some(member) = self.members.get(id) {
            let what = What::Member(id.to_owned(), Some(member.kept()));
            outcome.entries.push(self.entry(what));
        }
    }

    fn forget_member(&self, id: &str, outcome: &mut Outcome) {
        let what = What::Member(id.to_owned(), None);
        outcome.entries.push(self.entry(what));
    }
}

impl Member {
    fn new(hello: MemberHello, session: SessionId, now: Instant) -> Result<Self, GroupError> {
        check_id("member_id", &hello.member_id)?;
        if let Some(instance) = &hello.instance_id {
            check_id("instance_id", instance)?;
        }
        if hello.client_id.len() > MAX_ID_BYTES {
            return Err(GroupError::limit(format!(
                "client_id: at most {MAX_ID_BYTES} bytes"
            )));
        }
        let subscription = hello.subscription.unwrap_or_default();
        let pattern = check_subscription(&subscription)?;
        let default = match hello.instance_id {
            Some(_) => STATIC_SESSION,
            None => SESSION,
        };
        let session_timeout = timeout("session_timeout_ms", hello.session_timeout_ms, default)?;
        if session_timeout < SHORTEST_SESSION {
            let message = format!("it must be at least {SHORTEST_SESSION:?}");
            return Err(GroupError::invalid("session_timeout_ms", message));
        }
        Ok(Self {
            instance_id: hello.instance_id,
            client_id: hello.client_id,
            subscription,
            pattern,
            session_timeout,
            rebalance_timeout: timeout(
                "rebalance_timeout_ms",
                hello.rebalance_timeout_ms,
                REBALANCE,
            )?,
            owned: BTreeMap::new(),
            session: Some(session),
            deadline: now + session_timeout,
            told: 0,
            news: true,
        })
    }

    /// Who was there with the coordinator before has its whole session to come to this one.
    fn restore(kept: GroupLogMember, now: Instant) -> Self {
        let session_timeout = Duration::from_millis(kept.session_timeout_ms.into());
        let rebalance_timeout = Duration::from_millis(kept.rebalance_timeout_ms.into());
        let subscription = kept.subscription.unwrap_or_default();
        let owned = kept.owned.into_iter().map(|owned| {
            let by = now + rebalance_timeout;
            let revoking = owned.revoking.then_some(Revoking { version: None, by });
            let since = owned.since;
            let partition = (owned.topic.into(), owned.partition);
            (partition, Owned { since, revoking })
        });
        Self {
            owned: owned.collect(),
            instance_id: kept.instance_id,
            client_id: kept.client_id,
            pattern: check_subscription(&subscription).unwrap_or_default(),
            subscription,
            session_timeout,
            rebalance_timeout,
            session: None,
            deadline: now + session_timeout,
            told: 0,
            news: true,
        }
    }

    fn kept(&self) -> GroupLogMember {
        let owned = self
            .owned
            .iter()
            .map(|((topic, partition), owned)| GroupLogOwned {
                topic: topic.to_string(),
                partition: *partition,
                since: owned.since,
                revoking: owned.revoking.is_some(),
            });
        GroupLogMember {
            instance_id: self.instance_id.clone(),
            client_id: self.client_id.clone(),
            subscription: Some(self.subscription.clone()),
            session_timeout_ms: millis(self.session_timeout),
            rebalance_timeout_ms: millis(self.rebalance_timeout),
            owned: owned.collect(),
        }
    }

    /// What is kept of this one, but for what it owns, which is the other's.
    fn kept_like(&self, other: &Member) -> GroupLogMember {
        let owned = other.kept().owned;
        GroupLogMember {
            owned,
            ..self.kept()
        }
    }

    /// What it reads of what there is.
    fn topics(&self, topology: &Topology) -> BTreeSet<Arc<str>> {
        let named = self.subscription.topics.iter();
        let named = named.filter_map(|topic| topology.get_key_value(topic.as_str()));
        let named = named.map(|(topic, _)| topic.clone());
        let Some(pattern) = &self.pattern else {
            return named.collect();
        };
        let matching = topology.keys().filter(|topic| pattern.is_match(topic));
        named.chain(matching.cloned()).collect()
    }

    /// What it is to be told, if that is new and it can be reached.
    fn tell(&mut self, epoch: i32) -> Option<News> {
        let session = self.session.filter(|_| self.news)?;
        self.news = false;
        self.told += 1;
        for owned in self.owned.values_mut() {
            if let Some(revoking) = &mut owned.revoking {
                revoking.version.get_or_insert(self.told);
            }
        }
        let stays = self
            .owned
            .iter()
            .filter(|(_, owned)| owned.revoking.is_none());
        Some(News {
            session,
            assignment: Ok(v1::Assignment {
                version: self.told,
                epoch,
                partitions: by_topic(stays.map(|(partition, _)| partition)),
            }),
        })
    }
}

fn partition_of(offset: &GroupLogOffset) -> Option<(&str, i32)> {
    let offset = offset.offset.as_ref()?;
    Some((&offset.topic, offset.partition))
}

/// Sorted partitions, gathered by their topics.
pub(crate) fn by_topic<'a>(
    partitions: impl IntoIterator<Item = &'a TopicPartition>,
) -> Vec<TopicPartitions> {
    let mut topics: Vec<TopicPartitions> = Vec::new();
    for (topic, partition) in partitions {
        match topics.last_mut() {
            Some(last) if last.topic == **topic => last.partitions.push(*partition),
            _ => topics.push(TopicPartitions {
                topic: topic.to_string(),
                partitions: vec![*partition],
            }),
        }
    }
    topics
}

/// One by one.
pub(crate) fn flat(topics: &[TopicPartitions]) -> Vec<TopicPartition> {
    let all = topics.iter().flat_map(|topic| {
        let name: Arc<str> = topic.topic.as_str().into();
        let partitions = topic.partitions.iter();
        partitions.map(move |partition| (name.clone(), *partition))
    });
    all.collect()
}

pub(crate) fn check_id(field: &'static str, id: &str) -> Result<(), GroupError> {
    match id.len() {
        0 => Err(GroupError::invalid(field, "it is empty")),
        1..=MAX_ID_BYTES => Ok(()),
        _ => Err(GroupError::limit(format!(
            "{field}: at most {MAX_ID_BYTES} bytes"
        ))),
    }
}

fn check_subscription(subscription: &v1::Subscription) -> Result<Option<Regex>, GroupError> {
    if subscription.topics.len() > MAX_TOPICS {
        return Err(GroupError::limit(format!(
            "a member names at most {MAX_TOPICS} topics; a pattern may match more"
        )));
    }
    if subscription.topics.is_empty() && subscription.pattern.is_none() {
        let message = "the member names no topic and no pattern";
        return Err(GroupError::invalid("subscription", message));
    }
    if Assignor::try_from(subscription.assignor).is_err() {
        let message = format!("{} is not a value of Assignor", subscription.assignor);
        return Err(GroupError::invalid("assignor", message));
    }
    if subscription.rack.as_ref().map_or(0, String::len) > MAX_ID_BYTES {
        let message = format!("has more than {MAX_ID_BYTES} bytes");
        return Err(GroupError::invalid("rack", message));
    }
    let Some(pattern) = &subscription.pattern else {
        return Ok(None);
    };
    if pattern.len() > MAX_PATTERN_BYTES {
        return Err(GroupError::limit(format!(
            "a pattern has at most {MAX_PATTERN_BYTES} bytes"
        )));
    }
    // The whole name: alternatives are tried as one.
    let whole = Regex::new(&format!("^(?:{pattern})$"));
    let regex = whole.map_err(|error| GroupError::invalid("pattern", error.to_string()))?;
    Ok(Some(regex))
}

fn check_commit(commit: &OffsetCommit, topology: &Topology) -> Result<Uuid, GroupError> {
    let OffsetCommit {
        topic, partition, ..
    } = commit;
    let Some(Shape { id, partitions, .. }) = topology.get(topic.as_str()) else {
        return Err(GroupError::UnknownTopic(topic.clone()));
    };
    if !(0..*partitions).contains(partition) {
        return Err(GroupError::UnknownPartition {
            topic: topic.clone(),
            partition: *partition,
            partitions: *partitions,
        });
    }
    if commit.offset < 0 {
        let message = format!("{topic}/{partition}: {} is no offset", commit.offset);
        return Err(GroupError::invalid("offset", message));
    }
    if commit.metadata.len() > MAX_METADATA_BYTES {
        return Err(GroupError::limit(format!(
            "{topic}/{partition}: metadata of {} bytes; at most {MAX_METADATA_BYTES} are kept",
            commit.metadata.len()
        )));
    }
    Ok(*id)
}

fn timeout(field: &'static str, ms: u32, default: Duration) -> Result<Duration, GroupError> {
    match Duration::from_millis(ms.into()) {
        Duration::ZERO => Ok(default),
        asked if asked <= LONGEST_TIMEOUT => Ok(asked),
        _ => {
            let message = format!("it must be at most {LONGEST_TIMEOUT:?}");
            Err(GroupError::invalid(field, message))
        }
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
