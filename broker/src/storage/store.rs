//! The store: what it holds, and the threads that write, sync and retain.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use rocksdb::WriteBatch;
use tokio::sync::{Semaphore, oneshot};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::{
    Append, Appended, DiskSpace, DiskState, Durability, PartitionAppend, PartitionLog, ReadBatches,
    RecoveryReport, StorageError, StorageOptions, StoredPartition, UpTo,
    compaction::Compactor,
    db::Db,
    delete::clear_deleted,
    descriptors::StoreDescriptor,
    keys, read,
    recovery::{self, Recovered},
    retention,
    syncer::Syncer,
    topics::Topics,
    writer::{Command, Generations, TailBudget, Writer},
};

/// Room in the writer's queue is counted in this many bytes.
const ROOM_UNIT: usize = 1 << 10;
/// How often the volume's free space is looked at. What is written in between must fit into the reserve.
const DISK_INTERVAL: Duration = Duration::from_millis(250);

/// One broker's store.
pub struct Store {
    pub(super) db: Arc<Db>,
    disk: Arc<DiskSpace>,
    pub(super) generations: Generations,
    pub(super) compactor: Compactor,
    pub(super) topics: RwLock<Topics>,
    pub(super) descriptor: Mutex<StoreDescriptor>,
    /// Held by whoever deletes partitions.
    pub(super) deletions: Mutex<()>,
    pub(super) writer: Sender<Command>,
    room: Arc<Semaphore>,
    room_units: u32,
    threads: Mutex<Threads>,
    /// Long work ends early.
    closing: AtomicBool,
}

/// A thread with the sender whose end stops it.
type Housekeeper = (Sender<()>, JoinHandle<()>);

struct Threads {
    writer: Option<JoinHandle<()>>,
    housekeepers: Vec<Housekeeper>,
}

impl Store {
    /// Opens or creates the store and starts its threads.
    pub fn open(options: StorageOptions) -> Result<(Arc<Store>, RecoveryReport), StorageError> {
        let db = Arc::new(Db::open(&options)?);
        let Recovered {
            store,
            topics,
            slots,
            generations,
            generation,
            active,
            report,
        } = recovery::recover(&db, &options)?;
        let mut held = Topics::default();
        for topic in topics {
            held.merge(topic);
        }
        let disk = Arc::new(DiskSpace::new(&options.path, options.min_free_bytes));
        let generations = Generations::new(Mutex::new(generations));
        // Before the writer runs: it knows nothing of them.
        clear_deleted(&db, &generations)?;
        let compactor = Compactor::open(db.clone(), generations.clone(), &options)?;
        let thread_failed = |error: std::io::Error| {
            StorageError::Rocks(format!("a thread can't be started: {error}"))
        };
        let syncer = match options.durability {
            Durability::Os => None,
            Durability::Fsync => {
                Some(Syncer::start(db.clone(), disk.clone()).map_err(thread_failed)?)
            }
        };
        let writer = Writer {
            db: db.clone(),
            disk: disk.clone(),
            generations: generations.clone(),
            syncer,
            slots,
            generation,
            active,
            tail: TailBudget::new(options.tail_cache_bytes),
            tainted: false,
            failing_since: None,
            options: options.clone(),
        };
        let (sender, queue) = channel();
        let writer = std::thread::Builder::new()
            .name("writer".into())
            .spawn(move || writer.run(&queue));
        let room_units = u32::try_from(options.queued_bytes / ROOM_UNIT).unwrap_or(u32::MAX >> 3);
        let store = Arc::new(Store {
            db,
            disk,
            generations,
            compactor,
            topics: RwLock::new(held),
            descriptor: Mutex::new(store),
            deletions: Mutex::new(()),
            writer: sender,
            room: Arc::new(Semaphore::new(room_units as usize)),
            room_units,
            closing: AtomicBool::new(false),
            threads: Mutex::new(Threads {
                writer: Some(writer.map_err(thread_failed)?),
                housekeepers: Vec::new(),
            }),
        });
        let watcher = store
            .every("disk watch", DISK_INTERVAL, Store::watch_disk)
            .map_err(thread_failed)?;
        let retention = store.every("retention", options.retention_interval, |store| {
            if let Err(error) = store.retain() {
                error!(%error, "retention failed; trying again at the next interval");
            }
            // After it: what is replaced now goes with the next one, when no one reads it any more.
            if let Err(error) = store.compact() {
                error!(%error, "compaction failed; trying again at the next interval");
            }
        });
        store.threads.lock().housekeepers = vec![watcher, retention.map_err(thread_failed)?];
        Ok((store, report))
    }

    /// Free space, and whether writes are accepted.
    pub fn disk(&self) -> &DiskSpace {
        &self.disk
    }

    /// The store's id: a store that lost its data is another one.
    pub fn store_id(&self) -> Uuid {
        self.descriptor.lock().store_id
    }

    /// How many times the store was opened.
    pub fn incarnation(&self) -> i32 {
        self.descriptor.lock().incarnation
    }

    /// Appends. Waits for room in the queue; what it returns resolves when the append is as durable as configured. Appends to
    /// one partition keep the order of these calls.
    pub async fn append(
        &self,
        partitions: Vec<PartitionAppend>,
    ) -> Result<oneshot::Receiver<Vec<Result<Appended, StorageError>>>, StorageError> {
        self.disk.check()?;
        let bytes: usize = partitions.iter().map(PartitionAppend::size).sum();
        let units = u32::try_from(bytes / ROOM_UNIT + partitions.len())
            .unwrap_or(u32::MAX)
            .min(self.room_units);
        let room = self
            .room
            .clone()
            .acquire_many_owned(units)
            .await
            .map_err(|_| StorageError::Closed)?;
        let (reply, answer) = oneshot::channel();
        let append = Append {
            partitions,
            reply,
            room: Some(room),
        };
        self.writer
            .send(Command::Append(append))
            .map_err(|_| StorageError::Closed)?;
        Ok(answer)
    }

    /// Lets a transaction write to partitions, each of which is led in the epoch beside it. All or none: the error names the partition by its
    /// place. What is known of it is lost with the leadership.
    pub(crate) async fn announce(
        &self,
        logs: Vec<(StoredPartition, i32)>,
        producer_id: i64,
        producer_epoch: i16,
    ) -> Result<(), (usize, StorageError)> {
        let announce = |reply| Command::Announce {
            logs,
            producer_id,
            producer_epoch,
            reply,
        };
        let asked = self.ask(announce).await;
        asked.map_err(|error| (0, error))?
    }

    /// Waits until everything that the writer was given before is finished and answered: the logs that have resigned before stand
    /// still then.
    pub async fn settled(&self) -> Result<(), StorageError> {
        let nothing = |reply| {
            Command::Append(Append {
                partitions: Vec::new(),
                reply,
                room: None,
            })
        };
        self.ask(nothing).await?;
        Ok(())
    }

    /// Reads from `offset`, which must be between the log start and the log end offset, whole batches up to `max_bytes`; the first comes whatever its size if `at_least_one`. Only from memory: `Ok(None)` means that [`Self::read_disk`] has it.
    pub fn read_memory(
        &self,
        log: &PartitionLog,
        offset: i64,
        max_bytes: usize,
        at_least_one: bool,
        up_to: UpTo,
    ) -> Result<Option<ReadBatches>, StorageError> {
        read::read_memory(log, offset, max_bytes, at_least_one, up_to)
    }

    /// As [`Self::read_memory`], from RocksDB. Blocks.
    pub fn read_disk(
        &self,
        log: &PartitionLog,
        offset: i64,
        max_bytes: usize,
        at_least_one: bool,
        up_to: UpTo,
    ) -> Result<ReadBatches, StorageError> {
        read::read_disk(&self.db, log, offset, max_bytes, at_least_one, up_to)
    }

    /// The first record whose timestamp is at or after `timestamp_ms`: its offset and timestamp. Blocks.
    pub fn find_timestamp(
        &self,
        log: &PartitionLog,
        timestamp_ms: i64,
    ) -> Result<Option<(i64, i64)>, StorageError> {
        read::find_timestamp(&self.db, log, timestamp_ms)
    }

    /// Removes all batches that reach to or beyond `offset`, if the partition is followed in that epoch; returns the new log end offset.
    pub async fn truncate(
        &self,
        log: &StoredPartition,
        epoch: i32,
        offset: i64,
    ) -> Result<i64, StorageError> {
        let log = log.clone();
        self.ask(|reply| Command::Truncate {
            log,
            epoch,
            offset,
            reply,
        })
        .await?
    }

    /// Drops all that the log has and begins it anew at `offset`, if the partition is followed in that epoch: what lies between, the leader
    /// no longer has.
    pub async fn begin_at(
        &self,
        log: &StoredPartition,
        epoch: i32,
        offset: i64,
    ) -> Result<(), StorageError> {
        let log = log.clone();
        self.ask(|reply| Command::BeginAt {
            log,
            epoch,
            offset,
            reply,
        })
        .await?
    }

    /// Ends the active generation, so that retention can act on it.
    pub async fn seal(&self) -> Result<(), StorageError> {
        self.ask(|reply| Command::Seal { reply }).await?
    }

    /// Puts a command into the writer's queue, and waits for its answer.
    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, StorageError> {
        let (reply, answer) = oneshot::channel();
        self.writer
            .send(command(reply))
            .map_err(|_| StorageError::Closed)?;
        answer.await.map_err(|_| StorageError::Closed)
    }

    /// Applies every partition's retention and gives the space back. Blocks.
    pub fn retain(&self) -> Result<(), StorageError> {
        self.finish_deletions()?;
        for topic in self.topics() {
            for log in topic.partitions.values() {
                if self.closing.load(Ordering::Acquire) {
                    return Ok(());
                }
                retention::apply(&self.db, &self.generations, log)?;
            }
        }
        retention::reclaim(&self.db, &self.generations, &self.closing)
    }

    /// Notes in which epochs partitions are led or followed from now on, so that no older leader is followed after a restart. Blocks.
    pub fn note_epochs(&self, epochs: &[(StoredPartition, i32)]) -> Result<(), StorageError> {
        let mut batch = WriteBatch::default();
        for (log, epoch) in epochs {
            batch.put(keys::newest_epoch(log.id), epoch.to_be_bytes());
        }
        self.db.write_meta(batch)?;
        for (log, epoch) in epochs {
            log.set_newest_epoch(*epoch);
        }
        Ok(())
    }

    /// Compacts partitions that are due. Blocks.
    pub fn compact(&self) -> Result<(), StorageError> {
        for topic in self.topics() {
            for log in topic.partitions.values() {
                let mut is_due = true;
                while is_due && !self.closing.load(Ordering::Acquire) {
                    is_due = self.compactor.compact(log, &self.closing)?;
                }
            }
        }
        Ok(())
    }

    /// RocksDB's own statistics, as text.
    pub fn statistics(&self) -> Option<String> {
        self.db.statistics()
    }

    /// RocksDB's properties that tell of memory, files and stalls: (database, property, value).
    pub fn properties(&self) -> Vec<(&'static str, &'static str, u64)> {
        const PROPERTIES: [&str; 6] = [
            "rocksdb.cur-size-all-mem-tables",
            "rocksdb.total-sst-files-size",
            "rocksdb.live-sst-files-size",
            "rocksdb.num-files-at-level0",
            "rocksdb.actual-delayed-write-rate",
            "rocksdb.is-write-stopped",
        ];
        let databases = [("log", self.db.log()), ("meta", self.db.meta())];
        let all = databases.into_iter().flat_map(|(name, database)| {
            let value = move |property| database.property_int_value(property).ok().flatten();
            PROPERTIES
                .into_iter()
                .filter_map(move |property| Some((name, property, value(property)?)))
        });
        all.collect()
    }

    /// Finishes what was accepted and closes. Blocks.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.room.close();
        let none = Threads {
            writer: None,
            housekeepers: Vec::new(),
        };
        let Threads {
            writer,
            housekeepers,
        } = std::mem::replace(&mut *self.threads.lock(), none);
        let _ = self.writer.send(Command::Stop);
        if let Some(thread) = writer {
            let _ = thread.join();
        }
        for (stop, thread) in housekeepers {
            drop(stop);
            let _ = thread.join();
        }
    }

    /// Does something again and again, on a thread of its own, until the store closes.
    fn every(
        self: &Arc<Self>,
        name: &str,
        interval: Duration,
        work: impl Fn(&Store) + Send + 'static,
    ) -> std::io::Result<Housekeeper> {
        let (stop, stopped) = channel::<()>();
        let store = Arc::downgrade(self);
        let body = move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                let Some(store) = store.upgrade() else { break };
                work(&store);
            }
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(body)?;
        Ok((stop, thread))
    }

    fn watch_disk(&self) {
        let looked = self.disk.look();
        let free = self.disk.free_bytes();
        match looked {
            (DiskState::Enough, DiskState::Full) => {
                warn!(free, "the disk is full: writes are refused, reads go on");
            }
            (DiskState::Full, DiskState::Enough) => {
                info!(free, "the disk has room again: writes are accepted");
            }
            (DiskState::Failing, DiskState::Enough) => {
                info!("writes are accepted again after one has failed");
            }
            _ => {}
        }
    }
}
