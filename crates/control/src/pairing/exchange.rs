//! Half-done pairing exchanges: in memory, on the replica that began them, for two minutes.
//!
//! Invariants: an exchange belongs to the connection that began it and to no other; it is taken out to be
//! used, so two messages can't both use it; what proved right may be sent again, unchanged, on the same
//! connection, and gets the same answer; the number of exchanges is bounded, in all and per source; a PIN
//! exchange, for which an attempt was counted, is never pushed out by another.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
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
    /// Of this replica's own making, and the same each time: a repetition is answered and not applied again.
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
    network: String,
    born: Instant,
    stage: Stage,
}

/// All half-done exchanges of this replica.
pub(crate) struct Exchanges {
    held: Mutex<BTreeMap<Key, Held>>,
    limit: usize,
    per_network: usize,
}

impl fmt::Debug for Exchanges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Exchanges({})", self.lock().len())
    }
}

impl Exchanges {
    pub(crate) fn new(limit: usize, per_network: usize) -> Exchanges {
        Exchanges {
            held: Mutex::new(BTreeMap::new()),
            limit,
            per_network,
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for one more exchange. Of one network the oldest nonce gives way or the oldest proof whose
    /// answer is kept for a repetition, of whichever there are more; of all others only a nonce.
    ///
    /// # Errors
    /// [`Error::Busy`] when there are too many that must stay.
    pub(crate) fn make_room(&self, source: &EnrolSource) -> Result<(), Error> {
        self.clear(&mut self.lock(), &network_of(&source.address))
    }

    fn clear(&self, held: &mut BTreeMap<Key, Held>, network: &str) -> Result<(), Error> {
        held.retain(|_, exchange| exchange.born.elapsed() < EXCHANGE_LIFE);
        let same = held
            .values()
            .filter(|exchange| exchange.network == network)
            .count();
        if same >= self.per_network && !push_out(held, Some(network)) {
            return Err(Error::Busy {
                what: "pairing exchanges from this address",
            });
        }
        if held.len() >= self.limit && !push_out(held, None) {
            return Err(Error::Busy {
                what: "pairing exchanges",
            });
        }
        Ok(())
    }

    /// Keeps an exchange, after making room for it.
    ///
    /// # Errors
    /// As [`Exchanges::make_room`].
    pub(crate) fn put(&self, key: Key, source: &EnrolSource, stage: Stage) -> Result<(), Error> {
        let network = network_of(&source.address);
        let mut held = self.lock();
        self.clear(&mut held, &network)?;
        let exchange = Held {
            connection: source.connection,
            network,
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

/// Drops the oldest exchange that nobody loses an attempt with; says whether there was one.
fn push_out(held: &mut BTreeMap<Key, Held>, network: Option<&str>) -> bool {
    // Where many machines pair from one address, answers that are kept for repetitions would soon have all places, and
    // each new nonce would push out the one before it. Of a network those give way first that are more.
    let same = |exchange: &Held| network == Some(exchange.network.as_str());
    let of_network = || held.values().filter(|exchange| same(exchange));
    let kept = of_network().filter(|exchange| matches!(exchange.stage, Stage::Proved(_)));
    let more_kept = kept.count() * 2 > of_network().count();
    let rank = |exchange: &Held| match exchange.stage {
        Stage::Nonce if network.is_none() || same(exchange) => Some(u8::from(more_kept)),
        Stage::Proved(_) if same(exchange) => Some(u8::from(!more_kept)),
        Stage::Nonce | Stage::Proved(_) | Stage::Pin(_) => None,
    };
    let droppable = held
        .iter()
        .filter_map(|(key, exchange)| Some(((rank(exchange)?, exchange.born), *key)));
    let Some((_, oldest)) = droppable.min() else {
        return false;
    };
    held.remove(&oldest).is_some()
}

/// What counts as one source: an IPv4 address, or the /64 of an IPv6 address, of which one customer has all.
fn network_of(address: &str) -> String {
    match address.parse::<IpAddr>().map(|address| address.to_canonical()) {
        Ok(IpAddr::V6(address)) => {
            let network = Ipv6Addr::from_bits(address.to_bits() >> 64 << 64);
            format!("{network}/64")
        }
        Ok(IpAddr::V4(address)) => address.to_string(),
        Err(_) => address.to_owned(),
    }
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
    async fn one_source_pushes_out_its_own_oldest_only() {
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

    fn transcript() -> Transcript {
        let code = "01JD7Z8QK3M5N7P9R1S3T5V7X9";
        let opening = palyra_pki::transcript::Opening {
            cluster_id: code,
            method: palyra_pki::Method::Pin,
            code_id: code,
            node_id: code,
            server_end_point: [0; 32],
            csr_sha256: [0; 32],
            node_nonce: [0; 32],
            server_nonce: [0; 32],
        };
        Transcript::new(&opening).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn kept_answers_of_many_machines_leave_room_for_nonces() {
        let proved = || {
            Stage::Proved(Box::new(Proof {
                message: [0; 32],
                request_id: Id::ZERO,
                prove: Prove::default(),
                key: Zeroizing::default(),
                transcript: transcript(),
            }))
        };
        let exchanges = Exchanges::new(64, 8);
        let mine = source(1, "a");
        for key in 1..=30 {
            platform::sleep(std::time::Duration::from_millis(1)).await;
            exchanges.put([key; 32], &mine, proved()).unwrap();
        }
        for key in 101..=104 {
            platform::sleep(std::time::Duration::from_millis(1)).await;
            exchanges.put([key; 32], &mine, Stage::Nonce).unwrap();
        }
        for key in 101..=104 {
            assert!(
                exchanges.take(&[key; 32], &mine).is_some(),
                "nonce {key} was pushed out by answers that are kept"
            );
        }
        assert!(
            exchanges.take(&[30; 32], &mine).is_some(),
            "and the newest answer is kept"
        );
    }

    fn pin_stage() -> Stage {
        let rng = &mut |out: &mut [u8]| out.fill(7);
        let code = "01JD7Z8QK3M5N7P9R1S3T5V7X9";
        let typed = pin::Pin::parse("12345678").unwrap();
        let verifier = pin::mint(&typed, code, rng).unwrap();
        let (_, ke1) = pin::client_begin(&typed, rng).unwrap();
        let (server, _) = pin::server_begin(&verifier, code, b"", &ke1, rng).unwrap();
        Stage::Pin(Box::new(PinExchange {
            attempt_id: Id::ZERO,
            code_id: Id::ZERO,
            device_id: Id::ZERO,
            csr_sha256: [0; 32],
            server,
            transcript: transcript(),
        }))
    }

    #[tokio::test(start_paused = true)]
    async fn a_counted_exchange_is_pushed_out_by_nobody() {
        let exchanges = Exchanges::new(2, 2);
        let (mine, other) = (source(1, "a"), source(2, "b"));
        exchanges.put([1; 32], &mine, pin_stage()).unwrap();
        exchanges.put([2; 32], &mine, Stage::Nonce).unwrap();
        exchanges.put([3; 32], &other, Stage::Nonce).unwrap();
        assert!(exchanges.take(&[2; 32], &mine).is_none(), "a nonce costs nothing");
        exchanges.put([4; 32], &mine, pin_stage()).unwrap();
        for source in [&mine, &other] {
            assert!(matches!(exchanges.make_room(source), Err(Error::Busy { .. })));
            assert!(exchanges.put([5; 32], source, Stage::Nonce).is_err());
        }
        assert!(matches!(exchanges.take(&[1; 32], &mine), Some(Stage::Pin(_))));
        assert!(matches!(exchanges.take(&[4; 32], &mine), Some(Stage::Pin(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_is_one_source_however_many_addresses_it_has() {
        let exchanges = Exchanges::new(8, 1);
        let (first, second) = (source(1, "2001:db8:1:2::1"), source(2, "2001:db8:1:2:ffff::9"));
        exchanges.put([1; 32], &first, Stage::Nonce).unwrap();
        exchanges.put([2; 32], &second, Stage::Nonce).unwrap();
        assert!(exchanges.take(&[1; 32], &first).is_none(), "one /64");
        exchanges
            .put([3; 32], &source(3, "2001:db8:1:3::1"), Stage::Nonce)
            .unwrap();
        assert!(exchanges.take(&[2; 32], &second).is_some(), "another /64");
        assert_eq!(network_of("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(network_of("192.0.2.1"), "192.0.2.1");
    }
}
