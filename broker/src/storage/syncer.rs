//! Group fsync: one thread makes the WAL durable again and again; each round covers every append written before it began,
//! while the writer goes on with the next ones.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tracing::error;

use super::{Appended, DiskSpace, PartitionLog, StorageError, db::Db};

/// Groups that may wait for one fsync. The bytes are bounded by the writer's queue.
const WAITING_GROUPS: usize = 1024;

type Reply = (
    oneshot::Sender<Vec<Result<Appended, StorageError>>>,
    Vec<Result<Appended, StorageError>>,
    Option<OwnedSemaphorePermit>,
);

/// What is owed to readers and producers once a group is durable.
pub(super) struct Completion {
    /// Up to where logs are durable then.
    pub advanced: Vec<(Arc<PartitionLog>, i64)>,
    pub replies: Vec<Reply>,
}

impl Completion {
    pub(super) fn complete(self) {
        for (log, offset) in self.advanced {
            log.set_durable(offset);
        }
        for (reply, results, room) in self.replies {
            drop(room);
            let _ = reply.send(results);
        }
    }

    fn fail(self, error: &StorageError) {
        for (reply, results, _room) in self.replies {
            let _ = reply.send(results.iter().map(|_| Err(error.clone())).collect());
        }
    }
}

/// The fsync thread.
pub(super) struct Syncer {
    queue: SyncSender<Completion>,
    thread: JoinHandle<()>,
}

impl Syncer {
    pub(super) fn start(db: Arc<Db>, disk: Arc<DiskSpace>) -> std::io::Result<Syncer> {
        let (queue, waiting) = sync_channel(WAITING_GROUPS);
        let thread = std::thread::Builder::new()
            .name("syncer".into())
            .spawn(move || run(&db, &disk, &waiting))?;
        Ok(Syncer { queue, thread })
    }

    /// Hands over a group that has been written. Blocks while too many wait.
    pub(super) fn submit(&self, completion: Completion) {
        if let Err(refused) = self.queue.send(completion) {
            refused.0.fail(&StorageError::Closed);
        }
    }

    /// Waits until what was handed over is complete.
    pub(super) fn wait(&self) {
        let (reply, done) = oneshot::channel();
        // Groups are completed in their order, hence an empty one after all before it.
        self.submit(Completion {
            advanced: Vec::new(),
            replies: vec![(reply, Vec::new(), None)],
        });
        // An error means that the thread is gone, and with it whatever could still be completed.
        let _ = done.blocking_recv();
    }

    /// Completes what was handed over.
    pub(super) fn stop(self) {
        drop(self.queue);
        let _ = self.thread.join();
    }
}

fn run(db: &Db, disk: &DiskSpace, waiting: &Receiver<Completion>) {
    while let Ok(first) = waiting.recv() {
        let mut group = vec![first];
        group.extend(waiting.try_iter());
        match db.sync_log() {
            Ok(()) => group.into_iter().for_each(Completion::complete),
            Err(failure) => {
                // What the kernel could not write it may have dropped: a second fsync that succeeds would prove nothing.
                // Only a restart, which reads what is on the disk, can tell what is durable.
                error!(error = %failure, "fsync failed; the broker stops, since it can't tell what is on the disk");
                let cause = disk.cause(&failure);
                group
                    .into_iter()
                    .for_each(|completion| completion.fail(&cause));
                std::process::exit(1);
            }
        }
    }
}
