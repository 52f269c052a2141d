//! `revocation`: what is revoked is refused by everyone, and what is not revoked is not.
//!
//! # Operations
//!
//! | `f` | call | answer |
//! |---|---|---|
//! | `revoke` | `{device}` | `ok` adds `enforced`: every replica has carried it out, or serves nobody |
//! | `probe` | `{device, how}` at `node` | `ok` adds `accepted`, and `reason` when not; `info`: nobody answered |
//! | `stream` | `{device, stream}` at `node`: a session, open from the call on | `ok` adds `end`: why it has ended |
//! | `ping` | `{device, stream}` at `node`: a message within that session | `ok` adds `accepted`; `info`: no answer |
//!
//! A probe is a new connection with the device's certificate, and a call; `how` is `grpc` or `quic`, and a `reason` is
//! `revoked` or another.
//!
//! # Conditions
//!
//! - `revocation.answer-true`: after a revocation was answered with `enforced`, no probe or ping that begins is
//!   accepted.
//! - `revocation.bounded`: after any answer and the bound, none is accepted either.
//! - `revocation.fail-closed`: a replica that is cut off from every quorum for longer than its authority lasts accepts
//!   nobody.
//! - `revocation.monotone`: a replica that has refused a device as revoked never accepts it again, over restarts,
//!   snapshots and changes of membership; nor does any other after the bound.
//! - `revocation.streams-end`: sessions that were open when the device was revoked end within the bound; what faults
//!   and recovery take does not count, as a cut link hides the end.
//! - `revocation.open`: who is not revoked is accepted by each replica as soon as it has been whole for a time:
//!   refusing everybody is no way to pass.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::evidence::{MS, Setting, field, seconds, text, unreadable, violation};
use crate::history::{History, Kind, Op};
use crate::verdict::{Check, Violation};

#[cfg(test)]
mod tests;

/// What lifting a cut may take.
const LIFT_MS: u64 = 1_500;

/// What a run promises, in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Bounds {
    /// From the answer to a revocation until nobody accepts the device: the time for which a replica may serve without
    /// having heard from a quorum, the clocks' error, and one heartbeat.
    pub revoked_ms: u64,
    /// How long a replica may accept anybody after it was cut off from every quorum.
    pub alone_ms: u64,
    /// How long after faults have ended every replica must accept those who are not revoked.
    pub open_ms: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds {
            revoked_ms: 6_000,
            alone_ms: 6_000,
            open_ms: 10_000,
        }
    }
}

/// Judges a history.
#[must_use]
pub fn check(history: &History, setting: &Setting, bounds: &Bounds) -> Vec<Check> {
    let ops = history.ops();
    match Account::of(&ops, setting.end_of(history)) {
        Ok(mut account) => {
            let removed = history.faults().filter(|event| event.f == "removed");
            account.removed = removed
                .filter_map(|event| event.value.get("replica")?.as_str())
                .collect();
            account.judge(setting, bounds)
        }
        Err(why) => unreadable("revocation", &why),
    }
}

/// An answer to a certificate.
struct Probe<'a> {
    op: Op<'a>,
    device: &'a str,
    node: &'a str,
    /// `None`: nobody answered.
    accepted: Option<bool>,
    revoked: bool,
}

/// A session.
struct Stream<'a> {
    op: Op<'a>,
    device: &'a str,
    end: Option<u64>,
}

/// A device's revocation, from when it may be in force.
#[derive(Default)]
struct Revoked<'a> {
    /// The first call.
    asked: u64,
    /// The first answer that it is done.
    answer: Option<Op<'a>>,
    /// The first answer that everyone has carried it out.
    enforced: Option<Op<'a>>,
}

struct Account<'a> {
    probes: Vec<Probe<'a>>,
    streams: Vec<Stream<'a>>,
    revoked: BTreeMap<&'a str, Revoked<'a>>,
    /// Replicas that are members no more: nobody asks them at the end.
    removed: BTreeSet<&'a str>,
    end: u64,
}

impl<'a> Account<'a> {
    fn of(ops: &[Op<'a>], end: u64) -> Result<Account<'a>, String> {
        let mut account = Account {
            probes: Vec::new(),
            streams: Vec::new(),
            revoked: BTreeMap::new(),
            removed: BTreeSet::new(),
            end,
        };
        for op in ops {
            match op.invoke.f.as_str() {
                "revoke" => account.revoke(op)?,
                "probe" | "ping" => {
                    let accepted = match op.kind() {
                        Kind::Ok => Some(field(op, "accepted").as_bool().ok_or_else(|| {
                            format!("event {}: {} does not say accepted", op.invoke.index, op.invoke.f)
                        })?),
                        _ => None,
                    };
                    account.probes.push(Probe {
                        op: *op,
                        device: text(op, "device")?,
                        node: node(op)?,
                        accepted,
                        revoked: field(op, "reason") == "revoked",
                    });
                }
                "stream" => account.streams.push(Stream {
                    op: *op,
                    device: text(op, "device")?,
                    end: op.returned(),
                }),
                _ => {}
            }
        }
        Ok(account)
    }

    fn revoke(&mut self, op: &Op<'a>) -> Result<(), String> {
        // One that certainly did nothing revokes nobody.
        if op.kind() == Kind::Fail {
            return Ok(());
        }
        let at = op.invoke.time;
        let revoked = self
            .revoked
            .entry(text(op, "device")?)
            .or_insert_with(|| Revoked {
                asked: at,
                ..Revoked::default()
            });
        revoked.asked = revoked.asked.min(at);
        let earlier = |known: &Option<Op<'_>>| {
            known
                .as_ref()
                .is_none_or(|known| op.returned() < known.returned())
        };
        if op.kind() == Kind::Ok {
            if earlier(&revoked.answer) {
                revoked.answer = Some(*op);
            }
            if field(op, "enforced") == true && earlier(&revoked.enforced) {
                revoked.enforced = Some(*op);
            }
        }
        Ok(())
    }

    fn judge(&self, setting: &Setting, bounds: &Bounds) -> Vec<Check> {
        let bound = bounds.revoked_ms * MS;
        let answered: u64 = self
            .revoked
            .values()
            .map(|revoked| u64::from(revoked.answer.is_some()))
            .sum();
        if answered == 0 {
            let names = [
                "answer-true",
                "bounded",
                "fail-closed",
                "monotone",
                "streams-end",
                "open",
            ];
            return names
                .map(|name| Check::unknown(format!("revocation.{name}"), "no device was revoked"))
                .into();
        }
        vec![
            self.accepted_after("revocation.answer-true", 0, |revoked| revoked.enforced),
            self.accepted_after("revocation.bounded", bound, |revoked| revoked.answer)
                .fact("bound_ms", bounds.revoked_ms)
                .fact("revoked", answered)
                .fact("by_fault", self.by_fault(setting)),
            self.fail_closed(setting, bounds.alone_ms * MS),
            self.monotone(bound),
            self.streams_end(setting, bound),
            self.open(setting, bounds.open_ms),
        ]
    }

    /// Acceptances of what had been answered as revoked, `bound` after it.
    fn accepted_after(&self, name: &str, bound: u64, from: impl Fn(&Revoked<'a>) -> Option<Op<'a>>) -> Check {
        let (mut found, mut tried, mut worst) = (Vec::new(), 0u64, 0);
        for probe in &self.probes {
            let Some(answer) = self.revoked.get(probe.device).and_then(&from) else {
                continue;
            };
            let after = probe
                .op
                .invoke
                .time
                .checked_sub(answer.returned().unwrap_or(u64::MAX));
            let Some(after) = after else { continue };
            tried += 1;
            if probe.accepted != Some(true) {
                continue;
            }
            worst = worst.max(after);
            if after > bound {
                let what = format!(
                    "{} accepted device {} {} after its revocation was answered",
                    probe.node,
                    probe.device,
                    seconds(after)
                );
                found.push(violation(what, &[&answer, &probe.op]));
            }
        }
        Check::of(name, found)
            .fact("tried_afterwards", tried)
            .fact("last_accepted_after_ms", worst / MS)
    }

    /// What revocations took to reach everybody, by the faults under which they were answered: how many, and the
    /// longest from the answer to the begin of the last probe that was accepted, and to the end of the last session.
    fn by_fault(&self, setting: &Setting) -> Value {
        let mut worst: BTreeMap<&str, (u64, u64, u64)> = BTreeMap::new();
        for (device, revoked) in &self.revoked {
            let Some(answered) = revoked.answer.and_then(|answer| answer.returned()) else {
                continue;
            };
            let accepted = self
                .probes
                .iter()
                .filter(|probe| probe.device == *device && probe.accepted == Some(true));
            let last = accepted.filter_map(|probe| probe.op.invoke.time.checked_sub(answered));
            let last = last.max().unwrap_or(0);
            let open = self
                .streams
                .iter()
                .filter(|stream| stream.device == *device && stream.op.invoke.time <= answered);
            let ended = open.filter_map(|stream| stream.end?.checked_sub(answered));
            let ended = ended.max().unwrap_or(0);
            for name in setting.faults_at(answered) {
                let (count, accepts, ends) = worst.entry(name).or_default();
                *count += 1;
                (*accepts, *ends) = ((*accepts).max(last), (*ends).max(ended));
            }
        }
        let told = worst.into_iter().map(|(name, (count, accepts, ends))| {
            let figures = json!({
                "revoked": count, "last_accepted_after_ms": accepts / MS, "last_session_ended_after_ms": ends / MS,
            });
            (name.to_owned(), figures)
        });
        Value::Object(told.collect())
    }

    fn fail_closed(&self, setting: &Setting, bound: u64) -> Check {
        let (mut found, mut tried) = (Vec::new(), 0u64);
        for window in &setting.faults {
            for node in &window.isolated {
                // The cut is lifted a little before the end of the fault is written down.
                let (from, to) = (window.from + bound, window.to.saturating_sub(LIFT_MS * MS));
                let during =
                    |probe: &&Probe<'_>| probe.node == node && (from..to).contains(&probe.op.invoke.time);
                for probe in self.probes.iter().filter(during) {
                    tried += 1;
                    // What returned after the cut was healed may have been decided after it.
                    if probe.accepted == Some(true) && probe.op.returned().is_some_and(|time| time < to) {
                        let what = format!(
                            "{node} accepted device {} {} after it was cut off from every quorum ({})",
                            probe.device,
                            seconds(probe.op.invoke.time - window.from),
                            window.name
                        );
                        found.push(violation(what, &[&probe.op]));
                    }
                }
            }
        }
        Check::of("revocation.fail-closed", found).fact("tried_alone", tried)
    }

    fn monotone(&self, bound: u64) -> Check {
        let mut found = Vec::new();
        // By device: by node, the first refusal as revoked.
        let mut refused: BTreeMap<(&str, &str), &Probe<'_>> = BTreeMap::new();
        let mut first: BTreeMap<&str, &Probe<'_>> = BTreeMap::new();
        let earlier = |one: &Probe<'_>, known: Option<&&Probe<'_>>| {
            known.is_none_or(|known| one.op.returned() < known.op.returned())
        };
        for probe in self
            .probes
            .iter()
            .filter(|probe| probe.accepted == Some(false) && probe.revoked)
        {
            if earlier(probe, refused.get(&(probe.device, probe.node))) {
                refused.insert((probe.device, probe.node), probe);
            }
            if earlier(probe, first.get(probe.device)) {
                first.insert(probe.device, probe);
            }
        }
        for probe in self.probes.iter().filter(|probe| probe.accepted == Some(true)) {
            let after = |known: &&&Probe<'_>, bound: u64| {
                known
                    .op
                    .returned()
                    .is_some_and(|time| time.saturating_add(bound) < probe.op.invoke.time)
            };
            let own = refused
                .get(&(probe.device, probe.node))
                .filter(|known| after(known, 0));
            let any = first.get(probe.device).filter(|known| after(known, bound));
            if let Some(before) = own.or(any) {
                let what = format!(
                    "{} accepted device {}, which {} had refused as revoked {} before",
                    probe.node,
                    probe.device,
                    before.node,
                    seconds(probe.op.invoke.time - before.op.returned().unwrap_or(0))
                );
                found.push(violation(what, &[&before.op, &probe.op]));
            }
        }
        let strangers = refused
            .keys()
            .filter(|(device, _)| !self.revoked.contains_key(device));
        for key in strangers {
            let what = format!(
                "{} refused device {} as revoked, and nobody revoked it",
                key.1, key.0
            );
            found.push(violation(what, &[&refused[key].op]));
        }
        Check::of("revocation.monotone", found).fact("refused_as_revoked", refused.len())
    }

    fn streams_end(&self, setting: &Setting, bound: u64) -> Check {
        let (mut found, mut watched, mut worst) = (Vec::new(), 0u64, 0);
        for stream in &self.streams {
            let answer = self.revoked.get(stream.device).and_then(|revoked| revoked.answer);
            let Some(answer) = answer else { continue };
            let answered = answer.returned().unwrap_or(0);
            // One that begins later is a probe's affair.
            if stream.op.invoke.time > answered || stream.end.is_some_and(|end| end < answered) {
                continue;
            }
            watched += 1;
            let due = setting.due(answered, bound);
            let ended = stream.end.unwrap_or(self.end);
            if stream.end.is_some() {
                worst = worst.max(ended.saturating_sub(answered));
            }
            if ended > due {
                let how = if stream.end.is_some() {
                    "ended"
                } else {
                    "was still open"
                };
                let what = format!(
                    "a session of device {} at {} {how} {} after its revocation was answered",
                    stream.device,
                    stream.op.invoke.node.as_deref().unwrap_or("?"),
                    seconds(ended.saturating_sub(answered))
                );
                found.push(violation(what, &[&answer, &stream.op]));
            }
        }
        Check::of("revocation.streams-end", found)
            .fact("open_when_revoked", watched)
            .fact("worst_ms", worst / MS)
    }

    fn open(&self, setting: &Setting, open_ms: u64) -> Check {
        let name = "revocation.open";
        let calm = Setting {
            recover_ms: open_ms,
            ..setting.clone()
        };
        let healed = calm.disturbed().last().map_or(0, |(_, end)| *end);
        let mut found: Vec<Violation> = Vec::new();
        let nodes: BTreeSet<&str> = self.probes.iter().map(|probe| probe.node).collect();
        let mut accepted: BTreeMap<&str, u64> = nodes.iter().map(|node| (*node, 0)).collect();
        let mut silent: BTreeMap<&str, Vec<&Probe<'_>>> = BTreeMap::new();
        for probe in &self.probes {
            let (from, to) = (
                probe.op.invoke.time,
                probe.op.returned().unwrap_or(probe.op.invoke.time),
            );
            let revoked = self
                .revoked
                .get(probe.device)
                .is_some_and(|revoked| revoked.asked <= to);
            if revoked || probe.op.invoke.f != "probe" || !calm.is_calm(from, to) {
                continue;
            }
            match probe.accepted {
                Some(true) => {
                    *accepted.entry(probe.node).or_default() += u64::from(from >= healed);
                    silent.remove(probe.node);
                }
                Some(false) => {
                    let what = format!(
                        "{} refused device {}, which is not revoked, while nothing was wrong: {}",
                        probe.node,
                        probe.device,
                        field(&probe.op, "reason").as_str().unwrap_or("no reason")
                    );
                    found.push(violation(what, &[&probe.op]));
                }
                None => silent.entry(probe.node).or_default().push(probe),
            }
        }
        // Silence counts when nothing but silence followed.
        for (node, probes) in &silent {
            if probes.len() >= 3 && accepted.get(node).copied().unwrap_or(0) > 0 {
                let what = format!("{node} answers nobody any more, and nothing is wrong with it");
                let last: Vec<&Op<'_>> = probes.iter().map(|probe| &probe.op).collect();
                found.push(violation(what, &last[last.len() - 3..]));
            }
        }
        if let Some(node) = accepted
            .iter()
            .find(|(node, count)| **count == 0 && !self.removed.contains(*node))
            .filter(|_| found.is_empty())
        {
            return Check::unknown(name, format!("{} was never asked after the last fault", node.0));
        }
        Check::of(name, found).fact("accepted", accepted.values().sum::<u64>())
    }
}

fn node<'a>(op: &Op<'a>) -> Result<&'a str, String> {
    let node = op.invoke.node.as_deref();
    node.ok_or_else(|| {
        format!(
            "event {}: {} does not say at which replica",
            op.invoke.index, op.invoke.f
        )
    })
}
