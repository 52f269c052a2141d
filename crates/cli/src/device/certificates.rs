//! `palyra device rotate`, `clear-clone` and `policy`: the life of devices' certificates.

use std::time::Duration;

use clap::Args;
use palyra_client::{Class, Client, wall_ms};
use palyra_proto::node::v1::{
    ClearCloneRequest, CloneSuspicion, GetDeviceRequest, ListDevicesRequest, ListNodesRequest,
    RotateDeviceRequest, Rotation, SetCertificatePolicyRequest,
};
use serde::Serialize;

use crate::failure::{Failure, PARTIAL, Result};
use crate::output::note;
use crate::output::time::{Moment, millis, parse_duration, parse_limit, span};
use crate::pages::ALL;
use crate::session::{Global, required_reason};

/// How long a rotation is waited for when nothing is asked for.
const ROTATE_WAIT: Duration = Duration::from_secs(60);

/// Which devices change their certificates.
#[derive(Debug, Args)]
pub(crate) struct Rotate {
    /// Device id, name, or the beginning of an id
    #[arg(required_unless_present_any = ["all", "labels"], conflicts_with_all = ["all", "labels"])]
    device: Option<String>,
    /// All trusted devices
    #[arg(long, conflicts_with = "labels")]
    all: bool,
    /// Devices of nodes with this label; may be repeated, all must match
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = crate::node::parse_label)]
    labels: Vec<(String, String)>,
    /// Why; kept in the journal
    #[arg(long, default_value = "", hide_default_value = true)]
    reason: String,
    /// After which it is shown as overdue; without it a day
    #[arg(long, value_parser = parse_limit, value_name = "DURATION")]
    deadline: Option<Duration>,
    /// Wait until the new certificate is in use: a minute, or as --timeout says
    #[arg(long, conflicts_with_all = ["all", "labels"])]
    wait: bool,
}

/// Which device is one machine after all.
#[derive(Debug, Args)]
pub(crate) struct ClearClone {
    /// Device id, name, or the beginning of an id
    device: String,
    /// Why; kept in the journal
    #[arg(long)]
    reason: String,
}

/// What the cluster holds certificates to.
#[derive(Debug, Args)]
pub(crate) struct Policy {
    /// How long after its certificate's end a device may recover by itself, at most a year; 0: never
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    recovery: Option<Duration>,
}

#[derive(Serialize)]
struct RotationView {
    device: String,
    state: String,
    requested_at: Moment,
    deadline_at: Moment,
    fetched_at: Moment,
    used_at: Moment,
    reason: String,
    already: bool,
}

/// Asks devices to change their certificates.
pub(crate) async fn rotate(global: &Global, client: &Client, rotate: Rotate) -> Result {
    let Some(device) = rotate.device.clone() else {
        return rotate_many(global, client, &rotate).await;
    };
    let wait = global.timeout.unwrap_or(ROTATE_WAIT);
    let wait_ms = if rotate.wait { millis(wait) } else { 0 };
    let answer = client
        .rotate_device(RotateDeviceRequest {
            request_id: global.request_id(),
            device_id: device,
            reason: rotate.reason,
            deadline_ms: rotate.deadline.map_or(0, millis),
            wait_ms: u32::try_from(wait_ms).unwrap_or(u32::MAX),
        })
        .await?;
    let info = answer.device.unwrap_or_default();
    let rotation = info.rotation.unwrap_or_default();
    if answer.already {
        note("an earlier request is open; this one changed nothing");
    }
    let now = wall_ms();
    let facts = [
        ("device", info.id.clone()),
        ("name", info.name.clone()),
        ("rotation", told(&rotation, now)),
        ("next", format!("palyra device describe {}", info.id)),
    ];
    let done = rotation.used_at_ms != 0;
    let view = RotationView {
        device: info.id,
        state: rotation.state,
        requested_at: Moment(rotation.requested_at_ms),
        deadline_at: Moment(rotation.deadline_at_ms),
        fetched_at: Moment(rotation.fetched_at_ms),
        used_at: Moment(rotation.used_at_ms),
        reason: rotation.reason,
        already: answer.already,
    };
    global.out().one(&view, answer.write.into(), &facts)?;
    if rotate.wait && !done {
        return Err(Failure::Silent(PARTIAL));
    }
    Ok(())
}

#[derive(Serialize)]
struct Many {
    requested: Vec<String>,
    open_already: Vec<String>,
}

async fn rotate_many(global: &Global, client: &Client, rotate: &Rotate) -> Result {
    if global.request_id.is_some() {
        return Err(Failure::local(
            Class::Invalid,
            "--request-id names one change, and this is one for each device",
            "leave it away: a device with an open request is not asked again",
        ));
    }
    let devices = if rotate.all {
        trusted(client).await?
    } else {
        labelled(client, rotate).await?
    };
    let mut many = Many {
        requested: Vec::new(),
        open_already: Vec::new(),
    };
    let mut write = None;
    for device in devices {
        let answer = client
            .rotate_device(RotateDeviceRequest {
                device_id: device.clone(),
                reason: rotate.reason.clone(),
                deadline_ms: rotate.deadline.map_or(0, millis),
                ..Default::default()
            })
            .await?;
        write = answer.write;
        if answer.already {
            many.open_already.push(device);
        } else {
            many.requested.push(device);
        }
    }
    let facts = [
        ("requested", many.requested.len().to_string()),
        ("open already", many.open_already.len().to_string()),
        ("next", "palyra device ls".to_owned()),
    ];
    global.out().one(&many, write.into(), &facts)
}

async fn trusted(client: &Client) -> Result<Vec<String>> {
    let (ids, _) = ALL
        .all(async |page| {
            let request = ListDevicesRequest {
                status: "trusted".to_owned(),
                page: Some(page),
                read: None,
            };
            let answer = client.list_devices(request).await?;
            let ids = answer.devices.into_iter().map(|device| device.id).collect();
            Ok((ids, answer.page, answer.read.into()))
        })
        .await?;
    Ok(ids)
}

async fn labelled(client: &Client, rotate: &Rotate) -> Result<Vec<String>> {
    let (ids, _) = ALL
        .all(async |page| {
            let request = ListNodesRequest {
                labels: rotate.labels.iter().cloned().collect(),
                page: Some(page),
                ..Default::default()
            };
            let answer = client.list_nodes(request).await?;
            let ids = answer.nodes.into_iter().map(|node| node.device_id).collect();
            Ok((ids, answer.page, answer.read.into()))
        })
        .await?;
    Ok(ids)
}

#[derive(Serialize)]
struct Cleared {
    cleared: String,
}

/// Says that a suspected device is one machine.
pub(crate) async fn clear_clone(global: &Global, client: &Client, clear: ClearClone) -> Result {
    required_reason(&clear.reason)?;
    let found = client
        .get_device(GetDeviceRequest {
            device_id: clear.device,
            read: None,
        })
        .await?;
    let id = found.device.unwrap_or_default().id;
    let answer = client
        .clear_clone(ClearCloneRequest {
            request_id: global.request_id(),
            device_id: id.clone(),
            reason: clear.reason,
        })
        .await?;
    let facts = [
        ("cleared", id.clone()),
        ("next", "its next renewal is taken, whatever it counts".to_owned()),
    ];
    global
        .out()
        .one(&Cleared { cleared: id }, answer.write.into(), &facts)
}

#[derive(Serialize)]
struct PolicyView {
    recovery_ms: u64,
    set_at: Moment,
    set_by: String,
}

/// Shows or sets what the cluster holds certificates to.
pub(crate) async fn policy(global: &Global, client: &Client, policy: Policy) -> Result {
    if let Some(recovery) = policy.recovery {
        let request = SetCertificatePolicyRequest {
            request_id: global.request_id(),
            recovery_ms: millis(recovery),
        };
        client.set_certificate_policy(request).await?;
    }
    let answer = client.certificate_policy().await?;
    let found = answer.policy.unwrap_or_default();
    let window = if found.recovery_ms == 0 {
        "never".to_owned()
    } else {
        format!("within {} after the end", span(found.recovery_ms))
    };
    let set = if found.set_by.is_empty() {
        "as every cluster has it".to_owned()
    } else {
        format!("{} by {}", Moment(found.set_at_ms).told(wall_ms()), found.set_by)
    };
    let facts = [("a device recovers", window), ("set", set)];
    let view = PolicyView {
        recovery_ms: found.recovery_ms,
        set_at: Moment(found.set_at_ms),
        set_by: found.set_by,
    };
    global.out().one(&view, answer.read.into(), &facts)
}

/// A rotation in one line.
pub(crate) fn told(rotation: &Rotation, now: u64) -> String {
    let at = |ms: u64| Moment(ms).told(now);
    let mut line = format!(
        "{}: requested {} by {}",
        rotation.state,
        at(rotation.requested_at_ms),
        rotation.requested_by
    );
    if rotation.fetched_at_ms != 0 {
        line += &format!(", fetched {}", at(rotation.fetched_at_ms));
    }
    if rotation.used_at_ms == 0 {
        line += &format!(", due {}", at(rotation.deadline_at_ms));
    } else {
        line += &format!(", in use {}", at(rotation.used_at_ms));
    }
    if !rotation.reason.is_empty() {
        line += &format!(" ({})", rotation.reason);
    }
    line
}

/// Why a device is suspected, with the next commands.
pub(crate) fn suspicion(device: &str, found: &CloneSuspicion, now: u64) -> String {
    let or_unknown = |address: &str| {
        if address.is_empty() {
            "an unknown address".to_owned()
        } else {
            address.to_owned()
        }
    };
    format!(
        "two machines seem to have this folder, since {}: a {} from {} came with counter {}, when {} had been taken \
         from {}\ntwo machines: palyra device revoke {device} --reason ..., and pair each\none machine: palyra device \
         clear-clone {device} --reason ...",
        Moment(found.since_ms).told(now),
        found.how,
        or_unknown(&found.refused_from),
        found.shown_counter,
        found.counter,
        or_unknown(&found.taken_from),
    )
}
