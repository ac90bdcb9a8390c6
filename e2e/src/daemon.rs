//! A program that a benchmark or a long run starts: its log, what it uses, its signals, and that it never outlives who started it.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

/// A running program. Dropping it kills it.
pub struct Daemon {
    name: &'static str,
    child: Child,
    log: PathBuf,
    /// Where in the file its own output begins: an earlier process may have written there.
    log_begins: u64,
}

/// What a process has used since it started.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Processor time.
    pub cpu: Duration,
    /// Bytes of memory resident.
    pub rss: u64,
    /// The most that were.
    pub peak_rss: u64,
    /// Bytes that it made the kernel write to the disk, at once or later. Not what it deleted before the kernel got to it.
    pub written: u64,
    /// Files and sockets.
    pub open_files: usize,
}

impl Daemon {
    /// Starts `command` with all its output at the end of the file `log`.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn spawn(name: &'static str, command: &mut Command, log: PathBuf) -> Result<Self> {
        let out = File::options().create(true).append(true).open(&log);
        let out = out.with_context(|| format!("can't create {}", log.display()))?;
        let log_begins = out.metadata()?.len();
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("can't start {:?}", command.get_program()))?;
        Ok(Self {
            name,
            child,
            log,
            log_begins,
        })
    }

    /// Waits until the program prints `text`.
    ///
    /// # Errors
    /// If it does not in time, or ends.
    pub async fn printed(&mut self, text: &str, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            if self.printed_so_far()?.contains(text) {
                return Ok(());
            }
            if let Some(status) = self.ended()? {
                bail!("{} ended with {status}:\n{}", self.name, self.log_end());
            }
            ensure!(
                start.elapsed() < limit,
                "{} did not print {text:?} in {limit:?}:\n{}",
                self.name,
                self.log_end()
            );
            sleep(Duration::from_millis(2)).await;
        }
    }

    /// What it has used so far.
    ///
    /// # Errors
    /// If it is gone.
    pub fn usage(&self) -> Result<Usage> {
        let process = procfs::process::Process::new(self.pid()?.as_raw_nonzero().get())?;
        let stat = process
            .stat()
            .with_context(|| format!("{} is gone:\n{}", self.name, self.log_end()))?;
        let status = process.status()?;
        Ok(Usage {
            cpu: ticks(stat.utime + stat.stime),
            rss: status.vmrss.unwrap_or(0) * 1024,
            peak_rss: status.vmhwm.unwrap_or(0) * 1024,
            written: written(&process)?,
            open_files: process.fd_count()?,
        })
    }

    /// Syncs the disk, waits until the process has no more to do on its own account, and says what it used until then.
    ///
    /// # Errors
    /// If it is gone.
    pub async fn settled(&self) -> Result<Usage> {
        const QUIET: Duration = Duration::from_millis(1_500);
        const LIMIT: Duration = Duration::from_secs(60);
        let start = Instant::now();
        loop {
            let before = self.usage()?;
            tokio::task::spawn_blocking(rustix::fs::sync).await?;
            sleep(QUIET).await;
            let after = self.usage()?;
            let idle = after.cpu - before.cpu < QUIET / 10;
            // What is deleted before it is written makes it less.
            let quiet = after.written.abs_diff(before.written) < 64 * 1024;
            if (idle && quiet) || start.elapsed() > LIMIT {
                return Ok(after);
            }
        }
    }

    /// SIGTERM, and the exit status that follows.
    ///
    /// # Errors
    /// If it does not end.
    pub async fn terminate(mut self) -> Result<ExitStatus> {
        const LIMIT: Duration = Duration::from_secs(120);
        self.signal(Signal::TERM)?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            ensure!(
                start.elapsed() < LIMIT,
                "{} did not stop in {LIMIT:?}:\n{}",
                self.name,
                self.log_end()
            );
            sleep(Duration::from_millis(2)).await;
        }
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// If it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(self.pid()?, signal)
            .with_context(|| format!("{} is gone:\n{}", self.name, self.log_end()))
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// If the system can't say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Its process id.
    ///
    /// # Errors
    /// If it has none.
    pub fn pid(&self) -> Result<Pid> {
        i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .with_context(|| format!("{} has no process id", self.name))
    }

    /// The last lines of its log.
    pub fn log_end(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    fn printed_so_far(&self) -> Result<String> {
        let mut log = File::open(&self.log)?;
        log.seek(SeekFrom::Start(self.log_begins))?;
        let mut printed = Vec::new();
        log.read_to_end(&mut printed)?;
        Ok(String::from_utf8_lossy(&printed).into_owned())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to kill, and nothing more to do about it here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a tool to its end and returns what it printed. If the caller gives up waiting, the tool is killed.
///
/// # Errors
/// If it fails.
pub async fn run(command: Command) -> Result<String> {
    let name = format!("{:?}", command.get_program());
    let output = tokio::process::Command::from(command)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .with_context(|| format!("can't run {name}"))?;
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let err = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{name} ended with {}:\n{out}{err}",
        output.status
    );
    Ok(out)
}

/// CPU time of this process so far.
///
/// # Errors
/// If the system can't say.
pub fn own_cpu() -> Result<Duration> {
    let stat = procfs::process::Process::myself()?.stat()?;
    Ok(ticks(stat.utime + stat.stime))
}

/// CPU time of the tools that this process has run to their end.
///
/// # Errors
/// If the system can't say.
pub fn tools_cpu() -> Result<Duration> {
    let stat = procfs::process::Process::myself()?.stat()?;
    Ok(ticks(u64::try_from(stat.cutime + stat.cstime)?))
}

/// Bytes that this process has made the kernel write to the disk so far, as in [`Usage`].
///
/// # Errors
/// If the system can't say.
pub fn own_written() -> Result<u64> {
    written(&procfs::process::Process::myself()?)
}

fn written(process: &procfs::process::Process) -> Result<u64> {
    let io = process.io()?;
    Ok(io.write_bytes.saturating_sub(io.cancelled_write_bytes))
}

fn ticks(count: u64) -> Duration {
    Duration::from_secs_f64(count as f64 / procfs::ticks_per_second() as f64)
}
