//! `palyrad`, one replica of a Palyra cluster: the command line only, all else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    palyra_server::main()
}
