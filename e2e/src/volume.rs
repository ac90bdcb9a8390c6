//! A small volume that can be filled, for what happens when a disk has no room. It is a file system in memory, since mounting one takes root and
//! nothing else.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// What fills it, in its root: whoever uses the volume keeps to a folder of its own.
const BALLAST: &str = "ballast";

/// A mounted volume. Dropping it unmounts it, and what was on it is gone.
pub struct Volume {
    folder: PathBuf,
}

impl Volume {
    /// Whether this user may mount: `Err` says why not.
    ///
    /// # Errors
    /// If not.
    pub fn can_be_mounted() -> Result<()> {
        let folder = tempfile::tempdir()?;
        Self::mount(folder.path(), 1 << 20).map(drop)
    }

    /// Mounts one of so many bytes at a folder, which is made if it isn't there.
    ///
    /// # Errors
    /// If this user may not do that.
    pub fn mount(folder: &Path, bytes: u64) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
            .arg(folder)
            .output()
            .context("there is no program `mount`: install util-linux")?;
        ensure!(
            mounted.status.success(),
            "can't mount a volume at {}, which only root may: {}",
            folder.display(),
            String::from_utf8_lossy(&mounted.stderr).trim()
        );
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    /// Where it is mounted.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Fills what is free, up to the last `leave` bytes. Others may write meanwhile.
    ///
    /// # Errors
    /// If it can't be written for another reason than that it is full.
    pub fn fill(&self, leave: u64) -> Result<()> {
        let volume = rustix::fs::statvfs(&self.folder)?;
        let mut left = (volume.f_bavail * volume.f_frsize).saturating_sub(leave);
        let mut file = File::create(self.folder.join(BALLAST))?;
        let chunk = vec![7; 64 << 10];
        while left > 0 {
            let length = left.min(chunk.len() as u64) as usize;
            match file.write(&chunk[..length]) {
                Ok(written) => left -= written as u64,
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => return Err(error).context("can't fill a volume"),
            }
        }
        Ok(())
    }

    /// Gives back what [`Self::fill`] took.
    ///
    /// # Errors
    /// If it was not filled.
    pub fn free(&self) -> Result<()> {
        let ballast = self.folder.join(BALLAST);
        fs::remove_file(&ballast).with_context(|| format!("can't remove {}", ballast.display()))
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // Whoever still has a file open there keeps it until it is closed.
        let _ = Command::new("umount")
            .arg("--lazy")
            .arg(&self.folder)
            .status();
    }
}
