//! gRPC on the level of HTTP/2, on which a client can misbehave.

use bytes::{BufMut, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use http::{HeaderMap, Request};
use tokio::net::TcpStream;
use tonic::{Code, Status};

/// A connection on the level of HTTP/2, on which a client can misbehave.
pub(crate) async fn connect(address: &str) -> Option<SendRequest<Bytes>> {
    let stream = TcpStream::connect(address).await.ok()?;
    let (sender, connection) = h2::client::handshake(stream).await.ok()?;
    tokio::spawn(connection);
    sender.ready().await.ok()
}

/// Begins a call; the request's body stays open unless `end`.
pub(crate) fn call(
    sender: &mut SendRequest<Bytes>,
    method: &str,
    body: Bytes,
    end: bool,
) -> (ResponseFuture, h2::SendStream<Bytes>) {
    let request = Request::post(format!("http://millrace/millrace.v1.{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let (response, mut stream) = sender.send_request(request, false).unwrap();
    stream.send_data(body, end).unwrap();
    (response, stream)
}

/// A gRPC message as it is framed: not compressed, its length, its bytes.
pub(crate) fn framed(claimed: u32, message: &[u8]) -> Bytes {
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(claimed);
    framed.put_slice(message);
    framed.freeze()
}

/// What came back for a call.
pub(crate) struct Answer {
    pub(crate) status: Status,
    /// The messages as they are encoded.
    pub(crate) messages: Vec<Bytes>,
    /// Bytes of names and values in all headers and trailers.
    pub(crate) header_bytes: usize,
}

/// Waits for the end of a call.
pub(crate) async fn answer(response: ResponseFuture) -> Result<Answer, String> {
    let response = response.await.map_err(|error| error.to_string())?;
    let mut headers = response.headers().clone();
    let mut body = response.into_body();
    let mut data = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(|error| error.to_string())?;
        let _ = body.flow_control().release_capacity(chunk.len());
        data.extend_from_slice(&chunk);
    }
    let trailers = body.trailers().await.map_err(|error| error.to_string())?;
    headers.extend(trailers.unwrap_or_default());
    let mut messages = Vec::new();
    while let Some((&[0, ref length @ ..], _)) = data.split_first_chunk::<5>() {
        let length = u32::from_be_bytes(*length) as usize;
        let mut framed = data.split_to(5 + length);
        messages.push(framed.split_off(5).freeze());
    }
    Ok(Answer {
        status: status(&headers)?,
        messages,
        header_bytes: headers
            .iter()
            .map(|(n, v)| n.as_str().len() + v.len())
            .sum(),
    })
}

fn status(headers: &HeaderMap) -> Result<Status, String> {
    match headers.get("grpc-status") {
        None => Err(format!("an answer without a gRPC status: {headers:?}")),
        Some(code) if code == "0" => Ok(Status::new(Code::Ok, "")),
        Some(_) => {
            Status::from_header_map(headers).ok_or_else(|| format!("no status: {headers:?}"))
        }
    }
}
