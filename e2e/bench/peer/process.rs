//! A program that a benchmark starts: what it prints, what it uses, and that it never outlives the benchmark.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

/// A running program. Dropping it kills it.
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

/// What a process has used since it started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    pub(crate) cpu: Duration,
    pub(crate) rss: u64,
    pub(crate) peak_rss: u64,
    /// Bytes that it made the kernel write to the disk, at once or later. Not what it deleted before the kernel got to it.
    pub(crate) written: u64,
    pub(crate) open_files: usize,
}

impl Process {
    /// Starts `command` with all its output in the file `log`.
    pub(crate) fn spawn(name: &'static str, command: &mut Command, log: PathBuf) -> Result<Self> {
        let out = File::create(&log).with_context(|| format!("can't create {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("can't start {:?}", command.get_program()))?;
        Ok(Self { name, child, log })
    }

    /// Waits until the program prints `text`.
    pub(crate) async fn printed(&mut self, text: &str, limit: Duration) -> Result<()> {
        let start = Instant::now();
        loop {
            if fs::read_to_string(&self.log)?.contains(text) {
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
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

    pub(crate) fn usage(&self) -> Result<Usage> {
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
    pub(crate) async fn settled(&self) -> Result<Usage> {
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
    pub(crate) async fn terminate(mut self) -> Result<ExitStatus> {
        const LIMIT: Duration = Duration::from_secs(120);
        kill_process(self.pid()?, Signal::TERM)?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
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

    fn pid(&self) -> Result<Pid> {
        i32::try_from(self.child.id())
            .ok()
            .and_then(Pid::from_raw)
            .with_context(|| format!("{} has no process id", self.name))
    }

    fn log_end(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to kill, and nothing more to do about it here.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a tool to its end and returns what it printed. If the caller gives up waiting, the tool is killed.
pub(crate) async fn run(command: Command) -> Result<String> {
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
pub(crate) fn own_cpu() -> Result<Duration> {
    let stat = procfs::process::Process::myself()?.stat()?;
    Ok(ticks(stat.utime + stat.stime))
}

/// CPU time of the tools that this process has run to their end.
pub(crate) fn tools_cpu() -> Result<Duration> {
    let stat = procfs::process::Process::myself()?.stat()?;
    Ok(ticks(u64::try_from(stat.cutime + stat.cstime)?))
}

/// Bytes that this process has made the kernel write to the disk so far, as in [`Usage`].
pub(crate) fn own_written() -> Result<u64> {
    written(&procfs::process::Process::myself()?)
}

fn written(process: &procfs::process::Process) -> Result<u64> {
    let io = process.io()?;
    Ok(io.write_bytes.saturating_sub(io.cancelled_write_bytes))
}

fn ticks(count: u64) -> Duration {
    Duration::from_secs_f64(count as f64 / procfs::ticks_per_second() as f64)
}
