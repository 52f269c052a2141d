//! A simulated worker: real identity, real mutual TLS, real sessions; what it runs is a pause and some writes.
//!
//! What never lives here: judging. Invariants: it holds a lease by its own clock, from the moment at which it sent
//! the renewal
//! that was answered, less a margin; a worker that is made to pause says and hears nothing meanwhile, writes on
//! under its old
//! fences, and says so afterwards: what a process does whose supervisor was asleep.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use palyra_client::{Connection, Incoming, fill_random, new_ulid};
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::node_message::Body;
use palyra_proto::node::v1::server_message::Body as Heard;
use palyra_proto::worker::v1 as work;
use palyra_proto::worker::v1::worker_message::Body as Say;
use palyra_proto::worker::v1::worker_order::Body as Order;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::proof::Signer;
use super::resource::{Held, Holder, Resource};
use super::tally::Tally;
use crate::sim::Identity;
use crate::sim::node::{Transport, dial};
use crate::sim::session::{End, register};

/// Subtracted from every lease: what a clock and a kill may cost.
const MARGIN: Duration = Duration::from_millis(250);
/// How often a worker looks at what it has.
const TICK: Duration = Duration::from_millis(50);
/// A message whose answer was that nothing was decided, or none, is sent again.
const AGAIN: Duration = Duration::from_millis(800);
const CALL: Duration = Duration::from_secs(20);
const OUTGOING: usize = 256;

/// What workers share.
pub(crate) struct Shared {
    /// The replicas' addresses for nodes.
    pub(crate) addresses: Vec<String>,
    /// What leases protect.
    pub(crate) resource: Resource,
    /// What happened.
    pub(crate) tally: Tally,
    /// Whether workers are made to pause.
    pub(crate) pauses: AtomicBool,
    /// Workers that were admitted and are attached.
    pub(crate) ready: AtomicU64,
    /// Of the leases, for pauses longer than them.
    pub(crate) ttl: Duration,
}

/// Where a lease stands with its worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its acceptance is not answered yet.
    Offered,
    /// It runs.
    Running,
    /// Its result is not answered yet.
    Finishing,
    /// Its cleanup is not answered yet.
    Cleaning,
}

/// A lease that a worker has.
struct Lease {
    holder: Holder,
    stage: Stage,
    from: Instant,
    deadline: Instant,
    done_at: Instant,
    ttl: Duration,
    renew_at: Instant,
    /// Stopped: by its end, its deadline, or an order.
    stopped: Option<Instant>,
    request_id: String,
    said_at: Option<Instant>,
    /// Its own time was over when it reported a result: what an honest worker never does.
    stale: bool,
}

/// One worker, over all of its sessions.
pub(crate) struct Worker {
    pub(crate) identity: Identity,
    pub(crate) signer: Signer,
    pub(crate) seat: usize,
    leases: BTreeMap<String, Lease>,
    /// Sequence of a renewal, when it was sent.
    renewals: BTreeMap<u64, Instant>,
    sequence: u64,
    requests: BTreeMap<String, (String, Stage)>,
    pause_at: Instant,
}

/// A session under way.
struct Session {
    device_id: String,
    say: mpsc::Sender<wire::NodeMessage>,
    heard: Incoming<wire::ServerMessage>,
    interval: Duration,
    admitted: bool,
}

impl Worker {
    /// A worker that holds nothing.
    pub(crate) fn new(identity: Identity, signer: Signer, seat: usize) -> Worker {
        Worker {
            identity,
            signer,
            seat,
            leases: BTreeMap::new(),
            renewals: BTreeMap::new(),
            sequence: 0,
            requests: BTreeMap::new(),
            pause_at: Instant::now(),
        }
    }

    /// Lives until it is aborted.
    pub(crate) async fn live(mut self, shared: Arc<Shared>) {
        let mut at = self.seat % shared.addresses.len();
        let mut registered = false;
        self.pause_at = Instant::now() + next_pause(shared.ttl);
        loop {
            let address = shared.addresses[at].clone();
            match self.attach(&address, &mut registered).await {
                Ok(mut session) => {
                    let end = self.serve(&mut session, &shared).await;
                    if session.admitted {
                        shared.ready.fetch_sub(1, Ordering::Relaxed);
                    }
                    if let End::Revoked(_) = end {
                        shared.tally.trouble("revoked");
                        return;
                    }
                }
                Err(end) => shared.tally.trouble(&kind(&end)),
            }
            self.look(&shared);
            at = (at + 1) % shared.addresses.len();
            sleep(Duration::from_millis(50 + below(300))).await;
        }
    }

    async fn attach(&mut self, address: &str, registered: &mut bool) -> Result<Session, End> {
        let connection = dial(&self.identity, address, Transport::Grpc).await?;
        if !*registered {
            register(&connection, &self.identity.device_id).await?;
            *registered = true;
        }
        Session::open(&connection, &self.identity.device_id).await
    }

    /// One session: what it has is told first, then it is challenged, then it works.
    async fn serve(&mut self, session: &mut Session, shared: &Shared) -> End {
        self.requests.clear();
        for lease in self.leases.values_mut() {
            lease.said_at = None;
        }
        let report = work::Report {
            request_id: new_ulid(),
            held: self.leases.iter().map(|(id, lease)| held(id, lease)).collect(),
        };
        if let Err(end) = session.say(Say::Report(report)).await {
            return end;
        }
        let mut beat_at = Instant::now() + session.interval.mul_f64(0.3);
        let (mut sequence, mut heard_at) = (0, Instant::now());
        loop {
            let heard = tokio::select! {
                heard = session.heard.message() => Some(heard),
                () = sleep(TICK) => None,
            };
            let turn = match heard {
                Some(Ok(Some(message))) => {
                    heard_at = Instant::now();
                    self.take(session, shared, message.body).await
                }
                Some(Ok(None)) => return End::Lost("the server ended the stream".to_owned()),
                Some(Err(failure)) => return End::of(failure),
                None if heard_at.elapsed() > session.interval * 3 => {
                    return End::Lost("the server went silent".to_owned());
                }
                None => Ok(()),
            };
            if let Err(end) = turn {
                return end;
            }
            if Instant::now() >= beat_at {
                sequence += 1;
                beat_at = Instant::now() + session.interval;
                let beat = Body::Heartbeat(wire::Heartbeat { sequence });
                if let Err(end) = session.send(beat).await {
                    return end;
                }
            }
            self.look(shared);
            if let Err(end) = self.speak(session, shared).await {
                return end;
            }
            self.maybe_pause(shared).await;
        }
    }

    async fn take(&mut self, session: &mut Session, shared: &Shared, body: Option<Heard>) -> Result<(), End> {
        let order = match body {
            Some(Heard::Worker(order)) => order.body,
            Some(Heard::Goodbye(goodbye)) => return Err(End::of_goodbye(&goodbye)),
            _ => return Ok(()),
        };
        match order {
            Some(Order::Reconciled(reconciled)) => {
                for end in reconciled.end {
                    self.end(shared, &end);
                }
                if !session.admitted {
                    let ask = work::ChallengeRequest {
                        request_id: new_ulid(),
                    };
                    return session.say(Say::Challenge(ask)).await;
                }
                Ok(())
            }
            Some(Order::Challenge(challenge)) => {
                session.say(Say::Attest(self.signer.attest(&challenge))).await
            }
            Some(Order::Attested(answer)) => {
                if answer.admitted && !session.admitted {
                    session.admitted = true;
                    shared.ready.fetch_add(1, Ordering::Relaxed);
                } else if !answer.admitted {
                    shared
                        .tally
                        .trouble(&format!("attestation refused: {}", answer.code));
                }
                Ok(())
            }
            Some(Order::Offer(offer)) => {
                self.offered(shared, offer);
                Ok(())
            }
            Some(Order::Renewed(answer)) => {
                self.renewed(shared, &answer);
                Ok(())
            }
            Some(Order::Answer(answer)) => {
                self.answered(shared, &answer);
                Ok(())
            }
            Some(Order::End(end)) => {
                self.end(shared, &end);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn offered(&mut self, shared: &Shared, offer: work::LeaseOffer) {
        if self.leases.contains_key(&offer.lease_id) {
            return;
        }
        shared.tally.offers.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let ttl = Duration::from_millis(offer.ttl_ms);
        let params: serde_json::Value = serde_json::from_slice(&offer.params).unwrap_or_default();
        let hold = Duration::from_millis(params["hold_ms"].as_u64().unwrap_or(500));
        let lease = Lease {
            holder: Holder {
                worker: self.identity.device_id.clone(),
                slot: offer.slot,
                run: offer.run_id,
                fence: offer.fence,
            },
            stage: Stage::Offered,
            from: now,
            deadline: now + Duration::from_millis(offer.remaining_ms).saturating_sub(MARGIN),
            done_at: now + hold,
            ttl,
            renew_at: now + ttl / 3,
            stopped: None,
            request_id: new_ulid(),
            said_at: None,
            stale: false,
        };
        self.leases.insert(offer.lease_id, lease);
    }

    fn renewed(&mut self, shared: &Shared, answer: &work::RenewAnswer) {
        let Some(sent) = self.renewals.remove(&answer.sequence) else {
            return;
        };
        for one in &answer.leases {
            let Some(lease) = self.leases.get_mut(&one.lease_id) else {
                continue;
            };
            if one.renewed {
                shared.tally.renewals.fetch_add(1, Ordering::Relaxed);
                // Only what is still held: time that was over does not come back.
                if lease.stopped.is_none() {
                    lease.deadline = lease.deadline.max(sent + lease.ttl.saturating_sub(MARGIN));
                }
            } else if !one.code.is_empty() {
                shared.tally.refused("renew", &one.code);
            }
        }
    }

    fn answered(&mut self, shared: &Shared, answer: &work::Answer) {
        let Some((lease_id, stage)) = self.requests.remove(&answer.request_id) else {
            return;
        };
        let Some(lease) = self.leases.get_mut(&lease_id) else {
            return;
        };
        if answer.retry {
            shared.tally.retries.fetch_add(1, Ordering::Relaxed);
            lease.said_at = Some(Instant::now());
            return;
        }
        if lease.stage != stage {
            return;
        }
        let stopped = lease.stopped.is_some();
        match (stage, answer.accepted) {
            (Stage::Offered, true) => lease.next(Stage::Running),
            (Stage::Finishing, true) => {
                shared.tally.finished(&lease_id, lease.stale);
                lease.next(Stage::Cleaning);
            }
            (Stage::Cleaning, _) => {
                if !answer.accepted {
                    shared.tally.refused("cleaned", &answer.code);
                }
                lease.stop(shared, Instant::now());
                self.leases.remove(&lease_id);
            }
            (_, false) => {
                let what = match (stage, lease.stale || stopped) {
                    (Stage::Offered, _) => "accept",
                    (_, true) => "finish under a lease that was over",
                    (_, false) => "finish",
                };
                shared.tally.refused(what, &answer.code);
                lease.stop(shared, Instant::now());
                lease.next(Stage::Cleaning);
            }
            (Stage::Running, true) => {}
        }
    }

    fn end(&mut self, shared: &Shared, end: &work::LeaseEnd) {
        shared.tally.ended(&end.reason);
        if let Some(lease) = self.leases.get_mut(&end.lease_id)
            && lease.holder.fence == end.fence
        {
            lease.stop(shared, Instant::now());
            if lease.stage != Stage::Cleaning {
                lease.next(Stage::Cleaning);
            }
        }
    }

    /// Works: writes, and stops what is over.
    fn look(&mut self, shared: &Shared) {
        let now = Instant::now();
        for lease in self.leases.values_mut() {
            if lease.stage == Stage::Running {
                shared.resource.write(&lease.holder, lease.stopped.is_some());
            }
            if lease.stopped.is_none() && now >= lease.deadline {
                lease.stop(shared, lease.deadline);
                if lease.stage != Stage::Finishing {
                    lease.next(Stage::Cleaning);
                }
            }
            if lease.stage == Stage::Running && now >= lease.done_at {
                lease.stop(shared, now);
                lease.next(Stage::Finishing);
            }
        }
        self.renewals
            .retain(|_, sent| sent.elapsed() < Duration::from_secs(60));
    }

    /// Says what is to be said.
    async fn speak(&mut self, session: &Session, shared: &Shared) -> Result<(), End> {
        let now = Instant::now();
        let mut renew = Vec::new();
        let mut says = Vec::new();
        for (id, lease) in &mut self.leases {
            let live = matches!(lease.stage, Stage::Offered | Stage::Running);
            if live && lease.stopped.is_none() && now >= lease.renew_at {
                lease.renew_at = now + lease.ttl / 3;
                renew.push(work::LeaseRef {
                    lease_id: id.clone(),
                    fence: lease.holder.fence,
                });
            }
            let due = lease.said_at.is_none_or(|at| at.elapsed() >= AGAIN);
            if due && lease.stage != Stage::Running {
                lease.said_at = Some(now);
                self.requests
                    .insert(lease.request_id.clone(), (id.clone(), lease.stage));
                says.push(lease.message(id));
            }
        }
        for say in says {
            session.say(say).await?;
        }
        if !renew.is_empty() {
            self.sequence += 1;
            self.renewals.insert(self.sequence, Instant::now());
            shared
                .tally
                .wishes
                .fetch_add(renew.len() as u64, Ordering::Relaxed);
            let renew = work::LeaseRenew {
                sequence: self.sequence,
                leases: renew,
            };
            session.say(Say::Renew(renew)).await?;
        }
        Ok(())
    }

    /// Sleeps longer than its leases, while what it ran writes on; then reports results under the old fences.
    async fn maybe_pause(&mut self, shared: &Shared) {
        if Instant::now() < self.pause_at {
            return;
        }
        self.pause_at = Instant::now() + next_pause(shared.ttl);
        if !shared.pauses.load(Ordering::Relaxed) || self.leases.is_empty() {
            return;
        }
        shared.tally.pauses.fetch_add(1, Ordering::Relaxed);
        let until = Instant::now() + shared.ttl.mul_f64(1.2) + Duration::from_millis(below(3_000));
        while Instant::now() < until {
            sleep(TICK).await;
            let now = Instant::now();
            for lease in self
                .leases
                .values_mut()
                .filter(|lease| lease.stage == Stage::Running)
            {
                if lease.stopped.is_none() && now >= lease.deadline {
                    lease.stop(shared, lease.deadline);
                }
                shared.resource.write(&lease.holder, lease.stopped.is_some());
            }
        }
        for lease in self.leases.values_mut() {
            if lease.stage == Stage::Running && lease.stopped.is_some() {
                lease.stale = true;
                shared.tally.stale.fetch_add(1, Ordering::Relaxed);
                lease.next(Stage::Finishing);
            }
        }
    }
}

impl Lease {
    fn next(&mut self, stage: Stage) {
        self.stage = stage;
        self.request_id = new_ulid();
        self.said_at = None;
    }

    /// It holds nothing any more, once.
    fn stop(&mut self, shared: &Shared, at: Instant) {
        if self.stopped.is_some() {
            return;
        }
        let to = at.min(self.deadline).max(self.from);
        self.stopped = Some(to);
        shared.resource.held(Held {
            holder: self.holder.clone(),
            from: self.from,
            to,
        });
    }

    fn message(&self, lease_id: &str) -> Say {
        let (request_id, lease_id) = (self.request_id.clone(), lease_id.to_owned());
        let fence = self.holder.fence;
        match self.stage {
            Stage::Offered | Stage::Running => Say::Accept(work::LeaseAccept {
                request_id,
                lease_id,
                fence,
            }),
            Stage::Finishing => Say::Finish(work::LeaseFinish {
                request_id,
                lease_id,
                fence,
                outcome: "succeeded".to_owned(),
                result: b"{}".to_vec().into(),
                ..work::LeaseFinish::default()
            }),
            Stage::Cleaning => Say::Cleaned(work::LeaseCleaned {
                request_id,
                lease_id,
                fence,
                ok: true,
                ..work::LeaseCleaned::default()
            }),
        }
    }
}

fn held(id: &str, lease: &Lease) -> work::HeldLease {
    let state = match lease.stage {
        Stage::Offered | Stage::Running => "running",
        Stage::Finishing => "finished",
        Stage::Cleaning => "cleaned",
    };
    work::HeldLease {
        lease_id: id.to_owned(),
        fence: lease.holder.fence,
        state: state.to_owned(),
        message: String::new(),
    }
}

impl Session {
    async fn open(connection: &Connection, device_id: &str) -> Result<Session, End> {
        let (say, said) = mpsc::channel(OUTGOING);
        let attach = Body::Attach(wire::Attach {
            request_id: new_ulid(),
            ..wire::Attach::default()
        });
        say.try_send(message(device_id, attach))
            .map_err(|_| End::Lost("the stream is full".to_owned()))?;
        let opened = async {
            let mut heard = connection.session(said).await.map_err(End::of)?;
            let first = heard.message().await.map_err(End::of)?;
            Ok((heard, first.and_then(|message| message.body)))
        };
        let silent = |_| End::Lost("no answer to Attach".to_owned());
        match timeout(CALL, opened).await.map_err(silent)?? {
            (heard, Some(Heard::Attached(attached))) => Ok(Session {
                device_id: device_id.to_owned(),
                say,
                heard,
                interval: Duration::from_millis(attached.heartbeat_interval_ms.clamp(50, 600_000)),
                admitted: false,
            }),
            (_, Some(Heard::Goodbye(goodbye))) => Err(End::of_goodbye(&goodbye)),
            _ => Err(End::Lost("the first message was not Attached".to_owned())),
        }
    }

    async fn say(&self, body: Say) -> Result<(), End> {
        self.send(Body::Worker(work::WorkerMessage { body: Some(body) }))
            .await
    }

    async fn send(&self, body: Body) -> Result<(), End> {
        match timeout(self.interval * 3, self.say.send(message(&self.device_id, body))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Lost("the stream ended".to_owned())),
            Err(_) => Err(End::Lost("the server stopped reading".to_owned())),
        }
    }
}

fn message(device_id: &str, body: Body) -> wire::NodeMessage {
    wire::NodeMessage {
        device_id: device_id.to_owned(),
        body: Some(body),
    }
}

fn kind(end: &End) -> String {
    match end {
        End::Lost(cause) | End::Revoked(cause) => cause.chars().take(60).collect(),
        End::Unregistered => "unregistered".to_owned(),
        End::Moved(_) => "sent elsewhere".to_owned(),
        End::Superseded => "superseded".to_owned(),
    }
}

/// When a worker pauses next: each one, about every three leases' lives.
fn next_pause(ttl: Duration) -> Duration {
    ttl * 2 + ttl.mul_f64(0.001 * f64::from(u16::try_from(below(3_000)).unwrap_or(0)))
}

/// A number below `bound`.
pub(crate) fn below(bound: u64) -> u64 {
    let mut bytes = [0u8; 8];
    fill_random(&mut bytes);
    u64::from_le_bytes(bytes).checked_rem(bound).unwrap_or(0)
}
