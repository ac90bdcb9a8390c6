//! What a failed request becomes for its caller: the only place where errors turn into gRPC, but for requests that the codec in
//! `millrace-proto` refuses to decode.

use std::{borrow::Cow, collections::HashMap};

use millrace_crds::check_topic_name;
use millrace_proto::{
    ERROR_DOMAIN,
    v1::{self, ErrorReason},
};
use millrace_record::BatchError;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    groups::GroupError,
    partition::NotEnoughReplicas,
    storage::{SequenceError, StorageError},
    transactions::TransactionError,
};

/// Characters shown of a name that no topic can have.
const MAX_SHOWN: usize = 64;

/// A refused request, or the refused part of it for one partition.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) reason: ErrorReason,
    message: String,
    metadata: HashMap<String, String>,
}

impl ApiError {
    pub(crate) fn new(reason: ErrorReason, message: impl Into<String>) -> Self {
        ApiError {
            reason,
            message: message.into(),
            metadata: HashMap::new(),
        }
    }

    pub(crate) fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    pub(crate) fn invalid(field: &str, message: impl Into<String>) -> Self {
        ApiError::new(ErrorReason::InvalidRequest, message).with("field", field)
    }

    pub(crate) fn unknown_topic(topic: &str) -> Self {
        let topic = shown(topic);
        let message = format!(
            "topic {topic:?} does not exist; create it as a Topic resource, or check the name"
        );
        ApiError::new(ErrorReason::UnknownTopic, message).with("topic", topic)
    }

    pub(crate) fn unknown_partition(topic: &str, partition: i32, partitions: usize) -> Self {
        let message = format!(
            "topic {topic:?} has {partitions} partitions, counted from 0: there is no partition {partition}"
        );
        ApiError::new(ErrorReason::UnknownPartition, message)
            .with("topic", topic)
            .with("partition", partition)
            .with("partitions", partitions)
    }

    /// The leader is given as its id and address, if there is one.
    pub(crate) fn not_leader(
        topic: &str,
        partition: i32,
        leader_epoch: i32,
        leader: Option<(i32, String)>,
    ) -> Self {
        let message = match &leader {
            Some((id, address)) => {
                format!("{topic}/{partition} is led by broker {id}, at {address}: ask it")
            }
            None => format!(
                "{topic}/{partition} has no leader now: wait for one, or see what its Topic's status says"
            ),
        };
        let error = ApiError::new(ErrorReason::NotLeader, message)
            .with("topic", topic)
            .with("partition", partition)
            .with("leader_epoch", leader_epoch);
        match leader {
            Some((id, address)) => error.with("leader_id", id).with("leader_address", address),
            None => error,
        }
    }

    pub(crate) fn not_enough_replicas(
        topic: &str,
        partition: i32,
        error: NotEnoughReplicas,
    ) -> Self {
        let message = format!(
            "{topic}/{partition}: {error}; nothing was appended. Bring the missing brokers back, or lower minInSyncReplicas"
        );
        ApiError::new(ErrorReason::NotEnoughReplicas, message)
            .with("topic", topic)
            .with("partition", partition)
            .with("in_sync", error.in_sync)
            .with("min_in_sync", error.min_in_sync)
    }

    pub(crate) fn offset_not_available(topic: &str, partition: i32) -> Self {
        let message = format!(
            "{topic}/{partition} has a new leader, which does not know yet what the latest offset is; try again in a moment"
        );
        ApiError::new(ErrorReason::OffsetNotAvailable, message)
            .with("topic", topic)
            .with("partition", partition)
    }

    pub(crate) fn shutting_down() -> Self {
        ApiError::new(
            ErrorReason::ShuttingDown,
            "the broker is stopping; try the partition's next leader",
        )
    }

    /// A storage error of one partition.
    pub(crate) fn storage(topic: &str, partition: i32, error: &StorageError) -> Self {
        let message = format!("{topic}/{partition}: {error}");
        let of = |reason| {
            ApiError::new(reason, message)
                .with("topic", topic)
                .with("partition", partition)
        };
        match error {
            StorageError::OffsetOutOfRange {
                offset,
                log_start,
                high_watermark,
            } => of(ErrorReason::OffsetOutOfRange)
                .with("offset", offset)
                .with("log_start_offset", log_start)
                .with("high_watermark", high_watermark),
            StorageError::TooLarge { size, max } => of(ErrorReason::RecordTooLarge)
                .with("size_bytes", size)
                .with("max_bytes", max),
            StorageError::Timestamp {
                timestamp_ms,
                max_timestamp_ms,
            } => of(ErrorReason::InvalidTimestamp)
                .with("timestamp_ms", timestamp_ms)
                .with("max_timestamp_ms", max_timestamp_ms),
            StorageError::Batch(BatchError::CorruptCrc { expected, actual }) => {
                of(ErrorReason::CorruptBatch)
                    .with("expected_crc", expected)
                    .with("actual_crc", actual)
            }
            StorageError::Batch(_)
            | StorageError::Control
            | StorageError::NoProducer
            | StorageError::NoKey
            | StorageError::Stamped
            | StorageError::Sequence(SequenceError::OutsideTransaction { .. }) => {
                of(ErrorReason::InvalidBatch)
            }
            StorageError::Sequence(SequenceError::TransactionEnded { producer_id, epoch }) => {
                of(ErrorReason::TransactionAborted)
                    .with("producer_id", producer_id)
                    .with("producer_epoch", epoch)
            }
            StorageError::Sequence(SequenceError::NotInTransaction { producer_id, epoch }) => {
                of(ErrorReason::NotInTransaction)
                    .with("producer_id", producer_id)
                    .with("producer_epoch", epoch)
            }
            StorageError::Sequence(SequenceError::OutOfOrder {
                producer_id,
                sequence,
                expected,
            }) => of(ErrorReason::OutOfOrderSequence)
                .with("producer_id", producer_id)
                .with("sequence", sequence)
                .with("expected_sequence", expected),
            StorageError::Sequence(SequenceError::Duplicate {
                producer_id,
                sequence,
            }) => of(ErrorReason::DuplicateSequence)
                .with("producer_id", producer_id)
                .with("sequence", sequence),
            StorageError::Sequence(SequenceError::Fenced {
                producer_id,
                epoch,
                current,
            }) => of(ErrorReason::FencedProducer)
                .with("producer_id", producer_id)
                .with("producer_epoch", epoch)
                .with("current_epoch", current),
            StorageError::DiskFull {
                free_bytes,
                required_bytes,
            } => of(ErrorReason::DiskFull)
                .with("free_bytes", free_bytes)
                .with("required_bytes", required_bytes),
            StorageError::NotLed => of(ErrorReason::NotLeader),
            StorageError::FencedLeader { epoch, current } => of(ErrorReason::NotLeader)
                .with("request_leader_epoch", epoch)
                .with("leader_epoch", current),
            StorageError::Deleted => of(ErrorReason::UnknownTopic),
            StorageError::Closed => of(ErrorReason::ShuttingDown),
            StorageError::Open { .. }
            | StorageError::Format { .. }
            | StorageError::Corrupt { .. }
            | StorageError::ClaimedByOther { .. }
            | StorageError::Claimed { .. }
            | StorageError::NotContiguous { .. }
            | StorageError::Unclaimed
            | StorageError::UsedAlone { .. }
            | StorageError::Rocks(_) => of(ErrorReason::Storage),
        }
    }

    fn code(&self) -> Code {
        match self.reason {
            ErrorReason::UnknownTopic
            | ErrorReason::UnknownPartition
            | ErrorReason::UnknownMember
            | ErrorReason::UnknownGroup
            | ErrorReason::UnknownTransactionalId => Code::NotFound,
            ErrorReason::OffsetOutOfRange => Code::OutOfRange,
            ErrorReason::RecordTooLarge
            | ErrorReason::InvalidBatch
            | ErrorReason::CorruptBatch
            | ErrorReason::InvalidTimestamp
            | ErrorReason::InvalidRequest => Code::InvalidArgument,
            ErrorReason::NotLeader
            | ErrorReason::OutOfOrderSequence
            | ErrorReason::NotOwner
            | ErrorReason::TransactionCommitted
            | ErrorReason::NotInTransaction
            | ErrorReason::GroupNotEmpty => Code::FailedPrecondition,
            ErrorReason::DuplicateSequence => Code::AlreadyExists,
            ErrorReason::FencedProducer
            | ErrorReason::FencedMember
            | ErrorReason::TransactionAborted => Code::Aborted,
            ErrorReason::DiskFull | ErrorReason::Throttled | ErrorReason::LimitExceeded => {
                Code::ResourceExhausted
            }
            ErrorReason::ShuttingDown
            | ErrorReason::NotEnoughReplicas
            | ErrorReason::ConcurrentTransaction
            | ErrorReason::OffsetsPending
            | ErrorReason::OffsetNotAvailable => Code::Unavailable,
            ErrorReason::TimedOut => Code::DeadlineExceeded,
            ErrorReason::Storage | ErrorReason::Unspecified => Code::Internal,
        }
    }

    /// The reason's name as it stands in a gRPC status.
    pub(crate) fn reason_name(&self) -> &'static str {
        self.reason
            .as_str_name()
            .trim_start_matches("ERROR_REASON_")
    }
}

impl From<GroupError> for ApiError {
    fn from(error: GroupError) -> Self {
        let message = error.to_string();
        let of = |reason| ApiError::new(reason, message);
        match error {
            GroupError::UnknownMember { group, member } => of(ErrorReason::UnknownMember)
                .with("group_id", group)
                .with("member_id", member),
            GroupError::FencedMember { group, member } => of(ErrorReason::FencedMember)
                .with("group_id", group)
                .with("member_id", member),
            GroupError::NotOwner {
                group,
                member,
                topic,
                partition,
                epoch,
            } => of(ErrorReason::NotOwner)
                .with("group_id", group)
                .with("member_id", member)
                .with("topic", topic)
                .with("partition", partition)
                .with("epoch", epoch),
            GroupError::UnknownGroup(group) => {
                of(ErrorReason::UnknownGroup).with("group_id", group)
            }
            GroupError::NotEmpty { group, members } => of(ErrorReason::GroupNotEmpty)
                .with("group_id", group)
                .with("members", members),
            GroupError::UnknownTopic(topic) => ApiError::unknown_topic(&topic),
            GroupError::UnknownPartition {
                topic,
                partition,
                partitions,
            } => {
                let partitions = usize::try_from(partitions).unwrap_or_default();
                ApiError::unknown_partition(&topic, partition, partitions)
            }
            GroupError::OffsetsPending {
                group,
                topic,
                partition,
            } => of(ErrorReason::OffsetsPending)
                .with("group_id", group)
                .with("topic", topic)
                .with("partition", partition),
            GroupError::TransactionEnded {
                group, producer_id, ..
            } => of(ErrorReason::TransactionAborted)
                .with("group_id", group)
                .with("producer_id", producer_id),
            GroupError::Limit(limit) => of(ErrorReason::LimitExceeded).with("limit", limit),
            GroupError::Invalid { field, .. } => {
                of(ErrorReason::InvalidRequest).with("field", field)
            }
        }
    }
}

impl From<TransactionError> for ApiError {
    fn from(error: TransactionError) -> Self {
        let message = error.to_string();
        let of = |reason| ApiError::new(reason, &*message);
        let about = |reason, id: String| of(reason).with("transactional_id", id);
        match error {
            TransactionError::Unknown(id) => about(ErrorReason::UnknownTransactionalId, id),
            TransactionError::Fenced {
                id,
                producer_id,
                epoch,
            } => about(ErrorReason::FencedProducer, id)
                .with("producer_id", producer_id)
                .with("producer_epoch", epoch),
            TransactionError::Concurrent(id) => about(ErrorReason::ConcurrentTransaction, id),
            TransactionError::Aborted(id) => about(ErrorReason::TransactionAborted, id),
            TransactionError::Committed(id) => about(ErrorReason::TransactionCommitted, id),
            TransactionError::Limit(limit) => of(ErrorReason::LimitExceeded).with("limit", limit),
            TransactionError::Invalid { field, .. } => {
                of(ErrorReason::InvalidRequest).with("field", field)
            }
        }
    }
}

/// A topic's name for an error. One that no topic can have may be megabytes long; the headers in which a status travels may not.
fn shown(topic: &str) -> Cow<'_, str> {
    match check_topic_name(topic) {
        Ok(()) => topic.into(),
        Err(_) => topic.chars().take(MAX_SHOWN).collect(),
    }
}

impl From<ApiError> for v1::Error {
    fn from(error: ApiError) -> Self {
        v1::Error {
            reason: error.reason.into(),
            message: error.message,
            metadata: error.metadata,
        }
    }
}

impl From<ApiError> for Status {
    fn from(error: ApiError) -> Self {
        let code = error.code();
        let details =
            ErrorDetails::with_error_info(error.reason_name(), ERROR_DOMAIN, error.metadata);
        Status::with_error_details(code, error.message, details)
    }
}
