//! What one run is: its seed, and what a replay of it or a search for a smaller one leaves out.

use std::collections::BTreeSet;
use std::time::Duration;

use clap::ValueEnum as _;

use crate::breaks::Break;
use crate::faults::Kind;
use crate::load::Workload;
use crate::planted;

/// One run. Equal cases are equal runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Case {
    /// Decides everything that the rest leaves open.
    pub(crate) seed: u64,
    /// What clients do.
    pub(crate) workload: Workload,
    /// Only these kinds of faults, of those that the seed uses.
    pub(crate) only: Option<BTreeSet<Kind>>,
    /// Virtual time for which faults strike and clients ask; the seed's choice when there is none.
    pub(crate) horizon: Option<Duration>,
    /// What is broken on purpose.
    pub(crate) broken: Option<Break>,
}

impl Case {
    /// Whether this kind may strike.
    pub(crate) fn allows(&self, kind: Kind) -> bool {
        self.broken != Some(Break::NoFaults) && self.only.as_ref().is_none_or(|only| only.contains(&kind))
    }

    /// The options besides the seed that replay it.
    pub(crate) fn options(&self) -> Vec<String> {
        let mut options = Vec::new();
        if self.workload != Workload::Mix {
            options.extend(["--workload".to_owned(), self.workload.name()]);
        }
        if let Some(only) = &self.only {
            let names: Vec<String> = only.iter().map(|kind| kind.name()).collect();
            let names = if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(",")
            };
            options.extend(["--only".to_owned(), names]);
        }
        if let Some(horizon) = self.horizon {
            options.extend(["--horizon".to_owned(), format!("{}ms", horizon.as_millis())]);
        }
        if let Some(name) = self.broken.and_then(|broken| broken.to_possible_value()) {
            options.extend(["--break".to_owned(), name.get_name().to_owned()]);
        }
        if let Some(name) = planted::name() {
            options.extend(["--planted".to_owned(), name]);
        }
        options
    }

    /// The command line that replays it and shows every event.
    pub(crate) fn replay(&self) -> String {
        let words = [
            "jepsen-sim".to_owned(),
            "--seed".to_owned(),
            self.seed.to_string(),
        ];
        let rest = self.options().into_iter().chain(["--trace".to_owned()]);
        words.into_iter().chain(rest).collect::<Vec<_>>().join(" ")
    }
}

/// A time as people write it: `15s`, `800ms`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let parsed = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => number.parse().map(Duration::from_millis),
        (None, Some(number)) => number.parse().map(Duration::from_secs),
        (None, None) => return Err("write a time with its unit, 15s or 800ms".to_owned()),
    };
    match parsed {
        Ok(time) if time <= Duration::from_secs(600) => Ok(time),
        Ok(_) => Err("ten minutes at most".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Names of faults, separated by commas; `none` for no fault at all.
pub(crate) fn kinds(text: &str) -> Result<BTreeSet<Kind>, String> {
    if text == "none" {
        return Ok(BTreeSet::new());
    }
    let parsed = text.split(',').map(|name| Kind::from_str(name.trim(), false));
    parsed.collect::<Result<_, _>>().map_err(|_| {
        let known: Vec<String> = Kind::value_variants().iter().map(|kind| kind.name()).collect();
        format!("a fault is one of {}, or none", known.join(", "))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_replayed_by_the_line_that_it_prints() {
        let case = Case {
            seed: 7,
            workload: Workload::Lease,
            only: Some(kinds("kill, power-all").unwrap()),
            horizon: Some(duration("1500ms").unwrap()),
            broken: Some(Break::LoseVote),
        };
        assert_eq!(
            case.replay(),
            "jepsen-sim --seed 7 --workload lease --only kill,power-all --horizon 1500ms --break lose-vote --trace"
        );
        assert!(case.allows(Kind::Kill) && !case.allows(Kind::Power));
        assert_eq!(kinds("none"), Ok(BTreeSet::new()));
        assert!(kinds("kil").unwrap_err().contains("kill, "));
        assert_eq!(duration("15s"), Ok(Duration::from_secs(15)));
        for wrong in ["15", "x", "-1s", "700s"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
