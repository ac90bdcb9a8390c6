//! What a shard keeps in its partition of the internal topic: for each transactional id its newest value, or none.

use bytes::Bytes;
use millrace_proto::v1::{TransactionLogKey, TransactionLogValue};
use prost::Message;

use crate::shards::{self, EntryError};

/// A change of one transactional id; `None`: it is no more.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) id: String,
    pub(crate) value: Option<TransactionLogValue>,
}

impl shards::Entry for Entry {
    fn encode(&self) -> (Vec<u8>, Option<Vec<u8>>) {
        let key = TransactionLogKey {
            transactional_id: self.id.clone(),
        };
        let value = self.value.as_ref().map(Message::encode_to_vec);
        (key.encode_to_vec(), value)
    }

    fn decode(key: Option<Bytes>, value: Option<Bytes>) -> Result<Self, EntryError> {
        let key = TransactionLogKey::decode(key.ok_or(EntryError::NoKey)?)?;
        if key.transactional_id.is_empty() {
            return Err(EntryError::UnknownKey);
        }
        Ok(Self {
            id: key.transactional_id,
            value: value.map(TransactionLogValue::decode).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shards::Entry as _;

    #[test]
    fn entries_come_back_as_they_were_written() {
        for value in [None, Some(TransactionLogValue::default())] {
            let id = "copier-0".to_owned();
            let entry = Entry { id, value };
            let (key, value) = entry.encode();
            let decoded = Entry::decode(Some(key.into()), value.map(Bytes::from)).unwrap();
            assert_eq!(decoded, entry);
        }
        assert!(Entry::decode(None, None).is_err());
        assert!(Entry::decode(Some(Bytes::new()), None).is_err());
        assert!(Entry::decode(Some(Bytes::from_static(b"\xff")), None).is_err());
    }
}
