//! The lines of a history. All times are microseconds since the recorder was made, of one clock.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A producer sent a value, and this came of it. Written when its outcome is known.
    Append {
        /// What was sent.
        value: Value,
        /// To where.
        partition: i32,
        /// Before it was sent.
        invoked: u64,
        /// After the outcome was known.
        ended: u64,
        /// What came of it.
        outcome: Outcome,
    },
    /// A consumer was given records whose offsets follow each other. Of one reader they stand in the order in which it got them.
    Read {
        /// Who. Each goes through each partition once, from wherever it begins.
        reader: u32,
        /// From where.
        partition: i32,
        /// Of the first value.
        offset: i64,
        /// As they came.
        values: Vec<Seen>,
        /// After they came.
        at: u64,
    },
    /// A consumer that only ever went on was told that there is no such offset.
    Refused {
        /// Who.
        reader: u32,
        /// Where.
        partition: i32,
        /// What it was told.
        error: String,
        /// When.
        at: u64,
    },
    /// Everything was mended, no producer was at work any more, and a reader has read the whole partition.
    Drained {
        /// Of which.
        partition: i32,
        /// The offset after the last record, as the leader said.
        end: i64,
    },
    /// Something was broken, or mended again. Not checked; for people, and for the longest gap by kind of fault.
    Fault {
        /// What.
        kind: String,
        /// Which brokers.
        brokers: Vec<i32>,
        /// When it began.
        from: u64,
        /// When it was mended.
        until: u64,
    },
}

/// What became of an append.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It is in the log.
    Acked {
        /// Where; absent if the broker knew only that it is there.
        offset: Option<i64>,
    },
    /// It is certainly not in the log, and never will be.
    Failed {
        /// Why.
        error: String,
    },
    /// It may be in the log.
    Unknown {
        /// Why.
        error: String,
    },
}

/// A value that is sent once: the producer's number and its count. In a history it is written `producer-counter`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value {
    /// Who sent it.
    pub producer: u32,
    /// Its how manieth.
    pub counter: u64,
}

/// A value as it came back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Seen {
    /// One that a producer may have sent.
    Whole(Value),
    /// Bytes that no producer has made, or not all bytes of those that it has made.
    Foreign(String),
}

impl Value {
    /// As many bytes as asked for, or a few more: the value's text, a space, and a filler that follows from it, so that a byte that changed is seen.
    pub fn to_bytes(self, size: usize) -> Vec<u8> {
        let mut bytes = format!("{self} ").into_bytes();
        let mut filler = fastrand::Rng::with_seed(u64::from(self.producer) << 40 ^ self.counter);
        while bytes.len() < size {
            bytes.push(filler.lowercase() as u8);
        }
        bytes
    }
}

impl Seen {
    /// Recognises [`Value::to_bytes`].
    pub fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let value = text.split(' ').next().and_then(|word| word.parse().ok());
        match value {
            Some(value) if Value::to_bytes(value, bytes.len()) == bytes => Self::Whole(value),
            _ => Self::Foreign(text.chars().take(40).collect()),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.producer, self.counter)
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(value) => value.fmt(f),
            Self::Foreign(text) => write!(f, "foreign:{text}"),
        }
    }
}

/// A text that is no value.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no value: it would be two numbers, producer-counter")]
pub struct NotAValue(String);

impl FromStr for Value {
    type Err = NotAValue;

    fn from_str(text: &str) -> Result<Self, NotAValue> {
        let parsed = text.split_once('-').and_then(|(producer, counter)| {
            Some(Self {
                producer: producer.parse().ok()?,
                counter: counter.parse().ok()?,
            })
        });
        parsed.ok_or_else(|| NotAValue(text.to_owned()))
    }
}

impl FromStr for Seen {
    type Err = NotAValue;

    fn from_str(text: &str) -> Result<Self, NotAValue> {
        match text.strip_prefix("foreign:") {
            Some(foreign) => Ok(Self::Foreign(foreign.to_owned())),
            None => text.parse().map(Self::Whole),
        }
    }
}

/// Both stand in a history as text.
macro_rules! as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

as_text!(Value);
as_text!(Seen);
