//! Where a node stands: its status, the conditions that it rests on, and the indexes that follow both.
//!
//! What never lives here: who may change what (`rules`), and clocks: what is due is due by the state's own
//! time. Invariants: [`turn`] alone changes a status, so that no index and no counter can lag behind it; a
//! condition's `since` moves only when its truth does.

use std::ops::ControlFlow;

use super::{Node, node, totals};
use crate::ids::Id;
use crate::read::Read;
use crate::tables;
use crate::txn::Txn;

/// Where a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum NodeStatus {
    /// No session, and none is expected soon.
    Offline = 0,
    /// Has a session, or is on its way from a replica that sent it away to another.
    Online = 1,
    /// Its session ended without its saying so; it may come back any moment.
    Suspect = 2,
    /// Offline for longer than it may be: nothing waits for it any more.
    Gone = 3,
}

impl NodeStatus {
    /// All of them.
    pub const ALL: [NodeStatus; 4] = [
        NodeStatus::Online,
        NodeStatus::Suspect,
        NodeStatus::Offline,
        NodeStatus::Gone,
    ];

    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            NodeStatus::Offline => "offline",
            NodeStatus::Online => "online",
            NodeStatus::Suspect => "suspect",
            NodeStatus::Gone => "gone",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<NodeStatus> {
        NodeStatus::ALL.into_iter().find(|status| status.as_str() == text)
    }
}

/// What a condition is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum ConditionKind {
    /// The node has said what it is and can do.
    Registered = 0,
    /// A replica holds a session of it.
    Connected = 1,
    /// It answers, as far as anybody can tell.
    Responsive = 2,
}

impl ConditionKind {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            ConditionKind::Registered => "Registered",
            ConditionKind::Connected => "Connected",
            ConditionKind::Responsive => "Responsive",
        }
    }
}

/// Whether a condition holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Truth {
    /// Nobody can tell now.
    Unknown = 0,
    /// It holds.
    True = 1,
    /// It does not.
    False = 2,
}

impl Truth {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Truth::Unknown => "Unknown",
            Truth::True => "True",
            Truth::False => "False",
        }
    }
}

/// One thing that a status rests on.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Condition {
    /// What it is about.
    #[prost(enumeration = "ConditionKind", tag = "1")]
    pub kind: i32,
    /// Whether it holds.
    #[prost(enumeration = "Truth", tag = "2")]
    pub truth: i32,
    /// Why, in one stable word.
    #[prost(string, tag = "3")]
    pub reason: String,
    /// For people; may be empty.
    #[prost(string, tag = "4")]
    pub message: String,
    /// Since when it is so.
    #[prost(uint64, tag = "5")]
    pub since: u64,
}

/// Nodes of a status by device id, at most `limit`, from the one after `after` on.
#[must_use]
pub fn by_status(r: &dyn Read, status: NodeStatus, after: Option<Id>, limit: usize) -> Vec<Node> {
    let ids = tables::NODES_BY_STATUS.ids(r, status as u32, after, limit);
    ids.into_iter().filter_map(|id| node(r, id)).collect()
}

/// How many sessions this replica holds, as the state has it.
#[must_use]
pub fn session_count(r: &dyn Read, replica_id: u64) -> u64 {
    tables::SESSION_COUNTS
        .get(r, replica_id)
        .unwrap_or_default()
        .sessions
}

/// Nodes whose status time has changed by `now`, longest due first, at most `limit`: for the sweeper.
#[must_use]
pub fn due(r: &dyn Read, now: u64, limit: usize) -> Vec<Id> {
    let mut found = Vec::new();
    tables::NODES_DUE.visit(r, (), None, &mut |key, _| {
        if found.len() >= limit || time_of(key) > now {
            return ControlFlow::Break(());
        }
        found.extend(Id::from_slice(&key[8..]));
        ControlFlow::Continue(())
    });
    found
}

/// When the first of them is due: when the sweeper has to look next.
#[must_use]
pub fn next_due(r: &dyn Read) -> Option<u64> {
    let mut first = None;
    tables::NODES_DUE.visit(r, (), None, &mut |key, _| {
        first = Some(time_of(key));
        ControlFlow::Break(())
    });
    first
}

fn time_of(key: &[u8]) -> u64 {
    key.first_chunk()
        .map_or(u64::MAX, |bytes| u64::from_be_bytes(*bytes))
}

/// How many sessions one replica holds.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SessionCount {
    /// So many.
    #[prost(uint64, tag = "1")]
    pub sessions: u64,
}

/// A new node, offline, in the indexes that it belongs to.
pub(super) fn insert(txn: &mut Txn<'_>, new: &mut Node) {
    new.set_status(NodeStatus::Offline);
    new.status_since = txn.now;
    new.status_reason = "registered".to_owned();
    let now = txn.now;
    say(new, now, ConditionKind::Registered, Truth::True, "registered", "");
    say(new, now, ConditionKind::Connected, Truth::False, "registered", "");
    say(
        new,
        now,
        ConditionKind::Responsive,
        Truth::Unknown,
        "registered",
        "",
    );
    txn.mark(&tables::NODES_BY_STATUS, (new.status as u32, new.device_id));
    let mut sums = totals(txn);
    sums.nodes += 1;
    txn.put(&tables::NODE_TOTALS, (), &sums);
}

/// Forgets the node of a device that is revoked, and so has no session and is not waited for.
pub(crate) fn forget(txn: &mut Txn<'_>, id: Id) {
    let Some(old) = node(txn, id) else { return };
    if old.due_at != 0 {
        txn.delete(&tables::NODES_DUE, (old.due_at, id));
    }
    txn.delete(&tables::NODES_BY_STATUS, (old.status as u32, id));
    count(txn, old.status(), NodeStatus::Offline);
    let mut sums = totals(txn);
    sums.nodes -= 1;
    txn.put(&tables::NODE_TOTALS, (), &sums);
    txn.delete(&tables::NODES, id);
}

/// Gives a node its next status, with all that follows from it; time changes it again at `due_at`, unless that
/// is 0. Whoever calls it writes the record.
pub(super) fn turn(txn: &mut Txn<'_>, node: &mut Node, to: NodeStatus, reason: &str, due_at: u64) {
    let (id, from) = (node.device_id, node.status());
    if node.due_at != due_at {
        if node.due_at != 0 {
            txn.delete(&tables::NODES_DUE, (node.due_at, id));
        }
        if due_at != 0 {
            txn.mark(&tables::NODES_DUE, (due_at, id));
        }
        node.due_at = due_at;
    }
    if from != to {
        txn.delete(&tables::NODES_BY_STATUS, (from as u32, id));
        txn.mark(&tables::NODES_BY_STATUS, (to as u32, id));
        count(txn, from, to);
        node.set_status(to);
        node.status_since = txn.now;
    }
    node.status_reason = reason.to_owned();
    judge(node, txn.now);
}

fn count(txn: &mut Txn<'_>, from: NodeStatus, to: NodeStatus) {
    let mut sums = totals(txn);
    for (status, step) in [(from, -1), (to, 1)] {
        let counter = match status {
            NodeStatus::Online => &mut sums.online,
            NodeStatus::Suspect => &mut sums.suspect,
            NodeStatus::Gone => &mut sums.gone,
            NodeStatus::Offline => continue,
        };
        *counter = counter.saturating_add_signed(step);
    }
    txn.put(&tables::NODE_TOTALS, (), &sums);
}

/// Derives the conditions from status, session and reason.
fn judge(node: &mut Node, now: u64) {
    let reason = node.status_reason.clone();
    let (connected, place) = match &node.session {
        Some(session) => (
            Truth::True,
            format!("replica {}, {}", session.replica_id, session.transport),
        ),
        None => (Truth::False, String::new()),
    };
    let (responsive, why) = match node.status() {
        NodeStatus::Online if node.session.is_some() => (Truth::True, "heartbeats"),
        NodeStatus::Online => (Truth::Unknown, "moving"),
        NodeStatus::Suspect => (Truth::Unknown, "session_ended"),
        NodeStatus::Offline => (Truth::False, "offline"),
        NodeStatus::Gone => (Truth::False, "gone"),
    };
    say(node, now, ConditionKind::Connected, connected, &reason, &place);
    say(node, now, ConditionKind::Responsive, responsive, why, "");
}

fn say(node: &mut Node, now: u64, kind: ConditionKind, truth: Truth, reason: &str, message: &str) {
    let known = node.conditions.iter().position(|known| known.kind() == kind);
    let since = known
        .map(|at| &node.conditions[at])
        .filter(|known| known.truth() == truth)
        .map_or(now, |known| known.since);
    let said = Condition {
        kind: kind as i32,
        truth: truth as i32,
        reason: reason.to_owned(),
        message: message.to_owned(),
        since,
    };
    match known {
        Some(at) => node.conditions[at] = said,
        None => node.conditions.push(said),
    }
}

/// One session more, or one less, at a replica.
pub(super) fn count_session(txn: &mut Txn<'_>, replica_id: u64, step: i64) {
    let sessions = session_count(txn, replica_id).saturating_add_signed(step);
    if sessions == 0 {
        txn.delete(&tables::SESSION_COUNTS, replica_id);
    } else {
        txn.put(&tables::SESSION_COUNTS, replica_id, &SessionCount { sessions });
    }
}
