//! Small pieces of text: escapes in arguments, and numbers as people read them.

use std::time::Duration;

use clap::ValueEnum;
use millrace_client::Bytes;

/// Parses an argument with escapes (`\n \r \t \0 \\ \xNN`) into the bytes it means.
pub(crate) fn unescape(text: &str) -> Result<Bytes, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        let mut after = rest[at + 1..].chars();
        let byte = match after.next() {
            Some('n') => b'\n',
            Some('r') => b'\r',
            Some('t') => b'\t',
            Some('0') => 0,
            Some('\\') => b'\\',
            Some('x') => {
                let digits = after.as_str().get(..2).unwrap_or_default();
                let byte = u8::from_str_radix(digits, 16)
                    .map_err(|_| format!("\\x needs two hexadecimal digits in {text:?}"))?;
                after.nth(1);
                byte
            }
            Some(other) => {
                return Err(format!(
                    "unknown escape \\{other} in {text:?}: there are \\n \\r \\t \\0 \\\\ \\xNN"
                ));
            }
            None => return Err(format!("{text:?} ends in a single \\: write \\\\")),
        };
        bytes.push(byte);
        rest = after.as_str();
    }
    bytes.extend_from_slice(rest.as_bytes());
    Ok(bytes.into())
}

/// As [`unescape`], for what can't be empty.
pub(crate) fn unescape_nonempty(text: &str) -> Result<Bytes, String> {
    match unescape(text)? {
        bytes if bytes.is_empty() => Err("can't be empty".to_owned()),
        bytes => Ok(bytes),
    }
}

/// `2.1 s`, `13.4 ms`, `850 µs`: three digits at most.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds >= 100.0 {
        format!("{seconds:.0} s")
    } else if seconds >= 1.0 {
        format!("{seconds:.1} s")
    } else if seconds >= 1e-3 {
        format!("{:.1} ms", seconds * 1e3)
    } else {
        format!("{:.0} µs", seconds * 1e6)
    }
}

/// `N records/s, M MB/s`.
pub(crate) fn rates(records: u64, bytes: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-6);
    format!(
        "{:.0} records/s, {:.1} MB/s",
        records as f64 / seconds,
        bytes as f64 / 1e6 / seconds
    )
}

/// `1 record`, `2 records`.
pub(crate) fn records(count: u64) -> String {
    match count {
        1 => "1 record".to_owned(),
        count => format!("{count} records"),
    }
}

/// How tables and documents are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layout {
    /// For people.
    Table,
    /// For programs.
    Json,
    /// For programs and people.
    Yaml,
    /// Names only, one on each line.
    Name,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_mean_bytes() {
        for (text, bytes) in [
            ("", Ok(&b""[..])),
            ("a", Ok(b"a")),
            (r"\n", Ok(b"\n")),
            (r"a\tb\\c", Ok(b"a\tb\\c")),
            (r"\x00\xFf\0", Ok(&[0, 255, 0])),
            ("\u{e9}\\n", Ok("\u{e9}\n".as_bytes())),
            (r"\x4", Err("two hexadecimal digits")),
            ("\\x\u{e9}\u{e9}", Err("two hexadecimal digits")),
            (r"\q", Err("unknown escape \\q")),
            (r"a\", Err("ends in a single")),
        ] {
            match (unescape(text), bytes) {
                (Ok(got), Ok(expected)) => assert_eq!(&got[..], expected, "{text:?}"),
                (Err(got), Err(expected)) => assert!(got.contains(expected), "{text:?}: {got}"),
                (got, expected) => panic!("{text:?}: {got:?}, not {expected:?}"),
            }
        }
        assert!(unescape_nonempty("").is_err());
    }

    #[test]
    fn times_have_a_unit_that_fits() {
        for (micros, text) in [
            (7, "7 µs"),
            (1_500, "1.5 ms"),
            (2_140_000, "2.1 s"),
            (200_400_000, "200 s"),
        ] {
            assert_eq!(duration(Duration::from_micros(micros)), text);
        }
    }
}
