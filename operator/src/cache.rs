//! The objects of a kind that are there, as last seen.

use std::sync::Arc;

use kube::Resource;
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::Event;
use parking_lot::Mutex;

use crate::watch::Sink;

/// What is done when an object has changed: as it was, as it is.
type Listener<K> = Box<dyn Fn(Option<&K>, Option<&K>) + Send + Sync>;

/// Holds the objects, and tells a listener of each change.
pub(crate) struct Cache<K: Resource<DynamicType = ()> + Clone + 'static> {
    store: Store<K>,
    writer: Mutex<Writer<K>>,
}

impl<K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static> Cache<K> {
    pub(crate) fn new() -> Arc<Self> {
        let (store, mut writer) = reflector::store();
        // Several watches write into one cache, so it is not by its first list that it is known to be complete.
        writer.apply_watcher_event(&Event::Init);
        writer.apply_watcher_event(&Event::InitDone);
        Arc::new(Self {
            store,
            writer: Mutex::new(writer),
        })
    }

    /// As a controller reads it.
    pub(crate) fn store(&self) -> Store<K> {
        self.store.clone()
    }

    pub(crate) fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        self.store.get(&reference(namespace, name))
    }

    pub(crate) fn all(&self) -> Vec<Arc<K>> {
        self.store.state()
    }

    /// A sink for watches that also tells the listener.
    pub(crate) fn telling(
        self: &Arc<Self>,
        listener: impl Fn(Option<&K>, Option<&K>) + Send + Sync + 'static,
    ) -> Arc<Telling<K>> {
        Arc::new(Telling {
            cache: self.clone(),
            listener: Box::new(listener),
        })
    }
}

fn reference<K: Resource<DynamicType = ()>>(namespace: &str, name: &str) -> ObjectRef<K> {
    match namespace {
        "" => ObjectRef::new(name),
        namespace => ObjectRef::new(name).within(namespace),
    }
}

/// See [`Cache::telling`].
pub(crate) struct Telling<K: Resource<DynamicType = ()> + Clone + 'static> {
    cache: Arc<Cache<K>>,
    listener: Listener<K>,
}

impl<K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static> Sink<K> for Telling<K> {
    fn applied(&self, object: K) {
        let before = self.cache.store.get(&ObjectRef::from_obj(&object));
        let event = Event::Apply(object);
        self.cache.writer.lock().apply_watcher_event(&event);
        if let Event::Apply(object) = &event {
            (self.listener)(before.as_deref(), Some(object));
        }
    }

    fn deleted(&self, namespace: &str, name: &str) {
        let Some(before) = self.cache.get(namespace, name) else {
            return;
        };
        let event = Event::Delete(before.as_ref().clone());
        self.cache.writer.lock().apply_watcher_event(&event);
        (self.listener)(Some(&before), None);
    }
}
