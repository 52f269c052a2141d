//! How nodes register, and how sessions begin and end.

use super::{
    Action, Attach, Capability, Detach, DetachReplica, Node, NodeStatus, Register, Session, Totals, node,
    sessions_of, totals,
};
use crate::ids::Id;
use crate::reject::{Code, Reject};
use crate::reply::{Attached, Counted, Registered, Reply};
use crate::txn::Txn;
use crate::{check, cluster, dispatch, limits, tables};

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::Register(command) => register(txn, command),
        Action::Attach(command) => attach(txn, command),
        Action::Detach(command) => detach(txn, command),
        Action::DetachReplica(command) => detach_replica(txn, command),
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
    };
    if let Some(known) = before.as_ref().filter(|known| same(known)) {
        return Ok(Reply::Registered(Registered {
            generation: known.generation,
            changed: false,
        }));
    }
    let mut changed = before.unwrap_or_else(|| Node {
        device_id: id,
        registered_at: txn.now,
        status: NodeStatus::Offline as i32,
        status_since: txn.now,
        status_reason: "registered".to_owned(),
        ..Node::default()
    });
    if changed.generation == 0 {
        add_to_totals(txn, |sums| sums.nodes += 1);
    }
    changed.platform = command.platform.clone();
    changed.agent_version = command.agent_version.clone();
    changed.labels = command.labels.clone();
    changed.capabilities = capabilities;
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
    check::text(
        "the description of a capability",
        &capability.description,
        limits::DESCRIPTION_MAX,
    )
}

fn attach(txn: &mut Txn<'_>, command: &Attach) -> Result<Reply, Reject> {
    let id = command.device_id;
    let bad = |cause: &str| Reject::new(Code::BadAttach, [&id, &cause]);
    if !matches!(command.transport.as_str(), "stream" | "quic" | "poll") {
        return Err(bad("the transport is none of stream, quic and poll"));
    }
    if command.held.len() > limits::OPEN_PER_DEVICE as usize {
        return Err(bad("it names too many held dispatches"));
    }
    if !cluster::replica(txn, command.replica_id).is_some_and(|replica| replica.is_member()) {
        return Err(Reject::new(Code::ReplicaUnknown, [&command.replica_id]));
    }
    let mut node = node(txn, id).ok_or_else(|| Reject::new(Code::NodeNotRegistered, [&id]))?;
    let epoch = txn.index;
    if let Some(old) = node.session.take() {
        txn.delete(&tables::SESSIONS_OF, (old.replica_id, id));
        txn.emit(
            "node.session_superseded",
            id,
            [
                ("epoch", old.epoch.to_string()),
                ("replica", old.replica_id.to_string()),
                ("by_epoch", epoch.to_string()),
            ],
        );
    } else {
        add_to_totals(txn, |sums| sums.online += 1);
    }
    if node.status() != NodeStatus::Online {
        node.status_since = txn.now;
    }
    node.set_status(NodeStatus::Online);
    node.status_reason = "attached".to_owned();
    node.last_epoch = epoch;
    node.session = Some(Session {
        epoch,
        replica_id: command.replica_id,
        attached_at: txn.now,
        transport: command.transport.clone(),
    });
    txn.put(&tables::NODES, id, &node);
    txn.mark(&tables::SESSIONS_OF, (command.replica_id, id));
    txn.emit(
        "node.attached",
        id,
        [
            ("epoch", epoch.to_string()),
            ("replica", command.replica_id.to_string()),
            ("transport", command.transport.clone()),
        ],
    );
    let moved = dispatch::on_attach(txn, id, command.replica_id, &command.held);
    Ok(Reply::Attached(Attached {
        epoch,
        assigned: moved.assigned,
        rebound: moved.rebound,
        lost: moved.lost,
    }))
}

fn detach(txn: &mut Txn<'_>, command: &Detach) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let is_it = node(txn, command.device_id)
        .and_then(|node| node.session)
        .is_some_and(|session| session.epoch == command.epoch);
    if is_it {
        close_session(txn, command.device_id, &command.reason);
    }
    Ok(Reply::Counted(Counted {
        count: u32::from(is_it),
    }))
}

fn detach_replica(txn: &mut Txn<'_>, command: &DetachReplica) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let limit = match command.limit as usize {
        0 => limits::DETACH_BATCH,
        asked => asked.min(limits::DETACH_BATCH),
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
                close_session(txn, id, &command.reason);
                count += 1;
            }
        }
    }
    Ok(Reply::Counted(Counted { count: count as u32 }))
}

/// Ends the session of a node, if it has one. Its dispatches stay bound to it until the next attach or their
/// deadline.
pub(crate) fn close_session(txn: &mut Txn<'_>, device_id: Id, reason: &str) {
    let Some(mut node) = node(txn, device_id) else {
        return;
    };
    let Some(session) = node.session.take() else {
        return;
    };
    node.set_status(NodeStatus::Offline);
    node.status_since = txn.now;
    node.status_reason = reason.to_owned();
    txn.put(&tables::NODES, device_id, &node);
    txn.delete(&tables::SESSIONS_OF, (session.replica_id, device_id));
    add_to_totals(txn, |sums| sums.online = sums.online.saturating_sub(1));
    txn.emit(
        "node.detached",
        device_id,
        [
            ("epoch", session.epoch.to_string()),
            ("replica", session.replica_id.to_string()),
            ("reason", reason.to_owned()),
        ],
    );
}

/// Counts one more device that was ever paired.
pub(crate) fn count_device(txn: &mut Txn<'_>) -> Result<(), Reject> {
    if totals(txn).devices >= limits::DEVICES {
        return Err(Reject::new(Code::TooManyDevices, [&limits::DEVICES]));
    }
    add_to_totals(txn, |sums| sums.devices += 1);
    Ok(())
}

fn add_to_totals(txn: &mut Txn<'_>, change: impl FnOnce(&mut Totals)) {
    let mut sums = totals(txn);
    change(&mut sums);
    txn.put(&tables::NODE_TOTALS, (), &sums);
}
