//! Pairing: codes that operators mint, the enrol listener's exchanges, and the requests that operators
//! decide.
//!
//! What never lives here: the cryptography (`palyra_pki`) and the counting of attempts (`apply`).
//! Invariants: an attempt is in the log before anything is answered that depends on the secret; a certificate
//! is handed out only after the entry that approves it is committed; secrets are shown once and are never in
//! the log.

mod attempts;
pub(crate) mod codes;
pub(crate) mod enrol;
pub(crate) mod exchange;
pub(crate) mod requests;
