//! The operator's flags.

use std::net::SocketAddr;

use clap::Parser;

/// The Millrace operator: makes of Clusters and Topics what they ask for.
#[derive(Clone, Debug, Parser)]
#[command(version, about)]
pub(crate) struct Config {
    /// The image of brokers whose Cluster names none.
    #[arg(long, env = "MILLRACE_OPERATOR_BROKER_IMAGE", value_name = "IMAGE")]
    pub(crate) broker_image: String,
    /// The namespaces whose Clusters and Topics are looked after, separated by commas. Default: all.
    #[arg(
        long,
        env = "MILLRACE_OPERATOR_NAMESPACES",
        value_name = "NAMESPACES",
        value_delimiter = ','
    )]
    pub(crate) namespaces: Vec<String>,
    /// Where /metrics, /healthz and /readyz are served (HTTP).
    #[arg(
        long,
        env = "MILLRACE_OPERATOR_LISTEN",
        default_value = "0.0.0.0:8080",
        value_name = "ADDR"
    )]
    pub(crate) listen: SocketAddr,
    /// The operator's own namespace: that of the Lease by which one of several operators is elected. Default: the one that the credentials say.
    #[arg(long, env = "MILLRACE_OPERATOR_NAMESPACE", value_name = "NAMESPACE")]
    pub(crate) namespace: Option<String>,
    /// The operator's pod: its name in that Lease and in Events.
    #[arg(
        long,
        env = "MILLRACE_OPERATOR_POD",
        default_value = "millrace-operator",
        value_name = "NAME"
    )]
    pub(crate) pod: String,
    /// Log lines as JSON.
    #[arg(long, env = "MILLRACE_OPERATOR_LOG_JSON")]
    pub(crate) log_json: bool,
}

impl Config {
    /// The namespaces to watch; none: all.
    pub(crate) fn scopes(&self) -> Vec<Option<String>> {
        let named = self.namespaces.iter().map(|name| name.trim());
        let mut named: Vec<&str> = named.filter(|name| !name.is_empty()).collect();
        named.sort_unstable();
        named.dedup();
        if named.is_empty() {
            return vec![None];
        }
        named
            .into_iter()
            .map(|name| Some(name.to_owned()))
            .collect()
    }
}
