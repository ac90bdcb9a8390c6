//! Many members of one group: the time until each has its share of the partitions, how long it takes when one leaves and another one joins, and how often
//! they commit. And, for Millrace, very many groups of one member each on one coordinator.
//!
//! Millrace's members are streams of the group service that do as they are told, without a consumer behind them: what is measured is the coordinator.
//! Kafka's are its consumers (group.protocol=consumer, KIP-848), a thread each in one JVM, since its tools have nothing less.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use millrace_proto::v1::{
    CommitOffsetsRequest, JoinRequest, MemberHello, MemberLeave, OffsetCommit, Subscription,
    group_service_client::GroupServiceClient, join_request::Message,
};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::Bench;
use crate::peer::{Broker, Durability, Peer, Topic, run};
use crate::table::Report;

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Members of the one group.
    #[arg(long, default_value_t = 1_000)]
    members: usize,
    /// Partitions that they share.
    #[arg(long, default_value_t = 1_000)]
    partitions: u32,
    /// How often one leaves and another one joins.
    #[arg(long, default_value_t = 20)]
    changes: usize,
    /// Groups of one member each, for Millrace; 0: none.
    #[arg(long, default_value_t = 10_000)]
    groups: usize,
    /// How long commits are counted.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
}

const TOPIC: &str = "shared";
const MIB: f64 = 1024.0 * 1024.0;
/// Streams of one connection; a broker takes 256.
const STREAMS: usize = 200;
const SETTLED_WITHIN: Duration = Duration::from_secs(300);

/// What Kafka's members report.
#[derive(Debug, Deserialize)]
struct Reported {
    joined_ns: u64,
    change_p50_ns: u64,
    change_max_ns: u64,
    commits_per_s: f64,
}

pub(crate) async fn groups(bench: &Bench, options: &Options) -> Result<Report> {
    let title = format!(
        "One group of {} members that share {} partitions",
        options.members, options.partitions
    );
    let mut report = Report::new(title, crate::KAFKA);
    for peer in bench.turns("groups") {
        let topics = vec![Topic::new(TOPIC, options.partitions)];
        let broker = bench.peers.start(peer, Durability::Os, topics).await?;
        let before = broker.process().settled().await?.rss;
        let reported = match &broker {
            Broker::Millrace(broker) => one_group(&broker.bootstrap.0, options).await?,
            Broker::Kafka(broker) => {
                let args = [
                    TOPIC.to_owned(),
                    options.members.to_string(),
                    options.partitions.to_string(),
                    options.changes.to_string(),
                    options.seconds.to_string(),
                ];
                let output = run(broker.tools.bench("-Xmx8g", "groups", &args)).await?;
                let line = output.lines().last().context("KafkaBench said nothing")?;
                serde_json::from_str(line)?
            }
        };
        let mut add = |metric: &str, value| report.add(peer, metric, None, value);
        add(
            "until each has its share, s",
            reported.joined_ns as f64 / 1e9,
        );
        add(
            "one leaves, one joins: until settled, p50 ms",
            reported.change_p50_ns as f64 / 1e6,
        );
        add("… longest, ms", reported.change_max_ns as f64 / 1e6);
        add("commits/s", reported.commits_per_s);
        let usage = broker.process().usage()?;
        add(
            "broker's memory more, at its peak, MiB",
            usage.peak_rss.saturating_sub(before) as f64 / MIB,
        );
        broker.stop().await?;
        if peer == Peer::Millrace && options.groups > 0 {
            many_groups(bench, options, &mut report).await?;
        }
    }
    Ok(report)
}

/// What members have, by their ids.
type Shares = Arc<Mutex<HashMap<usize, Share>>>;

#[derive(Clone, Debug, Default)]
struct Share {
    epoch: i32,
    partitions: Vec<i32>,
}

/// A member that does as it is told, until it is told to leave.
struct Member {
    outgoing: mpsc::Sender<JoinRequest>,
}

/// Connections that members share.
struct Connections {
    address: String,
    channels: Mutex<Vec<Channel>>,
}

impl Connections {
    fn new(address: &str) -> Self {
        Self {
            address: address.to_owned(),
            channels: Mutex::default(),
        }
    }

    fn of(&self, member: usize) -> Result<Channel> {
        let mut channels = self.channels.lock();
        let index = member / STREAMS;
        while channels.len() <= index {
            let endpoint = Endpoint::from_shared(format!("http://{}", self.address))?;
            channels.push(endpoint.tcp_nodelay(true).connect_lazy());
        }
        Ok(channels[index].clone())
    }
}

fn say(message: Message) -> JoinRequest {
    JoinRequest {
        message: Some(message),
    }
}

async fn join(
    connections: &Connections,
    tasks: &mut JoinSet<()>,
    shares: &Shares,
    group: &str,
    id: usize,
) -> Result<Member> {
    let mut service = GroupServiceClient::new(connections.of(id)?);
    let (outgoing, messages) = mpsc::channel(16);
    let hello = MemberHello {
        group_id: group.to_owned(),
        member_id: format!("member-{id}"),
        subscription: Some(Subscription {
            topics: vec![TOPIC.to_owned()],
            ..Subscription::default()
        }),
        session_timeout_ms: 60_000,
        ..MemberHello::default()
    };
    outgoing.send(say(Message::Hello(hello))).await?;
    let joined = service.join(ReceiverStream::new(messages)).await;
    let joined = joined.with_context(|| format!("member {id} of group {group} can't join"))?;
    let mut incoming = joined.into_inner();
    let (shares, answers) = (shares.clone(), outgoing.clone());
    tasks.spawn(async move {
        while let Ok(Some(told)) = incoming.message().await {
            let answer = match told.assignment {
                None => Message::Alive(millrace_proto::v1::MemberAlive {}),
                Some(assignment) => {
                    let partitions = assignment.partitions.into_iter();
                    let share = Share {
                        epoch: assignment.epoch,
                        partitions: partitions.flat_map(|topic| topic.partitions).collect(),
                    };
                    shares.lock().insert(id, share);
                    Message::AppliedVersion(assignment.version)
                }
            };
            if answers.send(say(answer)).await.is_err() {
                break;
            }
        }
        shares.lock().remove(&id);
    });
    Ok(Member { outgoing })
}

/// Waits until each of them has its share.
async fn settle(shares: &Shares, members: usize, partitions: usize) -> Result<Duration> {
    let begun = Instant::now();
    let (least, most) = (partitions / members, partitions.div_ceil(members));
    let settled = async {
        loop {
            let even = {
                let shares = shares.lock();
                let counts = || shares.values().map(|share| share.partitions.len());
                shares.len() == members
                    && counts().sum::<usize>() == partitions
                    && counts().all(|count| (least..=most).contains(&count))
            };
            if even {
                return;
            }
            sleep(Duration::from_millis(1)).await;
        }
    };
    let settled = timeout(SETTLED_WITHIN, settled).await;
    settled.with_context(|| format!("not settled after {SETTLED_WITHIN:?}"))?;
    Ok(begun.elapsed())
}

async fn one_group(address: &str, options: &Options) -> Result<Reported> {
    let Options {
        members,
        partitions,
        changes,
        seconds,
        ..
    } = *options;
    let connections = Connections::new(address);
    let shares = Shares::default();
    let mut tasks = JoinSet::new();
    let mut joined = Vec::with_capacity(members + changes);
    let begun = Instant::now();
    for id in 0..members {
        joined.push(join(&connections, &mut tasks, &shares, "members", id).await?);
    }
    settle(&shares, members, partitions as usize).await?;
    let joined_ns = u64::try_from(begun.elapsed().as_nanos())?;
    let mut histogram = Histogram::<u64>::new(3)?;
    for change in 0..changes {
        let begun = Instant::now();
        let leave = say(Message::Leave(MemberLeave {}));
        joined[change].outgoing.send(leave).await?;
        let id = members + change;
        joined.push(join(&connections, &mut tasks, &shares, "members", id).await?);
        // Until the one that leaves is away it looks settled.
        while shares.lock().contains_key(&change) {
            sleep(Duration::from_millis(1)).await;
        }
        settle(&shares, members, partitions as usize).await?;
        histogram.record(u64::try_from(begun.elapsed().as_nanos())?)?;
    }
    let all: Vec<(usize, Share)> = shares.lock().clone().into_iter().collect();
    let committers = all
        .into_iter()
        .map(|(id, share)| ("members".to_owned(), id, share));
    let commits_per_s = commits(&connections, committers.collect(), seconds).await?;
    Ok(Reported {
        joined_ns,
        change_p50_ns: histogram.value_at_quantile(0.5),
        change_max_ns: histogram.max(),
        commits_per_s,
    })
}

/// Each commits again and again; how many in a second.
async fn commits(
    connections: &Connections,
    committers: Vec<(String, usize, Share)>,
    seconds: u64,
) -> Result<f64> {
    let count = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    for (group, id, share) in committers {
        let mut service = GroupServiceClient::new(connections.of(id)?);
        let (count, stop) = (count.clone(), stop.clone());
        tasks.spawn(async move {
            let Some(partition) = share.partitions.first() else {
                return Ok(());
            };
            let request = CommitOffsetsRequest {
                group_id: group,
                member_id: format!("member-{id}"),
                epoch: share.epoch,
                offsets: vec![OffsetCommit {
                    topic: TOPIC.to_owned(),
                    partition: *partition,
                    ..OffsetCommit::default()
                }],
            };
            while !stop.load(Ordering::Relaxed) {
                let committed = service.commit_offsets(request.clone()).await;
                committed.with_context(|| format!("member {id} can't commit"))?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<_, anyhow::Error>(())
        });
    }
    sleep(Duration::from_secs(2)).await;
    let before = count.load(Ordering::Relaxed);
    sleep(Duration::from_secs(seconds)).await;
    let after = count.load(Ordering::Relaxed);
    stop.store(true, Ordering::Relaxed);
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok((after - before) as f64 / seconds as f64)
}

async fn many_groups(bench: &Bench, options: &Options, report: &mut Report) -> Result<()> {
    let topics = vec![Topic::new(TOPIC, 1)];
    let broker = bench
        .peers
        .start(Peer::Millrace, Durability::Os, topics)
        .await?;
    let Broker::Millrace(millrace) = &broker else {
        return Ok(());
    };
    let before = broker.process().settled().await?.rss;
    let connections = Connections::new(&millrace.bootstrap.0);
    let shares = Shares::default();
    let mut tasks = JoinSet::new();
    let mut members = Vec::with_capacity(options.groups);
    let begun = Instant::now();
    for id in 0..options.groups {
        let group = format!("group-{id}");
        members.push(join(&connections, &mut tasks, &shares, &group, id).await?);
    }
    let all_have = async {
        while shares
            .lock()
            .values()
            .filter(|share| share.partitions.len() == 1)
            .count()
            < options.groups
        {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SETTLED_WITHIN, all_have)
        .await
        .context("not all groups have their partition")?;
    let mut add = |metric: String, value| report.add(Peer::Millrace, metric, None, value);
    let groups = options.groups;
    add(
        format!("{groups} groups of one member: until each has its partition, s"),
        begun.elapsed().as_secs_f64(),
    );
    let all: Vec<(usize, Share)> = shares.lock().clone().into_iter().collect();
    ensure!(
        all.len() == groups,
        "{} of {groups} members are left",
        all.len()
    );
    let committers = all
        .into_iter()
        .map(|(id, share)| (format!("group-{id}"), id, share));
    let per_s = commits(&connections, committers.collect(), options.seconds).await?;
    add(format!("{groups} groups: commits/s"), per_s);
    let usage = broker.process().usage()?;
    add(
        format!("{groups} groups: broker's memory more, at its peak, MiB"),
        usage.peak_rss.saturating_sub(before) as f64 / MIB,
    );
    drop(members);
    broker.stop().await?;
    Ok(())
}
