//! Whatever arrives at the gRPC boundary ends in a clear answer: generated requests, most of them damaged in some way, sent to a real
//! broker. Another topic stays writable and readable meanwhile, and the broker stays within its memory.

use std::{
    fmt,
    sync::LazyLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use millrace_e2e::{Api, Broker, batch, batch_of};
use millrace_proto::v1::{
    self, FetchPartition, FetchRequest, GetMetadataRequest, Header, ListOffsetsRequest,
    OffsetQuery, PartitionRecords, ProduceRequest, ProduceStreamRequest, Record,
    offset_query::Spec,
};
use millrace_record::{BatchOptions, Compression, HEADER_LEN, ProducerState};
use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{Index, select},
    test_runner::{Config, RngSeed, TestError, TestRunner},
};
use prost::{DecodeError, Message};
use serde_json::json;
use tokio::{runtime::Runtime, time::timeout};
use tonic::Code;

use crate::raw::{Answer, answer, call, connect};

const CASES: u32 = 500;
/// Long for any of these requests, on a machine that does much else.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// What gRPC clients take as headers, unless told otherwise.
const MAX_HEADER_BYTES: usize = 8 << 10;
/// More than the broker had before, at most. Its buffers and caches, as configured here, are most of it.
const MEMORY: u64 = 128 << 20;

/// One call, as it goes onto the wire.
#[derive(Clone)]
struct Call {
    method: Method,
    message: Vec<u8>,
    frame: Frame,
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = &self.message[..self.message.len().min(300)];
        let (length, bytes) = (self.message.len(), shown.escape_ascii());
        write!(
            f,
            "{:?}, {:?}, {length} bytes: {bytes}",
            self.method, self.frame
        )
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Method {
    Produce,
    ProduceStream,
    InitProducer,
    Fetch,
    ListOffsets,
    GetMetadata,
}

impl Method {
    const ALL: [Method; 6] = [
        Method::Produce,
        Method::ProduceStream,
        Method::InitProducer,
        Method::Fetch,
        Method::ListOffsets,
        Method::GetMetadata,
    ];

    fn path(self) -> &'static str {
        match self {
            Method::Produce => "ProducerService/Produce",
            Method::ProduceStream => "ProducerService/ProduceStream",
            Method::InitProducer => "ProducerService/InitProducer",
            Method::Fetch => "ConsumerService/Fetch",
            Method::ListOffsets => "ConsumerService/ListOffsets",
            Method::GetMetadata => "MetadataService/GetMetadata",
        }
    }

    /// The errors within an answer that is OK as a whole.
    fn errors(self, answer: &Bytes) -> Result<Vec<v1::Error>, DecodeError> {
        let bytes = answer.clone();
        let of_produce = |answer: v1::ProduceResponse| {
            let errors = answer.results.into_iter().filter_map(|result| result.error);
            errors.collect()
        };
        Ok(match self {
            Method::Produce => of_produce(v1::ProduceResponse::decode(bytes)?),
            Method::ProduceStream => {
                let answer = v1::ProduceStreamResponse::decode(bytes)?;
                let mut errors: Vec<_> = answer.response.map(of_produce).unwrap_or_default();
                errors.extend(answer.error);
                errors
            }
            Method::InitProducer => {
                v1::InitProducerResponse::decode(bytes)?;
                Vec::new()
            }
            Method::Fetch => {
                let results = v1::FetchResponse::decode(bytes)?.results.into_iter();
                results.filter_map(|result| result.error).collect()
            }
            Method::ListOffsets => {
                let results = v1::ListOffsetsResponse::decode(bytes)?.results.into_iter();
                results.filter_map(|result| result.error).collect()
            }
            Method::GetMetadata => {
                let topics = v1::GetMetadataResponse::decode(bytes)?.topics.into_iter();
                topics.filter_map(|topic| topic.error).collect()
            }
        })
    }
}

/// What is done to gRPC's framing.
#[derive(Clone, Debug)]
enum Frame {
    Right,
    /// A length that is not the message's.
    Claims(u32),
    /// A first byte that is no compression in use.
    Compressed(u8),
    /// The end is missing, of the prefix perhaps.
    Cut(Index),
    /// Nothing at all.
    Missing,
    /// A second message follows.
    Twice,
}

impl Call {
    fn framed(&self) -> Bytes {
        let mut framed = vec![0];
        framed.extend_from_slice(&(self.message.len() as u32).to_be_bytes());
        framed.extend_from_slice(&self.message);
        match self.frame {
            Frame::Right => {}
            Frame::Claims(length) => framed[1..5].copy_from_slice(&length.to_be_bytes()),
            Frame::Compressed(flag) => framed[0] = flag,
            Frame::Cut(at) => framed.truncate(at.index(framed.len())),
            Frame::Missing => framed.clear(),
            Frame::Twice => framed.extend_from_within(..),
        }
        framed.into()
    }

    /// A fetch may ask the broker to wait for a minute, and damage may make it one that does.
    fn asks_to_wait(&self) -> bool {
        self.method == Method::Fetch
            && FetchRequest::decode(&self.message[..])
                .is_ok_and(|fetch| fetch.min_bytes > 0 && fetch.max_wait_ms > 1_000)
    }
}

fn frame() -> impl Strategy<Value = Frame> {
    let length = prop_oneof![
        0..200_u32,
        select(vec![
            8 << 20,
            (8 << 20) + 1,
            i32::MAX as u32,
            1 << 31,
            u32::MAX
        ]),
    ];
    prop_oneof![
        4 => length.prop_map(Frame::Claims),
        1 => (1..=u8::MAX).prop_map(Frame::Compressed),
        2 => any::<Index>().prop_map(Frame::Cut),
        1 => Just(Frame::Missing),
        1 => Just(Frame::Twice),
    ]
}

fn topic() -> impl Strategy<Value = String> {
    prop_oneof![
        12 => Just("target".to_owned()),
        1 => "[a-zA-Z0-9._-]{0,300}",
        1 => "\\PC{0,100}",
        1 => (any::<char>(), 1..100_000_usize).prop_map(|(c, count)| c.to_string().repeat(count)),
    ]
}

fn number() -> impl Strategy<Value = i64> {
    let edges = vec![
        0,
        1,
        -1,
        i32::MAX.into(),
        i32::MIN.into(),
        u32::MAX.into(),
        i64::MAX,
        i64::MIN,
    ];
    prop_oneof![select(edges), any::<i64>(), -100..100_i64]
}

fn partition() -> impl Strategy<Value = i32> {
    prop_oneof![8 => 0..2_i32, 1 => any::<i32>()]
}

fn whole_batch() -> impl Strategy<Value = Bytes> {
    let value = prop_oneof![
        vec(any::<u8>(), 0..50),
        (any::<u8>(), 0..20_000_usize).prop_map(|(byte, length)| vec![byte; length]),
    ];
    let producer =
        (1..5_i64, 0..2_i16, 0..10_i32).prop_map(|(id, epoch, base_sequence)| ProducerState {
            id,
            epoch,
            base_sequence,
        });
    let compression = select(&Compression::ALL[..]);
    (vec(value, 1..5), compression, option::of(producer)).prop_map(
        |(values, compression, producer)| {
            let options = BatchOptions {
                compression,
                producer,
                ..BatchOptions::default()
            };
            batch_of(values, options)
        },
    )
}

/// What is done to a batch.
#[derive(Clone, Debug)]
enum BatchDamage {
    Flip(Index, u8),
    Cut(Index),
    Longer(Vec<u8>),
    /// A field of the header: where it is, its width, its value.
    Field((usize, usize), i64),
    /// Record count and last offset delta, which fit one another.
    Count(i32),
    NoRecords,
    Bomb,
}

/// The fields behind the base offset, which the broker sets.
const FIELDS: [(usize, usize); 12] = [
    (8, 4),
    (12, 4),
    (16, 1),
    (17, 4),
    (21, 2),
    (23, 4),
    (27, 8),
    (35, 8),
    (43, 8),
    (51, 2),
    (53, 4),
    (57, 4),
];

/// 64 MiB of zeros, compressed to a few thousand bytes.
static BOMB: LazyLock<Bytes> = LazyLock::new(|| {
    let options = BatchOptions {
        compression: Compression::Zstd,
        ..BatchOptions::default()
    };
    batch_of([vec![0; 64 << 20]], options)
});

impl BatchDamage {
    fn apply(self, batch: &mut Vec<u8>) {
        let mut put = |at: usize, width: usize, value: i64| {
            if let Some(field) = batch.get_mut(at..at + width) {
                field.copy_from_slice(&value.to_be_bytes()[8 - width..]);
            }
        };
        match self {
            BatchDamage::Field((at, width), value) => put(at, width, value),
            BatchDamage::Count(count) => {
                put(57, 4, count.into());
                put(23, 4, i64::from(count) - 1);
            }
            BatchDamage::NoRecords => {
                put(8, 4, HEADER_LEN as i64 - 12);
                put(57, 4, 0);
                put(23, 4, -1);
                batch.truncate(HEADER_LEN);
            }
            BatchDamage::Flip(at, bit) => flip(batch, at, bit),
            BatchDamage::Cut(at) => batch.truncate(at.index(batch.len() + 1)),
            BatchDamage::Longer(more) => batch.extend(more),
            BatchDamage::Bomb => *batch = BOMB.to_vec(),
        }
    }
}

fn flip(bytes: &mut [u8], at: Index, bit: u8) {
    if !bytes.is_empty() {
        bytes[at.index(bytes.len())] ^= 1 << bit;
    }
}

fn damaged_batch() -> impl Strategy<Value = Bytes> {
    let damage = prop_oneof![
        2 => (any::<Index>(), 0..8_u8).prop_map(|(at, bit)| BatchDamage::Flip(at, bit)),
        2 => any::<Index>().prop_map(BatchDamage::Cut),
        1 => vec(any::<u8>(), 1..100).prop_map(BatchDamage::Longer),
        6 => (select(&FIELDS[..]), number()).prop_map(|(at, value)| BatchDamage::Field(at, value)),
        2 => any::<i32>().prop_map(BatchDamage::Count),
        1 => Just(BatchDamage::NoRecords),
        1 => Just(BatchDamage::Bomb),
    ];
    // With a checksum that fits, the damage gets as far as it can.
    (whole_batch(), vec(damage, 1..3), any::<bool>()).prop_map(|(batch, damages, right_crc)| {
        let mut batch = batch.to_vec();
        for damage in damages {
            damage.apply(&mut batch);
        }
        if right_crc && batch.len() >= HEADER_LEN {
            let crc = crc32c::crc32c(&batch[21..]);
            batch[17..21].copy_from_slice(&crc.to_be_bytes());
        }
        batch.into()
    })
}

fn records() -> impl Strategy<Value = Vec<Record>> {
    let bytes = || option::of(vec(any::<u8>(), 0..20).prop_map(Bytes::from));
    let header = ("\\PC{0,5}", bytes()).prop_map(|(key, value)| Header { key, value });
    let record = (bytes(), bytes(), vec(header, 0..3), option::of(number())).prop_map(
        |(key, value, headers, timestamp_ms)| Record {
            key,
            value,
            headers,
            timestamp_ms,
            offset: 0,
        },
    );
    vec(record, 0..5)
}

fn produce(batch: impl Strategy<Value = Bytes>) -> impl Strategy<Value = ProduceRequest> {
    let content = prop_oneof![
        3 => vec(batch, 0..4).prop_map(|batches| (batches, Vec::new())),
        1 => records().prop_map(|records| (Vec::new(), records)),
    ];
    let entry =
        (topic(), partition(), content).prop_map(|(topic, partition, (batches, records))| {
            PartitionRecords {
                topic,
                partition,
                batches,
                records,
            }
        });
    (0..5_i32, 0..3_u32, vec(entry, 0..4)).prop_map(|(acks, timeout_s, partitions)| {
        ProduceRequest {
            acks,
            timeout_ms: timeout_s * 1_000,
            partitions,
        }
    })
}

/// A request that can be decoded; what is in it may be wrong.
fn request(
    batch: impl Strategy<Value = Bytes> + Clone,
) -> impl Strategy<Value = (Method, Vec<u8>)> {
    let fetched = (topic(), partition(), number(), 0..100_000_u32).prop_map(
        |(topic, partition, offset, max_bytes)| FetchPartition {
            topic,
            partition,
            offset,
            max_bytes,
        },
    );
    let fetch =
        (vec(fetched, 0..5), 0..4_i32, any::<u32>()).prop_map(|(partitions, format, max_bytes)| {
            FetchRequest {
                partitions,
                format,
                max_bytes,
                ..FetchRequest::default()
            }
        });
    let spec = prop_oneof![
        Just(Spec::Earliest(v1::Earliest {})),
        Just(Spec::Latest(v1::Latest {})),
        number().prop_map(Spec::TimestampMs),
    ];
    let query =
        (topic(), partition(), option::of(spec)).prop_map(|(topic, partition, spec)| OffsetQuery {
            topic,
            partition,
            spec,
        });
    let stream = (any::<u64>(), option::of(produce(batch.clone())));
    let produced = |request: ProduceRequest| (Method::Produce, request.encode_to_vec());
    let streamed = |(correlation_id, request)| {
        let request = ProduceStreamRequest {
            correlation_id,
            request,
        };
        (Method::ProduceStream, request.encode_to_vec())
    };
    let listed = |queries| {
        let request = ListOffsetsRequest {
            queries,
            ..ListOffsetsRequest::default()
        };
        (Method::ListOffsets, request.encode_to_vec())
    };
    let described = |topics| {
        let request = GetMetadataRequest { topics };
        (Method::GetMetadata, request.encode_to_vec())
    };
    prop_oneof![
        4 => produce(batch).prop_map(produced),
        2 => stream.prop_map(streamed),
        2 => fetch.prop_map(|request| (Method::Fetch, request.encode_to_vec())),
        1 => vec(query, 0..5).prop_map(listed),
        1 => vec(topic(), 0..5).prop_map(described),
    ]
}

/// What is done to an encoded message.
#[derive(Clone, Debug)]
enum Damage {
    Flip(Index, u8),
    Cut(Index),
    Insert(Index, Vec<u8>),
    Overwrite(Index, Vec<u8>),
    Repeat(Index),
}

impl Damage {
    fn apply(self, message: &mut Vec<u8>) {
        let end = message.len();
        match self {
            Damage::Flip(at, bit) => flip(message, at, bit),
            Damage::Cut(at) => message.truncate(at.index(end + 1)),
            Damage::Insert(at, bytes) => {
                let at = at.index(end + 1);
                message.splice(at..at, bytes);
            }
            Damage::Overwrite(at, bytes) => {
                let at = at.index(end + 1);
                message.splice(at..end.min(at + bytes.len()), bytes);
            }
            Damage::Repeat(at) => message.extend_from_within(at.index(end + 1)..),
        }
    }
}

fn damage() -> impl Strategy<Value = Damage> {
    // Lengths of 2 GiB, of the most that a varint holds, and of more than that.
    let lengths = [
        vec![0xff, 0xff, 0xff, 0xff, 0x07],
        [&[0xff; 9][..], &[1]].concat(),
        vec![0xff; 11],
    ];
    let bytes = prop_oneof![vec(any::<u8>(), 1..20), select(lengths.to_vec())];
    let bytes = bytes.boxed();
    prop_oneof![
        3 => (any::<Index>(), 0..8_u8).prop_map(|(at, bit)| Damage::Flip(at, bit)),
        2 => any::<Index>().prop_map(Damage::Cut),
        1 => (any::<Index>(), bytes.clone()).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        2 => (any::<Index>(), bytes).prop_map(|(at, bytes)| Damage::Overwrite(at, bytes)),
        1 => any::<Index>().prop_map(Damage::Repeat),
    ]
}

fn any_call() -> impl Strategy<Value = Call> {
    let whole = || whole_batch().boxed();
    let damaged_message =
        (request(whole()), vec(damage(), 1..4)).prop_map(|((method, mut message), damages)| {
            for damage in damages {
                damage.apply(&mut message);
            }
            (method, message, Frame::Right)
        });
    let damaged_batches = request(damaged_batch().boxed())
        .prop_map(|(method, message)| (method, message, Frame::Right));
    let damaged_frame =
        (request(whole()), frame()).prop_map(|((method, message), frame)| (method, message, frame));
    let noise = (select(&Method::ALL[..]), vec(any::<u8>(), 0..300))
        .prop_map(|(method, message)| (method, message, Frame::Right));
    let whole = request(whole()).prop_map(|(method, message)| (method, message, Frame::Right));
    prop_oneof![
        4 => damaged_message,
        4 => damaged_batches,
        2 => damaged_frame,
        1 => noise,
        1 => whole,
    ]
    .prop_map(|(method, message, frame)| Call {
        method,
        message,
        frame,
    })
}

/// A broker under test, and what it has acknowledged of another topic.
struct Subject {
    broker: Broker,
    api: Api,
    acknowledged: i64,
    /// Length of its log when it was last looked at.
    seen: usize,
    memory_before: u64,
}

impl Subject {
    async fn start() -> Subject {
        let broker = Broker::setup()
            .topic("target", json!({ "partitions": 2 }))
            .topic("steady", json!({}))
            .flag("--write-buffer", "4MiB")
            .flag("--tail-cache", "4MiB")
            .flag("--block-cache", "4MiB")
            .flag("--request-memory", "16MiB")
            .flag("--response-memory", "16MiB")
            .start();
        Subject {
            api: broker.api().await,
            acknowledged: 0,
            seen: 0,
            memory_before: broker.peak_resident_bytes(),
            broker,
        }
    }

    /// Makes a call. An error says what was wrong with what followed.
    async fn try_call(&mut self, call: &Call) -> Result<(), String> {
        let ended = timeout(ANSWER_TIME, self.send(call));
        let answer = match ended.await {
            Err(_) => Err(format!("no answer within {ANSWER_TIME:?}")),
            Ok(answer) => answer.and_then(|answer| check(call.method, &answer)),
        };
        let after = match timeout(ANSWER_TIME, self.use_another_topic()).await {
            Err(_) => Err(format!("no append within {ANSWER_TIME:?}")),
            Ok(after) => after,
        };
        if after.is_err() {
            // So that fewer and smaller calls can be tried by themselves.
            self.broker.kill_9();
            self.broker.restart();
            self.api = self.broker.api().await;
            self.seen = 0;
        }
        answer.and(after)
    }

    async fn send(&self, to_send: &Call) -> Result<Answer, String> {
        let sender = connect(self.broker.address()).await;
        let mut sender = sender.ok_or("the broker takes no connection")?;
        let (response, _stream) = call(&mut sender, to_send.method.path(), to_send.framed(), true);
        answer(response).await
    }

    async fn use_another_topic(&mut self) -> Result<(), String> {
        let log = self.broker.log();
        let news = &log[self.seen.min(log.len())..];
        self.seen = log.len();
        if news.contains("panicked") {
            return Err("something panicked".to_owned());
        }
        let grown = self
            .broker
            .peak_resident_bytes()
            .saturating_sub(self.memory_before);
        if grown > MEMORY {
            return Err(format!("it took {} MiB more", grown >> 20));
        }
        let next = batch([format!("{}", self.acknowledged)], None);
        let appended = self.api.append("steady", 0, vec![next]).await;
        let appended = appended.map_err(|error| format!("append to another topic: {error}"))?;
        if appended.base_offset != self.acknowledged {
            return Err(format!(
                "another topic's record {} was acknowledged at {}",
                self.acknowledged, appended.base_offset
            ));
        }
        self.acknowledged += 1;
        let fetched = self.api.fetch("steady", 0, self.acknowledged - 1).await;
        match fetched {
            Ok(_) => Ok(()),
            Err(error) => Err(format!("fetch from another topic: {error}")),
        }
    }

    async fn check_acknowledged(&mut self) {
        let records = self.api.read_all("steady", 0, 0).await;
        assert_eq!(records.len() as i64, self.acknowledged);
        for record in records {
            assert_eq!(record.value.unwrap(), record.offset.to_string());
        }
    }
}

/// Whether an answer is clear.
fn check(method: Method, answer: &Answer) -> Result<(), String> {
    let status = &answer.status;
    if answer.header_bytes > MAX_HEADER_BYTES {
        return Err(format!("{} bytes of headers", answer.header_bytes));
    }
    if status.code() != Code::Ok {
        let clear = status.code() != Code::Unknown && !status.message().is_empty();
        return clear
            .then_some(())
            .ok_or_else(|| format!("not clear: {status:?}"));
    }
    if answer.messages.is_empty() && method != Method::ProduceStream {
        return Err("OK, but no message".to_owned());
    }
    for message in &answer.messages {
        let errors = method.errors(message);
        for error in errors.map_err(|error| format!("an answer that can't be decoded: {error}"))? {
            let known = error.reason() != v1::ErrorReason::Unspecified;
            if !known || error.message.is_empty() {
                return Err(format!("not clear: {error:?}"));
            }
        }
    }
    Ok(())
}

#[test]
fn whatever_is_sent_ends_in_a_clear_answer_and_harms_no_one_else() {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut config = Config {
        cases: CASES,
        failure_persistence: None,
        max_shrink_time: 60_000,
        ..Config::default()
    };
    let seed = match config.rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => clock.as_nanos() as u64,
    };
    config.rng_seed = RngSeed::Fixed(seed);
    let runtime = Runtime::new().unwrap();
    let subject = std::cell::RefCell::new(runtime.block_on(Subject::start()));
    let tried = TestRunner::new(config).run(&any_call(), |call| {
        prop_assume!(!call.asks_to_wait());
        let tried = runtime.block_on(subject.borrow_mut().try_call(&call));
        tried.map_err(TestCaseError::fail)
    });
    match tried {
        Ok(()) => runtime.block_on(subject.borrow_mut().check_acknowledged()),
        Err(TestError::Fail(why, call)) => panic!(
            "{why}, after {call:?}\nagain: PROPTEST_RNG_SEED={seed} cargo test --release -p millrace-e2e --test e2e boundary"
        ),
        Err(error) => panic!("{error}; PROPTEST_RNG_SEED={seed}"),
    }
}
