//! Revocations, one after the other: from the command to the last socket of the device, and to the answer; and what a
//! revoked certificate is worth afterwards, at each replica, also at one that is cut off from the others.
//!
//! What never lives here: the device's good will. Invariants: a try at a replica that can't be reached is no refusal,
//! and fails the run; a replica that is cut off is asked from inside its own network namespace.

mod device;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use palyra_client::Client;
use palyra_pki::tls::SharedTrust;
use palyra_proto::node::v1::RevokeDeviceRequest;
use serde_json::json;
use tokio::time::{Instant, timeout};

use crate::cluster::{Cluster, Place, Settings};
use crate::netns::{Inside, Net};
use crate::report::Report;
use crate::sim::Identity;
use crate::sim::pair::pair;
use crate::spread::{self, Spread};
use crate::{Keep, say};
use device::{Device, Tried, try_certificate, try_over_quic};

/// How long an answer may wait for the enforcement: longer than the authority of a silent replica lasts.
const ANSWER_WAIT_MS: u32 = 60_000;
/// For the sockets that are open still when the answer has come.
const LATE: Duration = Duration::from_secs(10);
const WHOLE: Duration = Duration::from_secs(60);

/// Arguments of `palyra-bench revoke`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Devices that are revoked while all replicas are up
    #[arg(long, default_value = "100")]
    count: u32,
    /// Devices that are revoked while one replica is cut off by nftables in a network namespace of its own; needs root
    #[arg(long, default_value = "0")]
    pub(crate) partitioned: u32,
}

/// A run under way.
struct Run {
    cluster: Cluster,
    client: Client,
    identities: Vec<Identity>,
    found: Found,
}

/// What all revocations of a run come to.
#[derive(Default)]
struct Found {
    accepted: u64,
    tried: u64,
    still_open: u64,
    still_live: u64,
}

/// The times of one kind of revocation.
struct Times {
    to_last_socket: Spread,
    to_session_end: Spread,
    to_answer: Spread,
    after_answer: Spread,
}

impl Times {
    fn new() -> Times {
        Times {
            to_last_socket: Spread::new(),
            to_session_end: Spread::new(),
            to_answer: Spread::new(),
            after_answer: Spread::new(),
        }
    }

    fn tell(&self, report: &mut Report, when: &str) {
        let columns: Vec<&str> = [&["what"][..], &spread::COLUMNS[..]].concat();
        let rows = [
            (
                "command to last socket closed, at replicas that are up",
                &self.to_last_socket,
            ),
            ("command to end of session", &self.to_session_end),
            ("command to answer", &self.to_answer),
            ("answer to a socket that closed after it", &self.after_answer),
        ];
        for (what, spread) in rows {
            let cells = [vec![json!(format!("{when}: {what}"))], spread.cells()].concat();
            report.row("revocations", &columns, cells);
        }
    }
}

/// Runs it.
pub(crate) async fn run(args: Args, keep: Keep) -> Result<Report> {
    let net = match args.partitioned {
        0 => None,
        _ => Some(Net::build(3).await?),
    };
    let places = net
        .as_ref()
        .map_or_else(Place::loopback, |net| Ok(net.places()))?;
    let cluster = Cluster::start(None, places, Settings::new()).await?;
    let wanted = usize::try_from(args.count + args.partitioned)?;
    say(&format!("pairing {wanted} devices"));
    let identities = identities(&cluster, &cluster.dir().join("nodes.jsonl"), wanted).await?;
    let mut run = Run {
        client: cluster.client()?,
        cluster,
        identities,
        found: Found::default(),
    };
    let mut report = Report::new("revoke");
    if args.count > 0 {
        run.all_up(args.count, &mut report).await?;
    }
    if let Some(net) = &net {
        run.partitioned(args.partitioned, net, &mut report).await?;
    }
    let Found {
        accepted,
        tried,
        still_open,
        still_live,
    } = run.found;
    let found = format!("{accepted} of {tried} tries");
    report.promise(
        "after the answer no replica accepts the certificate",
        accepted == 0,
        found,
    );
    let found = format!("{still_open} after {} s", LATE.as_secs());
    report.promise("no socket of a revoked device stays open", still_open == 0, found);
    let found = format!("{still_live} after {} s", LATE.as_secs());
    report.promise("no session of a revoked device goes on", still_live == 0, found);
    report.note("a device holds a session at one replica and an idle connection at each other one");
    if args.partitioned > 0 {
        report.note(
            "cut off: the operator's client may be connected to the replica that is cut off, and then spends up to \
             5 s on finding out; the rest is the time after which a silent replica's authority has lapsed",
        );
    }
    keep.end(run.cluster).await?;
    Ok(report)
}

async fn identities(cluster: &Cluster, file: &Path, count: usize) -> Result<Vec<Identity>> {
    let credentials = pair(cluster, file, count).await?;
    let Some(first) = credentials.first() else {
        return Ok(Vec::new());
    };
    let trust = SharedTrust::new(first.trust()?);
    credentials
        .iter()
        .map(|credential| Identity::load(credential, &trust))
        .collect()
}

impl Run {
    fn next_identity(&mut self) -> Result<Identity> {
        self.identities.pop().context("more revocations than devices")
    }

    /// All replicas are up; every other device has its session over QUIC.
    async fn all_up(&mut self, count: u32, report: &mut Report) -> Result<()> {
        let (mut over_grpc, mut over_quic) = (Times::new(), Times::new());
        let ids = self.cluster.ids();
        for number in 0..count {
            let identity = self.next_identity()?;
            let home = ids[usize::try_from(number / 2)? % ids.len()];
            let mut device = Device::new(identity);
            let times = if number.is_multiple_of(2) {
                device
                    .hold_session(&self.cluster.node_address(home), None)
                    .await?;
                &mut over_grpc
            } else {
                device.hold_quic_session(&self.cluster.quic_address(home)).await?;
                &mut over_quic
            };
            for other in ids.iter().filter(|id| **id != home) {
                device.hold_connection(&self.cluster.node_address(*other)).await?;
            }
            self.revoke(&device, times).await?;
            for id in &ids {
                let tried = try_certificate(&device.identity, &self.cluster.node_address(*id), None).await?;
                self.judge(&device, *id, tried)?;
                let tried = try_over_quic(&device.identity, &self.cluster.quic_address(*id)).await;
                self.judge(&device, *id, tried)?;
            }
            if (number + 1) % 25 == 0 {
                say(&format!("revoked {} of {count}", number + 1));
            }
        }
        report.fact("revoked_with_all_replicas_up", count);
        over_grpc.tell(report, "all up, session over gRPC");
        over_quic.tell(report, "all up, session over QUIC");
        Ok(())
    }

    /// One replica after the other is cut off; the device's session is there, and the device on its side of the cut.
    async fn partitioned(&mut self, count: u32, net: &Net, report: &mut Report) -> Result<()> {
        let mut times = Times::new();
        let ids = self.cluster.ids();
        let insides: Vec<Inside> = ids.iter().map(|id| net.inside(*id)).collect::<Result<_>>()?;
        for number in 0..count {
            let at = usize::try_from(number)? % ids.len();
            let (cut, inside) = (ids[at], &insides[at]);
            let leader = self.cluster.settled(WHOLE).await?.leader_id;
            let mut device = Device::new(self.next_identity()?);
            device
                .hold_session(&self.cluster.node_address(cut), Some(inside))
                .await?;
            for other in ids.iter().filter(|id| **id != cut) {
                device.hold_connection(&self.cluster.node_address(*other)).await?;
            }
            net.cut(cut).await?;
            let took = self.revoke(&device, &mut times).await;
            let mut tried = Vec::new();
            for id in &ids {
                let inside = (*id == cut).then_some(inside);
                tried.push((
                    *id,
                    try_certificate(&device.identity, &self.cluster.node_address(*id), inside).await,
                ));
            }
            net.heal(cut).await?;
            let led = if leader == cut { " (it led)" } else { "" };
            say(&format!(
                "cut off {cut}{led}: answered after {:.1} s",
                took?.as_secs_f64()
            ));
            for (id, tried) in tried {
                self.judge(&device, id, tried?)?;
            }
            // It was told nothing of the revocation while it was cut off; now it is.
            if timeout(LATE, device.cut_off.last_end()).await.is_err() {
                self.found.still_open += 1;
            }
        }
        report.fact("revoked_with_one_replica_cut_off", count);
        times.tell(report, "one cut off");
        Ok(())
    }

    /// Revokes a device. Answers how long the answer took.
    async fn revoke(&mut self, device: &Device, times: &mut Times) -> Result<Duration> {
        let request = RevokeDeviceRequest {
            device_id: device.identity.device_id.clone(),
            reason: "palyra-bench".to_owned(),
            wait_ms: ANSWER_WAIT_MS,
            ..Default::default()
        };
        let began = Instant::now();
        let answer = self.client.revoke_device(request).await?;
        let answered = Instant::now();
        ensure!(
            answer.pending.is_empty(),
            "the answer of {} s leaves replicas {:?} pending",
            answered.duration_since(began).as_secs(),
            answer.pending
        );
        times.to_answer.record(answered - began);
        match timeout(LATE, device.sockets.last_end()).await {
            Ok(last) => {
                times.to_last_socket.record(last.saturating_duration_since(began));
                if last > answered {
                    times.after_answer.record(last - answered);
                }
            }
            Err(_) => self.found.still_open += 1,
        }
        match timeout(LATE, device.session.last_end()).await {
            Ok(ended) => times
                .to_session_end
                .record(ended.saturating_duration_since(began)),
            Err(_) => self.found.still_live += 1,
        }
        Ok(answered - began)
    }

    fn judge(&mut self, device: &Device, replica: u64, tried: Tried) -> Result<()> {
        self.found.tried += 1;
        match tried {
            Tried::Refused(_) => Ok(()),
            Tried::Accepted => {
                say(&format!(
                    "replica {replica} accepted the revoked {}",
                    device.identity.device_id
                ));
                self.found.accepted += 1;
                Ok(())
            }
            Tried::Unreachable(cause) => {
                anyhow::bail!("replica {replica} could not be asked about a revoked certificate: {cause}")
            }
        }
    }
}
