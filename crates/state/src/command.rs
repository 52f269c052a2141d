//! Envelope and command: what travels in the log, encoded once at the edge.
//!
//! An entry that this binary does not understand is an error and halts the replica; it is never skipped, for
//! the others may understand it.

use std::fmt;

use prost::Message as _;

use crate::actor::{Actor, WireActor};
use crate::ids::Id;
use crate::{access, approvals, ca, cluster, dispatch, fleet, identity, leases, limits, nodes, pairing};

/// A request: who asks for what, under which request id.
#[derive(Clone, Debug, PartialEq)]
pub struct Envelope {
    /// A ULID by the asking side; the same for every retry.
    pub request_id: Id,
    /// Who asks, verified by the edge.
    pub actor: Actor,
    /// What is asked.
    pub command: Command,
}

/// What is asked, by domain.
#[derive(Clone, PartialEq, prost::Oneof)]
#[expect(clippy::large_enum_variant, reason = "one is in memory at a time")]
pub enum Command {
    /// Of the cluster.
    #[prost(message, tag = "10")]
    Cluster(cluster::Command),
    /// About operators.
    #[prost(message, tag = "11")]
    Access(access::Command),
    /// About devices and certificates.
    #[prost(message, tag = "12")]
    Identity(identity::Command),
    /// About pairing.
    #[prost(message, tag = "13")]
    Pairing(pairing::Command),
    /// About nodes and sessions.
    #[prost(message, tag = "14")]
    Nodes(nodes::Command),
    /// About dispatches.
    #[prost(message, tag = "15")]
    Dispatch(dispatch::Command),
    /// About the cluster's authorities.
    #[prost(message, tag = "16")]
    Ca(ca::Command),
    /// About approvals and grants.
    #[prost(message, tag = "17")]
    Approvals(approvals::Command),
    /// About the worker fleet.
    #[prost(message, tag = "18")]
    Fleet(fleet::Command),
    /// About runs and leases.
    #[prost(message, tag = "19")]
    Leases(leases::Command),
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireEnvelope {
    #[prost(message, required, tag = "1")]
    request_id: Id,
    #[prost(message, required, tag = "2")]
    actor: WireActor,
    #[prost(oneof = "Command", tags = "10, 11, 12, 13, 14, 15, 16, 17, 18, 19")]
    command: Option<Command>,
}

impl Envelope {
    /// A request.
    #[must_use]
    pub fn new(request_id: Id, actor: Actor, command: impl Into<Command>) -> Envelope {
        Envelope {
            request_id,
            actor,
            command: command.into(),
        }
    }

    /// The bytes for the log. Encode once and carry these: `apply` hashes nothing else.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let wire = WireEnvelope {
            request_id: self.request_id,
            actor: WireActor::from(&self.actor),
            command: Some(self.command.clone()),
        };
        wire.encode_to_vec()
    }
}

/// Why bytes are no envelope that this binary understands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Undecodable {
    /// No protobuf, or cut short.
    Malformed(String),
    /// Over `limits::ENVELOPE_MAX` bytes.
    TooLarge(usize),
    /// An actor of a later version.
    UnknownActor,
    /// A command of a later version, or one with an enum value of a later version.
    UnknownCommand,
}

impl fmt::Display for Undecodable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Undecodable::Malformed(cause) => write!(f, "the entry is damaged: {cause}"),
            Undecodable::TooLarge(size) => {
                write!(
                    f,
                    "the entry has {size} bytes; the limit is {}",
                    limits::ENVELOPE_MAX
                )
            }
            Undecodable::UnknownActor => {
                f.write_str("the entry names an actor that this version does not know")
            }
            Undecodable::UnknownCommand => {
                f.write_str("the entry holds a command that this version does not know")
            }
        }
    }
}

impl std::error::Error for Undecodable {}

/// Reads an entry.
///
/// # Errors
/// [`Undecodable`], on which a replica must halt: it needs a newer binary, or its log is damaged.
pub fn decode(bytes: &[u8]) -> Result<Envelope, Undecodable> {
    if bytes.len() > limits::ENVELOPE_MAX {
        return Err(Undecodable::TooLarge(bytes.len()));
    }
    let wire = WireEnvelope::decode(bytes).map_err(|error| Undecodable::Malformed(error.to_string()))?;
    let actor = wire.actor.into_actor().ok_or(Undecodable::UnknownActor)?;
    let command = wire.command.ok_or(Undecodable::UnknownCommand)?;
    if !command.is_known() {
        return Err(Undecodable::UnknownCommand);
    }
    Ok(Envelope {
        request_id: wire.request_id,
        actor,
        command,
    })
}

impl Command {
    /// Stable dotted name, such as `pairing.approve`; `unknown` for what [`decode`] refuses.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Command::Cluster(command) => command.action.as_ref().map(cluster_name),
            Command::Access(command) => command.action.as_ref().map(access_name),
            Command::Identity(command) => command.action.as_ref().map(identity_name),
            Command::Pairing(command) => command.action.as_ref().map(pairing_name),
            Command::Nodes(command) => command.action.as_ref().map(nodes_name),
            Command::Dispatch(command) => command.action.as_ref().map(dispatch_name),
            Command::Ca(command) => command.action.as_ref().map(ca_name),
            Command::Approvals(command) => command.action.as_ref().map(approvals_name),
            Command::Fleet(command) => command.action.as_ref().map(fleet_name),
            Command::Leases(command) => command.action.as_ref().map(leases_name),
        }
        .unwrap_or("unknown")
    }

    /// The feature level that a cluster must have before this may be proposed: the one of the version that
    /// brought the command. Those of later versions name a higher one here.
    pub(crate) fn feature_level(&self) -> u32 {
        limits::FIRST_FEATURE_LEVEL
    }

    /// Whether this binary knows the command and every enum value in it.
    fn is_known(&self) -> bool {
        match self {
            Command::Cluster(command) => command.action.as_ref().is_some_and(cluster_is_known),
            Command::Access(command) => command.action.as_ref().is_some_and(access_is_known),
            Command::Identity(command) => command.action.is_some(),
            Command::Pairing(command) => command.action.as_ref().is_some_and(pairing_is_known),
            Command::Nodes(command) => command.action.as_ref().is_some_and(nodes_is_known),
            Command::Dispatch(command) => command.action.as_ref().is_some_and(dispatch_is_known),
            Command::Ca(command) => command.action.as_ref().is_some_and(ca_is_known),
            Command::Approvals(command) => command.action.as_ref().is_some_and(approvals_is_known),
            Command::Fleet(command) => command.action.as_ref().is_some_and(fleet_is_known),
            Command::Leases(command) => command.action.as_ref().is_some_and(leases_is_known),
        }
    }
}

fn cluster_name(action: &cluster::Action) -> &'static str {
    match action {
        cluster::Action::Genesis(_) => "cluster.genesis",
        cluster::Action::MintJoinToken(_) => "cluster.mint_join_token",
        cluster::Action::AllocateReplica(_) => "cluster.allocate_replica",
        cluster::Action::AdmitReplica(_) => "cluster.admit_replica",
        cluster::Action::SetReplicaStatus(_) => "cluster.set_replica_status",
        cluster::Action::UpdateReplicaAddresses(_) => "cluster.update_replica_addresses",
        cluster::Action::RemoveReplica(_) => "cluster.remove_replica",
        cluster::Action::RaiseFeatureLevel(_) => "cluster.raise_feature_level",
        cluster::Action::AnnounceCertificate(_) => "cluster.announce_certificate",
    }
}

fn access_name(action: &access::Action) -> &'static str {
    match action {
        access::Action::AddOperator(_) => "access.add_operator",
        access::Action::RemoveOperator(_) => "access.remove_operator",
        access::Action::SetRole(_) => "access.set_role",
    }
}

fn identity_name(action: &identity::Action) -> &'static str {
    match action {
        identity::Action::RevokeDevice(_) => "identity.revoke_device",
        identity::Action::RenewCertificate(_) => "identity.renew_certificate",
        identity::Action::RevokeOperatorCertificate(_) => "identity.revoke_operator_certificate",
        identity::Action::RenewOperatorCertificate(_) => "identity.renew_operator_certificate",
        identity::Action::RemoveDevice(_) => "identity.remove_device",
        identity::Action::PurgeDevice(_) => "identity.purge_device",
        identity::Action::ConfirmCertificate(_) => "identity.confirm_certificate",
        identity::Action::RotateDevice(_) => "identity.rotate_device",
        identity::Action::RecoverDevice(_) => "identity.recover_device",
        identity::Action::ClearClone(_) => "identity.clear_clone",
        identity::Action::SetPolicy(_) => "identity.set_policy",
    }
}

fn pairing_name(action: &pairing::Action) -> &'static str {
    match action {
        pairing::Action::MintCode(_) => "pairing.mint_code",
        pairing::Action::RevokeCode(_) => "pairing.revoke_code",
        pairing::Action::BeginAttempt(_) => "pairing.begin_attempt",
        pairing::Action::FailAttempt(_) => "pairing.fail_attempt",
        pairing::Action::Prove(_) => "pairing.prove",
        pairing::Action::Approve(_) => "pairing.approve",
        pairing::Action::Reject(_) => "pairing.reject",
        pairing::Action::MarkCompleted(_) => "pairing.mark_completed",
        pairing::Action::Expire(_) => "pairing.expire",
    }
}

fn nodes_name(action: &nodes::Action) -> &'static str {
    match action {
        nodes::Action::Register(_) => "nodes.register",
        nodes::Action::Attach(_) => "nodes.attach",
        nodes::Action::Detach(_) => "nodes.detach",
        nodes::Action::DetachReplica(_) => "nodes.detach_replica",
        nodes::Action::DetachMany(_) => "nodes.detach_many",
        nodes::Action::Lapse(_) => "nodes.lapse",
    }
}

fn dispatch_name(action: &dispatch::Action) -> &'static str {
    match action {
        dispatch::Action::Submit(_) => "dispatch.submit",
        dispatch::Action::Complete(_) => "dispatch.complete",
        dispatch::Action::AwaitMediation(_) => "dispatch.await_mediation",
        dispatch::Action::ResumeFromMediation(_) => "dispatch.resume_from_mediation",
        dispatch::Action::Cancel(_) => "dispatch.cancel",
        dispatch::Action::Expire(_) => "dispatch.expire",
        dispatch::Action::Wake(_) => "dispatch.wake",
    }
}

fn ca_name(action: &ca::Action) -> &'static str {
    match action {
        ca::Action::BeginRoot(_) => "ca.begin_root",
        ca::Action::AdvanceRoot(_) => "ca.advance_root",
        ca::Action::RevertRoot(_) => "ca.revert_root",
        ca::Action::CertifyAuthority(_) => "ca.certify_authority",
        ca::Action::RotateAuthority(_) => "ca.rotate_authority",
        ca::Action::AskRotation(_) => "ca.ask_rotation",
        ca::Action::RetireAuthority(_) => "ca.retire_authority",
        ca::Action::Acknowledge(_) => "ca.acknowledge",
        ca::Action::ReplicaReady(_) => "ca.replica_ready",
        ca::Action::PublishCrl(_) => "ca.publish_crl",
    }
}

fn approvals_name(action: &approvals::Action) -> &'static str {
    match action {
        approvals::Action::CreateGrant(_) => "approvals.create_grant",
        approvals::Action::RevokeGrant(_) => "approvals.revoke_grant",
        approvals::Action::Decide(_) => "approvals.decide",
        approvals::Action::Expire(_) => "approvals.expire",
        approvals::Action::SetPolicy(_) => "approvals.set_policy",
        approvals::Action::Withdraw(_) => "approvals.withdraw",
    }
}

fn fleet_name(action: &fleet::Action) -> &'static str {
    match action {
        fleet::Action::SetPolicy(_) => "fleet.set_policy",
        fleet::Action::OpenChallenge(_) => "fleet.open_challenge",
        fleet::Action::Attest(_) => "fleet.attest",
        fleet::Action::Quarantine(_) => "fleet.quarantine",
        fleet::Action::Reverify(_) => "fleet.reverify",
        fleet::Action::Release(_) => "fleet.release",
        fleet::Action::Drain(_) => "fleet.drain",
        fleet::Action::Cleanup(_) => "fleet.cleanup",
        fleet::Action::Violate(_) => "fleet.violate",
        fleet::Action::Lapse(_) => "fleet.lapse",
        fleet::Action::Recheck(_) => "fleet.recheck",
        fleet::Action::Reap(_) => "fleet.reap",
    }
}

fn leases_name(action: &leases::Action) -> &'static str {
    match action {
        leases::Action::StartRun(_) => "leases.start_run",
        leases::Action::PutArtifact(_) => "leases.put_artifact",
        leases::Action::CancelRun(_) => "leases.cancel_run",
        leases::Action::Accept(_) => "leases.accept",
        leases::Action::Renew(_) => "leases.renew",
        leases::Action::Finish(_) => "leases.finish",
        leases::Action::Cleaned(_) => "leases.cleaned",
        leases::Action::RevokeLease(_) => "leases.revoke_lease",
        leases::Action::Expire(_) => "leases.expire",
        leases::Action::Reconcile(_) => "leases.reconcile",
    }
}

fn cluster_is_known(action: &cluster::Action) -> bool {
    match action {
        cluster::Action::SetReplicaStatus(command) => cluster::ReplicaStatus::is_valid(command.status),
        _ => true,
    }
}

fn access_is_known(action: &access::Action) -> bool {
    match action {
        access::Action::AddOperator(command) => access::Role::is_valid(command.role),
        access::Action::SetRole(command) => access::Role::is_valid(command.role),
        access::Action::RemoveOperator(_) => true,
    }
}

fn pairing_is_known(action: &pairing::Action) -> bool {
    match action {
        pairing::Action::MintCode(command) => pairing::Method::is_valid(command.method),
        pairing::Action::BeginAttempt(command) => pairing::Method::is_valid(command.method),
        _ => true,
    }
}

fn nodes_is_known(action: &nodes::Action) -> bool {
    match action {
        nodes::Action::Register(command) => command
            .capabilities
            .iter()
            .all(|capability| nodes::Effect::is_valid(capability.effect)),
        nodes::Action::DetachMany(command) => command.ends.iter().all(|end| nodes::How::is_valid(end.how)),
        _ => true,
    }
}

fn dispatch_is_known(action: &dispatch::Action) -> bool {
    match action {
        dispatch::Action::Complete(command) => dispatch::Outcome::is_valid(command.outcome),
        dispatch::Action::Submit(command) => dispatch::Priority::is_valid(command.priority),
        _ => true,
    }
}

fn ca_is_known(action: &ca::Action) -> bool {
    match action {
        ca::Action::AdvanceRoot(command) => ca::Phase::is_valid(command.from),
        ca::Action::RevertRoot(command) => ca::Phase::is_valid(command.from),
        _ => true,
    }
}

fn approvals_is_known(action: &approvals::Action) -> bool {
    match action {
        approvals::Action::CreateGrant(command) => approvals::Risk::is_valid(command.risk),
        approvals::Action::Decide(command) => approvals::Scope::is_valid(command.scope),
        _ => true,
    }
}

fn fleet_is_known(action: &fleet::Action) -> bool {
    match action {
        fleet::Action::SetPolicy(command) => command
            .policy
            .capabilities
            .iter()
            .all(|capability| fleet::Evidence::is_valid(capability.min_evidence)),
        _ => true,
    }
}

fn leases_is_known(action: &leases::Action) -> bool {
    match action {
        leases::Action::StartRun(command) => {
            dispatch::Effect::is_valid(command.effect) && fleet::Evidence::is_valid(command.min_evidence)
        }
        leases::Action::Finish(command) => leases::Outcome::is_valid(command.outcome),
        leases::Action::Reconcile(command) => command
            .held
            .iter()
            .all(|held| leases::HeldState::is_valid(held.state)),
        _ => true,
    }
}

/// Lets every single command be passed where a [`Command`] is wanted.
macro_rules! commands {
    ($($variant:ident $domain:ident { $($action:ident)* })*) => {$($(
        impl From<$domain::$action> for Command {
            fn from(command: $domain::$action) -> Command {
                Command::$variant($domain::Command { action: Some($domain::Action::$action(command)) })
            }
        }
    )*)*};
}

commands! {
    Cluster cluster {
        Genesis MintJoinToken AllocateReplica AdmitReplica SetReplicaStatus UpdateReplicaAddresses
        RemoveReplica RaiseFeatureLevel AnnounceCertificate
    }
    Access access { AddOperator RemoveOperator SetRole }
    Identity identity {
        RevokeDevice RenewCertificate RevokeOperatorCertificate RenewOperatorCertificate ConfirmCertificate
        RotateDevice RecoverDevice ClearClone SetPolicy RemoveDevice PurgeDevice
    }
    Pairing pairing {
        MintCode RevokeCode BeginAttempt FailAttempt Prove Approve Reject MarkCompleted Expire
    }
    Nodes nodes { Register Attach Detach DetachReplica DetachMany Lapse }
    Dispatch dispatch { Submit Complete AwaitMediation ResumeFromMediation Cancel Expire Wake }
    Ca ca {
        BeginRoot AdvanceRoot RevertRoot CertifyAuthority RotateAuthority AskRotation RetireAuthority Acknowledge
        ReplicaReady PublishCrl
    }
    Approvals approvals { CreateGrant RevokeGrant Decide Expire SetPolicy Withdraw }
    Fleet fleet {
        SetPolicy OpenChallenge Attest Quarantine Reverify Release Drain Cleanup Violate Lapse Recheck Reap
    }
    Leases leases { StartRun PutArtifact CancelRun Accept Renew Finish Cleaned RevokeLease Expire Reconcile }
}
