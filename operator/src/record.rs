//! Writes topics' records: create, or a replace of the whole with its `resourceVersion`.

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{DeleteParams, Preconditions};
use millrace_crds::coordination::TopicRecord;

use crate::context::{Context, post_params};
use crate::error::{Doing, Error, conflict, not_found};
use crate::index::ClusterId;

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Written {
    /// It is as it was to be.
    Done,
    /// It was not as it was thought to be: it has been read again, and is to be decided again.
    Otherwise,
}

/// Makes a record, unless there is one.
pub(crate) async fn create(
    context: &Context,
    cluster: &ClusterId,
    record: &TopicRecord,
) -> Result<Written, Error> {
    let mut object = ConfigMap::default();
    record.write(&mut object, &cluster.name);
    object.metadata.namespace = Some(cluster.namespace.clone());
    let maps = context.api::<ConfigMap>(&cluster.namespace);
    match maps.create(&post_params(), &object).await {
        Ok(made) => {
            context.view.records.lock().apply(&made);
            Ok(Written::Done)
        }
        Err(error) if conflict(&error) => {
            read(context, cluster, &record.config.name).await?;
            Ok(Written::Otherwise)
        }
        Err(error) => Err(error).doing(|| format!("record topic {}", record.config.name)),
    }
}

/// Replaces a record, if it is still what it is thought to be.
pub(crate) async fn replace(
    context: &Context,
    cluster: &ClusterId,
    before: &TopicRecord,
    after: &TopicRecord,
) -> Result<Written, Error> {
    let Some(mut object) = read(context, cluster, &before.config.name).await? else {
        return Ok(Written::Otherwise);
    };
    if TopicRecord::read(&object)? != *before {
        return Ok(Written::Otherwise);
    }
    after.write(&mut object, &cluster.name);
    let name = TopicRecord::object_name(&cluster.name, &after.config.name);
    let maps = context.api::<ConfigMap>(&cluster.namespace);
    match maps.replace(&name, &post_params(), &object).await {
        Ok(made) => {
            context.view.records.lock().apply(&made);
            Ok(Written::Done)
        }
        Err(error) if conflict(&error) || not_found(&error) => Ok(Written::Otherwise),
        Err(error) => Err(error).doing(|| format!("record topic {}", after.config.name)),
    }
}

/// Deletes a record, if it is still what it is thought to be.
pub(crate) async fn delete(
    context: &Context,
    cluster: &ClusterId,
    record: &TopicRecord,
) -> Result<Written, Error> {
    let Some(object) = read(context, cluster, &record.config.name).await? else {
        return Ok(Written::Done);
    };
    if TopicRecord::read(&object)? != *record {
        return Ok(Written::Otherwise);
    }
    let name = TopicRecord::object_name(&cluster.name, &record.config.name);
    let params = DeleteParams::default().preconditions(Preconditions {
        uid: object.metadata.uid,
        resource_version: object.metadata.resource_version,
    });
    let maps = context.api::<ConfigMap>(&cluster.namespace);
    match maps.delete(&name, &params).await {
        Ok(_) => Ok(Written::Done),
        Err(error) if not_found(&error) => Ok(Written::Done),
        Err(error) if conflict(&error) => Ok(Written::Otherwise),
        Err(error) => {
            Err(error).doing(|| format!("delete the record of topic {}", record.config.name))
        }
    }
}

async fn read(
    context: &Context,
    cluster: &ClusterId,
    topic: &str,
) -> Result<Option<ConfigMap>, Error> {
    let name = TopicRecord::object_name(&cluster.name, topic);
    let maps = context.api::<ConfigMap>(&cluster.namespace);
    let found = maps.get_opt(&name).await;
    let found = found.doing(|| format!("read the record of topic {topic}"))?;
    if let Some(object) = &found {
        context.view.records.lock().apply(object);
    }
    Ok(found)
}
