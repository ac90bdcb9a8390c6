//! What people see of the operator: metrics, and whether it is alive and ready.

mod calls;
mod http;
mod metrics;

pub(crate) use calls::count_calls;
pub(crate) use http::serve;
pub(crate) use metrics::{Kind, Metrics};
