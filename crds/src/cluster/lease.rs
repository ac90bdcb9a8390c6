//! The timing of the brokers' session Leases.
//!
//! Safety does not depend on it (that rests on epochs and compare-and-swap), only how fast a broker without a sign of life is given up,
//! and how much the API server has to do for that: a write by each broker at each renewal.

// KubeSchema repeats the struct inside a function.
#![allow(unreachable_pub)]

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

/// How fast a broker that has gone silent is given up.
#[derive(KubeSchema, Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.durationSeconds >= 2 * self.renewSeconds")
        .message("lease.durationSeconds must be at least twice lease.renewSeconds: one renewal that is lost must not cost a broker its leaderships")
)]
pub struct LeaseTiming {
    /// A broker that has not renewed its Lease for so long is given up: others lead its partitions. A broker that ends or is killed is seen at
    /// once, without this.
    #[serde(default = "default_duration")]
    #[schemars(range(min = 2, max = 300))]
    pub duration_seconds: i32,

    /// How often each broker renews it.
    #[serde(default = "default_renewal")]
    #[schemars(range(min = 1, max = 100))]
    pub renew_seconds: i32,
}

impl Default for LeaseTiming {
    fn default() -> Self {
        Self {
            duration_seconds: default_duration(),
            renew_seconds: default_renewal(),
        }
    }
}

fn default_duration() -> i32 {
    6
}

fn default_renewal() -> i32 {
    2
}
