//! The Kubernetes that tests and long runs use: the one that `KUBECONFIG` names, or one of several nodes that is started for them (`e2e/cluster`).
//!
//! What is here panics when something fails that must not: whoever breaks a Kubernetes has no better answer to one that is broken otherwise.

mod installed;
mod pods;

use std::ffi::OsStr;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use rustix::process::{Pid, Signal, kill_process};

use crate::{Finished, repository, run};
pub use installed::{Installed, cluster_with_topic, condition, is_ready, is_well, uid};
pub use pods::{CutFrom, Pods};

/// The first time, its programs are built.
const UP_WITHIN: Duration = Duration::from_secs(20 * 60);
const FINISHED_WITHIN: Duration = Duration::from_secs(60);
/// One for each broker of a Cluster.
const NODES: u32 = 3;

/// A Kubernetes. One that was started here ends when this is dropped.
pub struct Kubernetes {
    kubeconfig: String,
    path: String,
    started: bool,
    launched: bool,
}

impl Kubernetes {
    /// That of `KUBECONFIG`; or the one that runs on this machine; or a new one.
    ///
    /// # Panics
    /// If it can't be started.
    pub fn start() -> Self {
        let path = std::env::var("PATH").unwrap_or_default();
        if let Ok(kubeconfig) = std::env::var("KUBECONFIG") {
            return Self {
                kubeconfig,
                path,
                started: false,
                launched: false,
            };
        }
        let runs = launcher(["status"]).code == Some(0);
        if !runs {
            launcher(["up", "--nodes", &NODES.to_string()]).success();
        }
        // Whatever goes wrong from here on, the drop ends what was started.
        let mut this = Self {
            kubeconfig: String::new(),
            path,
            started: !runs,
            launched: true,
        };
        let script = r#"eval "$("$0" env)"; printf '%s\n' "$KUBECONFIG" "$PATH""#;
        let printed = run(
            Command::new("sh").args(["-c", script]).arg(launcher_path()),
            None,
            FINISHED_WITHIN,
        );
        let printed = printed.success().text();
        let mut lines = printed.lines();
        this.kubeconfig = lines.next().unwrap_or_default().to_owned();
        this.path = lines.next().unwrap_or_default().to_owned();
        this
    }

    /// For the API server.
    ///
    /// # Errors
    /// If the configuration is no good.
    pub async fn client(&self) -> Result<Client> {
        let kubeconfig = Kubeconfig::read_from(&self.kubeconfig)?;
        let options = KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        Ok(Client::try_from(config)?)
    }

    /// Runs `kubectl`, with text for its standard input.
    pub fn kubectl<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        input: &str,
    ) -> Finished {
        self.run("kubectl", arguments, input)
    }

    /// Runs `helm`.
    pub fn helm<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Finished {
        self.run("helm", arguments, "")
    }

    /// Whether it is the launcher's, so that its nodes' processes are this machine's.
    pub fn is_launched(&self) -> bool {
        self.launched
    }

    /// The process of a broker, by its pod, if it has one now and its node is this machine's.
    ///
    /// # Panics
    /// If the processes of this machine can't be listed.
    pub fn broker_process(&self, pod: &str) -> Option<Pid> {
        let is_it = |process: &procfs::process::Process| {
            let environment = process.environ().unwrap_or_default();
            let found = environment.get(OsStr::new("MILLRACE_POD"));
            found.is_some_and(|found| found == pod)
        };
        let processes = procfs::process::all_processes().expect("/proc can be read");
        let found = processes
            .flatten()
            .find(|process| self.launched && is_it(process));
        Pid::from_raw(found?.pid())
    }

    /// Sends a signal to that process. False if there is none.
    ///
    /// # Panics
    /// If the processes of this machine can't be listed.
    pub fn signal_broker(&self, pod: &str, signal: Signal) -> bool {
        let process = self.broker_process(pod);
        // It may just have ended.
        process.is_some_and(|process| kill_process(process, signal).is_ok())
    }

    /// Where programs are looked for.
    pub fn search_path(&self) -> &str {
        &self.path
    }

    fn run<A: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = A>,
        input: &str,
    ) -> Finished {
        // A program is looked for in the PATH of the one that starts it, unless a shell does.
        let mut command = Command::new("sh");
        command.args(["-c", r#"exec "$0" "$@""#, program]);
        command.args(arguments);
        command.env("KUBECONFIG", &self.kubeconfig);
        command.env("PATH", &self.path);
        run(&mut command, Some(input.as_bytes()), FINISHED_WITHIN)
    }
}

impl Drop for Kubernetes {
    fn drop(&mut self) {
        if self.started {
            launcher(["down"]);
        }
    }
}

/// The program that starts a Kubernetes on this machine, and breaks it.
pub fn launcher_path() -> std::path::PathBuf {
    repository().join("e2e/cluster/run")
}

/// Runs it.
///
/// # Panics
/// If it does not end.
pub fn launcher<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Finished {
    run(
        Command::new(launcher_path()).args(arguments),
        None,
        UP_WITHIN,
    )
}
