//! Bounds what a request becomes in memory. An empty nested message takes two bytes on the wire and around a hundred once it is
//! decoded, so a limit on a message's bytes alone lets 8 MiB become hundreds. Elements are therefore counted before decoding.
//!
//! An element is one value of a repeated field that holds messages, strings or bytes. (Numbers grow eight times at most.)
//! Which fields those are, and which messages are requests, comes from [`DESCRIPTORS`]; responses come from brokers, which are
//! trusted, and are not counted.
//!
//! The walk follows prost's own, step by step: whatever prost would have decoded before it finds a message malformed is counted
//! first, also where a nested message claims more bytes than the one around it has. What is malformed is left to prost to refuse.

use std::{collections::HashMap, sync::LazyLock};

use prost::{
    Message, Name,
    encoding::{WireType, decode_key, decode_varint},
};
use prost_types::{
    DescriptorProto, FieldDescriptorProto, FileDescriptorSet,
    field_descriptor_proto::{Label, Type},
};

use crate::DESCRIPTORS;

/// The most elements of one request. A batch of 1 MiB, the usual limit of a topic, holds no more records than this unless they
/// are hardly longer than nothing; and 10,000 partitions are the limit of a request anyway. Decoded, so many take about 20 MiB.
pub const MAX_REQUEST_ELEMENTS: usize = 100_000;

/// A message and as many levels within it as prost decodes.
const MAX_DEPTH: usize = 101;

/// A message that is a method's input.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestType(usize);

/// A request has more elements than [`MAX_REQUEST_ELEMENTS`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the request holds more than {MAX_REQUEST_ELEMENTS} elements, the last of them in {field:?}; split it into several requests"
)]
pub(crate) struct TooManyElements {
    /// Where one was too many.
    pub(crate) field: &'static str,
}

impl RequestType {
    /// `None` if no method takes such a message.
    pub(crate) fn of<M: Name>() -> Option<RequestType> {
        SCHEMA
            .requests
            .get(&M::full_name())
            .map(|index| RequestType(*index))
    }

    /// Counts the elements of an encoded request. Takes time for each of its fields, whatever their lengths.
    pub(crate) fn check(self, encoded: &[u8]) -> Result<(), TooManyElements> {
        self.check_limit(encoded, MAX_REQUEST_ELEMENTS)
    }

    fn check_limit(self, encoded: &[u8], limit: usize) -> Result<(), TooManyElements> {
        let mut walk = Walk {
            rest: encoded,
            left: limit,
        };
        match walk.message(self.0, 0, MAX_DEPTH) {
            Err(Stop::TooMany(field)) => Err(TooManyElements { field }),
            Ok(()) | Err(Stop::Malformed) => Ok(()),
        }
    }
}

/// What of the descriptors counting needs.
#[derive(Default)]
struct Schema {
    /// The fields of each message that are counted or lead to what is.
    messages: Vec<Vec<Field>>,
    /// The messages that methods take, by full name.
    requests: HashMap<String, usize>,
}

struct Field {
    number: u32,
    name: String,
    repeated: bool,
    /// The message that it holds.
    message: Option<usize>,
}

/// Read once. The descriptors are compiled in, and a test holds that they are readable.
static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    FileDescriptorSet::decode(DESCRIPTORS).map_or_else(|_| Schema::default(), Schema::new)
});

impl Schema {
    fn new(files: FileDescriptorSet) -> Schema {
        let mut named = Vec::new();
        let mut inputs = Vec::new();
        for file in files.file {
            let package = format!(".{}", file.package());
            let methods = file.service.into_iter().flat_map(|service| service.method);
            inputs.extend(methods.filter_map(|method| method.input_type));
            for message in file.message_type {
                flatten(&package, message, &mut named);
            }
        }
        // Types are referred to by their full name with a dot in front.
        let index: HashMap<String, usize> = named
            .iter()
            .enumerate()
            .map(|(index, (name, _))| (name.clone(), index))
            .collect();
        let field = |field: FieldDescriptorProto| Field {
            number: field.number().unsigned_abs(),
            repeated: field.label() == Label::Repeated,
            message: index.get(field.type_name()).copied(),
            name: field.name.unwrap_or_default(),
        };
        let counts = |field: &FieldDescriptorProto| match field.r#type() {
            Type::Message => true,
            Type::String | Type::Bytes => field.label() == Label::Repeated,
            _ => false,
        };
        Schema {
            messages: named
                .into_iter()
                .map(|(_, fields)| fields.into_iter().filter(counts).map(field).collect())
                .collect(),
            requests: inputs
                .iter()
                .filter_map(|name| Some((name.strip_prefix('.')?.to_owned(), *index.get(name)?)))
                .collect(),
        }
    }

    fn field(&self, message: usize, number: u32) -> Option<&Field> {
        self.messages[message]
            .iter()
            .find(|field| field.number == number)
    }
}

/// A message and those declared within it, by full name.
fn flatten(
    scope: &str,
    message: DescriptorProto,
    named: &mut Vec<(String, Vec<FieldDescriptorProto>)>,
) {
    let name = format!("{scope}.{}", message.name());
    for nested in message.nested_type {
        flatten(&name, nested, named);
    }
    named.push((name, message.field));
}

/// Why a walk ends early.
enum Stop {
    TooMany(&'static str),
    Malformed,
}

struct Walk<'a> {
    rest: &'a [u8],
    /// Elements that may follow.
    left: usize,
}

impl Walk<'_> {
    /// Walks through a message that ends where `end` bytes of the whole are left.
    fn message(&mut self, message: usize, end: usize, depth: usize) -> Result<(), Stop> {
        let depth = depth.checked_sub(1).ok_or(Stop::Malformed)?;
        while self.rest.len() > end {
            let (number, wire_type) = self.key()?;
            let field = match wire_type {
                WireType::LengthDelimited => SCHEMA.field(message, number),
                _ => None,
            };
            let Some(field) = field else {
                self.skip_field(wire_type)?;
                continue;
            };
            if field.repeated {
                self.left = self.left.checked_sub(1).ok_or(Stop::TooMany(&field.name))?;
            }
            match field.message {
                Some(nested) => {
                    let length = self.length()?;
                    self.message(nested, self.rest.len() - length, depth)?;
                }
                None => self.skip_field(wire_type)?,
            }
        }
        // Prost notices only now, too, that a field went beyond its message's end.
        if self.rest.len() == end {
            Ok(())
        } else {
            Err(Stop::Malformed)
        }
    }

    fn key(&mut self) -> Result<(u32, WireType), Stop> {
        decode_key(&mut self.rest).map_err(|_| Stop::Malformed)
    }

    fn skip_field(&mut self, mut wire_type: WireType) -> Result<(), Stop> {
        // No message here has groups, but an unknown field may be one, and what follows it counts.
        let mut groups = 0_usize;
        loop {
            match wire_type {
                WireType::Varint => drop(self.varint()?),
                WireType::SixtyFourBit => self.skip(8)?,
                WireType::ThirtyTwoBit => self.skip(4)?,
                WireType::LengthDelimited => {
                    let length = self.length()?;
                    self.skip(length)?;
                }
                WireType::StartGroup => groups += 1,
                WireType::EndGroup => groups = groups.checked_sub(1).ok_or(Stop::Malformed)?,
            }
            if groups == 0 {
                return Ok(());
            }
            (_, wire_type) = self.key()?;
        }
    }

    /// A length that the bytes left allow.
    fn length(&mut self) -> Result<usize, Stop> {
        let length = usize::try_from(self.varint()?).map_err(|_| Stop::Malformed)?;
        if length > self.rest.len() {
            return Err(Stop::Malformed);
        }
        Ok(length)
    }

    fn skip(&mut self, bytes: usize) -> Result<(), Stop> {
        self.rest = self.rest.get(bytes..).ok_or(Stop::Malformed)?;
        Ok(())
    }

    fn varint(&mut self) -> Result<u64, Stop> {
        decode_varint(&mut self.rest).map_err(|_| Stop::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;
    use crate::v1::*;

    fn of<M: Name>() -> RequestType {
        RequestType::of::<M>().unwrap()
    }

    /// What [`RequestType::check`] counts, counted in the decoded request.
    fn elements(request: &ProduceRequest) -> usize {
        let of_record = |record: &Record| 1 + record.headers.len();
        let of_partition = |partition: &PartitionRecords| {
            1 + partition.batches.len() + partition.records.iter().map(of_record).sum::<usize>()
        };
        request.partitions.iter().map(of_partition).sum()
    }

    fn request(shape: &[(usize, Vec<usize>)]) -> ProduceRequest {
        let record = |headers: &usize| Record {
            value: Some("v".into()),
            headers: vec![Header::default(); *headers],
            ..Record::default()
        };
        let partitions = shape.iter().map(|(batches, records)| PartitionRecords {
            topic: "t".into(),
            partition: 0,
            batches: vec!["batch".into(); *batches],
            records: records.iter().map(record).collect(),
        });
        ProduceRequest {
            partitions: partitions.collect(),
            ..ProduceRequest::default()
        }
    }

    #[test]
    fn every_request_is_known_and_no_response_is() {
        of::<ProduceRequest>();
        of::<ProduceStreamRequest>();
        of::<InitProducerRequest>();
        of::<FetchRequest>();
        of::<ListOffsetsRequest>();
        of::<GetMetadataRequest>();
        assert!(RequestType::of::<FetchResponse>().is_none());
        assert!(RequestType::of::<GetMetadataResponse>().is_none());
    }

    #[test]
    fn messages_of_all_depths_batches_and_names_count() {
        let produce = request(&[(2, vec![]), (0, vec![3, 0])]);
        assert_eq!(elements(&produce), 9);
        let stream = ProduceStreamRequest {
            correlation_id: 7,
            request: Some(produce.clone()),
        };
        let names = GetMetadataRequest {
            topics: vec![String::new(); 9],
        };
        for (kind, encoded, last) in [
            (of::<ProduceRequest>(), produce.encode_to_vec(), "records"),
            (
                of::<ProduceStreamRequest>(),
                stream.encode_to_vec(),
                "records",
            ),
            (of::<GetMetadataRequest>(), names.encode_to_vec(), "topics"),
        ] {
            assert_eq!(kind.check_limit(&encoded, 9), Ok(()));
            let refused = Err(TooManyElements { field: last });
            assert_eq!(kind.check_limit(&encoded, 8), refused);
        }
    }

    #[test]
    fn millions_of_empty_messages_are_refused() {
        // Field 3 (partitions; field 5 in a fetch, 1 in a query), no bytes.
        for (kind, element) in [
            (of::<ProduceRequest>(), [0x1a, 0]),
            (of::<FetchRequest>(), [0x2a, 0]),
            (of::<ListOffsetsRequest>(), [0x0a, 0]),
            (of::<GetMetadataRequest>(), [0x0a, 0]),
        ] {
            assert_eq!(kind.check(&element.repeat(MAX_REQUEST_ELEMENTS)), Ok(()));
            assert!(kind.check(&element.repeat(4 << 20)).is_err());
        }
    }

    #[test]
    fn nothing_hides_elements() {
        let elements = [0x1a, 0].repeat(10);
        // An unknown group with a group in it; unknown fields of every kind; a partition that claims to go on to the end of all,
        // within a request that claims to be empty.
        let group = [0x7b, 0x7b, 0x08, 1, 0x7c, 0x7c].to_vec();
        let unknown = [&[0x78, 1, 0x79][..], &[0; 8], &[0x7a, 1, 0, 0x7d], &[0; 4]].concat();
        for prefix in [group, unknown] {
            let encoded = [prefix, elements.clone()].concat();
            assert_eq!(of::<ProduceRequest>().check_limit(&encoded, 10), Ok(()));
            assert!(of::<ProduceRequest>().check_limit(&encoded, 9).is_err());
        }
        let batches = [0x1a, 0].repeat(10);
        let encoded = [&[0x12, 2, 0x1a, 20][..], &batches].concat();
        assert!(ProduceStreamRequest::decode(&encoded[..]).is_err());
        let kind = of::<ProduceStreamRequest>();
        assert_eq!(kind.check_limit(&encoded, 11), Ok(()));
        assert!(kind.check_limit(&encoded, 10).is_err());
    }

    proptest! {
        #[test]
        fn what_is_let_through_decodes_to_no_more_than_the_limit(
            shape in vec((0..4_usize, vec(0..4_usize, 0..4)), 0..6),
            damage in vec((any::<Index>(), any::<u8>()), 0..4),
        ) {
            let request = request(&shape);
            let mut encoded = request.encode_to_vec();
            let kind = of::<ProduceRequest>();
            let count = elements(&request);
            prop_assert_eq!(kind.check_limit(&encoded, count), Ok(()));
            if let Some(less) = count.checked_sub(1) {
                prop_assert!(kind.check_limit(&encoded, less).is_err());
            }
            for (at, byte) in damage {
                if !encoded.is_empty() {
                    let at = at.index(encoded.len());
                    encoded[at] = byte;
                }
            }
            if let Ok(decoded) = ProduceRequest::decode(&encoded[..]) {
                let count = elements(&decoded);
                prop_assert_eq!(kind.check_limit(&encoded, count), Ok(()));
                if let Some(less) = count.checked_sub(1) {
                    prop_assert!(kind.check_limit(&encoded, less).is_err());
                }
            }
        }
    }
}
