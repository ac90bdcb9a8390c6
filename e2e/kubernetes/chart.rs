//! What `charts/millrace` and `manifests` make: accepted by the API server, and wrong values refused with a sentence.
//!
//! Nothing of it is kept: the API server is asked whether it would take it. What an installed operator does is not tested here.

use std::process::Command;

use millrace_e2e::{Finished, SOON, eventually, repository, run};
use serde::Deserialize;
use serde_yaml::Value;

use crate::objects::Objects;

/// The chart asks for one, and `helm template` knows of none.
const KUBE_VERSION: [&str; 2] = ["--kube-version", "1.34.0"];
const RESTRICTED: &str = "pod-security.kubernetes.io/enforce: restricted";

fn chart() -> String {
    path("charts/millrace")
}

fn path(name: &str) -> String {
    repository().join(name).display().to_string()
}

/// What the chart is tried with: none but its own values, each of these files, and the test's namespace as the only one that is watched.
fn variants(objects: &Objects<'_>) -> Vec<Vec<String>> {
    let file = |name: &str| {
        vec![
            "--values".to_owned(),
            path(&format!("e2e/kubernetes/values/{name}.yaml")),
        ]
    };
    let watched = format!("watchNamespaces={{{}}}", objects.namespace);
    vec![
        vec![],
        file("everything"),
        file("little"),
        vec!["--set".to_owned(), watched],
    ]
}

fn helm_template(objects: &Objects<'_>, arguments: &[String]) -> Finished {
    let fixed = ["template", "millrace", &chart(), "-n", &objects.namespace].map(str::to_owned);
    let version = KUBE_VERSION.map(str::to_owned);
    let all = fixed.iter().chain(&version).chain(arguments);
    objects.kubernetes.helm(all)
}

/// Asks whether these documents could be applied.
fn try_apply(objects: &Objects<'_>, documents: &str) -> Finished {
    // CRDs that others have applied are theirs, and this changes nothing.
    let arguments = [
        "apply",
        "--server-side",
        "--force-conflicts",
        "--dry-run=server",
        "-f",
        "-",
    ];
    objects.kubernetes.kubectl(arguments, documents)
}

fn parse(documents: &str) -> Vec<Value> {
    serde_yaml::Deserializer::from_str(documents)
        .map(|document| Value::deserialize(document).unwrap())
        .filter(|document| !document.is_null())
        .collect()
}

fn of_kind(documents: &[Value], kind: &str) -> Vec<Value> {
    let found = documents.iter().filter(|document| document["kind"] == kind);
    found.cloned().collect()
}

pub(crate) async fn it_has_no_lint(objects: &Objects<'_>) {
    for variant in variants(objects) {
        let fixed = ["lint", "--strict", &chart()].map(str::to_owned);
        let version = KUBE_VERSION.map(str::to_owned);
        objects
            .kubernetes
            .helm(fixed.iter().chain(&version).chain(&variant))
            .success();
    }
}

pub(crate) async fn what_it_makes_is_accepted(objects: &Objects<'_>) {
    for variant in variants(objects) {
        let made = helm_template(objects, &variant).success().text();
        let applied = try_apply(objects, &made);
        assert_eq!(applied.code, Some(0), "{variant:?}: {}", applied.stderr);
        let applied = applied.text();
        assert!(
            applied.contains("deployment.apps/millrace-operator serverside-applied"),
            "{applied}"
        );
    }
}

pub(crate) async fn listed_namespaces_have_roles_and_no_others(objects: &Objects<'_>) {
    let rules = |variant: &str, kind: &str| {
        let arguments = [
            "--set-json".to_owned(),
            format!("watchNamespaces={variant}"),
        ];
        let made = parse(&helm_template(objects, &arguments).success().text());
        let of_namespace = |role: &Value| {
            let namespace = role["metadata"]["namespace"].as_str().unwrap_or_default();
            (
                namespace.to_owned(),
                role["rules"].as_sequence().unwrap().len(),
            )
        };
        of_kind(&made, kind)
            .iter()
            .map(of_namespace)
            .collect::<Vec<_>>()
    };
    let own = || (objects.namespace.clone(), 2);
    assert_eq!(rules("[]", "ClusterRole"), [(String::new(), 15)]);
    assert_eq!(rules("[]", "Role"), [own()]);
    assert_eq!(rules(r#"["a","b"]"#, "ClusterRole"), [(String::new(), 3)]);
    let listed = [("a".to_owned(), 12), ("b".to_owned(), 12), own()];
    assert_eq!(rules(r#"["a","b"]"#, "Role"), listed);
}

pub(crate) async fn monitors_are_made_where_they_can_be(objects: &Objects<'_>) {
    let there = "--api-versions=monitoring.coreos.com/v1/PodMonitor";
    for (arguments, count) in [
        (&[][..], 0),
        (&[there], 2),
        (&[there, "--set=podMonitor.enabled=false"], 0),
        (&["--set=podMonitor.enabled=true"], 2),
    ] {
        let arguments: Vec<String> = arguments.iter().map(|part| (*part).to_owned()).collect();
        let made = parse(&helm_template(objects, &arguments).success().text());
        assert_eq!(of_kind(&made, "PodMonitor").len(), count, "{arguments:?}");
    }
}

pub(crate) async fn wrong_values_are_refused_with_a_sentence(objects: &Objects<'_>) {
    for (value, sentence) in [
        (
            "operator.replica=3",
            "at '/operator': additional properties 'replica' not allowed",
        ),
        ("replicas=3", "additional properties 'replicas' not allowed"),
        (
            "operator.replicas=\"two\"",
            "at '/operator/replicas': got string, want integer",
        ),
        (
            "operator.replicas=-1",
            "at '/operator/replicas': minimum: got -1, want 0",
        ),
        (
            "operator.log.format=\"xml\"",
            "at '/operator/log/format': value must be one of 'text', 'json'",
        ),
        (
            "operator.image.digest=\"abc\"",
            "at '/operator/image/digest': 'abc' does not match pattern",
        ),
        (
            "broker.image.tag=1",
            "at '/broker/image/tag': got number, want string",
        ),
        (
            "image.pullPolicy=\"Sometimes\"",
            "at '/image/pullPolicy': value must be one of 'Always', 'IfNotPresent', 'Never'",
        ),
        (
            "image.pullSecrets=[\"regcred\"]",
            "at '/image/pullSecrets/0': got string, want object",
        ),
        (
            "watchNamespaces=\"shop\"",
            "at '/watchNamespaces': got string, want array",
        ),
        (
            "watchNamespaces=[\"Shop\"]",
            "at '/watchNamespaces/0': 'Shop' does not match pattern",
        ),
        (
            "watchNamespaces=[\"a\",\"a\"]",
            "at '/watchNamespaces': items at 0 and 1 are equal",
        ),
        (
            "operator.resources.limits.memory=\"much\"",
            "at '/operator/resources/limits/memory': 'much' does not match pattern",
        ),
        (
            "operator.extraEnv=[{\"value\":\"a\"}]",
            "at '/operator/extraEnv/0': missing property 'name'",
        ),
        (
            "operator.nodeSelector.zone=1",
            "at '/operator/nodeSelector/zone': got number, want string",
        ),
        (
            "serviceAccount.create=false",
            "at '/serviceAccount/name': minLength: got 0, want 1",
        ),
        (
            "podMonitor.enabled=\"yes\"",
            "at '/podMonitor/enabled': value must be one of 'auto', true, false",
        ),
        (
            "flowSchema.matchingPrecedence=9000",
            "at '/flowSchema/matchingPrecedence': maximum: got 9,000, want 8,999",
        ),
        ("crds.keep=null", "at '/crds': missing property 'keep'"),
    ] {
        let refused = helm_template(objects, &["--set-json".to_owned(), value.to_owned()]);
        assert_ne!(refused.code, Some(0), "{value} is accepted");
        assert!(
            refused.stderr.contains(sentence),
            "{value}\nexpected: {sentence}\nfound: {}",
            refused.stderr
        );
    }
}

pub(crate) async fn generated_files_are_what_would_be_generated(objects: &Objects<'_>) {
    let mut command = Command::new(repository().join("charts/generate"));
    command
        .arg("--check")
        .env("PATH", objects.kubernetes.search_path());
    run(&mut command, None, SOON).success();
}

pub(crate) async fn plain_manifests_are_accepted(objects: &Objects<'_>) {
    let manifests = path("manifests");
    let made = objects
        .kubernetes
        .kubectl(["kustomize", &manifests], "")
        .success()
        .text();
    // In the test's namespace: theirs may not exist, and would not by being asked for.
    let made = made
        .replace(
            "namespace: millrace\n",
            &format!("namespace: {}\n", objects.namespace),
        )
        .replace(
            "  name: millrace\n",
            &format!("  name: {}\n", objects.namespace),
        );
    let applied = try_apply(objects, &made).success().text();
    assert_eq!(applied.lines().count(), parse(&made).len(), "{applied}");
}

/// Pods as the Deployment and `helm test` make them; and, so that it is seen to be asked, not without what they say of their security.
pub(crate) async fn pods_are_admitted_where_only_restricted_ones_are(objects: &Objects<'_>) {
    let namespace = format!("{}-restricted", objects.namespace);
    let document = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{{RESTRICTED}}}}}\n"
    );
    let kubectl =
        |arguments: &[&str], input: &str| objects.kubernetes.kubectl(arguments.to_vec(), input);
    kubectl(&["create", "-f", "-"], &document).success();
    // Kubernetes makes it a moment later, and no pod without it.
    eventually("the namespace has its account", SOON, || async {
        let found = kubectl(&["get", "serviceaccount", "default", "-n", &namespace], "");
        (found.code == Some(0)).then_some(())
    })
    .await;

    let account = "--set=serviceAccount.create=false,serviceAccount.name=default";
    let made = parse(
        &helm_template(objects, &[account.to_owned()])
            .success()
            .text(),
    );
    let pod = |template: &Value| {
        let mut pod = serde_yaml::Mapping::new();
        pod.insert("apiVersion".into(), "v1".into());
        pod.insert("kind".into(), "Pod".into());
        pod.insert(
            "metadata".into(),
            serde_yaml::from_str("{name: tried}").unwrap(),
        );
        pod.insert("spec".into(), template["spec"].clone());
        Value::from(pod)
    };
    let mut pods: Vec<Value> = of_kind(&made, "Deployment")
        .iter()
        .map(|deployment| pod(&deployment["spec"]["template"]))
        .collect();
    pods.extend(of_kind(&made, "Pod").iter().map(&pod));
    assert_eq!(pods.len(), 2);

    let create = |pod: &Value| {
        let document = serde_yaml::to_string(pod).unwrap();
        kubectl(
            &["create", "-n", &namespace, "--dry-run=server", "-f", "-"],
            &document,
        )
    };
    let tried: Vec<(Finished, Finished)> = pods
        .iter_mut()
        .map(|pod| {
            let admitted = create(pod);
            pod["spec"]["containers"][0]["securityContext"] = Value::Null;
            (admitted, create(pod))
        })
        .collect();
    kubectl(&["delete", "namespace", &namespace, "--wait=false"], "").success();
    for (admitted, refused) in tried {
        admitted.success();
        assert!(
            refused
                .stderr
                .contains("violates PodSecurity \"restricted:latest\""),
            "{}",
            refused.stderr
        );
    }
}
