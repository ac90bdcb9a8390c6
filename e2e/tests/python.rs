//! Callers in other languages: Python with stubs generated from the `.proto` files, and record batches of a Kafka client library.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::LazyLock,
    time::Duration,
};

use millrace_e2e::{Broker, repository, run};
use serde_json::json;

const INSTALL: Duration = Duration::from_secs(300);

/// A virtual environment with the pinned packages, made once for each version of the list. Under the target folder.
static PYTHON: LazyLock<PathBuf> = LazyLock::new(|| {
    let requirements = repository().join("e2e/python/requirements.txt");
    let wanted = fs::read_to_string(&requirements).unwrap();
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
    let installed = dir.join("installed.txt");
    if fs::read_to_string(&installed).is_ok_and(|installed| installed == wanted) {
        return dir.join("bin");
    }
    let create = ["-m", "venv", "--clear"];
    run(
        Command::new("python3").args(create).arg(&dir),
        None,
        INSTALL,
    )
    .success();
    let install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary",
        ":all:",
        "-r",
    ];
    run(
        Command::new(dir.join("bin/python"))
            .args(install)
            .arg(&requirements),
        None,
        INSTALL,
    )
    .success();
    // Last: an installation that was broken off is begun again.
    fs::write(installed, wanted).unwrap();
    dir.join("bin")
});

/// Generates the stubs as the documentation of grpcio-tools says and runs a script with them.
fn run_script(name: &str, broker: &Broker) -> String {
    let stubs = tempfile::tempdir().unwrap();
    let protos = repository().join("broker/proto/proto");
    let mut generate = Command::new(PYTHON.join("python"));
    generate
        .args(["-m", "grpc_tools.protoc"])
        .arg("-I")
        .arg(&protos);
    for option in ["--python_out", "--grpc_python_out"] {
        generate.arg(format!("{option}={}", stubs.path().display()));
    }
    for file in fs::read_dir(protos.join("millrace/v1")).unwrap() {
        generate.arg(file.unwrap().path());
    }
    run(&mut generate, None, INSTALL).success();
    let mut script = Command::new(PYTHON.join("python"));
    script
        .arg(repository().join("e2e/python").join(name))
        .arg(broker.address())
        .env("PYTHONPATH", stubs.path());
    script.env("PYTHONDONTWRITEBYTECODE", "1");
    let finished = run(&mut script, None, INSTALL).success();
    assert!(finished.text().ends_with("OK\n"), "{}", finished.text());
    finished.text()
}

#[test]
fn python_with_grpcio_and_generated_stubs_produces_and_fetches_plain_records() {
    let broker = Broker::setup()
        .topic("t", json!({ "partitions": 2 }))
        .start();
    run_script("smoke.py", &broker);
}

#[test]
fn batches_of_a_kafka_client_library_go_in_and_come_out_in_every_compression() {
    let broker = Broker::setup().topic("t", json!({})).start();
    let text = run_script("kafka_batches.py", &broker);
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        assert!(text.contains(&format!("{codec}: ")), "{text}");
    }
    // What the Python library wrote, the client library and the command line read.
    let read = broker
        .cli()
        .run(&["consume", "t", "--format", "%v"])
        .success();
    assert!(!read.stdout.is_empty());
}

#[test]
fn the_proto_files_follow_the_usual_style_rules() {
    let mut lint = Command::new(PYTHON.join("buf"));
    run(
        lint.arg("lint").arg(repository().join("broker/proto")),
        None,
        INSTALL,
    )
    .success();
}
