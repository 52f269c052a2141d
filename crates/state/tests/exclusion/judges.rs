//! Who judges: the rows and answers of apply are held against what is known of each lease from rows and
//! answers alone, and against the programs that run.

use palyra_state::leases::{self, LeaseRef};
use palyra_state::reply::Reply;
use palyra_state::{Actor, Command, Id, invariants};

use super::{Known, Letter, Program, Sim, kit};

impl Sim {
    /// Applies, and lets the judges look at what came of it.
    pub(super) fn run(&mut self, actor: Actor, command: Command) -> Result<Reply, palyra_state::Reject> {
        let name = command.name();
        let by_word = matches!(name, "leases.cleaned" | "leases.reconcile");
        let before = self.strict.then(|| self.world.state.clone());
        let request_id = kit::id_at(self.world.at, (1 << 41) + self.world.index);
        let envelope = palyra_state::Envelope::new(request_id, actor, command);
        let applied = self.world.apply(&envelope);
        if let Some(before) = before {
            let broken = invariants::check_step(&before, &self.world.state, &envelope, &applied);
            assert_eq!(broken, Vec::new(), "{name}");
        }
        for row in &applied.rows {
            self.judge_row(row, by_word);
        }
        applied.reply
    }

    pub(super) fn judge_row(&mut self, row: &palyra_state::Row, by_word: bool) {
        let Some(id) = Id::parse(&row.subject).filter(|_| row.action.starts_with("lease.")) else {
            return;
        };
        let number = |name: &str| row.detail(name).parse::<u64>().unwrap_or_default();
        match row.action.as_str() {
            "lease.granted" => {
                let new = Known {
                    run_id: Id::parse(row.detail("run")).unwrap(),
                    worker_id: Id::parse(row.detail("device")).unwrap(),
                    slot: row.detail("slot").to_owned(),
                    fence: number("fence"),
                    deadline_at: number("deadline_at"),
                    ending: false,
                };
                assert!(new.fence > self.newest, "fences rise");
                self.newest = new.fence;
                for other in self.known.values() {
                    assert!(
                        other.run_id != new.run_id,
                        "a run is leased under {} while {} has not ended",
                        new.fence,
                        other.fence
                    );
                    let same = other.worker_id == new.worker_id && other.slot == new.slot;
                    assert!(
                        !same,
                        "a slot is given under {} while {} has it",
                        new.fence, other.fence
                    );
                }
                self.known.insert(id, new);
                self.reach("granted");
            }
            "lease.ending" => {
                let known = self.known.get_mut(&id).unwrap();
                known.ending = true;
                let early = row.at_ms < known.deadline_at;
                let unasked = matches!(row.detail("reason"), "expired" | "run_deadline");
                assert!(!(early && unasked), "a lease ended before its time");
            }
            "lease.ended" => {
                let known = self.known.remove(&id).unwrap();
                let early = row.at_ms < known.deadline_at;
                assert!(
                    !early || by_word,
                    "a slot was freed before the deadline of {}",
                    known.fence
                );
                self.reach(if early { "ended by word" } else { "ended by time" });
            }
            _ => {}
        }
    }

    pub(super) fn reach(&mut self, what: &'static str) {
        *self.reached.entry(what).or_default() += 1;
    }

    /// What was accepted under a fence was said under the present one.
    pub(super) fn judge_fence(&mut self, lease_id: Id, fence: u64) {
        let known = self.known.get(&lease_id);
        assert!(
            known.is_some_and(|known| known.fence == fence
                && !known.ending
                && self.world.at < known.deadline_at),
            "a message of {lease_id} under {fence} was accepted"
        );
    }

    /// The program begins, unless its time is over or the worker was restarted meanwhile.
    pub(super) fn begin(&mut self, machine: usize, accept: &leases::Accept) {
        let lease = leases::lease(&self.world.state, accept.lease_id).unwrap();
        let mine = &self.machines[machine];
        if mine.epoch != accept.epoch
            || mine.programs.contains_key(&lease.id)
            || !mine.traces.contains_key(&lease.id)
        {
            return;
        }
        let program = Program {
            run_id: lease.run_id,
            fence: lease.fence,
            slot: lease.slot,
            epoch: accept.epoch,
            until: lease.deadline_at,
            ttl: lease.ttl,
        };
        for (number, other) in self.machines.iter().enumerate() {
            for running in other.programs.values() {
                assert!(
                    running.run_id != program.run_id,
                    "two programs of one run: {running:?}, {program:?}"
                );
                let same = number == machine && running.slot == program.slot;
                assert!(!same, "two programs in one slot: {running:?}, {program:?}");
            }
        }
        self.machines[machine].programs.insert(lease.id, program);
        self.reach("began");
    }

    pub(super) fn renewed(
        &mut self,
        letter: &Letter,
        wish: &LeaseRef,
        answer: &palyra_state::reply::Renewal,
    ) {
        if answer.refusal.is_some() {
            self.reach("renewal refused");
            return;
        }
        self.judge_fence(wish.lease_id, wish.fence);
        let known = self.known.get_mut(&wish.lease_id).unwrap();
        assert!(answer.deadline_at >= known.deadline_at, "a deadline went back");
        known.deadline_at = answer.deadline_at;
        // From when it was sent, so that the worker is never later than the ledger.
        if let Some(program) = self.machines[letter.from].programs.get_mut(&wish.lease_id)
            && program.epoch == wish.epoch
        {
            program.until = program
                .until
                .max((letter.sent + program.ttl).min(answer.deadline_at));
        }
        self.reach("renewed");
    }

    /// The wardens do what they are for.
    pub(super) fn kill_late(&mut self) {
        let now = self.world.at;
        for machine in &mut self.machines {
            machine.programs.retain(|_, program| now < program.until);
        }
    }
}
