//! Reads `kind: Topic` documents from a file or a folder: what a standalone broker has in place of an API server.
//!
//! A document that Kubernetes would refuse is refused here, a misspelt field included: `kubectl` warns of those, and a
//! warning that no one reads would silently give a topic other settings than its author meant.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_yaml::Value;
use thiserror::Error;

use crate::config::{TopicConfig, TopicError};
use crate::topic::{Topic, TopicSpec};

const API_VERSION: &str = "millrace.dev/v1alpha1";

/// Why the topics could not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TopicFileError {
    /// The file or folder can't be read.
    #[error(
        "can't read topics from {}: {source}; name a YAML file of `kind: Topic` documents, or a folder of *.yaml and *.yml files",
        path.display()
    )]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Not YAML, or not the shape of a Topic.
    #[error("{}, document {document}: {source}; compare it with manifests/samples", path.display())]
    Yaml {
        /// The file.
        path: PathBuf,
        /// Which document of the file, from 1.
        document: usize,
        /// The cause, with the field's path, line and column.
        source: serde_yaml::Error,
    },
    /// Another kind of document.
    #[error(
        "{}, document {document}: found {found}, expected apiVersion: {API_VERSION}, kind: Topic; move other documents elsewhere",
        path.display()
    )]
    OtherKind {
        /// The file.
        path: PathBuf,
        /// Which document of the file, from 1.
        document: usize,
        /// What it is.
        found: String,
    },
    /// A field that a Topic does not have.
    #[error("{}, document {document}: unknown field {field}; {hint}", path.display())]
    UnknownField {
        /// The file.
        path: PathBuf,
        /// Which document of the file, from 1.
        document: usize,
        /// The field's path.
        field: String,
        /// What could stand there.
        hint: String,
    },
    /// A field with a value that is not allowed.
    #[error("{}, document {document}: {source}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Which document of the file, from 1.
        document: usize,
        /// The cause.
        source: TopicError,
    },
    /// Two documents of one topic.
    #[error(
        "topic {topic:?} is declared twice, in {} (document {first_document}) and in {} (document {second_document}): remove one",
        first.display(), second.display()
    )]
    Duplicate {
        /// The topic's name.
        topic: String,
        /// The file that declares it first.
        first: PathBuf,
        /// Which document of that file, from 1.
        first_document: usize,
        /// The file that declares it again.
        second: PathBuf,
        /// Which document of that file, from 1.
        second_document: usize,
    },
}

/// Reads every `Topic` from a YAML file, or from the `*.yaml` and `*.yml` files of a folder (not of folders in it), in the
/// order of file names. Each is checked: `TopicConfig::try_from` succeeds on what is returned, and no topic is there twice.
/// Empty documents are skipped; a folder without topics is legal.
///
/// # Errors
/// The first thing that is wrong, with its file and document.
pub fn read_topics(path: impl AsRef<Path>) -> Result<Vec<Topic>, TopicFileError> {
    let mut topics = Vec::new();
    let mut seen: BTreeMap<String, (PathBuf, usize)> = BTreeMap::new();
    for file in files(path.as_ref())? {
        for (document, topic, name) in read_file(&file)? {
            if let Some((first, first_document)) = seen.remove(&name) {
                return Err(TopicFileError::Duplicate {
                    topic: name,
                    first,
                    first_document,
                    second: file,
                    second_document: document,
                });
            }
            seen.insert(name, (file.clone(), document));
            topics.push(topic);
        }
    }
    Ok(topics)
}

fn files(path: &Path) -> Result<Vec<PathBuf>, TopicFileError> {
    let failed = |source| TopicFileError::Read {
        path: path.to_owned(),
        source,
    };
    if !fs::metadata(path).map_err(failed)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        let is_yaml = file
            .extension()
            .is_some_and(|extension| extension == "yaml" || extension == "yml");
        // `is_file` follows links: a mounted ConfigMap is made of them.
        if is_yaml && file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// The topics of one file with the number of their document and their names.
fn read_file(path: &Path) -> Result<Vec<(usize, Topic, String)>, TopicFileError> {
    let text = fs::read_to_string(path).map_err(|source| TopicFileError::Read {
        path: path.to_owned(),
        source,
    })?;
    let mut topics = Vec::new();
    // Each document is read twice: as any YAML, to know its kind, and as a Topic, straight from the text so that errors
    // have a line and a field.
    let documents = serde_yaml::Deserializer::from_str(&text);
    for (index, (as_any, as_topic)) in documents
        .zip(serde_yaml::Deserializer::from_str(&text))
        .enumerate()
    {
        let document = index + 1;
        let bad_yaml = |source| TopicFileError::Yaml {
            path: path.to_owned(),
            document,
            source,
        };
        let value = Value::deserialize(as_any).map_err(bad_yaml)?;
        if value.is_null() {
            continue;
        }
        if let Some(found) = other_kind(&value) {
            return Err(TopicFileError::OtherKind {
                path: path.to_owned(),
                document,
                found,
            });
        }
        let mut unknown = None;
        let topic: Topic = serde_ignored::deserialize(as_topic, |field| {
            let field = field.to_string().replace("?.", "");
            // The first two are checked above. A status is no mistake: `kubectl get -o yaml` prints live objects with it.
            if !matches!(field.as_str(), "apiVersion" | "kind" | "status") {
                unknown.get_or_insert(field);
            }
        })
        .map_err(bad_yaml)?;
        if let Some(field) = unknown {
            return Err(TopicFileError::UnknownField {
                path: path.to_owned(),
                document,
                hint: known_fields(&field),
                field,
            });
        }
        let config = TopicConfig::try_from(&topic).map_err(|source| TopicFileError::Invalid {
            path: path.to_owned(),
            document,
            source,
        })?;
        topics.push((document, topic, config.name));
    }
    Ok(topics)
}

/// What the document is, if it is no Topic.
fn other_kind(document: &Value) -> Option<String> {
    let field = |name: &str| document.get(name).and_then(Value::as_str);
    match (field("apiVersion"), field("kind")) {
        (Some(API_VERSION), Some("Topic")) => None,
        (None, None) => Some("a document without apiVersion and kind".to_owned()),
        (api_version, kind) => Some(format!(
            "apiVersion: {}, kind: {}",
            api_version.unwrap_or("(none)"),
            kind.unwrap_or("(none)")
        )),
    }
}

/// The fields that may stand where the unknown one does.
fn known_fields(unknown: &str) -> String {
    let schema = schemars::schema_for!(TopicSpec);
    let mut node = schema.as_value();
    let mut parents: Vec<&str> = unknown.split('.').collect();
    parents.pop();
    let names: Vec<&str> = match parents.split_first() {
        None => vec!["apiVersion", "kind", "metadata", "spec"],
        Some((&"spec", parents)) => {
            for parent in parents {
                node = resolve(schema.as_value(), &node["properties"][*parent]);
            }
            let fields = node["properties"].as_object();
            fields.map_or_else(Vec::new, |fields| {
                fields.keys().map(String::as_str).collect()
            })
        }
        Some(_) => Vec::new(),
    };
    if names.is_empty() {
        return "remove it".to_owned();
    }
    format!("the fields there are {}", names.join(", "))
}

/// Follows the reference by which a schema names the type of a field.
fn resolve<'a>(root: &'a serde_json::Value, node: &'a serde_json::Value) -> &'a serde_json::Value {
    let target = node["$ref"]
        .as_str()
        .or_else(|| node["anyOf"][0]["$ref"].as_str())
        .and_then(|reference| reference.strip_prefix('#'));
    target
        .and_then(|pointer| root.pointer(pointer))
        .unwrap_or(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata: {name: orders}\n";

    fn names(topics: &[Topic]) -> Vec<&str> {
        topics
            .iter()
            .filter_map(|topic| topic.metadata.name.as_deref())
            .collect()
    }

    fn error(yaml: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("t.yaml"), yaml).unwrap();
        read_topics(folder.path()).unwrap_err().to_string()
    }

    #[test]
    fn the_samples_are_topics() {
        let samples = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/samples");
        let topics = read_topics(samples).unwrap();
        assert_eq!(names(&topics), ["events", "orders", "packages"]);
        let partitions = topics.iter().map(|topic| topic.spec.partitions);
        assert_eq!(partitions.collect::<Vec<_>>(), [12, 6, 6].map(Some));
    }

    #[test]
    fn a_folder_is_read_in_the_order_of_file_names_with_every_document() {
        let folder = tempfile::tempdir().unwrap();
        let topic = |name: &str| HEAD.replace("orders", name) + "spec: {}\n";
        let many = format!("---\n{}---\n---\n{}", topic("b"), topic("a"));
        fs::write(folder.path().join("2.yml"), many).unwrap();
        fs::write(folder.path().join("1.yaml"), topic("c")).unwrap();
        fs::write(folder.path().join("notes.txt"), "no topic").unwrap();
        fs::create_dir(folder.path().join("sub.yaml")).unwrap();
        assert_eq!(names(&read_topics(folder.path()).unwrap()), ["c", "b", "a"]);
        let one = read_topics(folder.path().join("2.yml")).unwrap();
        assert_eq!(names(&one), ["b", "a"]);
    }

    #[test]
    fn a_live_object_as_kubectl_prints_it_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let live = "apiVersion: millrace.dev/v1alpha1\nkind: Topic\nmetadata:\n  name: orders\n  generation: 2\n  \
                    uid: 5f0c\nspec: {clusterRef: {name: main}}\nstatus: {conditions: []}\n";
        let file = folder.path().join("live.yaml");
        fs::write(&file, live).unwrap();
        assert_eq!(names(&read_topics(&file).unwrap()), ["orders"]);
    }

    #[test]
    fn a_bad_document_is_named_with_its_field_and_the_next_step() {
        let spec = |spec: &str| format!("{HEAD}spec: {spec}\n");
        for (yaml, parts) in [
            (
                spec("{partitons: 6}"),
                [
                    "t.yaml, document 1: unknown field spec.partitons",
                    "partitions, replicationFactor",
                ],
            ),
            (
                spec("{retention: {tme: 7d}}"),
                [
                    "unknown field spec.retention.tme",
                    "the fields there are bytes, time",
                ],
            ),
            (
                spec("{clusterRef: {name: c, ns: d}}"),
                [
                    "unknown field spec.clusterRef.ns",
                    "the fields there are name, namespace",
                ],
            ),
            (
                format!("{HEAD}spec: {{}}\npartitions: 6\n"),
                [
                    "unknown field partitions",
                    "the fields there are apiVersion, kind, metadata, spec",
                ],
            ),
            (
                format!("{}spec: {{}}\n", HEAD.replace("name:", "lables: {}, name:")),
                ["unknown field metadata.lables", "remove it"],
            ),
            (
                spec("{partitions: six}"),
                ["spec.partitions: invalid type: string \"six\"", "line 4"],
            ),
            (
                spec("{timestampType: Now}"),
                ["spec.timestampType: unknown variant `Now`", "LogAppendTime"],
            ),
            (
                spec("{maxMessageBytes: [1]}"),
                ["spec.maxMessageBytes: invalid type: sequence", "\"10GiB\""],
            ),
            (
                spec("{retention: {bytes: 10 gigs}}"),
                ["spec.retention.bytes: \"10 gigs\" is not a size", "write"],
            ),
            (
                spec("{partitions: 0}"),
                ["document 1: spec.partitions: 0", "use 1 to 10000"],
            ),
            (
                HEAD.to_owned(),
                ["missing field `spec`", "manifests/samples"],
            ),
            (
                format!("{}---\nkind: ConfigMap\napiVersion: v1\n", spec("{}")),
                [
                    "document 2: found apiVersion: v1, kind: ConfigMap",
                    "move other documents",
                ],
            ),
            (
                spec("{}").replace("v1alpha1", "v2"),
                ["found apiVersion: millrace.dev/v2, kind: Topic", "expected"],
            ),
            (
                "just text".to_owned(),
                ["document 1: found a document without", "expected"],
            ),
            (
                format!("{}---\n{{a: [", spec("{}")),
                ["t.yaml, document 2", "line"],
            ),
            (
                format!("{}---\n{}", spec("{}"), spec("{}")),
                [
                    "topic \"orders\" is declared twice",
                    "(document 2): remove one",
                ],
            ),
        ] {
            let message = error(&yaml);
            for part in parts {
                assert!(message.contains(part), "{part:?} is not in {message:?}");
            }
        }
    }

    #[test]
    fn a_topic_in_two_files_is_an_error_that_names_both() {
        let folder = tempfile::tempdir().unwrap();
        let other = HEAD.replace("orders", "others") + "spec: {topicName: orders}\n";
        fs::write(folder.path().join("a.yaml"), format!("{HEAD}spec: {{}}\n")).unwrap();
        fs::write(folder.path().join("b.yaml"), other).unwrap();
        let message = read_topics(folder.path()).unwrap_err().to_string();
        assert!(message.contains("a.yaml (document 1)"), "{message}");
        assert!(message.contains("b.yaml (document 1)"), "{message}");
    }

    #[test]
    fn a_path_that_is_not_there_is_named() {
        let message = read_topics("/no/such/folder").unwrap_err().to_string();
        assert!(
            message.starts_with("can't read topics from /no/such/folder: "),
            "{message}"
        );
    }
}
