//! What replicas tell each other about the nodes that they hold: one digest a second to the leader, and the age of
//! what was last heard, for whoever asks.
//!
//! What never lives here: transitions. A replica ends its own sessions and tells the state (`ends`); the leader
//! ends those of lost replicas and gives up who is late (`reconcile`), and digests say when it may. Invariants: a
//! digest has a bounded size, whatever the replica holds, and makes no entry; an age is answered together with who
//! knows it, and "unknown" with why.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use palyra_platform::{self as platform, Instant};
use palyra_state::cluster::{self, Replica as Record};
use palyra_state::nodes::Node;
use palyra_state::{Id, Read};

use crate::caller::millis;
use crate::control::Control;
use crate::error::Error;
use crate::limits::{DIGEST_EVERY, DIGEST_KNOCKING, SEEN_TIMEOUT, Timings};
use crate::pace::SessionRefusal;
use crate::peers::{Answer, Call, Digest, DigestTaken, Seen, SeenAges, Silent};

/// When a node was last heard, and who says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastSeen {
    /// It never had a session.
    Never,
    /// In its live session.
    Live {
        /// Before the answer.
        age: Duration,
        /// The replica that holds the session.
        replica: u64,
    },
    /// At the end of its last session, as its record says.
    Recorded {
        /// Wall clock of the cluster.
        at_ms: u64,
    },
    /// It has a session, and its replica does not say.
    Unknown {
        /// That replica.
        replica: u64,
        /// How long it has not been heard, if anybody knows.
        silent_for: Option<Duration>,
    },
}

/// What this replica knows of the others.
#[derive(Debug, Default)]
pub(crate) struct Liveness {
    known: Mutex<Known>,
    /// What is in force here of `max_staleness`, in milliseconds; 0 before it was looked up.
    staleness: AtomicU64,
}

#[derive(Debug, Default)]
struct Known {
    /// As leader: the newest digest of each replica.
    digests: BTreeMap<u64, (Instant, Digest)>,
    /// When each replica's control plane was last heard.
    heard: BTreeMap<u64, Instant>,
    /// What the leader said last: how long it had not heard each replica.
    told: BTreeMap<u64, (Instant, Duration)>,
}

impl Liveness {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another replica asked or answered.
    pub(crate) fn heard(&self, id: u64) {
        self.lock().heard.insert(id, platform::now());
    }

    fn took(&self, from: u64, digest: Digest) {
        self.lock().digests.insert(from, (platform::now(), digest));
    }

    /// How old the newest digest of a replica is, of those that came after `since`.
    pub(crate) fn digest_age(&self, id: u64, since: Instant) -> Option<Duration> {
        let known = self.lock();
        let (at, _) = known.digests.get(&id).filter(|(at, _)| *at >= since)?;
        Some(at.elapsed())
    }

    /// Who waits to be attached somewhere else, as far as digests after `since` say; `None` when there are too many
    /// to name.
    pub(crate) fn knocking(&self, since: Instant) -> Option<Vec<Id>> {
        let known = self.lock();
        let fresh = known.digests.values().filter(|(at, _)| *at >= since);
        let mut all = Vec::new();
        for (_, digest) in fresh {
            if digest.more_knock {
                return None;
            }
            all.extend(digest.knocking.iter().copied());
        }
        Some(all)
    }

    fn silent_for(&self, id: u64) -> Option<Duration> {
        let known = self.lock();
        let own = known.heard.get(&id).map(Instant::elapsed);
        let told = known.told.get(&id).map(|(at, age)| *age + at.elapsed());
        own.into_iter().chain(told).min()
    }
}

impl Control {
    /// Tells the leader what is held here, once a second and whenever there is another leader, until this replica
    /// stops.
    pub(crate) async fn tell_digests(self) {
        let mut stopping = self.stopping();
        loop {
            if let Some(leader) = self.replica().leader()
                && leader != self.replica_id()
            {
                let asked = self.call_peer(leader, Call::Digest(self.digest()), DIGEST_EVERY);
                if let Ok(Answer::Digest(taken)) = asked.await {
                    self.note_silent(&taken);
                }
            }
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => return,
                () = self.replica().changed(DIGEST_EVERY) => {}
            }
        }
    }

    fn digest(&self) -> Digest {
        let (knocking, more_knock) = self.admission().knocking(DIGEST_KNOCKING);
        Digest {
            sessions: self.registry().count() as u64,
            knocking,
            more_knock,
        }
    }

    fn note_silent(&self, taken: &DigestTaken) {
        let now = platform::now();
        let told = taken.silent.iter().map(|silent| {
            let age = Duration::from_millis(silent.silent_for_ms);
            (silent.replica_id, (now, age))
        });
        self.liveness().lock().told = told.collect();
    }

    /// As leader: takes a digest in, and says who is not heard.
    pub(crate) fn take_digest(&self, from: u64, digest: Digest) -> DigestTaken {
        self.liveness().took(from, digest);
        let peers = self.replica().status().peers;
        let silent = peers.iter().filter_map(|peer| {
            let age = peer.silent_for?;
            (age > DIGEST_EVERY).then_some(Silent {
                replica_id: peer.id,
                silent_for_ms: millis(age),
            })
        });
        DigestTaken {
            silent: silent.collect(),
        }
    }

    /// How long a replica has not been heard, if anybody knows.
    fn silent_for(&self, id: u64) -> Option<Duration> {
        let peers = self.replica().status().peers;
        let led = peers
            .iter()
            .find(|peer| peer.id == id)
            .and_then(|peer| peer.silent_for);
        led.or_else(|| self.liveness().silent_for(id))
    }

    /// When each of these nodes was last heard: from this replica's sessions, from the records, and for the rest from
    /// the replicas that hold the sessions, one question to each.
    pub(crate) async fn last_seen(&self, nodes: &[Node]) -> Vec<LastSeen> {
        let mut elsewhere: BTreeMap<u64, Vec<(Id, u64)>> = BTreeMap::new();
        for node in nodes {
            if let Some(session) = &node.session
                && session.replica_id != self.replica_id()
            {
                let asked = elsewhere.entry(session.replica_id).or_default();
                asked.push((node.device_id, session.epoch));
            }
        }
        let answers = join_all(
            elsewhere
                .into_iter()
                .map(|(owner, asked)| self.ask_owner(owner, asked)),
        )
        .await;
        let answers: BTreeMap<Id, LastSeen> = answers.into_iter().flatten().collect();
        nodes
            .iter()
            .map(|node| match (&node.session, answers.get(&node.device_id)) {
                (_, Some(answer)) => *answer,
                (Some(session), None) => self.seen_here(node.device_id, session.epoch),
                (None, None) if node.last_seen_at == 0 => LastSeen::Never,
                (None, None) => LastSeen::Recorded {
                    at_ms: node.last_seen_at,
                },
            })
            .collect()
    }

    fn seen_here(&self, device_id: Id, epoch: u64) -> LastSeen {
        let replica = self.replica_id();
        match self.registry().last_seen(device_id, epoch) {
            Some(age) => LastSeen::Live { age, replica },
            None => LastSeen::Unknown {
                replica,
                silent_for: None,
            },
        }
    }

    async fn ask_owner(&self, owner: u64, asked: Vec<(Id, u64)>) -> Vec<(Id, LastSeen)> {
        let call = Call::Seen(Seen {
            devices: asked.iter().map(|(device, _)| *device).collect(),
            epochs: asked.iter().map(|(_, epoch)| *epoch).collect(),
        });
        let call = self.call_peer(owner, call, SEEN_TIMEOUT);
        let ages = match platform::timeout(SEEN_TIMEOUT, call).await {
            Ok(Ok(Answer::Seen(answer))) => answer.ages,
            _ => Vec::new(),
        };
        let answered = !ages.is_empty();
        let silent_for = if answered { None } else { self.silent_for(owner) };
        let ages = ages.into_iter().map(Some).chain(std::iter::repeat(None));
        let devices = asked.into_iter().map(|(device, _)| device);
        devices
            .zip(ages)
            .map(|(device, age)| {
                // One more than the age; 0 when the owner does not hold it any more.
                let seen = match age.and_then(|age| age.checked_sub(1)) {
                    Some(ms) => LastSeen::Live {
                        age: Duration::from_millis(ms),
                        replica: owner,
                    },
                    None => LastSeen::Unknown {
                        replica: owner,
                        silent_for,
                    },
                };
                (device, seen)
            })
            .collect()
    }

    /// Answers what another replica asks about sessions of this one.
    pub(crate) fn seen_ages(&self, ask: &Seen) -> SeenAges {
        let age = |(device, epoch): (&Id, &u64)| {
            let age = self.registry().last_seen(*device, *epoch);
            age.map_or(0, |age| millis(age).saturating_add(1))
        };
        SeenAges {
            ages: ask.devices.iter().zip(&ask.epochs).map(age).collect(),
        }
    }

    /// The `max_staleness` by which this replica serves: what is configured, but never more than the cluster has on
    /// record for it, for that is what a revocation waits for.
    pub(crate) fn staleness(&self) -> Duration {
        match self.liveness().staleness.load(Ordering::Acquire) {
            0 => self.timings().max_staleness,
            ms => Duration::from_millis(ms),
        }
    }

    /// Looks up what is on record. Called before anybody is served, and when replicas' records change.
    pub(crate) fn look_up_staleness(&self, view: &dyn Read) {
        let configured = self.timings().max_staleness;
        let recorded = cluster::replica(view, self.replica_id()).map_or(configured, |me| recorded(&me));
        let in_force = millis(configured.min(recorded)).max(1);
        self.liveness().staleness.store(in_force, Ordering::Release);
    }

    /// The longest `max_staleness` by which any replica may serve.
    pub(crate) fn largest_staleness(&self) -> Duration {
        let records = cluster::replicas(&self.replica().view());
        let recorded = records.iter().map(recorded);
        recorded.fold(self.staleness(), Duration::max)
    }

    /// Says so when replicas have announced different values.
    pub(crate) fn staleness_warning(&self, view: &dyn Read) -> Option<Error> {
        let members: Vec<Record> = cluster::replicas(view)
            .into_iter()
            .filter(|member| member.is_member() && member.max_staleness_ms != 0)
            .collect();
        let first = members.first()?.max_staleness_ms;
        if members.iter().all(|member| member.max_staleness_ms == first) {
            return None;
        }
        let values: Vec<String> = members
            .iter()
            .map(|member| format!("{} has {} ms", member.name, member.max_staleness_ms))
            .collect();
        let values = values.join(", ");
        Some(SessionRefusal::StalenessDiffers { values }.into())
    }
}

/// What a record says; a replica that has announced nothing serves by the default at most.
fn recorded(record: &Record) -> Duration {
    match record.max_staleness_ms {
        0 => Timings::default().max_staleness,
        ms => Duration::from_millis(ms),
    }
}
