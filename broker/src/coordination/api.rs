//! The few calls of the API server that coordination makes, each with a short limit, counted, and with an outcome that says what a
//! writer must do next. Nothing here retries: a retry would send an intent that was formed on a state that may be gone.

use std::{sync::Arc, time::Duration};

use k8s_openapi::api::{coordination::v1::Lease, core::v1::ConfigMap};
use kube::{
    Api, Client, Config,
    api::PostParams,
    client::{Body, ClientBuilder},
};

use crate::observe::Metrics;

/// A call that takes longer has an unknown outcome. Shorter than the renewal of a session may be late.
pub(crate) const CALL_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// Someone else wrote in between: read again and decide again.
    #[error("{0} was changed by someone else")]
    Conflict(String),
    /// It is not there.
    #[error("{0} does not exist")]
    NotFound(String),
    /// The API server says no, and will again.
    #[error("{object}: the API server refuses it: {message}")]
    Refused {
        /// The object.
        object: String,
        /// What it says.
        message: String,
    },
    /// Away, overloaded, or the answer was lost: what was to be written may be written, now or later.
    #[error("{object}: no answer from the API server: {message}")]
    Unknown {
        /// The object.
        object: String,
        /// What was seen.
        message: String,
    },
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
#[error(
    "the Kubernetes API can't be set up: {0}; a broker with --cluster runs in a pod, or with a KUBECONFIG"
)]
pub struct ConnectError(String);

/// The Leases and records of one namespace.
#[derive(Clone)]
pub(super) struct ClusterApi {
    leases: Api<Lease>,
    records: Api<ConfigMap>,
}

/// A client that never retries and counts its requests.
pub(super) async fn connect(metrics: Arc<Metrics>) -> Result<Client, ConnectError> {
    let failed = |error: String| ConnectError(error);
    let mut config = Config::infer().await.map_err(|e| failed(e.to_string()))?;
    config.default_retry = false;
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    let builder = ClientBuilder::try_from(config).map_err(|e| failed(e.to_string()))?;
    let count = tower::util::MapRequestLayer::new(move |request: http::Request<Body>| {
        metrics.api_request(request.method(), request.uri());
        request
    });
    Ok(builder.with_layer(&count).build())
}

impl ClusterApi {
    /// Of that namespace.
    pub(super) fn new(client: &Client, namespace: &str) -> Self {
        Self {
            leases: Api::namespaced(client.clone(), namespace),
            records: Api::namespaced(client.clone(), namespace),
        }
    }

    /// For watching.
    pub(super) fn leases(&self) -> Api<Lease> {
        self.leases.clone()
    }

    /// For watching.
    pub(super) fn records(&self) -> Api<ConfigMap> {
        self.records.clone()
    }

    /// The Lease as the API server has it now (a quorum read).
    pub(super) async fn lease(&self, name: &str) -> Result<Option<Lease>, ApiError> {
        match limited(name, self.leases.get(name)).await {
            Ok(lease) => Ok(Some(lease)),
            Err(ApiError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The record as the API server has it now (a quorum read).
    pub(super) async fn record(&self, name: &str) -> Result<Option<ConfigMap>, ApiError> {
        match limited(name, self.records.get(name)).await {
            Ok(record) => Ok(Some(record)),
            Err(ApiError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes the Lease if it has no version, and otherwise replaces exactly that version.
    pub(super) async fn write(&self, lease: &Lease) -> Result<Lease, ApiError> {
        let name = lease.metadata.name.as_deref().unwrap_or_default();
        let parameters = PostParams::default();
        match lease.metadata.resource_version {
            None => limited(name, self.leases.create(&parameters, lease)).await,
            Some(_) => limited(name, self.leases.replace(name, &parameters, lease)).await,
        }
    }
}

async fn limited<T>(
    object: &str,
    call: impl Future<Output = kube::Result<T>>,
) -> Result<T, ApiError> {
    let object = object.to_owned();
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(kube::Error::Api(status))) => Err(match status.code {
            // A create meets what is there already, or a replace another version.
            409 => ApiError::Conflict(object),
            404 => ApiError::NotFound(object),
            408 | 429 | 500.. => ApiError::Unknown {
                object,
                message: status.message,
            },
            _ => ApiError::Refused {
                object,
                message: status.message,
            },
        }),
        Ok(Err(error)) => Err(ApiError::Unknown {
            object,
            message: error.to_string(),
        }),
        Err(_) => Err(ApiError::Unknown {
            object,
            message: format!("nothing in {CALL_TIMEOUT:?}"),
        }),
    }
}
