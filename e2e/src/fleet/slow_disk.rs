//! A disk that takes its time: each fsync and fdatasync of one process is held up, for as long as a file says.
//!
//! A library that is preloaded into the broker does it (`slow_disk.c`), since slowing the disk itself takes a device mapper, which not every kernel
//! has. It is compiled at the start, with the C compiler that RocksDB needs anyway, so that nothing has to be installed beside the programs. It
//! delays the calls that a durable write waits for, and no others: reads, and writes into the page cache, are as fast as ever. It makes no
//! difference to a broker that does not wait for the disk (`--durability os`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

const SOURCE: &str = include_str!("slow_disk.c");

/// Compiles the library into a folder. Returns where it is.
pub(super) fn build(folder: &Path) -> Result<PathBuf> {
    let source = folder.join("slow_disk.c");
    let library = folder.join("slow_disk.so");
    fs::write(&source, SOURCE)?;
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-O2", "-o"])
        .args([&library, &source])
        .arg("-ldl")
        .output()
        .context("a slow disk needs a C compiler, `cc`: install gcc or clang")?;
    ensure!(
        compiled.status.success(),
        "{} can't be compiled: {}",
        source.display(),
        String::from_utf8_lossy(&compiled.stderr)
    );
    Ok(library)
}

/// The disk of one process.
pub(super) struct SlowDisk {
    library: PathBuf,
    delay: PathBuf,
}

impl SlowDisk {
    /// As fast as it is. `delay` is the file that will say how slow.
    pub(super) fn new(library: PathBuf, delay: PathBuf) -> Self {
        Self { library, delay }
    }

    /// Puts it between a program and its disk.
    pub(super) fn apply(&self, command: &mut Command) {
        command
            .env("LD_PRELOAD", &self.library)
            .env("SLOW_DISK_FILE", &self.delay);
    }

    /// From now on each fsync takes so much longer.
    pub(super) fn set(&self, delay: Duration) -> Result<()> {
        let path = &self.delay;
        fs::write(path, delay.as_millis().to_string())
            .with_context(|| format!("can't write {}", path.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_sync_takes_as_long_as_the_file_says_at_that_moment() {
        let folder = tempfile::tempdir().unwrap();
        let library = build(folder.path()).unwrap();
        let disk = SlowDisk::new(library, folder.path().join("delay"));
        let file = folder.path().join("file");
        fs::write(&file, "some").unwrap();
        let script = r#"sync "$0"; printf 500 > "$SLOW_DISK_FILE"; exec sync --data "$0""#;
        for (delay, least) in [(0, 500), (300, 800)] {
            disk.set(Duration::from_millis(delay)).unwrap();
            let mut command = Command::new("sh");
            disk.apply(command.args(["-c", script]).arg(&file));
            let begun = Instant::now();
            assert!(command.status().unwrap().success());
            let took = begun.elapsed();
            assert!(took >= Duration::from_millis(least), "{took:?}");
        }
        disk.set(Duration::ZERO).unwrap();
        let mut command = Command::new("sync");
        disk.apply(command.arg(&file));
        let begun = Instant::now();
        assert!(command.status().unwrap().success());
        assert!(begun.elapsed() < Duration::from_millis(300));
    }
}
