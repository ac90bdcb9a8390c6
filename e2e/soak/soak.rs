//! One run: brokers, load, faults, mending, check.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use millrace_e2e::fleet::{Fleet, FleetSetup, NewTopic};
use millrace_e2e::history::{self, Event, Recorder};
use millrace_e2e::volume::Volume;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::consumers::{Reader, ends};
use crate::load::{Load, TOPIC};
use crate::nemesis::Nemesis;
use crate::plan::{Kind, Plan};
use crate::producers::{DELIVERY_TIMEOUT, produce};
use crate::replicas::compare;
use crate::summary;

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How long things break.
    #[arg(long, default_value = "60s")]
    duration: humantime::Duration,
    /// Which faults come when. By default another one each time.
    #[arg(long)]
    seed: Option<u64>,
    /// What may break. By default all of it.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Kind::value_variants().to_vec())]
    faults: Vec<Kind>,
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..))]
    brokers: i32,
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(i32).range(1..))]
    partitions: i32,
    #[arg(long, default_value_t = 3)]
    replicas: usize,
    #[arg(long, default_value_t = 2)]
    min_in_sync: usize,
    #[arg(long, default_value_t = 3)]
    producers: u32,
    /// Records a second of each producer.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    #[arg(long, default_value_t = 2)]
    consumers: u32,
    /// Bytes of each value.
    #[arg(long, default_value_t = 100)]
    size: usize,
    /// After all is mended, each partition must have its leader and all replicas in sync within this time.
    #[arg(long, default_value = "60s")]
    whole_within: humantime::Duration,
    /// Where brokers' data, their logs and the history go; it is made, and removed unless the run fails. By default beside this program.
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Keep the folder in any case.
    #[arg(long)]
    keep: bool,
    /// When brokers acknowledge: `os` or `fsync`. Without fsync a slow disk is no fault.
    #[arg(long, default_value = "fsync", value_parser = ["os", "fsync"])]
    durability: String,
    /// One more argument for each broker.
    #[arg(long = "broker-arg", allow_hyphen_values = true)]
    broker_args: Vec<String>,
}

pub(crate) async fn soak(options: Options) -> Result<()> {
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    let exe = std::env::current_exe()?;
    let beside = exe.parent().context("this program has no folder")?;
    let folder = options
        .folder
        .clone()
        .unwrap_or_else(|| beside.join("soak-data").join(seed.to_string()));
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    eprintln!("seed {seed}, {}", folder.display());
    let outcome = run(&options, seed, &folder, &beside.join("millrace-broker")).await;
    if let Err(error) = outcome {
        let again: Vec<String> = std::env::args().skip(1).collect();
        let seed_flag = if options.seed.is_some() {
            String::new()
        } else {
            format!(" --seed {seed}")
        };
        bail!(
            "{error:#}\nseed {seed}: again with `millrace-e2e {}{seed_flag}`\nkept: {}; checked again with `millrace-e2e check {}`",
            again.join(" "),
            folder.display(),
            history_file(&folder).display()
        );
    }
    if !options.keep {
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(())
}

fn history_file(folder: &Path) -> PathBuf {
    folder.join("history.jsonl")
}

async fn run(options: &Options, seed: u64, folder: &Path, program: &Path) -> Result<()> {
    ensure!(
        program.is_file(),
        "{} does not exist: build it first, with `cargo build --release -p millrace-broker`",
        program.display()
    );
    let mut kinds = options.faults.clone();
    if kinds.contains(&Kind::FillDisk)
        && let Err(error) = Volume::can_be_mounted()
    {
        eprintln!("left out: fill-disk: {error:#}");
        kinds.retain(|kind| *kind != Kind::FillDisk);
    }
    let mut args = vec!["--durability".to_owned(), options.durability.clone()];
    args.extend_from_slice(&options.broker_args);
    let setup = FleetSetup {
        program: program.to_owned(),
        folder: folder.to_owned(),
        brokers: options.brokers,
        args,
        breakable: true,
        volume_bytes: kinds
            .contains(&Kind::FillDisk)
            .then(|| volume_bytes(options)),
        slow_disks: kinds.contains(&Kind::SlowDisk),
    };
    let mut fleet = Fleet::start(setup).await?;
    let outcome = break_things(options, seed, folder, kinds, &mut fleet).await;
    if outcome.is_err() || options.keep {
        fleet.keep_data()?;
    }
    outcome
}

async fn break_things(
    options: &Options,
    seed: u64,
    folder: &Path,
    kinds: Vec<Kind>,
    fleet: &mut Fleet,
) -> Result<()> {
    let topic = NewTopic {
        name: TOPIC,
        partitions: options.partitions,
        replicas: options.replicas,
        min_in_sync: options.min_in_sync,
    };
    fleet.create_topic(topic).await?;
    let path = history_file(folder);
    let recorder = Recorder::create(&path)?;
    let load = Load::new(
        fleet.bootstrap(),
        options.partitions,
        options.size,
        recorder,
    );

    let stop = CancellationToken::new();
    let numbers = Arc::new(AtomicU32::new(0));
    let interval = Duration::from_secs(1) / options.rate;
    let mut producers = JoinSet::new();
    for index in 0..options.producers {
        let seed = seed ^ u64::from(index + 1) << 32;
        let (load, numbers) = (load.clone(), numbers.clone());
        producers.spawn(produce(load, numbers, seed, interval, stop.clone()));
    }
    let readers: Vec<_> = (0..options.consumers)
        .map(|id| Reader::new(id, options.partitions))
        .collect();
    let mut consumers = JoinSet::new();
    for reader in &readers {
        consumers.spawn(reader.clone().read(load.clone()));
    }

    let mut nemesis = Nemesis {
        fleet,
        load: &load,
        min_in_sync: options.min_in_sync,
        whole_within: options.whole_within.into(),
        own_ends: Vec::new(),
        problems: Vec::new(),
    };
    let plan = Plan::new(seed, kinds, options.brokers);
    let faults = tokio::select! {
        faults = nemesis.run(plan, options.duration.into()) => faults?,
        ended = first_failure(&mut producers) => bail!("a producer's task ended: {:?}", ended.err()),
        ended = first_failure(&mut consumers) => bail!("a consumer's task ended: {:?}", ended.err()),
    };
    // Also what ended just before.
    nemesis.wait(Duration::from_secs(2)).await?;
    nemesis.become_whole("after the last fault").await?;
    let Nemesis {
        own_ends,
        mut problems,
        ..
    } = nemesis;

    stop.cancel();
    let all_answered = async {
        while producers
            .join_next()
            .await
            .transpose()?
            .transpose()?
            .is_some()
        {}
        Ok::<_, anyhow::Error>(())
    };
    match timeout(2 * DELIVERY_TIMEOUT, all_answered).await {
        Ok(answered) => answered?,
        Err(_) => {
            problems.push("some records have no outcome long after their time-out".to_owned())
        }
    }
    let ends = drain(options, &load, &readers, &mut problems).await?;
    drop(consumers);
    load.recorder.flush()?;
    match ends {
        Some(ends) => {
            let brokers = fleet.end();
            let copies = options.replicas;
            let compared =
                spawn_blocking(move || compare(&brokers, TOPIC, &ends, copies)).await??;
            println!("{compared}");
            problems.extend(compared.difference);
        }
        None => println!("replicas: not compared, as it is not known what is committed"),
    }
    report(&path, &load, faults, &own_ends, &problems)
}

/// Room for all that the load writes, more than once while RocksDB moves it, and for logs and buffers beside the reserve. It is memory: what is
/// not needed is taken only while it is filled.
fn volume_bytes(options: &Options) -> u64 {
    /// What a record costs at most beside its value, in a batch of its own.
    const RECORD: u64 = 150;
    let records = options.duration.as_secs() * u64::from(options.rate * options.producers);
    (512 << 20) + 3 * records * (options.size as u64 + RECORD)
}

/// Returns when a task ends though it was not told to.
async fn first_failure(tasks: &mut JoinSet<Result<()>>) -> Result<()> {
    match tasks.join_next().await {
        Some(ended) => ended?,
        None => std::future::pending().await,
    }
}

/// Reads all of it once more, from the beginning, and waits for the other readers. Returns where the partitions end, if that could be done.
async fn drain(
    options: &Options,
    load: &Arc<Load>,
    readers: &[Arc<Reader>],
    problems: &mut Vec<String>,
) -> Result<Option<Vec<i64>>> {
    const WITHIN: Duration = Duration::from_secs(120);
    let ends = match ends(load).await {
        Ok(ends) => ends,
        Err(error) => {
            problems.push(format!("the log can't be read to its end: {error:#}"));
            return Ok(None);
        }
    };
    let last = Reader::new(options.consumers, options.partitions);
    let reading = last.clone().read(load.clone());
    let reached = |reader: Arc<Reader>| {
        let ends = &ends;
        async move {
            while !reader.has_reached(ends) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    };
    tokio::select! {
        ended = reading => ended?,
        all = timeout(WITHIN, reached(last.clone())) => {
            if all.is_err() {
                problems.push(format!("a reader did not get from the beginning to the end in {WITHIN:?}"));
                return Ok(None);
            }
        }
    }
    for reader in readers {
        if timeout(WITHIN, reached(reader.clone())).await.is_err() {
            problems.push(format!(
                "a consumer does not reach the end of the log in {WITHIN:?}"
            ));
        }
    }
    for (partition, end) in (0..).zip(ends.iter().copied()) {
        load.record(&Event::Drained { partition, end })?;
    }
    Ok(Some(ends))
}

fn report(
    path: &Path,
    load: &Load,
    faults: usize,
    own_ends: &[String],
    problems: &[String],
) -> Result<()> {
    let events = history::read(path)?;
    let verdict = history::check(&events);
    println!("{}\n", summary::faults(&events));
    println!(
        "{faults} faults; brokers that ended by themselves: {}",
        own_ends.len()
    );
    for (kind, count, example) in load.errors() {
        println!("{kind}: {count} times, first: {example}");
    }
    println!("{}", summary::verdict(&verdict));
    for problem in problems {
        println!("problem: {problem}");
    }
    ensure!(
        verdict.violations.is_empty() && problems.is_empty(),
        "{} violations, {} problems",
        verdict.violations.len(),
        problems.len()
    );
    Ok(())
}
