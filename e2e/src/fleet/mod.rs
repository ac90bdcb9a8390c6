//! Several brokers of one Cluster as plain processes on this machine, with an API server of their own and a network that can be broken: what a
//! Kubernetes with three nodes would give them, started in seconds and broken in microseconds.
//!
//! Responsible for starting, stopping and breaking processes, and for what the operator would write: topics' records and partitions' Leases. Not
//! responsible for what to break, nor for what must hold then.

mod broker;
mod control_plane;
mod slow_disk;
mod topics;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::leases::{CLUSTER, Leases};
use crate::wires::{Node, Wires};
use broker::BrokerProcess;
pub use broker::State;
use control_plane::ControlPlane;
use slow_disk::SlowDisk;
pub use topics::NewTopic;

/// The Cluster's namespace.
const NAMESPACE: &str = "default";

/// What to start.
pub struct FleetSetup {
    /// `millrace-broker`.
    pub program: PathBuf,
    /// Where all data and logs go; it must exist.
    pub folder: PathBuf,
    /// How many brokers.
    pub brokers: i32,
    /// More arguments for each of them.
    pub args: Vec<String>,
    /// Brokers are reached, by each other too, and reach the API server, through proxies that can be told to hold back. They cost processor time.
    pub breakable: bool,
    /// Each broker has a volume of its own of so many bytes, which can be filled; it is in memory, and for root only. Otherwise their data is on
    /// whatever `folder` is on.
    pub volume_bytes: Option<u64>,
    /// Each broker's disk can be made slow.
    pub slow_disks: bool,
}

/// Running brokers. Dropping it ends all processes; the folder stays.
pub struct Fleet {
    wires: Wires,
    control_plane: ControlPlane,
    brokers: Vec<BrokerProcess>,
    leases: Leases,
}

impl Fleet {
    /// Starts API server and brokers, and waits until all are ready.
    ///
    /// # Errors
    /// If one can't be started.
    pub async fn start(setup: FleetSetup) -> Result<Self> {
        let folder = setup.folder.join("control-plane");
        fs::create_dir_all(&folder)?;
        let control_plane = ControlPlane::start(folder).await?;
        let wires = Wires::default();
        let api = control_plane.address();
        let api = if setup.breakable {
            wires.front(Node::Api, api)
        } else {
            api
        };
        let slow_disks = setup.slow_disks.then(|| slow_disk::build(&setup.folder));
        let slow_disks = slow_disks.transpose()?;
        let mut brokers = Vec::new();
        for id in 0..setup.brokers {
            let folder = setup.folder.join(format!("broker-{id}"));
            fs::create_dir_all(&folder)?;
            let kubeconfig = folder.join("kubeconfig");
            fs::write(&kubeconfig, control_plane.kubeconfig(api))?;
            let slow_disk = slow_disks.clone();
            let slow_disk =
                slow_disk.map(|library| SlowDisk::new(library, folder.join("fsync-delay")));
            let mut broker = BrokerProcess::new(id, &setup, folder, kubeconfig, slow_disk)?;
            if setup.breakable {
                broker.advertised = wires.front(Node::Broker(id), broker.listen);
            }
            brokers.push(broker);
        }
        let leases = Leases::new(control_plane.client().await?, NAMESPACE);
        let mut this = Self {
            wires,
            control_plane,
            brokers,
            leases,
        };
        for id in 0..setup.brokers {
            this.start_broker(id)?;
        }
        for broker in &mut this.brokers {
            broker.ready(Duration::from_secs(120)).await?;
        }
        Ok(this)
    }

    /// Where clients reach the brokers.
    pub fn bootstrap(&self) -> String {
        let addresses = self.brokers.iter().map(|b| b.advertised.to_string());
        addresses.collect::<Vec<_>>().join(",")
    }

    /// What the brokers write to the API server.
    pub fn leases(&self) -> &Leases {
        &self.leases
    }

    /// The network.
    pub fn wires(&self) -> &Wires {
        &self.wires
    }

    /// How many brokers there are, in whatever state.
    pub fn size(&self) -> usize {
        self.brokers.len()
    }

    /// One broker.
    ///
    /// # Errors
    /// If there is none of that id.
    pub fn broker(&mut self, id: i32) -> Result<&mut BrokerProcess> {
        let index = usize::try_from(id).ok();
        let broker = index.and_then(|index| self.brokers.get_mut(index));
        broker.with_context(|| format!("there is no broker {id}"))
    }

    /// All of them.
    pub fn brokers(&mut self) -> &mut [BrokerProcess] {
        &mut self.brokers
    }

    /// Kills all brokers. Returns where the data of each is.
    pub fn end(&mut self) -> Vec<(i32, PathBuf)> {
        let brokers = self.brokers.iter_mut();
        brokers
            .map(|broker| {
                broker.kill();
                (broker.id(), broker.data())
            })
            .collect()
    }

    /// Ends all brokers, and keeps their data even if it is on volumes of their own.
    ///
    /// # Errors
    /// If it can't be copied.
    pub fn keep_data(&mut self) -> Result<()> {
        self.brokers
            .iter_mut()
            .try_for_each(BrokerProcess::keep_data)
    }

    /// Starts a broker that does not run, without waiting until it is ready.
    ///
    /// # Errors
    /// If it runs, or can't be started.
    pub fn start_broker(&mut self, id: i32) -> Result<()> {
        let broker = self.broker(id)?;
        ensure!(broker.state() == State::Off, "broker {id} runs already");
        let pid = broker.start()?;
        self.wires.claim(pid, Node::Broker(id));
        Ok(())
    }

    /// Kills the API server. Its data stays.
    pub fn stop_api_server(&mut self) {
        self.control_plane.stop_api_server();
    }

    /// Starts it again, and waits until it answers.
    ///
    /// # Errors
    /// If it does not.
    pub async fn start_api_server(&mut self) -> Result<()> {
        self.control_plane.start_api_server().await
    }
}
