//! Keys and certificates of a simulated cluster: its root, the key that seals keys, and each replica's authority, as
//! real ones as in production, from the seed. What a replica's own disk would keep outlives its deaths here.
//!
//! Never here: certificates of devices and of the operator. Those are stand-ins (see `fleet`): the state machine and
//! the control layer compare their bytes and times, and only TLS, which is left out, looks inside of them.

use std::cell::RefCell;
use std::collections::BTreeMap;

use palyra_control::Keys;
use palyra_pki::seal::Purpose;
use palyra_pki::{Authority, Kek, KeyPair, PeerIdentity, Role, Root, SpiffeId, TrustDomain};
use palyra_platform as platform;
use palyra_state::Id;
use palyra_state::identity::NewCertificate;

use crate::world::EPOCH_MS;

/// What is made here is made from sound input; anything else is a bug of the simulation, and ends the seed as one.
const SOUND: &str = "keys of a simulated cluster can be made";

/// An authority's certificate and its key.
struct Stored {
    der: Vec<u8>,
    pkcs8: Vec<u8>,
}

/// The papers of one cluster.
pub(crate) struct Papers {
    domain: TrustDomain,
    root: Root,
    kek: Kek,
    authorities: RefCell<BTreeMap<u64, Stored>>,
}

fn rng(out: &mut [u8]) {
    platform::fill_random(out);
}

impl Papers {
    /// Those of a new cluster.
    pub(crate) fn new(cluster_id: Id) -> Self {
        let name = cluster_id.to_string();
        let domain = TrustDomain::for_cluster(&name).expect(SOUND);
        let root = Root::create(&name, &domain, EPOCH_MS, &mut rng).expect(SOUND);
        Papers {
            domain,
            root,
            kek: Kek::generate(&mut rng),
            authorities: RefCell::default(),
        }
    }

    /// The cluster's trust domain.
    pub(crate) fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The root's certificate.
    pub(crate) fn root_der(&self) -> Vec<u8> {
        self.root.der().to_vec()
    }

    /// The root's key as the state holds it.
    pub(crate) fn root_key_sealed(&self, cluster_id: Id) -> Vec<u8> {
        let context = cluster_id.to_string();
        let key = self.root.key().to_pkcs8();
        let sealed = self.kek.seal(Purpose::RootKey, context.as_bytes(), key, &mut rng);
        sealed.expect(SOUND)
    }

    /// Makes the authority of a replica, unless it has one; its certificate.
    pub(crate) fn authority(&self, replica: u64) -> Vec<u8> {
        if let Some(stored) = self.authorities.borrow().get(&replica) {
            return stored.der.clone();
        }
        let key = KeyPair::generate(&mut rng).expect(SOUND);
        let csr = key.make_csr().expect(SOUND);
        let signed = self
            .root
            .sign_authority(&csr, replica, EPOCH_MS, &mut rng)
            .expect(SOUND);
        let stored = Stored {
            der: signed.der.clone(),
            pkcs8: key.to_pkcs8().to_vec(),
        };
        self.authorities.borrow_mut().insert(replica, stored);
        signed.der
    }

    /// What a replica starts with.
    pub(crate) fn keys(&self, replica: u64) -> Keys {
        let der = self.authority(replica);
        let key = KeyPair::from_pkcs8(&self.authorities.borrow()[&replica].pkcs8).expect(SOUND);
        Keys {
            authority: Authority::new(der, key).expect(SOUND),
            kek: self.kek.clone(),
        }
    }

    /// A holder as TLS would show it to the control layer.
    pub(crate) fn peer(&self, role: Role, name: &str, certificate: &NewCertificate) -> PeerIdentity {
        PeerIdentity {
            id: SpiffeId::new(self.domain.clone(), role, name).expect(SOUND),
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
