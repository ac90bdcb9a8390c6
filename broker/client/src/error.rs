//! The crate's one error type, and the one place where gRPC statuses and `millrace.v1.Error` become it.
//!
//! Not responsible for retrying: producer and consumer do that, guided by [`Error::kind`] and [`Error::is_retriable`].

use std::{collections::BTreeMap, error::Error as StdError, fmt, sync::Arc};

use millrace_proto::{ERROR_DOMAIN, v1};
use millrace_record::BatchError;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// What went wrong, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// No such topic.
    UnknownTopic,
    /// The topic exists, but not this partition.
    UnknownPartition,
    /// The broker that was asked does not lead the partition, or no broker does.
    NotLeader,
    /// The offset to read from is not in the log.
    OffsetOutOfRange,
    /// A record, or the batch it is in, exceeds a limit.
    RecordTooLarge,
    /// A record batch breaks the format's rules.
    InvalidBatch,
    /// A record batch's checksum does not match its bytes.
    CorruptBatch,
    /// A record is stamped further ahead of the broker's clock than its topic allows.
    InvalidTimestamp,
    /// The request or the configuration contradicts itself or exceeds a limit.
    InvalidRequest,
    /// The batch's sequence does not follow the last one appended for this producer.
    OutOfOrderSequence,
    /// The batch is in the log already, so long ago that its offset is forgotten.
    DuplicateSequence,
    /// A newer epoch of the same producer id has written.
    FencedProducer,
    /// The broker's disk is full; it refuses writes.
    DiskFull,
    /// The broker's storage failed.
    Storage,
    /// The broker's memory for requests in flight is used up.
    Throttled,
    /// The broker is stopping.
    ShuttingDown,
    /// A time-out passed. An append may or may not have happened.
    TimedOut,
    /// Fewer replicas are in sync than the topic asks for (`minInSyncReplicas`); nothing was appended.
    NotEnoughReplicas,
    /// A new leader does not know yet what the latest offset is.
    OffsetNotAvailable,
    /// The group has no such member: it was taken for gone. A consumer joins again by itself.
    UnknownMember,
    /// Another process has this member's instance id now.
    FencedMember,
    /// The partition is not this member's, or was not when it was read.
    NotOwner,
    /// There is no such group.
    UnknownGroup,
    /// The group has members.
    GroupNotEmpty,
    /// A limit of groups, members, transactions or their sizes.
    LimitExceeded,
    /// The transactional id is not known to its coordinator.
    UnknownTransactionalId,
    /// The last transaction has not ended everywhere yet.
    ConcurrentTransaction,
    /// The transaction was aborted: by its time-out, or since something of it failed. Begin another one.
    TransactionAborted,
    /// The transaction is committed.
    TransactionCommitted,
    /// The partition's leader does not know of the transaction.
    NotInTransaction,
    /// Offsets of the group depend on a transaction that is open.
    OffsetsPending,
    /// The producer's buffer has no room and [`Backpressure`](crate::Backpressure) says not to wait (longer).
    BufferFull,
    /// The topic's metadata isn't here yet; it is being fetched. Only from [`Producer::try_send`](crate::Producer::try_send).
    NotReady,
    /// The connection failed, or the peer does not speak the protocol.
    Transport,
    /// The producer or client was closed.
    Closed,
}

/// An error of the client or of a broker. Cheap to clone: all records of a failed batch share one.
#[derive(Clone, thiserror::Error)]
#[error("{0}")]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    message: String,
    topic: Option<Arc<str>>,
    partition: Option<i32>,
    metadata: BTreeMap<String, String>,
}

impl fmt::Display for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        // Brokers name the partition in the message already; say it once.
        if let Some(topic) = self.topic.as_deref().filter(|t| !self.message.contains(*t)) {
            write!(f, " (topic `{topic}`")?;
            match self.partition {
                Some(partition) => write!(f, ", partition {partition})")?,
                None => f.write_str(")")?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.kind)
            .field("message", &self.0.message)
            .field("topic", &self.0.topic)
            .field("partition", &self.0.partition)
            .field("metadata", &self.0.metadata)
            .finish()
    }
}

/// A broker's word on who leads a partition, from a `NOT_LEADER` error.
pub(crate) struct LeaderHint<'a> {
    pub(crate) id: i32,
    pub(crate) address: &'a str,
    pub(crate) epoch: i32,
}

impl Error {
    /// What went wrong, for programs.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the same call may succeed later. The producer and the consumer have then retried already, within their
    /// deadlines.
    pub fn is_retriable(&self) -> bool {
        use ErrorKind::*;
        matches!(
            self.0.kind,
            NotLeader
                | DiskFull
                | Throttled
                | ShuttingDown
                | TimedOut
                | NotEnoughReplicas
                | OffsetNotAvailable
                | ConcurrentTransaction
                | NotInTransaction
                | OffsetsPending
                | BufferFull
                | NotReady
                | Transport
        )
    }

    /// The topic concerned.
    pub fn topic(&self) -> Option<&str> {
        self.0.topic.as_deref()
    }

    /// The partition concerned.
    pub fn partition(&self) -> Option<i32> {
        self.0.partition
    }

    /// The broker's details: see `error.proto` for the keys of each reason.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.0.metadata
    }

    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error(Arc::new(Inner {
            kind,
            message: message.into(),
            topic: None,
            partition: None,
            metadata: BTreeMap::new(),
        }))
    }

    /// The same error, with the partition that it is about, unless it names one already.
    pub(crate) fn at(self, topic: &Arc<str>, partition: i32) -> Self {
        if self.0.topic.is_some() {
            return self;
        }
        self.edit(|inner| {
            inner.topic = Some(topic.clone());
            inner.partition = Some(partition);
        })
    }

    /// The same error with more details.
    pub(crate) fn with(self, details: impl IntoIterator<Item = (&'static str, String)>) -> Self {
        self.edit(|inner| {
            inner
                .metadata
                .extend(details.into_iter().map(|(k, v)| (k.to_owned(), v)))
        })
    }

    fn edit(self, change: impl FnOnce(&mut Inner)) -> Self {
        let mut inner = Arc::unwrap_or_clone(self.0);
        change(&mut inner);
        Error(Arc::new(inner))
    }

    pub(crate) fn unknown_topic(topic: &str) -> Self {
        Error::new(
            ErrorKind::UnknownTopic,
            format!("topic `{topic}` does not exist; create it or check its name"),
        )
        .with([("topic", topic.to_owned())])
        .edit(|inner| inner.topic = Some(topic.into()))
    }

    pub(crate) fn unknown_partition(topic: &Arc<str>, partition: i32, partitions: usize) -> Self {
        Error::new(
            ErrorKind::UnknownPartition,
            format!(
                "topic `{topic}` has no partition {partition}: it has {partitions}, counted from 0"
            ),
        )
        .with([("partitions", partitions.to_string())])
        .at(topic, partition)
    }

    pub(crate) fn no_leader(topic: &Arc<str>, partition: i32) -> Self {
        Error::new(
            ErrorKind::NotLeader,
            format!("partition {partition} of topic `{topic}` has no leader; wait until one of its brokers is back"),
        )
        .at(topic, partition)
    }

    pub(crate) fn closed(what: &str) -> Self {
        Error::new(
            ErrorKind::Closed,
            format!("the {what} is closed; build another one"),
        )
    }

    /// Where the broker says that the leader is.
    pub(crate) fn leader_hint(&self) -> Option<LeaderHint<'_>> {
        let get = |key| self.0.metadata.get(key);
        Some(LeaderHint {
            address: get("leader_address").filter(|a| !a.is_empty())?,
            id: get("leader_id")?.parse().ok()?,
            epoch: get("leader_epoch")?.parse().ok()?,
        })
    }

    fn from_reason(
        reason: v1::ErrorReason,
        message: String,
        metadata: BTreeMap<String, String>,
    ) -> Self {
        use v1::ErrorReason as Reason;
        let kind = match reason {
            Reason::UnknownTopic => ErrorKind::UnknownTopic,
            Reason::UnknownPartition => ErrorKind::UnknownPartition,
            Reason::NotLeader => ErrorKind::NotLeader,
            Reason::OffsetOutOfRange => ErrorKind::OffsetOutOfRange,
            Reason::RecordTooLarge => ErrorKind::RecordTooLarge,
            Reason::InvalidBatch => ErrorKind::InvalidBatch,
            Reason::CorruptBatch => ErrorKind::CorruptBatch,
            Reason::InvalidTimestamp => ErrorKind::InvalidTimestamp,
            Reason::InvalidRequest => ErrorKind::InvalidRequest,
            Reason::OutOfOrderSequence => ErrorKind::OutOfOrderSequence,
            Reason::DuplicateSequence => ErrorKind::DuplicateSequence,
            Reason::FencedProducer => ErrorKind::FencedProducer,
            Reason::DiskFull => ErrorKind::DiskFull,
            Reason::Storage => ErrorKind::Storage,
            Reason::Throttled => ErrorKind::Throttled,
            Reason::ShuttingDown => ErrorKind::ShuttingDown,
            Reason::TimedOut => ErrorKind::TimedOut,
            Reason::NotEnoughReplicas => ErrorKind::NotEnoughReplicas,
            Reason::OffsetNotAvailable => ErrorKind::OffsetNotAvailable,
            Reason::UnknownMember => ErrorKind::UnknownMember,
            Reason::FencedMember => ErrorKind::FencedMember,
            Reason::NotOwner => ErrorKind::NotOwner,
            Reason::UnknownGroup => ErrorKind::UnknownGroup,
            Reason::GroupNotEmpty => ErrorKind::GroupNotEmpty,
            Reason::LimitExceeded => ErrorKind::LimitExceeded,
            Reason::UnknownTransactionalId => ErrorKind::UnknownTransactionalId,
            Reason::ConcurrentTransaction => ErrorKind::ConcurrentTransaction,
            Reason::TransactionAborted => ErrorKind::TransactionAborted,
            Reason::TransactionCommitted => ErrorKind::TransactionCommitted,
            Reason::NotInTransaction => ErrorKind::NotInTransaction,
            Reason::OffsetsPending => ErrorKind::OffsetsPending,
            // A reason of a newer protocol: retrying what isn't understood could go on for ever.
            Reason::Unspecified => ErrorKind::InvalidRequest,
        };
        Error(Arc::new(Inner {
            kind,
            topic: metadata.get("topic").map(|t| t.as_str().into()),
            partition: metadata.get("partition").and_then(|p| p.parse().ok()),
            message,
            metadata,
        }))
    }

    /// The failure of one partition, or of one request on a stream.
    pub(crate) fn from_proto(error: v1::Error) -> Self {
        let reason =
            v1::ErrorReason::try_from(error.reason).unwrap_or(v1::ErrorReason::Unspecified);
        let message = match error.message {
            message if message.is_empty() => reason.as_str_name().to_owned(),
            message => message,
        };
        Error::from_reason(reason, message, error.metadata.into_iter().collect())
    }

    /// The failure of a call to the broker at `address`.
    pub(crate) fn from_status(status: &Status, address: &str) -> Self {
        let info = status.get_details_error_info();
        if let Some(info) = info.filter(|info| info.domain == ERROR_DOMAIN) {
            let reason = v1::ErrorReason::from_str_name(&format!("ERROR_REASON_{}", info.reason));
            return Error::from_reason(
                reason.unwrap_or(v1::ErrorReason::Unspecified),
                status.message().to_owned(),
                info.metadata.into_iter().collect(),
            );
        }
        let kind = match status.code() {
            Code::DeadlineExceeded => ErrorKind::TimedOut,
            Code::InvalidArgument | Code::OutOfRange | Code::Unimplemented => {
                ErrorKind::InvalidRequest
            }
            Code::Unauthenticated | Code::PermissionDenied => ErrorKind::InvalidRequest,
            _ => ErrorKind::Transport,
        };
        let what = match status.message() {
            "" if kind == ErrorKind::Transport => {
                format!("the connection failed ({:?})", status.code())
            }
            message => message.to_owned(),
        };
        let causes = with_causes(what, StdError::source(status));
        let mut message = format!("broker {address}: {causes}");
        if status.code() == Code::Unimplemented {
            message.push_str("; is this a Millrace broker of the same version?");
        }
        Error::new(kind, message)
    }

    /// A record batch that can't be built or read.
    pub(crate) fn from_batch(
        error: &BatchError,
        topic: &Arc<str>,
        partition: i32,
        offset: Option<i64>,
    ) -> Self {
        let kind = match error {
            BatchError::CorruptCrc { .. } => ErrorKind::CorruptBatch,
            BatchError::TooLarge { .. } => ErrorKind::RecordTooLarge,
            _ => ErrorKind::InvalidBatch,
        };
        let place = match offset {
            Some(offset) => format!("topic `{topic}`, partition {partition}, offset {offset}"),
            None => format!("topic `{topic}`, partition {partition}"),
        };
        let built = Error::new(kind, format!("{place}: {error}")).at(topic, partition);
        match offset {
            Some(offset) => built.with([("offset", offset.to_string())]),
            None => built,
        }
    }
}

/// `what` and the causes behind it, each once: wrappers often repeat what they wrap.
pub(crate) fn with_causes(what: String, mut cause: Option<&(dyn StdError + 'static)>) -> String {
    let mut parts = vec![what];
    while let Some(error) = cause {
        cause = error.source();
        // Only names the layer that failed: what follows says more.
        if error.is::<tonic::transport::Error>() && cause.is_some() {
            continue;
        }
        let text = error.to_string();
        if !parts.iter().any(|part| part.contains(&text)) {
            parts.retain(|part| !text.contains(part.as_str()));
            parts.push(text);
        }
    }
    parts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic_types::ErrorDetails;

    #[test]
    fn a_status_with_error_info_keeps_reason_place_and_metadata() {
        let metadata = [
            ("topic", "orders"),
            ("partition", "3"),
            ("leader_id", "2"),
            ("leader_address", "b2:7070"),
            ("leader_epoch", "9"),
        ];
        let details = ErrorDetails::with_error_info(
            "NOT_LEADER",
            ERROR_DOMAIN,
            metadata
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .into_iter()
                .collect::<std::collections::HashMap<_, _>>(),
        );
        let status = Status::with_error_details(
            Code::FailedPrecondition,
            "broker 1 does not lead orders-3",
            details,
        );
        let error = Error::from_status(&status, "b1:7070");
        assert_eq!(error.kind(), ErrorKind::NotLeader);
        assert!(error.is_retriable());
        assert_eq!(
            (error.topic(), error.partition()),
            (Some("orders"), Some(3))
        );
        let hint = error.leader_hint().unwrap();
        assert_eq!((hint.id, hint.address, hint.epoch), (2, "b2:7070", 9));
        assert_eq!(error.to_string(), "broker 1 does not lead orders-3");
    }

    #[test]
    fn every_reason_of_the_protocol_has_a_kind_of_its_own() {
        let mut kinds = std::collections::HashSet::new();
        for number in 1..=31 {
            let reason = v1::ErrorReason::try_from(number).unwrap();
            let error = v1::Error {
                reason: number,
                message: String::new(),
                metadata: Default::default(),
            };
            let error = Error::from_proto(error);
            assert!(
                kinds.insert(error.kind()),
                "{reason:?} shares {:?}",
                error.kind()
            );
            assert!(error.to_string().starts_with("ERROR_REASON_"));
        }
        assert!(
            v1::ErrorReason::try_from(32).is_err(),
            "a new reason: map it and extend this test"
        );
    }

    #[test]
    fn each_cause_appears_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("{0}")]
        struct Layer(&'static str, #[source] Option<Box<Layer>>);
        let chain = |texts: &[&'static str]| {
            let layers = texts.iter().rev();
            layers.fold(None, |inner, text| Some(Box::new(Layer(text, inner))))
        };
        let told = |texts| {
            let chain = chain(texts);
            with_causes("broker b".into(), chain.as_deref().map(|layer| layer as _))
        };
        assert_eq!(told(&[]), "broker b");
        assert_eq!(told(&["tcp", "tcp", "refused"]), "broker b: tcp: refused");
        assert_eq!(told(&["tcp", "tcp: refused"]), "broker b: tcp: refused");
        assert_eq!(told(&["tcp: refused", "refused"]), "broker b: tcp: refused");
    }

    #[test]
    fn a_status_without_error_info_is_mapped_by_its_code() {
        for (code, kind, retriable) in [
            (Code::Unavailable, ErrorKind::Transport, true),
            (Code::DeadlineExceeded, ErrorKind::TimedOut, true),
            (Code::Unimplemented, ErrorKind::InvalidRequest, false),
        ] {
            let error = Error::from_status(&Status::new(code, "x"), "b:1");
            assert_eq!((error.kind(), error.is_retriable()), (kind, retriable));
            assert!(error.to_string().contains("b:1"), "{error}");
        }
    }
}
