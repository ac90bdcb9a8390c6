//! What a reconcile needs besides its object.

use std::fmt::Debug;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::NamespaceResourceScope;
use kube::runtime::events::{Event, EventType, Recorder};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tracing::warn;

use crate::error::{Doing, Error, conflict, not_found};
use crate::news::{News, news};
use crate::observe::{Kind, Metrics};
use crate::view::View;

/// Who the operator is to the API server, as a manager of fields.
pub(crate) const MANAGER: &str = "millrace-operator";
/// Leases of one topic that are made or deleted at a time.
const IN_FLIGHT: usize = 16;

/// An object of a kind that has namespaces.
pub(crate) trait Namespaced:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug
{
}

impl<K> Namespaced for K where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + Debug
{
}

/// See the module.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) view: Arc<View>,
    pub(crate) metrics: Arc<Metrics>,
    /// The brokers' image if a Cluster names none.
    pub(crate) default_image: String,
    /// The namespaces that are watched; `None`: all.
    pub(crate) scopes: Vec<Option<String>>,
    /// Two topics must not be placed at a time: each must see the other's replicas.
    pub(crate) placing: Mutex<()>,
    pub(crate) recorder: Recorder,
}

impl Context {
    pub(crate) fn api<K>(&self, namespace: &str) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), namespace)
    }

    /// Whether that namespace is watched, so that what is not seen there is not there.
    pub(crate) fn watches(&self, namespace: &str) -> bool {
        let mut scopes = self.scopes.iter();
        scopes.any(|scope| scope.as_deref().is_none_or(|scope| scope == namespace))
    }

    /// Says in an Event what was done. An Event that can't be written is no reason to do less.
    pub(crate) async fn event<K>(&self, object: &K, type_: EventType, reason: &str, note: String)
    where
        K: Resource<DynamicType = ()>,
    {
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note),
            action: reason.to_owned(),
            secondary: None,
        };
        let reference: ObjectReference = object.object_ref(&());
        if let Err(error) = self.recorder.publish(&event, &reference).await {
            warn!(%error, reason, "an Event could not be written");
        }
    }

    /// Says in Events what is new in the conditions of an object, compared with those that were told before.
    pub(crate) async fn tell<K>(
        &self,
        kind: Kind,
        object: &K,
        told: &[Condition],
        now: &[Condition],
    ) where
        K: Resource<DynamicType = ()>,
    {
        for News {
            type_,
            reason,
            note,
        } in news(kind, told, now)
        {
            self.event(object, type_, &reason, note).await;
        }
    }

    /// Writes a status: all of it, and nothing else.
    pub(crate) async fn write_status<K>(&self, object: &K, status: Value) -> Result<(), Error>
    where
        K: Namespaced,
    {
        let name = object.name_any();
        let api: Api<K> = self.api(&object.namespace().unwrap_or_default());
        let whole = json!({
            "apiVersion": K::api_version(&()),
            "kind": K::kind(&()),
            "metadata": {"name": name, "uid": object.uid()},
            "status": status,
        });
        let params = PatchParams::apply(MANAGER).force();
        api.patch_status(&name, &params, &Patch::Apply(&whole))
            .await
            .doing(|| format!("write the status of {} {name}", K::kind(&())))?;
        Ok(())
    }

    /// Deletes this object, not its successor. Whether it was there.
    pub(crate) async fn delete<K: Namespaced>(&self, object: &K) -> Result<bool, Error> {
        let name = object.name_any();
        let params = DeleteParams::default().preconditions(Preconditions {
            uid: object.uid(),
            resource_version: None,
        });
        let api: Api<K> = self.api(&object.namespace().unwrap_or_default());
        match api.delete(&name, &params).await {
            Err(error) if not_found(&error) || conflict(&error) => Ok(false),
            answer => {
                answer.doing(|| format!("delete {} {name}", K::kind(&())))?;
                Ok(true)
            }
        }
    }

    /// Puts a finalizer on an object, or takes it off: only if the object is as it was seen.
    pub(crate) async fn set_finalizer<K>(
        &self,
        object: &K,
        finalizer: &str,
        wanted: bool,
    ) -> Result<(), Error>
    where
        K: Namespaced,
    {
        let mut finalizers = object.finalizers().to_vec();
        if finalizers.iter().any(|held| held == finalizer) == wanted {
            return Ok(());
        }
        match wanted {
            true => finalizers.push(finalizer.to_owned()),
            false => finalizers.retain(|held| held != finalizer),
        }
        let name = object.name_any();
        let api: Api<K> = self.api(&object.namespace().unwrap_or_default());
        let patch = json!({"metadata": {
            "resourceVersion": object.resource_version(),
            "finalizers": finalizers,
        }});
        let params = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        match api.patch(&name, &params, &Patch::Merge(&patch)).await {
            Err(error) if !wanted && not_found(&error) => Ok(()),
            answer => answer
                .map(drop)
                .doing(|| format!("change the finalizers of {} {name}", K::kind(&()))),
        }
    }
}

/// Does the same to many objects, some at a time. The first error ends it.
pub(crate) async fn each<T, F>(items: Vec<T>, act: impl Fn(T) -> F) -> Result<(), Error>
where
    F: Future<Output = Result<(), Error>>,
{
    stream::iter(items)
        .map(act)
        .buffer_unordered(IN_FLIGHT)
        .try_collect()
        .await
}

/// Of creates and replaces.
pub(crate) fn post_params() -> PostParams {
    PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    }
}

pub(crate) fn now() -> Time {
    Time(Timestamp::now())
}
