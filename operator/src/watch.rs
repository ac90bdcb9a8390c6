//! Follows what there is at the API server, of one kind in one namespace or all, and tells a [`Sink`] of each change, of those too that it missed while
//! the watch was broken.

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;

use futures::StreamExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use tracing::warn;

/// Namespace (empty if it has none) and name.
pub(crate) type Key = (String, String);

/// Where changes go.
pub(crate) trait Sink<K>: Send + Sync {
    /// The object is there, like this.
    fn applied(&self, object: K);
    /// It is gone.
    fn deleted(&self, namespace: &str, name: &str);
}

pub(crate) fn key(object: &impl ResourceExt) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

/// Follows all objects of a kind. The answer comes when all that is there has been told.
pub(crate) fn objects<K>(
    api: Api<K>,
    selector: &str,
    sink: Arc<impl Sink<K> + 'static>,
) -> oneshot::Receiver<()>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    follow(watcher::watcher(api, config(selector)), sink)
}

fn config(selector: &str) -> watcher::Config {
    match selector {
        "" => watcher::Config::default(),
        selector => watcher::Config::default().labels(selector),
    }
}

fn follow<K>(
    stream: impl futures::Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
    sink: Arc<impl Sink<K> + 'static>,
) -> oneshot::Receiver<()>
where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + 'static,
{
    let (ready, told) = oneshot::channel();
    tokio::spawn(async move {
        let mut ready = Some(ready);
        let mut known = Known::default();
        // Who manages which field is of no use here, and often more than half of an object.
        let stream = stream
            .default_backoff()
            .modify(|object: &mut K| object.managed_fields_mut().clear());
        let mut stream = std::pin::pin!(stream);
        while let Some(event) = stream.next().await {
            match event {
                Ok(event) => {
                    let listed = matches!(event, Event::InitDone);
                    known.pass_on(event, &*sink);
                    if listed && let Some(ready) = ready.take() {
                        let _ = ready.send(());
                    }
                }
                Err(error) => {
                    warn!(kind = %K::kind(&()), %error, "the watch broke; it is begun again")
                }
            }
        }
    });
    told
}

/// What has been told of, to find out what a new list lacks.
#[derive(Default)]
struct Known {
    there: HashSet<Key>,
    listed: HashSet<Key>,
}

impl Known {
    fn pass_on<K: Resource<DynamicType = ()>>(&mut self, event: Event<K>, sink: &impl Sink<K>) {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(object) => {
                self.listed.insert(key(&object));
                sink.applied(object);
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                for (namespace, name) in self.there.difference(&listed) {
                    sink.deleted(namespace, name);
                }
                self.there = listed;
            }
            Event::Apply(object) => {
                self.there.insert(key(&object));
                sink.applied(object);
            }
            Event::Delete(object) => {
                let key = key(&object);
                sink.deleted(&key.0, &key.1);
                self.there.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;
    use parking_lot::Mutex;

    use super::*;

    #[derive(Default)]
    struct Told(Mutex<Vec<String>>);

    impl Sink<ConfigMap> for Told {
        fn applied(&self, object: ConfigMap) {
            self.0.lock().push(format!("+{}", object.name_any()));
        }
        fn deleted(&self, _: &str, name: &str) {
            self.0.lock().push(format!("-{name}"));
        }
    }

    fn map(name: &str) -> ConfigMap {
        let mut map = ConfigMap::default();
        map.metadata.name = Some(name.to_owned());
        map
    }

    #[test]
    fn what_a_new_list_lacks_is_told_as_deleted() {
        let told = Told::default();
        let mut known = Known::default();
        for event in [
            Event::Init,
            Event::InitApply(map("a")),
            Event::InitApply(map("b")),
            Event::InitDone,
            Event::Apply(map("c")),
            Event::Delete(map("a")),
            Event::Init,
            Event::InitApply(map("c")),
            Event::InitDone,
        ] {
            known.pass_on(event, &told);
        }
        assert_eq!(told.0.lock().join(" "), "+a +b +c -a +c -b");
    }
}
