//! `jepsen scenario`: runs the stages of a scenario, each as a command of its own, and compares how they ended.
//!
//! A stage runs in a process of its own because a run takes its process's namespaces with it. Exit codes add up: the
//! first of a broken harness, a violated property, and too little tested is that of the scenario.

use std::collections::BTreeMap;
use std::io::BufRead as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cli::{BROKEN, Form, ScenarioArgs, Usage};
use crate::judge::Results;
use crate::scenario::{self, Expect, Level, Scenario, Stage};

/// How a stage ended.
#[derive(Clone)]
struct Ended {
    code: u8,
    /// One line for people.
    line: String,
    /// The object that the command printed; null when it printed none.
    object: Value,
}

/// What stages came to in this call, by their command: what two scenarios ask alike is run once.
type Known = BTreeMap<String, Ended>;

/// Runs them.
///
/// # Errors
/// [`Usage`] when there is no such scenario; otherwise the harness failed.
pub fn main(args: &ScenarioArgs) -> Result<u8> {
    let scenarios = chosen(args)?;
    if args.show {
        scenarios.iter().for_each(|scenario| show(scenario, args.output));
        return Ok(0);
    }
    let (mut known, mut codes) = (Known::new(), Vec::new());
    for scenario in &scenarios {
        codes.push(one(scenario, args, &mut known)?);
    }
    if scenarios.len() > 1 && args.output == Form::Text {
        let good = codes.iter().filter(|code| **code == 0).count();
        println!("{good} of {} scenarios as expected", codes.len());
    }
    Ok(worst(&codes))
}

/// The scenarios that are meant, each with a stage to run.
fn chosen(args: &ScenarioArgs) -> Result<Vec<Scenario>> {
    let every = args.names.iter().any(|name| name == "all");
    let scenarios = if every {
        scenario::all()?
    } else {
        let found = args.names.iter().map(|name| scenario::find(name));
        found
            .collect::<Result<_>>()
            .map_err(|error| Usage(format!("{error:#}")))?
    };
    let mut with_stages = Vec::new();
    for scenario in scenarios {
        for stage in &scenario.stages {
            let known = stage.check_names();
            known.map_err(|error| Usage(format!("scenario {}: {error:#}", scenario.name)))?;
        }
        if stages(&scenario, args).next().is_some() {
            with_stages.push(scenario);
        } else if !every {
            let why = format!(
                "{} has no stage of that level; see jepsen scenario {0} --show",
                scenario.name
            );
            return Err(Usage(why).into());
        }
    }
    Ok(with_stages)
}

fn stages<'a>(scenario: &'a Scenario, args: &ScenarioArgs) -> impl Iterator<Item = &'a Stage> {
    let level = args.level;
    scenario
        .stages
        .iter()
        .filter(move |stage| level.is_none_or(|level| level == stage.level))
}

fn one(scenario: &Scenario, args: &ScenarioArgs, known: &mut Known) -> Result<u8> {
    if args.output == Form::Text {
        println!("{}: {}\n{}\n", scenario.name, scenario.title, scenario.source);
    }
    let (mut codes, mut objects) = (Vec::new(), Vec::new());
    let count = stages(scenario, args).count();
    for (at, stage) in stages(scenario, args).enumerate() {
        let command = command_line(stage);
        let ended = match known.get(&command) {
            Some(ended) => ended.clone(),
            None => run(scenario, stage, args)?,
        };
        known.insert(command.clone(), ended.clone());
        let code = judge(stage, &ended);
        if args.output == Form::Text {
            let word = if code == 0 {
                "as expected"
            } else {
                "NOT as expected"
            };
            let Ended { line, .. } = &ended;
            println!("stage {} of {count}, {command}: {word}\n{line}\n", at + 1);
        }
        objects.push(json!({
            "level": stage.level, "expect": stage.expect, "command": command, "exit": ended.code,
            "as_expected": code == 0, "result": ended.object,
        }));
        codes.push(code);
    }
    let code = worst(&codes);
    tell(scenario, code, &codes, &objects, args.output);
    Ok(code)
}

fn tell(scenario: &Scenario, code: u8, codes: &[u8], objects: &[Value], form: Form) {
    let valid = match code {
        0 => Some(true),
        1 => Some(false),
        _ => None,
    };
    if form == Form::Json {
        let object =
            json!({"scenario": scenario.name, "title": scenario.title, "valid": valid, "stages": objects});
        println!("{object}");
        return;
    }
    let word = verdict(valid);
    let good = codes.iter().filter(|code| **code == 0).count();
    println!(
        "{word} scenario {}: {good} of {} stages as expected\n",
        scenario.name,
        codes.len()
    );
}

fn verdict(valid: Option<bool>) -> &'static str {
    match valid {
        Some(true) => "PASS",
        Some(false) => "FAIL",
        None => "UNKNOWN",
    }
}

/// A broken harness says nothing about the others; a violation is worse than not knowing.
fn worst(codes: &[u8]) -> u8 {
    let order = [BROKEN, crate::cli::USAGE, 1, 2];
    let found = order.into_iter().find(|code| codes.contains(code));
    found
        .or_else(|| codes.iter().copied().find(|code| *code != 0))
        .unwrap_or(0)
}

/// The exit code that a stage comes to, given how it had to end.
fn judge(stage: &Stage, ended: &Ended) -> u8 {
    match (stage.expect, ended.code) {
        (Expect::Valid, code) => code,
        (Expect::Violated, 1) => match stage.check.as_deref() {
            Some(check) if violates(&ended.object, check) => 0,
            _ => 1,
        },
        // It was not found: the harness has become blind to it.
        (Expect::Violated, 0) => 1,
        (Expect::Violated, code) => code,
    }
}

fn violates(object: &Value, check: &str) -> bool {
    let checks = object["checks"].as_array().into_iter().flatten();
    checks
        .into_iter()
        .any(|found| found["name"] == check && found["outcome"] == "invalid")
}

fn command_line(stage: &Stage) -> String {
    let command = match stage.level {
        Level::Sim => "sim",
        Level::Run => "run",
    };
    format!("jepsen {command} {}", stage.arguments().join(" "))
}

fn run(scenario: &Scenario, stage: &Stage, args: &ScenarioArgs) -> Result<Ended> {
    let own = std::env::current_exe().context("where is this program?")?;
    let mut command = match stage.level {
        Level::Sim => Command::new(own.with_file_name("jepsen-sim")),
        Level::Run => {
            let mut command = Command::new(&own);
            command.args(["run", "--name", &format!("scenario-{}", scenario.name)]);
            command.arg("--store").arg(&args.store);
            let folder: Option<&PathBuf> = args.binary.as_ref();
            folder.map(|folder| command.arg("--binary").arg(folder));
            command
        }
    };
    command
        .args(["--output", "json"])
        .args(stage.arguments())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| match stage.level {
        Level::Sim => "jepsen-sim is not next to jepsen: cargo build --workspace --bins".to_owned(),
        Level::Run => format!("{} does not start", own.display()),
    })?;
    let output = child.stdout.take().context("a stage has no output")?;
    let mut lines = Vec::new();
    for line in std::io::BufReader::new(output).lines() {
        lines.push(line?);
    }
    let status = child.wait()?;
    let code = status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(BROKEN);
    Ok(ended(stage.level, code, &lines))
}

fn ended(level: Level, code: u8, lines: &[String]) -> Ended {
    let last = lines
        .iter()
        .rev()
        .find(|line| !line.trim().is_empty())
        .cloned()
        .unwrap_or_default();
    let object: Value = serde_json::from_str(&last).unwrap_or(Value::Null);
    let line = match (level, serde_json::from_value::<Results>(object.clone())) {
        (Level::Run, Ok(results)) => results.line(),
        (Level::Sim, _) if object.is_object() => seeds_line(&object),
        _ => last,
    };
    Ended { code, line, object }
}

/// What seeds came to, and of each that failed how to see it again.
fn seeds_line(object: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut line = format!(
        "{} {} seeds={} ok={} fail={} info={} faults={}",
        verdict(object["valid"].as_bool()),
        text(&object["workload"]),
        text(&object["seed"]),
        object["ops"]["ok"],
        object["ops"]["fail"],
        object["ops"]["info"],
        object["faults"],
    );
    for failure in object["failures"].as_array().into_iter().flatten() {
        let (seed, what) = (&failure["seed"], text(&failure["what"]));
        line.push_str(&format!(
            "\nseed {seed}: {what}\n     replay: {}",
            text(&failure["replay"])
        ));
    }
    line
}

fn show(scenario: &Scenario, form: Form) {
    let commands: Vec<String> = scenario.stages.iter().map(command_line).collect();
    if form == Form::Json {
        let object = json!({
            "scenario": scenario.name, "title": scenario.title, "source": scenario.source, "story": scenario.story,
            "ours": scenario.ours, "mutants": scenario.mutants, "fixed": scenario.fixed,
            "reproduced": scenario.reproduced, "stages": commands,
        });
        println!("{object}");
        return;
    }
    println!("{}: {}\n{}\n", scenario.name, scenario.title, scenario.source);
    println!("What happened\n{}\n\nHere\n{}\n", scenario.story, scenario.ours);
    if let Some(commit) = &scenario.fixed {
        println!("Fixed by {commit}");
    }
    if let Some(when) = &scenario.reproduced {
        println!("Last reproduced: {when}");
    }
    if !scenario.mutants.is_empty() {
        println!(
            "Planted bugs that do the same: jepsen mutants --only {}",
            scenario.mutants.join(",")
        );
    }
    println!("\n{}", commands.join("\n"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(keys: &str) -> Stage {
        let text = format!("title=\"t\"\nsource=\"s\"\nstory=\"x\"\nours=\"y\"\n[[stage]]\n{keys}");
        scenario::read("it", &text).unwrap().stages[0].clone()
    }

    fn end(code: u8, object: Value) -> Ended {
        Ended {
            code,
            line: String::new(),
            object,
        }
    }

    #[test]
    fn a_stage_is_as_expected_or_not() {
        let valid = stage("level = \"sim\"\nseeds = \"1..2\"");
        for code in [0, 1, 2, 254, 255] {
            assert_eq!(judge(&valid, &end(code, Value::Null)), code);
        }
        let violated =
            stage("level = \"sim\"\nseeds = \"1..2\"\nexpect = \"violated\"\ncheck = \"lease.fence\"");
        let found = json!({"checks": [{"name": "lease.fence", "outcome": "invalid"}]});
        let other = json!({"checks": [{"name": "lease.fence", "outcome": "valid"}]});
        assert_eq!(judge(&violated, &end(1, found)), 0);
        assert_eq!(
            judge(&violated, &end(1, other)),
            1,
            "another check has found something else"
        );
        assert_eq!(judge(&violated, &end(0, Value::Null)), 1, "nothing was found");
        assert_eq!(judge(&violated, &end(255, Value::Null)), 255);
    }

    #[test]
    fn a_broken_harness_outweighs_a_verdict_and_a_violation_not_knowing() {
        assert_eq!(worst(&[0, 0]), 0);
        assert_eq!(worst(&[0, 2, 1]), 1);
        assert_eq!(worst(&[1, 255]), 255);
        assert_eq!(worst(&[2, 0]), 2);
        assert_eq!(worst(&[0, 77]), 77);
    }

    #[test]
    fn what_a_stage_printed_is_kept() {
        let object = json!({
            "valid": false, "workload": "mix", "seed": "1..400", "ops": {"ok": 5, "fail": 2, "info": 1}, "faults": 3,
            "failures": [{"seed": 7, "what": "two leaders", "replay": "jepsen-sim --seed 7 --trace"}],
        });
        let told = ended(
            Level::Sim,
            1,
            &["progress".to_owned(), object.to_string(), String::new()],
        );
        let expected = "FAIL mix seeds=1..400 ok=5 fail=2 info=1 faults=3\nseed 7: two leaders\n     \
                        replay: jepsen-sim --seed 7 --trace";
        assert_eq!(told.line, expected);
        assert_eq!(ended(Level::Sim, 255, &["it broke".to_owned()]).line, "it broke");
        assert_eq!(
            ended(Level::Run, 1, &["{\"valid\":false}".to_owned()]).object["valid"],
            false
        );
    }
}
