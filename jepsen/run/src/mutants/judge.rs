//! What became of a mutant, from the checks that failed while it was planted.

use std::collections::BTreeMap;
use std::time::Duration;

use super::table::{Mutant, NOTHING};

/// What became of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Its check caught it.
    Killed,
    /// Others did, its own check did not.
    ByAnother,
    /// Nobody did.
    Survived,
}

impl Fate {
    /// Stable text form.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Fate::Killed => "killed",
            Fate::ByAnother => "killed by another check",
            Fate::Survived => "SURVIVED",
        }
    }
}

/// One mutant, judged.
#[derive(Clone, Debug)]
pub struct Judged {
    /// Which.
    pub mutant: Mutant,
    /// What became of it.
    pub fate: Fate,
    /// Seeds or runs until then.
    pub tries: u64,
    /// The seed in which its check failed, or any, when it was not its own.
    pub seed: Option<u64>,
    /// Time that it took.
    pub took: Duration,
    /// How often each check failed.
    pub failed: BTreeMap<String, u64>,
    /// Where the run is kept, or the words that replay it.
    pub replay: Option<String>,
}

impl Judged {
    /// Whether its own check caught it.
    #[must_use]
    pub fn is_killed(&self) -> bool {
        self.fate == Fate::Killed
    }

    /// The check that counts: its own when that failed, else the one that failed most often.
    #[must_use]
    pub fn caught_by(&self) -> Option<&str> {
        let own = self
            .mutant
            .checks
            .iter()
            .find(|check| self.failed.contains_key(**check));
        let most = || self.failed.iter().max_by_key(|(_, count)| **count);
        own.copied().or_else(|| most().map(|(name, _)| name.as_str()))
    }
}

/// What is seen of a mutant while its seeds or runs come in.
#[derive(Debug)]
pub(super) struct Watch {
    mutant: Mutant,
    began: std::time::Instant,
    tries: u64,
    seed: Option<u64>,
    killed: bool,
    failed: BTreeMap<String, u64>,
    replay: Option<String>,
}

impl Watch {
    pub(super) fn new(mutant: Mutant) -> Watch {
        Watch {
            mutant,
            began: std::time::Instant::now(),
            tries: 0,
            seed: None,
            killed: false,
            failed: BTreeMap::new(),
            replay: None,
        }
    }

    /// So many were tried.
    pub(super) fn tried(&mut self, tries: u64) {
        self.tries = self.tries.max(tries);
    }

    /// These checks failed in one of them. True once the mutant's own is among them.
    pub(super) fn failed(&mut self, seed: u64, checks: &[&str], replay: &str) -> bool {
        for check in checks.iter().filter(|check| !check.is_empty()) {
            *self.failed.entry((*check).to_owned()).or_default() += 1;
        }
        let own = self.mutant.checks.iter().any(|own| checks.contains(own));
        if (own && !self.killed) || self.seed.is_none() {
            self.seed = Some(seed);
            self.replay = Some(replay.to_owned());
        }
        self.killed |= own;
        self.killed
    }

    /// The harness itself refused the run as one that tests nothing.
    pub(super) fn refused(&mut self) {
        if self.mutant.checks.contains(&NOTHING) {
            self.killed = true;
        }
        *self.failed.entry(NOTHING.to_owned()).or_default() += 1;
    }

    pub(super) fn end(self) -> Judged {
        let only_refused = self.failed.keys().all(|name| name == NOTHING);
        let fate = match self.killed {
            true => Fate::Killed,
            false if only_refused => Fate::Survived,
            false => Fate::ByAnother,
        };
        Judged {
            mutant: self.mutant,
            fate,
            tries: self.tries,
            seed: self.seed,
            took: self.began.elapsed(),
            failed: self.failed,
            replay: self.replay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mutants::mutants;

    fn watch(name: &str) -> Watch {
        Watch::new(mutants().find(|mutant| mutant.is(name)).unwrap())
    }

    #[test]
    fn only_its_own_check_kills_a_mutant() {
        let mut own = watch("vote-not-saved");
        let check = own.mutant.checks[0];
        assert!(!own.failed(3, &["sim.other"], "a"));
        assert!(own.failed(9, &["sim.other", check], "b"));
        own.tried(9);
        let judged = own.end();
        assert_eq!(
            (judged.fate.clone(), judged.seed, judged.tries),
            (Fate::Killed, Some(9), 9)
        );
        assert_eq!(judged.caught_by(), Some(check));
        assert_eq!(judged.replay.as_deref(), Some("b"));

        let mut another = watch("vote-not-saved");
        assert!(!another.failed(3, &["sim.other"], "a"));
        let judged = another.end();
        assert_eq!(
            (judged.fate.clone(), judged.caught_by()),
            (Fate::ByAnother, Some("sim.other"))
        );
        assert!(!judged.is_killed());

        assert_eq!(watch("vote-not-saved").end().fate, Fate::Survived);
    }

    #[test]
    fn a_run_that_tests_nothing_kills_the_blind_and_nobody_else() {
        let mut blind = watch("nothing-strikes");
        blind.refused();
        assert!(blind.end().is_killed());
        let mut other = watch("vote-not-saved");
        other.refused();
        assert_eq!(other.end().fate, Fate::Survived);
    }
}
