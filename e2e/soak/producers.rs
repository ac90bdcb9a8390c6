//! Idempotent producers with acks=all, each of which sends at a steady rate, whatever happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Result;
use millrace_client::{Acks, Error, ErrorKind, Producer, Record};
use millrace_e2e::history::{Event, Outcome, Value};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::load::{Load, TOPIC};

/// A record that is not acknowledged after this time has an unknown outcome.
pub(crate) const DELIVERY_TIMEOUT: Duration = Duration::from_secs(60);
const BUFFER_BYTES: usize = 8 << 20;

/// Sends until told to stop, and returns once the outcome of all is known.
pub(crate) async fn produce(
    load: Arc<Load>,
    numbers: Arc<AtomicU32>,
    seed: u64,
    interval: Duration,
    stop: CancellationToken,
) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut outcomes = JoinSet::new();
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // A producer that has ended has a successor, of another number.
    'producers: while !stop.is_cancelled() {
        let number = numbers.fetch_add(1, Ordering::Relaxed);
        let Some(producer) = stop.run_until_cancelled(connect(&load)).await else {
            break;
        };
        let mut counter = 0;
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let value = Value {
                producer: number,
                counter,
            };
            counter += 1;
            let partition = random.i32(0..load.partitions);
            let record = Record::to(TOPIC)
                .partition(partition)
                .value(value.to_bytes(load.size));
            let invoked = load.recorder.now();
            let append = move |ended, outcome| Event::Append {
                value,
                partition,
                invoked,
                ended,
                outcome,
            };
            match producer.send(record).await {
                Ok(delivery) => {
                    let load = load.clone();
                    outcomes.spawn(async move {
                        let outcome = match delivery.await {
                            Ok(meta) => Outcome::Acked {
                                offset: (meta.offset >= 0).then_some(meta.offset),
                            },
                            Err(error) => {
                                load.told("producer", &error);
                                refused(&error)
                            }
                        };
                        load.record(&append(load.recorder.now(), outcome))
                    });
                }
                Err(error) => {
                    load.told("producer", &error);
                    // It never was in the producer's buffer.
                    let outcome = Outcome::Failed {
                        error: error.to_string(),
                    };
                    load.record(&append(load.recorder.now(), outcome))?;
                    if error.kind() == ErrorKind::Closed || !error.is_retriable() {
                        continue 'producers;
                    }
                }
            }
            while let Some(done) = outcomes.try_join_next() {
                done??;
            }
        }
        while let Some(done) = outcomes.join_next().await {
            done??;
        }
        // All of it is answered: there is nothing to wait for.
        producer.close(DELIVERY_TIMEOUT).await?;
    }
    while let Some(done) = outcomes.join_next().await {
        done??;
    }
    Ok(())
}

/// Tries until it works: all brokers may be away.
async fn connect(load: &Load) -> Producer {
    loop {
        let built = async {
            let client = millrace_client::Client::connect(load.bootstrap.as_str()).await?;
            let producer = client
                .producer()
                .acks(Acks::All)
                .idempotent(true)
                .max_buffered_bytes(BUFFER_BYTES)
                .delivery_timeout(DELIVERY_TIMEOUT);
            producer.build().await
        };
        match built.await {
            Ok(producer) => return producer,
            Err(error) => {
                load.told("producer that connects", &error);
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
}

/// Only what is refused before anything is sent has failed for certain: an earlier try of the same record may have got through.
fn refused(error: &Error) -> Outcome {
    let text = error.to_string();
    match error.kind() {
        ErrorKind::RecordTooLarge | ErrorKind::InvalidTimestamp => Outcome::Failed { error: text },
        _ => Outcome::Unknown { error: text },
    }
}
