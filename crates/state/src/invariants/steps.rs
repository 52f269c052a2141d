//! Rules about a step: what an entry may do to the state before it.

use super::{Findings, Violation, all};
use crate::actor::Actor;
use crate::apply::Applied;
use crate::cluster::ReplicaStatus;
use crate::command::{Command, Envelope};
use crate::identity::{self, CertificateStatus, DeviceStatus};
use crate::ids::Id;
use crate::nodes::NodeStatus;
use crate::read::Read;
use crate::{access, cluster, dispatch, meta, nodes, tables};

/// Keys with a tag up to this one are bookkeeping and journal; the others are what the domains hold.
const BOOKKEEPING: u8 = 0x0F;

/// Checks one entry: the state before it, the state after it, and what it said. Empty when all holds.
#[must_use]
pub fn check_step(
    before: &dyn Read,
    after: &dyn Read,
    envelope: &Envelope,
    applied: &Applied,
) -> Vec<Violation> {
    let mut findings = Findings::default();
    effects_are_said(envelope, applied, &mut findings);
    actor_was_valid(before, envelope, applied, &mut findings);
    bookkeeping_goes_forward(before, after, applied, &mut findings);
    ends_are_final(before, after, &mut findings);
    bans_are_final(before, after, applied, &mut findings);
    a_used_certificate_is_alone(after, envelope, applied, &mut findings);
    results_come_from_their_epoch(before, envelope, applied, &mut findings);
    nodes_are_waited_for(before, after, &mut findings);
    super::authorities::check_step(before, after, &mut findings);
    slots_are_kept(before, after, &mut findings);
    super::approvals::check_step(before, after, envelope, &mut findings);
    super::workers::check_step(before, after, applied, &mut findings);
    super::leases::check_step(before, after, envelope, applied, &mut findings);
    findings.found
}

/// Commands that change something without a row of the journal: renewals, of which there are thousands a second,
/// and pieces of files.
const UNSAID: [&str; 2] = ["leases.renew", "leases.put_artifact"];

fn effects_are_said(envelope: &Envelope, applied: &Applied, findings: &mut Findings) {
    let changes = applied.writes.keys().filter(|key| key[0] > BOOKKEEPING).count();
    let unsaid = UNSAID.contains(&envelope.command.name());
    let quiet = applied.reply.is_err() || applied.duplicate;
    findings.expect(
        "a refusal or a repetition changes nothing",
        !quiet || changes == 0,
        || format!("{changes} changes with {:?}", applied.reply),
    );
    findings.expect(
        "every journal row matches a change",
        applied.rows.is_empty() == (changes == 0) || (unsaid && applied.rows.is_empty()),
        || format!("{} rows for {changes} changes", applied.rows.len()),
    );
}

fn actor_was_valid(before: &dyn Read, envelope: &Envelope, applied: &Applied, findings: &mut Findings) {
    if applied.rows.is_empty() {
        return;
    }
    let clock = meta::clock(before).max(applied.rows[0].at_ms);
    let valid = identity::is_valid(before, &envelope.actor, clock);
    findings.expect(
        "no effect by an actor after its revocation",
        valid.is_ok(),
        || format!("{} did {}: {valid:?}", envelope.actor, envelope.command.name()),
    );
}

/// Whoever had an effect did so under a certificate that is in use from then on.
fn a_used_certificate_is_alone(
    after: &dyn Read,
    envelope: &Envelope,
    applied: &Applied,
    findings: &mut Findings,
) {
    let (Actor::Node { fingerprint, .. } | Actor::Operator { fingerprint, .. }) = envelope.actor else {
        return;
    };
    let used = identity::certificate_by_fingerprint(after, fingerprint);
    let waits = used.is_some_and(|used| used.status() == CertificateStatus::Issued);
    findings.expect(
        "a certificate that was used is in use",
        applied.rows.is_empty() || !waits,
        || fingerprint.to_string(),
    );
}

fn results_come_from_their_epoch(
    before: &dyn Read,
    envelope: &Envelope,
    applied: &Applied,
    findings: &mut Findings,
) {
    let Command::Dispatch(dispatch::Command {
        action: Some(dispatch::Action::Complete(command)),
    }) = &envelope.command
    else {
        return;
    };
    let now = meta::clock(before).max(applied.rows.first().map_or(0, |row| row.at_ms));
    let open = dispatch::dispatch(before, command.dispatch_id)
        .filter(|found| !found.state().is_terminal() && now < found.deadline_at);
    let Some(open) = open else { return };
    let bound = Some((open.device_id, open.epoch));
    let reporter = match envelope.actor {
        Actor::Node { device_id, .. } => Some((device_id, command.epoch)),
        _ => None,
    };
    let holds = applied.rows.is_empty() || bound == reporter;
    findings.expect("a result comes from the bound epoch", holds, || {
        format!("{bound:?} {reporter:?}")
    });
}

/// More is with a node after an entry than before it only within the limits that hold then; a node that lowers its
/// limits keeps what it has.
fn slots_are_kept(before: &dyn Read, after: &dyn Read, findings: &mut Findings) {
    for node in all(after, &tables::NODES) {
        let id = node.device_id;
        let bound = |r| dispatch::queue_length(r, id).bound;
        let slots = dispatch::device_slots(&node);
        let kept = bound(after) <= slots.max(bound(before));
        findings.expect("a node is given what it has slots for", kept, || {
            format!("{id}: {} of {slots}", bound(after))
        });
        for capability in &node.capabilities {
            let bound = |r| dispatch::load(r, id, &capability.name).bound;
            let slots = dispatch::capability_slots(&node, &capability.name);
            let kept = bound(after) <= slots.max(bound(before));
            findings.expect("a capability is given what it has slots for", kept, || {
                format!("{id} {}: {} of {slots}", capability.name, bound(after))
            });
        }
    }
}

fn bookkeeping_goes_forward(before: &dyn Read, after: &dyn Read, applied: &Applied, findings: &mut Findings) {
    let (old, new) = (meta::meta(before), meta::meta(after));
    findings.expect("the clock never goes back", new.clock >= old.clock, || {
        format!("{} {}", old.clock, new.clock)
    });
    findings.expect("the index rises", new.index > old.index, || {
        format!("{} {}", old.index, new.index)
    });
    findings.expect(
        "every entry moves the hash",
        new.state_hash != old.state_hash,
        || new.state_hash.to_string(),
    );
    let mut last = old.journal_last;
    for row in &applied.rows {
        let rises = row.cursor() > last || old.journal_head.is_zero();
        findings.expect("cursors strictly increase", rises, || {
            format!("{last:?} {:?}", row.cursor())
        });
        last = row.cursor();
    }
    let (old, new) = (cluster::cluster(before), cluster::cluster(after));
    let (Some(old), Some(new)) = (old, new) else {
        return;
    };
    findings.equal("a cluster keeps its id", "id", new.cluster_id, old.cluster_id);
    let rises = new.next_replica_id >= old.next_replica_id && new.feature_level >= old.feature_level;
    findings.expect("counters never go back", rises, || format!("{old:?} {new:?}"));
}

fn ends_are_final(before: &dyn Read, after: &dyn Read, findings: &mut Findings) {
    for old in all(before, &tables::DISPATCHES) {
        let new = dispatch::dispatch(after, old.id);
        let kept = match &new {
            // A late result is noted once, and nothing else of it changes.
            Some(new) => {
                let known = dispatch::Dispatch {
                    late: new.late.clone(),
                    ..old.clone()
                };
                !old.state().is_terminal() || (*new == known && (old.late.is_none() || new.late == old.late))
            }
            None => old.state().is_terminal(),
        };
        findings.expect("a dispatch ends exactly once", kept, || {
            format!("{old:?} {new:?}")
        });
        // What waits for its next attempt is bound to none.
        let bound = new.filter(|new| new.state() != dispatch::State::Queued);
        let epoch = bound.map_or(old.epoch, |new| new.epoch);
        findings.expect("tokens strictly increase", epoch >= old.epoch, || {
            old.id.to_string()
        });
    }
    for old in all(before, &tables::DEVICES) {
        let revoked =
            |r| identity::device(r, old.id).map(|device| device.status()) == Some(DeviceStatus::Revoked);
        let kept = match old.status() {
            DeviceStatus::Revoked => revoked(after) || identity::ban(after, old.id).is_some(),
            DeviceStatus::Trusted => {
                identity::device(after, old.id).is_some() || identity::ban(after, old.id).is_some()
            }
        };
        findings.expect("a revoked device stays revoked", kept, || old.id.to_string());
        let counter = identity::device(after, old.id).map_or(u64::MAX, |new| new.counter);
        findings.expect(
            "counters of devices never go down",
            counter >= old.counter,
            || format!("{} {} {counter}", old.id, old.counter),
        );
    }
    for old in all(before, &tables::CERTIFICATES) {
        let ended = |status| matches!(status, CertificateStatus::Superseded | CertificateStatus::Revoked);
        let new = identity::certificate_by_fingerprint(after, old.fingerprint);
        let kept = !ended(old.status()) || new.is_none_or(|new| ended(new.status()));
        findings.expect("an ended certificate stays ended", kept, || {
            old.fingerprint.to_string()
        });
    }
    for old in all(before, &tables::REPLICAS) {
        let removed = cluster::replica(after, old.id).map(|new| new.status()) == Some(ReplicaStatus::Removed);
        let kept = old.status() != ReplicaStatus::Removed || removed;
        findings.expect("a removed replica stays removed", kept, || old.id.to_string());
    }
    for old in all(before, &tables::NODES) {
        let removed = identity::ban(after, old.device_id).is_some();
        let epoch = match nodes::node(after, old.device_id) {
            None if removed => continue,
            new => new.map_or(0, |new| new.last_epoch),
        };
        findings.expect("tokens strictly increase", epoch >= old.last_epoch, || {
            old.device_id.to_string()
        });
    }
    for old in all(before, &tables::OPERATORS) {
        let kept = access::operator(after, &old.name).is_some();
        findings.expect("operators are never forgotten", kept, || old.name.clone());
    }
    pairings_are_final(before, after, findings);
}

/// A ban goes only by being purged, in an entry that says so.
fn bans_are_final(before: &dyn Read, after: &dyn Read, applied: &Applied, findings: &mut Findings) {
    for old in all(before, &tables::BANS) {
        let name = old.id.to_string();
        let purged = applied
            .rows
            .iter()
            .any(|row| row.action == "identity.device_purged" && row.subject == name);
        let kept = identity::ban(after, old.id) == Some(old);
        findings.expect("a ban stays until it is purged", kept || purged, || name.clone());
    }
}

/// Nobody is given up before it is late: by time from suspect to offline and from offline to gone, or because it
/// left, was revoked, or was paired anew.
fn nodes_are_waited_for(before: &dyn Read, after: &dyn Read, findings: &mut Findings) {
    let clock = meta::clock(after);
    for old in all(before, &tables::NODES) {
        let Some(new) = nodes::node(after, old.device_id) else {
            continue;
        };
        let (from, to) = (old.status(), new.status());
        if from == to {
            continue;
        }
        let was_due = old.due_at != 0 && old.due_at <= clock;
        // Revoked or paired anew: it does not come back with what it had.
        let closed = new.due_at == 0;
        let holds = match (from, to) {
            (_, NodeStatus::Online) => new.session.is_some(),
            (_, NodeStatus::Suspect) => old.session.is_some(),
            (NodeStatus::Offline, NodeStatus::Gone) => was_due,
            (_, NodeStatus::Gone) | (NodeStatus::Gone, NodeStatus::Offline) => false,
            (_, NodeStatus::Offline) => was_due || closed || old.session.is_some(),
        };
        findings.expect("a node is given up when it is due", holds, || {
            format!("{} from {} to {}", old.device_id, from.as_str(), to.as_str())
        });
    }
}

fn pairings_are_final(before: &dyn Read, after: &dyn Read, findings: &mut Findings) {
    use crate::pairing::{CodeStatus, RequestStatus, code, request};
    for old in all(before, &tables::CODES) {
        let new = code(after, old.id);
        let kept = old.status() == CodeStatus::Open || new.as_ref().is_none_or(|new| *new == old);
        findings.expect("a closed code stays closed", kept, || format!("C{}", old.number));
    }
    for old in all(before, &tables::PAIRINGS) {
        let new: Option<RequestStatus> = request(after, old.id).map(|new| new.status());
        let kept = match old.status() {
            RequestStatus::PendingApproval => new.is_some() && new != Some(RequestStatus::Completed),
            RequestStatus::Approved => {
                matches!(
                    new,
                    None | Some(RequestStatus::Approved | RequestStatus::Completed)
                )
            }
            ended => new.is_none() || new == Some(ended),
        };
        let id: Id = old.id;
        findings.expect("a pairing request is decided once", kept, || {
            format!("{id} is {new:?}")
        });
    }
}
