//! What can be wrong with a record batch.

use std::borrow::Cow;

/// Why a record batch was refused. The variants separate what a caller answers differently.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// The bytes end before the batch does: a cut transfer, or the partial batch at the end of a size-limited read.
    #[error(
        "record batch is truncated: it needs {needed} bytes and {available} are here; read or send the whole batch"
    )]
    Truncated {
        /// Bytes that the batch needs, as far as known.
        needed: usize,
        /// Bytes that are here.
        available: usize,
    },
    /// The bytes changed after the producer computed the checksum.
    #[error(
        "record batch is corrupt: its header says CRC-32C {expected:#010x}, its bytes give {actual:#010x}; send or fetch it again"
    )]
    CorruptCrc {
        /// The checksum in the batch's header.
        expected: u32,
        /// The checksum of the bytes that are here.
        actual: u32,
    },
    /// Another message format than v2.
    #[error(
        "record batch has magic {magic}, only magic 2 (Kafka 0.11 and later) is supported; use a client that writes message format v2"
    )]
    UnsupportedMagic {
        /// The magic byte of the batch.
        magic: i8,
    },
    /// The batch breaks a rule of the format, whoever wrote it: sending it again will not help.
    #[error("record batch is invalid: {reason}")]
    Invalid {
        /// The rule, with the figures that broke it.
        reason: Cow<'static, str>,
    },
    /// The batch is, or would become when decompressed, larger than allowed.
    #[error(
        "record batch is too large: more than {limit} bytes once decompressed; raise the limit or send smaller batches"
    )]
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
}

impl BatchError {
    pub(crate) fn invalid(reason: impl Into<Cow<'static, str>>) -> Self {
        BatchError::Invalid {
            reason: reason.into(),
        }
    }
}
