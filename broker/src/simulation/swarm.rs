//! What a seed draws before its run begins: how large its world is, and what goes wrong in it how often. A run in which everything
//! goes wrong a little finds less than many runs in which few things go wrong much (swarm testing).

use fastrand::Rng;

/// What can go wrong, or is done to a cluster by people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Kill,
    KillAll,
    PowerLoss,
    LoseStore,
    Pause,
    Stop,
    CutLink,
    MendLinks,
    Isolate,
    CutApi,
    ApiDown,
    BreakWatch,
    StallWatch,
    JumpClock,
    Reassign,
    Retain,
    ResetSessions,
}

const FAULTS: [(Fault, u32); 17] = [
    (Fault::Kill, 8),
    (Fault::KillAll, 1),
    (Fault::PowerLoss, 4),
    (Fault::LoseStore, 3),
    (Fault::Pause, 4),
    (Fault::Stop, 2),
    (Fault::CutLink, 5),
    (Fault::MendLinks, 5),
    (Fault::Isolate, 2),
    (Fault::CutApi, 3),
    (Fault::ApiDown, 1),
    (Fault::BreakWatch, 2),
    (Fault::StallWatch, 3),
    (Fault::JumpClock, 2),
    (Fault::Reassign, 3),
    (Fault::Retain, 4),
    (Fault::ResetSessions, 3),
];

/// A range of milliseconds, with a tail: one in `rare` takes up to `long`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Delay {
    pub(super) usual: u64,
    pub(super) long: u64,
    pub(super) rare: u32,
}

impl Delay {
    fn draw_from(rng: &mut Rng, usual: u64, long: u64) -> Self {
        Self {
            usual: rng.u64(1..=usual),
            long: rng.u64(usual..=long),
            rare: rng.choice([10, 50, 1_000]).unwrap_or(50),
        }
    }

    pub(super) fn draw(&self, rng: &mut Rng) -> u64 {
        match rng.u32(0..self.rare) {
            0 => rng.u64(0..=self.long),
            _ => rng.u64(0..=self.usual),
        }
    }
}

/// A run's constants. Times are in milliseconds.
#[derive(Clone, Debug)]
pub(super) struct Swarm {
    pub(super) brokers: i32,
    pub(super) replication: usize,
    pub(super) min_isr: usize,
    pub(super) partitions: i32,
    /// Acknowledged is what is synced; otherwise what is written, and a volume whose power failed counts as another one.
    pub(super) fsync: bool,
    pub(super) unclean: bool,
    pub(super) lag: u64,
    pub(super) producers: usize,
    pub(super) consumers: usize,
    pub(super) in_flight: usize,
    pub(super) batch_records: i32,
    /// Between two batches of a producer.
    pub(super) pace: u64,
    pub(super) network: Delay,
    /// Messages come out of order and twice. Streams do not do that; the protocol must not depend on it for its safety.
    pub(super) is_disordered: bool,
    /// One message in so many is lost, and with it its connection.
    pub(super) loss: u32,
    pub(super) api: Delay,
    /// One call in so many fares badly.
    pub(super) api_failures: u32,
    pub(super) watch: Delay,
    /// Lists may be of the past. Brokers ask for most recent ones; their safety must not hang on that alone.
    pub(super) has_stale_lists: bool,
    pub(super) sync: Delay,
    pub(super) serve: Delay,
    /// Until all heals.
    pub(super) chaos: u64,
    /// Between two faults.
    pub(super) calm: u64,
    /// How long what is down stays down at most.
    pub(super) outage: u64,
    faults: Vec<(Fault, u32)>,
}

impl Swarm {
    pub(super) fn draw(rng: &mut Rng) -> Self {
        let brokers = rng.choice([1, 2, 3, 3, 3, 3, 4, 5]).unwrap_or(3);
        let replication = rng
            .usize(1..=brokers as usize)
            .max(rng.usize(1..=brokers as usize));
        // A fault is drawn for a run with even odds, and then counts up to three times as much.
        let mut faults: Vec<(Fault, u32)> = Vec::new();
        for (fault, weight) in FAULTS {
            if rng.bool() {
                faults.push((fault, weight * rng.u32(1..=3)));
            }
        }
        Self {
            brokers,
            replication,
            min_isr: rng.usize(1..=replication.min(3)),
            partitions: rng.i32(1..=2),
            fsync: rng.u32(0..4) > 0,
            unclean: rng.u32(0..8) == 0,
            lag: rng.u64(1_500..=8_000),
            producers: rng.usize(1..=3),
            consumers: rng.usize(1..=2),
            in_flight: rng.usize(1..=3),
            batch_records: rng.i32(1..=4),
            pace: rng.choice([20, 100, 400]).unwrap_or(100),
            network: Delay::draw_from(rng, 20, 2_000),
            is_disordered: rng.u32(0..3) == 0,
            loss: rng.choice([200, 2_000, u32::MAX]).unwrap_or(2_000),
            api: Delay::draw_from(rng, 50, 6_000),
            api_failures: rng.choice([8, 40, 1_000]).unwrap_or(40),
            has_stale_lists: rng.bool(),
            watch: Delay::draw_from(rng, 100, 8_000),
            sync: Delay::draw_from(rng, 20, 500),
            serve: Delay::draw_from(rng, 10, 1_000),
            chaos: rng.u64(10_000..=35_000),
            calm: rng.choice([300, 1_000, 3_000]).unwrap_or(1_000),
            outage: rng.choice([1_000, 5_000, 15_000]).unwrap_or(5_000),
            faults,
        }
    }

    /// Nothing goes wrong any more.
    pub(super) fn heal(&mut self) {
        self.is_disordered = false;
        self.loss = u32::MAX;
        self.api_failures = u32::MAX;
        let delays = [
            &mut self.network,
            &mut self.api,
            &mut self.watch,
            &mut self.sync,
            &mut self.serve,
        ];
        for delay in delays {
            delay.long = delay.usual;
        }
    }

    pub(super) fn draw_fault(&self, rng: &mut Rng) -> Option<Fault> {
        let total: u32 = self.faults.iter().map(|(_, weight)| weight).sum();
        let mut at = rng.u32(0..total.max(1));
        for (fault, weight) in &self.faults {
            if at < *weight {
                return Some(*fault);
            }
            at -= weight;
        }
        None
    }
}
