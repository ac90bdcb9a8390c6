//! How messages become bytes and back: as `tonic-prost` does it, but with room for the whole message reserved first. Without that
//! a message of megabytes is copied again each time its buffer doubles. Requests are bounded before they are decoded: see
//! [`MAX_REQUEST_ELEMENTS`](crate::MAX_REQUEST_ELEMENTS).

use std::{collections::HashMap, marker::PhantomData};

use prost::{
    Message, Name,
    bytes::{Buf, Bytes},
};
use tonic::{
    Code, Status,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    ERROR_DOMAIN,
    elements::{RequestType, TooManyElements},
    v1::ErrorReason,
};

/// What a buffer begins with, in bytes. Answers to producers fit; each open stream has one.
const BUFFER_BYTES: usize = 1 << 10;
/// Streams send what they have once it reaches this many bytes.
const YIELD_BYTES: usize = 256 << 10;

/// The codec of all services in this crate.
#[derive(Debug)]
pub struct ReservingCodec<T, U> {
    messages: PhantomData<(T, U)>,
}

impl<T, U> Default for ReservingCodec<T, U> {
    fn default() -> Self {
        ReservingCodec {
            messages: PhantomData,
        }
    }
}

impl<T, U> Codec for ReservingCodec<T, U>
where
    T: Message + Send + 'static,
    U: Name + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = MessageEncoder<T>;
    type Decoder = MessageDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        MessageEncoder {
            message: PhantomData,
        }
    }

    fn decoder(&mut self) -> Self::Decoder {
        MessageDecoder {
            message: PhantomData,
            request: RequestType::of::<U>(),
        }
    }
}

/// Encodes messages of one type.
#[derive(Debug)]
pub struct MessageEncoder<T> {
    message: PhantomData<T>,
}

impl<T: Message> Encoder for MessageEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(item.encoded_len());
        item.encode(buffer)
            .map_err(|error| Status::internal(format!("a message can't be encoded: {error}")))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}

/// Decodes messages of one type.
#[derive(Debug)]
pub struct MessageDecoder<U> {
    message: PhantomData<U>,
    /// Unless it decodes responses.
    request: Option<RequestType>,
}

impl<U: Message + Default> Decoder for MessageDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        // Tonic holds a message in one piece.
        decode(self.request, buffer).map(Some)
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(BUFFER_BYTES, YIELD_BYTES)
    }
}

/// Decodes a request that came by another way than this codec, with the same checks.
pub fn decode_request<U: Name + Default>(message: Bytes) -> Result<U, Status> {
    decode(RequestType::of::<U>(), message)
}

fn decode<U: Message + Default>(
    request: Option<RequestType>,
    message: impl Buf,
) -> Result<U, Status> {
    if let Some(request) = request {
        request.check(message.chunk()).map_err(refused)?;
    }
    U::decode(message).map_err(|error| {
        Status::internal(format!(
            "a message can't be decoded: {error}; does its sender use this API's version?"
        ))
    })
}

fn refused(error: TooManyElements) -> Status {
    let reason = ErrorReason::InvalidRequest.as_str_name();
    let metadata = HashMap::from([("field".to_owned(), error.field.to_owned())]);
    Status::with_error_details(
        Code::InvalidArgument,
        error.to_string(),
        ErrorDetails::with_error_info(
            reason.trim_start_matches("ERROR_REASON_"),
            ERROR_DOMAIN,
            metadata,
        ),
    )
}
