//! Starts the programs as a user would, `millrace-broker` and `millrace`, and talks to them as a client would.
//!
//! Responsible for processes (start, wait until ready, kill, stop, what they use, what they log), free ports and folders, and for
//! short forms of API calls. Not responsible for what should hold: that is in `tests/`.

mod api;
mod broker;
mod cli;
pub mod daemon;
pub mod fleet;
pub mod gaps;
pub mod history;
mod http;
pub mod kubernetes;
pub mod leases;
mod ports;
mod process;
pub mod volume;
pub mod wires;

pub use api::{Api, Refusal, batch, batch_of, refusal};
pub use broker::{Broker, BrokerSetup, disk_usage};
pub use cli::{Cli, Running};
pub use http::HttpAnswer;
pub use ports::free_port;
pub use process::{Finished, run};

use std::{future::Future, path::PathBuf, time::Duration};

use tokio::time::Instant;

/// Long enough for anything that should happen at once, on a machine that has much else to do.
pub const SOON: Duration = Duration::from_secs(60);

/// How often [`eventually`] looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);

/// Looks again and again until there is an answer.
///
/// # Panics
/// If there is none within the time.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    within: Duration,
    mut look: impl FnMut() -> F,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = look().await {
            return answer;
        }
        assert!(begun.elapsed() < within, "not within {within:?}: {what}");
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// The folder of the repository.
pub fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A program that was built in the same profile as the running test.
///
/// # Panics
/// If it was not built.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the path of the running test");
    let built = test.parent().and_then(|deps| deps.parent());
    let program = built.expect("a test is in target/PROFILE/deps").join(name);
    assert!(
        program.is_file(),
        "{} does not exist; build the programs first: cargo build --release --workspace",
        program.display()
    );
    program
}
