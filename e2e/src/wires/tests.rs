use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::*;

const BROKER: Node = Node::Broker(1);
const QUICK: Duration = Duration::from_millis(300);

/// Sends back what it gets, at the address returned, until the task is aborted.
async fn echo(address: Option<SocketAddr>) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let address = address.unwrap_or_else(|| ([127, 0, 0, 1], free_port()).into());
    let listener = TcpListener::bind(address).await.unwrap();
    let task = tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    (address, task)
}

async fn connected(address: SocketAddr) -> TcpStream {
    for _ in 0..500 {
        if let Ok(stream) = TcpStream::connect(address).await {
            return stream;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no connection to {address}")
}

async fn ask(stream: &mut TcpStream) -> std::io::Result<Duration> {
    let begun = Instant::now();
    stream.write_all(b"?").await?;
    stream.read_u8().await?;
    Ok(begun.elapsed())
}

async fn is_silent(stream: &mut TcpStream) -> bool {
    tokio::time::timeout(QUICK, stream.read_u8()).await.is_err()
}

#[tokio::test]
async fn bytes_pass_until_the_cable_is_out_and_come_when_it_is_back() {
    let wires = Wires::default();
    let (target, _echo) = echo(None).await;
    let mut stream = connected(wires.front(BROKER, target)).await;
    ask(&mut stream).await.unwrap();
    // Each direction by itself is enough for silence; neither closes anything.
    for (from, to) in [(Node::Client, BROKER), (BROKER, Node::Client)] {
        wires.set(from, to, |link| link.cut = true);
        stream.write_all(b"?").await.unwrap();
        assert!(is_silent(&mut stream).await);
        wires.heal();
        stream.read_u8().await.unwrap();
    }
}

#[tokio::test]
async fn a_new_connection_over_a_cut_link_is_taken_and_silent() {
    let wires = Wires::default();
    let (target, _echo) = echo(None).await;
    let address = wires.front(BROKER, target);
    drop(connected(address).await);
    wires.cut(Node::Client, [BROKER]);
    let mut stream = connected(address).await;
    stream.write_all(b"?").await.unwrap();
    assert!(is_silent(&mut stream).await);
    wires.heal();
    stream.read_u8().await.unwrap();
}

#[tokio::test]
async fn delay_bandwidth_and_resets_are_those_of_their_link() {
    let wires = Wires::default();
    let (target, _echo) = echo(None).await;
    let address = wires.front(BROKER, target);
    let mut stream = connected(address).await;
    assert!(ask(&mut stream).await.unwrap() < QUICK);
    wires.set(Node::Client, BROKER, |link| link.delay = QUICK);
    let once = ask(&mut stream).await.unwrap();
    assert!(QUICK <= once && once < 2 * QUICK, "{once:?}");
    wires.set(BROKER, Node::Client, |link| link.delay = QUICK);
    let both = ask(&mut stream).await.unwrap();
    assert!(2 * QUICK <= both, "{both:?}");
    wires.heal();
    // A quarter of a second for each kilobyte.
    wires.set(Node::Client, BROKER, |link| {
        link.bytes_per_second = Some(4_000)
    });
    let begun = Instant::now();
    stream.write_all(&[0; 4_000]).await.unwrap();
    stream.read_exact(&mut [0; 4_000]).await.unwrap();
    assert!(
        begun.elapsed() >= Duration::from_millis(900),
        "{:?}",
        begun.elapsed()
    );
    wires.heal();
    wires.between(BROKER, Node::Api, |link| link.resets += 1);
    ask(&mut stream).await.unwrap();
    wires.set(BROKER, Node::Client, |link| link.resets += 1);
    let error = stream.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    ask(&mut connected(address).await).await.unwrap();
}

#[tokio::test]
async fn what_is_dead_refuses_and_what_is_back_is_reached_again() {
    let wires = Wires::default();
    let (target, running) = echo(None).await;
    let address = wires.front(BROKER, target);
    let mut stream = connected(address).await;
    ask(&mut stream).await.unwrap();
    running.abort();
    assert!(stream.read_u8().await.is_err());
    tokio::time::sleep(QUICK).await;
    let refused = TcpStream::connect(address).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    let (_, _running) = echo(Some(target)).await;
    ask(&mut connected(address).await).await.unwrap();
}

#[tokio::test]
async fn who_connects_is_known_by_the_process() {
    let wires = Wires::default();
    let (target, _echo) = echo(None).await;
    let address = wires.front(BROKER, target);
    wires.set(Node::Client, BROKER, |link| link.cut = true);
    wires.claim(i32::try_from(std::process::id()).unwrap(), Node::Broker(2));
    ask(&mut connected(address).await).await.unwrap();
    wires.set(Node::Broker(2), BROKER, |link| link.cut = true);
    let mut stream = connected(address).await;
    stream.write_all(b"?").await.unwrap();
    assert!(is_silent(&mut stream).await);
}
