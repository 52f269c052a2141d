//! Half-done pairing exchanges: in memory, on the replica that began them, for two minutes.
//!
//! Invariants: an exchange belongs to the connection that began it and to no other; it is taken out to be
//! used, so two messages can't both use it; what proved right may be sent again, unchanged, on the same
//! connection, and gets the same answer; the number of exchanges is bounded, in all and per address.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use palyra_pki::{Transcript, pin};
use palyra_platform::{self as platform, Instant};
use palyra_state::Id;
use palyra_state::pairing::Prove;
use zeroize::Zeroizing;

use crate::caller::EnrolSource;
use crate::error::{Error, Refusal};
use crate::limits::EXCHANGE_LIFE;

/// Names an exchange: the server's nonce of a ticket exchange, or the attempt of a PIN exchange.
pub(crate) type Key = [u8; 32];

/// A PIN exchange between its second and its third message.
pub(crate) struct PinExchange {
    pub(crate) attempt_id: Id,
    pub(crate) code_id: Id,
    pub(crate) device_id: Id,
    pub(crate) csr_sha256: [u8; 32],
    pub(crate) server: pin::ServerState,
    pub(crate) transcript: Transcript,
}

/// A proof that was right; all that is left is to commit it and to answer.
#[derive(Clone)]
pub(crate) struct Proof {
    /// Digest of the message that proved it: the same message may come again.
    pub(crate) message: [u8; 32],
    pub(crate) request_id: Id,
    pub(crate) prove: Prove,
    pub(crate) key: Zeroizing<Vec<u8>>,
    pub(crate) transcript: Transcript,
}

/// How far an exchange has come.
pub(crate) enum Stage {
    /// A nonce was given.
    Nonce,
    /// The second message was answered.
    Pin(Box<PinExchange>),
    /// The proof was right.
    Proved(Box<Proof>),
}

struct Held {
    connection: u64,
    address: String,
    born: Instant,
    stage: Stage,
}

/// All half-done exchanges of this replica.
pub(crate) struct Exchanges {
    held: Mutex<BTreeMap<Key, Held>>,
    limit: usize,
    per_address: usize,
}

impl fmt::Debug for Exchanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Exchanges({})", self.lock().len())
    }
}

impl Exchanges {
    pub(crate) fn new(limit: usize, per_address: usize) -> Exchanges {
        Exchanges {
            held: Mutex::new(BTreeMap::new()),
            limit,
            per_address,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps an exchange. Of one address the oldest nonce gives way.
    ///
    /// # Errors
    /// [`Error::Busy`] when there are too many.
    pub(crate) fn put(&self, key: Key, source: &EnrolSource, stage: Stage) -> Result<(), Error> {
        let mut held = self.lock();
        held.retain(|_, exchange| exchange.born.elapsed() < EXCHANGE_LIFE);
        let same = held
            .values()
            .filter(|exchange| exchange.address == source.address)
            .count();
        if same >= self.per_address && !drop_oldest_nonce(&mut held, Some(&source.address)) {
            return Err(Error::Busy {
                what: "pairing exchanges from this address",
            });
        }
        if held.len() >= self.limit && !drop_oldest_nonce(&mut held, None) {
            return Err(Error::Busy {
                what: "pairing exchanges",
            });
        }
        let exchange = Held {
            connection: source.connection,
            address: source.address.clone(),
            born: platform::now(),
            stage,
        };
        held.insert(key, exchange);
        Ok(())
    }

    /// Takes an exchange out, if it belongs to this connection and is young enough.
    pub(crate) fn take(&self, key: &Key, source: &EnrolSource) -> Option<Stage> {
        let mut held = self.lock();
        let found = held.get(key)?;
        // A message from elsewhere must not end the exchange of who began it.
        if found.connection != source.connection || found.born.elapsed() >= EXCHANGE_LIFE {
            return None;
        }
        held.remove(key).map(|exchange| exchange.stage)
    }
}

fn drop_oldest_nonce(held: &mut BTreeMap<Key, Held>, address: Option<&str>) -> bool {
    let nonces = held.iter().filter(|(_, exchange)| {
        matches!(exchange.stage, Stage::Nonce) && address.is_none_or(|address| exchange.address == address)
    });
    let Some(oldest) = nonces
        .min_by_key(|(_, exchange)| exchange.born)
        .map(|(key, _)| *key)
    else {
        return false;
    };
    held.remove(&oldest).is_some()
}

/// The key of a PIN exchange.
pub(crate) fn attempt_key(attempt_id: Id) -> Key {
    let mut key = [0; 32];
    key[..16].copy_from_slice(&attempt_id.to_bytes());
    key
}

/// 32 bytes that a caller sent.
///
/// # Errors
/// [`Error::Invalid`] when there are more or fewer.
pub(crate) fn exactly_32(field: &'static str, bytes: &[u8]) -> Result<[u8; 32], Error> {
    bytes
        .try_into()
        .map_err(|_| Error::invalid(field, format!("{} bytes", bytes.len()), "send exactly 32 bytes"))
}

/// What a message for an exchange that is not there gets.
pub(crate) fn unknown(key_is_nonce: bool) -> Error {
    if key_is_nonce {
        Refusal::UnknownNonce.into()
    } else {
        Refusal::UnknownExchange.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(connection: u64, address: &str) -> EnrolSource {
        EnrolSource {
            connection,
            address: address.to_owned(),
            end_point: [0; 32],
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_exchange_is_its_connections_own_once_and_for_two_minutes() {
        let exchanges = Exchanges::new(8, 4);
        let mine = source(1, "a");
        exchanges.put([1; 32], &mine, Stage::Nonce).unwrap();
        assert!(
            exchanges.take(&[1; 32], &source(2, "a")).is_none(),
            "another connection"
        );
        assert!(
            exchanges.take(&[1; 32], &mine).is_some(),
            "and that did not end it"
        );
        assert!(exchanges.take(&[1; 32], &mine).is_none(), "used");
        exchanges.put([2; 32], &mine, Stage::Nonce).unwrap();
        platform::sleep(EXCHANGE_LIFE).await;
        assert!(exchanges.take(&[2; 32], &mine).is_none(), "too old");
    }

    #[tokio::test(start_paused = true)]
    async fn one_address_pushes_out_its_own_oldest_only() {
        let exchanges = Exchanges::new(8, 2);
        let (mine, other) = (source(1, "a"), source(2, "b"));
        exchanges.put([9; 32], &other, Stage::Nonce).unwrap();
        for key in 1..=3 {
            platform::sleep(std::time::Duration::from_millis(1)).await;
            exchanges.put([key; 32], &mine, Stage::Nonce).unwrap();
        }
        assert!(
            exchanges.take(&[1; 32], &mine).is_none(),
            "the oldest of the same address"
        );
        assert!(exchanges.take(&[3; 32], &mine).is_some());
        assert!(
            exchanges.take(&[9; 32], &other).is_some(),
            "another address is left alone"
        );
    }
}
