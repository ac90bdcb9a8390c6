//! `millrace topics create`: writes the document that declares a topic. Topics are resources: the same document goes to
//! `kubectl apply` or into the folder that a standalone broker reads.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use millrace_crds::{Topic, TopicConfig, check_topic_name};
use serde_json::{Map, Value, json};

use crate::failure::Failure;
use crate::output;

const AFTER_HELP: &str = "\
Examples:
  millrace topics create orders --partitions 6 | kubectl apply -f -
  millrace topics create orders --partitions 6 --retention-time 30d --retention-bytes 10GiB
  millrace topics create orders --partitions 6 --dir topics

It prints the Topic's document and talks to no broker. A standalone broker
follows the folder of its --topics: a document written there makes the topic in
a moment. Options left out take their defaults when the document is read: 7
days; partitions and replicas are the Cluster's, or 1 on a standalone broker.";

/// Declare a topic: print its Topic document, or write it into a folder.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Create {
    /// The topic's name
    name: String,

    /// How many partitions
    #[arg(long, value_name = "N")]
    partitions: Option<i32>,

    /// How many brokers hold each partition
    #[arg(long, value_name = "N")]
    replication_factor: Option<i32>,

    /// How many of them must have a record for acks=all
    #[arg(long, value_name = "N")]
    min_in_sync_replicas: Option<i32>,

    /// Delete records older than this: 7d, 12h, forever
    #[arg(long, value_name = "TIME")]
    retention_time: Option<String>,

    /// Delete the oldest records of a partition beyond this size: 10GiB
    #[arg(long, value_name = "SIZE")]
    retention_bytes: Option<String>,

    /// The largest record batch: 1MiB
    #[arg(long, value_name = "SIZE")]
    max_message_bytes: Option<String>,

    /// Whose clock timestamps are from
    #[arg(long, value_enum, value_name = "WHOSE")]
    timestamp_type: Option<TimestampTypeOption>,

    /// How far ahead of the broker's clock records may be stamped: 1h
    #[arg(long, value_name = "TIME")]
    timestamp_after_max: Option<String>,

    /// The Cluster that holds the topic
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,

    /// The Kubernetes namespace
    #[arg(long, short = 'n', value_name = "NAME")]
    namespace: Option<String>,

    /// Write NAME.yaml into this folder instead of printing it
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,

    /// Replace a document that is there
    #[arg(long, requires = "dir")]
    force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TimestampTypeOption {
    /// The producer's
    #[value(name = "CreateTime", alias = "create-time")]
    CreateTime,
    /// The broker's
    #[value(name = "LogAppendTime", alias = "log-append-time")]
    LogAppendTime,
}

impl Create {
    pub(super) fn run(self) -> Result<(), Failure> {
        let yaml = self.document()?;
        match &self.dir {
            None => output::print(&yaml),
            Some(dir) => {
                let path = dir.join(format!("{}.yaml", object_name(&self.name)));
                self.write(&path, &yaml)
                    .map_err(|error| self.not_written(&path, error))?;
                eprintln!("wrote {}", path.display());
                Ok(())
            }
        }
    }

    fn write(&self, path: &Path, yaml: &str) -> io::Result<()> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut options = OpenOptions::new();
        options.write(true);
        match self.force {
            true => options.create(true).truncate(true),
            false => options.create_new(true),
        };
        options.open(path)?.write_all(yaml.as_bytes())
    }

    fn not_written(&self, path: &Path, error: io::Error) -> Failure {
        if error.kind() == io::ErrorKind::AlreadyExists {
            return Failure::new(format!("{} exists already", path.display()))
                .hint("edit it, or replace it with --force");
        }
        Failure::new(format!("can't write {}", path.display())).because(error)
    }

    /// The document: what was given and nothing else, checked as a broker or Kubernetes would.
    fn document(&self) -> Result<String, Failure> {
        check_topic_name(&self.name).map_err(|error| Failure::usage(error.to_string()))?;
        let object_name = object_name(&self.name);
        let mut spec = Map::new();
        let mut set = |field: &str, value: Option<Value>| {
            if let Some(value) = value {
                spec.insert(field.to_owned(), value);
            }
        };
        set(
            "clusterRef",
            self.cluster.as_ref().map(|name| json!({ "name": name })),
        );
        set(
            "topicName",
            (object_name != self.name).then(|| json!(self.name)),
        );
        set("partitions", self.partitions.map(Value::from));
        set(
            "replicationFactor",
            self.replication_factor.map(Value::from),
        );
        set(
            "minInSyncReplicas",
            self.min_in_sync_replicas.map(Value::from),
        );
        set("retention", self.retention());
        set(
            "maxMessageBytes",
            self.max_message_bytes.as_deref().map(size),
        );
        let timestamp_type = self.timestamp_type.map(|whose| match whose {
            TimestampTypeOption::CreateTime => "CreateTime",
            TimestampTypeOption::LogAppendTime => "LogAppendTime",
        });
        set("timestampType", timestamp_type.map(Value::from));
        let after_max = self.timestamp_after_max.as_deref();
        set("timestampAfterMax", after_max.map(Value::from));

        let mut metadata = Map::new();
        metadata.insert("name".to_owned(), json!(object_name));
        if let Some(namespace) = &self.namespace {
            metadata.insert("namespace".to_owned(), json!(namespace));
        }
        let document = json!({
            "apiVersion": "millrace.dev/v1alpha1",
            "kind": "Topic",
            "metadata": metadata,
            "spec": spec,
        });
        let topic: Topic = serde_json::from_value(document.clone())
            .map_err(|error| Failure::usage("not a legal topic").because(error))?;
        TopicConfig::try_from(&topic).map_err(|error| Failure::usage(error.to_string()))?;
        serde_yaml::to_string(&document)
            .map_err(|error| Failure::new("can't write the document").because(error))
    }

    fn retention(&self) -> Option<Value> {
        let mut retention = Map::new();
        if let Some(time) = &self.retention_time {
            retention.insert("time".to_owned(), json!(time));
        }
        if let Some(bytes) = &self.retention_bytes {
            retention.insert("bytes".to_owned(), size(bytes));
        }
        (!retention.is_empty()).then_some(Value::Object(retention))
    }
}

/// A plain number stays one in YAML.
fn size(text: &str) -> Value {
    text.parse::<i64>()
        .map_or_else(|_| json!(text), Value::from)
}

/// The topic's name as Kubernetes allows names of objects: topics may have capitals and underscores, objects may not.
fn object_name(topic: &str) -> String {
    let name: String = topic
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c == '_' { '-' } else { c })
        .collect();
    name.trim_matches(['-', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct CommandLine {
        #[command(flatten)]
        create: Create,
    }

    fn create(args: &str) -> Create {
        CommandLine::try_parse_from(["create"].into_iter().chain(args.split_whitespace()))
            .unwrap()
            .create
    }

    #[test]
    fn the_document_says_what_was_given_and_nothing_else() {
        let yaml = create("orders").document().unwrap();
        assert_eq!(
            yaml,
            "apiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata:\n  name: orders\nspec: {}\n"
        );
        let yaml = create(
            "My_Orders --partitions 6 --retention-time 30d --retention-bytes 10GiB --max-message-bytes 2048 \
             --timestamp-type LogAppendTime --timestamp-after-max 2h --cluster main -n shop",
        )
        .document()
        .unwrap();
        for line in [
            "  name: my-orders\n",
            "  namespace: shop\n",
            "  topicName: My_Orders\n",
            "  partitions: 6\n",
            "    time: 30d\n",
            "    bytes: 10GiB\n",
            "  maxMessageBytes: 2048\n",
            "  timestampType: LogAppendTime\n",
            "  timestampAfterMax: 2h\n",
            "    name: main\n",
        ] {
            assert!(yaml.contains(line), "{line:?} is not in {yaml}");
        }
    }

    #[test]
    fn what_a_broker_would_refuse_is_refused() {
        for args in [
            "a/b",
            "..",
            "orders --partitions 0",
            "orders --min-in-sync-replicas 2",
            "orders --retention-time soon",
            "orders --retention-bytes much",
            "orders --timestamp-after-max forever",
            "___",
        ] {
            assert!(create(args).document().is_err(), "{args}");
        }
    }

    #[test]
    fn a_broker_reads_the_file_and_it_is_never_replaced_unasked() {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("topics");
        let args = format!("Orders_1 --partitions 3 --dir {}", dir.display());
        create(&args).run().unwrap();
        let topics = millrace_crds::read_topics(&dir).unwrap();
        let config = TopicConfig::try_from(&topics[0]).unwrap();
        assert_eq!((config.name.as_str(), config.partitions), ("Orders_1", 3));
        let refused = create(&args).run().unwrap_err().to_string();
        assert!(refused.contains("exists already"), "{refused}");
        create(&format!("{args} --force")).run().unwrap();
    }
}
