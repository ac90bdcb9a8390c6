import java.io.BufferedOutputStream;
import java.io.BufferedReader;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.OutputStream;
import java.io.PrintStream;
import java.nio.ByteBuffer;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.StringJoiner;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.concurrent.atomic.AtomicReference;
import java.util.concurrent.atomic.LongAdder;
import java.util.concurrent.locks.LockSupport;
import java.util.function.LongConsumer;
import java.util.function.LongPredicate;
import java.util.stream.IntStream;

import org.HdrHistogram.Histogram;
import org.HdrHistogram.Recorder;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.TopicDescription;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.consumer.OffsetAndMetadata;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/**
 * The loads that Kafka's own tools don't offer: end-to-end latency in an open loop, many producers at once, writes at a rate, and writes
 * whose acknowledgements are told one by one. Each does what its Rust counterpart (latency.rs, connections.rs, live.rs,
 * failover/writer.rs) does; results are lines of JSON. And what brokers say of a topic, for trio.
 */
public final class KafkaBench {
    public static void main(String[] args) throws Exception {
        switch (args[0]) {
            case "latency" -> latency(args[1], args[2], Integer.parseInt(args[3]), Integer.parseInt(args[4]),
                Integer.parseInt(args[5]), Integer.parseInt(args[6]), Integer.parseInt(args[7]));
            case "connections" -> connections(args[1], args[2], Integer.parseInt(args[3]), Integer.parseInt(args[4]),
                Integer.parseInt(args[5]), Integer.parseInt(args[6]), Integer.parseInt(args[7]));
            case "live" -> live(args[1], args[2], Integer.parseInt(args[3]), Integer.parseInt(args[4]), Integer.parseInt(args[5]),
                Boolean.parseBoolean(args[6]));
            case "write" -> write(args[1], args[2], Integer.parseInt(args[3]), Integer.parseInt(args[4]), Integer.parseInt(args[5]),
                Integer.parseInt(args[6]));
            case "transactions" -> transactions(args[1], args[2], Integer.parseInt(args[3]), Integer.parseInt(args[4]),
                Integer.parseInt(args[5]), Integer.parseInt(args[6]), Integer.parseInt(args[7]));
            case "groups" -> groups(args[1], args[2], Integer.parseInt(args[3]), Integer.parseInt(args[4]), Integer.parseInt(args[5]),
                Integer.parseInt(args[6]));
            case "keyed" -> keyed(args[1], args[2], Long.parseLong(args[3]), Integer.parseInt(args[4]), Integer.parseInt(args[5]));
            case "describe" -> describe(args[1]);
            default -> throw new IllegalArgumentException("unknown load " + args[0]);
        }
    }

    /** Records leave on a fixed schedule and carry the time at which they were due, so a stall counts for all it delays. */
    private static void latency(String bootstrap, String topic, int partitions, int size, int rate, int seconds, int warmup)
            throws Exception {
        long total = (long) rate * (seconds + warmup);
        Histogram histogram = new Histogram(TimeUnit.MINUTES.toNanos(10), 3);
        AtomicReference<Throwable> failure = new AtomicReference<>();
        LongAdder acked = new LongAdder();
        KafkaConsumer<byte[], byte[]> consumer = new KafkaConsumer<>(
            Map.of("bootstrap.servers", bootstrap, "fetch.min.bytes", 1, "fetch.max.wait.ms", 500),
            new ByteArrayDeserializer(), new ByteArrayDeserializer());
        consumer.assign(IntStream.range(0, partitions).mapToObj(p -> new TopicPartition(topic, p)).toList());
        consumer.seekToBeginning(consumer.assignment());
        consumer.assignment().forEach(consumer::position);
        KafkaProducer<byte[], byte[]> producer = new KafkaProducer<>(
            Map.of("bootstrap.servers", bootstrap, "acks", "all", "linger.ms", 0),
            new ByteArraySerializer(), new ByteArraySerializer());
        producer.partitionsFor(topic);

        long start = System.nanoTime() + 100_000_000L;
        long measureFrom = start + warmup * 1_000_000_000L;
        long giveUp = start + (seconds + warmup + 60) * 1_000_000_000L;
        Thread sender = new Thread(() -> {
            onSchedule(start, rate, sent -> sent < total, due -> {
                byte[] value = ByteBuffer.allocate(size).putLong(due).array();
                producer.send(new ProducerRecord<>(topic, value), (metadata, error) -> {
                    if (error == null) {
                        acked.increment();
                    } else {
                        failure.compareAndSet(null, error);
                    }
                });
            });
            producer.flush();
        }, "sender");
        sender.start();
        long received = 0;
        while (received < total && failure.get() == null && System.nanoTime() < giveUp) {
            for (var record : consumer.poll(Duration.ofMillis(100))) {
                received++;
                long due = ByteBuffer.wrap(record.value()).getLong();
                if (due >= measureFrom) {
                    histogram.recordValue(System.nanoTime() - due);
                }
            }
        }
        sender.join();
        producer.close();
        consumer.close();
        if (failure.get() != null) {
            throw new IllegalStateException("produce failed", failure.get());
        }
        System.out.printf("{\"sent\":%d,\"acked\":%d,\"received\":%d,%s}%n", total, acked.sum(), received, latencies(histogram));
    }

    /** Calls `send` with the time at which a record is due, as long as `more`, told how many have left, wants another one. */
    private static void onSchedule(long start, int rate, LongPredicate more, LongConsumer send) {
        long interval = 1_000_000_000L / rate;
        for (long sent = 0; more.test(sent); sent++) {
            long due = start + sent * interval;
            for (long now = System.nanoTime(); now < due; now = System.nanoTime()) {
                LockSupport.parkNanos(due - now);
            }
            send.accept(due);
        }
    }

    private static String latencies(Histogram histogram) {
        return String.format("\"measured\":%d,\"p50_ns\":%d,\"p99_ns\":%d,\"p999_ns\":%d,\"max_ns\":%d", histogram.getTotalCount(),
            histogram.getValueAtPercentile(50), histogram.getValueAtPercentile(99), histogram.getValueAtPercentile(99.9),
            histogram.getMaxValue());
    }

    /** One transaction after another, as transactions.rs. */
    private static void transactions(String bootstrap, String topic, int partitions, int size, int records, int warmup, int seconds) {
        KafkaProducer<byte[], byte[]> producer = new KafkaProducer<>(
            Map.of("bootstrap.servers", bootstrap, "acks", "all", "linger.ms", 0, "transactional.id", "bench"),
            new ByteArraySerializer(), new ByteArraySerializer());
        producer.initTransactions();
        byte[] value = new byte[size];
        Histogram histogram = new Histogram(TimeUnit.MINUTES.toNanos(10), 3);
        long begun = 0;
        for (int run : new int[] {warmup, seconds}) {
            histogram.reset();
            begun = System.nanoTime();
            while (System.nanoTime() - begun < run * 1_000_000_000L) {
                long one = System.nanoTime();
                producer.beginTransaction();
                for (int record = 0; record < records; record++) {
                    producer.send(new ProducerRecord<>(topic, record % partitions, null, value));
                }
                producer.commitTransaction();
                histogram.recordValue(System.nanoTime() - one);
            }
        }
        System.out.printf("{\"transactions\":%d,\"seconds\":%f,\"p50_ns\":%d,\"p99_ns\":%d}%n", histogram.getTotalCount(),
            (System.nanoTime() - begun) / 1e9, histogram.getValueAtPercentile(50), histogram.getValueAtPercentile(99));
        producer.close();
    }

    /** A record of each key, and again, as compaction.rs. */
    private static void keyed(String bootstrap, String topic, long keys, int versions, int size) {
        KafkaProducer<byte[], byte[]> producer = new KafkaProducer<>(
            Map.of("bootstrap.servers", bootstrap, "acks", "all", "linger.ms", 5, "batch.size", 131072),
            new ByteArraySerializer(), new ByteArraySerializer());
        byte[] value = new byte[size];
        java.util.Arrays.fill(value, (byte) 7);
        for (int version = 0; version < versions; version++) {
            for (long key = 0; key < keys; key++) {
                producer.send(new ProducerRecord<>(topic, ByteBuffer.allocate(8).putLong(key).array(), value), (metadata, error) -> {
                    if (error != null) {
                        System.err.println(error);
                        Runtime.getRuntime().halt(1);
                    }
                });
            }
        }
        producer.close();
    }

    /**
     * Many members of one group, as groups.rs: the time until each has its share, how long it takes when one leaves and another one joins, and how
     * often they commit.
     */
    private static void groups(String bootstrap, String topic, int members, int partitions, int changes, int seconds) throws Exception {
        Map<Integer, Integer> shares = new ConcurrentHashMap<>();
        Map<Integer, Thread> threads = new ConcurrentHashMap<>();
        java.util.Set<Integer> leaving = ConcurrentHashMap.newKeySet();
        AtomicBoolean committing = new AtomicBoolean();
        AtomicBoolean stopping = new AtomicBoolean();
        LongAdder commits = new LongAdder();
        java.util.function.IntConsumer join = id -> {
            Thread thread = new Thread(() -> {
                try (KafkaConsumer<byte[], byte[]> consumer = new KafkaConsumer<>(
                        Map.of("bootstrap.servers", bootstrap, "group.id", "members", "group.protocol", "consumer",
                            "enable.auto.commit", false),
                        new ByteArrayDeserializer(), new ByteArrayDeserializer())) {
                    consumer.subscribe(List.of(topic));
                    while (!stopping.get() && !leaving.contains(id)) {
                        consumer.poll(Duration.ofMillis(committing.get() ? 0 : 50));
                        shares.put(id, consumer.assignment().size());
                        if (committing.get() && !consumer.assignment().isEmpty()) {
                            TopicPartition one = consumer.assignment().iterator().next();
                            consumer.commitSync(Map.of(one, new OffsetAndMetadata(0)));
                            commits.increment();
                        }
                    }
                }
                shares.remove(id);
                threads.remove(id);
            }, "member-" + id);
            threads.put(id, thread);
            thread.start();
        };
        java.util.function.IntFunction<Long> settle = count -> {
            long begun = System.nanoTime();
            while (true) {
                int least = partitions / count;
                int most = (partitions + count - 1) / count;
                boolean even = shares.size() == count && shares.values().stream().mapToInt(n -> n).sum() == partitions
                    && shares.values().stream().allMatch(n -> n >= least && n <= most);
                if (even) {
                    return System.nanoTime() - begun;
                }
                if (System.nanoTime() - begun > 300_000_000_000L) {
                    throw new IllegalStateException("not settled after 300 s: " + shares.size() + " members");
                }
                LockSupport.parkNanos(1_000_000);
            }
        };
        for (int id = 0; id < members; id++) {
            join.accept(id);
        }
        long joined = settle.apply(members);
        Histogram histogram = new Histogram(TimeUnit.MINUTES.toNanos(10), 3);
        for (int change = 0; change < changes; change++) {
            long begun = System.nanoTime();
            leaving.add(change);
            join.accept(members + change);
            // Until the one that leaves is away it looks settled.
            while (shares.containsKey(change)) {
                LockSupport.parkNanos(1_000_000);
            }
            settle.apply(members);
            histogram.recordValue(System.nanoTime() - begun);
        }
        committing.set(true);
        Thread.sleep(2_000);
        commits.reset();
        Thread.sleep(seconds * 1_000L);
        long committed = commits.sum();
        System.out.printf("{\"joined_ns\":%d,\"change_p50_ns\":%d,\"change_max_ns\":%d,\"commits_per_s\":%f}%n", joined,
            histogram.getValueAtPercentile(50), histogram.getMaxValue(), committed / (double) seconds);
        System.out.flush();
        Runtime.getRuntime().halt(0);
    }

    /**
     * Writes at a rate until standard input ends. Each line there is answered by how long the records took that were acknowledged since the
     * last one, and the end by the rest of them.
     */
    private static void live(String bootstrap, String topic, int size, int rate, int linger, boolean roundRobin)
            throws Exception {
        Recorder recorder = new Recorder(TimeUnit.MINUTES.toNanos(10), 3);
        AtomicReference<Throwable> failure = new AtomicReference<>();
        AtomicBoolean stopping = new AtomicBoolean();
        Map<String, Object> config = new java.util.HashMap<>(
            Map.of("bootstrap.servers", bootstrap, "acks", "all", "linger.ms", linger));
        if (roundRobin) {
            config.put("partitioner.class", "org.apache.kafka.clients.producer.RoundRobinPartitioner");
        }
        KafkaProducer<byte[], byte[]> producer = new KafkaProducer<>(config, new ByteArraySerializer(), new ByteArraySerializer());
        producer.partitionsFor(topic);
        byte[] value = new byte[size];
        long start = System.nanoTime() + 100_000_000L;
        Thread sender = new Thread(() -> onSchedule(start, rate, sent -> !stopping.get(), due ->
            producer.send(new ProducerRecord<>(topic, value), (metadata, error) -> {
                if (error == null) {
                    recorder.recordValue(System.nanoTime() - due);
                } else {
                    failure.compareAndSet(null, error);
                }
            })), "sender");
        sender.start();
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in));
        boolean more = true;
        while (more) {
            more = in.readLine() != null;
            if (!more) {
                stopping.set(true);
                sender.join();
                producer.close();
            }
            if (failure.get() == null) {
                System.out.printf("{%s}%n", latencies(recorder.getIntervalHistogram()));
            } else {
                System.out.println("a write failed: " + failure.get());
            }
        }
    }

    /** Each producer has its own connection and partition, and replaces each record acknowledged by another. */
    private static void connections(String bootstrap, String topic, int producers, int size, int inFlight, int seconds, int warmup)
            throws Exception {
        ExecutorService starters = Executors.newFixedThreadPool(8);
        List<Future<Sender>> starting = new ArrayList<>();
        for (int i = 0; i < producers; i++) {
            int partition = i;
            starting.add(starters.submit(() -> new Sender(bootstrap, topic, partition, size)));
        }
        List<Sender> senders = new ArrayList<>();
        for (Future<Sender> sender : starting) {
            senders.add(sender.get());
        }
        for (Sender sender : senders) {
            for (int i = 0; i < inFlight; i++) {
                sender.send();
            }
        }
        Thread.sleep(warmup * 1000L);
        long before = Sender.ACKED.sum();
        long start = System.nanoTime();
        Thread.sleep(seconds * 1000L);
        long measured = Sender.ACKED.sum() - before;
        long elapsed = System.nanoTime() - start;
        Sender.stopping = true;
        for (Sender sender : senders) {
            starters.submit(() -> sender.producer.close());
        }
        starters.shutdown();
        if (!starters.awaitTermination(2, TimeUnit.MINUTES)) {
            throw new IllegalStateException("producers did not close in 2 minutes");
        }
        System.out.printf("{\"measured\":%d,\"elapsed_ns\":%d,\"sent\":%d,\"acked\":%d,\"errors\":%d}%n",
            measured, elapsed, Sender.SENT.sum(), Sender.ACKED.sum(), Sender.ERRORS.sum());
    }

    /**
     * Writes to each partition at an interval until standard input ends. Prints "ack PARTITION NANOSECONDS" for each record, by the
     * system's monotonic clock, and "error PARTITION TEXT".
     */
    private static void write(String bootstrap, String topic, int partitions, int size, int intervalMs, int requestTimeoutMs)
            throws Exception {
        PrintStream out = new PrintStream(new BufferedOutputStream(new FileOutputStream(FileDescriptor.out), 1 << 16));
        KafkaProducer<byte[], byte[]> producer = new KafkaProducer<>(
            Map.of("bootstrap.servers", bootstrap, "acks", "all", "linger.ms", 0,
                "request.timeout.ms", requestTimeoutMs),
            new ByteArraySerializer(), new ByteArraySerializer());
        Thread input = new Thread(() -> {
            try {
                System.in.transferTo(OutputStream.nullOutputStream());
            } catch (IOException error) {
                out.println("error 0 standard input: " + error);
            }
        }, "input");
        input.start();
        byte[] value = new byte[size];
        long interval = TimeUnit.MILLISECONDS.toNanos(intervalMs);
        long due = System.nanoTime();
        while (input.isAlive()) {
            for (int p = 0; p < partitions; p++) {
                int partition = p;
                producer.send(new ProducerRecord<>(topic, partition, null, value), (metadata, error) -> {
                    if (error == null) {
                        out.println("ack " + partition + " " + System.nanoTime());
                    } else {
                        out.println("error " + partition + " " + error);
                    }
                });
            }
            out.flush();
            due = Math.max(due + interval, System.nanoTime() - interval);
            LockSupport.parkNanos(due - System.nanoTime());
        }
        Runtime.getRuntime().halt(0);
    }

    /** To each line, the name of a topic, the answer is "LEADER:IN_SYNC ...", by partition; -1 is no leader. Empty if it can't be told. */
    private static void describe(String bootstrap) throws IOException, InterruptedException {
        // A broker that hangs must not hold up the answer.
        Map<String, Object> properties = Map.of("bootstrap.servers", bootstrap, "request.timeout.ms", 1000,
            "default.api.timeout.ms", 5000);
        try (Admin admin = Admin.create(properties); BufferedReader in = new BufferedReader(new InputStreamReader(System.in))) {
            for (String topic = in.readLine(); topic != null; topic = in.readLine()) {
                StringJoiner state = new StringJoiner(" ");
                try {
                    TopicDescription found = admin.describeTopics(List.of(topic)).allTopicNames().get().get(topic);
                    for (var partition : found.partitions()) {
                        int leader = partition.leader() == null ? -1 : partition.leader().id();
                        state.add(leader + ":" + partition.isr().size());
                    }
                } catch (ExecutionException error) {
                    // Asked again soon.
                }
                System.out.println(state);
            }
        }
    }

    private static final class Sender {
        static final LongAdder SENT = new LongAdder();
        static final LongAdder ACKED = new LongAdder();
        static final LongAdder ERRORS = new LongAdder();
        static volatile boolean stopping;

        final KafkaProducer<byte[], byte[]> producer;
        final ProducerRecord<byte[], byte[]> record;

        Sender(String bootstrap, String topic, int partition, int size) throws Exception {
            producer = new KafkaProducer<>(
                Map.of("bootstrap.servers", bootstrap, "acks", "all", "linger.ms", 5, "batch.size", 16384,
                    "buffer.memory", 1 << 20),
                new ByteArraySerializer(), new ByteArraySerializer());
            byte[] value = new byte[size];
            new Random(partition).nextBytes(value);
            record = new ProducerRecord<>(topic, partition, null, value);
            SENT.increment();
            producer.send(record).get();
            ACKED.increment();
        }

        void send() {
            SENT.increment();
            producer.send(record, (metadata, error) -> {
                if (error != null) {
                    ERRORS.increment();
                    return;
                }
                ACKED.increment();
                if (!stopping) {
                    send();
                }
            });
        }
    }
}
