//! A played worker: real identity, real sessions; what it runs is a pause and some writes.
//!
//! Never here: judging. Invariants: it holds a lease from the first confirmed renewal, by its own clock: what was
//! left when the answer was made, counted from when the renewal was sent, less a margin. A worker that sleeps says
//! and hears nothing meanwhile, its programs write on under their old fences, and it reports their results
//! afterwards: what happens when a supervisor is stopped. One that dies comes back knowing nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use palyra_client::new_ulid;
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message::Body as Heard;
use palyra_proto::worker::v1 as work;
use palyra_proto::worker::v1::worker_message::Body as Say;
use palyra_proto::worker::v1::worker_order::Body as Order;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::super::operator::merge;
use super::super::session::{End, Papers, Session, Way};
use super::Resource;
use super::proof::Signer;
use crate::chance::Chance;
use crate::record::{self, Call, Process};
use crate::run::Run;

/// Subtracted from every lease: what a clock and a kill may cost.
const MARGIN_NS: u64 = 250_000_000;
/// How often a worker looks at what it has.
const TICK: Duration = Duration::from_millis(50);
/// How often a program writes.
const WRITE: Duration = Duration::from_millis(300);
/// A message whose answer was that nothing was decided, or none, is sent again.
const AGAIN: Duration = Duration::from_millis(800);

/// What workers share.
#[derive(Default)]
pub(super) struct Shared {
    resource: Resource,
}

/// Where a lease stands with its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its acceptance is not answered yet.
    Offered,
    /// It runs, once a renewal was confirmed.
    Running,
    /// Its result is not answered yet.
    Finishing,
    /// Its cleanup is not answered yet.
    Cleaning,
}

/// A lease that a worker has.
struct Lease {
    run: String,
    slot: String,
    fence: u64,
    stage: Stage,
    ttl: Duration,
    /// Its own end, in nanoseconds of the run; 0 before a renewal was confirmed.
    until: u64,
    done_at: Instant,
    renew_at: Instant,
    write_at: Instant,
    stopped: bool,
    request: String,
    said_at: Option<Instant>,
    /// What is said of it, one after the other.
    life: Process,
    open: Option<Call>,
    /// Its renewals.
    renewing: Process,
    renewal: Option<(u64, u64, Call)>,
    writer: Process,
}

/// One worker, over all of its sessions.
pub(super) struct Worker {
    run: Arc<Run>,
    papers: Papers,
    signer: Signer,
    chance: Chance,
    number: u64,
    leases: BTreeMap<String, Lease>,
    sequence: u64,
    sleep_at: Instant,
    reports: Process,
}

impl Worker {
    /// One that holds nothing.
    pub(super) fn new(run: &Arc<Run>, papers: Papers, signer: Signer, number: u64) -> Worker {
        Worker {
            run: Arc::clone(run),
            papers,
            signer,
            chance: run.chance(&format!("worker {number}")),
            number,
            leases: BTreeMap::new(),
            sequence: 0,
            sleep_at: Instant::now() + Duration::from_secs(12),
            reports: run.record.process(),
        }
    }

    /// Lives until `over`, and until it holds nothing.
    pub(super) async fn live(mut self, shared: Arc<Shared>, over: Arc<AtomicBool>) {
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
            let _ended = self.session(replica, way, &mut registered, &shared, &over).await;
            self.look(&shared);
            let pause = self.chance.between(50, 350);
            sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn session(
        &mut self,
        at: u64,
        way: Way,
        registered: &mut bool,
        shared: &Shared,
        over: &AtomicBool,
    ) -> Result<(), End> {
        let cluster = Arc::clone(&self.run.cluster);
        let connection = self.papers.connect(&cluster, at, way).await?;
        if !*registered {
            self.papers.register(&connection, Vec::new()).await?;
            *registered = true;
        }
        let attach = wire::Attach {
            request_id: new_ulid(),
            ..Default::default()
        };
        let mut session = Session::attach(&connection, &self.papers.device, attach).await?;
        self.report(&session).await?;
        let mut beat_at = Instant::now() + session.interval.mul_f64(0.3);
        let (mut beats, mut admitted) = (0, false);
        while !over.load(Ordering::Relaxed) {
            if let Some(heard) = session.next(TICK).await? {
                self.take(&session, heard, &mut admitted).await?;
            }
            if Instant::now() >= beat_at {
                beats += 1;
                beat_at = Instant::now() + session.interval;
                session.beat(beats).await?;
            }
            self.look(shared);
            self.speak(&session).await?;
            if self.maybe_dies(shared) {
                return Ok(());
            }
            self.maybe_sleeps(shared).await;
        }
        Ok(())
    }

    /// Says what it holds, as the first thing of each session.
    async fn report(&mut self, session: &Session) -> Result<(), End> {
        for lease in self.leases.values_mut() {
            lease.said_at = None;
        }
        let held: Vec<work::HeldLease> = self.leases.iter().map(|(id, lease)| lease.held(id)).collect();
        let told: Vec<Value> = held
            .iter()
            .map(|held| json!({"lease": held.lease_id, "fence": held.fence, "state": held.state}))
            .collect();
        let value = json!({"device": self.papers.device, "held": told});
        let call = self.reports.invoke("report", value.clone(), None, None);
        let report = work::Report {
            request_id: new_ulid(),
            held,
        };
        let said = say(session, Say::Report(report)).await;
        self.reports.end(call, record::End::ok(value));
        said
    }

    async fn take(&mut self, session: &Session, heard: Heard, admitted: &mut bool) -> Result<(), End> {
        let Heard::Worker(work::WorkerOrder { body: Some(order) }) = heard else {
            return Ok(());
        };
        match order {
            Order::Reconciled(reconciled) => {
                for end in reconciled.end {
                    self.over(session, &end).await?;
                }
                if !*admitted {
                    let ask = work::ChallengeRequest {
                        request_id: new_ulid(),
                    };
                    say(session, Say::Challenge(ask)).await?;
                }
            }
            Order::Challenge(challenge) => say(session, Say::Attest(self.signer.attest(&challenge))).await?,
            Order::Attested(answer) => *admitted |= answer.admitted,
            Order::Offer(offer) => self.offered(offer),
            Order::Renewed(answer) => self.renewed(&answer),
            Order::Answer(answer) => self.answered(&answer),
            Order::End(end) => self.over(session, &end).await?,
            _ => {}
        }
        Ok(())
    }

    fn offered(&mut self, offer: work::LeaseOffer) {
        if self.leases.contains_key(&offer.lease_id) {
            return;
        }
        let now = Instant::now();
        let params: Value = serde_json::from_slice(&offer.params).unwrap_or_default();
        let record = &self.run.record;
        let lease = Lease {
            run: offer.run_id,
            slot: format!("{}/{}", self.papers.device, offer.slot),
            fence: offer.fence,
            stage: Stage::Offered,
            ttl: Duration::from_millis(offer.ttl_ms),
            until: 0,
            done_at: now + Duration::from_millis(params["hold_ms"].as_u64().unwrap_or(500)),
            renew_at: now,
            write_at: now,
            stopped: false,
            request: new_ulid(),
            said_at: None,
            life: record.process(),
            open: None,
            renewing: record.process(),
            renewal: None,
            writer: record.process(),
        };
        self.leases.insert(offer.lease_id, lease);
    }

    fn renewed(&mut self, answer: &work::RenewAnswer) {
        for one in &answer.leases {
            let Some(lease) = self.leases.get_mut(&one.lease_id) else {
                continue;
            };
            let ours = lease
                .renewal
                .as_ref()
                .is_some_and(|(sequence, ..)| *sequence == answer.sequence);
            let Some((_, sent, call)) = lease.renewal.take_if(|_| ours) else {
                continue;
            };
            let value = json!({"lease": one.lease_id, "fence": lease.fence});
            let left = Duration::from_millis(one.remaining_ms).min(lease.ttl);
            let end = if one.renewed {
                let until = (sent + u64::try_from(left.as_nanos()).unwrap_or(0)).saturating_sub(MARGIN_NS);
                // Time that was over does not come back.
                if !lease.stopped {
                    lease.until = lease.until.max(until);
                }
                record::End::ok(merge(value, &json!({"until": until})))
            } else if one.retry {
                record::End::info(value, "not decided")
            } else {
                record::End::fail(value, format!("{} {}", one.code, one.message))
            };
            lease.renewing.end(call, end);
        }
    }

    fn answered(&mut self, answer: &work::Answer) {
        let found = self
            .leases
            .iter()
            .find(|(_, lease)| lease.request == answer.request_id);
        let Some(id) = found.map(|(id, _)| id.clone()) else {
            return;
        };
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        if answer.retry {
            lease.said_at = Some(Instant::now());
            return;
        }
        let Some(call) = lease.open.take() else { return };
        let value = lease.value(&id);
        let end = match answer.accepted {
            true => record::End::ok(value),
            false => record::End::fail(value, format!("{} {}", answer.code, answer.message)),
        };
        lease.life.end(call, end);
        match (lease.stage, answer.accepted) {
            (Stage::Offered, true) => {
                lease.next(Stage::Running);
            }
            (Stage::Cleaning, _) => drop(self.leases.remove(&id)),
            (Stage::Running, true) => {}
            (_, true) => lease.next(Stage::Cleaning),
            (_, false) => {
                lease.stop(&id);
                lease.next(Stage::Cleaning);
            }
        }
    }

    /// A lease is over. Of one that it knows nothing of it says at once that nothing is left: before that nothing is
    /// given to it.
    async fn over(&mut self, session: &Session, end: &work::LeaseEnd) -> Result<(), End> {
        if !self.leases.contains_key(&end.lease_id) {
            return say(session, cleaned(&end.lease_id, end.fence, new_ulid())).await;
        }
        self.end(end);
        Ok(())
    }

    fn end(&mut self, end: &work::LeaseEnd) {
        if let Some(lease) = self.leases.get_mut(&end.lease_id)
            && lease.fence == end.fence
            && lease.stage != Stage::Cleaning
        {
            lease.stop(&end.lease_id);
            lease.next(Stage::Cleaning);
        }
    }

    /// Works: writes, and stops what is over.
    fn look(&mut self, shared: &Shared) {
        let (now, nanos) = (Instant::now(), self.run.record.clock().nanos());
        for (id, lease) in &mut self.leases {
            let over = lease.until != 0 && nanos >= lease.until;
            if lease.stage == Stage::Running && lease.until != 0 && !over {
                lease.write(&shared.resource, now);
                if now >= lease.done_at {
                    lease.stop(id);
                    lease.next(Stage::Finishing);
                }
            }
            if over && !lease.stopped {
                lease.stop(id);
                if lease.stage != Stage::Finishing {
                    lease.next(Stage::Cleaning);
                }
            }
        }
    }

    /// Says what is to be said.
    async fn speak(&mut self, session: &Session) -> Result<(), End> {
        let (now, nanos) = (Instant::now(), self.run.record.clock().nanos());
        let (mut renew, mut says) = (Vec::new(), Vec::new());
        self.sequence += 1;
        for (id, lease) in &mut self.leases {
            let live = matches!(lease.stage, Stage::Offered | Stage::Running) && !lease.stopped;
            if live && now >= lease.renew_at {
                lease.renew_at = now + lease.ttl / 6;
                // Of one whose answer did not come nobody knows.
                if lease.renewal.take().is_some() {
                    lease.renewing = lease.renewing.another();
                }
                let value = json!({"lease": id, "fence": lease.fence});
                let call = lease.renewing.invoke("renew", value, None, None);
                lease.renewal = Some((self.sequence, nanos, call));
                renew.push(work::LeaseRef {
                    lease_id: id.clone(),
                    fence: lease.fence,
                });
            }
            let due = lease.said_at.is_none_or(|at| at.elapsed() >= AGAIN);
            if due && lease.stage != Stage::Running {
                lease.said_at = Some(now);
                says.push(lease.speak(id));
            }
        }
        for body in says {
            say(session, body).await?;
        }
        if !renew.is_empty() {
            let renew = work::LeaseRenew {
                sequence: self.sequence,
                leases: renew,
            };
            say(session, Say::Renew(renew)).await?;
        }
        Ok(())
    }

    /// Sleeps for longer than its leases, while what it ran writes on; then reports results under the old fences.
    async fn maybe_sleeps(&mut self, shared: &Shared) {
        if Instant::now() < self.sleep_at || !self.run.is_loading() {
            return;
        }
        self.sleep_at = Instant::now() + Duration::from_millis(self.chance.between(9_000, 18_000));
        let Some(ttl) = self.leases.values().map(|lease| lease.ttl).max() else {
            return;
        };
        let until = Instant::now() + ttl.mul_f64(1.2) + Duration::from_millis(self.chance.below(2_500));
        while Instant::now() < until {
            sleep(TICK).await;
            let (now, nanos) = (Instant::now(), self.run.record.clock().nanos());
            for (id, lease) in &mut self.leases {
                if lease.stage == Stage::Running && lease.until != 0 {
                    lease.write(&shared.resource, now);
                    if nanos >= lease.until {
                        lease.stop(id);
                    }
                }
            }
        }
        for lease in self
            .leases
            .values_mut()
            .filter(|lease| lease.stage == Stage::Running && lease.stopped)
        {
            lease.next(Stage::Finishing);
        }
    }

    /// Dies with everything that it runs, and comes back knowing nothing.
    fn maybe_dies(&mut self, _: &Shared) -> bool {
        // Twenty looks a second: about once in a minute and a half.
        let dies = self.run.is_loading() && !self.leases.is_empty() && self.chance.below(1_800) == 0;
        if dies {
            for (id, lease) in &mut self.leases {
                lease.stop(id);
            }
            self.leases.clear();
        }
        dies
    }
}

impl Lease {
    fn next(&mut self, stage: Stage) {
        self.stage = stage;
        self.request = new_ulid();
        self.said_at = None;
        // What was open is unknown for good.
        if self.open.take().is_some() {
            self.life = self.life.another();
        }
    }

    /// Nothing of it runs any more, once.
    fn stop(&mut self, id: &str) {
        if !std::mem::replace(&mut self.stopped, true) {
            let value = json!({"lease": id, "fence": self.fence});
            let mut process = self.writer.another();
            let call = process.invoke("stop", value.clone(), None, None);
            process.end(call, record::End::ok(value));
        }
    }

    fn write(&mut self, resource: &Resource, now: Instant) {
        if now < self.write_at {
            return;
        }
        self.write_at = now + WRITE;
        let value = json!({"run": self.run, "slot": self.slot, "fence": self.fence});
        let call = self.writer.invoke("touch", value.clone(), None, None);
        let end = match resource.write(&self.run, &self.slot, self.fence) {
            true => record::End::ok(value),
            false => record::End::fail(value, "behind a newer fence"),
        };
        self.writer.end(call, end);
    }

    fn value(&self, id: &str) -> Value {
        match self.stage {
            Stage::Offered => json!({"lease": id, "fence": self.fence, "run": self.run, "slot": self.slot}),
            Stage::Finishing => json!({"lease": id, "fence": self.fence, "outcome": "succeeded"}),
            Stage::Running | Stage::Cleaning => json!({"lease": id, "fence": self.fence}),
        }
    }

    /// What it says now; the operation begins with the first time.
    fn speak(&mut self, id: &str) -> Say {
        let (request, lease_id, fence) = (self.request.clone(), id.to_owned(), self.fence);
        let f = match self.stage {
            Stage::Offered | Stage::Running => "accept",
            Stage::Finishing => "finish",
            Stage::Cleaning => "clean",
        };
        if self.open.is_none() {
            self.open = Some(self.life.invoke(f, self.value(id), None, Some(&request)));
        }
        match self.stage {
            Stage::Offered | Stage::Running => Say::Accept(work::LeaseAccept {
                request_id: request,
                lease_id,
                fence,
            }),
            Stage::Finishing => Say::Finish(work::LeaseFinish {
                request_id: request,
                lease_id,
                fence,
                outcome: "succeeded".to_owned(),
                result: b"{}".to_vec().into(),
                ..work::LeaseFinish::default()
            }),
            Stage::Cleaning => cleaned(id, fence, request),
        }
    }

    fn held(&self, id: &str) -> work::HeldLease {
        let state = match self.stage {
            Stage::Offered | Stage::Running => "running",
            Stage::Finishing => "finished",
            Stage::Cleaning => "cleaned",
        };
        work::HeldLease {
            lease_id: id.to_owned(),
            fence: self.fence,
            state: state.to_owned(),
            message: String::new(),
        }
    }
}

fn cleaned(lease: &str, fence: u64, request_id: String) -> Say {
    Say::Cleaned(work::LeaseCleaned {
        request_id,
        lease_id: lease.to_owned(),
        fence,
        ok: true,
        ..work::LeaseCleaned::default()
    })
}

async fn say(session: &Session, body: Say) -> Result<(), End> {
    session
        .say(Body::Worker(work::WorkerMessage { body: Some(body) }))
        .await
}
