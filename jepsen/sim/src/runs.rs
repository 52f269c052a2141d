//! Runs: an operator has them granted and approved, starts them, and sometimes takes them back; at the end each must
//! have come to its one end.
//!
//! Never here: who does the work, see `workers`.

use std::rc::Rc;
use std::time::Duration;

use palyra_jepsen_check::Kind;
use palyra_jepsen_check::history::Answer;
use palyra_platform as platform;
use palyra_state::approvals::GrantState;
use palyra_state::leases::{self, RunState};
use palyra_state::{Id, Reply};
use serde_json::json;

use crate::chance;
use crate::cluster::{Cluster, Phase};
use crate::enrol::noted;
use crate::fleet;
use crate::history::Deed;
use crate::tape::kind;

/// An operator who has work done under leases, until faults end.
pub(crate) async fn operator(cluster: Rc<Cluster>) {
    while cluster.phase.get() == Phase::Faults {
        platform::sleep(Duration::from_millis(chance::between(50, 500))).await;
        let Some(run) = granted(&cluster).await else {
            continue;
        };
        start(&cluster, run).await;
        if chance::percent(10) {
            platform::sleep(Duration::from_millis(chance::below(1_500))).await;
            cancel(&cluster, run).await;
        }
    }
}

/// A run that may be started.
async fn granted(cluster: &Cluster) -> Option<Id> {
    let (run, approval) = (fleet::fresh(), fleet::fresh());
    let create = fleet::grant(run, approval);
    let created = noted(cluster, cluster.any_member(), create, Deed::Plain("grant")).await;
    let Some(Ok(Reply::GrantCreated(created))) = created.reply else {
        return None;
    };
    if created.state() == GrantState::Pending {
        // Two who decide at once: it is decided once.
        let decide = async |allow| {
            let decide = fleet::decide(approval, allow);
            noted(cluster, cluster.any_member(), decide, Deed::Plain("decide")).await
        };
        let allow = chance::percent(90);
        let (one, other) = futures::join!(decide(true), decide(allow));
        let allowed = |answer: &crate::cluster::Answer| answer.outcome.index().is_some();
        if !allowed(&one) && !allowed(&other) {
            return None;
        }
    }
    Some(run)
}

async fn start(cluster: &Cluster, run: Id) {
    let again = chance::percent(60);
    let (ttl_ms, timeout_ms) = (chance::between(1_000, 3_000), chance::between(3_000, 9_000));
    let envelope = fleet::start(run, again, ttl_ms, timeout_ms);
    let at = cluster.any_member();
    let effect = if again { "idempotent" } else { "once" };
    let value = json!({"run": run.to_string(), "effect": effect, "max_attempts": if again { 3 } else { 1 }});
    let call = cluster.invoke("start", value, Some(at), Some(envelope.request_id));
    let started = noted(cluster, at, envelope, Deed::Plain("start")).await;
    cluster.complete(&call, kind(&started.outcome), Answer::default());
}

async fn cancel(cluster: &Cluster, run: Id) {
    let at = cluster.any_member();
    let envelope = fleet::cancel_run(run);
    let value = json!({"run": run.to_string()});
    let call = cluster.invoke("cancel-run", value, Some(at), Some(envelope.request_id));
    // Whether there was anything to take back is not told apart.
    let answer = cluster.ask(at, envelope).await;
    cluster.complete(&call, kind(&answer.outcome), Answer::default());
}

/// Waits until no run is open; false when that takes too long. Virtual time.
pub(crate) async fn ended(cluster: &Cluster, limit: Duration) -> bool {
    let end = platform::now() + limit;
    while platform::now() < end {
        let open = |view: &palyra_replica::View| {
            let mut open = RunState::ALL.into_iter().filter(|state| !state.is_terminal());
            open.any(|state| !leases::runs_in_state(view, state, None, 1).is_empty())
        };
        if let Some((_, false)) = cluster.read(cluster.any_member(), open).await {
            return true;
        }
        platform::sleep(Duration::from_millis(250)).await;
    }
    false
}

/// What became of each run, as the history says it at its end.
pub(crate) fn close(cluster: &Cluster, state: &dyn palyra_state::Read) {
    let started: Vec<Id> = {
        let tape = cluster.tape.borrow();
        let ops = tape.history().ops();
        let started = ops.iter().filter(|op| op.invoke.f == "start");
        started
            .filter_map(|op| Id::parse(op.invoke.value["run"].as_str()?))
            .collect()
    };
    for run in started {
        let name = run.to_string();
        let call = cluster.invoke("run", json!({"run": name}), None, None);
        let (kind, value) = match leases::run(state, run) {
            Some(found) => (
                Kind::Ok,
                json!({"run": name, "state": found.state().as_str(), "fence": found.fence}),
            ),
            None => (Kind::Fail, json!({"run": name})),
        };
        let answer = Answer {
            value,
            ..Answer::default()
        };
        cluster.complete(&call, kind, answer);
    }
}
