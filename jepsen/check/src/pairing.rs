//! `pairing`: a code makes one machine a node, whoever races for it and wherever.
//!
//! # Operations
//!
//! | `f` | call | answer |
//! |---|---|---|
//! | `mint` | `{method, ttl_ms}`, method `pin` or `ticket`; with a request id | `ok` adds `code` |
//! | `close` | `{code}`: an operator takes it back | `ok` |
//! | `redeem` | `{code, device}`: a proof with a key of its own | `ok` adds `pairing`; `fail`: refused |
//! | `approve` | `{pairing}`; with a request id | `ok` adds `certificate` |
//! | `reject` | `{pairing}` | `ok` |
//! | `fetch` | `{pairing, device}` | `ok` adds `state`, and `certificate` when it is `approved` |
//! | `rows` | see [`crate::evidence`] | |
//!
//! A `redeem` says `wrong: true` of a wrong secret, and `alone: true` when it has no rival and a good code.
//! A call that is sent again, with the same request id or the same pairing, is an operation of its own here.
//!
//! # Conditions
//!
//! - `pairing.one-winner`: a code has at most one device that ever succeeds with it, and one pairing.
//! - `pairing.same-answer`: what is sent again is answered with the same code, the same pairing, the same certificate;
//!   and two pairings never have one certificate.
//! - `pairing.in-time`: nobody succeeds with a code after its end, before it was asked for, or after it was taken
//!   back; no certificate before an approval was asked for, none after a rejection.
//! - `pairing.proof-needed`: nobody succeeds with a wrong secret.
//! - `pairing.one-certificate`: in the journal each code that was used has one proof, by somebody who tried, and each
//!   approved pairing one certificate; what was answered as done is there, what nobody asked for is not.
//! - `pairing.live`: who is alone and has a good code succeeds while nothing is wrong, and has a certificate once
//!   approved.

use std::collections::{BTreeMap, BTreeSet};

use crate::evidence::{MS, Rows, Setting, field, number, seconds, text, unreadable, violation};
use crate::history::{History, Kind, Op};
use crate::verdict::Check;

mod server;
#[cfg(test)]
mod tests;

/// What the server's clock and the request's way may add to the end of a code, in milliseconds.
const CLOCK_MS: u64 = 1_000;

/// Judges a history.
#[must_use]
pub fn check(history: &History, setting: &Setting) -> Vec<Check> {
    let ops = history.ops();
    match Account::of(&ops) {
        Ok(account) => account.judge(setting),
        Err(why) => unreadable("pairing", &why),
    }
}

/// What is known of a code.
#[derive(Default)]
struct Code<'a> {
    mints: Vec<Op<'a>>,
    ttl: u64,
    closes: Vec<Op<'a>>,
    redeems: Vec<Op<'a>>,
}

/// What is known of a pairing.
#[derive(Default)]
struct Pairing<'a> {
    redeems: Vec<Op<'a>>,
    approves: Vec<Op<'a>>,
    rejects: Vec<Op<'a>>,
    fetches: Vec<Op<'a>>,
}

struct Account<'a> {
    codes: BTreeMap<&'a str, Code<'a>>,
    pairings: BTreeMap<&'a str, Pairing<'a>>,
    /// By request id.
    mints: BTreeMap<&'a str, Vec<Op<'a>>>,
    rows: Option<Rows>,
}

fn is_ok(op: &&Op<'_>) -> bool {
    op.kind() == Kind::Ok
}

impl<'a> Account<'a> {
    fn of(ops: &[Op<'a>]) -> Result<Account<'a>, String> {
        let mut account = Account {
            codes: BTreeMap::new(),
            pairings: BTreeMap::new(),
            mints: BTreeMap::new(),
            rows: Rows::of(ops)?,
        };
        for op in ops {
            account.read(op)?;
        }
        Ok(account)
    }

    fn read(&mut self, op: &Op<'a>) -> Result<(), String> {
        match op.invoke.f.as_str() {
            "mint" => {
                if let Some(request) = op.invoke.request.as_deref() {
                    self.mints.entry(request).or_default().push(*op);
                }
                if op.kind() == Kind::Ok {
                    let code = self.codes.entry(text(op, "code")?).or_default();
                    code.ttl = code.ttl.max(number(op, "ttl_ms")?);
                    code.mints.push(*op);
                }
            }
            "close" => self.codes.entry(text(op, "code")?).or_default().closes.push(*op),
            "redeem" => {
                text(op, "device")?;
                self.codes.entry(text(op, "code")?).or_default().redeems.push(*op);
                if op.kind() == Kind::Ok {
                    self.pairings
                        .entry(text(op, "pairing")?)
                        .or_default()
                        .redeems
                        .push(*op);
                }
            }
            "approve" | "reject" | "fetch" => {
                let pairing = self.pairings.entry(text(op, "pairing")?).or_default();
                match op.invoke.f.as_str() {
                    "approve" => &mut pairing.approves,
                    "reject" => &mut pairing.rejects,
                    _ => &mut pairing.fetches,
                }
                .push(*op);
            }
            _ => {}
        }
        Ok(())
    }

    fn judge(&self, setting: &Setting) -> Vec<Check> {
        vec![
            self.one_winner(),
            self.same_answer(),
            self.in_time(setting),
            self.proof_needed(),
            server::one_certificate(self),
            self.live(setting),
        ]
    }

    fn one_winner(&self) -> Check {
        let (mut found, mut used, mut raced) = (Vec::new(), 0u64, 0u64);
        for (id, code) in &self.codes {
            let devices: BTreeSet<&str> = code
                .redeems
                .iter()
                .filter_map(|op| field(op, "device").as_str())
                .collect();
            raced += u64::from(devices.len() > 1);
            let won: Vec<&Op<'_>> = code.redeems.iter().filter(is_ok).collect();
            used += u64::from(!won.is_empty());
            for pair in won.windows(2) {
                let (one, other) = (field(pair[0], "device"), field(pair[1], "device"));
                if one != other {
                    let what = format!("code {id} let devices {one} and {other} in");
                    found.push(violation(what, &[pair[0], pair[1]]));
                }
            }
        }
        Check::of("pairing.one-winner", found)
            .fact("codes_used", used)
            .fact("codes_with_rivals", raced)
    }

    fn same_answer(&self) -> Check {
        let mut found = Vec::new();
        let mut same = |what: &str, ops: &[&Op<'_>], name: &str| {
            for pair in ops.windows(2) {
                let (one, other) = (field(pair[0], name), field(pair[1], name));
                if one != other {
                    let what = format!("{what} was answered with {name} {one}, and again with {other}");
                    found.push(violation(what, &[pair[0], pair[1]]));
                }
            }
        };
        for (request, mints) in &self.mints {
            same(
                &format!("mint {request}"),
                &mints.iter().filter(is_ok).collect::<Vec<_>>(),
                "code",
            );
        }
        for (id, code) in &self.codes {
            let mut by_device: BTreeMap<&str, Vec<&Op<'_>>> = BTreeMap::new();
            for op in code.redeems.iter().filter(is_ok) {
                by_device
                    .entry(field(op, "device").as_str().unwrap_or(""))
                    .or_default()
                    .push(op);
            }
            for (device, ops) in by_device {
                same(&format!("code {id} of device {device}"), &ops, "pairing");
            }
        }
        let mut owners: BTreeMap<&str, (&str, &Op<'_>)> = BTreeMap::new();
        let mut shared = Vec::new();
        for (id, pairing) in &self.pairings {
            let all: Vec<&Op<'_>> = self.certificates(pairing);
            same(&format!("pairing {id}"), &all, "certificate");
            let Some(first) = all.first() else { continue };
            let certificate = field(first, "certificate").as_str().unwrap_or("");
            if let Some((other, op)) = owners.insert(certificate, (id, *first)) {
                shared.push(violation(
                    format!("pairings {other} and {id} have the same certificate {certificate}"),
                    &[op, first],
                ));
            }
        }
        found.extend(shared);
        Check::of("pairing.same-answer", found).fact("certificates", owners.len())
    }

    /// Answers that named a pairing's certificate.
    fn certificates<'s>(&self, pairing: &'s Pairing<'a>) -> Vec<&'s Op<'a>> {
        let all = pairing.approves.iter().chain(&pairing.fetches);
        all.filter(|op| op.kind() == Kind::Ok && field(op, "certificate").is_string())
            .collect()
    }

    fn in_time(&self, setting: &Setting) -> Check {
        let (mut found, mut late_tries) = (Vec::new(), 0u64);
        for (id, code) in &self.codes {
            let asked = code.mints.iter().map(|op| op.invoke.time).min();
            // The latest moment at which its time can have begun; a clock that was moved says nothing.
            let minted = code
                .mints
                .iter()
                .filter_map(Op::returned)
                .min()
                .filter(|_| setting.epoch_ms.is_some());
            let over = minted.map(|minted| minted + (code.ttl + CLOCK_MS) * MS);
            let closed = code.closes.iter().filter(is_ok).min_by_key(|op| op.returned());
            for redeem in &code.redeems {
                let at = redeem.invoke.time;
                late_tries += u64::from(over.is_some_and(|over| at > over));
                if redeem.kind() != Kind::Ok {
                    continue;
                }
                if let Some(over) = over.filter(|over| at > *over) {
                    let what = format!(
                        "code {id} was taken {} after its end",
                        seconds(at - over + CLOCK_MS * MS)
                    );
                    found.push(violation(what, &[redeem]));
                }
                if asked.is_none_or(|asked| redeem.returned().is_some_and(|time| time < asked)) {
                    found.push(violation(
                        format!("code {id} was taken before it was asked for"),
                        &[redeem],
                    ));
                }
                if let Some(close) = closed.filter(|close| close.returned().is_some_and(|time| time < at)) {
                    let what = format!("code {id} was taken after it had been taken back");
                    found.push(violation(what, &[close, redeem]));
                }
            }
        }
        for (id, pairing) in &self.pairings {
            let asked = pairing
                .approves
                .iter()
                .filter(|op| op.kind() != Kind::Fail)
                .map(|op| op.invoke.time)
                .min();
            for op in self.certificates(pairing) {
                if asked.is_none_or(|asked| op.returned().is_some_and(|time| time < asked)) {
                    found.push(violation(
                        format!("pairing {id} has a certificate that nobody approved"),
                        &[op],
                    ));
                }
                if let Some(reject) = pairing.rejects.iter().find(is_ok) {
                    found.push(violation(
                        format!("pairing {id} was rejected and has a certificate"),
                        &[reject, op],
                    ));
                }
            }
        }
        Check::of("pairing.in-time", found).fact("tries_after_the_end", late_tries)
    }

    fn proof_needed(&self) -> Check {
        let wrong = self
            .codes
            .iter()
            .flat_map(|(id, code)| code.redeems.iter().map(move |op| (id, op)));
        let wrong: Vec<_> = wrong.filter(|(_, op)| field(op, "wrong") == true).collect();
        let taken = wrong.iter().filter(|(_, op)| op.kind() == Kind::Ok);
        let found =
            taken.map(|(id, op)| violation(format!("code {id} was taken with a wrong secret"), &[*op]));
        Check::of("pairing.proof-needed", found.collect()).fact("wrong_tries", wrong.len())
    }

    fn live(&self, setting: &Setting) -> Check {
        let (mut found, mut tried) = (Vec::new(), 0u64);
        for (id, code) in &self.codes {
            for op in code.redeems.iter().filter(|op| field(op, "alone") == true) {
                let end = op.end.unwrap_or(op.invoke).time;
                if op.kind() == Kind::Ok || !setting.is_calm(op.invoke.time, end) {
                    tried += u64::from(op.kind() == Kind::Ok);
                    continue;
                }
                let why = op.end.and_then(|end| end.error.as_deref()).unwrap_or("no answer");
                let what = format!(
                    "code {id} was good, nobody else had it, nothing was wrong, and it failed: {why}"
                );
                found.push(violation(what, &[op]));
            }
        }
        for (id, pairing) in &self.pairings {
            let Some(approve) = pairing.approves.iter().find(is_ok) else {
                continue;
            };
            let approved = approve.returned().unwrap_or(u64::MAX);
            // A machine asks any replica, and one that is behind may still wait for the operator's word. That the
            // operator said no is nobody's to claim.
            let after = |op: &&Op<'_>| {
                let end = op.end.unwrap_or(op.invoke).time;
                let known = setting.is_calm(op.invoke.time, end) || field(op, "state") == "rejected";
                op.kind() == Kind::Ok && op.invoke.time > approved && known
            };
            if let Some(fetch) = pairing
                .fetches
                .iter()
                .filter(after)
                .find(|op| field(op, "state") != "approved")
            {
                let state = field(fetch, "state");
                found.push(violation(
                    format!("pairing {id} was approved and is {state}"),
                    &[approve, fetch],
                ));
            }
        }
        if tried == 0 && found.is_empty() {
            return Check::unknown("pairing.live", "nobody who was alone with a good code has tried");
        }
        Check::of("pairing.live", found).fact("alone", tried)
    }
}
