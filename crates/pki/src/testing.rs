//! A seeded [`Entropy`] and ready-made authorities for this crate's own tests. Never compiled into the
//! library.

use crate::{Authority, Entropy, KeyPair, Root, TrustBundle, TrustDomain, sha256};

/// 2026-11-21 12:00:00 UTC.
pub(crate) const NOW: u64 = 1_795_262_400_000;
/// The cluster that tests belong to.
pub(crate) const CLUSTER: &str = "01JD7Z8QK3M5N7P9R1S3T5V7X9";
/// A device id.
pub(crate) const DEVICE: &str = "01JD7ZB2C4D6E8F0G1H3J5K7M9";

/// SHA-256 in counter mode over a seed.
pub(crate) struct Seeded {
    seed: u64,
    counter: u64,
}

impl Seeded {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, counter: 0 }
    }
}

impl Entropy for Seeded {
    fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(32) {
            let mut block = self.seed.to_be_bytes().to_vec();
            block.extend_from_slice(&self.counter.to_be_bytes());
            self.counter += 1;
            chunk.copy_from_slice(&sha256(&block)[..chunk.len()]);
        }
    }
}

/// A cluster's root, one authority, and the bundle that trusts them.
pub(crate) struct Cluster {
    pub(crate) root: Root,
    pub(crate) authority: Authority,
    pub(crate) bundle: TrustBundle,
    pub(crate) domain: TrustDomain,
}

/// Builds a cluster from a seed; two seeds give two clusters with the same names and different keys.
pub(crate) fn cluster(seed: u64) -> Cluster {
    let mut rng = Seeded::new(seed);
    let domain = TrustDomain::for_cluster(CLUSTER).unwrap();
    let root = Root::create(CLUSTER, &domain, NOW, &mut rng).unwrap();
    let key = KeyPair::generate(&mut rng).unwrap();
    let csr = key.make_csr().unwrap();
    let issued = root.sign_authority(&csr, 1, NOW, &mut rng).unwrap();
    let authority = Authority::new(issued.der, key).unwrap();
    let bundle = TrustBundle::new(CLUSTER, domain.clone(), vec![root.der().to_vec()]).unwrap();
    Cluster {
        root,
        authority,
        bundle,
        domain,
    }
}
