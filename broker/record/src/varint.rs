//! Zig-zag variable-length integers as in Protocol Buffers, which records use for every length and delta.
//!
//! Reading is for hostile input: it never runs past the slice and refuses values wider than the type. Over-long encodings
//! of a value that fits are accepted, as Kafka accepts them.

/// Why a field could not be read; the caller adds which record it was in.
pub(crate) type Fault = &'static str;

/// Longest encoding of an `i64`.
pub(crate) const MAX_LEN: usize = 10;

/// Maps small negative numbers to small unsigned ones.
#[inline]
fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

/// Encoded length of `value`. An `i32` has the same encoding as the `i64` of the same value.
#[inline]
pub(crate) fn len(value: i64) -> usize {
    let bits = 64 - (zigzag(value) | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

/// Writes `value` at the start of `out` and returns the encoded length; `out` must hold [`MAX_LEN`] bytes.
#[inline]
pub(crate) fn write(out: &mut [u8], value: i64) -> usize {
    let mut rest = zigzag(value);
    let mut at = 0;
    while rest >= 0x80 {
        out[at] = rest as u8 | 0x80;
        rest >>= 7;
        at += 1;
    }
    out[at] = rest as u8;
    at + 1
}

/// A position in a slice that is read field by field.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    #[inline]
    pub(crate) fn new(bytes: &'a [u8], at: usize) -> Self {
        Reader { bytes, at }
    }

    /// Bytes not read yet.
    #[inline]
    pub(crate) fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next byte.
    #[inline]
    pub(crate) fn byte(&mut self) -> Result<u8, Fault> {
        let byte = *self.bytes.get(self.at).ok_or("it ends within a field")?;
        self.at += 1;
        Ok(byte)
    }

    /// Passes over `count` bytes and returns where they begin.
    #[inline]
    pub(crate) fn skip(&mut self, count: usize) -> Result<usize, Fault> {
        if count > self.remaining() {
            return Err("a length runs past its end");
        }
        let start = self.at;
        self.at += count;
        Ok(start)
    }

    /// A varint.
    #[inline]
    pub(crate) fn int(&mut self) -> Result<i32, Fault> {
        let raw = self.unsigned::<32>()? as u32;
        Ok((raw >> 1) as i32 ^ -((raw & 1) as i32))
    }

    /// A varlong.
    #[inline]
    pub(crate) fn long(&mut self) -> Result<i64, Fault> {
        let raw = self.unsigned::<64>()?;
        Ok((raw >> 1) as i64 ^ -((raw & 1) as i64))
    }

    #[inline]
    fn unsigned<const BITS: u32>(&mut self) -> Result<u64, Fault> {
        let first = self.byte()?;
        if first < 0x80 {
            Ok(u64::from(first))
        } else {
            self.unsigned_tail::<BITS>(first)
        }
    }

    fn unsigned_tail<const BITS: u32>(&mut self, first: u8) -> Result<u64, Fault> {
        let mut value = u64::from(first & 0x7f);
        let mut shift = 7;
        while shift < BITS {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            let room = BITS - shift;
            if room < 7 && bits >> room != 0 {
                break;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Ok(value);
            }
            shift += 7;
        }
        Err("a varint overflows its type")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encode(value: i64) -> Vec<u8> {
        let mut out = [0; MAX_LEN];
        let n = write(&mut out, value);
        out[..n].to_vec()
    }

    #[test]
    fn encodings_are_those_of_the_protobuf_specification() {
        let cases: &[(i64, &[u8])] = &[
            (0, &[0x00]),
            (-1, &[0x01]),
            (1, &[0x02]),
            (63, &[0x7e]),
            (-64, &[0x7f]),
            (64, &[0x80, 0x01]),
            (-65, &[0x81, 0x01]),
            (8191, &[0xfe, 0x7f]),
            (8192, &[0x80, 0x80, 0x01]),
            (i64::from(i32::MAX), &[0xfe, 0xff, 0xff, 0xff, 0x0f]),
            (i64::from(i32::MIN), &[0xff, 0xff, 0xff, 0xff, 0x0f]),
            (
                i64::MAX,
                &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            ),
            (
                i64::MIN,
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
            ),
        ];
        for (value, bytes) in cases {
            assert_eq!(encode(*value), *bytes, "{value}");
            assert_eq!(len(*value), bytes.len(), "{value}");
            assert_eq!(Reader::new(bytes, 0).long(), Ok(*value));
            if let Ok(small) = i32::try_from(*value) {
                assert_eq!(Reader::new(bytes, 0).int(), Ok(small));
            }
        }
    }

    #[test]
    fn values_wider_than_the_type_are_refused() {
        assert!(
            Reader::new(&[0xff, 0xff, 0xff, 0xff, 0x10], 0)
                .int()
                .is_err()
        );
        assert!(
            Reader::new(&[0x80, 0x80, 0x80, 0x80, 0x80, 0x00], 0)
                .int()
                .is_err()
        );
        assert!(
            Reader::new(
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02],
                0
            )
            .long()
            .is_err()
        );
        assert!(Reader::new(&[0x80; 11], 0).long().is_err());
    }

    #[test]
    fn a_varint_that_ends_early_is_refused() {
        assert!(Reader::new(&[], 0).int().is_err());
        assert!(Reader::new(&[0x80], 0).int().is_err());
        assert!(Reader::new(&[0xff; 9], 0).long().is_err());
    }

    proptest! {
        #[test]
        fn every_value_reads_back(value: i64, small: i32) {
            prop_assert_eq!(Reader::new(&encode(value), 0).long(), Ok(value));
            prop_assert_eq!(Reader::new(&encode(i64::from(small)), 0).int(), Ok(small));
            prop_assert_eq!(encode(value).len(), len(value));
        }
    }
}
