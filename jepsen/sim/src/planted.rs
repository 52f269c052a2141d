//! Bugs in the product's own code, for this run: `--planted NAME`, in a build with the feature `planted`.
//!
//! The bug is chosen by the environment, so that whatever is executed for a replay has it as well. Never here: the
//! bugs, which stand at their places in the product (`palyra_fault::planted`), and the list of them (jepsen/run).

use std::process::ExitCode;

/// Names the bug to whom this program executes.
const VARIABLE: &str = "PALYRA_PLANTED";

/// The bug of this run.
pub(crate) fn name() -> Option<String> {
    std::env::var(VARIABLE).ok().filter(|name| !name.is_empty())
}

/// Sees to it that this process has the bug: begins anew with it when it has not. `Some`: that cannot be.
pub(crate) fn plant(bug: Option<&str>) -> Option<ExitCode> {
    let wanted = bug.map(str::to_owned).or_else(name)?;
    if !cfg!(feature = "planted") {
        eprintln!(
            "this jepsen-sim has no planted bugs in it; build one that has: \
             cargo build -p palyra-jepsen-sim --features planted"
        );
        return Some(ExitCode::from(254));
    }
    if name().as_deref() == Some(wanted.as_str()) {
        return None;
    }
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => {
            eprintln!("this program does not find itself: {error}");
            return Some(ExitCode::from(255));
        }
    };
    use std::os::unix::process::CommandExt as _;
    let error = std::process::Command::new(program)
        .args(std::env::args_os().skip(1))
        .env(VARIABLE, &wanted)
        .exec();
    eprintln!("this program cannot be started again with {wanted} planted: {error}");
    Some(ExitCode::from(255))
}
