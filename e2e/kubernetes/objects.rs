//! Objects as people write them, put to the API server.
//!
//! They are sent as YAML says, not through our own types: those would already refuse some of what the API server shall refuse. Tests look for the
//! sentence, since a rule that refuses the right document for the wrong reason is worth nothing.

use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, ObjectMeta, Patch, PatchParams, PostParams,
};
use kube::runtime::conditions::is_crd_established;
use kube::runtime::wait::await_condition;
use millrace_crds::{Cluster, Topic, crds};
use millrace_e2e::SOON;
use millrace_e2e::kubernetes::Kubernetes;
use serde_json::{Value, json};

/// The answer of the API server to a document: the sentence with which it refused it, or the object.
pub(crate) type Answer = Result<DynamicObject, String>;

/// A namespace in which objects are made.
pub(crate) struct Objects<'a> {
    pub(crate) kubernetes: &'a Kubernetes,
    pub(crate) namespace: String,
    client: Client,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Cluster,
    Topic,
}

impl<'a> Objects<'a> {
    /// Applies the definitions, and makes a namespace.
    pub(crate) async fn begin(kubernetes: &'a Kubernetes) -> Self {
        let client = kubernetes.client().await.unwrap();
        // As people do it, since that has a limit of its own.
        let manifests = millrace_e2e::repository().join("manifests/crds");
        kubernetes
            .kubectl(["apply", "-f", manifests.to_str().unwrap()], "")
            .success();
        let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
        for crd in crds() {
            let name = crd.crd.metadata.name.unwrap();
            let established = await_condition(definitions.clone(), &name, is_crd_established());
            tokio::time::timeout(SOON, established)
                .await
                .expect("established")
                .unwrap();
        }
        let namespace = format!("millrace-test-{}", std::process::id());
        let this = Self {
            kubernetes,
            namespace,
            client,
        };
        this.make_namespace().await;
        this
    }

    async fn make_namespace(&self) {
        let metadata = ObjectMeta {
            name: Some(self.namespace.clone()),
            ..ObjectMeta::default()
        };
        let namespace = Namespace {
            metadata,
            ..Namespace::default()
        };
        Api::all(self.client.clone())
            .create(&PostParams::default(), &namespace)
            .await
            .unwrap();
    }

    pub(crate) async fn end(self) {
        let namespaces: Api<Namespace> = Api::all(self.client);
        namespaces
            .delete(&self.namespace, &DeleteParams::background())
            .await
            .unwrap();
    }

    pub(crate) fn api(&self, kind: Kind) -> Api<DynamicObject> {
        let resource = match kind {
            Kind::Cluster => ApiResource::erase::<Cluster>(&()),
            Kind::Topic => ApiResource::erase::<Topic>(&()),
        };
        Api::namespaced_with(self.client.clone(), &self.namespace, &resource)
    }

    /// Asks whether this document could be applied, with its spec as YAML.
    pub(crate) async fn try_new(&self, kind: Kind, name: &str, spec: &str) -> Answer {
        let asked = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        self.create(kind, name, spec, &asked).await
    }

    /// Makes it.
    pub(crate) async fn make(&self, kind: Kind, name: &str, spec: &str) -> DynamicObject {
        let made = self.create(kind, name, spec, &PostParams::default()).await;
        made.unwrap_or_else(|refused| panic!("{spec}: {refused}"))
    }

    async fn create(&self, kind: Kind, name: &str, spec: &str, params: &PostParams) -> Answer {
        let document = json!({
            "apiVersion": "millrace.dev/v1alpha1",
            "kind": format!("{kind:?}"),
            "metadata": {"name": name},
            "spec": yaml(spec),
        });
        let object: DynamicObject = serde_json::from_value(document).unwrap();
        let answer = self.api(kind).create(params, &object).await;
        answer.map_err(|error| sentence(&error))
    }

    /// Asks whether the spec could be changed so.
    pub(crate) async fn try_change(&self, kind: Kind, name: &str, spec: &str) -> Answer {
        let patch = Patch::Merge(json!({"spec": yaml(spec)}));
        let asked = PatchParams {
            dry_run: true,
            ..PatchParams::default()
        };
        let answer = self.api(kind).patch(name, &asked, &patch).await;
        answer.map_err(|error| sentence(&error))
    }

    /// Writes the status, as the operator would.
    pub(crate) async fn set_status(&self, kind: Kind, name: &str, status: &Value) -> DynamicObject {
        let patch = Patch::Merge(json!({"status": status}));
        let api = self.api(kind);
        api.patch_status(name, &PatchParams::default(), &patch)
            .await
            .unwrap()
    }
}

/// The document must have been refused, with this in the sentence.
#[track_caller]
pub(crate) fn assert_refused(answer: &Answer, what: &str, sentence: &str) {
    match answer {
        Ok(_) => panic!("accepted, instead of refused with {sentence:?}: {what}"),
        Err(refused) => assert!(
            refused.contains(sentence),
            "{what}\nexpected: {sentence}\nfound: {refused}"
        ),
    }
}

/// The document must have been accepted.
#[track_caller]
pub(crate) fn assert_accepted(answer: &Answer, what: &str) {
    if let Err(refused) = answer {
        panic!("refused: {what}\n{refused}");
    }
}

fn yaml(text: &str) -> Value {
    serde_yaml::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn sentence(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        other => panic!("the API server gave no verdict: {other}"),
    }
}
