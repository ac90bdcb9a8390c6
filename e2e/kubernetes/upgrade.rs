//! `helm upgrade` brings new CRDs, which Helm alone does not do; `helm test` shows that the installed operator works; and
//! `helm uninstall` leaves the CRDs, with which all Clusters and Topics would go.

use std::path::Path;

use millrace_e2e::kubernetes::{Installed, Kubernetes};
use millrace_e2e::repository;

/// In the CRD of Topics.
const SHORT_NAME: &str = "    - mrt\n";

pub(crate) fn the_resources_come_with_it(kubernetes: &Kubernetes) {
    let older = tempfile::tempdir().unwrap();
    copy(&repository().join("charts/millrace"), older.path());
    let crd = older.path().join("files/crds/topics.millrace.dev.yaml");
    let text = std::fs::read_to_string(&crd).unwrap();
    assert!(text.contains(SHORT_NAME));
    std::fs::write(&crd, text.replace(SHORT_NAME, "    - oldmrt\n")).unwrap();

    let (installed, _) = Installed::install_chart(kubernetes, older.path());
    assert_eq!(short_names(&installed), r#"["oldmrt"]"#);
    let chart = repository().join("charts/millrace").display().to_string();
    let namespace = installed.namespace.clone();
    let upgrade = [
        "upgrade",
        "millrace",
        &chart,
        "-n",
        &namespace,
        "--reuse-values",
        "--wait",
        "--timeout",
        "50s",
    ];
    kubernetes.helm(upgrade).success();
    assert_eq!(short_names(&installed), r#"["mrt"]"#);
    let test = ["test", "millrace", "-n", &namespace, "--timeout", "55s"];
    kubernetes.helm(test).success();
    installed.uninstall();
    let kept = [
        "get",
        "crds",
        "topics.millrace.dev",
        "clusters.millrace.dev",
    ];
    kubernetes.kubectl(kept, "").success();
}

fn short_names(installed: &Installed<'_>) -> String {
    let path = "jsonpath={.spec.names.shortNames}";
    installed.kubectl(&["get", "crd", "topics.millrace.dev", "-o", path])
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => std::fs::copy(entry.path(), target).map(|_| ()).unwrap(),
        }
    }
}
