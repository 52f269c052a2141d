//! Scenarios: bugs with a name. What went wrong somewhere, or in us, written down as the runs that would show it again.
//!
//! A scenario is a TOML file in `jepsen/scenarios`; those are built into this program, and `jepsen scenario
//! FILE.toml` takes any other. Here is the form of the file and the words of a command line that each of its stages
//! comes to; `commands::scenario` runs them. Invariant: a key that is not known is an error that names it, so that no
//! typing mistake weakens a regression.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::cli;
use crate::nemesis;
use crate::target::Target;
use crate::workloads;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What it is called: the name of its file.
    #[serde(skip)]
    pub name: String,
    /// One line: what went wrong.
    pub title: String,
    /// Where that is told: an address, or a document of this repository.
    pub source: String,
    /// What happened, for people.
    pub story: String,
    /// What stands against it here, and what would show that it does not.
    pub ours: String,
    /// Planted bugs that do the same to us: `jepsen mutants --only M4` shows that this would be found.
    #[serde(default)]
    pub mutants: Vec<String>,
    /// Of a bug of ours: the commit that fixed it.
    #[serde(default)]
    pub fixed: Option<String>,
    /// When it was last seen to happen to us: a commit, and how.
    #[serde(default)]
    pub reproduced: Option<String>,
    /// The runs, in this order.
    #[serde(rename = "stage")]
    pub stages: Vec<Stage>,
}

/// Where a stage runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, serde::Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// In the simulation.
    Sim,
    /// On real processes.
    Run,
}

/// How a stage has to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Expect {
    /// Every check holds.
    #[default]
    Valid,
    /// A check is violated: of a binary that is known to have the bug.
    Violated,
}

/// One run. What is absent is left to the command's own default.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    /// Where.
    pub level: Level,
    /// How it has to end.
    #[serde(default)]
    pub expect: Expect,
    /// With `expect = "violated"`: the check that has to find it.
    #[serde(default)]
    pub check: Option<String>,
    /// What clients do.
    #[serde(default)]
    pub workload: Option<String>,
    /// Simulation: seeds, `1..200`, both ends included.
    #[serde(default)]
    pub seeds: Option<String>,
    /// Real processes: the seed of generators and plan.
    #[serde(default)]
    pub seed: Option<u64>,
    /// Real processes: what harms them.
    #[serde(default)]
    pub nemesis: Vec<String>,
    /// Real processes: whom.
    #[serde(default)]
    pub target: Option<String>,
    /// Real processes: for how long.
    #[serde(default)]
    pub time: Option<String>,
    /// Real processes: from one fault to the next.
    #[serde(default)]
    pub interval: Option<String>,
    /// Real processes: how many replicas.
    #[serde(default)]
    pub replicas: Option<u64>,
    /// Real processes: operations a second.
    #[serde(default)]
    pub rate: Option<u64>,
    /// Real processes: clients, `6` or `2n`.
    #[serde(default)]
    pub concurrency: Option<String>,
    /// Real processes: the network.
    #[serde(default)]
    pub fabric: Option<String>,
    /// Real processes: where data is.
    #[serde(default)]
    pub disk: Option<String>,
    /// Real processes: each replica's clock since boot starts at another time.
    #[serde(default)]
    pub boot_offsets: bool,
}

macro_rules! built_in {
    ($($name:literal),* $(,)?) => {
        const BUILT_IN: &[(&str, &str)] = &[$(($name, include_str!(concat!("../../scenarios/", $name, ".toml")))),*];
    };
}

built_in![
    "consul-stale-reads",
    "etcd-13766",
    "etcd-14140",
    "etcd-14370",
    "etcd-14685",
    "etcd-15247",
    "etcd-15271",
    "etcd-17529",
    "etcd-20418",
    "etcd-9395",
    "etcd-locks-2020",
    "nats-bitflip",
    "nats-fsync",
    "nomad-1269",
    "openraft-1747",
    "openraft-1795",
    "openraft-1802",
    "openraft-leader-restore",
    "palyra-answers-held-back",
    "palyra-folder-not-synced",
    "palyra-frozen-time",
    "palyra-hole-behind-snapshot",
    "palyra-lease-cut-by-clock",
    "palyra-removed-too-soon",
    "palyra-requests-after-the-end",
    "palyra-second-answer",
    "palyra-snapshot-without-copy",
    "palyra-spin-on-dead-raft",
    "palyra-stale-after-write",
    "palyra-young-id",
    "palyra-young-quorum",
    "redis-raft-mix",
    "rqlite-2759",
    "tendermint-truncate",
    "tigerbeetle-upgrade",
    "yugabyte-32875",
];

/// All that are built in, by name.
///
/// # Errors
/// When one of them is wrong, which a test holds against.
pub fn all() -> Result<Vec<Scenario>> {
    BUILT_IN.iter().map(|(name, text)| read(name, text)).collect()
}

/// The one that somebody means: a name, or a file that ends in `.toml`.
///
/// # Errors
/// When there is none, with those whose names are near; or when the file is wrong.
pub fn find(wanted: &str) -> Result<Scenario> {
    if Path::new(wanted)
        .extension()
        .is_some_and(|ending| ending == "toml")
    {
        let text = std::fs::read_to_string(wanted).with_context(|| format!("cannot read {wanted}"))?;
        let name = Path::new(wanted)
            .file_stem()
            .and_then(|stem| stem.to_str())
            .unwrap_or(wanted);
        return read(name, &text);
    }
    if let Some((name, text)) = BUILT_IN.iter().find(|(name, _)| *name == wanted) {
        return read(name, text);
    }
    let near: Vec<&str> = BUILT_IN
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| is_near(name, wanted))
        .collect();
    let hint = if near.is_empty() {
        String::new()
    } else {
        format!(" (near: {})", near.join(", "))
    };
    bail!("{wanted:?} is no scenario{hint}; see jepsen list scenarios")
}

fn is_near(name: &str, wanted: &str) -> bool {
    name.split('-')
        .any(|word| word.len() > 2 && wanted.split('-').any(|other| other == word))
}

/// Reads a file.
///
/// # Errors
/// What is wrong, with the name of the scenario, the stage and the key.
pub fn read(name: &str, text: &str) -> Result<Scenario> {
    let mut scenario: Scenario = toml::from_str(text).with_context(|| format!("scenario {name}"))?;
    name.clone_into(&mut scenario.name);
    for said in [&mut scenario.story, &mut scenario.ours] {
        *said = said.trim().to_owned();
    }
    for (key, said) in [
        ("title", &scenario.title),
        ("source", &scenario.source),
        ("story", &scenario.story),
    ] {
        ensure!(!said.is_empty(), "scenario {name}: {key} is empty");
    }
    ensure!(
        !scenario.stages.is_empty(),
        "scenario {name}: it has no [[stage]]"
    );
    for (at, stage) in scenario.stages.iter().enumerate() {
        stage
            .check()
            .with_context(|| format!("scenario {name}, stage {}", at + 1))?;
    }
    Ok(scenario)
}

impl Stage {
    /// Whether it makes sense.
    fn check(&self) -> Result<()> {
        ensure!(
            self.check.is_some() == (self.expect == Expect::Violated),
            "check names what has to be violated: it comes with expect = \"violated\", and only with that"
        );
        match self.level {
            Level::Sim => self.check_sim(),
            Level::Run => self.check_run(),
        }
    }

    fn check_sim(&self) -> Result<()> {
        let seeds = self
            .seeds
            .as_deref()
            .context("a stage of the simulation needs seeds = \"1..200\"")?;
        let ends = seeds.split_once("..");
        let ends = ends.and_then(|(from, to)| Some((from.parse::<u64>().ok()?, to.parse::<u64>().ok()?)));
        ensure!(
            ends.is_some_and(|(from, to)| from <= to),
            "seeds = {seeds:?}: from..to, both ends included"
        );
        let only = self.run_only();
        ensure!(only.is_empty(), "{} is for level = \"run\"", only.join(", "));
        Ok(())
    }

    /// Keys that were given and mean nothing in the simulation.
    fn run_only(&self) -> Vec<&'static str> {
        let given = [
            ("seed", self.seed.is_some()),
            ("nemesis", !self.nemesis.is_empty()),
            ("target", self.target.is_some()),
            ("time", self.time.is_some()),
            ("interval", self.interval.is_some()),
            ("replicas", self.replicas.is_some()),
            ("rate", self.rate.is_some()),
            ("concurrency", self.concurrency.is_some()),
            ("fabric", self.fabric.is_some()),
            ("disk", self.disk.is_some()),
            ("boot_offsets", self.boot_offsets),
        ];
        given
            .iter()
            .filter(|(_, given)| *given)
            .map(|(key, _)| *key)
            .collect()
    }

    fn check_run(&self) -> Result<()> {
        ensure!(
            self.seeds.is_none(),
            "seeds is for level = \"sim\"; a run has one seed"
        );
        ensure!(self.workload.is_some(), "a run needs a workload");
        for (key, time) in [("time", &self.time), ("interval", &self.interval)] {
            if let Some(time) = time {
                cli::duration(time).map_err(|why| anyhow::anyhow!("{key}: {why}"))?;
            }
        }
        if let Some(target) = &self.target {
            target.parse::<Target>().map_err(anyhow::Error::msg)?;
        }
        Ok(())
    }

    /// Whether its workload and its nemeses are ones of this program.
    ///
    /// # Errors
    /// Which is not.
    pub fn check_names(&self) -> Result<()> {
        if let Some(workload) = self.workload.as_deref().filter(|_| self.level == Level::Run) {
            workloads::find(workload)?;
        }
        let usual = |name: &String| match (name.as_str(), &self.workload) {
            ("usual", Some(workload)) => nemesis::usual(workload),
            (name, _) => name.to_owned(),
        };
        let names: Vec<String> = self.nemesis.iter().map(usual).collect();
        nemesis::parse(&names, |_| true).map(|_| ())
    }

    /// What `jepsen run`, or `jepsen-sim`, is told for it.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut words = Vec::new();
        let mut option = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                words.extend([format!("--{name}"), value]);
            }
        };
        let number = |number: Option<u64>| number.map(|number| number.to_string());
        option("workload", self.workload.clone());
        option("seeds", self.seeds.clone());
        option("seed", number(self.seed));
        option(
            "nemesis",
            (!self.nemesis.is_empty()).then(|| self.nemesis.join(",")),
        );
        option("target", self.target.clone());
        option("time", self.time.clone());
        option("nemesis-interval", self.interval.clone());
        option("replicas", number(self.replicas));
        option("rate", number(self.rate));
        option("concurrency", self.concurrency.clone());
        option("fabric", self.fabric.clone());
        option("disk", self.disk.clone());
        if self.boot_offsets {
            words.push("--boot-offsets".to_owned());
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "title = \"t\"\nsource = \"s\"\nstory = \"x\"\nours = \"y\"\n";

    fn stage(keys: &str) -> Result<Scenario> {
        read("it", &format!("{GOOD}[[stage]]\n{keys}"))
    }

    #[test]
    fn every_scenario_is_sound_and_every_file_is_built_in() {
        let scenarios = all().unwrap();
        assert!(scenarios.len() >= 20);
        let folder = Path::new(".").join("../scenarios");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter_map(|name| name.strip_suffix(".toml").map(str::to_owned))
            .collect();
        files.sort();
        let names: Vec<String> = scenarios.iter().map(|scenario| scenario.name.clone()).collect();
        assert_eq!(names, files);
        for scenario in scenarios {
            let own = scenario.name.starts_with("palyra-");
            assert!(
                !own || scenario.fixed.is_some(),
                "{}: which commit fixed it?",
                scenario.name
            );
            let numbered = |id: &String| id.strip_prefix('M').is_some_and(|n| n.parse::<u32>().is_ok());
            assert!(scenario.mutants.iter().all(numbered), "{}", scenario.name);
            for stage in &scenario.stages {
                stage.check_names().unwrap();
            }
        }
    }

    #[test]
    fn documents_of_this_repository_that_are_sources_exist() {
        let root = Path::new(".").join("../..");
        for scenario in all().unwrap() {
            let there = scenario.source.contains("://") || root.join(&scenario.source).is_file();
            assert!(there, "{}: {} is not there", scenario.name, scenario.source);
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cases = [
            ("level = \"run\"", "a run needs a workload"),
            (
                "level = \"run\"\nworkload = \"registry\"\nnemeses = [\"kill\"]",
                "nemeses",
            ),
            (
                "level = \"run\"\nworkload = \"registry\"\ntime = \"soon\"",
                "time: \"soon\"",
            ),
            ("level = \"run\"\nworkload = \"registry\"\ntarget = \"r0\"", "r0"),
            (
                "level = \"run\"\nworkload = \"registry\"\nseeds = \"1..2\"",
                "seeds is for level = \"sim\"",
            ),
            (
                "level = \"run\"\nworkload = \"registry\"\ncheck = \"x\"",
                "expect = \"violated\"",
            ),
            ("level = \"sim\"", "needs seeds"),
            ("level = \"sim\"\nseeds = \"9..3\"", "both ends included"),
            (
                "level = \"sim\"\nseeds = \"1..3\"\ndisk = \"dir\"",
                "disk is for level = \"run\"",
            ),
            ("level = \"moon\"", "moon"),
        ];
        for (keys, why) in cases {
            let error = format!("{:#}", stage(keys).unwrap_err());
            assert!(
                error.contains(why) && error.contains("scenario it"),
                "{keys}: {error}"
            );
        }
        let error = format!("{:#}", read("it", GOOD).unwrap_err());
        assert!(error.contains("stage"), "{error}");
        assert!(read("it", "titel = \"t\"").is_err());
    }

    #[test]
    fn names_that_this_program_does_not_have_are_told() {
        for (keys, why) in [
            ("workload = \"bank\"", "bank"),
            (
                "workload = \"registry\"\nnemesis = [\"kil\"]",
                "\"kil\" is no nemesis",
            ),
        ] {
            let scenario = stage(&format!("level = \"run\"\n{keys}")).unwrap();
            let error = scenario.stages[0].check_names().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_stage_comes_to_the_words_of_a_command() {
        let keys = "level = \"run\"\nworkload = \"registry\"\nnemesis = [\"kill\", \"pause\"]\ntime = \"45s\"\n\
                    replicas = 5\ninterval = \"2s\"\nboot_offsets = true";
        let words = stage(keys).unwrap().stages[0].arguments().join(" ");
        let expected = "--workload registry --nemesis kill,pause --time 45s --nemesis-interval 2s --replicas 5 \
                        --boot-offsets";
        assert_eq!(words, expected);
        let words = stage("level = \"sim\"\nseeds = \"1..9\"").unwrap().stages[0].arguments();
        assert_eq!(words, ["--seeds", "1..9"]);
    }

    #[test]
    fn names_that_are_near_are_told() {
        let error = find("etcd-1524").unwrap_err().to_string();
        assert!(
            error.contains("etcd-15247") && error.contains("jepsen list scenarios"),
            "{error}"
        );
        assert!(
            find("/nowhere/x.toml")
                .unwrap_err()
                .to_string()
                .contains("/nowhere/x.toml")
        );
    }
}
