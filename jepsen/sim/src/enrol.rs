//! Machines that pair: one code and two machines at two replicas, and two approvals at once.
//!
//! Never here: PAKE and certificates, which live at the edges, and what becomes of the machine then, see `revocation`.
//! The state machine decides who wins; that is what races here.

use std::rc::Rc;
use std::time::Duration;

use palyra_platform as platform;
use palyra_state::{Envelope, Id, Reply, pairing};

use crate::chance;
use crate::cluster::{Answer, Cluster, Phase};
use crate::fleet;
use crate::history::{Asked, Deed};
use crate::revocation;

/// Lets machines in and shuts them out, one after another, until faults end.
pub(crate) async fn door(cluster: Rc<Cluster>) {
    while cluster.phase.get() == Phase::Faults {
        if let Some((pairing, device)) = race_for_code(&cluster).await
            && let Some(by) = race_for_approval(&cluster, pairing, device).await
        {
            revocation::use_and_revoke(&cluster, device, by).await;
        }
        platform::sleep(Duration::from_millis(chance::between(50, 400))).await;
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

/// Two machines prove one code at two replicas at the same time. The request and the machine that won.
async fn race_for_code(cluster: &Cluster) -> Option<(Id, Id)> {
    let code = fleet::fresh();
    let minted = noted(
        cluster,
        cluster.any_member(),
        fleet::mint(code),
        Deed::Plain("mint"),
    )
    .await;
    minted.outcome.index()?;
    let run = async |device: Id| {
        let (at, attempt, pairing) = (cluster.any_member(), fleet::fresh(), fleet::fresh());
        let begin = fleet::begin(at, attempt, code, device);
        let begun = noted(cluster, at, begin, Deed::Plain("begin")).await;
        begun.outcome.index()?;
        let prove = fleet::prove(at, attempt, code, device, pairing);
        let proved = noted(cluster, at, prove, Deed::Prove { code }).await;
        proved.outcome.index().map(|_| (pairing, device))
    };
    let (one, other) = futures::join!(run(fleet::fresh()), run(fleet::fresh()));
    if one.is_some() != other.is_some() {
        cluster.world.reach("code-raced");
    }
    one.or(other)
}

/// Two operators approve the same request at two replicas, each with a certificate of that replica's. Whose counts.
async fn race_for_approval(cluster: &Cluster, pairing: Id, device: Id) -> Option<u64> {
    let run = async |by: u64| {
        let deed = Deed::Approve { pairing };
        let approve = fleet::approve(pairing, device, by);
        let approved = noted(cluster, cluster.any_member(), approve, deed).await;
        matches!(approved.reply, Some(Ok(Reply::Approved(_)))).then_some(by)
    };
    let (one, other) = futures::join!(run(1), run(2));
    if one.is_some() != other.is_some() {
        cluster.world.reach("approval-raced");
    }
    let by = one.or(other)?;
    // The request names the certificate that was promised.
    let fingerprint = fleet::fingerprint(device, by);
    let look = move |view: &palyra_replica::View| {
        pairing::request(view, pairing).is_some_and(|request| request.certificate == Some(fingerprint))
    };
    if let Some((_, false)) = cluster.read(cluster.any_member(), look).await {
        cluster.problem(format!(
            "pairing {pairing} was approved, and has another certificate"
        ));
    }
    Some(by)
}
