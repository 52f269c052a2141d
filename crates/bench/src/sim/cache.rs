//! Credentials of paired nodes, kept with the cluster's folder: one JSON document a line.
//!
//! What never lives here: pairing. Invariants: the file is its owner's alone; a line that was cut off, or a
//! certificate that is about to run out, counts as a node that is not there, and a new one is paired for it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use palyra_client::wall_ms;
use palyra_pki::Credential;

/// A certificate that does not live this long any more is of no use for a run: agents renew at half of a day.
const LEFT_MS: u64 = 2 * 3_600_000;

/// The credentials that are good at `now_ms`, at most `wanted`.
pub(crate) fn read(path: &Path, wanted: usize, now_ms: u64) -> Result<Vec<Credential>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    let parsed = lines.filter_map(|line| Credential::from_json(&line).ok());
    let good = parsed.filter(|credential| {
        credential
            .identity()
            .is_ok_and(|peer| peer.not_after_ms > now_ms + LEFT_MS)
    });
    Ok(good.take(wanted).collect())
}

/// The file, for new credentials at its end.
pub(crate) struct Writer(std::fs::File);

impl Writer {
    /// Opens it, or makes it.
    pub(crate) fn open(path: &Path) -> Result<Writer> {
        let file = std::fs::File::options()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path);
        Ok(Writer(
            file.with_context(|| format!("cannot write {}", path.display()))?,
        ))
    }

    /// Adds a credential.
    pub(crate) fn add(&mut self, credential: &Credential) -> Result<()> {
        let mut line = serde_json::to_string(credential)?;
        line.push('\n');
        self.0.write_all(line.as_bytes())?;
        Ok(())
    }
}

/// The same with the clock of now.
pub(crate) fn read_now(path: &Path, wanted: usize) -> Result<Vec<Credential>> {
    read(path, wanted, wall_ms())
}

#[cfg(test)]
mod tests {
    use super::*;
    use palyra_client::fill_random;
    use palyra_pki::ca::HostNames;
    use palyra_pki::{Authority, KeyPair, Role, Root, SpiffeId, TrustBundle, TrustDomain};

    const CLUSTER: &str = "01ARZ3NDEKTSV4RRFFQ69G5FAV";

    fn credential(now: u64) -> Credential {
        let mut rng = fill_random;
        let domain = TrustDomain::for_cluster(CLUSTER).unwrap();
        let root = Root::create(CLUSTER, &domain, now, &mut rng).unwrap();
        let authority_key = KeyPair::generate(&mut rng).unwrap();
        let csr = authority_key.make_csr().unwrap();
        let signed = root.sign_authority(&csr, 1, now, &mut rng).unwrap();
        let authority = Authority::new(signed.der, authority_key).unwrap();
        let key = KeyPair::generate(&mut rng).unwrap();
        let id = SpiffeId::new(domain.clone(), Role::Node, CLUSTER).unwrap();
        let (csr, names) = (key.make_csr().unwrap(), HostNames::default());
        let leaf = authority
            .issue_from_csr(&csr, &id, 86_400_000, &names, now, &mut rng)
            .unwrap();
        let trust = TrustBundle::new(CLUSTER, domain, vec![root.der().to_vec()]).unwrap();
        let chain = [leaf.der, authority.der().to_vec()];
        Credential::new(&trust, vec!["127.0.0.1:1".to_owned()], &chain, &key).unwrap()
    }

    #[test]
    fn what_was_kept_is_read_until_it_runs_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nodes.jsonl");
        let now = wall_ms();
        assert_eq!(read(&path, 5, now).unwrap(), []);
        let made = credential(now);
        let mut writer = Writer::open(&path).unwrap();
        writer.add(&made).unwrap();
        writer.add(&made).unwrap();
        writer.0.write_all(b"{\"form\": 1, \"cut\":").unwrap();
        assert_eq!(read(&path, 5, now).unwrap(), [made.clone(), made.clone()]);
        assert_eq!(read(&path, 1, now).unwrap().len(), 1);
        assert_eq!(read(&path, 5, now + 23 * 3_600_000).unwrap(), []);
    }
}
