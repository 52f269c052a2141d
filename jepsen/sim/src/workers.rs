//! Workers that attest and hold leases over real sessions, by clocks of their own, and write to a resource that looks
//! at fences.
//!
//! A worker holds a lease from its first confirmed renewal until its own, conservative end: the moment at which it
//! sent the newest confirmed renewal, plus what was left of the lease, less what its clock may be wrong by. Now and
//! then its process stands still, and what it had begun writes on afterwards without a look at the clock: that is
//! what fences are for. It says all that it does in the history, in the words of `palyra_jepsen_check::lease`, which
//! judges it. Never here: who starts runs, see `runs`.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use palyra_control::{
    FromWorker, HeldLease, Inbound, LeaseName, LeaseRenewed, Offer, Outbound, Statement, ToWorker,
    WorkerAnswer,
};
use palyra_jepsen_check::Kind;
use palyra_jepsen_check::history::{Answer, Pending};
use palyra_pki::KeyPair;
use palyra_pki::attestation::{public_key, sign_statement};
use palyra_platform::{self as platform, Instant};
use palyra_state::Id;
use prost::Message as _;
use serde_json::{Value, json};

use crate::breaks::Break;
use crate::chance;
use crate::cluster::{Cluster, Phase};
use crate::fleet;
use crate::held::{Lease, Stage, answer, clean, refused, succeeded};
use crate::line::{Broken, Line};

/// How wrong a worker's clock may run, in millionths, and what it takes off each lease for it: twice as much.
const RHO_PPM: u64 = 10_000;
const MILLION: u64 = 1_000_000;
const MS: u64 = 1_000_000;
/// How often a worker looks at what it has.
const TICK: Duration = Duration::from_millis(40);
/// A word that was not answered for so long is said again.
const AGAIN: u64 = 900 * MS;
/// Slots of a worker.
pub(crate) const SLOTS: u32 = 2;

/// A word that waits for its answer.
struct Said {
    lease: Id,
    stage: Stage,
    pending: Pending,
}

/// A renewal that waits for its answer.
struct Wish {
    sent: u64,
    pending: BTreeMap<Id, Pending>,
}

/// A worker, over all of its sessions.
struct Worker {
    cluster: Rc<Cluster>,
    device: Id,
    key: KeyPair,
    /// How fast its clock runs, in millionths.
    rate: u64,
    line: Option<Line>,
    reported: bool,
    admitted: bool,
    leases: BTreeMap<Id, Lease>,
    /// Leases of which it has said, in whatever life, that nothing is left: its word may arrive late.
    said_clean: BTreeSet<Id>,
    /// Leases of an earlier life, with their fences, and when it will say that nothing is left of them.
    unclean: BTreeMap<Id, (u64, u64)>,
    said: BTreeMap<Id, Said>,
    wishes: BTreeMap<u64, Wish>,
    sequence: u64,
    beats: u64,
    beats_at: Instant,
    /// The report of this session.
    report: Option<Pending>,
}

/// A worker's life, until the run is over.
pub(crate) async fn worker(cluster: Rc<Cluster>, device: Id, key: KeyPair) {
    let mut worker = Worker {
        cluster,
        device,
        key,
        rate: MILLION - RHO_PPM + chance::below(2 * RHO_PPM + 1),
        line: None,
        reported: false,
        admitted: false,
        leases: BTreeMap::new(),
        said_clean: BTreeSet::new(),
        unclean: BTreeMap::new(),
        said: BTreeMap::new(),
        wishes: BTreeMap::new(),
        sequence: 0,
        beats: 0,
        beats_at: platform::now(),
        report: None,
    };
    while worker.cluster.phase.get() != Phase::Over {
        if worker.line.is_none() {
            worker.attach().await;
            platform::sleep(Duration::from_millis(chance::between(20, 150))).await;
        } else {
            worker.turn().await;
        }
        worker.look();
    }
    worker.leave();
}

impl Worker {
    fn now(&self) -> u64 {
        self.cluster.world.elapsed_ns()
    }

    async fn attach(&mut self) {
        let at = self.cluster.any_member();
        let peer = fleet::node_peer(&self.cluster.papers, self.device, 0);
        let Some(line) = Line::open(&self.cluster, at, peer, self.device, &[]).await else {
            return;
        };
        self.line = Some(line);
        let held: Vec<HeldLease> = self.leases.iter().map(|(id, lease)| lease.told(*id)).collect();
        let told: Vec<Value> = held
            .iter()
            .map(|one| json!({"lease": one.lease.id, "fence": one.lease.fence, "state": one.state}))
            .collect();
        let value = json!({"device": self.device.to_string(), "held": told});
        self.report = Some(self.cluster.invoke("report", value, Some(at), None));
        self.says(fleet::fresh(), Statement::Report { held });
    }

    /// The line is gone: what was not answered is unknown, and said again in the next session.
    fn leave(&mut self) {
        self.line = None;
        self.reported = false;
        self.admitted = false;
        // They are named again to the next session.
        self.unclean.clear();
        if let Some(report) = self.report.take() {
            self.cluster.complete(&report, Kind::Info, Answer::default());
        }
        for (_, said) in std::mem::take(&mut self.said) {
            self.unknown(&said.pending);
        }
        for (_, wish) in std::mem::take(&mut self.wishes) {
            for pending in wish.pending.values() {
                self.unknown(pending);
            }
        }
        for lease in self.leases.values_mut() {
            lease.said_at = None;
        }
    }

    /// Nobody knows.
    fn unknown(&self, pending: &Pending) {
        self.cluster.complete(pending, Kind::Info, Answer::default());
    }

    fn says(&mut self, request: Id, statement: Statement) {
        self.send(FromWorker::Says {
            request_id: request.to_string(),
            statement,
        });
    }

    fn send(&mut self, message: FromWorker) {
        let lost = self
            .line
            .as_ref()
            .is_some_and(|line| !line.say(Inbound::Worker(message)));
        if lost {
            self.leave();
        }
    }

    async fn turn(&mut self) {
        let Some(line) = &mut self.line else { return };
        match line.hear(TICK).await {
            Err(Broken) => return self.leave(),
            Ok(Some(Outbound::Worker(message))) => self.hear(*message),
            Ok(_) => {}
        }
        self.beat();
        self.speak();
        if chance::percent(1) {
            self.trouble().await;
        }
    }

    fn beat(&mut self) {
        let Some(line) = &self.line else { return };
        if platform::now() < self.beats_at {
            return;
        }
        self.beats_at = platform::now() + line.attached.heartbeat_interval;
        self.beats += 1;
        let sequence = self.beats;
        if !line.say(Inbound::Heartbeat { sequence }) {
            self.leave();
        }
    }

    async fn trouble(&mut self) {
        let pause = chance::between(100, 4_000);
        match chance::below(4) {
            0 => {
                if let Some(line) = &self.line {
                    line.hold(pause);
                }
            }
            1 => self.leave(),
            2 => self.die(),
            _ => {
                // The process stands still, in the middle of its work.
                self.cluster.world.reach("worker-paused");
                platform::sleep(Duration::from_millis(pause)).await;
                let begun: Vec<Id> = self.leases.keys().copied().collect();
                for id in begun {
                    self.write(id);
                }
            }
        }
    }

    fn hear(&mut self, message: ToWorker) {
        match message {
            ToWorker::Challenge(challenge) => {
                let statement = fleet::statement(self.device, &challenge, SLOTS).encode_to_vec();
                let Ok(signature) = sign_statement(&self.key, &statement) else {
                    return self.cluster.problem("a worker cannot sign".into());
                };
                let attest = Statement::Attest {
                    signature: signature.into(),
                    public_key: public_key(&self.key).into(),
                    statement: statement.into(),
                };
                self.says(fleet::fresh(), attest);
            }
            ToWorker::Attested(answer) => {
                self.admitted |= answer.admitted;
                if answer.admitted {
                    self.cluster.world.reach("worker-admitted");
                } else {
                    self.cluster
                        .world
                        .note(&format!("{} is not admitted: {}", self.device, answer.message));
                }
            }
            ToWorker::Offer(offer) => self.offered(&offer),
            ToWorker::Renewed { sequence, leases } => self.renewed(sequence, &leases),
            ToWorker::Answer(answer) => self.answered(&answer),
            ToWorker::End(end) => self.told_over(end.lease_id, end.fence, &end.reason),
            ToWorker::Reconciled { end, .. } => {
                self.reported = true;
                if let Some(report) = self.report.take() {
                    self.cluster.complete(&report, Kind::Ok, Answer::default());
                }
                for end in end {
                    self.told_over(end.lease_id, end.fence, &end.reason);
                }
            }
            ToWorker::Cleanup { .. } | ToWorker::Chunk(_) => {}
        }
    }

    fn offered(&mut self, offer: &Offer) {
        if let Some(id) = self.unclean.keys().next() {
            let (device, offered) = (self.device, offer.lease_id);
            let what = format!(
                "lease.clean-first: {device} was offered {offered} before it had said that nothing is left of {id}"
            );
            self.cluster.problem(what);
        }
        if self.leases.contains_key(&offer.lease_id) {
            return;
        }
        self.cluster.world.reach("lease-offered");
        let work_ms = chance::between(100, 2_500);
        let lease = Lease {
            run: offer.run_id,
            slot: format!("{}/{}", self.device, offer.slot),
            fence: offer.fence,
            stage: Stage::Offered,
            request: fleet::fresh(),
            said_at: None,
            until: 0,
            stopped: false,
            ttl_ms: offer.ttl_ms,
            renew_at: 0,
            done_at: u64::MAX,
            work_ms,
        };
        self.leases.insert(offer.lease_id, lease);
    }

    /// Its own time: what is left of a renewal that was sent at `sent`, by a clock that may be wrong.
    fn own_end(&self, sent: u64, remaining_ms: u64) -> u64 {
        let own = remaining_ms.saturating_mul(MS) / MILLION * (MILLION - 2 * RHO_PPM);
        sent.saturating_add(own / self.rate * MILLION)
    }

    fn renewed(&mut self, sequence: u64, answers: &[LeaseRenewed]) {
        let Some(mut wish) = self.wishes.remove(&sequence) else {
            return;
        };
        for one in answers {
            let Some(id) = Id::parse(&one.lease.id) else {
                continue;
            };
            let Some(pending) = wish.pending.remove(&id) else {
                continue;
            };
            let fence = one.lease.fence;
            if one.renewed {
                let until = self.own_end(wish.sent, one.remaining_ms);
                let value = json!({"lease": id.to_string(), "fence": fence, "until": until});
                self.cluster.complete(&pending, Kind::Ok, answer(value));
                self.cluster.world.reach("lease-renewed");
                let now = self.now();
                if let Some(lease) = self.leases.get_mut(&id)
                    && !lease.stopped
                {
                    lease.until = lease.until.max(until);
                    lease.done_at = lease.done_at.min(now + lease.work_ms * MS);
                }
            } else if one.retry {
                self.unknown(&pending);
            } else {
                self.cluster.complete(&pending, Kind::Fail, refused(&one.code));
                self.ends(id, fence);
            }
        }
        for pending in wish.pending.values() {
            self.unknown(pending);
        }
    }

    fn answered(&mut self, word: &WorkerAnswer) {
        let Some(said) = Id::parse(&word.request_id).and_then(|request| self.said.remove(&request)) else {
            return;
        };
        if word.retry {
            return self.unknown(&said.pending);
        }
        let kind = if word.accepted { Kind::Ok } else { Kind::Fail };
        let given = if word.accepted {
            Answer::default()
        } else {
            refused(&word.code)
        };
        self.cluster.complete(&said.pending, kind, given);
        let Some(lease) = self
            .leases
            .get_mut(&said.lease)
            .filter(|lease| lease.stage == said.stage)
        else {
            return;
        };
        match (said.stage, word.accepted) {
            (Stage::Offered, true) => {
                lease.next(Stage::Running);
                lease.renew_at = 0;
            }
            (Stage::Finishing, true) => lease.next(Stage::Cleaning),
            (Stage::Cleaning, _) => {
                self.leases.remove(&said.lease);
            }
            (Stage::Offered | Stage::Finishing, false) => {
                let fence = lease.fence;
                self.ends(said.lease, fence);
            }
            (Stage::Running, _) => {}
        }
    }

    /// The cluster says that a lease is over.
    fn told_over(&mut self, id: Id, fence: u64, reason: &str) {
        if self.leases.contains_key(&id) {
            return self.ends(id, fence);
        }
        if reason == "unclean" && self.said_clean.contains(&id) {
            self.says_clean(id, fence);
        } else if reason == "unclean" {
            // Before it has said that nothing is left nothing may be given to it, and it takes its time to look.
            let say_at = self.now() + chance::between(0, 3_000) * MS;
            self.unclean.entry(id).or_insert((fence, say_at));
        }
    }

    /// It is over, whatever its worker wants: all of it dies, and then it is cleaned up.
    fn ends(&mut self, id: Id, fence: u64) {
        self.stop(id);
        if let Some(lease) = self.leases.get_mut(&id)
            && lease.fence == fence
            && lease.stage != Stage::Cleaning
        {
            lease.next(Stage::Cleaning);
        }
    }

    fn stop(&mut self, id: Id) {
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        if std::mem::replace(&mut lease.stopped, true) {
            return;
        }
        let value = json!({"lease": id.to_string(), "fence": lease.fence});
        let stop = self.cluster.invoke("stop", value, None, None);
        self.cluster.complete(&stop, Kind::Ok, Answer::default());
    }

    /// One write of a lease's work, whatever the clock says.
    fn write(&mut self, id: Id) {
        let Some(lease) = self
            .leases
            .get(&id)
            .filter(|lease| lease.until > 0 && !lease.stopped)
        else {
            return;
        };
        let places = [format!("run {}", lease.run), format!("slot {}", lease.slot)];
        let value = json!({"run": lease.run.to_string(), "slot": lease.slot, "fence": lease.fence});
        let write = self.cluster.invoke("touch", value, None, None);
        let looks = self.cluster.world.broken() != Some(Break::IgnoreFence);
        let taken = self.cluster.resource.write(&places, lease.fence, looks);
        if !taken {
            self.cluster.world.reach("write-behind-fence");
        }
        let kind = if taken { Kind::Ok } else { Kind::Fail };
        self.cluster.complete(&write, kind, Answer::default());
    }

    /// Works, and stops what is over by its own clock.
    fn look(&mut self) {
        let now = self.now();
        let ids: Vec<Id> = self.leases.keys().copied().collect();
        for id in ids {
            let Some(lease) = self.leases.get(&id) else {
                continue;
            };
            if lease.stopped || lease.stage != Stage::Running || lease.until == 0 {
                continue;
            }
            let (fence, over, done) = (lease.fence, now >= lease.until, now >= lease.done_at);
            if over {
                self.cluster.world.reach("lease-over-by-own-clock");
                if chance::percent(25) {
                    self.wakes_late(id, now);
                } else {
                    self.ends(id, fence);
                }
            } else if done {
                self.stop(id);
                if let Some(lease) = self.leases.get_mut(&id) {
                    lease.next(Stage::Finishing);
                }
            } else if chance::percent(30) {
                self.write(id);
            }
        }
    }

    /// A worker that was stopped with a result in its hand: it says it when it wakes up, whatever became of the lease.
    fn wakes_late(&mut self, id: Id, now: u64) {
        self.stop(id);
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.next(Stage::Finishing);
            lease.said_at = Some(now + chance::between(0, 4_000) * MS);
        }
    }

    /// Says what is to be said.
    fn speak(&mut self) {
        if !self.reported || self.line.is_none() {
            return;
        }
        let now = self.now();
        self.clean_up(now);
        let ids: Vec<Id> = self.leases.keys().copied().collect();
        let mut wanted = Vec::new();
        for id in ids {
            let Some(lease) = self.leases.get_mut(&id) else {
                continue;
            };
            if lease.stage == Stage::Running && !lease.stopped {
                if now >= lease.renew_at {
                    lease.renew_at = now + lease.ttl_ms * MS / 4;
                    wanted.push((id, lease.fence));
                }
            } else if lease.said_at.is_none_or(|at| now >= at + AGAIN) && lease.stage != Stage::Running {
                lease.said_at = Some(now);
                self.say_stage(id);
            }
        }
        if !wanted.is_empty() {
            self.renew(&wanted);
        }
    }

    /// Says that nothing is left of an earlier life.
    fn clean_up(&mut self, now: u64) {
        let due = |(_, (_, at)): &(&Id, &(u64, u64))| *at <= now;
        let due: Vec<Id> = self.unclean.iter().filter(due).map(|(id, _)| *id).collect();
        for id in due {
            let Some((fence, _)) = self.unclean.remove(&id) else {
                continue;
            };
            self.cluster.world.reach("worker-cleaned-unknown");
            self.says_clean(id, fence);
        }
    }

    fn says_clean(&mut self, id: Id, fence: u64) {
        self.said_clean.insert(id);
        let named = LeaseName {
            id: id.to_string(),
            fence,
        };
        self.says(fleet::fresh(), Statement::Cleaned(named, clean()));
    }

    /// It dies with all that it runs, and comes back knowing nothing.
    fn die(&mut self) {
        self.cluster.world.reach("worker-died");
        self.leave();
        let begun: Vec<Id> = self.leases.keys().copied().collect();
        for id in begun {
            self.stop(id);
        }
        self.leases.clear();
    }

    fn renew(&mut self, wanted: &[(Id, u64)]) {
        self.sequence += 1;
        let at = self.line.as_ref().map(|line| line.at);
        let mut pending = BTreeMap::new();
        let mut leases = Vec::new();
        for (id, fence) in wanted {
            let value = json!({"lease": id.to_string(), "fence": fence});
            pending.insert(*id, self.cluster.invoke("renew", value, at, None));
            leases.push(LeaseName {
                id: id.to_string(),
                fence: *fence,
            });
        }
        let sent = self.now();
        self.wishes.insert(self.sequence, Wish { sent, pending });
        let sequence = self.sequence;
        self.send(FromWorker::Renew { sequence, leases });
    }

    /// The word of a lease's stage, for the first time or again.
    fn say_stage(&mut self, id: Id) {
        let Some(lease) = self.leases.get(&id) else { return };
        let (stage, request) = (lease.stage, lease.request);
        let named = LeaseName {
            id: id.to_string(),
            fence: lease.fence,
        };
        let mut value = json!({"lease": named.id, "fence": named.fence});
        let (f, statement) = match stage {
            Stage::Offered | Stage::Running => {
                value["run"] = lease.run.to_string().into();
                value["slot"] = lease.slot.clone().into();
                ("accept", Statement::Accept(named))
            }
            Stage::Finishing => {
                value["outcome"] = "succeeded".into();
                ("finish", Statement::Finish(named, Box::new(succeeded())))
            }
            Stage::Cleaning => {
                self.said_clean.insert(id);
                ("clean", Statement::Cleaned(named, clean()))
            }
        };
        if let Some(before) = self.said.remove(&request) {
            // Not answered: the same is said again.
            self.unknown(&before.pending);
        }
        let at = self.line.as_ref().map(|line| line.at);
        let pending = self.cluster.invoke(f, value, at, Some(request));
        let lease = id;
        self.said.insert(
            request,
            Said {
                lease,
                stage,
                pending,
            },
        );
        self.says(request, statement);
    }
}
