//! `palyra device`: the identities of paired machines, and their end.

mod certificates;
mod end;

use clap::{Args, Subcommand};
use palyra_client::{Client, wall_ms};
use palyra_proto::node::v1::{CertificateInfo, DeviceInfo, GetDeviceRequest, ListDevicesRequest};
use serde::Serialize;

use crate::failure::Result;
use crate::output::table::{Column, column, text, wide};
use crate::output::time::Moment;
use crate::output::{Out, Record, Source};
use crate::pages::{ALL, Limit};
use crate::session::Global;
use crate::watch::watch;

/// What can be done about devices.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Lists devices
    #[command(after_help = "Example:\n  palyra device ls --status revoked\n  palyra device ls -w")]
    Ls(List),
    /// Shows one device, its certificates, their rotation, and what is wrong with them
    #[command(
        visible_alias = "describe",
        after_help = "Example:\n  palyra device describe web-1"
    )]
    Show {
        /// Device id, name, or the beginning of an id
        device: String,
    },
    /// Revokes a device for good, and waits until no replica anywhere lets it in
    #[command(
        after_help = "Example:\n  palyra device revoke web-1 --reason \"stolen\"\n\nExit code 12: revoked, \
                            but not every replica is known to have enforced it yet."
    )]
    Revoke(end::Revoke),
    /// Shows how far a revocation is: which replicas have enforced it, and why others have not
    #[command(
        after_help = "Example:\n  palyra device revocation web-1\n\nAny replica can tell, at any time. Exit \
                            code 12: not every replica is known to have enforced it."
    )]
    Revocation(end::Revocation),
    /// Forgets a revoked device and its node; its id and its keys stay refused
    #[command(
        after_help = "Example:\n  palyra device remove web-1\n  palyra device remove web-2 --revoke \
                            --reason \"scrapped\""
    )]
    Remove(end::Remove),
    /// Forgets of a removed device what it is refused by, too: it may pair again. For admins
    #[command(after_help = "Example:\n  palyra device purge 01J9ZQ4Y8M6T2V5W7X1B3C5D7E")]
    Purge(end::Purge),
    /// Has devices change their certificates and keys now
    #[command(
        after_help = "Example:\n  palyra device rotate web-1 --reason \"key seen in a backup\" --wait\n  palyra \
                            device rotate --label site=brno\n\nA device that is away changes it when it comes back. \
                            Exit code 12: asked for, and not in use yet."
    )]
    Rotate(certificates::Rotate),
    /// Says that a device that is suspected to be two machines is one
    #[command(after_help = "Example:\n  palyra device clear-clone web-1 --reason \"restored from a backup\"")]
    ClearClone(certificates::ClearClone),
    /// Shows or sets how long after its certificate's end a device may recover by itself
    #[command(after_help = "Example:\n  palyra device policy\n  palyra device policy --recovery 7d")]
    Policy(certificates::Policy),
}

/// What is listed.
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only devices of this status: trusted, revoked, removed
    #[arg(
        long,
        value_name = "STATUS",
        default_value = "",
        hide_default_value = true,
        conflicts_with = "all"
    )]
    status: String,
    /// Removed devices, too
    #[arg(long)]
    all: bool,
    /// Print what changes, until interrupted
    #[arg(short, long)]
    watch: bool,
    #[command(flatten)]
    limit: Limit,
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
        Verb::Revoke(revoke) => end::revoke(global, client, revoke).await?,
        Verb::Revocation(revocation) => end::revocation(global, client, revocation).await?,
        Verb::Remove(remove) => end::remove(global, client, remove).await?,
        Verb::Purge(purge) => end::purge(global, client, purge).await?,
        Verb::Rotate(rotate) => certificates::rotate(global, client, rotate).await?,
        Verb::ClearClone(clear) => certificates::clear_clone(global, client, clear).await?,
        Verb::Policy(policy) => certificates::policy(global, client, policy).await?,
    }
    session.close().await;
    Ok(())
}

async fn devices(client: &Client, list: &List, limit: Limit) -> Result<(Vec<DeviceView>, Source)> {
    limit
        .all(async |page| {
            let request = ListDevicesRequest {
                status: if list.all {
                    "all".to_owned()
                } else {
                    list.status.clone()
                },
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
    let info = answer.device.unwrap_or_default();
    let now = wall_ms();
    let rotation = info
        .rotation
        .as_ref()
        .map(|rotation| certificates::told(rotation, now));
    let suspicion = info
        .suspicion
        .as_ref()
        .map(|found| certificates::suspicion(&info.id, found, now));
    let renewals = renewals(&info, now);
    let view = DeviceView::from(info);
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
    let removed = match view.removed_by.as_str() {
        "" => String::new(),
        by => format!(
            "{} by {by}; its id and keys stay refused until it is purged",
            view.removed_at.told(now)
        ),
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
        ("removed", removed),
        ("certificates", certificates.join("\n")),
        ("renewals", renewals),
        ("rotation", rotation.unwrap_or_default()),
        ("copied", suspicion.unwrap_or_default()),
    ];
    out.one(&view, answer.read.into(), &facts)
}

/// How often its certificate was renewed, and from where.
fn renewals(info: &DeviceInfo, now: u64) -> String {
    if info.counter == 0 {
        return String::new();
    }
    let at = Moment(info.counter_at_ms).told(now);
    let recovered = match info.recovered_at_ms {
        0 => String::new(),
        at_ms => format!(", recovered after its end {}", Moment(at_ms).told(now)),
    };
    format!(
        "{}, the last {at} from {}{recovered}",
        info.counter, info.counter_source
    )
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
    removed_at: Moment,
    removed_by: String,
    certificates: Vec<CertificateView>,
    counter: u64,
    rotation: String,
    clone_suspected: bool,
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
            counter: info.counter,
            rotation: info.rotation.map(|rotation| rotation.state).unwrap_or_default(),
            clone_suspected: info.suspicion.is_some(),
            id: info.id,
            name: info.name,
            status: info.status,
            paired_at: Moment(info.paired_at_ms),
            paired_by: info.paired_by,
            revoked_at: Moment(info.revoked_at_ms),
            revoked_by: info.revoked_by,
            reason: info.reason,
            removed_at: Moment(info.removed_at_ms),
            removed_by: info.removed_by,
            certificates: info.certificates.into_iter().map(CertificateView::from).collect(),
        }
    }
}

impl DeviceView {
    /// What an operator should know of its certificate: a copy, or a rotation that is under way.
    fn problem(&self) -> String {
        if self.clone_suspected {
            "CLONE SUSPECTED".to_owned()
        } else if matches!(self.rotation.as_str(), "" | "in_use") {
            String::new()
        } else {
            format!("rotation {}", self.rotation)
        }
    }
}

impl Record for DeviceView {
    const COLUMNS: &'static [Column] = &[
        column("DEVICE"),
        text("NAME"),
        column("STATUS"),
        text("CERTIFICATE"),
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
            self.problem(),
            self.paired_at.told(now_ms),
            self.paired_by.clone(),
            self.revoked_at.told(now_ms),
            self.revoked_by.clone(),
            self.reason.clone(),
        ]
    }
}
