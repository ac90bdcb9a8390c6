//! Consumers of one group that come, go and die while records flow: how long until the partitions are shared again, for how long those pause that
//! move and those that don't, what is read twice, and that nothing is missed.
//!
//! Each cycle joins consumers one by one, kills some of them (their connections break, without a farewell), and has others leave one by one. Every
//! record that was acknowledged must have been read by someone in the end.

use std::collections::{BTreeMap, HashMap};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::FutureExt;
use hdrhistogram::Histogram;
use millrace_client::{
    Client, ConsumedRecord, Consumer, ErrorKind, OffsetSpec, Record, StartFrom,
    TransactionalProducer,
};
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, BufReader};
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
    /// Each copies what it reads into the topic `rebalanced-copy`, exactly once: in transactions that commit what was read, too.
    #[arg(long)]
    exactly_once: bool,
    /// A command that is run at each cycle's peak, such as one that restarts the brokers. Each line of its output is a partition and the offset of a record
    /// that it has read in the group.
    #[arg(long)]
    meanwhile: Option<String>,
}

const TOPIC: &str = "rebalanced";
const COPY: &str = "rebalanced-copy";
const GROUP: &str = "rebalanced";
/// A killed consumer's transaction is aborted after this, or when one with its id comes.
const TRANSACTION_TIMEOUT: Duration = Duration::from_secs(5);
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
                let topics = [TOPIC, COPY].map(|name| Topic::new(name, options.partitions));
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
    /// Transactions that were.
    aborted: AtomicU64,
}

/// How a consumer ends.
enum End {
    Leave,
    Die,
}

struct Member {
    slot: u32,
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

impl Shared {
    fn read(&self, by: usize, partition: i32, offset: i64) -> Result<()> {
        let read = self.reads.get(usize::try_from(partition)?);
        let read = read.context("a record of an unknown partition")?;
        read.lock().record(by, offset);
        Ok(())
    }
}

/// A consumer, which may copy what it reads.
struct Reader {
    id: usize,
    consumer: Consumer,
    copier: Option<TransactionalProducer>,
    shared: Arc<Shared>,
}

impl Reader {
    /// Reads what is there, if there is anything soon.
    async fn read(&mut self) -> Result<()> {
        let Ok(first) = timeout(LOOK, self.consumer.next_record()).await else {
            return Ok(());
        };
        let mut records = vec![first.context("the consumer ended by itself")??];
        while records.len() < RECORDS_AT_A_TIME
            && let Some(next) = self.consumer.next_record().now_or_never()
        {
            records.push(next.context("the consumer ended by itself")??);
        }
        if let Some(copier) = &mut self.copier
            && let Err(error) = copy(copier, &mut self.consumer, &records).await
        {
            if error.kind() == ErrorKind::FencedProducer {
                return Err(error.into());
            }
            self.shared.aborted.fetch_add(1, Ordering::Relaxed);
            self.consumer.rewind().await?;
            return Ok(());
        }
        for record in &records {
            let (partition, offset) = (record.partition, record.record.offset);
            self.shared.read(self.id, partition, offset)?;
        }
        Ok(())
    }
}

async fn copy(
    copier: &mut TransactionalProducer,
    consumer: &mut Consumer,
    records: &[ConsumedRecord],
) -> Result<(), millrace_client::Error> {
    let transaction = copier.begin().await?;
    for consumed in records {
        let mut record = Record::to(COPY).partition(consumed.partition);
        record.value = consumed.record.value.clone();
        // Where it was: what the copy is compared by.
        record.key = Some(consumed.record.offset.to_be_bytes().to_vec().into());
        transaction.send(record).await?;
    }
    transaction.send_offsets(consumer).await?;
    transaction.commit().await
}

async fn consume(
    client: Client,
    shared: Arc<Shared>,
    id: usize,
    transactional_id: Option<String>,
    mut end: oneshot::Receiver<End>,
) -> Result<()> {
    let copier = match transactional_id {
        Some(id) => {
            let producer = client.producer().linger(LINGER);
            let producer = producer.transaction_timeout(TRANSACTION_TIMEOUT);
            Some(producer.build_transactional(id).await?)
        }
        None => None,
    };
    let consumer = client.consumer().topic(TOPIC).group(GROUP);
    let consumer = consumer.start(StartFrom::Earliest);
    let interval = copier.is_none().then_some(Duration::from_secs(1));
    let mut reader = Reader {
        id,
        consumer: consumer.auto_commit(interval).build().await?,
        copier,
        shared,
    };
    loop {
        reader.read().await?;
        let owned = reader.consumer.assignment().into_iter();
        let owned = owned.map(|(_, partition)| partition).collect();
        reader.shared.owned.lock().insert(id, owned);
        match end.try_recv() {
            Ok(End::Leave) => {
                reader.consumer.close().await?;
                break;
            }
            Ok(End::Die) => break,
            Err(oneshot::error::TryRecvError::Closed) => bail!("the benchmark failed"),
            Err(oneshot::error::TryRecvError::Empty) => {}
        }
    }
    reader.shared.owned.lock().remove(&id);
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
    exactly_once: bool,
    /// Pauses of partitions that stayed where they were, and of all when nothing changed.
    stayed: Histogram<u64>,
    quiet: Histogram<u64>,
}

impl Group {
    async fn join(&mut self) -> Result<()> {
        let (end, ends) = oneshot::channel();
        let client = self.bootstrap.client().await?;
        let id = self.next;
        // That of one that is gone, if there is one: so its transaction is aborted.
        let slot = (0..).find(|slot| !self.members.values().any(|m| m.slot == *slot));
        let slot = slot.context("there is a number for each")?;
        let copier = self.exactly_once.then(|| format!("copier-{slot}"));
        let task = consume(client, self.shared.clone(), id, copier, ends);
        let task = tokio::spawn(task);
        self.members.insert(id, Member { slot, end, task });
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
        aborted: AtomicU64::new(0),
    });
    let histogram = || Histogram::<u64>::new(3);
    let mut group = Group {
        bootstrap: bootstrap.clone(),
        shared: shared.clone(),
        members: BTreeMap::new(),
        next: 0,
        exactly_once: options.exactly_once,
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
            meanwhile(command, &shared).await?;
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
    let mut wrong = missed;
    if options.exactly_once {
        let (missing, twice) = check_copy(&client, &shared).await?;
        let aborted = shared.aborted.load(Ordering::Relaxed);
        count(
            "records missing in the copy",
            Some(Goal::AtMost(0.0)),
            missing as f64,
        );
        count(
            "records twice in the copy",
            Some(Goal::AtMost(0.0)),
            twice as f64,
        );
        count("transactions aborted", None, aborted as f64);
        wrong += missing + twice;
    }
    ensure!(
        wrong == 0,
        "of {written} records some were missed, or copied twice"
    );
    Ok(())
}

async fn meanwhile(command: &str, shared: &Shared) -> Result<()> {
    let mut shell = tokio::process::Command::new("sh");
    shell.args(["-c", command]).stdout(Stdio::piped());
    let mut shell = shell.kill_on_drop(true).spawn()?;
    let output = shell.stdout.take().context("it is piped")?;
    let mut lines = BufReader::new(output).lines();
    while let Some(line) = lines.next_line().await? {
        let place = line.split_once(char::is_whitespace);
        let place = place.with_context(|| format!("{line:?} is no partition and offset"))?;
        shared.read(usize::MAX, place.0.parse()?, place.1.trim().parse()?)?;
    }
    let status = shell.wait().await?;
    ensure!(status.success(), "{command:?} failed: {status}");
    Ok(())
}

/// Compares the copy with the topic: how many records of it are missing in the copy, and how many are there more than once or not in their place.
async fn check_copy(client: &Client, shared: &Shared) -> Result<(u64, u64)> {
    let (mut missing, mut wrong) = (0, 0);
    for (partition, read) in (0..).zip(&shared.reads) {
        let expected = read.lock().times.len() as i64;
        let consumer = client.consumer().partitions(COPY, [partition]);
        let mut consumer = consumer.start(StartFrom::Earliest).build().await?;
        let mut next = 0;
        // One more would be wrong, and is waited for.
        loop {
            let patience = match next < expected {
                true => DRAINED_WITHIN,
                false => Duration::from_millis(500),
            };
            let Ok(record) = timeout(patience, consumer.next_record()).await else {
                break;
            };
            let record = record.context("the consumer ended by itself")??;
            let key = record
                .record
                .key
                .context("a record of the copy has no key")?;
            let offset = i64::from_be_bytes(key[..].try_into()?);
            wrong += u64::from(offset < next);
            missing += u64::try_from(offset - next).unwrap_or(0);
            next = next.max(offset + 1);
        }
        missing += u64::try_from(expected - next).unwrap_or(0);
    }
    Ok((missing, wrong))
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
