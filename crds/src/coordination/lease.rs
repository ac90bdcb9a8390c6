//! The parts of a Lease that all kinds share: who holds it, how often it changed hands, and a JSON document in an annotation.

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::Role;

/// The version of all documents. A reader that meets a higher one must not act on it.
const VERSION: u32 = 1;

/// Why an object is not what it should be: someone else wrote it, or a later release did.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// It holds no document.
    #[error(
        "{object} has no {place}: it was not written by Millrace, or someone removed it; restore it, or delete the object"
    )]
    Missing {
        /// The object's name.
        object: String,
        /// The annotation or data key.
        place: &'static str,
    },
    /// Its document can't be read.
    #[error(
        "{object}: {place} can't be read: {source}; someone edited it, and it must be restored"
    )]
    Malformed {
        /// The object's name.
        object: String,
        /// The annotation or data key.
        place: &'static str,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A later release wrote it.
    #[error(
        "{object}: {place} has version {version}, and this release knows version {VERSION}: upgrade it before what wrote that"
    )]
    Version {
        /// The object's name.
        object: String,
        /// The annotation or data key.
        place: &'static str,
        /// The version.
        version: u32,
    },
    /// `leaseTransitions` is absent or negative.
    #[error("Lease {object}: spec.leaseTransitions is {found:?}, and an epoch is 0 or more")]
    Epoch {
        /// The object's name.
        object: String,
        /// What it says.
        found: Option<i32>,
    },
}

/// Who holds a Lease, since when in terms of its changes of hands, and how long without being seen to change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// `spec.holderIdentity`; `None`: no one.
    pub holder: Option<String>,
    /// `spec.leaseTransitions`: the epoch.
    pub epoch: i32,
    /// `spec.leaseDurationSeconds`; `None` on Leases that are not renewed.
    pub duration_seconds: Option<i32>,
    /// `spec.acquireTime`: for people.
    pub acquired: Option<MicroTime>,
    /// `spec.renewTime`: for people, and so that each renewal changes the object.
    pub renewed: Option<MicroTime>,
}

impl Held {
    pub(super) fn read(lease: &Lease) -> Result<Self, LeaseError> {
        let spec = lease.spec.as_ref();
        let found = spec.and_then(|spec| spec.lease_transitions);
        let epoch = found
            .filter(|epoch| *epoch >= 0)
            .ok_or_else(|| LeaseError::Epoch {
                object: name(&lease.metadata),
                found,
            })?;
        Ok(Self {
            // The API server refuses an empty identity on some versions and keeps it on others.
            holder: spec
                .and_then(|spec| spec.holder_identity.clone())
                .filter(|holder| !holder.is_empty()),
            epoch,
            duration_seconds: spec.and_then(|spec| spec.lease_duration_seconds),
            acquired: spec.and_then(|spec| spec.acquire_time.clone()),
            renewed: spec.and_then(|spec| spec.renew_time.clone()),
        })
    }

    pub(super) fn write(self) -> LeaseSpec {
        LeaseSpec {
            holder_identity: self.holder,
            lease_transitions: Some(self.epoch),
            lease_duration_seconds: self.duration_seconds,
            acquire_time: self.acquired,
            renew_time: self.renewed,
            ..LeaseSpec::default()
        }
    }
}

type Metadata = k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

pub(super) fn name(metadata: &Metadata) -> String {
    metadata.name.clone().unwrap_or_default()
}

/// Reads the document in an annotation.
pub(super) fn read_annotation<T: DeserializeOwned>(
    metadata: &Metadata,
    place: &'static str,
) -> Result<T, LeaseError> {
    let text = metadata
        .annotations
        .as_ref()
        .and_then(|annotations| annotations.get(place));
    read_document(text, || name(metadata), place)
}

/// Reads a document with its version.
pub(super) fn read_document<T: DeserializeOwned>(
    text: Option<&String>,
    object: impl Fn() -> String,
    place: &'static str,
) -> Result<T, LeaseError> {
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    let text = text.ok_or_else(|| LeaseError::Missing {
        object: object(),
        place,
    })?;
    let malformed = |source| LeaseError::Malformed {
        object: object(),
        place,
        source,
    };
    let Versioned { version } = serde_json::from_str(text).map_err(malformed)?;
    if version != VERSION {
        let object = object();
        return Err(LeaseError::Version {
            object,
            place,
            version,
        });
    }
    serde_json::from_str(text).map_err(malformed)
}

/// Writes a document with its version.
pub(super) fn write_document(document: &impl Serialize) -> String {
    #[derive(Serialize)]
    struct Versioned<'a, T> {
        version: u32,
        #[serde(flatten)]
        document: &'a T,
    }
    let version = VERSION;
    // Plain structs of strings and numbers: there is nothing that JSON can't hold.
    serde_json::to_string(&Versioned { version, document }).unwrap_or_default()
}

/// Writes the document, the labels and the spec into a Lease, and leaves all else in it as it is.
pub(super) fn write(
    lease: &mut Lease,
    cluster: &str,
    role: Role,
    place: &'static str,
    document: &impl Serialize,
    held: Held,
) {
    let annotations = lease.metadata.annotations.get_or_insert_default();
    annotations.insert(place.to_owned(), write_document(document));
    let labels = lease.metadata.labels.get_or_insert_default();
    labels.extend(role.labels(cluster));
    lease.spec = Some(held.write());
}
