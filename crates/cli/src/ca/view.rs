//! How the authorities are printed.

use palyra_client::wall_ms;
use palyra_proto::ca::v1::{AuthorityInfo, MissingNode, ReplicaTrust, RootInfo, StatusResponse};
use serde::Serialize;

use crate::failure::Result;
use crate::output::time::Moment;
use crate::output::{Out, Source};

/// Hex digits of a fingerprint that a table shows.
const SHORT: usize = 16;

#[derive(Serialize)]
struct Status<'a> {
    phase: &'a str,
    phase_since: Moment,
    begun_by: &'a str,
    generation: u64,
    step: u64,
    acknowledged: Counts,
    roots: Vec<Root<'a>>,
    authorities: Vec<Authority<'a>>,
    replicas: Vec<Replica<'a>>,
    operators_missing: &'a [String],
    nodes_missing: Vec<Node<'a>>,
    warnings: &'a [String],
}

#[derive(Serialize)]
struct Counts {
    nodes: u64,
    nodes_of: u64,
    operators: u64,
    operators_of: u64,
    replicas: usize,
    replicas_of: usize,
}

#[derive(Serialize)]
struct Root<'a> {
    number: u32,
    fingerprint: &'a str,
    status: &'a str,
    not_after: Moment,
    added_at: Moment,
    added_by: &'a str,
    key_held: bool,
    retired_at: Moment,
}

#[derive(Serialize)]
struct Authority<'a> {
    replica_id: u64,
    replica: &'a str,
    number: u32,
    status: &'a str,
    fingerprint: &'a str,
    roots: &'a [u32],
    not_after: Moment,
    since: Moment,
    live_certificates: u64,
    last_not_after: Moment,
    rotation_asked: bool,
    crl_number: u64,
    crl_entries: u32,
    crl_next_update: Moment,
}

#[derive(Serialize)]
struct Replica<'a> {
    id: u64,
    name: &'a str,
    step: u64,
    ready: bool,
}

#[derive(Serialize)]
struct Node<'a> {
    device_id: &'a str,
    name: &'a str,
    online: bool,
    generation: u64,
}

/// What a phase means, in a sentence.
pub(super) fn meaning(phase: &str) -> &'static str {
    match phase {
        "distribute" => "both roots are trusted; the old one signs",
        "issue" => "both roots are trusted; the new one signs",
        _ => "one root is trusted",
    }
}

/// Prints a status.
pub(super) fn print(out: Out, answer: &StatusResponse) -> Result {
    let ready = answer.replicas.iter().filter(|one| one.ready).count();
    let status = Status {
        phase: &answer.phase,
        phase_since: Moment(answer.phase_since_ms),
        begun_by: &answer.begun_by,
        generation: answer.generation,
        step: answer.step,
        acknowledged: Counts {
            nodes: answer.nodes_acknowledged,
            nodes_of: answer.nodes,
            operators: answer.operators_acknowledged,
            operators_of: answer.operators,
            replicas: ready,
            replicas_of: answer.replicas.len(),
        },
        roots: answer.roots.iter().map(root).collect(),
        authorities: answer.authorities.iter().map(authority).collect(),
        replicas: answer.replicas.iter().map(replica).collect(),
        operators_missing: &answer.operators_missing,
        nodes_missing: answer.nodes_missing.iter().map(node).collect(),
        warnings: &answer.warnings,
    };
    out.one(&status, Source::from(answer.read), &facts(answer, &status))
}

fn facts(answer: &StatusResponse, status: &Status<'_>) -> Vec<(&'static str, String)> {
    let now = wall_ms();
    let by = if answer.begun_by.is_empty() {
        String::new()
    } else {
        format!(", begun by {}", answer.begun_by)
    };
    let since = Moment(answer.phase_since_ms).told(now);
    let counts = &status.acknowledged;
    let mut facts = vec![
        (
            "rotation",
            format!("{} ({}; since {since}{by})", answer.phase, meaning(&answer.phase)),
        ),
        ("roots", lines(answer.roots.iter().map(|one| told_root(one, now)))),
        (
            "authorities",
            lines(answer.authorities.iter().map(|one| told_authority(one, now))),
        ),
        (
            "acknowledged",
            format!(
                "generation {}: {}/{} nodes, {}/{} operators; step {}: {}/{} replicas",
                answer.generation,
                counts.nodes,
                counts.nodes_of,
                counts.operators,
                counts.operators_of,
                answer.step,
                counts.replicas,
                counts.replicas_of
            ),
        ),
        ("missing", missing(answer)),
        ("warnings", answer.warnings.join("\n")),
    ];
    let all_here = counts.nodes == counts.nodes_of
        && counts.operators == counts.operators_of
        && counts.replicas == counts.replicas_of;
    let next = match (answer.phase.as_str(), all_here) {
        ("idle", _) => String::new(),
        (_, true) => "palyra ca rotate root advance".to_owned(),
        (_, false) => "wait for who is missing, then palyra ca rotate root advance".to_owned(),
    };
    facts.push(("next", next));
    facts
}

fn lines(lines: impl Iterator<Item = String>) -> String {
    lines.collect::<Vec<_>>().join("\n")
}

fn short(fingerprint: &str) -> &str {
    fingerprint.get(..SHORT).unwrap_or(fingerprint)
}

fn told_root(one: &RootInfo, now: u64) -> String {
    let key = if one.key_held { "" } else { ", key destroyed" };
    format!(
        "{} {} {}, ends {}{key}",
        one.number,
        short(&one.fingerprint),
        one.status,
        Moment(one.not_after_ms).told(now)
    )
}

fn told_authority(one: &AuthorityInfo, now: u64) -> String {
    let roots: Vec<String> = one.roots.iter().map(u32::to_string).collect();
    let asked = if one.rotation_asked {
        ", rotation asked"
    } else {
        ""
    };
    let crl = if one.crl_number == 0 {
        "no list yet".to_owned()
    } else {
        format!(
            "list {} of {}, next {}",
            one.crl_number,
            one.crl_entries,
            Moment(one.crl_next_update_ms).told(now)
        )
    };
    format!(
        "{} #{} {} {} under root {}, ends {}, {} live, {crl}{asked}",
        one.replica,
        one.number,
        short(&one.fingerprint),
        one.status,
        roots.join("+"),
        Moment(one.not_after_ms).told(now),
        one.live_certificates
    )
}

fn missing(answer: &StatusResponse) -> String {
    let mut all: Vec<String> = answer
        .replicas
        .iter()
        .filter(|one| !one.ready)
        .map(|one| format!("replica {} (step {})", one.name, one.step))
        .collect();
    all.extend(
        answer
            .operators_missing
            .iter()
            .map(|name| format!("operator {name}")),
    );
    all.extend(answer.nodes_missing.iter().map(|one| {
        let seen = if one.online { "online" } else { "offline" };
        format!(
            "node {} {} ({seen}, generation {})",
            one.device_id, one.name, one.generation
        )
    }));
    let more = answer
        .nodes
        .saturating_sub(answer.nodes_acknowledged)
        .saturating_sub(answer.nodes_missing.len() as u64);
    if more > 0 {
        all.push(format!("and {more} nodes; --all names them"));
    }
    all.join("\n")
}

fn root(one: &RootInfo) -> Root<'_> {
    Root {
        number: one.number,
        fingerprint: &one.fingerprint,
        status: &one.status,
        not_after: Moment(one.not_after_ms),
        added_at: Moment(one.added_at_ms),
        added_by: &one.added_by,
        key_held: one.key_held,
        retired_at: Moment(one.retired_at_ms),
    }
}

fn authority(one: &AuthorityInfo) -> Authority<'_> {
    Authority {
        replica_id: one.replica_id,
        replica: &one.replica,
        number: one.number,
        status: &one.status,
        fingerprint: &one.fingerprint,
        roots: &one.roots,
        not_after: Moment(one.not_after_ms),
        since: Moment(one.since_ms),
        live_certificates: one.live_certificates,
        last_not_after: Moment(one.last_not_after_ms),
        rotation_asked: one.rotation_asked,
        crl_number: one.crl_number,
        crl_entries: one.crl_entries,
        crl_next_update: Moment(one.crl_next_update_ms),
    }
}

fn replica(one: &ReplicaTrust) -> Replica<'_> {
    Replica {
        id: one.replica_id,
        name: &one.name,
        step: one.step,
        ready: one.ready,
    }
}

fn node(one: &MissingNode) -> Node<'_> {
    Node {
        device_id: &one.device_id,
        name: &one.name,
        online: one.online,
        generation: one.generation,
    }
}
