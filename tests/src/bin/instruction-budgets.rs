//! Runs the benchmarks that count instructions and compares each count with its budget in `tests/budgets.txt`.
//!
//! `instruction-budgets` compares, and fails with the names of those that went over; `--set NAME..` puts the budgets
//! of these names, or of all, a tenth above what is counted now. Invariants: what is counted has a budget and what has
//! a budget is counted; nothing here looks at a clock.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, bail, ensure};

/// The benchmarks, as `cargo bench` knows them.
const BENCHMARKS: [&str; 2] = ["commands", "readers"];
/// Where the budgets are, in the checkout.
const FILE: &str = "tests/budgets.txt";
/// A count below this part of its budget, in percent, is worth a lower budget.
const LOW: u64 = 75;

/// What one benchmark came to.
#[derive(Clone, Debug, PartialEq)]
struct Count {
    instructions: u64,
    /// The folder with the profile.
    profile: PathBuf,
}

type Counts = BTreeMap<String, Count>;
type Budgets = BTreeMap<String, u64>;

/// One line of the benchmarks' output: a benchmark's name and count.
fn count(line: &str) -> anyhow::Result<(String, Count)> {
    let told: serde_json::Value = serde_json::from_str(line)?;
    let word = |key: &str| told[key].as_str().with_context(|| format!("no {key} in {line}"));
    // What it was in an earlier run may stand beside it, as "old".
    let new = &told["profiles"][0]["data"]["total"]["metrics"]["Ir"]["values"]["new"];
    let count = Count {
        instructions: new.as_u64().with_context(|| format!("no count in {line}"))?,
        profile: word("output_dir")?.into(),
    };
    Ok((format!("{}.{}", word("function_name")?, word("id")?), count))
}

/// The budgets of a file: a name and a number a line.
fn budgets(text: &str) -> anyhow::Result<Budgets> {
    let lines = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    let mut found = Budgets::new();
    for line in lines {
        let (name, budget) = line.split_once(' ').with_context(|| format!("{FILE}: {line}"))?;
        let budget = budget
            .trim()
            .replace('_', "")
            .parse()
            .with_context(|| format!("{FILE}: {line}"))?;
        ensure!(
            found.insert(name.to_owned(), budget).is_none(),
            "{FILE} names {name} twice"
        );
    }
    Ok(found)
}

/// A tenth more, and of that three digits.
fn budget_of(instructions: u64) -> u64 {
    let wanted = instructions + instructions.div_ceil(10);
    let step = 10_u64.pow(wanted.max(1).ilog10().saturating_sub(2));
    wanted.div_ceil(step) * step
}

/// 1234567 as `1_234_567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push('_');
        }
        out.push(digit);
    }
    out
}

/// What is wrong, one text for each benchmark.
fn problems(counts: &Counts, budgets: &Budgets) -> Vec<String> {
    let mut found = Vec::new();
    for (name, count) in counts {
        let now = count.instructions;
        match budgets.get(name) {
            None => found.push(format!(
                "{name} has no budget: it takes {} instructions. Give it one: ./tests/run budgets --set {name}",
                grouped(now)
            )),
            Some(budget) if now > *budget => found.push(format!(
                "{name} takes {} instructions; its budget is {} ({} %).\n  \
                 Where they go: callgrind_annotate {}/*.out\n  \
                 If it is meant to be dearer: ./tests/run budgets --set {name}, and say in the commit why.",
                grouped(now),
                grouped(*budget),
                now * 100 / budget.max(&1),
                count.profile.display()
            )),
            Some(_) => {}
        }
    }
    let gone = budgets.keys().filter(|name| !counts.contains_key(*name));
    found.extend(gone.map(|name| format!("{name} has a budget in {FILE} and was not counted")));
    found
}

/// A line for each benchmark: its count, its budget, and how much of it is used.
fn table(counts: &Counts, budgets: &Budgets) -> String {
    let mut out = String::new();
    for (name, count) in counts {
        let now = count.instructions;
        let budget = budgets.get(name).copied().unwrap_or_default();
        let part = now * 100 / budget.max(1);
        let hint = if part < LOW {
            "  cheaper than it was: lower the budget"
        } else {
            ""
        };
        let (now, budget) = (grouped(now), grouped(budget));
        writeln!(out, "{name:<44} {now:>12} of {budget:>12} {part:>4} %{hint}").unwrap_or_default();
    }
    out
}

/// The file with the budgets of these names, or of all, put anew; those that are counted no more are dropped.
fn set(text: &str, counts: &Counts, names: &[String]) -> anyhow::Result<String> {
    let mut now = budgets(text)?;
    if let Some(unknown) = names.iter().find(|name| !counts.contains_key(*name)) {
        bail!("there is no benchmark {unknown}");
    }
    now.retain(|name, _| counts.contains_key(name));
    let chosen = counts
        .iter()
        .filter(|(name, _)| names.is_empty() || names.contains(name));
    now.extend(chosen.map(|(name, count)| (name.clone(), budget_of(count.instructions))));
    let comments = text
        .lines()
        .take_while(|line| line.is_empty() || line.starts_with('#'));
    let mut out: String = comments.flat_map(|line| [line, "\n"]).collect();
    for (name, budget) in now {
        writeln!(out, "{name:<44} {:>12}", grouped(budget))?;
    }
    Ok(out)
}

/// Runs the benchmarks, each in a process of its own under valgrind.
fn measure(root: &Path) -> anyhow::Result<Counts> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // The selection and the profile of every other build: see docs/decisions/builds.md.
    cargo.args(["bench", "--workspace", "--locked", "--profile", "dev"]);
    for benchmark in BENCHMARKS {
        cargo.args(["--bench", benchmark]);
    }
    cargo.args(["--", "--parallel=auto", "--output-format=json"]);
    let done = cargo.current_dir(root).stderr(Stdio::inherit()).output()?;
    ensure!(
        done.status.success(),
        "the benchmarks did not run: {}",
        done.status
    );
    let told = String::from_utf8(done.stdout)?;
    let lines = told.lines().filter(|line| line.starts_with('{'));
    let counts: Counts = lines.map(count).collect::<anyhow::Result<_>>()?;
    ensure!(!counts.is_empty(), "the benchmarks told nothing:\n{told}");
    Ok(counts)
}

fn run(words: &[String]) -> anyhow::Result<bool> {
    // `tests/run` stands at the top of its checkout; what this was built from may be another one.
    let root = Path::new(".");
    let file = root.join(FILE);
    let text = std::fs::read_to_string(&file).with_context(|| FILE.to_owned())?;
    match words.split_first() {
        None => {
            let budgets = budgets(&text)?;
            let counts = measure(root)?;
            print!("{}", table(&counts, &budgets));
            let problems = problems(&counts, &budgets);
            for problem in &problems {
                println!("error: {problem}");
            }
            Ok(problems.is_empty())
        }
        Some((word, names)) if word == "--set" => {
            let counts = measure(root)?;
            let text = set(&text, &counts, names)?;
            std::fs::write(&file, &text)?;
            print!("{}", table(&counts, &budgets(&text)?));
            Ok(true)
        }
        Some(_) => bail!("usage: instruction-budgets [--set [NAME..]]"),
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match run(&words) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn counted(name: &str, instructions: u64) -> Counts {
        let profile = PathBuf::from("/profiles/apply");
        let count = Count {
            instructions,
            profile,
        };
        Counts::from([(name.to_owned(), count)])
    }

    #[test]
    fn a_count_over_its_budget_is_told_with_all_that_one_needs() {
        let budgets = budgets("# comment\napply.one  1_100\n").unwrap();
        assert_eq!(
            problems(&counted("apply.one", 1_100), &budgets),
            Vec::<String>::new()
        );
        let told = problems(&counted("apply.one", 2_000), &budgets).remove(0);
        for part in [
            "apply.one",
            "2_000",
            "1_100",
            "181 %",
            "--set apply.one",
            "/profiles/apply",
        ] {
            assert!(told.contains(part), "{part}: {told}");
        }
    }

    #[test]
    fn what_is_counted_has_a_budget_and_what_has_a_budget_is_counted() {
        let told = problems(&counted("apply.one", 1), &budgets("apply.other 5").unwrap());
        assert!(
            told[0].contains("apply.one has no budget") && told[1].contains("apply.other"),
            "{told:?}"
        );
        assert!(budgets("apply.one 1\napply.one 2").is_err());
    }

    #[test]
    fn budgets_are_put_a_tenth_above_and_the_others_stay() {
        assert_eq!(
            [1, 999, 100_000, 225_697].map(budget_of),
            [2, 1_100, 110_000, 249_000]
        );
        let mut counts = counted("a.one", 1_000);
        counts.extend(counted("b.two", 1_000));
        let text = "# says what\n\na.one 900\nb.two 7\nc.gone 1\n";
        let one = set(text, &counts, &["a.one".to_owned()]).unwrap();
        assert!(one.starts_with("# says what\n\na.one"), "{one}");
        assert_eq!(
            budgets(&one).unwrap(),
            [("a.one".to_owned(), 1_100), ("b.two".to_owned(), 7)].into()
        );
        assert!(set(text, &counts, &["c.gone".to_owned()]).is_err());
    }

    #[test]
    fn a_line_of_the_benchmarks_is_read() {
        let line = |values: &str| {
            format!(
                "{{\"function_name\":\"apply\",\"id\":\"one\",\"output_dir\":\"/profiles/apply\",\"profiles\":\
                 [{{\"data\":{{\"total\":{{\"metrics\":{{\"Ir\":{{\"values\":{values}}}}}}}}}}}]}}"
            )
        };
        let wanted = counted("apply.one", 7).pop_first().unwrap();
        assert_eq!(count(&line("{\"new\":7}")).unwrap(), wanted);
        assert_eq!(count(&line("{\"new\":7,\"old\":9}")).unwrap(), wanted);
        assert!(count(&line("{}")).is_err());
    }
}
