//! The program that checks a history: what people and CI see of it.

use std::process::Command;

use millrace_e2e::history::{Event, Outcome, Recorder, Seen, Value};
use millrace_e2e::{Finished, SOON, program, run};

/// A record that was acknowledged, and a log in which it is or is not.
fn checked(records: usize) -> Finished {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("history.jsonl");
    let recorder = Recorder::create(&path).unwrap();
    let values = [0, 1].map(|counter| Value {
        producer: 0,
        counter,
    });
    for (value, offset) in values.into_iter().zip(0..) {
        let offset = Some(offset);
        let event = Event::Append {
            value,
            partition: 0,
            invoked: 10,
            ended: 20,
            outcome: Outcome::Acked { offset },
        };
        recorder.record(&event).unwrap();
    }
    let read = Event::Read {
        reader: 0,
        partition: 0,
        offset: 0,
        values: values[..records].iter().copied().map(Seen::Whole).collect(),
        at: 30,
    };
    recorder.record(&read).unwrap();
    let end = i64::try_from(records).unwrap();
    recorder
        .record(&Event::Drained { partition: 0, end })
        .unwrap();
    recorder.flush().unwrap();
    let mut command = Command::new(program("millrace-e2e"));
    run(command.arg("check").arg(&path), None, SOON)
}

#[test]
fn a_history_without_fault_is_said_to_be_so() {
    let text = checked(2).success().text();
    assert!(text.contains("2 records acknowledged"), "{text}");
    assert!(text.contains("nothing lost"), "{text}");
}

#[test]
fn a_lost_record_is_named_and_fails_the_check() {
    let finished = checked(1);
    assert_eq!(finished.code, Some(1));
    let text = finished.text();
    assert!(text.contains("partition 0: lost: 0-1"), "{text}");
    assert!(
        finished.stderr.contains("1 violations"),
        "{}",
        finished.stderr
    );
}
