//! Describes the machine, so that a figure can be read.

use std::path::Path;
use std::process::Command;

use anyhow::Result;
use procfs::process::Process;
use procfs::{CpuInfo, Current, Meminfo};

use crate::peer::run;

/// A Markdown list: processor, memory, kernel, disk, versions, and how Kafka runs, if it does.
pub(crate) async fn description(work: &Path, kafka: Option<&str>) -> Result<String> {
    let cpus = CpuInfo::current()?;
    let model = cpus.model_name(0).unwrap_or("unknown processor");
    let memory = Meminfo::current()?.mem_total as f64 / f64::from(1 << 30);
    let kernel = rustix::system::uname();
    let mut text = format!(
        "- {} × {model}, {memory:.0} GiB of memory, shared by clients and broker\n- {} {}, data on {}\n- Millrace {}",
        cpus.num_cores(),
        kernel.sysname().to_string_lossy(),
        kernel.release().to_string_lossy(),
        file_system(work)?,
        env!("CARGO_PKG_VERSION"),
    );
    if let Some(kafka) = kafka {
        let mut java = Command::new("java");
        java.arg("--version");
        let version = run(java).await?;
        text += &format!(
            "; {} ({kafka}) on {}",
            crate::KAFKA,
            version.lines().next().unwrap_or("an unknown JVM")
        );
    }
    Ok(text + "\n")
}

/// Type and device of the file system that holds `path`.
fn file_system(path: &Path) -> Result<String> {
    let path = path.canonicalize()?;
    let mounts = Process::myself()?.mountinfo()?;
    let mount = mounts
        .0
        .iter()
        .filter(|mount| path.starts_with(&mount.mount_point))
        .max_by_key(|mount| mount.mount_point.components().count());
    Ok(mount.map_or_else(
        || "an unknown file system".to_owned(),
        |mount| {
            format!(
                "{} ({})",
                mount.fs_type,
                mount.mount_source.as_deref().unwrap_or("no device")
            )
        },
    ))
}
