//! The keys of both databases, in one place. Numbers are big-endian, so that RocksDB's order is theirs.
//!
//! `log`: generation u32, partition u32, last offset u64. `meta`: one byte for the kind, then what the functions below say.
//! Since format 1, unless a key says otherwise.

use uuid::Uuid;

use super::{Generation, PartitionId};

/// `meta`: the store itself, a descriptor.
pub(super) const STORE: &[u8] = b"S";
/// `meta`: the generation that the writer fills, u32.
pub(super) const ACTIVE_GENERATION: &[u8] = b"G";
/// `meta`: present if the last process stopped in order and nothing was written since.
pub(super) const CLEAN_SHUTDOWN: &[u8] = b"C";
/// `meta`, prefix: topics.
pub(super) const TOPIC: u8 = b'T';
/// `meta`, prefix: partitions. Since format 2.
pub(super) const PARTITION: u8 = b'P';
/// `meta`, prefix: partitions that are deleted, of which other entries may be left. Since format 2.
pub(super) const DELETED: u8 = b'D';
/// `meta`, prefix: generations that hold data.
pub(super) const GENERATION: u8 = b'g';
/// `meta`, prefix: log start offsets.
pub(super) const LOG_START: u8 = b'O';
/// `meta`, prefix: producers.
pub(super) const PRODUCER: u8 = b'I';
/// `meta`, prefix: epoch caches. Since format 3.
pub(super) const EPOCHS: u8 = b'E';
/// `meta`, prefix: transactions that have ended. Since format 3.
pub(super) const ENDED: u8 = b'A';
/// `meta`, prefix: high watermarks as they were known. Since format 3.
pub(super) const HIGH_WATERMARK: u8 = b'H';
/// `meta`, prefix: how far partitions are compacted. Since format 3.
pub(super) const COMPACTED: u8 = b'K';
/// `meta`, prefix: the newest epochs in which partitions were led or followed. Since format 3.
pub(super) const NEWEST_EPOCH: u8 = b'N';
/// `meta`, prefix: runs.
pub(super) const RUN: u8 = b'R';

pub(super) const LOG_KEY_LEN: usize = 16;

/// `log`: the batch of a partition that ends at `last_offset`.
pub(super) fn log(
    generation: Generation,
    partition: PartitionId,
    last_offset: i64,
) -> [u8; LOG_KEY_LEN] {
    let mut key = [0; LOG_KEY_LEN];
    key[..4].copy_from_slice(&generation.0.to_be_bytes());
    key[4..8].copy_from_slice(&partition.0.to_be_bytes());
    key[8..].copy_from_slice(&last_offset.to_be_bytes());
    key
}

/// The parts of a `log` key; `None` if it is none.
pub(super) fn parse_log(key: &[u8]) -> Option<(Generation, PartitionId, i64)> {
    let key: &[u8; LOG_KEY_LEN] = key.try_into().ok()?;
    let (generation, rest) = key.split_first_chunk::<4>()?;
    let (partition, offset) = rest.split_first_chunk::<4>()?;
    Some((
        Generation(u32::from_be_bytes(*generation)),
        PartitionId(u32::from_be_bytes(*partition)),
        i64::from_be_bytes(offset.try_into().ok()?),
    ))
}

/// `meta`: the run of a partition that ends at `last_offset`.
pub(super) fn run(partition: PartitionId, last_offset: i64) -> [u8; 13] {
    let mut key = [0; 13];
    key[..5].copy_from_slice(&runs(partition));
    key[5..].copy_from_slice(&last_offset.to_be_bytes());
    key
}

/// `meta`, prefix: the runs of a partition.
pub(super) fn runs(partition: PartitionId) -> [u8; 5] {
    prefixed(RUN, partition.0)
}

/// The last offset in a run's key; `None` if it is none.
pub(super) fn parse_run(key: &[u8]) -> Option<i64> {
    Some(i64::from_be_bytes(key.get(5..)?.try_into().ok()?))
}

/// `meta`: a topic by its id. Since format 2; format 1 had its name.
pub(super) fn topic(topic_id: Uuid) -> [u8; 17] {
    let mut key = [TOPIC; 17];
    key[1..].copy_from_slice(topic_id.as_bytes());
    key
}

/// The id in a topic's key; `None` if it is none.
pub(super) fn parse_topic(key: &[u8]) -> Option<Uuid> {
    Uuid::from_slice(key.get(1..)?).ok()
}

/// `meta`: a partition by its topic's id and its index. Since format 2.
pub(super) fn partition(topic_id: Uuid, index: i32) -> [u8; 21] {
    let mut key = [PARTITION; 21];
    key[1..17].copy_from_slice(topic_id.as_bytes());
    key[17..].copy_from_slice(&index.to_be_bytes());
    key
}

/// The topic's id and the index in a partition's key; `None` if it is none.
pub(super) fn parse_partition(key: &[u8]) -> Option<(Uuid, i32)> {
    let (topic_id, index) = key.get(1..)?.split_first_chunk::<16>()?;
    let index = i32::from_be_bytes(index.try_into().ok()?);
    Some((Uuid::from_bytes(*topic_id), index))
}

/// `meta`: the newest epoch in which a partition was led or followed, i32. Since format 3.
pub(super) fn newest_epoch(partition: PartitionId) -> [u8; 5] {
    prefixed(NEWEST_EPOCH, partition.0)
}

/// `meta`: how far a partition is compacted. Since format 3.
pub(super) fn compacted(partition: PartitionId) -> [u8; 5] {
    prefixed(COMPACTED, partition.0)
}

/// `meta`: the mark of a deleted partition. Since format 2.
pub(super) fn deleted(partition: PartitionId) -> [u8; 5] {
    prefixed(DELETED, partition.0)
}

/// The partition in the mark of a deleted one; `None` if it is none.
pub(super) fn parse_deleted(key: &[u8]) -> Option<PartitionId> {
    let number = key.get(1..)?.try_into().ok()?;
    Some(PartitionId(u32::from_be_bytes(number)))
}

/// `meta`: a sealed generation.
pub(super) fn generation(generation: Generation) -> [u8; 5] {
    prefixed(GENERATION, generation.0)
}

/// `meta`: the log start offset of a partition.
pub(super) fn log_start(partition: PartitionId) -> [u8; 5] {
    prefixed(LOG_START, partition.0)
}

/// `meta`: the epochs of a partition up to the end of its sealed runs. Since format 3.
pub(super) fn epochs(partition: PartitionId) -> [u8; 5] {
    prefixed(EPOCHS, partition.0)
}

/// `meta`: the transactions that have ended in a partition, up to the end of its sealed runs. Since format 3.
pub(super) fn ended(partition: PartitionId) -> [u8; 5] {
    prefixed(ENDED, partition.0)
}

/// `meta`: how far a partition was committed when that was last noted. Since format 3.
pub(super) fn high_watermark(partition: PartitionId) -> [u8; 5] {
    prefixed(HIGH_WATERMARK, partition.0)
}

/// `meta`, prefix: the producers of a partition.
pub(super) fn producers(partition: PartitionId) -> [u8; 5] {
    prefixed(PRODUCER, partition.0)
}

/// `meta`: one producer of a partition.
pub(super) fn producer(partition: PartitionId, producer_id: i64) -> [u8; 13] {
    let mut key = [0; 13];
    key[..5].copy_from_slice(&producers(partition));
    key[5..].copy_from_slice(&producer_id.to_be_bytes());
    key
}

fn prefixed(kind: u8, number: u32) -> [u8; 5] {
    let mut key = [kind; 5];
    key[1..].copy_from_slice(&number.to_be_bytes());
    key
}

/// The smallest key greater than every key with this prefix; `None` for a prefix of 0xff bytes.
pub(super) fn after_prefix(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_keys_sort_by_generation_then_partition_then_offset() {
        let sorted = [
            log(Generation(1), PartitionId(2), 900),
            log(Generation(1), PartitionId(3), 0),
            log(Generation(1), PartitionId(3), 256),
            log(Generation(2), PartitionId(0), 0),
            log(Generation(256), PartitionId(0), 0),
        ];
        assert!(sorted.is_sorted());
        assert_eq!(
            parse_log(&sorted[2]),
            Some((Generation(1), PartitionId(3), 256))
        );
        assert_eq!(parse_log(b"short"), None);
    }

    #[test]
    fn keys_are_as_documented_byte_for_byte() {
        assert_eq!(
            log(Generation(1), PartitionId(2), 3),
            [0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3]
        );
        assert_eq!(
            run(PartitionId(2), 3),
            [b'R', 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3]
        );
        assert_eq!(parse_run(&run(PartitionId(2), 3)), Some(3));
        assert_eq!(
            producer(PartitionId(2), 3),
            [b'I', 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3]
        );
        let topic_id = Uuid::from_u128(0x0102);
        let mut expected = [0; 21];
        (expected[0], expected[15], expected[16]) = (b'T', 1, 2);
        assert_eq!(topic(topic_id), expected[..17]);
        assert_eq!(parse_topic(&topic(topic_id)), Some(topic_id));
        (expected[0], expected[20]) = (b'P', 7);
        assert_eq!(partition(topic_id, 7), expected);
        assert_eq!(parse_partition(&expected), Some((topic_id, 7)));
        assert_eq!(parse_partition(&expected[..20]), None);
        assert_eq!(deleted(PartitionId(2)), [b'D', 0, 0, 0, 2]);
        assert_eq!(epochs(PartitionId(2)), [b'E', 0, 0, 0, 2]);
        assert_eq!(ended(PartitionId(2)), [b'A', 0, 0, 0, 2]);
        assert_eq!(high_watermark(PartitionId(2)), [b'H', 0, 0, 0, 2]);
        assert_eq!(parse_deleted(&[b'D', 0, 0, 0, 2]), Some(PartitionId(2)));
        assert_eq!(after_prefix(&[1, 255]), Some(vec![2]));
        assert_eq!(after_prefix(&[255]), None);
    }
}
