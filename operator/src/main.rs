//! The operator's program: makes of `Cluster` and `Topic` resources what they ask for.
//!
//! [`watch`] follows what there is into [`view`]: caches of objects, and an [`index`] of Leases and records. Each change puts the object concerned
//! into a [`queue`]; [`control`] takes it from there to [`cluster`] or [`topic`], which look, decide, act and report. What is decided is pure:
//! [`placement`], the objects of a Cluster, what is wrong with it, each status. What can't be watched brokers are asked for: [`figures`]. One of several
//! operators acts, by [`election`].

mod alive;
mod balance;
mod cache;
mod cluster;
mod config;
mod context;
mod control;
mod election;
mod error;
mod figures;
mod index;
mod news;
mod observe;
mod placement;
mod problem;
mod queue;
mod record;
mod topic;
mod view;
mod watch;

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use kube::Client;
use kube::client::ClientBuilder;
use kube::runtime::events::{Recorder, Reporter};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

use self::config::Config;
use self::context::{Context, MANAGER};
use self::election::{Election, ElectionError};
use self::observe::Metrics;
use self::view::View;

/// Gives memory back that the first lists took.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Reconciles that have begun may take so long to end when the operator stops.
const DRAIN: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(
        "can't find the Kubernetes cluster: {0}; run in a pod with a service account, or set KUBECONFIG"
    )]
    Credentials(#[from] kube::config::InferConfigError),
    #[error("can't talk to the Kubernetes cluster: {0}")]
    Client(#[from] kube::Error),
    #[error("can't listen on {address}: {source}; choose another with --listen")]
    Listen {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error(transparent)]
    Election(#[from] ElectionError),
    #[error("the process can't be set up: {0}")]
    Process(#[from] std::io::Error),
}

fn main() -> ExitCode {
    let config = Config::parse();
    init_log(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let result = runtime
        .map_err(StartError::from)
        .and_then(|runtime| runtime.block_on(run(config)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: Config) -> Result<(), StartError> {
    let stop = stop_on_signals()?;
    let view = View::new();
    let metrics = Metrics::new(view.clone());
    let credentials = kube::Config::infer().await?;
    let home = config
        .namespace
        .clone()
        .unwrap_or_else(|| credentials.default_namespace.clone());
    let client = ClientBuilder::try_from(credentials)?
        .with_layer(&observe::count_calls(metrics.clone()))
        .build();
    let address = config.listen;
    let listener = TcpListener::bind(address).await;
    let listener = listener.map_err(|source| StartError::Listen { address, source })?;
    tokio::spawn(observe::serve(listener, metrics.clone()));
    let election = Election::new(client.clone(), &home, &config.pod);
    let elected = tokio::select! {
        elected = election.win() => elected,
        () = stop.cancelled() => return Ok(()),
    };
    metrics.set_elected();
    let context = context(&config, client, view, metrics);
    let mut acting = tokio::spawn(act(context, stop.clone()));
    let lost = tokio::select! {
        lost = elected.hold() => Some(lost),
        _ = &mut acting => None,
    };
    match lost {
        // Another may act already: nothing is finished first.
        Some(lost) => Err(lost.into()),
        None => {
            elected.release().await;
            info!("stopped");
            Ok(())
        }
    }
}

fn context(
    config: &Config,
    client: Client,
    view: Arc<View>,
    metrics: Arc<Metrics>,
) -> Arc<Context> {
    let reporter = Reporter {
        controller: MANAGER.to_owned(),
        instance: Some(config.pod.clone()),
    };
    Arc::new(Context {
        recorder: Recorder::new(client.clone(), reporter),
        client,
        view,
        metrics,
        default_image: config.broker_image.clone(),
        scopes: config.scopes(),
        placing: tokio::sync::Mutex::default(),
    })
}

/// Acts until it is stopped.
async fn act(context: Arc<Context>, stop: CancellationToken) {
    tokio::select! {
        () = context.view.follow(&context.client, &context.scopes) => {}
        () = stop.cancelled() => return,
    }
    context.metrics.set_synced();
    info!(
        clusters = context.view.clusters.all().len(),
        topics = context.view.topics.all().len(),
        "all that is there has been read"
    );
    let ended = async {
        tokio::join!(
            control::clusters(context.clone(), stop.clone()),
            control::topics(context.clone(), stop.clone()),
        )
    };
    let late = async {
        stop.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    tokio::select! {
        _ = ended => {}
        () = figures::follow(context.view.clone()) => {}
        () = late => {}
    }
}

fn stop_on_signals() -> std::io::Result<CancellationToken> {
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
