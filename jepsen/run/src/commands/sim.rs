//! `jepsen sim`: the simulation is a program of its own, next to this one, because it replaces functions of C for
//! the whole process.

use std::os::unix::process::CommandExt as _;

use anyhow::{Context, Result, ensure};

use crate::cli::SimArgs;

/// Becomes `jepsen-sim`.
///
/// # Errors
/// When it is not there.
pub fn main(args: &SimArgs) -> Result<u8> {
    let own = std::env::current_exe().context("where is this program?")?;
    let sim = own.with_file_name("jepsen-sim");
    ensure!(
        sim.is_file(),
        "{} is not there: cargo build --workspace --bins",
        sim.display()
    );
    let error = std::process::Command::new(&sim).args(&args.arguments).exec();
    Err(error).with_context(|| format!("{} does not start", sim.display()))
}
