//! Consumer groups through the client, against a broker.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use millrace_client::{
    Assignor, Client, Consumer, ErrorKind, GroupOffset, GroupState, Record, StartFrom,
};
use millrace_e2e::{Broker, SOON, refusal};
use millrace_proto::v1::{
    CommitOffsetsRequest, JoinRequest, MemberHello, OffsetCommit, Subscription,
    group_service_client::GroupServiceClient, join_request::Message,
};
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};

const PARTITIONS: i32 = 6;

async fn start() -> Broker {
    Broker::setup()
        .topic("t", json!({ "partitions": PARTITIONS }))
        .start()
}

/// Produces values `from..to`, one after the other to each partition.
async fn produce(client: &Client, from: u32, to: u32) {
    let producer = client.producer().build().await.unwrap();
    for value in from..to {
        let partition = value as i32 % PARTITIONS;
        let record = Record::to("t")
            .partition(partition)
            .value(value.to_string());
        drop(producer.send(record).await.unwrap());
    }
    producer.close(SOON).await.unwrap();
}

async fn member(client: &Client, group: &str) -> Consumer {
    let consumer = client.consumer().topic("t").group(group);
    consumer.build().await.unwrap()
}

/// Reads until nothing has come for a while.
async fn drain(consumer: &mut Consumer) -> Vec<u32> {
    let mut values = Vec::new();
    while let Ok(record) = timeout(Duration::from_secs(1), consumer.next_record()).await {
        let value = record.unwrap().unwrap().record.value.unwrap();
        values.push(std::str::from_utf8(&value).unwrap().parse().unwrap());
    }
    values
}

/// Has all of them read until each of `partitions` has one owner among them and all have as many, give or take one.
async fn settle(consumers: &mut [&mut Consumer], partitions: usize) -> Vec<u32> {
    let begun = Instant::now();
    let mut values = Vec::new();
    loop {
        for consumer in consumers.iter_mut() {
            if let Ok(record) = timeout(Duration::from_millis(20), consumer.next_record()).await {
                let value = record.unwrap().unwrap().record.value.unwrap();
                values.push(std::str::from_utf8(&value).unwrap().parse().unwrap());
            }
        }
        let owned: Vec<_> = consumers.iter().map(|c| c.assignment()).collect();
        let all: BTreeSet<_> = owned.iter().flatten().collect();
        let counts: BTreeSet<usize> = owned.iter().map(Vec::len).collect();
        let even = counts.last().unwrap() - counts.first().unwrap() <= 1;
        let total: usize = owned.iter().map(Vec::len).sum();
        if even && all.len() == partitions && total == partitions {
            return values;
        }
        assert!(begun.elapsed() < SOON, "not settled: {owned:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_share_the_partitions_and_each_group_gets_everything() {
    let broker = start().await;
    let client = broker.client().await;
    let (mut first, mut second) = (
        member(&client, "queue").await,
        member(&client, "queue").await,
    );
    settle(&mut [&mut first, &mut second], 6).await;
    produce(&client, 0, 600).await;
    let (a, b) = tokio::join!(drain(&mut first), drain(&mut second));
    assert_eq!((a.len(), b.len()), (300, 300));
    let all: BTreeSet<u32> = a.into_iter().chain(b).collect();
    assert_eq!(all.len(), 600);
    let mut other = member(&client, "another").await;
    assert_eq!(drain(&mut other).await.len(), 600);
    let groups = client.groups().await.unwrap();
    let states: Vec<_> = groups
        .iter()
        .map(|g| (g.group.as_str(), g.state, g.members))
        .collect();
    assert_eq!(
        states,
        [
            ("another", GroupState::Stable, 1),
            ("queue", GroupState::Stable, 2)
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_in_order_is_followed_by_others_with_nothing_twice() {
    let broker = start().await;
    let client = broker.client().await;
    produce(&client, 0, 600).await;
    let mut first = member(&client, "g").await;
    let mut seen = Vec::new();
    for _ in 0..250 {
        let record = first.next_record().await.unwrap().unwrap();
        let value = record.record.value.unwrap();
        seen.push(std::str::from_utf8(&value).unwrap().parse::<u32>().unwrap());
    }
    let mut second = member(&client, "g").await;
    seen.extend(settle(&mut [&mut first, &mut second], 6).await);
    first.close().await.unwrap();
    seen.extend(drain(&mut second).await);
    assert_eq!(second.assignment().len(), 6);
    second.close().await.unwrap();
    seen.sort_unstable();
    assert_eq!(seen, (0..600).collect::<Vec<u32>>());
    let described = client.describe_group("g").await.unwrap();
    assert_eq!(described.summary.state, GroupState::Empty);
    let offsets: Vec<i64> = described.offsets.iter().map(|o| o.offset).collect();
    assert_eq!(offsets, [100; 6]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_killed_is_replaced_soon_and_nothing_is_missed() {
    let broker = start().await;
    let client = broker.client().await;
    let mut first = member(&client, "g").await;
    // Another process would have a connection of its own.
    let doomed = broker.client().await;
    let mut second = member(&doomed, "g").await;
    settle(&mut [&mut first, &mut second], 6).await;
    produce(&client, 0, 600).await;
    let mut seen: Vec<u32> = Vec::new();
    let record = second.next_record().await.unwrap().unwrap();
    let value = record.record.value.unwrap();
    let value: u32 = std::str::from_utf8(&value).unwrap().parse().unwrap();
    // It was read, and not committed: it is read again.
    assert!(value < 600);
    drop((second, doomed));
    let begun = Instant::now();
    while first.assignment().len() < 6 {
        let Ok(record) = timeout(Duration::from_millis(50), first.next_record()).await else {
            assert!(
                begun.elapsed() < Duration::from_secs(8),
                "its partitions are no one's"
            );
            continue;
        };
        let value = record.unwrap().unwrap().record.value.unwrap();
        seen.push(std::str::from_utf8(&value).unwrap().parse().unwrap());
    }
    seen.extend(drain(&mut first).await);
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 600);
}

#[tokio::test(flavor = "multi_thread")]
async fn offsets_and_members_outlive_the_coordinator() {
    let mut broker = start().await;
    let client = broker.client().await;
    let mut consumer = member(&client, "g").await;
    produce(&client, 0, 60).await;
    assert_eq!(drain(&mut consumer).await.len(), 60);
    consumer.commit().await.unwrap();
    let epoch = client.describe_group("g").await.unwrap().summary.epoch;
    broker.kill_9();
    broker.restart();
    produce(&client, 60, 120).await;
    let more = drain(&mut consumer).await;
    assert_eq!(more.len(), 60, "read again, or missed: {more:?}");
    consumer.commit().await.unwrap();
    assert_eq!(consumer.assignment().len(), 6);
    let described = client.describe_group("g").await.unwrap();
    assert_eq!(described.members.len(), 1);
    assert!(described.summary.epoch >= epoch);
    let offsets: Vec<i64> = described.offsets.iter().map(|o| o.offset).collect();
    assert_eq!(offsets, [20; 6]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_static_member_comes_back_to_what_it_had() {
    let broker = start().await;
    let client = broker.client().await;
    let static_member = |name: &'static str| {
        let consumer = client.consumer().topic("t").group("g").instance_id(name);
        async { consumer.build().await.unwrap() }
    };
    let (mut a, mut b) = (static_member("a").await, static_member("b").await);
    settle(&mut [&mut a, &mut b], 6).await;
    let had = a.assignment();
    let epoch = client.describe_group("g").await.unwrap().summary.epoch;
    a.close().await.unwrap();
    let mut a = static_member("a").await;
    settle(&mut [&mut a, &mut b], 6).await;
    assert_eq!(a.assignment(), had);
    let described = client.describe_group("g").await.unwrap();
    assert_eq!(described.summary.epoch, epoch, "there was a rebalance");
    // A second process with the same id: the first one is told to end.
    let _thief = static_member("a").await;
    let error = loop {
        match timeout(SOON, a.next_record()).await.unwrap() {
            Some(Err(error)) => break error,
            Some(Ok(_)) => {}
            None => panic!("it ended without a word"),
        }
    };
    assert_eq!(error.kind(), ErrorKind::FencedMember, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn new_partitions_and_matching_topics_are_picked_up() {
    let broker = start().await;
    let client = broker.client().await;
    let consumer = client.consumer().pattern("t.*").group("g");
    let mut consumer = consumer.assignor(Assignor::Range).build().await.unwrap();
    settle(&mut [&mut consumer], 6).await;
    broker.declare("t", json!({ "partitions": 8 }));
    broker.declare("tea", json!({ "partitions": 2 }));
    broker.declare("coffee", json!({ "partitions": 2 }));
    settle(&mut [&mut consumer], 10).await;
    let mut counts: BTreeMap<Arc<str>, usize> = BTreeMap::new();
    for (topic, _) in consumer.assignment() {
        *counts.entry(topic).or_default() += 1;
    }
    assert_eq!(counts, BTreeMap::from([("t".into(), 8), ("tea".into(), 2)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn offsets_are_committed_exactly_with_metadata_and_while_reading_on() {
    let broker = start().await;
    let client = broker.client().await;
    produce(&client, 0, 60).await;
    let consumer = client.consumer().topic("t").group("g").auto_commit(None);
    let mut consumer = consumer.build().await.unwrap();
    assert_eq!(drain(&mut consumer).await.len(), 60);
    // Asked for, and not waited for: what comes after it waits for it.
    drop(consumer.commit_async());
    let some = [
        GroupOffset::new("t", 0, 3).metadata("a checkpoint"),
        GroupOffset::new("t", 1, 10),
    ];
    consumer.commit_offsets(some).await.unwrap();
    let committed = client.group_offsets("g").await.unwrap();
    let committed: Vec<(i64, &str)> = committed
        .iter()
        .map(|found| (found.offset, found.metadata.as_str()))
        .collect();
    let rest = [(10, ""); 5];
    assert_eq!(committed, [&[(3, "a checkpoint")], &rest[..]].concat());
    let beyond = [GroupOffset::new("t", 0, 4), GroupOffset::new("t", 1, 11)];
    let error = consumer.commit_offsets(beyond).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OffsetOutOfRange, "{error}");
    let foreign = [GroupOffset::new("other", 0, 0)];
    let error = consumer.commit_offsets(foreign).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotOwner, "{error}");
    assert_eq!(client.group_offsets("g").await.unwrap()[0].offset, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_without_members_is_reset_and_deleted() {
    let broker = start().await;
    let client = broker.client().await;
    produce(&client, 0, 60).await;
    let consumer = member(&client, "g").await;
    let reset = || (0..6).map(|partition| GroupOffset::new("t", partition, 4));
    // It may take a moment until it is a member.
    let begun = Instant::now();
    loop {
        match client.reset_group("g", reset()).await {
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::GroupNotEmpty, "{error}");
                break;
            }
            Ok(()) => assert!(begun.elapsed() < SOON, "a group with a member was reset"),
        }
        sleep(Duration::from_millis(20)).await;
    }
    let error = client.delete_group("g").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::GroupNotEmpty, "{error}");
    consumer.close().await.unwrap();
    client.reset_group("g", reset()).await.unwrap();
    let mut consumer = member(&client, "g").await;
    assert_eq!(drain(&mut consumer).await.len(), 36);
    consumer.close().await.unwrap();
    let beyond = reset().chain([GroupOffset::new("t", 3, 11)]);
    let error = client.reset_group("g", beyond).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OffsetOutOfRange, "{error}");
    client.delete_group("g").await.unwrap();
    let error = client.describe_group("g").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnknownGroup, "{error}");
    let from_the_end = client
        .consumer()
        .topic("t")
        .group("g")
        .start(StartFrom::Latest);
    let mut consumer = from_the_end.build().await.unwrap();
    settle(&mut [&mut consumer], 6).await;
    produce(&client, 60, 66).await;
    assert_eq!(drain(&mut consumer).await.len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_refused_with_a_reason_and_the_group_goes_on() {
    let broker = start().await;
    let client = broker.client().await;
    let mut consumer = member(&client, "g").await;
    settle(&mut [&mut consumer], 6).await;
    let described = client.describe_group("g").await.unwrap();
    let (id, epoch) = (&described.members[0].member_id, described.summary.epoch);
    let mut groups = GroupServiceClient::new(broker.api().await.channel);
    let commit = |member: &str, epoch, topic: &str, partition, offset, metadata: usize| {
        CommitOffsetsRequest {
            group_id: "g".into(),
            member_id: member.into(),
            epoch,
            offsets: vec![OffsetCommit {
                topic: topic.into(),
                partition,
                offset,
                leader_epoch: -1,
                metadata: "x".repeat(metadata),
            }],
        }
    };
    for (request, reason) in [
        (commit("nobody", epoch, "t", 0, 1, 0), "UNKNOWN_MEMBER"),
        (commit("", 0, "t", 0, 1, 0), "GROUP_NOT_EMPTY"),
        (commit(id, 0, "t", 0, 1, 0), "NOT_OWNER"),
        (commit(id, epoch, "none", 0, 1, 0), "UNKNOWN_TOPIC"),
        (commit(id, epoch, "t", 6, 1, 0), "UNKNOWN_PARTITION"),
        (commit(id, epoch, "t", -1, 1, 0), "UNKNOWN_PARTITION"),
        (commit(id, epoch, "t", 0, -1, 0), "INVALID_REQUEST"),
        (commit(id, epoch, "t", 0, 1, 4_097), "LIMIT_EXCEEDED"),
    ] {
        let refused = refusal(&groups.commit_offsets(request).await.unwrap_err());
        assert_eq!(refused.reason, reason, "{refused:?}");
    }
    let hello = MemberHello {
        group_id: "g".into(),
        member_id: "m".into(),
        subscription: Some(Subscription {
            topics: vec!["t".into()],
            ..Subscription::default()
        }),
        ..MemberHello::default()
    };
    let long = "x".repeat(256);
    let subscription = |topics: usize, pattern: Option<&str>, assignor| {
        Some(Subscription {
            topics: vec!["t".into(); topics],
            pattern: pattern.map(str::to_owned),
            assignor,
            rack: None,
        })
    };
    for (hello, reason) in [
        (
            MemberHello {
                group_id: String::new(),
                ..hello.clone()
            },
            "INVALID_REQUEST",
        ),
        (
            MemberHello {
                group_id: long.clone(),
                ..hello.clone()
            },
            "LIMIT_EXCEEDED",
        ),
        (
            MemberHello {
                member_id: String::new(),
                ..hello.clone()
            },
            "INVALID_REQUEST",
        ),
        (
            MemberHello {
                member_id: long,
                ..hello.clone()
            },
            "LIMIT_EXCEEDED",
        ),
        (
            MemberHello {
                subscription: None,
                ..hello.clone()
            },
            "INVALID_REQUEST",
        ),
        (
            MemberHello {
                subscription: subscription(1_001, None, 0),
                ..hello.clone()
            },
            "LIMIT_EXCEEDED",
        ),
        (
            MemberHello {
                subscription: subscription(0, Some("("), 0),
                ..hello.clone()
            },
            "INVALID_REQUEST",
        ),
        (
            MemberHello {
                subscription: subscription(1, None, 7),
                ..hello.clone()
            },
            "INVALID_REQUEST",
        ),
        (
            MemberHello {
                session_timeout_ms: 10,
                ..hello.clone()
            },
            "INVALID_REQUEST",
        ),
        (
            MemberHello {
                session_timeout_ms: u32::MAX,
                ..hello.clone()
            },
            "INVALID_REQUEST",
        ),
    ] {
        let messages = vec![JoinRequest {
            message: Some(Message::Hello(hello)),
        }];
        let refused = groups.join(tokio_stream::iter(messages)).await.unwrap_err();
        assert_eq!(refusal(&refused).reason, reason, "{refused:?}");
    }
    let alive = JoinRequest { message: None };
    let refused = groups
        .join(tokio_stream::iter(vec![alive]))
        .await
        .unwrap_err();
    assert_eq!(refusal(&refused).reason, "INVALID_REQUEST");

    produce(&client, 0, 6).await;
    assert_eq!(drain(&mut consumer).await.len(), 6);
    consumer.commit().await.unwrap();
    assert_eq!(client.group_offsets("g").await.unwrap().len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn how_far_a_group_is_behind_can_be_told_from_the_metrics() {
    let broker = start().await;
    let client = broker.client().await;
    produce(&client, 0, 60).await;
    let mut consumer = member(&client, "g").await;
    assert_eq!(drain(&mut consumer).await.len(), 60);
    consumer.commit().await.unwrap();
    produce(&client, 60, 120).await;
    assert_eq!(broker.metric("millrace_group_members{group=\"g\"}"), 1.0);
    let (mut end, mut committed) = (0.0, 0.0);
    for partition in 0..PARTITIONS {
        let place = format!("topic=\"t\",partition=\"{partition}\"");
        end += broker.metric(&format!("millrace_high_watermark{{{place}}}"));
        let metric = format!("millrace_group_committed_offset{{group=\"g\",{place}}}");
        committed += broker.metric(&metric);
    }
    assert_eq!((end, committed), (120.0, 60.0));
}

/// Has an app that dies again and again work through a topic. It says what it has done, in order, over all its lives.
async fn work_and_die(client: &Client, group: &str, commits_first: bool) -> Vec<u32> {
    const LIVES: u32 = 12;
    let mut done = Vec::new();
    for life in 0..=LIVES {
        let consumer = client.consumer().topic("t").group(group).auto_commit(None);
        // Static, so that who comes after a death goes on at once.
        let mut consumer = consumer.instance_id("worker").build().await.unwrap();
        let mut left = if life < LIVES { 7 + life % 5 } else { u32::MAX };
        // It dies before or after what comes second: dropped as it is, it commits nothing more.
        let dies_late = life % 2 == 0;
        while let Ok(record) = timeout(Duration::from_secs(2), consumer.next_record()).await {
            let value = record.unwrap().unwrap().record.value.unwrap();
            let value = std::str::from_utf8(&value).unwrap().parse().unwrap();
            left -= 1;
            if commits_first {
                consumer.commit().await.unwrap();
            } else {
                done.push(value);
            }
            if left == 0 && !dies_late {
                break;
            }
            if commits_first {
                done.push(value);
            } else {
                consumer.commit().await.unwrap();
            }
            if left == 0 {
                break;
            }
        }
    }
    done
}

#[tokio::test(flavor = "multi_thread")]
async fn who_commits_after_its_work_does_it_at_least_once_and_who_does_before_at_most_once() {
    const RECORDS: u32 = 240;
    let broker = start().await;
    let client = broker.client().await;
    produce(&client, 0, RECORDS).await;
    let (after, before) = tokio::join!(
        work_and_die(&client, "after", false),
        work_and_die(&client, "before", true)
    );
    let distinct = |done: &[u32]| done.iter().copied().collect::<BTreeSet<u32>>().len();
    assert_eq!(distinct(&after), RECORDS as usize, "nothing is left out");
    assert!(after.len() > RECORDS as usize, "something is done twice");
    assert_eq!(distinct(&before), before.len(), "nothing is done twice");
    assert!(before.len() < RECORDS as usize, "something is left out");
}
