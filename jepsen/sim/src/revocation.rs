//! Devices that are revoked while they talk, and probers that show their certificates to every replica all the time,
//! as TLS would: also to those that are cut off, that have just started, and whose clocks are wrong.
//!
//! What must hold. (a) When a revocation is answered as carried out everywhere, nobody accepts the certificate any
//! more. (b) However it was answered: from `max_staleness` after anybody knew of it, nobody does; a replica that has
//! missed it has missed the quorum for as long, and serves no node. (c) A session that was open then is served no
//! more. (d) None of this by refusing everyone: at the end each replica accepts what is not revoked. Never here: who
//! is let in, see `enrol`.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use palyra_control::{Control, Error, Inbound, Outbound};
use palyra_jepsen_check::Kind;
use palyra_jepsen_check::history::Answer as Told;
use palyra_pki::PeerIdentity;
use palyra_platform as platform;
use palyra_state::access::Role;
use palyra_state::{Code, Id, Reply};
use serde_json::{Value, json};

use crate::agents;
use crate::chance;
use crate::cluster::{Cluster, Phase};
use crate::enrol::noted;
use crate::fleet;
use crate::history::Deed;
use crate::line::Line;

/// Devices whose certificates are shown at any time: the newest ones.
const SHOWN: usize = 4;
/// What may lie between a replica's clock of boot time and ours, in thousandths; beyond it drift is no drift.
const DRIFT: u64 = 60;
/// How long a healed replica may take until it serves nodes.
const OPEN_WITHIN: Duration = Duration::from_secs(10);

/// A device whose certificate is shown.
struct Shown {
    device: Id,
    peer: PeerIdentity,
    /// From this virtual millisecond on no replica may accept it, and why.
    closed: Option<(u64, &'static str)>,
}

/// What probers know.
#[derive(Default)]
pub(crate) struct Probed(RefCell<BTreeMap<Id, Shown>>);

impl Probed {
    /// Shows a device's certificate from now on, and the oldest one no more.
    fn show(&self, device: Id, peer: PeerIdentity) {
        let mut shown = self.0.borrow_mut();
        if shown.len() == SHOWN {
            shown.pop_first();
        }
        let closed = None;
        shown.insert(device, Shown { device, peer, closed });
    }

    /// From `at` on it may not be accepted; the earliest moment counts.
    fn close(&self, device: Id, at: u64, why: &'static str) {
        if let Some(shown) = self.0.borrow_mut().get_mut(&device)
            && shown.closed.is_none_or(|(before, _)| at < before)
        {
            shown.closed = Some((at, why));
        }
    }

    fn any(&self) -> Option<(Id, PeerIdentity)> {
        let shown = self.0.borrow();
        let at = usize::try_from(chance::below(shown.len() as u64)).ok()?;
        let found = shown.values().nth(at)?;
        Some((found.device, found.peer.clone()))
    }

    fn closed(&self, device: Id) -> Option<(u64, &'static str)> {
        self.0.borrow().get(&device)?.closed
    }
}

/// What a replica makes of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Probe {
    Accepted,
    Revoked,
    Stale,
    /// For any other reason: it does not know the certificate yet, or its clock says that its time has not come.
    Refused,
}

fn probe(control: &Control, peer: &PeerIdentity) -> Probe {
    // As a listener does: the connection first, then the call on it.
    let accepted = control.accept(peer, "10.1.0.9");
    let called = control.admit_node(peer);
    match called {
        Ok(_) if accepted.is_ok() => Probe::Accepted,
        // Neither without the other, unless the state changed in between, which it does not here.
        Ok(_) => Probe::Refused,
        Err(Error::Stale { .. }) => Probe::Stale,
        Err(Error::Rejected(reject)) if reject.kind() == Code::DeviceRevoked => Probe::Revoked,
        Err(_) => Probe::Refused,
    }
}

/// When a revocation that was known at `known` binds every replica.
fn bound(cluster: &Cluster, known: u64) -> u64 {
    known + bound_ms(cluster)
}

/// How long after a revocation is known a replica may accept the device, at most.
pub(crate) fn bound_ms(cluster: &Cluster) -> u64 {
    let staleness = u64::try_from(cluster.timings.max_staleness.as_millis()).unwrap_or(u64::MAX);
    staleness + staleness * DRIFT / 1_000 + 1
}

/// Shows certificates to replicas until the run is over, and then sees that they are not refused for nothing.
pub(crate) async fn prober(cluster: Rc<Cluster>) {
    while cluster.phase.get() != Phase::Over {
        platform::sleep(Duration::from_millis(chance::between(10, 80))).await;
        let Some((device, peer)) = cluster.probed.any() else {
            continue;
        };
        // Those that were removed and do not know it yet as well.
        let at = cluster.any_running();
        if chance::percent(10) {
            ran_out(&cluster, at, device, peer.clone()).await;
        }
        let shown = peer.clone();
        let invoked = cluster.world.elapsed_ms();
        let value = json!({"device": device.to_string(), "how": "grpc"});
        let call = cluster.invoke("probe", value, Some(at), None);
        let Some(found) = cluster
            .call(at, |control| async move { probe(&control, &shown) })
            .await
        else {
            cluster.complete(&call, Kind::Info, Told::default());
            continue;
        };
        let reason = if found == Probe::Revoked {
            "revoked"
        } else {
            "another"
        };
        let value = json!({"accepted": found == Probe::Accepted, "reason": reason});
        cluster.complete(&call, Kind::Ok, answer(value));
        judge(&cluster, at, device, invoked, found);
    }
}

/// A certificate that ran out long ago, by whatever clock, on a connection that is open still.
async fn ran_out(cluster: &Cluster, at: u64, device: Id, peer: PeerIdentity) {
    let over = PeerIdentity {
        not_before_ms: 1,
        not_after_ms: 2,
        ..peer
    };
    let called = cluster.call(
        at,
        move |control| async move { control.admit_node(&over).is_ok() },
    );
    if called.await == Some(true) {
        cluster.problem(format!(
            "revocation.expired-refused: r{at} serves {device} under a certificate that ran out"
        ));
    }
}

fn judge(cluster: &Cluster, at: u64, device: Id, invoked: u64, found: Probe) {
    match found {
        Probe::Accepted => {
            cluster.world.reach("probe-accepted");
            if let Some((closed, why)) = cluster.probed.closed(device)
                && invoked > closed
            {
                cluster.problem(format!(
                    "revocation.enforced: r{at} accepts {device} at {invoked} ms; {why} at {closed} ms"
                ));
            }
        }
        Probe::Revoked => {
            cluster.world.reach("probe-revoked");
            // Whoever says so has applied it: it is committed.
            let binds = bound(cluster, cluster.world.elapsed_ms());
            cluster
                .probed
                .close(device, binds, "a replica's word of its revocation bound all");
        }
        Probe::Stale => cluster.world.reach("probe-stale"),
        Probe::Refused => {}
    }
}

/// The device registers, attaches, gets work, and is revoked while it goes on talking.
pub(crate) async fn use_and_revoke(cluster: &Cluster, device: Id, by: u64) {
    let actor = fleet::node(device, by);
    let peer = fleet::node_peer(&cluster.papers, device, by);
    cluster.probed.show(device, peer.clone());
    let write = |value| fleet::write(actor.clone(), device, value);
    let deed = || Deed::ByDevice { device };
    let registered = noted(cluster, cluster.any_member(), write(1), deed()).await;
    if registered.outcome.index().is_none() {
        return;
    }
    let mut line = None;
    if chance::percent(60) {
        line = Line::open(cluster, cluster.any_member(), peer, device, &[]).await;
        let dispatch = fleet::fresh();
        let submit = fleet::submit(dispatch, device, fleet::ONCE, 10, 20_000);
        agents::submit(cluster, submit, dispatch, device, fleet::ONCE).await;
    }
    let talk = async {
        for value in 2..5 {
            noted(cluster, cluster.any_member(), write(value), deed()).await;
        }
    };
    let (complete, ()) = futures::join!(revoke(cluster, device), talk);
    let Some(complete) = complete else { return };
    if complete && let Some(line) = line {
        is_closed(cluster, device, line).await;
    }
    let late = noted(cluster, cluster.any_member(), write(9), deed()).await;
    if matches!(late.reply, Some(Err(_))) {
        cluster.world.reach("revoked-was-refused");
    }
}

/// [`revoke_anyhow`], with its place in the shared history.
async fn revoke(cluster: &Cluster, device: Id) -> Option<bool> {
    let value = json!({"device": device.to_string()});
    let call = cluster.invoke("revoke", value, None, None);
    let complete = revoke_anyhow(cluster, device).await;
    match complete {
        Some(enforced) => cluster.complete(&call, Kind::Ok, answer(json!({"enforced": enforced}))),
        None => cluster.complete(&call, Kind::Info, Told::default()),
    }
    complete
}

fn answer(value: Value) -> Told {
    Told {
        value,
        ..Told::default()
    }
}

/// Revokes: as a command, or as an operator does who waits until it is carried out. `None` when nobody knows whether it
/// was; otherwise whether it is carried out everywhere.
async fn revoke_anyhow(cluster: &Cluster, device: Id) -> Option<bool> {
    if chance::percent(40) {
        let revoke = fleet::revoke(device);
        let revoked = noted(cluster, cluster.any_member(), revoke, Deed::Revoke { device }).await;
        if let Some(Ok(Reply::Revoked(reply))) = &revoked.reply
            && reply.cancelled > 0
        {
            cluster.world.reach("revoked-with-dispatches");
        }
        revoked.outcome.index()?;
        let binds = bound(cluster, cluster.world.elapsed_ms());
        cluster
            .probed
            .close(device, binds, "the answer to its revocation bound all");
        return Some(false);
    }
    let operator = fleet::operator_peer(&cluster.papers);
    let wait = chance::between(1, 8_000);
    let at = cluster.any_member();
    let asked = cluster.call(at, move |control| async move {
        let caller = control.admit_operator(&operator, Role::Operator)?;
        control
            .revoke_device(&caller, "", &device.to_string(), "lost", wait)
            .await
    });
    let revocation = asked.await?.ok()?;
    let now = cluster.world.elapsed_ms();
    let complete = revocation.pending.is_empty();
    cluster.world.note(&format!(
        "r{at}: {device} is revoked at index {}, carried out by {:?}, not by {:?}",
        revocation.index, revocation.enforced, revocation.pending
    ));
    if complete {
        cluster.world.reach("revocation-complete");
        cluster
            .probed
            .close(device, now, "its revocation was answered as complete");
    } else {
        cluster.world.reach("revocation-pending");
        let binds = bound(cluster, now);
        cluster
            .probed
            .close(device, binds, "the answer to its revocation bound all");
    }
    Some(complete)
}

/// A session that was open is served no more: what is asked on it now is never answered.
async fn is_closed(cluster: &Cluster, device: Id, mut line: Line) {
    let sequence = u64::MAX;
    line.say(Inbound::Heartbeat { sequence });
    let until = platform::now() + Duration::from_millis(200);
    while platform::now() < until {
        match line.hear(Duration::from_millis(50)).await {
            Ok(Some(Outbound::Heartbeat { sequence: answered })) if answered == sequence => {
                return cluster.problem(format!(
                    "revocation.streams-close: r{} serves {device} after its revocation was answered as complete",
                    line.at
                ));
            }
            Err(_) => return cluster.world.reach("revoked-was-closed"),
            Ok(_) => {}
        }
    }
}

/// At the end each replica serves nodes again.
pub(crate) async fn opens(cluster: &Rc<Cluster>, device: Id) {
    let peer = fleet::node_peer(&cluster.papers, device, 0);
    let end = platform::now() + OPEN_WITHIN;
    for id in cluster.members() {
        loop {
            let shown = peer.clone();
            let found = cluster
                .call(id, |control| async move { probe(&control, &shown) })
                .await;
            if found == Some(Probe::Accepted) {
                break;
            }
            if platform::now() > end {
                return cluster.problem(format!(
                    "revocation.opens-again: healed, but r{id} accepts nobody: {found:?}"
                ));
            }
            platform::sleep(Duration::from_millis(100)).await;
        }
    }
}
