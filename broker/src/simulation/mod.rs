//! A deterministic simulator of replication: brokers, an API server, a network, disks and clients in one thread, with time, chance and
//! failure drawn from a seed. It drives the real code: [`replication`](crate::replication), the pure parts of
//! [`coordination`](crate::coordination) (`view`, `liveness`, `election`, `session`, `replicas::wish`), the epoch cache and the producers'
//! state of [`storage`](crate::storage). What tasks, streams and files do around it in production is modelled here.
//!
//! # Running it
//! ```sh
//! cargo test --release -p millrace-broker --lib simulation           # 10,000 seeds, the mutations, coverage
//! MILLRACE_SIM_SEEDS=1000000 MILLRACE_SIM_FIRST=10000 cargo test --release -p millrace-broker --lib simulation::invariants_hold
//! MILLRACE_SIM_SEED=42 cargo test --release -p millrace-broker --lib simulation::replay -- --nocapture
//! ```
//! With `MILLRACE_SIM_MUTATION=KeepDiverging`, say, `replay` runs the seed with that rule broken.
//!
//! A failure names the seed, the invariant that was broken, and the last lines of the trace. The same seed gives the same run, as long as
//! the code is the same.
//!
//! # Reading it
//! [`swarm`] is what a seed draws first: how large its world is and what goes wrong how often. [`world`] is the run: it takes events
//! from the [`queue`] in the order of their time; [`faults`] go wrong in it, and [`health`] looks at it as a whole. [`process`] is a broker's process, with [`coordination`] (its session, its
//! view of Leases, elections, ISR changes) and [`sessions`] (logs on their way from leaders to followers). [`log`] is its disk,
//! [`kube`] the API server, [`net`] the network, [`clients`] the producers and consumers. [`oracle`] knows the invariants, [`coverage`] counts what
//! happened, and each of [`mutation`](crate::mutation)'s broken rules must be noticed.
//!
//! A line of the trace begins with the time in milliseconds; `1.3` is the third process of broker 1.
//!
//! # What is not in it
//! RocksDB, tokio and gRPC themselves, deletion of topics, Leases that are deleted or put back by hand, damaged disks, full disks.

mod clients;
mod coordination;
mod coverage;
mod faults;
mod health;
mod kube;
mod log;
mod net;
mod oracle;
mod process;
mod queue;
mod sessions;
mod swarm;
mod trace;
mod world;

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use self::{
    coverage::{Coverage, Seen},
    oracle::Violation,
    world::World,
};
use crate::mutation::{self, Mutation};

/// Seeds that are run unless told otherwise.
const SEEDS: u64 = 10_000;
/// Within so many each broken rule has to be noticed. Nearly all are within 2,000; to follow the past does harm only if the one who
/// leads there does not know better either, and is reached.
const MUTATION_SEEDS: u64 = 40_000;

fn from_environment(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is a number, and not {value:?}")),
    )
}

/// The first seed, and how many.
fn seeds(usually: u64) -> (u64, u64) {
    let first = from_environment("MILLRACE_SIM_FIRST").unwrap_or(0);
    let seeds = from_environment("MILLRACE_SIM_SEEDS").unwrap_or(usually);
    (first, seeds)
}

/// A seed whose run broke an invariant.
#[derive(Debug)]
struct Failure {
    seed: u64,
    violation: Violation,
}

/// Runs seeds on all cores until one fails, with a rule broken or none. The failure with the least seed of those that were found.
fn run(first: u64, seeds: u64, broken: Option<Mutation>) -> (Coverage, Option<Failure>) {
    let next = AtomicU64::new(first);
    let failed = AtomicBool::new(false);
    let found = Mutex::new((Coverage::default(), None::<Failure>));
    let work = || {
        mutation::set(broken);
        let mut coverage = Coverage::default();
        while !failed.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + seeds {
                break;
            }
            let mut world = World::new(seed, false);
            let violation = world.run();
            coverage.add(&world.coverage);
            if let Some(violation) = violation {
                failed.store(true, Ordering::Relaxed);
                let mut found = found.lock().expect("no worker panics");
                if found.1.as_ref().is_none_or(|known| seed < known.seed) {
                    found.1 = Some(Failure { seed, violation });
                }
            }
        }
        mutation::set(None);
        found.lock().expect("no worker panics").0.add(&coverage);
    };
    let workers = thread::available_parallelism().map_or(2, usize::from);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(work);
        }
    });
    found.into_inner().expect("no worker panics")
}

/// What a person needs to go on from a failure.
fn explain(failure: &Failure) -> String {
    let Failure { seed, violation } = failure;
    let mut world = World::new(*seed, true);
    world.run();
    let lines = world.trace.lines();
    let last = &lines[lines.len().saturating_sub(60)..];
    format!(
        "seed {seed} broke: {}\n{}\n{}\nreplay it: MILLRACE_SIM_SEED={seed} cargo test --release -p millrace-broker --lib simulation::replay -- --nocapture",
        violation.invariant,
        last.join("\n"),
        violation.detail,
    )
}

#[test]
fn invariants_hold() {
    let (first, seeds) = seeds(SEEDS);
    let (coverage, failure) = run(first, seeds, None);
    if let Some(failure) = failure {
        panic!("{}", explain(&failure));
    }
    for (seen, what) in Seen::ALL {
        println!("{:>10} {what}", coverage.count(*seen));
        // A few seeds need not come across everything.
        if seeds >= SEEDS {
            assert!(
                coverage.count(*seen) > 0,
                "in no run it happened that {what}"
            );
        }
    }
}

#[test]
fn replay() {
    let Some(seed) = from_environment("MILLRACE_SIM_SEED") else {
        return;
    };
    let broken = std::env::var("MILLRACE_SIM_MUTATION").ok().map(|name| {
        let mut all = Mutation::REPLICATION.iter();
        let named = all.find(|mutation| format!("{mutation:?}") == name);
        *named.unwrap_or_else(|| panic!("there is no mutation {name:?}"))
    });
    mutation::set(broken);
    let mut world = World::new(seed, true);
    let violation = world.run();
    mutation::set(None);
    println!("{:#?}", world.swarm);
    world.trace.lines().iter().for_each(|l| println!("{l}"));
    assert_eq!(violation, None);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let number = |seed| {
        let mut world = World::new(seed, false);
        world.run();
        world.trace.number()
    };
    for seed in 0..50 {
        assert_eq!(number(seed), number(seed), "seed {seed}");
    }
    assert_ne!(number(0), number(1));
}

#[test]
fn mutations() {
    let (first, seeds) = seeds(MUTATION_SEEDS);
    let mut unnoticed = Vec::new();
    for broken in Mutation::REPLICATION {
        match run(first, seeds, Some(*broken)).1 {
            Some(Failure { seed, violation }) => {
                println!("{broken:?}: seed {seed}: {}", violation.invariant);
            }
            None => unnoticed.push(broken),
        }
    }
    assert!(unnoticed.is_empty(), "not noticed: {unnoticed:?}");
}
