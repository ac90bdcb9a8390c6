//! Which partition a record goes to: the strategies.
//!
//! Not responsible for partitions' availability or for when the sticky partition changes: the producer's topics know that.

/// How a producer chooses the partition of records that name none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Partitioner {
    /// Records with a key go to the partition that murmur2 of the key gives, as with Kafka's Java client, so that equal keys
    /// stay in order. Records without one are [`Sticky`](Partitioner::Sticky).
    #[default]
    KeyHash,
    /// All go to one partition until its batch is full or sent, then to another: the fewest and largest batches. Ignores keys.
    Sticky,
    /// One after another. Ignores keys.
    RoundRobin,
    /// Each by chance. Ignores keys.
    Random,
}
