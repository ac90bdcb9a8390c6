//! Ctrl-C and SIGTERM: the first asks the command to finish what it began, the second ends it at once.

use std::io::{self, Write};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;

/// As shells report a program that SIGINT ended.
pub(crate) const EXIT_CODE: u8 = 130;

/// Listens from now on; the token is cancelled by the first signal.
pub(crate) fn listen() -> Result<CancellationToken, Failure> {
    let failed = |error| Failure::new("can't listen for Ctrl-C").because(error);
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let token = CancellationToken::new();
    let first = token.clone();
    tokio::spawn(async move {
        for attempt in 0..2 {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            if attempt == 0 {
                first.cancel();
            } else {
                let _ = writeln!(io::stderr(), "stopped without waiting");
                std::process::exit(EXIT_CODE.into());
            }
        }
    });
    Ok(token)
}
