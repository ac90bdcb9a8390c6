//! Channels to brokers: how they are configured, and one for each purpose, so that produce, fetch and metadata don't wait for
//! one another's bytes.
//!
//! Not responsible for which broker to ask, nor for retries. A channel connects when first used and again after a failure.

use std::{collections::HashMap, sync::Arc, time::Duration};

use millrace_proto::v1::{
    consumer_service_client::ConsumerServiceClient, group_service_client::GroupServiceClient,
    metadata_service_client::MetadataServiceClient, producer_service_client::ProducerServiceClient,
    transaction_service_client::TransactionServiceClient,
};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint},
};

use crate::error::{Error, ErrorKind, with_causes};

/// The largest message that the client sends or takes, as the broker has it. A batch can't be larger.
pub(crate) const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// How much a broker may send ahead of the reader, for each call and for each connection.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// Larger than HTTP/2's 16 KiB, since every frame costs both sides a pass through their HTTP/2 state.
const MAX_FRAME: u32 = 1 << 20;
/// A peer that says nothing is asked so often whether it is there, and taken for gone if it doesn't answer. Together as long as a
/// broker's session: who is given up sooner may only be busy, or behind a slow link. A leader that hangs is left as soon as
/// another is known, whatever its connection does.
const PING_INTERVAL: Duration = Duration::from_secs(2);
const PING_TIMEOUT: Duration = Duration::from_secs(4);
/// More channels than a cluster has brokers mean that addresses went out of use: then all are made anew.
const MAX_CHANNELS: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Purpose {
    Produce,
    Fetch,
    Metadata,
}

/// The client's connections.
pub(crate) struct Transport {
    client_id: String,
    connect_timeout: Duration,
    request_timeout: Duration,
    channels: Mutex<HashMap<(Purpose, Arc<str>), Channel>>,
}

impl Transport {
    pub(crate) fn new(
        client_id: String,
        connect_timeout: Duration,
        request_timeout: Duration,
    ) -> Self {
        Transport {
            client_id,
            connect_timeout,
            request_timeout,
            channels: Mutex::default(),
        }
    }

    pub(crate) fn client_id(&self) -> &str {
        &self.client_id
    }

    /// How long a call may take.
    pub(crate) fn request_timeout(&self) -> Duration {
        self.request_timeout
    }

    /// Connects now, so that a wrong address shows at once.
    pub(crate) async fn connect(&self, address: &Arc<str>, deadline: Instant) -> Result<(), Error> {
        let what = || format!("can't connect to broker {address}");
        let channel = match timeout_at(deadline, self.endpoint(address)?.connect()).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => {
                return Err(Error::new(
                    ErrorKind::Transport,
                    with_causes(what(), Some(&error)),
                ));
            }
            Err(_) => {
                let message = format!("{} within {:?}", what(), self.connect_timeout);
                return Err(Error::new(ErrorKind::Transport, message));
            }
        };
        self.channels
            .lock()
            .insert((Purpose::Metadata, address.clone()), channel);
        Ok(())
    }

    pub(crate) fn producer(
        &self,
        address: &Arc<str>,
    ) -> Result<ProducerServiceClient<Channel>, Error> {
        Ok(
            ProducerServiceClient::new(self.channel(Purpose::Produce, address)?)
                .max_encoding_message_size(MAX_MESSAGE_BYTES)
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
    }

    pub(crate) fn fetcher(
        &self,
        address: &Arc<str>,
    ) -> Result<ConsumerServiceClient<Channel>, Error> {
        Ok(
            ConsumerServiceClient::new(self.channel(Purpose::Fetch, address)?)
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
    }

    /// For offset queries, which shouldn't wait behind fetches.
    pub(crate) fn offsets(
        &self,
        address: &Arc<str>,
    ) -> Result<ConsumerServiceClient<Channel>, Error> {
        Ok(
            ConsumerServiceClient::new(self.channel(Purpose::Metadata, address)?)
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
    }

    pub(crate) fn metadata(
        &self,
        address: &Arc<str>,
    ) -> Result<MetadataServiceClient<Channel>, Error> {
        Ok(
            MetadataServiceClient::new(self.channel(Purpose::Metadata, address)?)
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
    }

    /// For consumer groups, over the connection for metadata.
    pub(crate) fn groups(&self, address: &Arc<str>) -> Result<GroupServiceClient<Channel>, Error> {
        Ok(
            GroupServiceClient::new(self.channel(Purpose::Metadata, address)?)
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
    }

    /// For transactions, over the connection for metadata.
    pub(crate) fn transactions(
        &self,
        address: &Arc<str>,
    ) -> Result<TransactionServiceClient<Channel>, Error> {
        Ok(
            TransactionServiceClient::new(self.channel(Purpose::Metadata, address)?)
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
    }

    /// For producer ids, over the connection for metadata.
    pub(crate) fn identities(
        &self,
        address: &Arc<str>,
    ) -> Result<ProducerServiceClient<Channel>, Error> {
        Ok(ProducerServiceClient::new(
            self.channel(Purpose::Metadata, address)?,
        ))
    }

    /// Runs one call to `address`, no longer than `limit`.
    pub(crate) async fn call<T>(
        address: &str,
        limit: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        match tokio::time::timeout(limit, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(Error::from_status(&status, address)),
            Err(_) => Err(Error::new(
                ErrorKind::TimedOut,
                format!(
                    "broker {address} did not answer within {limit:?}; is it overloaded or unreachable?"
                ),
            )),
        }
    }

    fn channel(&self, purpose: Purpose, address: &Arc<str>) -> Result<Channel, Error> {
        let mut channels = self.channels.lock();
        let key = (purpose, address.clone());
        if let Some(channel) = channels.get(&key) {
            return Ok(channel.clone());
        }
        if channels.len() >= MAX_CHANNELS {
            channels.clear();
        }
        let channel = self.endpoint(address)?.connect_lazy();
        channels.insert(key, channel.clone());
        Ok(channel)
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, Error> {
        let invalid = |cause: tonic::transport::Error| {
            Error::new(
                ErrorKind::InvalidRequest,
                format!("`{address}` is no broker address ({cause}); write host:port"),
            )
        };
        Ok(Endpoint::from_shared(format!("http://{address}"))
            .and_then(|endpoint| endpoint.user_agent(self.client_id.clone()))
            .map_err(invalid)?
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME))
    }
}
