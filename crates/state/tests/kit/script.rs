//! One line of a script, `actor command key=value ..`, as an actor and a command.
//!
//! Shared by the scripts (`tests/scripts.rs`) and by the guards of instruction counts (`benches/commands.rs`), which
//! have the kit as `crate::kit`. Names stand for ids.

#[path = "access_script.rs"]
mod access_script;
#[path = "approvals_script.rs"]
mod approvals_script;
#[path = "ca_script.rs"]
mod ca_script;
#[path = "dispatch_script.rs"]
mod dispatch_script;
#[path = "fleet_script.rs"]
mod fleet_script;
#[path = "lease_script.rs"]
pub(crate) mod lease_script;

use palyra_state::cluster::ReplicaStatus;
use palyra_state::{Actor, Command, Id, cluster, identity, nodes, pairing};

use crate::kit::{self, World, certificate, commands, fingerprint};

/// The actor and the command of a line, and the name of its request when it has one.
pub(crate) fn parse(world: &mut World, line: &str) -> (Actor, Command, Option<String>) {
    let mut words = line.split_whitespace();
    let (actor, name) = (words.next().unwrap(), words.next().expect(line));
    let args: Vec<(&str, &str)> = words.map(|word| word.split_once('=').expect(word)).collect();
    let actor = actor_of(world, actor);
    let mut args = Args { world, args, line };
    let request = args.has("req");
    let command = command_of(&mut args, name);
    (actor, command, request)
}

/// `90s` in milliseconds.
pub(crate) fn duration(text: &str) -> u64 {
    let (number, unit) = text.split_at(text.len() - 1);
    let unit = match unit {
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        other => panic!("no unit: {other}"),
    };
    number.parse::<u64>().unwrap() * unit
}

/// `system`, `r2`, `anon`, `node:n1`, `node:n1/certificate`, `alice`, `alice/certificate`.
fn actor_of(world: &mut World, text: &str) -> Actor {
    if text == "system" {
        return Actor::System;
    }
    if text == "anon" {
        return Actor::Anonymous {
            source: "192.0.2.9".to_owned(),
        };
    }
    if let Some(id) = text.strip_prefix('r').and_then(|id| id.parse().ok()) {
        return Actor::Replica { id };
    }
    let (name, shown) = text.split_once('/').unwrap_or((text, text));
    let shown = fingerprint(shown.strip_prefix("node:").unwrap_or(shown));
    match name.strip_prefix("node:") {
        Some(node) => Actor::Node {
            device_id: world.id(node),
            fingerprint: shown,
        },
        None => Actor::Operator {
            name: name.to_owned(),
            fingerprint: shown,
        },
    }
}

pub(crate) struct Args<'a> {
    pub(crate) world: &'a mut World,
    pub(crate) args: Vec<(&'a str, &'a str)>,
    pub(crate) line: &'a str,
}

impl Args<'_> {
    pub(crate) fn has(&self, key: &str) -> Option<String> {
        // `~` stands for a space.
        self.args
            .iter()
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value.replace('~', " "))
    }

    pub(crate) fn text(&self, key: &str) -> String {
        self.has(key).unwrap_or_default()
    }

    pub(crate) fn number(&self, key: &str) -> u64 {
        self.has(key).map_or(0, |text| text.parse().expect(self.line))
    }

    pub(crate) fn id(&mut self, key: &str) -> Id {
        match self.has(key) {
            Some(name) => self.world.id(&name),
            None => Id::ZERO,
        }
    }

    pub(crate) fn ids(&mut self, key: &str) -> Vec<Id> {
        let list = self.text(key);
        list.split(',')
            .filter(|name| !name.is_empty())
            .map(|name| self.world.id(name))
            .collect()
    }

    /// `cert=name`, with `authority=`, `until=` (seconds after the start).
    pub(crate) fn certificate(&self) -> identity::NewCertificate {
        let mut made = certificate(&self.text("cert"));
        if let Some(name) = self.has("real_key") {
            made.spki = kit::workers::worker_certificate(&name, 1).spki;
        }
        if let Some(name) = self.has("key") {
            made.spki = kit::key(&name);
        }
        if self.has("until").is_some() {
            made.not_after = kit::T0 + self.number("until") * 1_000;
        }
        if self.has("authority").is_some() {
            made.authority = self.number("authority");
        }
        made.authority_number = self.number("authority_number") as u32;
        made
    }
}

fn command_of(args: &mut Args<'_>, name: &str) -> Command {
    let domain = name.split('.').next().unwrap();
    match domain {
        "cluster" => cluster_command(args, name),
        "access" => access_script::command(args, name),
        "identity" => identity_command(args, name),
        "pairing" => pairing_command(args, name),
        "nodes" => nodes_command(args, name),
        "dispatch" => dispatch_script::command(args, name),
        "ca" => ca_script::command(args, name),
        "approvals" => approvals_script::command(args, name),
        "leases" => lease_script::command(args, name),
        "fleet" => fleet_script::command(args, name),
        _ => panic!("no such domain: {name}"),
    }
}

fn cluster_command(args: &mut Args<'_>, name: &str) -> Command {
    match name {
        "cluster.genesis" => commands::genesis(args.world).into(),
        "cluster.mint_join_token" => cluster::MintJoinToken {
            ttl_ms: args.number("ttl"),
            ..commands::mint_token(args.world, &args.text("token"), &args.text("name"))
        }
        .into(),
        "cluster.allocate_replica" => {
            commands::allocate(args.world, &args.text("token"), &args.text("name")).into()
        }
        "cluster.admit_replica" => {
            let mut made = commands::admit(args.number("id"), &args.text("name"));
            made.root = args.number("root") as u32;
            made.certificate.authority = args.has("root").map_or(1, |_| 0);
            made.certificate.authority_number = made.root;
            made.into()
        }
        "cluster.set_replica_status" => {
            let status = match args.text("to").as_str() {
                "joining" => ReplicaStatus::Joining,
                "learner" => ReplicaStatus::Learner,
                "voter" => ReplicaStatus::Voter,
                "removed" => ReplicaStatus::Removed,
                other => panic!("{other}"),
            };
            cluster::SetReplicaStatus {
                replica_id: args.number("id"),
                status: status as i32,
            }
            .into()
        }
        "cluster.update_replica_addresses" => cluster::UpdateReplicaAddresses {
            replica_id: args.number("id"),
            addresses: commands::addresses(&args.text("host")),
            feature_level: args.number("level") as u32,
            max_staleness_ms: args.number("staleness"),
        }
        .into(),
        "cluster.remove_replica" => cluster::RemoveReplica {
            replica_id: args.number("id"),
        }
        .into(),
        "cluster.announce_certificate" => commands::announce(args.number("id"), &args.certificate()).into(),
        "cluster.raise_feature_level" => cluster::RaiseFeatureLevel {
            level: args.number("level") as u32,
        }
        .into(),
        _ => panic!("no such command: {name}"),
    }
}

fn identity_command(args: &mut Args<'_>, name: &str) -> Command {
    match name {
        "identity.revoke_device" => identity::RevokeDevice {
            device_id: args.id("device"),
            reason: args.text("reason"),
        }
        .into(),
        "identity.remove_device" => identity::RemoveDevice {
            device_id: args.id("device"),
            reason: args.text("reason"),
            revoke: args.text("revoke") == "yes",
        }
        .into(),
        "identity.purge_device" => identity::PurgeDevice {
            device_id: args.id("device"),
            reason: args.text("reason"),
            force: args.text("force") == "yes",
        }
        .into(),
        "identity.renew_certificate" => identity::RenewCertificate {
            device_id: args.id("device"),
            certificate: args.certificate(),
            counter: args.number("counter"),
            source: args.text("from"),
        }
        .into(),
        "identity.recover_device" => identity::RecoverDevice {
            device_id: args.id("device"),
            certificate: args.certificate(),
            counter: args.number("counter"),
            source: args.text("from"),
            shown: fingerprint(&args.text("shown")),
        }
        .into(),
        "identity.confirm_certificate" => identity::ConfirmCertificate {}.into(),
        "identity.rotate_device" => identity::RotateDevice {
            device_id: args.id("device"),
            reason: args.text("reason"),
            deadline_ms: args.number("deadline"),
        }
        .into(),
        "identity.clear_clone" => identity::ClearClone {
            device_id: args.id("device"),
            reason: args.text("reason"),
        }
        .into(),
        "identity.set_policy" => {
            let recovery_ms = args.number("recovery");
            identity::SetPolicy { recovery_ms }.into()
        }
        "identity.revoke_operator_certificate" => identity::RevokeOperatorCertificate {
            fingerprint: fingerprint(&args.text("cert")),
            reason: args.text("reason"),
        }
        .into(),
        "identity.renew_operator_certificate" => identity::RenewOperatorCertificate {
            name: args.text("name"),
            certificate: args.certificate(),
        }
        .into(),
        _ => panic!("no such command: {name}"),
    }
}

fn pairing_command(args: &mut Args<'_>, name: &str) -> Command {
    let (code, device) = (args.text("code"), args.text("device"));
    match name {
        "pairing.mint_code" => pairing::MintCode {
            ttl_ms: args.number("ttl"),
            device_name: args.text("device_name"),
            ..commands::mint(args.world, &code, &args.text("method"))
        }
        .into(),
        "pairing.revoke_code" => pairing::RevokeCode {
            code_id: args.id("code"),
            reason: args.text("reason"),
        }
        .into(),
        "pairing.begin_attempt" => begin(args).into(),
        "pairing.fail_attempt" => commands::fail(args.world, &args.text("attempt"), &code).into(),
        "pairing.prove" => {
            let attempt = args.has("attempt");
            let mut made = commands::prove(
                args.world,
                &args.text("pairing"),
                &code,
                attempt.as_deref(),
                &device,
            );
            if let Some(name) = args.has("key") {
                made.csr_spki = kit::key(&name);
            }
            made.into()
        }
        "pairing.approve" => pairing::Approve {
            pairing_id: args.id("pairing"),
            certificate: args.certificate(),
            sas: args.text("sas"),
            reason: args.text("reason"),
        }
        .into(),
        "pairing.reject" => pairing::Reject {
            pairing_id: args.id("pairing"),
            reason: args.text("reason"),
        }
        .into(),
        "pairing.mark_completed" => pairing::MarkCompleted {
            pairing_id: args.id("pairing"),
        }
        .into(),
        "pairing.expire" => pairing::Expire {
            codes: args.ids("codes"),
            requests: args.ids("requests"),
        }
        .into(),
        _ => panic!("no such command: {name}"),
    }
}

fn begin(args: &mut Args<'_>) -> pairing::BeginAttempt {
    let method = if args.text("method") == "ticket" {
        pairing::Method::Ticket
    } else {
        pairing::Method::Pin
    };
    pairing::BeginAttempt {
        attempt_id: args.id("attempt"),
        code_id: args.has("code").map(|name| args.world.id(&name)),
        code_number: args.number("number") as u32,
        device_id: args.id("device"),
        source: "192.0.2.7".to_owned(),
        method: method as i32,
    }
}

fn nodes_command(args: &mut Args<'_>, name: &str) -> Command {
    let device = args.text("device");
    match name {
        "nodes.register" => {
            let mut made = commands::register(args.world, &device);
            if args.has("slots").is_some() {
                let [slots, each] = [args.number("slots") as u32, args.number("each") as u32];
                let [queue, each_queue] = [args.number("queue") as u32, args.number("each_queue") as u32];
                made = commands::limited(made, [slots, each], [queue, each_queue]);
            }
            if let Some(attempts) = args.has("attempts") {
                let echo = &mut made.capabilities[0];
                echo.max_attempts = attempts.parse().unwrap();
                echo.backoff_ms = args.number("backoff");
                echo.retry_on = args.has("retry_on").into_iter().collect();
            }
            if let Some(platform) = args.has("platform") {
                made.platform = platform;
            }
            made.lost_after = lost_after(&args.text("lost_after"));
            if let Some(twice) = args.has("twice") {
                let again = commands::capability(&twice, nodes::Effect::Once);
                made.capabilities.extend([again.clone(), again]);
            }
            made.into()
        }
        "nodes.attach" => nodes::Attach {
            device_id: args.id("device"),
            replica_id: args.number("replica"),
            transport: args.has("transport").unwrap_or_else(|| "stream".to_owned()),
            held: args.ids("held"),
            held_attempts: args
                .has("held_attempt")
                .map(|text| text.parse().unwrap())
                .into_iter()
                .collect(),
            fallback: args.has("fallback").unwrap_or_default(),
        }
        .into(),
        "nodes.detach" => commands::detach(args.world, &device, args.number("epoch")).into(),
        "nodes.detach_replica" => nodes::DetachReplica {
            replica_id: args.number("replica"),
            limit: args.number("limit") as u32,
            up_to_epoch: args.number("up_to"),
            reason: "replica lost".to_owned(),
            suspect_for: args.number("wait"),
            silent_for: args.number("silent"),
        }
        .into(),
        "nodes.detach_many" => detach_many(args).into(),
        "nodes.lapse" => nodes::Lapse {
            ids: args.ids("devices"),
            lost_after: args.number("lost_after"),
        }
        .into(),
        _ => panic!("no such command: {name}"),
    }
}

fn lost_after(text: &str) -> u64 {
    match text {
        "" => 0,
        "never" => palyra_state::limits::NEVER,
        text => text.parse().unwrap(),
    }
}

/// `devices=n1,n2`, the same `epoch=`, `how=` (lost, left, moving), `reason=` and `silent=` for all.
fn detach_many(args: &mut Args<'_>) -> nodes::DetachMany {
    let how = match args.text("how").as_str() {
        "left" => nodes::How::Left,
        "moving" => nodes::How::Moving,
        _ => nodes::How::Lost,
    };
    let ids = args.ids("devices");
    let ended = |device_id| nodes::Ended {
        device_id,
        epoch: args.number("epoch"),
        reason: args.text("reason"),
        how: how as i32,
        silent_for: args.number("silent"),
    };
    nodes::DetachMany {
        ends: ids.into_iter().map(ended).collect(),
        suspect_for: args.number("wait"),
        lost_after: lost_after(&args.text("lost_after")),
    }
}
