//! The client: how it is configured and connected, and what can be asked without a producer or consumer.
//!
//! Not responsible for records: see [`producer`](crate::Producer) and [`consumer`](crate::Consumer).

use std::{fmt, sync::Arc, time::Duration};

use millrace_proto::v1;
use millrace_record::ProducerState;
use tokio::time::Instant;

use crate::{
    backoff,
    consumer::ConsumerBuilder,
    error::{Error, ErrorKind},
    metadata::{ClusterMetadata, Metadata, Topic},
    offsets::{self, OffsetAt, OffsetSpec},
    producer::ProducerBuilder,
    race,
    suspects::Suspects,
    transport::Transport,
};

/// A connection to a cluster. Cheap to clone; clones share connections and what they know of the cluster.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    bootstrap: Vec<Arc<str>>,
    transport: Transport,
    metadata: Metadata,
    suspects: Suspects,
    metadata_refresh: Duration,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("bootstrap", &self.inner.bootstrap)
            .field("request_timeout", &self.inner.transport.request_timeout())
            .field("metadata_refresh", &self.inner.metadata_refresh)
            .finish()
    }
}

/// Configures a [`Client`].
#[derive(Debug, Clone)]
pub struct ClientBuilder {
    bootstrap: String,
    client_id: String,
    connect_timeout: Duration,
    request_timeout: Duration,
    metadata_refresh: Duration,
}

impl ClientBuilder {
    /// Sent to brokers as the user agent. Default: `millrace-client`.
    pub fn client_id(mut self, id: impl Into<String>) -> Self {
        self.client_id = id.into();
        self
    }

    /// How long to wait for a connection; [`connect`](ClientBuilder::connect) tries again until then. Default: 5 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// How long one try of a call may take. Default: 30 s.
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// How often producers and consumers look for new partitions of their topics. They also look after errors. Default: 30 s.
    pub fn metadata_refresh(mut self, interval: Duration) -> Self {
        self.metadata_refresh = interval;
        self
    }

    /// Connects to the first broker of the list that answers, trying all of them again until the time to connect is over.
    pub async fn connect(self) -> Result<Client, Error> {
        let bootstrap: Vec<Arc<str>> = self
            .bootstrap
            .split(',')
            .map(|address| {
                address
                    .trim()
                    .trim_start_matches("http://")
                    .trim_end_matches('/')
                    .into()
            })
            .filter(|address: &Arc<str>| !address.is_empty())
            .collect();
        if bootstrap.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidRequest,
                "no broker address given; write host:port[,host:port]",
            ));
        }
        let deadline = Instant::now() + self.connect_timeout;
        let transport = Transport::new(self.client_id, self.connect_timeout, self.request_timeout);
        // More than once: in Kubernetes a node learns only some time after a Service is ready what is behind it.
        let connect = |address: Arc<str>| {
            let transport = &transport;
            async move { transport.connect(&address, deadline).await }
        };
        backoff::until(deadline, || {
            race::first_success(bootstrap.iter().cloned(), connect)
        })
        .await?;
        Ok(Client {
            inner: Arc::new(Inner {
                bootstrap,
                transport,
                metadata: Metadata::default(),
                suspects: Suspects::default(),
                metadata_refresh: self.metadata_refresh.max(Duration::from_millis(10)),
            }),
        })
    }
}

impl Client {
    /// Connects with default settings. `bootstrap` is `host:port`, or several separated by commas.
    pub async fn connect(bootstrap: impl Into<String>) -> Result<Client, Error> {
        Client::builder(bootstrap).connect().await
    }

    /// Configures a client. `bootstrap` is `host:port`, or several separated by commas: the first that answers tells about
    /// the rest of the cluster.
    pub fn builder(bootstrap: impl Into<String>) -> ClientBuilder {
        ClientBuilder {
            bootstrap: bootstrap.into(),
            client_id: "millrace-client".to_owned(),
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(30),
            metadata_refresh: Duration::from_secs(30),
        }
    }

    /// Configures a producer.
    pub fn producer(&self) -> ProducerBuilder {
        ProducerBuilder::new(self.clone())
    }

    /// Configures a consumer.
    pub fn consumer(&self) -> ConsumerBuilder {
        ConsumerBuilder::new(self.clone())
    }

    /// Describes the cluster and the named topics, or all of them if none is named, but for internal ones. How far logs go, each partition's
    /// leader is asked.
    pub async fn metadata(&self, topics: &[&str]) -> Result<ClusterMetadata, Error> {
        let names: Vec<String> = topics.iter().map(|&topic| topic.to_owned()).collect();
        let response = backoff::until(self.deadline(), || self.refresh(&names)).await?;
        let mut cluster = ClusterMetadata::from_response(response)?;
        for (address, topics) in cluster.leaders_to_ask() {
            match self.describe(&address, &topics).await {
                Ok(told) => cluster.complete(&told),
                Err(error) => tracing::warn!(%address, %error, "can't ask a leader for its logs"),
            }
        }
        Ok(cluster)
    }

    /// Finds an offset. `None`: no record is as new as the time asked for.
    pub async fn list_offset(
        &self,
        topic: &str,
        partition: i32,
        spec: OffsetSpec,
    ) -> Result<Option<OffsetAt>, Error> {
        offsets::find_one(self, &topic.into(), partition, spec, self.deadline()).await
    }

    pub(crate) fn client_id(&self) -> &str {
        self.inner.transport.client_id()
    }

    pub(crate) fn transport(&self) -> &Transport {
        &self.inner.transport
    }

    pub(crate) fn cached(&self) -> &Metadata {
        &self.inner.metadata
    }

    pub(crate) fn metadata_refresh(&self) -> Duration {
        self.inner.metadata_refresh
    }

    /// When a call with retries that begins now has to be over.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.inner.transport.request_timeout()
    }

    /// Asks whichever broker answers for metadata and remembers the answer.
    pub(crate) async fn refresh(
        &self,
        topics: &[String],
    ) -> Result<v1::GetMetadataResponse, Error> {
        let response = self
            .any_broker(|address| async move { self.describe(&address, topics).await })
            .await?;
        self.inner.metadata.apply(&response)?;
        Ok(response)
    }

    /// Asks this broker for metadata.
    async fn describe(
        &self,
        address: &Arc<str>,
        topics: &[String],
    ) -> Result<v1::GetMetadataResponse, Error> {
        let mut service = self.inner.transport.metadata(address)?;
        let request = v1::GetMetadataRequest {
            topics: topics.to_vec(),
        };
        let timeout = self.inner.transport.request_timeout();
        Transport::call(address, timeout, service.get_metadata(request)).await
    }

    /// The topic, asking for it if it isn't known.
    pub(crate) async fn topic(&self, name: &str, deadline: Instant) -> Result<Arc<Topic>, Error> {
        if let Some(topic) = self.inner.metadata.topic(name) {
            return Ok(topic);
        }
        let names = [name.to_owned()];
        backoff::until(deadline, || self.refresh(&names)).await?;
        self.inner
            .metadata
            .topic(name)
            .ok_or_else(|| Error::unknown_topic(name))
    }

    /// A new producer id.
    pub(crate) async fn new_identity(&self) -> Result<ProducerState, Error> {
        self.any_broker(|address| async move {
            let mut service = self.inner.transport.identities(&address)?;
            let call = service.init_producer(v1::InitProducerRequest {});
            let identity =
                Transport::call(&address, self.inner.transport.request_timeout(), call).await?;
            let epoch = i16::try_from(identity.producer_epoch).map_err(|_| {
                let message = format!(
                    "broker {address} gave out producer epoch {}",
                    identity.producer_epoch
                );
                Error::new(ErrorKind::Transport, message)
            })?;
            Ok(ProducerState {
                id: identity.producer_id,
                epoch,
                base_sequence: 0,
            })
        })
        .await
    }

    /// Asks the known brokers in any order, then those of the configuration, until one answers. Suspects come last.
    async fn any_broker<T, F: Future<Output = Result<T, Error>>>(
        &self,
        call: impl Fn(Arc<str>) -> F,
    ) -> Result<T, Error> {
        let mut brokers = self.inner.metadata.brokers();
        fastrand::shuffle(&mut brokers);
        brokers.extend(self.inner.bootstrap.iter().cloned());
        let suspects = &self.inner.suspects;
        suspects.sort(&mut brokers, Instant::now());
        race::first_success(brokers, |address| {
            suspects.watch(address.clone(), call(address))
        })
        .await
    }
}
