//! `millrace-bench`: compares Millrace with Apache Kafka, and with what the machine can do at best.
//!
//! Both brokers run on this machine, in the same run, one at a time, in alternating rounds, each on a fresh folder of the same
//! disk. A table shows the median of the rounds and their spread. A benchmark checks what it counts: all that was sent must be
//! acknowledged, and be in the log. Not responsible for correctness beyond that: the tests are.

mod catchup;
mod compaction;
mod connections;
mod failover;
mod fetch;
mod fsync;
mod groups;
mod growth;
mod latency;
mod layouts;
mod limits;
mod live;
mod machine;
mod pace;
mod partitions;
mod peer;
mod produce;
mod rebalance;
mod replicated;
mod table;
mod throughput;
mod transactions;
mod trio;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Args, Command, Parser, Subcommand};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

use crate::peer::{Durability, Peer, Peers};
use crate::table::Report;
use crate::throughput::{Case, Plan, throughput};

/// Heads Kafka's column. The version is that of `kafka/pom.xml`.
const KAFKA: &str = "Kafka 4.1.1";

/// Compares Millrace with Apache Kafka, side by side on this machine.
#[derive(Parser)]
#[command(name = "millrace-bench", version)]
struct Cli {
    /// How often each broker is measured.
    #[arg(long, global = true, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Which brokers to measure.
    #[arg(long, global = true, value_delimiter = ',', default_values = ["millrace", "kafka"])]
    peers: Vec<Peer>,
    /// Where the brokers keep their data meanwhile. By default a folder beside this program.
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
    /// One more argument for Millrace's broker.
    #[arg(long = "broker-arg", global = true, allow_hyphen_values = true)]
    broker_args: Vec<String>,
    #[command(subcommand)]
    load: Load,
}

#[derive(Subcommand)]
enum Load {
    /// One producer, as fast as it can.
    Produce(Throughput),
    /// One consumer, from the beginning, as fast as it can.
    Fetch(Throughput),
    /// End-to-end latency at a steady rate.
    Latency(latency::Options),
    /// Many producers, each with its own connection and partition.
    Connections(connections::Options),
    /// One producer, acknowledged when on the disk.
    Fsync(fsync::Options),
    /// Shares of what disk and gRPC can do at best.
    Limits(limits::Options),
    /// Very many partitions in one broker.
    Partitions(partitions::Options),
    /// Three brokers, one of which fails: the longest gap between acknowledged writes.
    Failover(failover::Options),
    /// Three brokers, all with all records: one producer, as fast as it can.
    Replicated(replicated::Options),
    /// Three brokers, one of which fetches everything anew: what live traffic notices, and how long it takes.
    Catchup(catchup::Options),
    /// Three brokers with ever more partitions: start, throughput, latency, memory, failover.
    Growth(growth::Options),
    /// Many members of one group, and many groups.
    Groups(groups::Options),
    /// Consumers of a group that come, go and die while records flow.
    Rebalance(rebalance::Options),
    /// Records of the same keys again and again, of which the last ones are to be left.
    Compaction(compaction::Options),
    /// Transactions, one after another.
    Transactions(transactions::Options),
    /// All on one broker, as the README shows them.
    All {
        /// Short loads, to see that everything works. The figures mean nothing.
        #[arg(long)]
        quick: bool,
    },
    /// Layouts of batches in RocksDB, without a broker.
    Layouts(layouts::Options),
    /// The other end of `limits`' gRPC stream.
    #[command(hide = true)]
    GrpcSink { port: u16 },
}

#[derive(Args)]
struct Throughput {
    /// Bytes of each value.
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1_000])]
    sizes: Vec<usize>,
    /// Bytes of values to send, for each size; in MB.
    #[arg(long, default_value_t = 1_000)]
    volume_mb: u64,
    /// Records to send, in place of --volume-mb.
    #[arg(long)]
    records: Option<u64>,
    #[arg(long, default_value_t = 6)]
    partitions: u32,
    #[arg(long, default_value_t = 5)]
    linger_ms: u64,
    #[arg(long, default_value_t = 128)]
    batch_kib: usize,
}

/// What all benchmarks share.
struct Bench {
    peers: Peers,
    chosen: Vec<Peer>,
    rounds: u32,
    work: PathBuf,
}

impl Bench {
    /// Whose turn it is: each peer once in each round, another one first each time.
    fn turns(&self, name: &str) -> impl Iterator<Item = Peer> {
        (0..self.rounds).flat_map(move |round| {
            let mut order = self.chosen.clone();
            order.rotate_left(round as usize % self.chosen.len());
            let name = name.to_owned();
            order.into_iter().inspect(move |peer| {
                eprintln!("{name}, round {} of {}: {peer:?}", round + 1, self.rounds);
            })
        })
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    raise_open_files();
    // A task, as an app's work is: on the main thread each record that comes would have to wake another thread.
    let mut work = tokio::spawn(run(cli));
    let result = tokio::select! {
        result = &mut work => result.unwrap_or_else(|error| Err(error.into())),
        signal = stopped() => {
            // Ends when `run` has been dropped, and with it every process and folder that it made.
            work.abort();
            let _ = work.await;
            signal.and_then(|signal| bail!("stopped by {signal}"))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("millrace-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn stopped() -> Result<&'static str> {
    let (mut terminate, mut hang_up) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::hangup())?,
    );
    tokio::select! {
        result = tokio::signal::ctrl_c() => result.map(|()| "Ctrl-C").context("can't wait for Ctrl-C"),
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = hang_up.recv() => Ok("SIGHUP"),
    }
}

async fn run(cli: Cli) -> Result<()> {
    if let Load::GrpcSink { port } = cli.load {
        return limits::grpc_sink(port).await;
    }
    let base = match cli.dir {
        Some(dir) => dir,
        None => {
            let exe = std::env::current_exe()?;
            exe.parent()
                .context("this program has no folder")?
                .join("bench-data")
        }
    };
    std::fs::create_dir_all(&base).with_context(|| format!("can't make {}", base.display()))?;
    let work = tempfile::Builder::new().prefix("run-").tempdir_in(&base)?;
    let mut chosen = cli.peers;
    match cli.load {
        Load::Limits(_) | Load::Rebalance(_) => chosen = vec![Peer::Millrace],
        Load::Layouts(_) => chosen.clear(),
        _ => {}
    }
    let bench = Bench {
        peers: Peers::find(&chosen, work.path().to_owned(), cli.broker_args).await?,
        chosen,
        rounds: cli.rounds,
        work: work.path().to_owned(),
    };
    let kafka = match cli.load {
        Load::Failover(_) | Load::Replicated(_) | Load::Catchup(_) | Load::Growth(_) => {
            "three KRaft nodes, each broker and controller, 1 GiB heap each"
        }
        _ => "single KRaft node, 1 GiB heap",
    };
    let kafka = bench.chosen.contains(&Peer::Kafka).then_some(kafka);
    let machine = machine::description(&bench.work, kafka).await?;
    let command: Vec<_> = std::env::args().skip(1).collect();
    print!("{machine}- `millrace-bench {}`", command.join(" "));
    match cli.load {
        Load::Failover(_) => println!("\n"),
        _ => println!(
            ": median (min–max) of {} alternating rounds\n",
            bench.rounds
        ),
    }
    match cli.load {
        Load::Produce(options) => show(both(&bench, &options, true, false).await?),
        Load::Fetch(options) => show(both(&bench, &options, false, true).await?),
        Load::Latency(options) => show(latency::latency(&bench, &options).await?),
        Load::Connections(options) => show(connections::connections(&bench, &options).await?),
        Load::Fsync(options) => show(fsync::fsync(&bench, &options).await?),
        Load::Limits(options) => show(limits::limits(&bench, &options).await?),
        Load::Partitions(options) => show(partitions::partitions(&bench, &options).await?),
        Load::Failover(options) => println!("{}", failover::failover(&bench, &options).await?),
        Load::Replicated(options) => show(replicated::replicated(&bench, &options).await?),
        Load::Catchup(options) => show(catchup::catchup(&bench, &options).await?),
        Load::Growth(options) => {
            for report in growth::growth(&bench, &options).await? {
                show(report);
            }
        }
        Load::Groups(options) => show(groups::groups(&bench, &options).await?),
        Load::Rebalance(options) => show(rebalance::rebalance(&bench, &options).await?),
        Load::Compaction(options) => show(compaction::compaction(&bench, &options).await?),
        Load::Transactions(options) => show(transactions::transactions(&bench, &options).await?),
        Load::All { quick } => all(&bench, quick).await?,
        Load::Layouts(options) => {
            println!("{}", layouts::layouts(&bench, &options).await?.markdown())
        }
        Load::GrpcSink { .. } => {}
    }
    Ok(())
}

async fn all(bench: &Bench, quick: bool) -> Result<()> {
    let short = |args: &'static str| if quick { args } else { "" };
    show(both(bench, &parsed(short("--volume-mb 50"))?, true, true).await?);
    let options = parsed(short("--seconds 5 --warm-up 2"))?;
    show(latency::latency(bench, &options).await?);
    let options = parsed(short("--producers 100 --seconds 5 --warm-up 2"))?;
    show(connections::connections(bench, &options).await?);
    let options = parsed(short("--records 5000"))?;
    show(fsync::fsync(bench, &options).await?);
    if bench.chosen.contains(&Peer::Millrace) {
        let options = parsed(short("--volume-mib 100 --synced-mib 20"))?;
        show(limits::limits(bench, &options).await?);
    }
    let options = parsed(short("--partitions 500 --records 100000"))?;
    show(partitions::partitions(bench, &options).await?);
    Ok(())
}

/// Options as from a command line of their own.
fn parsed<T: Args>(args: &str) -> Result<T> {
    let command = T::augment_args(Command::new("all").no_binary_name(true));
    let matches = command.try_get_matches_from(args.split_whitespace())?;
    Ok(T::from_arg_matches(&matches)?)
}

/// Produce, fetch, or both on the same data.
async fn both(bench: &Bench, options: &Throughput, produce: bool, fetch: bool) -> Result<Report> {
    let cases = options.sizes.iter().map(|size| Case {
        name: format!("{size} B"),
        size: *size,
        records: options
            .records
            .unwrap_or(options.volume_mb * 1_000_000 / (*size).max(1) as u64),
        batch_bytes: options.batch_kib * 1024,
    });
    let plan = Plan {
        title: match (produce, fetch) {
            (true, true) => "One producer, acks=all, then one consumer of the same data",
            (false, _) => "One consumer, from the beginning",
            (true, false) => "One producer, acks=all",
        },
        durability: Durability::Os,
        partitions: options.partitions,
        linger_ms: options.linger_ms,
        cases: cases.collect(),
        produce: produce.then_some(2.0),
        fetch: fetch.then_some(2.0),
    };
    throughput(bench, &plan).await
}

fn show(report: Report) {
    println!("{}", report.markdown());
}

/// Thousands of connections need more than the usual 1,024 open files, in the brokers too, which inherit this.
fn raise_open_files() {
    const WANTED: u64 = 1 << 17;
    let now = getrlimit(Resource::Nofile);
    let wanted = Rlimit {
        current: Some(WANTED),
        maximum: Some(WANTED),
    };
    if now.current.is_some_and(|current| current < WANTED)
        && setrlimit(Resource::Nofile, wanted).is_err()
    {
        // Only root may go beyond the hard limit.
        let up_to_maximum = Rlimit {
            current: now.maximum,
            ..now
        };
        if let Err(error) = setrlimit(Resource::Nofile, up_to_maximum) {
            eprintln!("can't raise the limit of open files: {error}");
        }
    }
}
