//! What a shard keeps in its partition of the internal topic: for each key its newest value, or none.

use bytes::Bytes;
use millrace_proto::v1::{
    GroupLogGroup, GroupLogKey, GroupLogMember, GroupLogOffset, GroupLogPartition, GroupLogSelf,
    GroupLogTransaction, group_log_key::Of,
};
use prost::Message;

use crate::shards::{self, EntryError};

/// A change of one group.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) group: String,
    pub(crate) what: What,
}

/// What of it changed, and to what; `None`: it is no more.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum What {
    Group(Option<GroupLogGroup>),
    Member(String, Option<GroupLogMember>),
    Offset(GroupLogPartition, Option<GroupLogOffset>),
    /// A transaction with offsets, by its producer id.
    Transaction(i64, Option<GroupLogTransaction>),
}

impl shards::Entry for Entry {
    fn encode(&self) -> (Vec<u8>, Option<Vec<u8>>) {
        let (of, value) = match &self.what {
            What::Group(value) => (Of::Self_(GroupLogSelf {}), encoded(value)),
            What::Member(id, value) => (Of::MemberId(id.clone()), encoded(value)),
            What::Offset(partition, value) => (Of::Partition(partition.clone()), encoded(value)),
            What::Transaction(id, value) => (Of::ProducerId(*id), encoded(value)),
        };
        let key = GroupLogKey {
            group_id: self.group.clone(),
            of: Some(of),
        };
        (key.encode_to_vec(), value)
    }

    fn decode(key: Option<Bytes>, value: Option<Bytes>) -> Result<Entry, EntryError> {
        let key = GroupLogKey::decode(key.ok_or(EntryError::NoKey)?)?;
        let what = match key.of.ok_or(EntryError::UnknownKey)? {
            Of::Self_(_) => What::Group(decoded(value)?),
            Of::MemberId(id) => What::Member(id, decoded(value)?),
            Of::Partition(partition) => What::Offset(partition, decoded(value)?),
            Of::ProducerId(id) => What::Transaction(id, decoded(value)?),
        };
        let group = key.group_id;
        Ok(Entry { group, what })
    }
}

fn encoded<M: Message>(value: &Option<M>) -> Option<Vec<u8>> {
    value.as_ref().map(Message::encode_to_vec)
}

fn decoded<M: Message + Default>(value: Option<Bytes>) -> Result<Option<M>, prost::DecodeError> {
    value.map(M::decode).transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shards::Entry as _;

    #[test]
    fn entries_come_back_as_they_were_written() {
        let partition = GroupLogPartition {
            topic: "orders".into(),
            partition: 3,
        };
        for what in [
            What::Group(Some(GroupLogGroup {
                epoch: 7,
                empty_since_ms: Some(1),
            })),
            What::Group(None),
            What::Member("m".into(), Some(GroupLogMember::default())),
            What::Member("m".into(), None),
            What::Offset(partition.clone(), Some(GroupLogOffset::default())),
            What::Offset(partition, None),
            What::Transaction(7, Some(GroupLogTransaction::default())),
            What::Transaction(7, None),
        ] {
            let group = "g".to_owned();
            let entry = Entry { group, what };
            let (key, value) = entry.encode();
            let decoded = Entry::decode(Some(key.into()), value.map(Bytes::from)).unwrap();
            assert_eq!(decoded, entry);
        }
        assert!(Entry::decode(None, None).is_err());
        assert!(Entry::decode(Some(Bytes::new()), None).is_err());
        assert!(Entry::decode(Some(Bytes::from_static(b"\xff")), None).is_err());
    }
}
