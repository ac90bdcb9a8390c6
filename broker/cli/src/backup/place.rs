//! Where backups are, and how topics lie there: `TOPIC/topic.json`, and `TOPIC/PARTITION/` with its segments. A segment is written in one piece or not
//! at all, and there is no index beside it that could say otherwise, so an export that was cut off goes on where the last segment ends.

use std::{env, io};

use futures::TryStreamExt;
use millrace_client::Bytes;
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt, PutPayload, parse_url_opts};
use serde::{Deserialize, Serialize};
use url::Url;

use super::segment::{self, Segment};
use crate::failure::Failure;

/// The format of what [`Place`] writes.
const FORMAT: u32 = 1;
const CREDENTIALS: &str = "the store's address and credentials come from AWS_ENDPOINT, AWS_REGION, AWS_ACCESS_KEY_ID and \
                           AWS_SECRET_ACCESS_KEY; without TLS it takes AWS_ALLOW_HTTP=true";

/// A folder or an object store.
pub(super) struct Place {
    store: Box<dyn ObjectStore>,
    root: Path,
    name: String,
}

/// What is known of a topic in a backup.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Manifest {
    format: u32,
    pub(super) topic: String,
    pub(super) topic_id: String,
    pub(super) partitions: usize,
}

impl Manifest {
    pub(super) fn new(topic: String, topic_id: String, partitions: usize) -> Self {
        Self {
            format: FORMAT,
            topic,
            topic_id,
            partitions,
        }
    }
}

impl Place {
    /// Opens a folder, or an object store by its URL.
    pub(super) fn open(name: &str) -> Result<Self, Failure> {
        let wrong = |cause: &dyn std::fmt::Display| {
            Failure::usage(format!("can't use `{name}`: {cause}"))
                .hint("name a folder, or s3://BUCKET/PREFIX for a store that speaks S3")
        };
        let url = if name.contains("://") {
            Url::parse(name).map_err(|error| wrong(&error))?
        } else {
            let path = std::path::absolute(name).map_err(|error| wrong(&error))?;
            Url::from_file_path(path).map_err(|()| wrong(&"it is no path"))?
        };
        if !["file", "s3", "s3a"].contains(&url.scheme()) {
            return Err(wrong(&format!(
                "there is no support for {}://",
                url.scheme()
            )));
        }
        // It is the only one there is, and fails if it was set before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let variables = env::vars().map(|(name, value)| (name.to_lowercase(), value));
        let settings = variables.filter(|(name, _)| name.starts_with("aws_"));
        let (store, root) = parse_url_opts(&url, settings).map_err(|error| wrong(&error))?;
        Ok(Self {
            store,
            root,
            name: name.to_owned(),
        })
    }

    /// What is there of a topic.
    pub(super) async fn manifest(&self, topic: &str) -> Result<Option<Manifest>, Failure> {
        let path = self.manifest_path(topic);
        let bytes = match self.get(&path).await {
            Err(Error::NotFound { .. }) => return Ok(None),
            answer => answer.map_err(|error| self.failed("read", &path, &error))?,
        };
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| {
            Failure::new(format!("{path} in {} can't be read", self.name)).because(error)
        })?;
        if manifest.format != FORMAT {
            let (format, place) = (manifest.format, &self.name);
            return Err(Failure::new(format!(
                "the backup of topic `{topic}` in {place} has format {format}, and this release knows {FORMAT} only"
            )));
        }
        Ok(Some(manifest))
    }

    pub(super) async fn write_manifest(&self, manifest: &Manifest) -> Result<(), Failure> {
        let path = self.manifest_path(&manifest.topic);
        let bytes = serde_json::to_vec_pretty(manifest)
            .map_err(|error| Failure::new(format!("can't write {path}")).because(error))?;
        self.put(&path, vec![bytes.into()]).await
    }

    /// The segments of a partition, in order.
    pub(super) async fn segments(
        &self,
        topic: &str,
        partition: i32,
    ) -> Result<Vec<Segment>, Failure> {
        let folder = self.folder(topic, partition);
        let list = self.store.list(Some(&folder));
        let objects: Vec<_> = list
            .try_collect()
            .await
            .map_err(|error| self.failed("list", &folder, &error))?;
        let segments = objects
            .into_iter()
            .map(|object| Segment::of(object.location, object.size));
        let segments = segments.collect::<Result<_, _>>().and_then(segment::sorted);
        segments.map_err(|error| Failure::new(format!("the backup in {}: {error}", self.name)))
    }

    /// Writes a segment, whole or not at all.
    pub(super) async fn write(
        &self,
        topic: &str,
        partition: i32,
        (first, next): (i64, i64),
        records: u64,
        batches: Vec<Bytes>,
    ) -> Result<(), Failure> {
        let name = segment::name(first, next, records);
        let path = self.folder(topic, partition).join(name);
        self.put(&path, batches).await
    }

    /// The bytes of a segment.
    pub(super) async fn read(&self, segment: &Segment) -> Result<Bytes, Failure> {
        let answer = self.get(&segment.path).await;
        answer.map_err(|error| self.failed("read", &segment.path, &error))
    }

    async fn get(&self, path: &Path) -> Result<Bytes, Error> {
        self.store.get(path).await?.bytes().await
    }

    async fn put(&self, path: &Path, parts: Vec<Bytes>) -> Result<(), Failure> {
        let written = self.store.put(path, PutPayload::from_iter(parts)).await;
        written
            .map(drop)
            .map_err(|error| self.failed("write", path, &error))
    }

    fn manifest_path(&self, topic: &str) -> Path {
        self.root.clone().join(topic).join("topic.json")
    }

    fn folder(&self, topic: &str, partition: i32) -> Path {
        let folder = format!("{partition:05}");
        self.root.clone().join(topic).join(folder)
    }

    fn failed(&self, what: &str, path: &Path, error: &Error) -> Failure {
        let failure = Failure::new(format!("can't {what} {path} in {}", self.name));
        let failure = match brief(&error.to_string()) {
            Some(cause) => failure.because(io::Error::other(cause)),
            None => failure.because(error),
        };
        match self.name.starts_with("s3") {
            true => failure.hint(CREDENTIALS),
            false => failure,
        }
    }
}

/// What an object store said, without the page of XML in which it did.
fn brief(error: &str) -> Option<String> {
    let within = |tag: &str| {
        let after = error.split_once(&format!("<{tag}>"))?.1;
        Some(after.split_once("</")?.0)
    };
    let before = error.split_once(": <")?.0;
    Some(format!(
        "{before}: {} ({})",
        within("Message")?,
        within("Code")?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stores_refusal_is_shown_without_its_xml() {
        let error = "not found: status 404: <?xml version=\"1.0\"?>\n<Error><Code>NoSuchBucket</Code><Message>There is none.</Message></Error>";
        let expected = "not found: status 404: There is none. (NoSuchBucket)";
        assert_eq!(brief(error).as_deref(), Some(expected));
        assert_eq!(brief("connection refused"), None);
    }
}
