//! The Kubernetes that the tests use.

use std::ffi::OsStr;
use std::process::Command;
use std::time::Duration;

use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use millrace_e2e::{Finished, repository, run};

/// The first time, its programs are built.
const UP_WITHIN: Duration = Duration::from_secs(20 * 60);
const FINISHED_WITHIN: Duration = Duration::from_secs(60);
/// One for each broker of a Cluster.
const NODES: &str = "3";

/// A Kubernetes. One that was started here ends when this is dropped.
pub(crate) struct Kubernetes {
    kubeconfig: String,
    path: String,
    started: bool,
    launched: bool,
}

impl Kubernetes {
    /// That of `KUBECONFIG`; or the one that runs on this machine; or a new one.
    pub(crate) fn start() -> Self {
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
            launcher(["up", "--nodes", NODES]).success();
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

    pub(crate) async fn client(&self) -> Client {
        let kubeconfig = Kubeconfig::read_from(&self.kubeconfig).unwrap();
        let options = KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await;
        Client::try_from(config.unwrap()).unwrap()
    }

    /// Runs `kubectl`, with text for its standard input.
    pub(crate) fn kubectl<A: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = A>,
        input: &str,
    ) -> Finished {
        self.run("kubectl", arguments, input)
    }

    /// Runs `helm`.
    pub(crate) fn helm<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Finished {
        self.run("helm", arguments, "")
    }

    /// Whether it is the launcher's, so that its nodes' processes are this machine's.
    pub(crate) fn is_launched(&self) -> bool {
        self.launched
    }

    /// Kills the broker's process whose environment says so, with no chance to say goodbye. False if its node is elsewhere.
    pub(crate) fn kill_process(&self, variable: &str, value: &str) -> bool {
        if !self.launched {
            return false;
        }
        let wanted = format!("{variable}={value}");
        let of_broker = |process: &procfs::process::Process| {
            let environment = process.environ().unwrap_or_default();
            let found = environment.get(std::ffi::OsStr::new(variable));
            found.is_some_and(|found| found == value)
        };
        let processes = procfs::process::all_processes().unwrap();
        let found = processes.flatten().find(of_broker);
        let pid = found
            .unwrap_or_else(|| panic!("no process has {wanted}"))
            .pid;
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        true
    }

    /// Where programs are looked for.
    pub(crate) fn search_path(&self) -> &str {
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

pub(crate) fn launcher_path() -> std::path::PathBuf {
    repository().join("e2e/cluster/run")
}

pub(crate) fn launcher<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Finished {
    run(
        Command::new(launcher_path()).args(arguments),
        None,
        UP_WITHIN,
    )
}
