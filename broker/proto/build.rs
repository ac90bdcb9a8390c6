//! Compiles the `.proto` files with a compiler written in Rust, so that a build needs no `protoc`.

use std::{env, error::Error, fs, path::Path};

use prost::Message;

const PROTOS: [&str; 10] = [
    "millrace/v1/record.proto",
    "millrace/v1/error.proto",
    "millrace/v1/producer.proto",
    "millrace/v1/consumer.proto",
    "millrace/v1/metadata.proto",
    "millrace/v1/replication.proto",
    "millrace/v1/group.proto",
    "millrace/v1/group_log.proto",
    "millrace/v1/transaction.proto",
    "millrace/v1/transaction_log.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = env::var("OUT_DIR")?;
    fs::write(
        Path::new(&out).join("descriptors.bin"),
        descriptors.encode_to_vec(),
    )?;
    let mut config = tonic_prost_build::Config::new();
    // The codec finds a message's descriptor by its name.
    config.enable_type_names();
    tonic_prost_build::configure()
        .bytes(".")
        .codec_path("crate::codec::ReservingCodec")
        .compile_fds_with_config(descriptors, config)?;
    Ok(())
}
