//! An API server that keeps Leases: linearizable, a replace succeeds only on the version that it names, and every change is an event
//! with a place in one order. How late, or whether, requests and answers and events come is the [network](super::world)'s part.

use std::collections::BTreeMap;

use k8s_openapi::api::coordination::v1::Lease;

/// How a call that reached the API server fared.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// What is there now, after a write or a read; `None`: no such object.
    Is(Option<Box<Lease>>),
    /// Another version is there.
    Conflict,
    /// The object is not there.
    NotFound,
    /// Nothing was written.
    Refused,
    /// It may have been, or may yet be.
    Unknown,
}

/// What is asked of it.
#[derive(Clone, Debug)]
pub(super) enum Call {
    Read(String),
    /// Creates if the Lease has no version.
    Write(Box<Lease>),
}

/// The API server.
#[derive(Debug, Default)]
pub(super) struct Kube {
    objects: BTreeMap<String, Lease>,
    version: u64,
    /// All that was ever written, oldest first: what watches tell.
    events: Vec<Lease>,
    /// It does not answer.
    pub(super) down: bool,
    /// A rule broken on purpose: writes succeed on whatever version is there.
    pub(super) ignores_versions: bool,
}

pub(super) fn name_of(lease: &Lease) -> String {
    lease.metadata.name.clone().unwrap_or_default()
}

impl Kube {
    pub(super) fn get(&self, name: &str) -> Option<&Lease> {
        self.objects.get(name)
    }

    pub(super) fn call(&mut self, call: Call) -> Outcome {
        match call {
            Call::Read(name) => Outcome::Is(self.get(&name).cloned().map(Box::new)),
            Call::Write(lease) => self.write(*lease),
        }
    }

    fn write(&mut self, mut lease: Lease) -> Outcome {
        let name = name_of(&lease);
        let known = self.objects.get(&name);
        let known = known.and_then(|known| known.metadata.resource_version.as_ref());
        match (&lease.metadata.resource_version, known) {
            (Some(_), None) => return Outcome::NotFound,
            (wanted, known) if wanted.as_ref() != known && !self.ignores_versions => {
                return Outcome::Conflict;
            }
            _ => {}
        }
        self.version += 1;
        lease.metadata.resource_version = Some(self.version.to_string());
        lease.metadata.uid.get_or_insert_with(|| name.clone());
        self.events.push(lease.clone());
        self.objects.insert(name, lease.clone());
        Outcome::Is(Some(Box::new(lease)))
    }

    /// All objects, and from where on a watch tells what follows.
    pub(super) fn list(&self) -> (Vec<Lease>, usize) {
        (self.objects.values().cloned().collect(), self.events.len())
    }

    /// The same as it was some writes ago.
    pub(super) fn list_before(&self, writes: usize) -> (Vec<Lease>, usize) {
        let end = self.events.len().saturating_sub(writes);
        let mut objects = BTreeMap::new();
        for lease in &self.events[..end] {
            objects.insert(name_of(lease), lease.clone());
        }
        (objects.into_values().collect(), end)
    }

    /// The events from there on.
    pub(super) fn events(&self, from: usize) -> &[Lease] {
        &self.events[from.min(self.events.len())..]
    }
}
