//! What can go wrong while the operator acts. All of it is tried again.

use millrace_crds::coordination::LeaseError;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The API server refused a request, or did not answer.
    #[error("could not {doing}: {}", told(.source))]
    Api {
        /// What was to be done, and to what.
        doing: String,
        /// The answer.
        source: kube::Error,
    },
    /// An object between operator and brokers can't be read.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

impl Error {
    /// Whether the API server said that this can't be as it is, which trying again will not change.
    pub(crate) fn refused(&self) -> bool {
        let Self::Api { source, .. } = self else {
            return false;
        };
        code(source).is_some_and(|code| matches!(code, 400 | 403 | 422))
    }
}

/// Says of a failed request what was to be done.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> Doing<T> for Result<T, kube::Error> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Api {
            doing: what(),
            source,
        })
    }
}

/// The HTTP status of an answer.
pub(crate) fn code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// The object was changed meanwhile, or is there already: read again, decide again.
pub(crate) fn conflict(error: &kube::Error) -> bool {
    code(error) == Some(409)
}

/// The object is not there.
pub(crate) fn not_found(error: &kube::Error) -> bool {
    code(error) == Some(404)
}

/// What a person needs to know of it.
fn told(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        other => other.to_string(),
    }
}
