//! Asks brokers for their figures, over the gRPC API that clients use.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use millrace_proto::v1::metadata_service_client::MetadataServiceClient;
use millrace_proto::v1::{GetMetadataRequest, GetMetadataResponse, Volume};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tonic::transport::Endpoint;
use tracing::debug;
use uuid::Uuid;

use super::{TopicFigures, add};
use crate::index::ClusterId;
use crate::view::View;

/// Offsets can't be watched. Half of the least time between two writes of a status for them: what it shows is then a minute old and a half at most.
const INTERVAL: Duration = Duration::from_secs(30);
/// Brokers asked at a time: so many answers are in memory.
const AT_A_TIME: usize = 4;
/// A broker that has not answered after this, connecting included, is passed over until the next round.
const PATIENCE: Duration = Duration::from_secs(3);
/// A larger answer is refused. So much tells of some 60,000 partitions with three replicas each.
const MAX_ANSWER: usize = 4 << 20;

/// Why a broker's figures are not known.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("no answer within {PATIENCE:?}")]
    Late,
    #[error("can't connect: {0}")]
    Connect(#[from] tonic::transport::Error),
    #[error("{0}")]
    Answer(#[from] tonic::Status),
}

/// Asks the brokers of all Clusters again and again, for as long as it runs, and has the Topics looked at of which they say something new.
pub(crate) async fn follow(view: Arc<View>) {
    let mut rounds = interval(INTERVAL);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let begun = rounds.tick().await;
        let (answers, volumes) = ask_all(brokers(&view)).await;
        let filled = view
            .volumes
            .lock()
            .take_in(volumes, begun.into_std(), Timestamp::now());
        for ClusterId { namespace, name } in filled {
            view.cluster_queue.gathered(&namespace, &name);
        }
        let told = sorted(&view, answers);
        let changed = view.figures.lock().take_in(told, begun.into_std());
        for topic_id in changed {
            view.status_of(topic_id);
        }
    }
}

/// The addresses of all brokers that are up.
fn brokers(view: &View) -> Vec<(ClusterId, i32, String)> {
    let sessions = view.sessions.lock();
    let of_cluster = |id: ClusterId| {
        let brokers = sessions.brokers(&id).into_iter();
        let up = brokers.filter(|(_, broker)| broker.held);
        up.map(move |(broker_id, broker)| (id.clone(), broker_id, broker.session.address))
    };
    clusters(view).flat_map(of_cluster).collect()
}

fn clusters(view: &View) -> impl Iterator<Item = ClusterId> {
    let clusters = view.clusters.all().into_iter();
    clusters.map(|cluster| {
        let namespace = cluster.namespace().unwrap_or_default();
        ClusterId::new(&namespace, &cluster.name_any())
    })
}

/// What the brokers of each Cluster say.
type Answers = HashMap<ClusterId, HashMap<Uuid, TopicFigures>>;

async fn ask_all(
    brokers: Vec<(ClusterId, i32, String)>,
) -> (Answers, HashMap<(ClusterId, i32), Volume>) {
    let asked = stream::iter(brokers).map(|(cluster, id, address)| async move {
        let answer = ask(&address).await;
        (cluster, id, address, answer)
    });
    let mut answered = asked.buffer_unordered(AT_A_TIME);
    let (mut answers, mut volumes) = (Answers::new(), HashMap::new());
    while let Some((cluster, id, address, answer)) = answered.next().await {
        match answer {
            Ok(answer) => {
                add(answers.entry(cluster.clone()).or_default(), &answer);
                if let Some(volume) = answer.volume {
                    volumes.insert((cluster, id), volume);
                }
            }
            // Whether brokers are up is the business of their probes and sessions.
            Err(error) => debug!(address, %error, "a broker's figures are not known"),
        }
    }
    (answers, volumes)
}

async fn ask(address: &str) -> Result<GetMetadataResponse, AskError> {
    let answer = async {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
        let service = MetadataServiceClient::new(endpoint.connect().await?);
        let mut service = service.max_decoding_message_size(MAX_ANSWER);
        let answer = service.get_metadata(GetMetadataRequest::default()).await?;
        Ok(answer.into_inner())
    };
    match timeout(PATIENCE, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(AskError::Late),
    }
}

/// Of each topic that there is, what the brokers of its own Cluster say.
fn sorted(view: &View, mut answers: Answers) -> HashMap<Uuid, TopicFigures> {
    let records = view.records.lock();
    let mut told = HashMap::new();
    for cluster in clusters(view) {
        let mut answers = answers.remove(&cluster).unwrap_or_default();
        for record in records.of(&cluster) {
            let figures = answers.remove(&record.topic_id).unwrap_or_default();
            told.insert(record.topic_id, figures);
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use millrace_proto::v1::metadata_service_server::{MetadataService, MetadataServiceServer};
    use millrace_proto::v1::{PartitionMetadata, TopicMetadata};
    use tokio::net::TcpListener;
    use tonic::transport::Server;
    use tonic::transport::server::TcpIncoming;
    use tonic::{Request, Response, Status};

    use super::*;

    const TOPIC: Uuid = Uuid::from_u128(7);

    /// A broker that leads the first so many partitions of a topic with that name.
    struct Broker {
        name: String,
        partitions: i32,
    }

    #[tonic::async_trait]
    impl MetadataService for Broker {
        async fn get_metadata(
            &self,
            _: Request<GetMetadataRequest>,
        ) -> Result<Response<GetMetadataResponse>, Status> {
            let partition = |partition| PartitionMetadata {
                partition,
                leader_epoch: 1,
                log_start_offset: Some(5),
                high_watermark: Some(9),
                size_bytes: Some(100),
                ..PartitionMetadata::default()
            };
            Ok(Response::new(GetMetadataResponse {
                topics: vec![TopicMetadata {
                    name: self.name.clone(),
                    topic_id: TOPIC.to_string(),
                    partitions: (0..self.partitions).map(partition).collect(),
                    ..TopicMetadata::default()
                }],
                volume: Some(Volume {
                    free_bytes: 7,
                    ..Volume::default()
                }),
                ..GetMetadataResponse::default()
            }))
        }
    }

    async fn listen() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    async fn serve(name: String, partitions: i32) -> String {
        let (listener, address) = listen().await;
        let service = MetadataServiceServer::new(Broker { name, partitions });
        let serving = Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpIncoming::from(listener));
        tokio::spawn(serving);
        address.to_string()
    }

    #[tokio::test]
    async fn a_broker_that_does_not_answer_costs_nothing_but_its_figures() {
        let cluster = |name| ClusterId::new("shop", name);
        let (_silent, silent) = listen().await;
        let (closed, refusing) = listen().await;
        drop(closed);
        let brokers = vec![
            (cluster("main"), 0, silent.to_string()),
            (cluster("main"), 1, refusing.to_string()),
            (cluster("main"), 2, "not an address".to_owned()),
            (cluster("main"), 3, serve("orders".into(), 2).await),
            (cluster("large"), 0, serve("x".repeat(MAX_ANSWER), 1).await),
            (cluster("other"), 0, serve("orders".into(), 1).await),
        ];
        let (answers, volumes) = ask_all(brokers).await;
        assert_eq!(answers[&cluster("main")][&TOPIC].len(), 2);
        assert_eq!(answers[&cluster("main")][&TOPIC][&1].high_watermark, 9);
        assert_eq!(answers[&cluster("other")][&TOPIC].len(), 1);
        assert_eq!(answers.len(), 2, "{answers:?}");
        assert_eq!(volumes.len(), 2, "{volumes:?}");
        assert_eq!(volumes[&(cluster("main"), 3)].free_bytes, 7);
    }

    #[tokio::test]
    async fn it_is_said_why_a_broker_did_not_answer() {
        let (_silent, silent) = listen().await;
        let (closed, refusing) = listen().await;
        drop(closed);
        let large = serve("x".repeat(MAX_ANSWER), 1).await;
        for (address, expected) in [
            (silent.to_string(), "no answer within 3s"),
            (refusing.to_string(), "can't connect"),
            (large, "message length too large"),
        ] {
            let error = ask(&address).await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
