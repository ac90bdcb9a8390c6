//! What happened in runs, counted: a simulator that never gets to a rule says nothing of it.

use std::collections::BTreeMap;

macro_rules! counters {
    ($($name:ident: $what:literal,)*) => {
        /// Something that must happen in some run.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(super) enum Seen {
            $(#[doc = $what] $name,)*
        }

        impl Seen {
            /// All of them, each with what it is.
            pub(super) const ALL: &[(Seen, &str)] = &[$((Seen::$name, $what),)*];
        }
    };
}

counters! {
    Kill: "a process is killed",
    PowerLoss: "a node's power fails",
    UnsyncedLost: "records that were not synced are lost",
    StoreLost: "a volume is lost",
    Pause: "a process stands still",
    LongPause: "a process stands still for more than a minute",
    CutOneWay: "a link is cut in one direction",
    Isolated: "a broker is cut off from all others",
    ApiDown: "the API server is away",
    ApiCut: "a broker is cut off from the API server",
    ClockJump: "a broker's clock jumps",
    GracefulStop: "a broker stops in order",
    Reassigned: "a partition's replicas change",
    LetGo: "a replica deletes what it has of a partition that others hold now",
    Retained: "retention moves a log's start",
    Emptied: "retention empties a log",
    WatchBroken: "a watch breaks and lists anew",
    StaleServe: "a broker acts on a Lease that is not the newest",
    LateWrite: "a write lands after its writer has given up waiting",
    AnswerLost: "the answer to a write is lost",
    Conflict: "a write meets another version",
    Refused: "the API server refuses a write",
    ElectedFirst: "a new partition gets its first leader",
    ElectedClean: "a replica of the ISR is elected",
    ElectedPreferred: "the preferred leader leads again",
    ElectedUnclean: "a replica that may lack records is elected",
    ElectedFormer: "a member of the ISR is elected that is no replica any more",
    HandedOver: "a leader that no one reaches hands over",
    Offline: "a partition has no leader",
    ControllerChanged: "another broker becomes controller",
    SessionLost: "a process finds its session taken",
    IsrShrunk: "the ISR shrinks",
    IsrGrown: "the ISR grows",
    StoreReplaced: "a replica comes back to the ISR with another store",
    IsrUnknown: "the outcome of an ISR change is unknown",
    Fenced: "a fencing write is written",
    DeposedPending: "a leader is deposed while its ISR change is pending",
    Cut: "a follower cuts its log",
    BeganAnew: "a follower begins anew",
    LateRefusal: "a refusal that came late is left alone",
    OldLease: "a Lease that is older than the log is not followed",
    SessionReset: "a session between brokers breaks",
    ConnectionRefused: "a connection is refused",
    OutOfOrder: "batches that do not come next are refused by a follower",
    DuplicateBatch: "a producer's batch that is there already is answered with its offset",
    SequenceGap: "a producer's batch that leaves a gap is refused",
    ProducerRenewed: "a producer goes on under another id, as its gap stays",
    TooFewInSync: "acks=all is refused for lack of replicas in sync",
    WaitersFailed: "producers who wait are told that the leader leads no more",
    SentToDeposed: "a leader that was deposed, and does not know, is sent a batch",
    ConsumerReset: "a consumer is overtaken by retention",
    NotKnownLatest: "a new leader does not know yet what is committed",
}

/// How often.
#[derive(Clone, Debug, Default)]
pub(super) struct Coverage(BTreeMap<Seen, u64>);

impl Coverage {
    pub(super) fn note(&mut self, seen: Seen) {
        *self.0.entry(seen).or_default() += 1;
    }

    pub(super) fn add(&mut self, other: &Coverage) {
        for (seen, count) in &other.0 {
            *self.0.entry(*seen).or_default() += count;
        }
    }

    pub(super) fn count(&self, seen: Seen) -> u64 {
        self.0.get(&seen).copied().unwrap_or_default()
    }
}
