//! What operators see of a broker: metrics, and whether it is alive and ready.

mod groups;
mod http;
mod metrics;
mod replicas;

pub use http::{Readiness, serve};
pub use metrics::{ConnectionGauge, Method, Metrics};
