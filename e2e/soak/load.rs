//! What producers and consumers share: where to write and read, the history, and what went wrong on the way without being wrong.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use millrace_client::{Client, Error};
use millrace_e2e::history::{Event, Recorder};

/// The topic of all of it.
pub(crate) const TOPIC: &str = "soak";

/// One for all tasks.
pub(crate) struct Load {
    pub(crate) bootstrap: String,
    pub(crate) partitions: i32,
    /// Bytes of each value.
    pub(crate) size: usize,
    pub(crate) recorder: Recorder,
    /// How often clients were told what, by kind, with an example.
    errors: Mutex<BTreeMap<String, (usize, String)>>,
}

impl Load {
    pub(crate) fn new(
        bootstrap: String,
        partitions: i32,
        size: usize,
        recorder: Recorder,
    ) -> Arc<Self> {
        Arc::new(Self {
            bootstrap,
            partitions,
            size,
            recorder,
            errors: Mutex::default(),
        })
    }

    pub(crate) async fn client(&self) -> Result<Client> {
        Ok(Client::connect(self.bootstrap.as_str()).await?)
    }

    pub(crate) fn record(&self, event: &Event) -> Result<()> {
        Ok(self.recorder.record(event)?)
    }

    /// Counts what a client was told.
    pub(crate) fn told(&self, who: &str, error: &Error) {
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = format!("{who}: {:?}", error.kind());
        let entry = errors.entry(kind).or_insert_with(|| (0, error.to_string()));
        entry.0 += 1;
    }

    /// What clients were told, how often, and the first of each kind.
    pub(crate) fn errors(&self) -> Vec<(String, usize, String)> {
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        let all = errors.iter();
        all.map(|(kind, (count, example))| (kind.clone(), *count, example.clone()))
            .collect()
    }
}
