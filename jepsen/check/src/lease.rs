//! `lease`: workers hold leases of slots for runs; whatever fails, one place is held by one of them at a time.
//!
//! A lease binds two **places**: a run, and a slot of a worker (`"DEVICE/N"`). Its **fence** is its token.
//!
//! # Operations
//!
//! Workers (the harness's own, and the simulation's), one process for each lease:
//!
//! | `f` | call | answer |
//! |---|---|---|
//! | `accept` | `{lease, run, slot, fence}`, when it is first said | `ok`: taken; `fail`: refused |
//! | `renew` | `{lease, fence}` | `ok` adds `until`: the holder's own, conservative end, in nanoseconds of the run |
//! | `finish` | `{lease, fence, outcome}`; outcome `succeeded`, `failed`, `refused`, `cancelled` | `ok`: taken |
//! | `clean` | `{lease, fence}`: all of it is dead and removed | `ok`, `fail` |
//! | `report` | `{device, held: [{lease, fence, state}]}`, when a session begins; `state` as reported | `ok` |
//! | `stop` | `{lease, fence}`, `ok` at once: nothing of it runs from now on | |
//! | `touch` | `{run, slot, fence}`: a write to the harness's fenced resource | `ok`: taken; `fail`: refused |
//! | `held` | `{run, fence, from, to}`, and `slot` when known: read at the end from what a program left behind | `ok` |
//!
//! Operators: `start {run, effect, max_attempts}`, `cancel-run {run}`; at the end of each run that was started `run
//! {run}`, whose `ok` adds `state` and `fence` and whose `fail` says that there is none; and `rows` (see
//! [`crate::evidence`]). A message that is sent again under the same request id belongs to the operation that it
//! repeats.
//!
//! # Conditions
//!
//! - `lease.tokens-rise`: fences rise strictly in the order of the grants, each lease has one, no two the same.
//! - `lease.fenced-resource`: after a write with a higher fence returned, no lower one is taken for that place.
//! - `lease.fenced-control`: after the server has taken a word under a higher fence, none under a lower one for that
//!   place.
//! - `lease.exclusive`: the times in which different holders of a place believe to hold it don't overlap: from the
//!   first confirmed renewal to the holder's own stop or own end, whichever comes first; and of programs, what they
//!   left.
//! - `lease.not-early`: nobody is offered a place before the end that its holder was promised, unless the holder gave
//!   it back or came back without it; and no row ends such a lease before.
//! - `lease.grantable-again`: a lease whose end nobody confirmed frees its places within a bound after its deadline.
//! - `lease.one-result`: a run ends once, and as the one `finish` said that was taken.
//! - `lease.runs-end`: each run that was started is there and has come to an end; none that was refused is there, and
//!   none that nobody asked for.

use std::collections::{BTreeMap, BTreeSet};

use crate::evidence::{Rows, Setting, field, number, seconds, text, unreadable, violation};
use crate::history::{History, Kind, Op};
use crate::verdict::{Check, Violation};

mod server;
#[cfg(test)]
mod tests;

/// States in which a run stays.
const ENDS: [&str; 6] = ["succeeded", "failed", "refused", "cancelled", "timed_out", "lost"];

/// Judges a history.
#[must_use]
pub fn check(history: &History, setting: &Setting) -> Vec<Check> {
    let ops = history.ops();
    match Account::of(&ops) {
        Ok(account) => account.judge(setting),
        Err(why) => unreadable("lease", &why),
    }
}

/// A place: what only one may hold.
type Place = String;

/// A word to the server under a fence, or a write.
struct Word<'a> {
    op: Op<'a>,
    fence: u64,
    places: Vec<Place>,
    /// When it, or what it repeats, was first said.
    said: u64,
}

/// What is known of a lease from its worker.
#[derive(Default)]
struct Lease<'a> {
    fence: u64,
    run: String,
    slot: String,
    /// The first word of it: its acceptance.
    accept: Option<Op<'a>>,
    /// Renewals that were confirmed.
    renewed: Vec<(Op<'a>, u64)>,
    /// Its holder has stopped.
    stopped: Option<u64>,
    /// Its holder has said that it is over: by its cleanup, or by a report without it.
    given_back: Option<u64>,
}

/// Everything that a history says of leases.
struct Account<'a> {
    ops: &'a [Op<'a>],
    leases: BTreeMap<String, Lease<'a>>,
    words: Vec<Word<'a>>,
    writes: Vec<Word<'a>>,
    held: Vec<Held<'a>>,
    rows: Option<Rows>,
    /// Leases with more than one fence.
    fences: Vec<Violation>,
}

/// A time in which a place was held.
struct Held<'a> {
    places: Vec<Place>,
    fence: u64,
    from: u64,
    to: u64,
    op: Op<'a>,
}

impl<'a> Account<'a> {
    fn of(ops: &'a [Op<'a>]) -> Result<Account<'a>, String> {
        let mut account = Account {
            ops,
            leases: BTreeMap::new(),
            words: Vec::new(),
            writes: Vec::new(),
            held: Vec::new(),
            rows: Rows::of(ops)?,
            fences: Vec::new(),
        };
        let mut first: BTreeMap<&str, u64> = BTreeMap::new();
        for op in ops {
            let said = op.invoke.time;
            let said = match &op.invoke.request {
                Some(request) => *first.entry(request).or_insert(said),
                None => said,
            };
            account.read(op, said)?;
        }
        for lease in account.leases.values() {
            account.held.extend(lease.held());
        }
        Ok(account)
    }

    fn read(&mut self, op: &Op<'a>, said: u64) -> Result<(), String> {
        match op.invoke.f.as_str() {
            "accept" | "renew" | "finish" | "clean" | "stop" => self.of_lease(op, said)?,
            "report" => self.report(op)?,
            // The simulation's word for it, before registers share its history.
            "touch" | "write" if !field(op, "fence").is_null() => {
                let word = Word {
                    op: *op,
                    fence: number(op, "fence")?,
                    places: vec![
                        format!("run {}", text(op, "run")?),
                        format!("slot {}", text(op, "slot")?),
                    ],
                    said,
                };
                self.writes.push(word);
            }
            "held" => {
                let mut places = vec![format!("run {}", text(op, "run")?)];
                places.extend(field(op, "slot").as_str().map(|slot| format!("slot {slot}")));
                self.held.push(Held {
                    places,
                    fence: number(op, "fence")?,
                    from: number(op, "from")?,
                    to: number(op, "to")?,
                    op: *op,
                });
            }
            _ => {}
        }
        Ok(())
    }

    fn of_lease(&mut self, op: &Op<'a>, said: u64) -> Result<(), String> {
        let id = text(op, "lease")?;
        let fence = number(op, "fence")?;
        let lease = self.leases.entry(id.to_owned()).or_default();
        if lease.fence != 0 && lease.fence != fence {
            let what = format!("lease {id} has the fences {} and {fence}", lease.fence);
            self.fences.push(violation(what, &[op]));
        }
        lease.fence = lease.fence.max(fence);
        let took = op.kind() == Kind::Ok;
        match op.invoke.f.as_str() {
            "accept" => {
                text(op, "run")?.clone_into(&mut lease.run);
                text(op, "slot")?.clone_into(&mut lease.slot);
                lease.accept.get_or_insert(*op);
            }
            "renew" if took => lease.renewed.push((*op, number(op, "until")?)),
            "stop" => lease.stopped = Some(lease.stopped.unwrap_or(said).min(said)),
            "clean" => lease.given_back = Some(lease.given_back.unwrap_or(said).min(said)),
            _ => {}
        }
        // Cleanups are taken of leases that are over.
        if took && matches!(op.invoke.f.as_str(), "accept" | "renew" | "finish") {
            let places = lease.places();
            self.words.push(Word {
                op: *op,
                fence,
                places,
                said,
            });
        }
        Ok(())
    }

    /// What a worker does not name when it comes back, it does not hold.
    fn report(&mut self, op: &Op<'a>) -> Result<(), String> {
        let device = format!("{}/", text(op, "device")?);
        let held = field(op, "held").as_array().ok_or("a report without a list")?;
        let live: BTreeSet<&str> = held
            .iter()
            .filter(|one| one["state"] != "cleaned")
            .filter_map(|one| one["lease"].as_str())
            .collect();
        let at = op.invoke.time;
        for (id, lease) in &mut self.leases {
            if lease.slot.starts_with(&device) && !live.contains(id.as_str()) {
                lease.given_back = Some(lease.given_back.unwrap_or(at).min(at));
            }
        }
        Ok(())
    }

    fn judge(&self, setting: &Setting) -> Vec<Check> {
        let fenced = [
            ("lease.fenced-resource", &self.writes, "the resource took"),
            ("lease.fenced-control", &self.words, "the server took"),
        ];
        let mut checks = vec![self.tokens_rise()];
        for (name, words, took) in fenced {
            let taken: Vec<&Word<'_>> = words.iter().filter(|word| word.op.kind() == Kind::Ok).collect();
            let check = match taken.is_empty() {
                true => Check::unknown(name, "nothing was tried"),
                false => Check::of(name, went_back(&taken, took)).fact("taken", taken.len()),
            };
            checks.push(check);
        }
        checks.push(self.exclusive());
        checks.push(self.not_early(setting));
        checks.extend(self.by_rows(setting));
        checks
    }

    fn tokens_rise(&self) -> Check {
        let mut found = self.fences.clone();
        let mut owners: BTreeMap<u64, &str> = BTreeMap::new();
        for (id, lease) in &self.leases {
            if let Some(other) = owners.insert(lease.fence, id) {
                let shown: Vec<&Op<'_>> = lease.accept.iter().collect();
                found.push(violation(
                    format!("leases {other} and {id} have the same fence {}", lease.fence),
                    &shown,
                ));
            }
        }
        if let Some(rows) = &self.rows {
            found.extend(server::fences(rows, &self.leases));
        }
        Check::of("lease.tokens-rise", found).fact("leases", self.leases.len())
    }

    fn exclusive(&self) -> Check {
        if self.held.is_empty() {
            return Check::unknown("lease.exclusive", "nobody held a lease");
        }
        let mut by_place: BTreeMap<&Place, Vec<&Held<'_>>> = BTreeMap::new();
        for held in &self.held {
            for place in &held.places {
                by_place.entry(place).or_default().push(held);
            }
        }
        let mut found = Vec::new();
        for (place, mut times) in by_place {
            times.sort_by_key(|held| (held.from, held.to));
            let mut longest: Option<&Held<'_>> = None;
            for held in times {
                if let Some(before) = longest
                    && held.from < before.to
                    && held.fence != before.fence
                {
                    let both = seconds(before.to.min(held.to).saturating_sub(held.from));
                    let what = format!(
                        "{place} was held under fences {} and {} at one time, for {both}",
                        before.fence, held.fence
                    );
                    let mut seen = violation(what, &[&before.op, &held.op]);
                    seen.time = held.from;
                    found.push(seen);
                }
                if longest.is_none_or(|before| before.to < held.to) {
                    longest = Some(held);
                }
            }
        }
        Check::of("lease.exclusive", found).fact("times_held", self.held.len())
    }

    /// Offers of a place that came before its holder's time was over.
    fn not_early(&self, setting: &Setting) -> Check {
        let mut by_place: BTreeMap<Place, Vec<&Lease<'_>>> = BTreeMap::new();
        for lease in self.leases.values() {
            for place in lease.places() {
                by_place.entry(place).or_default().push(lease);
            }
        }
        let (mut found, mut compared) = (Vec::new(), 0u64);
        for (place, mut leases) in by_place {
            leases.sort_by_key(|lease| lease.fence);
            let mut longest: Option<&Lease<'_>> = None;
            for lease in leases {
                if let Some((before, offer)) = longest.zip(lease.accept) {
                    compared += 1;
                    found.extend(before.offered_early(&place, lease.fence, &offer));
                }
                if lease.due() > longest.map_or(0, Lease::due) {
                    longest = Some(lease);
                }
            }
        }
        if let Some(rows) = &self.rows {
            found.extend(server::ended_early(rows, self.ops, &self.leases, setting));
        }
        Check::of("lease.not-early", found).fact("compared", compared)
    }

    /// What only the server's rows can say.
    fn by_rows(&self, setting: &Setting) -> Vec<Check> {
        let names = ["lease.grantable-again", "lease.one-result", "lease.runs-end"];
        let Some(rows) = self.rows.as_ref().filter(|rows| rows.whole) else {
            let unread = "the journal was not read to its end";
            return names.map(|name| Check::unknown(name, unread)).into();
        };
        vec![
            server::grantable_again(rows, setting),
            server::one_result(rows, self.ops, &self.leases),
            server::runs_end(rows, self.ops),
        ]
    }
}

impl<'a> Lease<'a> {
    fn places(&self) -> Vec<Place> {
        if self.run.is_empty() {
            return Vec::new();
        }
        vec![format!("run {}", self.run), format!("slot {}", self.slot)]
    }

    /// The renewal that promised most, and what.
    fn promised(&self) -> Option<(Op<'a>, u64)> {
        self.renewed.iter().max_by_key(|(_, until)| *until).copied()
    }

    /// Until when its places are its own: what was promised, if it did not give them back before.
    fn due(&self) -> u64 {
        let promised = self.promised().map_or(0, |(_, until)| until);
        self.given_back.map_or(promised, |back| back.min(promised))
    }

    /// An offer of its place to another before that.
    fn offered_early(&self, place: &str, fence: u64, offer: &Op<'_>) -> Option<Violation> {
        let (renewal, _) = self.promised()?;
        let early = self
            .due()
            .checked_sub(offer.invoke.time)
            .filter(|early| *early > 0)?;
        let what = format!(
            "{place}: fence {fence} was offered {} before the end of fence {}, whose renewal was confirmed",
            seconds(early),
            self.fence
        );
        Some(violation(what, &[&renewal, offer]))
    }

    fn held(&self) -> Option<Held<'a>> {
        let (op, until) = self.promised()?;
        let from = self.renewed.iter().filter_map(|(op, _)| op.returned()).min()?;
        let to = self.stopped.map_or(until, |stopped| stopped.min(until));
        (from < to).then(|| Held {
            places: self.places(),
            fence: self.fence,
            from,
            to,
            op,
        })
    }
}

/// Words that were taken although a higher fence had been taken for the same place before they were said.
fn went_back(words: &[&Word<'_>], took: &str) -> Vec<Violation> {
    let mut by_place: BTreeMap<&Place, Vec<&Word<'_>>> = BTreeMap::new();
    for word in words {
        for place in &word.places {
            by_place.entry(place).or_default().push(word);
        }
    }
    let mut found = Vec::new();
    for (place, words) in by_place {
        let mut said = words.clone();
        said.sort_by_key(|word| (word.said, word.op.invoke.index));
        let mut returned = words;
        returned.sort_by_key(|word| word.op.returned());
        let (mut at, mut highest): (usize, Option<&Word<'_>>) = (0, None);
        for word in said {
            while at < returned.len() && returned[at].op.returned().is_some_and(|time| time < word.said) {
                if highest.is_none_or(|before| before.fence < returned[at].fence) {
                    highest = Some(returned[at]);
                }
                at += 1;
            }
            if let Some(before) = highest.filter(|before| before.fence > word.fence) {
                let what = format!(
                    "{took} {} under fence {} for {place} after {} under fence {}",
                    word.op.invoke.f, word.fence, before.op.invoke.f, before.fence
                );
                found.push(violation(what, &[&before.op, &word.op]));
            }
        }
    }
    found
}
