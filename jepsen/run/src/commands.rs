//! What each command of `jepsen` does.

pub mod run;
pub mod scenario;
