//! The broker's program: reads the configuration, wires the parts, stops in order on SIGTERM.

use std::{io::IsTerminal, net::SocketAddr, process::ExitCode, sync::Arc};

use clap::Parser;
use millrace_broker::{
    config::{Config, ServiceOptions},
    coordination::{JoinError, Member, SessionLost},
    directory::ClusterView,
    observe::{self, Metrics, Readiness},
    service::{self, Broker, ServeError},
    storage::{StorageError, Store},
    topics::{Standalone, TopicsError},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

/// Also serves RocksDB's allocations: one allocator with one idea of what memory can be given back.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Read by jemalloc when it starts. What is freed goes back to the system within half a second, not ten: bursts come from many
/// clients at once, and a container is charged for what it does not use, too.
#[allow(unsafe_code)]
#[unsafe(export_name = "malloc_conf")]
static ALLOCATOR_OPTIONS: &[u8; 38] = b"dirty_decay_ms:500,muzzy_decay_ms:500\0";

#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Storage(#[from] StorageError),
    #[error(transparent)]
    Topics(#[from] TopicsError),
    #[error(
        "can't listen on {address}: {source}; is another broker running? Choose another with {flag}"
    )]
    Listen {
        address: SocketAddr,
        flag: &'static str,
        source: std::io::Error,
    },
    #[error(transparent)]
    Join(#[from] JoinError),
    #[error(transparent)]
    SessionLost(#[from] SessionLost),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("the process can't be set up: {0}")]
    Process(#[from] std::io::Error),
}

fn main() -> ExitCode {
    let config = Config::parse();
    init_log(&config);
    raise_open_files();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    match runtime
        .map_err(StartError::from)
        .and_then(|runtime| runtime.block_on(run(config)))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: Config) -> Result<(), StartError> {
    let service_options = config.service();
    let storage_options = config.storage();
    info!(data = %config.data.display(), durability = %config.durability, "opening the store");
    let (store, report) = Store::open(storage_options)?;
    info!(store = %report.store_id, incarnation = report.incarnation, "store opened: {report}");
    let mut member = None;
    let result = serve(&config, &service_options, &store, &mut member).await;
    let closing = store.clone();
    let _ = tokio::task::spawn_blocking(move || closing.close()).await;
    // Last: from now on others may take over what this process had.
    if let Some(member) = member {
        member.leave().await;
    }
    if result.is_ok() {
        info!("stopped");
    }
    result
}

async fn serve(
    config: &Config,
    options: &ServiceOptions,
    store: &Arc<Store>,
    members: &mut Option<Member>,
) -> Result<(), StartError> {
    let asked_to_stop = stop_on_signals()?;
    // Cancelled when what this broker leads is handed over.
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    let mut cluster = ClusterView::default();
    let metrics = Metrics::new(store.clone(), cluster.hosting.clone());
    let observer = listen(config.metrics_listen, "--metrics-listen").await?;
    let readiness = Readiness::new(store.clone(), asked_to_stop.clone());
    tokio::spawn(observe::serve(observer, metrics.clone(), readiness.clone()));
    // Before others hear of this broker: one that does not listen would be taken for dead.
    let listener = listen(config.listen, "--listen").await?;
    let address = match &config.advertise {
        Some(address) => address.clone(),
        None => listener.local_addr()?.to_string(),
    };
    let mut lost = None;
    match config.membership() {
        Some(membership) => {
            cluster.cluster_id = membership.cluster_id();
            let (store, metrics) = (store.clone(), metrics.clone());
            let join = membership.join(store, cluster.clone(), metrics, stop.clone());
            let Some(member) = asked_to_stop.run_until_cancelled(join).await else {
                return Ok(());
            };
            let mut member = member?;
            lost = member.lost.take();
            *members = Some(member);
        }
        None => {
            cluster.cluster_id = store.store_id().to_string();
            let directory = cluster.directory.clone();
            let standalone = Standalone::new(store.clone(), directory, &address);
            standalone.make_internal()?;
            if let Some(path) = config.topics.clone() {
                standalone.apply(&path)?;
                tokio::spawn(standalone.follow(path, stop.clone()));
            }
        }
    }
    let broker = Broker::new(store.clone(), cluster, metrics, options, stop.clone());
    let topics = store.topics();
    let partitions: usize = topics.iter().map(|topic| topic.partitions.len()).sum();
    info!(%address, topics = topics.len(), partitions, metrics = %config.metrics_listen, "ready");
    match members {
        Some(member) => {
            let gate = member.restart_gate();
            readiness.set(move || gate.held_by());
        }
        // Nothing is gained by waiting.
        None => readiness.set(Vec::new),
    }
    let hand_over = async {
        asked_to_stop.cancelled().await;
        if let Some(member) = &members {
            member.drain().await;
        }
        stop.cancel();
        std::future::pending().await
    };
    let lost = async {
        match lost {
            // The sender goes with the session's task, when the process leaves in order.
            Some(lost) => match lost.await {
                Ok(lost) => lost,
                Err(_) => std::future::pending().await,
            },
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        served = service::serve(broker, listener, options) => served?,
        lost = lost => return Err(lost.into()),
        () = hand_over => {}
    }
    Ok(())
}

/// Cancelled by the first SIGTERM or SIGINT.
fn stop_on_signals() -> Result<CancellationToken, StartError> {
    let stop = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stopper = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => info!("SIGTERM: stopping"),
            _ = interrupt.recv() => info!("SIGINT: stopping"),
        }
        stopper.cancel();
    });
    Ok(stop)
}

async fn listen(address: SocketAddr, flag: &'static str) -> Result<TcpListener, StartError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| StartError::Listen {
            address,
            flag,
            source,
        })
}

fn init_log(config: &Config) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    if config.log_json {
        log.json().init()
    } else {
        log.init()
    }
}

/// Connections and files take descriptors; the soft limit is often 1,024 where the hard one is far higher.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
}
