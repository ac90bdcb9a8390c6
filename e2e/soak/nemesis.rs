//! Carries out the plan.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use millrace_e2e::history::Event;
use millrace_e2e::leases::Leases;
use uuid::Uuid;

use crate::load::{Load, TOPIC};
use crate::plan::{Fault, Kind, Plan};
use crate::target::Target;

/// Between two looks at whether all processes run that should.
const LOOK: Duration = Duration::from_millis(100);

/// What it works on, and what it noticed.
pub(crate) struct Nemesis<'a, T> {
    pub(crate) target: &'a mut T,
    pub(crate) load: &'a Load,
    /// How many replicas `acks=all` waits for: one volume fewer may be lost.
    pub(crate) min_in_sync: usize,
    /// While nothing is broken, all replicas must be in sync within this time.
    pub(crate) whole_within: Duration,
    /// Ends of brokers that no one asked for.
    pub(crate) own_ends: Vec<String>,
    /// What must not happen, besides what the history tells.
    pub(crate) problems: Vec<String>,
}

/// What must hold after a while.
#[derive(Clone, Copy)]
enum Due {
    /// All replicas are in sync.
    Whole,
    /// A broker has registered with another volume than this. Until then all that one can see is as it was before, and a second volume would be
    /// lost while the first one is missing.
    NewVolume(i32, Option<Uuid>),
}

impl Due {
    async fn holds(self, leases: &Leases) -> Result<()> {
        match self {
            Self::Whole => leases.wait_until_whole(TOPIC, Duration::ZERO).await,
            Self::NewVolume(id, lost) => {
                let store = leases.store(id).await?;
                ensure!(
                    store != lost,
                    "broker {id} has not registered with a new volume"
                );
                Ok(())
            }
        }
    }
}

impl<T: Target> Nemesis<'_, T> {
    /// Breaks things until the time is over, or that many faults have come. Returns with all mended and started.
    pub(crate) async fn run(
        &mut self,
        mut plan: Plan,
        duration: Duration,
        faults_max: usize,
    ) -> Result<usize> {
        let begun = Instant::now();
        let left = || duration.saturating_sub(begun.elapsed());
        let mut faults = 0;
        while faults < faults_max {
            let Some(fault) = plan.next() else {
                self.wait(left()).await?;
                break;
            };
            self.wait(fault.after.min(left())).await?;
            let left = left();
            if left.is_zero() {
                break;
            }
            if fault.kind == Kind::Wipe && !self.may_wipe().await? {
                self.say(&fault, "left out: one more volume lost may lose records");
                continue;
            }
            self.befall(&fault, fault.lasts.min(left)).await?;
            faults += 1;
            // A broker that stands aside after it could not write must come back by itself.
            if fault.kind == Kind::FillDisk {
                self.become_whole("after a disk was full").await?;
            }
        }
        Ok(faults)
    }

    async fn befall(&mut self, fault: &Fault, lasts: Duration) -> Result<()> {
        self.say(fault, &format!("for {lasts:.1?}"));
        let from = self.load.recorder.now();
        let mut lost = Vec::new();
        if fault.kind == Kind::Wipe {
            for id in &fault.brokers {
                lost.push((*id, self.target.leases().store(*id).await?));
            }
        }
        self.problems.extend(self.target.begin(fault).await?);
        let off: &[i32] = if fault.kind.takes_away() {
            &fault.brokers
        } else {
            &[]
        };
        self.wait_without(lasts, off).await?;
        self.target.mend(fault).await?;
        for (id, store) in lost {
            let due = Due::NewVolume(id, store);
            self.in_time("after a volume was lost", due).await?;
        }
        self.load.record(&Event::Fault {
            kind: fault.kind.name(),
            brokers: fault.brokers.clone(),
            from,
            until: self.load.recorder.now(),
        })
    }

    async fn may_wipe(&mut self) -> Result<bool> {
        Ok(self.min_in_sync > 1 && self.become_whole("before a volume is lost").await?)
    }

    /// Waits until all replicas are in sync, which they must be in time: nothing is broken now.
    pub(crate) async fn become_whole(&mut self, when: &str) -> Result<bool> {
        self.in_time(when, Due::Whole).await
    }

    /// Looks again and again whether something holds that must within a time. It is a problem if it does not.
    async fn in_time(&mut self, when: &str, due: Due) -> Result<bool> {
        let until = Instant::now() + self.whole_within;
        loop {
            // What ends by itself is started again.
            self.restart_ended(&[]).await?;
            match due.holds(self.target.leases()).await {
                Ok(()) => return Ok(true),
                Err(error) if Instant::now() >= until => {
                    let text = format!("{when}, not in {:?}: {error:#}", self.whole_within);
                    eprintln!("  {text}");
                    self.problems.push(text);
                    return Ok(false);
                }
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// Lets time pass, and starts again what ends by itself.
    pub(crate) async fn wait(&mut self, time: Duration) -> Result<()> {
        self.wait_without(time, &[]).await
    }

    /// The same, but those that are off are to stay so.
    async fn wait_without(&mut self, time: Duration, off: &[i32]) -> Result<()> {
        let until = Instant::now() + time;
        loop {
            self.restart_ended(off).await?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            tokio::time::sleep(left.min(LOOK)).await;
        }
    }

    async fn restart_ended(&mut self, off: &[i32]) -> Result<()> {
        let ended = self.target.restart_ended(off).await?;
        ended.iter().for_each(|text| eprintln!("  {text}"));
        self.own_ends.extend(ended);
        Ok(())
    }

    fn say(&self, fault: &Fault, what: &str) {
        let at = Duration::from_micros(self.load.recorder.now());
        let brokers = if fault.brokers.is_empty() {
            String::new()
        } else {
            format!(" {:?}", fault.brokers)
        };
        eprintln!(
            "{:7.1} s  {}{brokers} {what}",
            at.as_secs_f64(),
            fault.kind.name()
        );
    }
}
