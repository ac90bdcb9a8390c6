//! The check has teeth: histories of a correct log pass, and each way to spoil one is found.

use proptest::prelude::*;

use super::*;

/// A value of `producer`.
fn value(producer: u32, counter: u64) -> Value {
    Value { producer, counter }
}

fn sent(value: Value, invoked: u64, ended: u64, outcome: Outcome) -> Event {
    Event::Append {
        value,
        partition: 0,
        invoked,
        ended,
        outcome,
    }
}

fn acked(value: Value, invoked: u64, ended: u64, offset: i64) -> Event {
    let offset = Some(offset);
    sent(value, invoked, ended, Outcome::Acked { offset })
}

fn failed() -> Outcome {
    let error = "refused".to_owned();
    Outcome::Failed { error }
}

fn unknown() -> Outcome {
    let error = "timed out".to_owned();
    Outcome::Unknown { error }
}

fn read(reader: u32, offset: i64, values: &[Value], at: u64) -> Event {
    let values = values.iter().copied().map(Seen::Whole).collect();
    Event::Read {
        reader,
        partition: 0,
        offset,
        values,
        at,
    }
}

fn drained(end: i64) -> Event {
    Event::Drained { partition: 0, end }
}

fn kind(violation: &Violation) -> &'static str {
    match violation {
        Violation::Lost { .. } => "lost",
        Violation::Duplicated { .. } => "duplicated",
        Violation::Reordered { .. } => "reordered",
        Violation::OutOfTime { .. } => "out of time",
        Violation::Misplaced { .. } => "misplaced",
        Violation::Inconsistent { .. } => "inconsistent",
        Violation::Gap { .. } => "gap",
        Violation::StepBack { .. } => "step back",
        Violation::FailedYetRead { .. } => "failed, yet read",
        Violation::NeverSent { .. } => "never sent",
        Violation::Refused { .. } => "refused",
        Violation::NotDrained(_) => "not drained",
        Violation::SentTwice(_) => "sent twice",
    }
}

fn kinds(events: &[Event]) -> Vec<&'static str> {
    let verdict = check(events);
    verdict.violations.iter().map(|(_, v)| kind(v)).collect()
}

#[test]
fn each_kind_of_violation_is_found_and_nothing_else() {
    let (a, b, c, other) = (value(0, 0), value(0, 1), value(0, 2), value(1, 0));
    let all = || {
        vec![
            acked(a, 0, 10, 0),
            acked(b, 5, 15, 1),
            acked(other, 20, 30, 2),
        ]
    };
    let with = |more: Vec<Event>| [all(), more].concat();
    let whole = |reader, at| read(reader, 0, &[a, b, other], at);
    let cases: Vec<(&str, Vec<Event>, &[&str])> = vec![
        (
            "nothing is wrong",
            with(vec![whole(1, 40), drained(3)]),
            &[],
        ),
        (
            "read before the producer heard of it",
            with(vec![read(1, 0, &[a], 7), whole(2, 40), drained(3)]),
            &[],
        ),
        (
            "an unknown outcome that is in the log",
            with(vec![
                sent(c, 40, 50, unknown()),
                read(1, 0, &[a, b, other, c], 60),
                drained(4),
            ]),
            &[],
        ),
        (
            "an unknown outcome that is not",
            with(vec![sent(c, 40, 50, unknown()), whole(1, 60), drained(3)]),
            &[],
        ),
        (
            "an acknowledgement without offset",
            with(vec![
                sent(c, 40, 50, Outcome::Acked { offset: None }),
                read(1, 0, &[a, b, other, c], 60),
                drained(4),
            ]),
            &[],
        ),
        (
            "the end of the log is gone",
            with(vec![read(1, 0, &[a, b], 40), drained(2)]),
            &["lost"],
        ),
        (
            "the beginning of the log is gone",
            with(vec![read(1, 1, &[b, other], 40), drained(3)]),
            &["not drained", "lost"],
        ),
        (
            "an acknowledgement without offset, and no record",
            with(vec![
                sent(c, 40, 50, Outcome::Acked { offset: None }),
                whole(1, 60),
                drained(3),
            ]),
            &["lost"],
        ),
        (
            "a record twice",
            with(vec![read(1, 0, &[a, b, other, a], 40), drained(4)]),
            &["duplicated"],
        ),
        (
            "a producer's two, the wrong way round",
            vec![
                acked(a, 0, 10, 1),
                acked(b, 5, 15, 0),
                read(1, 0, &[b, a], 40),
                drained(2),
            ],
            &["reordered"],
        ),
        (
            "sent after another was acknowledged, and before it in the log",
            vec![
                acked(a, 0, 10, 1),
                acked(other, 11, 20, 0),
                read(1, 0, &[other, a], 40),
                drained(2),
            ],
            &["out of time"],
        ),
        (
            "sent after another was read, and before it in the log, with no acknowledgement",
            vec![
                sent(a, 0, 90, unknown()),
                read(1, 1, &[a], 10),
                sent(other, 11, 90, unknown()),
                read(2, 0, &[other, a], 100),
                drained(2),
            ],
            &["out of time"],
        ),
        (
            "read before it was sent",
            vec![acked(a, 20, 30, 0), read(1, 0, &[a], 10), drained(1)],
            &["out of time"],
        ),
        (
            "acknowledged elsewhere",
            vec![
                acked(a, 0, 10, 0),
                acked(other, 5, 15, 2),
                read(1, 0, &[a, other], 40),
                drained(2),
            ],
            &["misplaced"],
        ),
        (
            "two acknowledged at one offset",
            vec![
                acked(a, 0, 10, 0),
                acked(other, 5, 15, 0),
                read(1, 0, &[a], 40),
                drained(1),
            ],
            &["lost", "misplaced"],
        ),
        (
            "two readers, two values",
            with(vec![whole(1, 40), read(2, 1, &[other], 41), drained(3)]),
            &["inconsistent"],
        ),
        (
            "a reader is not shown an offset",
            with(vec![
                read(1, 0, &[a], 40),
                read(1, 2, &[other], 41),
                whole(2, 50),
                drained(3),
            ]),
            &["gap"],
        ),
        (
            "a reader is shown an offset again",
            with(vec![
                read(1, 0, &[a, b], 40),
                read(1, 1, &[b, other], 41),
                drained(3),
            ]),
            &["step back"],
        ),
        (
            "in the log, and its producer knows that it is not",
            with(vec![
                sent(c, 40, 50, failed()),
                read(1, 0, &[a, b, other, c], 60),
                drained(4),
            ]),
            &["failed, yet read"],
        ),
        (
            "not sent by anyone",
            with(vec![read(1, 0, &[a, b, other, c], 60), drained(4)]),
            &["never sent"],
        ),
        (
            "bytes that are no value",
            with(vec![
                whole(1, 40),
                Event::Read {
                    reader: 1,
                    partition: 0,
                    offset: 3,
                    values: vec![Seen::Foreign("x".into())],
                    at: 50,
                },
                drained(4),
            ]),
            &["never sent"],
        ),
        (
            "a reader was refused",
            with(vec![
                whole(1, 40),
                Event::Refused {
                    reader: 1,
                    partition: 0,
                    error: "out of range".into(),
                    at: 50,
                },
                drained(3),
            ]),
            &["refused"],
        ),
        ("not drained", with(vec![whole(1, 40)]), &["not drained"]),
        (
            "drained, but for what no one read",
            with(vec![whole(1, 40), drained(4)]),
            &["not drained"],
        ),
        (
            "a value sent twice",
            with(vec![acked(a, 0, 10, 0), whole(1, 40), drained(3)]),
            &["sent twice"],
        ),
    ];
    for (name, events, expected) in cases {
        assert_eq!(kinds(&events), expected, "{name}");
    }
}

#[test]
fn partitions_have_nothing_to_do_with_each_other() {
    let (a, b) = (value(0, 0), value(0, 1));
    let elsewhere = |event: Event| match event {
        Event::Append {
            value,
            invoked,
            ended,
            outcome,
            ..
        } => Event::Append {
            value,
            partition: 1,
            invoked,
            ended,
            outcome,
        },
        other => other,
    };
    let events = [
        acked(b, 20, 30, 0),
        elsewhere(acked(a, 0, 10, 0)),
        read(1, 0, &[b], 40),
        drained(1),
    ];
    // The other partition's record is not missed here, nor out of order; it was not read there.
    let verdict = check(&events);
    assert!(
        verdict.violations.iter().all(|(index, _)| *index == 1),
        "{verdict:?}"
    );
    assert_eq!(kinds(&events), ["not drained"]);
    assert_eq!(verdict.counts.partitions, 2);
}

#[test]
fn a_value_is_recognised_and_a_changed_byte_is_seen() {
    let value = value(3, 17);
    for size in [0, 5, 6, 100] {
        let bytes = value.to_bytes(size);
        assert_eq!(Seen::parse(&bytes), Seen::Whole(value), "{size}");
        for index in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[index] ^= 1;
            assert_ne!(Seen::parse(&changed), Seen::Whole(value), "{size}, {index}");
        }
    }
    assert_eq!(Seen::parse(b"3-17"), Seen::Foreign("3-17".into()));
}

#[test]
fn a_history_comes_back_from_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("history.jsonl");
    let mut events = vec![
        acked(value(0, 0), 0, 10, 0),
        sent(value(0, 1), 1, 11, failed()),
        sent(value(0, 2), 2, 12, unknown()),
        sent(value(0, 3), 2, 12, Outcome::Acked { offset: None }),
        read(1, 0, &[value(0, 0)], 20),
        drained(1),
    ];
    events.push(Event::Fault {
        kind: "kill".into(),
        brokers: vec![2],
        from: 5,
        until: 9,
    });
    events.push(Event::Read {
        reader: 2,
        partition: 0,
        offset: 0,
        values: vec![Seen::Foreign("a-b c".into())],
        at: 1,
    });
    let recorder = Recorder::create(&path).unwrap();
    for event in &events {
        recorder.record(event).unwrap();
    }
    recorder.flush().unwrap();
    assert_eq!(super::read(&path).unwrap(), events);
    assert_eq!(
        std::fs::read_to_string(&path)
            .unwrap()
            .lines()
            .next()
            .unwrap(),
        r#"{"event":"append","value":"0-0","partition":0,"invoked":0,"ended":10,"outcome":{"outcome":"acked","offset":0}}"#
    );

    std::fs::write(&path, "{}\n").unwrap();
    let error = super::read(&path).unwrap_err().to_string();
    assert!(error.contains("line 1"), "{error}");
}

/// What a generated history is made of: for each append, who sends it, how long around the instant at which it takes effect it lasts, and what
/// its producer hears.
type Plan = Vec<(u32, u64, u64, u8)>;

/// A history of a correct log: each append takes effect at one instant, in turn.
fn correct(plan: &Plan, pieces: &[usize]) -> Vec<Event> {
    const APART: u64 = 10;
    let mut events = Vec::new();
    let mut log: Vec<(Value, u64)> = Vec::new();
    let mut counters = [0; 4];
    // A producer's values are sent in its order.
    let mut sent_last = [0; 4];
    for (turn, (producer, before, after, heard)) in plan.iter().enumerate() {
        let instant = (turn as u64 + 10) * APART;
        let counter = &mut counters[*producer as usize];
        let this = value(*producer, *counter);
        *counter += 1;
        let sent_last = &mut sent_last[*producer as usize];
        let invoked = instant.saturating_sub(*before).max(*sent_last);
        *sent_last = invoked;
        let ended = instant + after;
        let offset = i64::try_from(log.len()).unwrap();
        let (outcome, in_log) = match heard {
            0 => (failed(), false),
            1 => (unknown(), false),
            2 => (unknown(), true),
            3 => (Outcome::Acked { offset: None }, true),
            _ => (
                Outcome::Acked {
                    offset: Some(offset),
                },
                true,
            ),
        };
        if in_log {
            log.push((this, instant));
        }
        events.push(sent(this, invoked, ended, outcome));
    }
    // Two readers that go along, one with pauses, and one that reads all of it at the end.
    for (reader, pieces) in [(0, pieces), (1, &[1][..]), (2, &[usize::MAX][..])] {
        let mut offset = 0_usize;
        for piece in pieces.iter().cycle() {
            let piece = &log[offset..log.len().min(offset.saturating_add(*piece))];
            let Some((_, last)) = piece.last() else {
                break;
            };
            let values: Vec<_> = piece.iter().map(|(value, _)| *value).collect();
            events.push(read(reader, i64::try_from(offset).unwrap(), &values, *last));
            offset += piece.len();
        }
    }
    events.push(drained(i64::try_from(log.len()).unwrap()));
    events
}

fn plans() -> impl Strategy<Value = (Plan, Vec<usize>)> {
    let append = (0..4_u32, 0..40_u64, 0..40_u64, 0..12_u8);
    (
        proptest::collection::vec(append, 1..40),
        proptest::collection::vec(1..5_usize, 1..5),
    )
}

/// Changes where values are in the log, for all who saw it.
fn rewrite(events: &mut [Event], offset_of: impl Fn(i64) -> i64) {
    let mut whole: Vec<(i64, Seen)> = Vec::new();
    for event in events.iter() {
        if let Event::Read {
            reader: 2,
            offset,
            values,
            ..
        } = event
        {
            whole.extend((*offset..).zip(values.iter().cloned()));
        }
    }
    let at = |wanted: i64| {
        let found = whole
            .iter()
            .find(|(offset, _)| offset_of(*offset) == wanted);
        found.map(|(_, seen)| seen.clone()).unwrap()
    };
    for event in events.iter_mut() {
        match event {
            Event::Append {
                outcome:
                    Outcome::Acked {
                        offset: Some(offset),
                    },
                ..
            } => *offset = offset_of(*offset),
            Event::Read { offset, values, .. } => {
                for (offset, seen) in (*offset..).zip(values) {
                    *seen = at(offset);
                }
            }
            _ => {}
        }
    }
}

/// Each spoils a history in one way, if it has what that needs, and says what must then be found.
fn spoil(events: &mut Vec<Event>, way: usize, pick: usize) -> Option<&'static str> {
    let (records, log_end) = events.iter().find_map(|event| match event {
        Event::Drained { end, .. } => Some((usize::try_from(*end).unwrap(), *end)),
        _ => None,
    })?;
    let at = i64::try_from(pick % records.max(1)).unwrap();
    let swap = move |one: i64, other: i64| {
        move |offset| match offset {
            _ if offset == one => other,
            _ if offset == other => one,
            _ => offset,
        }
    };
    let log: Vec<Value> = events
        .iter()
        .filter_map(|event| match event {
            Event::Read {
                reader: 2, values, ..
            } => Some(values.iter().map(|seen| match seen {
                Seen::Whole(value) => *value,
                Seen::Foreign(text) => panic!("{text}"),
            })),
            _ => None,
        })
        .flatten()
        .collect();
    let append = |events: &[Event], wanted: Value| {
        let found = events
            .iter()
            .position(|event| matches!(event, Event::Append { value, .. } if *value == wanted));
        found.unwrap()
    };
    let here = *log.get(pick % records.max(1))?;
    match way {
        // The log ends before an acknowledged record.
        0 => {
            let index = append(events, here);
            let Event::Append {
                outcome: Outcome::Acked { .. },
                ..
            } = events[index]
            else {
                return None;
            };
            for event in events.iter_mut() {
                match event {
                    Event::Read { offset, values, .. } => {
                        values.truncate(usize::try_from((at - *offset).max(0)).unwrap());
                    }
                    Event::Drained { end, .. } => *end = at,
                    _ => {}
                }
            }
            Some("lost")
        }
        // It has a record again.
        1 => {
            events.push(read(2, log_end, &[here], u64::MAX));
            Some("duplicated")
        }
        // Two of one producer have changed places.
        2 => {
            let other = log[..pick % records]
                .iter()
                .position(|other| other.producer == here.producer)?;
            rewrite(events, swap(at, i64::try_from(other).unwrap()));
            Some("reordered")
        }
        // Two have changed places, of which one was done before the other began.
        3 => {
            let Event::Append { invoked, .. } = events[append(events, here)] else {
                return None;
            };
            let other = log[..pick % records].iter().position(|other| {
                matches!(&events[append(events, *other)], Event::Append { ended, outcome: Outcome::Acked { .. }, .. } if *ended < invoked)
            })?;
            rewrite(events, swap(at, i64::try_from(other).unwrap()));
            Some("out of time")
        }
        // A producer was told another offset.
        4 => {
            let index = append(events, here);
            let Event::Append {
                outcome:
                    Outcome::Acked {
                        offset: Some(offset),
                    },
                ..
            } = &mut events[index]
            else {
                return None;
            };
            *offset += 1;
            Some("misplaced")
        }
        // A reader saw another value.
        5..=8 => {
            let index = events.iter().position(
                |event| matches!(event, Event::Read { reader: 1, offset, .. } if *offset == at),
            )?;
            match (way, &mut events[index]) {
                (5, Event::Read { values, .. }) => {
                    values[0] = Seen::Whole(*log.iter().find(|other| **other != here)?);
                    Some("inconsistent")
                }
                (6, _) if 0 < at && at < log_end - 1 => {
                    events.remove(index);
                    Some("gap")
                }
                (7, event) => {
                    let again = event.clone();
                    events.insert(index, again);
                    Some("step back")
                }
                // It saw it before it was sent.
                (8, Event::Read { at, .. }) => {
                    *at = 0;
                    Some("out of time")
                }
                _ => None,
            }
        }
        // Its producer was told that it failed.
        9 => {
            let index = append(events, here);
            let Event::Append { outcome, .. } = &mut events[index] else {
                return None;
            };
            *outcome = failed();
            Some("failed, yet read")
        }
        // No one has sent it.
        10 => {
            events.remove(append(events, here));
            Some("never sent")
        }
        // The whole log was not read.
        _ => {
            events.retain(|event| !matches!(event, Event::Drained { .. }));
            Some("not drained")
        }
    }
}

const WAYS: usize = 12;

proptest! {
    #[test]
    fn what_a_correct_log_shows_passes((plan, pieces) in plans()) {
        let verdict = check(&correct(&plan, &pieces));
        prop_assert_eq!(verdict.violations, vec![]);
    }

    #[test]
    fn what_is_spoilt_is_found((plan, pieces) in plans(), way in 0..WAYS, pick in any::<usize>()) {
        let mut events = correct(&plan, &pieces);
        if let Some(expected) = spoil(&mut events, way, pick) {
            prop_assert!(kinds(&events).contains(&expected), "expected {expected}, found {:?}", check(&events));
        }
    }
}

#[test]
fn each_way_to_spoil_a_history_is_tried() {
    // A filter above that let nothing through would prove nothing.
    let plan: Plan = (0..30).map(|turn| (turn % 4, 5, 5, 11)).collect();
    for way in 0..WAYS {
        let mut events = correct(&plan, &[3]);
        let expected = spoil(&mut events, way, 17);
        assert!(expected.is_some(), "{way}");
        assert!(kinds(&events).contains(&expected.unwrap()), "{way}");
    }
}
