//! What must hold of a world as a whole: always, and once all has healed.

use std::collections::BTreeSet;

use millrace_crds::coordination::PartitionLease;

use super::{log::SimLog, process::Role, queue::Event, world::World};
use crate::{partition::PartitionKey, replication::LogEnds};

/// Once healed, all has to be well within this time, in milliseconds.
const RECOVERY: u64 = 60_000;

impl World {
    /// After each event: of all partitions of which something changed.
    pub(super) fn look(&mut self) {
        for key in std::mem::take(&mut self.dirty) {
            let Some(lease) = self.lease(key) else {
                continue;
            };
            for replica in &lease.assignment.isr {
                let disk = self.nodes[replica.id as usize].disk();
                let Some(disk) = disk.filter(|disk| disk.store == replica.store) else {
                    continue;
                };
                let empty = SimLog::default();
                let log = disk.logs.get(&key).unwrap_or(&empty);
                self.oracle.check_electable(key, *replica, log);
            }
            self.look_at_leaders(key, &lease);
        }
    }

    fn look_at_leaders(&mut self, key: PartitionKey, lease: &PartitionLease) {
        for process in self.nodes.iter().filter_map(|node| node.process.as_ref()) {
            let hosted = process.hosted.get(&key).map(|hosted| &hosted.role);
            let Some(Role::Leader(leader)) = hosted else {
                continue;
            };
            let acknowledged = self.oracle.acknowledged_end(key);
            let is_newest = leader.epoch() == lease.held.epoch;
            if is_newest
                && leader.knows_latest()
                && leader.high_watermark() < acknowledged
                && !self.oracle.may_have_lost(key)
            {
                let (pid, known) = (process.pid, leader.high_watermark());
                self.oracle
                    .fail("the latest offset is never an old one", || {
                        format!(
                            "{pid} says {known}, and all before {acknowledged} was acknowledged"
                        )
                    });
            }
        }
    }

    pub(super) fn look_whether_healed(&mut self) {
        let Some(problem) = self.problem() else {
            self.is_well = true;
            return;
        };
        let healed_at = self.healed_at.unwrap_or_default();
        if self.at > healed_at + RECOVERY {
            self.oracle
                .fail("all is well again after all has healed", || problem);
        }
        self.queue.push(self.at + 500, Event::LookWhetherHealed);
    }

    /// What is not well yet.
    fn problem(&self) -> Option<String> {
        let mut producers = self.producers.iter();
        let waiting = producers.position(|p| p.in_flight() > 0 && self.may_be_led(p.key));
        if let Some(index) = waiting {
            return Some(format!(
                "producer {index} waits: {:?}",
                self.producers[index]
            ));
        }
        let mut keys = self.keys.iter().filter(|key| self.may_be_led(**key));
        keys.find_map(|key| self.problem_of(*key))
    }

    /// Whether a replica of the ISR is left. It may not be if the first one was elected while its store was lost: of no record, but who
    /// knows.
    fn may_be_led(&self, key: PartitionKey) -> bool {
        let isr = self.lease(key).map(|lease| lease.assignment.isr);
        isr.is_none_or(|isr| isr.is_empty() || isr.iter().any(|replica| self.exists(*replica)))
    }

    fn problem_of(&self, key: PartitionKey) -> Option<String> {
        let lease = self.lease(key)?;
        let index = key.1;
        let mut processes = self.nodes.iter().filter_map(|node| node.process.as_ref());
        if processes.any(|process| process.has_stopped_following(key)) {
            // Only after an unclean election, else it was noticed.
            return None;
        }
        let assignment = &lease.assignment;
        let Some(leader) = assignment.leader else {
            return Some(format!("partition {index} has no leader: {lease:?}"));
        };
        let log_at = |id: i32| {
            let process = self.nodes[id as usize].process.as_ref()?;
            process.disk.logs.get(&key)
        };
        let process = self.nodes[leader.id as usize].process.as_ref();
        let leads = process.is_some_and(|process| process.leads_in(key).is_some());
        let Some(log) = log_at(leader.id).filter(|_| leads) else {
            return Some(format!(
                "the leader of partition {index} does not lead: {lease:?}"
            ));
        };
        let in_sync: BTreeSet<i32> = assignment.isr.iter().map(|replica| replica.id).collect();
        if self.oracle.may_have_lost(key) {
            // A log that retention emptied before an unclean election may begin inside of a batch of its leader's: then it can't follow.
            return None;
        }
        if !assignment.replicas.iter().all(|id| in_sync.contains(id)) {
            return Some(format!(
                "not all replicas of {index} are in sync: {lease:?}"
            ));
        }
        let listed: BTreeSet<i32> = assignment.replicas.iter().copied().collect();
        if in_sync != listed {
            return Some(format!(
                "others than the replicas of {index} are in sync: {lease:?}"
            ));
        }
        let mut others = (0..self.swarm.brokers).filter(|id| !listed.contains(id));
        if let Some(id) = others.find(|id| log_at(*id).is_some()) {
            return Some(format!("broker {id} still has a log of {index}: {lease:?}"));
        }
        if log.high_watermark != log.log_end()
            || log.log_end() < self.oracle.committed_end(key) && !self.oracle.may_have_lost(key)
        {
            return Some(format!("not all of {index} is committed: {lease:?}"));
        }
        for id in &assignment.replicas {
            let Some(copy) = log_at(*id) else {
                return Some(format!("broker {id} has no log of {index}: {lease:?}"));
            };
            let from = copy.log_start().max(log.log_start());
            let is_same = copy.high_watermark == log.high_watermark
                && copy.batches(from, i64::MAX) == log.batches(from, i64::MAX);
            if !is_same {
                return Some(format!(
                    "broker {id} has another log than {} of {index}",
                    leader.id
                ));
            }
        }
        let mut consumers = self.consumers.iter().filter(|consumer| consumer.key == key);
        let behind = consumers.find(|consumer| consumer.next < log.high_watermark)?;
        Some(format!(
            "a consumer of {index} is at {}: {lease:?}",
            behind.next
        ))
    }
}
