//! Devices: looked at, and revoked with proof that every replica has carried it out.
//!
//! Invariants: a revocation is answered as enforced by a replica only when that replica said that it closed
//! the device's connections, or when it can serve no node because it lost the quorum too long ago; what is
//! neither is named as pending, never passed over.

use std::time::Duration;

use futures::future::join_all;
use palyra_platform::{self as platform, Instant};
use palyra_replica::{PeerError, Refusal as PeerRefusal};
use palyra_state::identity::{self, Certificate, CertificateKind, Device, DeviceStatus, RevokeDevice};
use palyra_state::{Code, Id, Read, Reject, Reply, cluster};

use crate::caller::{Caller, millis};
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo, bounded_wait};
use crate::dispatch::{Page, next_page, page_size, page_start};
use crate::error::Error;
use crate::limits::{ENFORCE_WAIT, ENFORCE_WAIT_MAX, LAPSE_MARGIN, REMOVED_LINGERS};
use crate::peers::{Answer, Call, Enforce};
use crate::selector;

/// The least time that a replica gets for a word before it counts as silent.
const LAST_CALL: Duration = Duration::from_secs(1);

/// A device with its certificates.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceView {
    /// The record.
    pub record: Device,
    /// Its certificates, oldest first.
    pub certificates: Vec<Certificate>,
}

/// What a revocation came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
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
        let wanted = match status {
            "" => None,
            "trusted" => Some(DeviceStatus::Trusted),
            "revoked" => Some(DeviceStatus::Revoked),
            other => {
                let cause = format!("{:?} is no status", other.chars().take(32).collect::<String>());
                return Err(Error::invalid("status", cause, "use trusted or revoked"));
            }
        };
        let limit = page_size(limit);
        let mut after = page_start(after)?;
        let mut items: Vec<Device> = Vec::new();
        while items.len() <= limit {
            let page = identity::devices(&view, after, limit);
            let Some(last) = page.last() else { break };
            after = Some(last.id);
            items.extend(
                page.into_iter()
                    .filter(|device| wanted.is_none_or(|wanted| device.status() == wanted)),
            );
        }
        let next = next_page(&mut items, limit, |device| device.id.to_string());
        let items = items
            .into_iter()
            .map(|device| with_certificates(&view, device))
            .collect();
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
        let device = identity::device(&view, id).ok_or_else(|| Reject::new(Code::NoSuchDevice, [&id]))?;
        Ok((with_certificates(&view, device), info))
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
        let written = self.propose(request_id, caller.actor(), command).await?;
        let Reply::Revoked(revoked) = written.reply else {
            return Err(self.odd_reply("identity.revoke_device"));
        };
        let wait = bounded_wait(wait_ms, ENFORCE_WAIT, ENFORCE_WAIT_MAX);
        let (enforced, pending) = self
            .enforce_everywhere(revoked.index, &device_id.to_string(), wait)
            .await;
        Ok(Revocation {
            index: revoked.index,
            enforced,
            pending,
            write: written.info,
        })
    }

    /// Which replicas have carried out `index` for a subject, and which have not within `wait`.
    pub(crate) async fn enforce_everywhere(
        &self,
        index: u64,
        subject: &str,
        wait: Duration,
    ) -> (Vec<u64>, Vec<u64>) {
        let committed = platform::now();
        // A replica that joined right before the entry must be among those that are asked.
        self.replica().wait_applied(index, wait).await;
        let left = wait.saturating_sub(committed.elapsed());
        let ids = self.may_serve();
        let asked = ids
            .iter()
            .map(|id| platform::timeout(left, self.enforced_by(*id, index, subject, committed)));
        let answers = join_all(asked).await;
        let (mut enforced, mut pending) = (Vec::new(), Vec::new());
        for (id, answer) in ids.into_iter().zip(answers) {
            if answer.is_ok() {
                enforced.push(id)
            } else {
                pending.push(id)
            }
        }
        (enforced, pending)
    }

    /// The replicas that may serve nodes now: all members, and those that were removed a moment ago and may
    /// not have heard of it.
    fn may_serve(&self) -> Vec<u64> {
        let view = self.replica().view();
        let lingers = millis(REMOVED_LINGERS);
        let earliest = self.now_ms(&view).saturating_sub(lingers);
        let replicas = cluster::replicas(&view).into_iter();
        replicas
            .filter(|replica| replica.is_member() || replica.removed_at > earliest)
            .map(|replica| replica.id)
            .collect()
    }

    /// Returns when one replica has carried out `index` for a subject, or can serve nobody.
    ///
    /// A contact with the quorum counts, on every replica, only once everything that was committed then is
    /// applied. So a replica that has not applied `index` is stale `max_staleness` after the commit, and one
    /// that has closes the connections by itself: from then on a replica that does not answer can be left
    /// out, and one that says that it is stale. One that answers anything else, and be it with a refusal, is not
    /// silent.
    async fn enforced_by(&self, id: u64, index: u64, subject: &str, committed: Instant) {
        if id == self.replica_id() {
            self.enforced_here(index, subject).await;
            return;
        }
        let step = self.timings().call_timeout;
        let lapsed = committed + self.largest_staleness() + LAPSE_MARGIN;
        loop {
            // A call that hangs must not outlast the lapse by much; but the last one needs its chance as well.
            let until_lapsed = lapsed.saturating_duration_since(platform::now());
            let patience = step.min(until_lapsed.max(LAST_CALL));
            let call = Call::Enforce(Enforce {
                index,
                subject: subject.to_owned(),
                wait_ms: millis(patience / 2),
            });
            match self.call_peer(id, call, patience).await {
                Ok(Answer::Enforced(answer)) if answer.done => return,
                // Only later: it might still hear of a contact from before the entry.
                Ok(Answer::Enforced(answer)) if answer.stale && platform::now() >= lapsed => return,
                Ok(_) => {}
                Err(error) if is_silence(&error) && platform::now() >= lapsed => return,
                Err(error) => {
                    tracing::debug!(replica = id, cause = %error, "no word yet of a revocation");
                    platform::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    /// Returns when this replica has carried out `index`, and holds no session and no connection of
    /// `subject`.
    pub(crate) async fn enforced_here(&self, index: u64, subject: &str) {
        let mut applied = self.replica().applied();
        if applied.wait_for(|at| *at >= index).await.is_err() {
            // The replica has stopped: it serves nobody, and says so by not answering.
            return std::future::pending().await;
        }
        // An entry that repeats an earlier request has no rows of its own, so that the follower never reaches
        // its index: what counts is that it has carried out all rows up to there.
        let rows = palyra_state::meta(&self.replica().view()).journal_last.index;
        let mut enforced = self.enforced().subscribe();
        // The sender lives as long as this control plane.
        let _ = enforced.wait_for(|at| *at >= rows).await;
        let mut connections = self.connections().watch();
        let mut sessions = self.registry().watch();
        let device_id = Id::parse(subject);
        loop {
            let no_session = device_id.is_none_or(|id| self.registry().of_device(id).is_empty());
            if no_session && self.connections().none_of(subject) {
                return;
            }
            tokio::select! {
                biased;
                _ = connections.changed() => {}
                _ = sessions.changed() => {}
            }
        }
    }
}

/// Whether an error says that a replica was not heard. A refusal is the word of one that lives, unless it stops.
fn is_silence(error: &PeerError) -> bool {
    match error {
        PeerError::Unreachable(_) | PeerError::Lost(_) | PeerError::Timeout(_) => true,
        PeerError::Refused { refusal, .. } => *refusal == PeerRefusal::Stopped,
    }
}

fn with_certificates(view: &dyn Read, record: Device) -> DeviceView {
    let certificates = identity::certificates_of(view, CertificateKind::Node, &record.id.to_string());
    DeviceView { record, certificates }
}
