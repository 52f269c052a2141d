//! The agent's sessions against replicas inside the test.

use std::sync::{Arc, Mutex};

use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message::Body as Said;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::*;
use crate::capability;
use crate::carrier::Choice;
use crate::fake::{Plain, Replica, SOON, refusal};
use crate::ledger::Ledger;
use crate::mediation::Desk;
use crate::testing::Fifo;
use crate::work::Worker;

struct Node {
    running: JoinHandle<Result<()>>,
    stop: watch::Sender<bool>,
    status: watch::Receiver<AgentStatus>,
    dir: tempfile::TempDir,
}

impl Node {
    fn start(replicas: &[KnownReplica], capabilities: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::create(&dir.path().join("home")).unwrap();
        let file = dir.path().join("caps.toml");
        std::fs::write(&file, capabilities).unwrap();
        let ledger = Arc::new(Mutex::new(Ledger::open(&home.ledger_dir()).unwrap().0));
        let (status, status_receiver) = watch::channel(AgentStatus::default());
        let (events, event_receiver) = mpsc::unbounded_channel();
        let worker = Worker::new(
            capability::load(&[file]).unwrap(),
            Arc::clone(&ledger),
            Arc::new(Desk::default()),
            home.dir().to_path_buf(),
            status_receiver.clone(),
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
            device_id: record.device_id.clone(),
            registration: wire::RegisterRequest {
                device_id: "DEVICE".to_owned(),
                ..Default::default()
            },
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
            desk: None,
        };
        Self {
            running: tokio::spawn(agent.run()),
            stop,
            status: status_receiver,
            dir,
        }
    }

    async fn end(self) -> Result<()> {
        timeout(SOON, self.running)
            .await
            .expect("the agent did not end")
            .unwrap()
    }

    async fn becomes(&mut self, wanted: impl FnMut(&AgentStatus) -> bool) {
        timeout(SOON, self.status.wait_for(wanted))
            .await
            .expect("the status did not change")
            .unwrap();
    }
}

fn script(name: &str, script: &str) -> String {
    format!(
        "[[capability]]\nname = \"{name}\"\nprogram = \"/bin/sh\"\neffect = \"once\"\n\
         timeout = \"10m\"\nargs = ['-c', '{script}']\n"
    )
}

#[tokio::test]
async fn it_registers_attaches_works_and_stops() {
    let mut replica = Replica::start().await;
    let mut node = Node::start(&[replica.known(1)], "");
    let mut session = replica.session().await;
    assert_eq!(session.attach(7, vec![]).await, Vec::<String>::new());
    session.assign("A", "echo", 7).await;
    assert!(matches!(session.hear().await, Body::Ack(ack) if ack.dispatch_id == "A" && ack.epoch == 7));
    let result = session.hear_result().await;
    assert_eq!(
        (result.outcome.as_str(), &result.payload[..], result.epoch),
        ("succeeded", &b"[1]"[..], 7)
    );
    session.answer("A", true, false).await;
    node.becomes(|status| status.epoch == 7 && status.unreported.is_empty())
        .await;
    assert_eq!(replica.notes.lock().unwrap().registered.len(), 1);
    node.stop.send_replace(true);
    node.end().await.unwrap();
}

#[tokio::test]
async fn work_survives_the_move_to_another_replica() {
    let mut first = Replica::start().await;
    let mut second = Replica::start().await;
    let gate = Fifo::new();
    let slow = script(
        "slow",
        &format!("echo x >> runs; read line <{}; echo 2", gate.gate()),
    );
    let node = Node::start(&[first.known(1)], &slow);
    let mut session = first.session().await;
    session
        .attach(7, vec![first.endpoint(1), second.endpoint(2)])
        .await;
    session.assign("A", "slow", 7).await;
    assert!(matches!(session.hear().await, Body::Ack(_)));
    first.task.abort();
    drop(session);
    drop(first);
    let mut session = second.session().await;
    assert_eq!(session.attach(9, vec![]).await, ["A"]);
    session.assign("A", "slow", 9).await;
    gate.open_gate().await;
    let result = session.hear_result().await;
    assert_eq!((result.epoch, &result.payload[..]), (9, &b"2"[..]));
    let runs = std::fs::read_to_string(node.dir.path().join("home/runs")).unwrap();
    assert_eq!(runs.lines().count(), 1, "delivered twice, run once");
    let record: NodeRecord = serde_json::from_str(
        &std::fs::read_to_string(node.dir.path().join("home/identity/node.json")).unwrap(),
    )
    .unwrap();
    assert_eq!(
        record.replicas.len(),
        2,
        "the replicas that it was told of are stored"
    );
    let again = second.notes.lock().unwrap().registered.len();
    assert_eq!(again, 0, "registered once, at the first replica");
}

#[tokio::test]
async fn a_result_is_sent_again_until_it_is_accepted() {
    let mut replica = Replica::start().await;
    let mut node = Node::start(&[replica.known(1)], "");
    let mut session = replica.session().await;
    session.attach(7, vec![]).await;
    session.assign("A", "echo", 7).await;
    let first = session.hear_result().await;
    session.answer("A", false, true).await;
    let second = session.hear_result().await;
    assert_eq!(
        first.request_id, second.request_id,
        "one request id for all tries"
    );
    // The session breaks before the answer.
    drop(session);
    let mut session = replica.session().await;
    assert_eq!(session.attach(8, vec![]).await, ["A"]);
    let third = session.hear_result().await;
    assert_eq!((third.request_id, third.epoch), (first.request_id, 8));
    session.answer("A", false, false).await;
    node.becomes(|status| status.epoch == 8 && status.unreported.is_empty())
        .await;
}

#[tokio::test]
async fn cancelling_kills_the_program() {
    let mut replica = Replica::start().await;
    let mut held = Fifo::new();
    let slow = script(
        "slow",
        &format!("exec 3>{}; echo up >&3; exec sleep 1000", held.path()),
    );
    let mut node = Node::start(&[replica.known(1)], &slow);
    let mut session = replica.session().await;
    session.attach(7, vec![]).await;
    session.assign("A", "slow", 7).await;
    held.opened().await;
    let cancel = wire::CancelDispatch {
        dispatch_id: "A".to_owned(),
        reason: "enough".to_owned(),
        epoch: 7,
        attempt: 1,
    };
    session.say(Said::Cancel(cancel)).await;
    held.released().await;
    let result = session.hear_result().await;
    assert_eq!(
        (result.outcome.as_str(), result.error_code.as_str()),
        ("cancelled", "stopped")
    );
    session.answer("A", true, false).await;
    node.becomes(|status| status.running.is_empty() && status.unreported.is_empty())
        .await;
}

#[tokio::test]
async fn a_revoked_node_ends() {
    let mut replica = Replica::start().await;
    let node = Node::start(&[replica.known(1)], "");
    let mut session = replica.session().await;
    session.attach(7, vec![]).await;
    session.goodbye("revoked").await;
    let error = node.end().await.unwrap_err();
    assert_eq!((error.exit_code(), error.code.as_str()), (3, "N0501"));
}

#[tokio::test]
async fn a_node_that_is_superseded_again_and_again_ends() {
    let mut replica = Replica::start().await;
    let node = Node::start(&[replica.known(1)], "");
    // The first time it may have been an attach of its own, given up and committed late.
    let mut first = replica.session().await;
    first.attach(7, vec![]).await;
    first.goodbye("superseded").await;
    let mut second = replica.session().await;
    second.attach(8, vec![]).await;
    second.goodbye("superseded").await;
    let error = node.end().await.unwrap_err();
    assert_eq!((error.exit_code(), error.code.as_str()), (11, "N0502"));
}

#[tokio::test]
async fn a_revoked_node_that_comes_back_ends() {
    let replica = Replica::start().await;
    replica.notes.lock().unwrap().refuse_register = Some(refusal("E0302", "denied"));
    let error = Node::start(&[replica.known(1)], "").end().await.unwrap_err();
    assert!(
        error.code == "N0501" && error.message.contains("E0302"),
        "{error}"
    );
}

#[tokio::test]
async fn a_node_that_is_not_known_registers_again() {
    let mut replica = Replica::start().await;
    replica.notes.lock().unwrap().refuse_stream = Some(refusal("E0501", "precondition"));
    let _node = Node::start(&[replica.known(1)], "");
    replica.session().await.attach(7, vec![]).await;
    assert_eq!(replica.notes.lock().unwrap().registered.len(), 2);
}

#[tokio::test]
async fn a_certificate_that_is_over_ends_the_agent_only_when_it_cannot_recover() {
    for code in ["E0305", "E0312"] {
        let replica = Replica::start().await;
        replica.notes.lock().unwrap().refuse_stream = Some(refusal(code, "denied"));
        let error = Node::start(&[replica.known(1)], "").end().await.unwrap_err();
        assert_eq!(error.code, "N0503", "{error}");
    }
    let refused = End::CredentialRefused("the certificate expired".to_owned());
    assert_eq!(session::final_error(&refused), None, "recovery decides");
    assert_eq!(session::final_error(&End::lost("no route")), None);
}

#[tokio::test]
async fn draining_moves_the_node_and_silence_does_too() {
    let mut first = Replica::start().await;
    let mut second = Replica::start().await;
    let _node = Node::start(&[first.known(1)], "");
    let mut session = first.session().await;
    session
        .attach(7, vec![first.endpoint(1), second.endpoint(2)])
        .await;
    session.goodbye("draining").await;
    let mut session = second.session().await;
    session.fall_silent();
    session.attach_at(8, vec![], 50).await;
    let mut back = first.session().await;
    back.attach(9, vec![]).await;
    drop(session);
}

#[tokio::test]
async fn broken_streams_lead_to_polling() {
    let mut replica = Replica::start().await;
    replica.notes.lock().unwrap().no_streams = true;
    replica.notes.lock().unwrap().polled.push(wire::ServerMessage {
        body: Some(Said::Assignment(wire::Assignment {
            dispatch_id: "A".to_owned(),
            epoch: 5,
            capability: "echo".to_owned(),
            payload: "true".into(),
            remaining_ms: 600_000,
            ..wire::Assignment::default()
        })),
    });
    let mut node = Node::start(&[replica.known(1)], "");
    node.becomes(|status| status.transport == "poll" && status.epoch == 5)
        .await;
    let reported = replica.report().await;
    assert_eq!(
        (
            reported.dispatch_id.as_str(),
            reported.epoch,
            &reported.payload[..]
        ),
        ("A", 5, &b"true"[..])
    );
    node.becomes(|status| status.unreported.is_empty()).await;
    node.stop.send_replace(true);
    node.end().await.unwrap();
}

#[tokio::test]
async fn a_stop_without_any_replica_is_prompt() {
    let nobody = KnownReplica {
        replica_id: 1,
        node_addr: "127.0.0.1:1".to_owned(),
        enrol_addr: String::new(),
        quic_addr: String::new(),
    };
    let mut node = Node::start(&[nobody], "");
    node.becomes(|status| !status.last_error.is_empty()).await;
    node.stop.send_replace(true);
    node.end().await.unwrap();
}

#[tokio::test]
async fn a_stop_does_not_wait_for_a_replica_that_hangs() {
    let mut replica = Replica::start().await;
    let node = Node::start(&[replica.known(1)], "");
    // It hears Attach and says nothing.
    let mut session = replica.session().await;
    assert!(matches!(session.hear().await, Body::Attach(_)));
    node.stop.send_replace(true);
    // Less than the agent would wait for the answer.
    let ended = timeout(session::CALL - Duration::from_secs(1), node.end()).await;
    ended.expect("it waited").unwrap();
}
