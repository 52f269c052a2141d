//! Approvals of pairing requests: opened, decided and ended by what happens to the request, in the same
//! entry.

use super::decide::{check_four_eyes, close, end, open};
use super::store::forget;
use super::{Approval, ApprovalState, Prompt, PromptOption, Risk, Scope, Subject, approval};
use crate::check;
use crate::ids::Id;
use crate::pairing::Request;
use crate::reject::Reject;
use crate::txn::Txn;

/// Opens the approval of a new pairing request, under its id. `minted_by` is the actor who minted its code.
pub(crate) fn open_pairing(txn: &mut Txn<'_>, new: &Request, minted_by: &str) -> Result<(), Reject> {
    if approval(txn, new.id).is_some() {
        return Err(check::invalid("the pairing id", &"it exists already"));
    }
    forget(txn);
    let name = if new.device_name.is_empty() {
        "a machine"
    } else {
        &new.device_name
    };
    let option = |id: &str, label: &str, allow| PromptOption {
        id: id.to_owned(),
        label: label.to_owned(),
        allow,
        scope: Scope::Once as i32,
    };
    let prompt = Prompt {
        title: format!("{name} asks to be paired as node {}", new.device_id),
        // Whoever is let in wrongly holds a certificate of the cluster.
        risk: Risk::High as i32,
        summary: format!(
            "Check digits {}; key {}; from {}, by {}",
            new.sas,
            new.csr_spki,
            new.source,
            new.method().as_str()
        ),
        options: vec![
            option("allow", "Let it in: a certificate is issued", true),
            option("deny", "Turn it away", false),
        ],
    };
    let waiting = Approval {
        id: new.id,
        prompt,
        requested_by: minted_by.to_owned(),
        expires_at: new.expires_at,
        ..Approval::default()
    };
    open(txn, Subject::Pairing, new.id, waiting);
    Ok(())
}

/// Refuses the operator who minted the code of a request, while four eyes are required.
pub(crate) fn check_pairing(txn: &Txn<'_>, pairing_id: Id) -> Result<(), Reject> {
    match approval(txn, pairing_id) {
        Some(found) => check_four_eyes(txn, &found),
        None => Ok(()),
    }
}

/// Ends the approval of a pairing request as the request ends.
pub(crate) fn close_pairing(txn: &mut Txn<'_>, pairing_id: Id, state: ApprovalState, reason: &str) {
    let waits = |found: &Approval| found.state() == ApprovalState::Pending;
    let Some(found) = approval(txn, pairing_id).filter(waits) else {
        return;
    };
    if state == ApprovalState::Allowed {
        let allowed = Approval {
            over_at: txn.now,
            ..found.clone()
        };
        close(txn, &found, allowed, state, reason);
    } else {
        end(txn, found, state, reason);
    }
}
