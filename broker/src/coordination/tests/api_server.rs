//! An API server in memory, with the faults of real ones: Leases and ConfigMaps by name, versions, compare-and-swap, lists and watches.
//!
//! What a request is answered is decided by the [faults](ApiServer::fault) first, which see every call but those of a watch that is open.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use http::{Method, Request, Response, StatusCode, Uri};
use kube::{Client, client::Body};
use parking_lot::Mutex;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tokio::sync::watch;

type Fault = Box<dyn FnMut(&Call) -> Option<Answer> + Send>;

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Get,
    List,
    Watch,
    Create,
    Update,
}

/// The client of a call that was served [later](Answer::Later), once it was.
pub(super) const LATE: &str = "late";

/// A request.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) client: String,
    pub(super) verb: Verb,
    /// `leases` or `configmaps`.
    pub(super) resource: &'static str,
    /// Empty for lists and watches.
    pub(super) name: String,
}

impl Call {
    pub(super) fn is_write(&self) -> bool {
        matches!(self.verb, Verb::Create | Verb::Update)
    }
}

/// What becomes of a request instead of being answered as it should.
#[derive(Clone, Copy, Debug)]
pub(super) enum Answer {
    /// There is no one there.
    Refused,
    /// This status, and nothing is done.
    Status(u16),
    /// It is done, and the answer is lost.
    Lost,
    /// The answer is lost, and it is done so much later.
    Later(Duration),
    /// No answer at all.
    Never,
}

/// The server. Clones are the same one.
#[derive(Clone, Default)]
pub(super) struct ApiServer {
    state: Arc<Mutex<State>>,
    /// Wakes the watches.
    changed: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<(&'static str, String), Value>,
    /// Each change with its version.
    history: Vec<(u64, &'static str, Event)>,
    /// No watch can begin before this version.
    compacted: u64,
    faults: Vec<(usize, Fault)>,
    next_fault: usize,
    calls: Vec<Call>,
    /// By client and resource.
    watches: HashMap<(String, &'static str), Watches>,
}

#[derive(Clone, Serialize)]
struct Event {
    r#type: &'static str,
    object: Value,
}

/// What happens to a client's watches of a resource.
#[derive(Clone, Copy, Default)]
struct Watches {
    /// Events after this version are held back.
    held: Option<u64>,
    /// Those that were opened before the last silence never say anything again.
    silences: u64,
    /// Those that were opened before the last cut end.
    cuts: u64,
}

/// A switch that is on until dropped.
#[must_use]
pub(super) struct Switch {
    server: ApiServer,
    id: usize,
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.server
            .state
            .lock()
            .faults
            .retain(|(id, _)| *id != self.id);
    }
}

impl ApiServer {
    /// A client by that name. Within a runtime.
    pub(super) fn client(&self, name: &str) -> Client {
        let server = self.clone();
        let name = name.to_owned();
        let service = tower::service_fn(move |request| {
            let server = server.clone();
            let name = name.clone();
            async move { server.answer(name, request).await }
        });
        Client::new(service, "shop")
    }

    /// From now on what `fault` says becomes of a request, if it says something, is what becomes of it.
    pub(super) fn fault(
        &self,
        fault: impl FnMut(&Call) -> Option<Answer> + Send + 'static,
    ) -> Switch {
        let mut state = self.state.lock();
        let id = state.next_fault;
        state.next_fault += 1;
        state.faults.push((id, Box::new(fault)));
        let server = self.clone();
        Switch { server, id }
    }

    /// All is refused, and all watches end.
    pub(super) fn away(&self) -> Switch {
        let switch = self.fault(|_| Some(Answer::Refused));
        self.watches(|_, _| true, |watches| watches.cuts += 1);
        switch
    }

    /// The watches of that client say nothing of what comes after that version, until told otherwise.
    pub(super) fn hold(&self, client: &str, held: Option<u64>) {
        self.watches(|of, _| of == client, |watches| watches.held = held);
    }

    /// The newest version.
    pub(super) fn version(&self) -> u64 {
        self.state.lock().version
    }

    /// The connections of all open watches of that resource die without a word.
    pub(super) fn silence(&self, resource: &str) {
        self.watches(|_, of| of == resource, |watches| watches.silences += 1);
    }

    fn watches(&self, which: impl Fn(&str, &str) -> bool, change: impl Fn(&mut Watches)) {
        for ((client, resource), watches) in &mut self.state.lock().watches {
            if which(client, resource) {
                change(watches);
            }
        }
        self.changed.send_replace(());
    }

    /// What has been is forgotten: all watches are too old.
    pub(super) fn compact(&self) {
        let mut state = self.state.lock();
        state.version += 1;
        state.compacted = state.version;
        state.history.clear();
        drop(state);
        self.changed.send_replace(());
    }

    /// The requests since the last time this was asked.
    pub(super) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.state.lock().calls)
    }

    /// An object as it is.
    pub(super) fn get<T: DeserializeOwned>(&self, resource: &str, name: &str) -> Option<T> {
        let state = self.state.lock();
        let found = state
            .objects
            .iter()
            .find(|((r, n), _)| *r == resource && n == name);
        found.map(|(_, object)| serde_json::from_value(object.clone()).unwrap())
    }

    /// Someone writes an object, whatever is there.
    pub(super) fn put(&self, resource: &'static str, object: &impl Serialize) {
        let mut object = serde_json::to_value(object).unwrap();
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        let mut state = self.state.lock();
        if let Some(there) = state.objects.get(&(resource, name.clone())) {
            object["metadata"]["uid"] = there["metadata"]["uid"].clone();
        }
        state.store(resource, name, object);
        drop(state);
        self.changed.send_replace(());
    }

    /// Someone deletes an object.
    pub(super) fn delete(&self, resource: &'static str, name: &str) {
        let mut state = self.state.lock();
        let mut object = state.objects.remove(&(resource, name.to_owned())).unwrap();
        state.version += 1;
        object["metadata"]["resourceVersion"] = state.version.to_string().into();
        state.record(resource, "DELETED", object);
        drop(state);
        self.changed.send_replace(());
    }

    async fn answer(
        self,
        client: String,
        request: Request<Body>,
    ) -> io::Result<Response<axum::body::Body>> {
        let (parts, body) = request.into_parts();
        let query = query(&parts.uri);
        let body = body.collect_bytes().await.map_err(io::Error::other)?;
        let call = read_call(client, &parts.method, &parts.uri, &query, &body);
        let answer = {
            let mut state = self.state.lock();
            state.calls.push(call.clone());
            let faults = state.faults.iter_mut().rev();
            faults.filter_map(|(_, fault)| fault(&call)).next()
        };
        let lost = || io::Error::from(io::ErrorKind::ConnectionReset);
        match answer {
            None => Ok(self.serve(call, &query, &body)),
            Some(Answer::Refused) => Err(io::ErrorKind::ConnectionRefused.into()),
            Some(Answer::Status(code)) => Ok(status(code)),
            Some(Answer::Lost) => {
                self.serve(call, &query, &body);
                Err(lost())
            }
            Some(Answer::Later(delay)) => {
                // Whatever becomes of the client meanwhile.
                std::thread::spawn(move || {
                    std::thread::sleep(delay);
                    self.serve(call.clone(), &query, &body);
                    let client = LATE.to_owned();
                    self.state.lock().calls.push(Call { client, ..call });
                });
                Err(lost())
            }
            Some(Answer::Never) => std::future::pending().await,
        }
    }

    fn serve(
        &self,
        call: Call,
        query: &HashMap<String, String>,
        body: &[u8],
    ) -> Response<axum::body::Body> {
        let selector = query.get("labelSelector").cloned().unwrap_or_default();
        let mut state = self.state.lock();
        let key = (call.resource, call.name.clone());
        let there = state.objects.get(&key).cloned();
        match call.verb {
            Verb::Get => there.map_or_else(|| status(404), |object| document(&object)),
            Verb::List => {
                let items: Vec<&Value> = state
                    .objects
                    .iter()
                    .filter(|((resource, _), o)| {
                        *resource == call.resource && selects(&selector, o)
                    })
                    .map(|(_, object)| object)
                    .collect();
                let version = state.version.to_string();
                document(&json!({"metadata": {"resourceVersion": version}, "items": items}))
            }
            Verb::Watch => {
                let since = query["resourceVersion"].parse().unwrap();
                let watches = (call.client.clone(), call.resource);
                let opened = *state.watches.entry(watches).or_default();
                drop(state);
                Response::new(axum::body::Body::from_stream(
                    self.clone().events(call, selector, since, opened),
                ))
            }
            Verb::Create | Verb::Update => {
                let mut object: Value = serde_json::from_slice(body).unwrap();
                let version = &object["metadata"]["resourceVersion"];
                match (&there, call.verb) {
                    (None, Verb::Update) => return status(404),
                    (Some(_), Verb::Create) => return status(409),
                    (Some(there), _) if there["metadata"]["resourceVersion"] != *version => {
                        return status(409);
                    }
                    _ => {}
                }
                object["metadata"]["uid"] = there.map_or_else(
                    || uuid::Uuid::new_v4().to_string().into(),
                    |there| there["metadata"]["uid"].clone(),
                );
                let stored = state.store(call.resource, call.name, object);
                drop(state);
                self.changed.send_replace(());
                document(&stored)
            }
        }
    }

    /// The lines of a watch.
    fn events(
        self,
        call: Call,
        selector: String,
        since: u64,
        opened: Watches,
    ) -> impl Stream<Item = io::Result<Bytes>> {
        let wake = self.changed.subscribe();
        let steps = stream::unfold(Some((since, wake)), move |position| {
            let (server, call, selector) = (self.clone(), call.clone(), selector.clone());
            async move {
                let (since, mut wake) = position?;
                loop {
                    wake.borrow_and_update();
                    let next = server
                        .state
                        .lock()
                        .next_lines(&call, &selector, since, opened);
                    match next {
                        Some((lines, Some(version))) => {
                            return Some((lines, Some((version, wake))));
                        }
                        Some((lines, None)) => return Some((lines, None)),
                        None => wake.changed().await.ok()?,
                    }
                }
            }
        });
        steps.map(|lines| Ok(lines.into()))
    }
}

impl State {
    fn store(&mut self, resource: &'static str, name: String, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let before = self.objects.insert((resource, name), object.clone());
        let r#type = before.map_or("ADDED", |_| "MODIFIED");
        self.record(resource, r#type, object.clone());
        object
    }

    fn record(&mut self, resource: &'static str, r#type: &'static str, object: Value) {
        let event = Event { r#type, object };
        self.history.push((self.version, resource, event));
    }

    /// What a watch that has said all up to `since` says next, and up to where; `None` if nothing, for now.
    fn next_lines(
        &self,
        call: &Call,
        selector: &str,
        since: u64,
        opened: Watches,
    ) -> Option<(String, Option<u64>)> {
        let watches = self.watches[&(call.client.clone(), call.resource)];
        if watches.cuts != opened.cuts {
            return Some((String::new(), None));
        }
        if watches.silences != opened.silences {
            return None;
        }
        let until = watches.held.unwrap_or(self.version).min(self.version);
        if since >= until {
            return None;
        }
        if since < self.compacted {
            let object = json!({"status": "Failure", "reason": "Expired", "message": "too old", "code": 410});
            let event = Event {
                r#type: "ERROR",
                object,
            };
            return Some((line(&event), None));
        }
        let news = self.history.iter().filter(|(version, resource, event)| {
            (since + 1..=until).contains(version)
                && *resource == call.resource
                && selects(selector, &event.object)
        });
        let mut lines: String = news.map(|(_, _, event)| line(event)).collect();
        // So that a watch goes on from here, although what changed was perhaps not for it.
        let object = json!({"metadata": {"resourceVersion": until.to_string()}, "apiVersion": "v1", "kind": "Bookmark"});
        let event = Event {
            r#type: "BOOKMARK",
            object,
        };
        lines += &line(&event);
        Some((lines, Some(until)))
    }
}

/// Answers the first `count` calls so, of those that are meant.
pub(super) fn first(
    count: usize,
    answer: Answer,
    meant: impl Fn(&Call) -> bool + Send + 'static,
) -> impl FnMut(&Call) -> Option<Answer> + Send + 'static {
    let mut left = count;
    move |call| {
        if left == 0 || !meant(call) {
            return None;
        }
        left -= 1;
        Some(answer)
    }
}

fn read_call(
    client: String,
    method: &Method,
    uri: &Uri,
    query: &HashMap<String, String>,
    body: &[u8],
) -> Call {
    let mut path = uri
        .path()
        .split('/')
        .skip_while(|part| *part != "namespaces")
        .skip(2);
    let resource = match path.next() {
        Some("leases") => "leases",
        Some("configmaps") => "configmaps",
        other => panic!("a request for {other:?}: {uri}"),
    };
    let mut name = path.next().unwrap_or_default().to_owned();
    if *method == Method::POST {
        let object: Value = serde_json::from_slice(body).unwrap();
        name = object["metadata"]["name"].as_str().unwrap().to_owned();
    }
    let verb = match *method {
        Method::POST => Verb::Create,
        Method::PUT => Verb::Update,
        Method::GET if !name.is_empty() => Verb::Get,
        Method::GET if query.contains_key("watch") => Verb::Watch,
        Method::GET => Verb::List,
        _ => panic!("a broker never does this: {method} {uri}"),
    };
    Call {
        client,
        verb,
        resource,
        name,
    }
}

fn query(uri: &Uri) -> HashMap<String, String> {
    let pairs = uri.query().unwrap_or_default().split('&');
    let pairs = pairs.filter_map(|pair| pair.split_once('='));
    let plain = |text: &str| {
        text.replace("%3D", "=")
            .replace("%2C", ",")
            .replace("%2F", "/")
    };
    pairs
        .map(|(key, value)| (plain(key), plain(value)))
        .collect()
}

fn selects(selector: &str, object: &Value) -> bool {
    selector
        .split(',')
        .filter_map(|term| term.split_once('='))
        .all(|(label, value)| object["metadata"]["labels"][label] == value)
}

fn line(event: &Event) -> String {
    serde_json::to_string(event).unwrap() + "\n"
}

fn document(object: &Value) -> Response<axum::body::Body> {
    Response::new(object.to_string().into())
}

fn status(code: u16) -> Response<axum::body::Body> {
    let document = json!({"status": "Failure", "message": "a fault of the test", "reason": "Test", "code": code});
    let mut response = Response::new(document.to_string().into());
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response
}
