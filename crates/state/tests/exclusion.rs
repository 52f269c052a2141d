//! Competing leases, late messages, pauses and restarts against apply, with judges that know nothing of its
//! tables: a resource that takes only rising fences, and a list of the programs that run on the workers.
//!
//! A worker here does what a good one does: it begins when its acceptance was accepted, counts its deadline
//! from the moment at which it sent what was answered, and kills at it also when it is paused. All that it
//! sends may arrive late, twice, or never.
#![allow(clippy::unwrap_used)]

#[path = "exclusion/judges.rs"]
mod judges;
mod kit;

use std::collections::BTreeMap;

use bytes::Bytes;
use kit::{World, commands, operator, replica};
use palyra_state::dispatch::Effect;
use palyra_state::leases::{self, HeldState, LeaseRef, Outcome, RunState};
use palyra_state::reply::Reply;
use palyra_state::{Actor, Command, Id, invariants};
use proptest::prelude::*;

/// A program that runs on a worker.
#[derive(Clone, Debug)]
struct Program {
    run_id: Id,
    fence: u64,
    slot: u32,
    epoch: u64,
    /// When its warden kills it, whatever happens.
    until: u64,
    ttl: u64,
}

#[derive(Default)]
struct Machine {
    epoch: u64,
    programs: BTreeMap<Id, Program>,
    /// Leases of which something may be left: the disk remembers them over a restart.
    traces: BTreeMap<Id, u64>,
}

/// Something on its way, and when it was sent.
#[derive(Clone)]
struct Letter {
    sent: u64,
    from: usize,
    command: Command,
}

/// What the judges know of a lease, from rows and answers alone.
struct Known {
    run_id: Id,
    worker_id: Id,
    slot: String,
    fence: u64,
    deadline_at: u64,
    ending: bool,
}

struct Sim {
    world: World,
    names: Vec<String>,
    machines: Vec<Machine>,
    letters: Vec<Letter>,
    known: BTreeMap<Id, Known>,
    /// The highest fence that each run's resource has seen.
    resource: BTreeMap<Id, u64>,
    newest: u64,
    started: u64,
    reached: BTreeMap<&'static str, u32>,
    /// Whether each step is held to the rules about steps, which takes a copy of the state.
    strict: bool,
}

#[derive(Clone, Debug)]
struct Step {
    kind: u8,
    one: usize,
    two: usize,
    wait: u64,
}

fn step() -> impl Strategy<Value = Step> {
    let wait = prop_oneof![6 => 0u64..200, 3 => 0u64..1_500, 1 => 0u64..8_000];
    (any::<u8>(), any::<u16>(), any::<u16>(), wait).prop_map(|(kind, one, two, wait)| Step {
        kind,
        one: usize::from(one),
        two: usize::from(two),
        wait,
    })
}

impl Sim {
    fn new(workers: usize, slots: u32, strict: bool) -> Sim {
        let mut world = World::born();
        world.checked = false;
        kit::fleet::policy(&mut world, slots);
        let names: Vec<String> = (0..workers).map(|number| format!("w{number}")).collect();
        let mut machines = Vec::new();
        for name in &names {
            kit::fleet::ready(&mut world, name, &[&format!("slots {slots}")]);
            machines.push(Machine {
                epoch: kit::workers::epoch(&mut world, name),
                ..Machine::default()
            });
        }
        Sim {
            world,
            names,
            machines,
            letters: Vec::new(),
            known: BTreeMap::new(),
            resource: BTreeMap::new(),
            newest: 0,
            started: 0,
            reached: BTreeMap::new(),
            strict,
        }
    }

    /// `pace` steps take as long as one would: so many workers act at the same time.
    fn play(&mut self, steps: &[Step], pace: u64, every: usize) {
        for (number, step) in steps.iter().enumerate() {
            self.world.advance(step.wait / pace);
            self.kill_late();
            self.one(step);
            if number % every == 0 {
                assert_eq!(
                    invariants::check(&self.world.state),
                    Vec::new(),
                    "after step {number}"
                );
            }
        }
        self.drain();
        assert_eq!(invariants::check(&self.world.state), Vec::new());
    }

    fn one(&mut self, step: &Step) {
        let machine = step.one % self.machines.len();
        match step.kind % 32 {
            0..5 => self.start(step),
            5..10 => self.poll(machine),
            10..15 => self.work(machine, step),
            15..19 => (0..4).for_each(|_| self.deliver(step)),
            19 | 20 => self.deliver_all(machine),
            21 if step.two.is_multiple_of(4) => self.restart(machine, step.two.is_multiple_of(3)),
            21 | 22 if step.two % 4 == 1 => self.report(machine),
            23 if step.two.is_multiple_of(4) => self.operator_acts(step),
            24..27 => self.sweep(),
            21..24 | 27 | 28 => self.renew_all(machine),
            29 if step.two.is_multiple_of(4) => self.letters.clear(),
            _ => self.clean(machine),
        }
    }

    fn actor(&mut self, machine: usize) -> Actor {
        let name = self.names[machine].clone();
        self.world.node(&name)
    }

    fn id(&mut self, machine: usize) -> Id {
        let name = self.names[machine].clone();
        self.world.id(&name)
    }

    fn start(&mut self, step: &Step) {
        if leases::totals(&self.world.state).open_runs() > 4 * self.machines.len() as u64 {
            return;
        }
        self.started += 1;
        let name = format!("run-{}", self.started);
        kit::fleet::grant(&mut self.world, &name, "lint");
        let effect = if step.two.is_multiple_of(3) {
            Effect::Once
        } else {
            Effect::Idempotent
        };
        let start = leases::StartRun {
            run_id: self.world.id(&name),
            tool: "lint".to_owned(),
            params: Bytes::from_static(b"{}"),
            effect: effect as i32,
            ttl_ms: 1_000 + (step.two as u64 % 5) * 700,
            timeout_ms: 4_000 + (step.one as u64 % 7) * 5_000,
            ..leases::StartRun::default()
        };
        self.run(operator("root"), start.into()).unwrap();
    }

    /// The worker sees its offers and takes them; the acceptance is on its way.
    fn poll(&mut self, machine: usize) {
        let (id, epoch) = (self.id(machine), self.machines[machine].epoch);
        for offer in leases::offers(&self.world.state, id, epoch) {
            let accept = leases::Accept {
                lease_id: offer.id,
                fence: offer.fence,
                epoch,
            };
            self.machines[machine].traces.insert(offer.id, offer.fence);
            self.send(machine, accept.into());
        }
        // What the ledger wants ended, the worker kills. Cleaning takes it a while.
        for end in leases::to_end(&self.world.state, id) {
            self.machines[machine].programs.remove(&end.lease_id);
            self.machines[machine]
                .traces
                .entry(end.lease_id)
                .or_insert(end.fence);
        }
    }

    fn send(&mut self, from: usize, command: Command) {
        let sent = self.world.at;
        self.letters.push(Letter { sent, from, command });
    }

    /// One of its programs writes to its resource, and perhaps ends.
    fn work(&mut self, machine: usize, step: &Step) {
        let programs: Vec<(Id, Program)> = self.machines[machine].programs.clone().into_iter().collect();
        let Some((lease_id, program)) = programs.get(step.two % programs.len().max(1)) else {
            return;
        };
        // The resource is the judge: it never sees an old fence after a newer one.
        let seen = self.resource.entry(program.run_id).or_default();
        assert!(
            program.fence >= *seen,
            "a program works under {} after {seen}",
            program.fence
        );
        *seen = program.fence;
        if !step.two.is_multiple_of(3) {
            return;
        }
        let outcomes = [
            Outcome::Succeeded,
            Outcome::Failed,
            Outcome::Cancelled,
            Outcome::Succeeded,
        ];
        let finish = leases::Finish {
            lease_id: *lease_id,
            fence: program.fence,
            outcome: outcomes[step.kind as usize % 4] as i32,
            ..leases::Finish::default()
        };
        self.machines[machine].programs.remove(lease_id);
        self.send(machine, finish.into());
    }

    /// One letter arrives, one in eight twice.
    fn deliver(&mut self, step: &Step) {
        if self.letters.is_empty() {
            return;
        }
        let at = step.two % self.letters.len();
        let letter = if step.one.is_multiple_of(8) {
            self.letters[at].clone()
        } else {
            self.letters.remove(at)
        };
        self.arrive(&letter);
    }

    fn deliver_all(&mut self, machine: usize) {
        let (own, others) = self.letters.drain(..).partition(|letter| letter.from == machine);
        self.letters = others;
        let own: Vec<Letter> = own;
        for letter in own {
            self.arrive(&letter);
        }
    }

    fn arrive(&mut self, letter: &Letter) {
        let Command::Leases(command) = &letter.command else {
            unreachable!("workers send nothing else");
        };
        let action = command.action.clone().unwrap();
        let renewal = matches!(action, leases::Action::Renew(_));
        let actor = if renewal {
            replica(1)
        } else {
            self.actor(letter.from)
        };
        let fenced = match &action {
            leases::Action::Accept(accept) => Some((accept.lease_id, accept.fence)),
            leases::Action::Finish(finish) => Some((finish.lease_id, finish.fence)),
            _ => None,
        };
        let judged = fenced.filter(|(id, _)| self.known.contains_key(id));
        let live = judged.is_some_and(|(id, _)| !self.known[&id].ending);
        let deadline = judged.map(|(id, _)| self.known[&id].deadline_at);
        let reply = self.run(actor, letter.command.clone());
        match (&action, &reply) {
            (leases::Action::Accept(accept), Ok(_)) => {
                self.judge_fence(accept.lease_id, accept.fence);
                self.begin(letter.from, accept);
            }
            (leases::Action::Finish(_), Ok(_)) => {
                assert!(
                    live && deadline.is_some_and(|at| self.world.at < at),
                    "a late result was accepted"
                );
                self.reach("finished");
            }
            (leases::Action::Renew(wishes), Ok(Reply::LeasesRenewed(answers))) => {
                for (wish, answer) in wishes.leases.iter().zip(&answers.renewals) {
                    self.renewed(letter, wish, answer);
                }
            }
            (_, Err(reject)) => {
                let stale = matches!(reject.code().as_str(), "E0860" | "E0861" | "E0862" | "E0859");
                assert!(stale, "{reject}");
                self.reach("refused");
            }
            _ => {}
        }
    }

    fn renew_all(&mut self, machine: usize) {
        let (worker_id, epoch) = (self.id(machine), self.machines[machine].epoch);
        let wishes = self.machines[machine]
            .programs
            .iter()
            .map(|(id, program)| LeaseRef {
                lease_id: *id,
                fence: program.fence,
                worker_id,
                epoch,
            });
        let leases: Vec<LeaseRef> = wishes.collect();
        if !leases.is_empty() {
            self.send(machine, leases::Renew { leases }.into());
        }
    }

    /// The worker's process begins anew; its wardens have killed what ran. With `forgets`, its disk is new,
    /// too.
    fn restart(&mut self, machine: usize, forgets: bool) {
        self.machines[machine].programs.clear();
        if forgets {
            self.machines[machine].traces.clear();
        }
        self.report(machine);
        self.reach("restarted");
    }

    /// A new session: what the worker has is compared.
    fn report(&mut self, machine: usize) {
        let (actor, worker_id) = (self.actor(machine), self.id(machine));
        let attach = commands::attach(&mut self.world, &self.names[machine], 1, &[]);
        self.run(actor.clone(), attach.into()).unwrap();
        let epoch = self.world.index;
        let mine = &mut self.machines[machine];
        mine.epoch = epoch;
        let held = mine.traces.iter().map(|(id, fence)| leases::Held {
            lease_id: *id,
            fence: *fence,
            state: if mine.programs.contains_key(id) {
                HeldState::Running
            } else {
                HeldState::Cleaned
            } as i32,
            message: String::new(),
        });
        let held: Vec<leases::Held> = held.take(palyra_state::limits::LEASES_HELD).collect();
        let report = leases::Reconcile {
            worker_id,
            epoch,
            held,
        };
        let reply = self.run(actor, report.into());
        let Ok(Reply::Reconciled(answer)) = reply else {
            panic!("{reply:?}");
        };
        let mine = &mut self.machines[machine];
        mine.traces.retain(|id, _| mine.programs.contains_key(id));
        mine.programs.retain(|id, _| answer.keep.contains(id));
        for program in mine.programs.values_mut() {
            program.epoch = epoch;
        }
        for end in answer.end {
            mine.traces.insert(end.lease_id, end.fence);
        }
        self.reach("reported");
    }

    /// The worker cleans what it does not run, and says so.
    fn clean(&mut self, machine: usize) {
        let mine = &mut self.machines[machine];
        let programs = &mine.programs;
        let over: Vec<(Id, u64)> = mine
            .traces
            .iter()
            .filter(|(id, _)| !programs.contains_key(id))
            .map(|(id, fence)| (*id, *fence))
            .collect();
        for (lease_id, fence) in over {
            // What is on its way may begin still, or bring the result: it is not clean before.
            let waits = self
                .letters
                .iter()
                .any(|letter| letter.from == machine && speaks_of(letter, lease_id));
            let live = leases::lease(&self.world.state, lease_id).is_some_and(|lease| lease.is_live());
            if waits || live {
                continue;
            }
            self.machines[machine].traces.remove(&lease_id);
            let cleaned = leases::Cleaned {
                lease_id,
                fence,
                ok: true,
                ..leases::Cleaned::default()
            };
            self.send(machine, cleaned.into());
        }
    }

    fn operator_acts(&mut self, step: &Step) {
        let live = leases::live(&self.world.state, None, 100);
        let Some(found) = live
            .get(step.two % live.len().max(1))
            .filter(|lease| lease.is_live())
        else {
            return;
        };
        let command: Command = if step.two.is_multiple_of(2) {
            leases::RevokeLease {
                lease_id: found.id,
                reason: "test".to_owned(),
            }
            .into()
        } else {
            leases::CancelRun {
                run_id: found.run_id,
                reason: String::new(),
            }
            .into()
        };
        self.run(operator("root"), command).unwrap();
        self.reach("taken back");
    }

    fn sweep(&mut self) {
        let due = leases::due(&self.world.state, self.world.at);
        if !due.leases.is_empty() || !due.runs.is_empty() {
            self.run(Actor::System, due.into()).unwrap();
        }
    }

    /// Everything arrives, everything ends: no slot is lost.
    fn drain(&mut self) {
        for letter in std::mem::take(&mut self.letters) {
            self.arrive(&letter);
        }
        for _ in 0..200 {
            self.world.advance(1_000);
            self.kill_late();
            self.sweep();
            for machine in 0..self.machines.len() {
                self.poll(machine);
                self.clean(machine);
            }
            for letter in std::mem::take(&mut self.letters) {
                self.arrive(&letter);
            }
        }
        let totals = leases::totals(&self.world.state);
        assert_eq!((totals.open_runs(), totals.live), (0, 0), "something never ended");
        for name in self.names.clone() {
            let id = self.world.id(&name);
            let worker = palyra_state::fleet::worker(&self.world.state, id).unwrap();
            assert_eq!(worker.lifecycle().as_str(), "available", "{name} {worker:?}");
        }
    }
}

fn speaks_of(letter: &Letter, id: Id) -> bool {
    let Command::Leases(command) = &letter.command else {
        return false;
    };
    match command.action.as_ref().unwrap() {
        leases::Action::Accept(accept) => accept.lease_id == id,
        leases::Action::Finish(finish) => finish.lease_id == id,
        _ => false,
    }
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 48,
        max_shrink_iters: 40,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn no_two_programs_of_one_run_and_no_stale_fence(steps in prop::collection::vec(step(), 1..400)) {
        Sim::new(3, 2, true).play(&steps, 1, 16);
    }
}

/// Thousands of leases on many workers.
#[test]
fn thousands_of_leases_compete() {
    use proptest::strategy::ValueTree as _;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let steps = prop::collection::vec(step(), 30_000)
        .new_tree(&mut runner)
        .unwrap()
        .current();
    let mut sim = Sim::new(16, 4, false);
    sim.play(&steps, 64, 4_000);
    let reached = |what: &str| sim.reached.get(what).copied().unwrap_or_default();
    assert!(reached("granted") > 1_500, "{:?}", sim.reached);
    for what in [
        "began",
        "renewed",
        "renewal refused",
        "refused",
        "finished",
        "ended by word",
        "ended by time",
        "restarted",
        "reported",
        "taken back",
    ] {
        assert!(reached(what) > 20, "{what}: {:?}", sim.reached);
    }
    let states = leases::totals(&sim.world.state).runs;
    for state in [
        RunState::Succeeded,
        RunState::Lost,
        RunState::TimedOut,
        RunState::Cancelled,
    ] {
        assert!(states[state as usize] > 0, "no run is {}", state.as_str());
    }
}
