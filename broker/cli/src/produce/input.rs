//! Cuts input into records at a delimiter, without changing or copying a byte, on a thread of its own.
//!
//! Memory is bounded: [`CHUNK_BYTES`] for each of the few chunks on their way, or [`MAX_RECORD_BYTES`] if records are that
//! large. What comes in slowly (a person who types) goes out at once.

use std::io::{self, Read};
use std::thread::{self, JoinHandle};

use memchr::memmem::Finder;
use millrace_client::Bytes;
use tokio::sync::mpsc;

use super::filling::Filling;

/// What is asked of one read.
const CHUNK_BYTES: usize = 1 << 20;
/// A read is not asked for less: below it the rest of a buffer is not worth a system call.
const READ_MIN_BYTES: usize = 64 << 10;
/// The largest record. A topic's limit is at most the same, before compression.
pub(super) const MAX_RECORD_BYTES: usize = millrace_crds::MAX_MAX_MESSAGE_BYTES as usize;
/// Chunks that wait while the producer is busy.
const CHUNKS_WAITING: usize = 4;

/// Where a record ends.
#[derive(Debug, Clone)]
pub(super) enum Delimiter {
    /// At these bytes, which are part of no record. The last record may go without.
    Bytes(Bytes),
    /// At the end of the input.
    EndOfInput,
}

/// Whole records from one read.
#[derive(Debug)]
pub(super) struct Chunk {
    bytes: Bytes,
    /// Where in `bytes` each record begins and ends.
    records: Vec<(u32, u32)>,
}

impl Chunk {
    /// Bytes of input, delimiters included.
    pub(super) fn input_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The records, which share the chunk's memory.
    pub(super) fn records(&self) -> impl Iterator<Item = Bytes> {
        self.records
            .iter()
            .map(|&(start, end)| self.bytes.slice(start as usize..end as usize))
    }
}

/// Why input ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum InputError {
    #[error("can't read {name}")]
    Read { name: String, source: io::Error },
    #[error("{name}: a record of more than {MAX_RECORD_BYTES} bytes")]
    TooLarge { name: String },
    #[error("the thread that reads the input died")]
    Died,
}

/// The reading thread, and what it has read.
pub(super) struct Input {
    chunks: mpsc::Receiver<Result<Chunk, InputError>>,
    thread: Option<JoinHandle<()>>,
}

/// Starts to read all inputs, one after another. Records never span inputs.
pub(super) fn start<R: Read + Send + 'static>(
    inputs: Vec<(String, R)>,
    delimiter: Delimiter,
) -> Input {
    let (sender, chunks) = mpsc::channel(CHUNKS_WAITING);
    let thread = thread::spawn(move || {
        for (name, input) in inputs {
            let outcome = cut(&name, input, &delimiter, |chunk| {
                sender.blocking_send(Ok(chunk)).is_ok()
            });
            if let Err(error) = outcome {
                // The receiver is gone if the command was interrupted.
                let _ = sender.blocking_send(Err(error));
                return;
            }
        }
    });
    Input {
        chunks,
        thread: Some(thread),
    }
}

impl Input {
    /// The next chunk; `None` at the end of the input. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<Result<Chunk, InputError>> {
        if let Some(chunk) = self.chunks.recv().await {
            return Some(chunk);
        }
        // A thread that died must not pass for the end of the input: records would be missing without a word.
        let died = self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err());
        died.then_some(Err(InputError::Died))
    }
}

/// Cuts one input; `sink` says whether more is wanted.
fn cut(
    name: &str,
    mut input: impl Read,
    delimiter: &Delimiter,
    mut sink: impl FnMut(Chunk) -> bool,
) -> Result<(), InputError> {
    let delimiter: Option<&[u8]> = match delimiter {
        Delimiter::Bytes(bytes) => Some(bytes),
        Delimiter::EndOfInput => None,
    };
    let finder = delimiter.map(Finder::new);
    let delimiter_len = delimiter.map_or(0, <[u8]>::len);
    let mut buffer = Filling::default();
    // Up to here there is no delimiter.
    let mut searched = 0;
    loop {
        buffer.make_room(READ_MIN_BYTES, CHUNK_BYTES);
        let read = match input.read(buffer.room()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read.map_err(|source| InputError::Read {
                name: name.to_owned(),
                source,
            })?,
        };
        buffer.filled(read);
        let held = buffer.held();
        let mut records = Vec::new();
        let mut start = 0;
        if let Some(finder) = &finder {
            while let Some(at) = finder.find(&held[searched..]) {
                let end = searched + at;
                records.push((start as u32, end as u32));
                start = end + delimiter_len;
                searched = start;
            }
            // The beginning of a delimiter may be the last thing read.
            searched = searched.max(held.len().saturating_sub(delimiter_len - 1));
        }
        if held.len() - start > MAX_RECORD_BYTES {
            return Err(InputError::TooLarge {
                name: name.to_owned(),
            });
        }
        let ended = read == 0;
        if ended && (start < held.len() || finder.is_none()) {
            records.push((start as u32, held.len() as u32));
            start = held.len();
        }
        if !records.is_empty() {
            searched -= start.min(searched);
            let bytes = buffer.take(start);
            if !sink(Chunk { bytes, records }) {
                return Ok(());
            }
        }
        if ended {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives what it has in pieces of a fixed size, as pipes do.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let n = self.1.min(self.0.len()).min(into.len());
            let (now, later) = self.0.split_at(n);
            into[..n].copy_from_slice(now);
            self.0 = later;
            Ok(n)
        }
    }

    fn records(input: &[u8], delimiter: &Delimiter, piece: usize) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        let mut bytes = 0;
        cut("t", Pieces(input, piece), delimiter, |chunk| {
            bytes += chunk.input_bytes();
            records.extend(chunk.records().map(|record| record.to_vec()));
            true
        })
        .unwrap();
        assert_eq!(bytes, input.len(), "every byte of the input is in a chunk");
        records
    }

    #[test]
    fn records_are_what_is_between_delimiters_byte_for_byte() {
        type Case<'a> = (&'a [u8], &'a [u8], &'a [&'a [u8]]);
        let cases: [Case; 12] = [
            (b"", b"\n", &[]),
            (b"\n", b"\n", &[b""]),
            (b"a", b"\n", &[b"a"]),
            (b"a\n", b"\n", &[b"a"]),
            (b"a\nb", b"\n", &[b"a", b"b"]),
            (b"a\n\nb\n", b"\n", &[b"a", b"", b"b"]),
            (b"a\r\nb\r\n", b"\n", &[b"a\r", b"b\r"]),
            (b"\xff\x00\n\xfe", b"\n", &[b"\xff\x00", b"\xfe"]),
            (b"a\0b\nc\0", b"\0", &[b"a", b"b\nc"]),
            (b"a--b-c--", b"--", &[b"a", b"b-c"]),
            (b"xaaay", b"aa", &[b"x", b"ay"]),
            (b"a-", b"--", &[b"a-"]),
        ];
        for (input, delimiter, expected) in cases {
            for piece in [1, 2, 3, 100] {
                let delimiter = Delimiter::Bytes(Bytes::copy_from_slice(delimiter));
                let got = records(input, &delimiter, piece);
                assert_eq!(got, expected, "{input:?} in pieces of {piece}");
            }
        }
    }

    #[test]
    fn a_whole_input_is_one_record_even_if_empty() {
        for input in [&b""[..], b"a\nb\n"] {
            assert_eq!(records(input, &Delimiter::EndOfInput, 1), [input]);
        }
    }

    #[test]
    fn a_large_input_survives_whatever_the_reads() {
        let input: Vec<u8> = (0..3_000_000_u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        let delimiter = Delimiter::Bytes(Bytes::from_static(b"\n"));
        for piece in [4_097, 65_536, usize::MAX] {
            let mut joined = records(&input, &delimiter, piece).join(&b'\n');
            joined.truncate(input.len());
            let whole = input.strip_suffix(b"\n").unwrap_or(&input);
            assert!(joined == whole, "pieces of {piece}");
        }
    }

    #[test]
    fn a_record_without_end_is_refused_before_memory_is() {
        let error = cut(
            "endless",
            io::repeat(b'a'),
            &Delimiter::Bytes(Bytes::from_static(b"\n")),
            |_| true,
        );
        let error = error.unwrap_err().to_string();
        assert!(
            error.starts_with("endless: a record of more than"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_reader_that_dies_is_no_end_of_input() {
        struct Dies;

        impl Read for Dies {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("on purpose")
            }
        }

        let mut input = start(vec![("t".to_owned(), Dies)], Delimiter::EndOfInput);
        assert!(matches!(input.next().await, Some(Err(InputError::Died))));
        assert!(input.next().await.is_none());
    }

    #[test]
    fn a_slow_input_is_handed_over_as_it_comes() {
        let mut chunks = Vec::new();
        let delimiter = Delimiter::Bytes(Bytes::from_static(b"\n"));
        cut("t", Pieces(b"ab\ncd\n", 3), &delimiter, |chunk| {
            chunks.push(chunk.records().count());
            true
        })
        .unwrap();
        assert_eq!(chunks, [1, 1]);
    }
}
