//! Names of what was violated, so that `jepsen mutants` can tell whether the right check noticed.
//!
//! A problem that comes from a shared checker begins with the name of its check, `workload.condition`. What the
//! simulation finds by itself is known by words of its sentence.

/// Words of a sentence, and the check that says it. The first that fits counts.
const OWN: &[(&str, &str)] = &[
    ("does not replay", "sim.replays"),
    ("it hung", "sim.ends"),
    ("its process died", "sim.ends"),
    ("the simulation itself", "sim.ends"),
    ("panic: ", "replica.panics"),
    ("the journal is broken", "journal.chain"),
    ("has another state", "replica.same-state"),
    ("went back from term", "replica.progress"),
    ("says that a quorum stood behind", "replica.freshness"),
    ("invariant ", "replica.invariants"),
    ("does not open its disk", "replica.starts"),
    ("does not start", "replica.starts"),
    ("ended itself", "replica.lives"),
    ("healed, but", "cluster.heals"),
    ("did not end", "cluster.heals"),
    ("never committed", "cluster.heals"),
    ("but the journal has it at", "journal.acknowledged"),
    ("was seen before it began", "registry.real-time"),
    ("a read at index", "registry.values"),
    ("the result of", "dispatch.results-kept"),
    ("was told of epoch", "dispatch.epochs-rise"),
    ("after its revocation was answered", "revocation.enforced"),
    ("after the revocation was answered", "revocation.enforced"),
    ("was revoked at", "revocation.enforced"),
];

/// The check that a problem violates; `sim.other` when nobody has given it a name.
pub(crate) fn check_of(problem: &str) -> &str {
    let first = problem.split([' ', ':']).next().unwrap_or("");
    let is_word = |word: &str| {
        !word.is_empty()
            && word
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    // Without a colon behind it what looks like a name is part of a sentence.
    let own = OWN.iter().find(|(words, _)| problem.contains(words));
    match (first.split_once('.'), own) {
        (_, Some((_, check))) if !problem[first.len()..].starts_with(':') => check,
        (Some((workload, condition)), _) if is_word(workload) && is_word(condition) => first,
        (_, Some((_, check))) => check,
        _ => "sim.other",
    }
}

/// The checks that these problems violate, each once, in their order.
pub(crate) fn checks(problems: &[String]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in problems.iter().map(|problem| check_of(problem)) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_are_known_by_their_check() {
        for (problem, check) in [
            (
                "lease.tokens-rise: fence 4 after 7 on run 01",
                "lease.tokens-rise",
            ),
            (
                "registry.linearizable: panic: of a reader",
                "registry.linearizable",
            ),
            ("raft.log: r1 has another payload at 3", "raft.log"),
            ("it does not replay: ok, then FAIL", "sim.replays"),
            ("it hung: some loop awaits nothing", "sim.ends"),
            (
                "r2 has another state at index 9 than r1 had",
                "replica.same-state",
            ),
            (
                "r1 recovered a state that is unsound: invariant fences rise: 3",
                "replica.invariants",
            ),
            ("r3 ended itself: Raft has stopped", "replica.lives"),
            ("something new", "sim.other"),
        ] {
            assert_eq!(check_of(problem), check, "{problem}");
        }
        let problems = ["a read at index 3", "a read at index 4", "panic: x"].map(str::to_owned);
        assert_eq!(checks(&problems), "registry.values,replica.panics");
    }
}
