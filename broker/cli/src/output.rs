//! Standard output. A reader that has seen enough (`| head`) closes it: that is a quiet success, not an error.

use std::io::{self, BufWriter, StdoutLock, Write};

use crate::failure::Failure;

/// Large enough that output at full speed costs few system calls.
const BUFFER_BYTES: usize = 256 << 10;

/// Whether anyone still reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    Listening,
    Gone,
}

/// Standard output, locked and buffered.
pub(crate) fn stdout() -> BufWriter<StdoutLock<'static>> {
    BufWriter::with_capacity(BUFFER_BYTES, io::stdout().lock())
}

/// Tells a reader that went away from a failure to write.
pub(crate) fn reader(written: io::Result<()>) -> Result<Reader, Failure> {
    match written {
        Ok(()) => Ok(Reader::Listening),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(Failure::new("can't write to standard output").because(error)),
    }
}

/// Prints a whole text.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = stdout();
    reader(out.write_all(text.as_bytes()).and_then(|()| out.flush())).map(|_| ())
}
