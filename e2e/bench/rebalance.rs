//! Consumers of one group that come, go and die while records flow: how long until the partitions are shared again, for how long those pause that
//! move and those that don't, what is read twice, and that nothing is missed.
//!
//! Each cycle joins consumers one by one, kills some of them (their connections break, without a farewell), and has others leave one by one. Every
//! record that was acknowledged must have been read by someone in the end.

use std::collections::{BTreeMap, HashMap};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::FutureExt;
use hdrhistogram::Histogram;
use millrace_client::{Client, ConsumedRecord, Consumer, OffsetSpec, StartFrom};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::Bench;
use crate::live::{Live, Load};
use crate::peer::{Peer, Target, Topic, millrace};
use crate::table::{Goal, Report};
use crate::trio::{REPLICAS, Trio};

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Consumers when a cycle begins, at its peak, and at its end.
    #[arg(long, value_delimiter = ',', num_args = 3, default_values_t = [1, 10, 3])]
    consumers: Vec<usize>,
    /// How many of them are killed at the peak; others join in their place.
    #[arg(long, default_value_t = 2)]
    killed: usize,
    /// Records a second.
    #[arg(long, default_value_t = 100_000)]
    rate: u64,
    /// Bytes of each value, at least 8.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(8..))]
    size: u32,
    /// Partitions; of a topic that is there already, as many as it has.
    #[arg(long, default_value_t = 30)]
    partitions: u32,
    /// How often consumers come and go.
    #[arg(long, default_value_t = 3)]
    cycles: usize,
    /// Of brokers that run already, which have the topic `rebalanced`. By default three are started here.
    #[arg(long)]
    bootstrap: Option<String>,
    /// A command that is run at each cycle's peak, such as one that restarts the brokers.
    #[arg(long)]
    meanwhile: Option<String>,
}

const TOPIC: &str = "rebalanced";
const GROUP: &str = "rebalanced";
/// What is undisturbed between changes.
const QUIET: Duration = Duration::from_secs(2);
const SETTLED_WITHIN: Duration = Duration::from_secs(60);
const DRAINED_WITHIN: Duration = Duration::from_secs(120);
/// A consumer looks up so often from records that come without end.
const RECORDS_AT_A_TIME: usize = 1_000;
/// As producers that send so much have it.
const LINGER: Duration = Duration::from_millis(5);
const LOOK: Duration = Duration::from_millis(2);

pub(crate) async fn rebalance(bench: &Bench, options: &Options) -> Result<Report> {
    let title = format!(
        "A group of {:?} consumers of {} partitions, beside {} records/s of {} B, acks=all, replication factor 3",
        options.consumers, options.partitions, options.rate, options.size
    );
    let mut report = Report::new(title, crate::KAFKA);
    for peer in bench.turns("rebalance") {
        ensure!(peer == Peer::Millrace, "only Millrace is measured here");
        match &options.bootstrap {
            Some(bootstrap) => {
                let bootstrap = millrace::Bootstrap(bootstrap.clone());
                measure(&bootstrap, options, &mut report).await?;
            }
            None => {
                let topics = [Topic::new(TOPIC, options.partitions)];
                let trio = bench.peers.start_three(peer, false, &topics).await?;
                if let Trio::Millrace { fleet, .. } = &trio {
                    fleet.create_internal_topics(REPLICAS).await?;
                }
                let Target::Millrace(bootstrap) = trio.target() else {
                    bail!("only Millrace is measured here");
                };
                measure(&bootstrap, options, &mut report).await?;
                trio.stop().await?;
            }
        }
    }
    Ok(report)
}

/// What was read of one partition.
#[derive(Default)]
struct Read {
    /// By offset: how often.
    times: Vec<u8>,
    /// When something was read last, and by whom.
    last: Option<(Instant, usize)>,
    /// The longest time without anything since it was last asked, as far as the same consumer read before and after, and as far as another one did.
    stayed: Duration,
    moved: Duration,
}

impl Read {
    fn record(&mut self, by: usize, offset: i64) {
        let now = Instant::now();
        if let Some((then, before)) = self.last.replace((now, by)) {
            let longest = match before == by {
                true => &mut self.stayed,
                false => &mut self.moved,
            };
            *longest = (*longest).max(now - then);
        }
        let offset = offset as usize;
        if self.times.len() <= offset {
            self.times.resize(offset + 1, 0);
        }
        self.times[offset] = self.times[offset].saturating_add(1);
    }
}

/// What all consumers share.
struct Shared {
    reads: Vec<Mutex<Read>>,
    /// What each that lives has, as it says itself.
    owned: Mutex<BTreeMap<usize, Vec<i32>>>,
}

/// How a consumer ends.
enum End {
    Leave,
    Die,
}

struct Member {
    end: oneshot::Sender<End>,
    task: JoinHandle<Result<()>>,
}

impl Member {
    async fn end(self, how: End) -> Result<()> {
        // If it has ended already, it says why.
        let _ = self.end.send(how);
        self.task.await?
    }
}

async fn consume(
    client: Client,
    shared: Arc<Shared>,
    id: usize,
    mut end: oneshot::Receiver<End>,
) -> Result<()> {
    let consumer = client.consumer().topic(TOPIC).group(GROUP);
    let consumer = consumer.start(StartFrom::Earliest);
    let mut consumer: Consumer = consumer
        .auto_commit(Some(Duration::from_secs(1)))
        .build()
        .await?;
    let read = |record: ConsumedRecord| -> Result<()> {
        let read = shared.reads.get(usize::try_from(record.partition)?);
        let read = read.context("a record of an unknown partition")?;
        read.lock().record(id, record.record.offset);
        Ok(())
    };
    loop {
        for _ in 0..RECORDS_AT_A_TIME {
            match consumer.next_record().now_or_never() {
                Some(Some(record)) => read(record?)?,
                Some(None) => bail!("consumer {id} ended by itself"),
                None => break,
            }
        }
        let owned = consumer.assignment().into_iter();
        let owned = owned.map(|(_, partition)| partition).collect();
        shared.owned.lock().insert(id, owned);
        match end.try_recv() {
            Ok(End::Leave) => {
                consumer.close().await?;
                break;
            }
            Ok(End::Die) => break,
            Err(oneshot::error::TryRecvError::Closed) => bail!("the benchmark failed"),
            Err(oneshot::error::TryRecvError::Empty) => {}
        }
        if let Ok(record) = timeout(LOOK, consumer.next_record()).await {
            read(record.context("the consumer ended by itself")??)?;
        }
    }
    shared.owned.lock().remove(&id);
    Ok(())
}

/// Times of one kind of change.
struct Change {
    name: &'static str,
    settled: Histogram<u64>,
    /// Pauses of partitions that another consumer got.
    moved: Histogram<u64>,
}

impl Change {
    fn new(name: &'static str) -> Result<Self> {
        Ok(Self {
            name,
            settled: Histogram::new(3)?,
            moved: Histogram::new(3)?,
        })
    }

    fn add_to(&self, report: &mut Report) {
        add(
            report,
            &format!("{}: until settled", self.name),
            &self.settled,
        );
        let moved = format!("{}: pause of a partition that moves", self.name);
        add(report, &moved, &self.moved);
    }
}

fn add(report: &mut Report, what: &str, times: &Histogram<u64>) {
    for (metric, quantile) in [("p50", 0.5), ("p99", 0.99), ("longest", 1.0)] {
        let ms = times.value_at_quantile(quantile) as f64 / 1e6;
        report.add(Peer::Millrace, format!("{what}, {metric} ms"), None, ms);
    }
}

/// The group, as it changes.
struct Group {
    bootstrap: millrace::Bootstrap,
    shared: Arc<Shared>,
    members: BTreeMap<usize, Member>,
    next: usize,
    /// Pauses of partitions that stayed where they were, and of all when nothing changed.
    stayed: Histogram<u64>,
    quiet: Histogram<u64>,
}

impl Group {
    async fn join(&mut self) -> Result<()> {
        let (end, ends) = oneshot::channel();
        let client = self.bootstrap.client().await?;
        let id = self.next;
        let task = tokio::spawn(consume(client, self.shared.clone(), id, ends));
        self.members.insert(id, Member { end, task });
        self.next += 1;
        Ok(())
    }

    /// The one that is there longest.
    async fn leave(&mut self, how: End) -> Result<()> {
        let (_, member) = self.members.pop_first().context("no consumer is left")?;
        member.end(how).await
    }

    /// Waits until the partitions are shared evenly by all members; who has which.
    async fn settled(&mut self) -> Result<HashMap<i32, usize>> {
        let begun = Instant::now();
        loop {
            if let Some(owners) = self.owners() {
                return Ok(owners);
            }
            if let Some((id, _)) = self.members.iter().find(|(_, m)| m.task.is_finished()) {
                let id = *id;
                let member = self.members.remove(&id).context("it was just found")?;
                member.task.await??;
                bail!("consumer {id} ended by itself");
            }
            ensure!(
                begun.elapsed() < SETTLED_WITHIN,
                "not shared evenly after {SETTLED_WITHIN:?}: {:?}",
                self.shared.owned.lock()
            );
            sleep(Duration::from_millis(1)).await;
        }
    }

    fn owners(&self) -> Option<HashMap<i32, usize>> {
        let owned = self.shared.owned.lock();
        let (partitions, members) = (self.shared.reads.len(), self.members.len());
        let share = partitions / members..=partitions.div_ceil(members);
        let even =
            owned.len() == members && owned.values().all(|owned| share.contains(&owned.len()));
        let each = owned.iter();
        let owners: HashMap<i32, usize> = each
            .flat_map(|(id, owned)| owned.iter().map(|partition| (*partition, *id)))
            .collect();
        let count: usize = owned.values().map(Vec::len).sum();
        (even && count == partitions && owners.len() == partitions).then_some(owners)
    }

    fn take_pauses(&self) -> Vec<(Duration, Duration)> {
        let reads = self.shared.reads.iter();
        let take = |read: &Mutex<Read>| {
            let mut read = read.lock();
            (
                std::mem::take(&mut read.stayed),
                std::mem::take(&mut read.moved),
            )
        };
        reads.map(take).collect()
    }

    /// Some time in which nothing changes, and then a change, until all have settled.
    async fn change(
        &mut self,
        kind: &mut Change,
        change: impl AsyncFnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let before = self.settled().await?;
        self.take_pauses();
        sleep(QUIET).await;
        for (stayed, _) in self.take_pauses() {
            self.quiet.record(stayed.as_nanos() as u64)?;
        }
        let begun = Instant::now();
        change(self).await?;
        let after = self.settled().await?;
        kind.settled.record(begun.elapsed().as_nanos() as u64)?;
        // What has moved was read again by then, too.
        sleep(QUIET / 2).await;
        for (partition, (stayed, moved)) in (0..).zip(self.take_pauses()) {
            if before.get(&partition) == after.get(&partition) {
                self.stayed.record(stayed.as_nanos() as u64)?;
            } else {
                kind.moved.record(moved.as_nanos() as u64)?;
            }
        }
        Ok(())
    }
}

async fn measure(
    bootstrap: &millrace::Bootstrap,
    options: &Options,
    report: &mut Report,
) -> Result<()> {
    let [first, peak, last] = options.consumers[..] else {
        bail!("--consumers has three numbers");
    };
    ensure!(
        0 < first && first < peak && 0 < last && last < peak && options.killed < peak,
        "--consumers grows and shrinks, and more are there than are killed"
    );
    let client = bootstrap.client().await?;
    let known = client.metadata(&[TOPIC]).await?;
    let known = known.topics.first().context("there is no topic")?;
    let partitions = known.partitions.len();
    let read = || Mutex::new(Read::default());
    let shared = Arc::new(Shared {
        reads: std::iter::repeat_with(read).take(partitions).collect(),
        owned: Mutex::default(),
    });
    let histogram = || Histogram::<u64>::new(3);
    let mut group = Group {
        bootstrap: bootstrap.clone(),
        shared: shared.clone(),
        members: BTreeMap::new(),
        next: 0,
        stayed: histogram()?,
        quiet: histogram()?,
    };
    let (mut joins, mut leaves) = (Change::new("one joins")?, Change::new("one leaves")?);
    let mut deaths = Change::new("one is killed")?;
    let target = Target::Millrace(bootstrap.clone());
    let load = Load {
        size: options.size as usize,
        rate: options.rate,
        linger: LINGER,
        // So that a pause is not that of a partition whose turn has not come.
        round_robin: true,
    };
    let mut live = Live::start(&target, TOPIC, load).await?;
    for _ in 0..first {
        group.join().await?;
    }
    for _ in 0..options.cycles {
        for _ in group.members.len()..peak {
            group
                .change(&mut joins, async |group| group.join().await)
                .await?;
        }
        if let Some(command) = &options.meanwhile {
            meanwhile(command).await?;
        }
        for _ in 0..options.killed {
            group
                .change(&mut deaths, async |group| group.leave(End::Die).await)
                .await?;
            group
                .change(&mut joins, async |group| group.join().await)
                .await?;
        }
        for _ in last..peak {
            group
                .change(&mut leaves, async |group| group.leave(End::Leave).await)
                .await?;
        }
    }
    let latencies = live.latencies().await?;
    let written = live.stop().await?;
    let (missed, twice) = check(&client, &shared, written).await?;
    while !group.members.is_empty() {
        group.leave(End::Leave).await?;
    }

    for change in [&joins, &leaves, &deaths] {
        change.add_to(report);
    }
    let stays = "a change: pause of a partition that stays";
    add(report, stays, &group.stayed);
    add(report, "no change: pause of a partition", &group.quiet);
    latencies.add_to(report, Peer::Millrace, "records acknowledged, ", None);
    let mut count = |metric, goal, value| report.add(Peer::Millrace, metric, goal, value);
    count("records", None, written as f64);
    count("records missed", Some(Goal::AtMost(0.0)), missed as f64);
    count("records read twice", None, twice as f64);
    ensure!(missed == 0, "{missed} of {written} records were missed");
    Ok(())
}

async fn meanwhile(command: &str) -> Result<()> {
    let mut shell = tokio::process::Command::new("sh");
    shell.args(["-c", command]).stdout(Stdio::null());
    let status = shell.status().await?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

/// Waits until all is read that the topic has; how much was not, and how much more than once.
async fn check(client: &Client, shared: &Shared, written: u64) -> Result<(u64, u64)> {
    let begun = Instant::now();
    let mut ends = Vec::new();
    for partition in (0..).take(shared.reads.len()) {
        let latest = OffsetSpec::Latest;
        let end = client.list_offset(TOPIC, partition, latest).await?;
        ends.push(end.map_or(0, |at| at.offset) as usize);
    }
    let held = ends.iter().sum::<usize>() as u64;
    ensure!(
        held == written,
        "{written} records were acknowledged, but topic {TOPIC} has {held}"
    );
    loop {
        let (mut missed, mut twice) = (0, 0);
        for (read, end) in shared.reads.iter().zip(&ends) {
            let read = read.lock();
            let times = (0..*end).map(|offset| read.times.get(offset).copied().unwrap_or(0));
            for times in times {
                missed += u64::from(times == 0);
                twice += u64::from(times.saturating_sub(1));
            }
        }
        if missed == 0 || begun.elapsed() > DRAINED_WITHIN {
            return Ok((missed, twice));
        }
        sleep(Duration::from_millis(200)).await;
    }
}
