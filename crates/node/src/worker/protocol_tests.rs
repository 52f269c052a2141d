//! A worker against a replica inside the test: what is said, in which order, and what is said again. Tools are played.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use palyra_proto::node::v1 as node;
use palyra_proto::node::v1::node_message::Body as Outer;
use palyra_proto::node::v1::server_message::Body as Server;
use palyra_proto::run::v1::{Manifest, ManifestEntry};
use palyra_proto::worker::v1 as wire;
use palyra_proto::worker::v1::worker_message::Body;
use palyra_proto::worker::v1::worker_order::Body as Order;
use prost::Message;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::execute::{Control, Ended, How};
use super::spec::{Spec, boot_ms};
use super::*;
use crate::agent::{Agent, Shutdown};
use crate::carrier::{Carrier, Choice};
use crate::fake::{Plain, Replica, SOON, Session};
use crate::home::{KnownReplica, NodeRecord};
use crate::jobs::Jobs;
use crate::ledger::Ledger;
use crate::route::Route;
use crate::service::AgentStatus;
use crate::work::Worker;

const DEVICE: &str = "01HZZZZZZZZZZZZZZZZZZZZZZZ";
const LEASE: &str = "01J00000000000000000000001";

/// A run of a tool, that the test ends.
struct Playing {
    spec: Spec,
    end: oneshot::Sender<Ended>,
    kill_at: watch::Receiver<u64>,
}

struct Stage(mpsc::UnboundedSender<Playing>);

impl lease::Runner for Stage {
    fn run<'a>(
        &'a self,
        spec: &'a Spec,
        control: &'a mut Control,
        output: &'a Output,
    ) -> futures::future::BoxFuture<'a, std::io::Result<Ended>> {
        Box::pin(async move {
            let (end, ended) = oneshot::channel();
            let (spec, kill_at) = (spec.clone(), control.kill_at_ms.clone());
            output.write(b"up\n");
            self.0.send(Playing { spec, end, kill_at }).unwrap();
            tokio::select! {
                Ok(ended) = ended => Ok(ended),
                why = control.stop.wait_for(Option::is_some) => {
                    let message = why.unwrap().clone().unwrap();
                    Ok(ended_by(How::Killed { why: "stopped".to_owned(), message }))
                }
            }
        })
    }
}

fn ended_by(how: How) -> Ended {
    Ended {
        how,
        gone: true,
        ..Ended::new()
    }
}

fn well(stdout: &[u8]) -> Ended {
    Ended {
        stdout: stdout.to_vec(),
        sandbox: vec!["pidns".to_owned()],
        ..ended_by(How::Exited(0))
    }
}

/// Folder with a worker's configuration and its one tool.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("t.sh"), "#!/bin/sh\necho 1\n").unwrap();
        std::fs::set_permissions(dir.path().join("t.sh"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let text = "uid_base = 0\n[[tools]]\nname = \"t\"\nauthority = \"acme\"\ncommand = [\"./t.sh\"]\n";
        std::fs::write(dir.path().join("worker.toml"), text).unwrap();
        Self { dir }
    }

    fn config(&self) -> config::Config {
        config::Config::read(&self.dir.path().join("worker.toml")).unwrap()
    }

    fn leases(&self) -> usize {
        let count = |name: &str| {
            std::fs::read_dir(self.dir.path().join("home/worker").join(name)).map_or(0, Iterator::count)
        };
        count("leases") + count("records")
    }

    fn start(&self, replicas: &[KnownReplica]) -> Node {
        let home = Home::create(&self.dir.path().join("home")).unwrap();
        let (started, playing) = mpsc::unbounded_channel();
        let desk = open(home.dir(), self.config(), DEVICE, Box::new(Stage(started))).unwrap();
        let ledger = Arc::new(Mutex::new(Ledger::open(&home.ledger_dir()).unwrap().0));
        let (status, status_receiver) = watch::channel(AgentStatus::default());
        let (events, event_receiver) = mpsc::unbounded_channel();
        let mediation = Arc::new(crate::mediation::Desk::default());
        let dir = home.dir().to_path_buf();
        let worker = Worker::new(
            vec![],
            Arc::clone(&ledger),
            mediation,
            dir,
            status_receiver,
            events,
        );
        let (stop, stopped) = watch::channel(false);
        let record = NodeRecord {
            device_id: "DEVICE".to_owned(),
            name: "n".to_owned(),
            cluster_id: "C".to_owned(),
            replicas: replicas.to_vec(),
        };
        let agent = Agent {
            device_id: "DEVICE".to_owned(),
            registration: node::RegisterRequest::default(),
            registered: false,
            jobs: Jobs::new(worker, ledger),
            events: event_receiver,
            link: Box::new(Plain),
            route: Route::new(replicas.to_vec()),
            status,
            shutdown: Shutdown::new(stopped),
            home,
            record,
            superseded_at: None,
            carrier: Carrier::new(Choice::Auto),
            fallback: String::new(),
            desk: Some(desk),
        };
        let running = tokio::spawn(agent.run());
        Node {
            running,
            stop,
            playing,
        }
    }
}

struct Node {
    running: JoinHandle<Result<()>>,
    stop: watch::Sender<bool>,
    playing: mpsc::UnboundedReceiver<Playing>,
}

impl Node {
    async fn plays(&mut self) -> Playing {
        timeout(SOON, self.playing.recv())
            .await
            .expect("nothing was started")
            .unwrap()
    }

    fn idle(&mut self) -> bool {
        self.playing.try_recv().is_err()
    }

    /// As a machine that loses its power.
    async fn dies(self) {
        self.running.abort();
        let _ = self.running.await;
    }
}

async fn say(session: &Session, order: Order) {
    session
        .say(Server::Worker(wire::WorkerOrder { body: Some(order) }))
        .await;
}

/// The next message of a worker that is none of its log.
async fn hear(session: &mut Session) -> Body {
    loop {
        if let Outer::Worker(message) = session.hear().await
            && let Some(body) = message.body
            && !matches!(body, Body::Log(_) | Body::Progress(_))
        {
            return body;
        }
    }
}

/// The next message, past renewals and proofs, which are admitted.
async fn hear_other(session: &mut Session) -> Body {
    loop {
        match hear(session).await {
            Body::Renew(_) => {}
            Body::Challenge(_) => say(session, Order::Challenge(challenge())).await,
            Body::Attest(attest) => admit(session, attest.request_id, true).await,
            body => return body,
        }
    }
}

fn challenge() -> wire::Challenge {
    wire::Challenge {
        nonce: vec![7; 32].into(),
        now_ms: 1_000_000,
        cluster_id: vec![9; 16].into(),
        max_life_ms: 3_600_000,
        ..Default::default()
    }
}

async fn admit(session: &Session, request_id: String, admitted: bool) {
    let answer = wire::AttestAnswer {
        request_id,
        admitted,
        expires_in_ms: 3_600_000,
        code: "E0811".to_owned(),
        ..Default::default()
    };
    say(session, Order::Attested(answer)).await;
}

async fn answer(session: &Session, request_id: &str, accepted: bool, retry: bool) {
    let (request_id, code) = (
        request_id.to_owned(),
        if accepted { "" } else { "E0850" }.to_owned(),
    );
    say(
        session,
        Order::Answer(wire::Answer {
            request_id,
            accepted,
            retry,
            code,
            ..Default::default()
        }),
    )
    .await;
}

async fn renewed(session: &Session, renew: &wire::LeaseRenew, renewed: bool, remaining_ms: u64) {
    let leases = renew.leases.iter().map(|lease| wire::RenewedLease {
        lease_id: lease.lease_id.clone(),
        fence: lease.fence,
        renewed,
        remaining_ms,
        ..Default::default()
    });
    let (sequence, leases) = (renew.sequence, leases.collect());
    say(session, Order::Renewed(wire::RenewAnswer { sequence, leases })).await;
}

/// Attach and Report, answered with these leases to keep and to end.
async fn reconcile(
    session: &mut Session,
    epoch: u64,
    keep: &[&str],
    end: &[(&str, u64)],
) -> Vec<wire::HeldLease> {
    session.attach(epoch, vec![]).await;
    let Body::Report(report) = hear(session).await else {
        panic!("the first message of a worker is its report")
    };
    let end = end.iter().map(|(id, fence)| wire::LeaseEnd {
        lease_id: (*id).to_owned(),
        fence: *fence,
        reason: "expired".to_owned(),
    });
    let keep = keep.iter().map(|id| (*id).to_owned()).collect();
    say(
        session,
        Order::Reconciled(wire::Reconciled {
            request_id: report.request_id,
            keep,
            end: end.collect(),
        }),
    )
    .await;
    report.held
}

/// Answers the question for a challenge. Answers the statement.
async fn attested(session: &mut Session, admitted: bool) -> wire::Statement {
    let Body::Challenge(_) = hear(session).await else {
        panic!("no challenge was asked for")
    };
    say(session, Order::Challenge(challenge())).await;
    let Body::Attest(attest) = hear(session).await else {
        panic!("nothing was attested")
    };
    let signed = [b"signed: ".as_slice(), &attest.statement].concat();
    assert_eq!(
        attest.signature,
        palyra_pki::sha256(&signed).to_vec(),
        "signed by the link"
    );
    admit(session, attest.request_id, admitted).await;
    wire::Statement::decode(attest.statement).unwrap()
}

fn offer(id: &str, fence: u64, inputs: Vec<ManifestEntry>) -> wire::LeaseOffer {
    wire::LeaseOffer {
        lease_id: id.to_owned(),
        run_id: "RUN".to_owned(),
        attempt: 1,
        fence,
        ttl_ms: 3_600_000,
        remaining_ms: 3_600_000,
        run_remaining_ms: 7_200_000,
        tool: "t".to_owned(),
        params: "{\"a\":1}".into(),
        inputs: Some(Manifest { entries: inputs }),
        ..Default::default()
    }
}

async fn accepted(session: &mut Session, id: &str) {
    let Body::Accept(accept) = hear_other(session).await else {
        panic!("the lease was not accepted")
    };
    assert_eq!(accept.lease_id, id);
    answer(session, &accept.request_id, true, false).await;
}

/// Offer, acceptance and first renewal of [`LEASE`].
async fn leased(session: &mut Session, fence: u64) {
    say(session, Order::Offer(offer(LEASE, fence, vec![]))).await;
    accepted(session, LEASE).await;
    let Body::Renew(renew) = hear(session).await else {
        panic!("it was not renewed")
    };
    renewed(session, &renew, true, 0).await;
}

async fn finished(session: &mut Session) -> wire::LeaseFinish {
    match hear_other(session).await {
        Body::Finish(finish) => finish,
        other => panic!("{other:?}"),
    }
}

async fn cleaned(session: &mut Session) -> wire::LeaseCleaned {
    match hear_other(session).await {
        Body::Cleaned(cleaned) => cleaned,
        other => panic!("{other:?}"),
    }
}

async fn over(session: &mut Session) {
    let said = cleaned(session).await;
    assert!(said.ok, "{said:?}");
    answer(session, &said.request_id, true, false).await;
}

async fn forgotten(machine: &Machine) {
    timeout(SOON, async {
        while machine.leases() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("something of the lease is left");
}

#[tokio::test]
async fn a_lease_from_the_offer_to_the_cleanup() {
    let (machine, mut replica) = (Machine::new(), Replica::start().await);
    let mut node = machine.start(&[replica.known(1)]);
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
    let Body::Get(get) = hear_other(&mut session).await else {
        panic!("no input was fetched")
    };
    assert_eq!((get.fence, get.offset), (11, 0));
    let (request_id, chunk) = (get.request_id, "1,2".into());
    say(
        &session,
        Order::Chunk(wire::ArtifactChunk {
            request_id,
            chunk,
            size: 3,
            ..Default::default()
        }),
    )
    .await;
    let playing = node.plays().await;
    let kill_at = playing.spec.kill_at_ms;
    // Never later than what the cluster said that is left, from when it was asked, less the margin.
    assert!(
        kill_at <= boot_ms() + 60_000 - 2_000 && kill_at + 60_000 > before,
        "{kill_at}"
    );
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
    leased(&mut session, 11).await;
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
        leased(&mut session, 11).await;
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
    leased(&mut session, 11).await;
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
    leased(&mut session, 12).await;
    node.plays().await.end.send(well(b"5")).unwrap();
    let finish = finished(&mut session).await;
    node.dies().await;
    let _node = machine.start(&[replica.known(1)]);
    let mut session = replica.session().await;
    assert_eq!(
        reconcile(&mut session, 9, &[LEASE], &[]).await[0].state,
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
    leased(&mut session, 11).await;
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
    leased(&mut session, 11).await;
    let _playing = node.plays().await;
    say(&session, Order::Offer(offer(LEASE, 11, vec![]))).await;
    say(
        &session,
        Order::Offer(offer("01J00000000000000000000002", 12, vec![])),
    )
    .await;
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
    leased(&mut session, 11).await;
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
    say(
        &session,
        Order::Offer(offer("01J00000000000000000000002", 12, vec![])),
    )
    .await;
    let refused = finished(&mut session).await;
    assert_eq!(refused.error_code, "slots", "its slot is not free");
    answer(&session, &refused.request_id, true, false).await;
    std::fs::remove_file(&folder).unwrap();
    say(&session, Order::Cleanup(wire::CleanupAsk::default())).await;
    over(&mut session).await;
    forgotten(&machine).await;
    assert!(aside.exists(), "what the link led to is not touched");
}
