//! How many connections there may be: in all, from one address, of one identity; and how many handshakes.
//!
//! Invariants: what counts is given back when the connection's [`Slot`] is dropped; an address that was not proved
//! keeps nobody else out: above a few handshakes it has to be proved first.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use palyra_quic::Fault;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::Limits;

/// What becomes of somebody at the door.
pub(super) enum Verdict {
    /// The handshake may begin.
    Enter(Handshake),
    /// First it has to prove that it receives at its address.
    Prove,
    /// There is no room, for this reason.
    Full(&'static str),
}

/// The connections of a listener.
pub(super) struct Slots {
    limits: Limits,
    connections: Arc<Semaphore>,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    handshakes: usize,
    by_source: HashMap<IpAddr, Mine>,
    by_identity: HashMap<String, VecDeque<(u64, CancellationToken)>>,
    next: u64,
}

/// What one address has.
#[derive(Default)]
struct Mine {
    connections: usize,
    handshakes: usize,
}

impl Slots {
    pub(super) fn new(limits: Limits) -> Arc<Slots> {
        Arc::new(Slots {
            limits,
            connections: Arc::new(Semaphore::new(limits.connections)),
            taken: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides about a first datagram.
    pub(super) fn knock(self: &Arc<Self>, source: IpAddr, is_proved: bool) -> Verdict {
        let mut taken = self.lock();
        if taken.handshakes >= self.limits.handshakes {
            return Verdict::Full("limits.handshakes are under way");
        }
        if taken.handshakes >= self.limits.retry_above && !is_proved {
            return Verdict::Prove;
        }
        let mine = taken.by_source.get(&source).map_or(0, |mine| mine.handshakes);
        // A quarter is left to others, or one source that never finishes a handshake shuts everybody out.
        if mine >= self.limits.handshakes - self.limits.handshakes / 4 {
            return Verdict::Full("the source has three quarters of limits.handshakes under way");
        }
        taken.handshakes += 1;
        taken.by_source.entry(source).or_default().handshakes += 1;
        Verdict::Enter(Handshake {
            slots: Arc::clone(self),
            source,
        })
    }
}

/// A handshake's place; given back on drop.
pub(super) struct Handshake {
    slots: Arc<Slots>,
    source: IpAddr,
}

impl Handshake {
    /// The handshake is done: a place for the connection of this identity. The oldest of an identity that has as many
    /// as it may have makes room: a node that comes back must not wait for what it left behind to be noticed.
    pub(super) fn done(self, identity: &str) -> Result<Slot, Fault> {
        let slots = &self.slots;
        let permit = Arc::clone(&slots.connections).try_acquire_owned();
        let permit = permit.map_err(|_| Fault::TooManyConnections { of: "this replica" })?;
        let mut taken = slots.lock();
        let mine = taken.by_source.entry(self.source).or_default();
        if mine.connections >= slots.limits.per_source {
            return Err(Fault::TooManyConnections { of: "this source" });
        }
        mine.connections += 1;
        taken.next += 1;
        let (id, replaced) = (taken.next, CancellationToken::new());
        let same = taken.by_identity.entry(identity.to_owned()).or_default();
        same.push_back((id, replaced.clone()));
        if same.len() > slots.limits.per_identity
            && let Some((_, oldest)) = same.pop_front()
        {
            oldest.cancel();
        }
        drop(taken);
        Ok(Slot {
            slots: Arc::clone(slots),
            source: self.source,
            identity: identity.to_owned(),
            id,
            replaced,
            _permit: permit,
        })
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        let mut taken = self.slots.lock();
        taken.handshakes -= 1;
        if let Some(mine) = taken.by_source.get_mut(&self.source) {
            mine.handshakes -= 1;
        }
        forget_idle(&mut taken, self.source);
    }
}

fn forget_idle(taken: &mut Taken, source: IpAddr) {
    let is_idle = |mine: &Mine| mine.connections == 0 && mine.handshakes == 0;
    if taken.by_source.get(&source).is_some_and(is_idle) {
        taken.by_source.remove(&source);
    }
}

/// A connection's place; given back on drop.
pub(super) struct Slot {
    slots: Arc<Slots>,
    source: IpAddr,
    identity: String,
    id: u64,
    replaced: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

impl Slot {
    /// Completes when a newer connection of the same identity takes this place.
    pub(super) async fn replaced(&self) {
        self.replaced.cancelled().await;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.lock();
        if let Some(mine) = taken.by_source.get_mut(&self.source) {
            mine.connections -= 1;
        }
        forget_idle(&mut taken, self.source);
        if let Some(same) = taken.by_identity.get_mut(&self.identity) {
            same.retain(|(id, _)| *id != self.id);
            if same.is_empty() {
                taken.by_identity.remove(&self.identity);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);
    const THERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn slots() -> Arc<Slots> {
        Slots::new(Limits {
            connections: 3,
            per_identity: 1,
            per_source: 2,
            streams: 4,
            handshakes: 8,
            retry_above: 2,
            handshake: Duration::from_secs(1),
            idle: Duration::from_secs(1),
            keepalive: Duration::from_secs(1),
            message: 1024,
        })
    }

    fn enter(slots: &Arc<Slots>, source: IpAddr) -> Handshake {
        match slots.knock(source, true) {
            Verdict::Enter(handshake) => handshake,
            Verdict::Prove => panic!("it was proved"),
            Verdict::Full(why) => panic!("{why}"),
        }
    }

    #[test]
    fn above_a_few_handshakes_an_address_has_to_be_proved() {
        let slots = slots();
        let held: Vec<Handshake> = (0..2).map(|_| enter(&slots, HERE)).collect();
        assert!(matches!(slots.knock(THERE, false), Verdict::Prove));
        assert!(matches!(slots.knock(THERE, true), Verdict::Enter(_)));
        drop(held);
        assert!(matches!(slots.knock(THERE, false), Verdict::Enter(_)));
    }

    #[test]
    fn no_source_has_all_handshakes() {
        let slots = slots();
        let _held: Vec<Handshake> = (0..6).map(|_| enter(&slots, HERE)).collect();
        assert!(matches!(slots.knock(HERE, true), Verdict::Full(_)));
        let _others: Vec<Handshake> = (0..2).map(|_| enter(&slots, THERE)).collect();
        assert!(
            matches!(slots.knock(THERE, true), Verdict::Full(_)),
            "there are eight"
        );
    }

    #[test]
    fn connections_are_bounded_and_given_back() {
        let slots = slots();
        let first = enter(&slots, HERE).done("a").unwrap();
        let _second = enter(&slots, HERE).done("b").unwrap();
        let refused = enter(&slots, HERE).done("c").err().unwrap();
        assert_eq!(refused, Fault::TooManyConnections { of: "this source" });
        let _third = enter(&slots, THERE).done("c").unwrap();
        let refused = enter(&slots, THERE).done("d").err().unwrap();
        assert_eq!(refused, Fault::TooManyConnections { of: "this replica" });
        drop(first);
        enter(&slots, HERE).done("d").unwrap();
    }

    #[test]
    fn the_newest_connection_of_an_identity_has_its_place() {
        let slots = slots();
        let old = enter(&slots, HERE).done("a").unwrap();
        let new = enter(&slots, HERE).done("a").unwrap();
        assert!(old.replaced.is_cancelled() && !new.replaced.is_cancelled());
        drop((old, new));
        let taken = slots.lock();
        assert!(taken.by_identity.is_empty() && taken.by_source.is_empty() && taken.handshakes == 0);
    }
}
