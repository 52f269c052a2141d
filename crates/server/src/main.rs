//! `palyrad`, one replica of a Palyra cluster: the command line only, all else is in the library.

use std::process::ExitCode;

/// Of RocksDB as well: see docs/decisions/allocator.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    palyra_server::main()
}
