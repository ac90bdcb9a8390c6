//! `/metrics`, `/healthz`, `/readyz` and `/restartable` over plain HTTP, on a port of their own.

use std::sync::{Arc, OnceLock};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::Metrics;
use crate::storage::{DiskState, Store};

/// Whether the broker serves.
#[derive(Clone)]
pub struct Readiness {
    store: Arc<Store>,
    stop: CancellationToken,
    serves: Arc<OnceLock<HeldBy>>,
}

/// The partitions that can't do without this broker.
type HeldBy = Box<dyn Fn() -> Vec<String> + Send + Sync>;

/// How many of them an answer names.
const NAMED: usize = 10;

impl Readiness {
    /// Not yet.
    pub fn new(store: Arc<Store>, stop: CancellationToken) -> Self {
        Self {
            store,
            stop,
            serves: Arc::default(),
        }
    }

    /// From now on it does, until it is told to stop, and by this it is known which partitions can't do without it.
    pub fn set(&self, held_by: impl Fn() -> Vec<String> + Send + Sync + 'static) {
        // It is set once.
        let _ = self.serves.set(Box::new(held_by));
    }
}

#[derive(Clone)]
struct Observed {
    metrics: Arc<Metrics>,
    readiness: Readiness,
}

/// Serves until the process ends.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    readiness: Readiness,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(scrape))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/restartable", get(restartable))
        .with_state(Observed { metrics, readiness });
    axum::serve(listener, router).await
}

async fn scrape(State(observed): State<Observed>) -> impl IntoResponse {
    observed.metrics.look().await;
    // Thousands of partitions take a while to write down.
    let text = tokio::task::spawn_blocking(move || observed.metrics.encode()).await;
    match text {
        Ok(Ok(text)) => {
            let kind = [(
                header::CONTENT_TYPE,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            )];
            (StatusCode::OK, kind, text).into_response()
        }
        _ => (
            StatusCode::INTERNAL_SERVER_ERROR,
            "metrics could not be encoded\n",
        )
            .into_response(),
    }
}

/// A broker that can't write stays ready: it serves reads, and no other broker could take its writes.
async fn ready(State(observed): State<Observed>) -> impl IntoResponse {
    let readiness = observed.readiness;
    if readiness.stop.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
    }
    if readiness.serves.get().is_none() {
        return (StatusCode::SERVICE_UNAVAILABLE, "starting\n");
    }
    match readiness.store.disk().state() {
        DiskState::Enough => (StatusCode::OK, "ready\n"),
        DiskState::Full => (
            StatusCode::OK,
            "ready, but the disk is full: writes are refused\n",
        ),
        DiskState::Failing => (
            StatusCode::OK,
            "ready, but a write has failed: see the broker's log\n",
        ),
    }
}

/// Whether it may be restarted: for whoever restarts pods or nodes by other means than the operator or evictions, which ask for themselves.
async fn restartable(State(observed): State<Observed>) -> (StatusCode, String) {
    let Some(held_by) = observed.readiness.serves.get() else {
        return (StatusCode::OK, "yes: it does not serve yet\n".to_owned());
    };
    let held_by = held_by();
    if held_by.is_empty() {
        return (StatusCode::OK, "yes\n".to_owned());
    }
    let some = held_by[..held_by.len().min(NAMED)].join(", ");
    let more = match held_by.len() > NAMED {
        true => ", …",
        false => "",
    };
    let text = format!(
        "no: {} partitions would have fewer replicas in sync than acks=all needs: {some}{more}\n",
        held_by.len()
    );
    (StatusCode::CONFLICT, text)
}
