//! Runs the controllers: takes objects from the queues, reconciles some at a time, and tries again what failed, later each time.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{FutureExt, StreamExt};
use kube::runtime::controller::{self, Action};
use kube::runtime::reflector::ObjectRef;
use kube::runtime::{Config, applier};
use kube::{Resource, ResourceExt};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::cache::Cache;
use crate::context::Context;
use crate::error::Error;
use crate::observe::Kind;
use crate::queue::Queue;
use crate::{cluster, topic};

/// Reconciles of one kind at a time.
const CONCURRENCY: u16 = 16;
/// What failed is tried again after this, and after twice as long each time,
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// but never later than this.
const LAST_RETRY: Duration = Duration::from_secs(60);

/// How often each object has failed since it last did not.
type Failures<K> = Mutex<HashMap<ObjectRef<K>, u32>>;

pub(crate) async fn clusters(context: Arc<Context>, stop: CancellationToken) {
    let view = context.view.clone();
    run(
        Kind::Cluster,
        &view.clusters,
        &view.cluster_queue,
        context,
        stop,
        cluster::reconcile,
    )
    .await;
}

pub(crate) async fn topics(context: Arc<Context>, stop: CancellationToken) {
    let view = context.view.clone();
    run(
        Kind::Topic,
        &view.topics,
        &view.topic_queue,
        context,
        stop,
        topic::reconcile,
    )
    .await;
}

/// Runs until it is stopped, and then until what has begun is done.
async fn run<K, F>(
    kind: Kind,
    cache: &Arc<Cache<K>>,
    queue: &Arc<Queue<K>>,
    context: Arc<Context>,
    stop: CancellationToken,
    reconcile: impl Fn(Arc<K>, Arc<Context>) -> F + Copy + Send + 'static,
) where
    K: Resource<DynamicType = ()> + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Action, Error>> + Send + 'static,
{
    let failures = Arc::new(Failures::<K>::default());
    let gathering = tokio::spawn(queue.clone().gather());
    let done = failures.clone();
    let act = move |object: Arc<K>, context: Arc<Context>| {
        let failures = done.clone();
        tokio::spawn(async move {
            let begun = Instant::now();
            let key = ObjectRef::from_obj(&*object);
            let result = reconcile(object, context.clone()).await;
            context
                .metrics
                .reconciled(kind, begun.elapsed(), result.is_ok());
            if result.is_ok() {
                failures.lock().remove(&key);
            }
            result
        })
        .map(|joined| joined.unwrap_or_else(|_| Ok(Action::requeue(LAST_RETRY))))
        .boxed()
    };
    let later = move |object: Arc<K>, error: &Error, _: Arc<Context>| {
        let key = ObjectRef::from_obj(&*object);
        let mut failures = failures.lock();
        let before = failures.entry(key).or_default();
        let delay = FIRST_RETRY
            .saturating_mul(1 << (*before).min(10))
            .min(LAST_RETRY);
        *before += 1;
        let name = object.name_any();
        warn!(?kind, name, namespace = object.namespace(), %error, ?delay, "reconcile failed; it is tried again");
        Action::requeue(delay)
    };
    let requests = queue.clone().requests().take_until(stop.cancelled_owned());
    let config = Config::default().concurrency(CONCURRENCY);
    applier(act, later, context, cache.store(), requests, config)
        .for_each(|result| async move {
            // Failures are told of where they are tried again, and who is gone needs nothing.
            if let Err(error) = result
                && !matches!(error, controller::Error::ObjectNotFound(_))
            {
                debug!(?kind, %error, "reconcile failed");
            }
        })
        .await;
    gathering.abort();
}
