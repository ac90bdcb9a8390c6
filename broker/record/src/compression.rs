//! Kafka's codecs, byte-compatible with what its Java client writes and reads.
//!
//! Decompressing is for hostile input: output grows as it is produced and never past the limit, and no size that the
//! input claims is allocated before the input was seen to hold it. (An LZ4 frame may ask for its block buffers, 8 MiB each at most.)

use std::cell::RefCell;
use std::fmt;
use std::io::{self, Read, Write};
use std::str::FromStr;

use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;
use lz4_flex::frame::{BlockMode, BlockSize, FrameDecoder, FrameEncoder, FrameInfo};
use zstd::zstd_safe::{self, CCtx, DCtx};

use crate::{BatchError, HEADER_LEN};

/// How a batch's records are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// Gzip, level 6.
    Gzip,
    /// Snappy in xerial's framing, blocks of 32 KiB.
    Snappy,
    /// LZ4 frame, independent blocks of 64 KiB.
    Lz4,
    /// Zstandard, level 3.
    Zstd,
}

impl Compression {
    /// All codecs, in the order of their codes.
    pub const ALL: [Compression; 5] = [
        Compression::None,
        Compression::Gzip,
        Compression::Snappy,
        Compression::Lz4,
        Compression::Zstd,
    ];

    pub(crate) fn code(self) -> u16 {
        self as u16
    }

    pub(crate) fn from_code(code: u16) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    fn name(self) -> &'static str {
        match self {
            Compression::None => "none",
            Compression::Gzip => "gzip",
            Compression::Snappy => "snappy",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that is no codec's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("compression `{0}` is unknown; use one of none, gzip, snappy, lz4, zstd")]
pub struct UnknownCompression(String);

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .into_iter()
            .find(|codec| codec.name() == name)
            .ok_or_else(|| UnknownCompression(name.to_owned()))
    }
}

/// Start of xerial's framing: magic, version 1, compatible from version 1.
const XERIAL_HEADER: [u8; 16] = *b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01";
const XERIAL_MAGIC_LEN: usize = 8;
const XERIAL_BLOCK: usize = 32 * 1024;
/// A Snappy copy element makes at most 64 bytes of 3, so a block that claims more than this per byte lies.
const SNAPPY_MAX_RATIO: usize = 22;
const ZSTD_LEVEL: i32 = 3;

thread_local! {
    // A compression context is a megabyte and a decompression context a tenth of that: too much to set up for each batch.
    static ZSTD_COMPRESS: RefCell<CCtx<'static>> = RefCell::new(CCtx::create());
    static ZSTD_DECOMPRESS: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// Compresses `records` behind [`HEADER_LEN`] zero bytes, where the caller writes the header.
pub(crate) fn compress(codec: Compression, records: &[u8]) -> Result<Vec<u8>, BatchError> {
    let mut out = Vec::with_capacity(HEADER_LEN + records.len() / 2);
    out.resize(HEADER_LEN, 0);
    let written = match codec {
        Compression::None => {
            out.extend_from_slice(records);
            Ok(out)
        }
        Compression::Gzip => {
            let mut encoder = GzEncoder::new(out, flate2::Compression::new(6));
            encoder.write_all(records).and_then(|()| encoder.finish())
        }
        Compression::Snappy => compress_snappy(records, out),
        Compression::Lz4 => {
            let info = FrameInfo::new()
                .block_mode(BlockMode::Independent)
                .block_size(BlockSize::Max64KB);
            let mut encoder = FrameEncoder::with_frame_info(info, out);
            encoder
                .write_all(records)
                .and_then(|()| encoder.finish().map_err(io::Error::from))
        }
        Compression::Zstd => compress_zstd(records, out),
    };
    written.map_err(|error| {
        BatchError::invalid(format!("{codec} failed to compress its records: {error}"))
    })
}

fn compress_snappy(records: &[u8], mut out: Vec<u8>) -> io::Result<Vec<u8>> {
    out.extend_from_slice(&XERIAL_HEADER);
    let mut encoder = snap::raw::Encoder::new();
    for block in records.chunks(XERIAL_BLOCK) {
        let length_at = out.len();
        let start = length_at + 4;
        out.resize(start + snap::raw::max_compress_len(block.len()), 0);
        let len = encoder.compress(block, &mut out[start..])?;
        out[length_at..start].copy_from_slice(&(len as u32).to_be_bytes());
        out.truncate(start + len);
    }
    Ok(out)
}

fn compress_zstd(records: &[u8], mut out: Vec<u8>) -> io::Result<Vec<u8>> {
    out.resize(HEADER_LEN + zstd_safe::compress_bound(records.len()), 0);
    let len = ZSTD_COMPRESS
        .with_borrow_mut(|context| context.compress(&mut out[HEADER_LEN..], records, ZSTD_LEVEL))
        .map_err(|code| io::Error::other(zstd_safe::get_error_name(code)))?;
    out.truncate(HEADER_LEN + len);
    Ok(out)
}

/// Decompresses a batch's records into at most `limit` bytes.
pub(crate) fn decompress(
    codec: Compression,
    input: &[u8],
    limit: usize,
) -> Result<Vec<u8>, BatchError> {
    let mut output = match codec {
        Compression::None => Ok(input.to_vec()),
        Compression::Gzip => {
            let mut decoder = MultiGzDecoder::new(input);
            read_bounded(&mut decoder, input.len(), limit)
        }
        Compression::Snappy => decompress_snappy(input, limit),
        Compression::Lz4 => {
            let mut decoder = FrameDecoder::new(input);
            read_bounded(&mut decoder, input.len(), limit).and_then(|output| {
                match decoder.get_ref().len() {
                    0 => Ok(output),
                    more => Err(Failure::Input(format!(
                        "{more} bytes follow the compressed data"
                    ))),
                }
            })
        }
        Compression::Zstd => decompress_zstd(input, limit),
    }
    .map_err(|failure| match failure {
        Failure::Limit => BatchError::TooLarge { limit },
        Failure::Input(reason) => {
            BatchError::invalid(format!("{codec} cannot decompress its records: {reason}"))
        }
    })?;
    // Records keep the whole buffer alive, so it should not be mostly slack.
    if output.capacity() / 2 > output.len() {
        output.shrink_to_fit();
    }
    Ok(output)
}

enum Failure {
    Limit,
    Input(String),
}

impl Failure {
    fn input(error: impl fmt::Display) -> Self {
        Failure::Input(error.to_string())
    }
}

fn read_bounded(
    decoder: &mut impl Read,
    input_len: usize,
    limit: usize,
) -> Result<Vec<u8>, Failure> {
    let mut output = Vec::with_capacity(input_len.saturating_mul(2).min(limit));
    let bound = (limit as u64).saturating_add(1);
    decoder
        .take(bound)
        .read_to_end(&mut output)
        .map_err(Failure::input)?;
    if output.len() > limit {
        Err(Failure::Limit)
    } else {
        Ok(output)
    }
}

fn decompress_snappy(input: &[u8], limit: usize) -> Result<Vec<u8>, Failure> {
    let mut decoder = snap::raw::Decoder::new();
    let mut output = Vec::new();
    if !is_xerial(input) {
        snappy_block(&mut decoder, input, &mut output, limit)?;
        return Ok(output);
    }
    let mut rest = input;
    while !rest.is_empty() {
        // The header stands at the start, and again wherever streams were joined.
        if is_xerial(rest) {
            rest = rest
                .get(XERIAL_HEADER.len()..)
                .ok_or_else(|| Failure::input("its framing is cut short"))?;
            continue;
        }
        let cut = || Failure::input("a block is cut short");
        let (length, after) = rest.split_first_chunk::<4>().ok_or_else(cut)?;
        let (block, after) = after
            .split_at_checked(u32::from_be_bytes(*length) as usize)
            .ok_or_else(cut)?;
        snappy_block(&mut decoder, block, &mut output, limit)?;
        rest = after;
    }
    Ok(output)
}

fn is_xerial(input: &[u8]) -> bool {
    input.starts_with(&XERIAL_HEADER[..XERIAL_MAGIC_LEN])
}

fn snappy_block(
    decoder: &mut snap::raw::Decoder,
    block: &[u8],
    output: &mut Vec<u8>,
    limit: usize,
) -> Result<(), Failure> {
    let claimed = snap::raw::decompress_len(block).map_err(Failure::input)?;
    if claimed > block.len().saturating_mul(SNAPPY_MAX_RATIO) {
        return Err(Failure::Input(format!(
            "a block of {} bytes claims to hold {claimed}",
            block.len()
        )));
    }
    let start = output.len();
    if claimed > limit - start {
        return Err(Failure::Limit);
    }
    output.resize(start + claimed, 0);
    decoder
        .decompress(block, &mut output[start..])
        .map_err(Failure::input)?;
    Ok(())
}

/// In one go rather than as a stream: that needs no window beside the output, whose size (up to 128 MiB) a frame dictates.
/// Kafka's client does not write the content size, so the output is guessed and enlarged fourfold until it fits.
fn decompress_zstd(input: &[u8], limit: usize) -> Result<Vec<u8>, Failure> {
    const TOO_SMALL: usize =
        (zstd_safe::zstd_sys::ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall as usize).wrapping_neg();
    let plausible = input.len().saturating_mul(64);
    let claimed = zstd_safe::get_frame_content_size(input)
        .ok()
        .flatten()
        .and_then(|size| usize::try_from(size).ok());
    let mut capacity = match claimed {
        Some(size) if size <= plausible => size,
        _ => input.len().saturating_mul(8),
    };
    ZSTD_DECOMPRESS.with_borrow_mut(|context| {
        loop {
            capacity = capacity.min(limit);
            let mut output = Vec::with_capacity(capacity);
            match context.decompress(&mut output, input) {
                Ok(_) if output.len() <= limit => return Ok(output),
                Ok(_) => return Err(Failure::Limit),
                Err(TOO_SMALL) if capacity == limit => return Err(Failure::Limit),
                Err(TOO_SMALL) => capacity = capacity.saturating_mul(4).max(1024),
                Err(code) => return Err(Failure::input(zstd_safe::get_error_name(code))),
            }
        }
    })
}
