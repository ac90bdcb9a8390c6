//! The README's walk-through: a package index of more than a million lines goes in keyed and comes out byte-identical.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{BufRead, BufReader},
    path::Path,
    process::Command,
    time::Duration,
};

use millrace_e2e::{Broker, program, repository, run};

/// The commands of the README, which must have them word for word. Each line of the index is a record; its key is the package
/// that it describes. A stable sort by key puts both sides into one order without touching the order within a key.
const INDEX: &str =
    r#"apt-cache dumpavail | awk '/^Package: /{p=$2} {print p "\t" $0}' > packages.tsv"#;
const PRODUCE: &str = r"millrace produce packages --file packages.tsv --key-separator '\t'";
const CONSUME: &str = r"millrace consume packages --key-separator '\t' > consumed.tsv";
const COMPARE: &str =
    r"for f in packages.tsv consumed.tsv; do LC_ALL=C sort -s -t $'\t' -k 1,1 $f | sha256sum; done";

/// For a machine without a package index: another text that every machine has that can build Millrace.
const SOURCES: &str = r#"find "${CARGO_HOME:-$HOME/.cargo}/registry/src" -name '*.rs' -print0 | sort -z |
    LC_ALL=C xargs -0 awk '{print FILENAME "\t" $0}' | head -n 1500000 > packages.tsv"#;

const LINES: usize = 1_000_000;

#[test]
fn a_package_index_of_a_million_lines_comes_back_byte_identical_in_order_within_each_partition() {
    let readme = fs::read_to_string(repository().join("README.md")).unwrap();
    for command in [INDEX, PRODUCE, CONSUME, COMPARE] {
        assert!(
            readme.lines().any(|line| line.trim() == command),
            "the README's walk-through lacks: {command}"
        );
    }
    let sample = repository().join("manifests/samples/packages.yaml");
    let setup = Broker::setup();
    fs::copy(sample, setup.topics().join("packages.yaml")).unwrap();
    let broker = setup.start();
    let dir = tempfile::tempdir().unwrap();
    let shell = |script: &str| {
        let mut bash = Command::new("bash");
        bash.args(["-c", script])
            .current_dir(dir.path())
            .env("MILLRACE_BOOTSTRAP", broker.address());
        let path = std::env::var("PATH").unwrap_or_default();
        bash.env(
            "PATH",
            format!("{}:{path}", program("millrace").parent().unwrap().display()),
        );
        run(&mut bash, None, Duration::from_secs(300)).success()
    };
    let index = dir.path().join("packages.tsv");
    // Some machines have neither apt nor its index; the shell then leaves an empty file.
    shell(&format!("{INDEX} || true"));
    if count_lines(&index) < LINES {
        shell(SOURCES);
    }
    let lines = count_lines(&index);
    assert!(
        lines >= LINES,
        "{lines} lines are too few; run apt-get update"
    );

    let produced = shell(PRODUCE).stderr;
    assert!(
        produced.contains(&format!("produced {lines} records")),
        "{produced}"
    );
    shell(CONSUME);
    let sums = shell(COMPARE).text();
    let sums: Vec<&str> = sums.lines().collect();
    assert_eq!(sums.len(), 2);
    assert_eq!(
        sums[0], sums[1],
        "checksums of what went in and what came out"
    );

    shell(r"millrace consume packages --format '%p\t%k\t%v\n' > placed.tsv");
    check_partitions(&index, &dir.path().join("placed.tsv"));
    println!("{lines} lines, sha256 {}; {produced}", sums[0]);
}

fn count_lines(path: &Path) -> usize {
    lines(path).count()
}

fn lines(path: &Path) -> impl Iterator<Item = Vec<u8>> {
    BufReader::with_capacity(1 << 20, File::open(path).unwrap())
        .split(b'\n')
        .map(Result::unwrap)
}

/// Each partition's records are exactly the input's lines with the keys that it holds, in the input's order.
fn check_partitions(input: &Path, placed: &Path) {
    let mut partitions: HashMap<Vec<u8>, Vec<Vec<u8>>> = HashMap::new();
    let mut partition_of: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
    let tab = |line: &[u8]| line.iter().position(|byte| *byte == b'\t').expect("a tab");
    for line in lines(placed) {
        let (partition, record) = line.split_at(tab(&line));
        let record = record[1..].to_vec();
        let key = record[..tab(&record)].to_vec();
        let held = partition_of
            .entry(key)
            .or_insert_with(|| partition.to_vec());
        assert_eq!(held, partition, "all records of a key are in one partition");
        partitions
            .entry(partition.to_vec())
            .or_default()
            .push(record);
    }
    assert!(partitions.len() > 1, "the keys are spread");
    let mut next: HashMap<Vec<u8>, usize> = HashMap::new();
    for (number, line) in lines(input).enumerate() {
        let partition = &partition_of[&line[..tab(&line)]];
        let at = next.entry(partition.clone()).or_default();
        assert_eq!(
            partitions[partition].get(*at),
            Some(&line),
            "line {} of the input",
            number + 1
        );
        *at += 1;
    }
    for (partition, records) in partitions {
        assert_eq!(
            next[&partition],
            records.len(),
            "nothing is there that was not sent"
        );
    }
}
