//! What goes wrong in a run, and what people do to a cluster.

use millrace_crds::coordination::{PartitionAssignment, Replica};
use uuid::Uuid;

use super::{
    coordination::CLUSTER,
    coverage::Seen,
    kube::Call,
    process::{Pid, Process},
    queue::Event,
    swarm::Fault,
    world::World,
};
use crate::replication::LogEnds;

impl World {
    pub(super) fn restart(&mut self, broker: i32) {
        let node = &mut self.nodes[broker as usize];
        let Some(disk) = node.disk.take() else { return };
        node.boots += 1;
        let pid = Pid {
            broker,
            boot: node.boots,
        };
        node.process = Some(Process::new(pid, disk, &self.record));
        self.with(pid, |process, cx| process.start(cx));
        self.trace.line(self.at, || format!("{pid} starts"));
    }

    /// Processes that ended by themselves are started again.
    pub(super) fn end_processes(&mut self) {
        for broker in 0..self.swarm.brokers {
            let process = self.nodes[broker as usize].process.as_ref();
            if process.is_some_and(|process| process.has_ended) {
                self.trace.line(self.at, || format!("{broker} has ended"));
                self.take_down(broker, false);
            }
        }
    }

    /// Goes on with what came while it stood still.
    pub(super) fn resume(&mut self, broker: i32) {
        let node = &mut self.nodes[broker as usize];
        if node.paused_until <= self.at {
            for event in std::mem::take(&mut node.held) {
                self.queue.push(self.at, event);
            }
        }
    }

    /// Ends a process, to be started again in a while. If the power fails, what was not synced may be gone.
    fn take_down(&mut self, broker: i32, power_fails: bool) {
        let node = &mut self.nodes[broker as usize];
        let Some(process) = node.process.take() else {
            return;
        };
        let Process { pid, mut disk, .. } = process;
        node.paused_until = self.at;
        self.resume(broker);
        let fsync = self.swarm.fsync;
        for (key, log) in &mut disk.logs {
            let end = log.log_end();
            if let Err(problem) = log.restart(power_fails, fsync, &mut self.rng) {
                self.oracle
                    .fail("a broker starts again", || format!("{pid}: {problem}"));
            }
            if log.log_end() < end {
                self.coverage.note(Seen::UnsyncedLost);
            }
            self.dirty.insert(*key);
        }
        if power_fails && !fsync && !broken!(KeepStoreId) {
            disk.store = Uuid::from_u128(self.rng.u128(..));
        }
        self.nodes[broker as usize].disk = Some(disk);
        for session in self.net.of(pid) {
            self.reset(session);
        }
        let down = match self.healed_at {
            Some(_) => 500,
            None => self.rng.u64(50..=self.swarm.outage),
        };
        self.queue.push(self.at + down, Event::Restart(broker));
    }

    /// Whether so few of the stores that must have everything are gone that one more may go.
    fn may_destroy(&self, broker: i32) -> bool {
        let Some(store) = self.nodes[broker as usize].disk().map(|disk| disk.store) else {
            return false;
        };
        let replica = Replica { id: broker, store };
        self.keys.iter().all(|key| {
            let lease = self.lease(*key);
            let isr = lease.map(|lease| lease.assignment.isr).unwrap_or_default();
            let gone = isr.iter().filter(|replica| !self.exists(**replica));
            !isr.contains(&replica) || gone.count() + 1 < self.swarm.min_isr.min(isr.len())
        })
    }

    /// Whether a store is still there.
    pub(super) fn exists(&self, replica: Replica) -> bool {
        let disk = self.nodes[replica.id as usize].disk();
        disk.is_some_and(|disk| disk.store == replica.store)
    }

    pub(super) fn on_fault(&mut self) {
        if self.healed_at.is_some() {
            return;
        }
        let calm = self.rng.u64(1..=2 * self.swarm.calm);
        self.queue.push(self.at + calm, Event::Fault);
        if let Some(fault) = self.swarm.draw_fault(&mut self.rng) {
            self.trace.line(self.at, || format!("fault: {fault:?}"));
            self.inflict(fault);
        }
    }

    fn inflict(&mut self, fault: Fault) {
        let broker = self.rng.i32(0..self.swarm.brokers);
        let outage = self.rng.u64(1..=self.swarm.outage);
        match fault {
            Fault::Kill => {
                self.coverage.note(Seen::Kill);
                self.take_down(broker, false);
            }
            Fault::KillAll => {
                let power = self.swarm.fsync && self.rng.bool();
                (0..self.swarm.brokers).for_each(|broker| self.take_down(broker, power));
            }
            Fault::PowerLoss if self.swarm.fsync || self.may_destroy(broker) => {
                self.coverage.note(Seen::PowerLoss);
                self.take_down(broker, true);
            }
            Fault::LoseStore if self.may_destroy(broker) => {
                self.coverage.note(Seen::StoreLost);
                self.take_down(broker, true);
                let mut disk = self.new_disk();
                let node = &mut self.nodes[broker as usize];
                if let (true, Some(lost)) = (broken!(KeepStoreId), &node.disk) {
                    disk.store = lost.store;
                }
                node.disk = Some(disk);
                self.dirty.extend(&self.keys);
            }
            Fault::PowerLoss | Fault::LoseStore => {}
            Fault::Pause => {
                self.coverage.note(Seen::Pause);
                let long = self.rng.u32(0..10) == 0;
                if long {
                    self.coverage.note(Seen::LongPause);
                }
                let pause = if long { 120_000 } else { outage };
                let until = self.at + pause;
                let node = &mut self.nodes[broker as usize];
                node.paused_until = node.paused_until.max(until);
                self.queue.push(until, Event::Resume(broker));
            }
            Fault::Stop => {
                self.coverage.note(Seen::GracefulStop);
                if let Some(pid) = self.process_of(broker) {
                    self.with(pid, |process, cx| process.begin_stop(cx));
                }
            }
            Fault::CutLink => {
                self.coverage.note(Seen::CutOneWay);
                let other = self.rng.i32(0..self.swarm.brokers);
                self.net.cut(broker, other);
            }
            Fault::Isolate => {
                self.coverage.note(Seen::Isolated);
                for other in (0..self.swarm.brokers).filter(|other| *other != broker) {
                    self.net.cut(broker, other);
                    self.net.cut(other, broker);
                }
            }
            Fault::MendLinks => self.net.mend(),
            Fault::CutApi => {
                self.coverage.note(Seen::ApiCut);
                self.net.without_api.insert(broker);
            }
            Fault::ApiDown => {
                self.coverage.note(Seen::ApiDown);
                self.kube.down = true;
                self.queue.push(self.at + outage, Event::ApiBack);
            }
            Fault::BreakWatch => {
                if let Some(pid) = self.process_of(broker) {
                    self.with(pid, |process, cx| process.on_watch_broken(cx));
                }
            }
            Fault::StallWatch => self.nodes[broker as usize].stalled_until = self.at + outage,
            Fault::JumpClock => {
                self.coverage.note(Seen::ClockJump);
                self.nodes[broker as usize].ahead += self.rng.u64(1..3_600_000);
            }
            Fault::Reassign => self.reassign(),
            Fault::Retain => self.retain(broker),
            Fault::ResetSessions => self.net.all().into_iter().for_each(|s| self.reset(s)),
        }
    }

    /// Gives a partition other replicas, as the operator does.
    fn reassign(&mut self) {
        let key = self.keys[self.rng.usize(0..self.keys.len())];
        let replicas = self.placement();
        let name = PartitionAssignment::new(key.0, key.1, Vec::new()).lease_name(CLUSTER);
        let (Some(mut lease), Some(object)) = (self.lease(key), self.kube.get(&name)) else {
            return;
        };
        self.coverage.note(Seen::Reassigned);
        let mut object = object.clone();
        let epoch = lease.held.epoch;
        lease = lease.reassigned(replicas);
        if broken!(ReassignInEpoch) {
            lease.held.epoch = epoch;
        }
        lease.assignment.write_id = Uuid::from_u128(self.rng.u128(..));
        lease.write(&mut object, CLUSTER);
        self.write_or_read(Call::Write(Box::new(object)));
    }

    fn retain(&mut self, broker: i32) {
        let Some(process) = &mut self.nodes[broker as usize].process else {
            return;
        };
        for log in process.disk.logs.values_mut() {
            if log.retain(&mut self.rng) {
                self.coverage.note(Seen::Retained);
                if log.log_start() == log.log_end() {
                    self.coverage.note(Seen::Emptied);
                }
            }
        }
        let pid = process.pid;
        self.trace
            .line(self.at, || format!("{pid} applies retention"));
    }

    pub(super) fn heal(&mut self) {
        self.healed_at = Some(self.at);
        self.trace.line(self.at, || "all heals".to_owned());
        self.net.mend();
        self.kube.down = false;
        for broker in 0..self.swarm.brokers {
            let node = &mut self.nodes[broker as usize];
            node.paused_until = self.at;
            node.stalled_until = 0;
            // A session's duration is three renewals, if clocks agree on what a second is.
            node.mend_clock(self.at);
            self.resume(broker);
        }
        // What is on its way out of order would be waited for in vain.
        self.swarm.heal();
        for session in self.net.all() {
            self.reset(session);
        }
        for broker in 0..self.swarm.brokers {
            self.restart(broker);
        }
        self.queue.push(self.at + 2_000, Event::LookWhetherHealed);
    }
}
