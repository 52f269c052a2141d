//! `jepsen`: attacks a cluster of real processes and says what it did wrong.

fn main() {}
