//! What the client tells of its retries, as lines on standard error: without them a broker that is away looks like a command
//! that hangs.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// One kind of warning is printed at most this often: retries come for each partition, many times a second.
const INTERVAL: Duration = Duration::from_secs(5);

/// Prints warnings from now on.
pub(crate) fn print() {
    // It fails only if this was done before.
    let _ = tracing_subscriber::registry()
        .with(Warnings::default().with_filter(LevelFilter::WARN))
        .try_init();
}

#[derive(Default)]
struct Warnings {
    /// When each kind was printed last. The kinds are places in the code, hence few.
    printed: Mutex<HashMap<&'static str, Instant>>,
}

impl Warnings {
    fn is_due(&self, kind: &'static str, now: Instant) -> bool {
        let Ok(mut printed) = self.printed.lock() else {
            return false;
        };
        let due = printed
            .get(kind)
            .is_none_or(|last| now.duration_since(*last) >= INTERVAL);
        if due {
            printed.insert(kind, now);
        }
        due
    }
}

impl<S: Subscriber> Layer<S> for Warnings {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if self.is_due(event.metadata().name(), Instant::now()) {
            let mut line = Line::default();
            event.record(&mut line);
            let _ = writeln!(io::stderr(), "{line}");
        }
    }
}

/// The message and the error that caused it; other fields repeat what the error says.
#[derive(Default)]
struct Line {
    message: String,
    error: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = match field.name() {
            "message" => &mut self.message,
            "error" => &mut self.error,
            _ => return,
        };
        let _ = write!(text, "{value:?}");
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "warning: {}", self.message)?;
        if !self.error.is_empty() {
            write!(f, ": {}", self.error)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_of_warning_is_printed_again_only_after_a_while() {
        let warnings = Warnings::default();
        let start = Instant::now();
        assert!(warnings.is_due("one", start));
        assert!(!warnings.is_due("one", start + INTERVAL / 2));
        assert!(warnings.is_due("other", start + INTERVAL / 2));
        assert!(warnings.is_due("one", start + INTERVAL));
    }
}
