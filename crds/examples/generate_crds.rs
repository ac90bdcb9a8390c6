//! Writes `manifests/crds` from the Rust types: `cargo run -p millrace-crds --example generate_crds`.

use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/crds");
    std::fs::create_dir_all(&folder)?;
    for crd in millrace_crds::crds() {
        std::fs::write(folder.join(crd.name), crd.yaml()?)?;
    }
    Ok(())
}
