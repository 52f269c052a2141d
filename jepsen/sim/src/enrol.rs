//! Machines that pair, in the words of `palyra_jepsen_check::pairing`: one code and two machines at two replicas, two
//! approvals at once, codes and requests that an operator takes back, and whoever is alone with a good code.
//!
//! Never here: PAKE and certificates, which live at the edges, and what becomes of the machine then, see `revocation`.
//! The state machine decides who wins; that is what races here. Invariant: at most [`SPENT_MAX`] attempts of a run may
//! count as failures, so that nobody is refused for those of others.

use std::rc::Rc;
use std::time::Duration;

use palyra_jepsen_check::Kind;
use palyra_jepsen_check::history::Answer as Told;
use palyra_platform as platform;
use palyra_state::{Envelope, Id, Reply, limits, pairing};
use serde_json::{Value, json};

use crate::chance;
use crate::cluster::{Answer, Cluster, Phase};
use crate::fleet;
use crate::history::{Asked, Deed, Outcome};
use crate::revocation;
use crate::tape::told;

/// Twenty attempts without a right proof within ten minutes close pairing for everybody; so many may be spent.
const SPENT_MAX: u64 = 14;

/// A code that is open.
#[derive(Clone, Copy)]
struct Code {
    id: Id,
    method: pairing::Method,
}

/// A machine whose proof was accepted.
#[derive(Clone, Copy)]
struct Proved {
    pairing: Id,
    device: Id,
}

/// Lets machines in and shuts them out, one after another, until faults end.
pub(crate) async fn door(cluster: Rc<Cluster>) {
    while cluster.phase.get() == Phase::Faults {
        if let Some(proved) = somebody(&cluster).await
            && let Some(by) = decided(&cluster, proved).await
        {
            revocation::use_and_revoke(&cluster, proved.device, by).await;
        }
        platform::sleep(Duration::from_millis(chance::between(50, 400))).await;
    }
}

/// Nothing is wrong any more: one machine alone with a good code, which must succeed and have its certificate.
pub(crate) async fn alone_at_last(cluster: &Cluster) {
    if let Some(code) = mint(cluster, pairing::Method::Pin).await
        && let Some(proved) = redeem(cluster, code, true).await
        && let Some(by) = approve(cluster, proved, 1).await
    {
        fetch(cluster, proved).await;
        cluster
            .world
            .note(&format!("{} was let in by {by}", proved.device));
    }
}

/// A command with its place in the history.
pub(crate) async fn noted(cluster: &Cluster, at: u64, envelope: Envelope, deed: Deed) -> Answer {
    cluster
        .ask_noted(at, envelope, |answer| Asked::Command {
            deed,
            request: answer.request,
        })
        .await
}

/// A machine with a new code; mostly it has a rival.
async fn somebody(cluster: &Cluster) -> Option<Proved> {
    // The loser of a race for a PIN counts as a failure.
    let pin = chance::percent(40) && cluster.spent.get() + 2 <= SPENT_MAX;
    let method = if pin {
        pairing::Method::Pin
    } else {
        pairing::Method::Ticket
    };
    let code = mint(cluster, method).await?;
    if chance::percent(10) {
        // Taken back before anybody comes.
        close(cluster, code).await;
        return redeem(cluster, code, false).await;
    }
    if chance::percent(25) {
        return redeem(cluster, code, true).await;
    }
    let (one, other) = futures::join!(redeem(cluster, code, false), redeem(cluster, code, false));
    if one.is_some() != other.is_some() {
        cluster.world.reach("code-raced");
    }
    one.or(other)
}

async fn mint(cluster: &Cluster, method: pairing::Method) -> Option<Code> {
    let code = Code {
        id: fleet::fresh(),
        method,
    };
    let value = json!({"method": method.as_str(), "ttl_ms": limits::CODE_TTL});
    let told = json!({"code": code.id.to_string()});
    let (at, mint) = (cluster.any_member(), fleet::mint(code.id, method));
    let minted = cluster
        .send(at, mint, Deed::Plain("mint"), ("mint", value), |_| told)
        .await;
    minted.outcome.index().map(|_| code)
}

async fn close(cluster: &Cluster, code: Code) {
    let value = json!({"code": code.id.to_string()});
    let (at, close) = (cluster.any_member(), fleet::close(code.id));
    cluster
        .send(at, close, Deed::Plain("close"), ("close", value), |_| json!({}))
        .await;
}

/// A new machine proves a code at one replica.
async fn redeem(cluster: &Cluster, code: Code, alone: bool) -> Option<Proved> {
    let at = cluster.any_member();
    let proved = Proved {
        pairing: fleet::fresh(),
        device: fleet::fresh(),
    };
    let is_pin = code.method == pairing::Method::Pin;
    let attempt = is_pin.then(fleet::fresh);
    let mut value = json!({"code": code.id.to_string(), "device": proved.device.to_string()});
    if alone {
        value["alone"] = true.into();
    }
    let prove = fleet::prove(at, attempt, code.id, proved.device, proved.pairing);
    let request = prove.request_id;
    let call = cluster.invoke("redeem", value.clone(), Some(at), Some(request));
    if let Some(attempt) = attempt {
        cluster.spent.set(cluster.spent.get() + 1);
        let begin = fleet::begin(at, attempt, code.id, proved.device);
        let begun = noted(cluster, at, begin, Deed::Plain("begin")).await;
        if begun.outcome.index().is_none() {
            // Without a proof nobody is let in.
            cluster.complete(&call, Kind::Fail, told(value));
            return None;
        }
    }
    let answer = noted(cluster, at, prove, Deed::Plain("prove")).await;
    let pairing = json!({"pairing": proved.pairing.to_string()});
    cluster.sent(&call, value, &answer, |_| pairing);
    answer.outcome.index()?;
    if is_pin {
        // A right proof takes its attempt off the count.
        cluster.spent.set(cluster.spent.get() - 1);
    }
    Some(proved)
}

/// What operators make of a request: whose certificate it has, when that was let in.
async fn decided(cluster: &Cluster, proved: Proved) -> Option<u64> {
    if chance::percent(8) {
        reject(cluster, proved).await;
        fetch(cluster, proved).await;
        return None;
    }
    // Two at two replicas, each with a certificate of that replica's. Whose counts.
    let (one, other) = futures::join!(approve(cluster, proved, 1), approve(cluster, proved, 2));
    if one.is_some() != other.is_some() {
        cluster.world.reach("approval-raced");
    }
    for _ in 0..chance::between(1, 2) {
        fetch(cluster, proved).await;
    }
    one.or(other)
}

async fn reject(cluster: &Cluster, proved: Proved) {
    let value = json!({"pairing": proved.pairing.to_string()});
    let (at, reject) = (cluster.any_member(), fleet::reject(proved.pairing));
    cluster
        .send(
            at,
            reject,
            Deed::Plain("reject"),
            ("reject", value),
            |_| json!({}),
        )
        .await;
}

/// An operator lets a machine in, with a certificate of `by`; now and then the same is sent again. Who signed, when it
/// counts.
async fn approve(cluster: &Cluster, proved: Proved, by: u64) -> Option<u64> {
    let approve = fleet::approve(proved.pairing, proved.device, by);
    let value = json!({"pairing": proved.pairing.to_string()});
    let (at, deed) = (cluster.any_member(), Deed::Plain("approve"));
    let asked = ("approve", value.clone());
    let answer = cluster.send(at, approve.clone(), deed, asked, certificate).await;
    answer.outcome.index()?;
    if chance::percent(20) {
        let at = cluster.any_member();
        let call = cluster.invoke("approve", value.clone(), Some(at), Some(approve.request_id));
        let mut again = cluster.ask(at, approve).await;
        if again.reply.is_none() {
            // That nobody took it this time does not undo what it did before.
            again.outcome = Outcome::Unknown;
        }
        cluster.sent(&call, value, &again, certificate);
    }
    matches!(answer.reply, Some(Ok(Reply::Approved(_)))).then_some(by)
}

fn certificate(answer: &Answer) -> Value {
    match &answer.reply {
        Some(Ok(Reply::Approved(approved))) => json!({"certificate": approved.fingerprint.to_string()}),
        _ => json!({}),
    }
}

/// The machine asks what became of its request.
async fn fetch(cluster: &Cluster, proved: Proved) {
    let Proved { pairing, device } = proved;
    let at = cluster.any_member();
    let mut value = json!({"pairing": pairing.to_string(), "device": device.to_string()});
    let call = cluster.invoke("fetch", value.clone(), Some(at), None);
    let look = move |view: &palyra_replica::View| {
        pairing::request(view, pairing).map(|found| (found.status(), found.certificate))
    };
    let Some((index, found)) = cluster.read(at, look).await else {
        return cluster.complete(&call, Kind::Fail, told(value));
    };
    value["state"] = found.map_or("unknown", |(status, _)| status.as_str()).into();
    if let Some((_, Some(certificate))) = found {
        value["certificate"] = certificate.to_string().into();
    }
    let answer = Told {
        value,
        rev: Some(index),
        ..Told::default()
    };
    cluster.complete(&call, Kind::Ok, answer);
}
