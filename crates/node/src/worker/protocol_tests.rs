//! A worker against a replica inside the test: what is said, in which order, and what is said again. Tools
//! are played.

#[path = "tests/kit.rs"]
mod kit;

use palyra_proto::run::v1::ManifestEntry;
use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_message::Body;
use palyra_proto::worker::v1::worker_order::Body as Order;
use prost::Message;
use tokio::time::timeout;

use super::execute::How;
use super::spec::boot_ms;
use super::{attest, tools};
use crate::fake::{Replica, SOON, Session};
use kit::*;

#[tokio::test]
async fn a_statement_says_what_there_is() {
    let (machine, mut replica) = (Machine::new(), Replica::start().await);
    let _node = machine.start(&[replica.known(1)]);
    let mut session = replica.session().await;
    assert!(reconcile(&mut session, 7, &[], &[]).await.is_empty());
    let statement = attested(&mut session, true).await;
    let measured = tools::measure(&machine.config()).unwrap().digests;
    assert_eq!(statement.artifact, measured.artifact.to_vec());
    assert_eq!(
        (statement.evidence, statement.supervisor),
        (2, measured.build.to_vec().into())
    );
    assert_eq!(statement.worker_id, attest::ulid_bytes(DEVICE).unwrap().to_vec());
    assert_eq!(
        (statement.nonce, statement.expires_at_ms),
        (vec![7; 32].into(), 4_600_000)
    );
    assert_eq!(statement.capabilities[0].authority, "acme");
}

/// Sends the one input, `1,2`.
async fn fetched(session: &mut Session) {
    let Body::Get(get) = hear_other(session).await else {
        panic!("no input was fetched")
    };
    assert_eq!((get.fence, get.offset), (11, 0));
    let chunk = wire::ArtifactChunk {
        request_id: get.request_id,
        chunk: "1,2".into(),
        size: 3,
        ..Default::default()
    };
    say(session, Order::Chunk(chunk)).await;
}

#[tokio::test]
async fn a_lease_from_the_offer_to_the_cleanup() {
    let (machine, mut replica) = (Machine::new(), Replica::start().await);
    let mut node = machine.start(&[replica.known(1)]);
    let mut session = replica.session().await;
    reconcile(&mut session, 7, &[], &[]).await;
    attested(&mut session, true).await;
    let input = ManifestEntry {
        path: "a.csv".to_owned(),
        digest: palyra_pki::sha256(b"1,2").to_vec().into(),
        size: 3,
        stored: true,
        executable: false,
    };
    say(&session, Order::Offer(offer(LEASE, 11, vec![input]))).await;
    accepted(&mut session, LEASE).await;
    let before = boot_ms();
    let Body::Renew(renew) = hear(&mut session).await else {
        panic!("it was not renewed")
    };
    assert!(node.idle(), "nothing runs before a renewal is confirmed");
    renewed(&session, &renew, true, 60_000).await;
    fetched(&mut session).await;
    let playing = node.plays().await;
    let kill_at = playing.spec.kill_at_ms;
    // Never later than what the cluster said that is left, from when it was asked, less the margin.
    let latest = boot_ms() + 60_000 - 2_000;
    assert!(kill_at <= latest && kill_at >= before, "{kill_at}");
    let work = playing.spec.work_dir.clone();
    assert_eq!(std::fs::read(work.join("in/a.csv")).unwrap(), b"1,2");
    assert_eq!(std::fs::read(&playing.spec.params).unwrap(), b"{\"a\":1}");
    assert!(
        playing
            .spec
            .env
            .contains(&("PALYRA_FENCE".to_owned(), "11".to_owned()))
    );
    std::fs::write(work.join("out/sum.json"), "3").unwrap();
    playing.end.send(well(b"{\"sum\":3}\n")).unwrap();
    let Body::Put(put) = hear_other(&mut session).await else {
        panic!("no output was sent")
    };
    assert_eq!(
        (put.fence, &put.chunk[..], &put.digest[..]),
        (11, &b"3"[..], &palyra_pki::sha256(b"3")[..])
    );
    answer(&session, &put.request_id, true, false).await;
    let finish = finished(&mut session).await;
    assert_eq!(
        (finish.outcome.as_str(), &finish.result[..], finish.fence),
        ("succeeded", &b"{\"sum\":3}"[..], 11)
    );
    let outputs = finish.outputs.unwrap().entries;
    assert_eq!(
        (outputs[0].path.as_str(), outputs[0].stored, outputs.len()),
        ("sum.json", true, 1)
    );
    assert_eq!(&finish.log_tail[..], b"up");
    answer(&session, &finish.request_id, true, false).await;
    over(&mut session).await;
    forgotten(&machine).await;
    node.stop.send_replace(true);
    timeout(SOON, node.running).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn what_was_ended_before_its_first_renewal_never_runs() {
    let (machine, mut replica) = (Machine::new(), Replica::start().await);
    let mut node = machine.start(&[replica.known(1)]);
    let mut session = replica.session().await;
    reconcile(&mut session, 7, &[], &[]).await;
    attested(&mut session, true).await;
    say(&session, Order::Offer(offer(LEASE, 11, vec![]))).await;
    accepted(&mut session, LEASE).await;
    let end = wire::LeaseEnd {
        lease_id: LEASE.to_owned(),
        fence: 11,
        reason: "expired".to_owned(),
    };
    say(&session, Order::End(end.clone())).await;
    over(&mut session).await;
    forgotten(&machine).await;
    assert!(node.idle());
    // And of a lease that it never heard of nothing is here.
    say(
        &session,
        Order::End(wire::LeaseEnd {
            lease_id: "OTHER".to_owned(),
            fence: 5,
            ..end
        }),
    )
    .await;
    let said = cleaned(&mut session).await;
    assert!(said.ok && said.fence == 5 && said.lease_id == "OTHER");
}

#[tokio::test]
async fn a_lease_outlives_its_session_and_is_renewed_in_the_next() {
    let (machine, mut one, mut two) = (Machine::new(), Replica::start().await, Replica::start().await);
    let mut node = machine.start(&[one.known(1), two.known(2)]);
    let (mut session, other) = tokio::select! {
        session = one.session() => (session, &mut two),
        session = two.session() => (session, &mut one),
    };
    reconcile(&mut session, 7, &[], &[]).await;
    attested(&mut session, true).await;
    leased(&mut session, LEASE, 11).await;
    let mut playing = node.plays().await;
    let first = *playing.kill_at.borrow_and_update();
    session.goodbye("draining").await;
    let mut session = other.session().await;
    let held = reconcile(&mut session, 8, &[LEASE], &[]).await;
    assert_eq!(
        (held[0].lease_id.as_str(), held[0].fence, held[0].state.as_str()),
        (LEASE, 11, "running")
    );
    let Body::Renew(renew) = hear(&mut session).await else {
        panic!("it was not renewed at once")
    };
    renewed(&session, &renew, true, 0).await;
    timeout(SOON, playing.kill_at.changed()).await.unwrap().unwrap();
    assert!(*playing.kill_at.borrow() > first);
    playing.end.send(well(b"1")).unwrap();
    let finish = finished(&mut session).await;
    // It is not decided: the same is asked again, and in the next session too.
    answer(&session, &finish.request_id, false, true).await;
    assert_eq!(finished(&mut session).await.request_id, finish.request_id);
    drop(session);
    let mut session =
        tokio::select! { session = one.session() => session, session = two.session() => session };
    let held = reconcile(&mut session, 9, &[LEASE], &[]).await;
    assert_eq!(held[0].state, "finished");
    let again = finished(&mut session).await;
    assert_eq!(again, finish);
    answer(&session, &again.request_id, true, false).await;
    over(&mut session).await;
    forgotten(&machine).await;
}

#[tokio::test]
async fn a_lease_that_is_somebody_elses_is_ended_and_cleaned_without_a_result() {
    for by_renewal in [true, false] {
        let (machine, mut replica) = (Machine::new(), Replica::start().await);
        let mut node = machine.start(&[replica.known(1)]);
        let mut session = replica.session().await;
        reconcile(&mut session, 7, &[], &[]).await;
        attested(&mut session, true).await;
        leased(&mut session, LEASE, 11).await;
        let _playing = node.plays().await;
        drop(session);
        let mut session = replica.session().await;
        if by_renewal {
            reconcile(&mut session, 8, &[LEASE], &[]).await;
            let Body::Renew(renew) = hear(&mut session).await else {
                panic!("it was not renewed")
            };
            renewed(&session, &renew, false, 0).await;
        } else {
            reconcile(&mut session, 8, &[], &[(LEASE, 11)]).await;
        }
        over(&mut session).await;
        forgotten(&machine).await;
    }
}

#[tokio::test]
async fn the_next_life_cleans_first_and_still_owes_the_result() {
    let (machine, mut replica) = (Machine::new(), Replica::start().await);
    // Died while the tool ran: there is no result.
    let mut node = machine.start(&[replica.known(1)]);
    let mut session = replica.session().await;
    reconcile(&mut session, 7, &[], &[]).await;
    attested(&mut session, true).await;
    leased(&mut session, LEASE, 11).await;
    let work = node.plays().await.spec.work_dir;
    node.dies().await;
    assert!(work.exists());
    let mut node = machine.start(&[replica.known(1)]);
    assert!(!work.exists(), "cleaned before anything is said");
    let mut session = replica.session().await;
    let held = reconcile(&mut session, 8, &[], &[(LEASE, 11)]).await;
    assert_eq!((held[0].state.as_str(), held[0].fence), ("cleaned", 11));
    let said = cleaned(&mut session).await;
    assert!(said.ok && said.removed_files > 0, "{said:?}");
    answer(&session, &said.request_id, true, false).await;
    forgotten(&machine).await;
    // Died with a result that nobody took.
    leased(&mut session, OTHER, 12).await;
    node.plays().await.end.send(well(b"5")).unwrap();
    let finish = finished(&mut session).await;
    node.dies().await;
    let _node = machine.start(&[replica.known(1)]);
    let mut session = replica.session().await;
    assert_eq!(
        reconcile(&mut session, 9, &[OTHER], &[]).await[0].state,
        "finished"
    );
    let again = finished(&mut session).await;
    assert_eq!(again, finish, "the same result under the same request id");
    answer(&session, &again.request_id, true, false).await;
    over(&mut session).await;
    forgotten(&machine).await;
}

#[tokio::test]
async fn what_was_not_attested_is_not_run_and_the_truth_is_told() {
    let (machine, mut replica) = (Machine::new(), Replica::start().await);
    let mut node = machine.start(&[replica.known(1)]);
    let mut session = replica.session().await;
    reconcile(&mut session, 7, &[], &[]).await;
    let before = attested(&mut session, true).await;
    std::fs::write(machine.dir.path().join("t.sh"), "#!/bin/sh\necho evil\n").unwrap();
    leased(&mut session, LEASE, 11).await;
    let (mut refused, mut told) = (None, None);
    while refused.is_none() || told.is_none() {
        match hear(&mut session).await {
            Body::Finish(finish) => {
                answer(&session, &finish.request_id, true, false).await;
                refused = Some(finish);
            }
            Body::Cleaned(cleaned) => answer(&session, &cleaned.request_id, true, false).await,
            Body::Challenge(_) => {
                let (nonce, cluster_id) = (vec![8; 32].into(), vec![9; 16].into());
                say(
                    &session,
                    Order::Challenge(wire::Challenge {
                        nonce,
                        cluster_id,
                        ..Default::default()
                    }),
                )
                .await;
            }
            Body::Attest(attest) => told = Some(wire::Statement::decode(attest.statement).unwrap()),
            Body::Renew(_) => {}
            other => panic!("{other:?}"),
        }
    }
    let (refused, told) = (refused.unwrap(), told.unwrap());
    assert_eq!(
        (refused.outcome.as_str(), refused.error_code.as_str()),
        ("refused", "digest_drift")
    );
    assert!(
        refused.error_message.contains("t.sh"),
        "{}",
        refused.error_message
    );
    assert!(node.idle());
    assert_ne!(told.artifact, before.artifact);
}

#[tokio::test]
async fn more_than_there_are_slots_is_refused_and_a_stop_tells_results() {
    let (machine, mut replica) = (Machine::new(), Replica::start().await);
    let mut node = machine.start(&[replica.known(1)]);
    let mut session = replica.session().await;
    reconcile(&mut session, 7, &[], &[]).await;
    attested(&mut session, true).await;
    leased(&mut session, LEASE, 11).await;
    let _playing = node.plays().await;
    say(&session, Order::Offer(offer(LEASE, 11, vec![]))).await;
    say(&session, Order::Offer(offer(OTHER, 12, vec![]))).await;
    let finish = finished(&mut session).await;
    assert_eq!(
        (finish.fence, finish.error_code.as_str()),
        (12, "slots"),
        "an offer that came twice is one"
    );
    answer(&session, &finish.request_id, true, false).await;
    node.stop.send_replace(true);
    let finish = finished(&mut session).await;
    assert_eq!((finish.fence, finish.error_code.as_str()), (11, "worker_stopped"));
    answer(&session, &finish.request_id, true, false).await;
    over(&mut session).await;
    timeout(SOON, node.running).await.unwrap().unwrap().unwrap();
    assert_eq!(machine.leases(), 0);
}

#[tokio::test]
async fn a_cleanup_that_fails_is_told_and_done_again_when_asked() {
    let (machine, mut replica) = (Machine::new(), Replica::start().await);
    let mut node = machine.start(&[replica.known(1)]);
    let mut session = replica.session().await;
    reconcile(&mut session, 7, &[], &[]).await;
    attested(&mut session, true).await;
    leased(&mut session, LEASE, 11).await;
    let playing = node.plays().await;
    // Something else is where its folder was.
    let folder = playing.spec.root_dir.parent().unwrap().to_owned();
    let aside = machine.dir.path().join("aside");
    std::fs::rename(&folder, &aside).unwrap();
    std::os::unix::fs::symlink(&aside, &folder).unwrap();
    playing.end.send(ended_by(How::Exited(1))).unwrap();
    let finish = finished(&mut session).await;
    answer(&session, &finish.request_id, true, false).await;
    let said = cleaned(&mut session).await;
    assert!(!said.ok && said.message.contains("no folder"), "{said:?}");
    answer(&session, &said.request_id, true, false).await;
    say(&session, Order::Offer(offer(OTHER, 12, vec![]))).await;
    let refused = finished(&mut session).await;
    assert_eq!(refused.error_code, "slots", "its slot is not free");
    answer(&session, &refused.request_id, true, false).await;
    std::fs::remove_file(&folder).unwrap();
    say(&session, Order::Cleanup(wire::CleanupAsk::default())).await;
    over(&mut session).await;
    forgotten(&machine).await;
    assert!(aside.exists(), "what the link led to is not touched");
}
