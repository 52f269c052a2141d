//! `dispatch`: jobs are run on nodes, once where that was asked for, whatever dies meanwhile; none is lost or invented.
//!
//! # Operations
//!
//! Operators:
//!
//! | `f` | call | answer |
//! |---|---|---|
//! | `submit` | `{device, effect}`; effect `once` or `idempotent`; the request id is the key | `ok` adds `job` |
//! | `cancel` | `{job}` | `ok` adds `state`: `cancelled`, it never began; `cancelling`, its node was asked |
//! | `job` | `{job}`, when the time for everything to end is over | `ok` adds `state`; `fail`: there is none |
//! | `rows` | see [`crate::evidence`] | |
//!
//! Nodes of the harness, and of the simulation, each delivery a process of its own:
//!
//! | `f` | call | answer |
//! |---|---|---|
//! | `deliver` | `{job, attempt, epoch, device}`, `ok` at once: it was heard and is begun | |
//! | `complete` | `{job, attempt, epoch, device, outcome}` | `ok`: it counts; `fail`: it came late or was known |
//!
//! An `outcome` is `succeeded`, `failed`, `rejected` or `cancelled`.
//!
//! Of real agents, what their programs left: `effects`, `ok` with `{device, effects: [{job, from, to}]}`; `from` and
//! `to` in nanoseconds of the run, `to` null of one that was cut short.
//! A message that is sent again under the same request id belongs to the operation that it repeats.
//!
//! # Conditions
//!
//! - `dispatch.all-end`: each job that was accepted has come to one end, and is there at the end, or was forgotten
//!   after the journal had told its end: of what is over only the newest are kept.
//! - `dispatch.delivered-once`: no node hears the same attempt of a job twice, over any number of sessions.
//! - `dispatch.attempts-follow`: an attempt is assigned only after the one before it has ended, and when it has been
//!   heard of, nothing of an earlier one counts any more.
//! - `dispatch.one-completion`: one completion counts for a job, and the job ends as that said.
//! - `dispatch.effects`: a `once` job is begun at most once, an idempotent one at most as often as it was assigned,
//!   one that succeeded at least once, and none that nobody asked for.
//! - `dispatch.one-job-per-key`: a key names one job, however often it is sent; a refused one none, an unknown one at
//!   most one.
//! - `dispatch.cancelled-stays`: a job that was taken back has come to its end or is being cancelled; one that was
//!   cancelled before it began does not begin after the answer, and one that was being cancelled gets no new attempt.

use std::collections::{BTreeMap, BTreeSet};

use crate::evidence::{Rows, field, number, text, unreadable, violation};
use crate::history::{History, Kind, Op};
use crate::verdict::{Check, Violation};

mod server;
#[cfg(test)]
mod tests;

/// States in which a job stays.
const ENDS: [&str; 6] = [
    "succeeded",
    "failed",
    "timed_out",
    "rejected",
    "cancelled",
    "session_lost",
];

/// So many jobs that have ended are kept; of what is older only the journal tells.
const KEPT: usize = 10_000;

/// Judges a history.
#[must_use]
pub fn check(history: &History) -> Vec<Check> {
    let ops = history.ops();
    match Account::of(&ops) {
        Ok(account) => account.judge(),
        Err(why) => unreadable("dispatch", &why),
    }
}

/// A delivery or a completion.
struct Step<'a> {
    op: Op<'a>,
    attempt: u64,
}

/// A begin of a program.
struct Effect<'a> {
    op: Op<'a>,
    from: u64,
}

/// What is known of a job.
#[derive(Default)]
struct Job<'a> {
    /// `once` or `idempotent`.
    effect: String,
    submit: Option<Op<'a>>,
    cancels: Vec<Op<'a>>,
    last: Option<Op<'a>>,
    heard: Vec<Step<'a>>,
    completed: Vec<Step<'a>>,
    effects: Vec<Effect<'a>>,
}

/// Everything that a history says of dispatches.
struct Account<'a> {
    jobs: BTreeMap<String, Job<'a>>,
    /// By request id.
    keys: BTreeMap<&'a str, Vec<Op<'a>>>,
    rows: Option<Rows>,
}

impl<'a> Account<'a> {
    fn of(ops: &[Op<'a>]) -> Result<Account<'a>, String> {
        let mut account = Account {
            jobs: BTreeMap::new(),
            keys: BTreeMap::new(),
            rows: Rows::of(ops)?,
        };
        for op in ops {
            account.read(op)?;
        }
        Ok(account)
    }

    fn read(&mut self, op: &Op<'a>) -> Result<(), String> {
        match op.invoke.f.as_str() {
            "submit" => {
                let key = op.invoke.request.as_deref();
                let key = key.ok_or_else(|| format!("event {}: a submit without a key", op.invoke.index))?;
                self.keys.entry(key).or_default().push(*op);
                if op.kind() == Kind::Ok {
                    let job = self.job(op)?;
                    job.submit.get_or_insert(*op);
                    text(op, "effect")?.clone_into(&mut job.effect);
                }
            }
            "cancel" => self.job(op)?.cancels.push(*op),
            "job" if op.kind() != Kind::Info => self.job(op)?.last = Some(*op),
            "deliver" | "complete" => {
                let step = Step {
                    op: *op,
                    attempt: number(op, "attempt")?,
                };
                let job = self.job(op)?;
                if op.invoke.f == "deliver" {
                    &mut job.heard
                } else {
                    &mut job.completed
                }
                .push(step);
            }
            "effects" if op.kind() == Kind::Ok => self.effects(op)?,
            _ => {}
        }
        Ok(())
    }

    fn job(&mut self, op: &Op<'a>) -> Result<&mut Job<'a>, String> {
        Ok(self.jobs.entry(text(op, "job")?.to_owned()).or_default())
    }

    fn effects(&mut self, op: &Op<'a>) -> Result<(), String> {
        let wrong = || format!("event {}: no list of effects with job and from", op.invoke.index);
        for effect in field(op, "effects").as_array().ok_or_else(wrong)? {
            let job = effect["job"].as_str().ok_or_else(wrong)?;
            let from = effect["from"].as_u64().ok_or_else(wrong)?;
            let job = self.jobs.entry(job.to_owned()).or_default();
            job.effects.push(Effect { op: *op, from });
        }
        Ok(())
    }

    fn judge(&self) -> Vec<Check> {
        vec![
            self.all_end(),
            self.delivered_once(),
            self.attempts_follow(),
            self.one_completion(),
            self.effects_fit(),
            self.one_job_per_key(),
            self.cancelled_stays(),
        ]
    }

    fn whole(&self) -> Option<&Rows> {
        self.rows.as_ref().filter(|rows| rows.whole)
    }

    fn all_end(&self) -> Check {
        let name = "dispatch.all-end";
        let accepted: Vec<(&String, Op<'_>)> = self
            .jobs
            .iter()
            .filter_map(|(id, job)| Some((id, job.submit?)))
            .collect();
        if accepted.is_empty() {
            return Check::unknown(name, "no job was accepted");
        }
        let (mut found, mut unread) = (Vec::new(), 0u64);
        let mut states: BTreeMap<&str, u64> = BTreeMap::new();
        let told: BTreeSet<&str> = self
            .whole()
            .into_iter()
            .flat_map(|rows| rows.of_action("dispatch.finished"))
            .map(|row| row.subject.as_str())
            .collect();
        for (id, submit) in &accepted {
            let Some(last) = self.jobs[*id].last else {
                unread += 1;
                continue;
            };
            let state = field(&last, "state").as_str().unwrap_or("");
            let may_be_forgotten = told.len() > KEPT && told.contains(id.as_str());
            if last.kind() == Kind::Fail && may_be_forgotten {
                *states.entry("forgotten").or_default() += 1;
            } else if last.kind() == Kind::Fail {
                found.push(violation(
                    format!("job {id} was accepted and is gone, and its end was never told"),
                    &[submit, &last],
                ));
            } else if ENDS.contains(&state) {
                *states.entry(state).or_default() += 1;
            } else {
                let what = format!("job {id} is {state:?} and has not come to an end");
                found.push(violation(what, &[submit, &last]));
            }
        }
        if let Some(rows) = &self.rows {
            found.extend(server::ends(rows));
        }
        let mut check = match unread {
            0 => Check::of(name, found),
            _ if !found.is_empty() => Check::of(name, found),
            _ => Check::unknown(
                name,
                format!("{unread} of {} jobs were not read at the end", accepted.len()),
            ),
        };
        check = check.fact("jobs", accepted.len());
        for (state, count) in states {
            check = check.fact(state, count);
        }
        check
    }

    fn delivered_once(&self) -> Check {
        let (mut found, mut heard) = (Vec::new(), 0);
        for (id, job) in &self.jobs {
            let mut first: BTreeMap<u64, &Step<'_>> = BTreeMap::new();
            for step in &job.heard {
                heard += 1;
                if let Some(before) = first.insert(step.attempt, step) {
                    let what = format!("attempt {} of job {id} was delivered twice", step.attempt);
                    found.push(violation(what, &[&before.op, &step.op]));
                }
            }
        }
        Check::of("dispatch.delivered-once", found).fact("delivered", heard)
    }

    fn attempts_follow(&self) -> Check {
        let mut found = Vec::new();
        for (id, job) in &self.jobs {
            let mut heard: Vec<&Step<'_>> = job.heard.iter().collect();
            heard.sort_by_key(|step| step.op.invoke.time);
            for pair in heard.windows(2).filter(|pair| pair[1].attempt < pair[0].attempt) {
                let what = format!(
                    "attempt {} of job {id} was delivered after attempt {}",
                    pair[1].attempt, pair[0].attempt
                );
                found.push(violation(what, &[&pair[0].op, &pair[1].op]));
            }
            for done in job.completed.iter().filter(|done| done.op.kind() == Kind::Ok) {
                let newer = heard
                    .iter()
                    .find(|step| step.attempt > done.attempt && step.op.invoke.time < done.op.invoke.time);
                if let Some(newer) = newer {
                    let what = format!(
                        "the result of attempt {} of job {id} counted after attempt {} had been delivered",
                        done.attempt, newer.attempt
                    );
                    found.push(violation(what, &[&newer.op, &done.op]));
                }
            }
        }
        if let Some(rows) = &self.rows {
            found.extend(server::attempts(rows));
        }
        Check::of("dispatch.attempts-follow", found)
    }

    fn one_completion(&self) -> Check {
        let (mut found, mut counted) = (Vec::new(), 0u64);
        for (id, job) in &self.jobs {
            // One that failed may be tried again; what ends a job is the last that counted.
            let ends = |step: &&Step<'_>| {
                step.op.kind() == Kind::Ok && field(&step.op, "outcome") != &serde_json::json!("failed")
            };
            let done: Vec<&Step<'_>> = job.completed.iter().filter(ends).collect();
            counted += done.len() as u64;
            for pair in done.windows(2) {
                let what = format!("two results counted for job {id}");
                found.push(violation(what, &[&pair[0].op, &pair[1].op]));
            }
            let (Some(done), Some(last)) = (done.first(), job.last) else {
                continue;
            };
            let outcome = field(&done.op, "outcome").as_str().unwrap_or("");
            let state = field(&last, "state").as_str().unwrap_or("");
            if last.kind() == Kind::Ok && outcome == "succeeded" && state != outcome {
                let what = format!("job {id} is {state}, though a result said that it {outcome} and counted");
                found.push(violation(what, &[&done.op, &last]));
            }
        }
        Check::of("dispatch.one-completion", found).fact("counted", counted)
    }

    fn effects_fit(&self) -> Check {
        let name = "dispatch.effects";
        let (mut found, mut begun) = (Vec::new(), 0);
        let assigned = self.rows.as_ref().map(server::assigned).unwrap_or_default();
        for (id, job) in &self.jobs {
            // A delivery is a begin, of nodes that leave no effects behind.
            let begins = job.begins();
            begun += begins.len();
            let known = job.submit.is_some() || self.whole().is_none() || assigned.contains_key(id.as_str());
            let Some((first, _)) = begins.first() else {
                let succeeded = job.last.is_some_and(|last| field(&last, "state") == "succeeded");
                if let Some(last) = job.last.filter(|_| succeeded && self.leaves_effects()) {
                    found.push(violation(
                        format!("job {id} succeeded and was never begun"),
                        &[&last],
                    ));
                }
                continue;
            };
            if !known {
                found.push(violation(
                    format!("job {id} was begun and was never assigned"),
                    &[first],
                ));
            }
            let allowed = match job.effect.as_str() {
                "once" => Some(1),
                _ => assigned
                    .get(id.as_str())
                    .copied()
                    .filter(|_| self.whole().is_some()),
            };
            if let Some(allowed) = allowed.filter(|allowed| begins.len() > *allowed) {
                let what = format!(
                    "job {id} ({}) was begun {} times and may be {allowed} times at most",
                    job.effect,
                    begins.len()
                );
                let shown: Vec<&Op<'_>> = begins.iter().map(|(op, _)| op).collect();
                let mut seen = violation(what, &shown);
                seen.time = begins[allowed.min(begins.len() - 1)].1;
                found.push(seen);
            }
        }
        Check::of(name, found).fact("begun", begun)
    }

    /// Whether begins are in the history at all.
    fn leaves_effects(&self) -> bool {
        self.jobs
            .values()
            .any(|job| !job.effects.is_empty() || !job.heard.is_empty())
    }

    fn one_job_per_key(&self) -> Check {
        let name = "dispatch.one-job-per-key";
        let mut found = Vec::new();
        for (key, ops) in &self.keys {
            let ok: Vec<&Op<'_>> = ops.iter().filter(|op| op.kind() == Kind::Ok).collect();
            for pair in ok.windows(2) {
                let (one, other) = (field(pair[0], "job"), field(pair[1], "job"));
                if one != other {
                    found.push(violation(
                        format!("key {key} made jobs {one} and {other}"),
                        &[pair[0], pair[1]],
                    ));
                }
            }
        }
        let Some(rows) = self.whole() else {
            return match found.is_empty() {
                true => Check::unknown(name, "the journal was not read to its end"),
                false => Check::of(name, found),
            };
        };
        let (by_rows, jobs) = server::keys(rows, &self.keys);
        found.extend(by_rows);
        for (id, job) in &self.jobs {
            if let Some(submit) = job.submit.filter(|_| !jobs.contains(id.as_str())) {
                found.push(violation(
                    format!("job {id} was accepted and the journal lacks it"),
                    &[&submit],
                ));
            }
        }
        Check::of(name, found)
            .fact("keys", self.keys.len())
            .fact("jobs", jobs.len())
    }

    fn cancelled_stays(&self) -> Check {
        let (mut found, mut cancelled) = (Vec::new(), 0u64);
        for (id, job) in &self.jobs {
            for cancel in job.cancels.iter().filter(|cancel| cancel.kind() == Kind::Ok) {
                cancelled += 1;
                let state = field(cancel, "state").as_str().unwrap_or("");
                if !state.is_empty() && state != "cancelling" && !ENDS.contains(&state) {
                    let what = format!("job {id} was taken back, as was answered, and is {state}");
                    found.push(violation(what, &[cancel]));
                }
                if state != "cancelled" {
                    continue;
                }
                let answered = cancel.returned().unwrap_or(u64::MAX);
                if let Some((op, from)) = job.begins().into_iter().find(|(_, from)| *from > answered) {
                    let mut seen = violation(
                        format!("job {id} was cancelled before it began, and began after the answer"),
                        &[cancel, &op],
                    );
                    seen.time = from;
                    found.push(seen);
                }
            }
        }
        if let Some(rows) = &self.rows {
            found.extend(server::cancelled(rows));
        }
        Check::of("dispatch.cancelled-stays", found).fact("cancelled", cancelled)
    }
}

impl<'a> Job<'a> {
    /// When its program was begun, in order.
    fn begins(&self) -> Vec<(Op<'a>, u64)> {
        let mut begins: Vec<(Op<'a>, u64)> = match self.effects.is_empty() {
            true => self
                .heard
                .iter()
                .map(|step| (step.op, step.op.invoke.time))
                .collect(),
            false => self
                .effects
                .iter()
                .map(|effect| (effect.op, effect.from))
                .collect(),
        };
        begins.sort_by_key(|(_, from)| *from);
        begins
    }
}

/// Ids, and what is wrong with them.
type Found<'r> = (Vec<Violation>, BTreeSet<&'r str>);
