//! What a node makes of the operator's decision, and of a listener that lies about it.

use std::path::Path;
use std::sync::Arc;

use super::*;
use crate::enrol::tests::{Decision, Fake, Lie, Quiet, listener};

async fn pair_at(dir: &Path, method: PairMethod) -> Result<Paired> {
    let config = PairConfig {
        data_dir: dir.to_owned(),
        name: Some("m".to_owned()),
        method,
        wait: Duration::from_millis(400),
        replace: false,
    };
    pair(config, &Quiet).await
}

fn ticket(fake: &Arc<Fake>) -> PairMethod {
    PairMethod::Ticket(fake.ticket.to_text().unwrap())
}

async fn decided(decision: Decision) -> (tempfile::TempDir, Arc<Fake>, Result<Paired>) {
    let (fake, _) = listener(Lie::Nothing).await;
    *fake.decision.lock().unwrap() = decision;
    let dir = tempfile::tempdir().unwrap();
    let paired = pair_at(dir.path(), ticket(&fake)).await;
    (dir, fake, paired)
}

fn is_pending(dir: &Path) -> bool {
    dir.join(PENDING).exists()
}

#[tokio::test]
async fn an_approval_leaves_an_identity_and_nothing_else() {
    let (dir, fake, paired) = decided(Decision::Approved).await;
    let paired = paired.unwrap();
    assert_eq!(paired.cluster_id, fake.cluster.id);
    let home = Home::create(dir.path()).unwrap();
    assert_eq!(home.record().unwrap().unwrap().device_id, paired.device_id);
    assert!(!is_pending(dir.path()));
    let again = pair_at(dir.path(), ticket(&fake)).await.unwrap_err();
    assert_eq!(again.code, "N0105", "{again}");
}

#[tokio::test]
async fn a_certificate_that_is_not_this_machines_is_not_stored() {
    for decision in [Decision::OtherDevice, Decision::OtherKey, Decision::OtherCluster] {
        let (dir, fake, paired) = decided(decision).await;
        let error = paired.unwrap_err();
        assert_eq!(
            (error.code.as_str(), error.exit_code()),
            ("N0213", 3),
            "{decision:?}: {error}"
        );
        let home = Home::create(dir.path()).unwrap();
        assert!(home.record().unwrap().is_none(), "{decision:?}");
        // The proof is kept: once the cluster tells the truth, the pairing goes on.
        *fake.decision.lock().unwrap() = Decision::Approved;
        pair_at(dir.path(), PairMethod::Resume).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_over_is_told_and_forgotten() {
    for (decision, code) in [
        (Decision::Rejected, "N0211"),
        (Decision::Expired, "N0212"),
        (Decision::Forgotten, "N0214"),
    ] {
        let (dir, fake, paired) = decided(decision).await;
        let error = paired.unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert_eq!(error.message.contains("not ours"), code == "N0211", "{error}");
        assert!(
            !is_pending(dir.path()),
            "{decision:?} stands in the way of a new pairing"
        );
        *fake.decision.lock().unwrap() = Decision::Approved;
        pair_at(dir.path(), ticket(&fake)).await.unwrap();
    }
}

#[tokio::test]
async fn silence_is_no_indecision() {
    let (dir, fake, paired) = decided(Decision::Silence).await;
    let error = paired.unwrap_err();
    assert_eq!((error.code.as_str(), error.exit_code()), ("N0201", 4), "{error}");
    assert!(is_pending(dir.path()), "the proof is kept");
    *fake.decision.lock().unwrap() = Decision::Approved;
    pair_at(dir.path(), PairMethod::Resume).await.unwrap();
}
