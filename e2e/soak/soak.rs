//! One run: brokers, load, faults, mending, check.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use millrace_e2e::history::{self, Event, Recorder};
use millrace_e2e::kubernetes::Kubernetes;
use tokio::task::{JoinSet, block_in_place, spawn_blocking};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::consumers::{Reader, ends};
use crate::copiers::{Copied, compare as compare_copy, copied_up_to, copy};
use crate::load::{Load, TOPIC};
use crate::nemesis::Nemesis;
use crate::plan::{Kind, Plan};
use crate::pods::{PodBrokers, run_on_a_node};
use crate::processes::Processes;
use crate::producers::{DELIVERY_TIMEOUT, produce};
use crate::replicas::compare;
use crate::summary;
use crate::target::Target;

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How long things break: 60s, unless --until-faults says when it is enough.
    #[arg(long)]
    duration: Option<humantime::Duration>,
    /// Things break until so many faults have come.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    until_faults: Option<u32>,
    /// Break pods of a real Kubernetes instead of processes of this machine: the one that e2e/cluster starts, as root, or the one that KUBECONFIG
    /// names, if pods and Services can be reached from here.
    #[arg(long)]
    kubernetes: bool,
    /// It runs in the network of a node already.
    #[arg(long, hide = true)]
    on_a_node: bool,
    /// Which faults come when. By default another one each time.
    #[arg(long)]
    seed: Option<u64>,
    /// What may break, as far as it can be broken where the brokers are. By default all of it.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Kind::value_variants().to_vec())]
    pub(crate) faults: Vec<Kind>,
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) brokers: i32,
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(i32).range(1..))]
    pub(crate) partitions: i32,
    #[arg(long, default_value_t = 3)]
    pub(crate) replicas: usize,
    #[arg(long, default_value_t = 2)]
    pub(crate) min_in_sync: usize,
    #[arg(long, default_value_t = 3)]
    pub(crate) producers: u32,
    /// Records a second of each producer.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rate: u32,
    #[arg(long, default_value_t = 2)]
    consumers: u32,
    /// Members of a group that copy all of it into another topic, exactly once.
    #[arg(long, default_value_t = 2)]
    pub(crate) copiers: u32,
    /// Bytes of each value.
    #[arg(long, default_value_t = 100)]
    pub(crate) size: usize,
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
    pub(crate) durability: String,
    /// Another version's broker, such as e2e/previous builds: a broker that was killed, restarted or wiped goes on in the other version than before.
    #[arg(long, value_name = "PROGRAM", conflicts_with = "kubernetes")]
    pub(crate) other_broker: Option<PathBuf>,
    /// One more argument for each broker that is a process.
    #[arg(long = "broker-arg", allow_hyphen_values = true)]
    pub(crate) broker_args: Vec<String>,
}

impl Options {
    /// It takes no longer than that, as far as one can tell.
    pub(crate) fn longest(&self) -> Duration {
        /// A fault lasts 30 s at most, and half a minute may pass until the next one.
        const FAULT: Duration = Duration::from_secs(60);
        match (self.duration, self.until_faults) {
            (Some(duration), _) => duration.into(),
            (None, Some(faults)) => FAULT * faults,
            (None, None) => Duration::from_secs(60),
        }
    }
}

pub(crate) async fn soak(options: Options) -> Result<()> {
    if options.kubernetes && !options.on_a_node && std::env::var_os("KUBECONFIG").is_none() {
        return run_on_a_node(&options).await;
    }
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    let exe = std::env::current_exe()?;
    let beside = exe.parent().context("this program has no folder")?;
    let folder = options
        .folder
        .clone()
        .unwrap_or_else(|| beside.join("soak-data").join(seed.to_string()));
    if folder.exists() {
        let removed = std::fs::remove_dir_all(&folder);
        // A run that was killed has left its volumes mounted.
        removed.with_context(|| {
            format!(
                "can't remove {}, which an earlier run has left: `umount` what is mounted there",
                folder.display()
            )
        })?;
    }
    std::fs::create_dir_all(&folder)?;
    eprintln!("seed {seed}, {}", folder.display());
    let outcome = if options.kubernetes {
        run_on_pods(&options, seed, &folder).await
    } else {
        run_on_processes(&options, seed, &folder).await
    };
    let outcome = outcome.and_then(|()| no_panics(&folder, options.brokers));
    if let Err(error) = outcome {
        let again = std::env::args().skip(1);
        let again: Vec<String> = again.filter(|word| word != "--on-a-node").collect();
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

/// A task of a broker that panicked need not end its process.
fn no_panics(folder: &Path, brokers: i32) -> Result<()> {
    for id in 0..brokers {
        let log = folder.join(format!("broker-{id}/log"));
        let text = std::fs::read(&log).with_context(|| format!("can't read {}", log.display()))?;
        let text = String::from_utf8_lossy(&text);
        let panic = text.lines().find(|line| line.contains("panicked at"));
        ensure!(
            panic.is_none(),
            "broker {id}: {}",
            panic.unwrap_or_default()
        );
    }
    Ok(())
}

async fn run_on_processes(options: &Options, seed: u64, folder: &Path) -> Result<()> {
    let mut processes = Processes::start(options, folder).await?;
    let outcome = break_things(options, seed, folder, &mut processes).await;
    if outcome.is_err() || options.keep {
        processes.keep_data()?;
    }
    outcome
}

async fn run_on_pods(options: &Options, seed: u64, folder: &Path) -> Result<()> {
    let kubernetes = block_in_place(Kubernetes::start);
    let mut pods = PodBrokers::start(&kubernetes, options, folder).await?;
    let outcome = break_things(options, seed, folder, &mut pods).await;
    if outcome.is_err() {
        pods.mend_all();
    }
    pods.uninstall()?;
    outcome
}

async fn break_things(
    options: &Options,
    seed: u64,
    folder: &Path,
    target: &mut impl Target,
) -> Result<()> {
    let asked = options.faults.iter().copied();
    let (kinds, others): (Vec<_>, Vec<_>) = asked.partition(|kind| target.can_break(*kind));
    if !others.is_empty() {
        let names: Vec<_> = others.into_iter().map(Kind::name).collect();
        eprintln!("left out, as it can't be broken here: {}", names.join(", "));
    }
    ensure!(
        !kinds.is_empty() || options.until_faults.is_none(),
        "--until-faults: nothing is left that can be broken"
    );
    let path = history_file(folder);
    let recorder = Recorder::create(&path)?;
    let load = Load::new(
        target.bootstrap(),
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

    let copied = Arc::new(Copied::default());
    let stop_copying = CancellationToken::new();
    let mut copiers = JoinSet::new();
    for index in 0..options.copiers {
        let seed = seed ^ u64::from(index + 1) << 48;
        let (load, copied, stop) = (load.clone(), copied.clone(), stop_copying.clone());
        copiers.spawn(copy(load, copied, index, seed, stop));
    }

    let mut nemesis = Nemesis {
        target,
        load: &load,
        min_in_sync: options.min_in_sync,
        whole_within: options.whole_within.into(),
        own_ends: Vec::new(),
        problems: Vec::new(),
    };
    let plan = Plan::new(seed, kinds, options.brokers);
    let faults_max = options
        .until_faults
        .map_or(usize::MAX, |most| most as usize);
    let duration = match (options.duration, options.until_faults) {
        (None, Some(_)) => Duration::MAX,
        _ => options.longest(),
    };
    let faults = tokio::select! {
        faults = nemesis.run(plan, duration, faults_max) => faults?,
        ended = first_failure(&mut producers) => bail!("a producer's task ended: {:?}", ended.err()),
        ended = first_failure(&mut consumers) => bail!("a consumer's task ended: {:?}", ended.err()),
        ended = first_failure(&mut copiers) => bail!("a copier's task ended: {:?}", ended.err()),
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
    if let Some(ends) = ends.as_ref().filter(|_| options.copiers > 0) {
        const WITHIN: Duration = Duration::from_secs(180);
        match timeout(WITHIN, copied_up_to(&load, ends)).await {
            Ok(done) => done?,
            Err(_) => problems.push(format!("the copy is not whole after {WITHIN:?}")),
        }
        stop_copying.cancel();
        while copiers
            .join_next()
            .await
            .transpose()?
            .transpose()?
            .is_some()
        {}
        println!("{}", copied.summary());
        if let Err(error) = compare_copy(&load, ends).await {
            problems.push(format!("the copy: {error:#}"));
        }
    }
    load.recorder.flush()?;
    let stores = match &ends {
        Some(_) => target.end().await?,
        None => None,
    };
    match ends.zip(stores) {
        Some((ends, brokers)) => {
            let copies = options.replicas;
            let compared =
                spawn_blocking(move || compare(&brokers, TOPIC, &ends, copies)).await??;
            println!("{compared}");
            problems.extend(compared.difference);
        }
        None => println!(
            "replicas: not compared: what is committed, or where the volumes are, is not known"
        ),
    }
    report(&path, &load, faults, &own_ends, &problems)
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
