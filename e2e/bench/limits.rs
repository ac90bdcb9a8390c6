//! What the machine could do at best: appending the same bytes to a plain file, and sending them through a bare gRPC stream.
//! Millrace's produce is shown as a share of each.

use std::convert::Infallible;
use std::fs::File;
use std::io::Write;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::process::Command;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures::stream;
use prost::Message;
use tempfile::NamedTempFile;
use tonic::body::Body;
use tonic::codec::{BufferSettings, Codec};
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::{ClientStreamingService, NamedService};
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use crate::Bench;
use crate::peer::{Daemon, Durability, Peer, Topic, free_port};
use crate::produce::{Load, Payloads, produce};
use crate::table::{Column, Report};

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// MiB to write and send in each round.
    #[arg(long, default_value_t = 1_000)]
    volume_mib: u64,
    /// MiB to write in each round where each MiB is synced.
    #[arg(long, default_value_t = 200)]
    synced_mib: u64,
    /// Bytes of each value that Millrace takes.
    #[arg(long, default_value_t = 1_000)]
    size: usize,
}

const MIB: usize = 1 << 20;

const FILE: &str = "produce, and appending to a plain file";
const GRPC: &str = "produce, and a bare gRPC stream of 1 MiB messages";
const SYNCED: &str = "produce with fsync, and a plain file with fdatasync after each MiB";

pub(crate) async fn limits(bench: &Bench, options: &Options) -> Result<Report> {
    let mut report = Report::new("Share of what the machine can do, MiB/s", "limit");
    let payloads = Payloads::new(&bench.work, options.size)?;
    for round in 1..=bench.rounds {
        eprintln!("limits, round {round} of {}", bench.rounds);
        let mut limit = |metric, value| report.add(Column::Other, metric, None, value);
        limit(
            FILE,
            append(bench.work.clone(), options.volume_mib, false).await?,
        );
        limit(
            SYNCED,
            append(bench.work.clone(), options.synced_mib, true).await?,
        );
        limit(GRPC, grpc(options.volume_mib).await?);
        let os = produced(bench, Durability::Os, options.volume_mib, &payloads).await?;
        let fsync = produced(bench, Durability::Fsync, options.synced_mib, &payloads).await?;
        for (metric, value) in [(FILE, os), (GRPC, os), (SYNCED, fsync)] {
            report.add(Column::Millrace, metric, None, value);
        }
    }
    Ok(report)
}

async fn produced(
    bench: &Bench,
    durability: Durability,
    mib: u64,
    payloads: &Payloads,
) -> Result<f64> {
    const TOPIC: &str = "limits";
    let broker = bench
        .peers
        .start(Peer::Millrace, durability, vec![Topic::new(TOPIC, 6)])
        .await?;
    let load = |mib: u64| Load {
        topic: TOPIC.to_owned(),
        records: mib * MIB as u64 / payloads.size as u64,
        linger_ms: 5,
        batch_bytes: 128 * 1024,
        buffer_bytes: None,
    };
    produce(&broker.target(), &load(mib.div_ceil(5)), payloads).await?;
    broker.process().settled().await?;
    let produced = produce(&broker.target(), &load(mib), payloads).await?;
    broker.stop().await?;
    Ok(produced.records_per_s * payloads.size as f64 / MIB as f64)
}

async fn append(dir: PathBuf, mib: u64, sync: bool) -> Result<f64> {
    let write = move || {
        rustix::fs::sync();
        let mut file = NamedTempFile::new_in(dir)?;
        let mut random = fastrand::Rng::with_seed(3);
        let block: Vec<u8> = (0..MIB).map(|_| random.u8(..)).collect();
        let start = Instant::now();
        for _ in 0..mib {
            let file: &mut File = file.as_file_mut();
            file.write_all(&block)?;
            if sync {
                file.sync_data()?;
            }
        }
        Ok::<_, std::io::Error>(mib as f64 / start.elapsed().as_secs_f64())
    };
    Ok(tokio::task::spawn_blocking(write).await??)
}

// The bare stream. Client and server are two processes, as with a broker.

#[derive(Clone, PartialEq, Message)]
struct Chunk {
    #[prost(bytes = "bytes", tag = "1")]
    data: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct Total {
    #[prost(uint64, tag = "1")]
    bytes: u64,
}

/// tonic's own codec with buffers that hold a whole message, so that they need not grow anew for each.
struct Large<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Large<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T: Message + 'static, U: Message + Default + 'static> Codec for Large<T, U> {
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(2 * MIB, MIB))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(2 * MIB, MIB))
    }
}

const WINDOW: u32 = 8 << 20;
const FRAME: u32 = 1 << 20;
const METHOD: &str = "/millrace.bench.Sink/Drain";

async fn grpc(mib: u64) -> Result<f64> {
    let dir = tempfile::tempdir()?;
    let port = free_port()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["grpc-sink", &port.to_string()]);
    let mut sink = Daemon::spawn("the gRPC sink", &mut command, dir.path().join("sink.log"))?;
    sink.printed("ready", Duration::from_secs(10)).await?;
    let channel = Endpoint::try_from(format!("http://127.0.0.1:{port}"))?
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(2 * WINDOW)
        .connect()
        .await
        .context("can't connect to the gRPC sink")?;
    let mut grpc = tonic::client::Grpc::new(channel);
    let mut random = fastrand::Rng::with_seed(5);
    let data: Bytes = (0..MIB).map(|_| random.u8(..)).collect();
    // The first round warms up connection and allocator.
    let mut rate = 0.0;
    for chunks in [mib.div_ceil(5), mib] {
        let data = data.clone();
        let messages = stream::iter((0..chunks).map(move |_| Chunk { data: data.clone() }));
        let start = Instant::now();
        grpc.ready().await?;
        let total: Response<Total> = grpc
            .client_streaming(
                Request::new(messages),
                http::uri::PathAndQuery::from_static(METHOD),
                Large::<Chunk, Total>::default(),
            )
            .await?;
        let elapsed = start.elapsed();
        let bytes = total.into_inner().bytes;
        ensure!(
            bytes == chunks * MIB as u64,
            "the gRPC sink got {bytes} bytes of {chunks} MiB"
        );
        rate = chunks as f64 / elapsed.as_secs_f64();
    }
    Ok(rate)
}

/// The other end of the stream: a process that counts what it gets. It runs until it is killed.
pub(crate) async fn grpc_sink(port: u16) -> Result<()> {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    println!("ready");
    let incoming = tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
    Server::builder()
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(2 * WINDOW)
        .max_frame_size(FRAME)
        .add_service(Sink)
        .serve_with_incoming(incoming)
        .await?;
    Ok(())
}

#[derive(Clone)]
struct Sink;

impl NamedService for Sink {
    const NAME: &'static str = "millrace.bench.Sink";
}

impl Service<http::Request<Body>> for Sink {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(Large::<Total, Chunk>::default());
            Ok(grpc.client_streaming(Drain, request).await)
        })
    }
}

struct Drain;

impl ClientStreamingService<Chunk> for Drain {
    type Response = Total;
    type Future = BoxFuture<Response<Total>, Status>;

    fn call(&mut self, request: Request<Streaming<Chunk>>) -> Self::Future {
        Box::pin(async move {
            let mut chunks = request.into_inner();
            let mut bytes = 0;
            while let Some(chunk) = chunks.message().await? {
                bytes += chunk.data.len() as u64;
            }
            Ok(Response::new(Total { bytes }))
        })
    }
}
