//! Devices: looked at, revoked, forgotten.
//!
//! What never lives here: how far a revocation is (`revocation`). Invariants: an answer to a revocation names every
//! replica that may serve nodes, as having enforced it or as pending; what is removed stays refused.

use palyra_state::identity::{
    self, Ban, Certificate, CertificateKind, Device, DeviceStatus, PurgeDevice, RemoveDevice, RevokeDevice,
};
use palyra_state::{Code, Id, Read, Reject, Reply};

use crate::caller::Caller;
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo, bounded_wait};
use crate::dispatch::{Page, next_page, page_size, page_start};
use crate::error::Error;
use crate::limits::{ENFORCE_WAIT, ENFORCE_WAIT_MAX};
use crate::selector;

/// A device with its certificates.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceView {
    /// The record.
    pub record: Device,
    /// Its certificates, oldest first.
    pub certificates: Vec<Certificate>,
    /// What is left when it was removed; the record is made of it then.
    pub ban: Option<Ban>,
}

/// What a revocation came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// The device.
    pub device_id: Id,
    /// Log index of the entry that revoked the device, now or earlier.
    pub index: u64,
    /// Replicas that closed its connections, or that can serve no node any more.
    pub enforced: Vec<u64>,
    /// Replicas that are not known to have done so.
    pub pending: Vec<u64>,
    /// The entry.
    pub write: WriteInfo,
}

impl Control {
    /// Devices by id; `status` may be empty for all.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a bad status or page, and what a read can say.
    pub async fn list_devices(
        &self,
        read: ReadOptions,
        status: &str,
        after: &str,
        limit: u32,
    ) -> Result<Page<DeviceView>, Error> {
        let (view, info) = self.read(read).await?;
        let wanted = Wanted::parse(status)?;
        let limit = page_size(limit);
        let mut after = page_start(after)?;
        let mut items: Vec<DeviceView> = Vec::new();
        while items.len() <= limit {
            let page = wanted.page(&view, after, limit);
            let Some(last) = page.last() else { break };
            after = Some(last.record.id);
            items.extend(page.into_iter().filter(|device| wanted.is(device)));
        }
        let next = next_page(&mut items, limit, |device| device.record.id.to_string());
        Ok(Page {
            items,
            next,
            read: info,
        })
    }

    /// One device, by id, prefix or name.
    ///
    /// # Errors
    /// [`Error::Rejected`] when there is none, and what a read can say.
    pub async fn get_device(
        &self,
        read: ReadOptions,
        selector: &str,
    ) -> Result<(DeviceView, ReadInfo), Error> {
        let (view, info) = self.read(read).await?;
        let id = selector::device(&view, selector)?;
        let found = match (identity::device(&view, id), identity::ban(&view, id)) {
            (Some(device), _) => with_certificates(&view, device),
            (None, Some(ban)) => removed(&view, ban),
            (None, None) => return Err(Reject::new(Code::NoSuchDevice, [&id]).into()),
        };
        Ok((found, info))
    }

    /// Revokes a device, and waits (10 s unless asked otherwise, 120 s at most) until no replica can serve
    /// it.
    ///
    /// # Errors
    /// What the state machine refuses. Once the entry is committed there is no error: replicas that have not
    /// carried it out yet are named as pending.
    pub async fn revoke_device(
        &self,
        caller: &Caller,
        request_id: &str,
        device: &str,
        reason: &str,
        wait_ms: u64,
    ) -> Result<Revocation, Error> {
        let request_id = self.request_id(request_id)?;
        let device_id = self.resolve_device(device).await?;
        let command = RevokeDevice {
            device_id,
            reason: reason.to_owned(),
        };
        self.answer_revocation(caller, request_id, device_id, command, wait_ms)
            .await
    }

    /// Forgets a revoked device, and waits as [`Control::revoke_device`] does; with `revoke` it is revoked in the same
    /// entry, if it is not.
    ///
    /// # Errors
    /// As [`Control::revoke_device`].
    pub async fn remove_device(
        &self,
        caller: &Caller,
        request_id: &str,
        device: &str,
        remove: Remove<'_>,
    ) -> Result<Revocation, Error> {
        let request_id = self.request_id(request_id)?;
        let device_id = self.resolve_device(device).await?;
        let command = RemoveDevice {
            device_id,
            reason: remove.reason.to_owned(),
            revoke: remove.revoke,
        };
        self.answer_revocation(caller, request_id, device_id, command, remove.wait_ms)
            .await
    }

    async fn answer_revocation(
        &self,
        caller: &Caller,
        request_id: Id,
        device_id: Id,
        command: impl Into<palyra_state::Command>,
        wait_ms: u64,
    ) -> Result<Revocation, Error> {
        let written = self.propose(request_id, caller.actor(), command).await?;
        let Reply::Revoked(revoked) = written.reply else {
            return Err(self.odd_reply("a revocation"));
        };
        let wait = bounded_wait(wait_ms, ENFORCE_WAIT, ENFORCE_WAIT_MAX);
        let (enforced, pending) = self
            .enforce_everywhere(revoked.index, &device_id.to_string(), wait)
            .await;
        Ok(Revocation {
            device_id,
            index: revoked.index,
            enforced,
            pending,
            write: written.info,
        })
    }

    /// Forgets what a removed device is refused by. The caller is an admin.
    ///
    /// # Errors
    /// What the state machine refuses.
    pub async fn purge_device(
        &self,
        caller: &Caller,
        request_id: &str,
        device: &str,
        reason: &str,
        force: bool,
    ) -> Result<(Id, WriteInfo), Error> {
        let request_id = self.request_id(request_id)?;
        let device_id = self.resolve_device(device).await?;
        let command = PurgeDevice {
            device_id,
            reason: reason.to_owned(),
            force,
        };
        let written = self.propose(request_id, caller.actor(), command).await?;
        Ok((device_id, written.info))
    }
}

/// How a device is removed.
#[derive(Debug, Clone, Copy)]
pub struct Remove<'a> {
    /// Why; may be empty.
    pub reason: &'a str,
    /// Revoke it as well.
    pub revoke: bool,
    /// How long to wait for enforcement, in milliseconds; 0: ten seconds.
    pub wait_ms: u64,
}

/// Which devices a list shows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// Trusted and revoked ones.
    Known,
    Trusted,
    Revoked,
    Removed,
    All,
}

impl Wanted {
    fn parse(status: &str) -> Result<Wanted, Error> {
        Ok(match status {
            "" => Wanted::Known,
            "trusted" => Wanted::Trusted,
            "revoked" => Wanted::Revoked,
            "removed" => Wanted::Removed,
            "all" => Wanted::All,
            other => {
                let cause = format!("{:?} is no status", other.chars().take(32).collect::<String>());
                let next = "use trusted, revoked, removed or all";
                return Err(Error::invalid("status", cause, next));
            }
        })
    }

    /// Devices from the one after `after` on, by id, at most `limit`.
    fn page(self, view: &dyn Read, after: Option<Id>, limit: usize) -> Vec<DeviceView> {
        let mut page = Vec::new();
        if self != Wanted::Removed {
            let devices = identity::devices(view, after, limit).into_iter();
            page.extend(devices.map(|device| with_certificates(view, device)));
        }
        if matches!(self, Wanted::Removed | Wanted::All) {
            let bans = identity::bans(view, after, limit).into_iter();
            page.extend(bans.map(|ban| removed(view, ban)));
        }
        page.sort_by_key(|device| device.record.id);
        page.truncate(limit);
        page
    }

    fn is(self, device: &DeviceView) -> bool {
        match self {
            Wanted::Known | Wanted::Removed | Wanted::All => true,
            Wanted::Trusted => device.record.status() == DeviceStatus::Trusted,
            Wanted::Revoked => device.record.status() == DeviceStatus::Revoked,
        }
    }
}

/// A removed device as far as it is known.
fn removed(view: &dyn Read, ban: Ban) -> DeviceView {
    let record = Device {
        id: ban.id,
        status: DeviceStatus::Revoked as i32,
        name: ban.name.clone(),
        revoked_at: ban.revoked_at,
        revoked_by: ban.revoked_by.clone(),
        reason: ban.reason.clone(),
        revoked_index: ban.revoked_index,
        ..Device::default()
    };
    DeviceView {
        ban: Some(ban),
        ..with_certificates(view, record)
    }
}

fn with_certificates(view: &dyn Read, record: Device) -> DeviceView {
    let certificates = identity::certificates_of(view, CertificateKind::Node, &record.id.to_string());
    DeviceView {
        record,
        certificates,
        ban: None,
    }
}
