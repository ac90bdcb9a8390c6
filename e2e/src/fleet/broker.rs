//! One broker's process, with its volume.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use uuid::Uuid;

use super::slow_disk::SlowDisk;
use super::{CLUSTER, FleetSetup, NAMESPACE};
use crate::daemon::{Daemon, Usage};
use crate::ports::free_port;
use crate::volume::Volume;

/// Whether it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// There is no process.
    Off,
    /// It runs.
    On,
    /// It stands still.
    Paused,
}

/// A broker that may run.
pub struct BrokerProcess {
    id: i32,
    program: PathBuf,
    args: Vec<String>,
    folder: PathBuf,
    kubeconfig: PathBuf,
    pod_uid: Uuid,
    metrics: SocketAddr,
    pub(super) listen: SocketAddr,
    pub(super) advertised: SocketAddr,
    process: Option<Daemon>,
    paused: bool,
    slow_disk: Option<SlowDisk>,
    // After the process, which uses it: fields drop in this order.
    volume: Option<Volume>,
}

impl BrokerProcess {
    pub(super) fn new(
        id: i32,
        setup: &FleetSetup,
        folder: PathBuf,
        kubeconfig: PathBuf,
        slow_disk: Option<SlowDisk>,
    ) -> Result<Self> {
        let address = || SocketAddr::from(([127, 0, 0, 1], free_port()));
        let listen = address();
        let mount = |bytes| Volume::mount(&folder.join("volume"), bytes);
        let volume = setup.volume_bytes.map(mount).transpose()?;
        Ok(Self {
            id,
            program: setup.program.clone(),
            args: setup.args.clone(),
            folder,
            kubeconfig,
            pod_uid: Uuid::new_v4(),
            metrics: address(),
            listen,
            advertised: listen,
            process: None,
            paused: false,
            slow_disk,
            volume,
        })
    }

    /// Its id.
    pub fn id(&self) -> i32 {
        self.id
    }

    /// Where metrics are.
    pub fn metrics(&self) -> SocketAddr {
        self.metrics
    }

    /// Whether it runs.
    pub fn state(&self) -> State {
        match (&self.process, self.paused) {
            (None, _) => State::Off,
            (Some(_), true) => State::Paused,
            (Some(_), false) => State::On,
        }
    }

    /// What it runs.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Runs another program from its next start on.
    pub fn set_program(&mut self, program: PathBuf) {
        self.program = program;
    }

    pub(super) fn start(&mut self) -> Result<i32> {
        let mut command = Command::new(&self.program);
        let pod = format!("{CLUSTER}-broker-{}", self.id);
        command
            .args(["--cluster", CLUSTER, "--namespace", NAMESPACE])
            .args(["--pod", &pod, "--pod-uid", &self.pod_uid.to_string()])
            .arg("--data")
            .arg(self.data())
            .args(["--listen", &self.listen.to_string()])
            .args(["--advertise", &self.advertised.to_string()])
            .args(["--metrics-listen", &self.metrics.to_string()])
            // The default reserve is for production.
            .args(["--min-free-disk", "64MiB"])
            .args(&self.args)
            .env("KUBECONFIG", &self.kubeconfig);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info");
        }
        if let Some(disk) = &self.slow_disk {
            disk.apply(&mut command);
        }
        let process = Daemon::spawn("Millrace", &mut command, self.folder.join("log"))?;
        let pid = process.pid()?.as_raw_nonzero().get();
        self.process = Some(process);
        self.paused = false;
        Ok(pid)
    }

    /// Waits until it serves.
    ///
    /// # Errors
    /// If it does not in time.
    pub async fn ready(&mut self, within: Duration) -> Result<()> {
        self.running()?.printed(" ready ", within).await
    }

    /// `kill -9`, whether it stands still or not.
    pub fn kill(&mut self) {
        self.process = None;
        self.paused = false;
    }

    /// SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// If it does not end, or not with success.
    pub async fn stop(&mut self) -> Result<()> {
        let process = self.process.take();
        let process = process.with_context(|| format!("broker {} does not run", self.id))?;
        let log = process.log_end();
        let status = process.terminate().await?;
        ensure!(
            status.success(),
            "broker {} ended with {status} after SIGTERM:\n{log}",
            self.id
        );
        Ok(())
    }

    /// SIGTERM, without waiting.
    ///
    /// # Errors
    /// If it does not run.
    pub fn begin_to_stop(&mut self) -> Result<()> {
        self.running()?.signal(Signal::TERM)
    }

    /// SIGSTOP.
    ///
    /// # Errors
    /// If it does not run.
    pub fn pause(&mut self) -> Result<()> {
        self.running()?.signal(Signal::STOP)?;
        self.paused = true;
        Ok(())
    }

    /// SIGCONT.
    ///
    /// # Errors
    /// If it does not run.
    pub fn resume(&mut self) -> Result<()> {
        self.running()?.signal(Signal::CONT)?;
        self.paused = false;
        Ok(())
    }

    /// Removes all that is on the volume of a broker that does not run.
    ///
    /// # Errors
    /// If it runs.
    pub fn wipe(&mut self) -> Result<()> {
        ensure!(
            self.process.is_none(),
            "broker {} runs: its volume is in use",
            self.id
        );
        let data = self.data();
        if data.exists() {
            fs::remove_dir_all(&data).with_context(|| format!("can't wipe {}", data.display()))?;
        }
        Ok(())
    }

    /// Fills its volume, up to the last `leave` bytes.
    ///
    /// # Errors
    /// If it has no volume of its own.
    pub fn fill_disk(&self, leave: u64) -> Result<()> {
        self.own_volume()?.fill(leave)
    }

    /// Gives back what [`Self::fill_disk`] took.
    ///
    /// # Errors
    /// If its volume was not filled.
    pub fn free_disk(&self) -> Result<()> {
        self.own_volume()?.free()
    }

    /// Each fsync takes so much longer from now on.
    ///
    /// # Errors
    /// If its disk can't be made slow.
    pub fn slow_disk(&self, delay: Duration) -> Result<()> {
        let disk = self.slow_disk.as_ref();
        let disk = disk.with_context(|| format!("broker {}'s disk can't be slowed", self.id))?;
        disk.set(delay)
    }

    /// Ends the process, and copies its data from a volume of its own, which is about to go, to the folder where it would be without one.
    ///
    /// # Errors
    /// If it can't be copied.
    pub fn keep_data(&mut self) -> Result<()> {
        self.kill();
        let (data, kept) = (self.data(), self.folder.join("data"));
        if self.volume.is_none() || !data.exists() {
            return Ok(());
        }
        let copied = Command::new("cp").arg("-a").args([&data, &kept]).status()?;
        ensure!(
            copied.success(),
            "can't copy {} to {}",
            data.display(),
            kept.display()
        );
        Ok(())
    }

    /// How it ended, if it did by itself since it was started; then it does not run any more.
    ///
    /// # Errors
    /// If the system can't say.
    pub fn ended(&mut self) -> Result<Option<(ExitStatus, String)>> {
        let Some(process) = &mut self.process else {
            return Ok(None);
        };
        let Some(status) = process.ended()? else {
            return Ok(None);
        };
        let log = process.log_end();
        self.kill();
        Ok(Some((status, log)))
    }

    /// What its process has used.
    ///
    /// # Errors
    /// If it does not run.
    pub fn usage(&mut self) -> Result<Usage> {
        self.running()?.usage()
    }

    fn running(&mut self) -> Result<&mut Daemon> {
        let process = self.process.as_mut();
        process.with_context(|| format!("broker {} does not run", self.id))
    }

    fn own_volume(&self) -> Result<&Volume> {
        let volume = self.volume.as_ref();
        volume.with_context(|| format!("broker {} has no volume of its own", self.id))
    }

    /// Where its data is.
    pub fn data(&self) -> PathBuf {
        let volume = self.volume.as_ref().map(Volume::folder);
        volume.unwrap_or(&self.folder).join("data")
    }
}
