//! How long writes stand still when a broker fails.
//!
//! A producer writes to each partition at a short interval, with acks=all and idempotence, through whatever happens. In each run the broker
//! that leads the first partition fails in some way; what counts is the longest time between two acknowledgements of a partition that it
//! led, the worst of these partitions. Then it is mended, all replicas get in sync again, and the next run begins. Clients have their
//! default settings, but for the time-out of requests if it is given.

mod writer;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use comfy_table::Table;
use comfy_table::presets::ASCII_MARKDOWN;
use millrace_e2e::gaps::{is_steady, longest_gap, quantile};

use crate::Bench;
use crate::peer::{Peer, Topic};
use crate::trio::{Partition, REPLICAS, Trio};
use writer::Writer;

#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// How often each fault is tried with each kind of broker.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// What to try.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["stop", "kill", "hang", "cut", "isolate"])]
    faults: Vec<Fault>,
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..))]
    partitions: u32,
    /// Between two records of one partition: gaps are known to within this.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    interval_ms: u32,
    /// Bytes of each value.
    #[arg(long, default_value_t = 100)]
    size: usize,
    /// After which time the producers give a request up, in milliseconds: both clients' default, and what a hung leader costs at most where nothing
    /// else tells the client to look elsewhere.
    #[arg(long, default_value_t = 30_000)]
    request_timeout_ms: u32,
    /// Before each fault, wait until the brokers lead as many partitions each, give or take one.
    #[arg(long)]
    balanced: bool,
}

/// How a broker fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Fault {
    /// It is asked to stop (SIGTERM): a planned handover.
    Stop,
    /// Its process is killed (SIGKILL).
    Kill,
    /// Its process hangs (SIGSTOP).
    Hang,
    /// Its network cable is taken out.
    Cut,
    /// It does not reach the other brokers, though clients and, if it is a service of its own, the coordination service.
    Isolate,
}

const TOPIC: &str = "written";
/// Writes go on by themselves for so long before a fault, and must again after it.
const STEADY: Duration = Duration::from_secs(2);
const STEADY_NS: u64 = STEADY.as_nanos() as u64;
/// Writes that pause for so long are not steady.
const STILL_NS: u64 = 500_000_000;
/// Longer than any of the time-outs involved.
const RECOVERED_WITHIN: Duration = Duration::from_secs(180);

/// One failure.
struct Run {
    /// The longest gap, in nanoseconds.
    gap: u64,
    /// How many writes failed for good.
    errors: usize,
    /// How many partitions lost their leader.
    led: usize,
    /// From the failure until all goes on.
    lasted: Duration,
    /// How many Leases were written in that time.
    lease_writes: Option<u64>,
}

/// All runs of one fault.
struct Measured {
    peer: Peer,
    fault: Fault,
    runs: Vec<Run>,
}

/// The table, in Markdown.
pub(crate) async fn failover(bench: &Bench, options: &Options) -> Result<String> {
    let mut measured = Vec::new();
    for peer in &bench.chosen {
        let topics = [Topic::new(TOPIC, options.partitions)];
        let mut trio = bench.peers.start_three(*peer, true, &topics).await?;
        let mut writer = Writer::start(&trio.target(), TOPIC, options).await?;
        whole(&mut trio, &mut writer, options.balanced).await?;
        for fault in &options.faults {
            let mut of_fault = Measured {
                peer: *peer,
                fault: *fault,
                runs: Vec::new(),
            };
            for number in 1..=options.runs {
                let run = run(&mut trio, &mut writer, *fault, options.balanced)
                    .await
                    .with_context(|| format!("{peer:?}, {fault:?}, run {number}"))?;
                let ms = run.gap as f64 / 1e6;
                eprintln!(
                    "{peer:?}, {fault:?}, run {number} of {}: {ms:.1} ms",
                    options.runs
                );
                of_fault.runs.push(run);
            }
            measured.push(of_fault);
        }
        writer.stop().await?;
        trio.stop().await?;
    }
    Ok(table(options, &measured))
}

/// One failure and its mending.
async fn run(trio: &mut Trio, writer: &mut Writer, fault: Fault, balanced: bool) -> Result<Run> {
    writer.check().await?;
    let state = trio.describe(TOPIC).await?;
    let victim = state.first().and_then(|partition| partition.leader);
    let victim = victim.context("the first partition has no leader")?;
    let led: Vec<usize> = (0..state.len())
        .filter(|index| state[*index].leader == Some(victim))
        .collect();
    writer.forget();
    tokio::time::sleep(STEADY).await;
    let writes_before = trio.lease_writes().await?;
    let from = writer::now_ns();
    match fault {
        Fault::Stop => trio.begin_to_stop(victim)?,
        Fault::Kill => trio.kill(victim)?,
        Fault::Hang => trio.pause(victim)?,
        Fault::Cut => trio.cut_off(victim),
        Fault::Isolate => trio.isolate(victim),
    }
    let begun = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = writer::now_ns();
        let steady = led.iter().all(|index| {
            writer.acks(*index, |acks| {
                is_steady(acks, now.saturating_sub(STEADY_NS), now, STILL_NS)
            })
        });
        // What has not moved yet may still be about to.
        if steady {
            let state = trio.describe(TOPIC).await?;
            let moved = |index: &usize| {
                let leader = state.get(*index).and_then(|partition| partition.leader);
                leader.is_some_and(|leader| leader != victim)
            };
            if led.iter().all(moved) {
                break;
            }
        }
        ensure!(
            begun.elapsed() < RECOVERED_WITHIN,
            "writes do not go on after {RECOVERED_WITHIN:?}"
        );
    }
    let until = writer::now_ns();
    let lasted = begun.elapsed();
    let writes = trio.lease_writes().await?;
    let gaps = led
        .iter()
        .map(|index| writer.acks(*index, |acks| longest_gap(acks, from, until)));
    let run = Run {
        gap: gaps.max().unwrap_or_default(),
        errors: writer.errors(),
        led: led.len(),
        lasted,
        lease_writes: writes
            .zip(writes_before)
            .map(|(after, before)| after.saturating_sub(before)),
    };
    match fault {
        Fault::Hang => trio.resume(victim)?,
        Fault::Cut | Fault::Isolate => trio.heal(),
        Fault::Stop | Fault::Kill => {}
    }
    whole(trio, writer, balanced).await?;
    Ok(run)
}

/// Starts what has ended, and waits until all replicas are in sync and writes go on, and until leaders are balanced if that is asked for.
async fn whole(trio: &mut Trio, writer: &mut Writer, balanced: bool) -> Result<()> {
    let begun = Instant::now();
    loop {
        trio.start_ended()?;
        writer.check().await?;
        let whole =
            trio.is_whole(TOPIC).await? && (!balanced || is_balanced(&trio.describe(TOPIC).await?));
        let now = writer::now_ns();
        if whole && writer.all(|acks| is_steady(acks, now.saturating_sub(STEADY_NS), now, STILL_NS))
        {
            return Ok(());
        }
        ensure!(
            begun.elapsed() < RECOVERED_WITHIN,
            "not all replicas are in sync, leaders are not balanced, or writes do not go on, after {RECOVERED_WITHIN:?}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn is_balanced(partitions: &[Partition]) -> bool {
    let mut led = BTreeMap::<i32, usize>::new();
    for leader in partitions.iter().filter_map(|partition| partition.leader) {
        *led.entry(leader).or_default() += 1;
    }
    let (least, most) = (led.values().min(), led.values().max());
    led.len() == REPLICAS
        && most
            .zip(least)
            .is_some_and(|(most, least)| most - least <= 1)
}

impl Fault {
    fn title(self) -> &'static str {
        match self {
            Self::Stop => "planned handover (SIGTERM)",
            Self::Kill => "killed (SIGKILL)",
            Self::Hang => "hung (SIGSTOP)",
            Self::Cut => "cut off",
            Self::Isolate => "cut off from the other brokers only",
        }
    }

    /// What Millrace's p99 must reach.
    fn goal(self) -> Duration {
        /// That of brokers' sessions by default.
        const LEASE: Duration = Duration::from_secs(6);
        match self {
            Self::Stop => Duration::from_millis(200),
            Self::Kill => Duration::from_millis(1_500),
            Self::Hang | Self::Cut | Self::Isolate => LEASE + Duration::from_secs(1),
        }
    }
}

fn table(options: &Options, measured: &[Measured]) -> String {
    let mut table = Table::new();
    table.load_style(ASCII_MARKDOWN).set_header([
        "leader",
        "Millrace p50, ms",
        "p99",
        "max",
        "Kafka p50, ms",
        "p99",
        "max",
        "goal: p99, ms",
        "met",
    ]);
    let ms = |ns: u64| format!("{:.0}", ns as f64 / 1e6);
    for fault in &options.faults {
        let of = |peer| {
            let found = measured
                .iter()
                .find(|measured| measured.peer == peer && measured.fault == *fault);
            found.map(|measured| {
                let gaps: Vec<u64> = measured.runs.iter().map(|run| run.gap).collect();
                [0.5, 0.99, 1.0].map(|q| quantile(&gaps, q))
            })
        };
        let goal = u64::try_from(fault.goal().as_nanos()).unwrap_or(u64::MAX);
        let mut row = vec![fault.title().to_owned()];
        for peer in [Peer::Millrace, Peer::Kafka] {
            row.extend(of(peer).map_or_else(|| [const { String::new() }; 3], |at| at.map(ms)));
        }
        row.push(ms(goal));
        let met = of(Peer::Millrace).map(|[_, p99, _]| if p99 <= goal { "yes" } else { "no" });
        row.push(met.unwrap_or_default().to_owned());
        table.add_row(row);
    }
    let mut text = format!(
        "### Longest gap between acknowledged writes to a partition whose leader fails, {} runs of each\n\n{table}\n",
        options.runs
    );
    for Measured { peer, fault, runs } in measured {
        let errors: usize = runs.iter().map(|run| run.errors).sum();
        // Writing to a string can't fail.
        if errors > 0 {
            let _ = writeln!(
                text,
                "\n{peer:?}, {fault:?}: {errors} writes failed for good."
            );
        }
        let writes: Vec<u64> = runs.iter().filter_map(|run| run.lease_writes).collect();
        if !writes.is_empty() {
            let each = runs.len() as f64;
            let mean = writes.iter().sum::<u64>() as f64 / each;
            let led = runs.iter().map(|run| run.led).sum::<usize>() as f64 / each;
            let lasted = runs.iter().map(|run| run.lasted.as_secs_f64()).sum::<f64>() / each;
            let _ = writeln!(
                text,
                "\n{peer:?}, {fault:?}: {led:.0} partitions lost their leader; {mean:.0} Leases were written in the {lasted:.1} s from then until all went on, renewals of sessions among them."
            );
        }
    }
    text
}
