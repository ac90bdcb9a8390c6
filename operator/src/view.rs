//! All that the operator sees: a cache for each kind of object, indexes of Leases and records, and which change calls for which reconcile.
//!
//! All objects of a Cluster have its label, by which they are watched: the operator's memory is bounded by Millrace's own objects, whatever else there is. Of
//! nodes and namespaces, which are others', it keeps names and labels.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::future::join_all;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    ConfigMap, Namespace, Node, PersistentVolumeClaim, Pod, Service, ServiceAccount,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{Role as RbacRole, RoleBinding};
use k8s_openapi::api::storage::v1::StorageClass;
use kube::core::{NamespaceResourceScope, PartialObjectMeta};
use kube::{Api, Client, Resource, ResourceExt};
use millrace_crds::coordination::{CLUSTER_LABEL, ROLE_LABEL, Role};
use millrace_crds::{Cluster, DeletionPolicy, Topic, is_internal_topic};
use parking_lot::Mutex;
use uuid::Uuid;

use crate::alive::Alive;
use crate::cache::Cache;
use crate::cluster::GoneSince;
use crate::context::Namespaced;
use crate::figures::{Figures, Volumes};
use crate::index::{ClusterId, Partitions, Records, Sessions};
use crate::queue::Queue;
use crate::watch::{self, Sink};

/// See the module.
pub(crate) struct View {
    pub(crate) clusters: Arc<Cache<Cluster>>,
    pub(crate) topics: Arc<Cache<Topic>>,
    pub(crate) stateful_sets: Arc<Cache<StatefulSet>>,
    pub(crate) services: Arc<Cache<Service>>,
    /// Settings, not records.
    pub(crate) config_maps: Arc<Cache<ConfigMap>>,
    pub(crate) service_accounts: Arc<Cache<ServiceAccount>>,
    pub(crate) roles: Arc<Cache<RbacRole>>,
    pub(crate) role_bindings: Arc<Cache<RoleBinding>>,
    pub(crate) disruption_budgets: Arc<Cache<PodDisruptionBudget>>,
    pub(crate) network_policies: Arc<Cache<NetworkPolicy>>,
    pub(crate) pods: Arc<Cache<Pod>>,
    pub(crate) claims: Arc<Cache<PersistentVolumeClaim>>,
    pub(crate) nodes: Arc<Cache<PartialObjectMeta<Node>>>,
    pub(crate) namespaces: Arc<Cache<PartialObjectMeta<Namespace>>>,
    pub(crate) storage_classes: Arc<Cache<StorageClass>>,
    pub(crate) partitions: Mutex<Partitions>,
    pub(crate) records: Mutex<Records>,
    pub(crate) sessions: Mutex<Sessions>,
    pub(crate) figures: Mutex<Figures>,
    pub(crate) volumes: Mutex<Volumes>,
    /// What the statuses of each Cluster's Topics were last looked at for.
    pub(crate) alive: Mutex<HashMap<ClusterId, Alive>>,
    /// The uids of Topics that asked for their records to be deleted, and were gone before the finalizer that sees to it could be put on them.
    pub(crate) unwanted: Mutex<HashSet<String>>,
    pub(crate) gone_since: Mutex<GoneSince>,
    pub(crate) cluster_queue: Arc<Queue<Cluster>>,
    pub(crate) topic_queue: Arc<Queue<Topic>>,
}

impl View {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            clusters: Cache::new(),
            topics: Cache::new(),
            stateful_sets: Cache::new(),
            services: Cache::new(),
            config_maps: Cache::new(),
            service_accounts: Cache::new(),
            roles: Cache::new(),
            role_bindings: Cache::new(),
            disruption_budgets: Cache::new(),
            network_policies: Cache::new(),
            pods: Cache::new(),
            claims: Cache::new(),
            nodes: Cache::new(),
            namespaces: Cache::new(),
            storage_classes: Cache::new(),
            partitions: Mutex::default(),
            records: Mutex::default(),
            sessions: Mutex::default(),
            figures: Mutex::default(),
            volumes: Mutex::default(),
            alive: Mutex::default(),
            unwanted: Mutex::default(),
            gone_since: Mutex::default(),
            cluster_queue: Queue::new(),
            topic_queue: Queue::new(),
        })
    }

    /// Begins to watch, and returns once all that is there has been seen.
    pub(crate) async fn follow(self: &Arc<Self>, client: &Client, scopes: &[Option<String>]) {
        let mut ready = Vec::new();
        let view = self.clone();
        let nodes = self.nodes.telling(|_, _| {});
        ready.push(watch::objects(Api::all(client.clone()), "", nodes));
        let namespaces = self.namespaces.telling(move |before, after| {
            if let (Some(before), Some(after)) = (before, after)
                && before.labels() != after.labels()
            {
                view.topics_in(&after.name_any());
            }
        });
        ready.push(watch::objects(Api::all(client.clone()), "", namespaces));
        let view = self.clone();
        let classes = self.storage_classes.telling(move |_, _| {
            for cluster in view.clusters.all() {
                view.cluster(&cluster);
            }
        });
        ready.push(watch::objects(Api::all(client.clone()), "", classes));
        for scope in scopes {
            let mut follow = Follow {
                view: self,
                client,
                scope: scope.as_deref(),
                ready: &mut ready,
            };
            follow.resources();
            follow.owned(&self.stateful_sets);
            follow.owned(&self.services);
            follow.owned(&self.service_accounts);
            follow.owned(&self.roles);
            follow.owned(&self.role_bindings);
            follow.owned(&self.disruption_budgets);
            follow.owned(&self.network_policies);
            follow.owned(&self.pods);
            follow.owned(&self.claims);
            follow.leases();
            follow.config_maps();
        }
        join_all(ready).await;
    }

    /// The labels of a namespace.
    pub(crate) fn namespace_labels(
        &self,
        namespace: &str,
    ) -> std::collections::BTreeMap<String, String> {
        let namespace = self.namespaces.get("", namespace);
        namespace
            .map(|namespace| namespace.labels().clone())
            .unwrap_or_default()
    }

    fn cluster(&self, cluster: &Cluster) {
        let namespace = cluster.namespace().unwrap_or_default();
        self.cluster_queue.soon(&namespace, &cluster.name_any());
    }

    fn topic(&self, topic: &Topic) {
        let namespace = topic.namespace().unwrap_or_default();
        self.topic_queue.soon(&namespace, &topic.name_any());
    }

    fn topics_in(&self, namespace: &str) {
        for topic in self.topics.all() {
            if topic.namespace().as_deref() == Some(namespace) {
                self.topic(&topic);
            }
        }
    }

    fn topics_of(&self, cluster: &ClusterId) {
        for topic in self.topics_naming(cluster) {
            self.topic(&topic);
        }
    }

    /// All Topics that name the Cluster.
    fn topics_naming(&self, cluster: &ClusterId) -> impl Iterator<Item = Arc<Topic>> {
        let topics = self.topics.all().into_iter();
        topics.filter(move |topic| cluster_of(topic) == *cluster)
    }

    /// These brokers are alive. If that is news, the statuses of the Cluster's Topics may be others.
    pub(crate) fn now_alive(&self, cluster: &ClusterId, alive: Alive) {
        let before = self.alive.lock().insert(cluster.clone(), alive.clone());
        if before == Some(alive) {
            return;
        }
        for topic in self.topics_naming(cluster) {
            let namespace = topic.namespace().unwrap_or_default();
            self.topic_queue.gathered(&namespace, &topic.name_any());
        }
    }

    /// The Topic that a topic is of.
    fn topic_of(&self, topic_id: Uuid) -> Option<(String, String)> {
        let named = self.records.lock().topic(topic_id).cloned();
        named.filter(|(_, name)| !is_internal_topic(name))
    }

    /// Something has changed that the status of the topic's Topic shows.
    pub(crate) fn status_of(&self, topic_id: Uuid) {
        if let Some((namespace, name)) = self.topic_of(topic_id) {
            self.topic_queue.gathered(&namespace, &name);
        }
    }
}

/// The Cluster that a Topic names.
pub(crate) fn cluster_of(topic: &Topic) -> ClusterId {
    let named = &topic.spec.cluster_ref;
    let namespace = named
        .namespace
        .as_deref()
        .or(topic.metadata.namespace.as_deref());
    ClusterId::new(namespace.unwrap_or_default(), &named.name)
}

struct Follow<'a> {
    view: &'a Arc<View>,
    client: &'a Client,
    scope: Option<&'a str>,
    ready: &'a mut Vec<tokio::sync::oneshot::Receiver<()>>,
}

impl Follow<'_> {
    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        match self.scope {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    fn resources(&mut self) {
        let view = self.view.clone();
        let clusters = self.view.clusters.telling(move |before, after| {
            if before.map(asked) == after.map(asked) {
                return;
            }
            let Some(cluster) = after.or(before) else {
                return;
            };
            view.cluster(cluster);
            let namespace = cluster.namespace().unwrap_or_default();
            view.topics_of(&ClusterId::new(&namespace, &cluster.name_any()));
        });
        self.ready.push(watch::objects(self.api(), "", clusters));
        let view = self.view.clone();
        let topics = self.view.topics.telling(move |before, after| {
            if before.map(asked) == after.map(asked) {
                return;
            }
            let Some(topic) = after.or(before) else {
                return;
            };
            let cluster = cluster_of(topic);
            if after.is_some() {
                view.topic(topic);
                view.cluster_queue
                    .gathered(&cluster.namespace, &cluster.name);
            } else {
                if gone_unfinished(topic) {
                    let uid = topic.uid().unwrap_or_default();
                    view.unwanted.lock().insert(uid);
                }
                view.cluster_queue.soon(&cluster.namespace, &cluster.name);
                // Another Topic may have waited for the name.
                view.topics_in(&topic.namespace().unwrap_or_default());
            }
        });
        self.ready.push(watch::objects(self.api(), "", topics));
    }

    /// Objects that belong to a Cluster: whatever becomes of one, the Cluster is looked at again.
    fn owned<K>(&mut self, cache: &Arc<Cache<K>>)
    where
        K: Namespaced + Send + Sync + 'static,
    {
        let view = self.view.clone();
        let sink = cache.telling(move |before, after| {
            if let Some((namespace, cluster)) = after.or(before).and_then(labelled) {
                view.cluster_queue.soon(&namespace, &cluster);
            }
        });
        self.ready
            .push(watch::objects(self.api(), CLUSTER_LABEL, sink));
    }

    fn leases(&mut self) {
        let sink = Arc::new(Leases(self.view.clone()));
        self.ready
            .push(watch::objects(self.api::<Lease>(), CLUSTER_LABEL, sink));
    }

    fn config_maps(&mut self) {
        let view = self.view.clone();
        let settings = self.view.config_maps.telling(move |before, after| {
            if let Some((namespace, cluster)) = after.or(before).and_then(labelled) {
                view.cluster_queue.soon(&namespace, &cluster);
            }
        });
        let sink = Arc::new(ConfigMaps {
            view: self.view.clone(),
            settings,
        });
        self.ready
            .push(watch::objects(self.api::<ConfigMap>(), CLUSTER_LABEL, sink));
    }
}

/// What an object asks for. Its status is what the operator wrote itself.
fn asked<K: Resource>(object: &K) -> (Option<&String>, Option<i64>, bool, Option<&Vec<String>>) {
    let metadata = object.meta();
    (
        metadata.uid.as_ref(),
        metadata.generation,
        metadata.deletion_timestamp.is_some(),
        metadata.finalizers.as_ref(),
    )
}

/// Whether a Topic that has just gone asked for its records to be deleted, without a finalizer yet: `kubectl patch` and `kubectl delete`, one after the
/// other, may both be done before the operator has seen the first.
fn gone_unfinished(topic: &Topic) -> bool {
    topic.spec.deletion_policy == DeletionPolicy::Delete
        && topic.metadata.deletion_timestamp.is_none()
}

/// Namespace and Cluster of an object that belongs to one.
fn labelled<K: Resource>(object: &K) -> Option<(String, String)> {
    let metadata = object.meta();
    let cluster = metadata.labels.as_ref()?.get(CLUSTER_LABEL)?;
    Some((metadata.namespace.clone()?, cluster.clone()))
}

struct Leases(Arc<View>);

impl Sink<Lease> for Leases {
    fn applied(&self, lease: Lease) {
        let view = &self.0;
        let role = lease.labels().get(ROLE_LABEL).map(String::as_str);
        if role == Some(Role::Partition.as_str()) {
            let changed = view.partitions.lock().apply(&lease);
            let Some(id) = changed else { return };
            view.status_of(id.topic_id);
            let cluster = id.cluster;
            view.cluster_queue
                .gathered(&cluster.namespace, &cluster.name);
        } else {
            let changed = view.sessions.lock().apply(&lease);
            if let Some(cluster) = changed {
                view.cluster_queue.soon(&cluster.namespace, &cluster.name);
            }
        }
    }

    fn deleted(&self, namespace: &str, name: &str) {
        let view = &self.0;
        let gone = view.partitions.lock().delete(namespace, name);
        if let Some(id) = gone {
            if let Some((namespace, name)) = view.topic_of(id.topic_id) {
                view.topic_queue.soon(&namespace, &name);
            }
            view.cluster_queue
                .gathered(&id.cluster.namespace, &id.cluster.name);
            return;
        }
        let changed = view.sessions.lock().delete(namespace, name);
        if let Some(cluster) = changed {
            view.cluster_queue.soon(&cluster.namespace, &cluster.name);
        }
    }
}

struct ConfigMaps {
    view: Arc<View>,
    settings: Arc<crate::cache::Telling<ConfigMap>>,
}

impl Sink<ConfigMap> for ConfigMaps {
    fn applied(&self, object: ConfigMap) {
        let role = object.labels().get(ROLE_LABEL).map(String::as_str);
        if role != Some(Role::Topic.as_str()) {
            return self.settings.applied(object);
        }
        let Some((namespace, cluster)) = labelled(&object) else {
            return;
        };
        let id = ClusterId::new(&namespace, &cluster);
        let name = object.name_any();
        let record = {
            let mut records = self.view.records.lock();
            let before = records.get(&id, &name);
            records.apply(&object);
            let record = records.get(&id, &name);
            if record == before {
                return;
            }
            record.or(before)
        };
        self.view.cluster_queue.gathered(&namespace, &cluster);
        match record {
            Some(Ok(record)) if is_internal_topic(&record.topic) => {}
            Some(Ok(record)) => self.view.topic_queue.soon(&record.namespace, &record.topic),
            // Whose it was can't be read: all are asked.
            _ => self.view.topics_of(&id),
        }
    }

    fn deleted(&self, namespace: &str, name: &str) {
        let gone = self.view.records.lock().delete(namespace, name);
        if let Some(record) = gone.filter(|record| !is_internal_topic(&record.topic)) {
            self.view.topic_queue.soon(&record.namespace, &record.topic);
        }
        self.settings.deleted(namespace, name);
    }
}
