//! Which broker to talk to, and what to say if it or a topic can't be found.

use std::time::Duration;

use clap::Args;
use millrace_client::{Client, Error, ErrorKind, Extent, PartitionInfo, TopicInfo};

use crate::failure::Failure;
use crate::warnings;

/// Options of every command that talks to a broker.
#[derive(Debug, Args)]
#[command(next_help_heading = "Connection options")]
pub(crate) struct Connection {
    /// A broker's host:port, or several separated by commas: the first that answers tells about the others
    #[arg(
        long,
        short = 'b',
        global = true,
        env = "MILLRACE_BOOTSTRAP",
        default_value = "127.0.0.1:7070",
        value_name = "HOST:PORT"
    )]
    bootstrap: String,

    /// How long one call to a broker may take
    #[arg(long, global = true, default_value = "30s", value_name = "TIME", value_parser = humantime::parse_duration)]
    request_timeout: Duration,
}

impl Connection {
    /// Connects.
    pub(crate) async fn open(&self) -> Result<Client, Failure> {
        let client = Client::builder(self.bootstrap.as_str())
            .client_id("millrace-cli")
            .request_timeout(self.request_timeout)
            .connect()
            .await
            .map_err(|error| match self.bootstrap.contains(',') {
                true => Failure::from(error).prefix(format!("none of {} answers", self.bootstrap)),
                false => error.into(),
            })?;
        // Not earlier: that it can't connect is what the command itself says.
        warnings::print();
        Ok(client)
    }
}

/// Describes a topic, or says which topics have a similar name.
pub(crate) async fn describe(client: &Client, topic: &str) -> Result<TopicInfo, Failure> {
    match client.metadata(&[topic]).await {
        Ok(cluster) => match cluster.topics.into_iter().find(|info| info.name == topic) {
            Some(info) => Ok(info),
            None => Err(unknown(client, topic).await),
        },
        Err(error) if error.kind() == ErrorKind::UnknownTopic => Err(unknown(client, topic).await),
        Err(error) => Err(error.into()),
    }
}

/// How far a partition's log goes.
pub(crate) fn extent(topic: &str, info: &PartitionInfo) -> Result<Extent, Failure> {
    info.extent.ok_or_else(|| {
        let partition = info.partition;
        match info.leader_id {
            Some(id) => Failure::new(format!(
                "broker {id}, which leads partition {partition} of topic `{topic}`, can't be reached"
            )),
            None => Failure::new(format!(
                "partition {partition} of topic `{topic}` has no leader now"
            ))
            .hint("in Kubernetes, `kubectl describe` of the Topic tells why"),
        }
    })
}

/// A partition that the topic does not have.
pub(crate) fn no_partition(topic: &TopicInfo, partition: i32) -> Failure {
    let (name, count) = (&topic.name, topic.partitions.len());
    Failure::new(format!(
        "topic `{name}` has no partition {partition}: it has {count}, counted from 0"
    ))
}

async fn unknown(client: &Client, topic: &str) -> Failure {
    let failure = Failure::new(format!("topic `{topic}` does not exist"));
    let names: Result<Vec<String>, Error> = client
        .metadata(&[])
        .await
        .map(|cluster| cluster.topics.into_iter().map(|info| info.name).collect());
    let Ok(names) = names else { return failure };
    failure.hint(match near(topic, &names).as_slice() {
        [] if names.is_empty() => "there are no topics; `millrace topics create --help` tells how \
                                   to declare one"
            .to_owned(),
        [] => "`millrace topics list` shows the topics there are; `millrace topics create` \
               declares one"
            .to_owned(),
        near => format!("did you mean {}?", near.join(" or ")),
    })
}

/// Up to three names like the wanted one, the nearest first.
fn near<'a>(wanted: &str, names: &'a [String]) -> Vec<&'a str> {
    let likeness = |name: &str| strsim::jaro_winkler(&wanted.to_lowercase(), &name.to_lowercase());
    let mut ranked: Vec<(f64, &str)> = names
        .iter()
        .map(|name| (likeness(name), name.as_str()))
        .filter(|(likeness, _)| *likeness > 0.8)
        .collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0));
    ranked.into_iter().take(3).map(|(_, name)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_offered_and_others_are_not() {
        let names = ["orders", "events", "order-lines", "packages"].map(String::from);
        assert_eq!(near("order", &names)[0], "orders");
        assert_eq!(near("Orders", &names)[0], "orders");
        assert_eq!(near("pakages", &names), ["packages"]);
        assert_eq!(near("zzz", &names), [""; 0]);
    }
}
