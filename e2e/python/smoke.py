"""Produces and fetches plain records with nothing but grpcio and the stubs generated from the .proto files.

Usage: smoke.py HOST:PORT, for a broker with an empty topic `t` of two partitions.
"""

import sys

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from millrace.v1 import consumer_pb2, consumer_pb2_grpc, error_pb2, metadata_pb2, metadata_pb2_grpc
from millrace.v1 import producer_pb2, producer_pb2_grpc, record_pb2

RECORDS = [
    record_pb2.Record(key=b"k", value=b"v", timestamp_ms=1_700_000_000_000),
    record_pb2.Record(value=b"null key", timestamp_ms=1),
    record_pb2.Record(key=b"null value", timestamp_ms=2),
    record_pb2.Record(key=b"", value=b"", timestamp_ms=3),
    record_pb2.Record(
        value=bytes(range(256)),
        timestamp_ms=4,
        headers=[record_pb2.Header(key="a", value=b"1"), record_pb2.Header(key="a"), record_pb2.Header(key="b", value=b"")],
    ),
]


def refused(call):
    """The gRPC code and the ErrorInfo of a call that must fail."""
    try:
        call()
    except grpc.RpcError as error:
        status = rpc_status.from_call(error)
        info = error_details_pb2.ErrorInfo()
        assert status.details[0].Unpack(info), status
        assert info.domain == "millrace.dev", info
        return error.code(), info
    raise AssertionError("it was not refused")


def main(address):
    channel = grpc.insecure_channel(address)
    producer = producer_pb2_grpc.ProducerServiceStub(channel)
    consumer = consumer_pb2_grpc.ConsumerServiceStub(channel)
    metadata = metadata_pb2_grpc.MetadataServiceStub(channel)

    topics = metadata.GetMetadata(metadata_pb2.GetMetadataRequest(), timeout=30).topics
    assert [(topic.name, len(topic.partitions)) for topic in topics] == [("t", 2)], topics

    def produce(topic, records):
        partition = producer_pb2.PartitionRecords(topic=topic, partition=1, records=records)
        return producer.Produce(producer_pb2.ProduceRequest(partitions=[partition]), timeout=30)

    def fetch(offset):
        partition = consumer_pb2.FetchPartition(topic="t", partition=1, offset=offset)
        request = consumer_pb2.FetchRequest(
            min_bytes=1, max_wait_ms=10_000, format=consumer_pb2.FETCH_FORMAT_RECORDS, partitions=[partition]
        )
        return consumer.Fetch(request, timeout=30)

    for base_offset in (0, len(RECORDS)):
        result = produce("t", RECORDS).results[0]
        assert (result.base_offset, result.HasField("error")) == (base_offset, False), result
    read = fetch(0).results[0]
    assert read.high_watermark == 2 * len(RECORDS), read
    assert len(read.records) == 2 * len(RECORDS), read
    for offset, (got, sent) in enumerate(zip(read.records, RECORDS + RECORDS)):
        assert got.offset == offset, got
        got.offset = 0
        assert got == sent, (got, sent)
        assert got.HasField("key") == sent.HasField("key") and got.HasField("value") == sent.HasField("value"), got

    code, info = refused(lambda: produce("absent", RECORDS))
    assert (code, info.reason, info.metadata["topic"]) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_TOPIC", "absent"), info
    code, info = refused(lambda: fetch(99))
    assert (code, info.reason) == (grpc.StatusCode.OUT_OF_RANGE, "OFFSET_OUT_OF_RANGE"), info
    assert dict(info.metadata)["high_watermark"] == "10" and dict(info.metadata)["log_start_offset"] == "0", info
    assert "ERROR_REASON_" + info.reason in error_pb2.ErrorReason.keys()

    def requests():
        for number in range(100):
            partition = producer_pb2.PartitionRecords(topic="t", records=[record_pb2.Record(value=b"%d" % number)])
            request = producer_pb2.ProduceRequest(partitions=[partition])
            yield producer_pb2.ProduceStreamRequest(correlation_id=number, request=request)

    answers = {answer.correlation_id: answer for answer in producer.ProduceStream(requests(), timeout=30)}
    offsets = [answers[number].response.results[0].base_offset for number in range(100)]
    assert offsets == list(range(100)), offsets
    print("OK")


main(*sys.argv[1:])
