//! `revocation`: devices are revoked while they talk, and their certificates are shown to every replica all the time.
//!
//! The first client revokes, one device after the other; a third of the others hold sessions and ping in them, the
//! rest probe: a new connection over gRPC or QUIC, and a call that the asked replica answers by itself, so that
//! one that is cut off shows what it believes. Conditions: `palyra_jepsen_check::revocation`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use palyra_client::new_ulid;
use palyra_proto::journal::v1::StreamEventsRequest;
use palyra_proto::node::v1 as wire;
use palyra_proto::node::v1::fleet_service_client::FleetServiceClient;
use palyra_proto::node::v1::server_message::Body as Heard;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::fleet;
use super::operator::{Asked, Operator, merge};
use super::session::{self, CALL, Papers, Session, Way};
use super::{Kind, Workload};
use crate::chance::Chance;
use crate::record;
use crate::run::Run;

pub(super) const KIND: Kind = Kind {
    name: "revocation",
    does: "devices that are revoked while they talk; certificates shown to every replica all the time",
    usual: &[
        "kill",
        "pause",
        "partition",
        "isolate-until-snapshot",
        "restart",
        "clock:jump",
        "clock:strobe",
        "cert-rotate",
        "disk:stall",
    ],
    make: || Box::new(Revocation::default()),
};

/// Devices that nobody revokes.
const KEPT: usize = 4;
/// From one revocation to the next.
const PERIOD: Duration = Duration::from_millis(2_500);
/// How long a device is held and probed before it is revoked.
const KNOWN: Duration = Duration::from_millis(1_200);
/// How long an answer may wait for the enforcement: longer than the authority of a silent replica lasts.
const ENFORCE_MS: u32 = 9_000;
/// A revoked certificate is tried for so long, and then now and then.
const HOT: Duration = Duration::from_secs(15);
/// Sessions of one client that holds some.
const SESSIONS: usize = 3;
/// A session that has lived so long makes room for another.
const LIFE: Duration = Duration::from_secs(10);
/// What a run is promised: a replica may serve for five seconds without having heard from a quorum; and one heartbeat.
const BOUND_MS: f64 = 6_000.0;

#[derive(Default)]
struct Revocation {
    pool: Mutex<Pool>,
    streams: AtomicU64,
}

#[derive(Default)]
struct Pool {
    /// Not revoked; the first [`KEPT`] never are.
    live: Vec<Papers>,
    /// The one that is revoked next.
    next: Option<Papers>,
    revoked: Vec<(Papers, Instant)>,
}

impl Pool {
    /// Whose certificate is shown next.
    fn probed(&self, chance: &mut Chance) -> Option<Papers> {
        let hot: Vec<&Papers> = self
            .revoked
            .iter()
            .filter(|(_, at)| at.elapsed() < HOT)
            .map(|(papers, _)| papers)
            .collect();
        match chance.below(100) {
            0..20 if self.next.is_some() => self.next.clone(),
            20..70 if !hot.is_empty() => Some((*chance.one(&hot)).clone()),
            70..75 if !self.revoked.is_empty() => Some(chance.one(&self.revoked).0.clone()),
            _ => {
                let kept = &self.live[..self.live.len().min(KEPT)];
                (!kept.is_empty()).then(|| chance.one(kept).clone())
            }
        }
    }
}

#[async_trait]
impl Workload for Revocation {
    fn name(&self) -> &'static str {
        "revocation"
    }

    /// It writes a few entries a second: a log that is to be outrun within a fault keeps few.
    fn settings(&self) -> &'static str {
        "[raft]\nsnapshot_entries = 100\nlog_entries = 20\n"
    }

    fn floors(&self) -> &'static [&'static str] {
        &["probe", "ping"]
    }

    async fn prepare(&self, run: &Arc<Run>) -> Result<()> {
        let wanted = run.settings.time.as_millis() / PERIOD.as_millis() + 2;
        let count = usize::try_from(wanted)?.min(300) + KEPT;
        let mut machines = Vec::new();
        for number in 1..=count {
            machines.push(fleet::pair(&run.cluster, &format!("d{number}")).await?);
        }
        let mut live = Vec::new();
        for machine in &machines {
            let papers = Papers::of(machine)?;
            let at = run.cluster.replicas().first().copied().unwrap_or(1);
            let connection = papers.connect(&run.cluster, at, Way::Grpc).await;
            let connection = connection.map_err(|end| anyhow::anyhow!("{}: {end:?}", machine.name))?;
            let registered = papers.register(&connection, Vec::new()).await;
            registered.map_err(|end| anyhow::anyhow!("{} can't register: {end:?}", machine.name))?;
            live.push(papers);
        }
        self.pool.lock().await.live = live;
        Ok(())
    }

    async fn client(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        match number {
            0 => self.revoke(run).await,
            _ if number % 3 == 1 => self.hold(run, number).await,
            _ => self.probe(run, number).await,
        }
    }

    async fn finish(&self, run: &Arc<Run>) -> Result<()> {
        // Whoever is not revoked must be accepted by each replica within ten seconds; whoever is, by none.
        sleep(Duration::from_secs(10)).await;
        let mut process = run.record.process();
        let pool = self.pool.lock().await;
        for at in run.cluster.replicas() {
            for papers in pool.live.iter().take(KEPT) {
                probe(run, &mut process, papers, at, Way::Grpc).await;
            }
            for (papers, _) in pool.revoked.iter().rev().take(20) {
                probe(run, &mut process, papers, at, Way::Grpc).await;
            }
        }
        Ok(())
    }

    fn bounds(&self) -> BTreeMap<String, f64> {
        let bounds = [
            ("revoked_ms", BOUND_MS),
            ("alone_ms", BOUND_MS),
            ("open_ms", 10_000.0),
        ];
        bounds.map(|(name, ms)| (name.to_owned(), ms)).into()
    }
}

impl Revocation {
    /// Revokes one device after the other.
    async fn revoke(&self, run: &Arc<Run>) -> Result<()> {
        let mut operator = Operator::new(run, "revoker")?;
        while run.is_loading() {
            let next = {
                let mut pool = self.pool.lock().await;
                if pool.live.len() <= KEPT {
                    return Ok(());
                }
                let next = pool.live.swap_remove(KEPT);
                pool.next = Some(next.clone());
                next
            };
            tokio::select! {
                () = sleep(KNOWN) => {},
                () = run.load_ended() => return Ok(()),
            }
            let began = Instant::now();
            {
                let mut pool = self.pool.lock().await;
                pool.next = None;
                pool.revoked.push((next.clone(), began));
            }
            revoke_one(&mut operator, &next.device).await;
            operator.roam(false);
            tokio::select! {
                () = tokio::time::sleep_until(began + PERIOD - KNOWN) => {},
                () = run.load_ended() => return Ok(()),
            }
        }
        Ok(())
    }

    /// Shows certificates.
    async fn probe(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        let mut chance = run.chance(&format!("prober {number}"));
        let mut process = run.record.process();
        while run.is_loading() {
            let papers = self.pool.lock().await.probed(&mut chance).context("no devices")?;
            let members = run.cluster.replicas();
            ensure!(!members.is_empty(), "there is no replica");
            let at = *chance.one(&members);
            let way = if chance.percent(30) { Way::Quic } else { Way::Grpc };
            probe(run, &mut process, &papers, at, way).await;
            run.pace(&mut chance).await;
        }
        Ok(())
    }

    /// Holds sessions, several at a time.
    async fn hold(&self, run: &Arc<Run>, number: u64) -> Result<()> {
        let mut chance = run.chance(&format!("holder {number}"));
        let mut sessions: JoinSet<()> = JoinSet::new();
        while run.is_loading() {
            while sessions.len() < SESSIONS {
                let pool = self.pool.lock().await;
                let papers = match &pool.next {
                    Some(next) if chance.percent(60) => next.clone(),
                    _ => chance.one(&pool.live).clone(),
                };
                drop(pool);
                let at = run.pick(&mut chance, None);
                let way = if chance.percent(50) { Way::Quic } else { Way::Grpc };
                let stream = self.streams.fetch_add(1, Ordering::Relaxed);
                sessions.spawn(hold_one(Arc::clone(run), papers, at, way, stream));
            }
            tokio::select! {
                ended = sessions.join_next() => ended.transpose().context("a session panicked")?.unwrap_or_default(),
                () = run.load_ended() => {},
            }
        }
        while let Some(ended) = sessions.join_next().await {
            ended.context("a session panicked")?;
        }
        Ok(())
    }
}

async fn revoke_one(operator: &mut Operator, device: &str) {
    let request = new_ulid();
    let send = wire::RevokeDeviceRequest {
        request_id: request.clone(),
        device_id: device.to_owned(),
        reason: "jepsen".to_owned(),
        wait_ms: ENFORCE_MS,
    };
    let mut asked = Asked::change("revoke", json!({"device": device}), &request);
    asked.within = Duration::from_millis(u64::from(ENFORCE_MS) + 2_000);
    let revoked = operator.insist(
        asked,
        Duration::from_secs(20),
        |channel| {
            let send = send.clone();
            async move { FleetServiceClient::new(channel).revoke_device(send).await }
        },
        |done: &wire::RevokeDeviceResponse| {
            let pending: Vec<String> = done.pending.iter().map(|id| format!("r{id}")).collect();
            (
                json!({"enforced": pending.is_empty(), "pending": pending}),
                done.index,
            )
        },
    );
    drop(revoked.await);
}

/// A new connection with a certificate, and a call that the replica answers by what it knows itself.
async fn probe(run: &Run, process: &mut record::Process, papers: &Papers, at: u64, way: Way) {
    let how = if way == Way::Quic { "quic" } else { "grpc" };
    let value = json!({"device": papers.device, "how": how});
    let call = process.invoke("probe", value.clone(), Some(&format!("r{at}")), None);
    let answer = async {
        let connection = papers.connect(&run.cluster, at, way).await?;
        let events = wire::NodeEventsRequest {
            device_id: papers.device.clone(),
            events: Some(StreamEventsRequest::default()),
        };
        // Over QUIC the call is open before it is answered: only what the replica says counts.
        let first = async {
            let mut feed = connection.events(events).await?;
            feed.message().await
        };
        match timeout(CALL, first).await {
            Ok(Ok(Some(_))) => Ok(()),
            Ok(Ok(None)) => Err(session::End::Lost("the feed ended".to_owned())),
            Ok(Err(failure)) => Err(session::End::of(&failure)),
            Err(_) => Err(session::End::Lost("no answer".to_owned())),
        }
    };
    process.end(call, answered(value, answer.await.map_or_else(Some, |()| None)));
}

/// What an answer to a certificate is in the history.
fn answered(value: Value, refused: Option<session::End>) -> record::End {
    match refused {
        None => record::End::ok(merge(value, &json!({"accepted": true}))),
        Some(session::End::Lost(why)) => record::End::info(value, why),
        Some(end) => {
            let mut told = json!({"accepted": false, "reason": end.word()});
            if let session::End::Revoked(why) = &end {
                told["why"] = why.as_str().into();
            }
            record::End::ok(merge(value, &told))
        }
    }
}

/// One session, from its attach to its end, pinged all the time.
async fn hold_one(run: Arc<Run>, papers: Papers, at: u64, way: Way, stream: u64) {
    let node = format!("r{at}");
    let opened = async {
        let connection = papers.connect(&run.cluster, at, way).await?;
        let attach = wire::Attach {
            request_id: new_ulid(),
            ..Default::default()
        };
        let session = Session::attach(&connection, &papers.device, attach).await?;
        Ok::<_, session::End>((connection, session))
    };
    let (mut stream_process, mut process) = (run.record.process(), run.record.process());
    let value = json!({"device": papers.device, "stream": stream});
    let Ok((_connection, mut session)) = opened.await else {
        // That it is refused is what probes are for; not in a tight loop.
        sleep(Duration::from_millis(300)).await;
        return;
    };
    let open = stream_process.invoke("stream", value.clone(), Some(&node), None);
    let until = Instant::now() + LIFE;
    let mut sequence = 0;
    let end = loop {
        if Instant::now() >= until || !run.is_loading() {
            break "left".to_owned();
        }
        sequence += 1;
        let call = process.invoke("ping", value.clone(), Some(&node), None);
        let answer = ping(&mut session, sequence).await;
        let refused = answer.err();
        process.end(call, answered(value.clone(), refused.clone()));
        if let Some(end) = refused {
            break end.word();
        }
        sleep(session.interval.min(Duration::from_millis(400))).await;
    };
    stream_process.end(open, record::End::ok(merge(value, &json!({"end": end}))));
}

async fn ping(session: &mut Session, sequence: u64) -> Result<(), session::End> {
    session.beat(sequence).await?;
    let until = Instant::now() + CALL;
    while Instant::now() < until {
        match session.next(until - Instant::now()).await? {
            Some(Heard::Heartbeat(answer)) if answer.sequence >= sequence => return Ok(()),
            _ => {}
        }
    }
    Err(session::End::Lost("no answer to a heartbeat".to_owned()))
}
