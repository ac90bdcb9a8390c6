//! What is to be reconciled. A queue holds each object at most once, hence is bounded by what there is.

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use kube::Resource;
use kube::runtime::controller::ReconcileRequest;
use kube::runtime::reflector::ObjectRef;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Changes that only a status shows are gathered for so long before the first.
const GATHER: Duration = Duration::from_millis(200);
/// And the next ones for so long: no status is written more often for them.
const PAUSE: Duration = Duration::from_secs(3);

/// Objects that wait to be reconciled.
pub(crate) struct Queue<K: Resource<DynamicType = ()> + 'static> {
    /// At once.
    soon: Pending<K>,
    /// When changes have been gathered.
    gathered: Pending<K>,
}

struct Pending<K: Resource<DynamicType = ()> + 'static> {
    objects: Mutex<HashSet<ObjectRef<K>>>,
    added: Notify,
}

impl<K: Resource<DynamicType = ()> + 'static> Default for Pending<K> {
    fn default() -> Self {
        Self {
            objects: Mutex::default(),
            added: Notify::new(),
        }
    }
}

impl<K: Resource<DynamicType = ()> + 'static> Pending<K> {
    fn add(&self, object: ObjectRef<K>) {
        self.objects.lock().insert(object);
        self.added.notify_one();
    }

    /// Waits until there are some, and takes them all.
    async fn take(&self) -> HashSet<ObjectRef<K>> {
        loop {
            let added = self.added.notified();
            let taken = std::mem::take(&mut *self.objects.lock());
            if !taken.is_empty() {
                return taken;
            }
            added.await;
        }
    }
}

impl<K: Resource<DynamicType = ()> + Send + Sync + 'static> Queue<K> {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            soon: Pending::default(),
            gathered: Pending::default(),
        })
    }

    /// The object's own state, or what it asks for, has changed.
    pub(crate) fn soon(&self, namespace: &str, name: &str) {
        self.soon.add(ObjectRef::new(name).within(namespace));
    }

    /// Something has changed that its status shows.
    pub(crate) fn gathered(&self, namespace: &str, name: &str) {
        self.gathered.add(ObjectRef::new(name).within(namespace));
    }

    /// Passes on what was gathered, for as long as it runs.
    pub(crate) async fn gather(self: Arc<Self>) {
        loop {
            self.gathered.added.notified().await;
            tokio::time::sleep(GATHER).await;
            let objects = self.gathered.take().await;
            for object in objects {
                self.soon.add(object);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// What is to be reconciled, as a controller takes it.
    pub(crate) fn requests(
        self: Arc<Self>,
    ) -> impl Stream<Item = Result<ReconcileRequest<K>, Infallible>> + Send {
        let taken = futures::stream::unfold(self, |queue| async {
            let objects: Vec<_> = queue.soon.take().await.into_iter().collect();
            Some((objects, queue))
        });
        futures::StreamExt::flat_map(taken, |objects| {
            let requests = objects.into_iter().map(ReconcileRequest::from).map(Ok);
            futures::stream::iter(requests.collect::<Vec<_>>())
        })
    }
}
