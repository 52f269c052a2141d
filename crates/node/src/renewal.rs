//! What has to be known from one renewal to the next: the counter that the cluster keeps too, and the key of a
//! request that was not answered yet. In `identity/renewal.json`.
//!
//! What never lives here: the request itself (see `link` and `recover`).
//!
//! Invariants: key and counter are on disk before the request that uses them is sent, so that a request whose answer
//! was lost is sent again as it was, and is not taken for that of a copy of this folder; a counter that was answered
//! is on disk before the certificate that came with it.

use palyra_client::fill_random;
use palyra_pki::KeyPair;
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use crate::{Error, Home, Kind, Result};

const FILE: &str = "identity/renewal.json";

#[derive(Default, Serialize, Deserialize)]
struct Kept {
    /// Of the last renewal that was taken; 0 before the first.
    counter: u64,
    /// A request that was not answered, or whose certificate is not stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pending: Option<Pending>,
}

#[derive(Serialize, Deserialize)]
struct Pending {
    /// PKCS#8, PEM.
    key: String,
    counter: u64,
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

/// What the next request asks for.
#[derive(Debug)]
pub(crate) struct Request {
    /// A fresh key, or that of the request that was not answered.
    pub(crate) key: KeyPair,
    /// One more than the last that was taken.
    pub(crate) counter: u64,
}

/// The next request. `held` are the keys of stored certificates: a request for one of them was answered.
pub(crate) fn prepare(home: &Home, held: &[[u8; 32]]) -> Result<Request> {
    let mut kept: Kept = home.read_json(FILE)?.unwrap_or_default();
    if let Some(pending) = &kept.pending {
        let key = KeyPair::from_pem(&pending.key).map_err(|error| broken(home, &error.to_string()))?;
        if !held.contains(&key.spki_sha256()) {
            let counter = pending.counter;
            return Ok(Request { key, counter });
        }
        kept.counter = kept.counter.max(pending.counter);
    }
    let key = KeyPair::generate(&mut fill_random)
        .map_err(|error| Error::new(Kind::Internal, "N0001", error.to_string(), ""))?;
    let counter = kept.counter.saturating_add(1);
    kept.pending = Some(Pending {
        key: key.to_pem().to_string(),
        counter,
    });
    home.write_json(FILE, &kept, 0o600)?;
    Ok(Request { key, counter })
}

/// The request was answered, under this counter. To be called before the certificate is stored.
pub(crate) fn answered(home: &Home, counter: u64) -> Result<()> {
    let mut kept: Kept = home.read_json(FILE)?.unwrap_or_default();
    kept.counter = counter;
    if let Some(pending) = kept.pending.as_mut() {
        pending.counter = counter;
    }
    home.write_json(FILE, &kept, 0o600)
}

/// The certificate is stored: the next request takes another key.
pub(crate) fn stored(home: &Home) -> Result<()> {
    let mut kept: Kept = home.read_json(FILE)?.unwrap_or_default();
    kept.pending = None;
    home.write_json(FILE, &kept, 0o600)
}

/// A new identity begins to count anew.
pub(crate) fn forget(home: &Home) -> Result<()> {
    home.remove(FILE)
}

/// The counter of the last renewal that was taken.
pub(crate) fn counter(home: &Home) -> u64 {
    let kept = home.read_json::<Kept>(FILE).ok().flatten();
    kept.map_or(0, |kept| kept.counter)
}

fn broken(home: &Home, why: &str) -> Error {
    Error::new(
        Kind::Precondition,
        "N0104",
        format!("{} is broken: {why}", home.dir().join(FILE).display()),
        "restore the file from a copy, or pair again: palyra node pair --replace",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn home() -> (tempfile::TempDir, Home) {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::create(&dir.path().join("home")).unwrap();
        (dir, home)
    }

    #[test]
    fn a_request_is_the_same_until_its_certificate_is_stored() {
        let (_dir, home) = home();
        let first = prepare(&home, &[]).unwrap();
        let again = prepare(&home, &[[7; 32]]).unwrap();
        assert_eq!(
            (first.key.spki_sha256(), first.counter),
            (again.key.spki_sha256(), again.counter)
        );
        assert_eq!((first.counter, counter(&home)), (1, 0));
        answered(&home, 1).unwrap();
        let after_a_crash = prepare(&home, &[]).unwrap();
        assert_eq!(after_a_crash.key.spki_sha256(), first.key.spki_sha256());
        assert_eq!((after_a_crash.counter, counter(&home)), (1, 1));
        stored(&home).unwrap();
        let next = prepare(&home, &[]).unwrap();
        assert_ne!(next.key.spki_sha256(), first.key.spki_sha256());
        assert_eq!(next.counter, 2);
    }

    #[test]
    fn a_stored_certificate_says_that_its_request_is_over() {
        let (_dir, home) = home();
        let first = prepare(&home, &[]).unwrap();
        // The cluster counts from elsewhere: an operator vouched for this machine.
        answered(&home, 9).unwrap();
        let next = prepare(&home, &[first.key.spki_sha256()]).unwrap();
        assert_ne!(next.key.spki_sha256(), first.key.spki_sha256());
        assert_eq!(next.counter, 10);
    }

    #[test]
    fn nothing_is_asked_that_is_not_on_disk() {
        let (_dir, home) = home();
        std::fs::create_dir(home.dir().join("identity/renewal.json.tmp")).unwrap();
        assert_eq!(prepare(&home, &[]).unwrap_err().code, "N0001");
    }
}
