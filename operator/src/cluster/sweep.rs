//! Records whose Topic is gone. A Topic that retains its records has no finalizer, so nothing but its absence says so.

use kube::ResourceExt;
use millrace_crds::coordination::{TopicRecord, TopicState};
use millrace_crds::{Topic, is_internal_topic};
use tracing::info;

use crate::context::Context;
use crate::error::{Doing, Error};
use crate::index::ClusterId;
use crate::record;
use crate::topic::{Progress, delete_records};

pub(super) async fn sweep(context: &Context, cluster: &ClusterId) -> Result<(), Error> {
    let records: Vec<TopicRecord> = context.view.records.lock().of(cluster).cloned().collect();
    for record in records {
        if !orphaned(context, &record).await? {
            continue;
        }
        let unwanted = context.view.unwanted.lock().contains(&record.topic_uid);
        match record.state {
            TopicState::Active if !unwanted => {
                let retained = TopicRecord {
                    state: TopicState::Retained,
                    ..record.clone()
                };
                record::replace(context, cluster, &record, &retained).await?;
                info!(
                    topic = record.config.name,
                    cluster = cluster.name,
                    "its Topic is gone; its records are kept"
                );
            }
            // The Topic had no finalizer yet, or someone took it off while it was being deleted.
            TopicState::Active | TopicState::Deleting => {
                if delete_records(context, cluster, &record).await? == Progress::Done {
                    context.view.unwanted.lock().remove(&record.topic_uid);
                }
            }
            TopicState::Retained => {}
        }
    }
    Ok(())
}

/// Whether the Topic is gone for certain: what the cache lacks is asked for.
async fn orphaned(context: &Context, record: &TopicRecord) -> Result<bool, Error> {
    let (namespace, name) = (&record.namespace, &record.topic);
    let is_it = |topic: &Topic| topic.uid().as_deref() == Some(&record.topic_uid);
    let internal = is_internal_topic(&record.config.name);
    if internal || record.state == TopicState::Retained || !context.watches(namespace) {
        return Ok(false);
    }
    if context
        .view
        .topics
        .get(namespace, name)
        .is_some_and(|topic| is_it(&topic))
    {
        return Ok(false);
    }
    let topics = context.api::<Topic>(namespace);
    let found = topics
        .get_opt(name)
        .await
        .doing(|| format!("read Topic {namespace}/{name}"))?;
    Ok(!found.is_some_and(|topic| is_it(&topic)))
}
