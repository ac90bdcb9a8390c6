import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HexFormat;
import java.util.Iterator;
import java.util.List;
import java.util.StringJoiner;
import java.util.zip.CRC32C;
import org.apache.kafka.common.KafkaException;
import org.apache.kafka.common.compress.Compression;
import org.apache.kafka.common.header.Header;
import org.apache.kafka.common.header.internals.RecordHeader;
import org.apache.kafka.common.record.CompressionType;
import org.apache.kafka.common.record.ControlRecordType;
import org.apache.kafka.common.record.DefaultRecordBatch;
import org.apache.kafka.common.record.EndTransactionMarker;
import org.apache.kafka.common.record.MemoryRecords;
import org.apache.kafka.common.record.MemoryRecordsBuilder;
import org.apache.kafka.common.record.MutableRecordBatch;
import org.apache.kafka.common.record.Record;
import org.apache.kafka.common.record.RecordBatch;
import org.apache.kafka.common.record.TimestampType;
import org.apache.kafka.common.utils.BufferSupplier;
import org.apache.kafka.common.utils.ByteBufferOutputStream;
import org.apache.kafka.common.utils.CloseableIterator;

/**
 * Record batches as Apache Kafka's own client library writes and reads them: the peer that Millrace's format is checked
 * against. "write DIR" writes batches and a manifest of what is in them; "read DIR" checks batches that another program
 * wrote against that program's manifest. See check.sh.
 *
 * <p>manifest.txt, one line per thing, fields separated by single spaces; the manifest says what the writer was told to
 * write, not what it read back. Bytes are "-" when null, "0x" and hex digits up to 1,024 of them, "crc32c:LENGTH:CRC" beyond:
 *
 * <pre>
 * batch FILE CODEC create|append BASE_OFFSET LAST_OFFSET LEADER_EPOCH MAX_TIMESTAMP PRODUCER_ID PRODUCER_EPOCH
 *     BASE_SEQUENCE LAST_SEQUENCE plain|transactional data|control DELETE_HORIZON|- RECORD_COUNT     (on one line)
 * record OFFSET TIMESTAMP KEY VALUE [HEADER_KEY HEADER_VALUE]...
 * </pre>
 *
 * The batches of one file lie back to back, in the manifest's order.
 */
public class RecordBatches {
    static final long TIME = 1_700_000_000_123L;
    static final long APPEND_TIME = 1_700_000_777_777L;
    static final HexFormat HEX = HexFormat.of();

    public static void main(String[] args) throws IOException {
        if (args.length != 2 || !List.of("write", "read").contains(args[0])) {
            System.err.println("usage: RecordBatches write|read DIR");
            System.exit(2);
        }
        Path dir = Path.of(args[1]);
        if (args[0].equals("write")) {
            Files.createDirectories(dir);
            new Writer(dir).writeAll();
        }
        // Also after writing: a manifest that the library itself does not confirm would be worth nothing.
        int batches = read(dir);
        System.out.println("kafka-clients " + args[0] + ": " + batches + " batches agree with the manifest");
    }

    // ---- what is written -------------------------------------------------------------------------------------------

    record Entry(long offset, long timestamp, byte[] key, byte[] value, Header... headers) {
        String line(long shownTimestamp) {
            StringJoiner line = new StringJoiner(" ");
            line.add("record").add(Long.toString(offset)).add(Long.toString(shownTimestamp)).add(hex(key)).add(hex(value));
            for (Header header : headers) {
                line.add(hex(utf8(header.key()))).add(hex(header.value()));
            }
            return line.toString();
        }
    }

    /** Everything a batch says about all its records; the with-methods keep the cases readable. */
    record Options(CompressionType codec, TimestampType timestampType, long baseOffset, int leaderEpoch, long producerId,
                   short producerEpoch, int baseSequence, boolean transactional, boolean control, long deleteHorizon) {
        static Options of(CompressionType codec, TimestampType timestampType) {
            return new Options(codec, timestampType, 0, RecordBatch.NO_PARTITION_LEADER_EPOCH, RecordBatch.NO_PRODUCER_ID,
                RecordBatch.NO_PRODUCER_EPOCH, RecordBatch.NO_SEQUENCE, false, false, RecordBatch.NO_TIMESTAMP);
        }

        Options at(long offset, int epoch) {
            return new Options(codec, timestampType, offset, epoch, producerId, producerEpoch, baseSequence, transactional,
                control, deleteHorizon);
        }

        Options producer(long id, int epoch, int sequence) {
            return new Options(codec, timestampType, baseOffset, leaderEpoch, id, (short) epoch, sequence, transactional,
                control, deleteHorizon);
        }

        Options inTransaction(boolean marker) {
            return new Options(codec, timestampType, baseOffset, leaderEpoch, producerId, producerEpoch, baseSequence, true,
                marker, deleteHorizon);
        }

        Options horizon(long ms) {
            return new Options(codec, timestampType, baseOffset, leaderEpoch, producerId, producerEpoch, baseSequence,
                transactional, control, ms);
        }

        MemoryRecordsBuilder builder() {
            return new MemoryRecordsBuilder(new ByteBufferOutputStream(1024), RecordBatch.MAGIC_VALUE_V2,
                Compression.of(codec).build(), timestampType, baseOffset,
                timestampType == TimestampType.LOG_APPEND_TIME ? APPEND_TIME : RecordBatch.NO_TIMESTAMP, producerId,
                producerEpoch, baseSequence, transactional, control, leaderEpoch, Integer.MAX_VALUE, deleteHorizon);
        }

        String line(String file, long lastOffset, long maxTimestamp, int records) {
            long lastSequence = baseSequence < 0 ? baseSequence : (baseSequence + (lastOffset - baseOffset)) % (1L << 31);
            StringJoiner line = new StringJoiner(" ");
            line.add("batch").add(file).add(codec.name).add(timestampType == TimestampType.CREATE_TIME ? "create" : "append");
            for (long field : new long[] {baseOffset, lastOffset, leaderEpoch, maxTimestamp, producerId, producerEpoch,
                baseSequence, lastSequence}) {
                line.add(Long.toString(field));
            }
            line.add(transactional ? "transactional" : "plain").add(control ? "control" : "data");
            line.add(deleteHorizon == RecordBatch.NO_TIMESTAMP ? "-" : Long.toString(deleteHorizon));
            return line.add(Integer.toString(records)).toString();
        }
    }

    static class Writer {
        final Path dir;
        final List<String> manifest = new ArrayList<>();

        Writer(Path dir) {
            this.dir = dir;
        }

        void writeAll() throws IOException {
            for (CompressionType codec : CompressionType.values()) {
                for (TimestampType type : List.of(TimestampType.CREATE_TIME, TimestampType.LOG_APPEND_TIME)) {
                    String kind = type == TimestampType.CREATE_TIME ? "create" : "append";
                    save(codec.name + "-" + kind, batch(codec.name + "-" + kind, Options.of(codec, type), mixed(0)));
                }
                save(codec.name + "-transactional", batch(codec.name + "-transactional",
                    Options.of(codec, TimestampType.CREATE_TIME).at(1_000_000_000_000L, 7)
                        .producer(Long.MAX_VALUE, Short.MAX_VALUE, 42).inTransaction(false), mixed(1_000_000_000_000L)));
                if (codec != CompressionType.NONE) {
                    // More than one block of every codec: Snappy has 32 KiB, LZ4 64 KiB, Zstandard 128 KiB.
                    save(codec.name + "-large", batch(codec.name + "-large", Options.of(codec, TimestampType.CREATE_TIME),
                        new Entry(0, TIME, utf8("large"), repetitive(200_000)), new Entry(1, TIME, null, repetitive(70_000))));
                }
            }
            Options none = Options.of(CompressionType.NONE, TimestampType.CREATE_TIME);
            save("idempotent-sequence-wraps", batch("idempotent-sequence-wraps",
                none.producer(4711, 3, Integer.MAX_VALUE - 1), mixed(0)));
            save("timestamps", batch("timestamps", none, new Entry(0, TIME, null, utf8("later")),
                new Entry(1, TIME - 90_000_000L, null, utf8("earlier")), new Entry(2, 0, null, utf8("epoch")),
                new Entry(3, Long.MAX_VALUE, null, utf8("end of time"))));
            save("delete-horizon", batch("delete-horizon",
                Options.of(CompressionType.LZ4, TimestampType.CREATE_TIME).horizon(TIME + 86_400_000L), mixed(0)));
            save("compacted", batch("compacted", Options.of(CompressionType.ZSTD, TimestampType.CREATE_TIME).at(500, 2),
                new Entry(503, TIME, utf8("a"), utf8("1")), new Entry(504, TIME + 1, utf8("b"), null),
                new Entry(1000, TIME + 2, utf8("c"), utf8("3"))));
            save("compacted-empty", emptied("compacted-empty", none.at(90, 4).producer(12, 1, 30), 99));
            save("markers",
                marker("markers", none.at(10, 1).producer(12, 1, RecordBatch.NO_SEQUENCE).inTransaction(true),
                    ControlRecordType.COMMIT, 5),
                marker("markers", none.at(11, 1).producer(13, 0, RecordBatch.NO_SEQUENCE).inTransaction(true),
                    ControlRecordType.ABORT, 6));
            save("several",
                batch("several", Options.of(CompressionType.SNAPPY, TimestampType.CREATE_TIME), mixed(0)),
                batch("several", none.at(20, 0), mixed(20)),
                batch("several", Options.of(CompressionType.GZIP, TimestampType.LOG_APPEND_TIME).at(40, 0), mixed(40)));
            Files.write(dir.resolve("manifest.txt"), manifest);
        }

        void save(String name, ByteBuffer... batches) throws IOException {
            byte[] all = new byte[Arrays.stream(batches).mapToInt(ByteBuffer::remaining).sum()];
            ByteBuffer out = ByteBuffer.wrap(all);
            Arrays.stream(batches).forEach(out::put);
            Files.write(dir.resolve(name + ".batch"), all);
        }

        ByteBuffer batch(String file, Options options, Entry... entries) {
            boolean append = options.timestampType == TimestampType.LOG_APPEND_TIME;
            long max = append ? APPEND_TIME : Arrays.stream(entries).mapToLong(Entry::timestamp).max().orElseThrow();
            manifest.add(options.line(file + ".batch", entries[entries.length - 1].offset, max, entries.length));
            try (MemoryRecordsBuilder builder = options.builder()) {
                for (Entry entry : entries) {
                    builder.appendWithOffset(entry.offset, entry.timestamp, entry.key, entry.value, entry.headers);
                    manifest.add(entry.line(append ? APPEND_TIME : entry.timestamp));
                }
                return builder.build().buffer();
            }
        }

        /** What compaction leaves of a batch whose records are all gone, for the sake of its producer's state. */
        ByteBuffer emptied(String file, Options options, long lastOffset) {
            manifest.add(options.line(file + ".batch", lastOffset, TIME, 0));
            ByteBuffer buffer = ByteBuffer.allocate(DefaultRecordBatch.RECORD_BATCH_OVERHEAD);
            DefaultRecordBatch.writeEmptyHeader(buffer, RecordBatch.MAGIC_VALUE_V2, options.producerId, options.producerEpoch,
                options.baseSequence, options.baseOffset, lastOffset, options.leaderEpoch, options.timestampType, TIME,
                options.transactional, options.control);
            buffer.rewind();
            return buffer;
        }

        ByteBuffer marker(String file, Options options, ControlRecordType type, int coordinatorEpoch) {
            manifest.add(options.line(file + ".batch", options.baseOffset, TIME, 1));
            byte[] key = ByteBuffer.allocate(4).putShort((short) 0).putShort((short) (type == ControlRecordType.COMMIT ? 1 : 0)).array();
            byte[] value = ByteBuffer.allocate(6).putShort((short) 0).putInt(coordinatorEpoch).array();
            manifest.add(new Entry(options.baseOffset, TIME, key, value).line(TIME));
            try (MemoryRecordsBuilder builder = options.builder()) {
                builder.appendEndTxnMarker(TIME, new EndTransactionMarker(type, coordinatorEpoch));
                return builder.build().buffer();
            }
        }

        /** Null, empty and real keys and values, and headers of every kind. */
        static Entry[] mixed(long base) {
            byte[] empty = new byte[0];
            return new Entry[] {
                new Entry(base, TIME, null, null),
                new Entry(base + 1, TIME + 1, empty, empty),
                new Entry(base + 2, TIME + 2, null, utf8("value without a key")),
                new Entry(base + 3, TIME + 3, utf8("key without a value"), null),
                new Entry(base + 4, TIME + 500, utf8("key"), utf8("value"), new RecordHeader("trace", utf8("a1b2")),
                    new RecordHeader("null", (byte[]) null), new RecordHeader("empty", empty), new RecordHeader("", utf8("no name")),
                    new RecordHeader("trace", utf8("again")), new RecordHeader("größe", new byte[] {0, -1, 127})),
                new Entry(base + 5, TIME - 1, new byte[] {0, -1, -128}, repetitive(300), new RecordHeader("long", repetitive(80))),
            };
        }
    }

    static byte[] repetitive(int length) {
        byte[] out = new byte[length];
        for (int i = 0; i < length; i++) {
            out[i] = (byte) ("a log is a sequence of records. ".charAt(i % 32) + (i / 4096) % 3);
        }
        return out;
    }

    // ---- what is read ----------------------------------------------------------------------------------------------

    static int read(Path dir) throws IOException {
        Iterator<String> manifest = Files.readAllLines(dir.resolve("manifest.txt")).iterator();
        String file = null;
        Iterator<MutableRecordBatch> batches = null;
        int count = 0;
        while (manifest.hasNext()) {
            String[] f = manifest.next().split(" ");
            check(f[0].equals("batch") && f.length == 16, "manifest", "a batch line", String.join(" ", f));
            if (!f[1].equals(file)) {
                check(batches == null || !batches.hasNext(), file, "no more batches", "one that the manifest does not have");
                file = f[1];
                batches = MemoryRecords.readableRecords(ByteBuffer.wrap(Files.readAllBytes(dir.resolve(file)))).batches().iterator();
            }
            check(batches.hasNext(), file, "one more batch", "the end");
            MutableRecordBatch batch = batches.next();
            try {
                batch.ensureValid();
            } catch (KafkaException invalid) {
                check(false, file, "a valid batch", invalid.toString());
            }
            String deleteHorizon = batch.deleteHorizonMs().isPresent() ? Long.toString(batch.deleteHorizonMs().getAsLong()) : "-";
            String[] actual = {"batch", file, batch.compressionType().name,
                batch.timestampType() == TimestampType.CREATE_TIME ? "create" : "append", "" + batch.baseOffset(),
                "" + batch.lastOffset(), "" + batch.partitionLeaderEpoch(), "" + batch.maxTimestamp(), "" + batch.producerId(),
                "" + batch.producerEpoch(), "" + batch.baseSequence(), "" + batch.lastSequence(),
                batch.isTransactional() ? "transactional" : "plain", batch.isControlBatch() ? "control" : "data", deleteHorizon,
                "" + batch.countOrNull()};
            check(batch.magic() == RecordBatch.MAGIC_VALUE_V2, file, "magic 2", "magic " + batch.magic());
            check(Arrays.equals(f, actual), file, String.join(" ", f), String.join(" ", actual));
            int records = 0;
            // The streaming iterator is the one that consumers use; it decompresses as it goes.
            try (CloseableIterator<Record> iterator = batch.streamingIterator(BufferSupplier.create())) {
                while (iterator.hasNext()) {
                    Record record = iterator.next();
                    record.ensureValid();
                    Entry entry = new Entry(record.offset(), record.timestamp(), bytes(record.key()), bytes(record.value()),
                        record.headers());
                    String expected = manifest.hasNext() ? manifest.next() : "the end";
                    check(expected.equals(entry.line(record.timestamp())), file, expected, entry.line(record.timestamp()));
                    records++;
                }
            }
            check(records == batch.countOrNull(), file, batch.countOrNull() + " records", records + " records");
            count++;
        }
        check(batches != null && !batches.hasNext(), file, "no more batches", "one that the manifest does not have");
        return count;
    }

    static void check(boolean holds, String file, String expected, String actual) {
        if (!holds) {
            System.err.println(file + ":\n  expected " + expected + "\n  found    " + actual);
            System.exit(1);
        }
    }

    static byte[] bytes(ByteBuffer buffer) {
        if (buffer == null) {
            return null;
        }
        byte[] out = new byte[buffer.remaining()];
        buffer.duplicate().get(out);
        return out;
    }

    static byte[] utf8(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }

    static String hex(byte[] bytes) {
        if (bytes == null) {
            return "-";
        }
        if (bytes.length <= 1024) {
            return "0x" + HEX.formatHex(bytes);
        }
        CRC32C crc = new CRC32C();
        crc.update(bytes);
        return "crc32c:" + bytes.length + ":" + HEX.toHexDigits((int) crc.getValue());
    }
}
