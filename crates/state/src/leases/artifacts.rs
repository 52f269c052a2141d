//! Files of runs: how they arrive in pieces, and how long they are kept.
