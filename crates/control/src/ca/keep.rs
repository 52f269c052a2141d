//! What each replica does for the authorities by itself: takes the steps of a rotation, renews its own authority,
//! signs lists of revoked certificates; and what the leader does for all of them.
//!
//! Invariants: each pass looks at the state and does what is missing, so a pass that finds nothing proposes nothing;
//! a replica says that it has taken a step only after its disk and its listeners have it; a new key is on disk before
//! its certificate is proposed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use palyra_pki::ca::{Crl, Revoked, RevokedFor, describe};
use palyra_pki::{Authority, KeyPair, Purpose, layout};
use palyra_platform as platform;
use palyra_replica::View;
use palyra_state::ca::{
    self, AuthorityStatus, CertifyAuthority, Phase, PublishCrl, ReplicaReady, RetireAuthority,
    RotateAuthority,
};
use palyra_state::{Actor, Read, cluster, limits};

use super::vault::{HeldKey, Installed, KeyName};
use super::{certificates_of, internal};
use crate::control::Control;
use crate::error::Error;

/// Pause between two looks at the state, each after something was applied.
const LOOK: Duration = Duration::from_millis(200);
/// The longest pause: what the clock brings about is seen then.
const TICK: Duration = Duration::from_secs(30);
/// After a pass that did not get through.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a list of revoked certificates is good; a newer one is out at half of it.
const CRL_LIFE_MS: u64 = limits::DAY;
/// The shortest time between two lists of one issuer.
const CRL_PAUSE_MS: u64 = 2_000;
/// How long after its last certificate has expired an authority is kept: clocks differ.
const RETIRE_AFTER_MS: u64 = 10 * limits::MINUTE;

impl Control {
    /// Cares for the authorities until this replica stops.
    pub(crate) async fn keep_authorities(self) {
        let mut applied = self.replica().applied();
        let mut stopping = self.stopping();
        loop {
            applied.borrow_and_update();
            let pause = match self.look_at_authorities().await {
                Ok(()) => LOOK,
                Err(error) => {
                    tracing::debug!(cause = error.for_log(), "the care for authorities will try again");
                    AGAIN
                }
            };
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => return,
                () = platform::sleep(pause) => {}
            }
            if pause == AGAIN {
                continue;
            }
            // A list that is made anew too soon waits for its time; nothing else may come to wake this.
            let tick = if self.has_unlisted() { LOOK * 5 } else { TICK };
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => return,
                changed = applied.changed() => if changed.is_err() { return },
                () = self.authorities().wake.notified() => {}
                () = platform::sleep(tick) => {}
            }
        }
    }

    async fn look_at_authorities(&self) -> Result<(), Error> {
        let (state, step) = {
            let view = self.replica().view();
            let me = cluster::replica(&view, self.replica_id());
            if !me.is_some_and(|record| record.is_member()) {
                return Ok(());
            }
            self.install(&view)?;
            (ca::ca(&view), ca::replica_step(&view, self.replica_id()))
        };
        self.offer_to_all(state.generation);
        self.check_fresh()?;
        if step < state.step {
            let ready = ReplicaReady {
                replica_id: self.replica_id(),
                step: state.step,
            };
            self.as_this(ready).await?;
        }
        while self.write_acks().await? {
            platform::sleep(LOOK).await;
        }
        self.renew_authority().await?;
        self.publish_own_lists().await?;
        if self.acts_as_leader() {
            self.certify_authorities().await?;
            self.retire_authorities().await?;
            self.publish_root_lists().await?;
        }
        Ok(())
    }

    async fn as_this(&self, command: impl Into<palyra_state::Command>) -> Result<(), Error> {
        let written = self.propose(self.fresh_id(), self.as_replica(), command).await?;
        self.applied(written.receipt).await
    }

    /// Puts in force what the state says, if it is not.
    fn install(&self, view: &View) -> Result<(), Error> {
        self.load_keys()?;
        let Some(wanted) = self.wanted(view) else {
            return Ok(());
        };
        let same = {
            let inside = self.authorities().read();
            let installed = inside.installed.as_ref();
            installed.is_some_and(|installed| wanted.is(installed))
        };
        if same {
            return Ok(());
        }
        let (number, wanted) = wanted.opened()?;
        self.authorities()
            .vault
            .install(&wanted)
            .map_err(Error::Internal)?;
        tracing::info!(
            step = wanted.step,
            roots = wanted.roots.len(),
            authority = number,
            "trust and authority are in force"
        );
        let mut inside = self.authorities().write();
        inside.issuing = Some((number, Arc::clone(&wanted.authority)));
        inside.installed = Some(wanted);
        Ok(())
    }

    /// Opens the stored keys, once.
    fn load_keys(&self) -> Result<(), Error> {
        if self.authorities().read().keys.is_some() {
            return Ok(());
        }
        let mut keys = BTreeMap::new();
        let own = self.keys().authority.key().to_pkcs8();
        let mut stored = self.authorities().vault.keys().map_err(Error::Internal)?;
        stored.push(self.seal_key(own)?);
        for sealed in stored {
            let opened = self
                .keys()
                .kek
                .open(Purpose::ReplicaKey, &self.key_context(), &sealed)
                .map_err(|error| internal("a stored key", &error))?;
            let key = KeyPair::from_pkcs8(&opened).map_err(|error| internal("a stored key", &error))?;
            let held = HeldKey {
                key: Arc::new(key),
                sealed,
            };
            keys.insert(held.key.spki_sha256(), held);
        }
        self.authorities().write().keys = Some(keys);
        Ok(())
    }

    fn key_context(&self) -> Vec<u8> {
        layout::authority_context(&self.cluster_id().to_string(), self.replica_id())
    }

    fn seal_key(&self, pkcs8: &[u8]) -> Result<Vec<u8>, Error> {
        let sealed = self.keys().kek.seal(
            Purpose::ReplicaKey,
            &self.key_context(),
            pkcs8,
            &mut platform::fill_random,
        );
        sealed.map_err(|error| internal("a new key", &error))
    }

    /// What the state wants this replica to trust and to show: its newest authority of which it has the key.
    fn wanted(&self, view: &dyn Read) -> Option<Wanted> {
        let mine = ca::authorities_of(view, self.replica_id());
        let inside = self.authorities().read();
        let keys = inside.keys.as_ref()?;
        mine.into_iter().rev().find_map(|record| {
            let own = certificates_of(view, &record);
            let held = keys.get(&self.authorities().key_of(own.first()?)?)?;
            let roots = ca::trusted_roots(view).into_iter();
            let authorities = ca::authorities(view);
            Some(Wanted {
                number: record.number,
                step: ca::ca(view).step,
                roots: roots.map(|root| root.der.to_vec()).collect(),
                authorities: authorities
                    .iter()
                    .flat_map(|one| certificates_of(view, one))
                    .collect(),
                own,
                key: Arc::clone(&held.key),
                key_sealed: held.sealed.clone(),
            })
        })
    }

    /// The authority with which this replica issues now, and its number.
    pub(crate) fn issuing(&self) -> Result<(u32, Arc<Authority>), Error> {
        if let Some((number, authority)) = &self.authorities().read().issuing {
            return Ok((*number, Arc::clone(authority)));
        }
        // Nothing was put in force yet: this replica has just started.
        self.load_keys()?;
        match self.wanted(&self.replica().view()) {
            Some(wanted) => wanted
                .opened()
                .map(|(number, installed)| (number, installed.authority)),
            None => Err(Error::Internal(
                "this replica has no key of an authority that the cluster knows".to_owned(),
            )),
        }
    }

    /// Makes a new authority when the active one is old, is to be replaced, has revoked very much, or when its key is
    /// gone.
    async fn renew_authority(&self) -> Result<(), Error> {
        let (active, root_number) = {
            let view = self.replica().view();
            let Some(active) = ca::active_authority(&view, self.replica_id()) else {
                return Ok(());
            };
            if !self.is_due(&view, &active) {
                return self.forget_keys(&view);
            }
            (active, ca::ca(&view).issuing)
        };
        // What this replica has not applied yet might be the very rotation that it is about to ask for.
        self.barrier().await?;
        let again = ca::active_authority(&self.replica().view(), self.replica_id());
        if again.is_none_or(|again| again.number != active.number) {
            return Ok(());
        }
        let key =
            KeyPair::generate(&mut platform::fill_random).map_err(|error| internal("a new key", &error))?;
        let name = key.spki_sha256();
        let sealed = self.seal_key(key.to_pkcs8())?;
        self.authorities()
            .vault
            .save_key(&name, &sealed)
            .map_err(Error::Internal)?;
        let csr = key.make_csr().map_err(|error| internal("a new key", &error))?;
        {
            let mut inside = self.authorities().write();
            inside.pending = Some(name);
            let key = Arc::new(key);
            inside
                .keys
                .get_or_insert_default()
                .insert(name, HeldKey { key, sealed });
        }
        let (root, signer) = self.open_root()?;
        let signed = signer
            .sign_authority(
                &csr,
                self.replica_id(),
                platform::wall_ms(),
                &mut platform::fill_random,
            )
            .map_err(|error| internal("a new authority", &error))?;
        let rotate = RotateAuthority {
            replica_id: self.replica_id(),
            number: active.number + 1,
            root,
            der: signed.der.into(),
        };
        tracing::info!(
            from = active.number,
            root,
            was = root_number,
            "rotating this replica's authority"
        );
        self.as_this(rotate).await
    }

    fn is_due(&self, view: &dyn Read, active: &ca::Authority) -> bool {
        let own = certificates_of(view, active);
        let Some(life) = own.first().and_then(|der| self.authorities().describe(der)) else {
            return false;
        };
        let has_key = {
            let inside = self.authorities().read();
            let keys = inside.keys.as_ref();
            keys.is_some_and(|keys| keys.contains_key(&life.spki_sha256))
        };
        let third = life.not_after_ms.saturating_sub(life.not_before_ms) / 3;
        let old = platform::wall_ms() > life.not_after_ms.saturating_sub(third);
        let listed = ca::crl(view, active.replica_id, active.number).map_or(0, |crl| crl.entries);
        let full = listed as usize > limits::CRL_ENTRIES / 2;
        !has_key || old || full || active.rotation_asked_at != 0
    }

    /// Lets go of keys whose authority is forgotten.
    fn forget_keys(&self, view: &View) -> Result<(), Error> {
        let known: Vec<KeyName> = ca::authorities_of(view, self.replica_id())
            .iter()
            .flat_map(|one| {
                one.certificates
                    .iter()
                    .filter_map(|certificate| self.authorities().key_of(&certificate.der))
            })
            .collect();
        let mut inside = self.authorities().write();
        if inside.pending.is_some_and(|pending| known.contains(&pending)) {
            inside.pending = None;
        }
        let pending = inside.pending;
        let Some(keys) = inside.keys.as_mut() else {
            return Ok(());
        };
        let unknown = |name: &&KeyName| !known.contains(name) && Some(**name) != pending;
        let gone: Vec<KeyName> = keys.keys().filter(unknown).copied().collect();
        // A replica that is fresh has applied what makes a key known; the look at the beginning of the pass asked that.
        if known.is_empty() {
            return Ok(());
        }
        for name in gone {
            self.authorities()
                .vault
                .forget_key(&name)
                .map_err(Error::Internal)?;
            keys.remove(&name);
        }
        Ok(())
    }

    /// Whether something is revoked that no published list of this replica, or of a root, has.
    fn has_unlisted(&self) -> bool {
        let view = self.replica().view();
        let behind = |replica_id, number, index: u64| {
            index > 0 && ca::crl(&view, replica_id, number).is_none_or(|crl| crl.crl_number < index)
        };
        let own = ca::authorities_of(&view, self.replica_id());
        let roots = if self.replica().leads() {
            ca::trusted_roots(&view)
        } else {
            Vec::new()
        };
        own.iter()
            .any(|one| behind(one.replica_id, one.number, one.revoked_index))
            || roots
                .iter()
                .any(|root| behind(0, root.number, root.revoked_index))
    }

    /// Signs a new list for each authority of this replica whose list is old, or does not have what was revoked.
    async fn publish_own_lists(&self) -> Result<(), Error> {
        let lists = {
            let view = self.replica().view();
            let mut lists = Vec::new();
            for record in ca::authorities_of(&view, self.replica_id()) {
                let issuer = (record.replica_id, record.number);
                let own = certificates_of(&view, &record);
                let Some(crl) = self.due_list(&view, issuer, record.revoked_index, Vec::new()) else {
                    continue;
                };
                let inside = self.authorities().read();
                let keys = inside.keys.as_ref();
                let held = own
                    .first()
                    .and_then(|der| self.authorities().key_of(der))
                    .and_then(|name| keys?.get(&name));
                let Some(held) = held else { continue };
                let signed = authority_of(&own, &held.key)?.sign_crl(&crl.list);
                lists.push(crl.signed(signed.map_err(|error| internal("a list", &error))?));
            }
            lists
        };
        for list in lists {
            self.as_this(list).await?;
        }
        Ok(())
    }

    /// The same for the roots, which list the authorities of replicas that are gone.
    async fn publish_root_lists(&self) -> Result<(), Error> {
        let lists = {
            let view = self.replica().view();
            let mut lists = Vec::new();
            for record in ca::trusted_roots(&view) {
                let gone = gone_authorities(&view, record.number);
                let Some(crl) = self.due_list(&view, (0, record.number), record.revoked_index, gone) else {
                    continue;
                };
                let signed = self.open_root_of(&record)?.sign_crl(&crl.list);
                lists.push(crl.signed(signed.map_err(|error| internal("a list", &error))?));
            }
            lists
        };
        for list in lists {
            self.as_this(list).await?;
        }
        Ok(())
    }

    fn due_list(
        &self,
        view: &View,
        (replica_id, number): (u64, u32),
        revoked_index: u64,
        more: Vec<Revoked>,
    ) -> Option<DueList> {
        let now = self.now_ms(view);
        if let Some(known) = ca::crl(view, replica_id, number) {
            let half = known.this_update + known.next_update.saturating_sub(known.this_update) / 2;
            let behind = known.crl_number < revoked_index && now > known.this_update + CRL_PAUSE_MS;
            if now < half && !behind {
                return None;
            }
        }
        let found = ca::revoked_of(view, replica_id, number, now, limits::CRL_ENTRIES - more.len());
        let (_, all) = ca::live_of(view, replica_id, number, now);
        let left_out = all.saturating_sub(found.len() as u64);
        let listed = found.into_iter().map(|one| Revoked {
            serial: one.serial.to_vec(),
            revoked_at_ms: one.revoked_at,
            reason: RevokedFor::PrivilegeWithdrawn,
        });
        Some(DueList {
            issuer: (replica_id, number),
            left_out: u32::try_from(left_out).unwrap_or(u32::MAX),
            list: Crl {
                number: view.index(),
                this_update_ms: now,
                next_update_ms: now + CRL_LIFE_MS,
                revoked: listed.chain(more).collect(),
            },
        })
    }

    /// Signs authorities that lack a certificate under a trusted root. The leader does it for all: it takes the root's
    /// key, which every replica can open, and nothing of the authority's.
    async fn certify_authorities(&self) -> Result<(), Error> {
        let missing = {
            let view = self.replica().view();
            let state = ca::ca(&view);
            if state.phase() != Phase::Issue {
                return Ok(());
            }
            let mut missing = Vec::new();
            for record in ca::trusted_roots(&view) {
                let unsigned = |one: &ca::Authority| one.under(record.number).is_none();
                let of: Vec<ca::Authority> = ca::authorities(&view).into_iter().filter(unsigned).collect();
                if of.is_empty() {
                    continue;
                }
                let root = self.open_root_of(&record)?;
                for one in of {
                    let Some(known) = one.certificates.first() else {
                        continue;
                    };
                    let signed = root
                        .certify_authority(
                            &known.der,
                            one.replica_id,
                            platform::wall_ms(),
                            &mut platform::fill_random,
                        )
                        .map_err(|error| internal("an authority under another root", &error))?;
                    missing.push(CertifyAuthority {
                        replica_id: one.replica_id,
                        number: one.number,
                        root: record.number,
                        der: signed.der.into(),
                    });
                }
            }
            missing
        };
        for certify in missing {
            let written = self.propose(self.fresh_id(), Actor::System, certify).await?;
            self.applied(written.receipt).await?;
        }
        Ok(())
    }

    /// Forgets authorities that issue no more and whose last certificate has expired.
    async fn retire_authorities(&self) -> Result<(), Error> {
        let over = {
            let view = self.replica().view();
            let now = self.now_ms(&view);
            let mut all = ca::authorities(&view);
            all.retain(|one| {
                let end = one.last_not_after + RETIRE_AFTER_MS;
                // What was signed right before the rotation may still be on its way into the log.
                one.status() == AuthorityStatus::Retiring && end < now && one.since + RETIRE_AFTER_MS < now
            });
            all
        };
        for one in over {
            let retire = RetireAuthority {
                replica_id: one.replica_id,
                number: one.number,
            };
            let written = self.propose(self.fresh_id(), Actor::System, retire).await?;
            self.applied(written.receipt).await?;
        }
        Ok(())
    }
}

/// What is to be in force. Its key is made ready for signing only when it comes to be: every pass looks at this.
struct Wanted {
    number: u32,
    step: u64,
    roots: Vec<Vec<u8>>,
    authorities: Vec<Vec<u8>>,
    own: Vec<Vec<u8>>,
    key: Arc<KeyPair>,
    key_sealed: Vec<u8>,
}

impl Wanted {
    /// Whether this is in force, to whoever shows and trusts.
    fn is(&self, installed: &Installed) -> bool {
        self.step == installed.step
            && self.roots == installed.roots
            && self.authorities == installed.authorities
            && self.own == installed.own
    }

    /// The number of the authority, and all of it ready to be put in force.
    fn opened(self) -> Result<(u32, Installed), Error> {
        let authority = Arc::new(authority_of(&self.own, &self.key)?);
        let installed = Installed {
            step: self.step,
            roots: self.roots,
            authorities: self.authorities,
            own: self.own,
            authority,
            key_sealed: self.key_sealed,
        };
        Ok((self.number, installed))
    }
}

/// A list that is to be signed.
struct DueList {
    issuer: (u64, u32),
    left_out: u32,
    list: Crl,
}

impl DueList {
    fn signed(self, der: Vec<u8>) -> PublishCrl {
        PublishCrl {
            crl: ca::Crl {
                replica_id: self.issuer.0,
                number: self.issuer.1,
                der: der.into(),
                crl_number: self.list.number,
                this_update: self.list.this_update_ms,
                next_update: self.list.next_update_ms,
                entries: u32::try_from(self.list.revoked.len()).unwrap_or(u32::MAX),
                left_out: self.left_out,
            },
        }
    }
}

/// The certificates that a root has given to authorities of replicas that are gone.
fn gone_authorities(view: &dyn Read, root: u32) -> Vec<Revoked> {
    let gone = cluster::replicas(view).into_iter().filter(|one| !one.is_member());
    let mut found = Vec::new();
    for replica in gone {
        for one in ca::authorities_of(view, replica.id) {
            let described = one
                .under(root)
                .and_then(|certificate| describe(&certificate.der).ok());
            found.extend(described.map(|described| Revoked {
                serial: described.serial,
                revoked_at_ms: replica.removed_at,
                reason: RevokedFor::Cessation,
            }));
        }
    }
    found.truncate(limits::CRL_ENTRIES / 2);
    found
}

/// An authority with the first of its certificates.
fn authority_of(own: &[Vec<u8>], key: &Arc<KeyPair>) -> Result<Authority, Error> {
    let der = own.first().cloned().unwrap_or_default();
    Authority::new(der, Arc::clone(key)).map_err(|error| internal("an authority", &error))
}
