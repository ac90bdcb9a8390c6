//! Sizes and durations as people write them in YAML.
//!
//! The patterns here are both written into the CRD and checked in Rust, so that a file read by a standalone broker and
//! one applied to Kubernetes are held to the same grammar. (serde_yaml reads `10Gi` as text and `1024` as a number, hence
//! [`ByteQuantity`] is either.)

use std::borrow::Cow;
use std::fmt;
use std::sync::LazyLock;
use std::time::Duration;

use bytesize::ByteSize;
use kube::core::Rule;
use regex_lite::Regex;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// `512`, `10GiB`, `1.5 GB`, and Kubernetes' own `10Gi`, `500M`, `64k`.
pub(crate) const BYTES_PATTERN: &str = r"^[0-9]+(\.[0-9]+)? ?([kKMGTP]i?B?|B)?$";

/// `7d`, `12h`, `1d 12h`, `90m`.
pub(crate) const TIME_PATTERN: &str = r"^[0-9]+(ms|s|m|h|d|w)( ?[0-9]+(ms|s|m|h|d|w))*$";

/// The same, or `forever`.
pub(crate) const RETENTION_TIME_PATTERN: &str =
    r"^(forever|[0-9]+(ms|s|m|h|d|w)( ?[0-9]+(ms|s|m|h|d|w))*)$";

/// `10s`, `1m30s`: what CEL reads as a `duration`, for rules.
pub(crate) const SHORT_TIME_PATTERN: &str = r"^([0-9]+(ms|s|m|h))+$";

/// The most characters of a size or a time: enough for any, and few enough for the API server to let rules read them.
pub(crate) const MAX_SIZE_LENGTH: usize = 32;
pub(crate) const MAX_TIME_LENGTH: usize = 64;

/// A rule for the CRD: the size is within these limits, in Kubernetes' own notation.
pub(crate) fn size_between(field: &str, min: &str, max: &str) -> Rule {
    let size = size_in_cel("self");
    Rule::new(format!(
        "{size}.compareTo(quantity('{min}')) >= 0 && {size}.compareTo(quantity('{max}')) <= 0"
    ))
    .message(format!("{field} must be from {min} to {max} bytes").as_str())
}

/// The same for a time that is written as [`SHORT_TIME_PATTERN`] says.
pub(crate) fn time_between(field: &str, min: &str, max: &str) -> Rule {
    Rule::new(format!(
        "duration(self) >= duration('{min}') && duration(self) <= duration('{max}')"
    ))
    .message(format!("{field} must be from {min} to {max}").as_str())
}

/// A size as a `quantity` of CEL, which reads Kubernetes' notation only.
pub(crate) fn size_in_cel(field: &str) -> String {
    format!(
        "quantity(string({field}).replace('B', '').replace(' ', '').replace('K', 'k').replace('ki', 'Ki'))"
    )
}

static BYTES: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(BYTES_PATTERN).ok());
static TIME: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(TIME_PATTERN).ok());

/// An amount of bytes: a number, or text with a unit (`10GiB`, `500MB`, `10Gi`).
///
/// It is kept as written and interpreted by [`ByteQuantity::bytes`], so that one bad object never makes a whole list of
/// objects unreadable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum ByteQuantity {
    /// A plain number of bytes.
    Number(i64),
    /// A number with a unit.
    Text(String),
}

impl ByteQuantity {
    /// The amount in bytes, or `None` if it is not a legal quantity.
    pub fn bytes(&self) -> Option<u64> {
        match self {
            Self::Number(number) => u64::try_from(*number).ok(),
            Self::Text(text) if matches(&BYTES, text) => {
                let bytes = text.parse::<ByteSize>().ok()?.as_u64();
                // The parser saturates: what does not fit is an error, not a smaller size.
                (bytes < u64::MAX).then_some(bytes)
            }
            Self::Text(_) => None,
        }
    }
}

impl fmt::Display for ByteQuantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

// By hand, because errors from serde's untagged enums have lost the name of the field.
impl<'de> Deserialize<'de> for ByteQuantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EitherForm;

        impl Visitor<'_> for EitherForm {
            type Value = ByteQuantity;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes or a size such as \"10GiB\"")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<ByteQuantity, E> {
                Ok(ByteQuantity::Number(number))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<ByteQuantity, E> {
                i64::try_from(number)
                    .map(ByteQuantity::Number)
                    .map_err(|_| E::invalid_value(Unexpected::Unsigned(number), &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteQuantity, E> {
                Ok(ByteQuantity::Text(text.to_owned()))
            }
        }

        deserializer.deserialize_any(EitherForm)
    }
}

impl JsonSchema for ByteQuantity {
    fn schema_name() -> Cow<'static, str> {
        "ByteQuantity".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "minimum": 0,
            "pattern": BYTES_PATTERN,
            "maxLength": MAX_SIZE_LENGTH,
        })
    }
}

/// Parses a retention time. `Ok(None)` means forever; `None` means that it is not a legal time.
#[allow(clippy::option_option)]
pub fn parse_retention_time(text: &str) -> Option<Option<Duration>> {
    match text {
        "forever" => Some(None),
        time => parse_time(time).map(Some),
    }
}

/// Parses a time. `None` means that it is not a legal one.
pub(crate) fn parse_time(text: &str) -> Option<Duration> {
    if !matches(&TIME, text) {
        return None;
    }
    humantime::parse_duration(text)
        .ok()
        .filter(|time| !time.is_zero())
}

fn matches(pattern: &Option<Regex>, text: &str) -> bool {
    pattern
        .as_ref()
        .is_some_and(|pattern| pattern.is_match(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_quantities_are_read_as_people_write_them() {
        const KIB: u64 = 1024;
        for (text, bytes) in [
            ("0", Some(0)),
            ("512", Some(512)),
            ("512B", Some(512)),
            ("64k", Some(64_000)),
            ("64Ki", Some(64 * KIB)),
            ("1MiB", Some(KIB * KIB)),
            ("1.5GiB", Some(3 * KIB * KIB * KIB / 2)),
            ("10 GiB", Some(10 * KIB * KIB * KIB)),
            ("10Gi", Some(10 * KIB * KIB * KIB)),
            ("10GB", Some(10_000_000_000)),
            ("2TiB", Some(2 * KIB * KIB * KIB * KIB)),
            ("9007199254740993", Some(9_007_199_254_740_993)),
            ("99999999999PiB", None),
            ("-1", None),
            ("", None),
            ("GiB", None),
            ("10 gigs", None),
            ("10gib", None),
            ("1e9", None),
        ] {
            assert_eq!(ByteQuantity::Text(text.into()).bytes(), bytes, "{text:?}");
        }
        assert_eq!(ByteQuantity::Number(7).bytes(), Some(7));
        assert_eq!(ByteQuantity::Number(-7).bytes(), None);
    }

    #[test]
    fn retention_times_are_read_as_people_write_them() {
        let hours = |n: u64| Some(Some(Duration::from_secs(n * 3600)));
        for (text, time) in [
            ("7d", hours(24 * 7)),
            ("12h", hours(12)),
            ("1d 12h", hours(36)),
            ("1d12h", hours(36)),
            ("2w", hours(24 * 14)),
            ("90m", Some(Some(Duration::from_secs(5400)))),
            ("1500ms", Some(Some(Duration::from_millis(1500)))),
            ("forever", Some(None)),
            ("0s", None),
            ("", None),
            ("7", None),
            ("7 days", None),
            ("-7d", None),
            ("for ever", None),
            ("99999999999999999999d", None),
        ] {
            assert_eq!(parse_retention_time(text), time, "{text:?}");
        }
    }
}
