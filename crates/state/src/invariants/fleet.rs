//! Rules about nodes: sessions, statuses, what they rest on, and their indexes.

use std::collections::{BTreeMap, BTreeSet};

use super::{Findings, all, keys};
use crate::nodes::{self, ConditionKind, Node, NodeStatus, Totals, Truth};
use crate::read::Read;
use crate::{dispatch, identity, meta, tables};

/// Keys that an index should have.
type Keys = BTreeSet<Vec<u8>>;

#[derive(Default)]
struct Expected {
    sessions: Keys,
    due: Keys,
    by_status: Keys,
    counts: BTreeMap<u64, u64>,
    totals: Totals,
}

pub(super) fn check(r: &dyn Read, findings: &mut Findings) {
    const RULE: &str = "indexes of nodes follow their records";
    let index = meta::meta(r).index;
    let mut expected = Expected::default();
    for node in all(r, &tables::NODES) {
        let name = || node.device_id.to_string();
        findings.expect("epochs come from the log", node.last_epoch <= index, name);
        let is_device = identity::device(r, node.device_id).is_some();
        findings.expect("a node is a device", is_device, name);
        check_session(&node, findings);
        check_status(r, &node, findings);
        expected.add(&node);
    }
    for (table, is, should) in [
        ("sessions", keys(r, &tables::SESSIONS_OF), expected.sessions),
        ("due", keys(r, &tables::NODES_DUE), expected.due),
        ("by status", keys(r, &tables::NODES_BY_STATUS), expected.by_status),
    ] {
        let is: Keys = is.into_iter().collect();
        findings.expect(RULE, is == should, || {
            format!("{table}: {} rows instead of {}", is.len(), should.len())
        });
    }
    let counts = all(r, &tables::SESSION_COUNTS).len();
    findings.equal("sessions are counted", "replicas", counts, expected.counts.len());
    for (replica, count) in expected.counts {
        let is = nodes::session_count(r, replica);
        findings.equal("sessions are counted", "of a replica", is, count);
    }
    let totals = Totals {
        devices: nodes::totals(r).devices,
        bans: nodes::totals(r).bans,
        ..expected.totals
    };
    findings.equal("nodes are counted", "totals", nodes::totals(r), totals);
}

fn check_session(node: &Node, findings: &mut Findings) {
    const RULE: &str = "at most one live session per node";
    let Some(session) = &node.session else { return };
    let name = node.device_id.to_string();
    findings.equal(RULE, "epoch", session.epoch, node.last_epoch);
    findings.equal("a session makes online", &name, node.status(), NodeStatus::Online);
    findings.equal("a live session is not due", &name, node.due_at, 0);
}

fn check_status(r: &dyn Read, node: &Node, findings: &mut Findings) {
    let name = || format!("{} is {}", node.device_id, node.status().as_str());
    let waits = match node.status() {
        NodeStatus::Online => node.session.is_none(),
        NodeStatus::Suspect => true,
        NodeStatus::Offline => node.due_at != 0,
        NodeStatus::Gone => false,
    };
    findings.expect("who is waited for is due", waits == (node.due_at != 0), name);
    if node.status() == NodeStatus::Gone {
        let open = dispatch::open_count(r, node.device_id);
        findings.equal("nothing waits for a node that is gone", &name(), open, 0);
    }
    let truth = |kind: ConditionKind| {
        let mut of_kind = node.conditions.iter().filter(|known| known.kind() == kind);
        let found = of_kind.next().map(|known| known.truth());
        found.filter(|_| of_kind.next().is_none())
    };
    let connected = if node.session.is_some() {
        Truth::True
    } else {
        Truth::False
    };
    const RULE: &str = "conditions say what the record says";
    findings.equal(
        RULE,
        "Registered",
        truth(ConditionKind::Registered),
        Some(Truth::True),
    );
    findings.equal(
        RULE,
        "Connected",
        truth(ConditionKind::Connected),
        Some(connected),
    );
    let responsive = truth(ConditionKind::Responsive);
    let answers = responsive == Some(Truth::True);
    findings.expect(RULE, answers == node.session.is_some(), || {
        format!("{}: responsive {responsive:?}", name())
    });
    let late = node
        .conditions
        .iter()
        .any(|known| known.since > meta::meta(r).clock);
    findings.expect(RULE, !late, || format!("{}: since a time to come", name()));
}

impl Expected {
    fn add(&mut self, node: &Node) {
        let id = node.device_id;
        if let Some(session) = &node.session {
            self.sessions
                .insert(tables::SESSIONS_OF.key((session.replica_id, id))[1..].to_vec());
            *self.counts.entry(session.replica_id).or_default() += 1;
        }
        if node.due_at != 0 {
            self.due
                .insert(tables::NODES_DUE.key((node.due_at, id))[1..].to_vec());
        }
        self.by_status
            .insert(tables::NODES_BY_STATUS.key((node.status as u32, id))[1..].to_vec());
        self.totals.nodes += 1;
        match node.status() {
            NodeStatus::Online => self.totals.online += 1,
            NodeStatus::Suspect => self.totals.suspect += 1,
            NodeStatus::Gone => self.totals.gone += 1,
            NodeStatus::Offline => {}
        }
    }
}
