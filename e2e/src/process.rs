//! A child process: what it prints, and its end, both with a deadline. Dropping it kills it.

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// Text that a process prints, as it comes.
#[derive(Default)]
struct Printed {
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Default)]
struct State {
    text: Vec<u8>,
    ended: bool,
}

impl Printed {
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.news.notify_all();
    }

    /// Waits until `done` says so; false if it does not in time, or the output ends first.
    fn wait(&self, within: Duration, done: impl Fn(&State) -> bool) -> bool {
        let deadline = Instant::now() + within;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if done(&state) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return false;
            }
            state = self
                .news
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn bytes(&self) -> Vec<u8> {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .text
            .clone()
    }
}

/// Follows a pipe line by line until it ends.
fn follow(pipe: impl Read + Send + 'static) -> Arc<Printed> {
    let printed = Arc::new(Printed::default());
    let into = printed.clone();
    std::thread::spawn(move || {
        let mut lines = BufReader::with_capacity(1 << 16, pipe);
        let mut line = Vec::new();
        while lines
            .read_until(b'\n', &mut line)
            .is_ok_and(|read| read > 0)
        {
            into.change(|state| state.text.append(&mut line));
        }
        into.change(|state| state.ended = true);
    });
    printed
}

/// A running child process.
pub(crate) struct Process {
    child: Child,
    stdout: Arc<Printed>,
    stderr: Arc<Printed>,
}

impl Process {
    /// Starts it. Standard input is `/dev/null` unless the command says otherwise.
    pub(crate) fn start(command: &mut Command) -> Process {
        let started = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = started
            .unwrap_or_else(|error| panic!("{:?} does not start: {error}", command.get_program()));
        let stdout = follow(child.stdout.take().expect("it is piped"));
        let stderr = follow(child.stderr.take().expect("it is piped"));
        Process {
            child,
            stdout,
            stderr,
        }
    }

    /// Writes all of standard input and closes it, beside what else happens.
    pub(crate) fn feed(&mut self, input: Vec<u8>) {
        let mut stdin = self.child.stdin.take().expect("standard input is piped");
        // A process that has read enough closes it; that is its right.
        std::thread::spawn(move || drop(stdin.write_all(&input)));
    }

    pub(crate) fn id(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids are small")
    }

    pub(crate) fn stdout(&self) -> Vec<u8> {
        self.stdout.bytes()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.bytes()).into_owned()
    }

    /// Waits for a text on standard error; false if the process ends or time runs out first.
    pub(crate) fn wait_for_stderr(&self, text: &str, within: Duration) -> bool {
        self.stderr
            .wait(within, |state| contains(&state.text, text))
    }

    /// The same on standard output, for a number of lines.
    pub(crate) fn wait_for_lines(&self, lines: usize, within: Duration) -> bool {
        self.stdout.wait(within, |state| {
            state.text.iter().filter(|byte| **byte == b'\n').count() >= lines
        })
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.id()).expect("a process id is not 0");
        kill_process(pid, signal).expect("the process is there to be signalled");
    }

    /// Waits for the end of its output, hence its own; `None` if that takes too long.
    pub(crate) fn wait(&mut self, within: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + within;
        for printed in [&self.stdout, &self.stderr] {
            let left = deadline.saturating_duration_since(Instant::now());
            if !printed.wait(left, |state| state.ended) {
                return None;
            }
        }
        Some(self.child.wait().expect("a child can be waited for"))
    }

    /// `kill -9`, and waits until it is gone.
    pub(crate) fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn contains(text: &[u8], wanted: &str) -> bool {
    text.windows(wanted.len())
        .any(|window| window == wanted.as_bytes())
}

/// How a program ended and what it printed.
#[derive(Debug)]
pub struct Finished {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The same, if it succeeded.
    ///
    /// # Panics
    /// If it failed.
    #[track_caller]
    pub fn success(self) -> Self {
        assert_eq!(
            self.code,
            Some(0),
            "stdout:\n{}\nstderr:\n{}",
            self.text(),
            self.stderr
        );
        self
    }
}

/// Runs a command to its end.
///
/// # Panics
/// If it takes longer than `within`; it is killed then.
#[track_caller]
pub fn run(command: &mut Command, input: Option<&[u8]>, within: Duration) -> Finished {
    command.stdin(if input.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    });
    let mut process = Process::start(command);
    if let Some(input) = input {
        process.feed(input.to_vec());
    }
    finish(process, command, within)
}

#[track_caller]
pub(crate) fn finish(mut process: Process, command: &Command, within: Duration) -> Finished {
    let Some(status) = process.wait(within) else {
        let printed = String::from_utf8_lossy(&process.stdout()).into_owned();
        panic!(
            "{command:?} did not end within {within:?}\nstdout:\n{printed}\nstderr:\n{}",
            process.stderr()
        );
    };
    Finished {
        code: status.code(),
        stdout: process.stdout(),
        stderr: process.stderr(),
    }
}
