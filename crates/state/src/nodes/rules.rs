//! How nodes register, and how sessions begin and end.

use super::status::{count_session, insert, turn};
use super::{
    Action, Attach, Capability, Detach, DetachMany, DetachReplica, Effect, Ended, How, Lapse, Node,
    NodeStatus, Register, Session, Totals, node, sessions_of, totals,
};
use crate::actor::Actor;
use crate::ids::Id;
use crate::reject::{Code, Reject};
use crate::reply::{Attached, Counted, Registered, Reply};
use crate::txn::Txn;
use crate::{check, cluster, dispatch, fleet, leases, limits, tables};

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::Register(command) => register(txn, command),
        Action::Attach(command) => attach(txn, command),
        Action::Detach(command) => detach(txn, command),
        Action::DetachReplica(command) => detach_replica(txn, command),
        Action::DetachMany(command) => detach_many(txn, command),
        Action::Lapse(command) => lapse(txn, command),
    }
}

fn register(txn: &mut Txn<'_>, command: &Register) -> Result<Reply, Reject> {
    let id = command.device_id;
    check_registration(command)
        .map_err(|cause| Reject::new(Code::BadRegistration, [&id, &cause.args.join(": ")]))?;
    let mut capabilities = command.capabilities.clone();
    capabilities.sort_by(|one, other| one.name.cmp(&other.name));
    let before = node(txn, id);
    let same = |known: &Node| {
        known.platform == command.platform
            && known.agent_version == command.agent_version
            && known.labels == command.labels
            && known.capabilities == capabilities
            && known.lost_after == command.lost_after
            && known.max_concurrency == command.max_concurrency
            && known.queue_limit == command.queue_limit
    };
    if let Some(known) = before.as_ref().filter(|known| same(known)) {
        return Ok(Reply::Registered(Registered {
            generation: known.generation,
            changed: false,
        }));
    }
    let mut changed = before.unwrap_or_else(|| {
        let mut new = Node {
            device_id: id,
            registered_at: txn.now,
            ..Node::default()
        };
        insert(txn, &mut new);
        new
    });
    changed.platform = command.platform.clone();
    changed.agent_version = command.agent_version.clone();
    changed.labels = command.labels.clone();
    changed.capabilities = capabilities;
    changed.lost_after = command.lost_after;
    changed.max_concurrency = command.max_concurrency;
    changed.queue_limit = command.queue_limit;
    changed.generation += 1;
    txn.put(&tables::NODES, id, &changed);
    let names: Vec<&str> = changed
        .capabilities
        .iter()
        .map(|capability| capability.name.as_str())
        .collect();
    txn.emit(
        "node.registered",
        id,
        [
            ("generation", changed.generation.to_string()),
            ("platform", changed.platform.clone()),
            ("agent_version", changed.agent_version.clone()),
            ("capabilities", names.join(" ")),
        ],
    );
    // More may run now, and its labels may be others.
    dispatch::fill(txn, id);
    leases::fill(txn, id);
    Ok(Reply::Registered(Registered {
        generation: changed.generation,
        changed: true,
    }))
}

fn check_registration(command: &Register) -> Result<(), Reject> {
    check::filled("the platform", &command.platform, limits::NAME_MAX)?;
    check::text("the agent's version", &command.agent_version, limits::NAME_MAX)?;
    check::count(
        "the list of capabilities",
        command.capabilities.len(),
        limits::CAPABILITIES,
    )?;
    check::count("the map of labels", command.labels.len(), limits::LABELS)?;
    let lost_after = command.lost_after;
    let bounds = limits::LOST_AFTER_MIN..=limits::LOST_AFTER_MAX;
    if lost_after != 0 && lost_after != limits::NEVER && !bounds.contains(&lost_after) {
        let cause = format_args!("{lost_after} ms is not between a second and a year");
        return Err(check::invalid("lost_after", &cause));
    }
    for (name, value) in &command.labels {
        check::filled("the name of a label", name, limits::NAME_MAX)?;
        check::text("the value of a label", value, limits::NAME_MAX)?;
    }
    for (at, capability) in command.capabilities.iter().enumerate() {
        check_capability(capability)?;
        if command.capabilities[..at]
            .iter()
            .any(|other| other.name == capability.name)
        {
            return Err(check::invalid(
                "a capability",
                &format_args!("{} is declared twice", capability.name),
            ));
        }
    }
    Ok(())
}

fn check_capability(capability: &Capability) -> Result<(), Reject> {
    if !check::is_short_name(&capability.name) {
        let cause = format_args!("{} is no name for one", check::quoted(&capability.name));
        return Err(check::invalid("a capability", &cause));
    }
    if capability.timeout_ms > limits::DEADLINE_MAX {
        let cause = format_args!("{} has a timeout of over 24 h", capability.name);
        return Err(check::invalid("a capability", &cause));
    }
    check_retry(capability)?;
    check::text(
        "the description of a capability",
        &capability.description,
        limits::DESCRIPTION_MAX,
    )
}

fn check_retry(capability: &Capability) -> Result<(), Reject> {
    let refused = |cause: String| {
        let cause = format_args!("{} {cause}", capability.name);
        Err(check::invalid("a capability", &cause))
    };
    if capability.effect() == Effect::Once && capability.max_attempts > 1 {
        return refused("is to run once and cannot be tried again".to_owned());
    }
    if capability.max_attempts > limits::DELIVERIES {
        return refused(format!("has over {} attempts", limits::DELIVERIES));
    }
    if capability.backoff_ms > limits::BACKOFF_MAX {
        return refused("waits over 1 h between attempts".to_owned());
    }
    check::count(
        "the list of what a capability is tried again after",
        capability.retry_on.len(),
        limits::RETRY_ON,
    )?;
    capability.retry_on.iter().try_for_each(|on| {
        check::filled(
            "what a capability is tried again after",
            on,
            limits::SHORT_NAME_MAX,
        )
    })
}

fn attach(txn: &mut Txn<'_>, command: &Attach) -> Result<Reply, Reject> {
    let id = command.device_id;
    let bad = |cause: &str| Reject::new(Code::BadAttach, [&id, &cause]);
    if !matches!(command.transport.as_str(), "stream" | "quic" | "poll") {
        return Err(bad("the transport is none of stream, quic and poll"));
    }
    check::text("the reason of a fallback", &command.fallback, limits::REASON_MAX)?;
    if command.held.len() > limits::OPEN_PER_DEVICE as usize {
        return Err(bad("it names too many held dispatches"));
    }
    if !cluster::replica(txn, command.replica_id).is_some_and(|replica| replica.is_member()) {
        return Err(Reject::new(Code::ReplicaUnknown, [&command.replica_id]));
    }
    let mut node = node(txn, id).ok_or_else(|| Reject::new(Code::NodeNotRegistered, [&id]))?;
    // Planted: epochs count by node, and a device that is registered anew begins where another had been.
    let counted = palyra_fault::planted("epoch-by-node");
    let epoch = if counted { node.last_epoch + 1 } else { txn.index };
    if let Some(old) = node.session.take() {
        txn.delete(&tables::SESSIONS_OF, (old.replica_id, id));
        count_session(txn, old.replica_id, -1);
        txn.emit(
            "node.session_superseded",
            id,
            [
                ("epoch", old.epoch.to_string()),
                ("replica", old.replica_id.to_string()),
                ("by_epoch", epoch.to_string()),
            ],
        );
    }
    node.last_epoch = epoch;
    node.last_seen_at = 0;
    node.session = Some(Session {
        epoch,
        replica_id: command.replica_id,
        attached_at: txn.now,
        transport: command.transport.clone(),
        fallback: command.fallback.clone(),
    });
    turn(txn, &mut node, NodeStatus::Online, "attached", 0);
    count_session(txn, command.replica_id, 1);
    txn.put(&tables::NODES, id, &node);
    txn.mark(&tables::SESSIONS_OF, (command.replica_id, id));
    txn.emit(
        "node.attached",
        id,
        [
            ("epoch", epoch.to_string()),
            ("replica", command.replica_id.to_string()),
            ("transport", command.transport.clone()),
            ("fallback", command.fallback.clone()),
        ],
    );
    fleet::on_attach(txn, id);
    let attempts = command.held_attempts.iter().copied().chain(std::iter::repeat(0));
    let held = command.held.iter().copied().zip(attempts).collect();
    let moved = dispatch::on_attach(txn, id, &held);
    Ok(Reply::Attached(Attached {
        epoch,
        assigned: moved.assigned,
        rebound: moved.rebound,
        lost: moved.lost,
    }))
}

fn detach(txn: &mut Txn<'_>, command: &Detach) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let how = match txn.actor {
        Actor::Node { .. } => How::Left,
        _ => How::Lost,
    };
    let end = Ended {
        device_id: command.device_id,
        epoch: command.epoch,
        reason: command.reason.clone(),
        how: how as i32,
        silent_for: 0,
    };
    let count = u32::from(end_session(txn, &end, Patience::default()));
    Ok(Reply::Counted(Counted { count }))
}

fn detach_many(txn: &mut Txn<'_>, command: &DetachMany) -> Result<Reply, Reject> {
    check::count("the list of sessions", command.ends.len(), limits::DETACH_BATCH)?;
    for end in &command.ends {
        check::text("the reason", &end.reason, limits::REASON_MAX)?;
    }
    let patience = Patience {
        suspect_for: command.suspect_for,
        lost_after: command.lost_after,
    };
    let mut count = 0;
    for end in &command.ends {
        count += u32::from(end_session(txn, end, patience));
    }
    Ok(Reply::Counted(Counted { count }))
}

fn detach_replica(txn: &mut Txn<'_>, command: &DetachReplica) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let limit = match command.limit as usize {
        0 => limits::DETACH_BATCH,
        asked => asked.min(limits::DETACH_BATCH),
    };
    let patience = Patience {
        suspect_for: command.suspect_for,
        lost_after: 0,
    };
    let mut count = 0;
    let mut after = None;
    // Sessions that are spared must not hide those behind them, so walk on until the batch is full.
    while count < limit {
        let page = sessions_of(txn, command.replica_id, after, limit);
        let Some(last) = page.last() else { break };
        after = Some(*last);
        for id in page {
            let epoch = node(txn, id)
                .and_then(|node| node.session)
                .map_or(0, |session| session.epoch);
            if count < limit && (command.up_to_epoch == 0 || epoch <= command.up_to_epoch) {
                let end = Ended {
                    device_id: id,
                    epoch,
                    reason: command.reason.clone(),
                    how: How::Lost as i32,
                    silent_for: command.silent_for,
                };
                count += usize::from(end_session(txn, &end, patience));
            }
        }
    }
    Ok(Reply::Counted(Counted { count: count as u32 }))
}

/// How long one waits for a node whose session ended, in milliseconds; 0 stands for the limits' value.
#[derive(Clone, Copy, Debug, Default)]
struct Patience {
    suspect_for: u64,
    lost_after: u64,
}

impl Patience {
    /// When a node that may come back is late.
    fn late_at(self, now: u64) -> u64 {
        let wait = match self.suspect_for {
            0 => limits::SUSPECT_FOR,
            asked => asked,
        };
        now.saturating_add(wait)
    }

    /// When a node that is offline is gone; 0: never.
    fn gone_at(self, now: u64, node: &Node) -> u64 {
        let wait = match (node.lost_after, self.lost_after) {
            (0, 0) => limits::LOST_AFTER,
            (0, asked) | (asked, _) => asked,
        };
        if wait == limits::NEVER {
            return 0;
        }
        now.saturating_add(wait)
    }
}

/// Ends a session, unless the node has another one; whether it did. The dispatches stay bound to it until the next
/// attach or their deadline.
fn end_session(txn: &mut Txn<'_>, end: &Ended, patience: Patience) -> bool {
    let is_it = |node: &Node| {
        node.session
            .as_ref()
            .is_some_and(|session| session.epoch == end.epoch)
    };
    let Some(mut node) = node(txn, end.device_id).filter(is_it) else {
        return false;
    };
    let now = txn.now;
    let (to, due_at) = match end.how() {
        How::Lost => (NodeStatus::Suspect, patience.late_at(now)),
        How::Left => (NodeStatus::Offline, patience.gone_at(now, &node)),
        How::Moving => (NodeStatus::Online, patience.late_at(now)),
    };
    close(txn, &mut node, to, &end.reason, due_at, end.silent_for);
    true
}

/// Ends the session of a node that is not to come back, if it has one, and expects nothing of it any more.
pub(crate) fn close_session(txn: &mut Txn<'_>, device_id: Id, reason: &str) {
    let Some(mut node) = node(txn, device_id) else {
        return;
    };
    if node.session.is_some() {
        close(txn, &mut node, NodeStatus::Offline, reason, 0, 0);
    } else if node.status() != NodeStatus::Offline || node.due_at != 0 {
        let to = match node.status() {
            NodeStatus::Gone => NodeStatus::Gone,
            _ => NodeStatus::Offline,
        };
        turn(txn, &mut node, to, reason, 0);
        txn.put(&tables::NODES, device_id, &node);
    }
}

fn close(txn: &mut Txn<'_>, node: &mut Node, to: NodeStatus, reason: &str, due_at: u64, silent_for: u64) {
    let Some(session) = node.session.take() else {
        return;
    };
    let id = node.device_id;
    // Nobody heard it before it attached, whatever a replica says of its silence.
    node.last_seen_at = txn.now.saturating_sub(silent_for).max(session.attached_at);
    turn(txn, node, to, reason, due_at);
    txn.put(&tables::NODES, id, node);
    txn.delete(&tables::SESSIONS_OF, (session.replica_id, id));
    count_session(txn, session.replica_id, -1);
    txn.emit(
        "node.detached",
        id,
        [
            ("epoch", session.epoch.to_string()),
            ("replica", session.replica_id.to_string()),
            ("reason", reason.to_owned()),
            ("status", to.as_str().to_owned()),
        ],
    );
    fleet::on_detach(txn, id, node.last_seen_at);
}

fn lapse(txn: &mut Txn<'_>, command: &Lapse) -> Result<Reply, Reject> {
    check::count("the list of nodes", command.ids.len(), limits::LAPSE_BATCH)?;
    let patience = Patience {
        suspect_for: 0,
        lost_after: command.lost_after,
    };
    let (mut count, mut ended) = (0, 0);
    for id in &command.ids {
        // What is gone may end a whole queue, and one entry does not end many of them.
        if ended >= limits::EXPIRE_BATCH as u32 {
            break;
        }
        let now = txn.now;
        let Some(mut node) = node(txn, *id).filter(|node| node.due_at != 0 && node.due_at <= now) else {
            continue;
        };
        count += 1;
        let (to, reason, due_at) = match node.status() {
            NodeStatus::Online | NodeStatus::Suspect => {
                let gone_at = patience.gone_at(now, &node);
                (NodeStatus::Offline, node.status_reason.clone(), gone_at)
            }
            NodeStatus::Offline | NodeStatus::Gone => (NodeStatus::Gone, "lost_after".to_owned(), 0),
        };
        turn(txn, &mut node, to, &reason, due_at);
        txn.put(&tables::NODES, *id, &node);
        let action = match to {
            NodeStatus::Gone => "node.gone",
            _ => "node.offline",
        };
        txn.emit(
            action,
            *id,
            [
                ("reason", reason),
                ("epoch", node.last_epoch.to_string()),
                ("last_seen_at", node.last_seen_at.to_string()),
            ],
        );
        if to == NodeStatus::Gone {
            ended += dispatch::on_gone(txn, *id);
        }
    }
    Ok(Reply::Counted(Counted { count }))
}

/// Counts one more device that was ever paired.
pub(crate) fn count_device(txn: &mut Txn<'_>) -> Result<(), Reject> {
    if totals(txn).devices >= limits::DEVICES {
        return Err(Reject::new(Code::TooManyDevices, [&limits::DEVICES]));
    }
    add_to_totals(txn, |sums| sums.devices += 1);
    Ok(())
}

/// Counts one more device that was removed, or one less.
pub(crate) fn count_ban(txn: &mut Txn<'_>, more: bool) {
    add_to_totals(txn, |sums| {
        if more {
            sums.bans += 1;
            sums.devices -= 1;
        } else {
            sums.bans -= 1;
        }
    });
}

fn add_to_totals(txn: &mut Txn<'_>, change: impl FnOnce(&mut Totals)) {
    let mut sums = totals(txn);
    change(&mut sums);
    txn.put(&tables::NODE_TOTALS, (), &sums);
}
