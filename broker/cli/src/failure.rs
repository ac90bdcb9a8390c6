//! What a command says when it fails: what happened, why, and what to do about it.

use std::error::Error as StdError;
use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;

use millrace_client::{Error, ErrorKind};

/// The end of a command that did not do what it was asked.
#[derive(Debug)]
pub(crate) struct Failure {
    message: String,
    causes: Vec<String>,
    hint: Option<String>,
    code: u8,
}

impl Failure {
    /// A failure at run time.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            causes: Vec::new(),
            hint: None,
            code: 1,
        }
    }

    /// A failure of the arguments that only shows once they are put together.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self {
            code: 2,
            ..Self::new(message)
        }
    }

    /// Adds the cause and what caused that.
    pub(crate) fn because(mut self, cause: impl StdError) -> Self {
        self.push_cause(cause.to_string());
        let mut next = cause.source();
        while let Some(cause) = next {
            self.push_cause(cause.to_string());
            next = cause.source();
        }
        self
    }

    /// Adds the next step.
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Says first what the message is about.
    pub(crate) fn prefix(mut self, prefix: impl fmt::Display) -> Self {
        self.message = format!("{prefix}: {}", self.message);
        self
    }

    /// Many errors repeat their source in their own text: that is said once.
    fn push_cause(&mut self, cause: String) {
        if !self.message.contains(&cause) && !self.causes.iter().any(|known| known.contains(&cause))
        {
            self.causes.push(cause);
        }
    }

    /// Prints it and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        // If standard error is gone there is no one left to tell.
        let _ = writeln!(io::stderr(), "{self}");
        ExitCode::from(self.code)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        for cause in &self.causes {
            write!(f, "\n  cause: {cause}")?;
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let failure = Failure::new(error.to_string());
        match next_step(error.kind()) {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

/// What to do about an error, beyond what its own message says.
fn next_step(kind: ErrorKind) -> Option<&'static str> {
    Some(match kind {
        ErrorKind::UnknownTopic => "`millrace topics list` shows the topics there are",
        ErrorKind::UnknownPartition => "`millrace topics describe TOPIC` shows its partitions",
        ErrorKind::NotLeader => {
            "`millrace topics describe TOPIC` shows which partitions have a leader; try again in a \
             moment"
        }
        ErrorKind::OffsetOutOfRange => {
            "`millrace topics describe TOPIC` shows the offsets held; or use --from earliest"
        }
        ErrorKind::RecordTooLarge => {
            "raise maxMessageBytes in the Topic's spec, or send smaller records"
        }
        ErrorKind::InvalidTimestamp => {
            "correct the clock that stamped the record, or raise timestampAfterMax in the Topic's spec"
        }
        ErrorKind::CorruptBatch => {
            "the batch was damaged on disk or on the way: look at the broker's log"
        }
        ErrorKind::DiskFull => {
            "free space on the broker's disk, or lower the retention of its topics, and try again"
        }
        ErrorKind::Storage => "the broker's log tells more",
        ErrorKind::NotEnoughReplicas => {
            "`millrace topics describe TOPIC` shows which replicas are in sync; bring the missing brokers back, or lower \
             minInSyncReplicas in the Topic's spec"
        }
        ErrorKind::Throttled | ErrorKind::ShuttingDown | ErrorKind::OffsetNotAvailable => {
            "try again in a moment"
        }
        ErrorKind::TimedOut => {
            "the broker is slow or stuck: look at its log. Records may or may not have been stored"
        }
        ErrorKind::Transport => {
            "is the broker running, and is this its address? Start one with `millrace-broker --data \
             DIR --topics DIR`, or name another with --bootstrap or MILLRACE_BOOTSTRAP"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_reads_as_what_why_and_what_next() {
        let cause = io::Error::new(io::ErrorKind::PermissionDenied, "no right to read");
        let failure = Failure::new("can't read a.txt")
            .because(cause)
            .hint("run as its owner");
        assert_eq!(
            failure.to_string(),
            "error: can't read a.txt\n  cause: no right to read\nhint: run as its owner"
        );
    }

    #[test]
    fn a_cause_that_the_message_has_told_is_not_repeated() {
        let failure = Failure::new("can't connect: refused").because(io::Error::other("refused"));
        assert_eq!(failure.to_string(), "error: can't connect: refused");
    }
}
