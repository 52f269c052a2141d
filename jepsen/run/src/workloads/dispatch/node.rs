//! A node that the harness plays: it sees each delivery, runs it for a while, and says what came of it, over any
//! number of sessions.
//!
//! Never here: judging. Invariants: what it has begun, or finished without an accepted result, it names when it
//! attaches; a result is said under one request id until it is answered. Sometimes it dies and comes back knowing
//! nothing, as a machine whose disk was replaced.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use palyra_client::new_ulid;
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message::Body as Heard;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::super::session::{End, Papers, Session, Way};
use super::{AGAIN, ATTEMPTS, ONCE};
use crate::chance::Chance;
use crate::record::{self, Call, Process};
use crate::run::Run;

/// How often it looks at what it has.
const TICK: Duration = Duration::from_millis(40);
/// A result without an answer is said again.
const REPEAT: Duration = Duration::from_millis(800);

/// A job that it has.
struct Job {
    attempt: u32,
    epoch: u64,
    done_at: Instant,
    /// How it ends; nothing while it runs.
    outcome: Option<&'static str>,
    fails: bool,
    request: String,
    said_at: Option<Instant>,
    process: Process,
    open: Option<Call>,
}

/// One node, over all of its sessions.
pub(super) struct Node {
    run: Arc<Run>,
    papers: Papers,
    chance: Chance,
    number: u64,
    jobs: BTreeMap<String, Job>,
}

impl Node {
    /// One that holds nothing.
    pub(super) fn new(run: &Arc<Run>, papers: Papers, number: u64) -> Node {
        Node {
            run: Arc::clone(run),
            papers,
            chance: run.chance(&format!("node {number}")),
            number,
            jobs: BTreeMap::new(),
        }
    }

    /// Lives until `over`.
    pub(super) async fn live(mut self, over: Arc<AtomicBool>) {
        let mut at = self.number;
        let mut registered = false;
        while !over.load(Ordering::Relaxed) && !self.run.stop.is_cancelled() {
            let members = self.run.cluster.replicas();
            let replica = members[usize::try_from(at).unwrap_or(0) % members.len()];
            at += 1;
            let way = if self.chance.percent(40) {
                Way::Quic
            } else {
                Way::Grpc
            };
            let _ended = self.session(replica, way, &mut registered, &over).await;
            let pause = self.chance.between(50, 350);
            sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn session(
        &mut self,
        at: u64,
        way: Way,
        registered: &mut bool,
        over: &AtomicBool,
    ) -> Result<(), End> {
        let cluster = Arc::clone(&self.run.cluster);
        let connection = self.papers.connect(&cluster, at, way).await?;
        if !*registered {
            self.papers.register(&connection, capabilities()).await?;
            *registered = true;
        }
        for job in self.jobs.values_mut() {
            job.said_at = None;
        }
        let attach = wire::Attach {
            request_id: new_ulid(),
            held: self.jobs.keys().cloned().collect(),
            held_attempts: self.jobs.values().map(|job| job.attempt).collect(),
            ..Default::default()
        };
        let mut session = Session::attach(&connection, &self.papers.device, attach).await?;
        for job in self.jobs.values_mut() {
            job.epoch = session.epoch;
        }
        let leave_at = Instant::now() + Duration::from_millis(self.chance.between(3_000, 12_000));
        let mut beat_at = Instant::now() + session.interval.mul_f64(0.3);
        let mut beats = 0;
        while !over.load(Ordering::Relaxed) {
            if let Some(heard) = session.next(TICK).await? {
                self.take(&session, heard).await?;
            }
            if Instant::now() >= beat_at {
                beats += 1;
                beat_at = Instant::now() + session.interval;
                session.beat(beats).await?;
            }
            self.speak(&session).await?;
            if self.run.is_loading() && Instant::now() >= leave_at {
                // A connection breaks; now and then the machine with it.
                if self.chance.percent(8) {
                    self.jobs.clear();
                }
                return Ok(());
            }
        }
        Ok(())
    }

    async fn take(&mut self, session: &Session, heard: Heard) -> Result<(), End> {
        match heard {
            Heard::Assignment(assignment) => {
                let ack = wire::Ack {
                    dispatch_id: assignment.dispatch_id.clone(),
                    epoch: assignment.epoch,
                };
                self.assigned(&assignment);
                session.say(Body::Ack(ack)).await
            }
            Heard::Result(answer) => {
                self.answered(&answer);
                Ok(())
            }
            Heard::Cancel(cancel) => self.cancelled(session, &cancel).await,
            _ => Ok(()),
        }
    }

    fn assigned(&mut self, assignment: &wire::Assignment) {
        let payload: Value = serde_json::from_slice(&assignment.payload).unwrap_or_default();
        let value = json!({
            "job": assignment.dispatch_id,
            "attempt": assignment.attempt,
            "epoch": assignment.epoch,
            "device": self.papers.device,
        });
        let mut process = self.run.record.process();
        let call = process.invoke("deliver", value.clone(), None, None);
        process.end(call, record::End::ok(value));
        let hold = Duration::from_millis(payload["hold_ms"].as_u64().unwrap_or(100));
        let job = Job {
            attempt: assignment.attempt,
            epoch: assignment.epoch,
            done_at: Instant::now() + hold,
            outcome: None,
            fails: payload["fails"] == true,
            request: new_ulid(),
            said_at: None,
            process,
            open: None,
        };
        self.jobs.insert(assignment.dispatch_id.clone(), job);
    }

    fn answered(&mut self, answer: &wire::ResultAnswer) {
        let Some(job) = self.jobs.get_mut(&answer.dispatch_id) else {
            return;
        };
        if answer.retry {
            job.said_at = Some(Instant::now());
            return;
        }
        let Some(call) = job.open.take() else { return };
        let value = job.value(&answer.dispatch_id, &self.papers.device);
        let end = if answer.accepted && !answer.late {
            record::End::ok(value)
        } else if answer.late {
            record::End::fail(value, "late")
        } else {
            record::End::fail(value, format!("{} {}", answer.error_code, answer.error_message))
        };
        job.process.end(call, end);
        self.jobs.remove(&answer.dispatch_id);
    }

    async fn cancelled(&mut self, session: &Session, cancel: &wire::CancelDispatch) -> Result<(), End> {
        if let Some(job) = self.jobs.get_mut(&cancel.dispatch_id) {
            job.outcome.get_or_insert("cancelled");
            return Ok(());
        }
        if cancel.epoch == 0 {
            return Ok(());
        }
        // It is the node's to say, also when the node does not have it.
        let value = json!({
            "job": cancel.dispatch_id,
            "attempt": cancel.attempt,
            "epoch": cancel.epoch,
            "device": self.papers.device,
            "outcome": "cancelled",
        });
        let mut process = self.run.record.process();
        let request = new_ulid();
        let open = process.invoke("complete", value, None, Some(&request));
        let job = Job {
            attempt: cancel.attempt,
            epoch: cancel.epoch,
            done_at: Instant::now(),
            outcome: Some("cancelled"),
            fails: false,
            request: request.clone(),
            said_at: Some(Instant::now()),
            process,
            open: Some(open),
        };
        let result = job.result(&cancel.dispatch_id);
        self.jobs.insert(cancel.dispatch_id.clone(), job);
        session.say(Body::Result(result)).await
    }

    async fn speak(&mut self, session: &Session) -> Result<(), End> {
        let mut says = Vec::new();
        for (id, job) in &mut self.jobs {
            if job.outcome.is_none() && Instant::now() >= job.done_at {
                job.outcome = Some(if job.fails { "failed" } else { "succeeded" });
            }
            let due = job.said_at.is_none_or(|at| at.elapsed() >= REPEAT);
            if job.outcome.is_some() && due {
                job.said_at = Some(Instant::now());
                if job.open.is_none() {
                    let value = job.value(id, &self.papers.device);
                    job.open = Some(job.process.invoke("complete", value, None, Some(&job.request)));
                }
                says.push(job.result(id));
            }
        }
        for result in says {
            session.say(Body::Result(result)).await?;
        }
        Ok(())
    }
}

impl Job {
    fn value(&self, id: &str, device: &str) -> Value {
        json!({
            "job": id,
            "attempt": self.attempt,
            "epoch": self.epoch,
            "device": device,
            "outcome": self.outcome.unwrap_or(""),
        })
    }

    fn result(&self, id: &str) -> wire::Result {
        let outcome = self.outcome.unwrap_or("succeeded");
        wire::Result {
            request_id: self.request.clone(),
            dispatch_id: id.to_owned(),
            epoch: self.epoch,
            outcome: outcome.to_owned(),
            payload: if outcome == "succeeded" {
                b"{}".to_vec().into()
            } else {
                Vec::new().into()
            },
            error_code: if outcome == "failed" {
                "program_failed".to_owned()
            } else {
                String::new()
            },
            attempt: self.attempt,
            ..Default::default()
        }
    }
}

fn capabilities() -> Vec<wire::Capability> {
    let one = |name: &str, effect: &str| wire::Capability {
        name: name.to_owned(),
        effect: effect.to_owned(),
        timeout_ms: 20_000,
        max_concurrency: 4,
        ..Default::default()
    };
    let mut again = one(AGAIN, "idempotent");
    again.max_attempts = ATTEMPTS;
    again.backoff_ms = 200;
    again.retry_on = vec!["failed".to_owned(), "session_lost".to_owned()];
    vec![one(ONCE, "once"), again]
}
