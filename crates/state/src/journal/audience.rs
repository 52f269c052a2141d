//! Who may see which rows of the journal, action by action: a closed table, and what is not in it is seen by
//! operators and admins only.
//!
//! What never lives here: who asks (`control` has verified that). Invariants: a node sees rows about itself, about its
//! own dispatches, and the few facts of the cluster that it acts upon, never another node's; of a row that it sees it
//! learns the details that are listed and no others, neither which operator acted nor under which request; a viewer
//! sees every row, but not where strangers and replicas are. A row that is shown in part carries no hash: it would
//! not match.

use super::Row;
use crate::ids::{Digest, Id};

/// Which nodes see a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nodes {
    /// None.
    Nobody,
    /// The one that is its subject.
    Subject,
    /// The one that its detail `device` names.
    Device,
    /// All.
    All,
}

/// Who sees the rows of one action.
#[derive(Clone, Copy, Debug)]
pub struct Audience {
    /// The action.
    pub action: &'static str,
    /// Which nodes see it.
    pub nodes: Nodes,
    /// The details that these nodes see.
    pub shown: &'static [&'static str],
    /// The details that a viewer does not see.
    pub hidden: &'static [&'static str],
}

const fn of(action: &'static str, nodes: Nodes, shown: &'static [&'static str]) -> Audience {
    Audience {
        action,
        nodes,
        shown,
        hidden: &[],
    }
}

/// For operators alone: pairing is between them and a machine that has no certificate yet.
const fn operators(action: &'static str, hidden: &'static [&'static str]) -> Audience {
    Audience {
        action,
        nodes: Nodes::Nobody,
        shown: &[],
        hidden,
    }
}

/// Every action that is ever written, by name.
pub const AUDIENCES: &[Audience] = &[
    operators("access.operator_added", &[]),
    operators("access.operator_removed", &[]),
    operators("access.role_changed", &[]),
    operators("approval.decided", &[]),
    operators("approval.expired", &[]),
    operators("approval.lapsed", &[]),
    operators("approval.opened", &[]),
    operators("approval.policy_changed", &[]),
    operators("approval.withdrawn", &[]),
    operators("ca.acknowledged", &[]),
    operators("ca.authority_certified", &[]),
    operators("ca.authority_retired", &[]),
    operators("ca.authority_rotated", &[]),
    operators("ca.crl_published", &[]),
    operators("ca.replica_ready", &[]),
    of("ca.root_retired", Nodes::All, &["root"]),
    of("ca.rotation_advanced", Nodes::All, &["from", "to"]),
    operators("ca.rotation_asked", &[]),
    of("ca.rotation_begun", Nodes::All, &["root", "phase"]),
    of("ca.rotation_reverted", Nodes::All, &["from", "to"]),
    operators("cluster.feature_level", &[]),
    operators("cluster.genesis", &[]),
    operators("cluster.join_token_minted", &[]),
    of("cluster.replica_admitted", Nodes::All, &["name"]),
    operators("cluster.replica_allocated", &["peer"]),
    operators("cluster.replica_certificate", &[]),
    operators("cluster.replica_level", &[]),
    Audience {
        action: "cluster.replica_moved",
        nodes: Nodes::All,
        shown: &["node", "enrol"],
        hidden: &["peer"],
    },
    of("cluster.replica_removed", Nodes::All, &["name"]),
    operators("cluster.replica_staleness", &[]),
    of("cluster.replica_status", Nodes::All, &["name", "from", "to"]),
    of(
        "dispatch.assigned",
        Nodes::Device,
        &["device", "epoch", "attempt"],
    ),
    of(
        "dispatch.attempt_ended",
        Nodes::Device,
        &["device", "attempt", "epoch", "why", "not_before"],
    ),
    of(
        "dispatch.awaiting_local_mediation",
        Nodes::Device,
        &["device", "epoch", "prompt"],
    ),
    of(
        "dispatch.cancelling",
        Nodes::Device,
        &["device", "epoch", "reason", "until"],
    ),
    of(
        "dispatch.finished",
        Nodes::Device,
        &["state", "device", "capability", "epoch", "reason", "error"],
    ),
    of("dispatch.ready", Nodes::Device, &["device", "attempts"]),
    of("dispatch.rebound", Nodes::Device, &["device", "epoch"]),
    of(
        "dispatch.result_late",
        Nodes::Device,
        &["device", "state", "outcome", "error", "size"],
    ),
    of("dispatch.resumed", Nodes::Device, &["device", "epoch"]),
    of(
        "dispatch.submitted",
        Nodes::Device,
        &["device", "capability", "state", "deadline_at", "priority"],
    ),
    operators("fleet.policy_set", &[]),
    operators("grant.activated", &[]),
    operators("grant.created", &[]),
    operators("grant.denied", &[]),
    operators("grant.expired", &[]),
    operators("grant.revoked", &[]),
    operators("grant.used", &[]),
    of("identity.certificate_in_use", Nodes::Subject, &["fingerprint"]),
    of(
        "identity.certificate_renewed",
        Nodes::Subject,
        &["fingerprint", "not_after"],
    ),
    // A copy reads the feed of the machine that it is a copy of.
    operators("identity.clone_cleared", &[]),
    operators("identity.clone_suspected", &[]),
    of("identity.device_purged", Nodes::Subject, &[]),
    of(
        "identity.device_recovered",
        Nodes::Subject,
        &["fingerprint", "not_after"],
    ),
    of("identity.device_removed", Nodes::Subject, &["reason"]),
    of("identity.device_revoked", Nodes::Subject, &["reason"]),
    operators("identity.operator_certificate_renewed", &[]),
    operators("identity.operator_certificate_revoked", &[]),
    operators("identity.policy_changed", &[]),
    of("identity.rotation_completed", Nodes::Subject, &["fingerprint"]),
    of(
        "identity.rotation_requested",
        Nodes::Subject,
        &["reason", "deadline_at"],
    ),
    of(
        "lease.accepted",
        Nodes::Device,
        &["device", "run", "attempt", "slot", "fence"],
    ),
    of(
        "lease.cleaned",
        Nodes::Device,
        &["device", "run", "fence", "ok", "message"],
    ),
    of(
        "lease.ended",
        Nodes::Device,
        &["device", "run", "reason", "slot", "fence", "clean"],
    ),
    of(
        "lease.ending",
        Nodes::Device,
        &["device", "run", "reason", "slot", "fence", "deadline_at"],
    ),
    of(
        "lease.granted",
        Nodes::Device,
        &[
            "device",
            "run",
            "tool",
            "attempt",
            "slot",
            "fence",
            "epoch",
            "deadline_at",
        ],
    ),
    of(
        "lease.rebound",
        Nodes::Device,
        &["device", "run", "fence", "epoch"],
    ),
    of(
        "lease.reconciled",
        Nodes::Subject,
        &["device", "epoch", "held", "kept", "end"],
    ),
    // Why an operator did it is between operators: the worker is told that it ends.
    of("lease.revoked", Nodes::Device, &["device", "run", "fence"]),
    of(
        "node.attached",
        Nodes::Subject,
        &["epoch", "replica", "transport"],
    ),
    of("node.detached", Nodes::Subject, &["epoch", "replica", "reason"]),
    of("node.gone", Nodes::Subject, &["reason"]),
    of("node.offline", Nodes::Subject, &["reason"]),
    of("node.registered", Nodes::Subject, &["generation"]),
    of(
        "node.session_superseded",
        Nodes::Subject,
        &["epoch", "replica", "by_epoch"],
    ),
    operators("pairing.approved", &[]),
    operators("pairing.attempt", &["source"]),
    operators("pairing.code_burned", &["source"]),
    operators("pairing.code_expired", &[]),
    operators("pairing.code_minted", &[]),
    operators("pairing.code_revoked", &[]),
    operators("pairing.completed", &[]),
    operators("pairing.proof_failed", &["source"]),
    operators("pairing.proved", &["source"]),
    operators("pairing.rejected", &[]),
    operators("pairing.request_expired", &[]),
    of("run.cancelling", Nodes::Device, &["device", "lease", "fence"]),
    of(
        "run.file_arrived",
        Nodes::Device,
        &["device", "run", "digest", "size", "fence"],
    ),
    of(
        "run.file_dropped",
        Nodes::Device,
        &["device", "run", "digest", "size", "fence", "is"],
    ),
    of(
        "run.finished",
        Nodes::Device,
        &[
            "device",
            "lease",
            "tool",
            "state",
            "attempt",
            "fence",
            "why",
            "exit_code",
            "error",
        ],
    ),
    operators("run.input_complete", &[]),
    of(
        "run.requeued",
        Nodes::Device,
        &["device", "lease", "attempt", "fence", "why"],
    ),
    operators("run.submitted", &[]),
    of(
        "worker.attestation_refused",
        Nodes::Subject,
        &["code", "severity", "message", "quarantined"],
    ),
    of(
        "worker.attested",
        Nodes::Subject,
        &["evidence", "expires_at", "slots", "tools"],
    ),
    of("worker.challenged", Nodes::Subject, &["epoch", "expires_at"]),
    of("worker.cleaned", Nodes::Subject, &["lease"]),
    of("worker.cleanup_asked", Nodes::Subject, &["reason"]),
    of("worker.cleanup_vouched", Nodes::Subject, &["reason"]),
    of(
        "worker.drain_asked",
        Nodes::Subject,
        &["reason", "until", "forced"],
    ),
    of("worker.drained", Nodes::Subject, &["leases_ended"]),
    of("worker.failed", Nodes::Subject, &["lease", "message"]),
    of("worker.forgotten", Nodes::Subject, &["reason"]),
    of("worker.lifecycle", Nodes::Subject, &["from", "to", "reason"]),
    of("worker.lost", Nodes::Subject, &["orphaned", "leases_ended"]),
    of("worker.quarantine_lifted", Nodes::Subject, &["cause"]),
    of(
        "worker.quarantined",
        Nodes::Subject,
        &["cause", "reason", "lease"],
    ),
    of("worker.rechecked", Nodes::Subject, &["policy_version"]),
    of("worker.registered", Nodes::Subject, &["lifecycle"]),
    of("worker.released", Nodes::Subject, &["reason"]),
    of("worker.reverify_asked", Nodes::Subject, &["reason"]),
    of("worker.statement_expired", Nodes::Subject, &[]),
    of("worker.violation", Nodes::Subject, &["lease", "kind", "message"]),
];

/// Who sees the rows of an action; nothing when it is not in the table.
#[must_use]
pub fn audience(action: &str) -> Option<&'static Audience> {
    AUDIENCES.iter().find(|known| known.action == action)
}

/// Which node a row concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Concerns {
    /// None.
    Nobody,
    /// This one.
    Node(Id),
    /// Every one.
    All,
}

/// Which node a row is shown to.
#[must_use]
pub fn concerns(row: &Row) -> Concerns {
    let named = |text: &str| Id::parse(text).map_or(Concerns::Nobody, Concerns::Node);
    match audience(&row.action).map(|known| known.nodes) {
        None | Some(Nodes::Nobody) => Concerns::Nobody,
        Some(Nodes::Subject) => named(&row.subject),
        Some(Nodes::Device) => named(row.detail("device")),
        Some(Nodes::All) => Concerns::All,
    }
}

/// What this node sees of a row; nothing when it is not for it.
#[must_use]
pub fn for_node(row: &Row, device_id: Id) -> Option<Row> {
    let known = audience(&row.action)?;
    match concerns(row) {
        Concerns::All => {}
        Concerns::Node(id) if id == device_id => {}
        Concerns::Node(_) | Concerns::Nobody => return None,
    }
    let own = row.actor == format!("node/{device_id}");
    let kind = row.actor.split('/').next().unwrap_or_default();
    let mut detail = row.detail.clone();
    detail.retain(|name, _| known.shown.contains(&name.as_str()));
    Some(Row {
        index: row.index,
        ordinal: row.ordinal,
        at_ms: row.at_ms,
        actor: if own { row.actor.clone() } else { kind.to_owned() },
        action: row.action.clone(),
        subject: row.subject.clone(),
        request_id: if own { row.request_id } else { Id::ZERO },
        detail,
        prev_hash: Digest::ZERO,
        hash: Digest::ZERO,
    })
}

/// What a viewer sees of a row: all of it, unless something in it is for operators. An action that is not in the table
/// keeps its details to itself.
#[must_use]
pub fn for_viewer(row: &Row) -> Row {
    let hides = |name: &str| audience(&row.action).is_none_or(|known| known.hidden.contains(&name));
    let stranger = row.actor.starts_with("anonymous/");
    if !stranger && !row.detail.keys().any(|name| hides(name)) {
        return row.clone();
    }
    let mut seen = row.clone();
    if stranger {
        seen.actor = "anonymous".to_owned();
    }
    seen.detail.retain(|name, _| !hides(name));
    seen.prev_hash = Digest::ZERO;
    seen.hash = Digest::ZERO;
    seen
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn row(action: &str, actor: &str, subject: &str, detail: &[(&str, &str)]) -> Row {
        let detail = detail
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Row {
            index: 7,
            ordinal: 1,
            at_ms: 9,
            actor: actor.to_owned(),
            action: action.to_owned(),
            subject: subject.to_owned(),
            request_id: Id::from_bytes([7; 16]),
            detail: detail.collect::<BTreeMap<_, _>>(),
            prev_hash: Digest::of(b"before"),
            hash: Digest::of(b"this"),
        }
    }

    /// Literals of the form `domain.action` in the sources of this crate that are no commands.
    fn written() -> Vec<String> {
        fn collect(folder: &std::path::Path, found: &mut Vec<String>) {
            #[allow(clippy::disallowed_methods)]
            let entries = std::fs::read_dir(folder).unwrap();
            for entry in entries {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    collect(&path, found);
                } else if !path.ends_with("command.rs") && !path.ends_with("dedup.rs") {
                    #[allow(clippy::disallowed_methods)]
                    let text = std::fs::read_to_string(&path).unwrap();
                    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
                    found.extend(
                        text.split('"')
                            .filter(|piece| is_action(piece))
                            .map(str::to_owned),
                    );
                }
            }
        }
        fn is_action(piece: &str) -> bool {
            const DOMAINS: [&str; 12] = [
                "access", "approval", "ca", "cluster", "dispatch", "grant", "identity", "lease", "node",
                "pairing", "recovery", "run",
            ];
            let word = |text: &str| {
                text.chars()
                    .all(|symbol| symbol.is_ascii_lowercase() || symbol == '_')
            };
            piece
                .split_once('.')
                .is_some_and(|(domain, rest)| DOMAINS.contains(&domain) && !rest.is_empty() && word(rest))
        }
        let mut found = Vec::new();
        collect(&std::path::Path::new(".").join("src"), &mut found);
        found.sort();
        found.dedup();
        found
    }

    #[test]
    fn every_action_is_in_the_table_once_and_in_order() {
        let names: Vec<&str> = AUDIENCES.iter().map(|known| known.action).collect();
        assert!(names.windows(2).all(|pair| pair[0] < pair[1]), "{names:?}");
        let written = written();
        assert!(written.len() > 30, "{written:?}");
        for action in written {
            assert!(
                audience(&action).is_some(),
                "{action} is written to the journal: say in journal/audience.rs who sees it"
            );
        }
    }

    #[test]
    fn a_node_sees_its_own_and_nothing_of_another() {
        let (own, other) = (Id::from_bytes([1; 16]), Id::from_bytes([2; 16]));
        let device = own.to_string();
        let finished = row(
            "dispatch.finished",
            "operator/anna",
            "job",
            &[("device", &device), ("reason", "late"), ("replica", "3")],
        );
        let seen = for_node(&finished, own).unwrap();
        assert_eq!(
            (seen.actor.as_str(), seen.request_id),
            ("operator", Id::ZERO),
            "not who asked, and not under which request"
        );
        assert_eq!((seen.detail("reason"), seen.detail("replica")), ("late", ""));
        assert_eq!(seen.hash, Digest::ZERO, "it would not match");
        assert_eq!(for_node(&finished, other), None);
        let attached = row(
            "node.attached",
            &format!("node/{own}"),
            &device,
            &[("epoch", "7")],
        );
        assert_eq!(
            for_node(&attached, own).unwrap().actor,
            format!("node/{own}"),
            "what it did itself it may know"
        );
        assert_eq!(for_node(&attached, other), None);
    }

    #[test]
    fn facts_of_the_cluster_reach_every_node_without_what_is_inside() {
        let moved = row(
            "cluster.replica_moved",
            "operator/anna",
            "2",
            &[("node", "a:7441"), ("peer", "a:7444")],
        );
        let seen = for_node(&moved, Id::from_bytes([1; 16])).unwrap();
        assert_eq!((seen.detail("node"), seen.detail("peer")), ("a:7441", ""));
    }

    #[test]
    fn what_nobody_classified_is_for_operators() {
        let odd = row("odd.thing", "system", "x", &[("device", "y"), ("source", "z")]);
        assert_eq!(concerns(&odd), Concerns::Nobody);
        assert_eq!(for_node(&odd, Id::from_bytes([1; 16])), None);
        assert!(for_viewer(&odd).detail.is_empty());
    }

    #[test]
    fn a_viewer_sees_no_addresses_of_strangers() {
        let attempt = row(
            "pairing.attempt",
            "anonymous/192.0.2.7",
            "code",
            &[("source", "192.0.2.7"), ("number", "C4")],
        );
        let seen = for_viewer(&attempt);
        assert_eq!(
            (seen.actor.as_str(), seen.detail("source"), seen.detail("number")),
            ("anonymous", "", "C4")
        );
        assert_eq!(seen.hash, Digest::ZERO);
        let plain = row("node.registered", "node/x", "x", &[("generation", "1")]);
        assert_eq!(for_viewer(&plain), plain, "whole, with its hash");
    }
}
