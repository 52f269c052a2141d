//! Signatures that repeat. A test program of its own: the choice is one process's.
#![allow(clippy::unwrap_used, missing_docs)]

use palyra_pki::ca::HostNames;
use palyra_pki::keys::{check_csr, sign_repeatably};
use palyra_pki::{Authority, KeyPair, Root, SpiffeId, TrustBundle, TrustDomain};

const NOW: u64 = 1_767_225_600_000;

/// Everything that a cluster signs at its birth, from a source of chance that begins at `seed`.
fn chain(seed: u8) -> Vec<Vec<u8>> {
    let mut count = seed;
    let mut rng = move |out: &mut [u8]| {
        for byte in out {
            count = count.wrapping_mul(37).wrapping_add(11);
            *byte = count;
        }
    };
    let domain = TrustDomain::for_cluster("01KE000000000000000000000A").unwrap();
    let root = Root::create("01KE000000000000000000000A", &domain, NOW, &mut rng).unwrap();
    let key = KeyPair::generate(&mut rng).unwrap();
    let csr = key.make_csr().unwrap();
    check_csr(&csr).unwrap();
    let signed = root.sign_authority(&csr, 1, NOW, &mut rng).unwrap();
    let authority = Authority::new(signed.der.clone(), key).unwrap();
    let node = KeyPair::generate(&mut rng).unwrap().make_csr().unwrap();
    let id = SpiffeId::parse(&format!("spiffe://{domain}/node/01KE000000000000000000000B")).unwrap();
    let leaf = authority
        .issue_from_csr(&node, &id, 3_600_000, &HostNames::default(), NOW, &mut rng)
        .unwrap();
    let roots = vec![root.der().to_vec()];
    TrustBundle::new("01KE000000000000000000000A", domain, roots).unwrap();
    vec![root.der().to_vec(), csr, signed.der, leaf.der]
}

#[test]
fn the_same_chance_signs_the_same_bytes() {
    sign_repeatably();
    let one = chain(3);
    assert_eq!(one, chain(3), "and what checks signatures has taken them");
    assert_ne!(one, chain(5));
}
