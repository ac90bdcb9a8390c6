//! A broker process with its folder, ports and topics.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use millrace_client::Client;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    Api, Cli, HttpAnswer, SOON, http,
    ports::free_port,
    process::{Finished, Process, finish},
    program,
};

/// What a broker is started with.
pub struct BrokerSetup {
    dir: TempDir,
    data: PathBuf,
    topics: PathBuf,
    flags: Vec<String>,
    survives_file_size_limit: bool,
    listen: String,
    metrics_listen: String,
}

/// A broker; it runs unless it was stopped. Dropping it kills it and removes its data, and shows its log if the test failed.
pub struct Broker {
    setup: BrokerSetup,
    process: Option<Process>,
    /// What the processes before have logged.
    past: String,
}

impl Default for BrokerSetup {
    fn default() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("millrace-e2e-")
            .tempdir()
            .expect("a temporary folder");
        let topics = dir.path().join("topics");
        fs::create_dir(&topics).expect("the temporary folder is writable");
        let address = || format!("127.0.0.1:{}", free_port());
        // The default reserve of 512 MiB is for production; a machine that runs tests may have less.
        let (listen, metrics_listen) = (address(), address());
        let flags = vec![
            "--min-free-disk=16MiB".to_owned(),
            format!("--listen={listen}"),
            format!("--metrics-listen={metrics_listen}"),
        ];
        let data = dir.path().join("data");
        BrokerSetup {
            data,
            topics,
            dir,
            flags,
            survives_file_size_limit: false,
            listen,
            metrics_listen,
        }
    }
}

impl BrokerSetup {
    /// Declares a topic; `spec` is that of the Topic resource.
    pub fn topic(self, name: &str, spec: Value) -> Self {
        self.declare(name, spec);
        self
    }

    /// Adds a flag. One given again replaces the earlier one.
    pub fn flag(mut self, name: &str, value: &str) -> Self {
        self.flags
            .retain(|flag| flag.split('=').next() != Some(name));
        self.flags.push(format!("{name}={value}"));
        self
    }

    /// Lets writes beyond [`Broker::limit_file_size`] fail, where the signal that comes with them would end the process.
    pub fn survives_file_size_limit(mut self) -> Self {
        self.survives_file_size_limit = true;
        self
    }

    /// Puts the data elsewhere than into a temporary folder.
    pub fn data(mut self, data: &Path) -> Self {
        self.data = data.to_owned();
        self
    }

    /// Starts it and waits until it is ready.
    #[track_caller]
    pub fn start(self) -> Broker {
        let mut broker = Broker {
            setup: self,
            process: None,
            past: String::new(),
        };
        broker.restart();
        broker
    }

    /// Starts it to see it refuse.
    #[track_caller]
    pub fn start_and_fail(&self) -> Finished {
        let mut command = self.command();
        finish(Process::start(&mut command), &command, SOON)
    }

    /// The folder of topic files.
    pub fn topics(&self) -> &Path {
        &self.topics
    }

    fn declare(&self, name: &str, spec: Value) {
        let topic = json!({
            "apiVersion": "millrace.dev/v1alpha1",
            "kind": "Topic",
            "metadata": { "name": name },
            "spec": spec,
        });
        // JSON is YAML. Renamed into place, so that the broker never sees half a file.
        let half = self.dir.path().join("half.yaml");
        fs::write(&half, topic.to_string()).expect("the temporary folder is writable");
        fs::rename(half, self.topics.join(format!("{name}.yaml")))
            .expect("the temporary folder is writable");
    }

    fn command(&self) -> Command {
        let program = program("millrace-broker");
        let mut command = if self.survives_file_size_limit {
            // What a shell ignores is still ignored by the program that replaces it.
            let mut shell = Command::new("sh");
            shell
                .args(["-c", r#"trap '' XFSZ; exec "$0" "$@""#])
                .arg(program);
            shell
        } else {
            Command::new(program)
        };
        command
            .arg("--data")
            .arg(&self.data)
            .arg("--topics")
            .arg(&self.topics)
            .args(&self.flags)
            .stdin(Stdio::null());
        command
    }
}

impl Broker {
    /// What a broker is started with, to be completed.
    pub fn setup() -> BrokerSetup {
        BrokerSetup::default()
    }

    /// Starts it again, on the same data and ports, and waits until it is ready.
    #[track_caller]
    pub fn restart(&mut self) {
        assert!(self.process.is_none(), "the broker runs already");
        let process = Process::start(&mut self.setup.command());
        let ready = process.wait_for_stderr(" ready ", SOON);
        assert!(
            ready,
            "the broker did not become ready:\n{}",
            process.stderr()
        );
        self.process = Some(process);
    }

    /// `kill -9`.
    pub fn kill_9(&mut self) {
        let mut process = self.process.take().expect("the broker runs");
        process.kill();
        self.past += &process.stderr();
        self.past += "(killed)\n";
    }

    /// SIGTERM. It must end with exit code 0. Returns its log.
    #[track_caller]
    pub fn terminate(&mut self) -> String {
        self.signal_term();
        self.stopped()
    }

    /// SIGTERM, without waiting for the end.
    pub fn signal_term(&self) {
        self.running().signal(Signal::TERM);
    }

    /// Waits for the end after [`Self::signal_term`]. The exit code must be 0. Returns its log.
    #[track_caller]
    pub fn stopped(&mut self) -> String {
        let mut process = self.process.take().expect("the broker runs");
        let status = process.wait(SOON);
        let log = process.stderr();
        self.past += &log;
        let Some(status) = status else {
            panic!("the broker did not stop within {SOON:?} of SIGTERM:\n{log}")
        };
        assert_eq!(
            status.code(),
            Some(0),
            "exit status after SIGTERM; log:\n{log}"
        );
        log
    }

    /// Creates or changes a topic's file.
    pub fn declare(&self, name: &str, spec: Value) {
        self.setup.declare(name, spec);
    }

    /// The folder of topic files.
    pub fn topics(&self) -> &Path {
        self.setup.topics()
    }

    /// The folder of the data.
    pub fn data(&self) -> &Path {
        &self.setup.data
    }

    /// `host:port` of the gRPC listener.
    pub fn address(&self) -> &str {
        &self.setup.listen
    }

    /// Makes every write fail that would let a file grow beyond so many bytes; `None`: no longer.
    pub fn limit_file_size(&self, bytes: Option<u64>) {
        let limit = Rlimit {
            current: bytes,
            maximum: None,
        };
        let pid = Pid::from_raw(self.running().id());
        prlimit(pid, Resource::Fsize, limit).expect("a process of one's own can be limited");
    }

    /// What it has logged since it was started.
    pub fn log(&self) -> String {
        self.running().stderr()
    }

    /// Waits until it has logged a text.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str, within: Duration) {
        let process = self.running();
        assert!(
            process.wait_for_stderr(text, within),
            "not logged within {within:?}: {text}\n{}",
            process.stderr()
        );
    }

    /// The client library, connected.
    pub async fn client(&self) -> Client {
        Client::connect(self.address())
            .await
            .expect("the broker takes connections")
    }

    /// The gRPC API, connected.
    pub async fn api(&self) -> Api {
        Api::connect(self.address()).await
    }

    /// The command line, set up for this broker.
    pub fn cli(&self) -> Cli {
        Cli::new(self.address())
    }

    /// GET from the metrics listener.
    pub fn get(&self, path: &str) -> HttpAnswer {
        http::get(&self.setup.metrics_listen, path)
    }

    /// One metric's value; `series` as it is printed, labels included.
    #[track_caller]
    pub fn metric(&self, series: &str) -> f64 {
        let text = self.get("/metrics").body;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        let value = line.and_then(|value| value.trim().parse().ok());
        value.unwrap_or_else(|| panic!("no series {series} among the metrics:\n{text}"))
    }

    /// Bytes of memory resident.
    pub fn resident_bytes(&self) -> u64 {
        self.status().vmrss.expect("it has memory") * 1024
    }

    /// The most bytes of memory that were resident since it was started.
    pub fn peak_resident_bytes(&self) -> u64 {
        self.status().vmhwm.expect("it has memory") * 1024
    }

    fn status(&self) -> procfs::process::Status {
        let process = procfs::process::Process::new(self.running().id()).expect("the broker runs");
        process.status().expect("its status is readable")
    }

    /// Files and sockets open.
    pub fn open_files(&self) -> usize {
        let process = procfs::process::Process::new(self.running().id()).expect("the broker runs");
        process.fd_count().expect("its descriptors are readable")
    }

    /// Bytes of disk that the data takes, as `du` counts them.
    pub fn disk_usage(&self) -> u64 {
        crate::disk_usage(&self.setup.data)
    }

    fn running(&self) -> &Process {
        self.process.as_ref().expect("the broker runs")
    }
}

/// Bytes of disk that the files in a folder take, as `du` counts them.
pub fn disk_usage(folder: &Path) -> u64 {
    let size = |entry: std::io::Result<fs::DirEntry>| {
        // A file may go while we look.
        let (entry, about) = entry
            .and_then(|entry| Ok((entry.path(), entry.metadata()?)))
            .ok()?;
        let within = if about.is_dir() {
            disk_usage(&entry)
        } else {
            0
        };
        Some(about.blocks() * 512 + within)
    };
    fs::read_dir(folder).map_or(0, |entries| entries.filter_map(size).sum())
}

impl Drop for Broker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let now = self
                .process
                .as_ref()
                .map(Process::stderr)
                .unwrap_or_default();
            eprintln!("--- the broker's log:\n{}{now}---", self.past);
        }
    }
}
