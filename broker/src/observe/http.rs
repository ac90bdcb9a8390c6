//! `/metrics`, `/healthz` and `/readyz` over plain HTTP, on a port of their own.

use std::sync::Arc;

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

#[derive(Clone)]
struct Observed {
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
}

/// Serves until the process ends.
pub async fn serve(
    listener: TcpListener,
    store: Arc<Store>,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(scrape))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(Observed {
            store,
            metrics,
            stop,
        });
    axum::serve(listener, router).await
}

async fn scrape(State(observed): State<Observed>) -> impl IntoResponse {
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
    if observed.stop.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
    }
    match observed.store.disk().state() {
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
