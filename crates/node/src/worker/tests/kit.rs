//! A worker with a stage in place of processes, and what a replica says to it and hears from it.

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

use crate::agent::{Agent, Shutdown};
use crate::carrier::{Carrier, Choice};
use crate::fake::{Plain, SOON, Session};
use crate::home::{KnownReplica, NodeRecord};
use crate::jobs::Jobs;
use crate::ledger::Ledger;
use crate::route::Route;
use crate::service::AgentStatus;
use crate::work::Worker;
use crate::worker::execute::{Control, Ended, How};
use crate::worker::spec::Spec;
use crate::worker::*;

pub(super) const DEVICE: &str = "01HZZZZZZZZZZZZZZZZZZZZZZZ";
pub(super) const LEASE: &str = "01J00000000000000000000001";
pub(super) const OTHER: &str = "01J00000000000000000000002";

/// A run of a tool, that the test ends.
pub(super) struct Playing {
    pub(super) spec: Spec,
    pub(super) end: oneshot::Sender<Ended>,
    pub(super) kill_at: watch::Receiver<u64>,
}

pub(super) struct Stage(mpsc::UnboundedSender<Playing>);

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

pub(super) fn ended_by(how: How) -> Ended {
    Ended {
        how,
        gone: true,
        ..Ended::new()
    }
}

pub(super) fn well(stdout: &[u8]) -> Ended {
    Ended {
        stdout: stdout.to_vec(),
        sandbox: vec!["pidns".to_owned()],
        ..ended_by(How::Exited(0))
    }
}

/// Folder with a worker's configuration and its one tool.
pub(super) struct Machine {
    pub(super) dir: tempfile::TempDir,
}

impl Machine {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("t.sh"), "#!/bin/sh\necho 1\n").unwrap();
        std::fs::set_permissions(dir.path().join("t.sh"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let text = "uid_base = 0\n[[tools]]\nname = \"t\"\nauthority = \"acme\"\ncommand = [\"./t.sh\"]\n";
        std::fs::write(dir.path().join("worker.toml"), text).unwrap();
        Self { dir }
    }

    pub(super) fn config(&self) -> config::Config {
        config::Config::read(&self.dir.path().join("worker.toml")).unwrap()
    }

    pub(super) fn leases(&self) -> usize {
        let count = |name: &str| {
            std::fs::read_dir(self.dir.path().join("home/worker").join(name)).map_or(0, Iterator::count)
        };
        count("leases") + count("records")
    }

    pub(super) fn start(&self, replicas: &[KnownReplica]) -> Node {
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

pub(super) struct Node {
    pub(super) running: JoinHandle<Result<()>>,
    pub(super) stop: watch::Sender<bool>,
    pub(super) playing: mpsc::UnboundedReceiver<Playing>,
}

impl Node {
    pub(super) async fn plays(&mut self) -> Playing {
        timeout(SOON, self.playing.recv())
            .await
            .expect("nothing was started")
            .unwrap()
    }

    pub(super) fn idle(&mut self) -> bool {
        self.playing.try_recv().is_err()
    }

    /// As a machine that loses its power.
    pub(super) async fn dies(self) {
        self.running.abort();
        let _ = self.running.await;
    }
}

pub(super) async fn say(session: &Session, order: Order) {
    session
        .say(Server::Worker(wire::WorkerOrder { body: Some(order) }))
        .await;
}

/// The next message of a worker that is none of its log.
pub(super) async fn hear(session: &mut Session) -> Body {
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
pub(super) async fn hear_other(session: &mut Session) -> Body {
    loop {
        match hear(session).await {
            Body::Renew(_) => {}
            Body::Challenge(_) => say(session, Order::Challenge(challenge())).await,
            Body::Attest(attest) => admit(session, attest.request_id, true).await,
            body => return body,
        }
    }
}

pub(super) fn challenge() -> wire::Challenge {
    wire::Challenge {
        nonce: vec![7; 32].into(),
        now_ms: 1_000_000,
        cluster_id: vec![9; 16].into(),
        max_life_ms: 3_600_000,
        ..Default::default()
    }
}

pub(super) async fn admit(session: &Session, request_id: String, admitted: bool) {
    let answer = wire::AttestAnswer {
        request_id,
        admitted,
        expires_in_ms: 3_600_000,
        code: "E0811".to_owned(),
        ..Default::default()
    };
    say(session, Order::Attested(answer)).await;
}

pub(super) async fn answer(session: &Session, request_id: &str, accepted: bool, retry: bool) {
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

pub(super) async fn renewed(session: &Session, renew: &wire::LeaseRenew, renewed: bool, remaining_ms: u64) {
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
pub(super) async fn reconcile(
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
pub(super) async fn attested(session: &mut Session, admitted: bool) -> wire::Statement {
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

pub(super) fn offer(id: &str, fence: u64, inputs: Vec<ManifestEntry>) -> wire::LeaseOffer {
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

pub(super) async fn accepted(session: &mut Session, id: &str) {
    let Body::Accept(accept) = hear_other(session).await else {
        panic!("the lease was not accepted")
    };
    assert_eq!(accept.lease_id, id);
    answer(session, &accept.request_id, true, false).await;
}

/// Offer, acceptance and first renewal.
pub(super) async fn leased(session: &mut Session, id: &str, fence: u64) {
    say(session, Order::Offer(offer(id, fence, vec![]))).await;
    accepted(session, id).await;
    let Body::Renew(renew) = hear(session).await else {
        panic!("it was not renewed")
    };
    renewed(session, &renew, true, 0).await;
}

pub(super) async fn finished(session: &mut Session) -> wire::LeaseFinish {
    match hear_other(session).await {
        Body::Finish(finish) => finish,
        other => panic!("{other:?}"),
    }
}

pub(super) async fn cleaned(session: &mut Session) -> wire::LeaseCleaned {
    match hear_other(session).await {
        Body::Cleaned(cleaned) => cleaned,
        other => panic!("{other:?}"),
    }
}

pub(super) async fn over(session: &mut Session) {
    let said = cleaned(session).await;
    assert!(said.ok, "{said:?}");
    answer(session, &said.request_id, true, false).await;
}

pub(super) async fn forgotten(machine: &Machine) {
    timeout(SOON, async {
        while machine.leases() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("something of the lease is left");
}
