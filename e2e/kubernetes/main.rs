//! What holds of Millrace in a real Kubernetes: the one that `KUBECONFIG` names, or one of three nodes that is started for it.
//!
//! A program of its own rather than tests in `e2e`: what it starts must end with it, whatever has failed, and there is nothing in the standard test
//! harness that runs after the last test. Its arguments are parts of names of tests, as there.

// .clippy.toml allows it in tests, but does not know their helper functions here.
#![allow(clippy::unwrap_used)]

mod chart;
mod clusters;
mod degraded;
mod elastic;
mod failures;
mod journey;
mod kubectl;
mod load;
mod objects;
mod outage;
mod refusals;
mod rollout;
mod topics;
mod upgrade;

use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::Instant;

use futures::FutureExt;
use futures::future::LocalBoxFuture;
use millrace_e2e::kubernetes::Kubernetes;
use objects::Objects;

/// A test: it panics if what its name says does not hold.
type Test = for<'a> fn(&'a Objects) -> LocalBoxFuture<'a, ()>;

macro_rules! tests {
    ($($module:ident::$name:ident,)+) => {
        &[$((concat!(stringify!($module), "::", stringify!($name)), |objects| $module::$name(objects).boxed_local()),)+]
    };
}

const TESTS: &[(&str, Test)] = tests![
    topics::good_ones_are_accepted,
    topics::bad_ones_are_refused_with_a_sentence,
    topics::changes_that_would_lose_records_are_refused,
    topics::partitions_that_the_cluster_chose_only_grow,
    clusters::good_ones_are_accepted,
    clusters::bad_ones_are_refused_with_a_sentence,
    clusters::changes_that_can_never_work_are_refused,
    clusters::what_is_laid_over_pods_is_kept_as_written,
    clusters::a_status_with_all_its_fields_is_kept,
    kubectl::misspelt_fields_are_refused,
    kubectl::fields_are_explained,
    kubectl::clusters_are_scaled,
    kubectl::lists_have_columns,
    kubectl::who_waits_for_a_new_object_waits,
    kubectl::the_samples_are_accepted,
    chart::it_has_no_lint,
    chart::what_it_makes_is_accepted,
    chart::listed_namespaces_have_roles_and_no_others,
    chart::monitors_are_made_where_they_can_be,
    chart::wrong_values_are_refused_with_a_sentence,
    chart::generated_files_are_what_would_be_generated,
    chart::plain_manifests_are_accepted,
    chart::pods_are_admitted_where_only_restricted_ones_are,
];

/// Tests that install Millrace, after all others: what is installed acts on what others make.
type Installation = fn(&Kubernetes);

const INSTALLATIONS: &[(&str, Installation)] = &[
    (
        "upgrade::the_resources_come_with_it",
        upgrade::the_resources_come_with_it,
    ),
    (
        "journey::from_install_to_uninstall",
        journey::from_install_to_uninstall,
    ),
    (
        "refusals::mistakes_end_in_conditions_that_say_what_to_do",
        refusals::mistakes_end_in_conditions_that_say_what_to_do,
    ),
    (
        "outage::producers_and_consumers_go_on_without_the_api_server",
        outage::producers_and_consumers_go_on_without_the_api_server,
    ),
    (
        "degraded::conditions_and_events_tell_when_it_begins_and_when_it_is_over",
        degraded::conditions_and_events_tell_when_it_begins_and_when_it_is_over,
    ),
    (
        "elastic::brokers_and_replicas_come_and_go",
        elastic::brokers_and_replicas_come_and_go,
    ),
    (
        "rollout::versions_change_and_a_change_that_does_not_work_stops_at_one_broker",
        rollout::versions_change_and_a_change_that_does_not_work_stops_at_one_broker,
    ),
    (
        "failures::nothing_acknowledged_is_lost",
        failures::nothing_acknowledged_is_lost,
    ),
];

#[tokio::main]
async fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|p| name.contains(p));
    let tests: Vec<_> = TESTS.iter().filter(|(name, _)| is_wanted(name)).collect();
    let installations: Vec<_> = INSTALLATIONS
        .iter()
        .filter(|(name, _)| is_wanted(name))
        .collect();
    // `cargo test PART` runs all test programs.
    let count = tests.len() + installations.len();
    if count == 0 || std::env::args().any(|argument| argument == "--list") {
        return ExitCode::SUCCESS;
    }
    let kubernetes = Kubernetes::start();
    let mut failed = Vec::new();
    let mut report = |name: &'static str, begun: Instant, passed: bool| {
        let verdict = if passed { "ok" } else { "FAILED" };
        println!("test {name} ... {verdict} ({:.1?})", begun.elapsed());
        if !passed {
            failed.push(name);
        }
    };
    if !tests.is_empty() {
        let objects = Objects::begin(&kubernetes).await;
        for (name, test) in tests {
            let begun = Instant::now();
            let result = AssertUnwindSafe(test(&objects)).catch_unwind().await;
            report(name, begun, result.is_ok());
        }
        objects.end().await;
    }
    for (name, test) in installations {
        let begun = Instant::now();
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| test(&kubernetes)));
        report(name, begun, result.is_ok());
    }
    println!("\n{} passed, {} failed", count - failed.len(), failed.len());
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    println!("failed: {failed:?}");
    ExitCode::FAILURE
}
