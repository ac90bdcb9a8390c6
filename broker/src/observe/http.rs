//! `/metrics`, `/healthz` and `/readyz` over plain HTTP, on a port of their own.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

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
    ready: Arc<AtomicBool>,
}

impl Readiness {
    /// Not yet.
    pub fn new(store: Arc<Store>, stop: CancellationToken) -> Self {
        let ready = Arc::default();
        Self { store, stop, ready }
    }

    /// From now on it does, until it is told to stop.
    pub fn set(&self) {
        self.ready.store(true, Ordering::Release);
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
    if !readiness.ready.load(Ordering::Acquire) {
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
