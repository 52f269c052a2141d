//! `jepsen`: attacks a cluster of real processes and says what it did wrong.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(jepsen::cli::main())
}
