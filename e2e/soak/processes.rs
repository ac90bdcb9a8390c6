//! Brokers that are processes of this machine, behind proxies.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use millrace_e2e::fleet::{Fleet, FleetSetup, NewTopic, State};
use millrace_e2e::leases::Leases;
use millrace_e2e::volume::Volume;
use millrace_e2e::wires::Node;

use crate::copiers::COPY;
use crate::load::TOPIC;
use crate::plan::{Fault, Kind};
use crate::soak::Options;
use crate::target::Target;

/// What ends by itself is started again after this time, as Kubernetes would.
const RESTART: Duration = Duration::from_secs(1);

/// Running brokers.
pub(crate) struct Processes {
    fleet: Fleet,
    volumes: bool,
    /// This version's program, and another's if brokers go from one to the other.
    program: PathBuf,
    other: Option<PathBuf>,
    /// How often one did.
    changes: usize,
}

impl Processes {
    /// Starts them, and makes the topic.
    pub(crate) async fn start(options: &Options, folder: &Path) -> Result<Self> {
        let exe = std::env::current_exe()?;
        let program = exe.with_file_name("millrace-broker");
        ensure!(
            program.is_file(),
            "{} does not exist: build it first, with `cargo build --release -p millrace-broker`",
            program.display()
        );
        let volumes = options.faults.contains(&Kind::FillDisk);
        let volumes = volumes && {
            let mounted = Volume::can_be_mounted();
            if let Err(error) = &mounted {
                eprintln!("fill-disk needs volumes that can be filled: {error:#}");
            }
            mounted.is_ok()
        };
        if let Some(other) = &options.other_broker {
            let there = other.is_file();
            ensure!(there, "--other-broker: {} does not exist", other.display());
        }
        let mut args = vec!["--durability".to_owned(), options.durability.clone()];
        args.extend_from_slice(&options.broker_args);
        let setup = FleetSetup {
            program: program.clone(),
            folder: folder.to_owned(),
            brokers: options.brokers,
            args,
            breakable: true,
            volume_bytes: volumes.then(|| volume_bytes(options)),
            slow_disks: options.faults.contains(&Kind::SlowDisk),
        };
        let fleet = Fleet::start(setup).await?;
        let topic = NewTopic {
            name: TOPIC,
            partitions: options.partitions,
            replicas: options.replicas,
            min_in_sync: options.min_in_sync,
        };
        fleet.create_topic(topic).await?;
        if options.copiers > 0 {
            let copy = NewTopic {
                name: COPY,
                ..topic
            };
            fleet.create_topic(copy).await?;
            fleet.create_internal_topics(options.replicas).await?;
        }
        Ok(Self {
            fleet,
            volumes,
            program,
            other: options.other_broker.clone(),
            changes: 0,
        })
    }

    /// Starts a broker that was taken away, in the other version than before.
    fn start_again(&mut self, id: i32) -> Result<()> {
        if let Some(other) = &self.other {
            let broker = self.fleet.broker(id)?;
            let next = match broker.program() == self.program {
                true => other,
                false => &self.program,
            };
            broker.set_program(next.clone());
            self.changes += 1;
        }
        self.fleet.start_broker(id)
    }

    /// Ends them, and keeps their data even if it is on volumes that go with them.
    pub(crate) fn keep_data(&mut self) -> Result<()> {
        self.fleet.keep_data()
    }

    fn cut(&self, id: i32, others: Vec<Node>) {
        self.fleet.wires().cut(Node::Broker(id), others);
    }

    fn others(&self, id: i32) -> Vec<Node> {
        let all = (0..).map(Node::Broker).take(self.fleet.size());
        all.filter(|other| *other != Node::Broker(id)).collect()
    }

    fn everybody(&self, id: i32) -> Vec<Node> {
        [self.others(id), vec![Node::Api, Node::Client]].concat()
    }
}

impl Target for Processes {
    fn can_break(&self, kind: Kind) -> bool {
        match kind {
            Kind::FillDisk => self.volumes,
            Kind::Loss => false,
            _ => true,
        }
    }

    fn bootstrap(&self) -> String {
        self.fleet.bootstrap()
    }

    async fn begin(&mut self, fault: &Fault) -> Result<Vec<String>> {
        let mut problems = Vec::new();
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
                    problems.extend(stopped.err().map(|error| format!("{error:#}")));
                }
                Kind::Pause => self.fleet.broker(id)?.pause()?,
                Kind::CutApi => self.cut(id, vec![Node::Api]),
                Kind::CutBrokers => self.cut(id, self.others(id)),
                Kind::CutAll => self.cut(id, self.everybody(id)),
                Kind::CutOneWay => {
                    for other in self.others(id) {
                        let wires = self.fleet.wires();
                        wires.set(Node::Broker(id), other, |link| link.cut = true);
                    }
                }
                Kind::Slow => {
                    for other in self.everybody(id) {
                        let wires = self.fleet.wires();
                        wires.between(Node::Broker(id), other, |link| link.delay = fault.delay);
                    }
                }
                Kind::FillDisk => self.fleet.broker(id)?.fill_disk(fault.leave)?,
                Kind::SlowDisk => self.fleet.broker(id)?.slow_disk(fault.delay)?,
                Kind::Loss | Kind::ApiServer => {}
            }
        }
        if fault.kind == Kind::ApiServer {
            self.fleet.stop_api_server();
        }
        Ok(problems)
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
                State::Off => self.start_again(id)?,
                State::On => {}
            }
        }
        Ok(())
    }

    async fn restart_ended(&mut self, off: &[i32]) -> Result<Vec<String>> {
        let (mut ended, mut texts) = (Vec::new(), Vec::new());
        for broker in self.fleet.brokers() {
            if let Some((status, log)) = broker.ended()? {
                let last = log.lines().last().unwrap_or_default();
                let id = broker.id();
                texts.push(format!("broker {id} ended by itself with {status}: {last}"));
                ended.push(id);
            }
        }
        ended.retain(|id| !off.contains(id));
        if !ended.is_empty() {
            tokio::time::sleep(RESTART).await;
        }
        for id in ended {
            self.fleet.start_broker(id)?;
        }
        Ok(texts)
    }

    fn leases(&self) -> &Leases {
        self.fleet.leases()
    }

    async fn end(&mut self) -> Result<Option<Vec<(i32, PathBuf)>>> {
        if self.other.is_some() {
            ensure!(
                self.changes > 0,
                "no broker went from one version to the other: take longer, another seed, or --faults kill,restart,wipe"
            );
            println!(
                "brokers went {} times from one version to the other",
                self.changes
            );
        }
        Ok(Some(self.fleet.end()))
    }
}

/// Room for all that the load writes, more than once while RocksDB moves it, and for logs and buffers beside the reserve. It is memory: what is
/// not needed is taken only while it is filled.
fn volume_bytes(options: &Options) -> u64 {
    /// What a record costs at most beside its value, in a batch of its own.
    const RECORD: u64 = 150;
    let records = options.longest().as_secs() * u64::from(options.rate * options.producers);
    (512 << 20) + 3 * records * (options.size as u64 + RECORD)
}
