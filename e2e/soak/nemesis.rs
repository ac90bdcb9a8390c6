//! Carries out the plan on brokers that are processes of this machine.

use std::time::{Duration, Instant};

use anyhow::Result;
use millrace_e2e::fleet::{Fleet, State};
use millrace_e2e::history::Event;
use millrace_e2e::wires::Node;

use crate::load::{Load, TOPIC};
use crate::plan::{Fault, Kind, Plan};

/// Between two looks at whether all processes run that should.
const LOOK: Duration = Duration::from_millis(100);
/// What ends by itself is started again after this time, as Kubernetes would.
const RESTART: Duration = Duration::from_secs(1);

/// What it works on, and what it noticed.
pub(crate) struct Nemesis<'a> {
    pub(crate) fleet: &'a mut Fleet,
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

impl Nemesis<'_> {
    /// Breaks things until the time is over. Returns with all mended and started.
    pub(crate) async fn run(&mut self, mut plan: Plan, duration: Duration) -> Result<usize> {
        let until = Instant::now() + duration;
        let mut faults = 0;
        while Instant::now() < until {
            let Some(fault) = plan.next() else {
                self.wait(until.saturating_duration_since(Instant::now()))
                    .await?;
                break;
            };
            self.wait(fault.after).await?;
            let left = until.saturating_duration_since(Instant::now());
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
        self.begin(fault).await?;
        let off: &[i32] = match fault.kind.takes_away() {
            true => &fault.brokers,
            false => &[],
        };
        self.wait_without(lasts, off).await?;
        self.mend(fault).await?;
        self.load.record(&Event::Fault {
            kind: fault.kind.name(),
            brokers: fault.brokers.clone(),
            from,
            until: self.load.recorder.now(),
        })
    }

    async fn begin(&mut self, fault: &Fault) -> Result<()> {
        for id in fault.brokers.iter().copied() {
            match fault.kind {
                Kind::Kill => self.fleet.broker(id)?.kill(),
                Kind::Wipe => {
                    let broker = self.fleet.broker(id)?;
                    broker.kill();
                    broker.wipe()?;
                }
                Kind::Restart => {
                    let stopped = self.fleet.broker(id)?.stop().await;
                    self.problems
                        .extend(stopped.err().map(|error| format!("{error:#}")));
                }
                Kind::Pause => self.fleet.broker(id)?.pause()?,
                Kind::CutApi => self.cut(id, &[Node::Api]),
                Kind::CutBrokers => self.cut(id, &self.others(id)),
                Kind::CutAll => {
                    let everybody = [self.others(id), vec![Node::Api, Node::Client]].concat();
                    self.cut(id, &everybody);
                }
                Kind::CutOneWay => {
                    for other in self.others(id) {
                        let wires = self.fleet.wires();
                        wires.set(Node::Broker(id), other, |link| link.cut = true);
                    }
                }
                Kind::Slow => {
                    let everybody = [self.others(id), vec![Node::Api, Node::Client]].concat();
                    for other in everybody {
                        let wires = self.fleet.wires();
                        wires.between(Node::Broker(id), other, |link| link.delay = fault.delay);
                    }
                }
                Kind::FillDisk => self.fleet.broker(id)?.fill_disk(fault.leave)?,
                Kind::SlowDisk => self.fleet.broker(id)?.slow_disk(fault.delay)?,
                Kind::ApiServer => {}
            }
        }
        if fault.kind == Kind::ApiServer {
            self.fleet.stop_api_server();
        }
        Ok(())
    }

    async fn mend(&mut self, fault: &Fault) -> Result<()> {
        self.fleet.wires().heal();
        if fault.kind == Kind::ApiServer {
            self.fleet.start_api_server().await?;
        }
        for id in fault.brokers.iter().copied() {
            match fault.kind {
                Kind::FillDisk => self.fleet.broker(id)?.free_disk()?,
                Kind::SlowDisk => self.fleet.broker(id)?.slow_disk(Duration::ZERO)?,
                _ => {}
            }
            match self.fleet.broker(id)?.state() {
                State::Paused => self.fleet.broker(id)?.resume()?,
                State::Off => self.fleet.start_broker(id)?,
                State::On => {}
            }
        }
        Ok(())
    }

    fn cut(&self, id: i32, others: &[Node]) {
        for other in others {
            let wires = self.fleet.wires();
            wires.between(Node::Broker(id), *other, |link| link.cut = true);
        }
    }

    fn others(&self, id: i32) -> Vec<Node> {
        let all = (0..).map(Node::Broker).take(self.fleet.size());
        all.filter(|other| *other != Node::Broker(id)).collect()
    }

    async fn may_wipe(&mut self) -> Result<bool> {
        Ok(self.min_in_sync > 1 && self.become_whole("before a volume is lost").await?)
    }

    /// Waits until all replicas are in sync, which they must be in time: nothing is broken now.
    pub(crate) async fn become_whole(&mut self, when: &str) -> Result<bool> {
        let until = Instant::now() + self.whole_within;
        loop {
            // What ends by itself is started again.
            self.restart_ended(&[]).await?;
            let found = self.fleet.wait_until_whole(TOPIC, LOOK).await;
            match found {
                Ok(()) => return Ok(true),
                Err(error) if Instant::now() >= until => {
                    let text = format!("{when}, not whole in {:?}: {error:#}", self.whole_within);
                    eprintln!("  {text}");
                    self.problems.push(text);
                    return Ok(false);
                }
                Err(_) => {}
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
        let mut ended = Vec::new();
        for broker in self.fleet.brokers() {
            if let Some((status, log)) = broker.ended()? {
                let last = log.lines().last().unwrap_or_default();
                let text = format!(
                    "broker {} ended by itself with {status}: {last}",
                    broker.id()
                );
                eprintln!("  {text}");
                self.own_ends.push(text);
                ended.push(broker.id());
            }
        }
        if ended.iter().any(|id| !off.contains(id)) {
            tokio::time::sleep(RESTART).await;
        }
        for id in ended.into_iter().filter(|id| !off.contains(id)) {
            self.fleet.start_broker(id)?;
        }
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
