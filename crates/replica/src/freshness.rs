//! How long ago a quorum stood behind what this replica knows, measured on the boot clock.
//!
//! A leader knows from acknowledgements: when the k-th newest acknowledged request was *sent*, a quorum had
//! no newer leader. A follower knows from its leader, without comparing clocks: it stamps each answer with
//! its own clock, the leader returns the newest stamp together with its own age; so the leader's quorum is at
//! most (now - stamp + age) old. Invariants: nothing here is ever younger than the truth; a contact counts
//! only once everything that the leader had committed then is applied here, so "fresh" means that a
//! revocation older than the age has been seen.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palyra_platform as platform;

use crate::types::Membership;

/// Bits of a stamp that hold the boot clock (34 years of milliseconds). Those above say which process made it.
const CLOCK_BITS: u32 = 40;
const CLOCK: u64 = (1 << CLOCK_BITS) - 1;

/// Contacts that wait for their commit index to be applied.
const PENDING: usize = 64;

/// What is known about quorum contact; boot-clock milliseconds throughout.
#[derive(Debug)]
pub(crate) struct Freshness {
    known: Mutex<Known>,
    /// Counts the requests that were sent, to all peers together.
    sent: AtomicU64,
    /// What this process puts above the clock in its stamps. A leader that outlives this machine's reboot echoes a
    /// stamp of the boot before, which may lie hours ahead of the clock that started anew.
    life: u64,
}

#[derive(Debug, Default)]
struct Known {
    /// As leader: term and send time of the newest request that each peer acknowledged.
    acked: BTreeMap<u64, (u64, u64)>,
    /// As leader: term and number of the newest request that each peer acknowledged.
    rounds: BTreeMap<u64, (u64, u64)>,
    /// As leader: the newest stamp of each follower.
    stamps: BTreeMap<u64, u64>,
    /// As leader: when a quorum last stood behind the term.
    led: Option<(u64, u64)>,
    /// Contacts by the commit index that must be applied before they count; both rise.
    pending: VecDeque<(u64, u64)>,
    /// The newest contact that counts.
    contact: Option<u64>,
}

impl Known {
    fn contact(&mut self, commit: u64, at: u64) {
        let full = self.pending.len() >= PENDING;
        if let Some(last) = self.pending.back_mut() {
            if at <= last.1 {
                return;
            }
            // The same commit index, or no room: the newer contact takes the place of the one before it.
            if commit <= last.0 {
                last.1 = at;
                return;
            }
            if full {
                *last = (commit, at);
                return;
            }
        }
        self.pending.push_back((commit, at));
    }
}

/// The newest time that a majority of each configuration reaches; `me` is always there.
fn quorum_time(members: &Membership, me: u64, now: u64, acked: impl Fn(u64) -> Option<u64>) -> Option<u64> {
    let reached = |voters: &BTreeSet<u64>| {
        let mut times: Vec<u64> = voters
            .iter()
            .filter_map(|id| if *id == me { Some(now) } else { acked(*id) })
            .collect();
        times.sort_unstable_by(|a, b| b.cmp(a));
        times.get(voters.len() / 2).copied()
    };
    let configs = members.get_joint_config();
    if configs.is_empty() {
        return None;
    }
    configs
        .iter()
        .map(reached)
        .collect::<Option<Vec<u64>>>()?
        .into_iter()
        .min()
}

impl Freshness {
    /// Nothing is known; stamps are those of a new process.
    pub(crate) fn new() -> Freshness {
        Freshness {
            known: Mutex::default(),
            sent: AtomicU64::new(0),
            life: platform::random_u64() << CLOCK_BITS,
        }
    }

    /// What this replica puts into an answer that it gives at `now`. Means something only to [`Self::heard`].
    pub(crate) fn stamp(&self, now: u64) -> u64 {
        self.life | (now & CLOCK)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of a request that is being sent now.
    pub(crate) fn number(&self) -> u64 {
        self.sent.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The number of the newest request so far.
    pub(crate) fn mark(&self) -> u64 {
        self.sent.load(Ordering::Acquire)
    }

    /// As leader: whether a quorum acknowledged requests of `term` that were sent after `mark`.
    pub(crate) fn confirmed(&self, term: u64, mark: u64, members: &Membership, me: u64) -> bool {
        let known = self.known();
        let round = |id: u64| {
            let newest = known.rounds.get(&id).filter(|(in_term, _)| *in_term == term);
            newest.map(|(_, number)| *number)
        };
        quorum_time(members, me, u64::MAX, round).is_some_and(|reached| reached > mark)
    }

    /// As leader: what to send along to a follower: the quorum's age in this term, and the follower's newest
    /// stamp.
    pub(crate) fn to_send(&self, to: u64, term: u64, now: u64) -> (Option<u64>, Option<u64>) {
        let known = self.known();
        let age = known
            .led
            .filter(|(led, _)| *led == term)
            .map(|(_, at)| now.saturating_sub(at));
        (age, known.stamps.get(&to).copied())
    }

    /// As leader: a peer acknowledged a request of `term` that was sent at `sent`; `commit` is what the
    /// request carried as committed in this very term.
    pub(crate) fn acknowledged(&self, peer: u64, ack: Ack, members: &Membership, me: u64, now: u64) {
        let mut known = self.known();
        known.stamps.insert(peer, ack.stamp);
        let round = known.rounds.entry(peer).or_default();
        *round = (*round).max((ack.term, ack.number));
        let newest = known.acked.entry(peer).or_insert((ack.term, ack.sent));
        *newest = (*newest).max((ack.term, ack.sent));
        let acked = |id: u64| {
            known
                .acked
                .get(&id)
                .filter(|(term, _)| *term == ack.term)
                .map(|(_, sent)| *sent)
        };
        let Some(at) = quorum_time(members, me, now, acked) else {
            return;
        };
        known.led = known.led.max(Some((ack.term, at)));
        if let Some(commit) = ack.commit {
            known.contact(commit, at);
        }
    }

    /// As follower: the leader had a quorum `age` before it sent this, and it had our answer stamped `echo`
    /// by then. A stamp that another process made here says nothing: the next one will be ours.
    pub(crate) fn heard(&self, commit: u64, echo: u64, age: u64) {
        // Planted: the leader's word counts from when it arrived.
        if palyra_fault::planted("fresh-by-arrival") {
            return self
                .known()
                .contact(commit, platform::boot_ms().saturating_sub(age));
        }
        if echo & !CLOCK == self.life {
            self.known().contact(commit, (echo & CLOCK).saturating_sub(age));
        }
    }

    /// Age of the newest contact whose commit index is applied; `None` when there was none yet.
    pub(crate) fn age(&self, applied: u64, now: u64) -> Option<Duration> {
        let mut known = self.known();
        while let Some((commit, at)) = known.pending.front().copied() {
            // Planted: a contact counts before what it vouches for is applied.
            if commit > applied && !palyra_fault::planted("fresh-before-applied") {
                break;
            }
            known.pending.pop_front();
            known.contact = known.contact.max(Some(at));
        }
        known
            .contact
            .map(|at| Duration::from_millis(now.saturating_sub(at)))
    }

    /// This replica alone is a quorum.
    pub(crate) fn alone(&self, now: u64) {
        let mut known = self.known();
        known.contact = known.contact.max(Some(now));
    }
}

/// An acknowledgement, as the leader has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ack {
    /// The leader's term.
    pub(crate) term: u64,
    /// When the request was sent.
    pub(crate) sent: u64,
    /// The request's [`Freshness::number`].
    pub(crate) number: u64,
    /// What the request said was committed, if that was an entry of this very leader.
    pub(crate) commit: Option<u64>,
    /// The follower's [`Freshness::stamp`].
    pub(crate) stamp: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Membership {
        Membership::new_with_defaults(vec![[1, 2, 3].into()], [])
    }

    fn ack(term: u64, sent: u64, commit: Option<u64>) -> Ack {
        Ack {
            term,
            sent,
            number: sent,
            commit,
            stamp: 0,
        }
    }

    #[test]
    fn a_read_is_confirmed_by_requests_that_were_sent_after_it() {
        let fresh = Freshness::new();
        let three = three();
        assert!(fresh.number() < fresh.number() && fresh.mark() == 2);
        assert!(!fresh.confirmed(1, 0, &three, 1), "nobody has answered");
        fresh.acknowledged(2, ack(1, 5, None), &three, 1, 1_000);
        assert!(fresh.confirmed(1, 4, &three, 1));
        assert!(!fresh.confirmed(1, 5, &three, 1), "the request was sent before");
        assert!(!fresh.confirmed(2, 4, &three, 1), "of another term");
        assert!(
            !fresh.confirmed(1, 4, &three, 9),
            "an outsider's own word does not count"
        );
        let alone = Membership::new_with_defaults(vec![[1].into()], []);
        assert!(fresh.confirmed(1, 99, &alone, 1));
    }

    #[test]
    fn a_leader_is_as_fresh_as_the_send_time_of_its_quorum() {
        let fresh = Freshness::new();
        assert_eq!(fresh.age(9, 1_000), None);
        fresh.acknowledged(2, ack(1, 900, Some(5)), &three(), 1, 1_000);
        // Not applied yet: it does not count.
        assert_eq!(fresh.age(4, 1_000), None);
        assert_eq!(fresh.age(5, 1_000), Some(Duration::from_millis(100)));
        // An older acknowledgement by the other peer makes nothing younger.
        fresh.acknowledged(3, ack(1, 500, Some(5)), &three(), 1, 1_200);
        assert_eq!(fresh.age(5, 1_200), Some(Duration::from_millis(300)));
    }

    #[test]
    fn acknowledgements_of_another_term_do_not_add_up() {
        let five = Membership::new_with_defaults(vec![[1, 2, 3, 4, 5].into()], []);
        let fresh = Freshness::new();
        fresh.acknowledged(2, ack(1, 900, Some(5)), &five, 1, 1_000);
        fresh.acknowledged(3, ack(2, 950, Some(5)), &five, 1, 1_000);
        assert_eq!(fresh.age(5, 1_000), None);
        fresh.acknowledged(4, ack(2, 960, Some(5)), &five, 1, 1_000);
        assert_eq!(fresh.age(5, 1_000), Some(Duration::from_millis(50)));
    }

    #[test]
    fn both_halves_of_a_joint_configuration_must_stand_behind_it() {
        let joint = Membership::new_with_defaults(vec![[1, 2, 3].into(), [3, 4, 5].into()], []);
        let fresh = Freshness::new();
        fresh.acknowledged(2, ack(1, 900, Some(1)), &joint, 1, 1_000);
        fresh.acknowledged(4, ack(1, 900, Some(1)), &joint, 1, 1_000);
        assert_eq!(fresh.age(1, 1_000), None);
        fresh.acknowledged(5, ack(1, 800, Some(1)), &joint, 1, 1_000);
        assert_eq!(fresh.age(1, 1_000), Some(Duration::from_millis(200)));
    }

    #[test]
    fn a_follower_counts_from_its_own_stamp() {
        let fresh = Freshness::new();
        // The message took 5 s: the stamp in it is as old, so the age is, too.
        fresh.heard(3, fresh.stamp(10_000), 40);
        assert_eq!(fresh.age(3, 15_000), Some(Duration::from_millis(5_040)));
        fresh.heard(3, fresh.stamp(9_000), 0);
        assert_eq!(
            fresh.age(3, 15_000),
            Some(Duration::from_millis(5_040)),
            "an older message changes nothing"
        );
    }

    #[test]
    fn a_stamp_from_before_a_reboot_makes_nothing_fresh() {
        let (before, now) = (Freshness::new(), Freshness::new());
        // The machine was up for a day, then booted; the leader still has its last stamp.
        now.heard(3, before.stamp(86_400_000), 10);
        assert_eq!(
            now.age(3, 30_000),
            None,
            "fresh until the clock gets there, whatever the leader says"
        );
        now.heard(3, now.stamp(30_000), 10);
        assert_eq!(now.age(3, 30_050), Some(Duration::from_millis(60)));
    }

    #[test]
    fn contacts_are_bounded_and_never_too_young() {
        let fresh = Freshness::new();
        for at in 1..=500 {
            fresh.heard(at, fresh.stamp(at), 0);
        }
        assert_eq!(fresh.age(10, 1_000), Some(Duration::from_millis(990)));
        assert_eq!(
            fresh.age(499, 1_000),
            Some(Duration::from_millis(937)),
            "the last slot waits for index 500"
        );
        assert_eq!(fresh.age(500, 1_000), Some(Duration::from_millis(500)));
    }
}
