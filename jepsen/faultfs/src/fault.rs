//! Faults: which requests they meet, and what happens to those.
//!
//! Never here: the file system itself (`store`), waiting (`room`). Every fault counts what it did, so that whoever
//! asked for it can tell whether it really happened.

use std::time::Duration;

use nix::errno::Errno;
use rand::Rng;
use rand::rngs::SmallRng;

/// What a process asks of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Reading bytes of a file.
    Read,
    /// Writing, truncating and allocating.
    Write,
    /// fsync and fdatasync, of files and folders.
    Sync,
    /// Creating, linking, renaming and unlinking.
    Name,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    /// EIO. A sync that fails this way loses the bytes that it was to write: they count as clean afterwards.
    Fail,
    /// A sync that says it is done and does nothing.
    Lie,
    /// Takes this much longer.
    Delay(Duration),
    /// No answer until the fault is cleared, or for this long.
    Stall(Duration),
    /// One bit of what is read is another one.
    Flip,
}

/// A rule about requests. Built by one of the constructors, narrowed by the methods, given to
/// [`crate::Handle::inject`].
#[derive(Clone, Debug)]
pub struct Fault {
    effect: Effect,
    operations: Vec<Operation>,
    suffix: Option<String>,
    times: Option<u64>,
    one_in: u32,
}

/// No stall lasts longer, whatever was asked: a process that waits for the disk cannot be killed.
pub const STALL_MAX: Duration = Duration::from_secs(120);
/// No delay lasts longer.
pub const DELAY_MAX: Duration = Duration::from_secs(30);

impl Fault {
    fn new(effect: Effect, operations: &[Operation]) -> Fault {
        Fault {
            effect,
            operations: operations.to_vec(),
            suffix: None,
            times: None,
            one_in: 1,
        }
    }

    /// The operations answer EIO. Of a sync, the bytes that it was to write are lost, as on Linux: processes go on
    /// seeing them, the next sync succeeds, and a loss of power takes them.
    pub fn eio(operations: &[Operation]) -> Fault {
        Fault::new(Effect::Fail, operations)
    }

    /// The next sync answers EIO, with the loss that [`Fault::eio`] describes, and no later one does.
    pub fn fsync_eio_once() -> Fault {
        Fault::eio(&[Operation::Sync]).times(1)
    }

    /// Syncs answer that all is well and make nothing durable.
    pub fn lost_fsync() -> Fault {
        Fault::new(Effect::Lie, &[Operation::Sync])
    }

    /// Syncs take `longer` more, at most [`DELAY_MAX`]. Writes that come meanwhile are not covered by them.
    pub fn slow_fsync(longer: Duration) -> Fault {
        Fault::new(Effect::Delay(longer.min(DELAY_MAX)), &[Operation::Sync])
    }

    /// The operations get no answer until the fault is cleared, or for `at_most`, itself at most [`STALL_MAX`]: then
    /// a watchdog clears the fault. A process that waits for an answer cannot be killed.
    pub fn stall(operations: &[Operation], at_most: Duration) -> Fault {
        Fault::new(Effect::Stall(at_most.min(STALL_MAX)), operations)
    }

    /// One random bit of what is read is flipped; what is stored stays as it is.
    pub fn bit_flips() -> Fault {
        Fault::new(Effect::Flip, &[Operation::Read])
    }

    /// Only files whose name ends so, as `.log` or `.sst`.
    pub fn only(mut self, suffix: &str) -> Fault {
        self.suffix = Some(suffix.to_owned());
        self
    }

    /// Only so many times; then the fault is over.
    pub fn times(mut self, times: u64) -> Fault {
        self.times = Some(times);
        self
    }

    /// Only one request in so many, by chance.
    pub fn one_in(mut self, requests: u32) -> Fault {
        self.one_in = requests.max(1);
        self
    }

    fn meets(&self, operation: Operation, name: &[u8], hits: u64, chance: &mut SmallRng) -> bool {
        self.operations.contains(&operation)
            && self.times.is_none_or(|times| hits < times)
            && self
                .suffix
                .as_ref()
                .is_none_or(|end| name.ends_with(end.as_bytes()))
            && (self.one_in == 1 || chance.gen_ratio(1, self.one_in))
    }
}

/// Names a fault that was injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FaultId(pub(crate) u64);

/// What is to become of a request once it has waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Pass,
    Fail(Errno),
    Lie,
    /// Which bit, out of all that there are, modulo their number.
    Flip(u64),
}

/// How long a request waits first, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wait {
    pub(crate) fault: FaultId,
    pub(crate) at_most: Duration,
    pub(crate) stall: bool,
}

/// What was decided about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) wait: Option<Wait>,
    pub(crate) outcome: Outcome,
}

impl Verdict {
    pub(crate) const PASS: Verdict = Verdict {
        wait: None,
        outcome: Outcome::Pass,
    };
}

#[derive(Debug)]
struct Active {
    id: FaultId,
    fault: Fault,
    on: bool,
    hits: u64,
}

/// All faults of one file system, those that are over included: their counts stay.
#[derive(Debug)]
pub(crate) struct Faults {
    all: Vec<Active>,
    chance: SmallRng,
}

/// So many faults, over or not, are remembered; the oldest that are over go first.
const REMEMBERED: usize = 4096;

impl Faults {
    pub(crate) fn new(chance: SmallRng) -> Faults {
        Faults {
            all: Vec::new(),
            chance,
        }
    }

    pub(crate) fn inject(&mut self, fault: Fault) -> FaultId {
        if self.all.len() >= REMEMBERED
            && let Some(over) = self.all.iter().position(|active| !active.on)
        {
            self.all.remove(over);
        }
        let id = FaultId(self.all.last().map_or(1, |last| last.id.0 + 1));
        self.all.push(Active {
            id,
            fault,
            on: true,
            hits: 0,
        });
        id
    }

    /// Ends a fault; whether it was still on.
    pub(crate) fn clear(&mut self, id: FaultId) -> bool {
        let found = self.all.iter_mut().find(|active| active.id == id);
        found.is_some_and(|active| std::mem::replace(&mut active.on, false))
    }

    pub(crate) fn clear_all(&mut self) -> Vec<FaultId> {
        let on = self.all.iter_mut().filter(|active| active.on);
        on.map(|active| {
            active.on = false;
            active.id
        })
        .collect()
    }

    pub(crate) fn hits(&self, id: FaultId) -> u64 {
        let found = self.all.iter().find(|active| active.id == id);
        found.map_or(0, |active| active.hits)
    }

    /// Decides about a request on a file of this name. All faults that meet it count; of those that decide how it
    /// ends the first does, and of those that make it wait the longest.
    pub(crate) fn decide(&mut self, operation: Operation, name: &[u8]) -> Verdict {
        let mut verdict = Verdict::PASS;
        let chance = &mut self.chance;
        for active in self.all.iter_mut().filter(|active| active.on) {
            if !active.fault.meets(operation, name, active.hits, chance) {
                continue;
            }
            active.hits += 1;
            let (at_most, stall) = match active.fault.effect {
                Effect::Delay(longer) => (longer, false),
                Effect::Stall(at_most) => (at_most, true),
                effect => {
                    if verdict.outcome == Outcome::Pass {
                        verdict.outcome = match effect {
                            Effect::Lie => Outcome::Lie,
                            Effect::Flip => Outcome::Flip(chance.r#gen()),
                            _ => Outcome::Fail(Errno::EIO),
                        };
                    }
                    continue;
                }
            };
            if verdict.wait.is_none_or(|wait| wait.at_most < at_most) {
                verdict.wait = Some(Wait {
                    fault: active.id,
                    at_most,
                    stall,
                });
            }
        }
        verdict
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn faults() -> Faults {
        Faults::new(SmallRng::seed_from_u64(1))
    }

    #[test]
    fn a_fault_meets_its_operation_on_its_files_so_many_times() {
        let mut faults = faults();
        let id = faults.inject(Fault::eio(&[Operation::Write]).only(".log").times(2));
        let fail = Outcome::Fail(Errno::EIO);
        assert_eq!(faults.decide(Operation::Write, b"1.sst").outcome, Outcome::Pass);
        assert_eq!(faults.decide(Operation::Sync, b"1.log").outcome, Outcome::Pass);
        assert_eq!(faults.decide(Operation::Write, b"1.log").outcome, fail);
        assert_eq!(faults.decide(Operation::Write, b"1.log").outcome, fail);
        assert_eq!(faults.decide(Operation::Write, b"1.log").outcome, Outcome::Pass);
        assert_eq!(faults.hits(id), 2);
    }

    #[test]
    fn the_first_end_and_the_longest_wait_win_and_all_count() {
        let mut faults = faults();
        let slow = faults.inject(Fault::slow_fsync(Duration::from_millis(5)));
        let stall = faults.inject(Fault::stall(&[Operation::Sync], Duration::from_secs(3600)));
        let lie = faults.inject(Fault::lost_fsync());
        let eio = faults.inject(Fault::fsync_eio_once());
        let verdict = faults.decide(Operation::Sync, b"");
        assert_eq!(verdict.outcome, Outcome::Lie);
        let wait = verdict.wait.unwrap();
        assert_eq!((wait.fault, wait.at_most, wait.stall), (stall, STALL_MAX, true));
        assert_eq!([slow, stall, lie, eio].map(|id| faults.hits(id)), [1; 4]);
        assert!(faults.clear(lie) && !faults.clear(lie));
        assert_eq!(faults.clear_all().len(), 3);
        assert_eq!(faults.decide(Operation::Sync, b""), Verdict::PASS);
    }

    #[test]
    fn one_in_many_is_about_that() {
        let mut faults = faults();
        let id = faults.inject(Fault::bit_flips().one_in(10));
        for _ in 0..10_000 {
            faults.decide(Operation::Read, b"x");
        }
        assert!((800..1200).contains(&faults.hits(id)), "{}", faults.hits(id));
    }

    #[test]
    fn what_is_remembered_of_faults_is_bounded() {
        let mut faults = faults();
        for _ in 0..2 * REMEMBERED {
            let id = faults.inject(Fault::lost_fsync());
            faults.clear(id);
        }
        assert_eq!(faults.all.len(), REMEMBERED);
    }
}
