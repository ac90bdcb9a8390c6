//! HTTP as little as a health probe needs.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use crate::SOON;

/// An answer.
#[derive(Debug)]
pub struct HttpAnswer {
    /// The status code.
    pub status: u16,
    /// The value of `content-type`.
    pub content_type: String,
    /// The body.
    pub body: String,
}

/// GET. HTTP/1.0, so that the end of the connection is that of the body.
pub(crate) fn get(address: &str, path: &str) -> HttpAnswer {
    let mut stream = TcpStream::connect(address).expect("the metrics listener takes connections");
    stream
        .set_read_timeout(Some(SOON))
        .expect("a time-out can be set");
    write!(stream, "GET {path} HTTP/1.0\r\nhost: {address}\r\n\r\n").expect("the request is sent");
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .expect("an answer in UTF-8");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .expect("a status line");
    let content_type = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-type")
            .then(|| value.trim().to_owned())
    });
    HttpAnswer {
        status,
        content_type: content_type.unwrap_or_default(),
        body: body.to_owned(),
    }
}
