//! Keys and certificates of a simulated cluster: its root, the key that seals keys, and each replica's authority, as
//! real ones as in production, the same in each seed. What a replica's own disk would keep outlives its deaths here.
//!
//! Never here: certificates of devices and of the operator. Those are stand-ins (see `fleet`): the state machine and
//! the control layer compare their bytes and times, and only TLS, which is left out, looks inside of them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use palyra_control::Keys;
use palyra_pki::seal::Purpose;
use palyra_pki::{Authority, Entropy, Kek, KeyPair, PeerIdentity, Role, Root, SpiffeId, TrustDomain};
use palyra_platform as platform;
use palyra_state::Id;
use palyra_state::identity::NewCertificate;

use crate::chance::Stream;
use crate::world::EPOCH_MS;

/// What is made here is made from sound input; anything else is a bug of the simulation, and ends the seed as one.
const SOUND: &str = "keys of a simulated cluster can be made";
/// The cluster: of the same name in each seed, so that its papers are made once for all of them.
pub(crate) const CLUSTER: Id = Id::from_bytes(*b"a simulated one.");
/// Authorities that are made beforehand.
const STOCKED: u64 = 6;

/// An authority's certificate and its key.
struct Stored {
    der: Vec<u8>,
    key: Arc<KeyPair>,
}

/// What the process that starts the seeds makes for all of them.
struct Stock {
    domain: TrustDomain,
    root: Root,
    kek: Kek,
    authorities: Vec<Arc<Stored>>,
}

static STOCK: LazyLock<Stock> = LazyLock::new(|| {
    let rng = &mut numbers("root");
    let name = CLUSTER.to_string();
    let domain = TrustDomain::for_cluster(&name).expect(SOUND);
    let root = Root::create(&name, &domain, EPOCH_MS, rng).expect(SOUND);
    Stock {
        authorities: (1..=STOCKED).map(|replica| stored(&root, replica)).collect(),
        kek: Kek::generate(rng),
        domain,
        root,
    }
});

/// Has signatures made repeatably, and makes what all seeds share. On a thread of its own, for maps count on each
/// thread how many there were, and a seed's is to begin at none.
pub(crate) fn warm_up() {
    palyra_pki::keys::sign_repeatably();
    let maker = std::thread::spawn(|| {
        LazyLock::force(&STOCK);
    });
    maker.join().expect(SOUND);
}

/// The same numbers in each seed and process.
fn numbers(purpose: &str) -> impl Entropy + use<> {
    let mut stream = Stream::new(0, purpose);
    move |out: &mut [u8]| {
        for part in out.chunks_mut(8) {
            part.copy_from_slice(&stream.next().to_le_bytes()[..part.len()]);
        }
    }
}

fn stored(root: &Root, replica: u64) -> Arc<Stored> {
    let rng = &mut numbers(&format!("authority {replica}"));
    let key = KeyPair::generate(rng).expect(SOUND);
    let csr = key.make_csr().expect(SOUND);
    let signed = root.sign_authority(&csr, replica, EPOCH_MS, rng).expect(SOUND);
    Arc::new(Stored {
        der: signed.der,
        key: Arc::new(key),
    })
}

/// The papers of the cluster.
#[derive(Default)]
pub(crate) struct Papers {
    /// Of replicas beyond those that are stocked.
    more: RefCell<BTreeMap<u64, Arc<Stored>>>,
}

impl Papers {
    /// The cluster's trust domain.
    pub(crate) fn domain(&self) -> &TrustDomain {
        &STOCK.domain
    }

    /// The root's certificate.
    pub(crate) fn root_der(&self) -> Vec<u8> {
        STOCK.root.der().to_vec()
    }

    /// The root's key as the state holds it.
    pub(crate) fn root_key_sealed(&self) -> Vec<u8> {
        let context = CLUSTER.to_string();
        let key = STOCK.root.key().to_pkcs8();
        let sealed = STOCK.kek.seal(
            Purpose::RootKey,
            context.as_bytes(),
            key,
            &mut platform::fill_random,
        );
        sealed.expect(SOUND)
    }

    fn stored(&self, replica: u64) -> Arc<Stored> {
        let stocked = usize::try_from(replica - 1)
            .ok()
            .and_then(|at| STOCK.authorities.get(at));
        match stocked {
            Some(stored) => Arc::clone(stored),
            None => Arc::clone(
                self.more
                    .borrow_mut()
                    .entry(replica)
                    .or_insert_with(|| stored(&STOCK.root, replica)),
            ),
        }
    }

    /// The certificate of a replica's authority.
    pub(crate) fn authority(&self, replica: u64) -> Vec<u8> {
        self.stored(replica).der.clone()
    }

    /// What a replica starts with.
    pub(crate) fn keys(&self, replica: u64) -> Keys {
        let stored = self.stored(replica);
        let key = Arc::clone(&stored.key);
        Keys {
            authority: Authority::new(stored.der.clone(), key).expect(SOUND),
            kek: STOCK.kek.clone(),
        }
    }

    /// A holder as TLS would show it to the control layer.
    pub(crate) fn peer(&self, role: Role, name: &str, certificate: &NewCertificate) -> PeerIdentity {
        PeerIdentity {
            id: SpiffeId::new(STOCK.domain.clone(), role, name).expect(SOUND),
            fingerprint: certificate.fingerprint().to_bytes(),
            serial: hex(&certificate.serial),
            not_before_ms: certificate.not_before,
            not_after_ms: certificate.not_after,
            spki_sha256: certificate.spki.to_bytes(),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
