//! Who holds which trust bundle: nodes are told in their sessions, and what they acknowledge is gathered and written
//! down in batches.
//!
//! Invariants: what is lost with a replica before it is written down is acknowledged again, because a node says with
//! each attach what it holds; a fleet that acknowledges at once costs one entry per [`limits::ACK_BATCH`] nodes.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use palyra_pki::PeerIdentity;
use palyra_state::ca::{self, Acknowledge};
use palyra_state::{Id, Read, limits};

use crate::caller::Caller;
use crate::control::Control;
use crate::error::Error;
use crate::outbox::{End, TrustUpdate, Waiting};
use crate::registry::Entry;

/// What waits to be written down.
#[derive(Debug, Default)]
pub(crate) struct Acks {
    generation: u64,
    devices: BTreeSet<Id>,
    operators: BTreeSet<String>,
}

impl Acks {
    /// Makes room for those of another generation.
    fn turn_to(&mut self, generation: u64) {
        if self.generation != generation {
            *self = Acks {
                generation,
                ..Acks::default()
            };
        }
    }

    fn take(&mut self) -> Option<Acknowledge> {
        let devices: Vec<Id> = self.devices.iter().take(limits::ACK_BATCH).copied().collect();
        let operators: Vec<String> = self.operators.iter().take(limits::ACK_BATCH).cloned().collect();
        if devices.is_empty() && operators.is_empty() {
            return None;
        }
        for id in &devices {
            self.devices.remove(id);
        }
        for name in &operators {
            self.operators.remove(name);
        }
        Some(Acknowledge {
            generation: self.generation,
            devices,
            operators,
        })
    }

    fn give_back(&mut self, batch: Acknowledge) {
        if self.generation == batch.generation {
            self.devices.extend(batch.devices);
            self.operators.extend(batch.operators);
        }
    }
}

/// What an operator is answered who says which bundle it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustAnswer {
    /// The generation of the bundle of now.
    pub generation: u64,
    /// Its roots, DER; empty when the caller holds it already.
    pub roots: Vec<Vec<u8>>,
}

impl Control {
    fn acks(&self) -> std::sync::MutexGuard<'_, Acks> {
        self.authorities()
            .acks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A node says which generation of the trust bundle it holds durably: at its attach, and when it has stored one
    /// that it was told. It is told a newer one, if there is one.
    ///
    /// # Errors
    /// What admission refuses.
    pub fn node_trusts(&self, peer: &PeerIdentity, device_id: &str, generation: u64) -> Result<(), Error> {
        let Caller::Node { device_id, .. } = self.admit_node_as(peer, device_id)? else {
            return Ok(());
        };
        let view = self.replica().view();
        let current = ca::ca(&view).generation;
        // A node of an earlier release, or one that was just paired, does not know the number of what it was given.
        let holds = if generation == 0 && current == 1 {
            1
        } else {
            generation
        };
        for entry in self.registry().of_device(device_id) {
            entry.trust.store(holds, Ordering::Release);
            self.offer(&entry, current);
        }
        let known = ca::device_ack(&view, device_id).map_or(0, |ack| ack.number);
        if holds == current && known < current {
            let mut acks = self.acks();
            acks.turn_to(current);
            acks.devices.insert(device_id);
            drop(acks);
            self.authorities().wake.notify_one();
        }
        Ok(())
    }

    /// An operator says which generation of the trust bundle it holds durably, and is answered with a newer one.
    ///
    /// # Errors
    /// [`Error::Unavailable`] before the cluster is born.
    pub fn operator_trusts(&self, caller: &Caller, generation: u64) -> Result<TrustAnswer, Error> {
        let view = self.replica().view();
        let current = ca::ca(&view).generation;
        if current == 0 {
            return Err(Error::Unavailable { leader_hint: None });
        }
        if let Caller::Operator { name, .. } = caller
            && generation == current
            && ca::operator_ack(&view, name).is_none_or(|ack| ack.number < current)
        {
            let mut acks = self.acks();
            acks.turn_to(current);
            acks.operators.insert(name.clone());
            drop(acks);
            self.authorities().wake.notify_one();
        }
        let roots = if generation >= current {
            Vec::new()
        } else {
            roots_of(&view)
        };
        Ok(TrustAnswer {
            generation: current,
            roots,
        })
    }

    /// What a node is told; read when it is sent.
    pub(crate) fn trust_update(&self) -> TrustUpdate {
        let view = self.replica().view();
        TrustUpdate {
            generation: ca::ca(&view).generation,
            roots: roots_of(&view),
        }
    }

    /// Tells a node the bundle of now, once, if it holds an older one.
    fn offer(&self, entry: &Arc<Entry>, current: u64) {
        let holds = entry.trust.load(Ordering::Acquire);
        if holds < current
            && entry.offered.fetch_max(current, Ordering::AcqRel) < current
            && !entry.outbox.put(Waiting::Trust)
        {
            self.end_session(entry, End::SlowReader);
        }
    }

    /// Tells every node that is connected here and holds an older bundle.
    pub(super) fn offer_to_all(&self, current: u64) {
        for entry in self.registry().all() {
            self.offer(&entry, current);
        }
    }

    /// Writes down a batch of what was acknowledged. Whether there is more.
    pub(super) async fn write_acks(&self) -> Result<bool, Error> {
        let current = ca::ca(&self.replica().view()).generation;
        let batch = {
            let mut acks = self.acks();
            acks.turn_to(current);
            acks.take()
        };
        let Some(batch) = batch else { return Ok(false) };
        let written = self
            .propose(self.fresh_id(), self.as_replica(), batch.clone())
            .await;
        match written {
            Ok(written) => self.applied(written.receipt).await?,
            Err(error) => {
                self.acks().give_back(batch);
                return Err(error);
            }
        }
        Ok(true)
    }
}

fn roots_of(view: &dyn Read) -> Vec<Vec<u8>> {
    let roots = ca::trusted_roots(view).into_iter();
    roots.map(|root| root.der.to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_written_down_waits_unless_the_bundle_changed() {
        let mut acks = Acks::default();
        acks.turn_to(2);
        acks.devices
            .extend([Id::from_bytes([1; 16]), Id::from_bytes([2; 16])]);
        let batch = acks.take().unwrap();
        assert_eq!((batch.generation, batch.devices.len()), (2, 2));
        assert_eq!(acks.take(), None);
        acks.give_back(batch.clone());
        assert_eq!(acks.take().unwrap().devices.len(), 2);
        acks.turn_to(3);
        acks.give_back(batch);
        assert_eq!(
            acks.take(),
            None,
            "nobody asks for the second generation any more"
        );
    }

    #[test]
    fn a_batch_is_bounded() {
        let mut acks = Acks::default();
        acks.turn_to(1);
        let number = |n: u128| Id::from_bytes(n.to_be_bytes());
        acks.devices
            .extend((0..limits::ACK_BATCH as u128 + 3).map(number));
        assert_eq!(acks.take().unwrap().devices.len(), limits::ACK_BATCH);
        assert_eq!(acks.take().unwrap().devices.len(), 3);
    }
}
