import java.io.BufferedOutputStream;
import java.io.BufferedReader;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.PrintStream;
import java.nio.ByteBuffer;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.Random;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicReference;
import java.util.concurrent.atomic.LongAdder;
import java.util.concurrent.locks.LockSupport;
import java.util.stream.IntStream;

import org.HdrHistogram.Histogram;
import org.apache.kafka.clients.admin.Admin;
import org.apache.kafka.clients.admin.TopicDescription;
import org.apache.kafka.clients.consumer.KafkaConsumer;
import org.apache.kafka.clients.producer.KafkaProducer;
import org.apache.kafka.clients.producer.ProducerRecord;
import org.apache.kafka.common.TopicPartition;
import org.apache.kafka.common.serialization.ByteArrayDeserializer;
import org.apache.kafka.common.serialization.ByteArraySerializer;

/**
 * The loads that Kafka's own tools don't offer: end-to-end latency in an open loop, many producers at once, and writes whose
 * acknowledgements are told one by one. Each does what its Rust counterpart (latency.rs, connections.rs, failover/writer.rs) does; the
 * first two print one line of JSON.
 */
public final class KafkaBench {
    public static void main(String[] args) throws Exception {
        switch (args[0]) {
            case "latency" -> latency(args[1], args[2], Integer.parseInt(args[3]), Integer.parseInt(args[4]),
                Integer.parseInt(args[5]), Integer.parseInt(args[6]), Integer.parseInt(args[7]));
            case "connections" -> connections(args[1], args[2], Integer.parseInt(args[3]), Integer.parseInt(args[4]),
                Integer.parseInt(args[5]), Integer.parseInt(args[6]), Integer.parseInt(args[7]));
            case "write" -> write(args[1], args[2], Integer.parseInt(args[3]), Integer.parseInt(args[4]), Integer.parseInt(args[5]),
                Integer.parseInt(args[6]));
            default -> throw new IllegalArgumentException("unknown load " + args[0]);
        }
    }

    /** Records leave on a fixed schedule and carry the time at which they were due, so a stall counts for all it delays. */
    private static void latency(String bootstrap, String topic, int partitions, int size, int rate, int seconds, int warmup)
            throws Exception {
        long total = (long) rate * (seconds + warmup);
        long interval = 1_000_000_000L / rate;
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
            for (long i = 0; i < total; i++) {
                long due = start + i * interval;
                for (long now = System.nanoTime(); now < due; now = System.nanoTime()) {
                    LockSupport.parkNanos(due - now);
                }
                byte[] value = ByteBuffer.allocate(size).putLong(due).array();
                producer.send(new ProducerRecord<>(topic, value), (metadata, error) -> {
                    if (error == null) {
                        acked.increment();
                    } else {
                        failure.compareAndSet(null, error);
                    }
                });
            }
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
        System.out.printf("{\"sent\":%d,\"acked\":%d,\"received\":%d,\"measured\":%d,\"p50_ns\":%d,\"p99_ns\":%d,\"p999_ns\":%d,\"max_ns\":%d}%n",
            total, acked.sum(), received, histogram.getTotalCount(), histogram.getValueAtPercentile(50),
            histogram.getValueAtPercentile(99), histogram.getValueAtPercentile(99.9), histogram.getMaxValue());
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
     * system's monotonic clock, and "error PARTITION TEXT". To the line "describe" the answer is "state LEADER:IN_SYNC ...", by
     * partition; -1 is no leader.
     */
    private static void write(String bootstrap, String topic, int partitions, int size, int intervalMs, int requestTimeoutMs)
            throws Exception {
        PrintStream out = new PrintStream(new BufferedOutputStream(new FileOutputStream(FileDescriptor.out), 1 << 16));
        KafkaProducer<byte[], byte[]> producer = new KafkaProducer<>(
            Map.of("bootstrap.servers", bootstrap, "acks", "all", "linger.ms", 0,
                "request.timeout.ms", requestTimeoutMs),
            new ByteArraySerializer(), new ByteArraySerializer());
        Thread describer = new Thread(() -> describe(bootstrap, topic, out), "describer");
        describer.start();
        byte[] value = new byte[size];
        long interval = TimeUnit.MILLISECONDS.toNanos(intervalMs);
        long due = System.nanoTime();
        while (describer.isAlive()) {
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

    private static void describe(String bootstrap, String topic, PrintStream out) {
        // A broker that hangs must not hold up the answer.
        Map<String, Object> properties = Map.of("bootstrap.servers", bootstrap, "request.timeout.ms", 1000,
            "default.api.timeout.ms", 5000);
        try (Admin admin = Admin.create(properties); BufferedReader in = new BufferedReader(new InputStreamReader(System.in))) {
            for (String line = in.readLine(); line != null; line = in.readLine()) {
                try {
                    TopicDescription found = admin.describeTopics(List.of(topic)).allTopicNames().get().get(topic);
                    StringBuilder state = new StringBuilder("state");
                    for (var partition : found.partitions()) {
                        int leader = partition.leader() == null ? -1 : partition.leader().id();
                        state.append(' ').append(leader).append(':').append(partition.isr().size());
                    }
                    out.println(state);
                } catch (ExecutionException | InterruptedException error) {
                    out.println("state");
                }
            }
        } catch (IOException error) {
            out.println("error 0 standard input: " + error);
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
