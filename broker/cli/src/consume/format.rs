//! How a record is written: bytes as they are, JSON, or a template in the style of kcat.

use std::io::{self, Write};

use base64::prelude::{BASE64_STANDARD, Engine};
use millrace_client::millrace_record::Record;
use millrace_client::{Bytes, RecordHeader};
use serde::Serialize;

use crate::points::format_time;
use crate::text::unescape;

/// A way to write records.
#[derive(Debug)]
pub(super) enum Format {
    /// The value, then the delimiter.
    Value { delimiter: Bytes },
    /// The key, the separator, the value, then the delimiter.
    KeyValue { separator: Bytes, delimiter: Bytes },
    /// One JSON object on each line.
    Json,
    /// A template.
    Template(Vec<Piece>),
}

/// A piece of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    Text(Bytes),
    Topic,
    Partition,
    Offset,
    Key,
    KeyLength,
    Value,
    ValueLength,
    TimestampMs,
    Time,
    Headers,
}

/// Where a record is from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) topic: &'a str,
    pub(super) partition: i32,
}

/// Parses a template.
pub(super) fn parse_template(text: &str) -> Result<Vec<Piece>, String> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        push_text(&mut pieces, &rest[..at])?;
        let mut after = rest[at + 1..].chars();
        pieces.push(match after.next() {
            Some('t') => Piece::Topic,
            Some('p') => Piece::Partition,
            Some('o') => Piece::Offset,
            Some('k') => Piece::Key,
            Some('K') => Piece::KeyLength,
            Some('v' | 's') => Piece::Value,
            Some('V' | 'S') => Piece::ValueLength,
            Some('T') => Piece::TimestampMs,
            Some('d') => Piece::Time,
            Some('h') => Piece::Headers,
            Some('%') => Piece::Text(Bytes::from_static(b"%")),
            other => {
                let found = other.map_or_else(|| "a % at the end".to_owned(), |c| format!("%{c}"));
                return Err(format!(
                    "{found} means nothing: there are %t %p %o %k %K %v %V %T %d %h %%"
                ));
            }
        });
        rest = after.as_str();
    }
    push_text(&mut pieces, rest)?;
    Ok(pieces)
}

fn push_text(pieces: &mut Vec<Piece>, text: &str) -> Result<(), String> {
    let bytes = unescape(text)?;
    if !bytes.is_empty() {
        pieces.push(Piece::Text(bytes));
    }
    Ok(())
}

impl Format {
    /// Writes one record. Null is written as `null` where bytes are written as they are.
    pub(super) fn write(
        &self,
        out: &mut impl Write,
        place: Place<'_>,
        record: &Record,
        null: &[u8],
    ) -> io::Result<()> {
        let bytes = |bytes: &Option<Bytes>| {
            bytes
                .clone()
                .unwrap_or_else(|| Bytes::copy_from_slice(null))
        };
        match self {
            Self::Value { delimiter } => {
                out.write_all(record.value.as_deref().unwrap_or(null))?;
                out.write_all(delimiter)
            }
            Self::KeyValue {
                separator,
                delimiter,
            } => {
                out.write_all(record.key.as_deref().unwrap_or(null))?;
                out.write_all(separator)?;
                out.write_all(record.value.as_deref().unwrap_or(null))?;
                out.write_all(delimiter)
            }
            Self::Json => {
                serde_json::to_writer(&mut *out, &JsonRecord::new(place, record))?;
                out.write_all(b"\n")
            }
            Self::Template(pieces) => pieces.iter().try_for_each(|piece| match piece {
                Piece::Text(text) => out.write_all(text),
                Piece::Topic => out.write_all(place.topic.as_bytes()),
                Piece::Partition => write!(out, "{}", place.partition),
                Piece::Offset => write!(out, "{}", record.offset),
                Piece::Key => out.write_all(&bytes(&record.key)),
                Piece::KeyLength => write!(out, "{}", length(&record.key)),
                Piece::Value => out.write_all(&bytes(&record.value)),
                Piece::ValueLength => write!(out, "{}", length(&record.value)),
                Piece::TimestampMs => write!(out, "{}", record.timestamp_ms),
                Piece::Time => out.write_all(format_time(record.timestamp_ms).as_bytes()),
                Piece::Headers => write_headers(out, &record.headers, null),
            }),
        }
    }
}

/// As kcat: -1 for null.
fn length(bytes: &Option<Bytes>) -> i64 {
    bytes.as_ref().map_or(-1, |bytes| bytes.len() as i64)
}

fn write_headers(out: &mut impl Write, headers: &[RecordHeader], null: &[u8]) -> io::Result<()> {
    for (index, header) in headers.iter().enumerate() {
        if index > 0 {
            out.write_all(b",")?;
        }
        out.write_all(&header.key)?;
        out.write_all(b"=")?;
        out.write_all(header.value.as_deref().unwrap_or(null))?;
    }
    Ok(())
}

/// A record as JSON. Bytes that are UTF-8 are a string; others are in base64, in a field whose name says so.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonRecord<'a> {
    topic: &'a str,
    partition: i32,
    offset: i64,
    timestamp: String,
    timestamp_ms: i64,
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    headers: Vec<JsonHeader<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonHeader<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    name_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Option<&'a str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_base64: Option<String>,
}

impl<'a> JsonRecord<'a> {
    fn new(place: Place<'a>, record: &'a Record) -> Self {
        let (key, key_base64) = text_or_base64(record.key.as_deref());
        let (value, value_base64) = text_or_base64(record.value.as_deref());
        Self {
            topic: place.topic,
            partition: place.partition,
            offset: record.offset,
            timestamp: format_time(record.timestamp_ms),
            timestamp_ms: record.timestamp_ms,
            key,
            key_base64,
            value,
            value_base64,
            headers: record.headers.iter().map(JsonHeader::new).collect(),
        }
    }
}

impl<'a> JsonHeader<'a> {
    fn new(header: &'a RecordHeader) -> Self {
        let (name, name_base64) = text_or_base64(Some(&header.key));
        let (value, value_base64) = text_or_base64(header.value.as_deref());
        Self {
            name,
            name_base64,
            value,
            value_base64,
        }
    }
}

/// The two fields of which one is written: a string or null, or base64.
type TextOrBase64<'a> = (Option<Option<&'a str>>, Option<String>);

fn text_or_base64(bytes: Option<&[u8]>) -> TextOrBase64<'_> {
    match bytes.map(std::str::from_utf8) {
        None => (Some(None), None),
        Some(Ok(text)) => (Some(Some(text)), None),
        Some(Err(_)) => (None, bytes.map(|bytes| BASE64_STANDARD.encode(bytes))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: Option<&'static [u8]>, value: Option<&'static [u8]>) -> Record {
        Record {
            offset: 42,
            timestamp_ms: 1_700_000_000_123,
            key: key.map(Bytes::from_static),
            value: value.map(Bytes::from_static),
            headers: Vec::new(),
        }
    }

    fn header(key: &'static str, value: Option<&'static [u8]>) -> RecordHeader {
        RecordHeader {
            key: Bytes::from_static(key.as_bytes()),
            value: value.map(Bytes::from_static),
        }
    }

    fn written(format: &Format, record: &Record) -> Vec<u8> {
        let mut out = Vec::new();
        let place = Place {
            topic: "t",
            partition: 3,
        };
        format.write(&mut out, place, record, b"NULL").unwrap();
        out
    }

    #[test]
    fn bytes_are_written_as_they_are() {
        let delimiter = Bytes::from_static(b"\n");
        let value = Format::Value {
            delimiter: delimiter.clone(),
        };
        let both = Format::KeyValue {
            separator: "::".into(),
            delimiter,
        };
        for (key, val, as_value, as_both) in [
            (
                None,
                Some(&b"a\r\xff"[..]),
                &b"a\r\xff\n"[..],
                &b"NULL::a\r\xff\n"[..],
            ),
            (Some(&b"k"[..]), Some(b""), b"\n", b"k::\n"),
            (Some(b""), None, b"NULL\n", b"::NULL\n"),
        ] {
            let record = record(key, val);
            assert_eq!(written(&value, &record), as_value);
            assert_eq!(written(&both, &record), as_both);
        }
    }

    #[test]
    fn json_tells_null_empty_text_and_bytes_apart() {
        let start = r#"{"topic":"t","partition":3,"offset":42,"timestamp":"2023-11-14T22:13:20.123Z","timestampMs":1700000000123,"#;
        let mut with_headers = record(Some(b"k"), Some(b"{\"a\":1}"));
        with_headers.headers = vec![header("h", Some(b"\xff")), header("n", None)];
        for (record, end) in [
            (record(None, None), r#""key":null,"value":null}"#),
            (record(Some(b""), Some(b"")), r#""key":"","value":""}"#),
            (
                record(Some(b"\xff"), Some(b"\x80")),
                r#""keyBase64":"/w==","valueBase64":"gA=="}"#,
            ),
            (
                with_headers,
                r#""key":"k","value":"{\"a\":1}","headers":[{"name":"h","valueBase64":"/w=="},{"name":"n","value":null}]}"#,
            ),
        ] {
            let text = String::from_utf8(written(&Format::Json, &record)).unwrap();
            assert_eq!(text, format!("{start}{end}\n"));
        }
    }

    #[test]
    fn templates_are_filled_in() {
        let mut record = record(Some(b"key"), None);
        record.headers = vec![header("a", Some(b"1")), header("b", None)];
        for (template, text) in [
            (r"%t %p %o %k %v\n", "t 3 42 key NULL\n"),
            (r"%s|%S|%V|%K\0", "NULL|-1|-1|3\0"),
            ("%T %d", "1700000000123 2023-11-14T22:13:20.123Z"),
            ("%h", "a=1,b=NULL"),
            ("100%%", "100%"),
            ("", ""),
        ] {
            let format = Format::Template(parse_template(template).unwrap());
            assert_eq!(
                String::from_utf8(written(&format, &record)).unwrap(),
                text,
                "{template:?}"
            );
        }
    }

    #[test]
    fn a_template_that_means_nothing_is_refused() {
        for (template, part) in [
            ("%q", "%q means nothing"),
            ("a%", "a % at the end"),
            (r"\q", "escape"),
        ] {
            let error = parse_template(template).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
