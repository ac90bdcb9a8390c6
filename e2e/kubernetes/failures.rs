//! What goes wrong with nodes, pods and processes while an app produces: nothing that was acknowledged is lost, nothing comes twice, and the
//! app's requests succeed in the end. Each failure ends before the next one begins, and the partitions must be whole again in between.

use std::time::{Duration, Instant};

use comfy_table::{Table, presets};
use millrace_e2e::kubernetes::{CutFrom, Kubernetes, Pods, cluster_with_topic, is_well, launcher};
use rustix::process::Signal;

use crate::load::{begin, end, under_load};

/// How long a pause or a cut lasts: longer than a session lives without renewal, and than a replica may lag.
const LONG: Duration = Duration::from_secs(12);
const TOPIC: &str = "events";

pub(crate) fn nothing_acknowledged_is_lost(kubernetes: &Kubernetes) {
    let Some(pods) = begin(kubernetes, "failures", &cluster_with_topic(TOPIC)) else {
        return;
    };
    let times = under_load(&pods, TOPIC, || break_things(&pods));
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["failure", "all replicas in sync again after its end"]);
    for (what, took) in times {
        table.add_row([what.to_owned(), format!("{:.1} s", took.as_secs_f64())]);
    }
    println!("{table}");
    end(pods);
}

fn break_things(pods: &Pods<'_>) -> Vec<(&'static str, Duration)> {
    let (installed, namespace) = (&pods.installed, pods.namespace());
    // The broker whose node may be broken: the app is on the first one.
    let node = |id: &i32| pods.node(*id).filter(|node| node != "1");
    let broker_and_node = || (0..3).find_map(|id| Some((id, node(&id)?))).unwrap();
    let (broken, node) = broker_and_node();
    let others: Vec<i32> = (0..3).filter(|id| *id != broken).collect();
    let mut times = Vec::new();
    let mut after = |what: &'static str| {
        let begun = Instant::now();
        installed.wait(120, namespace, "topic/events", "whole", is_well);
        times.push((what, begun.elapsed()));
    };
    let leader = |partition: usize| {
        let topic = installed.get(namespace, "topic/events").unwrap();
        let state = &topic["status"]["partitionStates"][partition];
        i32::try_from(state["leader"].as_i64().unwrap()).unwrap()
    };
    let kill = |id| assert!(pods.signal(id, Signal::KILL), "broker {id} does not run");
    let delete = |id| installed.delete_pod(90, namespace, &format!("pod/{}", Pods::pod(id)));
    let sleep = std::thread::sleep;

    sleep(Duration::from_secs(2));
    kill(leader(0));
    sleep(Duration::from_secs(2));
    after("a leader's process killed");
    // Not the last of them: Kubernetes' own controllers have lost their leases then, and take their time.
    launcher(["apiserver", "stop"]).success();
    sleep(LONG);
    launcher(["apiserver", "start"]).success();
    sleep(Duration::from_secs(2));
    after("the API server away for 12 s");
    delete(leader(1));
    after("a leader's pod deleted");
    launcher(["node", "pause", &node]).success();
    sleep(LONG);
    launcher(["node", "resume", &node]).success();
    sleep(Duration::from_secs(2));
    after("a node stood still for 12 s");
    for (what, from) in [
        (
            "a node cut off from the API server for 12 s",
            CutFrom::ApiServer,
        ),
        (
            "a node cut off from the other brokers for 12 s",
            CutFrom::Brokers(&others),
        ),
        ("a node cut off from all for 12 s", CutFrom::All),
    ] {
        pods.cut(&node, from);
        sleep(LONG);
        pods.heal(&node);
        sleep(Duration::from_secs(2));
        after(what);
    }
    let claim = format!("pvc/data-{}", Pods::pod(broken));
    installed.kubectl(&["delete", "-n", namespace, &claim, "--wait=false"]);
    delete(broken);
    after("a broker's pod deleted together with its volume");
    kill(0);
    kill(1);
    sleep(Duration::from_secs(2));
    after("two of three brokers' processes killed");
    // As when a machine is given back. Kubernetes' own controllers delete its pods, too, a minute later.
    let (broken, node) = broker_and_node();
    launcher(["node", "wipe", &node]).success();
    installed.kubectl(&["delete", "node", &format!("node-{node}")]);
    let pod = format!("pod/{}", Pods::pod(broken));
    installed.kubectl(&["delete", "-n", namespace, &pod, "--force"]);
    sleep(LONG);
    after("a node gone for good, and a broker's volume with it");
    launcher(["node", "start", &node]).success();
    times
}
