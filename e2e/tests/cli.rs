//! The command line from end to end: what goes in comes out, and what people are told when it does not.

use std::fs;

use millrace_e2e::{Broker, Cli, SOON};
use serde_json::{Value, json};

fn broker() -> Broker {
    Broker::setup()
        .topic("t", json!({ "partitions": 3 }))
        .topic("one", json!({}))
        .start()
}

#[test]
fn lines_come_back_byte_for_byte() {
    let broker = broker();
    let cli = broker.cli();
    let input: &[u8] = b"first\n\n spaces \r\n\xff\xfe not UTF-8\nlast, without newline";
    let produced = cli.run_with(&["produce", "one"], input).success();
    assert!(produced.stdout.is_empty());
    assert!(
        produced.stderr.contains("produced 5 records"),
        "{}",
        produced.stderr
    );
    let consumed = cli.run(&["consume", "one"]).success();
    assert_eq!(consumed.stdout, [input, b"\n"].concat());
    let file = broker.topics().join("../words");
    fs::write(&file, "a\0b\nc\0").unwrap();
    cli.run(&[
        "produce",
        "one",
        "--quiet",
        "-0",
        "--file",
        file.to_str().unwrap(),
    ])
    .success();
    assert_eq!(
        cli.run(&["consume", "one", "--from", "5", "-0"])
            .success()
            .stdout,
        b"a\0b\nc\0"
    );
}

#[test]
fn keys_nulls_and_headers_are_told_apart_in_json() {
    let broker = broker();
    let cli = broker.cli();
    let flags = [
        "-K",
        "\\t",
        "-Z",
        "NULL",
        "-H",
        "source=test",
        "-p",
        "1",
        "--compression",
        "zstd",
    ];
    let args = [&["produce", "t"], &flags[..]].concat();
    cli.run_with(&args, "k\tv\nNULL\tNULL\n\t\n").success();
    let lines = cli.run(&["consume", "t", "-o", "json"]).success().text();
    let records: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let read: Vec<_> = records
        .iter()
        .map(|r| {
            (
                &r["key"],
                &r["value"],
                r["partition"].as_i64(),
                r["offset"].as_i64(),
            )
        })
        .collect();
    let (k, v, empty) = (json!("k"), json!("v"), json!(""));
    let null = Value::Null;
    assert_eq!(
        read,
        [
            (&k, &v, Some(1), Some(0)),
            (&null, &null, Some(1), Some(1)),
            (&empty, &empty, Some(1), Some(2))
        ]
    );
    assert_eq!(
        records[0]["headers"],
        json!([{ "name": "source", "value": "test" }])
    );
    assert!(records[0]["timestampMs"].as_i64().unwrap() > 1_600_000_000_000);
    let formatted = cli
        .run(&[
            "consume",
            "t",
            "-Z",
            "-",
            "--format",
            r"%t/%p:%o %k=%v (%V) %h\n",
        ])
        .success()
        .text();
    assert_eq!(
        formatted,
        "t/1:0 k=v (1) source=test\nt/1:1 -=- (-1) source=test\nt/1:2 = (0) source=test\n"
    );
    assert_eq!(
        cli.run(&["consume", "t", "-K", ": "]).success().text(),
        "k: v\n: \n: \n"
    );
}

#[test]
fn a_key_always_goes_to_the_partition_that_kafka_would_choose() {
    let broker = broker();
    let cli = broker.cli();
    // From Kafka's Utils.murmur2, as in its UtilsTest: 21 -> -973932308, foobar -> -790332482, a-little-bit-long-string -> -985981536.
    cli.run_with(
        &["produce", "t", "-K", ":"],
        "21:x\nfoobar:x\na-little-bit-long-string:x\n",
    )
    .success();
    let text = cli
        .run(&["consume", "t", "--format", r"%k %p\n"])
        .success()
        .text();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    let partition = |hash: i32| (hash & i32::MAX) % 3;
    let expected = [
        format!("21 {}", partition(-973_932_308)),
        format!("a-little-bit-long-string {}", partition(-985_981_536)),
        format!("foobar {}", partition(-790_332_482)),
    ];
    assert_eq!(lines, expected);
}

#[test]
fn ranges_counts_and_following_end_where_they_should() {
    let broker = broker();
    let cli = broker.cli();
    let numbers: String = (0..1_000).map(|i| format!("{i}\n")).collect();
    cli.run_with(&["produce", "one"], &numbers).success();
    let lines = |args: &[&str]| {
        let text = cli
            .run(&[&["consume", "one"], args].concat())
            .success()
            .text();
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(lines(&["--from", "-3"]), ["997", "998", "999"]);
    assert_eq!(lines(&["--from", "10", "--to", "13"]), ["10", "11", "12"]);
    assert_eq!(lines(&["-n", "2"]), ["0", "1"]);
    assert_eq!(lines(&["--from", "latest"]).len(), 0);
    assert_eq!(lines(&["--from", "@2001-01-01", "--to", "1h ago"]).len(), 0);
    assert_eq!(lines(&["--from", "1h ago"]).len(), 1_000);

    let follower = cli.start(&["consume", "one", "--from", "-1", "--follow"]);
    follower.wait_for_lines(1, SOON);
    cli.run_with(&["produce", "one"], "new\n").success();
    follower.wait_for_lines(2, SOON);
    follower.interrupt();
    let followed = follower.finish();
    assert_eq!(
        (followed.code, followed.text().as_str()),
        (Some(130), "999\nnew\n"),
        "{}",
        followed.stderr
    );
}

#[test]
fn topics_are_listed_described_and_declared() {
    let broker = broker();
    let cli = broker.cli();
    cli.run_with(&["produce", "t", "-p", "2"], "a\nb\n")
        .success();
    let table = cli.run(&["topics", "list"]).success().text();
    let row = table
        .lines()
        .find(|line| line.starts_with("t "))
        .unwrap_or_else(|| panic!("{table}"));
    assert_eq!(
        row.split_whitespace().take(4).collect::<Vec<_>>(),
        ["t", "3", "1", "2"]
    );
    assert_eq!(
        cli.run(&["topics", "list", "-o", "name"]).success().text(),
        "one\nt\n"
    );
    let described: Value = serde_json::from_slice(
        &cli.run(&["topics", "describe", "t", "-o", "json"])
            .success()
            .stdout,
    )
    .unwrap();
    assert_eq!(described["partitions"][2]["highWatermark"], json!(2));
    let offsets: Value = serde_json::from_slice(
        &cli.run(&["topics", "offsets", "t", "-o", "json"])
            .success()
            .stdout,
    )
    .unwrap();
    let ends: Vec<_> = offsets
        .as_array()
        .unwrap()
        .iter()
        .map(|line| line["offset"].as_i64())
        .collect();
    assert_eq!(ends, [Some(0), Some(0), Some(2)]);

    let dir = broker.topics().to_str().unwrap();
    cli.run(&[
        "topics",
        "create",
        "made_here",
        "--partitions",
        "2",
        "--dir",
        dir,
    ])
    .success();
    broker.wait_for_log("topic files changed and were applied", SOON);
    cli.run_with(&["produce", "made_here"], "hello\n").success();
    assert_eq!(
        cli.run(&["consume", "made_here"]).success().text(),
        "hello\n"
    );
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let broker = broker();
    let cli = broker.cli();
    let numbers: String = (0..100_000)
        .map(|i| format!("{i} {}\n", "x".repeat(50)))
        .collect();
    cli.run_with(&["produce", "one"], &numbers).success();
    let program = millrace_e2e::program("millrace");
    let script = format!(
        "set -o pipefail; {} consume one | head -n 1",
        program.display()
    );
    let mut shell = std::process::Command::new("bash");
    shell
        .args(["-c", &script])
        .env("MILLRACE_BOOTSTRAP", broker.address());
    let piped = millrace_e2e::run(&mut shell, None, SOON).success();
    assert!(piped.text().starts_with("0 x"));
    assert_eq!(piped.stderr, "");
}

#[test]
fn failures_say_what_why_and_what_next_and_have_their_exit_codes() {
    let mut broker = broker();
    let cli = broker.cli();
    let fails = |cli: &Cli, args: &[&str], input: &str, code: i32, texts: &[&str]| {
        let failed = cli.run_with(args, input);
        assert_eq!(failed.code, Some(code), "{args:?}: {}", failed.stderr);
        for text in texts {
            assert!(
                failed.stderr.contains(text),
                "{args:?}: no {text:?} in {}",
                failed.stderr
            );
        }
        assert!(failed.stdout.is_empty(), "{args:?}");
    };
    fails(
        &cli,
        &["produce", "onee"],
        "a\n",
        1,
        &["error: topic `onee` does not exist", "did you mean one?"],
    );
    fails(
        &cli,
        &["consume", "absent"],
        "",
        1,
        &["topic `absent` does not exist", "hint:"],
    );
    fails(
        &cli,
        &["consume", "t", "-p", "3"],
        "",
        1,
        &["topic `t` has no partition 3: it has 3, counted from 0"],
    );
    fails(
        &cli,
        &["produce", "one", "-K", ":"],
        "a:1\nb:2\nc\n",
        1,
        &["record 3 has no key separator", "produced 2 records"],
    );
    fails(
        &cli,
        &["produce", "one", "-f", "/absent"],
        "",
        1,
        &["can't open /absent", "cause:"],
    );
    fails(
        &cli,
        &["consume", "one", "--from", "soon"],
        "",
        2,
        &["\"soon\" is not a point in a log"],
    );
    fails(&cli, &["produce"], "", 2, &["Usage: millrace produce"]);
    fails(&cli, &["unheard-of"], "", 2, &["unrecognized subcommand"]);
    let large = "x".repeat(3 << 20);
    fails(
        &cli,
        &["produce", "one"],
        &format!("fits\n{large}\n"),
        1,
        &["record 2 was not stored", "hint: raise maxMessageBytes"],
    );
    assert_eq!(
        cli.run(&["consume", "one"]).success().text(),
        "1\n2\nfits\n",
        "what came before a failure stays"
    );

    broker.terminate();
    let quick = ["--delivery-timeout", "1s", "--request-timeout", "1s"];
    let args = [&["produce", "one"], &quick[..]].concat();
    fails(
        &cli,
        &args,
        "a\n",
        1,
        &[
            "can't connect to broker 127.0.0.1:",
            "hint: is the broker running",
        ],
    );
    fails(
        &cli,
        &["topics", "list"],
        "",
        1,
        &["is the broker running, and is this its address?"],
    );
}

#[test]
fn help_has_examples_and_shells_get_completions() {
    let broker = Broker::setup().start();
    let cli = broker.cli();
    for args in [
        &["--help"][..],
        &["produce", "--help"],
        &["consume", "--help"],
        &["topics", "create", "--help"],
        &["bench", "--help"],
    ] {
        let help = cli.run(args).success().text();
        assert!(help.contains("Examples:\n  "), "{args:?}: {help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            cli.run(&["completions", shell])
                .success()
                .text()
                .contains("millrace"),
            "{shell}"
        );
    }
}
