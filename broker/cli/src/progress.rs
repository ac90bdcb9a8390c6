//! The bar on a terminal while records are copied. Without a terminal there is none.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A bar of bytes if the total is known, else a running count; none if `quiet`.
pub(crate) fn bar(quiet: bool, total_bytes: Option<u64>) -> ProgressBar {
    // A person who types records needs no bar between them.
    let is_typed = total_bytes.is_none() && io::stdin().is_terminal();
    if quiet || !io::stderr().is_terminal() || is_typed {
        return ProgressBar::hidden();
    }
    let (bar, template) = match total_bytes {
        Some(total) => (
            ProgressBar::new(total),
            "{bar:30} {bytes}/{total_bytes}  {bytes_per_sec}  {eta} left",
        ),
        None => (
            ProgressBar::new_spinner(),
            "{spinner} {bytes}  {bytes_per_sec}",
        ),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}
