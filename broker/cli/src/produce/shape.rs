//! Makes records of pieces of input: what is key, what is value, what is null.

use memchr::memmem::Finder;
use millrace_client::{Bytes, Record};

/// Where keys come from.
#[derive(Debug)]
pub(super) enum Keys {
    /// Records have none.
    None,
    /// All have this one.
    Fixed(Bytes),
    /// What stands before the first separator.
    Before {
        separator: Box<Finder<'static>>,
        /// Whether a record without separator has a null key; else it is an error.
        may_be_missing: bool,
    },
}

/// How pieces of input become records.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) topic: std::sync::Arc<str>,
    pub(super) keys: Keys,
    /// A value (or a key before a separator) of exactly these bytes is null.
    pub(super) null: Option<Bytes>,
    pub(super) headers: Vec<(String, Bytes)>,
    pub(super) partition: Option<i32>,
}

/// There is no key separator in the piece.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NoSeparator;

impl Shape {
    /// Key and value; null is `None`.
    fn split(&self, piece: Bytes) -> Result<(Option<Bytes>, Option<Bytes>), NoSeparator> {
        Ok(match &self.keys {
            Keys::None => (None, self.unless_null(piece)),
            Keys::Fixed(key) => (Some(key.clone()), self.unless_null(piece)),
            Keys::Before {
                separator,
                may_be_missing,
            } => match separator.find(&piece) {
                Some(at) => {
                    let value = piece.slice(at + separator.needle().len()..);
                    (self.unless_null(piece.slice(..at)), self.unless_null(value))
                }
                None if *may_be_missing => (None, self.unless_null(piece)),
                None => return Err(NoSeparator),
            },
        })
    }

    fn unless_null(&self, bytes: Bytes) -> Option<Bytes> {
        (self.null.as_ref() != Some(&bytes)).then_some(bytes)
    }

    /// The record and the bytes of its key and value.
    pub(super) fn record(&self, piece: Bytes) -> Result<(Record, usize), NoSeparator> {
        let (key, value) = self.split(piece)?;
        let size = key.as_ref().map_or(0, Bytes::len) + value.as_ref().map_or(0, Bytes::len);
        let mut record = Record::to(self.topic.clone());
        if let Some(key) = key {
            record = record.key(key);
        }
        if let Some(value) = value {
            record = record.value(value);
        }
        for (name, value) in &self.headers {
            record = record.header(name.clone(), value.clone());
        }
        if let Some(partition) = self.partition {
            record = record.partition(partition);
        }
        Ok((record, size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_nulls_are_found() {
        let before = |may_be_missing| Keys::Before {
            separator: Box::new(Finder::new("::").into_owned()),
            may_be_missing,
        };
        let fixed = || Keys::Fixed("f".into());
        type Split = Result<(Option<&'static str>, Option<&'static str>), NoSeparator>;
        let cases: [(Keys, &'static str, Split); 11] = [
            (Keys::None, "a::b", Ok((None, Some("a::b")))),
            (Keys::None, "", Ok((None, Some("")))),
            (Keys::None, "NULL", Ok((None, None))),
            (fixed(), "a", Ok((Some("f"), Some("a")))),
            (fixed(), "NULL", Ok((Some("f"), None))),
            (before(false), "k::v::w", Ok((Some("k"), Some("v::w")))),
            (before(false), "::", Ok((Some(""), Some("")))),
            (before(false), "k::NULL", Ok((Some("k"), None))),
            (before(false), "NULL::v", Ok((None, Some("v")))),
            (before(false), "k:v", Err(NoSeparator)),
            (before(true), "k:v", Ok((None, Some("k:v")))),
        ];
        for (keys, piece, expected) in cases {
            let shape = Shape {
                topic: "t".into(),
                keys,
                null: Some("NULL".into()),
                headers: Vec::new(),
                partition: None,
            };
            let text = |bytes: Option<Bytes>| bytes.map(|b| String::from_utf8(b.to_vec()).unwrap());
            let got = shape.split(piece.into()).map(|(k, v)| (text(k), text(v)));
            let expected = expected.map(|(k, v)| (k.map(String::from), v.map(String::from)));
            assert_eq!(got, expected, "{piece:?} with {:?}", shape.keys);
        }
    }
}
