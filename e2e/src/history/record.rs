//! A history's file: one JSON object a line, written as things happen, so that a run that is killed leaves what it saw.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::Event;

/// Why a history can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    /// The file.
    #[error("history {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A line that is no event.
    #[error("history {}, line {line}: {source}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Why.
        source: serde_json::Error,
    },
}

/// Writes a history. Many tasks may write at a time.
pub struct Recorder {
    path: PathBuf,
    file: Mutex<BufWriter<File>>,
    begun: Instant,
}

impl Recorder {
    /// Begins a new file.
    ///
    /// # Errors
    /// If it can't be made.
    pub fn create(path: &Path) -> Result<Self, HistoryError> {
        let file = File::create(path).map_err(|source| HistoryError::File {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            file: Mutex::new(BufWriter::new(file)),
            begun: Instant::now(),
        })
    }

    /// Now, as events have it.
    pub fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Writes an event.
    ///
    /// # Errors
    /// If the disk takes no more.
    pub fn record(&self, event: &Event) -> Result<(), HistoryError> {
        let mut line = serde_json::to_vec(event).map_err(|error| self.failed(error.into()))?;
        line.push(b'\n');
        self.locked(|file| file.write_all(&line))
    }

    /// Hands all of it to the file.
    ///
    /// # Errors
    /// If the disk takes no more.
    pub fn flush(&self) -> Result<(), HistoryError> {
        self.locked(|file| file.flush())
    }

    fn locked(
        &self,
        act: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> Result<(), HistoryError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        act(&mut file).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> HistoryError {
        HistoryError::File {
            path: self.path.clone(),
            source,
        }
    }
}

/// Reads a history.
///
/// # Errors
/// If the file can't be read, or a line is no event.
pub fn read(path: &Path) -> Result<Vec<Event>, HistoryError> {
    let failed = |source| HistoryError::File {
        path: path.to_owned(),
        source,
    };
    let lines = BufReader::new(File::open(path).map_err(failed)?).lines();
    let events = lines.enumerate().map(|(index, line)| {
        serde_json::from_str(&line.map_err(failed)?).map_err(|source| HistoryError::Line {
            path: path.to_owned(),
            line: index + 1,
            source,
        })
    });
    events.collect()
}
