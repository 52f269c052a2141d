//! The mutants: which bug, against which workload and nemesis, and which check must see it.
//!
//! `M1` to `M24` are those of the design; `P` are more of our own; `B` are runs in which nothing strikes. Each bug
//! stands in the product under its name, `palyra_fault::planted("name")`, and a test compares the two. In the
//! simulation workload and nemesis say what the bug needs; a seed draws them among all others.

/// Where a mutant is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// In the simulation, for so many seeds.
    Sim,
    /// On real processes, for so many runs.
    Real,
}

impl Level {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Sim => "sim",
            Level::Real => "real",
        }
    }
}

/// One mutant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mutant {
    /// `M1`.
    pub id: &'static str,
    /// The name of the bug at its place in the product.
    pub name: &'static str,
    /// What is wrong with it, in words.
    pub breaks: &'static str,
    /// What clients do.
    pub workload: &'static str,
    /// What strikes.
    pub nemesis: &'static str,
    /// Further words for `jepsen run`.
    pub options: &'static [&'static str],
    /// The checks of which one must fail.
    pub checks: &'static [&'static str],
    /// Where it is run.
    pub level: Level,
}

impl Mutant {
    /// Whether a word names it: its id or its name.
    #[must_use]
    pub fn is(&self, word: &str) -> bool {
        self.id.eq_ignore_ascii_case(word) || self.name == word
    }
}

/// In the place of a check: the run was refused as one that tests nothing.
pub(super) const NOTHING: &str = "exit 2";
/// No bug: no fault of a simulated run ever strikes.
pub(super) const BLIND_SIM: &str = "nothing-strikes";
/// No bug: the nemesis of a real run does nothing.
pub(super) const BLIND_REAL: &str = "nemesis-does-nothing";

const fn sim(
    (id, name): (&'static str, &'static str),
    breaks: &'static str,
    (workload, nemesis): (&'static str, &'static str),
    checks: &'static [&'static str],
) -> Mutant {
    Mutant {
        id,
        name,
        breaks,
        workload,
        nemesis,
        options: &[],
        checks,
        level: Level::Sim,
    }
}

const fn real(
    named: (&'static str, &'static str),
    breaks: &'static str,
    against: (&'static str, &'static str),
    checks: &'static [&'static str],
) -> Mutant {
    Mutant {
        level: Level::Real,
        ..sim(named, breaks, against, checks)
    }
}

/// All of them.
pub fn mutants() -> impl Iterator<Item = Mutant> {
    DESIGNED.iter().chain(OWN).chain(BLIND).copied()
}

const BLIND: &[Mutant] = &[
    sim(
        ("B1", BLIND_SIM),
        "No fault ever strikes in the simulation",
        ("mix", "none"),
        &[NOTHING],
    ),
    real(
        ("B2", BLIND_REAL),
        "The nemesis does nothing",
        ("registry", "noop"),
        &[NOTHING],
    ),
];

const DESIGNED: &[Mutant] = &[
    sim(
        ("M1", "flush-before-sync"),
        "Entries are told to be durable before they are synced",
        ("registry", "power"),
        &["raft.quorum", "journal.acknowledged"],
    ),
    sim(
        ("M2", "vote-not-saved"),
        "A vote is never written",
        ("registry", "kill"),
        &["raft.durable", "replica.same-state"],
    ),
    sim(
        ("M3", "leader-restored"),
        "A restarted leader goes on in its term, without an election",
        ("journal", "power:all"),
        &["raft.leader", "replica.same-state"],
    ),
    sim(
        ("M4", "local-reads"),
        "Whoever believes that it leads answers reads alone",
        ("registry", "partition:peers-only"),
        &["registry.linearizable", "registry.real-time"],
    ),
    sim(
        ("M5", "lease-read"),
        "A leader trusts a lease for reads that outlasts its followers' patience",
        ("registry", "pause,transfer"),
        &["registry.linearizable", "registry.real-time"],
    ),
    sim(
        ("M6", "fence-ignored"),
        "Whoever held a run once may still speak for it",
        ("lease", "pause"),
        &["lease.fenced-control", "lease.one-result"],
    ),
    sim(
        ("M7", "fence-forgets"),
        "Fences are counted from what is held now, and so are given again",
        ("lease", "kill:leader"),
        &["lease.tokens-rise"],
    ),
    sim(
        ("M8", "sweeper-decides"),
        "A sweeper ends leases that are not due yet, renewed meanwhile or not",
        ("lease", "disk:stall:leader"),
        &["lease.not-early"],
    ),
    sim(
        ("M9", "apply-in-two-writes"),
        "What entries did and that they did it are two writes",
        ("journal", "kill"),
        &["replica.same-state"],
    ),
    sim(
        ("M10", "apply-by-own-clock"),
        "Each replica applies entries by its own clock",
        ("journal", "clock:skew"),
        &["replica.same-state"],
    ),
    sim(
        ("M11", "code-checked-before-log"),
        "That a code is open is looked at before the entry and not in it",
        ("pairing", "none"),
        &["pairing.one-winner"],
    ),
    sim(
        ("M12", "stale-serves-on"),
        "What a replica knew once is good for ever",
        ("revocation", "partition:peers-only"),
        &["revocation.enforced", "revocation.bounded"],
    ),
    sim(
        ("M13", "snapshot-without-revocations"),
        "Who is revoked is left out of the snapshot",
        ("revocation", "isolate-until-snapshot"),
        &["replica.same-state"],
    ),
    sim(
        ("M14", "resume-off-by-one"),
        "A follower of the journal goes on too late after it moved",
        ("watch", "reset"),
        &["watch.gapless", "watch.bookmarks"],
    ),
    sim(
        ("M15", "snapshot-without-journal"),
        "Events that a snapshot stands for are passed over in silence",
        ("watch", "isolate-until-snapshot"),
        &["watch.gapless", "watch.committed"],
    ),
    sim(
        ("M16", "events-before-commit"),
        "What is in the log is told as if it had happened",
        ("watch", "partition:leader"),
        &["watch.committed", "watch.gapless"],
    ),
    sim(
        ("M17", "ok-before-commit"),
        "A submission is answered before it is committed",
        ("dispatch", "kill:leader"),
        &["dispatch.one-job-per-key", "dispatch.all-end"],
    ),
    sim(
        ("M18", "given-again"),
        "What a node was given is given again when it comes back",
        ("dispatch", "reset"),
        &["dispatch.delivered-once"],
    ),
    sim(
        ("M19", "ack-before-write"),
        "Entries are acknowledged before they are on their way to the disk",
        ("registry", "power:minority,kill"),
        &["raft.quorum", "journal.acknowledged"],
    ),
    sim(
        ("M20", "head-without-batch"),
        "The journal's head is what the disk has, without the entries of the same batch",
        ("journal", "partition:leader"),
        &["journal.chain", "replica.same-state"],
    ),
    sim(
        ("M21", "install-in-two-writes"),
        "A snapshot replaces the log first and the state later",
        ("journal", "failpoint:snapshot.flip=crash"),
        &["raft.durable", "replica.starts"],
    ),
    sim(
        ("M22", "wiped-comes-back"),
        "A replica that lost its disk comes back under its id",
        ("membership", "member"),
        &["membership.ids-are-new"],
    ),
    sim(
        ("M23", "checksums-unread"),
        "What the disk returns is believed",
        ("journal", "bitflip"),
        &["replica.lives", "replica.same-state", "journal.chain"],
    ),
    sim(
        ("M24", "expiry-unwatched"),
        "A stream that is open outlives its certificate",
        ("revocation", "cert-expire"),
        &["revocation.expired-refused"],
    ),
];

const OWN: &[Mutant] = &[
    sim(
        ("P1", "epoch-ignored"),
        "A result counts from a session that is over",
        ("dispatch", "reset"),
        &["dispatch.results-kept"],
    ),
    sim(
        ("P2", "retry-applied-again"),
        "A retry under the same request id is another request",
        ("registry", "kill"),
        &["journal.acknowledged"],
    ),
    sim(
        ("P3", "unknown-told-as-refused"),
        "A lost answer is taken for a refusal",
        ("registry", "kill:leader"),
        &["journal.acknowledged"],
    ),
    sim(
        ("P4", "approval-used-twice"),
        "An approval may be used again",
        ("pairing", "none"),
        &["pairing.same-answer", "pairing.one-certificate"],
    ),
    sim(
        ("P5", "revoked-let-in"),
        "Whoever is revoked is let in",
        ("revocation", "none"),
        &["revocation.enforced"],
    ),
    sim(
        ("P6", "once-tried-again"),
        "Work that must not run twice is tried again",
        ("dispatch", "reset"),
        &["dispatch.effects"],
    ),
    sim(
        ("P7", "epoch-by-node"),
        "Epochs of sessions are counted by node instead of by the log",
        ("dispatch", "none"),
        &["dispatch.epochs-rise"],
    ),
    sim(
        ("P8", "leader-always-fresh"),
        "A leader takes its own word for that of a quorum",
        ("revocation", "partition:peers-only"),
        &["replica.freshness"],
    ),
    sim(
        ("P9", "fresh-by-arrival"),
        "The leader's word counts from when it arrived, not from when it was said",
        ("revocation", "delay"),
        &["replica.freshness"],
    ),
    sim(
        ("P10", "fresh-before-applied"),
        "A replica calls itself fresh before it has applied what makes it so",
        ("revocation", "disk:stall"),
        &["replica.freshness"],
    ),
    sim(
        ("P11", "truncation-not-saved"),
        "Entries that a new leader overruled stay on the disk",
        ("journal", "partition:leader,kill"),
        &["raft.log", "raft.committed"],
    ),
    sim(
        ("P14", "deadline-by-sweeper"),
        "A sweeper ends dispatches that are not late yet",
        ("dispatch", "clock:skew"),
        &["dispatch.not-early"],
    ),
    sim(
        ("P15", "cancelled-delivered"),
        "A dispatch that was taken back is delivered",
        ("dispatch", "none"),
        &["dispatch.cancelled-stays", "journal.acknowledged"],
    ),
    sim(
        ("P16", "unclean-given-work"),
        "A worker that never said that it is clean is given work",
        ("lease", "machine-kill"),
        &["lease.clean-first"],
    ),
    sim(
        ("P17", "crl-forgets"),
        "The list of revoked certificates stays empty",
        ("revocation", "none"),
        &["replica.invariants"],
    ),
    sim(
        ("P18", "renewal-before-commit"),
        "A worker is told that its lease is longer before anybody has written it down",
        ("lease", "partition:leader"),
        &["lease.not-early", "lease.exclusive"],
    ),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// Names of bugs in the sources of the product.
    fn places(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                places(&path, found);
                continue;
            }
            if path.extension().is_none_or(|end| end != "rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let names = text.split("palyra_fault::planted(\"").skip(1);
            found.extend(names.map(|rest| rest[..rest.find('"').unwrap()].to_owned()));
        }
    }

    #[test]
    fn each_bug_in_the_product_is_in_the_table_and_each_in_the_table_has_its_place() {
        let mut found = BTreeSet::new();
        places(&Path::new(".").join("../../crates"), &mut found);
        let blind = [BLIND_SIM, BLIND_REAL];
        let listed: BTreeSet<String> = mutants()
            .map(|mutant| mutant.name.to_owned())
            .filter(|name| !blind.contains(&name.as_str()))
            .collect();
        let unlisted: Vec<&String> = found.difference(&listed).collect();
        let nowhere: Vec<&String> = listed.difference(&found).collect();
        assert!(unlisted.is_empty(), "planted, and not in the table: {unlisted:?}");
        assert!(
            nowhere.is_empty(),
            "in the table, and planted nowhere: {nowhere:?}"
        );
    }

    #[test]
    fn the_table_is_sound() {
        let (mut ids, mut names) = (BTreeSet::new(), BTreeSet::new());
        for mutant in mutants() {
            assert!(
                ids.insert(mutant.id) && names.insert(mutant.name),
                "{} is there twice",
                mutant.id
            );
            assert!(mutant.is(mutant.name) && mutant.is(&mutant.id.to_lowercase()));
            assert!(!mutant.checks.is_empty(), "{} has no check", mutant.id);
            let is_check = |name: &&str| *name == NOTHING || name.split('.').count() == 2;
            assert!(
                mutant.checks.iter().all(is_check),
                "{}: {:?}",
                mutant.id,
                mutant.checks
            );
            let kebab = |c: char| c.is_ascii_lowercase() || c == '-';
            assert!(mutant.name.chars().all(kebab), "{}", mutant.name);
        }
        for number in 1..=24 {
            assert!(
                ids.contains(format!("M{number}").as_str()),
                "M{number} is missing"
            );
        }
    }
}
