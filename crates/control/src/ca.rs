//! The cluster's authorities, as operators see and move them.
//!
//! What never lives here: the rules of a rotation (`palyra_state::ca`), and what replicas do by themselves
//! (`keep`). Invariants: a step names the phase that it leaves; before a step that leaves somebody behind, the refusal
//! says how many, and the status says who.

mod acks;
mod keep;
mod vault;

pub use acks::TrustAnswer;
pub(crate) use vault::Authorities;
pub use vault::{Installed, MemoryVault, Vault};

use palyra_pki::ca::describe;
use palyra_pki::{Purpose, Root, TrustDomain, layout};
use palyra_platform as platform;
use palyra_state::access::{self, OperatorStatus};
use palyra_state::ca::{self, AdvanceRoot, AskRotation, BeginRoot, Ca, Phase, RevertRoot};
use palyra_state::identity::{self, DeviceStatus};
use palyra_state::pairing::{self, Method};
use palyra_state::{Code, Fingerprint, Id, Read, Reject, Reply, cluster, limits, nodes};

use crate::caller::Caller;
use crate::control::{Control, ReadInfo, ReadOptions, WriteInfo};
use crate::error::Error;

/// How long before its end a root is warned of: a year.
const ROOT_WARNING_MS: u64 = 365 * limits::DAY;

/// A root as operators see it.
#[derive(Debug, Clone, PartialEq)]
pub struct RootView {
    /// The record.
    pub record: ca::Root,
    /// `signs`, `trusted` or `retired`.
    pub status: &'static str,
    /// Its end.
    pub not_after_ms: u64,
}

/// An authority as operators see it.
#[derive(Debug, Clone, PartialEq)]
pub struct AuthorityView {
    /// The record.
    pub record: ca::Authority,
    /// Name of its replica.
    pub replica: String,
    /// SHA-256 of its certificate under the root that signs, or the only one.
    pub fingerprint: Fingerprint,
    /// Its end.
    pub not_after_ms: u64,
    /// Certificates that it issued and that are neither expired nor revoked.
    pub live: u64,
    /// Its list of revoked certificates.
    pub crl: Option<ca::Crl>,
}

/// What a replica has taken over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaTrust {
    /// Its id.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// The step that it has taken.
    pub step: u64,
}

/// A node that does not hold the bundle of now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeMissing {
    /// The device.
    pub device_id: Id,
    /// Its name.
    pub name: String,
    /// Whether it has a session.
    pub online: bool,
    /// The generation that it holds; 0 when that is not known.
    pub generation: u64,
}

/// How the authorities are.
#[derive(Debug, Clone, PartialEq)]
pub struct CaStatus {
    /// The rotation of the root, and the counters.
    pub ca: Ca,
    /// All roots that are kept.
    pub roots: Vec<RootView>,
    /// All authorities.
    pub authorities: Vec<AuthorityView>,
    /// The lists of the roots.
    pub root_crls: Vec<ca::Crl>,
    /// What the members have taken over.
    pub replicas: Vec<ReplicaTrust>,
    /// Operators that are let in.
    pub operators: u64,
    /// Those that have not acknowledged this generation.
    pub operators_missing: Vec<String>,
    /// Nodes that have not acknowledged this generation, at most as many as were asked for.
    pub nodes_missing: Vec<NodeMissing>,
    /// What needs somebody's attention.
    pub warnings: Vec<String>,
    /// How fresh it is.
    pub read: ReadInfo,
}

impl Control {
    /// How the authorities are; names at most `names` nodes that have not acknowledged the bundle.
    ///
    /// # Errors
    /// What a read can say.
    pub async fn ca_status(&self, read: ReadOptions, names: usize) -> Result<CaStatus, Error> {
        let (view, info) = self.read(read).await?;
        let state = ca::ca(&view);
        let now = self.now_ms(&view);
        let roots: Vec<RootView> = ca::roots(&view)
            .into_iter()
            .map(|record| root_view(record, &state))
            .collect();
        let authorities: Vec<AuthorityView> = ca::authorities(&view)
            .into_iter()
            .map(|record| authority_view(&view, record, now))
            .collect();
        let members = cluster::replicas(&view).into_iter().filter(|one| one.is_member());
        let replicas = members.map(|one| ReplicaTrust {
            step: ca::replica_step(&view, one.id),
            id: one.id,
            name: one.name,
        });
        let active: Vec<String> = access::operators(&view)
            .into_iter()
            .filter(|one| one.status() == OperatorStatus::Active)
            .map(|one| one.name)
            .collect();
        let behind =
            |name: &&String| ca::operator_ack(&view, name).is_none_or(|ack| ack.number < state.generation);
        let mut status = CaStatus {
            root_crls: roots
                .iter()
                .filter_map(|root| ca::crl(&view, 0, root.record.number))
                .collect(),
            replicas: replicas.collect(),
            operators: active.len() as u64,
            operators_missing: active.iter().filter(behind).cloned().collect(),
            nodes_missing: nodes_missing(&view, &state, names, false),
            warnings: Vec::new(),
            read: info,
            roots,
            authorities,
            ca: state,
        };
        status.warnings = warnings(&view, &status, now);
        Ok(status)
    }

    /// The published lists of revoked certificates, as this replica has them.
    #[must_use]
    pub fn crls(&self) -> Vec<ca::Crl> {
        ca::crls(&self.replica().view())
    }

    /// Asks a replica, or with 0 all of them, for a new authority. Answers how many were asked.
    ///
    /// # Errors
    /// What the state machine refuses.
    pub async fn rotate_authorities(
        &self,
        caller: &Caller,
        request_id: &str,
        replica_id: u64,
        reason: &str,
    ) -> Result<(u32, WriteInfo), Error> {
        let request_id = self.request_id(request_id)?;
        let ask = AskRotation {
            replica_id,
            reason: reason.to_owned(),
        };
        let written = self.propose(request_id, caller.actor(), ask).await?;
        let Reply::Counted(counted) = written.reply else {
            return Err(self.odd_reply("ca.ask_rotation"));
        };
        Ok((counted.count, written.info))
    }

    /// Begins a rotation of the root: to one that is made here, or to one that is brought along (certificate DER and
    /// key PKCS#8).
    ///
    /// # Errors
    /// [`Code::BadRoot`] for a root that is not usable here, and what the state machine refuses.
    pub async fn begin_root(
        &self,
        caller: &Caller,
        request_id: &str,
        imported: Option<(Vec<u8>, Vec<u8>)>,
        reason: &str,
    ) -> Result<WriteInfo, Error> {
        let request_id = self.request_id(request_id)?;
        self.barrier().await?;
        let number = ca::ca(&self.replica().view()).next_root;
        let cluster_id = self.cluster_id().to_string();
        let now = platform::wall_ms();
        let root = match imported {
            Some((der, key)) => import(der, &key, self.trust_domain(), now)?,
            None => Root::create_next(
                &cluster_id,
                number,
                self.trust_domain(),
                now,
                &mut platform::fill_random,
            )
            .map_err(|error| internal("a new root", &error))?,
        };
        let context = layout::root_context(&cluster_id);
        let sealed = self.keys().kek.seal(
            Purpose::RootKey,
            &context,
            root.key().to_pkcs8(),
            &mut platform::fill_random,
        );
        let begin = BeginRoot {
            der: root.der().to_vec().into(),
            key_sealed: sealed.map_err(|error| internal("a new root", &error))?.into(),
            reason: reason.to_owned(),
        };
        let written = self.propose(request_id, caller.actor(), begin).await?;
        Ok(written.info)
    }

    /// Goes on to the next phase of the rotation.
    ///
    /// # Errors
    /// [`Code::NotAcknowledged`] while nodes that are online have not acknowledged the bundle, and what the state
    /// machine refuses.
    pub async fn advance_root(
        &self,
        caller: &Caller,
        request_id: &str,
        from: &str,
        force: bool,
        reason: &str,
    ) -> Result<WriteInfo, Error> {
        let request_id = self.request_id(request_id)?;
        self.barrier().await?;
        let from = self.phase_named(from)?;
        {
            // The rest of the gate stands in the state machine: this part is about who is connected right now.
            let view = self.replica().view();
            let state = ca::ca(&view);
            if state.phase() == from && from == Phase::Distribute && !force {
                let online = nodes_missing(&view, &state, usize::MAX, true).len();
                if online > 0 {
                    let args: [&dyn std::fmt::Display; 3] = [&online, &0, &state.generation];
                    return Err(Reject::new(Code::NotAcknowledged, args).into());
                }
            }
        }
        let advance = AdvanceRoot {
            from: from as i32,
            force,
            reason: reason.to_owned(),
        };
        let written = self.propose(request_id, caller.actor(), advance).await?;
        Ok(written.info)
    }

    /// Goes back one phase of the rotation.
    ///
    /// # Errors
    /// What the state machine refuses.
    pub async fn revert_root(
        &self,
        caller: &Caller,
        request_id: &str,
        from: &str,
        reason: &str,
    ) -> Result<WriteInfo, Error> {
        let request_id = self.request_id(request_id)?;
        self.barrier().await?;
        let revert = RevertRoot {
            from: self.phase_named(from)? as i32,
            reason: reason.to_owned(),
        };
        let written = self.propose(request_id, caller.actor(), revert).await?;
        Ok(written.info)
    }

    /// The phase of this name; the present one when it is empty.
    fn phase_named(&self, text: &str) -> Result<Phase, Error> {
        if text.is_empty() {
            return Ok(ca::ca(&self.replica().view()).phase());
        }
        [Phase::Distribute, Phase::Issue]
            .into_iter()
            .find(|phase| phase.as_str() == text)
            .ok_or_else(|| {
                let shown: String = text.chars().take(32).collect();
                Error::invalid(
                    "from",
                    format!("{shown:?} is no phase"),
                    "use distribute or issue",
                )
            })
    }
}

/// Takes a root that was brought along.
fn import(der: Vec<u8>, key: &[u8], domain: &TrustDomain, now: u64) -> Result<Root, Error> {
    let bad = |cause: &dyn std::fmt::Display| Error::from(Reject::new(Code::BadRoot, [cause]));
    let key = palyra_pki::KeyPair::from_pkcs8(key).map_err(|error| bad(&error))?;
    let root = Root::open(der, key).map_err(|error| bad(&error))?;
    if root.trust_domain() != domain {
        let cause = format!("it is for the trust domain {}, not {domain}", root.trust_domain());
        return Err(bad(&cause));
    }
    if root.not_after_ms() < now + ROOT_WARNING_MS {
        return Err(bad(&"it ends within a year"));
    }
    Ok(root)
}

fn root_view(record: ca::Root, state: &Ca) -> RootView {
    let status = if record.number == state.issuing {
        "signs"
    } else if state.trusted().contains(&record.number) {
        "trusted"
    } else {
        "retired"
    };
    RootView {
        status,
        not_after_ms: describe(&record.der).map_or(0, |described| described.not_after_ms),
        record,
    }
}

fn authority_view(view: &dyn Read, record: ca::Authority, now: u64) -> AuthorityView {
    let own = certificates_of(view, &record);
    let first = own.first();
    let (issued, revoked) = ca::live_of(view, record.replica_id, record.number, now);
    AuthorityView {
        replica: cluster::replica(view, record.replica_id)
            .map(|replica| replica.name)
            .unwrap_or_default(),
        fingerprint: first.map(|der| Fingerprint::of(der)).unwrap_or_default(),
        not_after_ms: first
            .and_then(|der| describe(der).ok())
            .map_or(0, |described| described.not_after_ms),
        live: issued.saturating_sub(revoked),
        crl: ca::crl(view, record.replica_id, record.number),
        record,
    }
}

/// Trusted devices that do not hold the bundle of now, at most `limit`.
fn nodes_missing(view: &dyn Read, state: &Ca, limit: usize, only_online: bool) -> Vec<NodeMissing> {
    let mut missing = Vec::new();
    if state.devices == state.devices_acked {
        return missing;
    }
    let mut after = None;
    while missing.len() < limit {
        let page = identity::devices(view, after, limits::PAGE);
        let Some(last) = page.last() else { break };
        after = Some(last.id);
        for device in page {
            let generation = ca::device_ack(view, device.id).map_or(0, |ack| ack.number);
            if device.status() != DeviceStatus::Trusted || generation >= state.generation {
                continue;
            }
            let online = nodes::node(view, device.id).is_some_and(|node| node.session.is_some());
            if missing.len() < limit && (online || !only_online) {
                missing.push(NodeMissing {
                    device_id: device.id,
                    name: device.name,
                    online,
                    generation,
                });
            }
        }
    }
    missing
}

fn warnings(view: &dyn Read, status: &CaStatus, now: u64) -> Vec<String> {
    let mut warnings = Vec::new();
    let state = &status.ca;
    for root in status.roots.iter().filter(|root| root.status == "signs") {
        if root.not_after_ms < now + ROOT_WARNING_MS {
            let next = "begin a rotation: palyra ca rotate root begin";
            warnings.push(format!("the root ends within a year; {next}"));
        }
    }
    for one in &status.authorities {
        let begun = one.record.created_at;
        let late = begun + one.not_after_ms.saturating_sub(begun) / 4 * 3;
        if one.record.status() == ca::AuthorityStatus::Active && late < now {
            warnings.push(format!(
                "the authority of {} should have been renewed by now; is the replica up? see its log",
                one.replica
            ));
        }
        if let Some(crl) = &one.crl {
            if crl.next_update < now {
                warnings.push(format!(
                    "the list of revoked certificates of {} is out of date",
                    one.replica
                ));
            }
            if crl.left_out > 0 {
                warnings.push(format!(
                    "the list of revoked certificates of {} leaves {} out; its authority is being rotated",
                    one.replica, crl.left_out
                ));
            }
        }
    }
    if state.phase() == Phase::Issue {
        let old =
            |code: &&pairing::Code| code.method() == Method::Ticket && code.created_at < state.phase_since;
        let tickets = pairing::open_codes(view, now).iter().filter(old).count();
        let pinned = |token: &&cluster::JoinToken| {
            token.used_by == 0 && token.expires_at > now && token.created_at < state.phase_since
        };
        let tokens = cluster::join_tokens(view).iter().filter(pinned).count();
        if tickets + tokens > 0 {
            warnings.push(format!(
                "{tickets} pairing tickets and {tokens} join tokens pin the old root: they are worth nothing once it \
                 is retired"
            ));
        }
    }
    warnings
}

/// The certificates of an authority under the trusted roots, DER, the one by the root that signs first.
pub(crate) fn certificates_of(view: &dyn Read, authority: &ca::Authority) -> Vec<Vec<u8>> {
    let trusted = ca::ca(view).trusted().into_iter();
    trusted
        .filter_map(|root| authority.under(root))
        .map(|certificate| certificate.der.to_vec())
        .collect()
}

fn internal(what: &str, error: &dyn std::fmt::Display) -> Error {
    Error::Internal(format!("{what}: {error}"))
}
