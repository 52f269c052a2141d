//! `jepsen mutants`: the harness put to the test. Bugs are planted in the product, one at a time, and each must be
//! caught by the check that it is named with.
//!
//! A mutant that another check catches first is told as such and does not count as killed: the check that was
//! written for it may be blind. One that nobody catches survives, and the command fails. Besides there are runs in
//! which nothing strikes, which must be refused as runs that test nothing.
//!
//! To add one: put `if palyra_fault::planted("its-name") { … }` with a comment `// Planted: …` where the bug would
//! be, give it a line in `table`, and run it: `jepsen mutants --only its-name`. When it survives, workload,
//! nemesis or check is too weak.
//!
//! Never here: what a bug does (it stands at its place in the product, behind `palyra_fault::planted`), and
//! simulation and runs themselves, which are executed as anybody would. Invariants: the programs that carry bugs
//! lie in a folder of their own, `planted`, never where somebody could take them for the product; a run that the
//! harness failed is no verdict.

mod build;
mod judge;
mod real;
mod report;
mod sim;
mod table;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};

pub use judge::{Fate, Judged};
pub use report::list;
pub use table::{Level, Mutant, mutants};

use crate::cli::{Form, Usage, duration};

/// What `jepsen mutants` takes.
#[derive(Clone, Debug, Args)]
pub struct MutantsArgs {
    /// Only these, by id or name: M6,flush-before-sync
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<String>,
    /// Only those of one level; both when absent
    #[arg(long, value_enum)]
    pub level: Option<Level>,
    /// Seeds that a simulated one may live for
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub seeds: u64,
    /// Seeds at a time
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=256))]
    pub jobs: u64,
    /// How long one run on real processes lasts
    #[arg(long, default_value = "60s", value_parser = duration)]
    pub time: Duration,
    /// Runs on real processes that one may live for
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub tries: u64,
    /// Folder of programs that were built with `--features planted`; built when absent
    #[arg(long)]
    pub binary: Option<PathBuf>,
    /// Form of the answer
    #[arg(long, short, value_enum, default_value_t = Form::Text)]
    pub output: Form,
}

/// Runs it. Answers the exit code: 1 when a mutant was not killed by its check.
///
/// # Errors
/// [`Usage`] when it was asked for wrongly; otherwise the harness failed.
pub fn main(args: &MutantsArgs) -> Result<u8> {
    let chosen = chosen(args)?;
    let wants = |level: Level| chosen.iter().any(|mutant| mutant.level == level);
    let programs = build::programs(args.binary.as_deref(), wants(Level::Sim), wants(Level::Real))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut judged = Vec::new();
    for mutant in &chosen {
        report::begin(args.output, mutant);
        let one = match mutant.level {
            Level::Sim => runtime.block_on(sim::run(mutant, &programs, args))?,
            Level::Real => runtime.block_on(real::run(mutant, &programs, args))?,
        };
        report::one(args.output, &one);
        judged.push(one);
    }
    report::all(args.output, &judged)?;
    Ok(u8::from(!judged.iter().all(Judged::is_killed)))
}

/// The mutants that were asked for, in the table's order.
fn chosen(args: &MutantsArgs) -> Result<Vec<Mutant>> {
    let known = |word: &String| mutants().any(|mutant| mutant.is(word));
    if let Some(word) = args.only.iter().find(|word| !known(word)) {
        return Err(Usage(format!("there is no mutant {word}; see: jepsen list mutants")).into());
    }
    let level = |mutant: &Mutant| args.level.is_none_or(|level| level == mutant.level);
    let named = |mutant: &Mutant| args.only.is_empty() || args.only.iter().any(|word| mutant.is(word));
    let chosen: Vec<Mutant> = mutants()
        .filter(|mutant| level(mutant) && named(mutant))
        .collect();
    ensure!(
        !chosen.is_empty(),
        Usage("none of these mutants is of that level; see: jepsen list mutants".to_owned())
    );
    Ok(chosen)
}

impl ValueEnum for Level {
    fn value_variants<'a>() -> &'a [Self] {
        &[Level::Sim, Level::Real]
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(self.as_str()))
    }
}
