//! What each command of `jepsen` does.

pub mod check;
pub mod doctor;
pub mod list;
pub mod run;
pub mod scenario;
pub mod serve;
pub mod sim;
