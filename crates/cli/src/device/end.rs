//! The end of a device: revoked everywhere, then forgotten, then even what it is refused by.
//!
//! Invariants: what is said to be enforced, a replica has said; a wait that ends early tells what is pending and why,
//! and can be taken up again at any replica.

use std::io::Write as _;
use std::time::Duration;

use clap::Args;
use palyra_client::{Client, Enforced};
use palyra_proto::node::v1::{
    DeviceInfo, GetDeviceRequest, PurgeDeviceRequest, RemoveDeviceRequest, ReplicaEnforcement,
    RevokeDeviceRequest, WatchRevocationResponse,
};
use serde::Serialize;

use crate::failure::{Failure, PARTIAL, Result};
use crate::output::{Source, interactive, note};
use crate::session::{Global, required_reason};

/// How long a revocation waits for all replicas when nothing is asked for: twice what it takes for the
/// authority of a lost replica to lapse.
const REVOKE_WAIT: Duration = Duration::from_secs(15);

/// How long to wait.
#[derive(Debug, Args)]
struct Waiting {
    /// Wait until every replica has enforced it; this is the default
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Answer once it is committed
    #[arg(long)]
    no_wait: bool,
}

/// Which device is revoked.
#[derive(Debug, Args)]
pub(crate) struct Revoke {
    /// Device id, name, or the beginning of an id
    device: String,
    /// Why; kept in the journal
    #[arg(long)]
    reason: String,
    #[command(flatten)]
    waiting: Waiting,
}

/// Whose revocation is asked about.
#[derive(Debug, Args)]
pub(crate) struct Revocation {
    /// Device id, name, or the beginning of an id
    device: String,
    #[command(flatten)]
    waiting: Waiting,
}

/// Which device is removed.
#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// Device id, name, or the beginning of an id
    device: String,
    /// Why; kept in the journal
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// Revoke it as well, in the same entry; needs a reason
    #[arg(long)]
    revoke: bool,
    #[command(flatten)]
    waiting: Waiting,
}

/// Which device is purged.
#[derive(Debug, Args)]
pub(crate) struct Purge {
    /// Device id, name, or the beginning of an id, of a removed device
    device: String,
    /// Why; kept in the journal
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// Also while a certificate of it has not expired
    #[arg(long)]
    force: bool,
    /// Do not ask for the id to be typed
    #[arg(long)]
    yes: bool,
}

/// `palyra device revoke`.
pub(crate) async fn revoke(global: &Global, client: &Client, revoke: Revoke) -> Result {
    required_reason(&revoke.reason)?;
    let device = find(client, revoke.device).await?;
    let request = RevokeDeviceRequest {
        request_id: global.request_id(),
        device_id: device.id.clone(),
        reason: revoke.reason,
        wait_ms: 1,
    };
    let answer = client.revoke_device(request).await?;
    let end = End {
        did: "revoked",
        device,
        index: answer.index,
        source: answer.write.into(),
    };
    end.follow(global, client, &revoke.waiting).await
}

/// `palyra device revocation`.
pub(crate) async fn revocation(global: &Global, client: &Client, ask: Revocation) -> Result {
    let answer = client
        .get_device(GetDeviceRequest {
            device_id: ask.device,
            read: None,
        })
        .await?;
    let end = End {
        did: "revoked",
        device: answer.device.unwrap_or_default(),
        index: 0,
        source: answer.read.into(),
    };
    end.follow(global, client, &ask.waiting).await
}

/// `palyra device remove`.
pub(crate) async fn remove(global: &Global, client: &Client, remove: Remove) -> Result {
    if remove.revoke {
        required_reason(&remove.reason)?;
    }
    let device = find(client, remove.device).await?;
    let request = RemoveDeviceRequest {
        request_id: global.request_id(),
        device_id: device.id.clone(),
        reason: remove.reason,
        revoke: remove.revoke,
        wait_ms: 1,
    };
    let answer = client.remove_device(request).await?;
    let end = End {
        did: "removed",
        device,
        index: answer.index,
        source: answer.write.into(),
    };
    end.follow(global, client, &remove.waiting).await
}

/// `palyra device purge`.
pub(crate) async fn purge(global: &Global, client: &Client, purge: Purge) -> Result {
    let device = find(client, purge.device).await?;
    if !purge.yes {
        confirm(&device)?;
    }
    let request = PurgeDeviceRequest {
        request_id: global.request_id(),
        device_id: device.id.clone(),
        reason: purge.reason,
        force: purge.force,
    };
    let answer = client.purge_device(request).await?;
    let view = Purged { device: &device.id };
    let facts = [
        ("purged", device.id.clone()),
        ("name", device.name),
        (
            "state",
            "a machine with its id or its keys may pair again".to_owned(),
        ),
    ];
    global.out().one(&view, answer.write.into(), &facts)
}

/// By its id from here on: a name means a device only while it is trusted, and the question is asked again.
async fn find(client: &Client, device: String) -> Result<DeviceInfo> {
    let found = client
        .get_device(GetDeviceRequest {
            device_id: device,
            read: None,
        })
        .await?;
    Ok(found.device.unwrap_or_default())
}

/// Has the id typed: this lets a machine that was shut out for good come back.
fn confirm(device: &DeviceInfo) -> Result {
    let next = format!("repeat with --yes: palyra device purge {} --yes", device.id);
    if !interactive() {
        let message = "purging a device has to be confirmed, and this is no terminal";
        return Err(Failure::usage(message, next));
    }
    let mut stderr = std::io::stderr();
    let (id, name) = (&device.id, &device.name);
    write!(
        stderr,
        "{id} ({name}) may pair again after this. Type its id to go on: "
    )?;
    stderr.flush()?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    if line.trim().eq_ignore_ascii_case(&device.id) {
        return Ok(());
    }
    Err(Failure::usage("that is not its id; nothing was purged", next))
}

/// A device whose end was asked for.
struct End {
    did: &'static str,
    device: DeviceInfo,
    index: u64,
    source: Source,
}

impl End {
    /// Tells how far it is until it is done, or for as long as was asked for.
    async fn follow(self, global: &Global, client: &Client, waiting: &Waiting) -> Result {
        let wait = match (waiting.no_wait, waiting.wait) {
            (true, _) => Duration::ZERO,
            (false, _) => global.timeout.unwrap_or(REVOKE_WAIT),
        };
        let mut progress = client.revocation(&self.device.id, wait);
        let mut last = None;
        let mut told = String::new();
        loop {
            match progress.next().await {
                Ok(Some(Enforced::Progress(now))) => {
                    let line = line(&now);
                    if !waiting.no_wait && line != told {
                        note(&line);
                        told = line;
                    }
                    last = Some(now);
                    if waiting.no_wait {
                        break;
                    }
                }
                Ok(Some(Enforced::Lost { cause })) => note(&format!("{cause}; still asking")),
                Ok(None) => break,
                // Of a revocation that is not there: `palyra device revocation` of a trusted device.
                Err(error) if self.index == 0 => return Err(error.into()),
                Err(error) => {
                    let cause = error.message;
                    note(&format!(
                        "committed; how far it is enforced is not known: {cause}"
                    ));
                    break;
                }
            }
        }
        self.print(global, last.unwrap_or_default(), waiting.no_wait)
    }

    fn print(self, global: &Global, last: WatchRevocationResponse, no_wait: bool) -> Result {
        let with = |states: &[&str]| -> Vec<u64> {
            let of = last
                .replicas
                .iter()
                .filter(|replica| states.contains(&replica.state.as_str()));
            of.map(|replica| replica.replica_id).collect()
        };
        let (enforced, pending) = (with(&["closed", "lapsed"]), with(&["pending"]));
        let view = Ended {
            device: &self.device.id,
            revoked_index: self.index.max(last.index),
            complete: last.complete,
            enforced: &enforced,
            pending: &pending,
            replicas: last.replicas.iter().map(ReplicaView::from).collect(),
        };
        let state = if last.complete {
            "no replica lets it in any more".to_owned()
        } else {
            format!(
                "committed; ask again: palyra device revocation {}",
                self.device.id
            )
        };
        let facts = [
            (self.did, self.device.id.clone()),
            ("name", self.device.name.clone()),
            ("state", state),
            ("enforced by", replicas(&enforced)),
            ("pending at", replicas(&pending)),
        ];
        global.out().one(&view, self.source, &facts)?;
        if last.complete || no_wait {
            Ok(())
        } else {
            Err(Failure::Silent(PARTIAL))
        }
    }
}

/// `2/3 replicas enforced; r3 pending: unreachable; its authority lapses in 4 s`.
fn line(progress: &WatchRevocationResponse) -> String {
    let all = progress.replicas.len();
    let pending = progress
        .replicas
        .iter()
        .filter(|replica| replica.state == "pending");
    let pending: Vec<String> = pending.map(told).collect();
    let mut line = format!("{}/{all} replicas enforced", all - pending.len());
    for told in pending {
        line = format!("{line}; {told}");
    }
    line
}

fn told(replica: &ReplicaEnforcement) -> String {
    let ReplicaEnforcement {
        replica_id,
        reason,
        lapses_in_ms,
        ..
    } = replica;
    let lapse = match (reason.as_str(), lapses_in_ms.div_ceil(1_000)) {
        // One that answers is waited for, however long it takes.
        ("it is closing connections", _) | (_, 0) => String::new(),
        (_, seconds) => format!("; its authority lapses in {seconds} s"),
    };
    format!("r{replica_id} pending: {reason}{lapse}")
}

fn replicas(ids: &[u64]) -> String {
    ids.iter()
        .map(|id| format!("r{id}"))
        .collect::<Vec<_>>()
        .join(" ")
}

#[derive(Serialize)]
struct Ended<'a> {
    device: &'a str,
    /// Of the entry that revoked it; `index` is that of the answer, as in every other.
    revoked_index: u64,
    complete: bool,
    enforced: &'a [u64],
    pending: &'a [u64],
    replicas: Vec<ReplicaView>,
}

#[derive(Serialize)]
struct ReplicaView {
    replica: u64,
    name: String,
    state: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    #[serde(skip_serializing_if = "is_zero")]
    lapses_in_ms: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl From<&ReplicaEnforcement> for ReplicaView {
    fn from(replica: &ReplicaEnforcement) -> ReplicaView {
        ReplicaView {
            replica: replica.replica_id,
            name: replica.name.clone(),
            state: replica.state.clone(),
            reason: replica.reason.clone(),
            lapses_in_ms: replica.lapses_in_ms,
        }
    }
}

#[derive(Serialize)]
struct Purged<'a> {
    device: &'a str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_says_who_is_pending_and_why() {
        let replica = |replica_id, state: &str, reason: &str, lapses_in_ms| ReplicaEnforcement {
            replica_id,
            state: state.to_owned(),
            reason: reason.to_owned(),
            lapses_in_ms,
            ..ReplicaEnforcement::default()
        };
        let progress = |replicas| WatchRevocationResponse {
            replicas,
            ..WatchRevocationResponse::default()
        };
        assert_eq!(
            line(&progress(vec![
                replica(1, "closed", "", 0),
                replica(2, "lapsed", "", 0),
                replica(3, "pending", "unreachable", 3_200),
            ])),
            "2/3 replicas enforced; r3 pending: unreachable; its authority lapses in 4 s"
        );
        assert_eq!(
            line(&progress(vec![replica(
                1,
                "pending",
                "it is closing connections",
                900
            )])),
            "0/1 replicas enforced; r1 pending: it is closing connections"
        );
        assert_eq!(
            line(&progress(vec![replica(1, "closed", "", 0)])),
            "1/1 replicas enforced"
        );
    }
}
