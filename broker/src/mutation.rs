//! Rules broken on purpose, one at a time: each must be noticed by the simulator of its protocol. Only in tests; otherwise [`broken!`] is `false`.

#[cfg(test)]
use std::cell::Cell;

/// Whether a rule is broken on purpose.
#[cfg(not(test))]
macro_rules! broken {
    ($mutation:ident) => {
        false
    };
}
#[cfg(test)]
macro_rules! broken {
    ($mutation:ident) => {
        $crate::mutation::is_on($crate::mutation::Mutation::$mutation)
    };
}

#[cfg(test)]
macro_rules! mutations {
    ($($protocol:ident { $($name:ident: $what:literal,)* })*) => {
        /// A rule that is not kept.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Mutation {
            $($(#[doc = $what] $name,)*)*
        }

        impl Mutation {
            $(/// All of this protocol.
            pub(crate) const $protocol: &[Mutation] = &[$(Mutation::$name,)*];)*
        }
    };
}

#[cfg(test)]
mutations! {
REPLICATION {
    RollBackUnknown: "An ISR change whose outcome is unknown is taken for not written.",
    SkipFence: "A write of which a read shows nothing is taken for one that never comes.",
    IgnoreStoreIds: "A store that lost its data counts as the one that it was.",
    JoinBelowEpochStart: "A replica joins the ISR with all that is committed, but not all that was there when the epoch began.",
    ShrinkBeforeWritten: "A smaller ISR counts before it is written.",
    CountUnchecked: "A follower counts before its log was compared.",
    CountUnsynced: "The leader counts what it has not synced.",
    CommitBelowMinimum: "Records are committed although fewer replicas are in sync than the topic demands.",
    KeepDiverging: "A follower keeps what its leader does not have.",
    BeginAnewAnytime: "A follower begins anew on a refusal that came late.",
    KeepIncomparable: "A follower keeps what is older than all that its leader has.",
    ResumeEpoch: "A process leads on in the epoch of the one before it.",
    FollowThePast: "A replica follows a leader whose epoch is older than its own records.",
    KeepOffice: "A process that is controller anew goes on in the epoch in which it was before.",
    GoBackInTime: "An event that comes late undoes what is known.",
    ElectAnyone: "A replica that is not in sync is elected.",
    ElectListedOnly: "The last member of the ISR is not elected if it is to be a replica no longer.",
    DeleteInSync: "A replica that is to be one no longer deletes what it has while it is in sync.",
    ReassignInEpoch: "A partition gets other replicas in the epoch in which it was led before.",
    KeepEmptiedEpochs: "The epochs of a log that retention emptied are kept.",
    KeepStoreId: "A store that lost its data keeps its id.",
    WriteAnyVersion: "A Lease is replaced whatever version is there.",
    ForgetProducers: "A follower does not remember what producers have written.",
    AcknowledgeUncommitted: "Producers are told that what is only appended is committed.",
    ShowUncommitted: "Consumers are shown what is not committed.",
}
TRANSACTIONS {
    KeepEpoch: "A producer's next transaction has the epoch of the last.",
    ForgetEnds: "A marker that comes again ends whatever is open.",
    TakeUnannounced: "A partition takes records of a transaction that its coordinator does not tell of.",
    ForgetPartitions: "A partition is told of a transaction before it is noted that it is to be told of its end.",
    ForgetDecisions: "Who coordinates next does not tell of the ends that were decided before.",
    DecideAgain: "A transaction whose end is decided is ended otherwise.",
    LetZombiesEnd: "A producer that was taken over ends the transaction of its successor.",
    TakeMoreAfterEnd: "A transaction that has ended somewhere begins there again.",
    ShowAborted: "Readers of what is committed are shown what was aborted.",
}
}

#[cfg(test)]
thread_local! {
    static ON: Cell<Option<Mutation>> = const { Cell::new(None) };
}

/// Breaks a rule on this thread, or none.
#[cfg(test)]
pub(crate) fn set(mutation: Option<Mutation>) {
    ON.set(mutation);
}

#[cfg(test)]
pub(crate) fn is_on(mutation: Mutation) -> bool {
    ON.get() == Some(mutation)
}
