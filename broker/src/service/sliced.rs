//! Fetch responses that are sent from where their batches are. Left to tonic, the whole message is copied into one buffer first.
//!
//! The message is the one of `consumer.proto`, byte for byte what prost would make of it, but in pieces: large batches as they
//! are, and what is between them.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame};
use millrace_proto::v1::{FetchResponse, FetchResult};
use parking_lot::Mutex;
use prost::{
    Message,
    encoding::{WireType, encode_key, encode_varint, encoded_len_varint},
};
use tonic::{Response, Status, body::Body};

/// Field numbers in `consumer.proto`.
const RESULTS: u32 = 1;
const BATCHES: u32 = 5;
/// gRPC's prefix of a message: one byte for compression, four for the length.
const PREFIX: usize = 5;
/// Smaller batches are copied together: each piece costs both sides the handling of a frame.
const MIN_PIECE: usize = 32 << 10;

/// Travels with a response to [`send_pieces`]. Extensions must be cloneable, hence the `Arc`.
#[derive(Clone)]
struct Pieces(Arc<Mutex<VecDeque<Bytes>>>);

/// The response with these results.
pub(super) fn response(results: Vec<FetchResult>) -> Response<FetchResponse> {
    // The message is in the pieces; this one only carries them, and the status that follows.
    let mut response = Response::new(FetchResponse::default());
    let pieces = Pieces(Arc::new(Mutex::new(encode(results))));
    response.extensions_mut().insert(pieces);
    response
}

fn encode(results: Vec<FetchResult>) -> VecDeque<Bytes> {
    let results: Vec<(FetchResult, Vec<Bytes>)> = results
        .into_iter()
        .map(|mut result| {
            let batches = std::mem::take(&mut result.batches);
            (result, batches)
        })
        .collect();
    let field = |length: usize| 1 + encoded_len_varint(length as u64) + length;
    let result_len = |(rest, batches): &(FetchResult, Vec<Bytes>)| {
        let batches: usize = batches.iter().map(|batch| field(batch.len())).sum();
        rest.encoded_len() + batches
    };
    let length: usize = results.iter().map(|result| field(result_len(result))).sum();

    let mut pieces = VecDeque::new();
    let mut small = BytesMut::new();
    small.put_u8(0);
    // A response is far below 4 GiB: the request's limit, or one batch, and batches are bounded by what can be produced.
    small.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    for result in &results {
        encode_key(RESULTS, WireType::LengthDelimited, &mut small);
        encode_varint(result_len(result) as u64, &mut small);
        let (rest, batches) = result;
        rest.encode_raw(&mut small);
        for batch in batches {
            encode_key(BATCHES, WireType::LengthDelimited, &mut small);
            encode_varint(batch.len() as u64, &mut small);
            if batch.len() < MIN_PIECE {
                small.extend_from_slice(batch);
            } else {
                pieces.push_back(small.split().freeze());
                pieces.push_back(batch.clone());
            }
        }
    }
    if !small.is_empty() {
        pieces.push_back(small.freeze());
    }
    debug_assert_eq!(
        pieces.iter().map(Bytes::len).sum::<usize>(),
        PREFIX + length
    );
    pieces
}

/// Puts the pieces that [`response`] left with a response in the place of its message.
pub(super) fn send_pieces(mut response: http::Response<Body>) -> http::Response<Body> {
    match response.extensions_mut().remove::<Pieces>() {
        Some(Pieces(pieces)) => {
            let pieces = std::mem::take(&mut *pieces.lock());
            response.map(|status| Body::new(PiecesBody { pieces, status }))
        }
        None => response,
    }
}

struct PiecesBody {
    pieces: VecDeque<Bytes>,
    /// An empty message, which is not sent, and the status in the trailers, which is.
    status: Body,
}

impl HttpBody for PiecesBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(piece) = self.pieces.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        loop {
            match ready!(Pin::new(&mut self.status).poll_frame(cx)) {
                Some(Ok(frame)) if frame.is_data() => {}
                other => return Poll::Ready(other),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn results() -> impl Strategy<Value = Vec<FetchResult>> {
        let batch = prop_oneof![
            0..100usize,
            MIN_PIECE - 2..MIN_PIECE + 2,
            Just(200_000_usize)
        ];
        let batches = prop::collection::vec((batch, any::<u8>()), 0..5);
        let result = ("[a-z]{0,5}", any::<i32>(), any::<i64>(), batches);
        let result = result.prop_map(|(topic, partition, high_watermark, batches)| FetchResult {
            topic,
            partition,
            high_watermark,
            batches: batches
                .into_iter()
                .map(|(length, byte)| vec![byte; length].into())
                .collect(),
            ..FetchResult::default()
        });
        prop::collection::vec(result, 0..4)
    }

    proptest! {
        #[test]
        fn the_pieces_are_the_message(results in results()) {
            let whole = encode(results.clone()).into_iter().flatten().collect::<Vec<u8>>();
            let (prefix, message) = whole.split_at(PREFIX);
            prop_assert_eq!(prefix[0], 0);
            prop_assert_eq!(&prefix[1..], u32::try_from(message.len()).unwrap().to_be_bytes());
            prop_assert_eq!(FetchResponse::decode(message).unwrap(), FetchResponse { results });
        }
    }
}
