//! What is done when a Cluster is deleted whose `storage.onDelete` is `Delete`: all that Kubernetes' garbage collection would leave goes, and the
//! brokers before it, so that none makes it again.

use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim};
use kube::ResourceExt;
use kube::api::{DeleteParams, ListParams};
use kube::runtime::events::EventType;
use millrace_crds::coordination::{CLUSTER_LABEL, Role};
use millrace_crds::{Cluster, DeletionPolicy};

use super::objects::broker_name;
use crate::context::{Context, Namespaced, each};
use crate::error::{Doing, Error, not_found};
use crate::index::ClusterId;

/// Holds a Cluster until its data is deleted.
pub(super) const FINALIZER: &str = "millrace.dev/data";

/// Whether a Cluster needs the finalizer.
pub(super) fn wanted(cluster: &Cluster) -> bool {
    cluster.spec.storage.on_delete == DeletionPolicy::Delete
}

/// Deletes, as far as it can be now. Answers whether all is done.
pub(super) async fn remove(
    context: &Context,
    cluster: &Cluster,
    id: &ClusterId,
) -> Result<bool, Error> {
    if wanted(cluster) && !data(context, cluster, id).await? {
        return Ok(false);
    }
    context.set_finalizer(cluster, FINALIZER, false).await?;
    context.view.partitions.lock().forget_cluster(id);
    context.view.alive.lock().remove(id);
    Ok(true)
}

async fn data(context: &Context, cluster: &Cluster, id: &ClusterId) -> Result<bool, Error> {
    let namespace = &id.namespace;
    let sets = context.api::<StatefulSet>(namespace);
    let set = broker_name(&id.name);
    let deleted = sets.delete(&set, &DeleteParams::background()).await;
    if let Err(error) = deleted
        && !not_found(&error)
    {
        return Err(error).doing(|| format!("delete StatefulSet {namespace}/{set}"));
    }
    // Not from the cache: a pod that it has not seen yet would make its Lease again.
    let pods = context.api::<k8s_openapi::api::core::v1::Pod>(namespace);
    let labelled = ListParams::default().labels(&format!("{CLUSTER_LABEL}={}", id.name));
    let left = pods
        .list(&labelled)
        .await
        .doing(|| format!("list the pods of Cluster {}", id.name))?;
    if !left.items.is_empty() {
        return Ok(false);
    }
    context
        .api::<Lease>(namespace)
        .delete_collection(&DeleteParams::default(), &labelled)
        .await
        .doing(|| format!("delete the Leases of Cluster {}", id.name))?;
    let records = ListParams::default().labels(&Role::Topic.selector(&id.name));
    delete_all::<ConfigMap>(context, namespace, &records, "topic record").await?;
    let volumes =
        delete_all::<PersistentVolumeClaim>(context, namespace, &labelled, "volume").await?;
    let note = format!("deleted {volumes} volumes with all records, as spec.storage.onDelete says");
    context
        .event(cluster, EventType::Normal, "DataDeleted", note)
        .await;
    Ok(true)
}

/// Deletes one by one all objects that are listed, `what` they are in words. Answers how many there were.
async fn delete_all<K>(
    context: &Context,
    namespace: &str,
    listed: &ListParams,
    what: &str,
) -> Result<usize, Error>
where
    K: Namespaced,
{
    let api = context.api::<K>(namespace);
    let held = api
        .list(listed)
        .await
        .doing(|| format!("list each {what} in namespace {namespace}"))?;
    let names: Vec<_> = held.items.iter().map(ResourceExt::name_any).collect();
    let count = names.len();
    each(names, |name| {
        let api = api.clone();
        async move {
            match api.delete(&name, &DeleteParams::default()).await {
                Err(error) if not_found(&error) => Ok(()),
                answer => answer
                    .map(drop)
                    .doing(|| format!("delete the {what} {name}")),
            }
        }
    })
    .await?;
    Ok(count)
}
