//! Who may ask for what. Decided at the entry's place in the log, so that a revocation before it always wins.

use crate::access::{self, Role};
use crate::actor::Actor;
use crate::command::{Command, Envelope};
use crate::ids::Id;
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::{approvals, ca, cluster, dispatch, fleet, identity, leases, nodes, pairing};

/// Which actors a command is for.
enum Need {
    /// Only the system.
    System,
    /// The system or a replica.
    Replica,
    /// The system, a replica, or an operator with this role.
    ReplicaOr(Role),
    /// An operator with this role.
    Role(Role),
    /// This node.
    Node(Id),
    /// This node, the system, or a replica.
    NodeOrReplica(Id),
    /// Some node; the domain checks that the thing is its own.
    AnyNode,
    /// A replica, for a stranger at its enrol listener.
    Enrol,
    /// This operator, or an admin.
    Operator(String),
}

/// Whether the actor is valid now, and may ask for this.
pub(crate) fn admit(r: &dyn Read, now: u64, envelope: &Envelope) -> Result<(), Reject> {
    let actor = &envelope.actor;
    identity::is_valid(r, actor, now)?;
    let refused = || Err(Reject::new(Code::NotAllowed, [actor, &envelope.command.name()]));
    match (need(&envelope.command), actor) {
        (Need::System, Actor::System)
        | (
            Need::Replica | Need::ReplicaOr(_) | Need::NodeOrReplica(_),
            Actor::System | Actor::Replica { .. },
        )
        | (Need::Enrol, Actor::Replica { .. } | Actor::Anonymous { .. })
        | (Need::AnyNode, Actor::Node { .. }) => Ok(()),
        (Need::Role(role) | Need::ReplicaOr(role), Actor::Operator { name, .. }) => has_role(r, name, role),
        (Need::Operator(own), Actor::Operator { name, .. }) => {
            if own == *name {
                Ok(())
            } else {
                has_role(r, name, Role::Admin)
            }
        }
        (Need::Node(own) | Need::NodeOrReplica(own), Actor::Node { device_id, .. }) => {
            if own == *device_id {
                Ok(())
            } else {
                Err(Reject::new(Code::NotYours, [actor, &own]))
            }
        }
        _ => refused(),
    }
}

fn has_role(r: &dyn Read, name: &str, needed: Role) -> Result<(), Reject> {
    let role = access::operator(r, name).map_or(Role::Viewer, |operator| operator.role());
    if role >= needed {
        return Ok(());
    }
    Err(Reject::new(
        Code::RoleTooLow,
        [&name, &role.as_str(), &needed.as_str()],
    ))
}

fn need(command: &Command) -> Need {
    match command {
        Command::Cluster(command) => command.action.as_ref().map(cluster_need),
        Command::Access(command) => command.action.as_ref().map(|_| Need::Role(Role::Admin)),
        Command::Identity(command) => command.action.as_ref().map(identity_need),
        Command::Pairing(command) => command.action.as_ref().map(pairing_need),
        Command::Nodes(command) => command.action.as_ref().map(nodes_need),
        Command::Dispatch(command) => command.action.as_ref().map(dispatch_need),
        Command::Ca(command) => command.action.as_ref().map(ca_need),
        Command::Approvals(command) => command.action.as_ref().map(approvals_need),
        Command::Fleet(command) => command.action.as_ref().map(fleet_need),
        Command::Leases(command) => command.action.as_ref().map(leases_need),
    }
    .unwrap_or(Need::System)
}

fn cluster_need(action: &cluster::Action) -> Need {
    use cluster::Action;
    match action {
        Action::Genesis(_) => Need::System,
        Action::MintJoinToken(_) | Action::RemoveReplica(_) => Need::Role(Role::Admin),
        Action::AllocateReplica(_)
        | Action::AdmitReplica(_)
        | Action::SetReplicaStatus(_)
        | Action::AnnounceCertificate(_) => Need::Replica,
        Action::UpdateReplicaAddresses(_) | Action::RaiseFeatureLevel(_) => Need::ReplicaOr(Role::Admin),
    }
}

fn identity_need(action: &identity::Action) -> Need {
    use identity::Action;
    match action {
        Action::RevokeDevice(_) | Action::RemoveDevice(_) => Need::Role(Role::Operator),
        Action::PurgeDevice(_) => Need::Role(Role::Admin),
        Action::RenewCertificate(command) => Need::Node(command.device_id),
        Action::RevokeOperatorCertificate(_) => Need::Role(Role::Admin),
        Action::RenewOperatorCertificate(command) => Need::Operator(command.name.clone()),
        Action::ConfirmCertificate(_) => Need::Role(Role::Viewer),
        Action::RotateDevice(_) | Action::ClearClone(_) => Need::Role(Role::Operator),
        Action::RecoverDevice(_) => Need::Replica,
        Action::SetPolicy(_) => Need::Role(Role::Admin),
    }
}

fn pairing_need(action: &pairing::Action) -> Need {
    use pairing::Action;
    match action {
        Action::MintCode(_) | Action::RevokeCode(_) | Action::Approve(_) | Action::Reject(_) => {
            Need::Role(Role::Operator)
        }
        Action::BeginAttempt(_) | Action::FailAttempt(_) | Action::Prove(_) => Need::Enrol,
        Action::MarkCompleted(_) | Action::Expire(_) => Need::Replica,
    }
}

fn nodes_need(action: &nodes::Action) -> Need {
    use nodes::Action;
    match action {
        Action::Register(command) => Need::Node(command.device_id),
        Action::Attach(command) => Need::Node(command.device_id),
        Action::Detach(command) => Need::NodeOrReplica(command.device_id),
        Action::DetachReplica(_) | Action::DetachMany(_) | Action::Lapse(_) => Need::Replica,
    }
}

fn dispatch_need(action: &dispatch::Action) -> Need {
    use dispatch::Action;
    match action {
        Action::Submit(_) | Action::Cancel(_) => Need::Role(Role::Operator),
        Action::Complete(_) | Action::AwaitMediation(_) | Action::ResumeFromMediation(_) => Need::AnyNode,
        Action::Expire(_) | Action::Wake(_) => Need::Replica,
    }
}

fn ca_need(action: &ca::Action) -> Need {
    use ca::Action;
    match action {
        Action::BeginRoot(_) | Action::AdvanceRoot(_) | Action::RevertRoot(_) | Action::AskRotation(_) => {
            Need::Role(Role::Admin)
        }
        Action::CertifyAuthority(_)
        | Action::RotateAuthority(_)
        | Action::RetireAuthority(_)
        | Action::Acknowledge(_)
        | Action::ReplicaReady(_)
        | Action::PublishCrl(_) => Need::Replica,
    }
}

fn approvals_need(action: &approvals::Action) -> Need {
    use approvals::Action;
    match action {
        Action::CreateGrant(_) | Action::RevokeGrant(_) | Action::Decide(_) | Action::Withdraw(_) => {
            Need::Role(Role::Operator)
        }
        Action::Expire(_) => Need::Replica,
        Action::SetPolicy(_) => Need::Role(Role::Admin),
    }
}

fn fleet_need(action: &fleet::Action) -> Need {
    use fleet::Action;
    match action {
        Action::SetPolicy(_) => Need::Role(Role::Admin),
        Action::OpenChallenge(command) => Need::Node(command.worker_id),
        Action::Attest(command) => Need::Node(command.worker_id),
        Action::Violate(command) => Need::Node(command.worker_id),
        Action::Quarantine(_)
        | Action::Reverify(_)
        | Action::Release(_)
        | Action::Drain(_)
        | Action::Cleanup(_) => Need::Role(Role::Operator),
        Action::Lapse(_) | Action::Recheck(_) => Need::Replica,
        Action::Reap(_) => Need::ReplicaOr(Role::Operator),
    }
}

fn leases_need(action: &leases::Action) -> Need {
    use leases::Action;
    match action {
        Action::StartRun(_) | Action::CancelRun(_) | Action::RevokeLease(_) => Need::Role(Role::Operator),
        Action::PutArtifact(command) if command.lease_id.is_none() => Need::Role(Role::Operator),
        Action::PutArtifact(_) | Action::Accept(_) | Action::Finish(_) | Action::Cleaned(_) => Need::AnyNode,
        Action::Renew(_) | Action::Expire(_) => Need::Replica,
        Action::Reconcile(command) => Need::Node(command.worker_id),
    }
}
