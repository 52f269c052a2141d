//! `palyra device`: the identities of paired machines, and their end.

use std::time::Duration;

use clap::{Args, Subcommand};
use palyra_client::{Client, wall_ms};
use palyra_proto::node::v1::{
    CertificateInfo, DeviceInfo, GetDeviceRequest, ListDevicesRequest, RevokeDeviceRequest,
    RevokeDeviceResponse,
};
use serde::Serialize;
use tokio::time::Instant;

use crate::failure::{Failure, PARTIAL, Result};
use crate::output::table::{Column, column, text, wide};
use crate::output::time::{Moment, millis};
use crate::output::{Out, Record, Source, note};
use crate::pages::{ALL, Limit};
use crate::session::{Global, required_reason};
use crate::watch::watch;

/// How long a revocation waits for all replicas when nothing is asked for: twice what it takes for the
/// authority of a lost replica to lapse.
const REVOKE_WAIT: Duration = Duration::from_secs(15);

/// What can be done about devices.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Lists devices
    #[command(after_help = "Example:\n  palyra device ls --status revoked\n  palyra device ls -w")]
    Ls(List),
    /// Shows one device and its certificates
    #[command(after_help = "Example:\n  palyra device show web-1")]
    Show {
        /// Device id, name, or the beginning of an id
        device: String,
    },
    /// Revokes a device for good, and waits until no replica anywhere lets it in
    #[command(
        after_help = "Example:\n  palyra device revoke web-1 --reason \"stolen\"\n\nExit code 12: revoked, \
                            but not every replica is known to have enforced it yet."
    )]
    Revoke(Revoke),
}

/// What is listed.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only devices of this status: trusted, revoked
    #[arg(long, value_name = "STATUS", default_value = "", hide_default_value = true)]
    status: String,
    /// Print what changes, until interrupted
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    limit: Limit,
}

/// Which device is revoked.
#[derive(Debug, Args)]
pub(crate) struct Revoke {
    /// Device id, name, or the beginning of an id
    device: String,
    /// Why; kept in the journal
    #[arg(long)]
    reason: String,
    /// Wait until every replica has enforced it; this is the default
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Answer once it is committed
    #[arg(long)]
    no_wait: bool,
}

/// Does what was asked about devices.
pub(crate) async fn run(global: &Global, verb: Verb) -> Result {
    let session = global.open()?;
    let (client, out) = (&session.client, global.out());
    match verb {
        Verb::Ls(list) if list.watch => {
            let fetch = async |client: Client| devices(&client, &list, ALL).await;
            watch(client, out, list.limit.count(), fetch).await?;
        }
        Verb::Ls(list) => {
            let (items, source) = devices(client, &list, list.limit).await?;
            out.list(&items, source)?;
        }
        Verb::Show { device } => show(client, out, device).await?,
        Verb::Revoke(revoke) => revoke_device(global, client, revoke).await?,
    }
    session.close().await;
    Ok(())
}

async fn devices(client: &Client, list: &List, limit: Limit) -> Result<(Vec<DeviceView>, Source)> {
    limit
        .all(async |page| {
            let request = ListDevicesRequest {
                status: list.status.clone(),
                page: Some(page),
                read: None,
            };
            let answer = client.list_devices(request).await?;
            Ok((
                answer.devices.into_iter().map(DeviceView::from).collect(),
                answer.page,
                answer.read.into(),
            ))
        })
        .await
}

async fn show(client: &Client, out: Out, device: String) -> Result {
    let answer = client
        .get_device(GetDeviceRequest {
            device_id: device,
            read: None,
        })
        .await?;
    let view = DeviceView::from(answer.device.unwrap_or_default());
    let now = wall_ms();
    let certificates: Vec<String> = view
        .certificates
        .iter()
        .map(|certificate| certificate.told(now))
        .collect();
    let revoked = if view.revoked_by.is_empty() {
        String::new()
    } else {
        format!("{} by {}", view.revoked_at.told(now), view.revoked_by)
    };
    let facts = [
        ("device", view.id.clone()),
        ("name", view.name.clone()),
        ("status", view.status.clone()),
        (
            "paired",
            format!("{} by {}", view.paired_at.told(now), view.paired_by),
        ),
        ("revoked", revoked),
        ("reason", view.reason.clone()),
        ("certificates", certificates.join("\n")),
    ];
    out.one(&view, answer.read.into(), &facts)
}

async fn revoke_device(global: &Global, client: &Client, revoke: Revoke) -> Result {
    required_reason(&revoke.reason)?;
    // By its id from here on: a name means a device only while it is trusted, and the question is asked
    // again.
    let found = client
        .get_device(GetDeviceRequest {
            device_id: revoke.device,
            read: None,
        })
        .await?;
    let device = found.device.unwrap_or_default();
    let until = Instant::now() + global.timeout.unwrap_or(REVOKE_WAIT);
    let mut request = RevokeDeviceRequest {
        request_id: global.request_id(),
        device_id: device.id,
        reason: revoke.reason,
        wait_ms: 1,
    };
    let mut answer = client.revoke_device(request.clone()).await?;
    let mut told = usize::MAX;
    loop {
        if revoke.no_wait {
            break;
        }
        if told != answer.enforced.len() {
            note(&progress(&answer));
            told = answer.enforced.len();
        }
        let left = millis(until.saturating_duration_since(Instant::now()));
        if answer.pending.is_empty() || left == 0 {
            break;
        }
        // The same request id: the first call has revoked, this one asks how far it has come. It is committed, so
        // a failure is none of the revocation. In one go: a replica that is silent counts as harmless once the
        // server has waited for it long enough, and each call waits anew.
        request.wait_ms = u32::try_from(left).unwrap_or(u32::MAX);
        match client.revoke_device(request.clone()).await {
            Ok(further) => answer = further,
            Err(error) => {
                // The client has tried for long enough already.
                let cause = &error.message;
                note(&format!(
                    "committed; how far it is enforced is not known: {cause}"
                ));
                break;
            }
        }
    }
    let view = Revoked {
        device: &request.device_id,
        enforced: &answer.enforced,
        pending: &answer.pending,
    };
    let state = if answer.pending.is_empty() {
        "no replica lets it in any more"
    } else {
        "committed"
    };
    let facts = [
        ("revoked", request.device_id.clone()),
        ("name", device.name),
        ("state", state.to_owned()),
        ("enforced by", replicas(&answer.enforced)),
        ("pending at", replicas(&answer.pending)),
    ];
    global.out().one(&view, answer.write.into(), &facts)?;
    if answer.pending.is_empty() || revoke.no_wait {
        Ok(())
    } else {
        Err(Failure::Silent(PARTIAL))
    }
}

fn progress(answer: &RevokeDeviceResponse) -> String {
    let all = answer.enforced.len() + answer.pending.len();
    let end = if answer.pending.is_empty() { "" } else { "\u{2026}" };
    format!("{}/{all} replicas enforced{end}", answer.enforced.len())
}

fn replicas(ids: &[u64]) -> String {
    ids.iter()
        .map(|id| format!("r{id}"))
        .collect::<Vec<_>>()
        .join(" ")
}

#[derive(Serialize)]
struct Revoked<'a> {
    device: &'a str,
    enforced: &'a [u64],
    pending: &'a [u64],
}

/// A device as it is printed.
#[derive(Debug, Clone, Serialize)]
struct DeviceView {
    id: String,
    name: String,
    status: String,
    paired_at: Moment,
    paired_by: String,
    revoked_at: Moment,
    revoked_by: String,
    reason: String,
    certificates: Vec<CertificateView>,
}

#[derive(Debug, Clone, Serialize)]
struct CertificateView {
    fingerprint: String,
    serial: String,
    status: String,
    not_before: Moment,
    not_after: Moment,
    authority: u64,
}

impl CertificateView {
    fn told(&self, now_ms: u64) -> String {
        let short: String = self.fingerprint.chars().take(16).collect();
        format!(
            "{short}  {}  ends {}  signed by r{}",
            self.status,
            self.not_after.told(now_ms),
            self.authority
        )
    }
}

impl From<CertificateInfo> for CertificateView {
    fn from(info: CertificateInfo) -> CertificateView {
        CertificateView {
            fingerprint: info.fingerprint,
            serial: info.serial,
            status: info.status,
            not_before: Moment(info.not_before_ms),
            not_after: Moment(info.not_after_ms),
            authority: info.authority,
        }
    }
}

impl From<DeviceInfo> for DeviceView {
    fn from(info: DeviceInfo) -> DeviceView {
        DeviceView {
            id: info.id,
            name: info.name,
            status: info.status,
            paired_at: Moment(info.paired_at_ms),
            paired_by: info.paired_by,
            revoked_at: Moment(info.revoked_at_ms),
            revoked_by: info.revoked_by,
            reason: info.reason,
            certificates: info.certificates.into_iter().map(CertificateView::from).collect(),
        }
    }
}

impl Record for DeviceView {
    const COLUMNS: &'static [Column] = &[
        column("DEVICE"),
        text("NAME"),
        column("STATUS"),
        column("PAIRED"),
        wide("PAIRED BY"),
        wide("REVOKED"),
        wide("REVOKED BY"),
        wide("REASON"),
    ];

    fn key(&self) -> String {
        self.id.clone()
    }

    fn cells(&self, now_ms: u64) -> Vec<String> {
        vec![
            self.id.clone(),
            self.name.clone(),
            self.status.clone(),
            self.paired_at.told(now_ms),
            self.paired_by.clone(),
            self.revoked_at.told(now_ms),
            self.revoked_by.clone(),
            self.reason.clone(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_counts_replicas() {
        let answer = |enforced: &[u64], pending: &[u64]| RevokeDeviceResponse {
            enforced: enforced.to_vec(),
            pending: pending.to_vec(),
            write: None,
        };
        assert_eq!(progress(&answer(&[1, 2], &[3])), "2/3 replicas enforced\u{2026}");
        assert_eq!(progress(&answer(&[1, 2, 3], &[])), "3/3 replicas enforced");
    }
}
