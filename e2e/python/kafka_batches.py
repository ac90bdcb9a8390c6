"""Record batches that a Kafka client library (kafka-python) builds are produced as bytes, fetched as bytes, and read by the same
library, in every compression.

Usage: kafka_batches.py HOST:PORT, for a broker with an empty topic `t`.
"""

import sys

import grpc
from kafka.record import MemoryRecords, MemoryRecordsBuilder
from millrace.v1 import consumer_pb2, consumer_pb2_grpc, producer_pb2, producer_pb2_grpc

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}

RECORDS = [
    (1_700_000_000_000, b"key", b"value", []),
    (1_700_000_000_500, None, b"null key", []),
    (1_699_999_999_000, b"null value", None, []),
    (1_700_000_000_000, b"", b"", []),
    (1_700_000_000_000, None, b"headers", [("a", b"1"), ("a", None), ("\u00fc", b"\xff")]),
] + [(1_700_000_001_000 + i, b"key %d" % (i % 7), b"value %d of many that look alike" % i, []) for i in range(1_000)]


def build(codec, producer=None):
    """A batch as kafka-python's producer would send it."""
    builder = MemoryRecordsBuilder(magic=2, compression_type=codec, batch_size=1 << 20)
    for timestamp, key, value, headers in RECORDS:
        assert builder.append(timestamp, key, value, headers) is not None, "the batch is full"
    if producer is not None:
        builder.set_producer_state(*producer, False)
    builder.close()
    return bytes(builder.buffer())


def read(batches):
    """All batches and records of a fetch response's bytes, by kafka-python's consumer code."""
    records = MemoryRecords(b"".join(batches))
    while records.has_next():
        batch = records.next_batch()
        assert batch.validate_crc()
        yield batch, [(r.offset, (r.timestamp, r.key, r.value, list(r.headers))) for r in batch]


def main(address):
    channel = grpc.insecure_channel(address, options=[("grpc.max_receive_message_length", 64 << 20)])
    producer = producer_pb2_grpc.ProducerServiceStub(channel)
    consumer = consumer_pb2_grpc.ConsumerServiceStub(channel)

    def produce(batch):
        partition = producer_pb2.PartitionRecords(topic="t", batches=[batch])
        answer = producer.Produce(producer_pb2.ProduceRequest(partitions=[partition]), timeout=30)
        return answer.results[0].base_offset

    def fetch(offset):
        partition = consumer_pb2.FetchPartition(topic="t", offset=offset)
        return consumer.Fetch(consumer_pb2.FetchRequest(partitions=[partition]), timeout=30).results[0].batches

    offset = 0
    for name, codec in CODECS.items():
        batch = build(codec)
        assert produce(batch) == offset
        [(header, got)] = read(fetch(offset))
        assert header.compression_type == codec, (name, header.compression_type)
        assert [place for place, _ in got] == list(range(offset, offset + len(RECORDS)))
        for (_, record), sent in zip(got, RECORDS):
            assert record == sent, (name, record, sent)
        print(f"{name}: {len(batch)} bytes, {len(RECORDS)} records")
        offset += len(RECORDS)

    identity = producer.InitProducer(producer_pb2.InitProducerRequest(), timeout=30)
    batch = build(CODECS["zstd"], (identity.producer_id, identity.producer_epoch, 0))
    assert produce(batch) == offset
    assert produce(batch) == offset, "a batch sent again is answered with its first offset"
    [(header, _)] = read(fetch(offset))
    assert (header.producer_id, header.producer_epoch, header.base_sequence) == (identity.producer_id, 0, 0)
    assert sum(len(got) for _, got in read(fetch(0))) == offset + len(RECORDS)
    print("OK")


main(*sys.argv[1:])
