//! Which faults come, and for how long: a pure function of the seed.

use std::time::Duration;

use clap::ValueEnum;
use fastrand::Rng;

/// What can break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Kind {
    /// The process is killed (SIGKILL) and started again.
    Kill,
    /// The process hangs (SIGSTOP) and goes on.
    Pause,
    /// The process is asked to stop (SIGTERM) and started again.
    Restart,
    /// No way to the API server.
    CutApi,
    /// No way to the other brokers, nor back.
    CutBrokers,
    /// What it sends the other brokers is lost; what they send it is not.
    CutOneWay,
    /// No way to anyone.
    CutAll,
    /// Slow links to and from everybody.
    Slow,
    /// Some of the packets to and from everybody are lost.
    Loss,
    /// Killed, and its volume is empty when it is started again.
    Wipe,
    /// Its disk is full, and has room again.
    FillDisk,
    /// Its disk takes its time with each fsync.
    SlowDisk,
    /// The API server is killed and started again.
    ApiServer,
}

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    /// Whom it befalls; no one if it is the API server.
    pub(crate) brokers: Vec<i32>,
    /// All is left alone for so long before it.
    pub(crate) after: Duration,
    /// It lasts so long.
    pub(crate) lasts: Duration,
    /// On each slow link, and of each fsync.
    pub(crate) delay: Duration,
    /// Packets lost of a hundred.
    pub(crate) loss: u8,
    /// Bytes that are left on a full disk.
    pub(crate) leave: u64,
}

/// A disk may be full to the last byte, or only so far that brokers refuse to write: their reserve is larger than any of these.
const LEAVES: [u64; 3] = [0, 1 << 20, 32 << 20];

/// Draws one after another.
pub(crate) struct Plan {
    random: Rng,
    kinds: Vec<Kind>,
    brokers: i32,
}

impl Plan {
    pub(crate) fn new(seed: u64, kinds: Vec<Kind>, brokers: i32) -> Self {
        let random = Rng::with_seed(seed);
        Self {
            random,
            kinds,
            brokers,
        }
    }

    pub(crate) fn next(&mut self) -> Option<Fault> {
        let random = &mut self.random;
        let kind = *self.kinds.get(random.usize(..self.kinds.len().max(1)))?;
        let mut brokers: Vec<i32> = (0..self.brokers).collect();
        random.shuffle(&mut brokers);
        // Now and then most of them at once: nothing may be lost then either.
        let several = random.u8(..5) == 0;
        brokers.truncate(match kind {
            Kind::ApiServer => 0,
            Kind::Wipe => 1,
            _ if several => 2,
            _ => 1,
        });
        // In milliseconds. Sessions last 6 s, so both shorter and longer than that.
        let lasts = match kind {
            Kind::Kill | Kind::Restart | Kind::Wipe => 0..8_000,
            Kind::Pause => 1_000..30_000,
            Kind::CutApi | Kind::CutBrokers | Kind::CutOneWay | Kind::CutAll => 1_000..20_000,
            Kind::Slow | Kind::Loss | Kind::FillDisk | Kind::SlowDisk => 3_000..15_000,
            Kind::ApiServer => 1_000..20_000,
        };
        Some(Fault {
            kind,
            brokers,
            after: Duration::from_millis(random.u64(500..6_000)),
            lasts: Duration::from_millis(random.u64(lasts)),
            delay: Duration::from_millis(random.u64(50..400)),
            loss: random.u8(5..40),
            leave: random.choice(LEAVES).unwrap_or_default(),
        })
    }
}

impl Kind {
    /// Whether a broker that it befalls has no process until it is mended.
    pub(crate) fn takes_away(self) -> bool {
        matches!(self, Self::Kill | Self::Restart | Self::Wipe)
    }

    /// As on the command line.
    pub(crate) fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_tells_the_whole_plan_and_every_kind_comes() {
        let drawn = |seed| {
            let mut plan = Plan::new(seed, Kind::value_variants().to_vec(), 3);
            (0..200).map_while(|_| plan.next()).collect::<Vec<_>>()
        };
        let plan = drawn(7);
        assert_eq!(plan, drawn(7));
        assert_ne!(plan, drawn(8));
        for kind in Kind::value_variants() {
            assert!(plan.iter().any(|fault| fault.kind == *kind), "{kind:?}");
        }
        let most = |kind| {
            let of_kind = plan.iter().filter(|fault| fault.kind == kind);
            of_kind.map(|fault| fault.brokers.len()).max()
        };
        assert_eq!(most(Kind::Wipe), Some(1));
        assert_eq!(most(Kind::ApiServer), Some(0));
        assert_eq!(most(Kind::Kill), Some(2));
    }

    #[test]
    fn with_nothing_to_break_there_is_no_fault() {
        assert_eq!(Plan::new(0, Vec::new(), 3).next(), None);
    }
}
