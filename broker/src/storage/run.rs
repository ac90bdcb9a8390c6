//! Runs: where the batches of a partition are. A run is the part of one partition within one generation.

use super::{Generation, StorageError};

/// A contiguous part of a partition's log within one generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub generation: Generation,
    /// Base offset of the first batch.
    pub first_offset: i64,
    /// Last offset of the last batch; also the key.
    pub last_offset: i64,
    /// Bytes of batches in it.
    pub bytes: u64,
    /// Bytes of batches ever appended to the partition up to and with this run: the difference between two runs is the
    /// size of what lies between, so that a partition's size costs two look-ups.
    pub cumulative_bytes: u64,
    /// The greatest record timestamp in it; milliseconds since the Unix epoch.
    pub max_timestamp: i64,
}

impl Run {
    /// Value of `meta`'s run entries: format u8 = 1, generation u32, first offset i64, bytes u64, cumulative bytes u64,
    /// max timestamp i64; big-endian. Since format 1.
    const LEN: usize = 37;

    pub(super) fn encode(&self) -> [u8; Self::LEN] {
        let mut value = [1; Self::LEN];
        value[1..5].copy_from_slice(&self.generation.0.to_be_bytes());
        value[5..13].copy_from_slice(&self.first_offset.to_be_bytes());
        value[13..21].copy_from_slice(&self.bytes.to_be_bytes());
        value[21..29].copy_from_slice(&self.cumulative_bytes.to_be_bytes());
        value[29..].copy_from_slice(&self.max_timestamp.to_be_bytes());
        value
    }

    pub(super) fn decode(last_offset: i64, value: &[u8]) -> Result<Run, StorageError> {
        let parse = || {
            let (format, rest) = value.split_first()?;
            let (generation, rest) = rest.split_first_chunk::<4>()?;
            let (first_offset, rest) = rest.split_first_chunk::<8>()?;
            let (bytes, rest) = rest.split_first_chunk::<8>()?;
            let (cumulative_bytes, max_timestamp) = rest.split_first_chunk::<8>()?;
            (*format == 1).then_some(Run {
                generation: Generation(u32::from_be_bytes(*generation)),
                first_offset: i64::from_be_bytes(*first_offset),
                last_offset,
                bytes: u64::from_be_bytes(*bytes),
                cumulative_bytes: u64::from_be_bytes(*cumulative_bytes),
                max_timestamp: i64::from_be_bytes(max_timestamp.try_into().ok()?),
            })
        };
        parse().ok_or_else(|| StorageError::Corrupt {
            what: format!("run that ends at offset {last_offset}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_survives_encoding_and_damage_is_noticed() {
        let run = Run {
            generation: Generation(7),
            first_offset: 100,
            last_offset: 250,
            bytes: 4_096,
            cumulative_bytes: 1 << 40,
            max_timestamp: -1,
        };
        let value = run.encode();
        assert_eq!(Run::decode(250, &value).unwrap(), run);
        assert_eq!(value[..13], [1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 100]);
        assert!(Run::decode(250, &value[..36]).is_err());
        assert!(Run::decode(250, &[2; 37]).is_err());
    }
}
