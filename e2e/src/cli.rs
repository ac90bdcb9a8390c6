//! The `millrace` command.

use std::{
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;

use crate::{
    SOON,
    process::{Finished, Process, finish, run},
    program,
};

/// Runs `millrace` against one broker.
pub struct Cli {
    address: String,
}

/// A `millrace` that has not ended yet. Dropping it kills it.
pub struct Running {
    command: Command,
    process: Process,
}

impl Cli {
    pub(crate) fn new(address: &str) -> Self {
        Cli {
            address: address.to_owned(),
        }
    }

    /// The command with these arguments.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(program("millrace"));
        command
            .args(args)
            .env("MILLRACE_BOOTSTRAP", &self.address)
            .env_remove("RUST_LOG");
        command
    }

    /// Runs it to its end, without input.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Finished {
        run(&mut self.command(args), None, SOON)
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn run_with(&self, args: &[&str], input: impl AsRef<[u8]>) -> Finished {
        run(&mut self.command(args), Some(input.as_ref()), SOON)
    }

    /// Starts it, without input.
    pub fn start(&self, args: &[&str]) -> Running {
        let mut command = self.command(args);
        let process = Process::start(command.stdin(Stdio::null()));
        Running { command, process }
    }
}

impl Running {
    /// Waits until it has printed so many lines.
    #[track_caller]
    pub fn wait_for_lines(&self, lines: usize, within: Duration) {
        let printed = self.process.wait_for_lines(lines, within);
        assert!(
            printed,
            "{:?} did not print {lines} lines within {within:?}:\n{}",
            self.command,
            self.process.stderr()
        );
    }

    /// Ctrl-C.
    pub fn interrupt(&self) {
        self.process.signal(Signal::INT);
    }

    /// Waits for its end.
    #[track_caller]
    pub fn finish(self) -> Finished {
        finish(self.process, &self.command, SOON)
    }
}
