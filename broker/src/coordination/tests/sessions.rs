//! Sessions: claimed, renewed, lost.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use millrace_crds::coordination::BrokerSession;
use tokio::runtime::Runtime;
use uuid::Uuid;

use super::{
    api_server::{Answer, ApiServer, Call, first},
    cluster::{CLUSTER, Cluster, TIMING, eventually, pod},
};
use crate::coordination::{
    api::ClusterApi,
    membership::{self, Session},
    session::{ClaimError, Claimant},
};

fn claimant(boot: &str) -> Arc<Claimant> {
    Arc::new(Claimant {
        cluster: CLUSTER.into(),
        owner: None,
        session: BrokerSession {
            broker_id: 0,
            store_id: Uuid::from_u128(1),
            pod: pod(0),
            address: "a:1".into(),
            release: "0".into(),
            draining: false,
        },
        identity: format!("{}/uid/{boot}", pod(0)),
        duration_seconds: 2,
        starts: 1,
        draining: Arc::default(),
    })
}

async fn claim(server: &ApiServer, boot: &str) -> Result<Session, ClaimError> {
    let api = ClusterApi::new(&server.client(boot), "shop");
    let claim = async { membership::claim(&api, &claimant(boot)).await };
    let limit = Duration::from_secs(60);
    tokio::time::timeout(limit, claim).await.unwrap()
}

#[test]
fn a_session_is_claimed_once_although_the_answer_was_lost() {
    for answer in [Answer::Lost, Answer::Later(Duration::from_millis(1500))] {
        let cluster = Cluster::default();
        let runtime = Runtime::new().unwrap();
        let _lost = cluster.server.fault(first(1, answer, Call::is_write));
        let session = runtime.block_on(claim(&cluster.server, "a")).unwrap();
        assert_eq!(session.epoch, 1, "{answer:?}");
        assert_eq!(cluster.session(0).unwrap().epoch, 1, "{answer:?}");
    }
}

#[test]
fn of_two_processes_of_a_pod_the_older_one_ends() {
    let cluster = Cluster::default();
    let runtime = Runtime::new().unwrap();
    let lost = runtime.block_on(async {
        let server = &cluster.server;
        let keep = |session: Session, boot: &str| {
            let api = ClusterApi::new(&server.client(boot), "shop");
            session.keep(api, claimant(boot), TIMING.renewal)
        };
        let (_old, lost) = keep(claim(server, "a").await.unwrap(), "a");
        let (_new, mut kept) = keep(claim(server, "b").await.unwrap(), "b");
        let lost = tokio::time::timeout(Duration::from_secs(60), lost).await;
        assert!(kept.try_recv().is_err());
        lost.unwrap().unwrap()
    });
    assert_eq!(lost.broker_id, 0);
    assert_eq!(cluster.session(0).unwrap().epoch, 2);
}

#[test]
fn renewals_go_on_through_errors_conflicts_and_a_deletion_by_hand() {
    let cluster = Cluster::default();
    let runtime = Runtime::new().unwrap();
    let server = &cluster.server;
    let (_renewal, mut lost) = runtime.block_on(async {
        let session = claim(server, "a").await.unwrap();
        let api = ClusterApi::new(&server.client("a"), "shop");
        session.keep(api, claimant("a"), TIMING.renewal)
    });
    for answer in [429, 500, 503, 409].map(Answer::Status) {
        let seen = Arc::new(AtomicUsize::new(0));
        let fault = {
            let seen = seen.clone();
            server.fault(move |call| {
                call.is_write().then(|| {
                    seen.fetch_add(1, Ordering::Relaxed);
                    answer
                })
            })
        };
        eventually("two renewals fail", || seen.load(Ordering::Relaxed) >= 2);
        drop(fault);
        let before = cluster.session(0);
        eventually("it is renewed", || cluster.session(0) != before);
    }
    // The next renewal is applied and looks as if it were not.
    let _lost = server.fault(first(1, Answer::Lost, Call::is_write));
    let before = cluster.session(0);
    eventually("it is renewed", || cluster.session(0) != before);
    server.delete("leases", "main-broker-0");
    eventually("it is there again", || cluster.session(0).is_some());
    let held = cluster.session(0).unwrap();
    assert_eq!(
        (held.epoch, held.holder.unwrap().as_str()),
        (1, "main-broker-0/uid/a")
    );
    assert!(lost.try_recv().is_err());
}

#[test]
fn a_claim_that_meets_nothing_but_conflicts_does_not_hammer_the_api_server() {
    let cluster = Cluster::default();
    let runtime = Runtime::new().unwrap();
    let server = cluster.server.clone();
    let storm = server.fault(|call| call.is_write().then_some(Answer::Status(409)));
    let claiming = runtime.spawn(async move { claim(&server, "a").await.map(|s| s.epoch) });
    std::thread::sleep(Duration::from_secs(1));
    let calls = cluster.server.take_calls().len();
    drop(storm);
    assert_eq!(runtime.block_on(claiming).unwrap().unwrap(), 1);
    assert!(calls < 50, "{calls} requests in a second");
}
